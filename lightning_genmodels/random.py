"""Random numbers that follow from a seed and a key, whatever the batch, the process or the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import at_least_float32

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: one generator for a whole batch, one generator *per image* of the batch (then the
numbers an image sees do not depend on the batch it is in), or None for PyTorch's global generator."""


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


def uniform(shape: Sequence[int], generator: Noise, like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator is and moved to the device of ``like``; of one generator per
    image, each draws a row.

    They are drawn in float64 for a float64 ``like`` and in float32 otherwise, so that half-precision networks do not
    sample from a coarse grid.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(generator, Sequence):
        rows = [torch.rand(tuple(shape)[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
        return torch.stack(rows).to(like.device) if rows else torch.zeros(tuple(shape), dtype=dtype, device=like.device)
    device = generator.device if generator is not None else like.device
    return torch.rand(tuple(shape), generator=generator, device=device, dtype=dtype).to(like.device)


def check_generator(generator: Noise) -> None:
    """Refuses anything but a source of random numbers.

    Raises:
        OptionError: Neither a generator nor a list of them, nor None.
    """
    given = generator if isinstance(generator, list | tuple) else [generator]
    if not all(one is None or isinstance(one, torch.Generator) for one in given):
        raise OptionError(f"expected a torch.Generator, got {generator!r}; make one: torch.Generator().manual_seed(0)")


def sample_bernoulli(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws pixels in {0, 1}, float32, shaped as ``logits``, each 1 with probability ``sigmoid(logits)``."""
    return (uniform(logits.shape, generator, logits) < torch.sigmoid(at_least_float32(logits))).to(torch.float32)
