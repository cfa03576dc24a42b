"""A model that somebody else's package brings: the pixels of a row are equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import ExplicitModel, TrainingOptions
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.models.vae import VAE
from lightning_genmodels.random import sample_bernoulli


class SharedRows(ExplicitModel):
    """p(x) = prod_i Bernoulli(x_i; row of i)."""

    small = {"event_shape": (1, 3, 2)}

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Unpack[TrainingOptions]) -> None:
        super().__init__(event_shape, **options)
        self.rows = nn.Parameter(torch.zeros(1, self.event_shape[1], 1))

    def _logits(self, count: int) -> Tensor:
        return self.rows.expand(count, *self.event_shape)

    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(self._logits(len(x)), x)

    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli(self._logits(num_samples), generator)


class DropoutVAE(VAE):
    """A VAE with dropout in its encoder: with it, training draws every kind of random number there is."""

    small = {"event_shape": (1, 2, 2), "hidden_sizes": (5,), "latent_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (30,),
        latent_dim: int = 5,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, hidden_sizes, latent_dim, kl_warmup_steps=20, **options)
        self.encoder = nn.Sequential(nn.Dropout(0.2), *self.encoder)
