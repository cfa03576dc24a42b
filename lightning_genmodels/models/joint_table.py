"""The full joint table: one probability for each of the 2^n images, which assumes nothing and needs 2^n - 1 numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genmodels.base import TabularModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import as_float64, at_least_float32
from lightning_genmodels.random import uniform

_MAX_PIXELS = 16


class JointTable(TabularModel):
    """p(x) = theta_x, for images of at most 16 pixels (``--data.image_size 4``).

    Learned by counting, with a pseudo-count for every image: theta_x = (count of x + alpha) / (N + alpha 2^n).

    Args:
        event_shape: (1, H, W) of one image, H W at most 16.
        pseudo_count: alpha.

    Raises:
        OptionError: More than 16 pixels, or ``pseudo_count`` is not above zero.
    """

    small = {"event_shape": (1, 2, 2)}

    def __init__(self, event_shape: Sequence[int] = (1, 4, 4), pseudo_count: float = 1.0) -> None:
        super().__init__(event_shape)
        pixels = math.prod(self.event_shape)
        if pixels > _MAX_PIXELS or pseudo_count <= 0.0:
            raise OptionError(
                f"expected at most {_MAX_PIXELS} pixels (choose --data.image_size 4) and a pseudo_count above 0, got "
                f"{pixels} and {pseudo_count}"
            )
        self.pseudo_count = pseudo_count
        self.logits = nn.Parameter(torch.zeros(2**pixels))  # log theta, up to a constant

    @property
    def num_free_parameters(self) -> int:
        """2^n - 1: the probabilities sum to one."""
        return len(self.logits) - 1

    def statistics(self, x: Tensor) -> Tensor:
        """(2^n,) int64: how often each image was seen; its row is its pixels, read as a binary number."""
        return torch.bincount(self._row(x), minlength=len(self.logits))

    @torch.no_grad()
    def fit_statistics(self, counts: Tensor) -> None:
        """Maximum likelihood with ``pseudo_count`` more of each image."""
        smoothed = as_float64(counts) + self.pseudo_count
        self.logits.copy_(torch.log(smoothed / smoothed.sum()))

    def _log_prob(self, x: Tensor) -> Tensor:
        return torch.log_softmax(at_least_float32(self.logits), dim=0)[self._row(x)]

    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        cumulative = torch.softmax(as_float64(self.logits), dim=0).cumsum(0)
        numbers = uniform((num_samples,), generator, cumulative)
        row = torch.searchsorted(cumulative, numbers).to(self.device).clamp(max=len(cumulative) - 1)  # rounded sums
        return ((row.unsqueeze(1) & self._digits()) > 0).float().view(-1, *self.event_shape)

    def _digits(self) -> Tensor:
        """(n,) what each pixel adds to the row, the first pixel most."""
        pixels = math.prod(self.event_shape)
        return 2 ** torch.arange(pixels - 1, -1, -1, device=self.logits.device)

    def _row(self, x: Tensor) -> Tensor:
        return (x.flatten(1).to(torch.int64) * self._digits()).sum(1)
