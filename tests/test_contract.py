"""What every registered model promises: the theorems of lightning_genmodels.testing, and arguments that are refused."""

from __future__ import annotations

import pytest
import torch

from lightning_genmodels import list_models
from lightning_genmodels.base import ExplicitModel, LatentVariableModel
from lightning_genmodels.errors import ImageError, OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.testing import check_model, tiny
from lightning_genmodels.weights.names import model_class, model_name

MODELS = list_models()


def of_kind(*kinds: type) -> list[str]:
    return [name for name in MODELS if issubclass(model_class(name), kinds)]


@pytest.mark.parametrize("name", MODELS)
def test_every_theorem_holds(name: str) -> None:
    check_model(model_class(name))


@pytest.mark.parametrize("name", MODELS)
def test_registered_under_its_name(name: str) -> None:
    assert model_name(model_class(name)) == name


@pytest.mark.parametrize("name", MODELS)
def test_samples_that_make_no_sense_are_refused(name: str) -> None:
    model = tiny(model_class(name))
    with pytest.raises(OptionError, match="at least 0, got -1"):
        model.sample(-1)
    with pytest.raises(OptionError, match=r"a whole number of at least 0, got 2\.0"):
        model.sample(2.0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"expected a torch\.Generator, got 0"):
        model.sample(2, generator=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", of_kind(ExplicitModel, LatentVariableModel))
def test_bad_images_are_refused(name: str) -> None:
    model = tiny(model_class(name))
    use = model.log_prob if isinstance(model, ExplicitModel) else model.elbo
    good = all_images(model.event_shape)[:3]
    with pytest.raises(ImageError, match="expected images of shape"):
        use(good[0])
    with pytest.raises(ImageError, match=r"expected pixels in \{0, 1\}, got values from 0 to 255"):
        use(good * 0 + torch.tensor([0.0, 255.0] * 50)[: good.numel()].view_as(good))
    with pytest.raises(ImageError, match="NaN"):
        use(good * float("nan"))


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_bounds_of_other_noise_differ(name: str) -> None:
    model = tiny(model_class(name))
    x = all_images(model.event_shape)[:6]
    first, second = (model.iw_bound(x, 30, generator=keyed_generators(seed, range(6))) for seed in (7, 8))
    assert not torch.allclose(first, second, atol=1e-9)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        model.iw_bound(x, 0)


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_encode_and_decode_shapes(name: str) -> None:
    model = tiny(model_class(name))
    x = all_images(model.event_shape)[:4]
    codes = model.encode(x)
    assert codes.shape == (4, model.num_latents) == model.sample_latent(4).shape
    assert model.decode(codes).shape == x.shape
    assert model.decode(codes[None].expand(3, -1, -1)).shape == (3, *x.shape)
