"""Order-agnostic NADE and the ensemble of its orders (Uria, Murray and Larochelle 2014, "A deep and tractable density
estimator": DeepNADE and EoNADE).

The paper's notation: d is the position in the order o of the first pixel that is predicted, m_{o<d} the mask of the
pixels before it. W and U are the weights of pixels and of masks into the first hidden layer; both have one row a pixel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import OrderMixture, TrainingOptions
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import at_least_float32, draw_pixel, mean_logits
from lightning_genmodels.random import Noise, keyed_generators, uniform

_ROWS = 800  # hidden layers computed at once, an image and a pixel each: what fits the cache of a CPU


class EoNADE(OrderMixture):
    """One network for the conditionals of *every* order: p(x_i = 1 | x_{o<d}, which pixels those are).

    It is trained to predict all missing pixels from a random number of random ones, and evaluated as a mixture over M
    stored orders, drawn at random from ``order_seed``.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units of the hidden layers, first to last; one or two in the paper.
        num_orders: M, orders in the mixture. Time to score grows with it; training does not depend on it.
        order_seed: Seed of the orders.
        dropout: Probability with which a hidden unit is dropped in training.
        layer_norm: Whether every hidden layer is normalized before its nonlinearity (Ba et al. 2016). The paper has no
            such thing; but the number of pixels that are seen runs from 0 to n - 1, and with it the scale of the
            hidden layers, which makes training several times as slow.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, or a dropout probability outside of [0, 1).
    """

    monitor = "val/order_agnostic_nll"
    """Estimate of the mean over all n! orders, in nats per image: higher than the mixture of the M that are stored."""

    any_order = True
    matrices = ("W", "U", "V")

    small = {"event_shape": (1, 2, 3), "hidden_sizes": (5, 4), "num_orders": 3, "layer_norm": True}

    mean_image: Tensor

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (500, 500),
        num_orders: int = 128,
        order_seed: int = 0,
        dropout: float = 0.0,
        layer_norm: bool = False,
        **options: Unpack[TrainingOptions],
    ) -> None:
        at_least(1, num_orders=num_orders)
        super().__init__(event_shape, ["random"] * num_orders, order_seed, **options)
        if min([num_orders, *hidden_sizes]) < 1 or not hidden_sizes or not 0.0 <= dropout < 1.0:
            raise OptionError(
                f"expected at least one hidden layer, sizes and num_orders of at least 1 and a dropout in [0, 1), got "
                f"hidden_sizes={tuple(hidden_sizes)}, num_orders={num_orders}, dropout={dropout}"
            )
        pixels = math.prod(self.event_shape)
        self.dropout = dropout
        self.W = nn.Parameter(torch.empty(pixels, hidden_sizes[0]))
        self.U = nn.Parameter(torch.empty(pixels, hidden_sizes[0]))
        self.c = nn.Parameter(torch.zeros(hidden_sizes[0]))
        self.hidden = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(hidden_sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) if layer_norm else nn.Identity() for size in hidden_sizes)
        self.V = nn.Parameter(torch.empty(pixels, hidden_sizes[-1]))
        self.b = nn.Parameter(torch.zeros(pixels))
        for weight in (self.W, self.U, self.V):
            nn.init.uniform_(weight, -1 / math.sqrt(pixels), 1 / math.sqrt(pixels))
        self.register_buffer("mean_image", torch.full((pixels,), 0.5))

    def edges(self) -> list[nn.Module]:
        """W, U and V are the model's own."""
        return [self]

    def _initialize(self, images: Tensor) -> None:
        """Starts at the mean image."""
        self.b.copy_(mean_logits(images))
        self.mean_image.copy_(mean_logits(images).sigmoid())

    def training_loss(self, x: Tensor) -> Tensor:
        """Unbiased estimate of the negative log-likelihood in nats per image, a mean over all n! orders (eq. 9)."""
        return -self._estimate(x, None).mean()

    def _validation_log_prob(self, x: Tensor, indices: range) -> Tensor:
        """The estimate that training minimizes, with the same random numbers for an image in every epoch.

        All M orders would take 1000 times as long.
        """
        return self._estimate(x, keyed_generators(0, indices))

    def _estimate(self, x: Tensor, generator: Noise) -> Tensor:  # (B,)
        """Log-probability of the n - d + 1 pixels that are missing, times n / (n - d + 1), with d drawn from 1 to n."""
        pixels = x.flatten(1)
        n = pixels.shape[1]
        # If each pixel is seen at a rate that is itself uniform, any number of seen pixels from 0 to n is as likely as
        # any other: d without sorting random numbers. Once in n + 1 times nothing is missing, hence n + 1 below.
        rate = uniform((len(x), 1), generator, pixels)
        seen = uniform(pixels.shape, generator, pixels) < rate  # (B, n), m_{o<d}
        missing = (~seen).to(pixels)
        a = (pixels * seen) @ self.W + seen.to(pixels) @ self._mask_weights() + self.c
        logits = F.linear(self._last_hidden(a), self.V, self.b)
        log_prob = F.logsigmoid(at_least_float32((2.0 * pixels - 1.0) * logits))
        return (log_prob * missing).sum(1) * ((n + 1) / missing.sum(1).clamp(min=1))

    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of binary images of that shape."""
        order, U = self.pixel_orders[index], self._mask_weights()  # noqa: N806
        a = self.c.expand(len(x), -1)  # (B, h), the first hidden layer before its nonlinearity
        logits = []
        for block in order.split(max(1, _ROWS // max(1, len(x)))):
            pixels = x.flatten(1)[:, block]  # (B, size)
            before = torch.ones(len(block), len(block), device=x.device).to(x).tril(-1)  # row i: the pixels before i
            first = (pixels.unsqueeze(1) * before) @ self.W[block] + before @ U[block]  # (B, size, h)
            logits.append((self._last_hidden(first + a.unsqueeze(1)) * self.V[block]).sum(-1))
            a = a + pixels @ self.W[block] + U[block].sum(0)
        ordered = torch.cat(logits, dim=1) + self.b[order]
        return torch.empty_like(ordered).index_copy(1, order, ordered).view_as(x)

    def _mask_weights(self) -> Tensor:  # (n, h)
        """Weights of the mask into the first hidden layer.

        W and U are the weights of *centred* inputs, (x - mean image) * m and m - mean(m): the same functions, but ones
        that gradient descent finds sooner. What centring takes away is a sum over the pixels that are seen, and so a
        change of these weights.
        """
        return self.U - self.U.mean(0) - self.mean_image.unsqueeze(1) * self.W

    def _last_hidden(self, a: Tensor) -> Tensor:
        """The last hidden layer (..., h') from the first one before its nonlinearity (..., h)."""
        hidden = F.dropout(F.relu(self.norms[0](a)), self.dropout, self.training)
        for layer, norm in zip(self.hidden, self.norms[1:], strict=True):
            hidden = F.dropout(F.relu(norm(layer(hidden))), self.dropout, self.training)
        return hidden

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        pixels, known, U = x.flatten(1).clone(), observed.flatten(1), self._mask_weights()  # noqa: N806
        orders = self.pixel_orders[which]  # (N, n)
        # Any order will do for this network: observed pixels move to the front, so that every draw sees all of them.
        is_drawn = (~known).gather(1, orders).to(torch.int8)
        orders = orders.gather(1, is_drawn.argsort(dim=1, stable=True))
        a = self.c.expand(len(x), -1)  # (N, h)
        for i, pixel in enumerate(orders.T.unsqueeze(2)):  # (N, 1) each: image by image another pixel
            index = pixel.squeeze(1)
            logits = (self._last_hidden(a) * self.V[index]).sum(-1) + self.b[index]
            value, given = pixels.gather(1, pixel).squeeze(1), known.gather(1, pixel).squeeze(1)
            drawn = draw_pixel(logits, uniforms[:, i], value, given).unsqueeze(1)
            pixels.scatter_(1, pixel, drawn)
            a = a + drawn * self.W[index] + U[index]
        return pixels.view_as(x)
