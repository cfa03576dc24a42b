"""Tracking runs in Weights & Biases, and metrics that every logger gets besides losses."""

from __future__ import annotations

import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_genmodels.data import Batch, BinarizedMNISTDataModule
from lightning_genmodels.system import write_atomically
from lightning_genmodels.training.callbacks import EXPORTED, WANDB_ID, BestCheckpoint, last_path
from lightning_genmodels.weights.loading import export


def wandb_logger(project: str, root: Path, tags: list[str], monitor: str) -> WandbLogger:
    """A logger for Weights & Biases that falls back to offline mode without a network.

    Without a key, or without a connection to the server, it tracks offline and warns; ``wandb sync`` uploads such a run
    later. The run is named after its folder, and a run that is resumed from that folder goes on in the same place.

    Args:
        project: Name of the project.
        root: Folder of the run.
        tags: Tags of the run.
        monitor: The validation figure; the run's summary holds its lowest value.
    """
    reason = _why_offline()
    if reason is not None:
        warnings.warn(
            f"Weights & Biases tracks this run offline: {reason}. "
            f"Upload it later with: wandb sync {root}/wandb/offline-*",
            stacklevel=2,
        )
    logger = WandbLogger(
        name=root.name,
        project=project,
        save_dir=str(root),
        id=_run_id(root),
        tags=tags,
        offline=reason is not None,
        mode="online" if reason is None else "offline",
    )
    _define_summary(logger, monitor)
    return logger


@rank_zero_only
def _define_summary(logger: WandbLogger, monitor: str) -> None:
    logger.experiment.define_metric(monitor, summary="min,last")


def _run_id(root: Path) -> str | None:
    """The id of the run that has this folder, made by the first process when it is first tracked."""
    file = root / WANDB_ID
    _write_run_id(file)
    return file.read_text(encoding="utf-8") if file.is_file() else None


@rank_zero_only
def _write_run_id(file: Path) -> None:
    if not file.is_file():
        write_atomically(file, os.urandom(5).hex().encode())


def _why_offline() -> str | None:
    """Why a run cannot be sent to the server now, or None if it can."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE is {mode}"
    if not wandb.api.api_key:
        return "there is no API key; run `wandb login`, or set WANDB_API_KEY"
    address = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3.0).close()
    except OSError as error:
        return f"{address.hostname} does not answer ({error})"
    return None


class TrainingMonitor(Callback):
    """Logs the norm of the gradient before clipping, and images per second over all processes.

    Args:
        every_n_steps: How often; as often as the trainer logs.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._since = time.monotonic()
        self._images = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since, self._images = time.monotonic(), 0

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Logs ``train/grad_norm``."""
        if (trainer.global_step + 1) % self.every_n_steps == 0:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Logs ``train/images_per_second``."""
        self._images += len(batch if isinstance(batch, Tensor) else batch[0]) * trainer.world_size
        if (batch_idx + 1) % self.every_n_steps == 0:
            now = time.monotonic()
            pl_module.log("train/images_per_second", self._images / (now - self._since))
            self._since, self._images = now, 0


class EpochLines(Callback):
    """Prints a line after every epoch: the training loss, the figures of a validation, and the time."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since, self._validated = time.monotonic(), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there are new figures."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints, on the first process, to standard error."""
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name == "train/loss" or (self._validated and name.startswith("val/") and not name.endswith("_stderr"))
        }
        parts = [f"{name} {figures[name]:.3f}" for name in sorted(figures)]
        parts.append(f"{time.monotonic() - self._since:.1f} s")
        of = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        rank_zero_info(f"epoch {trainer.current_epoch + 1}{of}: {', '.join(parts)}")


class ExportBest(Callback):
    """When training ends, exports the best checkpoint to ``weights/``, and sends it to Weights & Biases as an artifact.

    A run that validated nothing exports its last checkpoint.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only the first process writes."""
        found = [callback.best_model_path for callback in trainer.callbacks if isinstance(callback, BestCheckpoint)]  # type: ignore[attr-defined]
        root = Path(trainer.default_root_dir)
        best = Path(found[0]) if found and found[0] else last_path(root)
        if not trainer.is_global_zero or not best.is_file():
            return
        folder = root / EXPORTED
        data = getattr(trainer, "datamodule", None)
        export(best, folder, data if isinstance(data, BinarizedMNISTDataModule) else None)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                artifact = wandb.Artifact(f"{root.name}-weights", type="model")
                artifact.add_dir(str(folder))
                logger.experiment.log_artifact(artifact)
