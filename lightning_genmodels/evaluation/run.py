"""The one evaluation protocol behind every published figure.

Every image is counted once, on any number of processes. Noise is keyed by (seed, image), so that a figure does not
depend on batches, processes or the device. All figures are *negative* log-likelihoods, or upper bounds on them, in nats
per image: lower is better.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import safetensors.torch
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_genmodels import __version__
from lightning_genmodels.base import (
    ExplicitModel,
    GenerativeModel,
    LatentVariableModel,
    OrderMixture,
)
from lightning_genmodels.base.metrics import PerImage
from lightning_genmodels.data import BinarizedMNISTDataModule, InMemoryLoader
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError, first_line
from lightning_genmodels.evaluation.ais import ais_bound, ais_bracket, images_at_once
from lightning_genmodels.evaluation.classifier import SHIPPED, DigitClassifier
from lightning_genmodels.evaluation.probe import linear_probe
from lightning_genmodels.evaluation.quality import FEWEST, Judge, Quality, deviation, mean, with_deviation
from lightning_genmodels.functional import as_float64, bits_per_dimension
from lightning_genmodels.models import Bernoulli
from lightning_genmodels.random import derive_seed, keyed_generators, process_share
from lightning_genmodels.system import leave_group_at_exit, write_atomically
from lightning_genmodels.weights.names import model_name

SUBSET = "head of a fixed permutation"
"""Which images an evaluation takes that does not take all."""

METRICS, VALUES = "metrics.json", "values.safetensors"

_FIRST_ORDER = "nll_first_order"

EXTRACTOR = "digit_classifier"
"""What figures call the digit classifier that ships."""

_ROWS = 1000  # images times particles at once, where no cache limits them


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


def estimators(model: GenerativeModel, num_particles: int) -> dict[str, str]:
    """The figures that a model can be given, and how each is estimated: none for an implicit model."""
    if isinstance(model, OrderMixture) and len(model.pixel_orders) > 1:
        return {"nll": f"exact, {len(model.pixel_orders)} orders", _FIRST_ORDER: "exact, first order alone"}
    if isinstance(model, ExplicitModel):
        return {"nll": "exact"}
    if isinstance(model, LatentVariableModel):
        return {"nelbo": "ELBO, 1 particle", f"iw{num_particles}": f"IW bound, k={num_particles}"}
    return {}


@torch.no_grad()
def score(model: GenerativeModel, x: Tensor, indices: Sequence[int], figure: str, *, seed: int = 0) -> Tensor:
    """Log-probabilities of images, or lower bounds on them.

    Args:
        model: An explicit or latent-variable model.
        x: (N, 1, H, W) binary images.
        indices: The N images' indices in their data set, which key the noise.
        figure: "nll", "nll_first_order", "nelbo" or "iw<k>".
        seed: Seed of the noise.

    Returns:
        (N,) float64 nats per image. N times the particles in memory is bounded, whatever N and k.

    Raises:
        OptionError: The model cannot be given this figure.
    """
    particles = _particles(figure)
    if figure not in estimators(model, particles):
        raise OptionError(f"a {type(model).__name__} has no figure {figure!r}; it has {list(estimators(model, 1))}")
    parts = []
    for part, keys in zip(*_split(x, indices, _batch_size(model, particles)), strict=True):
        if isinstance(model, LatentVariableModel):
            noise = keyed_generators(seed, keys)
            is_elbo = figure == "nelbo"
            parts.append(
                model.elbo(part, generator=noise) if is_elbo else model.iw_bound(part, particles, generator=noise)
            )
        elif isinstance(model, OrderMixture) and figure == _FIRST_ORDER:
            parts.append(model.log_prob_by_order(part, [0])[0])
        elif isinstance(model, ExplicitModel):
            parts.append(model.log_prob(part))
    return as_float64(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.float64)


def evaluate(
    model: GenerativeModel,
    data: BinarizedMNISTDataModule,
    split: Split = "test",
    *,
    num_particles: int = 5000,
    limit: int | None = None,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
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
        devices: Number of processes; more than one starts them as ``ddp``.
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
        _check_quality(model, samples, DigitClassifier.load(extractor or SHIPPED))  # before what takes long
    evaluator = _Evaluator(model, data, split, list(estimators(model, num_particles)), limit, seed)
    try:
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
        )
    except ValueError as error:
        raise OptionError(first_line(error)) from error
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


def evaluate_ais(
    model: GenerativeModel,
    data: BinarizedMNISTDataModule,
    split: Split = "test",
    *,
    num_images: int = 200,
    num_temperatures: int = 1000,
    num_chains: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Annealed importance sampling on some images of a split, and on as many images that the model draws.

    Args:
        model: A latent-variable model, in evaluation mode.
        data: The data module.
        split: train, val or test.
        num_images: Images of each kind; of the split, the head of one fixed permutation.
        num_temperatures: See :func:`lightning_genmodels.evaluation.ais.ais_bound`.
        num_chains: See :func:`lightning_genmodels.evaluation.ais.ais_bound`.
        seed: Seed of the noise.

    Returns:
        JSON: the mean upper bound on the negative log-likelihood with its standard error, and for the simulated images
        both bounds and the gap between them; nats per image.

    Raises:
        OptionError: Another kind of model, or a number below one.
    """
    if not isinstance(model, LatentVariableModel):
        raise OptionError(f"a {type(model).__name__} has no latent variables to anneal; leave out --ais")
    data.prepare_data()
    chosen = data.subset(split, num_images)
    images = data.images(split)[chosen].to(model.device).float()
    size = images_at_once(num_chains)
    parts = [
        ais_bound(
            model,
            part,
            num_temperatures=num_temperatures,
            num_chains=num_chains,
            generator=keyed_generators(seed, keys),
        )
        for part, keys in zip(*_split(images, chosen.tolist(), size), strict=True)
    ]
    bracket = ais_bracket(
        model, num_images, num_temperatures=num_temperatures, num_chains=num_chains, seed=derive_seed("ais", seed)
    )
    return {
        "estimator": f"{num_temperatures:,} temperatures, {num_chains} chains",
        "num_images": len(images),
        **_mean_and_error(-torch.cat(parts).cpu()),
        "simulated": {
            "num_images": num_images,
            "lower_bound": _mean_and_error(-bracket.upper),
            "upper_bound": _mean_and_error(-bracket.lower),
            "gap": _mean_and_error(bracket.upper - bracket.lower),
        },
    }


