"""Turns a trained checkpoint into a weight that ships with the package: export, evaluate, sample, register.

python tools/ship.py runs/vae/checkpoints/best.ckpt vae.static_v1 recipes/vae.yaml --data.root /path/to/data
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lightning_genmodels import BinarizedMNISTDataModule, Weights
from lightning_genmodels.data.images import write_images
from lightning_genmodels.evaluation.run import Protocol, evaluate
from lightning_genmodels.system import reuse_freed_memory
from lightning_genmodels.training.curves import write_curves
from lightning_genmodels.weights.files import CONFIG, WEIGHTS
from lightning_genmodels.weights.loading import export, load
from lightning_genmodels.weights.names import model_name
from lightning_genmodels.weights.publish import SAMPLES
from lightning_genmodels.weights.records import SHIPPED


def ship(
    checkpoint: Path,
    name: str,
    data: BinarizedMNISTDataModule,
    recipe: str,
    half: bool = True,
    default: bool = True,
    num_particles: int = 5000,
    samples: int = 10_000,
    probe: bool = False,
) -> None:
    """Writes a folder of ``lightning_genmodels/weights/shipped``; the figures are those of the files it holds.

    Args:
        checkpoint: A ``.ckpt`` file, or a folder of exported weights; of a run's own, its learning curve is kept, too.
        name: ``<model>.<protocol>_v<N>``.
        data: The data module of the protocol.
        recipe: The YAML file that trained it.
        half: Store half-precision numbers.
        default: Whether the model's bare name loads this weight.
        num_particles: k of the importance-weighted bound.
        samples: Samples whose quality is judged; 0 for none.
        probe: Also measure what a linear probe reads off the codes.
    """
    folder = SHIPPED / name
    export(checkpoint, folder, data, half=half)
    model = load(folder)
    report = evaluate(model, data, Protocol(num_particles=num_particles, samples=samples, probe=probe))
    assert report is not None
    report.write(folder)
    if (checkpoint.parent / "logs").is_dir():
        write_curves(checkpoint.parent, folder)
    write_images(folder / SAMPLES, model.sample(64, generator=torch.Generator().manual_seed(0)))
    print(report.table())
    model_, version = model_name(type(model)), name.partition(".")[2]
    record = Weights(
        name=name,
        model=model_,
        repo=f"lightning-genmodels/{model_}",
        revision=version,
        filename=WEIGHTS,
        sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        config_sha256=hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
        binarization=data.binarization,
        recipe=recipe,
        license="Apache-2.0",
        default=default,
    )
    fields = {key: value for key, value in dataclasses.asdict(record).items() if key != "metrics"}
    (folder / "weights.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(ship, as_positional=True, skip={"data"})
    parser.add_class_arguments(BinarizedMNISTDataModule, "data")
    options = parser.instantiate(parser.parse_args())
    reuse_freed_memory()
    ship(**{key: value for key, value in vars(options).items() if key != "config"})
