"""The neural autoregressive distribution estimator (Larochelle and Murray 2011, "The Neural Autoregressive
Distribution Estimator").

The paper's notation: W and V are the weights into and out of the hidden layer, b and c the biases of pixels and hidden
units, h_i the hidden layer of the conditional of pixel i. Here both W and V have one row a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import AutoregressiveModel, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import draw_pixel, mean_logits


class NADE(AutoregressiveModel):
    """p(x_i = 1 | x_<i) = sigmoid(b_i + V_i h_i) with h_i = sigmoid(c + sum_{j<i} x_j W_j) (eq. 10 and 11).

    The n hidden layers share their weights, so that each follows from the last by adding one row of W: an image takes
    O(n h) operations to score, and as many to draw.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_size: h, units of the hidden layer.
        order: Name of the pixel order; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of a random order.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: ``hidden_size`` is below one.
    """

    matrices = ("W", "V")

    small = {"event_shape": (1, 2, 3), "hidden_size": 4}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_size: int = 500,
        order: str = "raster",
        order_seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, order_seed, **options)
        if hidden_size < 1:
            raise OptionError(f"expected hidden_size of at least 1, got {hidden_size}")
        pixels = math.prod(self.event_shape)
        self.W = nn.Parameter(torch.empty(pixels, hidden_size))
        self.V = nn.Parameter(torch.empty(pixels, hidden_size))
        self.b = nn.Parameter(torch.zeros(pixels))
        self.c = nn.Parameter(torch.zeros(hidden_size))
        # Few pixels of an image are 1: smaller weights into the hidden layer would leave its sigmoids all but linear.
        nn.init.normal_(self.W, std=0.1)
        nn.init.normal_(self.V, std=1 / hidden_size)

    @torch.no_grad()
    def _initialize(self, images: Tensor) -> None:
        """Starts at the mean image."""
        self.b.copy_(mean_logits(images))

    def edges(self) -> list[nn.Module]:
        """W and V are the model's own."""
        return [self]

    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of binary images of that shape."""
        order = self.pixel_order
        logits = nade_logits(x.flatten(1)[:, order], self.W[order], self.V[order], self.b[order], self.c)
        return torch.empty_like(logits).index_copy(1, order, logits).view_as(x)

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        pixels, known = x.flatten(1).clone(), observed.flatten(1)  # (N, n)
        a = self.c.expand(len(x), -1).clone()  # (N, h), the hidden layer before its sigmoid
        for i, pixel in enumerate(self.pixel_order.tolist()):
            logits = self.b[pixel] + torch.sigmoid(a) @ self.V[pixel]
            drawn = draw_pixel(logits, uniforms[:, i], pixels[:, pixel], known[:, pixel])
            pixels[:, pixel] = drawn
            a.addr_(drawn, self.W[pixel])
        return pixels.view_as(x)


def nade_logits(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor, block: int = 28) -> Tensor:  # noqa: N803
    """Logits of all conditionals of NADE, in a fraction of the time and memory of a loop over the pixels.

    A hidden layer differs from the one before it only where the pixel between them is 1, which few pixels of a digit
    are. So within a block of pixels an image has as many different hidden layers as it has such pixels, and one more:
    those alone are computed, all at once by a matrix product, and every pixel looks up the one that it needs.

    Args:
        x: (B, n) pixels in {0, 1}, the first of the order first.
        W: (n, h) weights of the pixels into the hidden layer.
        V: (n, h) weights out of it.
        b: (n,) biases of the pixels.
        c: (h,) biases of the hidden units.
        block: Pixels in a block: more of them take fewer and larger products, and more arithmetic.

    Returns:
        (B, n) log-odds; differentiable with respect to the weights, not to ``x``.
    """
    # (B, n): has pixel i another hidden layer than i - 1? The sizes of all blocks are one wait for the accelerator.
    is_new = torch.cat([torch.ones_like(x[:, :1]), x[:, :-1]], dim=1) == 1
    is_new[:, ::block] = True
    sizes = torch.stack([part.sum() for part in is_new.split(block, 1)]).tolist()
    a = c.expand(len(x), -1)  # (B, h), the hidden layer before its sigmoid at the start of a block
    logits = []
    blocks = zip(x.split(block, 1), is_new.split(block, 1), sizes, W.split(block), V.split(block), strict=True)
    for x_block, new, count, w, v in blocks:
        size = x_block.shape[1]
        # (S,) each: the different hidden layers, image after image
        image, first = torch.nonzero_static(new, size=count).unbind(1)
        seen = torch.arange(size, device=x.device) < first.unsqueeze(1)  # (S, size)
        h = torch.sigmoid(a.index_select(0, image) + (x_block[image] * seen) @ w)  # (S, h)
        row = new.flatten().cumsum(0).view_as(new) - 1  # (B, size): which of them a pixel needs
        logits.append((h @ v.T).take(row * size + torch.arange(size, device=x.device)))
        a = a + x_block @ w
    return torch.cat(logits, dim=1) + b
