"""Annealed importance sampling against quadrature."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_genmodels.base import LatentVariableModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.ais import ais_bound, ais_bracket
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.testing import log_likelihood_by_quadrature, tiny
from lightning_genmodels.weights.names import model_class


def latent(name: str) -> LatentVariableModel:
    model = tiny(model_class(name))
    assert isinstance(model, LatentVariableModel)
    return model


@pytest.mark.parametrize(("name", "temperatures"), [("vae", 60), ("ladder_vae", 15)])
def test_mean_weight_is_the_likelihood(name: str, temperatures: int) -> None:
    model = latent(name)
    x = all_images(model.event_shape)[[0, 5, -2]]
    with torch.no_grad():
        truth = log_likelihood_by_quadrature(model, x)
    bounds = ais_bound(
        model,
        x.repeat_interleave(50, dim=0),
        num_temperatures=temperatures,
        num_chains=20,
        leapfrog_steps=3,
        generator=torch.Generator().manual_seed(1),
    )
    ratios = (bounds.view(3, 50) - truth[:, None]).exp()  # means of 20 weights, over the likelihood
    error = ratios.std(dim=1) / math.sqrt(50)
    assert bool(((ratios.mean(dim=1) - 1).abs() < 4 * error).all())
    assert bool((error < 0.1).all())


def test_more_temperatures_tighten_the_bound() -> None:
    model = latent("vae")
    x = all_images(model.event_shape)
    with torch.no_grad():
        truth = log_likelihood_by_quadrature(model, x)
    gaps = [
        (truth - ais_bound(model, x.repeat(20, 1, 1, 1), num_temperatures=t, num_chains=1).view(20, -1)).mean().item()
        for t in (1, 20)
    ]
    assert gaps[1] < 0.5 * gaps[0]


def test_bracket_holds_the_likelihood_between_its_bounds() -> None:
    lower, upper = ais_bracket(latent("vae"), 200, num_temperatures=60, num_chains=4, leapfrog_steps=3)
    gap = upper - lower
    assert lower.shape == upper.shape == (200,)
    assert gap.mean() > -4 * gap.std() / math.sqrt(len(gap))
    assert gap.mean() < 0.5
    coarse = ais_bracket(latent("vae"), 200, num_temperatures=2, num_chains=4, leapfrog_steps=3)
    assert (coarse.upper - coarse.lower).mean() > gap.mean()


def test_bound_does_not_depend_on_the_batch() -> None:
    model = latent("vae")
    x = all_images(model.event_shape)[:4]
    options = {"num_temperatures": 10, "num_chains": 3, "leapfrog_steps": 2}
    whole = ais_bound(model, x, generator=keyed_generators(0, range(4)), **options)
    parts = [ais_bound(model, x[i : i + 2], generator=keyed_generators(0, [i, i + 1]), **options) for i in (0, 2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_numbers_below_one_are_refused() -> None:
    model = latent("vae")
    x = all_images(model.event_shape)[:1]
    with pytest.raises(OptionError, match="at least 1, got 0, 10 and 10"):
        ais_bound(model, x, num_temperatures=0)
    with pytest.raises(OptionError, match="num_images of at least 1"):
        ais_bracket(model, 0)
