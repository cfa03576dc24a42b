"""Pure functions on tensors: log-likelihoods, checks of images and codes, drawing pixels in order.

Nothing here knows of a module, a data set or a trainer. All logarithms are natural, so log-likelihoods are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genmodels.errors import ImageError, OptionError


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
    fast = against.device.type == "cpu" and not against.requires_grad and not torch.compiler.is_exporting()
    if not fast or not against.numel() or against.amax() > _LARGE:
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
    if not values or images.dtype == torch.bool or torch.compiler.is_exporting():  # a graph has no values to look at
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


def check_mask(observed: Any, shape: Sequence[int]) -> Tensor:
    """Refuses anything but a mask of pixels that fits images.

    Args:
        observed: Zeros and ones, or booleans, which broadcast to ``shape``; as :func:`check_images`.
        shape: (B, 1, H, W) of the images.

    Returns:
        The mask in that shape, bool.

    Raises:
        ImageError: Another shape, or other values.
    """
    observed = as_numbers(observed, "a mask of observed pixels")
    if observed.dtype != torch.bool and not bool(((observed == 0) | (observed == 1)).all()):
        raise ImageError("expected a mask of zeros and ones, or booleans, got other values; compare it with 0.5 first")
    try:
        mask: Tensor = observed.bool().expand(*shape)
    except RuntimeError as error:
        given = tuple(observed.shape)
        raise ImageError(f"a mask of shape {given} does not fit images of shape {tuple(shape)}") from error
    return mask


def check_observed(x: Any, observed: Any, event_shape: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Refuses anything but binary images of which a mask says what is observed; other pixels may have any value.

    Args:
        x: As :func:`check_images`.
        observed: As :func:`check_mask`.
        event_shape: The (1, H, W) that is expected.
        like: A tensor of the type and on the device that are wanted.

    Returns:
        The images with zeros where nothing is observed, and the mask in their shape.

    Raises:
        ImageError: Wrong shapes, or other values where something is observed.
    """
    x = check_images(x, event_shape, values=False)
    observed = check_mask(observed, x.shape).to(x.device)
    x = check_images(torch.where(observed, x, torch.zeros_like(x)), event_shape)
    return x.to(like), observed.to(like.device)


def check_codes(z: Any, size: int) -> Tensor:
    """Refuses anything but codes or latents: a floating-point tensor (..., D).

    Args:
        z: The codes.
        size: D.

    Returns:
        ``z``.

    Raises:
        OptionError: Another type or another shape.
    """
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim < 2 or z.shape[-1] != size:
        came = f"{z.dtype}, {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise OptionError(f"expected codes as a floating-point tensor of shape (..., {size}), got {came}")
    return z


def resize_area(images: Tensor, size: int) -> Tensor:
    """Resizes (N, 1, H, W) images in [0, 1] to (N, 1, size, size) by area averaging; float32."""
    return F.interpolate(images.float(), size=(size, size), mode="area")


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
