"""What an evaluation found: files, and every rendering of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lightning_genmodels.evaluation.quality import with_deviation
from lightning_genmodels.system import write_atomically

SUBSET = "head of a fixed permutation"
"""Which images an evaluation takes that does not take all."""

METRICS, VALUES = "metrics.json", "values.safetensors"


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

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
            lines += quality_lines(m["quality"])
        sampling = m["sampling"]
        lines.append(f"sampling {sampling['num_images']} images: {sampling['seconds']:.3f} s on {m['device']}")
        return "\n".join(lines)


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """What :func:`evaluate_quality` found, as lines of text."""
    lines = [
        f"{quality['num_seeds']} times {quality['num_samples']:,} samples beside {quality['num_real']:,} "
        f"{quality['split']} images, as {quality['extractor']} sees them; mean ± standard deviation",
        f"{'':24} {'Frechet':>12} {'precision':>15} {'recall':>15} {'coverage':>15} {'classes':>7} "
        f"{'rarest':>13} {'label KL':>17} {'nearest':>14} {'copies':>15}",
    ]
    kinds = {"samples": "samples", "floor": "floor: real images", "ceiling": "ceiling: independent"}
    for kind, q in quality["results"].items():
        d = quality["deviations"][kind]
        said = {key: with_deviation(q[key], d[key]) for key in q}
        lines.append(
            f"{kinds[kind]:24} {said['frechet']:>12} {said['precision']:>15} {said['recall']:>15} "
            f"{said['coverage']:>15} {q['classes']:7.0f} {said['rarest_class']:>13} {said['label_kl']:>17} "
            f"{said['nearest']:>14} {said['copies']:>15}"
        )
    return lines
