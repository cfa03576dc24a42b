"""Data files: local paths, downloads and parsing.

Local files come first, plain or gzip-compressed. What is missing is downloaded to a temporary name, checked against a
checksum of the *uncompressed* bytes, and renamed: a file that has its final name is complete.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightning_genmodels.errors import DataError

ROOT_VARIABLE = "LIGHTNING_GENMODELS_DATA"
"""Environment variable that names the data folder where no ``root`` is given."""

_SLACK = 1 << 16  # bytes by which a compressed file may be larger than what is in it

WAY_OUT = "or train without MNIST: --data.source digits"


@dataclass(frozen=True)
class DataFile:
    """One public file.

    Attributes:
        path: Where it lies below the root folder, without ``.gz``.
        sha256: Checksum of the uncompressed bytes.
        size: Number of the uncompressed bytes; no more are read or downloaded.
        mirrors: Folders it can be downloaded from, in the order they are tried.
        suffix: What a mirror appends to the file's name: ".gz" or "".
    """

    path: str
    sha256: str
    size: int
    mirrors: tuple[str, ...]
    suffix: str


_MNIST = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_LAROCHELLE = "www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_BINARIZED = (
    "http://" + _LAROCHELLE,
    "https://" + _LAROCHELLE,
    "https://web.archive.org/web/2020id_/http://" + _LAROCHELLE,
)


def _mnist(name: str, size: int, sha256: str) -> DataFile:
    return DataFile(f"mnist/{name}-ubyte", sha256, size, _MNIST, ".gz")


def _binarized(split: str, images: int, sha256: str) -> DataFile:
    return DataFile(f"binarized_mnist/binarized_mnist_{split}.amat", sha256, 2 * 784 * images, _BINARIZED, "")


GREY_FILES = {
    "train_images": _mnist(
        "train-images-idx3", 16 + 784 * 60_000, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train_labels": _mnist(
        "train-labels-idx1", 8 + 60_000, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "test_images": _mnist(
        "t10k-images-idx3", 16 + 784 * 10_000, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "test_labels": _mnist(
        "t10k-labels-idx1", 8 + 10_000, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
"""Grey MNIST (LeCun, Cortes and Burges), IDX files."""

STATIC_FILES = {
    "train": _binarized("train", 50_000, "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
    "val": _binarized("valid", 10_000, "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
    "test": _binarized("test", 10_000, "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
}
"""The fixed binarization of Salakhutdinov and Murray (2008), in the files of Larochelle."""


def default_root() -> Path:
    """The folder of ``$LIGHTNING_GENMODELS_DATA``, else one in the user's cache."""
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "lightning_genmodels" / "data"


def find(root: Path, file: DataFile) -> Path | None:
    """The local path of a file, plain or .gz, or None."""
    for path in (root / file.path, root / f"{file.path}.gz"):
        if path.is_file():
            return path
    return None


def fetch(root: Path, file: DataFile, timeout: float = 30.0, limit: float = 900.0) -> Path:
    """Returns the local path of a file, downloading it first if it is missing or damaged.

    Args:
        root: The data folder.
        file: What to find or fetch.
        timeout: Seconds without an answer after which the next mirror is tried.
        limit: Seconds that one mirror may take in all.

    Raises:
        DataError: The folder cannot be written, no mirror answered, or none had a file with the right checksum.
    """
    found = find(root, file)
    failures: list[str] = []
    if found is not None:
        try:
            _read_checked(found, file, compressed=found.suffix == ".gz")
        except DataError as error:
            failures.append(f"  {error}")
        else:
            return found
    target = root / (file.path + file.suffix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(descriptor)
    except OSError as error:
        raise DataError(
            f"cannot write to the data folder {root} ({error.strerror or error}); "
            f"choose another with --data.root or ${ROOT_VARIABLE}, {WAY_OUT}"
        ) from error
    temporary = Path(name)
    try:
        for mirror in file.mirrors:
            address = mirror + target.name
            try:
                with urllib.request.urlopen(address, timeout=timeout) as response, temporary.open("wb") as out:
                    _copy(response, out, file.size + _SLACK, limit)
                _read_checked(temporary, file, compressed=target.suffix == ".gz")
            except (OSError, http.client.HTTPException, DataError) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                failures.append(f"  {address}: {reason}")
                continue
            temporary.chmod(0o644)
            os.replace(temporary, target)
            if found is not None and found != target:
                found.unlink(missing_ok=True)  # damaged, and would be found first
            return target
    finally:
        temporary.unlink(missing_ok=True)
    raise DataError(
        f"{file.path} (or {file.path}.gz) is not whole in the data folder {root}, and could not be downloaded:\n"
        + "\n".join(failures)
        + f"\nPut the file there by hand, name another folder with --data.root or ${ROOT_VARIABLE}, {WAY_OUT}"
    )


def read(root: Path, file: DataFile) -> bytes:
    """The uncompressed bytes of a file that lies below ``root``.

    Raises:
        DataError: The file is missing, cannot be decompressed, or has another checksum than the public one.
    """
    path = find(root, file)
    if path is None:
        raise DataError(
            f"{file.path} (or {file.path}.gz) is not in the data folder {root}; "
            f"call prepare_data() to download it, name another folder with --data.root or ${ROOT_VARIABLE}, {WAY_OUT}"
        )
    return _read_checked(path, file, compressed=path.suffix == ".gz")


def _read_checked(path: Path, file: DataFile, *, compressed: bool) -> bytes:
    try:
        with gzip.open(path) if compressed else path.open("rb") as stream:
            content = stream.read(file.size + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no complete gzip file ({error}); delete it to have it downloaded again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} is corrupt: expected sha256 {file.sha256} of the uncompressed bytes, found {found}; "
            "delete it to have it downloaded again"
        )
    return content


def _copy(source: BinaryIO, target: BinaryIO, size: int, seconds: float) -> None:
    """Copies a download, within bounds of size and time."""
    start, copied = time.monotonic(), 0
    while chunk := source.read1(1 << 16):  # type: ignore[attr-defined]
        copied += len(chunk)
        if copied > size:
            raise DataError(f"more than the {size:,} bytes that the file can have")
        if time.monotonic() - start > seconds:
            raise DataError(f"not complete after {seconds:g} seconds")
        target.write(chunk)


def read_idx(content: bytes) -> Tensor:
    """Parses an IDX file of unsigned bytes: (N, 1, H, W) for images, (N,) for labels."""
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    array = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape([int(size) for size in shape])
    tensor = torch.from_numpy(array.copy())
    return tensor.unsqueeze(1) if dimensions == 3 else tensor


def read_amat(content: bytes) -> Tensor:
    """Parses lines of 784 characters 0 or 1, each followed by one space or line end: (N, 1, 28, 28) uint8."""
    digits = np.frombuffer(content, dtype=np.uint8)[::2] - ord("0")
    return torch.from_numpy(digits.reshape(-1, 1, 28, 28).copy())


def load_digits() -> tuple[Tensor, Tensor]:
    """The handwritten digits that scikit-learn embeds: 1,797 grey images, enlarged from 8x8 to 28x28, and their labels.

    Returns:
        (1797, 1, 28, 28) uint8 grey images in 0..255 and (1797,) uint8 labels.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError(
            "the source 'digits' needs scikit-learn; install it with: pip install 'lightning-genmodels[digits]'"
        ) from error
    bunch = load()
    small = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)).unsqueeze(1) / 16.0
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bicubic", align_corners=False)
    grey = (large.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return grey, torch.from_numpy(np.asarray(bunch.target, dtype=np.uint8))
