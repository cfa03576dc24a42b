"""Representation learning: models with an encoder and a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class RepresentationModel(ABC):
    """An interface beside :class:`GenerativeModel`: a model that encodes images and decodes codes."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, D) of images (B, 1, H, W); of latent variables, the mean of the approximate posterior.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels' conditional distributions given codes (..., D)."""
