"""Errors that a user can fix. Each message says what was expected, what was given, and what to do.

The command line prints them as one line; any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union


class GenmodelsError(Exception):
    """Base of all of them."""


class OptionError(GenmodelsError, ValueError):
    """An option with an invalid value."""


class ImageError(GenmodelsError, ValueError):
    """Images of a wrong shape or with pixels other than 0 and 1, or a file without images."""


class DataError(GenmodelsError, RuntimeError):
    """Data that are missing, cannot be downloaded, or fail their checksum."""


class WeightsError(GenmodelsError, RuntimeError):
    """Weights that are missing, damaged, or of another model."""


class FileError(GenmodelsError, OSError):
    """A file that cannot be written."""


class DivergenceError(GenmodelsError, ArithmeticError):
    """A loss, a figure or weights that are not finite."""


class ModelError(GenmodelsError, ImportError):
    """A model of another package that cannot be imported."""


class UnknownNameError(GenmodelsError, LookupError):
    """An unknown name; the message lists the known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}; {hint}there are: {', '.join(known) or 'none'}")


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_arguments(values: Mapping[str, Any], *functions: Callable[..., Any]) -> None:
    """Makes sure that arguments have the types that functions are annotated with.

    Args:
        values: By the names of the arguments; one without an annotation is not checked.
        functions: Where the annotations are looked up: the first that has one counts.

    Raises:
        OptionError: Names the first that has not, with what was expected and what came.

    Example:
        >>> def resize(size: int, mode: Literal["area", "nearest"] = "area") -> None: ...
        >>> check_arguments({"size": 2.5}, resize)
        Traceback (most recent call last):
        lightning_genmodels.errors.OptionError: expected size to be a whole number, got 2.5
    """
    hints = ChainMap(*map(_hints, functions))
    for name, value in values.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            raise OptionError(f"expected {name} to be {_described(hint)}, got {value!r}")


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by argument, those of ``**options: Unpack[...]`` among them."""
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # imported for type checkers alone
        return {}
    for hint in list(hints.values()):
        if typing.get_origin(hint) is typing.Unpack:
            hints.update(typing.get_type_hints(typing.get_args(hint)[0]))
    return hints


_NUMBERS: dict[Any, tuple[type, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint][0]) and not isinstance(value, bool)
    if origin in (Sequence, list, tuple):
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return False
        if origin is tuple and parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(item, parts[0]) for item in value)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _described(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin in (Sequence, list, tuple):
        count = f"{len(parts)} values" if origin is tuple and parts[-1] is not Ellipsis else "values"
        return f"a list of {count}, each {_described(parts[0])}"
    known = {str: "text", bool: "True or False", type(None): "None", Path: "a path"}
    return _NUMBERS[hint][1] if hint in _NUMBERS else known.get(hint, getattr(hint, "__name__", str(hint)))


def at_least(least: float, **values: Any) -> None:
    """Makes sure that numbers, or all numbers of a list, are at least so large.

    Args:
        least: The bound; a whole number asks for whole numbers.
        values: By the names that the message gives them.

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
    return list(value) if isinstance(value, list | tuple) else [value]
