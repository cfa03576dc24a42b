"""The one evaluation protocol behind every published figure.

Every image is counted once, on any number of processes. Noise is keyed by (seed, image), so that a figure does not
depend on batches, processes or the device. All figures are *negative* log-likelihoods, or upper bounds on them, in nats
per image: lower is better.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_genmodels import __version__
from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.base.metrics import PerImage
from lightning_genmodels.data import BinarizedMNISTDataModule, InMemoryLoader
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError, at_least, first_line, within
from lightning_genmodels.evaluation.ais import evaluate_ais
from lightning_genmodels.evaluation.classifier import SHIPPED, DigitClassifier
from lightning_genmodels.evaluation.likelihood import batch_size, figures_of, score
from lightning_genmodels.evaluation.probe import evaluate_probe
from lightning_genmodels.evaluation.quality import check_quality, evaluate_quality
from lightning_genmodels.evaluation.report import SUBSET, Report
from lightning_genmodels.functional import bits_per_dimension
from lightning_genmodels.random import process_share
from lightning_genmodels.system import leave_group_at_exit
from lightning_genmodels.training.launch import check_size, trainer_options
from lightning_genmodels.weights.names import model_name


@dataclass(frozen=True)
class Protocol:
    """Which figures are measured, on which images, and where.

    Args:
        split: train, val or test.
        num_particles: k of the importance-weighted bound, for a latent-variable model.
        limit: Only so many images, the head of one fixed permutation: the static test file is sorted by class.
        seed: Seed of the noise, which is keyed by image: the figures do not depend on batches and processes.
        accelerator: cpu, gpu or auto.
        devices: Number of processes, which are started as ``ddp``. Default: those that torchrun or srun started, on one
            node or several, or one.
        precision: 32-true or bf16-mixed; sums are in at least float32 in any case.
        ais: Temperatures of annealed importance sampling, say 1000; 0 for none. It takes 200 images, and as many that
            the model drew, for which the error of the estimate is bounded.
        probe: Also a linear probe of the digit's class on codes, on raw pixels, and on codes of a random encoder.
        samples: Also judge so many samples, say 10000, beside real images and independent pixels; 0 for none.
        extractor: File of the digit classifier that judges them, as
            `python -m lightning_genmodels.evaluation.classifier` writes it; default: the one that ships.

    Raises:
        OptionError: A number is out of its range.
    """

    split: Split = "test"
    num_particles: int = 5000
    limit: int | None = None
    seed: int = 0
    accelerator: str = "auto"
    devices: int | None = None
    precision: str = "32-true"
    ais: int = 0
    probe: bool = False
    samples: int = 0
    extractor: Path | None = None

    def __post_init__(self) -> None:
        at_least(2, limit=2 if self.limit is None else self.limit)  # an error of the mean takes two images
        at_least(1, num_particles=self.num_particles, devices=1 if self.devices is None else self.devices)
        at_least(0, ais=self.ais, samples=self.samples)
        within(0, 2**63, seed=self.seed)


def evaluate(model: GenerativeModel, data: BinarizedMNISTDataModule, protocol: Protocol | None = None) -> Report | None:
    """Evaluates a trained model on one split of the data.

    Args:
        model: The model, in evaluation mode.
        data: The data module; images of another shape than the model's are an error.
        protocol: What is measured, and how.

    Returns:
        The report, or None on every process but the first.

    Raises:
        OptionError: The data do not fit the model, or a device is not there.
        DataError: Data missing or corrupt.
    """
    protocol = protocol or Protocol()
    if data.event_shape != model.event_shape:
        raise OptionError(
            f"the model takes images of shape {model.event_shape}, the data have {data.event_shape}; "
            f"choose --data.image_size {model.event_shape[-1]}"
        )
    if protocol.samples:  # before what takes long
        check_quality(model, protocol.samples, DigitClassifier.load(protocol.extractor or SHIPPED))
    evaluator = _Evaluator(model, data, protocol)
    options: dict[str, Any] = {"devices": protocol.devices, "num_nodes": 1}
    trainer_options(options)
    options["devices"] = options["devices"] or 1
    try:
        trainer = Trainer(
            **options,
            accelerator=protocol.accelerator,
            precision=protocol.precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
    except ValueError as error:
        raise OptionError(first_line(error)) from error
    check_size(trainer.world_size)
    origin = model.device
    trainer.test(evaluator, verbose=False)
    if not trainer.is_global_zero:
        return None
    model.to(evaluator.device_of_test)  # Lightning left it on the CPU
    figures = {}
    for figure in evaluator.figures:
        values = evaluator.found[figure.name]  # of all processes: a torchmetrics.Metric would gather them again
        value = values.mean().item()
        figures[figure.name] = {
            "estimator": figure.estimator,
            "particles": figure.particles,
            "value": value,
            "standard_error": values.std().item() / math.sqrt(len(values)),
            "bits_per_dimension": bits_per_dimension(value, model.event_shape),
            "images_per_second": evaluator.rates[figure.name],
        }
    metrics = {
        "model": model_name(type(model)),
        "num_parameters": model.num_parameters,
        "protocol": {
            **data.protocol,
            "split": protocol.split,
            "num_images": evaluator.num_images,
            **({"subset": SUBSET} if evaluator.is_subset else {}),
        },
        "figures": figures,
        "sampling": {"num_images": 64, "seconds": _sampling_seconds(model, 64)},
        "seed": protocol.seed,
        "precision": protocol.precision,
        "processes": trainer.world_size,
        "device": _device_name(model.device),
        "versions": _versions(),
    }
    seed = protocol.seed
    if protocol.ais:
        images, temperatures = min(protocol.limit or 200, 200), protocol.ais
        metrics["ais"] = evaluate_ais(
            model, data, protocol.split, num_images=images, num_temperatures=temperatures, seed=seed
        )
    if protocol.probe:
        metrics["probe"] = evaluate_probe(model, data, seed=seed)
    if protocol.samples:
        metrics["quality"] = evaluate_quality(
            model, data, protocol.split, num_samples=protocol.samples, extractor=protocol.extractor, seed=seed
        )
    model.to(origin)
    return Report(metrics, evaluator.found)


def _versions() -> dict[str, str]:
    return {
        "lightning_genmodels": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


class _Evaluator(LightningModule):
    """Scores this process's share of the images in ``test_step``, and gathers the values of all processes."""

    def __init__(self, model: GenerativeModel, data: BinarizedMNISTDataModule, protocol: Protocol) -> None:
        super().__init__()
        self.model = model
        self.data = data
        self.protocol = protocol
        self.figures = figures_of(model, protocol.num_particles)
        self.gathered = torch.nn.ModuleDict({figure.name: PerImage() for figure in self.figures})
        self.seconds = {figure.name: 0.0 for figure in self.figures}
        self.found: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.num_images = 0
        self.num_seen = 0
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.is_subset = False
        self.device_of_test = torch.device("cpu")

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        leave_group_at_exit()

    def test_dataloader(self) -> InMemoryLoader:
        self.keys = self.data.subset(self.protocol.split, self.protocol.limit)
        images = self.data.images(self.protocol.split)
        self.is_subset = len(self.keys) < len(images)
        images = images[self.keys]
        self.num_images = len(images)
        rows = min([batch_size(self.model, figure.particles) for figure in self.figures], default=500)
        world = self.trainer.world_size
        return InMemoryLoader(images, rows * world, rank=self.global_rank, world_size=world)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        places = process_share(self.num_seen, len(batch), self.global_rank, self.trainer.world_size)
        self.num_seen += len(batch)
        keys = self.keys[places.start : places.stop : places.step].tolist()
        for figure in self.figures:
            start = time.perf_counter()
            values = -score(self.model, batch, keys, figure, seed=self.protocol.seed)
            gathered = self.gathered[figure.name]
            gathered.update(torch.tensor(places, device=values.device), values)  # type: ignore[operator]
            self.seconds[figure.name] += time.perf_counter() - start

    def on_test_epoch_end(self) -> None:
        self.device_of_test = self.device
        for name, gathered in self.gathered.items():
            self.found[name] = gathered.compute().cpu()  # type: ignore[operator]
            self.rates[name] = self.num_images / self.seconds[name]


def _sampling_seconds(model: GenerativeModel, num_images: int) -> float:
    """Seconds to sample, once warm."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        start = time.perf_counter()
        model.sample(num_images, generator=generator).cpu()
        seconds = time.perf_counter() - start
    return seconds


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
