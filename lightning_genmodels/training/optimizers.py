"""Muon beside AdamW, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lightning_genmodels.errors import OptionError
from lightning_genmodels.nn.recurrent import LineLSTM

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear_fall"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonal matrices, for hidden weights; AdamW for all other parameters.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a
    weight matrix by the nearest semi-orthogonal one, approximately, by five Newton-Schulz iterations: every direction
    of the matrix changes at the same rate. A convolution's weight is the matrix (outputs, inputs * height * width).
    AdamW is that of Loshchilov and Hutter (2019), which trains inputs, outputs, embeddings and biases.

    ``torch.optim.Muon`` takes two-dimensional parameters alone, no others beside them, and iterates in bfloat16, which
    is slow on a CPU. This one iterates in float32 on a CPU and in bfloat16 elsewhere, with all matrices of one shape in
    one batch.

    Args:
        groups: Parameter groups, as PyTorch has them. A group with ``"muon": True`` is stepped by Muon and lists the
            shape (matrices, rows, columns) of each of its parameters under ``"shapes"``.
        lr: Learning rate of the groups that have none.
        betas: AdamW's decay rates.
        weight_decay: Decoupled weight decay of the groups that have none.

    Raises:
        OptionError: A parameter is sharded over processes: the iteration needs the whole matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8, "muon": False, "fused": True}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["muon"] and any(_is_sharded(p, s) for p, s in zip(group["params"], group["shapes"], strict=True)):
                raise OptionError(
                    "Muon needs whole weight matrices, and these are sharded over processes; choose "
                    "--model.optimizer adamw, or a strategy that keeps weights whole: --trainer.strategy ddp"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
            else:
                self._step_adamw(group)
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor, Tensor]]] = {}
        for parameter, shape in zip(group["params"], group["shapes"], strict=True):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
            nesterov = parameter.grad.lerp(momentum, _MOMENTUM).reshape(shape)
            by_shape.setdefault(tuple(shape), []).append((parameter, momentum, nesterov))
        for shape, members in by_shape.items():
            updates = orthogonalized(torch.cat([nesterov for _, _, nesterov in members])).split(shape[0])
            rate = group["lr"] * math.sqrt(max(1.0, shape[1] / shape[2]))
            for (parameter, momentum, _), update in zip(members, updates, strict=True):
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                # A weight under a constant mask has no gradient, and an orthogonal matrix has no zeros: it stays.
                parameter.addcmul_(update.reshape(parameter.shape), momentum != 0, value=-rate)

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices U V^T of U S V^T, by five Newton-Schulz iterations.

    The coefficients are those of Jordan et al. (2024), which bring singular values near one fast, and not exactly.

    Args:
        matrices: (k, rows, columns).

    Returns:
        (k, rows, columns), of the type of ``matrices``; singular values between about 0.7 and 1.2, those of a zero
        matrix zero.
    """
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def weight_matrices(network: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Weight matrices of a network: what weight decay is for. Biases, scales, embeddings and tables are none.

    These are parameters called ``weight`` with two dimensions or more, unless they belong to an embedding, and those
    that a module lists by name in an attribute ``matrices``.

    Yields:
        Name, module and parameter.
    """
    for prefix, module in network.named_modules():
        names: Collection[str] = getattr(module, "matrices", ())
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
            if is_weight or name in names:
                yield f"{prefix}.{name}" if prefix else name, module, parameter


def ends(*networks: nn.Module) -> list[nn.Module]:
    """First and last layer of each of some networks whose layers are registered in the order of their use."""
    layers = [[module for _, module, _ in weight_matrices(network)] for network in networks]
    return [module for chain in layers for module in (chain[0], chain[-1])]


def matrix_shape(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int, int]:
    """Matrices, rows and columns of a weight as Muon sees it.

    A transposed convolution's is (inputs, outputs * height * width). A module that computes several things by one
    weight, such as queries, keys and values, says so by an attribute ``parts``: each is a matrix by itself.
    """
    if isinstance(module, LineLSTM) or parameter.ndim == 3:
        rows, columns = parameter.shape[-2:]
        return parameter.numel() // (rows * columns), rows, columns
    parts = getattr(module, "parts", 1)
    return parts, parameter.shape[0] // parts, parameter[0].numel()


def schedule_factor(
    schedule: Schedule, step: int, *, warmup_steps: int, total_steps: float, fall: float
) -> float:  # in [0, 1]
    """The learning rate of a step, as a fraction of the peak.

    It rises linearly for ``warmup_steps``. Then ``cosine`` falls to zero by half a period over the rest of the run;
    ``linear_fall`` stays at the peak and falls linearly over the last fraction ``fall`` of the run, so that up to there
    it does not depend on how long the run is. In a run without an end both stay at the peak.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if not math.isfinite(total_steps):
        return 1.0
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, max(0.0, (total_steps - step) / max(1.0, fall * total_steps)))


def _is_sharded(parameter: nn.Parameter, shape: tuple[int, int, int]) -> bool:
    """Whether this process holds a part of a parameter: a DTensor, or a flat view of fully sharded data parallelism."""
    return hasattr(parameter, "device_mesh") or parameter.ndim < 2 or parameter.numel() != math.prod(shape)
