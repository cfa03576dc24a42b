"""Annealed importance sampling: log-likelihoods of latent-variable models, with an error that can be bounded.

Wu, Burda, Salakhutdinov and Grosse (2017), "On the Quantitative Analysis of Decoder-Based Generative Models". Forward
chains go from a distribution that is known to the posterior, and bound log p(x) from below in expectation. On images
that the model itself draws, whose latents are exact samples of the posterior, reverse chains bound it from above
(Grosse, Ghahramani and Adams 2015, "Sandwiching the marginal likelihood"); the gap between the two says how far the
lower bound may be off.

It serves every model whose latents are real numbers and whose ``log_joint`` can be differentiated by them: all latent-
variable models of this package. It is at its best where ``_annealing_start`` is near the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_genmodels.base import GenerativeModel, LatentVariableModel
from lightning_genmodels.base.metrics import mean_and_error
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.datamodule import Split
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.likelihood import in_parts
from lightning_genmodels.functional import as_float64, log_mean_exp, standard_normal_log_prob
from lightning_genmodels.random import Noise, derive_seed, keyed_generators, standard_normal
from lightning_genmodels.system import tracked

_ROWS = 2000  # images times chains at once
_ACCEPTANCE = 0.65  # of the proposals, as Hamiltonian Monte Carlo has them near its best (Neal 2011, section 5.4.4)


class Bracket(NamedTuple):
    """Stochastic bounds on log p(x) of images that a model drew, (N,) float64 nats each."""

    lower: Tensor
    upper: Tensor


def ais_bound(
    model: LatentVariableModel,
    x: Tensor,
    *,
    num_temperatures: int = 1000,
    num_chains: int = 10,
    leapfrog_steps: int = 10,
    generator: Noise = None,
) -> Tensor:
    """A lower bound on log p(x), in expectation, by annealed importance sampling (Wu et al. 2017, algorithm 1).

    Args:
        model: In evaluation mode.
        x: (B, 1, H, W) binary images.
        num_temperatures: T, intermediate distributions; the bound gets tighter with them.
        num_chains: M chains an image, whose weights are averaged.
        leapfrog_steps: Of each Hamiltonian transition, one a temperature.
        generator: One generator, or one per image.

    Returns:
        (B,) float64 nats: log mean exp of the weights; exp of it has mean p(x).

    Raises:
        OptionError: A number below one.
        ImageError: ``x`` is no batch of binary images.
    """
    chains = _Chains(model, x, num_temperatures, num_chains, leapfrog_steps, generator)
    return log_mean_exp(chains.forward(), dim=0)


def ais_bracket(
    model: LatentVariableModel,
    num_images: int = 200,
    *,
    num_temperatures: int = 1000,
    num_chains: int = 10,
    leapfrog_steps: int = 10,
    seed: int = 0,
) -> Bracket:
    """Bounds from both sides for images that the model draws: bidirectional Monte Carlo (Wu et al. 2017, section 4.2).

    Args:
        model: In evaluation mode.
        num_images: N, drawn from the model.
        num_temperatures: As in :func:`ais_bound`.
        num_chains: As in :func:`ais_bound`, in each direction.
        leapfrog_steps: As in :func:`ais_bound`.
        seed: Of images and chains.

    Raises:
        OptionError: A number below one.
    """
    if num_images < 1:
        raise OptionError(f"expected num_images of at least 1, got {num_images}")
    bounds = []
    for start in range(0, num_images, images_at_once(num_chains)):
        keys = range(start, min(num_images, start + images_at_once(num_chains)))
        with torch.no_grad():
            drawn = [_draw(model, generator) for generator in keyed_generators(seed, keys)]
        z, x = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        noise = keyed_generators(seed + 1, keys)
        chains = _Chains(model, x, num_temperatures, num_chains, leapfrog_steps, noise)
        bounds.append((log_mean_exp(chains.forward(), dim=0), -log_mean_exp(chains.reverse(z), dim=0)))
    lower, upper = (torch.cat(parts) for parts in zip(*bounds, strict=True))
    return Bracket(lower, upper)


def images_at_once(num_chains: int) -> int:
    """How many images to anneal together, so that memory is bounded."""
    return max(1, _ROWS // max(1, num_chains))


def _draw(model: LatentVariableModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    z = model.sample_latent(1, generator=generator)
    probabilities = torch.sigmoid(model.decode(z)).cpu()
    return z, (torch.rand(probabilities.shape, generator=generator) < probabilities).to(z)


class _State(NamedTuple):
    """Where chains are, in coordinates u in which they start as a standard normal: (M, B, D), and (M, B) nats."""

    u: Tensor
    base: Tensor  # log N(u; 0, I)
    joint: Tensor  # log p(x, z(u)) |dz/du|
    gradient: Tensor  # of the joint, (M, B, D)


class _Chains:
    """Chains between N(u; 0, I) at beta = 0 and p(u|x) at beta = 1, with geometric averages between the two."""

    def __init__(
        self, model: LatentVariableModel, x: Tensor, temperatures: int, chains: int, leapfrog: int, noise: Noise
    ) -> None:
        if min(temperatures, chains, leapfrog) < 1:
            raise OptionError(
                f"expected num_temperatures, num_chains and leapfrog_steps of at least 1, got {temperatures}, "
                f"{chains} and {leapfrog}"
            )
        self.model = model
        self.num_chains = chains
        self.leapfrog = leapfrog
        self.noise = noise
        x = model._checked(x)  # once: the chains look at it thousands of times
        with torch.no_grad():
            start = model._annealing_start(x)
            self.mean, self.std = start.mean, start.stddev  # (B, D)
        self.x = x.to(self.mean)
        self.betas = _schedule(temperatures)
        self.step_sizes = self._tune(max(1, temperatures // 10))

    def forward(self) -> Tensor:
        """Log-weights (M, B), the mean of whose exponentials is p(x)."""
        state = self._start()
        total = torch.zeros_like(as_float64(state.joint))
        steps = range(1, len(self.betas))
        for t in tracked(steps, len(steps), "annealing", "temperature"):
            total += (self.betas[t] - self.betas[t - 1]) * as_float64(state.joint - state.base)
            state, _ = self._transition(state, self.betas[t], self._step_size(t))
        return total

    def reverse(self, z: Tensor) -> Tensor:
        """Log-weights (M, B), the mean of whose exponentials is 1 / p(x), from exact samples z (B, D) of p(z|x)."""
        state = self._state(((z - self.mean) / self.std).expand(self.num_chains, -1, -1))
        total = torch.zeros_like(as_float64(state.joint))
        steps = range(len(self.betas) - 1, 0, -1)
        for t in tracked(steps, len(steps), "annealing in reverse", "temperature"):
            state, _ = self._transition(state, self.betas[t], self._step_size(t))
            total += (self.betas[t - 1] - self.betas[t]) * as_float64(state.joint - state.base)
        return total

    def _tune(self, temperatures: int) -> Tensor:
        """Step sizes (T', B) that have about the wanted acceptance.

        They come from chains of their own: adapted in the chains that are weighed, they would bias the weights.
        """
        state, found = self._start(), []
        size = torch.full_like(self.mean[:, 0], 0.2)
        for beta in tracked(_schedule(temperatures)[1:], temperatures, "tuning step sizes", "temperature"):
            for _ in range(3):
                state, accepted = self._transition(state, beta, size)
                size = size * torch.exp(0.5 * (accepted.to(size).mean(dim=0) - _ACCEPTANCE))
            found.append(size)
        return torch.stack(found)

    def _step_size(self, t: int) -> Tensor:
        """(B,), that of the temperature that is as far along."""
        return self.step_sizes[(t - 1) * len(self.step_sizes) // (len(self.betas) - 1)]

    def _start(self) -> _State:
        return self._state(self._normal(self.mean.shape[1]))

    def _normal(self, width: int) -> Tensor:
        return standard_normal(self.num_chains, len(self.x), (width,), self.noise, like=self.mean)

    def _state(self, u: Tensor) -> _State:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            joint = self.model._log_joint(self.x, self.mean + self.std * u) + self.std.log().sum(dim=-1)
            (gradient,) = torch.autograd.grad(joint.sum(), u)
        u = u.detach()
        return _State(u, standard_normal_log_prob(u), joint.detach(), gradient)

    def _transition(self, state: _State, beta: float, step_size: Tensor) -> tuple[_State, Tensor]:
        """A Hamiltonian step (Neal 2011, "MCMC using Hamiltonian dynamics", section 5.3) that leaves the distribution
        at ``beta`` as it is; also says which chains moved, (M, B) bool.
        """

        def slope(at: _State) -> Tensor:
            return beta * at.gradient - (1.0 - beta) * at.u

        noise = self._normal(self.mean.shape[1] + 1)
        momentum, chance = noise[..., :-1], torch.special.ndtr(as_float64(noise[..., -1]))
        size = step_size[:, None]  # (B, 1)
        before = self._energy(state, momentum, beta)
        proposal = state
        momentum = momentum + 0.5 * size * slope(proposal)
        for step in range(self.leapfrog):
            proposal = self._state(proposal.u + size * momentum)
            momentum = momentum + (size if step < self.leapfrog - 1 else 0.5 * size) * slope(proposal)
        accepted = (chance.log() < (before - self._energy(proposal, momentum, beta))).to(state.u.device)
        pick = _picker(accepted)
        return _State(*(pick(new, old) for new, old in zip(proposal, state, strict=True))), accepted

    def _energy(self, state: _State, momentum: Tensor, beta: float) -> Tensor:
        energy = 0.5 * momentum.square().sum(dim=-1) - beta * state.joint - (1.0 - beta) * state.base
        return torch.nan_to_num(as_float64(energy), nan=math.inf)


def _picker(accepted: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accepted if new.ndim == accepted.ndim else accepted.unsqueeze(-1), new, old)

    return pick


def _schedule(temperatures: int) -> list[float]:
    """Temperatures, from 0 to 1, dense at both ends (Wu et al. 2017, section 5.1: a sigmoid)."""
    raw = torch.sigmoid(torch.linspace(-4.0, 4.0, temperatures + 1, dtype=torch.float64))
    betas: list[float] = ((raw - raw[0]) / (raw[-1] - raw[0])).tolist()
    return betas


def evaluate_ais(
    model: GenerativeModel,
    data: BinarizedMNISTDataModule,
    split: Split = "test",
    *,
    num_images: int = 200,
    num_temperatures: int = 1000,
    num_chains: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Annealed importance sampling on some images of a split, and on as many images that the model draws.

    Args:
        model: A latent-variable model, in evaluation mode.
        data: The data module.
        split: train, val or test.
        num_images: Images of each kind; of the split, the head of one fixed permutation.
        num_temperatures: See :func:`lightning_genmodels.evaluation.ais.ais_bound`.
        num_chains: See :func:`lightning_genmodels.evaluation.ais.ais_bound`.
        seed: Seed of the noise.

    Returns:
        JSON: the mean upper bound on the negative log-likelihood with its standard error, and for the simulated images
        both bounds and the gap between them; nats per image.

    Raises:
        OptionError: Another kind of model, or a number below one.
    """
    if not isinstance(model, LatentVariableModel):
        raise OptionError(f"a {type(model).__name__} has no latent variables to anneal; leave out --ais")
    data.prepare_data()
    chosen = data.subset(split, num_images)
    images = data.images(split)[chosen].to(model.device).float()
    size = images_at_once(num_chains)
    parts = [
        ais_bound(
            model,
            part,
            num_temperatures=num_temperatures,
            num_chains=num_chains,
            generator=keyed_generators(seed, keys),
        )
        for part, keys in zip(*in_parts(images, chosen.tolist(), size), strict=True)
    ]
    bracket = ais_bracket(
        model, num_images, num_temperatures=num_temperatures, num_chains=num_chains, seed=derive_seed("ais", seed)
    )
    return {
        "estimator": f"{num_temperatures:,} temperatures, {num_chains} chains",
        "num_images": len(images),
        **mean_and_error(-torch.cat(parts).cpu()),
        "simulated": {
            "num_images": num_images,
            "lower_bound": mean_and_error(-bracket.upper),
            "upper_bound": mean_and_error(-bracket.lower),
            "gap": mean_and_error(bracket.upper - bracket.lower),
        },
    }
