"""The abstract classes: what a generative model of binary images can do, and what it must say to be able to.

A model implements what its kind leaves abstract; everything else is written here once and is final. What a model cannot
do it has no method for, so ``isinstance`` tells exact likelihoods, bounds and samplers apart.

==================== ============================== ======================================
kind                 scores by                      what a model implements
==================== ============================== ======================================
ExplicitModel        exact ``log_prob``             ``_log_prob``, ``_sample``
TabularModel         the same, learned by counting  and ``statistics``, ``fit_statistics``
AutoregressiveModel  the chain rule, in one order   ``conditional_logits``, ``_fill``
OrderMixture         a mixture of several orders    ``conditional_logits``, ``_fill``
LatentVariableModel  ``elbo`` and ``iw_bound``      ``encode``, ``decode``, ``log_joint``,
                                                    ``log_weights``, ``sample_latent``
ImplicitModel        nothing                        ``_sample``, its own ``training_step``
==================== ============================== ======================================
"""

from __future__ import annotations

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict, final

import torch
from lightning import LightningModule
from torch import Tensor
from typing_extensions import Unpack

from lightning_genmodels import pretrained
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import ImageError, OptionError
from lightning_genmodels.functional import (
    Noise,
    bernoulli_log_prob,
    check_images,
    derive_seed,
    keyed_generators,
    log_mean_exp,
    pixel_order,
    process_share,
    sample_bernoulli,
    seed_default_generators,
    uniform,
)
from lightning_genmodels.metrics import Estimate, NegativeLogLikelihood

EventShape = tuple[int, int, int]


