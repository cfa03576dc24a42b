"""Pixel orders are permutations of the image they claim to walk over, on squares, rectangles and lines."""

from __future__ import annotations

import pytest
import torch

from lightning_genmodels.errors import OptionError
from lightning_genmodels.orders import RASTER_ORDERS, autoregressive_mask, pixel_order

CURVES = ["snake", "spiral", "spiral_out", "hilbert", "hilbert_rot90", "snake_transpose", "spiral_mirror"]
SHAPES = [(1, 1), (1, 7), (6, 1), (2, 3), (3, 3), (5, 8), (7, 7), (28, 28), (11, 28)]


def steps(order: torch.Tensor, width: int) -> torch.Tensor:
    """Rows and columns crossed from each pixel to the next."""
    return (order // width).diff().abs() + (order % width).diff().abs()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*RASTER_ORDERS, *CURVES, "random"])
def test_every_order_is_a_permutation(name: str, shape: tuple[int, int]) -> None:
    order = pixel_order(name, *shape)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(shape[0] * shape[1]))


def test_the_orders_by_hand() -> None:
    assert pixel_order("raster", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert pixel_order("raster_mirror", 2, 3).tolist() == [2, 1, 0, 5, 4, 3]
    assert pixel_order("raster_flip", 2, 3).tolist() == [3, 4, 5, 0, 1, 2]
    assert pixel_order("raster_transpose", 2, 3).tolist() == [0, 3, 1, 4, 2, 5]
    assert pixel_order("raster_rot90", 2, 3).tolist() == [2, 5, 1, 4, 0, 3]
    assert pixel_order("snake", 2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert pixel_order("spiral", 3, 3).tolist() == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert pixel_order("spiral_out", 3, 3).tolist() == [4, 3, 6, 7, 8, 5, 2, 1, 0]


def test_the_raster_has_eight_different_symmetries() -> None:
    for shape in [(3, 3), (3, 4)]:
        assert len({tuple(pixel_order(name, *shape).tolist()) for name in RASTER_ORDERS}) == 8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CURVES)
def test_a_curve_steps_from_neighbour_to_neighbour(name: str, shape: tuple[int, int]) -> None:
    far = steps(pixel_order(name, *shape), shape[1])
    assert (far > 2).sum() == 0
    assert (far == 2).sum() <= (1 if name.startswith("hilbert") else 0)


def test_a_hilbert_curve_stays_near_where_it_is() -> None:
    def spread(name: str) -> float:
        """Mean height times width of the region that 49 pixels in a row lie in."""
        places = torch.stack([pixel_order(name, 28, 28) // 28, pixel_order(name, 28, 28) % 28]).unfold(1, 49, 1)
        return (places.amax(-1) - places.amin(-1) + 1).prod(dim=0).double().mean().item()

    assert spread("hilbert") < min(spread("raster"), spread("snake"), spread("spiral"))


def test_a_random_order_depends_on_its_seed_alone() -> None:
    assert torch.equal(pixel_order("random", 4, 5, seed=3), pixel_order("random", 4, 5, seed=3))
    assert not torch.equal(pixel_order("random", 4, 5, seed=3), pixel_order("random", 4, 5, seed=4))


@pytest.mark.parametrize("name", ["", "rows", "raster_", "raster_upwards", "random_flip", "flip"])
def test_an_unknown_order_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="unknown pixel order"):
        pixel_order(name, 4, 4)


def test_masks_let_no_pixel_see_itself() -> None:
    pixels, hidden = torch.tensor([3, 1, 2]), torch.tensor([1, 2, 2, 1])
    into, out = autoregressive_mask(hidden, pixels), autoregressive_mask(pixels, hidden, strict=True)
    paths = out.int() @ into.int()  # how many ways lead from each input to each output
    assert torch.equal(paths > 0, autoregressive_mask(pixels, pixels, strict=True))
