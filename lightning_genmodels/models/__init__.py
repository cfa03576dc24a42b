"""The models, one file a paper. They are imported when they are first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_genmodels.models.autoencoder import Autoencoder
    from lightning_genmodels.models.bernoulli import Bernoulli
    from lightning_genmodels.models.chain_rule_table import ChainRuleTable
    from lightning_genmodels.models.eonade import EoNADE
    from lightning_genmodels.models.fvbn import FVBN
    from lightning_genmodels.models.gan import GAN
    from lightning_genmodels.models.gated_pixelcnn import GatedPixelCNN
    from lightning_genmodels.models.iwae import IWAE
    from lightning_genmodels.models.joint_table import JointTable
    from lightning_genmodels.models.ladder_vae import LadderVAE
    from lightning_genmodels.models.made import MADE
    from lightning_genmodels.models.markov import Markov
    from lightning_genmodels.models.nade import NADE
    from lightning_genmodels.models.pixelrnn import DiagonalBiLSTM, PixelCNN, RowLSTM
    from lightning_genmodels.models.pixelsnail import PixelSNAIL
    from lightning_genmodels.models.vae import VAE
    from lightning_genmodels.models.wgan_gp import WGANGP

__all__ = [
    "FVBN",
    "GAN",
    "IWAE",
    "MADE",
    "NADE",
    "VAE",
    "WGANGP",
    "Autoencoder",
    "Bernoulli",
    "ChainRuleTable",
    "DiagonalBiLSTM",
    "EoNADE",
    "GatedPixelCNN",
    "JointTable",
    "LadderVAE",
    "Markov",
    "PixelCNN",
    "PixelSNAIL",
    "RowLSTM",
]

_MODULES = {
    "Autoencoder": "autoencoder",
    "Bernoulli": "bernoulli",
    "ChainRuleTable": "chain_rule_table",
    "DiagonalBiLSTM": "pixelrnn",
    "EoNADE": "eonade",
    "FVBN": "fvbn",
    "GAN": "gan",
    "GatedPixelCNN": "gated_pixelcnn",
    "IWAE": "iwae",
    "JointTable": "joint_table",
    "LadderVAE": "ladder_vae",
    "MADE": "made",
    "Markov": "markov",
    "NADE": "nade",
    "PixelCNN": "pixelrnn",
    "PixelSNAIL": "pixelsnail",
    "RowLSTM": "pixelrnn",
    "VAE": "vae",
    "WGANGP": "wgan_gp",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
