"""Pure functions on tensors: log-likelihoods, log-mean-exp, seeds and noise, image checks, pixel orders.

Nothing here knows of a module, a data set or a trainer. All logarithms are natural, so log-likelihoods are in nats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genmodels.errors import ImageError, OptionError

Noise = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: one generator for a whole batch, one generator *per image* of the batch (then the
numbers an image sees do not depend on the batch it is in), or None for PyTorch's global generator."""


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return values if values.dtype == torch.float64 else values.float()


@cache
def has_float64(device_type: str) -> bool:
    """Whether tensors on a kind of device can have float64: Apple's (``mps``) cannot."""
    try:
        torch.zeros((), device=device_type, dtype=torch.float64)
    except (TypeError, RuntimeError):
        return False
    return True


def as_float64(values: Tensor) -> Tensor:
    """Values in float64: on their device, or on the CPU where the device has none."""
    return values.double() if has_float64(values.device.type) else values.cpu().double()


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
    against = ((1.0 - 2.0 * x).to(logits.dtype) * logits).flatten(start_dim=-event_dims)  # log-odds of the other value
    if against.requires_grad or against.device.type != "cpu" or not against.numel() or against.amax() > _LARGE:
        return F.logsigmoid(-against).sum(dim=-1)
    return -_sum_log_one_plus_exp_(against)


_LARGE = 20.0  # (1 + exp(20))^4 is a float32


def _sum_log_one_plus_exp_(x: Tensor) -> Tensor:
    """Sum of log(1 + exp(x)) over the last dimension, for a CPU, without gradients and for x up to 20; overwrites x.

    It takes one logarithm for the product of up to four of the factors, and allocates next to nothing: about half
    the time of ``F.logsigmoid``.
    """
    x.exp_().add_(1.0)
    for _ in range(2):
        half, odd = divmod(x.shape[-1], 2)
        if odd:
            break
        x = x[..., :half].mul_(x[..., half:])
    return x.log_().sum(dim=-1)


def lines(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Straight lines between pairs of points (P, D): (P, steps, D), the ends included."""
    share = torch.linspace(0.0, 1.0, steps).to(first)[:, None]
    return torch.lerp(first[:, None], second[:, None], share)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log N(z; 0, I) in nats, (...), of (..., D): summed over the last dimension."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=-1)


def mean_logits(images: Tensor) -> Tensor:
    """Log-odds of a pixel being 1, with add-one smoothing, since some pixels of digits are never on.

    Args:
        images: (N, 1, H, W) in {0, 1}, of any type.

    Returns:
        (n,) float64: where the biases of a model's outputs best start, so that it need not learn the mean image.
    """
    ones = as_float64(images.sum(dim=0, dtype=torch.int64).flatten())
    return torch.log(ones + 1) - torch.log(len(images) - ones + 1)


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


def sample_bernoulli(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws pixels in {0, 1}, float32, shaped as ``logits``, each 1 with probability ``sigmoid(logits)``."""
    return (uniform(logits.shape, generator, logits) < torch.sigmoid(at_least_float32(logits))).to(torch.float32)


def check_generator(generator: Noise) -> None:
    """Refuses anything but a source of random numbers.

    Raises:
        OptionError: Neither a generator nor a list of them, nor None.
    """
    given = generator if isinstance(generator, list | tuple) else [generator]
    if not all(one is None or isinstance(one, torch.Generator) for one in given):
        raise OptionError(f"expected a torch.Generator, got {generator!r}; make one: torch.Generator().manual_seed(0)")


def as_numbers(values: Any, what: str = "images") -> Tensor:
    """A tensor of real numbers, made of a NumPy array or nested lists where it is none yet.

    Raises:
        ImageError: Text, ragged lists, complex or sparse numbers, or anything else.
    """
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImageError(
            f"expected {what} as a tensor, a NumPy array or lists of numbers, got {_shortened(values)}"
        ) from error
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise ImageError(f"expected {what} of real numbers, dense, got {tensor.dtype}, {tensor.layout}; convert them")
    return tensor


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} {text[:70]}..."


