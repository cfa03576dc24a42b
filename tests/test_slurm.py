"""The job files that ship, on a real Slurm of two nodes: preempted, requeued, resumed, and equal to a run that was not.

``GENMODELS_TEST_PREEMPTIONS`` is the number of preemptions.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lightning_genmodels.training.callbacks import last_path

pytestmark = [pytest.mark.cluster, pytest.mark.slow(reason="jobs of a real Slurm")]

RECIPES = Path(__file__).parent.parent / "recipes"
PREEMPTIONS = int(os.environ.get("GENMODELS_TEST_PREEMPTIONS", "3"))
RUN = [
    *("--data.source=digits", "--data.image_size=8", "--data.binarization=dynamic", "--data.batch_size=100"),
    *("--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--samples.every_n_epochs=0"),
]
LONG = [*RUN, f"--trainer.max_epochs={40 + 25 * PREEMPTIONS}", "--model.init_args.warmup_steps=5"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that talk to a Slurm that runs for these tests."""
    script = Path(__file__).parent / "slurm.sh"
    if shutil.which("slurmctld") is None or os.getuid() != 0:
        pytest.skip(f"there is no Slurm that could be started; {script} install, as root")
    folder = tmp_path_factory.mktemp("slurm")
    with open(folder / "up.log", "w") as log:  # not a pipe: the daemons would hold it open
        subprocess.run([str(script), "up", str(folder)], check=True, stdout=log, stderr=log, timeout=60)
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",  # both nodes are this machine
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([str(script), "down", str(folder)], check=True)


class Job:
    """A job that was submitted."""

    def __init__(self, slurm: dict[str, str], script: str, *args: str, **variables: str) -> None:
        self.environment = {**slurm, **variables}
        options = [arg for arg in args if arg.startswith(("--nodes", "--ntasks", "--array"))]
        others = [arg for arg in args if arg not in options]
        said = self.command("sbatch", *options, str(RECIPES / "slurm" / script), *others)
        self.id = said.split()[-1]

    def command(self, *args: str) -> str:
        done = subprocess.run(args, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self) -> set[str]:
        return set(re.findall(r"JobState=(\w+)", self.command("scontrol", "show", "job", self.id)))

    def property(self, name: str) -> str:
        return re.findall(rf"\b{name}=(\S+)", self.command("scontrol", "show", "job", self.id))[0]

    def tasks(self) -> int:
        """Number of its tasks that could get a signal now; before there is one, Slurm drops a signal to the job."""
        count = 0
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                ours = f"SLURM_JOB_ID={self.id}".encode() in (process / "environ").read_bytes().split(b"\0")
                count += ours and b"bin/genmodels\0fit" in (process / "cmdline").read_bytes()
        return count

    def wait(self, holds: Callable[[], bool], what: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"hangs: {what}\n{self.log()}"
            time.sleep(0.05)

    def end(self) -> None:
        self.wait(lambda: not self.states() & {"PENDING", "RUNNING", "COMPLETING"}, "ending", seconds=400)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(Path().glob(f"*-{self.id}*.out")))


def changed(path: Path, since: float) -> bool:
    return path.is_file() and path.stat().st_mtime > since


def same_weights(one: Path, other: Path) -> None:
    checkpoints = [torch.load(last_path(root), weights_only=True) for root in (one, other)]
    assert checkpoints[0]["global_step"] == checkpoints[1]["global_step"]
    for key in ("state_dict", "current_model_state"):
        for name, value in checkpoints[0][key].items():
            assert torch.equal(value, checkpoints[1][key][name]), name


