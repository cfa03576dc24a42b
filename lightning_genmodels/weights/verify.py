"""Recomputing published figures from the weights they were published for."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.datamodule import Binarization, Source, Split
from lightning_genmodels.errors import WeightsError
from lightning_genmodels.evaluation.likelihood import figures_of, score
from lightning_genmodels.evaluation.report import METRICS, VALUES
from lightning_genmodels.weights.loading import load
from lightning_genmodels.weights.lookup import resolve

TOLERANCE = 0.01
"""Nats by which the value of an image may differ between machines, whose arithmetic rounds differently."""

_CHUNK = 20
_MAX_BYTES = 2**28  # of a report's file


@dataclass(frozen=True)
class Verification:
    """The result of verifying one figure.

    Attributes:
        figure: Its name, such as "nll" or "iw5000".
        num_images: How many images were recomputed.
        largest_difference: In nats, between a stored value and the recomputed one.
        reason: Why the figure does not agree; empty if it does.
    """

    figure: str
    num_images: int
    largest_difference: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the report agrees with itself, and with what was recomputed."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"{self.figure}: DOES NOT AGREE: {self.reason}"
        return f"{self.figure}: agrees on {self.num_images} images, to {self.largest_difference:.2g} nats"


@dataclass(frozen=True)
class _Report:
    """A report of valid structure, whose figures are yet to be verified."""

    source: Source
    binarization: Binarization
    image_size: int
    split: Split
    num_images: int
    seed: int
    figures: dict[str, tuple[float, float, int]]  # mean, standard error, particles
    values: dict[str, Tensor]  # (num_images,) each


def verify(
    name: str,
    root: str | None = None,
    *,
    full: bool = False,
    seconds: float = 60.0,
    batch: int = _CHUNK,
    seed: int | None = None,
) -> list[Verification]:
    """Loads a weight, scores the images its figures were measured on, and compares value by value.

    Args:
        name: A weight, a model, a folder or a repository; it must hold figures beside the weights.
        root: The data folder; see :class:`lightning_genmodels.data.BinarizedMNISTDataModule`.
        full: All images, however long it takes.
        seconds: Else: stop after so long for each figure (at least one batch is scored).
        batch: Images at a time.
        seed: Of the order in which images are recomputed; default: drawn anew, so that nobody knows which they will be.

    Raises:
        WeightsError: The weights are damaged, or have no figures; or the model has no likelihood.
        DataError: Data missing or corrupt.
    """
    folder = resolve(name, also=(METRICS, VALUES)).path
    report = _read(folder)
    model = load(name)
    if not report.figures:
        raise WeightsError(
            f"{name} has no likelihood, and so no values of images to compare; judge its samples anew with: "
            f"genmodels evaluate {name} --samples 10000"
        )
    data = BinarizedMNISTDataModule(
        root, source=report.source, binarization=report.binarization, image_size=report.image_size
    )
    data.prepare_data()
    keys = data.subset(report.split, report.num_images)
    if len(keys) != report.num_images:
        raise WeightsError(f"{folder}: a report of {report.num_images:,} images, of which there are {len(keys):,}")
    images = data.images(report.split)[keys].float()
    chooser = torch.Generator()
    chooser.manual_seed(chooser.seed() if seed is None else seed)
    order = torch.randperm(len(images), generator=chooser)
    found = []
    for name_, (mean, standard_error, particles) in report.figures.items():
        figure = next((known for known in figures_of(model, particles) if known.name == name_), None)
        if figure is None:
            raise WeightsError(f"{folder}: a {type(model).__name__} has no figure {name_!r}")
        values = report.values[name_].double()
        reason = _contradiction(values, mean, standard_error)
        start, difference, count = time.monotonic(), 0.0, 0
        while not reason and count < len(images) and (full or count == 0 or time.monotonic() - start < seconds):
            part = order[count : count + batch]
            recomputed = -score(model, images[part], keys[part].tolist(), figure, seed=report.seed)
            worst = (recomputed - values[part]).abs().max()
            difference = max(difference, float(torch.nan_to_num(worst, nan=float("inf"))))
            count += len(part)
        if difference > TOLERANCE:
            reason = f"stored and recomputed values differ by up to {difference:.2g} nats on {count} images"
        found.append(Verification(name_, count, difference, reason))
    return found


def _contradiction(values: Tensor, mean: float, standard_error: float) -> str:
    """How a report contradicts its own values; empty if it does not."""
    found = values.mean().item()
    if not abs(found - mean) < TOLERANCE:
        return f"the mean of the stored values is {found:.3f}, the report says {mean:.3f}"
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    if len(values) > 1 and not abs(error - standard_error) < TOLERANCE:
        return f"the standard error of the stored values is {error:.3f}, the report says {standard_error:.3f}"
    return ""


def _read(folder: Path) -> _Report:
    """Reads a report, and looks at everything in it before anything is believed.

    Raises:
        WeightsError: It is missing, or not what :meth:`lightning_genmodels.evaluation.run.Report.write` writes.
    """
    for file in (METRICS, VALUES):
        if not (folder / file).is_file():
            raise WeightsError(f"{folder} has no {file}: there is no figure to verify; run genmodels evaluate")
        if (folder / file).stat().st_size > _MAX_BYTES:
            raise WeightsError(f"{folder / file} has more than {_MAX_BYTES:,} bytes, which no report has")
    try:
        metrics = json.loads((folder / METRICS).read_bytes())
        values = safetensors.torch.load((folder / VALUES).read_bytes())
        protocol = metrics["protocol"]
        report = _Report(
            source=_one_of(protocol["source"], get_args(Source)),
            binarization=_one_of(protocol["binarization"], get_args(Binarization)),
            image_size=_whole(protocol["image_size"], 1, 28),
            split=_one_of(protocol["split"], get_args(Split)),
            num_images=_whole(protocol["num_images"], 1, 10**6),
            seed=_whole(metrics.get("seed", 0), 0, 2**62),
            figures={
                str(name): (
                    _number(figure["value"]),
                    _number(figure["standard_error"]),
                    _whole(figure["particles"], 1, 10**7),
                )
                for name, figure in metrics["figures"].items()
            },
            values=values,
        )
        if set(report.figures) != set(values):
            raise ValueError(f"figures {sorted(report.figures)}, but values of {sorted(values)}")
        for name, tensor in values.items():
            if tuple(tensor.shape) != (report.num_images,) or not tensor.is_floating_point():
                raise ValueError(f"{name}: {tuple(tensor.shape)} values of {report.num_images} images")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: values that are not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise WeightsError(f"{folder} holds no valid report of genmodels evaluate ({error})") from error
    return report


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {value!r}")
    return value


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"expected a whole number from {least} to {most}, got {value!r}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"expected a number, got {value!r}")
    return float(value)
