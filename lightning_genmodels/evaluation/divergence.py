"""How far one distribution is from another, in nats: KL divergence, cross-entropy and entropy.

Between two explicit models of tiny images they are exact, by enumeration of all images. Elsewhere they are means over
samples, with a standard error. Between two distributions of ``torch.distributions`` they are known in closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import kl_divergence as closed_form

from lightning_genmodels.base import ExplicitModel
from lightning_genmodels.base.metrics import Estimate, MeanWithError
from lightning_genmodels.errors import OptionError

MAX_PIXELS = 16
"""Up to so many pixels, all 2^n images are enumerated."""

_BATCH = 500


def kl_divergence(
    p: ExplicitModel | Distribution,
    q: ExplicitModel | Distribution,
    *,
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Estimate:
    """KL(p || q) = E_p[log p(x) - log q(x)] (Kullback and Leibler 1951, eq. 2.2), zero only if p and q are the same.

    It is not symmetric: KL(p || q) asks that q be likely wherever p is, KL(q || p) that it be unlikely elsewhere.

    Args:
        p: The distribution that the mean is over; two models, or two of ``torch.distributions``.
        q: The other one, over the same images.
        num_samples: Images drawn from ``p`` where there are too many to enumerate.
        generator: Source of their randomness; default: PyTorch's global generator.

    Returns:
        Nats per image, float64, with the standard error of the estimate; it is zero where the value is exact. An
        estimate may be negative, the divergence is not. Two of ``torch.distributions`` give one value per batch entry.

    Raises:
        OptionError: Images of two shapes, a model and no model, fewer than two samples, or two of PyTorch's
            distributions of whose divergence it knows no closed form.
    """
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        try:
            value = closed_form(p, q).double()
        except NotImplementedError as error:
            names = f"{type(p).__name__} and {type(q).__name__}"
            raise OptionError(f"PyTorch knows no closed form of the divergence between {names}") from error
        return Estimate(value, torch.zeros_like(value))
    if not isinstance(p, ExplicitModel) or not isinstance(q, ExplicitModel):
        raise OptionError(
            f"expected two explicit models or two of torch.distributions, got {type(p).__name__} and {type(q).__name__}"
        )
    return _mean_over(p, p, q, num_samples, generator)


def cross_entropy(
    p: ExplicitModel, q: ExplicitModel, *, num_samples: int = 1000, generator: torch.Generator | None = None
) -> Estimate:
    """E_p[-log q(x)] = H(p) + KL(p || q): the negative log-likelihood of ``q`` on endless data from ``p``.

    Arguments, result and errors are those of :func:`kl_divergence`, for models.
    """
    return _mean_over(p, None, q, num_samples, generator)


def entropy(p: ExplicitModel, *, num_samples: int = 1000, generator: torch.Generator | None = None) -> Estimate:
    """H(p) = E_p[-log p(x)]: the least negative log-likelihood that any model can have on data from ``p``.

    Arguments, result and errors are those of :func:`kl_divergence`, for models.
    """
    return _mean_over(p, None, p, num_samples, generator)


def all_images(event_shape: tuple[int, int, int]) -> Tensor:  # (2^n, 1, H, W)
    """Every binary image of a tiny shape, float32; row k holds the binary digits of k, the first pixel's most.

    Raises:
        OptionError: More than 16 pixels.
    """
    pixels = math.prod(event_shape)
    if pixels > MAX_PIXELS:
        raise OptionError(f"expected at most {MAX_PIXELS} pixels, got {pixels}: there are too many images to enumerate")
    digits = 2 ** torch.arange(pixels - 1, -1, -1)
    return ((torch.arange(2**pixels).unsqueeze(1) & digits) > 0).float().view(-1, *event_shape)


@torch.no_grad()
def _mean_over(
    p: ExplicitModel,
    plus: ExplicitModel | None,
    minus: ExplicitModel,
    num_samples: int,
    generator: torch.Generator | None,
) -> Estimate:
    """Mean under p of log plus(x) - log minus(x); a term that is None is left out."""
    if p.event_shape != minus.event_shape:
        raise OptionError(f"expected two models of the same images, got {p.event_shape} and {minus.event_shape}")
    if math.prod(p.event_shape) <= MAX_PIXELS:
        x = all_images(p.event_shape)
        log_p = _log_prob(p, x)
        value = (log_p.exp() * _difference(x, plus, minus)).sum()
        return Estimate(value, torch.zeros_like(value))
    if num_samples < 2:
        raise OptionError(f"expected num_samples of at least 2, got {num_samples}")
    mean = MeanWithError()
    mean.update(_difference(p.sample(num_samples, generator=generator), plus, minus))
    return mean.compute()


def _difference(x: Tensor, plus: ExplicitModel | None, minus: ExplicitModel) -> Tensor:
    positive = torch.zeros((), dtype=torch.float64) if plus is None else _log_prob(plus, x)
    return positive - _log_prob(minus, x)


def _log_prob(model: ExplicitModel, x: Tensor) -> Tensor:
    """(N,) float64 on the CPU, in batches."""
    return torch.cat([model.log_prob(part).cpu().double() for part in x.split(_BATCH)])
