"""A Markov chain over the pixels (Markov 1913): 2n - 1 parameters for a memory of one pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genmodels.base import AutoregressiveModel, TabularModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import as_float64, draw_pixel

_MAX_MEMORY = 16  # n * 2^k counts have to fit in memory


class Markov(TabularModel, AutoregressiveModel):
    """p(x) = prod_i p(x_i | x_{i-k}, ..., x_{i-1}): a table of 2^k probabilities for every pixel, of the k before it.

    Learned by counting, with a pseudo-count for each outcome in each context:
    p(x_i = 1 | context) = (count of ones + alpha) / (count of the context + 2 alpha).

    Args:
        event_shape: (1, H, W) of one image.
        memory: k, the order of the chain; 0 makes the pixels independent. The first pixels have fewer before them.
        order: Name of the pixel order; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of a random order.
        pseudo_count: alpha.

    Raises:
        OptionError: ``memory`` is not from 0 to 16, or ``pseudo_count`` is not above zero.
    """

    small = {"event_shape": (1, 2, 3), "memory": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        memory: int = 1,
        order: str = "raster",
        order_seed: int = 0,
        pseudo_count: float = 1.0,
    ) -> None:
        super().__init__(event_shape, order=order, order_seed=order_seed)
        if not 0 <= memory <= _MAX_MEMORY or pseudo_count <= 0.0:
            raise OptionError(
                f"expected a memory from 0 to {_MAX_MEMORY} and a pseudo_count above 0, got {memory} and {pseudo_count}"
            )
        self.memory = memory
        self.pseudo_count = pseudo_count
        # Row i is the table of the i-th pixel in the order: log-odds by context.
        self.logits = nn.Parameter(torch.zeros(math.prod(self.event_shape), 2**memory))

    @property
    def num_free_parameters(self) -> int:
        """One probability for every context that a pixel can have: 2n - 1 for a memory of one."""
        return sum(2 ** min(i, self.memory) for i in range(len(self.logits)))

    def statistics(self, x: Tensor) -> Tensor:
        """(n, 2^k, 2) int64: how often the i-th pixel of the order is 0 and 1 in each context."""
        pixels = x.flatten(1)[:, self.pixel_order].to(torch.int64)  # (B, n), first pixel first
        table = torch.arange(pixels.shape[1], device=x.device) * 2**self.memory + self._contexts(pixels)
        counts = torch.bincount((2 * table + pixels).flatten(), minlength=2 * self.logits.numel())
        return counts.view(*self.logits.shape, 2)

    @torch.no_grad()
    def fit_statistics(self, counts: Tensor) -> None:
        """Maximum likelihood, with ``pseudo_count`` more of each outcome in each context."""
        zeros, ones = (as_float64(counts) + self.pseudo_count).unbind(-1)
        self.logits.copy_(torch.log(ones) - torch.log(zeros))

    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i), (B, 1, H, W), of binary images of that shape."""
        order = self.pixel_order
        contexts = self._contexts(x.flatten(1)[:, order].to(torch.int64))
        ordered = self.logits.expand(len(x), -1, -1).gather(2, contexts.unsqueeze(2)).squeeze(2)
        return torch.empty_like(ordered).index_copy(1, order, ordered).view_as(x)

    def _contexts(self, pixels: Tensor) -> Tensor:
        """The k pixels before each of (B, n) as a binary number (B, n), the latest its last digit."""
        contexts = torch.zeros_like(pixels)
        for distance in range(1, min(self.memory, pixels.shape[1] - 1) + 1):
            contexts[:, distance:] += pixels[:, :-distance] << (distance - 1)
        return contexts

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        pixels, known = x.flatten(1).clone(), observed.flatten(1)  # (N, n)
        context = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for i, pixel in enumerate(self.pixel_order.tolist()):
            drawn = draw_pixel(self.logits[i, context], uniforms[:, i], pixels[:, pixel], known[:, pixel])
            pixels[:, pixel] = drawn
            context = (2 * context + drawn.to(torch.int64)) % 2**self.memory
        return pixels.view_as(x)
