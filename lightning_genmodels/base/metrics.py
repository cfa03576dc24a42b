"""Metrics that count every image once, on any number of processes, with sums in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance  # the package exports it with torch-fidelity alone

from lightning_genmodels.functional import as_float64, bits_per_dimension, has_float64


class Estimate(NamedTuple):
    """A figure and its standard error, float64 scalars in the same unit."""

    value: Tensor
    standard_error: Tensor


class _Float64Metric(Metric):
    """A metric whose states stay in float64; on the CPU, if the module moves to a device without float64."""

    full_state_update = False

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Does nothing: the states stay in float64 when a module that holds the metric changes its precision."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Self:
        # Torchmetrics tells conversions of type, which it leaves out, by the function itself: it is not to be wrapped.
        if not has_float64(fn(torch.zeros((), device=self.device)).device.type):
            return self
        moved: Self = super()._apply(fn, exclude_state)  # type: ignore[assignment]
        return moved


class MeanWithError(_Float64Metric):
    """Mean of one value per image, with the standard error of that mean.

    The states are a float64 sum and sum of squares (both of deviations from a fixed ``offset``, so that neither loses
    digits) and an int64 count, all summed over processes: the result does not depend on how the images were split.

    Args:
        offset: Any constant near the values. It does not change the result beyond rounding.
    """

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, offset: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offset = offset
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds one value per image, (B,)."""
        deviations = as_float64(values.detach()) - self.offset
        self.total += deviations.sum()
        self.squares += deviations.square().sum()
        self.count += deviations.numel()

    def compute(self) -> Estimate:
        """The mean and its standard error (NaN for fewer than two images), over all processes."""
        variance = (self.squares - self.total.square() / self.count) / (self.count - 1)
        return Estimate(self.total / self.count + self.offset, torch.sqrt(variance.clamp(min=0.0) / self.count))


class NegativeLogLikelihood(MeanWithError):  # noqa: N818, an error is something else
    """Mean negative log-likelihood (or a bound on it) in nats per image, with its standard error.

    Args:
        event_shape: (1, H, W) of one image.

    Example:
        >>> metric = NegativeLogLikelihood(event_shape=(1, 2, 2))
        >>> metric.update(torch.tensor([-2.0, -4.0]))
        >>> estimate = metric.compute()
        >>> round(estimate.value.item(), 6), round(estimate.standard_error.item(), 6)
        (3.0, 1.0)
    """

    def __init__(self, event_shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(offset=math.prod(event_shape) * 0.1, **kwargs)
        self.event_shape = tuple(event_shape)

    def update(self, log_prob: Tensor) -> None:
        """Adds log-probabilities, (B,) nats per image."""
        super().update(-log_prob)

    def bits_per_dimension(self) -> Estimate:
        """The same figures in bits per pixel."""
        value, error = self.compute()
        return Estimate(*(nats * bits_per_dimension(1.0, self.event_shape) for nats in (value, error)))


class FrechetDistance(_Float64Metric, FrechetInceptionDistance):
    """The Fréchet distance between two sets of images in any feature space (Heusel et al. 2017, eq. 6).

    It is updated with features (B, D), which whoever has the images extracts: so several metrics share them, and none
    holds weights that would be saved with a model.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(nn.Identity(), input_img_size=(num_features,))  # type: ignore[arg-type]

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (B, D), of real images or of samples."""
        super().update(as_float64(features), real)


class PerImage(_Float64Metric):
    """Collects one value per image from all processes, and returns them in the order of the images' indices."""

    indices: list[Tensor]
    values: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, indices: Tensor, values: Tensor) -> None:
        """Adds values (B,) of the images with these indices (B,)."""
        wide = as_float64(values.detach())
        self.indices.append(indices.to(wide.device))
        self.values.append(wide)

    def compute(self) -> Tensor:
        """(N,) float64 values, sorted by image index.

        Raises:
            RuntimeError: An image was counted twice.
        """
        indices = self.indices if isinstance(self.indices, Tensor) else torch.cat(self.indices)
        values = self.values if isinstance(self.values, Tensor) else torch.cat(self.values)
        order = indices.argsort()
        if len(indices) != len(indices.unique()):
            raise RuntimeError(f"{len(indices) - len(indices.unique())} images were evaluated more than once")
        return values[order]


def mean_and_error(values: Tensor) -> dict[str, float]:
    """The mean of values (N,) and its standard error; JSON."""
    return {"value": values.mean().item(), "standard_error": values.std().item() / math.sqrt(len(values))}
