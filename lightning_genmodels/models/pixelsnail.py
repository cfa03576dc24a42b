"""PixelSNAIL (Chen, Mishra, Rohaninejad and Abbeel 2018, "PixelSNAIL: An Improved Autoregressive Generative Model"),
for small sets of binary images: on patches of 2x2 pixels, and one network for several symmetries of their order.

Causal convolutions see near patches sharply, attention sees all earlier ones (section 2). A softmax over the 16 states
of a patch replaces the paper's mixture of logistics: a quarter of the positions, a sixteenth of the attention, and no
independence within a patch. Mixtures of orders are from Uria, Murray and Larochelle (2014); with convolutions from
Jain, Abbeel and Pathak (2020). Deviations from the paper: a block has one convolution instead of several and is told
the order, and the attention does not read the image anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import OrderMixture, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import at_least_float32
from lightning_genmodels.nn.patches import PATCH, draw_patch, patch_states, pixel_logits
from lightning_genmodels.nn.raster import CausalConv2d, CausalLayer, CausalNetwork, ConvCache, Pointwise
from lightning_genmodels.orders import patch_grid
from lightning_genmodels.system import tracked


class _ChannelNorm(nn.LayerNorm):
    """Normalizes the channels of every position by themselves, of (B, C, H, W) or (N, C): no position sees another."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        last = x.permute(0, 2, 3, 1)
        return F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class _GatedBlock(CausalLayer):
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

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W), given the orders (B,) that images were turned for."""
        return self._add(h, self.conv(F.silu(self.norm(h))), given)

    def cache(self, num_images: int, height: int, width: int) -> ConvCache:
        """What the convolution sees."""
        return self.conv.cache(num_images, height, width)

    def step(self, h: Tensor, cache: ConvCache, row: int, column: int, given: Tensor | None = None) -> Tensor:
        """Maps the features (N, C) of one patch."""
        return self._add(h, self.conv.step(F.silu(self.norm(h)), cache, row, column), given)

    def _add(self, x: Tensor, y: Tensor, given: Tensor | None) -> Tensor:
        told = self.order(given)
        y = F.silu(y + (told if y.ndim == 2 else told[:, :, None, None]))
        a, b = self.gate(F.dropout(y, self.dropout, self.training)).chunk(2, dim=1)
        added: Tensor = a * torch.sigmoid(b)
        return x + added


class _Attention(CausalLayer):
    """Attention of every position to what was known at the earlier ones and at itself (Chen et al. 2018, fig. 3).

    Features at a position have seen only what comes before it, so it may attend to its own.
    """

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = _ChannelNorm(channels)
        self.project = Pointwise(channels, 3 * channels)  # queries, keys and values
        self.mix = Pointwise(channels, channels)
        self.heads = heads
        self.dropout = dropout
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, h: Tensor, given: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W)."""
        size, _, height, width = h.shape
        projected = self.project(self.norm(h)).permute(0, 2, 3, 1).reshape(size, height * width, 3, self.heads, -1)
        q, k, v = projected.permute(2, 0, 3, 1, 4)  # (B, heads, n, d) each
        if h.device.type == "cpu":  # in float32: there the backward pass in bfloat16 takes twice as long
            with torch.autocast("cpu", enabled=False):
                q, k, v = (at_least_float32(part) for part in (q, k, v))
                seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = seen.transpose(1, 2).reshape(size, height, width, -1).permute(0, 3, 1, 2)
        return self._add(h, seen.to(h.dtype))

    def cache(self, num_images: int, height: int, width: int) -> Tensor:
        """Room for the keys and values of all patches, (2, N, heads, H, W, d)."""
        size = self.project.in_features // self.heads
        return self.project.weight.new_zeros((2, num_images, self.heads, height, width, size))

    def start_row(self, cache: Tensor, above: Tensor | None) -> Tensor | None:
        """Nothing: it sees all rows."""
        return above

    def step(self, h: Tensor, cache: Tensor, row: int, column: int, given: Tensor | None = None) -> Tensor:
        """Maps the features (N, C) of one patch."""
        q, k, v = self.project(self.norm(h)).view(len(h), 3, self.heads, -1).unbind(1)
        cache[0, :, :, row, column], cache[1, :, :, row, column] = k, v
        keys, values = cache.flatten(3, 4)[:, :, :, : row * cache.shape[4] + column + 1]
        seen = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values)
        return self._add(h, seen.flatten(1))

    def _add(self, x: Tensor, seen: Tensor) -> Tensor:
        added: Tensor = self.mix(F.dropout(seen, self.dropout, self.training))
        return x + added


