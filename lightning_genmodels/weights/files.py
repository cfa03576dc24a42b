"""Reading and writing trained weights: safetensors plus a JSON config, never a pickle.

A folder of weights, a repository on the Hub and a weight inside the package have one layout:

- ``model.safetensors``: the state of the model.
- ``config.json``: the model's registered name, its constructor's arguments, and checksums of both files.

Loading is strict. The config is checked first, then names and shapes of the tensors against a model that takes no
memory (on PyTorch's meta device), and only then is anything allocated: a damaged or hostile file is refused with one
:class:`WeightsError`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import pickle
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from lightning import LightningModule
from torch import Tensor

from lightning_genmodels.errors import UnknownNameError, WeightsError, first_line
from lightning_genmodels.system import write_atomically
from lightning_genmodels.weights.lookup import CONFIG, WEIGHTS, Source, resolve
from lightning_genmodels.weights.names import model_class, model_name

M = TypeVar("M", bound=LightningModule)

FORMAT = 1
CHECKPOINT_KEY = "lightning_genmodels"

_TRAINING_ONLY = ("init_from",)
_CONFIG_KEY, _DIGEST_KEY = "config", "sha256"  # in the header of the safetensors file
_MAX_CONFIG_BYTES = 1 << 20
# Bounds of what a stranger's file may ask for: more than any model of binary images has.
_MAX_BYTES = 1 << 30
_MAX_HEADER_BYTES = 1 << 22
_MAX_TENSORS = 10_000
_MAX_PIXELS = 4096
_MAX_STEPS = 2**63
_LEAST_BOUND = 1024  # of a number, however small the tensors are
_SMALL_BYTES = 1 << 26  # of a file whose checksum is taken even where its header makes no sense
_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


# Writing.


def describe(model: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Notes the model's registered name in a Lightning checkpoint, if it has one."""
    try:
        checkpoint[CHECKPOINT_KEY] = {"model": model_name(type(model))}
    except UnknownNameError:
        checkpoint[CHECKPOINT_KEY] = {"model": None}


