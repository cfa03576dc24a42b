"""The fully visible belief network: a logistic regression for every pixel on the pixels before it.

Frey, Hinton and Dayan (1996), "Does the wake-sleep algorithm produce good density estimators?", section 4; named so by
Neal (1992), "Connectionist learning of belief networks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import AutoregressiveModel, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import draw_pixel, mean_logits
from lightning_genmodels.orders import autoregressive_mask


class FVBN(AutoregressiveModel):
    """p(x_i = 1 | x_<i) = sigmoid(b_i + sum_{j<i} W_ij x_j): n(n - 1)/2 weights, strictly triangular in the order.

    Args:
        event_shape: (1, H, W) of one image.
        order: Name of the pixel order; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of a random order.
        l2: Strength of a penalty l2/2 sum W_ij^2 on the training loss, which is a Gaussian prior of precision N l2 on
            every weight for N training images. ``weight_decay`` would instead be weakest on the weights of pixels that
            are rarely 1, which are the ones that overfit.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: ``l2`` is negative.
    """

    small = {"event_shape": (1, 2, 3)}

    mask: Tensor

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        order: str = "raster",
        order_seed: int = 0,
        l2: float = 0.0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, order, order_seed, **options)
        if l2 < 0.0:
            raise OptionError(f"expected l2 of at least 0, got {l2}")
        self.l2 = l2
        pixels = math.prod(self.event_shape)
        # The problem is convex, so any start will do; from zero, absent weights stay zero.
        self.weight = nn.Parameter(torch.zeros(pixels, pixels))
        self.bias = nn.Parameter(torch.zeros(pixels))
        position = self.pixel_order.argsort()
        self.register_buffer("mask", autoregressive_mask(position, position, strict=True), persistent=False)

    def edges(self) -> list[nn.Module]:
        """There is one layer, the model itself."""
        return [self]

    def _initialize(self, images: Tensor) -> None:
        """Starts at the mean image."""
        self.bias.copy_(mean_logits(images))

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image, and the penalty."""
        return super().training_loss(x) + 0.5 * self.l2 * self.weight.square().sum()

    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of binary images of that shape."""
        return F.linear(x.flatten(1), self.weight * self.mask, self.bias).view_as(x)

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        order = self.pixel_order
        weight, bias = self.weight[order][:, order], self.bias[order]
        ordered, known = x.flatten(1)[:, order], observed.flatten(1)[:, order]  # (N, n), first pixel first
        for i in range(len(order)):
            logits = bias[i] + ordered[:, :i] @ weight[i, :i]  # a regression each: one full evaluation in all
            ordered[:, i] = draw_pixel(logits, uniforms[:, i], ordered[:, i], known[:, i])
        return torch.empty_like(ordered).index_copy_(1, order, ordered).view_as(x)
