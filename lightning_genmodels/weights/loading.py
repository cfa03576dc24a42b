"""Loading trained models by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.errors import WeightsError
from lightning_genmodels.weights.files import read
from lightning_genmodels.weights.records import get_weights


def load(name: str | Path, *, revision: str | None = None, **hyper_parameters: Any) -> GenerativeModel:
    """Loads a trained model in evaluation mode.

    The look-up order is: a local folder of weights or a Lightning checkpoint, weights inside the package, the Hub's
    cache, the Hub.

    Args:
        name: A folder, a ``.ckpt`` file, a model (``vae``), a weight (``vae.static_v1``) or ``owner/repo`` on the Hub.
        revision: Branch, tag or commit of a Hub repository.
        hyper_parameters: What the model must have been trained with; a contradiction is an error.

    Raises:
        UnknownNameError: A name that names nothing.
        WeightsError: Nothing is there, it is damaged, or a hyper-parameter contradicts it.
    """
    return read(name, GenerativeModel, revision=revision, **hyper_parameters)  # type: ignore[type-abstract]


def load_model(model: str, weights: str | None = None, **hyper_parameters: Any) -> GenerativeModel:
    """Loads a model by its name, with its default weight or a named one of its own.

    Raises:
        UnknownNameError: No such model or weight.
        WeightsError: The weight belongs to another model, and whatever :func:`load` raises.
    """
    record = get_weights(weights or model)
    if record.model != model:
        raise WeightsError(f"{record.name} is a weight of {record.model!r}, not of {model!r}")
    return load(record.name, **hyper_parameters)


def export(
    checkpoint: str | Path, folder: Path, data: BinarizedMNISTDataModule | None = None, *, half: bool = False
) -> GenerativeModel:
    """Turns a checkpoint into a folder of weights: safetensors and a JSON config.

    Args:
        checkpoint: A ``.ckpt`` file, or exported weights.
        folder: Made if it does not exist.
        data: What the model was trained on; read only if an export needs it, see :attr:`GenerativeModel.finalizes`.
        half: Store floating-point weights in half precision.

    Returns:
        The model that was exported, in evaluation mode.

    Raises:
        WeightsError: The checkpoint is damaged, or no checkpoint of this package.
        FileError: The folder cannot be written.
    """
    model = load(checkpoint)
    if model.finalizes and data is not None:
        data.prepare_data()
        model.finalize(data.images("train"))
    model.save_pretrained(folder, half=half)
    return model
