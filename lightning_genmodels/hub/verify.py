"""Recomputing published figures from the weights they were published for."""

from __future__ import annotations

import time
from dataclasses import dataclass

import safetensors.torch
import torch

from lightning_genmodels import pretrained
from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import WeightsError
from lightning_genmodels.evaluation import METRICS, VALUES, read_metrics, score

TOLERANCE = 0.01
"""Nats by which the value of an image may differ between machines, whose arithmetic rounds differently."""

_CHUNK = 20


@dataclass(frozen=True)
class Verification:
    """What came of one figure.

    Attributes:
        figure: Its name, such as "nll" or "iw5000".
        num_images: How many images were recomputed.
        largest_difference: In nats, between a stored value and the recomputed one.
        agrees: Whether all differences are within the tolerance, and the stored values have the published mean.
    """

    figure: str
    num_images: int
    largest_difference: float
    agrees: bool

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else "DOES NOT AGREE"
        return f"{self.figure}: {verdict} on {self.num_images} images, to {self.largest_difference:.2g} nats"


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
    source = pretrained.resolve(name)
    for file in (METRICS, VALUES):
        if not (source.path / file).is_file():
            raise WeightsError(f"{source.path} has no {file}: there is no figure to verify; run genmodels evaluate")
    model: GenerativeModel = pretrained.read(name)
    metrics = read_metrics(source.path)
    protocol = metrics["protocol"]
    stored = safetensors.torch.load_file(source.path / VALUES)
    if not stored:
        raise WeightsError(
            f"{name} has no likelihood, and so no values of images to compare; judge its samples anew with: "
            f"genmodels evaluate {name} --samples 10000"
        )
    data = BinarizedMNISTDataModule(
        root,
        source=protocol["source"],
        binarization=protocol["binarization"],
        image_size=protocol["image_size"],
    )
    data.prepare_data()
    keys = data.subset(protocol["split"], protocol["num_images"])
    images = data.images(protocol["split"])[keys].float()
    chooser = torch.Generator()
    chooser.manual_seed(chooser.seed() if seed is None else seed)
    order = torch.randperm(len(images), generator=chooser)
    found = []
    for figure, values in stored.items():
        start, difference, count = time.monotonic(), 0.0, 0
        while count < len(images) and (full or count == 0 or time.monotonic() - start < seconds):
            part = order[count : count + batch]
            recomputed = -score(model, images[part], keys[part].tolist(), figure, seed=metrics["seed"])
            worst = (recomputed - values[part].double()).abs().max()
            difference = max(difference, float(torch.nan_to_num(worst, nan=float("inf"))))
            count += len(part)
        same_mean = abs(values.double().mean().item() - metrics["figures"][figure]["value"]) < TOLERANCE
        found.append(Verification(figure, count, difference, difference <= TOLERANCE and same_mean))
    return found
