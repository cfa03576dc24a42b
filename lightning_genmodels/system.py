"""System helpers: atomic file writes, memory, process groups, progress bars."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from lightning_genmodels.errors import FileError

T = TypeVar("T")

_is_shown: ContextVar[bool] = ContextVar("progress", default=False)
_report: ContextVar[Callable[[float], None] | None] = ContextVar("report", default=None)


@contextmanager
def shown(enabled: bool = True) -> Iterator[None]:
    """Within it, :func:`tracked` shows a bar on standard error, if that is a terminal."""
    token = _is_shown.set(enabled and sys.stderr.isatty())
    try:
        yield
    finally:
        _is_shown.reset(token)


@contextmanager
def reported(report: Callable[[float], None]) -> Iterator[None]:
    """Within it, :func:`tracked` calls a function before each step with the share that is done; what the function
    raises ends the steps.
    """
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


def _reporting(steps: Iterable[T], total: int, report: Callable[[float], None]) -> Iterator[T]:
    for index, step in enumerate(steps):
        report(index / total)
        yield step


def tracked(steps: Iterable[T], total: int, what: str, unit: str) -> Iterable[T]:
    """The same steps, with a progress bar, or reports, where they are wanted.

    Args:
        steps: What is iterated over.
        total: How many steps there are.
        what: Stands before the bar.
        unit: What is one step of them.
    """
    report = _report.get()
    if report is not None:
        return _reporting(steps, total, report)
    if not _is_shown.get():
        return steps
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(steps, desc=what, total=total, unit=f" {unit}", leave=False)
    return bar


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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD_MAX = 2**25  # bytes, where the library's own adaptation ends
_NEVER = 2**31 - 1


def reuse_freed_memory() -> bool:
    """Asks the C library to keep what is freed, for the next tensors, instead of handing it back to the system.

    On the CPU every operation allocates the tensor that it returns, of megabytes for a batch of images. The GNU C
    library hands back what is freed at the end of its heap, so that the system maps and clears the same pages again
    and again. With this, a process holds on to the memory that it had, but for blocks of more than 32 MiB. It lasts
    as long as the process does, and changes nothing about results. The command ``genmodels`` and the recipes call it;
    call it once in a program of your own that trains or scores on the CPU.

    Returns:
        Whether the C library took it; False where that is another one (macOS, Windows, musl).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


MatmulPrecision = Literal["highest", "high", "medium"]


def set_matmul_precision(precision: MatmulPrecision = "highest") -> None:
    """Sets how precise products of float32 matrices are, and convolutions with them.

    PyTorch leaves TF32, of 10 bits, on for convolutions on GPUs, and off for matrices. The command ``genmodels`` turns
    it off for both, so that a figure in ``32-true`` is one in float32.

    Args:
        precision: As ``torch.set_float32_matmul_precision`` takes it; ``high`` and ``medium`` allow TF32 to both.
    """
    import torch

    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


def leave_group_at_exit() -> None:
    """Has this process leave its group before the interpreter ends, if it belongs to one; call it as often as you like.

    Lightning does it for the backend nccl alone. The threads of gloo, the CPU's, hold tensors for a moment after a
    collective operation; one that lets go of them while the interpreter is ending aborts the process, so that now and
    then a run that succeeded has an exit status that says it did not.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
