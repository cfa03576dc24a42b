"""No file is ever left half-written or lost, whenever a process is killed, whatever disk is full.

``GENMODELS_SOAK=1`` runs the long counts.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_genmodels import load
from lightning_genmodels.cli import main
from lightning_genmodels.errors import FileError, WeightsError
from lightning_genmodels.models import FVBN, MADE, VAE, Bernoulli, EoNADE, LadderVAE, Markov, PixelCNN, PixelSNAIL
from lightning_genmodels.system import write_atomically
from lightning_genmodels.training.callbacks import WholeCheckpointIO, best_path, last_path

SOAK = bool(os.environ.get("GENMODELS_SOAK"))


def killed(work: Callable[[], None], seconds: float) -> None:
    """Runs in a process of its own, which is killed after so long."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def checkpoint(step: int) -> dict[str, Any]:
    return {"step": step, "tensor": torch.full((1_500_000,), float(step))}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files on another file system."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("there is no second file system to write to")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_is_whole_whenever_its_writer_is_killed(tmp_path: Path, elsewhere: Path) -> None:
    path, rng = tmp_path / "last.ckpt", random.Random(0)
    plugin = WholeCheckpointIO()
    plugin.save_checkpoint(checkpoint(0), path)

    def write_again_and_again() -> None:
        for step in range(1, 10_000):
            plugin.save_checkpoint(checkpoint(step), path)

    for _ in range(40 if SOAK else 8):
        killed(write_again_and_again, rng.uniform(0.01, 0.2))
        found = plugin.load_checkpoint(path, weights_only=True)
        assert bool((found["tensor"] == found["step"]).all())
    assert not list(elsewhere.glob("*last.ckpt*"))


def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path) -> None:
    path, plugin = small_disk / "last.ckpt", WholeCheckpointIO()
    plugin.save_checkpoint(checkpoint(1), path)
    for _ in range(20 if SOAK else 3):
        with pytest.raises(FileError, match="No space left"):
            plugin.save_checkpoint(checkpoint(2), path)
        assert plugin.load_checkpoint(path, weights_only=True)["step"] == 1
        assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]


def test_a_full_folder_for_temporary_files_does_not_matter(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small_disk / "filler").write_bytes(bytes(10 * 2**20 - 8192))
    monkeypatch.setenv("TMPDIR", str(small_disk))
    WholeCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert WholeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["step"] == 1


