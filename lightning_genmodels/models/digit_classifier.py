"""A classifier of binarized digits. It is no generative model: its features are what samples are judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import TrainableModel, TrainingOptions
from lightning_genmodels.base.metrics import MeanWithError
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import at_least_float32

CLASSES = 10


class DigitClassifier(TrainableModel):
    """Two convolutions that each halve the image (after LeCun et al. 1998), a layer of features, and a class.

    Args:
        event_shape: (1, H, W) of one image.
        channels: Of the convolutions.
        num_features: D, units of the layer before the class, ReLU.
        dropout: Fraction of hidden units that training drops.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.TrainableModel`.

    Raises:
        OptionError: A size below one, or a fraction outside [0, 1).
    """

    monitor = "val/error"

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        channels: Sequence[int] = (32, 64),
        num_features: int = 64,
        dropout: float = 0.3,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if len(channels) != 2 or min([*channels, num_features]) < 1 or not 0.0 <= dropout < 1.0:
            raise OptionError(
                "expected two channels and num_features of at least 1, and dropout in [0, 1), got "
                f"channels={tuple(channels)}, num_features={num_features}, dropout={dropout}"
            )
        first, second = channels
        _, height, width = self.event_shape
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
        self.val_error, self.test_error = MeanWithError(), MeanWithError()

    def features(self, x: Tensor) -> Tensor:
        """Features (B, D), at least float32, of binary images (B, 1, H, W).

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        return at_least_float32(self.encoder(self._checked(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 10) of the classes of binary images (B, 1, H, W)."""
        return at_least_float32(self.classifier(self.features(x)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logs and returns the cross-entropy, nats."""
        images, labels = self._labelled(batch)
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation figure."""
        self.val_error.update(self._errors(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the test figure."""
        self.test_error.update(self._errors(batch))

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/error``, the fraction of images whose class is predicted wrongly."""
        self._log_estimate("val/error", self.val_error.compute())
        self.val_error.reset()

    def on_test_epoch_end(self) -> None:
        """Logs ``test/error``."""
        self._log_estimate("test/error", self.test_error.compute())
        self.test_error.reset()

    def _errors(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = self._labelled(batch)
        wrong: Tensor = self(images).argmax(dim=1) != labels
        return wrong.float()

    def _labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, Tensor) or len(batch) < 2:
            raise OptionError("a classifier is trained on labels; set --data.labelled true")
        return self._taken(batch), batch[1]
