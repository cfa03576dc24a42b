"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lightning_genmodels.errors import FileError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` once it is written, and is on the disk; its folder is made if needed.

    It lies beside ``path`` until then, so that nothing is copied from one file system to another. If anything fails,
    ``path`` is what it was before.

    Raises:
        FileError: The folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:  # less the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to, on a disk with room"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, making its folder if needed.

    Raises:
        FileError: The folder cannot be written.
    """
    with atomic_file(path) as file:
        file.write(content)


def check_output(path: Path, endings: Sequence[str], *inputs: Path) -> Path:
    """Makes sure that a command can write its output, before it does its work.

    Args:
        path: The file to be written: this very path.
        endings: Those that the output may have, such as ``.npy``.
        inputs: Files that the command reads.

    Returns:
        ``path``.

    Raises:
        FileError: Another ending, an input, a folder, or a folder that cannot be written.
    """
    if path.suffix not in endings:
        raise FileError(f"expected an output that ends in {' or '.join(endings)}, got {path}")
    if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
        raise FileError(f"{path} is the input of this command; give the output another name")
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; give the output another name")
    check_folder(path.parent)
    return path


def check_folder(path: Path) -> Path:
    """Makes sure that files can be written into a folder, which need not exist yet.

    Returns:
        ``path``.

    Raises:
        FileError: It, or the folder that it would be made in, is a file or cannot be written.
    """
    absolute = path.absolute()
    nearest = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise FileError(f"cannot write into {path}: {nearest} is no folder you may write to; choose another")
    return path


def _sync_folder(folder: Path) -> None:
    """Makes a rename last; where folders cannot be synchronized, as on Windows, it is left to the system."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
