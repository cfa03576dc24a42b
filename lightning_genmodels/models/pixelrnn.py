"""PixelCNN, Row LSTM and Diagonal BiLSTM (van den Oord, Kalchbrenner and Kavukcuoglu 2016, "Pixel Recurrent Neural
Networks").

The paper's notation: h is the number of features of a layer's inside, whose input and output have 2h (fig. 5); K^is and
K^ss are the input-to-state and the state-to-state convolution of an LSTM, o, f, i and g its gates (eq. 3). All three
networks start with a 7x7 convolution with mask A and end with two 1x1 convolutions, each after a ReLU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import RasterModel, TrainingOptions
from lightning_genmodels.nn.raster import CausalConv2d, ConvCache, Pointwise, RasterNetwork, check_network
from lightning_genmodels.nn.recurrent import ChannelsFirstLinear, LineLSTM, gates_to_state


class _ResidualBlock(nn.Module):
    """ReLU and 1x1, ReLU and 3x3 with mask B, ReLU and 1x1 convolution, added to the input (fig. 5, left)."""

    def __init__(self, hidden: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.reduce = Pointwise(2 * hidden, hidden)
        self.conv = CausalConv2d(hidden, hidden, kernel_size)
        self.expand = Pointwise(hidden, 2 * hidden)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(F.relu(self.reduce(F.relu(x)))))
        added: Tensor = self.expand(F.dropout(y, self.dropout, self.training))
        return x + added


class _PixelCNNNetwork(RasterNetwork):
    def __init__(
        self, hidden: int, layers: int, first_kernel: int, kernel: int, dropout: float, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(1, 2 * hidden, first_kernel, "A", places=places)
        self.blocks: Any = nn.ModuleList(_ResidualBlock(hidden, kernel, dropout) for _ in range(layers))
        self.head = Pointwise(2 * hidden, 2 * hidden)
        self.output = Pointwise(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            h = block(h)
        return self._logits(h)

    def _logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.output(F.relu(self.head(F.relu(h))))
        return logits

    def conditionals(self, x: Tensor) -> Iterator[Tensor]:
        size, _, height, width = x.shape
        first = ConvCache(self.first, size, width)
        caches = [ConvCache(block.conv, size, width) for block in self.blocks]
        for i in range(height):
            for cache in (first, *caches):
                cache.start_row()
            for j in range(width):
                h = first.at(j)  # (N, 2h)
                for block, cache in zip(self.blocks, caches, strict=True):
                    cache.write(j, F.relu(block.reduce(F.relu(h))))
                    h = h + block.expand(F.relu(cache.at(j)))
                yield self._logits(h)[:, 0]
                first.write(j, x[:, :, i, j])


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


class _LSTMNetwork(RasterNetwork, ABC):
    """What Row LSTM and Diagonal BiLSTM share; channels come first and images last, see :class:`LineLSTM`."""

    def __init__(
        self, layers: Sequence[nn.Module], hidden: int, first_kernel: int, places: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(1, 2 * hidden, first_kernel, "A", places=places)
        self.layers: Any = nn.ModuleList(layers)
        self.head = ChannelsFirstLinear(2 * hidden, 2 * hidden)
        self.output = ChannelsFirstLinear(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).permute(1, 2, 3, 0).contiguous()  # (2h, H, W, B)
        for layer in self.layers:
            h = layer(h)
        return self._logits(h).permute(3, 0, 1, 2)

    def _logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.output(F.relu(self.head(F.relu(h))))
        return logits

    @abstractmethod
    def conditionals(self, x: Tensor) -> Iterator[Tensor]: ...


class _LSTMModel(RasterModel, ABC):
    """What Row LSTM and Diagonal BiLSTM share; their docstrings say what the arguments are."""

    network: ClassVar[Any]
    """The class of ``net``, a :class:`_LSTMNetwork`."""

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
        shape = self.raster_shape
        self.net = type(self).network(hidden_size, num_layers, shape, first_kernel_size, dropout, bias_by_place)


class _RowLSTMLayer(nn.Module):
    """A convolutional LSTM that goes down row by row: K^is is 3x1 with mask B, K^ss 3x1 with no mask (sec. 3.1)."""

    def __init__(self, hidden: int, height: int, width: int, dropout: float) -> None:
        super().__init__()
        self.input_to_state = ChannelsFirstLinear(4 * hidden, 4 * hidden)  # of a pixel and the one to its left
        self.lstm = LineLSTM(hidden, [range(width)] * height, offsets=(0, -1, 1))
        self.expand = ChannelsFirstLinear(hidden, 2 * hidden)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        left = F.pad(x, (0, 0, 1, -1))  # (2h, H, W, B)
        gates = self.input_to_state(torch.cat([x, left])).flatten(1, 2)  # (4h, n, B)
        h = self.lstm(gates.unsqueeze(0)).view(-1, *x.shape[1:])
        added: Tensor = self.expand(F.dropout(h, self.dropout, self.training))
        return x + added


class _RowLSTMNetwork(_LSTMNetwork):
    def __init__(
        self, hidden: int, layers: int, shape: tuple[int, int], first_kernel: int, dropout: float, by_place: bool
    ) -> None:
        modules = [_RowLSTMLayer(hidden, *shape, dropout) for _ in range(layers)]
        super().__init__(modules, hidden, first_kernel, shape if by_place else None)

    def conditionals(self, x: Tensor) -> Iterator[Tensor]:
        size, _, height, width = x.shape
        first = ConvCache(self.first, size, width)
        weights = torch.stack([torch.cat(list(layer.lstm.weight[:, 0]), dim=1) for layer in self.layers])  # (L, 4h, 3h)
        hidden = x.new_zeros((len(self.layers), weights.shape[-1] // 3, width, size))  # (L, h, W, N) of the row above
        cells = torch.zeros_like(hidden)
        for i in range(height):
            first.start_row()
            seen = torch.cat([F.pad(hidden, (0, 0, -offset, offset)) for offset in (0, -1, 1)], dim=1)
            above = (weights @ seen.flatten(2)).view(len(self.layers), -1, width, size)  # (L, 4h, W, N)
            lefts = [x.new_zeros((len(self.first.weight), size)) for _ in self.layers]  # inputs at the pixel before
            for j in range(width):
                y = first.at(j).T  # (2h, N)
                for index, layer in enumerate(self.layers):
                    gates = layer.input_to_state(torch.cat([y, lefts[index]])) + above[index, :, j]
                    lefts[index] = y
                    hidden[index, :, j], cells[index, :, j] = gates_to_state(gates, cells[index, :, j])
                    y = y + layer.expand(hidden[index, :, j])
                yield self._logits(y)[0]
                first.write(j, x[:, :, i, j])


class RowLSTM(_LSTMModel):
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

    network = _RowLSTMNetwork


class _DiagonalBiLSTMLayer(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[2]
        pixels = x.flatten(1, 2)  # (2h, n, B)
        skewed = torch.stack([pixels.index_select(1, scan) for scan in self.scans])  # (2, 2h, n, B)
        gates = torch.baddbmm(self.bias, self.input_to_state, skewed.flatten(2))
        from_left, from_right = self.lstm(gates.view(2, -1, *skewed.shape[2:]))  # (h, n, B) each
        h = from_left.index_select(1, self.places[0])
        h = h + F.pad(from_right.index_select(1, self.places[1, :-width]), (0, 0, width, 0))
        added: Tensor = self.expand(F.dropout(h, self.dropout, self.training))
        return x + added.view_as(x)


class _DiagonalBiLSTMNetwork(_LSTMNetwork):
    """It sees one more column, of zeros, at the right: only features there have seen the last pixel of the row, which
    could otherwise not reach the start of the next one.
    """

    def __init__(
        self, hidden: int, layers: int, shape: tuple[int, int], first_kernel: int, dropout: float, by_place: bool
    ) -> None:
        height, width = shape
        modules = [_DiagonalBiLSTMLayer(hidden, height, width + 1, dropout) for _ in range(layers)]
        super().__init__(modules, hidden, first_kernel, (height, width + 1) if by_place else None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1)))[..., :-1]

    def conditionals(self, x: Tensor) -> Iterator[Tensor]:
        size, _, height, width = x.shape
        columns = width + 1
        first = ConvCache(self.first, size, columns)
        count, features = len(self.layers), len(self.first.weight)
        # Of both directions, for all layers: (L, 4h, 2h), (L, 4h, 1), and (L, 4h, h) from beside and from above.
        into = torch.stack([layer.input_to_state for layer in self.layers], dim=1)
        bias = torch.stack([layer.bias for layer in self.layers], dim=1)
        beside, above = torch.stack([layer.lstm.weight for layer in self.layers], dim=2)
        inputs = x.new_zeros((count, features, columns, size))  # (L, 2h, W + 1, N) of a row, to each layer
        left = x.new_zeros((count, features // 2, columns, size))  # (L, h, W + 1, N) states of a row
        right = torch.zeros_like(left)  # those of the row above it
        for i in range(height):
            first.start_row()
            if i > 0:
                right = self._from_right(into[1], bias[1], beside[1], above[1], inputs, right)
            base = torch.baddbmm(bias[0], above[0], left.flatten(2)).view(count, -1, columns, size)  # (L, 4h, W + 1, N)
            cells: list[Tensor | None] = [None] * count
            for j in range(columns):
                y = first.at(j).T  # (2h, N)
                for index, layer in enumerate(self.layers):
                    inputs[index, :, j] = y
                    gates = torch.addmm(base[index, :, j], into[0, index], y)
                    if j > 0:
                        gates.addmm_(beside[0, index], left[index, :, j - 1])
                    h, cells[index] = gates_to_state(gates, cells[index])
                    left[index, :, j] = h
                    y = y + layer.expand(h + right[index, :, j])
                if j < width:
                    yield self._logits(y)[0]
                    first.write(j, x[:, :, i, j])

    @staticmethod
    def _from_right(
        into: Tensor, bias: Tensor, beside: Tensor, above: Tensor, inputs: Tensor, before: Tensor
    ) -> Tensor:
        """States (L, h, W + 1, N) of a row that is complete, from the right, all layers at once."""
        gates = torch.baddbmm(bias, into, inputs.flatten(2)).baddbmm_(above, before.flatten(2))
        gates = gates.view(len(inputs), -1, *inputs.shape[2:])  # (L, 4h, W + 1, N)
        states = torch.empty_like(before)
        h, cell = torch.zeros_like(before[:, :, 0]), None
        for j in reversed(range(inputs.shape[2])):
            h, cell = gates_to_state(torch.baddbmm(gates[:, :, j], beside, h), cell)
            states[:, :, j] = h
        return states


class DiagonalBiLSTM(_LSTMModel):
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

    network = _DiagonalBiLSTMNetwork