def evaluate_probe(model: GenerativeModel, data: BinarizedMNISTDataModule, *, seed: int = 0) -> dict[str, Any]:
    """A linear probe on codes, raw pixels and a random encoder, by
    :func:`lightning_genmodels.evaluation.probe.linear_probe`.

    Static binarized MNIST has no labels: there the probe takes the draws of the dynamic one, and says so.

    Returns:
        JSON: the binarization, and by kind of features their number, the accuracy and its standard error.

    Raises:
        OptionError: The model has no codes, or scikit-learn is not installed.
    """
    if data.source == "mnist" and data.binarization == "static":
        data = BinarizedMNISTDataModule(str(data.root), binarization="dynamic", image_size=data.image_size)
    data.prepare_data()
    results = linear_probe(model, data, seed=seed)
    return {"binarization": data.binarization, "results": {kind: asdict(result) for kind, result in results.items()}}


def evaluate_quality(
    model: GenerativeModel,
    data: BinarizedMNISTDataModule,
    split: Split = "test",
    *,
    num_samples: int = 10_000,
    num_seeds: int = 3,
    extractor: Path | None = None,
    seed: int = 0,
    reference: QualityReference | None = None,
) -> dict[str, Any]:
    """Judges samples beside the images of a split; see :class:`lightning_genmodels.evaluation.quality.Quality`.

    Args:
        model: Any model, in evaluation mode.
        data: The data module.
        split: train, val or test.
        num_samples: How many images the model draws. The Fréchet distance falls with their number, so figures of
            different numbers are not comparable.
        num_seeds: How many such sets it draws: every figure is their mean, with the standard deviation over them.
        extractor: File of the digit classifier whose features and classes are taken; default: the one that ships.
        seed: Seed of the samples.
        reference: What they stand beside, if it was made before, with the same arguments.

    Returns:
        JSON: means (``results``) and standard deviations (``deviations``) of the figures of the ``samples``; of the
        ``floor``, as many training images (for ``nearest`` and ``copies``: the images of the split); and of the
        ``ceiling``, as many draws of independent pixels fitted to the training images.

    Raises:
        OptionError: Too few samples or seeds, or a classifier of images of another shape.
        WeightsError: There is no such classifier.
    """
    classifier = DigitClassifier.load(extractor or SHIPPED).to(model.device)
    _check_quality(model, num_samples, classifier)
    if num_seeds < 2:
        raise OptionError(f"expected num_seeds of at least 2, whose deviation is the error, got {num_seeds}")
    reference = reference or QualityReference(data, split, num_samples, num_seeds, classifier, seed)
    found = {"samples": [reference.judge.judge(reference.draw(model, repeat)) for repeat in range(num_seeds)]}
    found |= {"floor": reference.floor, "ceiling": reference.ceiling}
    return {
        "num_samples": num_samples,
        "num_seeds": num_seeds,
        "num_real": reference.num_real,
        "split": split,
        "extractor": EXTRACTOR if extractor is None else str(extractor),
        "results": {name: mean(qualities) for name, qualities in found.items()},
        "deviations": {name: deviation(qualities) for name, qualities in found.items()},
    }