def check_images(x: Any, event_shape: Sequence[int], *, values: bool = True) -> Tensor:
    """Refuses anything but a batch of binary images.

    Args:
        x: Should be (B, 1, H, W) with every pixel 0 or 1, of any numeric or boolean type: a tensor, a NumPy array, or
            nested lists.
        event_shape: The (1, H, W) that is expected.
        values: Look at the pixels, too, and not at the shape alone.

    Returns:
        The images as a tensor.

    Raises:
        ImageError: Wrong shape, NaN, or pixels other than 0 and 1; says what was expected, what came, and the way out.
    """
    images = as_numbers(x)
    expected = tuple(event_shape)
    if images.ndim != len(expected) + 1 or tuple(images.shape[1:]) != expected:
        raise ImageError(
            f"expected images of shape (batch, {', '.join(map(str, expected))}), got {tuple(images.shape)}; "
            "reshape them, or choose a model for this image size"
        )
    if not values or images.dtype == torch.bool:
        return images
    if images.is_floating_point() and bool(torch.isnan(images).any()):
        raise ImageError(
            f"expected pixels in {{0, 1}}, got {int(torch.isnan(images).sum())} NaN; clean the images first"
        )
    if not bool(((images == 0) | (images == 1)).all()):
        raise ImageError(
            f"expected pixels in {{0, 1}}, got values from {images.min().item():.4g} to {images.max().item():.4g}; "
            "binarize the images first, for example with (x > 0.5) if they lie in [0, 1]"
        )
    return images


def resize_area(images: Tensor, size: int) -> Tensor:
    """Resizes (N, 1, H, W) images in [0, 1] to (N, 1, size, size) by area averaging; float32."""
    return F.interpolate(images.float(), size=(size, size), mode="area")


# Pixel orders: which pixel is drawn first, second, ... A factorization of p(x) by the chain rule needs one.

_SYMMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "mirror": lambda grid: grid.flip(1),
    "flip": lambda grid: grid.flip(0),
    "rot180": lambda grid: grid.flip(0, 1),
    "transpose": lambda grid: grid.T,
    "rot90": lambda grid: grid.T.flip(0),
    "rot270": lambda grid: grid.T.flip(1),
    "antitranspose": lambda grid: grid.flip(0, 1).T,
}

_BY_COLUMN = ("transpose", "rot90", "rot270", "antitranspose")

RASTER_ORDERS = ("raster", *(f"raster_{symmetry}" for symmetry in _SYMMETRIES))
"""The eight symmetries of the raster order, which are the orders of convolutional and recurrent networks."""

PATCH_ORDERS = ("patches", *(f"patches_{symmetry}" for symmetry in _SYMMETRIES))
"""The eight symmetries of the order of 2x2 patches."""


def pixel_order(name: str, height: int, width: int, *, seed: int = 0) -> Tensor:  # (H * W,)
    """An order of the pixels of an image.

    Args:
        name: ``raster`` (row by row from the top left), ``snake`` (every second row backwards), ``spiral`` (clockwise
            from the top left inwards), ``spiral_out`` (its reverse), ``hilbert`` (a curve that fills square after
            square, generalized to rectangles), ``patches`` (patches of 2x2 pixels row by row, and row by row within a
            patch), ``random``; each but the last also followed by a symmetry of the image: ``raster_flip`` starts at
            the bottom left, ``raster_transpose`` goes column by column. The symmetries are mirror (left to right), flip
            (upside down), rot90, rot180, rot270, transpose, antitranspose.
        height: H.
        width: W.
        seed: Seed of a random order.

    Returns:
        (H * W,) int64 on the CPU: entry i is the row-major index of the i-th pixel. A permutation.

    Raises:
        OptionError: No order has this name, or patches do not divide the image.
    """
    if name == "random":
        generator = torch.Generator(device="cpu").manual_seed(derive_seed("pixel order", seed))
        return torch.randperm(height * width, generator=generator, device="cpu")
    curve, _, symmetry = (name, "", None) if name in _CURVES else name.rpartition("_")
    if curve not in _CURVES or (symmetry is not None and symmetry not in _SYMMETRIES):
        raise OptionError(
            f"unknown pixel order {name!r}; there are random, {', '.join(_CURVES)}, the others also followed by "
            f"_{', _'.join(_SYMMETRIES)}"
        )
    grid = torch.arange(height * width, device="cpu").view(height, width)
    grid = grid if symmetry is None else _SYMMETRIES[symmetry](grid)
    return grid.flatten()[torch.tensor(_CURVES[curve](*grid.shape), device="cpu")]