class _Network(CausalNetwork):
    """Logits of the 16 states of all patches, in raster order of the patches."""

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        layers: int,
        attention_every: int,
        first_kernel: int,
        kernel: int,
        heads: int,
        num_orders: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.first = CausalConv2d(PATCH, channels, first_kernel, "A", places=grid)
        self.previous = Pointwise(PATCH, channels)  # of the patch before, also from the end of the last row
        self.blocks: Any = nn.ModuleList(_GatedBlock(channels, kernel, num_orders, dropout) for _ in range(layers))
        count = layers // attention_every if attention_every else 0
        self.attention: Any = nn.ModuleList(_Attention(channels, heads, dropout) for _ in range(count))
        self.every = attention_every
        self.norm = _ChannelNorm(channels)
        self.head = Pointwise(channels, channels)
        self.output = Pointwise(channels, 2**PATCH)

    def sequence(self) -> list[CausalLayer]:
        layers: list[CausalLayer] = []
        for index, block in enumerate(self.blocks, 1):
            layers.append(block)
            if self.every and index % self.every == 0:
                layers.append(self.attention[index // self.every - 1])
        return layers

    def edges(self) -> list[nn.Module]:
        return [self.first, self.previous, self.output]

    def embed(self, x: Tensor) -> Tensor:
        before = F.pad(x.flatten(2), (1, -1)).view_as(x)
        h: Tensor = self.first(x) + self.previous(before)
        return h.contiguous(memory_format=torch.channels_last)

    def embed_next(self, before: Tensor, cache: ConvCache, row: int, column: int) -> Tensor:
        embedded: Tensor = super().embed_next(before, cache, row, column) + self.previous(before)
        return embedded

    def logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.output(F.silu(self.head(F.silu(self.norm(h)))))
        return logits


class PixelSNAIL(OrderMixture):
    """Gated causal convolutions and causal attention over 2x2 patches, for several orders of them: their mixture.

    The network predicts the 16 states of a patch at once, given the patches before it. A pixel's conditional follows by
    summing over the pixels of its patch that come later, so the model is an autoregressive one of pixels, in the order
    patch after patch and row by row within. :meth:`complete` conditions a patch on those of its pixels that are
    observed.

    In training every image is scored in one of the orders, drawn at random; validation scores each in one of them, in
    turn, which estimates the mean over orders. Their mixture is better than that: it averages probabilities.

    Args:
        event_shape: (1, H, W) of one image, with even sides.
        channels: Features of a patch.
        num_layers: Gated residual blocks.
        attention_every: Attention follows after each so many of them; 0 for none.
        kernel_size: Patches on a side of the convolutions in the blocks, odd.
        heads: Attention heads, which divide the channels.
        first_kernel_size: Patches on a side of the first convolution, odd.
        dropout: Probability with which a feature is dropped in training, before every gate.
        orders: Symmetries of the order of patches; see :data:`lightning_genmodels.orders.PATCH_ORDERS`.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, an even kernel size, heads that do not divide the channels, a dropout outside
            of [0, 1), odd sides, another pixel order, or orders by rows beside orders by columns of an image that is no
            square.

    Example:
        >>> model = PixelSNAIL((1, 4, 4), channels=8, num_layers=2, attention_every=2, heads=2)
        >>> model.log_prob(torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3])
    """

    sample_chunk = 200  # it keeps the keys and values of all patches
    score_chunk = 50
    joint_pixels = PATCH

    monitor = "val/nll_of_one_order"
    """Mean over images, each in one order, in nats per image: higher than what the mixture will have."""

    small = {
        "event_shape": (1, 2, 4),
        "channels": 4,
        "num_layers": 2,
        "attention_every": 1,
        "heads": 2,
        "first_kernel_size": 3,
        "orders": ("patches", "patches_rot180"),
    }

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        channels: int = 96,
        num_layers: int = 8,
        attention_every: int = 4,
        kernel_size: int = 3,
        heads: int = 4,
        first_kernel_size: int = 7,
        dropout: float = 0.0,
        orders: Sequence[str] = ("patches", "patches_rot180"),
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, orders, **options)
        is_odd = all(size > 0 and size % 2 for size in (first_kernel_size, kernel_size))
        counts = (channels, num_layers, attention_every + 1, heads)
        if min(counts) < 1 or channels % heads or not is_odd or not 0.0 <= dropout < 1.0:
            raise OptionError(
                f"expected counts of at least 1 (attention_every 0), heads that divide channels, odd kernel sizes and "
                f"a dropout in [0, 1), got channels={channels}, num_layers={num_layers}, "
                f"attention_every={attention_every}, heads={heads}, first_kernel_size={first_kernel_size}, "
                f"kernel_size={kernel_size}, dropout={dropout}"
            )
        grids = {patch_grid(order, *self.event_shape[1:]) for order in orders}
        if len(grids) > 1:
            raise OptionError(
                f"orders by rows and orders by columns need square images, got {self.event_shape} and {tuple(orders)}"
            )
        self.grid = grids.pop()
        self.net = _Network(
            self.grid,
            channels,
            num_layers,
            attention_every,
            first_kernel_size,
            kernel_size,
            heads,
            len(orders),
            dropout,
        )

    def edges(self) -> list[nn.Module]:
        """The layers that read patches or write logits."""
        return self.net.edges()

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image, each in an order drawn at random, all equally often."""
        return -self._log_prob_in(x, torch.randperm(len(x), device=x.device) % len(self.pixel_orders)).mean()

    def _validation_log_prob(self, x: Tensor, indices: range) -> Tensor:
        """Log-probability of each image in one order, in turn: all of them would take as many times as long."""
        return self._log_prob_in(x, torch.tensor(indices, device=x.device) % len(self.pixel_orders))

    def _log_prob_in(self, x: Tensor, which: Tensor) -> Tensor:
        """Log-probability (B,) of image b in the order ``which[b]``."""
        patches = self._patches(x, which)
        logits = at_least_float32(self.net(patches, which))
        return -F.cross_entropy(logits, patch_states(patches), reduction="none").flatten(1).sum(dim=1)

    def _order_log_prob(self, x: Tensor, index: int) -> Tensor:
        return self._log_prob_in(x, torch.full((len(x),), index, device=x.device))

    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of binary images of that shape."""
        which = torch.full((len(x),), index, device=x.device)
        patches = self._patches(x, which)
        logits = pixel_logits(at_least_float32(self.net(patches, which)), patch_states(patches))  # (B, 4, H, W)
        in_order = logits.flatten(2).transpose(1, 2).flatten(1)
        return torch.empty_like(in_order).index_copy(1, self.pixel_orders[index], in_order).view_as(x)

    @torch.no_grad()
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        patches, known = self._patches(torch.where(observed, x, 0.0), which), self._patches(observed, which)
        states, given = (values.flatten(2).transpose(1, 2) for values in (patches, known))  # (N, n / 4, 4) views
        numbers = uniforms.view(*states.shape)
        with torch.inference_mode():  # most of the time goes into the overhead of small operations
            conditionals = tracked(self.net.conditionals(patches, which), states.shape[1], "sampling", "patch")
            for i, logits in enumerate(conditionals):
                states[:, i] = draw_patch(logits, numbers[:, i], states[:, i], given[:, i])
        return torch.empty_like(x.flatten(1)).scatter(1, self.pixel_orders[which], states.flatten(1)).view_as(x)

    def _patches(self, x: Tensor, which: Tensor) -> Tensor:  # (B, 4, H / 2, W / 2), contiguous
        """Pixels of the patches of images (B, 1, H, W), each turned so that its order is the plain one."""
        in_order = x.flatten(1).gather(1, self.pixel_orders[which])
        return in_order.view(len(x), -1, PATCH).transpose(1, 2).reshape(len(x), PATCH, *self.grid)
