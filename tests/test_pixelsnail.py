"""PixelSNAIL on patches: which pixels a conditional sees, patches against pixels, caches against full evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.models import PixelSNAIL
from lightning_genmodels.orders import PATCH_ORDERS, pixel_order
from lightning_genmodels.testing import FALSE_ALARM_RATE, check_drawing, check_order, p_value


def pixelsnail(height: int, width: int, scale: float = 0.3, **options: Any) -> PixelSNAIL:
    """A small one in float64, with parameters far from their initial values: those open gates that start closed."""
    torch.manual_seed(0)
    given = {"channels": 8, "num_layers": 4, "attention_every": 2, "first_kernel_size": 3, "heads": 2}
    model = PixelSNAIL((1, height, width), **{**given, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.mark.parametrize("order", PATCH_ORDERS)
def test_an_order_goes_patch_by_patch_and_row_by_row_within(order: str) -> None:
    _, _, symmetry = order.partition("_")
    raster = pixel_order(f"raster_{symmetry}" if symmetry else "raster", 4, 6)
    patches = pixel_order(order, 4, 6).view(6, 4)
    assert sorted(patches.flatten().tolist()) == list(range(24))
    rows, columns = patches // 6, patches % 6
    assert bool((rows.amax(1) - rows.amin(1) == 1).all())
    assert bool((columns.amax(1) - columns.amin(1) == 1).all())
    place = raster.argsort()  # in the raster of the same symmetry, a patch is read from its first pixel on
    assert bool((place[patches].diff(dim=1) > 0).all())
    assert bool((place[patches[:, 0]].diff() > 0).all())


def test_odd_sides_are_refused() -> None:
    with pytest.raises(OptionError, match="do not divide an image of 4x5"):
        pixel_order("patches", 4, 5)
    with pytest.raises(OptionError, match="do not divide an image of 7x4"):
        PixelSNAIL((1, 7, 4))


@pytest.mark.parametrize("order", PATCH_ORDERS)
@torch.no_grad()
def test_a_conditional_sees_every_earlier_pixel_and_no_other(order: str) -> None:
    model = pixelsnail(8, 8, orders=("patches_rot90", order))
    check_order(model)
    x = torch.randint(2, (8, 1, 8, 8)).double()
    logits = model.conditional_logits(x, 1).flatten(1)[:, model.pixel_orders[1]]
    for position in range(64):
        flipped = x.flatten(1).clone()
        pixel = model.pixel_orders[1, position]
        flipped[:, pixel] = 1 - flipped[:, pixel]
        changed = model.conditional_logits(flipped.view_as(x), 1).flatten(1)[:, model.pixel_orders[1]] != logits
        assert changed[:, position + 1 :].any(0).all()


@pytest.mark.slow(reason="enumerates 65,536 images")
@pytest.mark.parametrize("orders", [PATCH_ORDERS, ("patches_flip",)])
def test_the_probability_of_patches_is_that_of_their_pixels_and_sums_to_one(orders: tuple[str, ...]) -> None:
    model = pixelsnail(4, 4, orders=orders)
    x = all_images((1, 4, 4)).double()[:: 1 if len(orders) == 1 else 7]
    with torch.no_grad():
        by_order = model.log_prob_by_order(x)
        for index in range(len(orders)):
            pixels = bernoulli_log_prob(model.conditional_logits(x, index), x)
            torch.testing.assert_close(by_order[index], pixels, rtol=0, atol=1e-10)
    mixture = by_order.logsumexp(0) - math.log(len(orders))
    torch.testing.assert_close(model.log_prob(x), mixture)
    if len(orders) == 1:
        assert mixture.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_an_image_that_is_no_square_is_read_by_rows_or_by_columns() -> None:
    x = torch.randint(2, (6, 1, 4, 8)).double()
    with torch.no_grad():
        for orders in (("patches", "patches_flip"), ("patches_rot90", "patches_transpose")):
            assert torch.isfinite(pixelsnail(4, 8, orders=orders).log_prob(x)).all()
    with pytest.raises(OptionError, match="square"):
        pixelsnail(4, 8, orders=("patches", "patches_rot90"))


@pytest.mark.parametrize("orders", [PATCH_ORDERS, *((order,) for order in PATCH_ORDERS)])
def test_drawing_from_caches_equals_full_evaluations_from_the_same_random_numbers(orders: tuple[str, ...]) -> None:
    check_drawing(pixelsnail(6, 6, orders=orders))


def enumerated(model: PixelSNAIL, x: Tensor, observed: Tensor, index: int) -> Tensor:
    """p(image | observed pixels of x) of all images, in one order."""
    images = all_images(model.event_shape)
    fits = ((images == x) | ~observed).flatten(1).all(1)
    with torch.no_grad():
        log_prob = model.log_prob_by_order(images, [index])[0]
    return torch.where(fits, log_prob.exp(), 0.0) / log_prob[fits].exp().sum()


@pytest.mark.parametrize("observed", [[(0, 0), (1, 0)], [(0, 1)], [(0, 0), (0, 1), (1, 0), (1, 1), (1, 3)], [(1, 2)]])
def test_completion_is_exact_where_nothing_is_observed_after_the_first_incomplete_patch(
    observed: list[tuple[int, int]], recwarn: pytest.WarningsRecorder
) -> None:
    """Of an image of two patches side by side, also where the observed pixels come last within their patch."""
    model = pixelsnail(2, 4, 0.5, orders=("patches", "patches_mirror"))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for row, column in observed:
        mask[row, column] = True
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]).double()
    samples = model.complete(x.expand(20_000, 1, 2, 4), mask, generator=torch.Generator().manual_seed(1))
    starts_at_the_right = observed == [(1, 2)]
    assert p_value(samples, enumerated(model, x, mask, int(starts_at_the_right))) > FALSE_ALARM_RATE
    assert not [warning for warning in recwarn if "observed pixels" in str(warning.message)]


def test_completion_warns_where_observed_pixels_come_too_late() -> None:
    model = pixelsnail(2, 4, orders=("patches",))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 3] = True
    with pytest.warns(UserWarning, match="in 3 of 3 images, observed pixels come after missing ones"):
        completed = model.complete(torch.ones(3, 1, 2, 4), mask)
    assert bool((completed[..., 0, 3] == 1).all())


def test_it_validates_and_trains_on_single_orders() -> None:
    model = pixelsnail(6, 6, orders=PATCH_ORDERS)
    x = torch.randint(2, (400, 1, 6, 6)).double()
    with torch.no_grad():
        by_order = model.log_prob_by_order(x)
        losses = torch.stack([model.training_loss(x) for _ in range(20)])
    assert abs(losses.mean() + by_order.mean()) < 4 * losses.std() / 20**0.5


@pytest.mark.parametrize(
    "build",
    [
        lambda: PixelSNAIL(heads=0),
        lambda: PixelSNAIL(channels=10, heads=4),
        lambda: PixelSNAIL(attention_every=-1),
        lambda: PixelSNAIL(kernel_size=2),
        lambda: PixelSNAIL(dropout=1.0),
        lambda: PixelSNAIL(orders=()),
        lambda: PixelSNAIL(orders=("patches", "raster")),
    ],
)
def test_options_without_sense_are_refused(build: Callable[[], PixelSNAIL]) -> None:
    with pytest.raises(OptionError, match="expected"):
        build()
