"""The full joint distribution as a product of conditional tables: the chain rule, which assumes nothing either.

1 + 2 + 4 + ... + 2^(n-1) = 2^n - 1 numbers: as many as in the table of the joint distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genmodels.base import AutoregressiveModel, TabularModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import as_float64, fill_in_order

_MAX_PIXELS = 16


class ChainRuleTable(TabularModel, AutoregressiveModel):
    """p(x) = prod_i p(x_i | x_<i): for pixel i a table with one probability for each of 2^(i-1) images of those before.

    Learned by counting. A pseudo-count of alpha for every whole image is one of alpha 2^(n-i) on each branch of
    conditional i (as many images begin so), which makes this the same distribution as the joint table, in any order.

    Args:
        event_shape: (1, H, W) of one image, H W at most 16.
        order: Name of the pixel order; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of a random order.
        pseudo_count: alpha.

    Raises:
        OptionError: More than 16 pixels, or ``pseudo_count`` is not above zero.
    """

    small = {"event_shape": (1, 2, 2)}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 4, 4),
        order: str = "raster",
        order_seed: int = 0,
        pseudo_count: float = 1.0,
    ) -> None:
        super().__init__(event_shape, order=order, order_seed=order_seed)
        pixels = math.prod(self.event_shape)
        if pixels > _MAX_PIXELS or pseudo_count <= 0.0:
            raise OptionError(
                f"expected at most {_MAX_PIXELS} pixels (choose --data.image_size 4) and a pseudo_count above 0, got "
                f"{pixels} and {pseudo_count}"
            )
        self.pseudo_count = pseudo_count
        self.logits = nn.Parameter(torch.zeros(2**pixels - 1))  # table after table: 1, 2, 4, ... log-odds

    @property
    def num_free_parameters(self) -> int:
        """2^n - 1: one probability for each context of each pixel."""
        return len(self.logits)

    def statistics(self, x: Tensor) -> Tensor:
        """(2 (2^n - 1),) int64: how often each pixel is 0 (even entries) and 1 (odd) in each context."""
        pixels = x.flatten(1)[:, self.pixel_order].to(torch.int64)
        return torch.bincount((2 * self._rows(pixels) + pixels).flatten(), minlength=2 * len(self.logits))

    @torch.no_grad()
    def fit_statistics(self, counts: Tensor) -> None:
        """Maximum likelihood with pseudo-counts that amount to ``pseudo_count`` more of each whole image."""
        n = len(self.pixel_order)
        tables = as_float64(counts).view(-1, 2).split([2**i for i in range(n)])
        smoothed = torch.cat([table + self.pseudo_count * 2 ** (n - 1 - i) for i, table in enumerate(tables)])
        zeros, ones = smoothed.unbind(1)
        self.logits.copy_(torch.log(ones) - torch.log(zeros))

    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of binary images of that shape."""
        order = self.pixel_order
        ordered = self.logits[self._rows(x.flatten(1)[:, order].to(torch.int64))]
        return torch.empty_like(ordered).index_copy(1, order, ordered).view_as(x)

    def _rows(self, pixels: Tensor) -> Tensor:
        """Where the tables hold the contexts of pixels (B, n), the first of the order first."""
        rows, context = [], torch.zeros_like(pixels[:, 0])
        for i, pixel in enumerate(pixels.unbind(1)):
            rows.append(2**i - 1 + context)
            context = 2 * context + pixel
        return torch.stack(rows, dim=1)

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        return fill_in_order(self.conditional_logits, self.pixel_order, x, observed, uniforms)
