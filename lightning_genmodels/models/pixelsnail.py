"""PixelSNAIL (Chen, Mishra, Rohaninejad and Abbeel 2018, "PixelSNAIL: An Improved Autoregressive Generative Model"),
built for small sets of binary images: one network for several symmetries of the raster order, and their mixture.

Causal convolutions see near pixels sharply, attention sees all earlier ones (sec. 2). What is added is against
overfitting: the network learns every order at once, told which, on images that are turned so that the order is the
plain raster. Mixtures of orders are from Uria, Murray and Larochelle (2014); with convolutions from Jain, Abbeel and
Pathak (2020).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import OrderMixture, TrainingOptions, fill_raster, from_raster, to_raster
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import RASTER_ORDERS, bernoulli_log_prob, raster_shape
from lightning_genmodels.nn.raster import CausalConv2d, ConvCache, Pointwise

_FREQUENCIES = 4


class _ChannelNorm(nn.LayerNorm):
    """Normalizes the channels of every pixel by themselves, of (B, C, H, W) or (N, C): no pixel sees another."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        last = x.permute(0, 2, 3, 1)
        return F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class _GatedBlock(nn.Module):
    """A gated residual block (Chen et al. 2018, fig. 3): a causal convolution, and a gate that is told the order."""

    def __init__(self, channels: int, kernel_size: int, num_orders: int, dropout: float) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.conv = CausalConv2d(channels, channels, kernel_size)
        self.gate = Pointwise(channels, 2 * channels)
        self.order = nn.Embedding(num_orders, channels)
        self.dropout = dropout
        nn.init.normal_(self.order.weight, std=0.1)
        nn.init.zeros_(self.gate.weight)  # a block starts as the identity
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.add(x, self.conv(F.silu(self.norm(x))), which)

    def add(self, x: Tensor, y: Tensor, which: Tensor) -> Tensor:
        """The output, from the input x and its convolution y, of (B, C, H, W) or (N, C) each."""
        told = self.order(which)
        y = F.silu(y + (told if y.ndim == 2 else told[:, :, None, None]))
        a, b = self.gate(F.dropout(y, self.dropout, self.training)).chunk(2, dim=1)
        added: Tensor = a * torch.sigmoid(b)
        return x + added


