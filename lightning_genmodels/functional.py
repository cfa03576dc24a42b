"""Pure functions on tensors: log-likelihoods, log-mean-exp, seeds and noise, image checks.

Nothing here knows of a module, a data set or a trainer. All logarithms are natural, so log-likelihoods are in nats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genmodels.errors import ImageError

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: one generator for a whole batch, one generator *per image* of the batch (then the
numbers an image sees do not depend on the batch it is in), or None for PyTorch's global generator."""


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return values if values.dtype == torch.float64 else values.float()


def bernoulli_log_prob(logits: Tensor, x: Tensor, event_dims: int = 3) -> Tensor:
    """Log-probability of binary images under independent Bernoulli pixels, summed (never averaged) over the pixels.

    Args:
        logits: (..., C, H, W) log-odds of a pixel being 1, any float type.
        x: (..., C, H, W) pixels in {0, 1}; broadcasts against ``logits``.
        event_dims: How many trailing dimensions make one image.

    Returns:
        (...) nats per image, in float32 or float64 whatever the type of ``logits``.
    """
    logits = at_least_float32(logits)
    # log sigmoid(+-logits): one pass over what may be K times as large as x, and no cancellation at large logits.
    return F.logsigmoid((2.0 * x - 1.0).to(logits.dtype) * logits).flatten(start_dim=-event_dims).sum(dim=-1)


def log_mean_exp(values: Tensor, dim: int = 0) -> Tensor:
    """``log(mean(exp(values)))`` along ``dim``, stable for very negative log-probabilities."""
    return torch.logsumexp(values, dim=dim) - math.log(values.shape[dim])


def bits_per_dimension(nats: float, event_shape: Sequence[int]) -> float:
    """Converts nats per image to bits per pixel."""
    return nats / (math.prod(event_shape) * math.log(2))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed: a fixed, well-mixed function of ``parts``, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image, keyed by the image's index in its data set.

    An estimate that draws from these depends on the image and the seed alone: not on the batch size, the number of
    processes, or the device.
    """
    return [torch.Generator().manual_seed(derive_seed(seed, int(index))) for index in indices]


def process_share(start: int, count: int, rank: int, world_size: int) -> range:
    """Data-set indices of images ``start`` to ``start + count`` of process r, which has r, r + world_size, ..."""
    return range(start * world_size + rank, (start + count) * world_size + rank, world_size)


def seed_default_generators(seed: int, device: torch.device) -> None:
    """Seeds PyTorch's global generators of the CPU and of ``device``: ``torch.manual_seed`` for one device, which is
    an order of magnitude faster and so fit for every training step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def standard_normal(
    num_particles: int, batch: int, shape: Sequence[int], noise: Noise, like: Tensor
) -> Tensor:  # (K, B, *shape)
    """Draws standard normal noise for ``num_particles`` particles of each of ``batch`` images.

    Args:
        num_particles: K.
        batch: B.
        shape: Shape of one particle.
        noise: A generator, or one generator per image (then there must be B of them). A generator may live on the CPU
            while ``like`` lives elsewhere: numbers are drawn where the generator is, and moved.
        like: Device and type of the result.

    Returns:
        (K, B, *shape).

    Raises:
        ValueError: The number of generators is not B.
    """
    if isinstance(noise, Sequence):
        if len(noise) != batch:
            raise ValueError(f"expected one generator per image, {batch} of them, got {len(noise)}")
        columns = [
            torch.randn((num_particles, *shape), generator=generator, device=generator.device) for generator in noise
        ]
        return torch.stack(columns, dim=1).to(like)
    device = noise.device if noise is not None else like.device
    return torch.randn((num_particles, batch, *shape), generator=noise, device=device).to(like)


def uniform(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator is and moved to the device and type of ``like``.

    They are drawn in float64 for a float64 ``like`` and in float32 otherwise, so that half-precision networks do not
    sample from a coarse grid.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    device = generator.device if generator is not None else like.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=dtype).to(like.device)


def sample_bernoulli(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws pixels in {0, 1}, float32, shaped as ``logits``, each 1 with probability ``sigmoid(logits)``."""
    return (uniform(logits.shape, generator, logits) < torch.sigmoid(logits)).to(torch.float32)


def check_images(x: Tensor, event_shape: Sequence[int], *, values: bool = True) -> None:
    """Refuses anything but a batch of binary images.

    Args:
        x: Should be (B, 1, H, W) with every pixel 0 or 1, of any numeric or boolean type.
        event_shape: The (1, H, W) that is expected.
        values: Look at the pixels, too, and not at the shape alone.

    Raises:
        ImageError: Wrong shape, NaN, or pixels other than 0 and 1; says what was expected, what came, and the way out.
    """
    expected = tuple(event_shape)
    if x.ndim != len(expected) + 1 or tuple(x.shape[1:]) != expected:
        raise ImageError(
            f"expected images of shape (batch, {', '.join(map(str, expected))}), got {tuple(x.shape)}; "
            "reshape them, or choose a model for this image size"
        )
    if not values or x.dtype == torch.bool:
        return
    if x.is_floating_point() and bool(torch.isnan(x).any()):
        raise ImageError(f"expected pixels in {{0, 1}}, got {int(torch.isnan(x).sum())} NaN; clean the images first")
    if not bool(((x == 0) | (x == 1)).all()):
        raise ImageError(
            f"expected pixels in {{0, 1}}, got values from {x.min().item():.4g} to {x.max().item():.4g}; "
            "binarize the images first, for example with (x > 0.5) if they lie in [0, 1]"
        )


def resize_area(images: Tensor, size: int) -> Tensor:
    """Resizes (N, 1, H, W) images in [0, 1] to (N, 1, size, size) by area averaging; float32."""
    return F.interpolate(images.float(), size=(size, size), mode="area")
