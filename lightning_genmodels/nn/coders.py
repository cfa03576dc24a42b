"""Networks that map images to codes, and codes to images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genmodels.errors import OptionError

Network = Literal["mlp", "conv"]


def coders(
    network: Network,
    event_shape: tuple[int, int, int],
    hidden_sizes: Sequence[int],
    outputs: int,
    code_dim: int,
    dropout: float = 0.0,
) -> tuple[nn.Module, nn.Module]:
    """An encoder of pixels (B, n) to (B, outputs), and a decoder of codes (..., code_dim) to logits (..., n).

    Args:
        network: ``mlp`` (:func:`mlp`) or ``conv`` (:class:`ConvolutionalEncoder`, :class:`ConvolutionalDecoder`).
        event_shape: (1, H, W) of one image, of n pixels.
        hidden_sizes: Units, or channels, of the encoder's hidden layers; the decoder has them in reverse.
        outputs: Numbers that the encoder computes.
        code_dim: Numbers in a code.
        dropout: Fraction of hidden units, or channels, that training drops.

    Raises:
        OptionError: Another network, or a fraction outside [0, 1).
    """
    if network not in ("mlp", "conv"):
        raise OptionError(f"expected network 'mlp' or 'conv', got {network!r}")
    if not 0.0 <= dropout < 1.0:
        raise OptionError(f"expected dropout in [0, 1), got {dropout}")
    if network == "conv":
        return (
            ConvolutionalEncoder(event_shape, hidden_sizes, outputs, dropout),
            ConvolutionalDecoder(event_shape, hidden_sizes, code_dim, dropout),
        )
    pixels = math.prod(event_shape)
    return mlp([pixels, *hidden_sizes, outputs], dropout), mlp([code_dim, *reversed(hidden_sizes), pixels], dropout)


def output_bias(decoder: nn.Module) -> nn.Parameter:
    """The bias (n,) of the logits that a decoder of :func:`coders` computes."""
    output = decoder[-1] if isinstance(decoder, nn.Sequential) else decoder
    assert isinstance(output.bias, nn.Parameter)
    return output.bias


def mlp(sizes: list[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with tanh and dropout between them, and the weights of Glorot and Bengio (2010).

    Args:
        sizes: Units of all layers, from inputs to outputs.
        dropout: Fraction of hidden units that training drops.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sequential(nn.Tanh(), nn.Dropout(dropout)) if dropout else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class ConvolutionalEncoder(nn.Module):
    """Convolutions that each halve the image, with SiLU and dropout of whole channels, and a linear layer.

    Args:
        event_shape: (1, H, W) of one image.
        channels: Of every convolution.
        outputs: Numbers to compute.
        dropout: Fraction of channels that training drops (Tompson et al. 2015, "Efficient Object Localization Using
            Convolutional Networks", section 3.2).
    """

    def __init__(
        self, event_shape: tuple[int, int, int], channels: Sequence[int], outputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.event_shape = event_shape
        convolutions = [nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in itertools.pairwise([1, *channels])]
        self.convolutions = nn.ModuleList(convolutions)
        self.dropout = nn.Dropout2d(dropout)
        height, width = halved_sizes(event_shape, len(channels))[-1]
        self.linear = nn.Linear(channels[-1] * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pixels (B, n) to (B, ``outputs``)."""
        x = x.unflatten(-1, self.event_shape).contiguous(memory_format=torch.channels_last)
        for convolution in self.convolutions:
            x = self.dropout(F.silu(convolution(x)))
        output: Tensor = self.linear(x.flatten(1))
        return output


class ConvolutionalDecoder(nn.Module):
    """A linear layer, and transposed convolutions that each double the image, with SiLU and dropout of whole
    channels.

    Args:
        event_shape: (1, H, W) of one image.
        channels: Of the encoder's convolutions, which are undone in reverse.
        inputs: Numbers in a code.
        dropout: Fraction of channels that training drops (Tompson et al. 2015, "Efficient Object Localization Using
            Convolutional Networks", section 3.2).
    """

    def __init__(
        self, event_shape: tuple[int, int, int], channels: Sequence[int], inputs: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        *self.sizes, smallest = halved_sizes(event_shape, len(channels))
        self.shape = (channels[-1], *smallest)
        self.linear = nn.Linear(inputs, math.prod(self.shape))
        widths = itertools.pairwise([*reversed(channels), 1])
        self.convolutions = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, stride=2, padding=1) for i, o in widths)
        self.bias = nn.Parameter(torch.zeros(math.prod(event_shape)))
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, z: Tensor) -> Tensor:
        """Maps codes (..., D) to the logits of pixels (..., n)."""
        y = self.linear(z.flatten(0, -2)).unflatten(1, self.shape).contiguous(memory_format=torch.channels_last)
        for convolution, (height, width) in zip(self.convolutions, reversed(self.sizes), strict=True):
            y = convolution(self.dropout(F.silu(y)))[..., :height, :width]
        logits: Tensor = y.flatten(1) + self.bias
        return logits.view(*z.shape[:-1], len(self.bias))


def halved_sizes(event_shape: tuple[int, int, int], halvings: int) -> list[tuple[int, int]]:
    """Height and width of an image after none, one, two, ... halvings, rounded up."""
    _, height, width = event_shape
    return [(-(-height // 2**level), -(-width // 2**level)) for level in range(halvings + 1)]
