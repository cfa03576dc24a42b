"""Autoregressive models whose network has the geometry of an image that is read row by row."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base.autoregressive import AutoregressiveModel
from lightning_genmodels.base.generative import TrainingOptions
from lightning_genmodels.functional import draw_pixel
from lightning_genmodels.nn.raster import CausalNetwork
from lightning_genmodels.orders import raster_shape
from lightning_genmodels.system import tracked


class RasterModel(AutoregressiveModel, ABC):
    """An autoregressive model by a convolutional or recurrent network: it takes the eight symmetries of the raster.

    Its network only ever goes row by row; in another order it sees an image that is turned so that its rows come in
    that order. A model sets ``net``, for images of the shape ``raster_shape``.

    Args:
        event_shape: (1, H, W) of one image.
        order: One of the eight symmetries of the raster; see :data:`lightning_genmodels.orders.RASTER_ORDERS`.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: ``order`` is not one of the eight.
    """

    score_chunk = 50

    net: CausalNetwork

    def __init__(
        self, event_shape: Sequence[int] = (1, 28, 28), order: str = "raster", **options: Unpack[TrainingOptions]
    ) -> None:
        super().__init__(event_shape, order, **options)
        self.raster_shape = raster_shape(order, *self.event_shape[1:])

    def edges(self) -> list[nn.Module]:
        """The layers that read pixels or write logits."""
        return self.net.edges()

    @final
    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of binary images of that shape."""
        return from_raster(self.net(to_raster(x, self.pixel_order, self.raster_shape)), self.pixel_order, x)

    @final
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        filled = fill_raster(
            self.net.conditionals,
            to_raster(x, self.pixel_order, self.raster_shape),
            to_raster(observed, self.pixel_order, self.raster_shape),
            uniforms,
        )
        return from_raster(filled, self.pixel_order, x)


def to_raster(x: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Turns images (B, 1, H, W) so that a symmetry of the raster becomes the plain one: (B, 1, *shape)."""
    return x.flatten(1)[:, order].view(-1, 1, *shape)


def from_raster(turned: Tensor, order: Tensor, like: Tensor) -> Tensor:
    """Turns images back into the shape of ``like``."""
    pixels = turned.flatten(1)
    return torch.empty_like(pixels).index_copy(1, order, pixels).view(like.shape)


@torch.no_grad()
def fill_raster(
    conditionals: Callable[[Tensor], Iterator[Tensor]], x: Tensor, observed: Tensor, uniforms: Tensor
) -> Tensor:
    """Draws the pixels that are not observed, row by row; see :func:`lightning_genmodels.functional.fill_in_order`.

    ``conditionals`` is what :class:`lightning_genmodels.nn.raster.CausalNetwork` has.
    """
    x = torch.where(observed, x, torch.zeros_like(x)).contiguous()
    pixels, known = x.flatten(1), observed.flatten(1)  # (N, n), pixels is a view of x
    with torch.inference_mode():  # most of the time goes into the overhead of small operations
        for i, logits in enumerate(tracked(conditionals(x), pixels.shape[1], "sampling", "pixel")):
            pixels[:, i] = draw_pixel(logits[:, 0], uniforms[:, i], pixels[:, i], known[:, i])
    return x
