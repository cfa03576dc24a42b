"""Published test figures on binarized MNIST, to stand beside our own: nats per image, lower is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A figure from a paper.

    Attributes:
        value: Nats per image, on test images.
        estimator: "exact", or a bound such as "IW-5000".
        source: Where it is printed.
        note: What was different, if anything.
    """

    value: float
    estimator: str
    source: str
    note: str = ""


STATIC: dict[str, Published] = {
    "vae": Published(88.71, "IW-5000", "Burda et al. 2016"),
}
"""By model, on the static binarization."""
