"""Models with latent variables, whose likelihood is bounded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint
from typing_extensions import Unpack

from lightning_genmodels.base.generative import GenerativeModel, TrainingOptions, chunk_sizes
from lightning_genmodels.base.metrics import MeanWithError, NegativeLogLikelihood
from lightning_genmodels.base.representation import RepresentationModel
from lightning_genmodels.errors import at_least
from lightning_genmodels.functional import as_float64, at_least_float32, check_codes
from lightning_genmodels.random import Noise, check_generator, keyed_generators, sample_bernoulli


class LatentVariableModel(GenerativeModel, RepresentationModel, ABC):
    """A model p(x, z) with an approximate posterior q(z|x): its likelihood is bounded, never known.

    It implements ``num_latents``, ``_encode``, ``_decode``, ``_log_joint``, ``_log_weights`` and ``_sample_latent``;
    ``_elbo`` too where a term is known in closed form. The public methods of these names check what they are given,
    once, and call them. Bounds are free of whatever training adds (beta, free bits, warm-up), which lives in
    ``training_loss`` alone. Codes are posterior means, levels concatenated.
    """

    particle_block: ClassVar[int] = 100
    """Particles drawn at once by :meth:`iw_bound`: it bounds memory, and fixes the order in which noise is drawn."""

    score_rows: ClassVar[int] = 1000
    """Images times particles that an evaluation takes at once on a CPU, whose cache their activations should fit; no
    figure depends on it."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Unpack[TrainingOptions]) -> None:
        super().__init__(event_shape, **options)
        self.val_nelbo = NegativeLogLikelihood(self.event_shape)
        self.val_kl = MeanWithError()
        self.val_iw = NegativeLogLikelihood(self.event_shape)
        self.test_nelbo = NegativeLogLikelihood(self.event_shape)
        self.test_iw = NegativeLogLikelihood(self.event_shape)

    # Subclasses implement these. Images are binary, (B, 1, H, W), on the model's device and of its type.

    @property
    @abstractmethod
    def num_latents(self) -> int:
        """D, numbers in z."""

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """Posterior means (B, D)."""

    @abstractmethod
    def _decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels given latents (..., D)."""

    @abstractmethod
    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) in nats, (..., B), of latents (..., B, D)."""

    @abstractmethod
    def _log_weights(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        """Log p(x, z_k) - log q(z_k | x), (K, B) nats, for K particles z_k ~ q(z|x)."""

    @abstractmethod
    def _sample_latent(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws (num_samples, D) latents from the prior p(z)."""

    def _elbo(self, x: Tensor, generator: Noise) -> Tensor:
        """Evidence lower bound (B,) in nats, one particle each."""
        return self._log_weights(x, 1, generator)[0]

    def _elbo_terms(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor] | None:
        """The two terms of the evidence lower bound, which is their difference: E_q[log p(x|z)] and the KL divergence,
        (B,) nats each, one particle each; None where they are not known apart.
        """
        return None

    def _annealing_start(self, x: Tensor) -> Normal:
        """Where annealed importance sampling starts: a diagonal Gaussian over latents, with batch shape (B, D). The
        nearer to the posterior, the better; default: a standard normal.
        """
        codes = self._encode(x)
        return Normal(torch.zeros_like(codes), torch.ones_like(codes), validate_args=False)

    @property
    def num_particles(self) -> int:
        """Particles of the training objective."""
        return 1

    @property
    def val_particles(self) -> int:
        """Particles of the bound that validation logs as ``iw<k>``, if more than one; default: those of training."""
        return self.num_particles

    @property
    def monitor(self) -> str:  # type: ignore[override]
        """The bound on validation images by which a checkpoint is chosen."""
        return "val/nelbo" if self.val_particles == 1 else f"val/iw{self.val_particles}"

    # Using a model.

    @final
    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, D) of binary images (B, 1, H, W): means of the approximate posterior.

        Raises:
            ImageError: ``x`` is no batch of binary images.
        """
        return self._encode(self._checked(x))

    @final
    def decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels given latents (..., D).

        Raises:
            OptionError: ``z`` has another shape.
        """
        return self._decode(check_codes(z, self.num_latents))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of the pixels of images, given their own codes: a reconstruction."""
        return self.decode(self.encode(x))

    @final
    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) in nats, (..., B), of images (B, 1, H, W) and latents (..., B, D).

        Raises:
            ImageError: ``x`` is no batch of binary images.
            OptionError: ``z`` has another shape.
        """
        return self._log_joint(self._checked(x), check_codes(z, self.num_latents))

    @final
    def log_weights(self, x: Tensor, num_particles: int, *, generator: Noise = None) -> Tensor:
        """Log p(x, z_k) - log q(z_k | x) for particles z_k ~ q(z|x).

        Args:
            x: (B, 1, H, W) binary images.
            num_particles: K.
            generator: One generator, or one per image.

        Returns:
            (K, B) nats.

        Raises:
            OptionError: ``num_particles`` is not a positive integer, or ``generator`` is of another type.
            ImageError: ``x`` is no batch of binary images.
        """
        at_least(1, num_particles=num_particles)
        check_generator(generator)
        return self._log_weights(self._checked(x), num_particles, generator)

    @final
    def sample_latent(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) latents from the prior p(z).

        Raises:
            OptionError: ``num_samples`` is negative, or ``generator`` is of another type.
        """
        at_least(0, num_samples=num_samples)
        check_generator(generator)
        return self._sample_latent(num_samples, generator)

    @final
    def elbo(self, x: Tensor, *, generator: Noise = None) -> Tensor:
        """Evidence lower bound (B,) in nats per image, one particle each (Kingma and Welling 2014, eq. 3).

        Raises:
            ImageError: ``x`` is no batch of binary images.
            OptionError: ``generator`` is of another type.
        """
        check_generator(generator)
        return self._elbo(self._checked(x), generator)

    @final
    def iw_bound(self, x: Tensor, num_particles: int, *, generator: Noise = None) -> Tensor:
        """Importance-weighted bound (Burda et al. 2016, eq. 8): log mean exp of K log-weights, in expectation below
        log p(x) and rising with K.

        Particles are drawn ``particle_block`` at a time, so that memory does not grow with K; with gradients, blocks
        are computed again in the backward pass.

        Args:
            x: (B, 1, H, W) binary images.
            num_particles: K.
            generator: One generator, or one per image; with one per image the bound does not depend on the batch.

        Returns:
            (B,) nats per image.

        Raises:
            OptionError: ``num_particles`` is not a positive integer, or ``generator`` is of another type.
            ImageError: ``x`` is no batch of binary images.
        """
        at_least(1, num_particles=num_particles)
        check_generator(generator)
        return self._iw_bound(self._checked(x), num_particles, generator)

    def _iw_bound(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        if not len(x):
            return at_least_float32(x.new_zeros(0))
        sizes = list(chunk_sizes(num_particles, self.particle_block))
        keeps_graphs = torch.is_grad_enabled() and len(sizes) > 1
        block = self._recomputed_block if keeps_graphs else self._block
        bound = torch.logsumexp(torch.stack([block(x, size, generator) for size in sizes]), dim=0)
        bound = bound - math.log(num_particles)
        return bound.to(torch.float64 if self._number_type == torch.float64 else torch.float32).to(x.device)

    def _block(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        """Log of the sum of the weights of some particles, (B,) float64."""
        return torch.logsumexp(as_float64(self._log_weights(x, num_particles, generator)), dim=0)

    def _recomputed_block(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        """The same, whose activations are not kept for the gradient, but computed again from the same noise."""
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator or ())
        states = [source.get_state() for source in generators]
        is_first = True

        def block(x: Tensor) -> Tensor:
            nonlocal is_first
            now = [source.get_state() for source in generators]
            if not is_first:
                _restore(generators, states)
            found = self._block(x, num_particles, generator)
            if not is_first:
                _restore(generators, now)
            is_first = False
            return found

        recomputed: Tensor = checkpoint(block, x, use_reentrant=False)
        return recomputed

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative ELBO in nats per image, or the importance-weighted bound for more than one particle."""
        if self.num_particles == 1:
            return -self._elbo(x, None).mean()
        return -self._iw_bound(x, self.num_particles, None).mean()

    @final
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs and returns the training loss of a batch, images or (images, ...)."""
        return self._logged(self.training_loss(self._taken(batch)))

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli(self._decode(self._sample_latent(num_samples, generator)), generator)

    # Evaluation draws its noise from generators keyed by the image's index, so that figures do not depend on batches
    # and processes, and do not jitter from epoch to epoch.

    @final
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the validation figures."""
        x = self._taken(batch)
        indices = self._indices(x)
        terms = self._elbo_terms(x, keyed_generators(0, indices))
        if terms is None:
            self.val_nelbo.update(self._elbo(x, keyed_generators(0, indices)))
        else:
            self.val_nelbo.update(terms[0] - terms[1])
            self.val_kl.update(terms[1])
        if self.val_particles > 1:
            self.val_iw.update(self._iw_bound(x, self.val_particles, keyed_generators(0, indices)))

    @final
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the test figures."""
        x = self._taken(batch)
        indices = self._indices(x)
        self.test_nelbo.update(self._elbo(x, keyed_generators(0, indices)))
        self.test_iw.update(self._iw_bound(x, self.particle_block, keyed_generators(0, indices)))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs ``val/nelbo`` and, for several particles, ``val/iw<k>``, in nats per image."""
        self._log_estimate("val/nelbo", self.val_nelbo.compute())
        if self.val_kl.update_called:
            kl, nelbo = self.val_kl.compute().value, self.val_nelbo.compute().value
            self.log_dict({"val/kl": kl.float(), "val/reconstruction": (nelbo - kl).float()})
            self.val_kl.reset()
        self.val_nelbo.reset()
        if self.val_particles > 1:
            self._log_estimate(f"val/iw{self.val_particles}", self.val_iw.compute())
            self.val_iw.reset()

    @final
    def on_test_epoch_end(self) -> None:
        """Logs ``test/nelbo`` and ``test/iw<k>`` with k = ``particle_block``, in nats per image."""
        self._log_estimate("test/nelbo", self.test_nelbo.compute())
        self._log_estimate(f"test/iw{self.particle_block}", self.test_iw.compute())
        self.test_nelbo.reset()
        self.test_iw.reset()


def _restore(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for source, state in zip(generators, states, strict=True):
        source.set_state(state)