def raster_shape(name: str, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image as a symmetry of the raster order walks over it: row by row, in its own frame.

    Args:
        name: One of :data:`RASTER_ORDERS`.
        height: H.
        width: W.

    Returns:
        (H, W), or (W, H) for an order that goes column by column: x[order] viewed in this shape is the image turned so
        that the order becomes the plain raster.

    Raises:
        OptionError: The order is not one of the eight.
    """
    if name not in RASTER_ORDERS:
        raise OptionError(
            f"convolutional and recurrent networks go row by row or column by column: expected one of the pixel orders "
            f"{', '.join(RASTER_ORDERS)}, got {name!r}; for other orders take a network without geometry: nade, made"
        )
    _, _, symmetry = name.partition("_")
    return (width, height) if symmetry in _BY_COLUMN else (height, width)


def patch_grid(name: str, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the 2x2 patches of an image, as a symmetry of their order walks over it.

    Args:
        name: One of :data:`PATCH_ORDERS`.
        height: H, even.
        width: W, even.

    Returns:
        (H / 2, W / 2), or (W / 2, H / 2) for an order that goes column by column: x[order] viewed as (H W / 4, 4) has a
        patch in each row.

    Raises:
        OptionError: The order is not one of the eight.
    """
    if name not in PATCH_ORDERS:
        raise OptionError(f"expected one of the orders of patches, {', '.join(PATCH_ORDERS)}, got {name!r}")
    _, _, symmetry = name.partition("_")
    rows, columns = height // 2, width // 2
    return (columns, rows) if symmetry in _BY_COLUMN else (rows, columns)


def _patches(height: int, width: int) -> list[int]:
    if height % 2 or width % 2:
        raise OptionError(
            f"patches of 2x2 pixels do not divide an image of {height}x{width}; choose even sides, or an order of "
            "single pixels"
        )
    return [
        (row + i) * width + column + j
        for row in range(0, height, 2)
        for column in range(0, width, 2)
        for i in range(2)
        for j in range(2)
    ]


def _raster(height: int, width: int) -> list[int]:
    return list(range(height * width))


def _snake(height: int, width: int) -> list[int]:
    rows = [range(row * width, (row + 1) * width) for row in range(height)]
    return [index for row, indices in enumerate(rows) for index in (reversed(indices) if row % 2 else indices)]


def _spiral(height: int, width: int) -> list[int]:
    rows = [list(range(row * width, (row + 1) * width)) for row in range(height)]
    order: list[int] = []
    while rows:
        order += rows[0]
        # The rest turned by a quarter to the left: its last column is the next row to walk along.
        rows = [list(column) for column in zip(*rows[1:], strict=True)][::-1]
    return order


def _spiral_out(height: int, width: int) -> list[int]:
    return _spiral(height, width)[::-1]


def _hilbert(height: int, width: int) -> list[int]:
    """A Hilbert-like curve over any rectangle: neighbours in the order are neighbours in the image.

    A block is spanned by two vectors (complex numbers) from its starting corner: the curve goes through it along
    ``long`` and bulges along ``wide``. A block that is too long is cut across; any other into three: up, across, and
    back down. Even halves keep the pieces connected; odd sizes may cost one diagonal step.
    """

    def walk(start: complex, long: complex, wide: complex) -> list[complex]:
        length, breadth = round(abs(long)), round(abs(wide))
        along, aside = long / length, wide / breadth
        if breadth == 1:
            return [start + step * along for step in range(length)]
        if length == 1:
            return [start + step * aside for step in range(breadth)]
        if 2 * length > 3 * breadth:
            half = _even_half(length) * along
            return walk(start, half, wide) + walk(start + half, long - half, wide)
        up, half = _even_half(breadth) * aside, length // 2 * along
        return (
            walk(start, up, half)
            + walk(start + up, long, wide - up)
            + walk(start + (long - along) + (up - aside), -up, half - long)
        )

    long, wide = (complex(width, 0), complex(0, height)) if width >= height else (complex(0, height), complex(width, 0))
    return [round(at.imag) * width + round(at.real) for at in walk(0j, long, wide)]


def _even_half(length: int) -> int:
    """About half of a length: even if it can be."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


_CURVES: dict[str, Callable[[int, int], list[int]]] = {
    "raster": _raster,
    "snake": _snake,
    "spiral": _spiral,
    "spiral_out": _spiral_out,
    "hilbert": _hilbert,
    "patches": _patches,
}


def autoregressive_mask(outputs: Tensor, inputs: Tensor, *, strict: bool = False) -> Tensor:  # (O, I)
    """Which input a unit may see, so that pixel i depends on earlier pixels alone (Germain et al. 2015, eq. 8 and 9).

    Args:
        outputs: (O,) degrees of the units that are computed. A hidden unit of degree d may depend on the first d
            pixels; the degree of a pixel is its position in the order, from 1.
        inputs: (I,) degrees of the units they are computed from.
        strict: For outputs that are conditionals of pixels, which must not see the pixel itself.

    Returns:
        (O, I) bool, to be used as the mask of a weight matrix.
    """
    return inputs < outputs.unsqueeze(1) if strict else inputs <= outputs.unsqueeze(1)


def draw_pixel(logits: Tensor, uniforms: Tensor, x: Tensor, observed: Tensor) -> Tensor:
    """A pixel, observed or drawn: ``x`` where ``observed``, elsewhere 1 with probability ``sigmoid(logits)``.

    All arguments are (N,); a ``uniforms`` below the probability makes a 1, so the same numbers draw the same pixels.
    """
    return torch.where(observed, x, (uniforms < torch.sigmoid(at_least_float32(logits))).to(x))


def fill_in_order(
    conditional_logits: Callable[[Tensor], Tensor], order: Tensor, x: Tensor, observed: Tensor, uniforms: Tensor
) -> Tensor:  # (N, 1, H, W)
    """Ancestral sampling by its definition: one full evaluation of all conditionals for every pixel.

    It is slow, works for every autoregressive model, and is what every faster sampler must agree with.

    Args:
        conditional_logits: Maps images (N, 1, H, W) to the logits of all conditionals, of the same shape.
        order: (n,) indices of the pixels, first to last.
        x: (N, 1, H, W) images, of which the observed pixels are kept.
        observed: (N, 1, H, W) bool.
        uniforms: (N, n) in [0, 1); column i draws the i-th pixel of the order.

    Returns:
        (N, 1, H, W) images in {0, 1} of the type of ``x``.
    """
    x = torch.where(observed, x, torch.zeros_like(x))
    pixels, known = x.flatten(1), observed.flatten(1)  # (N, n), pixels is a view of x
    for step, pixel in enumerate(order.tolist()):
        logits = conditional_logits(x).flatten(1)[:, pixel]
        pixels[:, pixel] = draw_pixel(logits, uniforms[:, step], pixels[:, pixel], known[:, pixel])
    return x
