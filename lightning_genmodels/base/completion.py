"""Completing images: models that draw pixels given others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class CompletionModel(ABC):
    """An interface beside :class:`GenerativeModel`: a model that draws the pixels of an image that are not observed."""

    @abstractmethod
    def complete(self, x: Tensor, observed: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws the pixels that are not observed, given those that are; each kind says how exactly.

        Args:
            x: (B, 1, H, W) images in {0, 1}; pixels that are not observed may have any value.
            observed: Zeros and ones, or booleans, shaped as ``x`` or (H, W) or whatever broadcasts to it: which pixels
                are given.
            generator: Source of randomness; default: PyTorch's global generator.

        Returns:
            (B, 1, H, W) float32 in {0, 1}, on the model's device.

        Raises:
            ImageError: ``x`` is no batch of binary images, or ``observed`` does not fit it.
            OptionError: ``generator`` is of another type.
        """