@pytest.fixture(scope="module")
def whole(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    command = [str(RECIPES / "torchrun.sh"), "vae", *LONG, f"--trainer.default_root_dir={root}"]
    environment = {**slurm, "PROCESSES": "2", "PORT": "29518"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    return root


@pytest.mark.timeout(120 + 120 * (PREEMPTIONS + 3))
@pytest.mark.parametrize("shape", ["2 tasks on 1 node", "1 task on each of 2 nodes"])
def test_preempted_runs_end_with_the_same_bits(
    slurm: dict[str, str], whole: Path, run_folder: Path, shape: str
) -> None:
    sizes = ["--ntasks-per-node=2"] if shape.startswith("2 tasks") else ["--nodes=2", "--ntasks-per-node=1"]
    preemptions = PREEMPTIONS if shape.startswith("2 tasks") else 1
    job = Job(slurm, "train.sbatch", *sizes, "vae", *LONG, "--trainer.default_root_dir=run")
    rng, last = random.Random(0), last_path("run")
    for preemption in range(preemptions):
        began = time.time()
        job.wait(lambda n=preemption: job.property("Restarts") == str(n), "requeueing")
        job.wait(lambda: job.tasks() == 2, "starting")
        if preemption > 0 or preemptions == 1:  # else it is asked while it starts
            job.wait(lambda began=began: changed(last, began), "training")
            time.sleep(rng.uniform(0.0, 0.5))
        job.command("scancel", "--signal=USR1", job.id)
        job.wait(lambda n=preemption: job.property("Restarts") == str(n + 1), "leaving")
    job.end()
    assert job.states() == {"COMPLETED"}, job.log()
    lines = [line for line in job.log().splitlines() if re.search(r"^SIGUSR1|going on from|status|stopped", line)]
    assert sum(line.startswith("SIGUSR1: leaving") for line in lines) == preemptions
    assert sum(line.endswith("status 75") for line in lines) == preemptions
    assert lines[-1].endswith("status 0")
    same_weights(whole, Path("run"))
    print(f"\n{shape}:", *lines, "weights equal", sep="\n  ")


def test_a_cancelled_run_saves_and_stays_cancelled(slurm: dict[str, str], run_folder: Path) -> None:
    job = Job(slurm, "train.sbatch", "vae", *LONG, "--trainer.max_epochs=100000", "--trainer.default_root_dir=run")
    job.wait(lambda: last_path("run").is_file(), "training")
    second = Job(slurm, "train.sbatch", "vae", *LONG, "--trainer.default_root_dir=run")
    second.end()  # into the same folder
    assert second.property("ExitCode") == "2:0"
    assert "another process trains in run" in second.log()
    job.command("scancel", "--signal=TERM", job.id)
    job.end()
    assert job.property("ExitCode") == "143:0"
    assert job.property("Restarts") == "0"
    assert "SIGTERM: leaving" in job.log()
    step = int(re.findall(r"SIGTERM: leaving at epoch \d+, step (\d+)", job.log())[0])
    assert torch.load(last_path("run"), weights_only=True)["global_step"] == step


def test_an_array_trains_every_recipe_in_its_own_folder(slurm: dict[str, str], run_folder: Path) -> None:
    choice = {"RECIPES": "bernoulli vae gan", "SEEDS": "3"}
    job = Job(slurm, "array.sbatch", "--array=0-2", *RUN, "--trainer.max_epochs=2", **choice)
    job.end()
    assert job.states() == {"COMPLETED"}, job.log()
    for recipe in choice["RECIPES"].split():
        assert Path("runs", recipe, "seed_3", "weights", "model.safetensors").is_file()


def test_two_nodes_evaluate_as_one_process(slurm: dict[str, str], run_folder: Path) -> None:
    options = ["vae", "--data.source=digits", "--limit=60", "--num_particles=20", "--accelerator=cpu"]
    job = Job(slurm, "evaluate.sbatch", "--nodes=2", "--ntasks-per-node=1", *options, "--out=two")
    one = Job(slurm, "evaluate.sbatch", *options, "--out=one")
    for each in (job, one):
        each.end()
        assert each.states() == {"COMPLETED"}, each.log()
        assert each.log().count("written") == 1
    reports = [json.loads(Path(name, "metrics.json").read_text()) for name in ("one", "two")]
    assert [report["processes"] for report in reports] == [1, 2]
    for name, figure in reports[0]["figures"].items():
        assert reports[1]["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-6)


KINDS = """
import sys
from lightning_genmodels.cli import main

for recipe in ("bernoulli", "made", "pixelsnail", "vae", "gan", "autoencoder"):
    main(["fit", "--config", recipe, *sys.argv[1:], f"--trainer.default_root_dir=runs/{recipe}"])
"""


def test_srun_trains_a_recipe_of_each_kind(slurm: dict[str, str], run_folder: Path) -> None:
    """Straight from a shell, and with a number of tasks that is not one for each node."""
    Path("kinds.py").write_text(KINDS)
    options = [*RUN, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false"]
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "kinds.py", *options]
    environment = {**slurm, "SLURM_JOB_NAME": "bash"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert runs == sorted(["bernoulli", "made", "pixelsnail", "vae", "gan", "autoencoder"])
    for run in runs:
        assert Path("runs", run, "weights", "model.safetensors").is_file()
        assert len(list(Path("runs", run, "logs").iterdir())) == 1
