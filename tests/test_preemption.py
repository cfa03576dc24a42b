"""A run that is asked to leave saves, leaves, and goes on with the very next batch, whenever it is asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from lightning_genmodels.cli import main
from lightning_genmodels.training.callbacks import last_path

OPTIONS = [
    *("fit", "--model=vae", "--model.hidden_sizes=[20]", "--model.latent_dim=4", "--model.warmup_steps=5"),
    *("--data.source=digits", "--data.image_size=8", "--data.binarization=dynamic", "--data.batch_size=100"),
    *("--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--samples.every_n_epochs=0", "--ema=0.9", "--ckpt_path=auto"),
]
NEVER = 10**9


class Signal(Callback):
    """Sends a signal to its own process when a hook is called for the n-th time."""

    def __init__(self, hook: str, count: int, number: int = signal.SIGUSR1, rank: int = 0) -> None:
        self.count = count
        self.number = number
        self.rank = rank
        setattr(self, hook, self._called)

    def _called(self, trainer: Any, *args: Any, **options: Any) -> None:
        self.count -= 1
        if self.count == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def asked(hook: str, count: int, number: int = signal.SIGUSR1, rank: int = 0) -> str:
    options = f'{{"hook": "{hook}", "count": {count}, "number": {int(number)}, "rank": {rank}}}'
    return f'--trainer.callbacks+={{"class_path": "test_preemption.Signal", "init_args": {options}}}'


def _train(root: str, extra: list[str]) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        os.dup2(null.fileno(), 1)
    main([*OPTIONS, f"--trainer.default_root_dir={root}", *extra])


def train(root: Path, *extra: str) -> int | None:
    """Trains in a process of its own, forked so that nothing is imported again; returns its status."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(str(root), list(extra)))
    process.start()
    process.join(200)
    return process.exitcode


def assert_same(one: Path, other: Path) -> None:
    checkpoints = [torch.load(last_path(root), weights_only=True) for root in (one, other)]
    for key in ("state_dict", "current_model_state"):
        for name, value in checkpoints[0][key].items():
            assert torch.equal(value, checkpoints[1][key][name]), name
    assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"]
    states = [c["optimizer_states"][0]["state"] for c in checkpoints]
    assert all(torch.equal(states[0][i][k], states[1][i][k]) for i in states[0] for k in states[0][i])


ACCUMULATED = ("--trainer.accumulate_grad_batches=5",)
VALIDATED = ("--trainer.val_check_interval=4",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    runs = {}
    for extra in ((), ACCUMULATED, VALIDATED):
        runs[extra] = tmp_path_factory.mktemp("whole")
        assert train(runs[extra], *extra) == 0
    return runs


@pytest.mark.parametrize(
    ("hook", "count", "extra", "step"),
    [
        ("setup", 1, (), None),
        ("on_fit_start", 1, (), None),  # here to on_train_start: signals wait while Lightning registers handlers
        ("on_sanity_check_start", 1, (), None),
        ("on_validation_start", 1, (), None),  # the sanity check's
        ("on_train_start", 1, (), None),
        ("on_train_batch_start", 1, (), 1),
        ("on_before_optimizer_step", 7, (), 7),
        ("on_train_batch_start", 12, (), 12),  # the last batch of an epoch
        ("on_validation_start", 2, (), 13),  # the signal is seen at the end of the next batch
        ("on_train_epoch_end", 2, (), 25),
        ("on_train_batch_start", 7, ACCUMULATED, 2),  # within a window of 5 batches
        ("on_train_batch_start", 11, ACCUMULATED, 3),  # within the shorter window that ends an epoch
        ("on_validation_start", 2, VALIDATED, 5),
        ("on_train_batch_start", 8, VALIDATED, 8),  # a validation is due
    ],
)
def test_it_goes_on_with_the_next_batch(
    whole: dict[tuple[str, ...], Path], tmp_path: Path, hook: str, count: int, extra: tuple[str, ...], step: int | None
) -> None:
    assert train(tmp_path, *extra, asked(hook, count)) == 75
    if step is None:
        assert not last_path(tmp_path).exists()
    else:
        assert torch.load(last_path(tmp_path), weights_only=True)["global_step"] == step
    assert train(tmp_path, *extra) == 0
    assert_same(whole[extra], tmp_path)


def test_sigterm_saves_and_is_no_reason_to_start_again(whole: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    signals = [asked("on_train_batch_start", 20, number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    assert train(tmp_path, *signals) == 143  # which counts more
    assert torch.load(last_path(tmp_path), weights_only=True)["global_step"] == 20
    assert train(tmp_path) == 0
    assert_same(whole[()], tmp_path)


def test_a_run_that_is_asked_in_its_last_batch_ends(whole: dict[tuple[str, ...], Path], tmp_path: Path) -> None:
    assert train(tmp_path, asked("on_train_batch_start", 36)) == 0
    assert_same(whole[()], tmp_path)
    assert (tmp_path / "weights" / "model.safetensors").is_file()


def test_signals_do_what_they_did_before_once_a_run_is_over(run_folder: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    main([*OPTIONS, "--trainer.default_root_dir=run", "--trainer.fast_dev_run=true", "--ckpt_path=null"])
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGUSR1, signal.SIGTERM}


@pytest.mark.cluster
def test_one_of_two_processes_is_asked_and_both_leave(run_folder: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def genmodels(root: str, *extra: str) -> int:
        command = [
            sys.executable,
            str(Path(__file__).parent.parent / "recipes" / "train.py"),
            *OPTIONS,
            "--trainer.devices=2",
        ]
        command += [f"--trainer.default_root_dir={root}", *extra]
        return subprocess.run(command, env=environment, timeout=300, capture_output=True).returncode

    assert genmodels("whole") == 0
    assert genmodels("asked", asked("on_train_batch_start", 4, rank=1)) == 75
    assert torch.load(last_path("asked"), weights_only=True)["global_step"] == 10  # they agree every 10 steps
    assert genmodels("asked") == 0
    assert_same(Path("whole"), Path("asked"))
