"""Sample quality, judged by the features and predicted classes of a digit classifier.

Every figure stands beside what real training images get (the floor) and what independent pixels get (the ceiling):
alone it means nothing. None of them is a likelihood, and none sees everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.base.metrics import FrechetDistance
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.classifier import CLASSES, SHIPPED, DigitClassifier
from lightning_genmodels.models import Bernoulli
from lightning_genmodels.random import derive_seed

NEIGHBOURS = 3
"""k of precision and recall, as Kynkäänniemi et al. (2019) choose it."""

COVERING_NEIGHBOURS = 5
"""k of coverage, as Naeem et al. (2020) choose it."""

FEWEST = 100
"""Images in a set that is judged: with fewer the figures are noise."""

_COMMON = 0.99  # of the test images are farther from the training images than what counts as a copy


@dataclass(frozen=True)
class Quality:
    """A set of images beside real ones.

    Attributes:
        frechet: Fréchet distance between the features of the set and of the test images (Heusel et al. 2017, eq. 6).
        precision: Fraction of the set that lies among the test images, in features (Kynkäänniemi et al. 2019, eq. 2).
            It is high for the ceiling, too, for a classifier sees noise amid what it knows: by itself it says nothing.
        recall: Fraction of the test images that lie among the set.
        coverage: Fraction of the test images in whose neighbourhood one of the set lies (Naeem et al. 2020).
        classes: Number of classes at least half as frequent as in the test images.
        rarest_class: Share of the rarest class, in units of 1/10.
        commonest_class: Share of the commonest class, in units of 1/10.
        label_kl: KL divergence of the frequencies of the classes from those of the test images, nats.
        nearest: Pixels in which an image differs from the training image next to it, mean over the set.
        copies: Fraction of the set that is nearer to a training image than 99 % of the test images are.
    """

    frechet: float
    precision: float
    recall: float
    coverage: float
    classes: int
    rarest_class: float
    commonest_class: float
    label_kl: float
    nearest: float
    copies: float


class Judge:
    """Judges sets of images beside real ones, by a classifier's features and classes.

    Args:
        classifier: In evaluation mode, on any device; distances and neighbourhoods are those of its features.
        train: (N, 1, H, W) binary training images.
        test: (M, 1, H, W) binary test images.

    Raises:
        OptionError: The classifier takes images of another shape, or there are too few.
    """

    def __init__(self, classifier: DigitClassifier, train: Tensor, test: Tensor) -> None:
        if tuple(test.shape[1:]) != classifier.event_shape:
            raise OptionError(
                f"the classifier takes images of shape {classifier.event_shape}, these are {tuple(test.shape[1:])}; "
                "train one for them, and name it with --extractor"
            )
        self.classifier = classifier
        self.train = train
        self.features, self.shares = self._seen(test)
        self.radii = _radii(self.features, NEIGHBOURS)
        self.covering_radii = _radii(self.features, COVERING_NEIGHBOURS)
        self.nearest = nearest(test, train)  # (M,)

    def judge(self, images: Tensor, *, neighbours_of: Tensor | None = None) -> Quality:
        """Judges a set of images.

        Args:
            images: (K, 1, H, W) binary images.
            neighbours_of: (L,) distances as of :func:`nearest`, instead of those of the images: training images are
                their own neighbours, and so would seem copied.

        Raises:
            OptionError: There are too few.
        """
        features, shares = self._seen(images)
        frechet = FrechetDistance(self.classifier.num_features)
        frechet.update(self.features, real=True)
        frechet.update(features, real=False)
        distances = nearest(images, self.train) if neighbours_of is None else neighbours_of
        return Quality(
            frechet=max(0.0, frechet.compute().item()),
            precision=_share(_among(features, self.features, self.radii)),
            recall=_share(_among(self.features, features, _radii(features, NEIGHBOURS))),
            coverage=_share(_to_next(self.features, features) <= self.covering_radii),
            classes=int((shares >= self.shares / 2).sum()),
            rarest_class=CLASSES * shares.min().item(),
            commonest_class=CLASSES * shares.max().item(),
            label_kl=kl_divergence(Categorical(probs=shares), Categorical(probs=self.shares)).item(),
            nearest=distances.mean().item(),
            copies=_share(distances < torch.quantile(self.nearest, 1 - _COMMON)),
        )

    @torch.no_grad()
    def _seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) of images, and the frequencies (10,) of their classes; float64."""
        if len(images) < FEWEST:
            raise OptionError(f"expected at least {FEWEST} images to judge, got {len(images)}")
        features = torch.cat([self.classifier.features(part) for part in images.split(500)])
        classes = self.classifier.classifier(features).argmax(dim=1).cpu()
        return features.cpu().double(), torch.bincount(classes, minlength=CLASSES).double() / len(classes)


def nearest(images: Tensor, train: Tensor) -> Tensor:
    """In how many pixels images differ from the training image next to them, (N,) float64.

    Args:
        images: (N, 1, H, W) binary images.
        train: (M, 1, H, W) binary training images.
    """
    rows = train.flatten(1).float()  # (M, n)
    ones = rows.sum(dim=1)
    found = []
    for part in images.flatten(1).float().split(500):
        differing = part.sum(dim=1, keepdim=True) + ones - 2 * part @ rows.T  # (B, M), whole numbers
        found.append(differing.amin(dim=1))
    return torch.cat(found).double()


def mean(qualities: Sequence[Quality]) -> dict[str, float]:
    """The mean of every figure over several sets of samples."""
    return {key: float(torch.tensor(values).mean()) for key, values in _figures(qualities).items()}


def deviation(qualities: Sequence[Quality]) -> dict[str, float]:
    """The standard deviation of every figure over several sets of samples."""
    return {key: float(torch.tensor(values).std()) for key, values in _figures(qualities).items()}


def _figures(qualities: Sequence[Quality]) -> dict[str, list[float]]:
    return {key: [float(getattr(quality, key)) for quality in qualities] for key in Quality.__annotations__}


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each of (N, D) features from its k-th neighbour, (N,)."""
    parts = features.split(1000)
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in parts])


def _among(queries: Tensor, features: Tensor, radii: Tensor) -> Tensor:
    """Whether each of (K, D) queries lies within the radius (N,) of any of (N, D) features: (K,)."""
    return torch.cat([(torch.cdist(part, features) <= radii).any(dim=1) for part in queries.split(1000)])


def _to_next(queries: Tensor, features: Tensor) -> Tensor:
    """Distance of each of (K, D) queries from the next of (N, D) features, (K,)."""
    return torch.cat([torch.cdist(part, features).amin(dim=1) for part in queries.split(1000)])


def _share(which: Tensor) -> float:
    return which.double().mean().item()


EXTRACTOR = "digit_classifier"
"""What figures call the digit classifier that ships."""


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
    check_quality(model, num_samples, classifier)
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


def check_quality(model: GenerativeModel, num_samples: int, classifier: DigitClassifier) -> None:
    """Checks that samples can be judged, before anything that takes long.

    Raises:
        OptionError: Too few samples, or a classifier of images of another shape.
    """
    if num_samples < FEWEST:
        raise OptionError(f"expected samples of at least {FEWEST}, got {num_samples}")
    if classifier.event_shape != model.event_shape:
        raise OptionError(
            f"the extractor takes images of shape {classifier.event_shape}, the model draws {model.event_shape}; "
            "name a classifier of such images with --extractor"
        )
