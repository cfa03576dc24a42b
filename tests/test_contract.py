"""What every model promises, stated as properties and checked on a tiny instance of each, in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import all_images
from torch import Tensor

from lightning_genmodels import base, list_models
from lightning_genmodels.base import ExplicitModel, GenerativeModel, LatentVariableModel, TabularModel
from lightning_genmodels.errors import ImageError, OptionError
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.weights.names import model_class, model_name

MODELS = list_models()


def of_kind(kind: type) -> list[str]:
    return [name for name in MODELS if issubclass(model_class(name), kind)]


def build(name: str) -> GenerativeModel:
    """A tiny instance with parameters far from their initial values, in float64."""
    cls = model_class(name)
    torch.manual_seed(0)
    model = cls(**cls.small).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return model


def frequencies(samples: Tensor, event_shape: tuple[int, int, int]) -> Tensor:
    powers = 2 ** torch.arange(math.prod(event_shape) - 1, -1, -1)
    codes = (samples.flatten(1).long() * powers).sum(1)
    return torch.bincount(codes, minlength=2 ** math.prod(event_shape)).double()


def assert_frequencies_match(samples: Tensor, probabilities: Tensor, event_shape: tuple[int, int, int]) -> None:
    """Chi-square over cells with at least five expected images (the rest pooled), within 5 standard deviations."""
    expected = probabilities * len(samples)
    found = frequencies(samples, event_shape)
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    found = torch.cat([found[common], found[~common].sum()[None]])
    keep = expected > 0.5
    chi_square = ((found - expected)[keep].square() / expected[keep]).sum()
    degrees = int(keep.sum()) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees) + 5


@pytest.mark.parametrize("name", MODELS)
def test_registered_under_its_name(name: str) -> None:
    assert model_name(model_class(name)) == name


@pytest.mark.parametrize("name", MODELS)
def test_final_methods_are_not_overridden(name: str) -> None:
    cls = model_class(name)
    kinds = [kind for kind in vars(base).values() if isinstance(kind, type) and issubclass(kind, GenerativeModel)]
    for kind in kinds:
        for attribute, value in vars(kind).items():
            function = value.__func__ if isinstance(value, classmethod) else value
            if getattr(function, "__final__", False) and issubclass(cls, kind):
                owner = next(c for c in cls.__mro__ if attribute in vars(c))
                assert owner.__module__.startswith(base.__name__), f"{cls.__name__} overrides the final {attribute}"


@pytest.mark.parametrize("name", MODELS)
def test_state_round_trip(name: str, tmp_path: Path) -> None:
    model = build(name).float()
    model.save_pretrained(tmp_path)
    loaded = GenerativeModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key
    first, second = (m.sample(5, generator=torch.Generator().manual_seed(1)) for m in (model, loaded))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in list_models()
        if hasattr(model_class(name), "training_loss") and name not in of_kind(TabularModel)
    ],
)
def test_gradients_reach_every_trained_parameter(name: str) -> None:
    model = build(name).train()
    x = all_images(model.event_shape)
    loss = sum(model.training_loss(x) for _ in range(4))
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert bool((parameter.grad != 0).any()), key


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_binary_and_reproducible(name: str) -> None:
    model = build(name).float()
    first = model.sample(7, generator=torch.Generator().manual_seed(3))
    assert first.shape == (7, *model.event_shape)
    assert first.dtype == torch.float32
    assert bool(((first == 0) | (first == 1)).all())
    assert torch.equal(first, model.sample(7, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(
        model.sample(50, generator=torch.Generator().manual_seed(3)),
        model.sample(50, generator=torch.Generator().manual_seed(4)),
    )
    assert model.sample(0).shape == (0, *model.event_shape)
    with pytest.raises(OptionError, match="at least 0, got -1"):
        model.sample(-1)
    with pytest.raises(OptionError, match=r"a whole number of at least 0, got 2\.0"):
        model.sample(2.0)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"expected a torch\.Generator, got 0"):
        model.sample(2, generator=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_sampling_in_chunks_has_the_right_number(name: str) -> None:
    model = build(name)
    assert model.sample(model.sample_chunk + 3).shape[0] == model.sample_chunk + 3


@pytest.mark.parametrize("name", of_kind(ExplicitModel))
def test_probabilities_of_all_images_sum_to_one(name: str) -> None:
    model = build(name)
    log_prob = model.log_prob(all_images(model.event_shape))
    assert log_prob.shape == (2 ** math.prod(model.event_shape),)
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", of_kind(ExplicitModel))
def test_sample_frequencies_match_probabilities(name: str) -> None:
    model = build(name)
    probabilities = model.log_prob(all_images(model.event_shape)).exp().detach()
    samples = model.sample(20_000, generator=torch.Generator().manual_seed(5))
    assert_frequencies_match(samples, probabilities, model.event_shape)


@pytest.mark.parametrize("name", of_kind(ExplicitModel))
def test_log_prob_does_not_depend_on_the_batch(name: str) -> None:
    model = build(name)
    x = all_images(model.event_shape)
    alone = torch.cat([model.log_prob(image[None]) for image in x[:6]])
    assert torch.allclose(alone, model.log_prob(x)[:6], atol=1e-10)


@pytest.mark.parametrize("name", of_kind(ExplicitModel) + of_kind(LatentVariableModel))
def test_bad_images_are_refused(name: str) -> None:
    model = build(name)
    use = model.log_prob if isinstance(model, ExplicitModel) else model.elbo
    good = all_images(model.event_shape)[:3]
    with pytest.raises(ImageError, match="expected images of shape"):
        use(good[0])
    with pytest.raises(ImageError, match=r"expected pixels in \{0, 1\}, got values from 0 to 255"):
        use(good * 0 + torch.tensor([0.0, 255.0] * 50)[: good.numel()].view_as(good))
    with pytest.raises(ImageError, match="NaN"):
        use(good * float("nan"))
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        assert torch.isfinite(use(good.to(dtype))).all()


@pytest.mark.parametrize("name", of_kind(TabularModel))
def test_counts_add_up_over_batches(name: str) -> None:
    model = build(name)
    assert isinstance(model, TabularModel)
    x = all_images(model.event_shape)
    x = x[torch.randint(len(x), (50,), generator=torch.Generator().manual_seed(0))]
    whole = model.statistics(x)
    assert torch.equal(whole, sum(model.statistics(part) for part in x.split(7)))
    model.fit_statistics(whole)
    trained = model.log_prob(x).mean()
    assert trained > model_class(name)(**model_class(name).small).double().log_prob(x).mean()


@pytest.mark.parametrize("name", of_kind(ExplicitModel) + of_kind(LatentVariableModel))
@torch.no_grad()
def test_mixed_precision_sums_in_float32(name: str) -> None:
    model = build(name).float()
    x = all_images(model.event_shape)[:20].float()

    def score() -> Tensor:
        if isinstance(model, ExplicitModel):
            return model.log_prob(x)
        assert isinstance(model, LatentVariableModel)
        return model.iw_bound(x, 20, generator=keyed_generators(0, range(len(x))))

    whole = score()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = score()
    assert mixed.dtype in (torch.float32, torch.float64)
    assert torch.allclose(mixed.double(), whole.double(), atol=0.1)


# Latent-variable models. The quadrature below is exact to many digits: a fine grid over a latent space of at most two
# dimensions, far beyond where the prior has mass.


def log_likelihood_by_quadrature(model: LatentVariableModel, x: Tensor) -> Tensor:
    width = model.encode(x[:1]).shape[1]
    assert width <= 2, "the contract's quadrature needs a latent space of at most two dimensions"
    line = torch.linspace(-9.0, 9.0, 301, dtype=torch.float64)
    z = torch.cartesian_prod(*[line] * width).view(-1, width)  # (G, D)
    cell = (line[1] - line[0]).item() ** width
    log_joint = torch.cat([model.log_joint(x, part[:, None]) for part in z.split(5000)])  # (G, B)
    return torch.logsumexp(log_joint, dim=0) + math.log(cell)


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_marginals_of_all_images_sum_to_one(name: str) -> None:
    model = build(name)
    log_likelihood = log_likelihood_by_quadrature(model, all_images(model.event_shape))
    assert log_likelihood.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_sample_frequencies_match_marginals(name: str) -> None:
    model = build(name)
    probabilities = log_likelihood_by_quadrature(model, all_images(model.event_shape)).exp()
    samples = model.sample(20_000, generator=torch.Generator().manual_seed(5))
    assert_frequencies_match(samples, probabilities, model.event_shape)


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_mean_log_weight_is_the_elbo(name: str) -> None:
    model = build(name)
    x = all_images(model.event_shape)[[0, 3, -1]]
    draws = 40_000
    log_weights = model.log_weights(x, draws, generator=torch.Generator().manual_seed(0))
    assert log_weights.shape == (draws, 3)
    elbos = torch.stack([model.elbo(x, generator=torch.Generator().manual_seed(seed)) for seed in range(2000)])
    error = (log_weights.var(0) / draws + elbos.var(0) / len(elbos)).sqrt()
    assert bool(((log_weights.mean(0) - elbos.mean(0)).abs() < 4 * error).all())


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_bounds_grow_with_particles_and_stay_below_the_likelihood(name: str) -> None:
    model = build(name)
    x = all_images(model.event_shape)[[0, 5, -2]]
    truth = log_likelihood_by_quadrature(model, x)
    repeated = x.repeat(1000, 1, 1, 1)
    means, errors = [], []
    for particles in (1, 5, 50):
        bounds = model.iw_bound(repeated, particles, generator=torch.Generator().manual_seed(particles)).view(-1, 3)
        means.append(bounds.mean(0))
        errors.append(bounds.std(0) / math.sqrt(len(bounds)))
    for k in range(2):
        assert bool((means[k + 1] > means[k] - 4 * (errors[k] + errors[k + 1])).all())
    assert bool((means[2] > means[0]).all())
    for mean, error in zip(means, errors, strict=True):
        assert bool((mean <= truth + 4 * error).all())


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_keyed_bounds_do_not_depend_on_the_batch(name: str) -> None:
    model = build(name)
    x = all_images(model.event_shape)[:6]
    particles = model.particle_block + 30
    whole = model.iw_bound(x, particles, generator=keyed_generators(7, range(6)))
    parts = [model.iw_bound(x[i : i + 2], particles, generator=keyed_generators(7, [i, i + 1])) for i in (0, 2, 4)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-9)
    other = model.iw_bound(x, particles, generator=keyed_generators(8, range(6)))
    assert not torch.allclose(whole, other, atol=1e-9)


@pytest.mark.parametrize("name", of_kind(LatentVariableModel))
@torch.no_grad()
def test_encode_and_decode_shapes(name: str) -> None:
    model = build(name)
    x = all_images(model.event_shape)[:4]
    codes = model.encode(x)
    assert codes.shape == (4, model.sample_latent(1).shape[1])
    assert model.decode(codes).shape == x.shape
    assert model.decode(codes[None].expand(3, -1, -1)).shape == (3, *x.shape)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        model.iw_bound(x, 0)
