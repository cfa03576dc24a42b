"""Runs sent to a local server that speaks the protocol of Weights & Biases: resumed, synchronized, swept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_server import WandbServer

from lightning_genmodels.training.callbacks import WANDB_ID

pytestmark = [pytest.mark.hub, pytest.mark.slow(reason="starts processes, which talk to a server")]

FIT = [
    *("lightning_genmodels.cli", "fit", "--model=vae", "--data.source=digits", "--trainer.accelerator=cpu"),
    *("--trainer.log_every_n_steps=4", "--samples.num_samples=4", "--trainer.default_root_dir=run"),
]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    pytest.importorskip("wandb")
    with WandbServer() as running:
        yield running


def call(server: WandbServer, *args: str, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {**server.environment, "HOME": os.getcwd(), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def asked(server: WandbServer, field: str) -> list[dict[str, Any]]:
    return [variables for name, variables in server.queries if name == field]


def validations(rows: dict[int, dict[str, Any]]) -> list[int]:
    """The steps at which a run was validated."""
    return [row["trainer/global_step"] for _, row in sorted(rows.items()) if "val/nelbo" in row]


def test_a_resumed_run_goes_on_with_its_axis_configuration_artifacts_and_lineage(
    server: WandbServer, run_folder: Path
) -> None:
    options = ["--wandb.project=digits", "--model.init_from=vae.static_v1", "--wandb.job_type=train"]
    said = call(server, *FIT, *options, "--trainer.max_epochs=2")
    assert "deprecated" not in said
    assert "anonymous" not in said
    call(server, *FIT, *options, "--trainer.max_epochs=3", "--ckpt_path=last")
    name = (run_folder / "run" / WANDB_ID).read_text()
    assert list(server.history) == [name]
    rows = server.history[name]
    assert validations(rows) == [11, 23, 35]
    assert all("trainer/global_step" in row for row in rows.values())
    keys = {key for row in rows.values() for key in row}
    assert {"train/loss", "val/kl", "train/images_per_second", "samples", "reconstructions"} <= keys

    configurations = [json.loads(v["config"]) for v in asked(server, "upsertBucket") if v.get("config")]
    configured = {key: entry["value"] for found in configurations for key, entry in found.items() if key != "_wandb"}
    assert configured["model"]["class_path"].endswith("VAE")
    assert configured["started_from"]["name"] == "vae.static_v1"
    assert "hidden_sizes" not in configured
    assert str(run_folder) not in json.dumps(configured)

    made = json.dumps(asked(server, "createArtifact("))
    assert "run-weights" in made
    assert "vae.static_v1" in made
    assert asked(server, "useArtifact")


def test_segments_of_an_offline_run_become_one_without_loss(server: WandbServer, run_folder: Path) -> None:
    options = ["--wandb.project=digits", "--samples.every_n_epochs=0"]
    call(server, *FIT, *options, "--trainer.max_epochs=2", WANDB_MODE="offline")
    call(server, *FIT, *options, "--trainer.max_epochs=4", "--ckpt_path=last", WANDB_MODE="offline")
    segments = sorted(map(str, Path("run/wandb").glob("offline-run-*")))
    assert len(segments) == 2
    assert not server.queries
    call(server, "wandb", "sync", *segments)
    (rows,) = server.history.values()
    assert validations(rows) == [11, 23, 35, 47]


def test_three_trials_of_a_sweep_are_three_runs(server: WandbServer, run_folder: Path) -> None:
    """As an agent starts them."""
    for trial in ("one", "two", "three"):
        agent = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": trial, "WANDB_PROJECT": "digits"}
        call(server, *FIT, f"--model.latent_dim={len(trial)}", "--trainer.max_epochs=1", **agent)
    assert set(server.history) == {"one", "two", "three"}
    assert all(validations(rows) == [11] for rows in server.history.values())
    assert {folder.name for folder in Path("run").iterdir()} == {"one", "two", "three"}
