"""Learning curves: from the CSV files that every run writes, or from the file that a weight keeps of its run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_genmodels.errors import FileError, OptionError
from lightning_genmodels.system import atomic_file

MINUTES = "train/cpu_minutes"
CURVES = "curves.json"

Curve = list[tuple[int, float]]
"""Optimizer steps and values."""


def read_curves(run: Path) -> dict[str, Curve]:
    """The losses and validation figures of a run, by name; those of a resumed run are joined.

    Args:
        run: The run's folder, ``--trainer.default_root_dir`` of its training; or a file of :func:`write_curves`.

    Raises:
        FileError: It holds no logs of a run, or the file cannot be read.
    """
    if run.name == CURVES:
        try:
            kept = json.loads(run.read_bytes())
            return {name: [(int(step), float(value)) for step, value in curve] for name, curve in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FileError(f"cannot read learning curves from {run}: {error}; write them anew from a run") from error
    files = sorted(
        run.glob("logs/version_*/metrics.csv"), key=lambda file: int(file.parent.name.removeprefix("version_"))
    )
    curves: dict[str, dict[int, float]] = {}
    for file in files:
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                for name, text in row.items():
                    is_figure = name in ("train/loss", MINUTES) or name.startswith("val/")
                    if text and is_figure and not name.endswith("_stderr"):
                        curves.setdefault(name, {})[int(row["step"])] = float(text)
    if not curves:
        raise FileError(f"{run} holds no logs of a run (logs/version_*/metrics.csv); name the folder of a training run")
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def write_curves(run: Path, folder: Path, points: int = 200) -> None:
    """Keeps the validation figures of a run, and its CPU time, in a file of their own, ``curves.json``.

    Args:
        run: The run's folder.
        folder: Where to write the file.
        points: Of a figure, at most as many are kept, evenly.

    Raises:
        FileError: The run's folder holds no logs of a run.
    """
    curves = {name: curve for name, curve in read_curves(run).items() if name == MINUTES or name.startswith("val/")}
    kept = {
        name: [(step, round(value, 3)) for step, value in curve[:: math.ceil(len(curve) / points)]]
        for name, curve in curves.items()
    }
    with atomic_file(folder / CURVES) as file:
        file.write(json.dumps(kept).encode() + b"\n")


def draw_curves(runs: Mapping[str, Mapping[str, Curve]], file: Path, over_minutes: bool = False) -> None:
    """Draws a panel for each figure, with a line for each run that has it; the lowest value is named in the legend.

    Args:
        runs: What :func:`read_curves` read, by a label.
        file: The PNG file to write.
        over_minutes: Over minutes of CPU time in the first process, and not over optimizer steps.

    Raises:
        OptionError: matplotlib is not installed, or a run did not note its CPU time.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("plots need matplotlib: pip install 'lightning-genmodels[plots]'") from error
    for label, curves in runs.items():
        if over_minutes and MINUTES not in curves:
            raise OptionError(f"{label} did not note its CPU time; leave out --over_minutes")
    names = sorted(
        {name for curves in runs.values() for name in curves} - {MINUTES}, key=lambda name: (name != "train/loss", name)
    )
    figure = Figure(figsize=(5.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for label, curves in runs.items():
            if name in curves:
                steps, values = zip(*curves[name], strict=True)
                noted = dict(curves.get(MINUTES, []))
                axes.plot(
                    np.interp(steps, list(noted), list(noted.values())) if over_minutes else steps,
                    values,
                    label=f"{label}: {min(values):.2f}",
                    marker="." if len(steps) == 1 else None,
                )
        axes.set(
            xlabel="minutes of CPU time" if over_minutes else "optimizer steps", ylabel="nats per image", title=name
        )
        axes.set_ylim(*_range([value for curves in runs.values() for _, value in curves.get(name, [])]))
        axes.legend(title="lowest")
    figure.savefig(file, dpi=120, format="png")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that leave out what an untrained model has: the highest tenth."""
    finite = sorted(value for value in values if math.isfinite(value)) or [0.0]
    low, high = finite[0], finite[math.ceil(0.9 * len(finite)) - 1]
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
