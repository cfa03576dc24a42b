"""Models that count: their numbers of parameters, and that the chain rule changes nothing."""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lightning_genmodels.base import TabularModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.models import Bernoulli, ChainRuleTable, JointTable, Markov
from lightning_genmodels.testing import check_normalization, check_sampling

SHAPE = (1, 2, 3)
Model = TypeVar("Model", bound=TabularModel)


def images(count: int = 200) -> Tensor:
    """Images whose pixels depend on each other."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((count, 6), generator=generator)
    return (noise.cumsum(1) % 1 < noise.flip(1)).float().view(-1, *SHAPE)


def fitted(model: Model, x: Tensor) -> Model:
    model.double().fit_statistics(model.statistics(x))
    return model


@pytest.mark.parametrize("pseudo_count", [1.0, 0.3])
@pytest.mark.parametrize("order", ["raster", "spiral", "random"])
def test_the_chain_rule_changes_nothing(order: str, pseudo_count: float) -> None:
    joint = fitted(JointTable(SHAPE, pseudo_count), images())
    chain = fitted(ChainRuleTable(SHAPE, order, pseudo_count=pseudo_count), images())
    x = all_images(SHAPE)
    torch.testing.assert_close(chain.log_prob(x), joint.log_prob(x), rtol=0, atol=1e-12)
    assert joint.num_free_parameters == chain.num_free_parameters == 2**6 - 1


def test_a_chain_with_the_longest_memory_is_the_full_distribution() -> None:
    joint = fitted(JointTable(SHAPE, 1e-9), images(5000))
    chain = fitted(Markov(SHAPE, memory=5, pseudo_count=1e-9), images(5000))
    seen = images(5000).unique(dim=0)
    torch.testing.assert_close(chain.log_prob(seen), joint.log_prob(seen), rtol=0, atol=1e-6)
    assert chain.num_free_parameters == joint.num_free_parameters


def test_a_chain_without_memory_has_independent_pixels() -> None:
    x = all_images(SHAPE)
    chain, independent = fitted(Markov(SHAPE, memory=0), images()), fitted(Bernoulli(SHAPE), images())
    torch.testing.assert_close(chain.log_prob(x), independent.log_prob(x), rtol=0, atol=1e-12)
    assert chain.num_free_parameters == independent.num_free_parameters == 6


def test_the_numbers_of_parameters_of_the_lecture() -> None:
    assert Bernoulli().num_free_parameters == 784
    assert Markov().num_free_parameters == 2 * 784 - 1
    assert Markov(memory=3).num_free_parameters == 1 + 2 + 4 + 781 * 8
    assert Markov((1, 4, 4)).num_free_parameters == 31
    assert JointTable((1, 4, 4)).num_free_parameters == ChainRuleTable((1, 4, 4)).num_free_parameters == 2**16 - 1


@pytest.mark.parametrize("model", [JointTable(SHAPE), ChainRuleTable(SHAPE), Markov(SHAPE, 2, "snake")])
def test_smoothed_probabilities_sum_to_one_and_counts_add_up(model: TabularModel) -> None:
    first, second = images().split([50, 150])
    counts = model.statistics(first) + model.statistics(second)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, model.statistics(images()))
    check_normalization(fitted(model, images()))
    assert model.log_prob(all_images(SHAPE)).isfinite().all()


def test_conditional_frequencies_of_a_markov_chain() -> None:
    x = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1], [1, 0], [1, 1]]).view(6, 1, 1, 2).float()
    chain = fitted(Markov((1, 1, 2), pseudo_count=0.5), x)
    p_first, p_second = 4.5 / 7, {0: 1.5 / 3, 1: 3.5 / 5}
    for a, b in itertools.product([0, 1], repeat=2):
        expected = (p_first if a else 1 - p_first) * (p_second[a] if b else 1 - p_second[a])
        found = chain.log_prob(torch.tensor([[[[a, b]]]])).exp().item()
        assert math.isclose(found, expected, rel_tol=1e-9)


def test_the_joint_table_samples_what_it_says() -> None:
    model = fitted(JointTable((1, 2, 2)), torch.cat([torch.zeros(90, 1, 2, 2), torch.ones(30, 1, 2, 2)]))
    check_sampling(model)


def test_tables_of_large_images_are_refused() -> None:
    for build in (JointTable, ChainRuleTable):
        with pytest.raises(OptionError, match="image_size 4"):
            build((1, 28, 28))


@pytest.mark.data
def test_the_markov_chain_on_static_mnist() -> None:
    from lightning_genmodels.data import BinarizedMNISTDataModule

    data = BinarizedMNISTDataModule()
    chain = fitted(Markov(), data.images("train"))
    nll = -torch.cat([chain.log_prob(x) for x in data.images("test").split(1000)]).mean().item()
    assert abs(nll - 145.35) < 0.01
