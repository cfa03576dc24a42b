"""Likelihoods and bounds on them, image by image: noise is keyed by (seed, image), and memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_genmodels.base import ExplicitModel, GenerativeModel, LatentVariableModel, OrderMixture
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import as_float64
from lightning_genmodels.random import keyed_generators

FIRST_ORDER = "nll_first_order"

_ROWS = 1000  # images times particles at once, where no cache limits them


@dataclass(frozen=True)
class Figure:
    """A mean negative log-likelihood, or an upper bound on it, that a model can be given.

    Attributes:
        name: Its key in reports: ``nll``, ``nll_first_order``, ``nelbo`` or ``iw<k>``.
        estimator: How it is estimated, in words.
        particles: k, for a bound.
    """

    name: str
    estimator: str
    particles: int = 1


def figures_of(model: GenerativeModel, num_particles: int) -> list[Figure]:
    """The figures that a model can be given, with a bound of so many particles: none for an implicit model."""
    if isinstance(model, OrderMixture) and len(model.pixel_orders) > 1:
        orders = f"exact, {len(model.pixel_orders)} orders"
        return [Figure("nll", orders), Figure(FIRST_ORDER, "exact, first order alone")]
    if isinstance(model, ExplicitModel):
        return [Figure("nll", "exact")]
    if isinstance(model, LatentVariableModel):
        bound = Figure(f"iw{num_particles}", f"IW bound, k={num_particles}", num_particles)
        return [Figure("nelbo", "ELBO, 1 particle"), bound]
    return []


@torch.no_grad()
def score(model: GenerativeModel, x: Tensor, indices: Sequence[int], figure: Figure, *, seed: int = 0) -> Tensor:
    """Log-probabilities of images, or lower bounds on them.

    Args:
        model: An explicit or latent-variable model.
        x: (N, 1, H, W) binary images.
        indices: The N images' indices in their data set, which key the noise.
        figure: One of :func:`figures_of` the model.
        seed: Seed of the noise.

    Returns:
        (N,) float64 nats per image. N times the particles in memory is bounded, whatever N and k.

    Raises:
        OptionError: The model cannot be given this figure.
    """
    known = figures_of(model, figure.particles)
    if figure not in known:
        names = [each.name for each in known]
        raise OptionError(f"a {type(model).__name__} has no figure {figure.name!r}; it has {names}")
    parts = []
    for part, keys in zip(*in_parts(x, indices, batch_size(model, figure.particles)), strict=True):
        if isinstance(model, LatentVariableModel):
            noise = keyed_generators(seed, keys)
            is_elbo = figure.name == "nelbo"
            parts.append(
                model.elbo(part, generator=noise)
                if is_elbo
                else model.iw_bound(part, figure.particles, generator=noise)
            )
        elif isinstance(model, OrderMixture) and figure.name == FIRST_ORDER:
            parts.append(model.log_prob_by_order(part, [0])[0])
        elif isinstance(model, ExplicitModel):
            parts.append(model.log_prob(part))
    return as_float64(torch.cat(parts)) if parts else torch.zeros(0, dtype=torch.float64)


def batch_size(model: GenerativeModel, num_particles: int) -> int:
    """How many images to score at once: what fits a CPU's cache, or bounds the memory of an accelerator."""
    on_cpu = model.device.type == "cpu"
    if isinstance(model, LatentVariableModel):
        rows = model.score_rows if on_cpu else _ROWS
        return max(1, min(500, rows // min(num_particles, model.particle_block)))
    return model.score_chunk if isinstance(model, ExplicitModel) and on_cpu else 500


def in_parts(x: Tensor, indices: Sequence[int], size: int) -> tuple[Sequence[Tensor], list[Sequence[int]]]:
    """Images (N, ...) and their indices, ``size`` at a time."""
    return x.split(size), [indices[start : start + size] for start in range(0, len(indices), size)]
