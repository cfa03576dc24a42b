"""The variational autoencoder (Kingma and Welling 2014, "Auto-Encoding Variational Bayes").

The default network is that of Burda, Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders": two layers
of 200 tanh units on either side of 50 latent variables. ``beta`` is that of Higgins et al. (2017), "beta-VAE".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from typing_extensions import Unpack

from lightning_genmodels.base import CompletionModel, LatentVariableModel, TrainingOptions
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import (
    at_least_float32,
    bernoulli_log_prob,
    check_observed,
    mean_logits,
    standard_normal_log_prob,
)
from lightning_genmodels.nn.coders import Network, coders, output_bias
from lightning_genmodels.random import Noise, check_generator, sample_bernoulli, standard_normal, uniform
from lightning_genmodels.system import tracked
from lightning_genmodels.training.optimizers import ends


class VAE(LatentVariableModel, CompletionModel):
    """p(x, z) = N(z; 0, I) prod_i Bernoulli(x_i; f_i(z)), with q(z|x) = N(z; mu(x), diag(sigma(x)^2)).

    Args:
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units of the encoder's hidden layers; the decoder has them in reverse. For ``conv``: channels.
        latent_dim: D, number of latent variables.
        kl_warmup_steps: Steps over which the weight of the KL divergence rises from zero to one in the training loss
            (Sønderby et al. 2016, section 2.3). Without it most latent variables are pruned in the first epochs, and
            stay so. The bounds that are reported never have it.
        dropout: Fraction of hidden units, or channels, that training drops, after every hidden layer of both networks
            (Srivastava et al. 2014).
        network: ``mlp``: linear layers and tanh. ``conv``: each hidden layer is a convolution that halves the
            image, and in the decoder one that doubles it, with SiLU (Hendrycks and Gimpel 2016).
        beta: Weight of the KL divergence in the training loss (Higgins et al. 2017, eq. 4), after warm-up. The bounds
            that are reported never have it.
        val_particles: K of the bound on validation images by which a checkpoint is chosen; 0 for that of training. The
            encoder overfits before the decoder does, and a tight bound is less hurt by that than one of few particles.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size below one, an unknown network, a fraction outside [0, 1), or a negative ``beta``.
    """

    small = {"event_shape": (1, 2, 2), "hidden_sizes": (5,), "latent_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (200, 200),
        latent_dim: int = 50,
        kl_warmup_steps: int = 0,
        dropout: float = 0.0,
        network: Network = "mlp",
        beta: float = 1.0,
        val_particles: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if min([*hidden_sizes, latent_dim, val_particles + 1]) < 1:
            raise OptionError(
                f"expected sizes of at least 1, got hidden_sizes={tuple(hidden_sizes)}, latent_dim={latent_dim}, "
                f"val_particles={val_particles}"
            )
        if beta < 0.0:
            raise OptionError(f"expected beta of at least 0, got {beta}")
        self.latent_dim = latent_dim
        self.kl_warmup_steps = kl_warmup_steps
        self.beta = beta
        self._val_particles = val_particles
        self.encoder, self.decoder = coders(
            network, self.event_shape, hidden_sizes, 2 * latent_dim, latent_dim, dropout
        )

    def edges(self) -> list[nn.Module]:
        """First and last layers of both networks."""
        return ends(self.encoder, self.decoder)

    def _initialize(self, images: Tensor) -> None:
        """Starts the decoder at the mean image, as Burda et al. do. Latent variables then need not model the mean, and
        fewer of them are pruned.
        """
        output_bias(self.decoder).copy_(mean_logits(images))

    @property
    def val_particles(self) -> int:
        """K of the bound that is validated."""
        return self._val_particles or self.num_particles

    @property
    def num_latents(self) -> int:
        """D, numbers in z."""
        return self.latent_dim

    def posterior(self, x: Tensor) -> Normal:
        """q(z|x), of the lowest layer if there are several: a diagonal Gaussian with batch shape (B, D), of binary
        images (B, 1, H, W).
        """
        return self._posterior(self._checked(x))

    def _posterior(self, x: Tensor) -> Normal:
        return diagonal_gaussian(self.encoder(x.flatten(1)))

    def _annealing_start(self, x: Tensor) -> Normal:
        """The approximate posterior, wider by the root of its standard deviation, since a start too narrow gives
        weights of heavy tails.
        """
        posterior = self._posterior(x)
        return Normal(posterior.mean, posterior.stddev.sqrt(), validate_args=False)

    def _encode(self, x: Tensor) -> Tensor:
        """Posterior mean (B, D)."""
        mean: Tensor = self._posterior(x).mean
        return mean

    def _decode(self, z: Tensor) -> Tensor:
        logits: Tensor = self.decoder(z.to(self._number_type)).unflatten(-1, self.event_shape)
        return logits

    def _log_prior(self, z: Tensor) -> Tensor:
        """Log p(z) in nats, (...), of latents (..., D)."""
        return standard_normal_log_prob(z)

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) = log p(z) + log p(x|z)."""
        return self._log_prior(z) + bernoulli_log_prob(self._decode(z), x)

    def _infer(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z = mu + sigma * noise, (..., B, D), and log q(z|x), (..., B)."""
        return draw(self._posterior(x), noise)

    def _log_posterior(self, x: Tensor, z: Tensor) -> Tensor:
        """Log q(z|x) in nats, (B,), of latents (B, D)."""
        log_q: Tensor = self._posterior(x).log_prob(z).sum(dim=-1)
        return log_q

    @final
    @torch.no_grad()
    def complete(
        self, x: Tensor, observed: Tensor, *, num_steps: int = 300, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws the pixels that are not observed, given those that are, by Metropolis within Gibbs (Mattei and Frellsen
        2018, "Leveraging the exact likelihood of deep latent variable models", algorithm 1).

        A step proposes latents from q(z|x), accepts them with the probability that leaves p(z|x) as it is, and draws
        the missing pixels from p(x|z). In the limit of many steps that is an exact draw from p(x_unobserved |
        x_observed). The first fifth accepts every proposal (Rezende, Mohamed and Wierstra 2014, appendix F), which
        is no exact step but finds likely images sooner.

        Args:
            x: As for :meth:`CompletionModel.complete`, as are ``observed``, ``generator``, the result and its errors.
            observed: Which pixels are given.
            num_steps: Steps of the Markov chain of each image.
            generator: Source of randomness.

        Raises:
            OptionError: ``num_steps`` is not a positive integer.
        """
        at_least(1, num_steps=num_steps)
        check_generator(generator)
        x, observed = check_observed(x, observed, self.event_shape, next(self.parameters()))
        z = self._sample_latent(len(x), generator)
        for step in tracked(range(num_steps), num_steps, "completing", "step"):
            proposal, log_q = self._infer(x, self._noise(1, len(x), generator)[0])
            log_ratio = self._log_joint(x, proposal) - log_q - self._log_joint(x, z) + self._log_posterior(x, z)
            accepted = uniform((len(x),), generator, log_ratio).log() < log_ratio
            z = torch.where((accepted | (step < num_steps // 5))[:, None], proposal, z)
            x = torch.where(observed, x, sample_bernoulli(self._decode(z), generator).to(x))
        return x.float()

    def _log_weights(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        z, log_q = self._infer(x, self._noise(num_particles, len(x), generator))
        return self._log_joint(x, z) - log_q

    def _noise(self, num_particles: int, num_images: int, generator: Noise) -> Tensor:
        like = at_least_float32(next(self.parameters()))
        return standard_normal(num_particles, num_images, (self.num_latents,), generator, like=like)

    def _elbo(self, x: Tensor, generator: Noise) -> Tensor:
        """E_q[log p(x|z)] - KL(q(z|x) || p(z)), the divergence as in :meth:`elbo_terms`."""
        reconstruction, kl = self._elbo_terms(x, generator)
        return reconstruction - kl

    def elbo_terms(self, x: Tensor, *, generator: Noise = None) -> tuple[Tensor, Tensor]:
        """The two terms of the ELBO, which is their difference (Kingma and Welling, eq. 10).

        Args:
            x: (B, 1, H, W) binary images.
            generator: One generator, or one per image.

        Returns:
            E_q[log p(x|z)], estimated with one particle, and KL(q(z|x) || p(z)), (B,) nats each. The divergence is in
            closed form, and so never negative; with several layers that holds for the top one's part, and one particle
            estimates the rest.
        """
        check_generator(generator)
        return self._elbo_terms(self._checked(x), generator)

    def _elbo_terms(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        posterior = self._posterior(x)
        z, _ = draw(posterior, self._noise(1, len(x), generator)[0])
        return bernoulli_log_prob(self._decode(z), x), kl_to_standard_normal(posterior)

    def training_loss(self, x: Tensor) -> Tensor:
        """The negative bound; in the ELBO, the KL divergence weighs ``beta``, and less during warm-up."""
        warm = self.global_step >= self.kl_warmup_steps
        weight = self.beta if warm else self.beta * self.global_step / self.kl_warmup_steps
        if weight == 1.0:
            return super().training_loss(x)
        reconstruction, kl = self._elbo_terms(x, None)
        return (weight * kl - reconstruction).mean()

    def _sample_latent(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return self._noise(1, num_samples, generator)[0]


def diagonal_gaussian(output: Tensor) -> Normal:
    """A diagonal Gaussian from means and log standard deviations, side by side in the last dimension."""
    mean, log_std = at_least_float32(output).chunk(2, dim=-1)
    return Normal(mean, torch.exp(log_std), validate_args=False)


def draw(gaussian: Normal, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A draw mu + sigma * noise, (..., D), and its log-density in nats, (...)."""
    log_prob = standard_normal_log_prob(noise) - gaussian.stddev.log().sum(dim=-1)
    return gaussian.mean + gaussian.stddev * noise, log_prob


def kl_to_standard_normal(gaussian: Normal) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) in nats, summed over the last dimension."""
    standard = Normal(torch.zeros_like(gaussian.mean), torch.ones_like(gaussian.mean), validate_args=False)
    return kl_divergence(gaussian, standard).sum(dim=-1)
