"""The registry of models by name: this package's own, and those that other packages add by an entry point.

A model of another package joins with one line of its ``pyproject.toml``::

    [project.entry-points."lightning_genmodels.models"]
    my_model = "my_package.my_module:MyModel"
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from lightning_genmodels.errors import ModelError, UnknownNameError, first_line

if TYPE_CHECKING:
    from lightning import LightningModule

ENTRY_POINT_GROUP = "lightning_genmodels.models"

MODELS = {
    "autoencoder": "lightning_genmodels.models.autoencoder:Autoencoder",
    "bernoulli": "lightning_genmodels.models.bernoulli:Bernoulli",
    "chain_rule_table": "lightning_genmodels.models.chain_rule_table:ChainRuleTable",
    "diagonal_bilstm": "lightning_genmodels.models.pixelrnn:DiagonalBiLSTM",
    "eonade": "lightning_genmodels.models.eonade:EoNADE",
    "fvbn": "lightning_genmodels.models.fvbn:FVBN",
    "gan": "lightning_genmodels.models.gan:GAN",
    "gated_pixelcnn": "lightning_genmodels.models.gated_pixelcnn:GatedPixelCNN",
    "iwae": "lightning_genmodels.models.iwae:IWAE",
    "joint_table": "lightning_genmodels.models.joint_table:JointTable",
    "ladder_vae": "lightning_genmodels.models.ladder_vae:LadderVAE",
    "made": "lightning_genmodels.models.made:MADE",
    "markov": "lightning_genmodels.models.markov:Markov",
    "nade": "lightning_genmodels.models.nade:NADE",
    "pixelcnn": "lightning_genmodels.models.pixelrnn:PixelCNN",
    "pixelsnail": "lightning_genmodels.models.pixelsnail:PixelSNAIL",
    "row_lstm": "lightning_genmodels.models.pixelrnn:RowLSTM",
    "vae": "lightning_genmodels.models.vae:VAE",
    "wgan_gp": "lightning_genmodels.models.wgan_gp:WGANGP",
}
"""This package's models; the names are those of papers and lectures."""


@cache
def _import_strings() -> dict[str, str]:
    """Name -> "module:Class"; a name of this package cannot be taken over by another one."""
    foreign = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {**foreign, **MODELS}


def list_models() -> list[str]:
    """Names of all models, sorted."""
    return sorted(_import_strings())


def model_class(name: str) -> type[LightningModule]:
    """Imports the class of a model.

    Raises:
        UnknownNameError: No model has this name.
        ModelError: The package that brings it cannot be imported.
    """
    strings = _import_strings()
    if name not in strings:
        raise UnknownNameError("model", name, list_models())
    module, _, attribute = strings[name].partition(":")
    try:
        found: type[LightningModule] = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        if name in MODELS:
            raise
        raise ModelError(
            f"the model {name!r} cannot be imported from {strings[name]} ({type(error).__name__}: "
            f"{first_line(error)}); repair or uninstall the package that brings it"
        ) from error
    return found


def importable_models() -> Iterator[type[LightningModule]]:
    """The classes of all models that can be imported; one of another package that cannot is left out with a warning."""
    for name in _import_strings():
        try:
            yield model_class(name)
        except ModelError as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)


def model_name(cls: type) -> str:
    """The name under which a class is registered.

    Raises:
        UnknownNameError: It is not registered, so nothing that is saved from it could be loaded.
    """
    own = f"{cls.__module__}:{cls.__qualname__}"
    for name, string in _import_strings().items():
        if string == own or (string.rpartition(":")[2] == cls.__name__ and model_class(name) is cls):
            return name
    raise UnknownNameError(
        f"model class (it is not registered: add an entry point to the group {ENTRY_POINT_GROUP!r})", own, list_models()
    )
