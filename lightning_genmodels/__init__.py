"""Trained, honest, fast generative models of binary images.

Everything below is imported when it is first used, so that ``import lightning_genmodels`` costs nothing.

>>> import lightning_genmodels as gm
>>> model = gm.load("vae")
>>> model.sample(16).shape
torch.Size([16, 1, 28, 28])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_genmodels.base import (
        AdversarialModel,
        AutoregressiveModel,
        CompletionModel,
        ExplicitModel,
        GenerativeModel,
        LatentVariableModel,
        OrderMixture,
        RasterModel,
        RepresentationModel,
        TabularModel,
    )
    from lightning_genmodels.data import BinarizedMNISTDataModule
    from lightning_genmodels.evaluation.divergence import kl_divergence
    from lightning_genmodels.models import (
        FVBN,
        GAN,
        IWAE,
        MADE,
        NADE,
        VAE,
        WGANGP,
        Autoencoder,
        Bernoulli,
        ChainRuleTable,
        DiagonalBiLSTM,
        EoNADE,
        GatedPixelCNN,
        JointTable,
        LadderVAE,
        Markov,
        PixelCNN,
        PixelSNAIL,
        RowLSTM,
    )
    from lightning_genmodels.weights.loading import load
    from lightning_genmodels.weights.names import list_models
    from lightning_genmodels.weights.records import Weights, list_weights

__version__ = "0.1.0"

__all__ = [
    "FVBN",
    "GAN",
    "IWAE",
    "MADE",
    "NADE",
    "VAE",
    "WGANGP",
    "AdversarialModel",
    "Autoencoder",
    "AutoregressiveModel",
    "Bernoulli",
    "BinarizedMNISTDataModule",
    "ChainRuleTable",
    "CompletionModel",
    "DiagonalBiLSTM",
    "EoNADE",
    "ExplicitModel",
    "GatedPixelCNN",
    "GenerativeModel",
    "JointTable",
    "LadderVAE",
    "LatentVariableModel",
    "Markov",
    "OrderMixture",
    "PixelCNN",
    "PixelSNAIL",
    "RasterModel",
    "RepresentationModel",
    "RowLSTM",
    "TabularModel",
    "Weights",
    "__version__",
    "kl_divergence",
    "list_models",
    "list_weights",
    "load",
]

_HOMES = {
    "BinarizedMNISTDataModule": "data",
    "Weights": "weights.records",
    "kl_divergence": "evaluation.divergence",
    "list_models": "weights.names",
    "list_weights": "weights.records",
    "load": "weights.loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "base" if name.endswith("Model") or name == "OrderMixture" else "models")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return __all__
