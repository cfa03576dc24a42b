"""The variational autoencoder (Kingma and Welling 2014, "Auto-Encoding Variational Bayes").

The default network is that of Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders": two layers
of 200 tanh units on either side of 50 latent variables. ``num_particles`` above one trains their importance-weighted
bound.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from typing_extensions import Unpack

from lightning_genmodels.base import LatentVariableModel, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import Noise, at_least_float32, bernoulli_log_prob, mean_logits, standard_normal


class VAE(LatentVariableModel):
    """p(x, z) = N(z; 0, I) prod_i Bernoulli(x_i; f_i(z)), with q(z|x) = N(z; mu(x), diag(sigma(x)^2)).

    Args:
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: D, number of latent variables.
        num_particles: K of the training objective: 1 for the ELBO (Kingma and Welling, eq. 10, with the KL divergence
            in closed form), more for the importance-weighted bound (Burda et al., eq. 8).
        kl_warmup_steps: Steps over which the weight of the KL divergence rises from zero to one in the training loss
            (Sønderby et al. 2016, section 2.3). Without it most latent variables are pruned in the first epochs, and
            stay so. The bounds that are reported never have it.
        dropout: Fraction of hidden units that training drops, after every hidden layer of both networks (Srivastava
            et al. 2014).
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size or number of particles below one, or a fraction outside [0, 1).
    """

    small = {"event_shape": (1, 2, 2), "hidden_sizes": (5,), "latent_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (200, 200),
        latent_dim: int = 50,
        num_particles: int = 1,
        kl_warmup_steps: int = 0,
        dropout: float = 0.0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if min([*hidden_sizes, latent_dim, num_particles]) < 1:
            raise OptionError(
                f"expected sizes of at least 1, got hidden_sizes={tuple(hidden_sizes)}, latent_dim={latent_dim}, "
                f"num_particles={num_particles}"
            )
        if not 0.0 <= dropout < 1.0:
            raise OptionError(f"expected dropout in [0, 1), got {dropout}")
        self.latent_dim = latent_dim
        self.kl_warmup_steps = kl_warmup_steps
        self._num_particles = num_particles
        pixels = math.prod(self.event_shape)
        self.encoder = _mlp([pixels, *hidden_sizes, 2 * latent_dim], dropout)
        self.decoder = _mlp([latent_dim, *reversed(hidden_sizes), pixels], dropout)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Starts the decoder at the mean image, as Burda et al. do. Latent variables then need not model the mean, and
        fewer of them are pruned.
        """
        output = self.decoder[-1]
        assert isinstance(output, nn.Linear)
        output.bias.copy_(mean_logits(images))

    @property
    def num_particles(self) -> int:
        """K of the training objective."""
        return self._num_particles

    @property
    def monitor(self) -> str:  # type: ignore[override]
        """The bound that is trained, on validation images."""
        return "val/nelbo" if self.num_particles == 1 else f"val/iw{self.num_particles}"

    def posterior(self, x: Tensor) -> Normal:
        """q(z|x), a diagonal Gaussian with batch shape (B, D), of binary images (B, 1, H, W)."""
        output = at_least_float32(self.encoder(self._checked(x).flatten(1)))
        mean, log_std = output.chunk(2, dim=-1)  # (B, D) each
        return Normal(mean, torch.exp(log_std), validate_args=False)

    def encode(self, x: Tensor) -> Tensor:
        """Posterior mean (B, D) of binary images (B, 1, H, W)."""
        mean: Tensor = self.posterior(x).mean
        return mean

    def decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels given latents (..., D)."""
        logits: Tensor = self.decoder(z).unflatten(-1, self.event_shape)
        return logits

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) = log p(z) + log p(x|z) in nats, (..., B), of images (B, 1, H, W) and latents (..., B, D)."""
        return _standard_normal_log_prob(z) + bernoulli_log_prob(self.decode(z), self._checked(x))

    def log_weights(self, x: Tensor, num_particles: int, *, generator: Noise = None) -> Tensor:
        """Log p(x, z_k) - log q(z_k|x), (K, B) nats, for K particles z_k = mu + sigma * eps_k of each image."""
        posterior = self.posterior(x)
        noise = standard_normal(num_particles, len(x), (self.latent_dim,), generator, like=posterior.mean)  # (K, B, D)
        z = posterior.mean + posterior.stddev * noise
        log_q = _standard_normal_log_prob(noise) - posterior.stddev.log().sum(-1)  # (K, B)
        return self.log_joint(x, z) - log_q

    def elbo(self, x: Tensor, *, generator: Noise = None) -> Tensor:
        """E_q[log p(x|z)] - KL(q(z|x) || p(z)) in nats, (B,): one particle, the divergence in closed form."""
        reconstruction, kl = self._elbo_terms(x, generator)
        return reconstruction - kl

    def training_loss(self, x: Tensor) -> Tensor:
        """The negative bound, after a warm-up in which the KL divergence of the ELBO weighs less."""
        if self.global_step >= self.kl_warmup_steps:
            return super().training_loss(x)
        reconstruction, kl = self._elbo_terms(x, None)
        return (self.global_step / self.kl_warmup_steps * kl - reconstruction).mean()

    def _elbo_terms(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        """One-particle estimate of E_q[log p(x|z)], and KL(q(z|x) || p(z)): (B,) nats each."""
        posterior = self.posterior(x)
        noise = standard_normal(1, len(x), (self.latent_dim,), generator, like=posterior.mean)[0]
        z = posterior.mean + posterior.stddev * noise  # (B, D)
        prior = Normal(torch.zeros_like(z), torch.ones_like(z), validate_args=False)
        return bernoulli_log_prob(self.decode(z), self._checked(x)), kl_divergence(posterior, prior).sum(-1)

    def sample_latent(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) standard normal latents."""
        like = next(self.parameters())
        return standard_normal(1, num_samples, (self.latent_dim,), generator, like=like)[0]


def _mlp(sizes: list[int], dropout: float) -> nn.Sequential:
    """Linear layers with tanh and dropout between them, and the weights of Glorot and Bengio (2010), as Burda et al.
    have.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sequential(nn.Tanh(), nn.Dropout(dropout)) if dropout else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log N(z; 0, I) in nats, summed over the last dimension."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=-1)
