"""The base class of all models: training, saving, loading and sampling."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, final

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_genmodels.base.metrics import Estimate
from lightning_genmodels.data import BinarizedMNISTDataModule, InMemoryLoader
from lightning_genmodels.errors import DivergenceError, ImageError, OptionError, at_least, check_arguments, within
from lightning_genmodels.functional import check_images
from lightning_genmodels.random import check_generator, derive_seed, process_share, seed_default_generators
from lightning_genmodels.system import leave_group_at_exit
from lightning_genmodels.training.optimizers import (
    Muon,
    OptimizerName,
    Schedule,
    matrix_shape,
    schedule_factor,
    weight_matrices,
)
from lightning_genmodels.weights import files

EventShape = tuple[int, int, int]

_BASE_SEED = "base_seed"
_LOOK_EVERY = 50  # batches, after which a run asks the accelerator whether the loss was finite
_NEVER = 2**31 - 1  # no step
_STATE_OF_A_STEP = frozenset({"_current_fx_name", "_diverged_at"})  # the first is Lightning's


class TrainingOptions(TypedDict, total=False):
    """Options that every model trained by gradients takes; see :class:`GenerativeModel`."""

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    optimizer: OptimizerName
    muon_learning_rate: float
    schedule: Schedule
    fall: float
    init_from: str | None


class GenerativeModel(LightningModule, ABC):
    """A distribution over binary images that can be sampled; trained by a recipe, saved and loaded by name.

    A model implements ``_sample`` and ``training_step``, for which most kinds need ``training_loss`` alone.

    Args:
        event_shape: (1, H, W) of one image.
        learning_rate: Peak learning rate of AdamW (Loshchilov and Hutter 2019).
        weight_decay: Decoupled weight decay of weight matrices (not of biases, scales and embeddings).
        betas: AdamW's two decay rates.
        warmup_steps: Steps over which the learning rate rises linearly.
        optimizer: ``adamw`` for all parameters, or ``muon`` for the weight matrices of hidden layers and AdamW for the
            rest; see :class:`lightning_genmodels.training.optimizers.Muon`.
        muon_learning_rate: Muon's peak learning rate.
        schedule: After the warm-up, ``cosine`` falls to zero over the whole run; ``linear_fall`` is constant, and then
            falls to zero. A run with the latter keeps a checkpoint from before the fall, to be prolonged from there.
        fall: Fraction of the run over which ``linear_fall`` falls.
        init_from: Exported weights to start training from (a folder, a weight's name, or a repository on the Hub).
            They are loaded when fitting starts; the option is not saved with the model.

    Raises:
        OptionError: ``event_shape`` is not (1, H, W), an unknown optimizer or schedule, or ``fall`` outside of (0, 1].
    """

    monitor: ClassVar[str]
    """The validation figure by which the best checkpoint is chosen; lower is better."""

    small: ClassVar[dict[str, Any]]
    """Constructor arguments of a tiny instance, whose images can all be enumerated: what the contract tests run on."""

    sample_chunk: ClassVar[int] = 1000
    """At most this many images are sampled at once; the samples of a seed depend on it, so it is part of the model."""

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
        optimizer: OptimizerName = "adamw",
        muon_learning_rate: float = 0.02,
        schedule: Schedule = "cosine",
        fall: float = 0.6,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=_not_saved(type(self)), logger=False)
        kinds = [cls for cls in type(self).__mro__ if issubclass(cls, GenerativeModel)]
        check_arguments(self.hparams, *(cls.__init__ for cls in kinds))
        if not 0.0 < fall <= 1.0:
            raise OptionError(f"expected fall in (0, 1], got {fall}")
        shape = tuple(event_shape)
        if len(shape) != 3 or shape[0] != 1 or min(shape) < 1:
            raise OptionError(f"expected event_shape (1, H, W), got {shape}")
        at_least(0.0, learning_rate=learning_rate, weight_decay=weight_decay, muon_learning_rate=muon_learning_rate)
        at_least(0, warmup_steps=warmup_steps)
        within(0.0, 1.0, betas=betas)
        self.event_shape: EventShape = (shape[0], shape[1], shape[2])
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.optimizer = optimizer
        self.muon_learning_rate = muon_learning_rate
        self.schedule: Schedule = schedule
        self.fall = fall
        self.init_from = init_from
        # No part of the weights: whether fitting may still set parameters, and what a run knows of itself.
        self._is_initialized = False
        self._base_seed = 0
        self._checked_stage: Any = None
        self._diverged_at: Tensor | None = None
        self._num_evaluated = 0
        self._state_before: Tensor | None = None
        self._device_state_before: Tensor | None = None

    # What a model implements.

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Learns from a batch: images (B, 1, H, W), or (images, labels) where the data module is asked for labels."""

    @abstractmethod
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """Draws (num_samples, 1, H, W) images in {0, 1}, float32; called without gradients, in chunks."""

    def _initialize(self, images: Tensor) -> None:
        """Sets parameters from all training images, (N, 1, H, W) uint8; default: none. Called without gradients."""

    def finalize(self, images: Tensor) -> None:
        """Sets buffers from all training images, (N, 1, H, W) uint8, when weights are exported; default: none."""

    def edges(self) -> Sequence[nn.Module]:
        """Layers that read pixels or codes, or write logits: Muon leaves them to AdamW. Default: none."""
        return ()

    # Using a model.

    @final
    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Sets parameters from all training images: the mean image, say, from which training starts.

        Fitting does it, once in a model's life: never for a model that was loaded or trained.

        Args:
            images: (N, 1, H, W) in {0, 1}, of any type.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        self._initialize(check_images(images, self.event_shape))
        self._is_initialized = True

    @final
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads parameters and buffers, as every PyTorch module does; afterwards the model counts as initialized."""
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._is_initialized = True
        return keys

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
            OptionError: ``num_samples`` is negative, or ``generator`` is of another type.
        """
        at_least(0, num_samples=num_samples)
        check_generator(generator)
        chunks = [self._sample(size, generator) for size in chunk_sizes(num_samples, self.sample_chunk)]
        return torch.cat(chunks).float() if chunks else torch.zeros((0, *self.event_shape), device=self.device)

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
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
        files.write(self, Path(folder), half=half)

    @classmethod
    @final
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
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
        return files.read(name, cls, revision=revision)

    @final
    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the weights to a repository on the Hugging Face Hub, made if need be; returns its address."""
        return files.push(self, repo_id, private=private, token=token)

    # Training: final steps and the default optimizer.

    @final
    def setup(self, stage: str) -> None:
        """Before fitting, draws the seed of the run's noise, and loads ``init_from`` or looks at the data.

        A checkpoint is restored afterwards.
        """
        leave_group_at_exit()
        with torch.inference_mode(False):  # a validation before leaves states that could not be updated
            for module in self.modules():
                if isinstance(module, Metric):
                    module.reset()
        if stage != "fit":
            return
        self._start_noise()
        self._diverged_at = None
        if self._starts_anew and self.init_from is not None:
            files.load_into(self, self.init_from)
        data = getattr(self.trainer, "datamodule", None)
        if self._starts_anew and isinstance(data, BinarizedMNISTDataModule):
            self.initialize(data.images("train"))

    @final
    def on_train_start(self) -> None:
        """Looks at the batches of a user's own loader, where ``setup`` found no data module of this package.

        Raises:
            OptionError: The loader never ends.
            ImageError: Batches that are no binary images.
        """
        looks = type(self)._initialize is not GenerativeModel._initialize
        data = getattr(self.trainer, "datamodule", None)
        if self._starts_anew and looks and not isinstance(data, BinarizedMNISTDataModule):
            self.initialize(self._all_training_images().to(self.device))
        self._is_initialized = True

    def _all_training_images(self) -> Tensor:
        """One pass through the loader, in every process; (N, 1, H, W) uint8 on the CPU."""
        if not math.isfinite(self.trainer.num_training_batches):
            raise OptionError(
                f"a {type(self).__name__} is initialized from all training images, but this loader is endless; call "
                "model.initialize(images) with some of them before fitting"
            )
        loader: Any = self.trainer.train_dataloader
        with torch.random.fork_rng([]):  # the training that follows shuffles as it would without the look
            images = torch.cat([self._images(batch).cpu().to(torch.uint8) for batch in loader])
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, images)
            images = torch.cat(parts)
        return images

    @final
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Seeds the noise of the step by (base seed, epoch, step, process), so that a resumed run repeats it."""
        seed = derive_seed("step", self._base_seed, self.current_epoch, batch_idx, self.global_rank)
        seed_default_generators(seed, self.device)

    @final
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops a run that diverged."""
        if (batch_idx + 1) % _LOOK_EVERY == 0:
            self._stop_if_diverged()

    @final
    def on_train_epoch_end(self) -> None:
        """Stops a run that diverged."""
        self._stop_if_diverged()

    @final
    def on_fit_end(self) -> None:
        """Restores the global random state to what it was after the run's single draw."""
        if self._state_before is not None:
            torch.set_rng_state(self._state_before)
        if self._device_state_before is not None:
            torch.cuda.set_rng_state(self._device_state_before, self.device)

    def configure_optimizers(self) -> Any:
        """AdamW, or Muon beside it, with the learning-rate schedule of the model's options."""
        return self._optimization_of(self)

    @final
    def _optimization_of(self, network: nn.Module, every: int = 1) -> dict[str, Any]:
        """Optimizer and learning-rate schedule of the trained parameters of a network, as Lightning takes them.

        Args:
            network: The model, or one of its networks.
            every: The run's steps between two of this optimizer.

        Raises:
            OptionError: ``muon`` for a network without hidden weight matrices.
        """
        matrices = {p: module for _, module, p in weight_matrices(network) if p.requires_grad}
        edges = set(self.edges())
        hidden = [p for p, module in matrices.items() if self.optimizer == "muon" and module not in edges]
        if self.optimizer == "muon" and not hidden:
            raise OptionError(
                f"a {type(self).__name__} of these sizes has no weight matrices of hidden layers, which Muon is for; "
                "choose --model.optimizer adamw"
            )
        rest = [p for p in network.parameters() if p.requires_grad and p not in set(hidden)]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p in matrices], "weight_decay": self.weight_decay},
            {"params": [p for p in rest if p not in matrices], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        betas = (self.betas[0], self.betas[1])
        optimizer: torch.optim.Optimizer
        if hidden:
            shapes = [matrix_shape(matrices[p], p) for p in hidden]
            groups.append({"params": hidden, "shapes": shapes, "muon": True, "lr": self.muon_learning_rate})
            optimizer = Muon(groups, lr=self.learning_rate, betas=betas, weight_decay=self.weight_decay)
        else:
            # Lightning refuses to clip the gradients of a fused optimizer in mixed precision, scaled losses or not.
            clips_mixed = self.trainer.precision == "bf16-mixed" and bool(self.trainer.gradient_clip_val)
            fused = self.trainer.precision != "16-mixed" and not clips_mixed
            optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=betas, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._learning_rate_factor(step * every))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @final
    def _learning_rate_factor(self, step: int) -> float:
        """The learning rate as a fraction of its peak."""
        # Asking Lightning for the total before the first step would load the data, and the state of the loader in a
        # checkpoint, which is restored later, would be lost.
        total = self.trainer.estimated_stepping_batches if step else math.inf
        return schedule_factor(self.schedule, step, warmup_steps=self.warmup_steps, total_steps=total, fall=self.fall)

    @property
    def is_before_fall(self) -> bool:
        """Whether the schedule is ``linear_fall``, and no step so far depended on the length of the run."""
        if self.schedule != "linear_fall":
            return False
        total = self.trainer.estimated_stepping_batches
        return self.global_step <= total - self.fall * total

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what changes many times a step without asking whether it is a parameter, a module or a buffer."""
        if name in _STATE_OF_A_STEP:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which model the checkpoint holds, so that it can be loaded without naming the class, and its seed."""
        self._stop_if_diverged()
        files.describe(self, checkpoint)
        checkpoint[_BASE_SEED] = self._base_seed

    @final
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the noise of the run that the checkpoint is of."""
        self._base_seed = checkpoint.get(_BASE_SEED, self._base_seed)

    # Helpers of both classes.

    @property
    def _number_type(self) -> torch.dtype:
        """The type of the parameters, which is float32 in mixed precision, too."""
        return next(self.parameters()).dtype

    @property
    def _starts_anew(self) -> bool:
        """Whether fitting starts from ``init_from`` or from a look at the data."""
        return not self._is_initialized

    @final
    def _start_noise(self) -> None:
        """Draws the base seed of the run's noise from the user's generator: one number, the first process's."""
        drawn = int(torch.randint(2**62, ()))
        self._base_seed = int(self.trainer.strategy.broadcast(drawn))
        self._state_before = torch.get_rng_state()
        on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._device_state_before = torch.cuda.get_rng_state() if on_cuda else None

    @final
    def _taken(self, batch: Any) -> Tensor:
        """The images of a batch, as floating-point numbers; the pixels of the first batch of every stage are checked.

        Raises:
            ImageError: It has none, or they are not binary.
        """
        stage = self.trainer.state.stage
        is_first = stage != self._checked_stage
        images = self._images(batch, values=is_first)
        if is_first:
            self._checked_stage = stage
        return images if images.is_floating_point() else images.float()

    @final
    def _images(self, batch: Any, values: bool = True) -> Tensor:
        """The images of a batch (images, ...) or of a batch that is nothing else, checked.

        Raises:
            ImageError: It has none.
        """
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise ImageError(
                f"expected a batch of images (batch, {', '.join(map(str, self.event_shape))}), or a list or tuple "
                f"whose first item they are, got {type(batch).__name__}; give the Trainer such a loader"
            )
        check_images(images, self.event_shape, values=values)
        return images

    @final
    def on_validation_epoch_start(self) -> None:
        """Starts counting images."""
        self._num_evaluated = 0

    @final
    def on_test_epoch_start(self) -> None:
        """Starts counting images."""
        self._num_evaluated = 0

    @final
    def _indices(self, batch: Tensor) -> range:
        """Data-set indices of an evaluated batch: this process has every ``world_size``-th image, in order."""
        start, self._num_evaluated = self._num_evaluated, self._num_evaluated + len(batch)
        return process_share(start, len(batch), self.trainer.global_rank, self.trainer.world_size)

    @final
    def _watch(self, loss: Tensor) -> None:
        """Notes the step at which a loss is no longer finite, without waiting for the accelerator."""
        step = torch.where(torch.isfinite(loss.detach()), _NEVER, self.global_step)
        self._diverged_at = step if self._diverged_at is None else torch.minimum(self._diverged_at, step)

    @final
    def _logged(self, loss: Tensor) -> Tensor:
        """The loss of a training step, watched, weighted by the share of this process, and logged."""
        self._watch(loss)
        loss = self._weighted(loss)
        if self._logs_step:
            self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    @final
    def _weighted(self, values: Tensor) -> Tensor:
        """What is to be averaged over the processes: a mean over this process's share of a global batch, weighted."""
        if self.trainer.world_size == 1 or not isinstance(self.trainer.train_dataloader, InMemoryLoader):
            return values
        return values * self.trainer.train_dataloader.weight

    @property
    def _logs_step(self) -> bool:
        """Whether loggers take what is logged in this step; in others it would cost time, and be thrown away."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every > 0 and (self.global_step + 1) % every == 0
        return is_due or self.trainer.fit_loop.batch_idx == 0  # what a progress bar shows from then on

    @final
    def _stop_if_diverged(self) -> None:
        """Raises on all processes if the loss of any was not finite.

        Raises:
            DivergenceError: Names the step.
        """
        if self._diverged_at is None or self._trainer is None or not self.trainer.training:
            return
        step: Tensor = self.trainer.strategy.reduce(-self._diverged_at, reduce_op="max")
        if -int(step) < _NEVER:
            raise DivergenceError(
                f"the loss is not finite at step {-int(step)}: training diverged, and nothing is exported; try a lower "
                f"--model.learning_rate (it is {self.learning_rate:g}), --model.warmup_steps 500, or "
                "--trainer.gradient_clip_val 1, and start anew, or from the last good checkpoint by --model.init_from"
            )

    @final
    def _checked(self, x: Tensor) -> Tensor:
        """Images, checked and brought to the model's device and type.

        Values are not looked at while a trainer runs: there they come from the data module, and a look costs a wait for
        the accelerator in every step.
        """
        running = self._trainer is not None and self._trainer.state.stage is not None
        return check_images(x, self.event_shape, values=not running).to(next(self.parameters()))

    @final
    def _log_estimate(self, name: str, estimate: Estimate) -> None:
        """Logs a figure that is already reduced over the processes.

        Raises:
            DivergenceError: It is not finite.
        """
        if not bool(torch.isfinite(estimate.value)):
            raise DivergenceError(
                f"{name} is {float(estimate.value)} after step {self.global_step}: the weights are not finite, or make "
                "figures that are not; try a lower --model.learning_rate, --model.warmup_steps 500, or "
                "--trainer.gradient_clip_val 1"
            )
        self.log(name, estimate.value.float(), prog_bar=True, rank_zero_only=False)
        self.log(f"{name}_stderr", estimate.standard_error.float())


def _not_saved(cls: type[GenerativeModel]) -> list[str]:
    """Arguments of base classes that are no hyper-parameters of a class: those its own constructor lacks."""
    parameters = inspect.signature(cls).parameters
    takes_options = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {*parameters, *(TrainingOptions.__annotations__ if takes_options else ())}
    bases = [base for base in cls.__mro__ if issubclass(base, GenerativeModel)]
    inherited = {name for base in bases for name in inspect.signature(base).parameters}
    return ["init_from", *sorted(inherited - own)]


def chunk_sizes(total: int, chunk: int) -> Iterator[int]:
    """Sizes of the chunks, of at most ``chunk``, that ``total`` things are done in."""
    for start in range(0, total, chunk):
        yield min(chunk, total - start)
