"""Generators and discriminators of binary images, and the binary output that lets gradients through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import at_least_float32
from lightning_genmodels.nn.coders import Network, halved_sizes
from lightning_genmodels.random import Noise, uniform

Estimator = Literal["straight_through", "gumbel_sigmoid"]

_SLOPE = 0.2  # of LeakyReLU below zero (Radford et al. 2016, section 3)


def binarize(logits: Tensor, estimator: Estimator, temperature: float = 1.0, generator: Noise = None) -> Tensor:
    """Pixels that are 0 or 1, with the gradient of a relaxation, so that no discriminator can tell them by their grey.

    Args:
        logits: Of any shape.
        estimator: ``straight_through``: 1 where the logit is positive, with the gradient of sigmoid(logit / t) (Bengio,
            Léonard and Courville 2013, section 4). ``gumbel_sigmoid``: a draw with probability sigmoid(logit), with the
            gradient of sigmoid((logit + noise) / t), noise logistic (Jang et al. 2017, straight-through; Maddison et
            al. 2017, appendix B).
        temperature: t of the relaxation.
        generator: Source of the noise: one generator, or one for each of the first dimension.

    Returns:
        Values in {0, 1}, shaped as ``logits``, in at least float32.
    """
    logits = at_least_float32(logits)
    if estimator == "gumbel_sigmoid":
        logits = logits + torch.logit(uniform(logits.shape, generator, logits))
    soft = torch.sigmoid(logits / temperature)
    return (logits > 0).to(soft) + (soft - soft.detach())


def generator(
    network: Network, event_shape: tuple[int, int, int], hidden_sizes: Sequence[int], latent_dim: int
) -> nn.Sequential:
    """A network from latents (N, D) to the logits (N, 1, H, W) of pixels, with ReLU.

    Args:
        network: ``mlp``, or ``conv``: transposed convolutions that each double the image (Radford et al. 2016), with
            layer in place of batch normalization, so that an image depends on its own latents alone.
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units, or channels, from the image to the latents.
        latent_dim: D.
    """
    if network == "mlp":
        sizes = itertools.pairwise([latent_dim, *reversed(hidden_sizes)])
        hidden = [layer for i, o in sizes for layer in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(hidden_sizes[0], math.prod(event_shape)), nn.Unflatten(1, event_shape))
    *sizes_up, smallest = halved_sizes(event_shape, len(hidden_sizes))
    start = (hidden_sizes[-1], *smallest)
    layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(start)), nn.Unflatten(1, start)]
    channels = itertools.pairwise([*reversed(hidden_sizes), 1])
    for (inputs, outputs), (height, width) in zip(channels, reversed(sizes_up), strict=True):
        even = (1 - height % 2, 1 - width % 2)
        layers += [
            nn.GroupNorm(1, inputs),
            nn.ReLU(),
            nn.ConvTranspose2d(inputs, outputs, 5, 2, 2, output_padding=even),
        ]
    return nn.Sequential(*layers)


def discriminator(
    network: Network, event_shape: tuple[int, int, int], hidden_sizes: Sequence[int], dropout: float = 0.0
) -> nn.Sequential:
    """A network from images (N, 1, H, W) to one number each, (N,), with LeakyReLU.

    It has no normalization: the gradient penalty of Gulrajani et al. (2017, section 4) is one of each image alone.

    Args:
        network: ``mlp``, or ``conv``: convolutions that each halve the image (Radford et al. 2016).
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units, or channels.
        dropout: Fraction of hidden units that training drops.
    """
    if network == "mlp":
        layers: list[nn.Module] = [nn.Flatten()]
        hidden: list[nn.Module] = [
            nn.Linear(i, o) for i, o in itertools.pairwise([math.prod(event_shape), *hidden_sizes])
        ]
        features = hidden_sizes[-1]
    else:
        layers = []
        hidden = [nn.Conv2d(i, o, 5, 2, 2) for i, o in itertools.pairwise([1, *hidden_sizes])]
        features = hidden_sizes[-1] * math.prod(halved_sizes(event_shape, len(hidden_sizes))[-1])
    for layer in hidden:
        layers += [layer, nn.LeakyReLU(_SLOPE), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 1), nn.Flatten(0))


def check_options(
    network: Network, hidden_sizes: Sequence[int], latent_dim: int, estimator: Estimator, temperature: float
) -> None:
    """Refuses what no generator can be built from.

    Raises:
        OptionError: An unknown network or estimator, no hidden layer, a size below one, or a temperature of zero.
    """
    if network not in ("mlp", "conv"):
        raise OptionError(f"expected network 'mlp' or 'conv', got {network!r}")
    if estimator not in ("straight_through", "gumbel_sigmoid"):
        raise OptionError(f"expected estimator 'straight_through' or 'gumbel_sigmoid', got {estimator!r}")
    if not hidden_sizes or min([*hidden_sizes, latent_dim]) < 1:
        raise OptionError(
            f"expected sizes of at least 1, got hidden_sizes={tuple(hidden_sizes)}, latent_dim={latent_dim}"
        )
    if temperature <= 0.0:
        raise OptionError(f"expected a temperature above 0, got {temperature}")
