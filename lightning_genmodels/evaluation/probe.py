"""A linear probe: how much of an image's class can be read off its code by logistic regression.

Codes are judged beside raw pixels and beside a random encoder, a new model of the same architecture: what they do not
beat was not learned (Alain and Bengio 2017, "Understanding intermediate layers using linear classifier probes").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_genmodels.base import GenerativeModel, RepresentationModel
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError

_PENALTIES = (0.01, 0.1, 1.0)  # C of scikit-learn: the inverse of the penalty on weights


@dataclass(frozen=True)
class ProbeResult:
    """The accuracy of the probe on one kind of features.

    Attributes:
        dim: Numbers an image is described by.
        accuracy: Fraction of test images whose class is predicted rightly.
        standard_error: Of the accuracy.
        penalty: Inverse strength of the penalty, the one best on validation images.
    """

    dim: int
    accuracy: float
    standard_error: float
    penalty: float


def linear_probe(
    model: GenerativeModel, data: BinarizedMNISTDataModule, *, num_train: int | None = None, seed: int = 0
) -> dict[str, ProbeResult]:
    """Fits a logistic regression of the class on codes, on raw pixels, and on the codes of a random encoder.

    Args:
        model: In evaluation mode.
        data: Images with labels: not the static binarization of MNIST.
        num_train: Only the first so many training images.
        seed: Of the random encoder.

    Returns:
        Results by kind of features: ``codes``, ``pixels``, ``random_encoder``.

    Raises:
        OptionError: The model has no codes, the data have no labels, or scikit-learn is not installed.
    """
    if not isinstance(model, RepresentationModel):
        raise OptionError(f"a {type(model).__name__} has no codes to probe; leave out --probe")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise OptionError(
            "a probe needs scikit-learn; install it with: pip install 'lightning-genmodels[digits]'"
        ) from error
    splits: tuple[Split, ...] = ("train", "val", "test")
    limits = {"train": num_train, "val": None, "test": None}
    labels = {split: data.labels(split)[: limits[split]].numpy() for split in splits}
    images = {split: data.images(split)[: limits[split]].float() for split in splits}
    results = {}
    for kind, encoder in (("codes", model), ("pixels", None), ("random_encoder", random_encoder(model, seed))):
        features = {split: _features(encoder, x) for split, x in images.items()}
        mean, std = features["train"].mean(0), features["train"].std(0)
        inputs = {split: ((x - mean) / (std + 1e-6)).numpy() for split, x in features.items()}
        fitted = []
        for penalty in _PENALTIES:
            classifier: Any = LogisticRegression(C=penalty, max_iter=300)
            classifier.fit(inputs["train"], labels["train"])
            fitted.append((classifier.score(inputs["val"], labels["val"]), penalty, classifier))
        _, penalty, best = max(fitted, key=lambda entry: entry[0])
        accuracy = float(best.score(inputs["test"], labels["test"]))
        standard_error = math.sqrt(accuracy * (1.0 - accuracy) / len(labels["test"]))
        results[kind] = ProbeResult(inputs["train"].shape[1], accuracy, standard_error, penalty)
    return results


def random_encoder(model: GenerativeModel, seed: int = 0) -> GenerativeModel:
    """A new model of the same architecture, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(model)(**{key: value for key, value in model.hparams.items() if key != "init_from"})
    return fresh.to(model.device).eval()


@torch.no_grad()
def _features(encoder: GenerativeModel | None, images: Tensor) -> Tensor:
    """Codes (N, D), or the pixels (N, n) where there is no encoder."""
    if not isinstance(encoder, RepresentationModel):
        return images.flatten(1)
    return torch.cat([encoder.encode(part).float().cpu() for part in images.split(500)])


def evaluate_probe(model: GenerativeModel, data: BinarizedMNISTDataModule, *, seed: int = 0) -> dict[str, Any]:
    """A linear probe on codes, raw pixels and a random encoder, by
    :func:`lightning_genmodels.evaluation.probe.linear_probe`.

    Static binarized MNIST has no labels: there the probe takes the draws of the dynamic one, and says so.

    Returns:
        JSON: the binarization, and by kind of features their number, the accuracy and its standard error.

    Raises:
        OptionError: The model has no codes, or scikit-learn is not installed.
    """
    if data.source == "mnist" and data.binarization == "static":
        data = BinarizedMNISTDataModule(str(data.root), binarization="dynamic", image_size=data.image_size)
    data.prepare_data()
    results = linear_probe(model, data, seed=seed)
    return {"binarization": data.binarization, "results": {kind: asdict(result) for kind, result in results.items()}}
