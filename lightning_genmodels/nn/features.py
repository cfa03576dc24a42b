"""Features of images by untrained networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genmodels.random import derive_seed


class RandomFeatures(nn.Module):
    """Features by a convolutional network with fixed random weights: 64 for each quarter of the image.

    Distances between sets of images in such features rank models of data that no classifier was trained on (Naeem et
    al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"). The weights are the same
    everywhere, and are not saved.
    """

    first: Tensor
    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("first", (16, 1, 5, 5)), ("second", (64, 16, 5, 5))):
            source = torch.Generator().manual_seed(derive_seed("random features", name))
            weight = torch.randn(shape, generator=source, device="cpu") * math.sqrt(2 / math.prod(shape[1:]))
            self.register_buffer(name, weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 1, H, W) to (N, 256) features, float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.relu(F.conv2d(x.to(self.first), self.first, stride=2, padding=2))
            x = F.relu(F.conv2d(x, self.second, stride=2, padding=2))
            return F.adaptive_avg_pool2d(x, 2).flatten(1)
