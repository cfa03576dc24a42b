"""Generative adversarial models: a generator trained against a discriminator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypedDict, final

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base.generative import GenerativeModel
from lightning_genmodels.base.metrics import FrechetDistance
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import check_codes
from lightning_genmodels.nn.adversarial import Estimator, binarize, check_options, discriminator, generator
from lightning_genmodels.nn.coders import Network
from lightning_genmodels.nn.features import RandomFeatures
from lightning_genmodels.random import Noise, check_generator, derive_seed, keyed_generators, standard_normal
from lightning_genmodels.training.optimizers import OptimizerName, Schedule, ends


class AdversarialOptions(TypedDict, total=False):
    """Options of training beside those that an adversarial model names; see :class:`GenerativeModel`."""

    weight_decay: float
    warmup_steps: int
    optimizer: OptimizerName
    muon_learning_rate: float
    schedule: Schedule
    fall: float
    init_from: str | None


class AdversarialModel(GenerativeModel, ABC):
    """A generator x = g(z) of latents z ~ N(0, I), trained against a discriminator.

    A model implements the two losses. One training step is an update of the discriminator on a batch and, every
    ``discriminator_steps`` of them, one of the generator; ``global_step``, the schedule and the average of the weights
    count the discriminator's. Each update takes the gradient of its own network alone, and averages it over the
    processes itself, so that neither network's update touches the other, on any number of processes.

    There is no likelihood to validate. The best checkpoint is the one with the lowest ``val/frechet``: the Fréchet
    distance (Heusel et al. 2017, eq. 6) between validation images and as many samples, always from the same latents, in
    :class:`lightning_genmodels.nn.features.RandomFeatures`. It is cheap, and needs nothing that was trained; it chooses
    among the checkpoints of a run, and is no figure to publish.

    Args:
        event_shape: (1, H, W) of one image.
        latent_dim: D, numbers in z.
        hidden_sizes: Units, or channels, of the discriminator's hidden layers; the generator has them in reverse.
        network: ``mlp`` or ``conv``.
        estimator: How the generator's output is made binary, and the gradient gets through it; see
            :func:`lightning_genmodels.nn.adversarial.binarize`.
        temperature: Of that estimator.
        dropout: Fraction of the discriminator's hidden units that training drops.
        discriminator_steps: Updates of the discriminator for one of the generator.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: A size below one, an unknown network or estimator, or a fraction outside [0, 1).
    """

    monitor = "val/frechet"

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int,
        hidden_sizes: Sequence[int],
        network: Network,
        estimator: Estimator,
        temperature: float,
        dropout: float,
        discriminator_steps: int,
        learning_rate: float,
        betas: tuple[float, float],
        **options: Unpack[AdversarialOptions],
    ) -> None:
        super().__init__(event_shape, learning_rate=learning_rate, betas=betas, **options)
        check_options(network, hidden_sizes, latent_dim, estimator, temperature)
        if not 0.0 <= dropout < 1.0 or discriminator_steps < 1:
            raise OptionError(
                f"expected dropout in [0, 1) and discriminator_steps of at least 1, got dropout={dropout}, "
                f"discriminator_steps={discriminator_steps}"
            )
        self.automatic_optimization = False
        self.latent_dim = latent_dim
        self.estimator = estimator
        self.temperature = temperature
        self.discriminator_steps = discriminator_steps
        self.generator = generator(network, self.event_shape, hidden_sizes, latent_dim)
        self.discriminator = discriminator(network, self.event_shape, hidden_sizes, dropout)
        self.features = RandomFeatures()
        self.val_frechet, self.test_frechet = FrechetDistance(256), FrechetDistance(256)

    # What a model implements.

    @abstractmethod
    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The scalar that the discriminator minimizes, of images (B, 1, H, W) of the data and of the generator."""

    @abstractmethod
    def generator_loss(self, fake: Tensor) -> Tensor:
        """The scalar that the generator minimizes, of its images (B, 1, H, W)."""

    @final
    def edges(self) -> list[nn.Module]:
        """First and last layers of both networks."""
        return ends(self.generator, self.discriminator)

    # Using a model.

    @final
    def sample_latent(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) latents, standard normal.

        Raises:
            OptionError: ``num_samples`` is negative, or ``generator`` is of another type.
        """
        at_least(0, num_samples=num_samples)
        check_generator(generator)
        device = generator.device if generator is not None else self.device
        noise = torch.randn((num_samples, self.latent_dim), generator=generator, device=device)
        return noise.to(next(self.parameters()))

    @final
    def decode(self, z: Tensor) -> Tensor:
        """Logits (N, 1, H, W) of the pixels given latents (N, D): a pixel is on where its logit is positive, or, for
        ``gumbel_sigmoid``, with probability sigmoid(logit).

        Raises:
            OptionError: ``z`` has another shape.
        """
        logits: Tensor = self.generator(check_codes(z, self.latent_dim))
        return logits

    def forward(self, z: Tensor) -> Tensor:
        """:meth:`decode`: logits (N, 1, H, W) of latents (N, D)."""
        return self.decode(z)

    @final
    def generate(self, z: Tensor, *, generator: Noise = None) -> Tensor:
        """Images (N, 1, H, W) in {0, 1} of latents (N, D), with a gradient; noise from one generator, or one a row."""
        return binarize(self.decode(z), self.estimator, self.temperature, generator).to(self._number_type)

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return self.generate(self.sample_latent(num_samples, generator=generator), generator=generator)

    # Training.

    @final
    def configure_optimizers(self) -> Any:  # a list of dictionaries, which Lightning takes and its types leave out
        """One optimizer and schedule for each network, the discriminator's first.

        Raises:
            OptionError: Half precision that needs its losses scaled.
        """
        if self.trainer.precision == "16-mixed":
            raise OptionError("adversarial training scales no losses; choose --trainer.precision bf16-mixed or 32-true")
        generator = self._optimization_of(self.generator, every=self.discriminator_steps)
        return [self._optimization_of(self.discriminator), generator]

    @final
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Updates the discriminator, and after ``discriminator_steps`` of it the generator (Goodfellow et al. 2014,
        algorithm 1).
        """
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        batch = self._taken(batch)
        with torch.no_grad():
            fake = self.generate(self.sample_latent(len(batch)))
        loss = self.discriminator_loss(batch, fake)
        self._watch(loss)
        self._set_gradients(self.discriminator, loss)
        logs = self._logs_step  # before the step is counted
        optimizers[0].step()
        if logs:
            self.log("train/discriminator_loss", self._weighted(loss), sync_dist=True)
        if self.global_step % self.discriminator_steps == 0:
            loss = self.generator_loss(self.generate(self.sample_latent(len(batch))))
            self._watch(loss)
            self._set_gradients(self.generator, loss)
            optimizers[1].optimizer.step()  # not Lightning's wrapper: global_step counts one optimizer
            schedulers[1].step()
            if logs:
                self.log("train/generator_loss", self._weighted(loss), prog_bar=True, sync_dist=True)
        schedulers[0].step()

    def _set_gradients(self, network: nn.Module, loss: Tensor) -> None:
        """Gradients of a loss, averaged over the processes, for the parameters of one network and no other."""
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        flat = self._weighted(torch.cat([gradient.flatten() for gradient in gradients]))
        mean: Tensor = self.trainer.strategy.reduce(flat, reduce_op="mean")
        for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    # Validation.

    @final
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch, and as many samples, to the validation figure."""
        self._compare(self.val_frechet, self._taken(batch))

    @final
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch, and as many samples, to the test figure."""
        self._compare(self.test_frechet, self._taken(batch))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs ``val/frechet``."""
        self.log("val/frechet", self.val_frechet.compute().float(), prog_bar=True)
        self.val_frechet.reset()

    @final
    def on_test_epoch_end(self) -> None:
        """Logs ``test/frechet``."""
        self.log("test/frechet", self.test_frechet.compute().float())
        self.test_frechet.reset()

    def _compare(self, metric: FrechetDistance, batch: Tensor) -> None:
        """An image always stands beside the sample of the same latents, so that the figures of epochs can be compared,
        and do not depend on batches and processes.
        """
        noise = keyed_generators(derive_seed("frechet"), self._indices(batch))
        z = standard_normal(1, len(batch), (self.latent_dim,), noise, like=next(self.parameters()))[0]
        metric.update(self.features(batch), real=True)
        metric.update(self.features(self.generate(z, generator=noise)), real=False)