RUN = [
    *("fit", "--model=vae", "--model.hidden_sizes=[5]", "--model.latent_dim=2", "--data.source=digits"),
    *("--data.image_size=4", "--data.batch_size=200", "--trainer.accelerator=cpu", "--samples.every_n_epochs=0"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.default_root_dir=run", "--trainer.max_epochs=2"),
]


def flip(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_changes_no_tensor(run_folder: Path) -> None:
    main(RUN)
    content, rng = last_path("run").read_bytes(), random.Random(0)
    whole = load(last_path("run")).state_dict()
    refused = 0
    for _ in range(1000 if SOAK else 60):
        Path("flipped.ckpt").write_bytes(flip(content, rng.randrange(8 * len(content))))
        try:
            found = load("flipped.ckpt").state_dict()
        except WeightsError:
            refused += 1
        else:
            assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert refused > 0


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_which(
    run_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    main(RUN)
    content = last_path("run").read_bytes()
    last_path("run").write_bytes(flip(content, 8 * len(content) // 2))
    with caplog.at_level("INFO"):
        main([*RUN, "--trainer.max_epochs=3", "--ckpt_path=auto"])
    assert f"going on from {best_path('run')}" in caplog.text + capsys.readouterr().err
    assert torch.load(last_path("run"), weights_only=True)["epoch"] == 2
    for path in (last_path("run"), best_path("run")):
        path.write_bytes(content[:1000])
    with pytest.raises(SystemExit) as caught:
        main([*RUN, "--ckpt_path=auto"])
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("genmodels: error: no whole checkpoint in run")
    assert "--overwrite true" in line


def test_a_folder_of_weights_that_is_replaced_always_loads(tmp_path: Path) -> None:
    folder, rng = tmp_path / "weights", random.Random(0)
    models = [VAE((1, 4, 4), (size,), 2) for size in (5, 300)]
    models[0].save_pretrained(folder)

    def replace_again_and_again() -> None:
        for step in range(10_000):
            models[step % 2].save_pretrained(folder)

    torn = 0
    for _ in range(150 if SOAK else 25):
        killed(replace_again_and_again, rng.uniform(0.01, 0.05))
        found = load(folder)
        index = int(found.hparams["hidden_sizes"][0] == 300)
        for name, tensor in models[index].state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor)
        torn += int(not _is_pair(folder))
    print(f"{torn} of the folders held the config of other weights")


def _is_pair(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return bool(config["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def test_weights_of_a_folder_that_was_replaced_in_part_are_the_new_ones(tmp_path: Path) -> None:
    old, new = (VAE((1, 4, 4), (size,), 2) for size in (5, 6))
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    weights = (tmp_path / "new" / "model.safetensors").read_bytes()
    (tmp_path / "old" / "model.safetensors").write_bytes(weights)
    found = load(tmp_path / "old")
    assert found.hparams["hidden_sizes"] == [6]
    rng = random.Random(0)
    for _ in range(200 if SOAK else 40):  # a damaged file is not mistaken for a replaced one
        (tmp_path / "old" / "model.safetensors").write_bytes(flip(weights, rng.randrange(8 * len(weights))))
        with pytest.raises(WeightsError):
            load(tmp_path / "old")


# Outputs.


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["log_prob", "./weights", "images.npy", "--out=images.txt"], "ends in .npy, got images.txt"),
        (["log_prob", "./weights", "images.npy", "--out=images.npy"], "is the input"),
        (["log_prob", "./weights", "images.npy", "--out=./../here/images.npy"], "is the input"),
        (["complete", "./weights", "images.npy", "--out=images.npy"], "is the input"),
        (["complete", "./weights", "images.npy", "--observed=mask.npy", "--out=mask.npy"], "is the input"),
        (["sample", "./weights", "--out=samples.jpg"], "ends in .png or .npy"),
        (["sample", "./weights", "--out=."], "ends in .png or .npy"),
        (["sample", "./weights", "--out=folder.png"], "is a folder"),
        (["sample", "./weights", "--out=images.npy/samples.png"], "no folder you may write to"),
    ],
)
def test_an_output_is_the_path_that_was_given_and_never_an_input(
    run_folder: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("here").mkdir()
    os.chdir("here")
    Bernoulli((1, 2, 2)).save_pretrained("weights")
    Path("folder.png").mkdir()
    np.save("images.npy", np.zeros((3, 2, 2), dtype=np.uint8))
    np.save("mask.npy", np.ones((2, 2), dtype=np.uint8))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_scores_are_written_where_they_were_asked_for(run_folder: Path) -> None:
    Bernoulli((1, 2, 2)).save_pretrained("weights")
    np.save("images.npy", np.zeros((3, 2, 2), dtype=np.uint8))
    main(["log_prob", "./weights", "images.npy", "--out=scores.v2.npy"])
    assert np.load("scores.v2.npy").shape == (3,)


def test_files_respect_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# Limits.


BOMBS = """
import json, os, resource, sys, time
import lightning_genmodels as gm
from lightning_genmodels.errors import WeightsError
from lightning_genmodels.weights.names import importable_models
list(importable_models())
gm.load("vae")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    gm.load(sys.argv[1])
except WeightsError as error:
    said = str(error)
print(json.dumps({
    "said": said,
    "seconds": time.monotonic() - start,
    "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
}))
"""


def _signed(config: dict[str, Any]) -> str:
    plain = {key: value for key, value in config.items() if key != "config_sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**plain, "config_sha256": digest})


def _hyper_parameters(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["hyper_parameters"].update(changes)
        (folder / "config.json").write_text(_signed(config))

    return change


def _fifo(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def _zero(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _sparse(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10 * 2**30)


def _long_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2**29)


@pytest.mark.parametrize(
    ("model", "attack"),
    [
        (lambda: PixelCNN((1, 4, 4), 3, 2, 3), _hyper_parameters(num_layers=10**9)),
        (lambda: PixelCNN((1, 4, 4), 3, 2, 3), _hyper_parameters(first_kernel_size=10**9 + 1)),
        (lambda: MADE((1, 4, 4), (5,)), _hyper_parameters(num_orders=100_000)),
        (lambda: MADE((1, 4, 4), (5,)), _hyper_parameters(hidden_sizes=[10**9])),
        (lambda: PixelSNAIL((1, 4, 4), 8, 2, heads=2), _hyper_parameters(orders=["patches"] * 100_000)),
        (lambda: EoNADE((1, 4, 4), (5,)), _hyper_parameters(num_orders=100_000)),
        (lambda: FVBN((1, 4, 4)), _hyper_parameters(event_shape=[1, 12000, 12000])),
        (lambda: FVBN((1, 4, 4)), _hyper_parameters(event_shape=[1, 1000, 1000])),
        (lambda: Markov((1, 4, 4)), _hyper_parameters(memory=10**6)),
        (lambda: LadderVAE(**LadderVAE.small), _hyper_parameters(layers=[10**8, 1])),
        (lambda: Bernoulli((1, 4, 4)), _fifo),
        (lambda: Bernoulli((1, 4, 4)), lambda folder: _fifo(folder, "config.json")),
        (lambda: Bernoulli((1, 4, 4)), _zero),
        (lambda: Bernoulli((1, 4, 4)), _sparse),
        (lambda: Bernoulli((1, 4, 4)), _long_header),
    ],
)
@pytest.mark.slow(reason="a process for each file")
def test_a_file_that_asks_for_too_much_is_refused_at_once(
    model: Callable[[], Any], attack: Callable[[Path], None], tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path / "weights")
    attack(tmp_path / "weights")
    command = [sys.executable, "-c", BOMBS, str(tmp_path / "weights")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert "\n" not in found["said"]
    assert found["mebibytes"] < 200
    assert found["seconds"] < 10  # about 0.01 on a quiet machine


@pytest.mark.parametrize("attack", [_fifo, _zero])
def test_a_checkpoint_that_never_ends_is_refused(attack: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    attack(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "endless.ckpt")
    with pytest.raises(WeightsError, match=r"no (regular file|checkpoint)"):
        load(tmp_path / "endless.ckpt")
