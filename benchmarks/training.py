"""What a training step costs beside its arithmetic, and what a second process brings: ratios of one run.

python benchmarks/training.py
python benchmarks/training.py overhead --rounds 5
python benchmarks/training.py processes

Nothing else should compute meanwhile. ``overhead`` is the CPU time of a step of a recipe under Lightning with the
callbacks of ``genmodels fit``, over that of a bare loop with the same model, batches, optimizer, schedule, clipping and
averaged weights; rounds of both alternate, and the best median of each counts. ``processes`` is the wall time of a
step on one process over that on two, of one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_genmodels.cli.train import TrainingCLI
from lightning_genmodels.system import reuse_freed_memory

RECIPES = Path(__file__).parent.parent / "recipes"
QUIET = [
    *("--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--samples.every_n_epochs=0"),
    *("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"),
]
OVERHEADS: dict[str, tuple[str, list[str], int, float]] = {
    "vae": ("vae", [], 100, 1.08),
    "pixelsnail": ("pixelsnail", [], 8, 1.03),
    "tiny vae": (
        "vae",
        ["--model.init_args.hidden_sizes=[20]", "--model.init_args.latent_dim=4", "--data.batch_size=20"],
        400,
        1.4,
    ),
}
"""Recipe, options, steps in a round, and the ratio to stay below."""


class Clock(Callback):
    """Notes when batches start."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes one."""
        self.times.append(self.clock())

    def median(self) -> float:
        """Seconds of a step; the first ones, in which memory is allocated, are left out."""
        return median_step(self.times)


def median_step(times: list[float]) -> float:
    """The median difference of times, after the first tenth of them."""
    steps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(steps[len(steps) // 10 :])


@contextlib.contextmanager
def silence() -> Any:
    """Nothing is printed within."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def by_lightning(recipe: str, options: list[str], steps: int, clock: Any = time.process_time) -> tuple[float, Any]:
    """Seconds of a step of ``genmodels fit``, and what ran it."""
    noted = Clock(clock)

    class Timed(TrainingCLI):
        def _instantiate_trainer(self, config: Any, callbacks: list[Callback]) -> Trainer:
            return super()._instantiate_trainer(config, [*callbacks, noted])

    limit = f"--trainer.limit_train_batches={steps}"
    with tempfile.TemporaryDirectory() as root, silence():
        folder = f"--trainer.default_root_dir={root}"
        run = Timed(["fit", "--config", str(RECIPES / f"{recipe}.yaml"), *QUIET, limit, folder, *options])
    return noted.median(), run


def by_hand(run: Any, steps: int) -> float:
    """Seconds of a step of a loop that a user would write for the same model and data."""
    model = type(run.model)(**run.model.hparams)
    model._trainer = run.trainer  # whose length the schedule asks for
    optimization = model.configure_optimizers()
    optimizer, schedule = optimization["optimizer"], optimization["lr_scheduler"]["scheduler"]
    networks = nn.ModuleList(child for child in model.children() if any(True for _ in child.parameters()))
    decay = run.config["fit"].ema
    average = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay is not None else None
    times = []
    loader = run.datamodule.loader("train", train=True)
    while len(times) < steps:
        for x in loader:
            times.append(time.process_time())
            optimizer.zero_grad()
            model.training_loss(x).backward()
            if run.trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(model.parameters(), run.trainer.gradient_clip_val)
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update_parameters(networks)
            if len(times) >= steps:
                break
    return median_step(times)


def overhead(rounds: int) -> None:
    """Prints the ratio of each recipe."""
    for name, (recipe, options, steps, most) in OVERHEADS.items():
        ours, bare = [], []
        for _ in range(rounds):
            seconds, run = by_lightning(recipe, options, steps)
            ours.append(seconds)
            bare.append(by_hand(run, steps))
        ratio = min(ours) / min(bare)
        print(
            f"{name}: {1e3 * min(ours):.2f} ms a step against {1e3 * min(bare):.2f} ms of a bare loop: {ratio:.2f} "
            f"(at most {most})",
            flush=True,
        )


def processes(recipe: str = "pixelcnn", batch: int = 50, steps: int = 30) -> None:
    """Prints how much faster two processes take the steps of a recipe than one."""
    seconds = []
    for count in (1, 2):
        command = [sys.executable, __file__, "step", recipe, str(steps)]
        options = [f"--data.batch_size={batch}", f"--trainer.devices={count}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        seconds.append(min(float(line) for line in done.stdout.splitlines()))
    print(
        f"{recipe}, {batch} images: {1e3 * seconds[0]:.0f} ms a step on one process, {1e3 * seconds[1]:.0f} ms on two: "
        f"{seconds[0] / seconds[1]:.2f} times as fast (at least 1.7)",
        flush=True,
    )


def main() -> None:
    """Measures what is asked for, or all."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    reuse_freed_memory()
    if sys.argv[1:2] == ["step"]:  # one of the processes that are compared
        print(by_lightning(sys.argv[2], sys.argv[4:], int(sys.argv[3]), time.perf_counter)[0])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="overhead, processes; default: both")
    parser.add_argument("--rounds", type=int, default=3, help="of each overhead")
    options = parser.parse_args()
    names = options.names or ["overhead", "processes"]
    if "overhead" in names:
        overhead(options.rounds)
    if "processes" in names:
        processes()


if __name__ == "__main__":
    main()
