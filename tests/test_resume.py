"""A run that is killed anywhere and resumed ends with the very bits of the run that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_genmodels.cli import main
from lightning_genmodels.training.callbacks import last_path
from lightning_genmodels.weights import names as registry

THIRD_PARTY = Path(__file__).parent / "third_party"
KILLS = int(os.environ.get("GENMODELS_TEST_KILLS", "4"))

OPTIONS = [
    *("fit", "--model=dropout_vae", "--model.warmup_steps=5", "--ema=0.9"),
    *("--data.source=digits", "--data.binarization=dynamic", "--data.batch_size=100"),
    *("--trainer.max_epochs=4", "--trainer.accelerator=cpu", "--trainer.gradient_clip_val=1.0"),
    "--trainer.check_val_every_n_epoch=3",
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--save_every_n_batches=5", "--samples.every_n_epochs=2", "--ckpt_path=auto"),
]


def _train(root: str, extra: list[str]) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
        os.dup2(null.fileno(), 1)
    main([*OPTIONS, f"--trainer.default_root_dir={root}", *extra])


def start(root: Path, *extra: str) -> multiprocessing.Process:
    """Starts training in a process of its own, forked so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=_train, args=(str(root), list(extra)))
    process.start()
    return process


def train(root: Path, *extra: str) -> float:
    """Trains to the end; returns seconds."""
    began = time.monotonic()
    process = start(root, *extra)
    process.join(300)
    assert process.exitcode == 0
    return time.monotonic() - began


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    registry._import_strings.cache_clear()
    yield
    registry._import_strings.cache_clear()
    sys.modules.pop("third_party_models", None)


@pytest.mark.slow(reason="trains for minutes, and kills")
@pytest.mark.parametrize("strategy", ["one process"])
def test_killed_runs_end_bit_identical(
    third_party: None, tmp_path: Path, strategy: str, assert_same: Callable[..., None]
) -> None:
    duration = train(tmp_path / "whole")
    whole = torch.load(last_path(tmp_path / "whole"), weights_only=True)
    rng = random.Random(0)
    mid_epoch = 0
    for kill in range(KILLS):
        root = tmp_path / f"killed{kill}"
        process = start(root)
        process.join(rng.uniform(0.3, 1.0) * duration)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if last_path(root).is_file():
            stopped = torch.load(last_path(root), weights_only=True)
            mid_epoch += stopped["loops"]["fit_loop"]["state_dict"]["combined_loader"] != []
        train(root)
        resumed = torch.load(last_path(root), weights_only=True)
        for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert_same(whole[key], resumed[key], key)
        assert whole["epoch"] == resumed["epoch"]
        assert whole["global_step"] == resumed["global_step"]
        of_last_epoch = [run["callbacks"]["BestCheckpoint"]["current_score"] for run in (whole, resumed)]
        assert of_last_epoch[0] == of_last_epoch[1]
    print(f"{KILLS} of {KILLS} killed runs ended bit-identical; {mid_epoch} had a checkpoint to go on from")


@pytest.mark.slow(reason="trains three times each")
@pytest.mark.parametrize("batch", [3, 7, 12, 15, 24])
def test_resumed_from_every_kind_of_batch(
    third_party: None, tmp_path: Path, batch: int, assert_same: Callable[..., None]
) -> None:
    """Killed right after a checkpoint within an epoch, at its last batch, and at its end."""
    whole = tmp_path / "whole"
    quick = ("--trainer.max_epochs=3", "--samples.every_n_epochs=0", f"--save_every_n_batches={batch % 12 or 12}")
    train(whole, *quick)
    process = start(tmp_path / "killed", *quick)
    deadline = time.monotonic() + 120
    while not last_path(tmp_path / "killed").is_file() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    train(tmp_path / "killed", *quick)
    one, other = (torch.load(last_path(root), weights_only=True) for root in (whole, tmp_path / "killed"))
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert_same(one[key], other[key], key)
