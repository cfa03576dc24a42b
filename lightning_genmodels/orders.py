"""Pixel orders: which pixel is drawn first, second, ... A factorization of p(x) by the chain rule needs one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_genmodels.errors import OptionError
from lightning_genmodels.random import derive_seed

_SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror": lambda grid: grid.flip(1),
    "flip": lambda grid: grid.flip(0),
    "rot180": lambda grid: grid.flip(0, 1),
    "transpose": lambda grid: grid.T,
    "rot90": lambda grid: grid.T.flip(0),
    "rot270": lambda grid: grid.T.flip(1),
    "antitranspose": lambda grid: grid.flip(0, 1).T,
}

_BY_COLUMN = ("transpose", "rot90", "rot270", "antitranspose")

RASTER_ORDERS = ("raster", *(f"raster_{symmetry}" for symmetry in _SYMMETRIES))
"""The eight symmetries of the raster order, which are the orders of convolutional and recurrent networks."""

PATCH_ORDERS = ("patches", *(f"patches_{symmetry}" for symmetry in _SYMMETRIES))
"""The eight symmetries of the order of 2x2 patches."""


def pixel_order(name: str, height: int, width: int, *, seed: int = 0) -> Tensor:  # (H * W,)
    """An order of the pixels of an image.

    Args:
        name: ``raster`` (row by row from the top left), ``snake`` (every second row backwards), ``spiral`` (clockwise
            from the top left inwards), ``spiral_out`` (its reverse), ``hilbert`` (a curve that fills square after
            square, generalized to rectangles), ``patches`` (patches of 2x2 pixels row by row, and row by row within a
            patch), ``random``; each but the last also followed by a symmetry of the image: ``raster_flip`` starts at
            the bottom left, ``raster_transpose`` goes column by column. The symmetries are mirror (left to right), flip
            (upside down), rot90, rot180, rot270, transpose, antitranspose.
        height: H.
        width: W.
        seed: Seed of a random order.

    Returns:
        (H * W,) int64 on the CPU: entry i is the row-major index of the i-th pixel. A permutation.

    Raises:
        OptionError: No order has this name, or patches do not divide the image.
    """
    if name == "random":
        generator = torch.Generator(device="cpu").manual_seed(derive_seed("pixel order", seed))
        return torch.randperm(height * width, generator=generator, device="cpu")
    curve, _, symmetry = (name, "", None) if name in _CURVES else name.rpartition("_")
    if curve not in _CURVES or (symmetry is not None and symmetry not in _SYMMETRIES):
        raise OptionError(
            f"unknown pixel order {name!r}; there are random, {', '.join(_CURVES)}, the others also followed by "
            f"_{', _'.join(_SYMMETRIES)}"
        )
    grid = torch.arange(height * width, device="cpu").view(height, width)
    grid = grid if symmetry is None else _SYMMETRIES[symmetry](grid)
    return grid.flatten()[torch.tensor(_CURVES[curve](*grid.shape), device="cpu")]


def raster_shape(name: str, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image as a symmetry of the raster order walks over it: row by row, in its own frame.

    Args:
        name: One of :data:`RASTER_ORDERS`.
        height: H.
        width: W.

    Returns:
        (H, W), or (W, H) for an order that goes column by column: x[order] viewed in this shape is the image turned so
        that the order becomes the plain raster.

    Raises:
        OptionError: The order is not one of the eight.
    """
    if name not in RASTER_ORDERS:
        raise OptionError(
            f"convolutional and recurrent networks go row by row or column by column: expected one of the pixel orders "
            f"{', '.join(RASTER_ORDERS)}, got {name!r}; for other orders take a network without geometry: nade, made"
        )
    _, _, symmetry = name.partition("_")
    return (width, height) if symmetry in _BY_COLUMN else (height, width)


