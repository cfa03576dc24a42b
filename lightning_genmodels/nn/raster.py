"""Networks that see an image row by row: causal convolutions, and what it takes to draw from them pixel by pixel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genmodels.errors import OptionError


class RasterNetwork(nn.Module, ABC):
    """Logits of all conditionals of an image in raster order: all at once, or one after the other from caches."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of images (B, 1, H, W) in {0, 1}."""

    def edges(self) -> list[nn.Module]:
        """Layers that read pixels or write logits, by their names."""
        return [self.get_submodule("first"), self.get_submodule("output")]

    @abstractmethod
    def conditionals(self, x: Tensor) -> Iterator[Tensor]:
        """Yields the log-odds (N,) of one pixel after the other, each computed from what was kept of those before it.

        Args:
            x: (N, 1, H, W); the caller writes a pixel into it before asking for the next one's logits. A pixel is
                never read before that.
        """


def check_network(hidden_size: int, num_layers: int, kernel_sizes: Sequence[int], dropout: float) -> None:
    """Checks the numbers that such a network is made of.

    Raises:
        OptionError: A number below one, an even kernel size, or a dropout outside of [0, 1).
    """
    is_odd = all(size > 0 and size % 2 for size in kernel_sizes)
    if min(hidden_size, num_layers) < 1 or not is_odd or not 0.0 <= dropout < 1.0:
        raise OptionError(
            f"expected hidden_size and num_layers of at least 1, odd kernel sizes and a dropout in [0, 1), got "
            f"hidden_size={hidden_size}, num_layers={num_layers}, kernel sizes {tuple(kernel_sizes)}, dropout={dropout}"
        )


class CausalConv2d(nn.Module):
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
        visible = torch.ones(self.above + 1, width, device="cpu")
        visible[-1, self.left :] = 0
        self.register_buffer("mask", visible, persistent=False)
        bound = 1 / math.sqrt(max(1, inputs * (self.above * width + self.left)))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, self.above + 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None
        self.bias_of_places = nn.Parameter(torch.zeros(outputs, *places)) if places else None  # (outputs, H, W)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H, W)."""
        # Rows are padded at the top alone: cropping the result instead leaves it, and its gradient, with gaps.
        x = F.pad(x, (0, 0, self.above, 0)) if self.above else x
        y = F.conv2d(x, self.weight * self.mask, self.bias, padding=(0, self.side))
        return y if self.bias_of_places is None else y + self.bias_of_places


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
