"""What is tracked: the offline Weights & Biases run is read back; CSV and TensorBoard logs hold the same figures."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

FIT = [
    *("fit", "--model=vae", "--data.source=digits", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=4"),
    *("--samples.every_n_epochs=1", "--samples.num_samples=9", "--trainer.default_root_dir=first_run"),
]


def fit(*args: str, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "lightning_genmodels.cli", *FIT, *args]
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "HOME": str(cwd), **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


BLOCK, HEADER = 32_768, 7


def records(run: Path) -> list[Any]:
    """The records of an offline run: protocol buffers in the log format of LevelDB, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    content = next(run.glob("*.wandb")).read_bytes()
    found, parts, position = [], b"", HEADER
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the end of a block is padded
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])  # after a checksum
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.mark.slow(reason="starts processes")
def test_an_offline_run_holds_everything(run_folder: Path) -> None:
    pytest.importorskip("wandb")
    said = fit(
        "--wandb.project=digits",
        "--wandb.tags=[mine]",
        "--wandb.group=seeds",
        "--ema=0.9",
        cwd=run_folder,
        WANDB_API_KEY="",
    )
    assert "tracks this run offline: there is no API key" in said

    runs = list((run_folder / "first_run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    found = records(runs[0])
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.project, run.display_name) == ("digits", "first_run")
    assert list(run.tags) == ["vae", "static", "mine"]
    assert run.run_id == (run_folder / "first_run" / "wandb_run_id").read_text()

    rows: list[dict[str, Any]] = []
    for record in found:
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    logged = {key for row in rows for key in row}
    assert {"train/loss", "train/grad_norm", "train/images_per_second", "val/nelbo", "val/nelbo_stderr"} <= logged
    assert {"val/kl", "val/reconstruction"} <= logged
    assert any(key.startswith("lr-AdamW") for key in logged)
    assert {"samples"} <= {key.split("/")[0] for key in logged}
    validated = [row["val/nelbo"] for row in rows if "val/nelbo" in row]
    assert len(validated) == 3
    assert all(row["train/images_per_second"] > 0 for row in rows if "train/images_per_second" in row)

    metrics = [record.metric for record in found if record.HasField("metric")]
    assert any(metric.name == "val/nelbo" and metric.summary.min for metric in metrics)

    configured = {}
    for record in found:
        if record.HasField("config"):
            configured |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
        if record.HasField("run"):
            configured |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
    assert configured["data"]["source"] == "digits"
    assert configured["model"]["class_path"].endswith("VAE")
    assert "hidden_sizes" not in configured  # nothing is there twice, flat and nested
    assert configured["protocol"]["binarization"] == "static"
    assert {"lightning_genmodels", "torch", "host"} <= set(configured["made_by"])
    assert str(run_folder) not in json.dumps(configured)
    assert run.run_group == "seeds"
    axes = {metric.name: metric.step_metric for metric in metrics}
    assert axes["val/nelbo"] == "trainer/global_step"

    pictures = sorted((runs[0] / "files" / "media" / "images").glob("samples*.png"))
    assert len(pictures) == 3
    with Image.open(pictures[-1]) as image:
        assert image.size == (3 * 30 + 2, 3 * 30 + 2)
        assert image.convert("L").getextrema() == (0, 255)

    artifacts = [record.request.log_artifact.artifact for record in found if record.HasField("request")]
    artifacts += [record.artifact for record in found if record.HasField("artifact")]
    names = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    assert {"config.json", "model.safetensors"} <= names
    assert sorted(p.name for p in (run_folder / "first_run" / "weights").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.slow(reason="starts processes")
def test_no_network_is_noticed_in_seconds(run_folder: Path) -> None:
    began = time.monotonic()
    fit("--wandb.project=digits", cwd=run_folder, WANDB_MODE="offline")
    offline, began = time.monotonic() - began, time.monotonic()
    address = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    said = fit("--wandb.project=digits", "--trainer.default_root_dir=second_run", cwd=run_folder, **address)
    assert time.monotonic() - began < 2 * offline + 10  # the client itself waits for 90 seconds
    assert "tracks this run offline: 127.0.0.1 does not answer" in said


@pytest.mark.cluster
def test_two_processes_make_one_run(run_folder: Path) -> None:
    fit("--wandb.project=digits", "--trainer.devices=2", cwd=run_folder, WANDB_MODE="offline")
    assert len(list((run_folder / "first_run" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.slow(reason="starts processes")
def test_csv_and_tensorboard(run_folder: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "board", "name": ""}}
    Path("board.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    fit("--config=board.yaml", cwd=run_folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(Path("board").rglob("events.*"))))
    events.Reload()
    assert "val/nelbo" in events.Tags()["scalars"]
    assert "samples" in events.Tags()["images"]

    fit("--trainer.default_root_dir=csv", cwd=run_folder)
    header = next(Path("csv/logs").glob("*/metrics.csv")).read_text().splitlines()[0]
    assert {"train/grad_norm", "train/images_per_second", "val/nelbo"} <= set(header.split(","))


@pytest.mark.slow(reason="starts processes")
def test_a_disabled_client_writes_nothing(run_folder: Path) -> None:
    fit("--wandb.project=digits", cwd=run_folder, WANDB_MODE="disabled")
    assert not (run_folder / "first_run" / "wandb").exists()
    assert not (run_folder / "first_run" / "wandb_run_id").exists()


@pytest.mark.slow(reason="starts processes")
def test_trials_of_a_sweep_have_folders_and_runs_of_their_own(run_folder: Path) -> None:
    """As an agent starts them."""
    for trial in ("one", "two"):
        agent = {"WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": trial, "WANDB_PROJECT": "digits", "WANDB_MODE": "offline"}
        fit(f"--model.learning_rate={0.001 if trial == 'one' else 0.002}", cwd=run_folder, **agent)
        assert (run_folder / "first_run" / trial / "weights" / "config.json").is_file()
        (tracked,) = (run_folder / "first_run" / trial / "wandb").glob("offline-run-*")
        assert next(record.run.run_id for record in records(tracked) if record.HasField("run")) == trial


@pytest.mark.slow(reason="starts processes")
def test_a_run_that_starts_from_weights_says_from_which_and_resumes_as_itself(run_folder: Path) -> None:
    short = {"cwd": run_folder, "WANDB_MODE": "offline"}
    fit("--trainer.default_root_dir=start", **short)
    start = run_folder / "start" / "weights"
    fit("--wandb.project=digits", f"--model.init_from={start}", **short)
    fit("--wandb.project=digits", f"--model.init_from={start}", "--trainer.max_epochs=4", "--ckpt_path=last", **short)
    segments = sorted((run_folder / "first_run" / "wandb").glob("offline-run-*"))
    runs = [next(record.run for record in records(run) if record.HasField("run")) for run in segments]
    assert len({run.run_id for run in runs}) == 1
    made = [record.request.log_artifact.artifact for record in records(segments[0]) if record.HasField("request")]
    configured = [i for r in records(segments[0]) if r.HasField("config") for i in r.config.update]
    (started,) = {i.value_json for i in configured if (i.key or i.nested_key[0]) == "started_from"}
    digest = hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads(started) == {"name": "weights", "sha256": digest}
    made += [record.artifact for record in records(segments[0]) if record.HasField("artifact")]
    aliases = {alias for artifact in made for alias in artifact.aliases}
    assert "best" in aliases
