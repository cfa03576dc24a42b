"""The gated PixelCNN (van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu 2016, "Conditional Image
Generation with PixelCNN Decoders").

The paper's notation: p is the number of features of a layer, n the size of its filters; the vertical stack sees all
rows above a pixel, the horizontal stack the pixels to its left, and what the vertical one hands it (fig. 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import RasterModel, TrainingOptions
from lightning_genmodels.nn.raster import CausalConv2d, CausalLayer, CausalNetwork, ConvCache, Pointwise, check_network


def _gate(y: Tensor) -> Tensor:
    """Tanh(W_f * x) times sigmoid(W_g * x), from both convolutions at once (eq. 2)."""
    f, g = y.chunk(2, dim=1)
    return torch.tanh(f) * torch.sigmoid(g)


class _Layer(CausalLayer):
    """One layer of both stacks (fig. 2); the first has no residual connection, and must not see the pixel itself.

    The features of the vertical stack at row i have seen row i; they move down by one row on their way to the
    horizontal stack. So no vertical convolution needs a mask.
    """

    def __init__(
        self, inputs: int, p: int, n: int, dropout: float, first: bool = False, places: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.vertical = CausalConv2d(inputs, 2 * p, n, None)
        self.horizontal = CausalConv2d(inputs, 2 * p, (1, n), "A" if first else "B", places=places)
        self.link = Pointwise(2 * p, 2 * p, bias=False)
        self.mix = Pointwise(p, p)
        self.first = first
        self.dropout = dropout

    def forward(self, h: Any, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps the vertical stack, before its gate, and the horizontal one; the first layer maps the image."""
        v, h = (h, h) if self.first else h
        y = self.vertical(v if self.first else _gate(v))
        above = F.pad(self.link(y), (0, 0, 1, -1))
        return y, self._add(h, self.horizontal(h) + above)

    def cache(self, num_images: int, height: int, width: int) -> tuple[_LastRows, ConvCache]:
        """The last rows of the vertical stack, and what the horizontal one sees."""
        return _LastRows(self.vertical, num_images, width), self.horizontal.cache(num_images, height, width)

    def start_row(self, cache: tuple[_LastRows, ConvCache], above: Tensor | None) -> Tensor | None:
        """Computes the row above of the vertical stack, and hands it to the horizontal one."""
        rows, seen = cache
        y = None if above is None else rows.next(above)  # (N, 2p, 1, W)
        seen.start_row(None if y is None else self.link(y)[:, :, 0])
        return None if y is None else _gate(y)[:, :, 0]

    def step(self, h: Tensor, cache: Any, row: int, column: int, given: Tensor | None = None) -> Tensor:
        """Maps the horizontal stack at a pixel; the first layer maps the pixel before it."""
        return self._add(h, self.horizontal.step(h, cache[1], row, column))

    def _add(self, h: Tensor, y: Tensor) -> Tensor:
        """Output of the horizontal stack, from its input and what comes before the gate."""
        out: Tensor = self.mix(F.dropout(_gate(y), self.dropout, self.training))
        return out if self.first else h + out


class _LastRows:
    """Computes a convolution of the vertical stack row by row, from the last rows that it saw."""

    def __init__(self, conv: CausalConv2d, num_images: int, width: int) -> None:
        self.conv = conv
        self.rows = conv.weight.new_zeros((num_images, conv.weight.shape[1], conv.above + 1, width))

    def next(self, row: Tensor) -> Tensor:
        """The output (N, O, 1, W) at the row (N, I, W) that follows."""
        self.rows = torch.cat([self.rows[:, :, 1:], row.unsqueeze(2)], dim=2)
        return F.conv2d(self.rows, self.conv.weight, self.conv.bias, padding=(0, self.conv.side))


class _Network(CausalNetwork):
    def __init__(
        self, p: int, layers: int, first_n: int, n: int, dropout: float, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        first = _Layer(1, p, first_n, dropout, first=True, places=places)
        self.layers = nn.ModuleList([first, *(_Layer(p, p, n, dropout) for _ in range(layers - 1))])
        self.head = Pointwise(p, 2 * p)
        self.output = Pointwise(2 * p, 1)

    @property
    def first(self) -> Any:
        return self.layers[0]

    def sequence(self) -> Sequence[CausalLayer]:
        layers: Sequence[CausalLayer] = self.layers[1:]
        return layers

    def edges(self) -> list[nn.Module]:
        return [self.first.vertical, self.first.horizontal, self.output]

    def embed(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(stack.contiguous(memory_format=torch.channels_last) for stack in self.first(x))

    def logits(self, h: Any) -> Tensor:
        return super().logits(h[1] if isinstance(h, tuple) else h)


class GatedPixelCNN(RasterModel):
    """p(x_i = 1 | x_<i) by two stacks of gated convolutions, without the blind spot of a plain PixelCNN.

    The context grows by a layer's reach in every layer: deep enough, it is every earlier pixel; at six layers, with
    filters of 15 and then 3 pixels, it ends 13 rows above and 12 columns beside.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_size: p, features of a layer.
        num_layers: Layers of both stacks, the first of which has no residual connection.
        first_kernel_size: n of the first layer.
        kernel_size: n of the others.
        dropout: Probability with which a gated feature is dropped in training; the paper has none.
        bias_by_place: Whether the first layer of the horizontal stack has a bias of its own for every pixel: the
            location-dependent term of eq. 5, with the place itself for s.
        order: One of the eight symmetries of the raster; see :data:`lightning_genmodels.orders.RASTER_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, a dropout outside of [0, 1), another pixel order.
    """

    small = {"event_shape": (1, 2, 3), "hidden_size": 3, "num_layers": 2, "first_kernel_size": 3, "kernel_size": 3}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_size: int = 64,
        num_layers: int = 8,
        first_kernel_size: int = 7,
        kernel_size: int = 5,
        dropout: float = 0.0,
        bias_by_place: bool = False,
        order: str = "raster",
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, **options)
        check_network(hidden_size, num_layers, (first_kernel_size, kernel_size), dropout)
        places = self.raster_shape if bias_by_place else None
        self.net = _Network(hidden_size, num_layers, first_kernel_size, kernel_size, dropout, places)