def write(model: LightningModule, folder: Path, *, half: bool = False) -> None:
    """Writes ``config.json`` and ``model.safetensors``; see :meth:`GenerativeModel.save_pretrained`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    config: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name(type(model)),
        "hyper_parameters": {k: v for k, v in model.hparams.items() if k not in _TRAINING_ONLY},
    }
    # A folder is replaced file by file: in between, the config of the new weights is found in their header.
    text = json.dumps(config)
    content = safetensors.torch.save(state, metadata=_header(text, state))
    config["weights_sha256"] = hashlib.sha256(content).hexdigest()
    config["config_sha256"] = _digest(config)
    _check_finite(str(folder), state, "nothing is written; train again, with a lower learning rate")
    write_atomically(folder / WEIGHTS, content)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def push(model: LightningModule, repo_id: str, *, private: bool, token: str | None) -> str:
    """Uploads the two files in one commit; see :meth:`GenerativeModel.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(model, Path(folder))
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model")
        except Exception as error:  # whatever the client and its HTTP library raise, the names of which change
            raise WeightsError(f"uploading to {repo_id} failed: {upload_advice(error, repo_id)}") from error
    return str(address)


def upload_advice(error: Exception, repo: str) -> str:
    """What to do about an upload that the Hub refused."""
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if status == 401:
        return "the Hub asks for a valid token (401); run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo} (403); choose another namespace, or a token with write access"
    return f"{first_line(error)}; run it again: what was uploaded stays, and it goes on from there"


# Reading.


def read(name: str | Path, expected: type[M], *, revision: str | None = None, **overrides: Any) -> M:
    """Loads a model in evaluation mode.

    Args:
        name: A folder of weights, a Lightning checkpoint (``.ckpt``), a weight's or model's name, or ``owner/repo``.
        expected: The class that the model must be, or be derived from.
        revision: Branch, tag or commit, for a repository.
        overrides: Hyper-parameters that the weights must have been trained with.

    Raises:
        WeightsError: Nothing is there, it is damaged, it is another kind of model, or an override contradicts it.
        UnknownNameError: A name that names nothing.
    """
    source = resolve(name, revision=revision)
    path = source.path
    cls, hyper_parameters, state = _open(source)
    if not issubclass(cls, expected):
        raise WeightsError(f"{path} holds a {cls.__name__}, not a {expected.__name__}; load it with {cls.__name__}")
    _check_overrides(path, cls, hyper_parameters, overrides)
    _check_finite(str(path), state, "take weights of a run that did not diverge")
    model = _build(path, cls, hyper_parameters)
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_into(model: LightningModule, name: str | Path) -> None:
    """Copies trained weights into a model that exists, for a warm start.

    Raises:
        WeightsError: As in :func:`read`, or the weights are of another class or other shapes.
    """
    source = resolve(name)
    path = source.path
    cls, _, state = _open(source)
    if not isinstance(model, cls):
        raise WeightsError(f"init_from: {path} holds a {cls.__name__}, which cannot start a {type(model).__name__}")
    way_out = "train a model of the options that these weights were trained with"
    _compare(f"init_from: {path}", _shapes(model.state_dict()), _shapes(state), way_out)
    _check_finite(f"init_from: {path}", state, "take weights of a run that did not diverge")
    model.load_state_dict(state, strict=True)


def check_whole(path: Path) -> None:
    """Makes sure that a Lightning checkpoint, which is a zip file, holds what was written: by its own checksums.

    Raises:
        WeightsError: It does not, or cannot be read.
    """
    if not _is_file(path):
        raise WeightsError(f"no checkpoint at {path}: it is no regular file")
    try:
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise ValueError("compressed, as no checkpoint is")
            damaged = file.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError, zlib.error) as error:  # encrypted, too
        raise WeightsError(
            f"{path} is no checkpoint of this package, or it is damaged ({first_line(error)})"
        ) from error
    if damaged is not None:
        raise WeightsError(f"{path} is damaged: the checksum of {damaged!r} in it does not hold")


def check_checkpoint(path: Path, model: LightningModule) -> dict[str, Any]:
    """Makes sure that a Lightning checkpoint can be loaded into a model, and returns the arguments it was trained with.

    Raises:
        WeightsError: There is none, it is damaged, or of another model.
    """
    if not path.is_file():
        raise WeightsError(f"no checkpoint at {path}; give --ckpt_path a file, or last, best or auto")
    cls, hyper_parameters, state = _open_checkpoint(path)
    if cls is not type(model):
        raise WeightsError(f"{path} holds a {cls.__name__}, not a {type(model).__name__}; name its model with --model")
    way_out = "give the recipe that this checkpoint was trained with"
    _compare(str(path), _shapes(model.state_dict()), _shapes(state), way_out)
    return hyper_parameters


def _open(source: Source) -> tuple[type[LightningModule], dict[str, Any], dict[str, torch.Tensor]]:
    if source.path.is_file():
        return _open_checkpoint(source.path)
    return _open_folder(source)


def _open_folder(source: Source) -> tuple[type[LightningModule], dict[str, Any], dict[str, torch.Tensor]]:
    folder = source.path
    file = folder / WEIGHTS
    config = _read_config(folder / CONFIG, source.config_sha256)
    cls = _class(folder, config["model"])
    misfit: WeightsError | None = None
    try:
        shapes, inner = _read_header(file)
        try:
            _check_fit(folder, cls, config["hyper_parameters"], shapes)
        except WeightsError as error:
            if inner is None:
                raise
            misfit = error  # unless the config is that of other weights, which these have just replaced
            _check_fit(folder, _class(folder, inner["model"]), inner["hyper_parameters"], shapes)
    except WeightsError:
        if _is_file(file) and file.stat().st_size < _SMALL_BYTES:
            _check_sha256(file, hashlib.sha256(file.read_bytes()).hexdigest(), config["weights_sha256"])
        raise
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if source.sha256 is not None:
        _check_sha256(file, found, source.sha256)
    if found != config["weights_sha256"]:
        replaced = None if source.config_sha256 else _config_in_header(content)
        if replaced is None:
            _check_sha256(file, found, config["weights_sha256"])
        else:
            config, cls = replaced, _class(folder, replaced["model"])
    elif misfit is not None:
        raise misfit
    try:
        return cls, config["hyper_parameters"], safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{file} is no safetensors file: {error}") from error


def _check_sha256(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise WeightsError(f"{file} is damaged: expected sha256 {expected}, found {found}; get the file again")


def _is_file(path: Path) -> bool:
    """Whether a path is a regular file: no pipe or device, which might never end."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any] | None]:
    """Names and shapes of the tensors in a safetensors file, and the config in its header if there is one, of which
    nothing is believed yet. The tensors are not read.

    Raises:
        WeightsError: It is no such file, or larger than weights may be.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror or error}") from error
    if not _is_file(file) or size > _MAX_BYTES:
        raise WeightsError(f"{file} is no regular file of at most {_MAX_BYTES >> 20} MiB, which weights are")
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        shapes, end = {}, 0
        for name, entry in header.items():
            shape, width = tuple(entry["shape"]), _WIDTHS[entry["dtype"]]
            if any(type(side) is not int or side < 0 for side in shape):
                raise ValueError(f"{name!r} of shape {shape}")
            shapes[name], end = shape, end + width * math.prod(shape)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, of which the header explains {8 + length + end}")
        inner = json.loads(metadata[_CONFIG_KEY]) if _CONFIG_KEY in metadata else None
        if inner is not None and not (isinstance(inner["model"], str) and isinstance(inner["hyper_parameters"], dict)):
            raise ValueError("a config that is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{file} is no safetensors file: {type(error).__name__}: {error}") from error
    return shapes, inner


def _check_fit(
    source: Path, cls: type[LightningModule], hyper_parameters: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Makes sure that a model of these hyper-parameters has tensors of these shapes, without allocating one.

    Numbers are bounded first: by what a model of images of up to ``_MAX_PIXELS`` pixels may have, and by the tensors.

    Raises:
        WeightsError: It has not, or a number is out of bounds.
    """
    if len(shapes) > _MAX_TENSORS:
        raise WeightsError(f"{source}: {len(shapes)} tensors, where a model has at most {_MAX_TENSORS}")
    longest = max([_LEAST_BOUND, *(side for shape in shapes.values() for side in shape)])
    for key, value in hyper_parameters.items():
        bound = _MAX_STEPS if key.endswith(("_steps", "_seed", "_particles")) or key == "num_particles" else longest
        bound = min(bound, _LEAST_BOUND + len(shapes)) if key in ("num_layers", "layers", "encoder_blocks") else bound
        for number in _numbers(value):
            if abs(number) > bound:
                raise WeightsError(
                    f"{source}: {key}={number:g} is out of bounds: beside tensors like these it is at most {bound}"
                )
    event_shape = hyper_parameters.get("event_shape", ())
    if isinstance(event_shape, list | tuple) and math.prod([*_numbers(event_shape)]) > _MAX_PIXELS:
        raise WeightsError(f"{source}: event_shape={event_shape} has more than {_MAX_PIXELS} pixels")
    _check_shapes(source, cls, hyper_parameters, shapes)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value; of a list, its length, too."""
    if isinstance(value, list | tuple):
        yield len(value)
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _config_in_header(content: bytes) -> dict[str, Any] | None:
    """The config in the header of a safetensors file, if it is what would be written with its tensors."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        text, state = header[_CONFIG_KEY], safetensors.torch.load(content)
        config = json.loads(text)
        if header != _header(text, state) or config["format"] != FORMAT:
            return None
        return {"model": str(config["model"]), "hyper_parameters": dict(config["hyper_parameters"])}
    except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
        return None


def _header(config: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """A config, and the SHA-256 of it and of all tensors with their names, types and shapes."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {"format": "pt", _CONFIG_KEY: config, _DIGEST_KEY: digest.hexdigest()}


def _open_checkpoint(path: Path) -> tuple[type[LightningModule], dict[str, Any], dict[str, torch.Tensor]]:
    check_whole(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        name = checkpoint[CHECKPOINT_KEY]["model"]
        hyper_parameters, state = dict(checkpoint["hyper_parameters"]), checkpoint["state_dict"]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"{path} is no checkpoint of this package, or it is damaged ({type(error).__name__}: {error})"
        ) from error
    for key in _TRAINING_ONLY:
        hyper_parameters.pop(key, None)
    cls = _class(path, name)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{path} is no checkpoint of this package, or it is damaged: its state holds no tensors")
    _check_fit(path, cls, hyper_parameters, _shapes(state))
    return cls, hyper_parameters, state


def _read_config(file: Path, sha256: str | None = None) -> dict[str, Any]:
    try:
        if file.exists() and not _is_file(file):
            raise WeightsError(f"cannot read {file}: it is no regular file")
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise WeightsError(f"{file} has {file.stat().st_size} bytes, a config has at most {_MAX_CONFIG_BYTES}")
        content = file.read_bytes()
        if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise WeightsError(
                f"{file} is not the published one: expected sha256 {sha256}, found {found}; get it again"
            )
        config = json.loads(content)
    except OSError as error:
        raise WeightsError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is no JSON: {error}") from error
    kinds = {"format": int, "model": str, "hyper_parameters": dict, "weights_sha256": str, "config_sha256": str}
    if not isinstance(config, dict) or set(config) != set(kinds):
        raise WeightsError(f"{file} should have exactly the keys {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(config[key]) is not kind:
            raise WeightsError(f"{file}: {key!r} should be a {kind.__name__}, got {config[key]!r}")
    if config["format"] != FORMAT:
        raise WeightsError(f"{file} has format {config['format']}, this version reads {FORMAT}; upgrade the package")
    if set(_TRAINING_ONLY) & set(config["hyper_parameters"]):
        raise WeightsError(f"{file} has hyper-parameters that weights cannot have: {', '.join(_TRAINING_ONLY)}")
    digest = config.pop("config_sha256")
    if digest != _digest(config):
        raise WeightsError(f"{file} is damaged: expected sha256 {digest}, found {_digest(config)}; get the file again")
    return config


def _digest(config: dict[str, Any]) -> str:
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _class(source: Path, name: Any) -> type[LightningModule]:
    if not isinstance(name, str):
        raise WeightsError(f"{source} names no registered model")
    try:
        return model_class(name)
    except UnknownNameError as error:
        raise WeightsError(f"{source} names no registered model: {error}") from error


def _check_finite(source: str, state: Mapping[str, Tensor], way_out: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise WeightsError(f"{source}: {count} of {tensor.numel()} numbers of {name!r} are not finite; {way_out}")


def _check_overrides(source: Path, cls: type, hyper_parameters: dict[str, Any], overrides: dict[str, Any]) -> None:
    for key, value in overrides.items():
        if key not in hyper_parameters:
            raise WeightsError(f"{cls.__name__} has no hyper-parameter {key!r}; it has {', '.join(hyper_parameters)}")
        if _plain(value) != _plain(hyper_parameters[key]):
            raise WeightsError(
                f"{key}={value!r} contradicts the weights at {source}, trained with {key}={hyper_parameters[key]!r}; "
                "leave it out, or take pretrained=False"
            )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_shapes(source: Path, cls: type, hyper_parameters: dict[str, Any], found: dict[str, tuple[int, ...]]) -> None:
    with torch.device("meta"):
        skeleton: LightningModule = _build(source, cls, hyper_parameters)
    _compare(str(source), _shapes(skeleton.state_dict()), found, "export it again")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _compare(
    source: str, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], way_out: str
) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise WeightsError(
            f"{source}: missing tensors {missing or 'none'}, unexpected tensors {unexpected or 'none'}; {way_out}"
        )
    for key, shape in expected.items():
        if shape != found[key]:
            raise WeightsError(f"{source}: tensor {key!r} should have shape {shape}, has {found[key]}; {way_out}")


def _build(source: Path, cls: type[M], hyper_parameters: dict[str, Any]) -> M:
    try:
        inspect.signature(cls).bind(**hyper_parameters)
        model = cls(**hyper_parameters)
    except (TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise WeightsError(f"{source}: {cls.__name__} cannot be built from its config: {error}") from error
    return model
