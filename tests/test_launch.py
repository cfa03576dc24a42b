"""However processes are started, together they make one run; and a folder holds one run at a time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lightning_genmodels.errors import OptionError
from lightning_genmodels.training.callbacks import last_path, lock
from lightning_genmodels.training.launch import Launch, check_size, launched, trainer_options

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NAME": "train",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in TORCHRUN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "")  # is set by what is tested, and then restored
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    return monkeypatch


def start(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected", "cluster"),
    [
        ({}, None, None),
        (TORCHRUN, Launch("torchrun", 2, 2), TorchElasticEnvironment),
        (SRUN, Launch("srun", 2, 2), SLURMEnvironment),
        ({**SRUN, **TORCHRUN}, Launch("torchrun", 2, 2), TorchElasticEnvironment),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, Launch("srun", 2, 2), SLURMEnvironment),  # srun from a shell of salloc
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None, LightningEnvironment),  # a shell, or a batch script
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None, LightningEnvironment),  # srun --pty bash
    ],
)
def test_devices_and_nodes_follow_from_what_started_the_processes(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: Launch | None, cluster: type | None
) -> None:
    start(environment, variables)
    assert launched() == expected
    options = {"devices": "auto", "num_nodes": 1, "plugins": None}
    trainer_options(options)
    assert (options["devices"], options["num_nodes"]) == (("auto", 1) if expected is None else (2, 2))
    assert [type(plugin) for plugin in options["plugins"]] == ([] if cluster is None else [cluster])
    for plugin in options["plugins"]:
        assert expected is None or plugin.world_size() == 4
        plugin.validate_settings(2, 2)


@pytest.mark.parametrize("variables", [SRUN, TORCHRUN])
@pytest.mark.parametrize("given", [{"devices": 1}, {"devices": "0,1,2"}, {"devices": 2, "num_nodes": 3}])
def test_other_numbers_are_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], given: dict[str, object]
) -> None:
    start(environment, variables)
    with pytest.raises(OptionError, match="started 2 processes on each of 2 nodes"):
        trainer_options(given)


@pytest.mark.parametrize("devices", [2, "2", [0, 1], "0,1"])
def test_the_same_numbers_are_taken(environment: pytest.MonkeyPatch, devices: object) -> None:
    start(environment, SRUN)
    options = {"devices": devices, "num_nodes": 2}
    trainer_options(options)
    assert options["devices"] == devices


@pytest.mark.parametrize(
    "variables", [{**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, {**TORCHRUN, "GROUP_WORLD_SIZE": "3"}]
)
def test_every_node_has_as_many(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    start(environment, variables)
    with pytest.raises(OptionError, match="not equally many"):
        launched()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_launcher_of_another_kind_is_noticed(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.setenv(name, "2")
    check_size(2)
    with pytest.raises(OptionError, match=f"{name} says that 2"):
        check_size(1)


def _hold(root: Path) -> None:
    with lock(root):
        (root / "held").touch()
        time.sleep(60)


def test_a_folder_is_locked_until_its_process_is_gone(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(OptionError, match="another process trains in"), lock(tmp_path):
        pass
    process.kill()
    process.join()
    with lock(tmp_path):
        pass
    with lock(tmp_path):  # it was let go of
        pass


RUN = [
    *("--data.source=digits", "--data.image_size=8", "--trainer.accelerator=cpu", "--samples.every_n_epochs=0"),
    *("--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    "--trainer.default_root_dir=run",
]


@pytest.mark.cluster
def test_torchrun_as_two_nodes_makes_one_run(run_folder: Path) -> None:
    script = Path(__file__).parent.parent / "recipes" / "torchrun.sh"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "NODES": "2", "PROCESSES": "1", "PORT": "29517", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            [str(script), "gan", *RUN], env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors
    assert torch.load(last_path("run"), weights_only=True)["epoch"] == 2 - 1
    assert len(list(Path("run/logs").iterdir())) == 1
