"""Models with an exact likelihood, trained by gradients or by counting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_genmodels.base.generative import GenerativeModel, TrainingOptions
from lightning_genmodels.base.metrics import NegativeLogLikelihood
from lightning_genmodels.functional import at_least_float32

_COUNTED_AT_ONCE = 1000  # images


class ExplicitModel(GenerativeModel, ABC):
    """A model with an exact likelihood; subclasses implement ``_log_prob`` and ``_sample``."""

    monitor = "val/nll"

    score_chunk: ClassVar[int] = 500
    """Images that an evaluation scores at once on a CPU, whose cache their activations should fit; no figure depends on
    it."""

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Unpack[TrainingOptions]) -> None:
        super().__init__(event_shape, **options)
        self.val_nll = NegativeLogLikelihood(self.event_shape)
        self.test_nll = NegativeLogLikelihood(self.event_shape)

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor:
        """Log-probability (B,) of images (B, 1, H, W) that are known to be binary."""

    @final
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-probability of images.

        Args:
            x: (B, 1, H, W) in {0, 1}, of any type, on any device.

        Returns:
            (B,) nats per image, summed over pixels in at least float32.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        x = self._checked(x)
        return self._log_prob(x) if x.shape[0] else at_least_float32(x.new_zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`log_prob`, (B,) nats, of images (B, 1, H, W): what ``model(x)`` and ``trainer.predict`` give."""
        return self.log_prob(x)

    def _validation_log_prob(self, x: Tensor, indices: range) -> Tensor:
        """Log-probability (B,) as validated during training: exact, unless that would take longer than training.

        Args:
            x: (B, 1, H, W).
            indices: Of the images in the validation set, by which an estimate keys its noise.
        """
        return self._log_prob(x)

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image."""
        return -self._log_prob(x).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Logs and returns the training loss of a batch, images or (images, ...)."""
        return self._logged(self.training_loss(self._taken(batch)))

    @final
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the validation figure."""
        x = self._taken(batch)
        self.val_nll.update(self._validation_log_prob(x, self._indices(x)))

    @final
    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the test figure."""
        self.test_nll.update(self._log_prob(self._taken(batch)))

    @final
    def on_validation_epoch_end(self) -> None:
        """Logs ``monitor``, which is ``val/nll`` unless that is estimated, in nats per image."""
        self._log_estimate(self.monitor, self.val_nll.compute())
        self.val_nll.reset()

    @final
    def on_test_epoch_end(self) -> None:
        """Logs ``test/nll`` in nats per image."""
        self._log_estimate("test/nll", self.test_nll.compute())
        self.test_nll.reset()


class TabularModel(ExplicitModel, ABC):
    """An explicit model whose parameters are functions of counts, learned in one pass over the data.

    It implements ``statistics`` (what to count), ``fit_statistics`` (parameters from the counts of all images) and
    ``num_free_parameters``. Every fit counts all training images anew when it starts, so that one epoch is enough; of
    dynamic binarization it counts one draw.
    """

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), **options: Any) -> None:
        super().__init__(event_shape, **options)  # a tabular model that is autoregressive, too, has an order
        self.automatic_optimization = False

    @property
    @abstractmethod
    def num_free_parameters(self) -> int:
        """Number of free parameters of the distribution."""

    @abstractmethod
    def statistics(self, x: Tensor) -> Tensor:
        """Sufficient statistics of a batch (B, 1, H, W), an int64 tensor that adds up over batches."""

    @abstractmethod
    def fit_statistics(self, counts: Tensor) -> None:
        """Sets the parameters from the statistics of all training images."""

    @property
    def _starts_anew(self) -> bool:
        return True

    @final
    def _initialize(self, images: Tensor) -> None:
        counts = [self.statistics(part.to(next(self.parameters()))) for part in images.split(_COUNTED_AT_ONCE)]
        self.fit_statistics(torch.stack(counts).sum(dim=0))

    @final
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Does nothing: all images were counted when fitting started."""

    @final
    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None: nothing is learned by gradients."""
        return []
