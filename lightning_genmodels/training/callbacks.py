"""Callbacks of every recipe: exactly resumable checkpoints, and sample grids."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchmetrics import Metric

from lightning_genmodels.base import (
    CompletionModel,
    GenerativeModel,
    RepresentationModel,
    TabularModel,
)
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.images import grid, write_png
from lightning_genmodels.errors import OptionError, WeightsError, at_least, within
from lightning_genmodels.system import atomic_file
from lightning_genmodels.weights import files

CHECKPOINTS = "checkpoints"
EXPORTED = "weights"
CONFIG = "config.yaml"
WANDB_ID = "wandb_run_id"
LOCK = ".lock"

_SHOWN = 16  # validation images in a picture
_WAIT_FOR_LOCK = 5.0  # seconds: a run that is being killed may take as long to end

PICTURES = ("samples", "reconstructions", "completions")
RUN = (CHECKPOINTS, EXPORTED, CONFIG, "logs", *PICTURES, WANDB_ID)
"""What a run writes into its folder; Weights & Biases keeps runs apart by itself."""


def best_path(root: str | Path) -> Path:
    """Where a run keeps the checkpoint with the best validation figure."""
    return Path(root) / CHECKPOINTS / "best.ckpt"


def last_path(root: str | Path) -> Path:
    """Where a run keeps the checkpoint that it can be resumed from."""
    return Path(root) / CHECKPOINTS / "last.ckpt"


def before_fall_path(root: str | Path) -> Path:
    """Where a run keeps the last checkpoint before its learning rate falls, which a longer run can go on from."""
    return Path(root) / CHECKPOINTS / "before_fall.ckpt"


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their place, and then in one step; reads those alone whose checksums hold.

    Lightning writes them into the folder for temporary files, and copies them where that is another file system: over
    the last checkpoint, which a kill or a full disk would then destroy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replaces the file by a whole one, or leaves it.

        Raises:
            FileError: The folder cannot be written, or the disk is full.
        """
        with atomic_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # PyTorch's writer of zip files hides why it could not write
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file whose checksums hold.

        Raises:
            WeightsError: It is damaged.
        """
        files.check_whole(Path(path))
        checkpoint: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return checkpoint


def newest_whole(root: Path) -> Path | None:
    """The checkpoint that a run goes on from: the last one, or the best if that is damaged; None if there is none.

    Raises:
        WeightsError: There are checkpoints, and all are damaged.
    """
    found = [path for path in (last_path(root), best_path(root)) if path.is_file()]
    reasons = []
    for path in found:
        try:
            files.check_whole(path)
        except WeightsError as error:
            reasons.append(str(error))
        else:
            return path
    if reasons:
        raise WeightsError(f"no whole checkpoint in {root}: {'; '.join(reasons)}; start anew with --overwrite true")
    return None


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Holds the folder of a run, made if need be; the system lets go of it when the process is killed.

    Raises:
        OptionError: Another process trains in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    held = FileLock(root / LOCK)
    try:
        held.acquire(timeout=_WAIT_FOR_LOCK)
    except Timeout as error:
        raise OptionError(
            f"another process trains in {root}; wait until it ends, or choose another folder with "
            "--trainer.default_root_dir"
        ) from error
    except (NotImplementedError, OSError) as error:
        rank_zero_warn(f"cannot lock {root}, so that nothing keeps a second run out of it: {error}")
    try:
        yield
    finally:
        held.release()


def claim(root: Path, *, resumes: bool, overwrite: bool) -> None:
    """Refuses to start a run in a folder that holds another one.

    Args:
        root: Folder of the run.
        resumes: It goes on from a checkpoint, or would if there were one.
        overwrite: Delete what the folder holds of another run.

    Raises:
        OptionError: The folder holds a run that is neither resumed nor to be overwritten, or both are asked for.
    """
    found = [name for name in (CHECKPOINTS, EXPORTED, CONFIG) if (root / name).exists()]
    if resumes and overwrite:
        raise OptionError("a run is resumed or overwritten, not both; leave out --overwrite or --ckpt_path")
    if resumes or not found:
        return
    if not overwrite:
        raise OptionError(
            f"{root} holds a run ({', '.join(found)}); go on with it by --ckpt_path last, choose "
            "another folder with --trainer.default_root_dir, or delete it by --overwrite true"
        )
    for path in (root / name for name in RUN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class LastEpochValidation(Callback):
    """Has the last epoch validated, however rare validations are: it often has the best figure."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Asks in every batch: a run that is resumed within the epoch does not see its start."""
        if trainer.check_val_every_n_epoch and trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt`` in the Trainer's folder: the lowest figure so far of what the model monitors."""

    state_key = "BestCheckpoint"  # which Lightning's would write anew for every hook

    def __init__(self) -> None:
        super().__init__(filename="best", mode="min", save_on_train_epoch_end=False, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks the Trainer for the folder, and the model for its figure."""
        self.dirpath = str(best_path(trainer.default_root_dir).parent)  # it goes into checkpoints
        self.monitor = getattr(pl_module, "monitor", None)
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves; a model that counts takes no optimizer steps, which Lightning would read as nothing new."""
        if isinstance(pl_module, TabularModel):
            self._last_global_step_saved = -1
        super().on_validation_end(trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the Trainer's folder, from which a run goes on as if it had not been stopped.

    It is written after every validation (or epoch, where there is none), and every ``every_n_batches`` batches; never
    between a batch and the validation that follows it, from where Lightning could not resume without skipping that
    validation. List it after every other checkpoint callback, so that it holds their state.

    A model with the schedule ``linear_fall`` also keeps ``checkpoints/before_fall.ckpt``, the last one before the fall.
    Up to there nothing depends on the length of the run: one that goes on from it with more epochs ends as if it had
    been as long from the start.

    Args:
        every_n_batches: Also save within an epoch; 0 for never.

    Attributes:
        is_due: Set it to have a checkpoint at the next batch after which one may be; it is unset once it is saved.
    """

    def __init__(self, every_n_batches: int = 0) -> None:
        at_least(0, save_every_n_batches=every_n_batches)
        self.every_n_batches = every_n_batches
        self.is_due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves within an epoch."""
        self.is_due |= self.every_n_batches > 0 and (batch_idx + 1) % self.every_n_batches == 0
        # Gradients that are being accumulated are no part of a checkpoint: it waits for the optimizer's step.
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.is_due and stepped and not trainer.is_last_batch and not _validation_follows(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation within an epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after an epoch and its validation."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.is_due = False
        model = trainer.lightning_module
        if isinstance(model, GenerativeModel) and model.is_before_fall:
            trainer.save_checkpoint(before_fall_path(trainer.default_root_dir), weights_only=False)
        trainer.save_checkpoint(last_path(trainer.default_root_dir), weights_only=False)


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    every = trainer.val_check_batch
    return trainer.enable_validation and isinstance(every, int) and (batch_idx + 1) % every == 0


class SampleGrid(Callback):
    """Draws the same random numbers into a grid of samples every few epochs: a PNG file, and an image in the logger.

    Beside it, where the model can, reconstructions of some validation images, and completions of their upper halves.

    Args:
        every_n_epochs: How often; 0 for never.
        num_samples: Images in the grid.
        seed: Seed of the samples, so that grids of different epochs can be compared.
    """

    def __init__(self, every_n_epochs: int = 10, num_samples: int = 64, seed: int = 0) -> None:
        at_least(0, every_n_epochs=every_n_epochs)
        at_least(1, num_samples=num_samples)
        self.every_n_epochs = every_n_epochs
        self.num_samples = num_samples
        self.seed = seed

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Samples from the weights that were validated (their average, where there is one)."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        due = self.every_n_epochs > 0 and (epoch % self.every_n_epochs == 0 or last)
        if not due or trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        if not isinstance(pl_module, GenerativeModel):
            return
        data = getattr(trainer, "datamodule", None)
        for name, pixels in self._pictures(pl_module, data if isinstance(data, BinarizedMNISTDataModule) else None):
            write_png(Path(trainer.default_root_dir) / name / f"epoch_{epoch:04d}.png", pixels, scale=2)
            for logger in trainer.loggers:
                log_image(logger, name, pixels, trainer.global_step)

    @torch.no_grad()
    def _pictures(
        self, model: GenerativeModel, data: BinarizedMNISTDataModule | None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Samples; below a few validation images, their reconstructions, and completions of their upper halves."""
        generator = torch.Generator().manual_seed(self.seed)
        yield "samples", grid(model.sample(self.num_samples, generator=generator))
        if data is None or data.event_shape != model.event_shape:
            return
        x = data.images("val")[data.subset("val", _SHOWN)].float().to(model.device)
        if isinstance(model, RepresentationModel):
            yield (
                "reconstructions",
                grid(torch.cat([x, model.decode(model.encode(x)).float().sigmoid()]), columns=_SHOWN),
            )
        if isinstance(model, CompletionModel):
            observed = torch.zeros(model.event_shape[1:], dtype=torch.bool, device=x.device)
            observed[: len(observed) // 2] = True
            with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that an order knows the half in part
                drawn = model.complete(x, observed, generator=generator)
            yield "completions", grid(torch.cat([x, torch.where(observed, 0.25 + 0.4 * drawn, drawn)]), columns=_SHOWN)


def log_image(logger: Logger, name: str, pixels: np.ndarray, step: int) -> None:
    """Sends an (H, W) uint8 image to a logger that shows images; others have none."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, pixels, step, dataformats="HW")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [pixels], step=step)  # uint8: a float image would be saved black


class CompileNetworks(Callback):
    """Compiles the networks of a model in place when training starts, which keeps the names of their weights.

    The model itself is left alone: its steps log, which does not compile.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Marks every network for compilation, which happens when it is first called."""
        for child in pl_module.children():
            if not isinstance(child, Metric):
                child.compile()


class MovingAverage(WeightAveraging):
    """Averages the weights after every step, exponentially; the average is validated, and is what a checkpoint holds.

    Buffers are copied and not averaged: averaging would corrupt integer buffers such as pixel orders. Lightning's own
    callback asks the accelerator twice in a step how many weights were averaged, and collects the weights anew.

    Args:
        decay: Of the average, in [0, 1).
    """

    state_key = WeightAveraging.__qualname__  # under which checkpoints have it

    def __init__(self, decay: float) -> None:
        within(0.0, 1.0, ema=decay)
        self._average = get_ema_multi_avg_fn(decay)
        self._weights: tuple[list[Tensor], list[Tensor]] | None = None
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies the model."""
        super().setup(trainer, pl_module, stage)
        self._weights = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages after an optimizer's step; the first average is a copy."""
        if self._latest_update_step == 0 or self._average_model is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step > self._latest_update_step:
            if self._weights is None:
                self._weights = list(self._average_model.parameters()), list(pl_module.parameters())
            self._average(*self._weights, self._average_model.n_averaged)
            self._average_model.n_averaged += 1
            self._latest_update_step = trainer.global_step