class QualityReference:
    """What the samples of every model are judged by and stand beside: real images, and draws of independent pixels.

    Args:
        data: The data module.
        split: train, val or test.
        num_samples: Images in a set.
        num_seeds: Sets.
        classifier: In evaluation mode.
        seed: Seed of all sets.
    """

    def __init__(
        self,
        data: BinarizedMNISTDataModule,
        split: Split,
        num_samples: int,
        num_seeds: int,
        classifier: DigitClassifier,
        seed: int = 0,
    ) -> None:
        data.prepare_data()
        train, real = data.images("train"), data.images(split)
        self.num_samples, self.seed, self.num_real = num_samples, seed, len(real)
        self.judge = Judge(classifier, train, real)
        independent = Bernoulli(data.event_shape)
        independent.initialize(train)
        self.floor: list[Quality] = []
        self.ceiling: list[Quality] = []
        for repeat in range(num_seeds):
            chosen = torch.randperm(len(train), generator=self._source("floor", repeat))[:num_samples]
            self.floor.append(self.judge.judge(train[chosen], neighbours_of=self.judge.nearest))
            self.ceiling.append(self.judge.judge(self.draw(independent, repeat)))

    def draw(self, model: GenerativeModel, repeat: int) -> Tensor:
        """A set of samples of a model, on the CPU."""
        return model.sample(self.num_samples, generator=self._source("samples", repeat)).cpu()

    def _source(self, kind: str, repeat: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed("quality", kind, self.seed, repeat))


def _check_quality(model: GenerativeModel, num_samples: int, classifier: DigitClassifier) -> None:
    if num_samples < FEWEST:
        raise OptionError(f"expected samples of at least {FEWEST}, got {num_samples}")
    if classifier.event_shape != model.event_shape:
        raise OptionError(
            f"the extractor takes images of shape {classifier.event_shape}, the model draws {model.event_shape}; "
            "name a classifier of such images with --extractor"
        )


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


def _versions() -> dict[str, str]:
    return {
        "lightning_genmodels": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def _mean_and_error(values: Tensor) -> dict[str, float]:
    return {"value": values.mean().item(), "standard_error": values.std().item() / math.sqrt(len(values))}


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
        rows = min([_batch_size(self.model, _particles(name)) for name in self.figures], default=500)
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


def _particles(figure: str) -> int:
    return int(figure[2:]) if figure.startswith("iw") else 1


def _batch_size(model: GenerativeModel, num_particles: int) -> int:
    on_cpu = model.device.type == "cpu"
    if isinstance(model, LatentVariableModel):
        rows = model.score_rows if on_cpu else _ROWS
        return max(1, min(500, rows // min(num_particles, model.particle_block)))
    return model.score_chunk if isinstance(model, ExplicitModel) and on_cpu else 500


def _split(x: Tensor, indices: Sequence[int], size: int) -> tuple[Sequence[Tensor], list[Sequence[int]]]:
    return x.split(size), [indices[start : start + size] for start in range(0, len(indices), size)]


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
