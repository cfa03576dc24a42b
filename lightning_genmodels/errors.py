"""The errors that a user can mend. Each message says what was expected, what came, and the way out.

The command line prints them as one line; any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class GenmodelsError(Exception):
    """Base of all of them."""


class OptionError(GenmodelsError, ValueError):
    """An option with a value that it cannot have."""


class ImageError(GenmodelsError, ValueError):
    """Images of a wrong shape or with pixels other than 0 and 1, or a file that holds none."""


class DataError(GenmodelsError, RuntimeError):
    """Data that are missing, cannot be fetched, or are not what they should be."""


class WeightsError(GenmodelsError, RuntimeError):
    """Weights that are missing, damaged, or not what they should be."""


class FileError(GenmodelsError, OSError):
    """A file that cannot be written."""


class DivergenceError(GenmodelsError, ArithmeticError):
    """A loss, a figure or weights that are not finite."""


class ModelError(GenmodelsError, ImportError):
    """A model of another package that cannot be imported."""


class UnknownNameError(GenmodelsError, LookupError):
    """A name that names nothing; the message lists what there is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}there are: {', '.join(known) or 'none'}")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def at_least(least: float, **values: Any) -> None:
    """Makes sure that numbers, or all numbers of a list, are at least so large.

    Args:
        least: The bound; a whole number asks for whole numbers.
        values: By the names that the message gives them; None is left out.

    Raises:
        OptionError: Names the first that is not, with what was expected and what came.

    Example:
        >>> at_least(1, hidden_size=500, kernel_sizes=(7, 3))
    """
    kind, what = (Integral, "a whole number") if isinstance(least, int) else (Real, "a number")
    for name, value in values.items():
        if not all(
            isinstance(item, kind) and not isinstance(item, bool) and float(item) >= least for item in _items(value)
        ):
            raise OptionError(f"expected {name} to be {what} of at least {least:g}, got {value!r}")


def within(low: float, high: float, **values: Any) -> None:
    """Makes sure that numbers, or all numbers of a list, are at least ``low`` and below ``high``.

    Raises:
        OptionError: As :func:`at_least`.
    """
    for name, value in values.items():
        if not all(isinstance(item, Real) and low <= float(item) < high for item in _items(value)):
            raise OptionError(f"expected {name} to be from {low:g} to below {high:g}, got {value!r}")


def _items(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None else [value]
