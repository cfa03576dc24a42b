"""The importance-weighted autoencoder (Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders")."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from typing_extensions import Unpack

from lightning_genmodels.base import LatentVariableModel, TrainingOptions
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import bernoulli_log_prob, standard_normal_log_prob
from lightning_genmodels.models.vae import VAE, diagonal_gaussian, draw, kl_to_standard_normal
from lightning_genmodels.nn.coders import mlp
from lightning_genmodels.random import Noise
from lightning_genmodels.training.optimizers import ends


class IWAE(VAE):
    """p(x, z) = N(z_L; 0, I) prod_l N(z_l; g_l(z_l+1)) prod_i Bernoulli(x_i; f_i(z_1)), trained by the bound of K
    particles, with q(z|x) = q(z_1|x) prod_l q(z_l+1|z_l); all Gaussians are diagonal.

    The default is the paper's network with one layer; its other one has ``latent_dims=(100, 50)`` and
    ``hidden_sizes=((200, 200), (100, 100))``. With one layer and one particle it is a VAE, whose weights can start it.
    The latents of all layers are concatenated, z_1 first.

    Args:
        event_shape: (1, H, W) of one image.
        latent_dims: D_1, ..., D_L, numbers of latent variables, the layer next to the image first.
        hidden_sizes: For each of these layers, the units of the networks, linear and tanh, between it and what is
            below it: from below upwards, and in reverse downwards.
        num_particles: K of the training objective (Burda et al., eq. 8); 1 for the ELBO.
        kl_warmup_steps: As in :class:`VAE`; while it lasts, one particle is trained, since the importance-weighted
            bound has no such weight. That is not Burda et al.'s.
        dropout: As in :class:`VAE`.
        val_particles: K of the bound on validation images by which a checkpoint is chosen; 0 for that of training.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size or number of particles below one, not as many ``hidden_sizes`` as ``latent_dims``, or a
            fraction outside [0, 1).
    """

    small = {"event_shape": (1, 2, 2), "latent_dims": (1, 1), "hidden_sizes": ((5,), (1,)), "num_particles": 3}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dims: Sequence[int] = (50,),
        hidden_sizes: Sequence[Sequence[int]] = ((200, 200),),
        num_particles: int = 5,
        kl_warmup_steps: int = 0,
        dropout: float = 0.0,
        val_particles: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        if not latent_dims or len(latent_dims) != len(hidden_sizes) or min(latent_dims) < 1:
            raise OptionError(
                f"expected sizes of at least 1, and hidden_sizes for each of latent_dims, got "
                f"latent_dims={tuple(latent_dims)}, hidden_sizes={tuple(map(tuple, hidden_sizes))}"
            )
        at_least(1, num_particles=num_particles, hidden_sizes=min(itertools.chain(*hidden_sizes), default=1))
        super().__init__(
            event_shape,
            hidden_sizes[0],
            latent_dims[0],
            kl_warmup_steps,
            dropout,
            val_particles=val_particles,
            **options,
        )
        self.latent_dims = list(latent_dims)
        self._num_particles = num_particles
        above = list(zip(itertools.pairwise(latent_dims), hidden_sizes[1:], strict=True))
        self.encoders = nn.ModuleList(mlp([below, *sizes, 2 * dim], dropout) for (below, dim), sizes in above)
        self.decoders = nn.ModuleList(mlp([dim, *reversed(sizes), 2 * below], dropout) for (below, dim), sizes in above)

    def edges(self) -> list[nn.Module]:
        """First and last layers of all networks."""
        return ends(self.encoder, self.decoder, *self.encoders, *self.decoders)

    @property
    def num_particles(self) -> int:
        """K of the training objective."""
        return self._num_particles

    @property
    def num_latents(self) -> int:
        """D, numbers in z, of all layers."""
        return sum(self.latent_dims)

    def _annealing_start(self, x: Tensor) -> Normal:
        """As for a VAE with one layer, and else a standard normal."""
        return LatentVariableModel._annealing_start(self, x) if self.encoders else super()._annealing_start(x)

    def _encode(self, x: Tensor) -> Tensor:
        """Posterior means (B, D), each layer's at the mean of the one below."""
        return self._infer(x, x.new_zeros(len(x), self.num_latents))[0]

    def _decode(self, z: Tensor) -> Tensor:
        return super()._decode(z[..., : self.latent_dim])

    def _log_prior(self, z: Tensor) -> Tensor:
        layers = z.split(self.latent_dims, dim=-1)
        return sum(self._log_conditionals(layers), standard_normal_log_prob(layers[-1]))

    def _log_conditionals(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """Log p(z_l|z_l+1) in nats, (...), of all layers but the top one."""
        pairs = zip(self.decoders, itertools.pairwise(layers), strict=True)
        return [self._gaussian(decoder, above).log_prob(z).sum(dim=-1) for decoder, (z, above) in pairs]

    def _gaussian(self, network: nn.Module, z: Tensor) -> Normal:
        return diagonal_gaussian(network(z.to(self._number_type)))

    def _infer(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        layers, log_qs, _ = self._infer_layers(x, noise)
        return torch.cat(layers, dim=-1), sum(log_qs[1:], log_qs[0])

    def _log_posterior(self, x: Tensor, z: Tensor) -> Tensor:
        layers = z.split(self.latent_dims, dim=-1)
        pairs = zip(self.encoders, itertools.pairwise(layers), strict=True)
        above = [self._gaussian(encoder, below).log_prob(z).sum(dim=-1) for encoder, (below, z) in pairs]
        return sum(above, super()._log_posterior(x, layers[0]))

    def _infer_layers(self, x: Tensor, noise: Tensor) -> tuple[list[Tensor], list[Tensor], Normal]:
        """Latents and log-densities of all layers, and the posterior of the top one."""
        posterior = self._posterior(x)
        first, *others = noise.split(self.latent_dims, dim=-1)
        drawn = [draw(posterior, first)]
        for encoder, part in zip(self.encoders, others, strict=True):
            posterior = self._gaussian(encoder, drawn[-1][0])
            drawn.append(draw(posterior, part))
        return [z for z, _ in drawn], [log_q for _, log_q in drawn], posterior

    def _elbo_terms(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        layers, log_qs, top = self._infer_layers(x, self._noise(1, len(x), generator)[0])
        lower = (log_q - log_p for log_q, log_p in zip(log_qs[:-1], self._log_conditionals(layers), strict=True))
        return bernoulli_log_prob(super()._decode(layers[0]), x), sum(lower, kl_to_standard_normal(top))

    def _sample_latent(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Those of the top layer are standard normal; each layer below is drawn given the one above."""
        *parts, z = self._noise(1, num_samples, generator)[0].split(self.latent_dims, dim=-1)
        layers = [z]
        for decoder, part in zip(reversed(self.decoders), reversed(parts), strict=True):
            layers.insert(0, draw(self._gaussian(decoder, layers[0]), part)[0])
        return torch.cat(layers, dim=-1)
