"""Networks that are causal in raster order, and their caches for sampling pixel by pixel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genmodels.errors import OptionError


class CausalLayer(nn.Module, ABC):
    """A layer of a :class:`CausalNetwork`, which sees no later place: for a whole map at once, and for the next place.

    ``given`` is what the whole image is conditioned on, such as the index of a pixel order; most layers ignore it.
    """

    @abstractmethod
    def forward(self, h: Any, given: Tensor | None = None) -> Any:
        """Maps the features of all places, (B, C, H, W)."""

    @abstractmethod
    def cache(self, num_images: int, height: int, width: int) -> Any:
        """The state that :meth:`step` keeps of earlier places."""

    def start_row(self, cache: Any, above: Tensor | None) -> Tensor | None:
        """Goes on to the next row; those above it are complete.

        Args:
            cache: See :meth:`cache`.
            above: (N, C, W) what the layer below says of the row above; None for the first row.

        Returns:
            What this layer says of it to the next one.
        """
        cache.start_row()
        return above

    @abstractmethod
    def step(self, h: Tensor, cache: Any, row: int, column: int, given: Tensor | None = None) -> Tensor:
        """Maps the features (N, C) of the next place, from those before it: equal to :meth:`forward` there."""


class CausalNetwork(nn.Module):
    """Logits of all conditionals of a map in raster order: all at once, or one after the other from caches.

    ``first`` sees the places before, and not the place itself; the layers of :meth:`sequence`, ``head`` and ``output``
    follow.
    """

    first: Any
    layers: Any
    head: Any
    output: Any

    margin: ClassVar[int] = 0
    """Columns of zeros that the network sees to the right of a map."""

    def sequence(self) -> Sequence[CausalLayer]:
        """The layers after the first, in the order of their use."""
        layers: Sequence[CausalLayer] = self.layers
        return layers

    def edges(self) -> list[nn.Module]:
        """Layers that read pixels or write logits."""
        return [self.first, self.output]

    def embed(self, x: Tensor) -> Any:
        """The features of all places before the layers, of a map (B, C, H, W)."""
        return self.first(x).contiguous(memory_format=torch.channels_last)

    def embed_next(self, before: Tensor, cache: Any, row: int, column: int) -> Tensor:
        """The features of the next place before the layers, given the value (N, C) of the place before it."""
        embedded: Tensor = self.first.step(before, cache, row, column)
        return embedded

    def logits(self, h: Any) -> Tensor:
        """Logits, given the features of all places or of one."""
        logits: Tensor = self.output(F.relu(self.head(F.relu(h))))
        return logits

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits (B, O, H, W) of maps (B, C, H, W)."""
        h = self.embed(F.pad(x, (0, self.margin)))
        for layer in self.sequence():
            h = layer(h, given)
        return self.logits(h)[..., : x.shape[-1]]

    def conditionals(self, x: Tensor, given: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the logits (N, O) of one place after the other, each computed from what was kept of those before it.

        Args:
            x: (N, C, H, W); the caller writes a place into it before asking for the next one's logits. A place is
                never read before that.
            given: See :class:`CausalLayer`.
        """
        size, channels, height, width = x.shape
        layers = [self.first, *self.sequence()]
        caches = [layer.cache(size, height, width + self.margin) for layer in layers]
        before = x.new_zeros((size, channels))
        for row in range(height):
            above = x[:, :, row - 1] if row else None
            for layer, cache in zip(layers, caches, strict=True):
                above = layer.start_row(cache, above)
            for column in range(width + self.margin):
                h = self.embed_next(before, caches[0], row, column)
                for layer, cache in zip(layers[1:], caches[1:], strict=True):
                    h = layer.step(h, cache, row, column, given)
                if column < width:
                    yield self.logits(h)
                    before = x[:, :, row, column]


def check_network(hidden_size: int, num_layers: int, kernel_sizes: Sequence[int], dropout: float) -> None:
    """Checks the sizes of a causal network.

    Raises:
        OptionError: A number below one, an even kernel size, or a dropout outside of [0, 1).
    """
    is_odd = all(size > 0 and size % 2 for size in kernel_sizes)
    if min(hidden_size, num_layers) < 1 or not is_odd or not 0.0 <= dropout < 1.0:
        raise OptionError(
            f"expected hidden_size and num_layers of at least 1, odd kernel sizes and a dropout in [0, 1), got "
            f"hidden_size={hidden_size}, num_layers={num_layers}, kernel sizes {tuple(kernel_sizes)}, dropout={dropout}"
        )


class CausalConv2d(CausalLayer):
    """A convolution that sees what comes before a pixel in raster order (van den Oord et al. 2016, fig. 4).

    Rows below the pixel, which the paper masks, are left out of the kernel; only the pixels to its right are masked.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel_size: Odd height and width of the whole kernel, or both in one number; a height of 1 sees one row.
        mask: ``A`` leaves out the pixel itself, as the first layer must; ``B`` has it; None has the whole row.
        bias: Whether to add one.
        places: H and W of images at every place of which another bias is added; None for one bias everywhere.
    """

    mask: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | tuple[int, int],
        mask: Literal["A", "B"] | None = "B",
        bias: bool = True,
        places: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.above, self.side = height // 2, width // 2  # rows above, and columns on each side, that are seen
        self.left = width if mask is None else self.side + (mask == "B")  # pixels seen in the row itself
        self.sees_itself = mask != "A"
        visible = torch.ones(self.above + 1, width, device="cpu")
        visible[-1, self.left :] = 0
        self.register_buffer("mask", visible, persistent=False)
        bound = 1 / math.sqrt(max(1, inputs * (self.above * width + self.left)))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.above + 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None
        self.bias_of_places = nn.Parameter(torch.zeros(outputs, *places)) if places else None  # (outputs, H, W)

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H, W)."""
        # Rows are padded at the top alone: cropping the result instead leaves it, and its gradient, with gaps.
        h = F.pad(h, (0, 0, self.above, 0)) if self.above else h
        y = F.conv2d(h, self.weight * self.mask, self.bias, padding=(0, self.side))
        return y if self.bias_of_places is None else y + self.bias_of_places

    def cache(self, num_images: int, height: int, width: int) -> ConvCache:
        """The rows that it sees."""
        return ConvCache(self, num_images, width)

    def start_row(self, cache: ConvCache, above: Tensor | None) -> Tensor | None:
        """Goes on to the next row; with mask A, no step has seen the last value of the row above."""
        if above is not None and not self.sees_itself:
            cache.write(above.shape[2] - 1, above[:, :, -1])
        return super().start_row(cache, above)

    def step(self, h: Tensor, cache: ConvCache, row: int, column: int, given: Tensor | None = None) -> Tensor:
        """Maps the value (N, inputs) of a place to (N, outputs); with mask A, that of the place before it."""
        if self.sees_itself:
            cache.write(column, h)
        elif column:
            cache.write(column - 1, h)
        return cache.at(column)


class ConvCache:
    """Computes a :class:`CausalConv2d` pixel by pixel, from the rows it sees; what comes from above, a row at a time.

    Args:
        conv: The convolution.
        num_images: N.
        width: W of the images.
    """

    def __init__(self, conv: CausalConv2d, num_images: int, width: int) -> None:
        self.conv = conv
        weight = (conv.weight * conv.mask).detach()  # (O, I, rows, columns)
        self._from_above = weight[:, :, : conv.above].contiguous(memory_format=torch.channels_last)
        self._from_left = weight[:, :, -1, : conv.left].permute(2, 1, 0).flatten(0, 1)  # (left * I, O)
        # Inputs (N, above + 1, W + 2 side, I) of the rows that are seen, the last of which is the one at hand.
        self._rows = weight.new_zeros((num_images, conv.above + 1, width + 2 * conv.side, weight.shape[1]))
        self._bias = weight.new_zeros((num_images, width, len(weight)))
        if conv.bias is not None:
            self._bias += conv.bias.detach()
        self._base = self._bias  # what is known of a row before its first pixel
        self._row = -1

    def start_row(self, added: Tensor | None = None) -> None:
        """Goes on to the next row (at the start, the first); those above it are complete.

        Args:
            added: (N, O, W), what comes from elsewhere to the outputs of this row.
        """
        self._row += 1
        self._base = self._bias
        if self.conv.above:
            self._rows = torch.cat([self._rows[:, 1:], torch.zeros_like(self._rows[:, :1])], dim=1)
            above = self._rows[:, :-1].permute(0, 3, 1, 2)  # (N, I, above, W + 2 side)
            self._base = F.conv2d(above, self._from_above, self.conv.bias)[:, :, 0].transpose(1, 2)  # (N, W, O)
        if self.conv.bias_of_places is not None:
            self._base = self._base + self.conv.bias_of_places[:, self._row].T
        if added is not None:
            self._base = self._base + added.transpose(1, 2)
        # With a height of 1, what the last row left to the right of a pixel is never looked at.

    def write(self, column: int, value: Tensor) -> None:
        """Keeps the input (N, I) at a pixel of the row."""
        self._rows[:, -1, column + self.conv.side] = value

    def at(self, column: int) -> Tensor:
        """The output (N, O) at a pixel of the row, of which all inputs that it sees are written."""
        seen = self._rows[:, -1, column : column + self.conv.left]  # (N, left, I)
        return torch.addmm(self._base[:, column], seen.flatten(1), self._from_left)


class Pointwise(nn.Linear):
    """A 1x1 convolution: a linear map of the channels, of a map (B, C, H, W) or of single pixels (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps the channels of (B, C, H, W) or (N, C)."""
        if x.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)
