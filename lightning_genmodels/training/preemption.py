"""Leaving a run when the cluster asks for it, such that the next start goes on with the very next batch."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_genmodels.training import signals
from lightning_genmodels.training.callbacks import LastCheckpoint, last_path

_AGREE_EVERY = 10  # optimizer steps: to agree, processes wait for one another, and for the accelerator


class Preempted(SystemExit):
    """A run that left because a signal asked for it; ``code`` is its exit status."""


class Preemption(Callback):
    """Saves and leaves on SIGUSR1, with status 75 ("try again"), and on SIGTERM, with status 143.

    A handler only notes the signal. At the end of a batch all processes agree on whether one of them got any; the last
    checkpoint is then saved as soon as it may be: after the optimizer's step of an accumulation window, and after a
    validation that is due. Before the next batch they leave. A run that ends meanwhile ends as usual. Lightning's own
    handlers, which communicate from within a signal handler and can hang there, are replaced.

    Args:
        last: What saves the checkpoint that the next start goes on from; None where nothing is saved.
    """

    def __init__(self, last: LastCheckpoint | None) -> None:
        self.last = last
        self._status = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Holds signals back while Lightning registers handlers."""
        self._status = 0
        signals.hold(True)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens."""
        signals.listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens, and leaves at once if a signal came during the start."""
        signals.listen()
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _nothing  # Lightning's: processes wait for one another at every batch
        self._agree(trainer)
        self._leave(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves once everything is saved."""
        self._leave(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leaves once everything is saved."""
        self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agrees on whether to leave, and asks for the checkpoint; those that save are called afterwards."""
        steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if trainer.world_size == 1 or trainer.is_last_batch or (rest == 0 and steps % _AGREE_EVERY == 0):
            self._agree(trainer)
            if self._status and self.last is not None:
                self.last.is_due = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets signals through."""
        signals.hold(False)

    def _agree(self, trainer: Trainer) -> None:
        if self._status == 0:
            status = torch.tensor(signals.received(), device=trainer.strategy.root_device)
            self._status = int(trainer.strategy.reduce(status, reduce_op="max"))

    def _leave(self, trainer: Trainer) -> None:
        if self._status == 0 or (self.last is not None and self.last.is_due):
            return
        name = next(name for name, status in signals.STATUS.items() if status == self._status)
        path = last_path(trainer.default_root_dir)
        kept = f"go on from {path} with --ckpt_path auto" if path.is_file() else "there is no checkpoint yet"
        rank_zero_info(f"{name}: leaving at epoch {trainer.current_epoch}, step {trainer.global_step}; {kept}")
        environment: Any = getattr(trainer.strategy, "cluster_environment", None)
        # Lightning kills a process whose children failed: of those that it started, the first speaks for all.
        is_child = environment is not None and not environment.creates_processes_externally and trainer.local_rank > 0
        raise Preempted(0 if is_child else self._status)


def _nothing() -> None:
    pass
