"""Published test figures on binarized MNIST, to stand beside our own: nats per image, lower is better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_genmodels.weights.records import Weights


@dataclass(frozen=True)
class Published:
    """A figure from a paper.

    Attributes:
        value: Nats per image, on test images.
        estimator: "exact", or a bound such as "IW-5000".
        source: Where it is printed.
        deviations: How the weight that stands beside it differs from the paper's model.
    """

    value: float
    estimator: str
    source: str
    deviations: str = ""

    def __str__(self) -> str:
        said = f"{self.value:.2f} ({self.estimator}; {self.source})"
        return f"{said}; here: {self.deviations}" if self.deviations else said


STATIC: dict[str, Published] = {
    "diagonal_bilstm": Published(
        80.75, "exact", "van den Oord et al. 2016, 1 layer", "24 features, a path from the end of a row to the next"
    ),
    "diagonal_bilstm_by_place": Published(
        80.75,
        "exact",
        "van den Oord et al. 2016, 1 layer",
        "48 features, biases by place, a path from the end of a row to the next",
    ),
    "eonade": Published(
        85.10,
        "exact mixture of 128 orders",
        "Uria, Murray and Larochelle 2014",
        "32 orders, layer normalization, centred inputs",
    ),
    "fvbn": Published(97.45, "exact", "Larochelle and Murray 2011"),
    "gated_pixelcnn": Published(
        80.10,
        "exact",
        "as the PixelVAE paper reports it, Gulrajani et al. 2017",
        "64 features, 10 layers, dropout",
    ),
    "iwae": Published(
        87.10, "IW-5000", "Burda et al. 2016, trained with 50 particles", "5 particles, from the trained VAE on"
    ),
    "iwae_2layer": Published(
        85.32,
        "IW-5000",
        "Burda et al. 2016, two layers of latent variables, trained with 50 particles",
        "5 particles, from the trained VAE on",
    ),
    "ladder_vae": Published(
        78.30,
        "IW-1000",
        "a public implementation with 12 layers, trained on train and validation",
        "9 layers, trained on train alone, no precision-weighted merge of the two passes",
    ),
    "made": Published(
        86.64,
        "exact mixture of 32 masks",
        "Germain et al. 2015, 2 x 8000 units",
        "2 x 900 units, 8 masks, each with scales and shifts of its own",
    ),
    "nade": Published(88.33, "exact", "Larochelle and Murray 2011, as later papers report it"),
    "pixelcnn": Published(
        81.30, "exact", "van den Oord et al. 2016", "32 features, a first filter of 27x27 and not 7x7, biases by place"
    ),
    "pixelcnn_7x7": Published(81.30, "exact", "van den Oord et al. 2016", "10 blocks of 32 features"),
    "row_lstm": Published(80.54, "exact", "van den Oord et al. 2016, 12 layers", "2 layers of 16 features"),
    "row_lstm_by_place": Published(
        80.54,
        "exact",
        "van den Oord et al. 2016, 12 layers",
        "2 layers of 32 features, a first filter of 27x27 and not 7x7, biases by place",
    ),
    "vae": Published(88.71, "IW-5000", "Burda et al. 2016"),
    "vae_2layer": Published(88.08, "IW-5000", "Burda et al. 2016, two layers of latent variables"),
    "vae_conv": Published(88.71, "IW-5000", "Burda et al. 2016, with linear layers", "convolutional"),
}
"""By model, or by the recipe of one, on the static binarization."""


DYNAMIC: dict[str, Published] = {
    "vae": Published(86.76, "IW-5000", "Burda et al. 2016", "from the weights of the static binarization on")
}
"""The same on the dynamic binarization, a different test set."""


def published(weights: Weights) -> Published | None:
    """The figure that a weight stands beside, if one was published on its data."""
    figures = {"static": STATIC, "dynamic": DYNAMIC}.get(weights.binarization, {})
    return figures.get(Path(weights.recipe).stem) or figures.get(weights.model)
