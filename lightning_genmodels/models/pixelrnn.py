"""PixelCNN, Row LSTM and Diagonal BiLSTM (van den Oord, Kalchbrenner and Kavukcuoglu 2016, "Pixel Recurrent Neural
Networks").

The paper's notation: h is the number of features of a layer's inside, whose input and output have 2h (fig. 5); K^is and
K^ss are the input-to-state and the state-to-state convolution of an LSTM, o, f, i and g its gates (eq. 3). All three
networks start with a 7x7 convolution with mask A and end with two 1x1 convolutions, each after a ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import RasterModel, TrainingOptions
from lightning_genmodels.nn.raster import (
    CausalConv2d,
    CausalLayer,
    CausalNetwork,
    ConvCache,
    Pointwise,
    check_network,
)
from lightning_genmodels.nn.recurrent import ChannelsFirstLinear, LineLSTM, gates_to_state


class _ResidualBlock(CausalLayer):
    """ReLU and 1x1, ReLU and 3x3 with mask B, ReLU and 1x1 convolution, added to the input (fig. 5, left)."""

    def __init__(self, hidden: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.reduce = Pointwise(2 * hidden, hidden)
        self.conv = CausalConv2d(hidden, hidden, kernel_size)
        self.expand = Pointwise(hidden, 2 * hidden)
        self.dropout = dropout

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        return self._add(h, self.conv(self._inside(h)))

    def cache(self, num_images: int, height: int, width: int) -> ConvCache:
        return self.conv.cache(num_images, height, width)

    def step(self, h: Tensor, cache: ConvCache, row: int, column: int, given: Tensor | None = None) -> Tensor:
        return self._add(h, self.conv.step(self._inside(h), cache, row, column))

    def _inside(self, h: Tensor) -> Tensor:
        return F.relu(self.reduce(F.relu(h)))

    def _add(self, h: Tensor, y: Tensor) -> Tensor:
        added: Tensor = self.expand(F.dropout(F.relu(y), self.dropout, self.training))
        return h + added


class _PixelCNNNetwork(CausalNetwork):
    def __init__(
        self, hidden: int, layers: int, first_kernel: int, kernel: int, dropout: float, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(1, 2 * hidden, first_kernel, "A", places=places)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden, kernel, dropout) for _ in range(layers))
        self.head = Pointwise(2 * hidden, 2 * hidden)
        self.output = Pointwise(2 * hidden, 1)

    def sequence(self) -> Sequence[CausalLayer]:
        return self.blocks  # type: ignore[return-value]


class PixelCNN(RasterModel):
    """p(x_i = 1 | x_<i) by masked convolutions: all conditionals at once, from a bounded context.

    The context has a blind spot: stacked 3x3 convolutions never see what lies far to the right in the rows above.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_size: h, features inside of a residual block; the paper does not say how many it has for MNIST.
        num_layers: Residual blocks.
        first_kernel_size: Of the first convolution, with mask A; 7 in the paper, 27 in the weight that ships.
        kernel_size: Of those in the blocks, with mask B.
        dropout: Probability with which a feature is dropped in training; the paper has none.
        bias_by_place: Whether the first convolution has a bias of its own for every pixel, which the paper has not: a
            context of few pixels does not say where in the image it lies.
        order: One of the eight symmetries of the raster; see :data:`lightning_genmodels.orders.RASTER_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, a dropout outside of [0, 1), another pixel order.
    """

    small = {"event_shape": (1, 2, 3), "hidden_size": 3, "num_layers": 2, "first_kernel_size": 3}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_size: int = 32,
        num_layers: int = 7,
        first_kernel_size: int = 7,
        kernel_size: int = 3,
        dropout: float = 0.0,
        bias_by_place: bool = False,
        order: str = "raster",
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, **options)
        check_network(hidden_size, num_layers, (first_kernel_size, kernel_size), dropout)
        places = self.raster_shape if bias_by_place else None
        self.net = _PixelCNNNetwork(hidden_size, num_layers, first_kernel_size, kernel_size, dropout, places)


class _LSTMNetwork(CausalNetwork):
    """What Row LSTM and Diagonal BiLSTM share; channels come first and images last, see :class:`LineLSTM`."""

    def __init__(
        self, layers: Sequence[nn.Module], hidden: int, first_kernel: int, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(1, 2 * hidden, first_kernel, "A", places=places)
        self.layers = nn.ModuleList(layers)
        self.head = ChannelsFirstLinear(2 * hidden, 2 * hidden)
        self.output = ChannelsFirstLinear(2 * hidden, 1)

    def embed(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x).movedim(0, -1)
        return h.contiguous()  # (2h, H, W, B)

    def embed_next(self, before: Tensor, cache: ConvCache, row: int, column: int) -> Tensor:
        return super().embed_next(before, cache, row, column).T  # (2h, N)

    def logits(self, h: Tensor) -> Tensor:
        return super().logits(h).movedim(-1, 0)


class _RowLSTMLayer(CausalLayer):
    """A convolutional LSTM that goes down row by row: K^is is 3x1 with mask B, K^ss 3x1 with no mask (sec. 3.1)."""

    def __init__(self, hidden: int, height: int, width: int, dropout: float) -> None:
        super().__init__()
        self.input_to_state = ChannelsFirstLinear(4 * hidden, 4 * hidden)  # of a pixel and the one to its left
        self.lstm = LineLSTM(hidden, [range(width)] * height, offsets=(0, -1, 1))
        self.expand = ChannelsFirstLinear(hidden, 2 * hidden)
        self.dropout = dropout

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        left = F.pad(h, (0, 0, 1, -1))  # (2h, H, W, B)
        gates = self.input_to_state(torch.cat([h, left])).flatten(1, 2)  # (4h, n, B)
        states = self.lstm(gates.unsqueeze(0)).view(-1, *h.shape[1:])
        added: Tensor = self.expand(F.dropout(states, self.dropout, self.training))
        return h + added

    def cache(self, num_images: int, height: int, width: int) -> _RowCache:
        return _RowCache(self.lstm.weight[:, 0], num_images, width)

    def step(self, h: Tensor, cache: _RowCache, row: int, column: int, given: Tensor | None = None) -> Tensor:
        gates = self.input_to_state(torch.cat([h, cache.left])) + cache.above[:, column]
        state, cache.cells[:, column] = gates_to_state(gates, cache.cells[:, column])
        cache.states[:, column], cache.left = state, h
        added: Tensor = self.expand(state)
        return h + added


class _RowCache:
    """States and cells (h, W, N) of a row, at first of the one above, and what comes from above to the gates."""

    def __init__(self, weight: Tensor, num_images: int, width: int) -> None:
        self.weight = torch.cat(list(weight), dim=1)  # (4h, 3h)
        self.states = weight.new_zeros((weight.shape[-1], width, num_images))
        self.cells = torch.zeros_like(self.states)
        self.start_row()

    def start_row(self) -> None:
        """Goes on to the next row."""
        seen = torch.cat([F.pad(self.states, (0, 0, -offset, offset)) for offset in (0, -1, 1)])
        self.above = (self.weight @ seen.flatten(1)).unflatten(1, self.states.shape[1:])  # (4h, W, N)
        self.left = self.states.new_zeros((2 * len(self.states), self.states.shape[-1]))  # input at the pixel before


class _RowLSTMNetwork(_LSTMNetwork):
    def __init__(
        self, hidden: int, layers: int, shape: tuple[int, int], first_kernel: int, dropout: float, by_place: bool
    ) -> None:
        modules = [_RowLSTMLayer(hidden, *shape, dropout) for _ in range(layers)]
        super().__init__(modules, hidden, first_kernel, shape if by_place else None)


class RowLSTM(RasterModel):
    """p(x_i = 1 | x_<i) by LSTMs that go down the image row by row, each state from three of the row above.

    The context is a triangle above the pixel, and the row itself to its left as far as the input-to-state convolutions
    reach.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_size: h, features of an LSTM's state.
        num_layers: LSTM layers.
        first_kernel_size: Of the first convolution, with mask A.
        dropout: Probability with which a feature is dropped in training; the paper has none.
        bias_by_place: Whether the first convolution has a bias of its own for every pixel, which the paper has not.
        order: One of the eight symmetries of the raster; see :data:`lightning_genmodels.orders.RASTER_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, a dropout outside of [0, 1), another pixel order.
    """

    small = {"event_shape": (1, 2, 3), "hidden_size": 3, "num_layers": 2, "first_kernel_size": 3}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_size: int = 16,
        num_layers: int = 7,
        first_kernel_size: int = 7,
        dropout: float = 0.0,
        bias_by_place: bool = False,
        order: str = "raster",
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, **options)
        check_network(hidden_size, num_layers, (first_kernel_size,), dropout)
        self.net = _RowLSTMNetwork(
            hidden_size, num_layers, self.raster_shape, first_kernel_size, dropout, bias_by_place
        )


class _DiagonalBiLSTMLayer(CausalLayer):
    """Two LSTMs that go along the diagonals from both upper corners: K^is is 1x1, K^ss 2x1 (sec. 3.2).

    The state of a pixel follows from those to its left (or right) and above it. What comes from the right would see the
    rest of the row, and so moves down by one row before the two are added.
    """

    matrices = ("input_to_state",)

    scans: Tensor
    places: Tensor

    def __init__(self, hidden: int, height: int, width: int, dropout: float) -> None:
        super().__init__()
        self.input_to_state = nn.Parameter(torch.empty(2, 4 * hidden, 2 * hidden))
        self.bias = nn.Parameter(torch.zeros(2, 4 * hidden, 1))
        nn.init.uniform_(self.input_to_state, -1 / math.sqrt(2 * hidden), 1 / math.sqrt(2 * hidden))
        lines = [range(max(0, d - width + 1), min(d + 1, height)) for d in range(height + width - 1)]  # rows of each
        self.lstm = LineLSTM(hidden, lines, offsets=(0, -1), directions=2)
        self.expand = ChannelsFirstLinear(hidden, 2 * hidden)
        self.dropout = dropout
        # The image is skewed by indexing: in step d of a scan, row i has its pixel in column d - i.
        pixels = torch.arange(height * width, device="cpu").view(height, width)
        row = torch.tensor([i for line in lines for i in line], device="cpu")
        step = torch.tensor([d for d, line in enumerate(lines) for _ in line], device="cpu")
        scans = torch.stack([grid[row, step - row] for grid in (pixels, pixels.flip(1))])
        self.register_buffer("scans", scans, persistent=False)  # (2, n) pixels in the order of the scan
        self.register_buffer("places", scans.argsort(1), persistent=False)  # (2, n) where in the scan a pixel is

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        width = h.shape[2]
        pixels = h.flatten(1, 2)  # (2h, n, B)
        skewed = torch.stack([pixels.index_select(1, scan) for scan in self.scans])  # (2, 2h, n, B)
        gates = torch.baddbmm(self.bias, self.input_to_state, skewed.flatten(2))
        from_left, from_right = self.lstm(gates.view(2, -1, *skewed.shape[2:]))  # (h, n, B) each
        states = from_left.index_select(1, self.places[0])
        states = states + F.pad(from_right.index_select(1, self.places[1, :-width]), (0, 0, width, 0))
        added: Tensor = self.expand(F.dropout(states, self.dropout, self.training))
        return h + added.view_as(h)

    def cache(self, num_images: int, height: int, width: int) -> _DiagonalCache:
        return _DiagonalCache(self, num_images, width)

    def step(self, h: Tensor, cache: _DiagonalCache, row: int, column: int, given: Tensor | None = None) -> Tensor:
        cache.inputs[:, column] = h
        gates = torch.addmm(cache.above[:, column], self.input_to_state[0], h)
        if column:
            gates.addmm_(self.lstm.weight[0, 0], cache.left[:, column - 1])
        state, cache.cell = gates_to_state(gates, cache.cell if column else None)
        cache.left[:, column] = state
        added: Tensor = self.expand(state + cache.right[:, column])
        return h + added


class _DiagonalCache:
    """A row's inputs (2h, W, N) and states from the left (h, W, N), at first those of the row above.

    ``above`` (4h, W, N) is what these add to the gates; ``right`` (h, W, N) has the states of that row from the right.
    """

    def __init__(self, layer: _DiagonalBiLSTMLayer, num_images: int, width: int) -> None:
        self.layer = layer
        self.inputs = layer.bias.new_zeros((layer.input_to_state.shape[2], width, num_images))
        self.left = layer.bias.new_zeros((len(self.inputs) // 2, width, num_images))
        self.right = torch.zeros_like(self.left)
        self.cell: Tensor | None = None
        self.begun = False

    def start_row(self) -> None:
        """Goes on to the next row: that above it is complete, and can be scanned from the right."""
        into, bias, (beside, above) = self.layer.input_to_state, self.layer.bias, self.layer.lstm.weight
        if self.begun:
            gates = torch.addmm(bias[1], into[1], self.inputs.flatten(1)).addmm_(above[1], self.right.flatten(1))
            gates, states = gates.unflatten(1, self.left.shape[1:]), torch.empty_like(self.right)
            h, cell = torch.zeros_like(self.right[:, 0]), None
            for column in reversed(range(states.shape[1])):
                h, cell = gates_to_state(torch.addmm(gates[:, column], beside[1], h), cell)
                states[:, column] = h
            self.right = states
        self.above = torch.addmm(bias[0], above[0], self.left.flatten(1)).unflatten(1, self.left.shape[1:])
        self.begun = True


class _DiagonalBiLSTMNetwork(_LSTMNetwork):
    """It sees one more column, of zeros, at the right: only features there have seen the last pixel of the row, which
    could otherwise not reach the start of the next one.
    """

    margin = 1

    def __init__(
        self, hidden: int, layers: int, shape: tuple[int, int], first_kernel: int, dropout: float, by_place: bool
    ) -> None:
        height, width = shape
        modules = [_DiagonalBiLSTMLayer(hidden, height, width + 1, dropout) for _ in range(layers)]
        super().__init__(modules, hidden, first_kernel, (height, width + 1) if by_place else None)


class DiagonalBiLSTM(RasterModel):
    """p(x_i = 1 | x_<i) by LSTMs that go along the diagonals from both upper corners: every earlier pixel is context.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_size: h, features of an LSTM's state.
        num_layers: Layers of two LSTMs each; 7 in the paper, and 1 in its comparison.
        first_kernel_size: Of the first convolution, with mask A.
        dropout: Probability with which a feature is dropped in training; the paper has none.
        bias_by_place: Whether the first convolution has a bias of its own for every pixel, which the paper has not.
        order: One of the eight symmetries of the raster; see :data:`lightning_genmodels.orders.RASTER_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, a dropout outside of [0, 1), another pixel order.
    """

    small = {"event_shape": (1, 2, 3), "hidden_size": 3, "num_layers": 2, "first_kernel_size": 3}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_size: int = 16,
        num_layers: int = 7,
        first_kernel_size: int = 7,
        dropout: float = 0.0,
        bias_by_place: bool = False,
        order: str = "raster",
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, **options)
        check_network(hidden_size, num_layers, (first_kernel_size,), dropout)
        self.net = _DiagonalBiLSTMNetwork(
            hidden_size, num_layers, self.raster_shape, first_kernel_size, dropout, bias_by_place
        )
