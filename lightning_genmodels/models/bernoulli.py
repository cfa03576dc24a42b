"""Independent pixels: n parameters for n pixels, where the full joint table has 2^n - 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genmodels.base import TabularModel
from lightning_genmodels.functional import as_float64, bernoulli_log_prob
from lightning_genmodels.random import sample_bernoulli


class Bernoulli(TabularModel):
    """p(x) = prod_i p(x_i): every pixel is 1 with a probability of its own, whatever the others are.

    Learned by counting, with add-one smoothing (a pixel that is never on in training may be on in a test image):
    p_i = (count_i + 1) / (N + 2).

    Args:
        event_shape: (1, H, W) of one image.
    """

    small = {"event_shape": (1, 2, 3)}

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__(event_shape)
        self.logits = nn.Parameter(torch.zeros(self.event_shape))  # (1, H, W)

    @property
    def num_free_parameters(self) -> int:
        """n, one probability a pixel."""
        return math.prod(self.event_shape)

    def statistics(self, x: Tensor) -> Tensor:
        """(1 + 1 * H * W,) int64: the number of images, then how often each pixel is 1."""
        pixels = x.to(torch.int64).sum(dim=0).flatten()
        return torch.cat([pixels.new_tensor([len(x)]), pixels])

    @torch.no_grad()
    def fit_statistics(self, counts: Tensor) -> None:
        """Maximum likelihood with one image more in which a pixel is 0, and one more in which it is 1."""
        total, ones = as_float64(counts[0]), as_float64(counts[1:])
        self.logits.copy_((torch.log(ones + 1) - torch.log(total - ones + 1)).view(self.event_shape))

    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(self.logits, x)

    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli(self.logits.expand(num_samples, *self.event_shape), generator)
