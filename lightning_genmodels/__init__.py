"""Trained, honest, fast generative models of binary images.

Everything below is imported when it is first used, so that ``import lightning_genmodels`` costs nothing.

>>> import lightning_genmodels as gm
>>> gm.list_models()  # doctest: +SKIP
>>> model = gm.load("vae")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_genmodels.base import (
        AutoregressiveModel,
        ExplicitModel,
        GenerativeModel,
        ImplicitModel,
        LatentVariableModel,
        OrderMixture,
        TabularModel,
    )
    from lightning_genmodels.data import BinarizedMNISTDataModule
    from lightning_genmodels.evaluation.divergence import kl_divergence
    from lightning_genmodels.weights.files import load
    from lightning_genmodels.weights.names import list_models
    from lightning_genmodels.weights.records import Weights, list_weights

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveModel",
    "BinarizedMNISTDataModule",
    "ExplicitModel",
    "GenerativeModel",
    "ImplicitModel",
    "LatentVariableModel",
    "OrderMixture",
    "TabularModel",
    "Weights",
    "__version__",
    "kl_divergence",
    "list_models",
    "list_weights",
    "load",
]

_HOMES = {
    "AutoregressiveModel": "base",
    "BinarizedMNISTDataModule": "data",
    "ExplicitModel": "base",
    "GenerativeModel": "base",
    "ImplicitModel": "base",
    "LatentVariableModel": "base",
    "OrderMixture": "base",
    "TabularModel": "base",
    "Weights": "weights.records",
    "kl_divergence": "evaluation.divergence",
    "list_models": "weights.names",
    "list_weights": "weights.records",
    "load": "weights.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