class TrainingOptions(TypedDict, total=False):
    """Options that every model trained by gradients takes; see :class:`GenerativeModel`."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    init_from: str | None


class GenerativeModel(LightningModule, ABC):
    """A distribution over binary images that can be sampled.

    A model implements ``training_loss`` (the one hook of the training step) and ``_sample``.

    Args:
        event_shape: (1, H, W) of one image.
        learning_rate: Peak learning rate of AdamW (Loshchilov and Hutter 2019).
        weight_decay: Its decoupled weight decay, on tensors of two or more dimensions (not on biases).
        betas: Its two decay rates.
        warmup_steps: Steps over which the learning rate rises linearly; afterwards it falls to zero by a cosine over
            the whole run.
        init_from: Exported weights to start training from (a folder, a weight's name, or a repository on the Hub).
            They are loaded when fitting starts; the option is not saved with the model.

    Raises:
        OptionError: ``event_shape`` is not (1, H, W).
    """

    monitor: ClassVar[str]
    """The validation figure by which the best checkpoint is chosen; lower is better."""

    small: ClassVar[dict[str, Any]]
    """Constructor arguments of a tiny instance, whose images can all be enumerated: what the contract tests run on."""

    sample_chunk: ClassVar[int] = 1000
    """At most this many images are sampled at once; the samples of a seed depend on it, so it is part of the model."""

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        shape = tuple(event_shape)
        if len(shape) != 3 or shape[0] != 1 or min(shape) < 1:
            raise OptionError(f"expected event_shape (1, H, W), got {shape}")
        self.event_shape: EventShape = (shape[0], shape[1], shape[2])
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.init_from = init_from
        self.save_hyperparameters(ignore=_not_saved(type(self)))

    # What a model implements.

    @abstractmethod
    def training_loss(self, x: Tensor) -> Tensor:
        """The scalar that training minimizes, a mean over the batch ``x`` (B, 1, H, W)."""

    @abstractmethod
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws (num_samples, 1, H, W) images in {0, 1}, float32; called without gradients, in chunks."""

    def initialize(self, images: Tensor) -> None:
        """Sets parameters from all training images, (N, 1, H, W) uint8, before training from scratch; default: none."""

    # Using a model.

    @property
    def num_parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(parameter.numel() for parameter in self.parameters())

    @final
    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws images.

        Args:
            num_samples: N, zero or more.
            generator: Source of randomness, for reproducible samples; one on the CPU serves a model anywhere. Default:
                PyTorch's global generator.

        Returns:
            (N, 1, H, W) float32 in {0, 1}, on the model's device.

        Raises:
            OptionError: ``num_samples`` is negative.
        """
        if num_samples < 0:
            raise OptionError(f"expected num_samples of at least 0, got {num_samples}")
        chunks = [self._sample(size, generator) for size in _chunk_sizes(num_samples, self.sample_chunk)]
        return torch.cat(chunks).float() if chunks else torch.zeros((0, *self.event_shape), device=self.device)

    @final
    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into a folder, which :meth:`from_pretrained` reads.

        Args:
            folder: Made if it does not exist.
            half: Store floating-point weights in half precision.

        Raises:
            UnknownNameError: The model's class is not registered, so that it could not be loaded again.
            WeightsError: The folder cannot be written.
        """
        pretrained.write(self, Path(folder), half=half)

    @classmethod
    @final
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Any:
        """Loads trained weights, in evaluation mode.

        Args:
            name: A local folder, the name of a weight such as ``vae.static_v1``, or a repository ``owner/repo`` on the
                Hugging Face Hub.
            revision: Branch, tag or commit of a Hub repository.

        Returns:
            A model of the class that the weights name, which must be ``cls`` or derived from it.

        Raises:
            WeightsError: Nothing is there, it is damaged, or it is another kind of model.
        """
        return pretrained.read(name, expected=cls, revision=revision)

    @final
    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the weights to a repository on the Hugging Face Hub, made if need be; returns its address."""
        return pretrained.push(self, repo_id, private=private, token=token)

    # Training: final steps and the default optimizer.

    @final
    def setup(self, stage: str) -> None:
        """Before fitting, loads ``init_from`` or looks at the data; a checkpoint is restored afterwards."""
        if stage != "fit":
            return
        if self.init_from is not None:
            pretrained.load_into(self, self.init_from)
            return
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, BinarizedMNISTDataModule):
            self.initialize(data.images("train"))

    @final
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Seeds the noise of the step by (seed, epoch, step, process), so that a resumed run repeats it exactly."""
        base = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        seed_default_generators(derive_seed("step", base, self.current_epoch, batch_idx, self.global_rank), self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Logs and returns the training loss."""
        loss = self.training_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, with linear warm-up and cosine decay over the whole run."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning refuses to clip the gradients of a fused optimizer under float16 loss scaling.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            fused=fused,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @final
    def _learning_rate_factor(self, step: int) -> float:
        """A linear rise, then a cosine to zero (constant if the run has no end)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if step == 0:
            # Asking Lightning for the total now would load the data, and the state of the loader in a checkpoint,
            # which is restored later, would be lost.
            return 1.0
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            return 1.0
        progress = (step - self.warmup_steps) / max(1.0, total - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which model the checkpoint holds, so that it can be loaded without naming the class."""
        pretrained.describe(self, checkpoint)

    # Helpers for the kinds below.

    @final
    def _checked(self, x: Tensor) -> Tensor:
        """Images, checked and brought to the model's device and type.

        Values are not looked at while a trainer runs: there they come from the data module, and a look costs a wait for
        the accelerator in every step.
        """
        running = self._trainer is not None and self._trainer.state.stage is not None
        check_images(x, self.event_shape, values=not running)
        return x.to(next(self.parameters()))

    @final
    def _log_estimate(self, name: str, estimate: Estimate) -> None:
        """Logs a figure that is already reduced over the processes."""
        self.log(name, estimate.value.float(), prog_bar=True, rank_zero_only=False)
        self.log(f"{name}_stderr", estimate.standard_error.float())


class ExplicitModel(GenerativeModel, ABC):
    """A model that says exactly how likely an image is; it implements ``_log_prob`` and ``_sample``."""

    monitor = "val/nll"

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Unpack[TrainingOptions]) -> None:
        super().__init__(event_shape, **options)
        self.val_nll = NegativeLogLikelihood(self.event_shape)
        self.test_nll = NegativeLogLikelihood(self.event_shape)

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (B,) of images (B, 1, H, W) that are known to be binary."""

    @final
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-probability of images.

        Args:
            x: (B, 1, H, W) in {0, 1}, of any type, on any device.

        Returns:
            (B,) nats per image, summed over pixels in at least float32.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        return self._log_prob(self._checked(x))

    def _validation_log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (B,) as validated during training: exact, unless that would take longer than training."""
        return self._log_prob(x)

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image."""
        return -self._log_prob(x).mean()

    @final
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds a batch to the validation figure."""
        self.val_nll.update(self._validation_log_prob(batch))

    @final
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds a batch to the test figure."""
        self.test_nll.update(self._log_prob(batch))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs ``val/nll`` in nats per image."""
        self._log_estimate("val/nll", self.val_nll.compute())
        self.val_nll.reset()

    @final
    def on_test_epoch_end(self) -> None:
        """Logs ``test/nll`` in nats per image."""
        self._log_estimate("test/nll", self.test_nll.compute())
        self.test_nll.reset()


class TabularModel(ExplicitModel, ABC):
    """An explicit model whose parameters are functions of counts, learned in one pass over the data.

    It implements ``statistics`` (what to count), ``fit_statistics`` (parameters from the counts, summed over all
    batches and processes) and ``num_free_parameters``. Counts start anew with every epoch, so that one epoch is enough
    and more of them change nothing but, for dynamic binarization, the draw.
    """

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Any) -> None:
        super().__init__(event_shape, **options)  # a tabular model that is autoregressive, too, has an order
        self.automatic_optimization = False
        self._counts: Tensor | None = None
        self._counted_epoch = -1

    @property
    @abstractmethod
    def num_free_parameters(self) -> int:
        """How many numbers determine the distribution."""

    @abstractmethod
    def statistics(self, x: Tensor) -> Tensor:
        """Sufficient statistics of a batch (B, 1, H, W), an int64 tensor that adds up over batches."""

    @abstractmethod
    def fit_statistics(self, counts: Tensor) -> None:
        """Sets the parameters from the statistics of all training images."""

    @final
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Counts a batch."""
        counts = self.statistics(batch)
        if self._counts is not None and self._counted_epoch == self.current_epoch:
            counts = self._counts + counts
        self._counts = counts
        self._counted_epoch = self.current_epoch

    @final
    def on_validation_start(self) -> None:
        """Sets the parameters before they are validated: in Lightning, validation precedes the end of the epoch."""
        if not self.trainer.sanity_checking:
            self._fit_counts()

    @final
    def on_train_epoch_end(self) -> None:
        """Sets the parameters, also where there is no validation."""
        self._fit_counts()

    @final
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None: nothing is learned by gradients."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the counts of an unfinished epoch."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["counts"] = self._reduced_counts()
        checkpoint["counted_epoch"] = self._counted_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on counting; the counts of all processes are now the first one's."""
        counts = checkpoint["counts"]
        self._counted_epoch = checkpoint["counted_epoch"]
        self._counts = None
        if counts is not None:
            counts = counts.to(self.device)
            self._counts = counts if self.global_rank == 0 else torch.zeros_like(counts)

    def _fit_counts(self) -> None:
        counts = self._reduced_counts()
        if counts is not None:
            self.fit_statistics(counts)

    def _reduced_counts(self) -> Tensor | None:
        if self._counts is None:
            return None
        counts: Tensor = self.trainer.strategy.reduce(self._counts.clone(), reduce_op="sum")
        return counts


class AutoregressiveModel(ExplicitModel, ABC):
    """p(x) = prod_i p(x_i | x_<i) in one order of the pixels: the chain rule, exact whatever the conditionals are.

    It implements ``conditional_logits`` and ``_fill``.

    Args:
        event_shape: (1, H, W) of one image.
        order: Name of the pixel order; see :func:`lightning_genmodels.functional.pixel_order`.
        order_seed: Seed of a random order.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: No order has this name.
    """

    pixel_order: Tensor
    """(n,) row-major index of the first, second, ... pixel; computed from its name, so no part of the weights."""

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        order: str = "raster",
        order_seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        permutation = pixel_order(order, *self.event_shape[1:], seed=order_seed)
        self.register_buffer("pixel_order", permutation, persistent=False)

    @abstractmethod
    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) for every pixel i, (B, 1, H, W), of images (B, 1, H, W) in {0, 1}."""

    @abstractmethod
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        """Draws the pixels that are not observed, in order; see :func:`lightning_genmodels.functional.fill_in_order`,
        with which it agrees.

        Args:
            x: (N, 1, H, W) in {0, 1}.
            observed: (N, 1, H, W) bool.
            uniforms: (N, n) in [0, 1); column i draws the i-th pixel of the order.

        Returns:
            (N, 1, H, W).
        """

    @final
    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(self.conditional_logits(x), x)

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        x, observed, uniforms = _nothing_observed(self, num_samples, generator)
        return self._fill(x, observed, uniforms)

    @final
    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws the pixels that are not observed, given those that are.

        Every pixel is drawn given the pixels before it in the order. That is a draw from p(x_unobserved | x_observed)
        where the observed pixels come first in the order; elsewhere it is an approximation that ignores what is
        observed later.

        Args:
            x: (B, 1, H, W) images in {0, 1}; pixels that are not observed may have any value.
            observed: Bool, shaped as ``x`` or (H, W) or whatever broadcasts to it; True where a pixel is given.
            generator: Source of randomness; default: PyTorch's global generator.

        Returns:
            (B, 1, H, W) float32 in {0, 1}, on the model's device.

        Raises:
            ImageError: ``x`` is no batch of binary images, or ``observed`` does not fit it.
        """
        x, observed = _checked_observed(self, x, observed)
        uniforms = uniform((len(x), math.prod(self.event_shape)), generator, x)
        return self._fill(x, observed, uniforms).float()


class OrderMixture(ExplicitModel, ABC):
    """p(x) = 1/M sum_m p(x; order m): one network that knows several orders of the pixels, and their average.

    What is averaged is the joint probability of the whole image (Uria, Murray and Larochelle 2014, eq. 14), never the
    conditionals, whose average would let a pixel see itself. It implements ``conditional_logits`` and ``_fill``.

    Args:
        event_shape: (1, H, W) of one image.
        orders: Names of the M orders; see :func:`lightning_genmodels.functional.pixel_order`.
        order_seed: Order m has the seed ``order_seed + m``, if it is random.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: No order at all, or one with an unknown name.
    """

    pixel_orders: Tensor
    """(M, n) row-major indices of the pixels, one order a row; computed from names, so no part of the weights."""

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        orders: Sequence[str] = ("raster",),
        order_seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if not orders:
            raise OptionError("expected at least one pixel order, got none")
        rows = [pixel_order(name, *self.event_shape[1:], seed=order_seed + m) for m, name in enumerate(orders)]
        self.register_buffer("pixel_orders", torch.stack(rows), persistent=False)

    @abstractmethod
    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of images (B, 1, H, W) in {0, 1}."""

    @abstractmethod
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        """As :meth:`AutoregressiveModel._fill`, image b in the order ``which[b]``; ``which`` is (N,) int64."""

    @final
    def log_prob_by_order(self, x: Tensor) -> Tensor:
        """Exact log-probability under every single order, (M, B) nats per image, of images (B, 1, H, W) in {0, 1}.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        x = self._checked(x)
        return torch.stack(
            [bernoulli_log_prob(self.conditional_logits(x, m), x) for m in range(len(self.pixel_orders))]
        )

    @final
    def _log_prob(self, x: Tensor) -> Tensor:
        return log_mean_exp(self.log_prob_by_order(x), dim=0)

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        x, observed, uniforms = _nothing_observed(self, num_samples, generator)
        which = uniform((num_samples,), generator, x) * len(self.pixel_orders)
        return self._fill(x, observed, uniforms, which.long())

    @final
    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws the pixels that are not observed, given those that are, in the order that suits them best.

        For each image that is the order in which the fewest observed pixels follow a pixel that is not. If none does,
        the draw is exact for the density of *that order*, not for the mixture, whose orders would have to be weighted
        by how likely they make what is observed. Otherwise it ignores what is observed later.

        Args:
            x: (B, 1, H, W) images in {0, 1}; pixels that are not observed may have any value.
            observed: Bool, shaped as ``x`` or (H, W) or whatever broadcasts to it; True where a pixel is given.
            generator: Source of randomness; default: PyTorch's global generator.

        Returns:
            (B, 1, H, W) float32 in {0, 1}, on the model's device.

        Raises:
            ImageError: ``x`` is no batch of binary images, or ``observed`` does not fit it.
        """
        x, observed = _checked_observed(self, x, observed)
        uniforms = uniform((len(x), math.prod(self.event_shape)), generator, x)
        in_order = observed.flatten(1)[:, self.pixel_orders]  # (B, M, n)
        late = (in_order & ((~in_order).cumsum(-1) > 0)).sum(-1)  # (B, M) observed pixels after one that is not
        return self._fill(x, observed, uniforms, late.argmin(dim=1)).float()


class LatentVariableModel(GenerativeModel, ABC):
    """A model p(x, z) with an approximate posterior q(z|x): its likelihood is bounded, never known.

    It implements ``encode``, ``decode``, ``log_joint``, ``log_weights`` and ``sample_latent``; ``elbo`` too where a
    term is known in closed form. Bounds are free of whatever training adds (beta, free bits, warm-up), which lives in
    ``training_loss`` alone.
    """

    monitor = "val/nelbo"

    particle_block: ClassVar[int] = 100
    """Particles drawn at once by :meth:`iw_bound`: it bounds memory, and fixes the order in which noise is drawn."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Unpack[TrainingOptions]) -> None:
        super().__init__(event_shape, **options)
        self.val_nelbo = NegativeLogLikelihood(self.event_shape)
        self.val_iw = NegativeLogLikelihood(self.event_shape)
        self.test_nelbo = NegativeLogLikelihood(self.event_shape)
        self.test_iw = NegativeLogLikelihood(self.event_shape)
        self._num_evaluated = 0

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Mean (B, D) of the approximate posterior of images (B, 1, H, W); several levels are concatenated.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels' conditional distributions given latents (..., D)."""

    @abstractmethod
    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) in nats, (..., B), of images (B, 1, H, W) and latents (..., B, D)."""

    @abstractmethod
    def log_weights(self, x: Tensor, num_particles: int, *, generator: Noise = None) -> Tensor:
        """Log p(x, z_k) - log q(z_k | x) for particles z_k ~ q(z|x).

        Args:
            x: (B, 1, H, W) binary images.
            num_particles: K.
            generator: One generator, or one per image.

        Returns:
            (K, B) nats.
        """

    @abstractmethod
    def sample_latent(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) latents from the prior p(z)."""

    @property
    def num_particles(self) -> int:
        """Particles of the training objective; above one, validation logs and monitors the bound ``iw<k>`` too."""
        return 1

    def elbo(self, x: Tensor, *, generator: Noise = None) -> Tensor:
        """Evidence lower bound (B,) in nats per image, one particle each (Kingma and Welling 2014, eq. 3)."""
        return self.log_weights(x, 1, generator=generator)[0]

    @final
    def iw_bound(self, x: Tensor, num_particles: int, *, generator: Noise = None) -> Tensor:
        """Importance-weighted bound (Burda et al. 2016, eq. 8): log mean exp of K log-weights, in expectation below
        log p(x) and rising with K.

        Particles are drawn ``particle_block`` at a time, so that memory does not grow with K.

        Args:
            x: (B, 1, H, W) binary images.
            num_particles: K.
            generator: One generator, or one per image; with one per image the bound does not depend on the batch.

        Returns:
            (B,) nats per image.

        Raises:
            OptionError: ``num_particles`` is below one.
            ImageError: ``x`` is no batch of binary images.
        """
        if num_particles < 1:
            raise OptionError(f"expected num_particles of at least 1, got {num_particles}")
        x = self._checked(x)
        blocks = [
            torch.logsumexp(self.log_weights(x, size, generator=generator).double(), dim=0)
            for size in _chunk_sizes(num_particles, self.particle_block)
        ]
        bound = torch.logsumexp(torch.stack(blocks), dim=0) - math.log(num_particles)
        return bound.to(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative ELBO in nats per image, or the importance-weighted bound for more than one particle."""
        if self.num_particles == 1:
            return -self.elbo(x).mean()
        return -self.iw_bound(x, self.num_particles).mean()

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli(self.decode(self.sample_latent(num_samples, generator=generator)), generator)

    # Evaluation draws its noise from generators keyed by the image's index, so that figures do not depend on batches
    # and processes, and do not jitter from epoch to epoch.

    @final
    def on_validation_epoch_start(self) -> None:
        """Starts counting images."""
        self._num_evaluated = 0

    @final
    def on_test_epoch_start(self) -> None:
        """Starts counting images."""
        self._num_evaluated = 0

    @final
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds a batch to the validation figures."""
        indices = self._indices(batch)
        self.val_nelbo.update(self.elbo(batch, generator=keyed_generators(0, indices)))
        if self.num_particles > 1:
            self.val_iw.update(self.iw_bound(batch, self.num_particles, generator=keyed_generators(0, indices)))

    @final
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds a batch to the test figures."""
        indices = self._indices(batch)
        self.test_nelbo.update(self.elbo(batch, generator=keyed_generators(0, indices)))
        bound = self.iw_bound(batch, self.particle_block, generator=keyed_generators(0, indices))
        self.test_iw.update(bound)

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs ``val/nelbo`` and, for several particles, ``val/iw<k>``, in nats per image."""
        self._log_estimate("val/nelbo", self.val_nelbo.compute())
        self.val_nelbo.reset()
        if self.num_particles > 1:
            self._log_estimate(f"val/iw{self.num_particles}", self.val_iw.compute())
            self.val_iw.reset()

    @final
    def on_test_epoch_end(self) -> None:
        """Logs ``test/nelbo`` and ``test/iw<k>`` with k = ``particle_block``, in nats per image."""
        self._log_estimate("test/nelbo", self.test_nelbo.compute())
        self._log_estimate(f"test/iw{self.particle_block}", self.test_iw.compute())
        self.test_nelbo.reset()
        self.test_iw.reset()

    def _indices(self, batch: Tensor) -> range:
        """Data-set indices of a batch: this process has every ``world_size``-th image, in order."""
        start, self._num_evaluated = self._num_evaluated, self._num_evaluated + len(batch)
        return process_share(start, len(batch), self.trainer.global_rank, self.trainer.world_size)


class ImplicitModel(GenerativeModel, ABC):
    """A model that is known by its samples alone; it owns its training step."""


def _nothing_observed(
    model: GenerativeModel, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, H, W) with no pixel observed, and the uniform numbers (N, n) that will draw all of them."""
    x = torch.zeros((num_samples, *model.event_shape)).to(next(model.parameters()))
    uniforms = uniform((num_samples, math.prod(model.event_shape)), generator, x)
    return x, torch.zeros_like(x, dtype=torch.bool), uniforms


def _checked_observed(model: GenerativeModel, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Images with zeros where nothing is observed, and the mask in their shape, both on the model's device."""
    if observed.dtype != torch.bool:
        raise ImageError(f"expected a boolean mask of observed pixels, got {observed.dtype}; compare it with 0.5 first")
    check_images(x, model.event_shape, values=False)
    try:
        observed = observed.to(x.device).expand(x.shape)
    except RuntimeError as error:
        shape = tuple(observed.shape)
        raise ImageError(f"a mask of shape {shape} does not fit images of shape {tuple(x.shape)}") from error
    x = torch.where(observed, x, torch.zeros_like(x))
    check_images(x, model.event_shape)
    x = x.to(next(model.parameters()))
    return x, observed.to(x.device)


def _not_saved(cls: type[GenerativeModel]) -> list[str]:
    """Arguments of base classes that are no hyper-parameters of a class: those its own constructor lacks."""
    parameters = inspect.signature(cls).parameters
    takes_options = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {*parameters, *(TrainingOptions.__annotations__ if takes_options else ())}
    bases = [base for base in cls.__mro__ if issubclass(base, GenerativeModel)]
    inherited = {name for base in bases for name in inspect.signature(base).parameters}
    return ["init_from", *sorted(inherited - own)]


def _chunk_sizes(total: int, chunk: int) -> Iterator[int]:
    for start in range(0, total, chunk):
        yield min(chunk, total - start)
