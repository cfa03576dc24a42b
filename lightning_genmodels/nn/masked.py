"""Linear layers with a mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedLinear(nn.Module):
    """A linear layer some of whose weights are absent: y = (W * M) x + b (Germain et al. 2015, eq. 4).

    The mask comes with every call, since one set of weights may serve many masks; the weights are never changed by it.
    A weight under a constant zero of the mask is never trained.

    Args:
        inputs: I.
        outputs: O.
        bias: Whether there is a b.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Maps x (..., I) with a mask (O, I), 1 where a weight is present, to (..., O)."""
        # A product of one type: with a boolean mask it takes more than twice as long on a CPU.
        return F.linear(x, self.weight * mask.to(self.weight.dtype), self.bias)
