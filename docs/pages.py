"""What the pages share: the style of their pictures, grids of images, quiet training."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from lightning import Trainer, seed_everything
from matplotlib import pyplot as plt
from torch import Tensor

import lightning_genmodels
from lightning_genmodels import BinarizedMNISTDataModule, GenerativeModel
from lightning_genmodels.data.images import grid, read_images

DIGITS = Path(lightning_genmodels.__file__).parent / "app" / "digits.png"

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning.pytorch")
seed_everything(0, verbose=False)  # every build draws the same samples
mpl.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "font.size": 10,
        "axes.prop_cycle": mpl.cycler(color=["#3465a4", "#cc5500", "#4e9a06", "#75507b", "#888a85", "#c4a000"]),
    }
)


def show(images: Mapping[str, Tensor], columns: int = 10, width: float = 3.0) -> None:
    """Draw grids of images beside each other, each under its title.

    Args:
        images: (N, 1, H, W) in [0, 1], by title; ones are white.
        columns: Of each grid.
        width: Of each grid, in inches.
    """
    pixels = {title: grid(found, columns=columns) for title, found in images.items()}
    height = max(found.shape[0] / found.shape[1] for found in pixels.values()) * width + 0.4
    _, axes = plt.subplots(1, len(pixels), figsize=(width * len(pixels), height), squeeze=False)
    for place, (title, found) in zip(axes[0], pixels.items(), strict=True):
        place.imshow(found, cmap="gray", vmin=0, vmax=255)
        place.set_title(title)
        place.axis("off")
    plt.show()


def digits() -> Tensor:
    """Return test digits of static binarized MNIST, (40, 1, 28, 28) in {0, 1}: enough for pictures, not for figures."""
    return read_images(DIGITS, (1, 28, 28))


def fit(model: GenerativeModel, data: BinarizedMNISTDataModule, epochs: int = 1, seed: int = 0) -> GenerativeModel:
    """Train a model without files or output, and return it in evaluation mode."""
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    return model.eval()
