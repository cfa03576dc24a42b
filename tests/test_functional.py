"""Pure functions against independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Bernoulli

from lightning_genmodels.errors import ImageError
from lightning_genmodels.functional import bernoulli_log_prob, check_images, log_mean_exp, resize_area
from lightning_genmodels.random import derive_seed, keyed_generators, process_share, sample_bernoulli, standard_normal


def test_bernoulli_log_prob_is_that_of_torch_distributions() -> None:
    logits = 5 * torch.randn(4, 3, 1, 5, 6, dtype=torch.float64)
    x = (torch.rand(3, 1, 5, 6) < 0.5).double()
    expected = Bernoulli(logits=logits).log_prob(x.expand_as(logits)).sum((-3, -2, -1))
    assert torch.allclose(bernoulli_log_prob(logits, x), expected, atol=1e-12)


def test_bernoulli_log_prob_is_exact_at_extreme_logits() -> None:
    logits = torch.tensor([80.0, -80.0, 200.0, -200.0]).view(4, 1, 1, 1)
    ones, zeros = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    assert bernoulli_log_prob(logits, ones).tolist() == pytest.approx([0.0, -80.0, 0.0, -200.0], abs=1e-30)
    assert bernoulli_log_prob(logits, zeros).tolist() == pytest.approx([-80.0, 0.0, -200.0, 0.0], abs=1e-30)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 2, 3), (1, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("scale", [3.0, 20.0])
def test_bernoulli_log_prob_is_the_same_with_and_without_gradients(shape: tuple[int, ...], scale: float) -> None:
    logits = scale * torch.randn(7, 4, *shape)
    x = (torch.rand(4, *shape) < 0.5).float()
    before = logits.clone()
    fast, exact = bernoulli_log_prob(logits, x), bernoulli_log_prob(logits.double().requires_grad_(), x)
    assert torch.equal(logits, before)
    assert torch.allclose(fast.double(), exact, rtol=1e-6, atol=1e-6)


def test_bernoulli_log_prob_is_summed_in_float32() -> None:
    logits = torch.randn(2, 1, 28, 28).bfloat16()
    x = (torch.rand(2, 1, 28, 28) < 0.5).float()
    found = bernoulli_log_prob(logits, x)
    assert found.dtype == torch.float32
    assert torch.allclose(found, bernoulli_log_prob(logits.float(), x))


def test_log_mean_exp_survives_very_negative_values() -> None:
    values = torch.tensor([-1000.0, -1000.0 + math.log(3)])
    assert log_mean_exp(values).item() == pytest.approx(-1000.0 + math.log(2))


def test_seeds_are_fixed_forever_and_distinct() -> None:
    assert derive_seed("step", 0, 1) == 8157581573849908968
    seeds = {derive_seed("a", i, j) for i in range(100) for j in range(100)}
    assert len(seeds) == 10_000
    assert derive_seed("a", 1, 12) != derive_seed("a", 11, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_keyed_by_image_does_not_depend_on_the_batch() -> None:
    like = torch.zeros(())
    whole = standard_normal(3, 4, (5,), keyed_generators(0, [10, 11, 12, 13]), like)
    part = standard_normal(3, 2, (5,), keyed_generators(0, [12, 13]), like)
    assert torch.equal(whole[:, 2:], part)
    assert whole.unique().numel() == whole.numel()
    with pytest.raises(ValueError, match="one generator per image, 3 of them, got 2"):
        standard_normal(1, 3, (5,), keyed_generators(0, [1, 2]), like)


def test_shares_of_processes_cover_all_images_once() -> None:
    shares = [i for rank in range(3) for start in (0, 4) for i in process_share(start, 4, rank, 3)]
    assert sorted(shares) == list(range(24))


def test_samples_have_the_probabilities_of_their_logits() -> None:
    logits = torch.tensor([-200.0, -2.0, 0.0, 1.0, 200.0])
    mean = sample_bernoulli(logits.expand(40_000, 5), torch.Generator().manual_seed(0)).mean(0)
    assert mean[0] == 0
    assert mean[4] == 1
    assert torch.allclose(mean, torch.sigmoid(logits), atol=0.012)


def test_area_averaging_of_a_whole_multiple_is_the_block_mean() -> None:
    x = torch.rand(2, 1, 28, 28)
    assert torch.allclose(resize_area(x, 4), x.view(2, 1, 4, 7, 4, 7).mean((3, 5)), atol=1e-6)


def test_image_checks_say_what_came() -> None:
    check_images(torch.ones(2, 1, 3, 3), (1, 3, 3))
    check_images(torch.full((2, 1, 3, 3), 7.0), (1, 3, 3), values=False)
    with pytest.raises(ImageError, match=r"shape \(batch, 1, 3, 3\), got \(2, 3, 3\)"):
        check_images(torch.ones(2, 3, 3), (1, 3, 3))
    with pytest.raises(ImageError, match="values from -1 to 1"):
        check_images(torch.tensor([[[[1.0, -1.0]]]]), (1, 1, 2))
