"""The divergence between two models: exact on tiny images, estimated elsewhere, closed for torch.distributions."""

from __future__ import annotations

import math
from typing import TypeVar

import pytest
import torch
from torch import distributions as D

from lightning_genmodels.base import ExplicitModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images, cross_entropy, entropy, kl_divergence
from lightning_genmodels.models import MADE, NADE, VAE, Bernoulli, JointTable

SHAPE = (1, 2, 3)
Model = TypeVar("Model", bound=ExplicitModel)


def randomized(model: Model, seed: int, scale: float = 1.0) -> Model:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.double().eval()


def models() -> list[ExplicitModel]:
    built = [NADE(SHAPE, 4), MADE(SHAPE, (8,), num_orders=2), JointTable(SHAPE), Bernoulli(SHAPE)]
    return [randomized(model, seed) for seed, model in enumerate(built)]


def test_it_is_positive_and_zero_for_equal_distributions_alone() -> None:
    for p in models():
        for q in models():
            value, error = kl_divergence(p, q)
            assert error == 0
            if type(p) is type(q):
                assert abs(value.item()) < 1e-12
            else:
                assert value > 0.01


def test_it_is_not_symmetric() -> None:
    p, q, *_ = models()
    assert abs(kl_divergence(p, q).value - kl_divergence(q, p).value) > 0.01


def test_cross_entropy_is_entropy_plus_divergence() -> None:
    p, q, *_ = models()
    total = entropy(p).value + kl_divergence(p, q).value
    assert math.isclose(cross_entropy(p, q).value.item(), total.item(), rel_tol=1e-12)


def test_uniform_images_have_the_entropy_of_as_many_coins() -> None:
    assert math.isclose(entropy(JointTable(SHAPE).double()).value.item(), 6 * math.log(2), rel_tol=1e-12)


def test_enumeration_equals_the_closed_form_for_independent_pixels() -> None:
    p, q = randomized(Bernoulli(SHAPE), 0), randomized(Bernoulli(SHAPE), 1)
    closed = kl_divergence(D.Bernoulli(logits=p.logits), D.Bernoulli(logits=q.logits))
    assert closed.value.shape == SHAPE
    torch.testing.assert_close(kl_divergence(p, q).value, closed.value.sum())


def test_the_estimate_on_larger_images_agrees_with_the_closed_form() -> None:
    shape = (1, 6, 5)
    p, q = (randomized(Bernoulli(shape), seed, scale=0.3) for seed in (0, 1))
    exact = kl_divergence(D.Bernoulli(logits=p.logits), D.Bernoulli(logits=q.logits)).value.sum()
    value, error = kl_divergence(p, q, num_samples=4000, generator=torch.Generator().manual_seed(0))
    assert error > 0
    assert abs(value - exact) < 4 * error
    again = kl_divergence(p, q, num_samples=4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(value, again.value)
    same = kl_divergence(p, p, num_samples=10)
    assert same.value == 0
    assert same.standard_error == 0


def test_distributions_over_other_images_and_models_without_density_are_refused() -> None:
    with pytest.raises(OptionError, match="same images"):
        kl_divergence(Bernoulli((1, 2, 2)), Bernoulli((1, 2, 3)))
    with pytest.raises(OptionError, match="explicit models"):
        kl_divergence(VAE(**VAE.small), Bernoulli((1, 2, 2)))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no closed form"):
        kl_divergence(D.Cauchy(0.0, 1.0), D.Poisson(1.0))
    with pytest.raises(OptionError, match="num_samples"):
        kl_divergence(Bernoulli(), Bernoulli(), num_samples=1)
    with pytest.raises(OptionError, match="too many"):
        all_images((1, 28, 28))
