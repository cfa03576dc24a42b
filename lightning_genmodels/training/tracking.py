"""Tracking runs in Weights & Biases, and metrics that every logger gets besides losses."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_genmodels.data import Batch, BinarizedMNISTDataModule
from lightning_genmodels.system import write_atomically
from lightning_genmodels.training.callbacks import EXPORTED, WANDB_ID, BestCheckpoint, last_path
from lightning_genmodels.weights.loading import export
from lightning_genmodels.weights.lookup import WEIGHTS, resolve


@dataclass(frozen=True)
class WandbOptions:
    """Where and how a run is tracked in Weights & Biases.

    Args:
        project: Name of the project; default: not tracked, but for an agent of a sweep.
        entity: User or team that owns the project; default: that of the key.
        name: Of the run; default: that of its folder.
        group: Runs that belong together, such as the seeds of one recipe.
        job_type: Kind of run within a group.
        tags: Beside those of the model and of the binarization.
    """

    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)


def trial_folder(root: Path) -> Path:
    """The folder of a run: one below ``root`` for each trial of a sweep, which an agent started; else ``root``."""
    return root / os.environ["WANDB_RUN_ID"] if "WANDB_SWEEP_ID" in os.environ else root


def wandb_logger(options: WandbOptions, root: Path, tags: list[str], monitor: str) -> WandbLogger | None:
    """A logger for Weights & Biases that falls back to offline mode without a network.

    Without a key, or without a connection to the server, it tracks offline and warns; ``wandb sync`` uploads such a run
    later. A run that is resumed from its folder goes on in the same run.

    Args:
        options: Project, name, and others.
        root: Folder of the run.
        tags: Tags of the run, beside those of the options.
        monitor: The validation figure; the run's summary holds its lowest value.

    Returns:
        The logger, or None if there is no project, or ``WANDB_MODE`` is ``disabled``.
    """
    project = options.project or (os.environ.get("WANDB_PROJECT") if "WANDB_SWEEP_ID" in os.environ else None)
    if project is None or os.environ.get("WANDB_MODE") == "disabled":
        return None
    reason = _why_offline()
    if reason is not None:
        warnings.warn(
            f"Weights & Biases tracks this run offline: {reason}. "
            f"Upload it later with: wandb sync {root}/wandb/offline-*",
            stacklevel=2,
        )
    logger = WandbLogger(
        name=options.name or root.name,
        project=project,
        entity=options.entity,
        group=options.group,
        job_type=options.job_type,
        save_dir=str(root),
        id=_run_id(root),
        tags=[*tags, *options.tags],
        offline=reason is not None,
        mode="online" if reason is None else "offline",
    )
    logger._wandb_init.pop("anonymous", None)  # of which the client warns
    _define_summary(logger, monitor)
    return logger


@rank_zero_only
def _define_summary(logger: WandbLogger, monitor: str) -> None:
    """The lowest value; a definition of its own replaces that of all metrics, and so names their step again."""
    logger.experiment.define_metric(monitor, step_metric="trainer/global_step", step_sync=True, summary="min,last")


def provenance(version: str) -> dict[str, Any]:
    """What a run was made by: versions (``version`` is this package's), commit of a checkout, host, and Slurm job."""
    found: dict[str, Any] = {
        "lightning_genmodels": version,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
    }
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
        with suppress(OSError):
            found["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if "SLURM_JOB_ID" in os.environ:
        found["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return found


def without_paths(config: Any) -> Any:
    """A configuration without absolute paths, which say nothing on another machine."""
    if isinstance(config, dict):
        return {key: without_paths(value) for key, value in config.items() if not _is_absolute(value)}
    if isinstance(config, list):
        return [without_paths(value) for value in config if not _is_absolute(value)]
    return config


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _run_id(root: Path) -> str | None:
    """The id of the run that has this folder, made by the first process when it is first tracked."""
    if "WANDB_SWEEP_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]  # the agent's
    file = root / WANDB_ID
    _write_run_id(file)
    return file.read_text(encoding="utf-8") if file.is_file() else None


@rank_zero_only
def _write_run_id(file: Path) -> None:
    if not file.is_file():
        write_atomically(file, os.urandom(5).hex().encode())


def _why_offline() -> str | None:
    """Why a run cannot be sent to the server now, or None if it can."""
    import requests  # as the client does
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun"):
        return f"WANDB_MODE is {mode}"
    if not wandb.login(prompt=False, verify=False):
        return "there is no API key; run `wandb login`, or set WANDB_API_KEY"
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        requests.head(address, timeout=5.0)  # through a proxy, if there is one; whatever it answers
    except requests.RequestException as error:
        return f"{urlsplit(address).hostname} does not answer ({type(error).__name__})"
    return None


class TrainingMonitor(Callback):
    """Logs the norm of the gradient before clipping, images per second over all processes, and CPU time.

    Args:
        every_n_steps: How often; as often as the trainer logs.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._since = time.monotonic()
        self._images = 0
        self._cpu_start = time.process_time()  # less what the run took before it was resumed

    def state_dict(self) -> dict[str, Any]:
        """CPU time of the run so far."""
        return {"cpu_seconds": time.process_time() - self._cpu_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._cpu_start = time.process_time() - state_dict["cpu_seconds"]

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
        """Logs ``train/images_per_second`` and ``train/cpu_minutes``, that of this process since the run began."""
        self._images += len(batch if isinstance(batch, Tensor) else batch[0]) * trainer.world_size
        if (batch_idx + 1) % self.every_n_steps == 0:
            now = time.monotonic()
            pl_module.log("train/images_per_second", self._images / (now - self._since))
            pl_module.log("train/cpu_minutes", (time.process_time() - self._cpu_start) / 60)
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


class Lineage(Callback):
    """Notes in Weights & Biases which weights a run was started from: in its configuration, and online as an artifact
    that the run uses.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Only the first process notes."""
        start = getattr(pl_module, "init_from", None)
        if start is None or not trainer.is_global_zero:
            return
        folder, name = resolve(start).path, Path(start).name
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() if folder.is_dir() else None
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.experiment.config.update(
                    {"started_from": {"name": name, "sha256": sha256}}, allow_val_change=True
                )
                if not logger.experiment.offline:  # whose client takes no artifacts that a run uses
                    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="model", metadata={"sha256": sha256})
                    add = artifact.add_dir if folder.is_dir() else artifact.add_file
                    add(str(folder))
                    logger.experiment.use_artifact(artifact)


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

                figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name}
                metadata = {"model": type(pl_module).__name__, "checkpoint": best.name, "last": figures}
                artifact = wandb.Artifact(f"{root.name}-weights", type="model", metadata=metadata)
                artifact.add_dir(str(folder))
                logger.experiment.log_artifact(artifact, aliases=["best"])
