"""Saved weights: damaged and hostile files are refused with one clear error; nothing is unpickled or left behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_genmodels as gm
from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.errors import FileError, UnknownNameError, WeightsError
from lightning_genmodels.models import VAE, Bernoulli
from lightning_genmodels.weights import files
from lightning_genmodels.weights.card import usage
from lightning_genmodels.weights.loading import load_model
from lightning_genmodels.weights.records import registry

MUTATIONS = 2000 if os.environ.get("GENMODELS_SOAK") else 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    VAE(event_shape=(1, 3, 4), hidden_sizes=(6,), latent_dim=2).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def signed(config: dict[str, Any]) -> bytes:
    """A config with a checksum that is right, as an attacker would write it."""
    config = {key: value for key, value in config.items() if key != "config_sha256"}
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**config, "config_sha256": hashlib.sha256(canonical).hexdigest()}).encode()


# What ships.


@pytest.mark.parametrize("name", gm.list_weights())
def test_every_shipped_weight_loads_with_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    record = registry()[name]
    model = gm.load(name)
    assert not model.training
    assert model.sample(3).shape == (3, *model.event_shape)
    assert record.folder is not None
    assert hashlib.sha256((record.folder / record.filename).read_bytes()).hexdigest() == record.sha256
    assert record.metrics["model"] == record.model
    assert record.metrics["protocol"]["split"] == "test"
    assert record.metrics["protocol"]["num_images"] == 10_000
    assert record.metrics["protocol"]["binarization"] == record.binarization
    assert (Path(__file__).parent.parent / record.recipe).is_file()


def test_shipped_weights_keep_to_their_budget() -> None:
    megabytes = {name: sum(f.stat().st_size for f in w.folder.iterdir()) / 1e6 for name, w in registry().items()}
    assert sum(megabytes.values()) < 40


def test_no_pickles_ship() -> None:
    package = Path(gm.__file__).parent
    assert not [path for path in package.rglob("*") if path.suffix in {".pt", ".pth", ".ckpt", ".pkl", ".bin"}]


def test_each_model_has_one_default_weight() -> None:
    models = [record.model for record in registry().values() if record.default]
    assert len(models) == len(set(models))
    assert {record.model for record in registry().values()} == set(models)


# Names.


def test_look_up_order(folder: Path, run_folder: Path) -> None:
    shutil.copytree(folder, run_folder / "bernoulli")
    assert isinstance(gm.load("bernoulli"), Bernoulli)  # a name that is known means what is known
    assert isinstance(gm.load("./bernoulli"), VAE)
    assert isinstance(gm.load(Path("bernoulli")), VAE)
    shutil.copytree(folder, run_folder / "owner" / "repo")
    assert isinstance(gm.load("owner/repo"), VAE)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'bernoulli'"):
        gm.load("bernouli")
    with pytest.raises(UnknownNameError, match=r"bernoulli\.static_v1"):
        gm.load("bernoulli.static_v9")


def test_weight_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="is a weight of 'bernoulli', not of 'vae'"):
        load_model("vae", "bernoulli.static_v1")
    with pytest.raises(WeightsError, match="holds a VAE, not a Bernoulli"):
        Bernoulli.from_pretrained(folder)


def test_hyper_parameters_must_not_contradict_the_weights(folder: Path) -> None:
    assert gm.load(folder, latent_dim=2, hidden_sizes=[6], event_shape=(1, 3, 4)).latent_dim == 2
    with pytest.raises(WeightsError, match="latent_dim=3 contradicts the weights"):
        gm.load(folder, latent_dim=3)
    with pytest.raises(WeightsError, match="no hyper-parameter 'latent_dims'"):
        gm.load(folder, latent_dims=2)


def test_warm_start_needs_the_same_model_and_shapes(folder: Path) -> None:
    with pytest.raises(WeightsError, match="which cannot start a Bernoulli"):
        files.load_into(Bernoulli((1, 3, 4)), folder)
    with pytest.raises(WeightsError, match="should have shape"):
        files.load_into(VAE((1, 3, 4), hidden_sizes=(7,), latent_dim=2), folder)


def test_unregistered_class_is_refused_when_saving(tmp_path: Path) -> None:
    class Mine(Bernoulli):
        pass

    with pytest.raises(UnknownNameError, match="not registered: add an entry point"):
        Mine((1, 2, 2)).save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_unwritable_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="choose a folder you may write to"):
        Bernoulli((1, 2, 2)).save_pretrained(tmp_path / "file" / "weights")


# Damage and hostility.


def test_wrong_checksum_names_file_expected_and_found(folder: Path) -> None:
    file = folder / "model.safetensors"
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WeightsError) as caught:
        gm.load(folder)
    assert all(part in str(caught.value) for part in (str(file), good, hashlib.sha256(file.read_bytes()).hexdigest()))


@pytest.mark.parametrize(
    "model",
    ["os:system", "builtins.eval", "torch.nn:Linear", "../../vae", "", "vae\x00", "lightning_genmodels.models.vae:VAE"],
)
def test_hostile_class_names_are_refused(folder: Path, model: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(signed({**config, "model": model}))
    with pytest.raises(WeightsError, match="names no registered model"):
        gm.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_sizes": [10**9, 10**9]},
        {"latent_dim": 10**12},
        {"event_shape": [1, 10**6, 10**6]},
        {"event_shape": [1, 3]},
        {"event_shape": "1,3,4"},
        {"hidden_sizes": [-1]},
        {"hidden_sizes": None},
        {"latent_dim": 2.5},
        {"num_particles": "many"},
        {"__class__": "os.system"},
        {"init_from": "/etc"},
        {"self": 1},
    ],
)
def test_hostile_hyper_parameters_are_refused(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["hyper_parameters"].update(change)
    (folder / "config.json").write_bytes(signed(config))
    with pytest.raises(WeightsError):  # in how much memory, test_survival.py says
        gm.load(folder)


def test_a_config_of_another_weight_is_refused(folder: Path, tmp_path: Path) -> None:
    """Of the same shapes: only checksums tell them apart."""
    torch.manual_seed(1)
    VAE(event_shape=(1, 3, 4), hidden_sizes=(6,), latent_dim=2, beta=2.0).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", folder / "config.json")
    model = gm.load(folder)  # the weights carry their own config, which counts
    assert model.hparams.beta == 1.0
    content = (folder / "model.safetensors").read_bytes()
    header, body = header_of(content)
    del header["__metadata__"]  # as in a file that another program wrote
    (folder / "model.safetensors").write_bytes(with_header(header, body))
    with pytest.raises(WeightsError, match="is damaged: expected sha256"):
        gm.load(folder)


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    torch.save({"state_dict": Bomb()}, folder / "model.safetensors")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_bytes(signed(config))
    with pytest.raises(WeightsError, match="no safetensors file"):
        gm.load(folder)
    with pytest.raises(WeightsError, match="no checkpoint of this package"):
        gm.load(tmp_path / "bomb.ckpt")
    assert not marker.exists()


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutate(rng: random.Random, config: bytes, weights: bytes) -> tuple[bytes, bytes]:
    """One damaged or hostile pair of files; about half of them carry checksums that fit the damage."""
    kind = rng.randrange(9)
    if kind == 0:
        return config, weights[: rng.randrange(len(weights))]
    if kind == 1:
        return config[: rng.randrange(len(config))], weights
    if kind == 2:
        return weights, config
    if kind == 3:
        position = rng.randrange(len(config) - 1)
        return config[:position] + bytes([config[position] ^ (1 << rng.randrange(8))]) + config[position + 1 :], weights
    if kind == 4:
        position = rng.randrange(len(weights))
        return config, weights[:position] + bytes([weights[position] ^ (1 << rng.randrange(8))]) + weights[
            position + 1 :
        ]
    header, body = header_of(weights)
    name = rng.choice([key for key in header if key != "__metadata__"])
    if kind == 5:
        header[rng.choice(["extra", "../../etc/passwd", "__class__", "encoder.0.weight.x"])] = header.pop(name)
    elif kind == 6:
        header[name] = {**header[name], "shape": [rng.choice([10**9, 2**40, 1, 7])] * rng.randrange(1, 4)}
    elif kind == 7:
        header[name] = {**header[name], "data_offsets": [rng.randrange(2**40), rng.randrange(2**40)]}
    else:
        del header[name]
    weights = with_header(header, body) + (b"" if rng.random() < 0.7 else rng.randbytes(40))
    if rng.random() < 0.8:
        fields = json.loads(config)
        fields["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        config = signed(fields)
    return config, weights


def test_mutated_folders_are_refused(folder: Path) -> None:
    config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    state = gm.load(folder).state_dict()
    rng = random.Random(0)
    refused = 0
    for _ in range(MUTATIONS):
        damaged = mutate(rng, config, weights)
        for name, content in zip(("config.json", "model.safetensors"), damaged, strict=True):
            (folder / name).write_bytes(content)
        try:
            model = GenerativeModel.from_pretrained(folder)
        except WeightsError as error:
            refused += str(folder) in str(error)
        else:  # white space in the config is no damage; anything else must not have come through
            assert json.loads(damaged[0]) == json.loads(config)
            assert damaged[1] == weights
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert refused >= 0.99 * MUTATIONS
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("made", ["Bernoulli((1, 4, 4))", "NADE((1, 4, 4), 5)", "VAE((1, 4, 4), (5,), 2)", "GAN()"])
def test_the_lines_on_a_card_run(made: str) -> None:
    code = usage(getattr(gm, made.partition("(")[0]), f"gm.{made}")
    found: dict[str, Any] = {}
    with warnings.catch_warnings(action="error"):
        exec(code.removeprefix("```python\n").removesuffix("```"), found)
    images = found["images"]
    assert ("completed" in found) == isinstance(found["model"], gm.CompletionModel)
    if "completed" in found:
        assert torch.equal(found["completed"][:, :, :2], images[:, :, :2])
    for name in {"log_prob", "bound", "codes", "completed"} & set(found):
        assert len(found[name]) == len(images) == 64
