"""Several processes on this machine give the figures, and take the steps, of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lightning_genmodels import load
from lightning_genmodels.cli import recipes
from lightning_genmodels.models import VAE
from lightning_genmodels.training.callbacks import best_path, last_path

pytestmark = pytest.mark.cluster

ONE_RUN = [
    *("--data.source=digits", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.enable_model_summary=false", "--samples.every_n_epochs=1"),
]


GENMODELS = """
import atexit, sys, torch
from lightning_genmodels.cli import main

# Runs after what registers later; in one write, for all processes write to the same pipe.
atexit.register(lambda: sys.stderr.write(f"in a group: {torch.distributed.is_initialized()}\\n"))
main()
"""


def genmodels(*args: str, cwd: Path) -> str:
    (cwd / "genmodels.py").write_text(GENMODELS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "genmodels.py", *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "in a group: False" in done.stderr
    assert "in a group: True" not in done.stderr  # gloo's threads may abort a process that ends in its group
    return done.stdout


def report(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics, safetensors.torch.load_file(folder / "values.safetensors")


def test_every_value_is_that_of_one_process(run_folder: Path) -> None:
    torch.manual_seed(0)
    VAE(hidden_sizes=(20,), latent_dim=4).save_pretrained("weights")
    common = ("evaluate", "weights", "--data.source=digits", "--limit=97", "--num_particles=120", "--accelerator=cpu")
    printed = [genmodels(*common, f"--devices={n}", f"--out=report{n}", cwd=run_folder) for n in (1, 2, 3)]
    metrics, values = report(run_folder / "report1")
    for n in (2, 3):
        other_metrics, other_values = report(run_folder / f"report{n}")
        assert other_metrics["processes"] == n
        assert other_metrics["protocol"]["num_images"] == 97
        for name, figure in metrics["figures"].items():
            assert other_metrics["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6)
            assert torch.allclose(values[name], other_values[name], rtol=1e-6)
    assert all(text.count("parameters") == 1 for text in printed)  # only the first process prints


def test_counting_on_two_processes_is_counting_on_one(run_folder: Path) -> None:
    for devices in (1, 2):
        genmodels(
            *("fit", "--model=bernoulli", *ONE_RUN, "--trainer.max_epochs=1", "--data.batch_size=100"),
            *(f"--trainer.devices={devices}", f"--trainer.default_root_dir=run{devices}"),
            cwd=run_folder,
        )
    one, two = (load(run_folder / best_path(f"run{n}")) for n in (1, 2))
    assert torch.equal(one.logits, two.logits)


def test_two_processes_take_the_steps_of_one_and_write_once(run_folder: Path) -> None:
    """Without noise in the loss, weights agree; a model with a density has none."""
    path = str(Path(__file__).parent / "third_party")
    os.environ["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    try:
        for devices in (1, 2):
            genmodels(
                *("fit", "--model=shared_rows", *ONE_RUN, "--trainer.max_epochs=3", "--model.learning_rate=0.05"),
                *(f"--trainer.devices={devices}", f"--trainer.default_root_dir=run{devices}", "--ema=0.9"),
                "--data.batch_size=9",  # of which one process has five
                cwd=run_folder,
            )
    finally:
        os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].removeprefix(path + os.pathsep)
    one, two = (torch.load(last_path(f"run{n}"), weights_only=True) for n in (1, 2))
    assert one["global_step"] == two["global_step"] == 3 * (1297 // 9)
    for key in ("current_model_state", "state_dict"):
        assert torch.allclose(one[key]["rows"], two[key]["rows"], atol=1e-6)
    listings = [sorted(p.relative_to(f"run{n}").as_posix() for p in Path(f"run{n}").rglob("*")) for n in (1, 2)]
    assert listings[0] == listings[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_processes_take_the_steps_of_muon_that_one_takes(run_folder: Path, precision: str) -> None:
    for devices in (1, 2):
        genmodels(
            *("fit", "--model=pixelcnn", *ONE_RUN, "--trainer.max_epochs=1", "--data.image_size=8"),
            *("--model.hidden_size=4", "--model.num_layers=2", "--model.first_kernel_size=3", "--model.optimizer=muon"),
            *("--data.batch_size=100", f"--trainer.devices={devices}", f"--trainer.default_root_dir=run{devices}"),
            *(f"--trainer.precision={precision}", "--samples.every_n_epochs=0"),
            cwd=run_folder,
        )
    one, two = (load(run_folder / best_path(f"run{n}")) for n in (1, 2))
    (optimizer,) = torch.load(last_path("run1"), weights_only=True)["optimizer_states"]
    assert any(group["muon"] for group in optimizer["param_groups"])
    for name, weight in one.state_dict().items():
        other = two.state_dict()[name]
        assert torch.isfinite(weight).all(), name
        # In bfloat16 gradients differ by rounding, and AdamW's first steps follow the sign of the smallest of them.
        assert (weight - other).norm() <= (1e-3 if precision == "32-true" else 0.2) * (weight.norm() + 0.1), name


def test_two_processes_train_the_vae_in_mixed_precision(run_folder: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        genmodels(
            *("fit", "--model=vae", *ONE_RUN, "--trainer.max_epochs=4", f"--trainer.precision={precision}"),
            *("--trainer.devices=2", f"--trainer.default_root_dir={precision}", "--trainer.log_every_n_steps=1"),
            cwd=run_folder,
        )
        log = next(Path(precision, "logs").glob("*/metrics.csv")).read_text().splitlines()
        column = log[0].split(",").index("val/nelbo")
        losses[precision] = [float(line.split(",")[column]) for line in log[1:] if line.split(",")[column]]
    assert losses["32-true"][-1] < losses["32-true"][0] - 5
    assert losses["bf16-mixed"][-1] == pytest.approx(losses["32-true"][-1], rel=0.02)


EVERY_RECIPE = """
import sys
from lightning_genmodels.cli import main, recipes

for recipe in sorted(recipes()):
    main(["fit", "--config", recipe, *sys.argv[1:], f"--trainer.default_root_dir=runs/{recipe}"])
"""


@pytest.mark.slow(reason="trains by every recipe")
@pytest.mark.timeout(900)
def test_every_recipe_trains_on_two_processes_in_mixed_precision(run_folder: Path) -> None:
    """One pair of processes trains them all: imports are what takes time."""
    (run_folder / "every.py").write_text(EVERY_RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "every.py", *ONE_RUN]
    command += ["--samples.every_n_epochs=0", "--trainer.precision=bf16-mixed", "--trainer.max_epochs=1"]
    command += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"]
    command += ["--data.batch_size=9", "--data.eval_batch_size=50"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-5000:]
    exported = {path.parent.parent.name for path in Path("runs").glob("*/weights/model.safetensors")}
    assert exported == set(recipes())
