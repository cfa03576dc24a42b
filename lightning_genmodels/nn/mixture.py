"""A mixture of Gaussians over codes, fitted by expectation maximization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from lightning_genmodels.functional import as_float64
from lightning_genmodels.random import standard_normal, uniform


class GaussianMixture(nn.Module):
    """sum_m w_m N(z; mu_m, L_m L_m^T) in D dimensions, with full covariances; a standard normal until it is fitted.

    Its parameters are buffers: no gradient trains them.

    Args:
        components: M.
        dim: D.
    """

    log_weights: Tensor
    means: Tensor
    scale_tril: Tensor

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("log_weights", torch.full((components,), -math.log(components)))
        self.register_buffer("means", torch.zeros(components, dim))
        self.register_buffer("scale_tril", torch.eye(dim).repeat(components, 1, 1))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (N,) in nats of codes (N, D)."""
        return torch.logsumexp(self._log_joint(z), dim=1)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (num_samples, D) codes."""
        edges = self.log_weights.exp().cumsum(0)
        component = torch.searchsorted(edges, uniform((num_samples,), generator, self.means).to(edges))
        component = component.clamp(max=len(edges) - 1)
        noise = standard_normal(1, num_samples, self.means.shape[1:], generator, like=self.means)[0]
        return self.means[component] + torch.einsum("nij,nj->ni", self.scale_tril[component], noise)

    @torch.no_grad()
    def fit(self, z: Tensor, *, steps: int = 50, seed: int = 0) -> None:
        """Fits the mixture to codes by expectation maximization (Bishop 2006, section 9.2.2).

        Args:
            z: (N, D) codes.
            steps: At most so many, from means that are codes far from each other; it ends when a step gains less than
                1e-4 nats a code.
            seed: Of the choice of the first means.
        """
        z = as_float64(z)
        count, dim = z.shape
        components = len(self.means)
        centred = z - z.mean(0)
        covariance = centred.T @ centred / count
        # A little of the overall variance keeps each covariance positive definite, whatever its share of the codes.
        ridge = 1e-3 * covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(dim).to(z)
        generator = torch.Generator().manual_seed(seed)
        covariances = (covariance / components + ridge).repeat(components, 1, 1)
        self._set(z.new_full((components,), 1.0 / components), self._spread(z, components, generator), covariances)
        found = -math.inf
        for _ in range(steps):
            log_joint = as_float64(self._log_joint(z.to(self.means)))  # (N, M)
            before, found = found, float(torch.logsumexp(log_joint, dim=1).mean())
            if found - before < 1e-4:
                break
            share = torch.softmax(log_joint, dim=1)
            total = share.sum(0).clamp(min=1e-6)
            means = share.T @ z / total.unsqueeze(1)
            for m in range(components):
                distance = z - means[m]
                covariances[m] = (share[:, m : m + 1] * distance).T @ distance / total[m] + ridge
            self._set(total / total.sum(), means, covariances)

    @staticmethod
    def _spread(z: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Some of the codes, each drawn in proportion to its squared distance from those before it (Arthur and
        Vassilvitskii 2007, "k-means++").
        """
        share, chosen = torch.ones(len(z)), []
        for _ in range(count):
            index = int(torch.multinomial(share.clamp(min=1e-12), 1, generator=generator))
            chosen.append(z[index])
            share = torch.stack([(z - mean).square().sum(dim=1) for mean in chosen]).amin(dim=0).float().cpu()
        return torch.stack(chosen)

    def _set(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.log_weights.copy_(weights.log())
        self.means.copy_(means)
        self.scale_tril.copy_(torch.linalg.cholesky(covariances))

    def _log_joint(self, z: Tensor) -> Tensor:  # (N, M)
        columns = []
        for log_weight, mean, scale in zip(self.log_weights, self.means, self.scale_tril, strict=True):
            gaussian = MultivariateNormal(mean, scale_tril=scale, validate_args=False)
            columns.append(log_weight + gaussian.log_prob(z))
        return torch.stack(columns, dim=1)