def patch_grid(name: str, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the 2x2 patches of an image, as a symmetry of their order walks over it.

    Args:
        name: One of :data:`PATCH_ORDERS`.
        height: H, even.
        width: W, even.

    Returns:
        (H / 2, W / 2), or (W / 2, H / 2) for an order that goes column by column: x[order] viewed as (H W / 4, 4) has a
        patch in each row.

    Raises:
        OptionError: The order is not one of the eight.
    """
    if name not in PATCH_ORDERS:
        raise OptionError(f"expected one of the orders of patches, {', '.join(PATCH_ORDERS)}, got {name!r}")
    _, _, symmetry = name.partition("_")
    rows, columns = height // 2, width // 2
    return (columns, rows) if symmetry in _BY_COLUMN else (rows, columns)


def _patches(height: int, width: int) -> list[int]:
    if height % 2 or width % 2:
        raise OptionError(
            f"patches of 2x2 pixels do not divide an image of {height}x{width}; choose even sides, or an order of "
            "single pixels"
        )
    return [
        (row + i) * width + column + j
        for row in range(0, height, 2)
        for column in range(0, width, 2)
        for i in range(2)
        for j in range(2)
    ]


def _raster(height: int, width: int) -> list[int]:
    return list(range(height * width))


def _snake(height: int, width: int) -> list[int]:
    rows = [range(row * width, (row + 1) * width) for row in range(height)]
    return [index for row, indices in enumerate(rows) for index in (reversed(indices) if row % 2 else indices)]


def _spiral(height: int, width: int) -> list[int]:
    rows = [list(range(row * width, (row + 1) * width)) for row in range(height)]
    order: list[int] = []
    while rows:
        order += rows[0]
        # The rest turned by a quarter to the left: its last column is the next row to walk along.
        rows = [list(column) for column in zip(*rows[1:], strict=True)][::-1]
    return order


def _spiral_out(height: int, width: int) -> list[int]:
    return _spiral(height, width)[::-1]


def _hilbert(height: int, width: int) -> list[int]:
    """A Hilbert-like curve over any rectangle: neighbours in the order are neighbours in the image.

    A block is spanned by two vectors (complex numbers) from its starting corner: the curve goes through it along
    ``long`` and bulges along ``wide``. A block that is too long is cut across; any other into three: up, across, and
    back down. Even halves keep the pieces connected; odd sizes may cost one diagonal step.
    """

    def walk(start: complex, long: complex, wide: complex) -> list[complex]:
        length, breadth = round(abs(long)), round(abs(wide))
        along, aside = long / length, wide / breadth
        if breadth == 1:
            return [start + step * along for step in range(length)]
        if length == 1:
            return [start + step * aside for step in range(breadth)]
        if 2 * length > 3 * breadth:
            half = _even_half(length) * along
            return walk(start, half, wide) + walk(start + half, long - half, wide)
        up, half = _even_half(breadth) * aside, length // 2 * along
        return (
            walk(start, up, half)
            + walk(start + up, long, wide - up)
            + walk(start + (long - along) + (up - aside), -up, half - long)
        )

    long, wide = (complex(width, 0), complex(0, height)) if width >= height else (complex(0, height), complex(width, 0))
    return [round(at.imag) * width + round(at.real) for at in walk(0j, long, wide)]


def _even_half(length: int) -> int:
    """About half of a length: even if it can be."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


_CURVES: dict[str, Callable[[int, int], list[int]]] = {
    "raster": _raster,
    "snake": _snake,
    "spiral": _spiral,
    "spiral_out": _spiral_out,
    "hilbert": _hilbert,
    "patches": _patches,
}


def autoregressive_mask(outputs: Tensor, inputs: Tensor, *, strict: bool = False) -> Tensor:  # (O, I)
    """Which input a unit may see, so that pixel i depends on earlier pixels alone (Germain et al. 2015, eq. 8 and 9).

    Args:
        outputs: (O,) degrees of the units that are computed. A hidden unit of degree d may depend on the first d
            pixels; the degree of a pixel is its position in the order, from 1.
        inputs: (I,) degrees of the units they are computed from.
        strict: For outputs that are conditionals of pixels, which must not see the pixel itself.

    Returns:
        (O, I) bool, to be used as the mask of a weight matrix.
    """
    return inputs < outputs.unsqueeze(1) if strict else inputs <= outputs.unsqueeze(1)
