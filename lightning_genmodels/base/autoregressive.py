"""The chain rule: models that predict one pixel after the other, in one order or in several."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from lightning_genmodels.base.completion import CompletionModel
from lightning_genmodels.base.explicit import ExplicitModel
from lightning_genmodels.base.generative import GenerativeModel, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import as_numbers, bernoulli_log_prob, check_mask, check_observed, log_mean_exp
from lightning_genmodels.orders import pixel_order
from lightning_genmodels.random import check_generator, uniform


class AutoregressiveModel(ExplicitModel, CompletionModel, ABC):
    """p(x) = prod_i p(x_i | x_<i) in one order of the pixels: the chain rule, exact whatever the conditionals are.

    It implements ``conditional_logits`` and ``_fill``.

    Args:
        event_shape: (1, H, W) of one image.
        order: Name of the pixel order; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of a random order.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: No order has this name.
    """

    pixel_order: Tensor
    """(n,) row-major index of the first, second, ... pixel; computed from its name, so no part of the weights."""

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        order: str = "raster",
        order_seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        permutation = pixel_order(order, *self.event_shape[1:], seed=order_seed)
        self.register_buffer("pixel_order", permutation, persistent=False)

    @abstractmethod
    def conditional_logits(self, x: Tensor) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) for every pixel i, (B, 1, H, W), of images (B, 1, H, W) in {0, 1}."""

    @abstractmethod
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        """Draws the pixels that are not observed, in order; see :func:`lightning_genmodels.functional.fill_in_order`,
        with which it agrees.

        Args:
            x: (N, 1, H, W) in {0, 1}.
            observed: (N, 1, H, W) bool.
            uniforms: (N, n) in [0, 1); column i draws the i-th pixel of the order.

        Returns:
            (N, 1, H, W).
        """

    @final
    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(self.conditional_logits(x), x)

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        x, observed, uniforms = _nothing_observed(self, num_samples, generator)
        return self._fill(x, observed, uniforms)

    @final
    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws the pixels that are not observed, given those that are.

        Every pixel is drawn given the pixels before it in the order. That is a draw from p(x_unobserved | x_observed)
        where the observed pixels come first in the order; elsewhere it is an approximation that ignores what is
        observed later, and a warning says so.

        Arguments, result and errors are those of :meth:`CompletionModel.complete`.
        """
        check_generator(generator)
        x, observed = check_observed(x, observed, self.event_shape, next(self.parameters()))
        if not len(x):
            return x.float()
        uniforms = uniform((len(x), math.prod(self.event_shape)), generator, x)
        _warn_of_ignored(self._ignored(observed), "the order of the model")
        return self._fill(x, observed, uniforms).float()

    @final
    def num_ignored(self, observed: Tensor) -> Tensor:
        """Number of observed pixels that come after missing ones in the order, which :meth:`complete` ignores there.

        Args:
            observed: Zeros and ones, or booleans, (B, 1, H, W) or what broadcasts to (1, 1, H, W).

        Returns:
            (B,) int64; 0 where a completion is exact.

        Raises:
            ImageError: ``observed`` has another shape or other values.

        Example:
            >>> from lightning_genmodels import NADE
            >>> NADE((1, 2, 2)).num_ignored(torch.tensor([[False, False], [True, True]]))
            tensor([2])
        """
        return self._ignored(_batch_of_masks(self, observed))

    def _ignored(self, observed: Tensor) -> Tensor:  # (B,)
        return _ignored(observed, self.pixel_order[None])[:, 0]


class OrderMixture(ExplicitModel, CompletionModel, ABC):
    """p(x) = 1/M sum_m p(x; order m): one network that knows several orders of the pixels, and their average.

    What is averaged is the joint probability of the whole image (Uria, Murray and Larochelle 2014, eq. 14), never the
    conditionals, whose average would let a pixel see itself. It implements ``conditional_logits`` and ``_fill``.

    Args:
        event_shape: (1, H, W) of one image.
        orders: Names of the M orders; see :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Order m has the seed ``order_seed + m``, if it is random.
        options: See :class:`GenerativeModel`.

    Raises:
        OptionError: No order at all, or one with an unknown name.
    """

    joint_pixels: ClassVar[int] = 1
    """How many neighbours in the order are drawn together: each is drawn given all of them that are observed."""

    any_order: ClassVar[bool] = False
    """Whether images are completed in an order of their own, in which all observed pixels come first."""

    pixel_orders: Tensor
    """(M, n) row-major indices of the pixels, one order a row; computed from names, so no part of the weights."""

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        orders: Sequence[str] = ("raster",),
        order_seed: int = 0,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if not orders:
            raise OptionError("expected at least one pixel order, got none")
        rows = [pixel_order(name, *self.event_shape[1:], seed=order_seed + m) for m, name in enumerate(orders)]
        self.register_buffer("pixel_orders", torch.stack(rows), persistent=False)

    @abstractmethod
    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of images (B, 1, H, W) in {0, 1}."""

    @abstractmethod
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        """As :meth:`AutoregressiveModel._fill`, image b in the order ``which[b]``; ``which`` is (N,) int64."""

    def _order_log_prob(self, x: Tensor, index: int) -> Tensor:
        """Log-probability (B,) in one order; a model that knows it without the conditionals says how."""
        return bernoulli_log_prob(self.conditional_logits(x, index), x)

    @final
    def log_prob_by_order(self, x: Tensor, orders: Sequence[int] | None = None) -> Tensor:
        """Exact log-probability under single orders.

        Args:
            x: (B, 1, H, W) in {0, 1}.
            orders: Indices of K orders; default: all M.

        Returns:
            (K, B) nats per image.

        Raises:
            ImageError: Wrong shape, NaN, or pixels other than 0 and 1.
        """
        x = self._checked(x)
        chosen = range(len(self.pixel_orders)) if orders is None else orders
        return torch.stack([self._order_log_prob(x, m) for m in chosen])

    @final
    def _log_prob(self, x: Tensor) -> Tensor:
        return log_mean_exp(self.log_prob_by_order(x), dim=0)

    @final
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        x, observed, uniforms = _nothing_observed(self, num_samples, generator)
        which = uniform((num_samples,), generator, x) * len(self.pixel_orders)
        return self._fill(x, observed, uniforms, which.long())

    @final
    @torch.no_grad()
    def complete(self, x: Tensor, observed: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws the pixels that are not observed, given those that are, in the order that suits them best.

        For each image that is the order in which the fewest observed pixels follow a pixel that is not. If none does,
        the draw is exact for the density of *that order*, not for the mixture, whose orders would have to be weighted
        by how likely they make what is observed. Otherwise it ignores what is observed later, and a warning says so.

        Arguments, result and errors are those of :meth:`CompletionModel.complete`.
        """
        check_generator(generator)
        x, observed = check_observed(x, observed, self.event_shape, next(self.parameters()))
        if not len(x):
            return x.float()
        uniforms = uniform((len(x), math.prod(self.event_shape)), generator, x)
        ignored, which = self._fewest_ignored(observed)
        _warn_of_ignored(ignored, "every order of the model")
        return self._fill(x, observed, uniforms, which).float()

    @final
    def num_ignored(self, observed: Tensor) -> Tensor:
        """Number of observed pixels that come after missing ones in the order that suits them best, the one that
        :meth:`complete` takes; see :meth:`AutoregressiveModel.num_ignored`.
        """
        return self._fewest_ignored(_batch_of_masks(self, observed))[0]

    def _fewest_ignored(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """How many observed pixels the best order ignores, and which order that is, (B,) each."""
        ignored, which = _ignored(observed, self.pixel_orders, self.joint_pixels).min(dim=1)
        return torch.zeros_like(ignored) if self.any_order else ignored, which


def _nothing_observed(
    model: GenerativeModel, num_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, H, W) with no pixel observed, and the uniform numbers (N, n) that will draw all of them."""
    x = torch.zeros((num_samples, *model.event_shape)).to(next(model.parameters()))
    uniforms = uniform((num_samples, math.prod(model.event_shape)), generator, x)
    return x, torch.zeros_like(x, dtype=torch.bool), uniforms


def _batch_of_masks(model: GenerativeModel, observed: Any) -> Tensor:
    observed = as_numbers(observed, "a mask of observed pixels")
    count = len(observed) if observed.ndim == 4 else 1
    return check_mask(observed, (count, *model.event_shape)).to(next(model.parameters()).device)


def _ignored(observed: Tensor, orders: Tensor, joint_pixels: int = 1) -> Tensor:  # (B, M)
    """How many observed pixels (B, 1, H, W) come after one to be drawn in each of the orders (M, n)."""
    in_order = observed.flatten(1)[:, orders].unflatten(-1, (-1, joint_pixels))  # (B, M, n / k, k)
    missing = (~in_order).any(-1).cumsum(-1)  # groups up to this one that have a pixel to draw
    begun = F.pad(missing, (1, -1)) > 0
    ignored: Tensor = (in_order & begun.unsqueeze(-1)).flatten(2).sum(-1)
    return ignored


def _warn_of_ignored(ignored: Tensor, orders: str) -> None:
    count = int((ignored > 0).sum())
    if count:
        warnings.warn(
            f"in {count} of {len(ignored)} images, observed pixels come after missing ones in {orders}: they are kept, "
            "but the missing pixels before them are drawn without regard to them; observe pixels that come first, or "
            "take a model that puts them first: eonade does, whichever they are",
            stacklevel=4,  # complete, and its decorator
        )
