"""Metrics count every value once, in float64, however the values were split."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_genmodels.base.metrics import MeanWithError, NegativeLogLikelihood, PerImage


def test_mean_and_standard_error_do_not_depend_on_the_split() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 - 500
    for size in (1, 7, 1001):
        metric = MeanWithError(offset=-400.0)
        for part in values.split(size):
            metric.update(part)
        estimate = metric.compute()
        assert estimate.value.item() == pytest.approx(values.mean().item(), rel=1e-12)
        assert estimate.standard_error.item() == pytest.approx((values.std() / math.sqrt(1001)).item(), rel=1e-9)


def test_float32_values_lose_nothing_in_the_sum() -> None:
    metric = NegativeLogLikelihood((1, 28, 28))
    for _ in range(100):
        metric.update(torch.full((10_000,), -100.1))
    assert metric.compute().value.item() == pytest.approx(float(torch.tensor(100.1)), rel=1e-12)


def test_states_stay_in_float64_when_a_module_changes_precision() -> None:
    metric = torch.nn.ModuleList([NegativeLogLikelihood((1, 2, 2))]).half()[0]
    metric.update(torch.tensor([-1.0]))
    assert metric.compute().value.dtype == torch.float64


def test_bits_per_dimension() -> None:
    metric = NegativeLogLikelihood((1, 2, 2))
    metric.update(torch.tensor([-4 * math.log(2)] * 3))
    assert metric.bits_per_dimension().value.item() == pytest.approx(1.0)


def test_states_are_not_saved_with_a_model() -> None:
    assert NegativeLogLikelihood((1, 2, 2)).state_dict() == {}


def test_values_come_back_in_the_order_of_the_images() -> None:
    metric = PerImage()
    metric.update(torch.tensor([0, 2, 4]), torch.tensor([0.0, 20.0, 40.0]))
    metric.update(torch.tensor([1, 3]), torch.tensor([10.0, 30.0]))
    assert metric.compute().tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    metric.update(torch.tensor([3]), torch.tensor([30.0]))
    with pytest.raises(RuntimeError, match="evaluated more than once"):
        metric.compute()
