"""The registry of weights: one frozen record per trained weight, and the location of its files."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lightning_genmodels.errors import UnknownNameError, first_line
from lightning_genmodels.weights.names import list_models

SHIPPED = Path(__file__).parent / "shipped"
"""Weights that come with the package, one folder each, laid out like a repository on the Hub."""


@dataclass(frozen=True)
class Weights:
    """One trained weight.

    Attributes:
        name: ``<model>.<protocol>_v<N>``; retraining makes a new N.
        model: Name of the model's class in the registry.
        repo: Repository on the Hugging Face Hub.
        revision: Tag or commit of the repository that holds exactly these files.
        filename: The safetensors file, beside ``config.json``.
        sha256: Checksum of that file.
        config_sha256: Checksum of ``config.json``.
        binarization: Data protocol it was trained on: static, dynamic or threshold.
        recipe: The YAML file that trains it.
        license: Licence of the weights, an SPDX identifier.
        default: Whether it is what the model's bare name loads.
        metrics: Figures as ``genmodels evaluate`` wrote them, with standard errors and estimators.
    """

    name: str
    model: str
    repo: str
    revision: str
    filename: str
    sha256: str
    config_sha256: str
    binarization: str
    recipe: str
    license: str
    default: bool = False
    metrics: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def folder(self) -> Path | None:
        """Where the files lie if they ship inside the package."""
        folder = SHIPPED / self.name
        return folder if (folder / self.filename).is_file() else None


@cache
def registry() -> dict[str, Weights]:
    """All weights by name. A record that is damaged is left out, with a warning that names it."""
    found = {}
    for record in sorted(SHIPPED.glob("*/weights.json")):
        metrics = record.with_name("metrics.json")
        try:
            fields = json.loads(record.read_text(encoding="utf-8"))
            fields["metrics"] = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {}
            found[fields["name"]] = Weights(**fields)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"the record {record} is damaged and left out: {first_line(error)}", stacklevel=2)
    return found


def list_weights(model: str | None = None) -> list[str]:
    """Names of all weights of generative models, or of one model's, sorted.

    Raises:
        UnknownNameError: No model has this name.
    """
    models = list_models()
    if model is not None and model not in models:
        raise UnknownNameError("model", model, models)
    return sorted(n for n, weights in registry().items() if weights.model in models and model in (None, weights.model))


def get_weights(name: str) -> Weights:
    """The record of a weight, or of a model's default weight.

    Args:
        name: A weight's name (``vae.static_v1``) or a model's (``vae``).

    Raises:
        UnknownNameError: Neither a weight nor a model with weights.
    """
    records = registry()
    if name in records:
        return records[name]
    for weights in records.values():
        if weights.model == name and weights.default:
            return weights
    if name in list_models():
        raise UnknownNameError(f"weight (the model {name!r} has no trained weights yet)", name, records)
    raise UnknownNameError("model or weight", name, {*records, *list_models()})
