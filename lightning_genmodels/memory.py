"""How this process keeps its memory."""

from __future__ import annotations

import ctypes
import platform

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
