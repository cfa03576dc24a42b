"""Convolutional LSTMs over the lines of an image: rows, or the diagonals of an image that is skewed by indexing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Shift(NamedTuple):
    """Which states of a step take part in the next one by one weight of the state-to-state convolution.

    Positions are counted through all lines of the scan; the two slices are equally long.
    """

    now: slice
    before: slice


class Step(NamedTuple):
    """One line of a scan: its positions, and by weight of the convolution what it sees of the line before."""

    line: slice
    shifts: list[Shift]


def scan_steps(lines: Sequence[range], offsets: Sequence[int]) -> list[Step]:
    """Plans a scan over lines of which each sees the one before by a convolution.

    Args:
        lines: The places that each line has, such as columns of a row.
        offsets: Places of the line before that a place sees, relative to its own; the first is where its cell comes
            from. What lies outside of the line before is zero, and left out of the plan.
    """
    steps: list[Step] = []
    start = 0
    for index, line in enumerate(lines):
        shifts = []
        before = lines[index - 1] if index else range(0)
        for offset in offsets:
            first, last = max(line.start, before.start - offset), min(line.stop, before.stop - offset)
            last = max(first, last)
            now = start + first - line.start
            then = start - len(before) + first + offset - before.start
            shifts.append(Shift(slice(now, now + last - first), slice(then, then + last - first)))
        steps.append(Step(slice(start, start + len(line)), shifts))
        start += len(line)
    return steps


def gates_to_state(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (van den Oord et al. 2016, eq. 3), for sampling.

    Args:
        gates: (..., 4 h, N): output, forget and input gate and content, before their nonlinearities.
        cell: (..., h, N), or None for zero.

    Returns:
        Hidden state and cell, (..., h, N) each.
    """
    o, f, i, g = gates.chunk(4, dim=-2)
    new = torch.sigmoid(i) * torch.tanh(g)
    if cell is not None:
        new = new + torch.sigmoid(f) * cell
    return torch.sigmoid(o) * torch.tanh(new), new


class ChannelsFirstLinear(nn.Linear):
    """A linear map of channels that come first: a 1x1 convolution in the layout of :class:`LineLSTM`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (inputs, ...) to (outputs, ...)."""
        y = torch.addmm(self.bias.unsqueeze(1), self.weight, x.flatten(1))
        return y.view(-1, *x.shape[1:])


class LineLSTM(nn.Module):
    """The state-to-state part of a convolutional LSTM that goes over an image line by line, in several directions.

    Channels come first and images last, so that a line is one block of memory and a step one matrix product per weight
    of the convolution. The gradient is computed by hand: by autograd, which adds to the gradient of the weights and
    copies slices of the gradient of the gates in every step, a training step of the Row LSTM takes 2.4 times as long,
    and one of the Diagonal BiLSTM 3.4 times (CPU, batches of 32).

    Args:
        channels: h.
        lines: See :func:`scan_steps`.
        offsets: See :func:`scan_steps`.
        directions: How many scans with weights of their own run side by side.
    """

    def __init__(self, channels: int, lines: Sequence[range], offsets: Sequence[int], directions: int = 1) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels * len(offsets))
        shape = (len(offsets), directions, 4 * channels, channels)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.steps = scan_steps(lines, offsets)

    @torch.compiler.disable
    def forward(self, gates: Tensor) -> Tensor:
        """Maps the input-to-state part of the gates (directions, 4 h, places, B) to states (directions, h, places, B).

        Places are in the order of the scan, gates in that of :func:`gates_to_state`. It computes in the precision of
        the weights, whatever that of the gates.
        """
        with torch.autocast(gates.device.type, enabled=False):
            hidden: Tensor = _Scan.apply(gates.to(self.weight.dtype), self.weight, self.steps)
        return hidden


_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward


class _Scan(torch.autograd.Function):
    """All steps of :class:`LineLSTM`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, steps: list[Step]) -> Tensor:
        gates = inputs.clone(memory_format=torch.contiguous_format)  # (D, 4 h, n, B)
        directions, channels, places, batch = gates.shape
        size = channels // 4
        hidden = gates.new_empty((directions, size, places, batch))
        cells = torch.empty_like(hidden)
        for step in steps:
            for w, shift in zip(weight, step.shifts, strict=True):
                if shift.now.start < shift.now.stop:
                    _block(gates, shift.now).baddbmm_(w, _block(hidden, shift.before))
            a = gates[:, :, step.line]
            o, f, i, g = a.split(size, dim=1)
            a[:, : 3 * size].sigmoid_()
            g.tanh_()
            cell = cells[:, :, step.line]
            torch.mul(i, g, out=cell)
            now, before = step.shifts[0]
            cells[:, :, now].addcmul_(f[:, :, _within(now, step.line)], cells[:, :, before])
            torch.mul(o, cell.tanh(), out=hidden[:, :, step.line])
        ctx.save_for_backward(weight, gates, cells, hidden)
        ctx.steps = steps
        return hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, gates, cells, hidden = ctx.saved_tensors
        size = hidden.shape[1]
        grad_hidden = grad_hidden.clone(memory_format=torch.contiguous_format)  # and that of later steps
        grad_cells = torch.zeros_like(cells)
        grad_gates = torch.empty_like(gates)  # before their nonlinearities
        grad_weight = torch.zeros_like(weight)
        for step in reversed(ctx.steps):
            line = step.line
            o, f, i, g = gates[:, :, line].split(size, dim=1)
            to_o, to_f, to_i, to_g = grad_gates[:, :, line].split(size, dim=1)
            grad_h, grad_c = grad_hidden[:, :, line], grad_cells[:, :, line]
            out = cells[:, :, line].tanh()
            torch.mul(grad_h, out, out=to_o)
            grad_c.add_(_tanh_backward(grad_h * o, out))
            torch.mul(grad_c, g, out=to_i)
            _tanh_backward.grad_input(grad_c * i, g, grad_input=to_g)
            now, before = step.shifts[0]
            part = _within(now, line)
            if part != slice(0, line.stop - line.start):
                to_f.zero_()
            torch.mul(grad_c[:, :, part], cells[:, :, before], out=to_f[:, :, part])
            grad_cells[:, :, before].addcmul_(grad_c[:, :, part], f[:, :, part])
            to_opened = grad_gates[:, : 3 * size, line]
            _sigmoid_backward.grad_input(to_opened, gates[:, : 3 * size, line], grad_input=to_opened)
            for w, grad_w, shift in zip(weight, grad_weight, step.shifts, strict=True):
                if shift.now.start < shift.now.stop:
                    grad = _block(grad_gates, shift.now)
                    _block(grad_hidden, shift.before).baddbmm_(w.mT, grad)
                    grad_w.baddbmm_(grad, _block(hidden, shift.before).mT)
        return grad_gates, grad_weight, None


def _block(x: Tensor, places: slice) -> Tensor:
    """A view (D, C, places * B) of some places of (D, C, n, B)."""
    return x[:, :, places].flatten(2)


def _within(part: slice, line: slice) -> slice:
    """A part of a line, counted from where the line starts."""
    return slice(part.start - line.start, part.stop - line.start)
