"""Patches of 2x2 pixels, whose 16 states are drawn at once."""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 4
"""Pixels in a patch, row by row; the first one is the most significant bit of the patch's state."""


def patch_states(patches: Tensor) -> Tensor:
    """States 0 to 15, (B, ...) int64, of patches (B, 4, ...) in {0, 1}."""
    a, b, c, d = patches.long().unbind(1)
    return 8 * a + 4 * b + 2 * c + d


def pixel_logits(logits: Tensor, states: Tensor) -> Tensor:  # (B, 4, ...)
    """Log-odds of each pixel of a patch given those before it, from the logits of the patch.

    Args:
        logits: (B, 16, ...) of the states.
        states: (B, ...) the states; a pixel's own and later bits do not matter.

    Returns:
        (B, 4, ...).
    """
    columns = []
    for pixel in range(PATCH):
        # Of the states that begin with the pixels before this one: those with a 1, and those with a 0.
        after = logits.unflatten(1, (2**pixel, 2, -1)).logsumexp(dim=3)  # (B, 2^pixel, 2, ...)
        begun = (states >> (PATCH - pixel))[:, None, None].expand(-1, 1, 2, *states.shape[1:])
        off, on = after.gather(1, begun)[:, 0].unbind(1)
        columns.append(on - off)
    return torch.stack(columns, dim=1)


def draw_patch(logits: Tensor, uniforms: Tensor, x: Tensor, observed: Tensor) -> Tensor:
    """Draws the pixels of a patch that are not observed, given those that are.

    Args:
        logits: (N, 16) of the states.
        uniforms: (N, 4) in [0, 1), one for each pixel.
        x: (N, 4) in {0, 1}; pixels that are not observed may have any value.
        observed: (N, 4) bool.

    Returns:
        (N, 4) in {0, 1}, of the type of ``x``.
    """
    states = torch.arange(2**PATCH, device=x.device)
    bits = (states.unsqueeze(1) >> torch.arange(PATCH - 1, -1, -1, device=x.device)) & 1 == 1  # (16, 4)
    possible = ((bits == x.bool().unsqueeze(1)) | ~observed.unsqueeze(1)).all(dim=2)  # (N, 16)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    left = wide.masked_fill(~possible, -torch.inf).softmax(dim=1)  # of the states that are still possible
    drawn = []
    for pixel in range(PATCH):
        on = (left * bits[:, pixel]).sum(dim=1)
        value = uniforms[:, pixel] * left.sum(dim=1) < on
        left = left * (bits[:, pixel] == value.unsqueeze(1))
        drawn.append(value)
    return torch.stack(drawn, dim=1).to(x)
