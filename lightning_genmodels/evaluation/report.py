"""Evaluation reports: their files, and all tables that are rendered from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lightning_genmodels.system import write_atomically

SUBSET = "head of a fixed permutation"
"""Which images an evaluation takes that does not take all."""

METRICS, VALUES = "metrics.json", "values.safetensors"


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        metrics: All figures with standard errors and estimators, the protocol, the seed and the versions; JSON.
        values: Per figure, one float64 value per image, in nats, in the order of the images.
    """

    metrics: dict[str, Any]
    values: dict[str, Tensor] = field(repr=False)

    def write(self, folder: Path) -> None:
        """Writes ``metrics.json`` and ``values.safetensors`` (float32).

        Raises:
            FileError: The folder cannot be written.
        """
        values = {name: values.float().contiguous() for name, values in self.values.items()}
        write_atomically(folder / VALUES, safetensors.torch.save(values))
        write_atomically(folder / METRICS, (json.dumps(self.metrics, indent=2) + "\n").encode())

    def table(self) -> str:
        """The figures as text."""
        m, protocol = self.metrics, self.metrics["protocol"]
        lines = [
            f"{m['model']}: {m['num_parameters']:,} parameters, {protocol['binarization']} {protocol['source']}, "
            f"{protocol['split']}, {protocol['num_images']:,} images"
            + (f", the {protocol['subset']}" if "subset" in protocol else ""),
            f"{'figure':10} {'estimator':22} {'nats':>10} {'std. error':>11} {'bits/dim':>9} {'images/s':>10}",
        ]
        for name, figure in m["figures"].items():
            lines.append(
                f"{name:10} {figure['estimator']:22} {figure['value']:10.3f} {figure['standard_error']:11.3f} "
                f"{figure['bits_per_dimension']:9.4f} {figure['images_per_second']:10.1f}"
            )
        if "ais" in m:
            ais, gap = m["ais"], m["ais"]["simulated"]["gap"]
            simulated = ais["simulated"]["num_images"]
            lines.append(
                f"annealed importance sampling, {ais['estimator']}, {ais['num_images']} images, the {SUBSET}: "
                f"{ais['value']:.3f} +- {ais['standard_error']:.3f} nats; on {simulated} images that the model drew, "
                f"upper and lower bounds are {gap['value']:.3f} +- {gap['standard_error']:.3f} apart"
            )
        for kind, result in m.get("probe", {}).get("results", {}).items():
            lines.append(
                f"linear probe on {kind} ({result['dim']} numbers, {m['probe']['binarization']} binarization): "
                f"{100 * result['accuracy']:.2f} % +- {100 * result['standard_error']:.2f}"
            )
        if "quality" in m:
            q = m["quality"]
            lines.append(
                f"{q['num_seeds']} times {q['num_samples']:,} samples beside {q['num_real']:,} {q['split']} images, as "
                f"{q['extractor']} sees them; mean ± standard deviation"
            )
            lines.append(quality_table({"samples": q}))
        sampling = m["sampling"]
        lines.append(f"sampling {sampling['num_images']} images: {sampling['seconds']:.3f} s on {m['device']}")
        return "\n".join(lines)


def figures_table(metrics: Mapping[str, Any]) -> str:
    """Markdown: the likelihoods in a report."""
    return markdown(
        ["figure", "estimator", "nats", "standard error", "bits per dimension"],
        (
            [name, f["estimator"], f"{f['value']:.2f}", f"{f['standard_error']:.2f}", f"{f['bits_per_dimension']:.4f}"]
            for name, f in metrics["figures"].items()
        ),
    )


def probe_table(probes: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what :func:`evaluate_probe` found, by a label each."""
    return markdown(
        ["weight", "numbers in a code", "read off the codes", "off raw pixels", "off a random encoder's codes"],
        (
            [
                label,
                str(found["results"]["codes"]["dim"]),
                *(
                    f"{100 * result['accuracy']:.2f} ± {100 * result['standard_error']:.2f} %"
                    for result in (found["results"][kind] for kind in ("codes", "pixels", "random_encoder"))
                ),
            ]
            for label, found in probes.items()
        ),
    )


def quality_table(judged: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what :func:`evaluate_quality` found, by a label each, lowest Fréchet distance first; among them what
    real images (the floor) and independent pixels (the ceiling) get, between which every other row is read.
    """
    bounds = next(iter(judged.values()))
    rows = [(found["results"]["samples"], found["deviations"]["samples"], label) for label, found in judged.items()]
    for kind, label in (("floor", "*floor: real training images*"), ("ceiling", "*ceiling: independent pixels*")):
        rows.append((bounds["results"][kind], bounds["deviations"][kind], label))
    keys = ["frechet", "precision", "recall", "coverage", "classes", "rarest_class", "commonest_class", "label_kl"]
    return markdown(
        [
            *("samples of", "Fréchet distance", "precision", "recall", "coverage", "classes", "rarest class"),
            *("commonest class", "label KL", "pixels to the nearest training image", "copies"),
        ],
        (
            [label, *(with_deviation(means[key], spreads[key]) for key in [*keys, "nearest", "copies"])]
            for means, spreads, label in sorted(rows, key=lambda row: row[0]["frechet"])
        ),
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_deviation(value: float, spread: float | None) -> str:
    """A figure and its standard deviation, with no more digits than they carry: ``35.5 ± 0.6``; of one set of samples,
    whose deviation is not known, or where it is one of rounding, the figure alone.
    """
    if spread is None or spread <= 1e-6 * abs(value):
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(spread)))
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"