class _AttentionBlock(nn.Module):
    """Attention of every pixel to what was known at the earlier ones and at itself (Chen et al. 2018, fig. 3).

    Features at a pixel have seen only what comes before it, so a pixel may attend to its own.
    """

    def __init__(self, channels: int, heads: int, head_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.project = Pointwise(channels, 3 * heads * head_size)  # queries, keys and values
        self.mix = Pointwise(heads * head_size, channels)
        self.heads = heads
        self.dropout = dropout
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        size, _, height, width = x.shape
        projected = self.project(self.norm(x)).permute(0, 2, 3, 1).reshape(size, height * width, 3, self.heads, -1)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # (B, heads, n, d) each
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.add(x, seen.transpose(1, 2).reshape(size, height, width, -1).permute(0, 3, 1, 2))

    def add(self, x: Tensor, seen: Tensor) -> Tensor:
        """The output, from the input x and what was attended to, of (B, C, H, W) or (N, C) each."""
        added: Tensor = self.mix(F.dropout(seen, self.dropout, self.training))
        return x + added


def _moved(x: Tensor, max_shift: int) -> tuple[Tensor, Tensor | None]:
    """Images (B, 1, H, W) moved at random, zeros following, and which of (2 max_shift + 1)^2 moves each made, (B,)."""
    if max_shift == 0:
        return x, None
    _, _, height, width = x.shape
    side = 2 * max_shift + 1
    moves = torch.randint(side * side, (len(x),)).to(x.device)
    padded = F.pad(x[:, 0], (max_shift,) * 4)
    rows = (moves // side).view(-1, 1, 1) + torch.arange(height, device=x.device).view(1, -1, 1)
    columns = (moves % side).view(-1, 1, 1) + torch.arange(width, device=x.device)
    images = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return padded[images, rows, columns].unsqueeze(1), moves


class _Network(nn.Module):
    """Logits of all conditionals in raster order, of images each of which is told which order it was turned for."""

    def __init__(
        self,
        channels: int,
        layers: int,
        attention_every: int,
        first_kernel: int,
        kernel: int,
        heads: int,
        head_size: int,
        num_orders: int,
        dropout: float,
        max_shift: int,
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(1, channels, first_kernel, "A")
        self.previous = nn.Parameter(torch.randn(channels) / 3)  # the pixel before, also from the end of the last row
        self.position = nn.Linear(2 + 4 * _FREQUENCIES, channels)
        moves = (2 * max_shift + 1) ** 2  # by how much an image was moved; not at all is in the middle
        self.moved = nn.Embedding(moves, channels) if max_shift else None
        self.blocks: Any = nn.ModuleList(_GatedBlock(channels, kernel, num_orders, dropout) for _ in range(layers))
        count = layers // attention_every if attention_every else 0
        self.attention: Any = nn.ModuleList(_AttentionBlock(channels, heads, head_size, dropout) for _ in range(count))
        self.every = attention_every
        self.norm = _ChannelNorm(channels)
        self.head = Pointwise(channels, channels)
        self.output = Pointwise(channels, 1)

    def forward(self, x: Tensor, which: Tensor, moves: Tensor | None = None) -> Tensor:
        """Maps images (B, 1, H, W), their orders (B,) and moves (B,), if any, to log-odds (B, 1, H, W)."""
        h = self.first(x) + self._positions(x).permute(2, 0, 1) + self._told(moves)[:, :, None, None]
        before = F.pad(x.flatten(1), (1, -1)).view_as(x)
        h = (h + before * self.previous[:, None, None]).contiguous(memory_format=torch.channels_last)
        for index, block in enumerate(self.blocks):
            h = block(h, which)
            attention = self._attention_after(index)
            if attention is not None:
                h = attention(h)
        return self._logits(h)

    def _attention_after(self, index: int) -> Any:
        """The attention block that follows a gated block, or None."""
        return self.attention[index // self.every] if self.every and (index + 1) % self.every == 0 else None

    def _positions(self, x: Tensor) -> Tensor:  # (H, W, C)
        """Where a pixel is: its coordinates, from -1 to 1, and their sines and cosines at some frequencies."""
        sides = [torch.linspace(-1, 1, side, device=x.device).to(x.dtype) for side in x.shape[2:]]
        coordinates = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)  # (H, W, 2)
        angles = [coordinates * (math.pi * 2**k / 2) for k in range(_FREQUENCIES)]
        positions: Tensor = self.position(
            torch.cat([coordinates, *(wave(angle) for angle in angles for wave in (torch.sin, torch.cos))], dim=-1)
        )
        return positions

    def _told(self, moves: Tensor | None) -> Tensor:  # (B, C), or (1, C) where nothing moved
        """What is added for how an image was moved."""
        if self.moved is None:
            return torch.zeros_like(self.previous).unsqueeze(0)
        told: Tensor = (
            self.moved.weight[len(self.moved.weight) // 2].unsqueeze(0) if moves is None else self.moved(moves)
        )
        return told

    def _logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.output(F.silu(self.head(F.silu(self.norm(h)))))
        return logits

    def conditionals(self, x: Tensor, which: Tensor) -> Iterator[Tensor]:
        """Yields the log-odds (N,) of one pixel after the other, as :class:`RasterNetwork` does."""
        size, _, height, width = x.shape
        first = ConvCache(self.first, size, width)
        caches = [ConvCache(block.conv, size, width) for block in self.blocks]
        keys_values = [
            x.new_zeros((2, size, block.heads, height * width, len(block.project.weight) // 3 // block.heads))
            for block in self.attention
        ]
        positions = self._positions(x) + self._told(None)
        before = x.new_zeros((size, 1))
        for i in range(height):
            for cache in (first, *caches):
                cache.start_row()
            for j in range(width):
                h = first.at(j) + positions[i, j] + before * self.previous  # (N, C)
                now = i * width + j
                for index, (block, cache) in enumerate(zip(self.blocks, caches, strict=True)):
                    cache.write(j, F.silu(block.norm(h)))
                    h = block.add(h, cache.at(j), which)
                    attention = self._attention_after(index)
                    if attention is not None:
                        kept = keys_values[index // self.every]
                        q, k, v = attention.project(attention.norm(h)).view(size, 3, attention.heads, -1).unbind(1)
                        kept[0, :, :, now], kept[1, :, :, now] = k, v
                        known = kept[:, :, :, : now + 1]
                        seen = F.scaled_dot_product_attention(q.unsqueeze(2), known[0], known[1])
                        h = attention.add(h, seen.flatten(1))
                yield self._logits(h)[:, 0]
                before = x[:, :, i, j]
                first.write(j, before)


class PixelSNAIL(OrderMixture):
    """Gated causal convolutions and causal attention, for several symmetries of the raster: the mixture of all of them.

    In training every image is scored in one of the orders, drawn at random; validation scores each in one of them, in
    turn, which estimates the mean over orders. Their mixture is better than that: it averages probabilities.

    Args:
        event_shape: (1, H, W) of one image.
        channels: Features of a pixel.
        num_layers: Gated residual blocks.
        attention_every: An attention block follows after each so many of them; 0 for no attention.
        kernel_size: Of the convolutions in the blocks, odd.
        heads: Attention heads.
        head_size: Features of a query, a key and a value.
        first_kernel_size: Of the first convolution, odd.
        dropout: Probability with which a feature is dropped in training, before every gate.
        max_shift: In training, images are moved by up to so many pixels up or down and left or right, at random, and
            the network is told by how many; otherwise it is told that nothing moved, so the density is exact.
        orders: Symmetries of the raster; see :data:`lightning_genmodels.functional.RASTER_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, a dropout outside of [0, 1), another pixel order.
    """

    sample_chunk = 200  # it keeps the keys and values of all pixels
    score_chunk = 25

    monitor = "val/nll_of_one_order"
    """Mean over images, each in one order, in nats per image: higher than what the mixture will have."""

    small = {
        "event_shape": (1, 2, 3),
        "channels": 4,
        "num_layers": 2,
        "attention_every": 1,
        "heads": 2,
        "head_size": 2,
        "first_kernel_size": 3,
        "orders": ("raster", "raster_rot90"),
    }

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        channels: int = 128,
        num_layers: int = 12,
        attention_every: int = 4,
        kernel_size: int = 3,
        heads: int = 4,
        head_size: int = 32,
        first_kernel_size: int = 7,
        dropout: float = 0.5,
        max_shift: int = 0,
        orders: Sequence[str] = RASTER_ORDERS,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, orders, **options)
        is_odd = all(size > 0 and size % 2 for size in (first_kernel_size, kernel_size))
        counts = (channels, num_layers, attention_every + 1, heads, head_size, max_shift + 1)
        if min(counts) < 1 or not is_odd or not 0.0 <= dropout < 1.0:
            raise OptionError(
                f"expected counts of at least 1 (attention_every and max_shift 0), odd kernel sizes and a dropout in "
                f"[0, 1), got channels={channels}, num_layers={num_layers}, attention_every={attention_every}, "
                f"heads={heads}, head_size={head_size}, first_kernel_size={first_kernel_size}, "
                f"kernel_size={kernel_size}, dropout={dropout}, max_shift={max_shift}"
            )
        self.max_shift = max_shift
        self.raster_shapes = [raster_shape(order, *self.event_shape[1:]) for order in orders]
        self.net = _Network(
            channels,
            num_layers,
            attention_every,
            first_kernel_size,
            kernel_size,
            heads,
            head_size,
            len(orders),
            dropout,
            max_shift,
        )

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image, each in an order drawn at random."""
        which = torch.randint(len(self.pixel_orders), (len(x),)).to(x.device)
        return -self._log_prob_in(x, which, self.max_shift).mean()

    def _validation_log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of each image in one order, in turn: all of them would take as many times as long."""
        return self._log_prob_in(x, torch.arange(len(x), device=x.device) % len(self.pixel_orders))

    def _log_prob_in(self, x: Tensor, which: Tensor, max_shift: int = 0) -> Tensor:
        """Log-probability (B,) of image b in the order ``which[b]``; of the image moved, if it is to be."""
        pixels, orders = x.flatten(1), self.pixel_orders[which]  # (B, n)
        log_prob: Tensor | None = None
        for rows, shape in self._groups(which):
            turned, moves = _moved(pixels[rows].gather(1, orders[rows]).view(-1, 1, *shape), max_shift)
            found = bernoulli_log_prob(self.net(turned, which[rows], moves), turned)
            log_prob = found.new_zeros(len(x)) if log_prob is None else log_prob
            log_prob = log_prob.index_put((rows,), found)
        assert log_prob is not None
        return log_prob

    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of binary images of that shape."""
        order = self.pixel_orders[index]
        which = torch.full((len(x),), index, device=x.device)
        return from_raster(self.net(to_raster(x, order, self.raster_shapes[index]), which), order, x)

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        pixels, orders, filled = x.flatten(1), self.pixel_orders[which], torch.empty_like(x.flatten(1))
        for rows, shape in self._groups(which):
            turned, known = (
                values[rows].gather(1, orders[rows]).view(-1, 1, *shape) for values in (pixels, observed.flatten(1))
            )
            conditionals = functools.partial(self.net.conditionals, which=which[rows])
            filled[rows.unsqueeze(1), orders[rows]] = fill_raster(conditionals, turned, known, uniforms[rows]).flatten(
                1
            )
        return filled.view_as(x)

    def _groups(self, which: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Which images (indices) are turned to which shape: all to one, unless the image is no square."""
        images = torch.arange(len(which), device=which.device)
        shapes = dict.fromkeys(self.raster_shapes)
        if len(shapes) == 1:
            yield images, self.raster_shapes[0]
            return
        for shape in shapes:
            has_shape = torch.tensor([other == shape for other in self.raster_shapes], device=which.device)
            rows = images[has_shape[which]]
            if len(rows):
                yield rows, shape
