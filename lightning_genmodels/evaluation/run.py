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
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_genmodels import __version__
from lightning_genmodels.base import (
    GenerativeModel,
)
from lightning_genmodels.base.metrics import PerImage
from lightning_genmodels.data import BinarizedMNISTDataModule, InMemoryLoader
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError, first_line
from lightning_genmodels.evaluation.ais import evaluate_ais
from lightning_genmodels.evaluation.classifier import SHIPPED, DigitClassifier
from lightning_genmodels.evaluation.likelihood import batch_size, estimators, particles_of, score
from lightning_genmodels.evaluation.probe import evaluate_probe
from lightning_genmodels.evaluation.quality import (
    check_quality,
    evaluate_quality,
)
from lightning_genmodels.evaluation.report import SUBSET, Report
from lightning_genmodels.functional import bits_per_dimension
from lightning_genmodels.random import process_share
from lightning_genmodels.system import leave_group_at_exit
from lightning_genmodels.training.launch import check_size, trainer_options
from lightning_genmodels.weights.names import model_name


def evaluate(
    model: GenerativeModel,
    data: BinarizedMNISTDataModule,
    split: Split = "test",
    *,
    num_particles: int = 5000,
    limit: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int | None = None,
    precision: Any = "32-true",
    ais: int = 0,
    probe: bool = False,
    samples: int = 0,
    extractor: Path | None = None,
) -> Report | None:
    """Evaluates a trained model on one split of the data.

    Args:
        model: The model, in evaluation mode.
        data: The data module; images of another shape than the model's are an error.
        split: train, val or test.
        num_particles: k of the importance-weighted bound of a latent-variable model.
        limit: Only so many images, the head of one fixed permutation; see
            :meth:`lightning_genmodels.data.BinarizedMNISTDataModule.subset`.
        seed: Seed of the noise.
        accelerator: As Lightning's Trainer takes it.
        devices: Number of processes, which are started as ``ddp``. Default: those that torchrun or srun started, on one
            node or several, or one.
        precision: As Lightning's Trainer takes it; sums are in at least float32 in any case.
        ais: Temperatures of annealed importance sampling, by :func:`evaluate_ais`; 0 for none.
        probe: Also a linear probe on codes, by :func:`evaluate_probe`.
        samples: Also the quality of so many samples, by :func:`evaluate_quality`; 0 for none.
        extractor: File of the digit classifier that judges them; default: the one that ships.

    Returns:
        The report, or None on every process but the first.

    Raises:
        OptionError: The data do not fit the model, or a number is below one.
        DataError: Data missing or corrupt.
    """
    if data.event_shape != model.event_shape:
        raise OptionError(
            f"the model takes images of shape {model.event_shape}, the data have {data.event_shape}; "
            f"choose --data.image_size {model.event_shape[-1]}"
        )
    if num_particles < 1 or (limit is not None and limit < 1):
        raise OptionError(f"expected num_particles and limit of at least 1, got {num_particles} and {limit}")
    if samples:
        check_quality(model, samples, DigitClassifier.load(extractor or SHIPPED))  # before what takes long
    evaluator = _Evaluator(model, data, split, list(estimators(model, num_particles)), limit, seed)
    options: dict[str, Any] = {"devices": devices, "num_nodes": 1}
    trainer_options(options)
    options["devices"] = options["devices"] or 1
    try:
        trainer = Trainer(
            **options,
            accelerator=accelerator,
            precision=precision,
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
    for name, estimator in estimators(model, num_particles).items():
        values = evaluator.found[name]  # of all processes: a torchmetrics.Metric would gather them again
        value = values.mean().item()
        figures[name] = {
            "estimator": estimator,
            "value": value,
            "standard_error": values.std().item() / math.sqrt(len(values)),
            "bits_per_dimension": bits_per_dimension(value, model.event_shape),
            "images_per_second": evaluator.rates[name],
        }
    metrics = {
        "model": model_name(type(model)),
        "num_parameters": model.num_parameters,
        "protocol": {
            **data.protocol,
            "split": split,
            "num_images": evaluator.num_images,
            **({"subset": SUBSET} if evaluator.is_subset else {}),
        },
        "figures": figures,
        "sampling": {"num_images": 64, "seconds": _sampling_seconds(model, 64)},
        "seed": seed,
        "precision": str(precision),
        "processes": trainer.world_size,
        "device": _device_name(model.device),
        "versions": _versions(),
    }
    if ais:
        images = min(limit or 200, 200)
        metrics["ais"] = evaluate_ais(model, data, split, num_images=images, num_temperatures=ais, seed=seed)
    if probe:
        metrics["probe"] = evaluate_probe(model, data, seed=seed)
    if samples:
        quality = evaluate_quality(model, data, split, num_samples=samples, extractor=extractor, seed=seed)
        metrics["quality"] = quality
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

    def __init__(
        self,
        model: GenerativeModel,
        data: BinarizedMNISTDataModule,
        split: Split,
        figures: list[str],
        limit: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.data = data
        self.split = split
        self.figures = figures
        self.limit = limit
        self.seed = seed
        self.gathered = torch.nn.ModuleDict({name: PerImage() for name in figures})
        self.seconds = dict.fromkeys(figures, 0.0)
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
        self.keys = self.data.subset(self.split, self.limit)
        images = self.data.images(self.split)
        self.is_subset = len(self.keys) < len(images)
        images = images[self.keys]
        self.num_images = len(images)
        rows = min([batch_size(self.model, particles_of(name)) for name in self.figures], default=500)
        world = self.trainer.world_size
        return InMemoryLoader(images, rows * world, rank=self.global_rank, world_size=world)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        places = process_share(self.num_seen, len(batch), self.global_rank, self.trainer.world_size)
        self.num_seen += len(batch)
        keys = self.keys[places.start : places.stop : places.step].tolist()
        for name in self.figures:
            start = time.perf_counter()
            values = -score(self.model, batch, keys, name, seed=self.seed)
            self.gathered[name].update(torch.tensor(places, device=values.device), values)  # type: ignore[operator]
            self.seconds[name] += time.perf_counter() - start

    def on_test_epoch_end(self) -> None:
        self.device_of_test = self.device
        for name in self.figures:
            self.found[name] = self.gathered[name].compute().cpu()  # type: ignore[operator]
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
