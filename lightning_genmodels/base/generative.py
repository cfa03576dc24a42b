"""What every model is: trained, saved and loaded; and a distribution over binary images that can be sampled."""

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
from torch import Tensor, nn

from lightning_genmodels import pretrained
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import (
    check_images,
    derive_seed,
    seed_default_generators,
)
from lightning_genmodels.metrics import Estimate
from lightning_genmodels.processes import leave_group_at_exit

EventShape = tuple[int, int, int]


class TrainingOptions(TypedDict, total=False):
    """Options that every model trained by gradients takes; see :class:`TrainableModel`."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    init_from: str | None


class TrainableModel(LightningModule, ABC):
    """A model of binary images that is trained by a recipe, and saved and loaded by name.

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

    finalizes: ClassVar[bool] = False
    """Whether an export needs the training images, for :meth:`finalize`."""

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
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Learns from a batch: images (B, 1, H, W), or (images, labels) where the data module is asked for labels."""

    def initialize(self, images: Tensor) -> None:
        """Sets parameters from all training images, (N, 1, H, W) uint8, before training from scratch; default: none."""

    def finalize(self, images: Tensor) -> None:
        """Sets buffers from all training images, (N, 1, H, W) uint8, when weights are exported; default: none."""

    # Using a model.

    @property
    def num_parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        leave_group_at_exit()
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

    def configure_optimizers(self) -> Any:
        """AdamW, with linear warm-up and cosine decay over the whole run."""
        return self._optimization_of(self)

    @final
    def _optimization_of(self, network: nn.Module) -> dict[str, Any]:
        """Optimizer and learning-rate schedule of the trained parameters of a network, as Lightning takes them."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        # Lightning refuses to clip the gradients of a fused optimizer in mixed precision, with or without loss scaling.
        clips_mixed = self.trainer.precision == "bf16-mixed" and bool(self.trainer.gradient_clip_val)
        fused = self.trainer.precision != "16-mixed" and not clips_mixed
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


class GenerativeModel(TrainableModel, ABC):
    """A distribution over binary images that can be sampled.

    A model implements ``_sample``, and ``training_loss`` unless it owns its training step. Its arguments are those of
    :class:`TrainableModel`.
    """

    small: ClassVar[dict[str, Any]]
    """Constructor arguments of a tiny instance, whose images can all be enumerated: what the contract tests run on."""

    sample_chunk: ClassVar[int] = 1000
    """At most this many images are sampled at once; the samples of a seed depend on it, so it is part of the model."""

    @abstractmethod
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws (num_samples, 1, H, W) images in {0, 1}, float32; called without gradients, in chunks."""

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
        chunks = [self._sample(size, generator) for size in chunk_sizes(num_samples, self.sample_chunk)]
        return torch.cat(chunks).float() if chunks else torch.zeros((0, *self.event_shape), device=self.device)


class LossTrainedModel(GenerativeModel, ABC):
    """A model trained by descending on the gradient of one scalar: ``training_loss`` is the one hook of its step."""

    @abstractmethod
    def training_loss(self, x: Tensor) -> Tensor:
        """The scalar that training minimizes, a mean over the batch ``x`` (B, 1, H, W)."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Logs and returns the training loss."""
        loss = self.training_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss


def _not_saved(cls: type[TrainableModel]) -> list[str]:
    """Arguments of base classes that are no hyper-parameters of a class: those its own constructor lacks."""
    parameters = inspect.signature(cls).parameters
    takes_options = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {*parameters, *(TrainingOptions.__annotations__ if takes_options else ())}
    bases = [base for base in cls.__mro__ if issubclass(base, TrainableModel)]
    inherited = {name for base in bases for name in inspect.signature(base).parameters}
    return ["init_from", *sorted(inherited - own)]


def chunk_sizes(total: int, chunk: int) -> Iterator[int]:
    """Sizes of the chunks, of at most ``chunk``, that ``total`` things are done in."""
    for start in range(0, total, chunk):
        yield min(chunk, total - start)
