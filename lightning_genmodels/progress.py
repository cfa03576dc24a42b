"""A progress bar for what takes long, which programs switch on: a library stays silent."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

_is_shown: ContextVar[bool] = ContextVar("progress", default=False)


@contextmanager
def shown(enabled: bool = True) -> Iterator[None]:
    """Within it, :func:`tracked` shows a bar on standard error, if that is a terminal."""
    token = _is_shown.set(enabled and sys.stderr.isatty())
    try:
        yield
    finally:
        _is_shown.reset(token)


def tracked(steps: Iterable[T], total: int, what: str, unit: str) -> Iterable[T]:
    """The same steps, with a progress bar where one is wanted.

    Args:
        steps: What is iterated over.
        total: How many steps there are.
        what: Stands before the bar.
        unit: What is one step of them.
    """
    if not _is_shown.get():
        return steps
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(steps, desc=what, total=total, unit=f" {unit}", leave=False)
    return bar
