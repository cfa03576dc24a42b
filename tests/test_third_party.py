"""A model of another package, found by its entry point, is trained, loaded, evaluated and pushed like ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

HERE = Path(__file__).parent


def run(*command: str, cwd: Path, **variables: str) -> str:
    path = os.pathsep.join([str(HERE / "third_party"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.hub
def test_from_training_to_the_hub(run_folder: Path) -> None:
    genmodels = ("-m", "lightning_genmodels.cli")
    assert "shared_rows" in run(*genmodels, "list", cwd=run_folder)
    run(
        *(*genmodels, "fit", "--model=shared_rows", "--data.source=digits", "--trainer.max_epochs=3"),
        *("--trainer.accelerator=cpu", "--model.learning_rate=0.1"),
        cwd=run_folder,
    )
    best = "runs/shared_rows/checkpoints/best.ckpt"
    run(*genmodels, "export", best, "weights", cwd=run_folder)
    table = run(*genmodels, "evaluate", "weights", "--data.source=digits", cwd=run_folder)
    assert "shared_rows: 28 parameters" in table
    assert "exact" in table
    run(*genmodels, "sample", "weights", "--out=x.png", cwd=run_folder)
    with HubServer({"hf_me": "me"}) as hub:
        code = (
            "import lightning_genmodels as gm\n"
            "model = gm.load('weights'); model.push_to_hub('me/rows'); again = gm.load('me/rows')\n"
            "print(type(again).__name__, bool((again.rows == model.rows).all()))"
        )
        environment = hub.environment(run_folder / "home", token="hf_me")
        assert run("-c", code, cwd=run_folder, **environment).strip() == "SharedRows True"


def test_it_passes_the_contract(run_folder: Path) -> None:
    contract = HERE / "test_contract.py"
    printed = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "shared_rows or dropout_vae",
        str(contract),
        cwd=run_folder,
    )
    assert "passed" in printed
    assert "shared_rows" not in printed
    assert "failed" not in printed
