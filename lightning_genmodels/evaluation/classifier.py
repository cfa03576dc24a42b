"""A classifier of binarized digits, whose features and classes are used to judge samples.

One for images of another size is trained in minutes::

    python -m lightning_genmodels.evaluation.classifier classifier.safetensors --data.image_size 14
    genmodels evaluate NAME --samples 10000 --extractor classifier.safetensors
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError, WeightsError, at_least, first_line
from lightning_genmodels.functional import at_least_float32, check_images
from lightning_genmodels.system import check_output, write_atomically

CLASSES = 10

SHIPPED = Path(__file__).parent / "digit_classifier.safetensors"
"""The classifier behind every published figure; its accuracy lies beside it."""

_OPTIONS = "digit_classifier"  # in the header of the file
_MAX_BYTES = 1 << 26
_DECAY = 0.999


class DigitClassifier(nn.Module):
    """Two convolutions that each halve the image (after LeCun et al. 1998), a layer of features, and a class.

    Args:
        event_shape: (1, H, W) of one image.
        channels: Of the convolutions.
        num_features: D, units of the layer before the class, ReLU.
        dropout: Fraction of hidden units that training drops.

    Raises:
        OptionError: A size below one, or a fraction outside [0, 1).
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        num_features: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if len(channels) != 2 or min([*channels, num_features]) < 1 or not 0.0 <= dropout < 1.0:
            raise OptionError(
                "expected two channels and num_features of at least 1, and dropout in [0, 1), got "
                f"channels={tuple(channels)}, num_features={num_features}, dropout={dropout}"
            )
        self.options = {
            "event_shape": list(event_shape),
            "channels": list(channels),
            "num_features": num_features,
            "dropout": dropout,
        }
        first, second = channels
        _, height, width = event_shape
        self.event_shape = (1, height, width)
        self.num_features = num_features
        self.encoder = nn.Sequential(
            nn.Conv2d(1, first, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(second * math.ceil(height / 4) * math.ceil(width / 4), num_features),
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, CLASSES))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, D), at least float32, of binary images (B, 1, H, W).

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        images = check_images(x, self.event_shape).to(next(self.parameters()))
        return at_least_float32(self.encoder(images))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of the classes of binary images (B, 1, H, W)."""
        return at_least_float32(self.classifier(self.features(x)))

    def save(self, file: Path) -> None:
        """Writes one safetensors file, whose header holds the options; numbers in half precision.

        Raises:
            FileError: It cannot be written.
        """
        state = {name: tensor.half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(file, safetensors.torch.save(state, metadata={_OPTIONS: json.dumps(self.options)}))

    @classmethod
    def load(cls, file: Path = SHIPPED) -> Self:
        """Reads what :meth:`save` wrote, in evaluation mode.

        Raises:
            WeightsError: There is no such file, or it holds something else.
        """
        try:
            if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size > _MAX_BYTES:
                raise ValueError(f"expected a file of at most {_MAX_BYTES >> 20} MiB")
            with safetensors.safe_open(file, "pt") as found:
                options = json.loads((found.metadata() or {})[_OPTIONS])
                state = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
            with torch.device("meta"):
                shapes = {name: tensor.shape for name, tensor in cls(**options).state_dict().items()}
            if shapes != {name: tensor.shape for name, tensor in state.items()}:
                raise ValueError("its tensors are those of another network")
            classifier = cls(**options)
            classifier.load_state_dict(state)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise WeightsError(
                f"{file} holds no digit classifier ({type(error).__name__}: {first_line(error)}); train one with "
                f"python -m {__name__}"
            ) from error
        return classifier.eval()


def train_classifier(
    data: BinarizedMNISTDataModule, epochs: int = 12, learning_rate: float = 0.002, seed: int = 0
) -> DigitClassifier:
    """Trains a classifier: AdamW, a rate that falls as a cosine, and an average of the weights.

    Args:
        data: A data module with labels, ``labelled=True``.
        epochs: Passes over the training images.
        learning_rate: Its peak, after 200 steps.
        seed: Of the initial weights and of what is dropped; the global generator stays as it is.

    Returns:
        The averaged classifier, in evaluation mode.

    Raises:
        OptionError: The data have no labels, or there are no epochs.
    """
    at_least(1, epochs=epochs)
    if not data.labelled:
        raise OptionError("a classifier is trained on labels; set --data.labelled true")
    data.prepare_data()
    loader: Any = data.train_dataloader()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        classifier = DigitClassifier(data.event_shape)
        average = AveragedModel(classifier, avg_fn=_averaged)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.0)
        total, warmup = epochs * len(loader), min(200, len(loader))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / total))
        )
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for images, labels in loader:
                loss = F.cross_entropy(classifier(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                average.update_parameters(classifier)
    trained = average.module
    assert isinstance(trained, DigitClassifier)
    return trained.eval()


def _averaged(average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
    """An exponential moving average whose horizon is a tenth of the run so far, until it has its full length."""
    return torch.lerp(average, current, 1.0 - min(_DECAY, (1.0 + int(steps)) / (10.0 + int(steps))))


@torch.no_grad()
def accuracy(classifier: DigitClassifier, data: BinarizedMNISTDataModule, split: Split = "test") -> tuple[float, float]:
    """The fraction of images whose class is right, and its standard error.

    Raises:
        OptionError: The data have no labels.
        ImageError: The data have another shape.
    """
    data.prepare_data()
    images, labels = data.images(split), data.labels(split)
    right = torch.cat([classifier(part).argmax(dim=1).cpu() for part in images.split(500)]) == labels
    value = right.double().mean().item()
    return value, math.sqrt(value * (1.0 - value) / len(images))


def main(args: Sequence[str] | None = None) -> None:
    """``python -m lightning_genmodels.evaluation.classifier FILE``: trains a classifier, and says how good it is."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="The .safetensors file to write.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_class_arguments(BinarizedMNISTDataModule, "data")
    parser.set_defaults({"data.binarization": "dynamic", "data.labelled": True})
    options = parser.instantiate(parser.parse_args(args))
    check_output(options.file, [".safetensors"])
    classifier = train_classifier(options.data, options.epochs)
    value, error = accuracy(classifier, options.data)
    classifier.save(options.file)
    print(f"accuracy {value:.4f} ± {error:.4f} on test images: {options.file}")


if __name__ == "__main__":
    main()
