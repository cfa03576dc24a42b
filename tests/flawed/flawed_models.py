"""Models with defects that published code has, as somebody else's package would bring them."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genmodels.functional import bernoulli_log_prob, standard_normal_log_prob
from lightning_genmodels.models import MADE, NADE, VAE


class BatchStatistics(VAE):
    """Its encoder normalizes by the statistics of the batch, in evaluation, too."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), hidden_sizes: Sequence[int] = (30,)) -> None:
        super().__init__(event_shape, hidden_sizes, latent_dim=5)
        self.encoder.insert(1, nn.BatchNorm1d(hidden_sizes[0], track_running_stats=False))


class AveragedLogits(MADE):
    """It averages the logits of its orders, and scores images by the average."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__(event_shape, (30,), num_orders=3)

    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(sum(self.conditional_logits(x, m) for m in range(3)) / 3, x)


class MeanOverPixels(NADE):
    """Its log-probability is a mean over the pixels."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__(event_shape, 10)

    def _log_prob(self, x: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(self.conditional_logits(x), x, reduction="none")
        return -losses.mean(dim=(1, 2, 3))


class MeanInTheBound(VAE):
    """Its reconstruction term is a mean over the pixels, its divergence a sum."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__(event_shape, (30,), latent_dim=5)

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        return standard_normal_log_prob(z) + bernoulli_log_prob(self._decode(z), x) / x[0].numel()
