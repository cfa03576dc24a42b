"""The ladder VAE (Sønderby, Raiko, Maaløe, Sønderby and Winther 2016, "Ladder Variational Autoencoders").

A deep hierarchy of latent variables, whose posterior is inferred from the top down: a deterministic path goes up from
the image, and the posterior of every layer combines what comes up with what the generative path brings down. The form
is that of its convolutional successors: residual blocks with bottlenecks and one feature map a resolution from the path
upwards (Child 2021, "Very Deep VAEs"), and a posterior relative to the prior (Vahdat and Kautz 2020, "NVAE", eq. 7).
Their merge of the two passes, weighted by precisions, is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import LatentVariableModel, TrainingOptions
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import at_least_float32, bernoulli_log_prob, mean_logits, standard_normal_log_prob
from lightning_genmodels.random import Noise, check_generator, standard_normal


class LadderVAE(LatentVariableModel):
    """p(x, z) = prod_l N(z_l; 0, I) prod_i Bernoulli(x_i; f_i(z)), with q(z|x) = prod_l q(z_l | z_1, ..., z_l-1, x).

    Layer 1 is the top. Latents are standard normal because they are written relative to their prior: what the papers
    call the latent variable of layer l, with mean and scale that depend on the layers above, is a term of the state h
    that the path downwards carries, h + W (s_l(h) * z_l). The divergence of the two forms is the same.

    Args:
        event_shape: (1, H, W) of one image.
        layers: Layers of latent variables at each resolution, the finest (half of the image's) first; every further
            one is half as fine.
        channels: Channels of the state and of the feature maps at each resolution; residual blocks have half as many
            inside.
        latent_channels: Latent variables of a layer at each position.
        encoder_blocks: Residual blocks of the path upwards at each resolution.
        output_channels: Channels at the image's own resolution; 0 for none: pixels are then read off the state at half
            of it.
        dropout: Fraction of channels that training drops inside every block (Tompson et al. 2015, "Efficient Object
            Localization Using Convolutional Networks").
        kl_warmup_steps: Steps over which the weight of the KL divergence rises from zero to one in the training loss
            (Sønderby et al. 2016, section 2.3).
        free_bits: Nats per layer below which a divergence, averaged over the batch, costs nothing more in the training
            loss (Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow", eq. 15).
        num_particles: K of the training objective; 1 for the ELBO. With more it is the importance-weighted bound, as in
            Sønderby et al. (2016, section 3), once the warm-up is over; free bits then count in the warm-up alone.
        skip_threshold: Norm above which the gradient of a step is taken for zero, before it is clipped (Child 2021): a
            rare draw of the latents may give a loss a thousand times the usual one, whose direction, however short, is
            worth nothing. None to follow all.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size or number of particles below one, no layer at all, a fraction outside [0, 1), negative
            free bits, or a negative threshold.
    """

    score_rows = 200

    small = {
        "event_shape": (1, 2, 2), "layers": (1, 1), "channels": (2, 3), "latent_channels": 1, "encoder_blocks": 1,
    }  # fmt: skip

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        layers: Sequence[int] = (1, 2, 4),
        channels: Sequence[int] = (32, 64, 64),
        latent_channels: int = 8,
        encoder_blocks: int = 2,
        output_channels: int = 0,
        dropout: float = 0.1,
        kl_warmup_steps: int = 0,
        free_bits: float = 0.0,
        num_particles: int = 1,
        skip_threshold: float | None = None,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        if min([*channels, latent_channels, encoder_blocks, output_channels + 1]) < 1 or len(channels) != len(layers):
            raise OptionError(
                f"expected sizes of at least 1, and as many channels as resolutions, got channels={tuple(channels)}, "
                f"layers={tuple(layers)}, latent_channels={latent_channels}, encoder_blocks={encoder_blocks}, "
                f"output_channels={output_channels}"
            )
        if min(layers, default=0) < 0 or sum(layers) < 1:
            raise OptionError(f"expected at least one layer of latent variables, got layers={tuple(layers)}")
        if not 0.0 <= dropout < 1.0 or free_bits < 0.0:
            raise OptionError(
                f"expected dropout in [0, 1) and free_bits of at least 0, got dropout={dropout}, free_bits={free_bits}"
            )
        at_least(1, num_particles=num_particles)
        at_least(0.0, skip_threshold=skip_threshold or 0.0)
        self.skip_threshold = skip_threshold
        self._num_particles = num_particles
        self.kl_warmup_steps = kl_warmup_steps
        self.free_bits = free_bits
        _, height, width = self.event_shape
        resolutions = [(-(-height // 2**level), -(-width // 2**level)) for level in range(1, len(layers) + 1)]
        self.up = nn.ModuleList(
            _StageUp(inputs, outputs, encoder_blocks, dropout) for inputs, outputs in itertools.pairwise([1, *channels])
        )
        top_first = list(zip(reversed(resolutions), reversed(layers), reversed(channels), strict=True))
        self.down = nn.ModuleList(
            _StageDown(resolution, count, inputs, outputs, latent_channels, dropout)
            for (resolution, count, outputs), inputs in zip(top_first, [0, *reversed(channels[1:])], strict=True)
        )
        self.shapes = [(latent_channels, *resolution) for resolution, count, _ in top_first for _ in range(count)]
        self.enlarge = nn.ConvTranspose2d(channels[0], output_channels or 1, 4, stride=2, padding=1)
        self.output = nn.Conv2d(output_channels, 1, 3, padding=1, bias=False) if output_channels else None
        self.output_bias = nn.Parameter(torch.zeros(self.event_shape))

    def edges(self) -> list[nn.Module]:
        """The layers that read pixels or write logits."""
        return [self.up[0].shrink, self.enlarge, *([self.output] if self.output is not None else [])]  # type: ignore[list-item]

    def _initialize(self, images: Tensor) -> None:
        """Starts the output at the mean image."""
        self.output_bias.copy_(mean_logits(images).view(self.event_shape))

    @property
    def num_particles(self) -> int:
        """K of the training objective."""
        return self._num_particles

    @property
    def num_latents(self) -> int:
        """D, numbers in z, of all layers."""
        return sum(math.prod(shape) for shape in self.shapes)

    def _encode(self, x: Tensor) -> Tensor:
        """Posterior means (B, D), each layer's at the means of those above; top first."""
        contexts = self._ascend(x)
        means: list[Tensor] = []

        def mean(layer: _Layer, h: Tensor) -> Tensor:
            means.append(layer.posterior(h, contexts[len(means)])[0])
            return means[-1]

        self._descend(len(x), mean)
        return torch.cat([part.flatten(1) for part in means], dim=-1)

    def _decode(self, z: Tensor) -> Tensor:
        rows = z.flatten(0, -2)
        parts = iter(self._split(rows))
        return self._descend(len(rows), lambda layer, h: next(parts)).view(*z.shape[:-1], *self.event_shape)

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x, z) = log p(z) + log p(x|z)."""
        return standard_normal_log_prob(z) + bernoulli_log_prob(self._decode(z), x)

    def _log_weights(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        logits, posteriors, noise = self._infer(x, num_particles, generator)
        log_ratio = -standard_normal_log_prob(noise)  # log p(z) - log q(z|x), layer by layer
        for mean, log_std, part in zip(*posteriors, self._split(noise.flatten(0, 1)), strict=True):
            z = mean + log_std.exp() * part
            log_ratio += (standard_normal_log_prob(z.flatten(1)) + log_std.flatten(1).sum(-1)).view_as(log_ratio)
        return bernoulli_log_prob(logits.view(num_particles, *x.shape), x) + log_ratio

    def _elbo(self, x: Tensor, generator: Noise) -> Tensor:
        """E_q[log p(x|z)] - sum_l KL(q(z_l|.) || p(z_l)), the divergences in closed form."""
        reconstruction, kl = self._elbo_terms(x, generator)
        return reconstruction - kl

    def elbo_terms(self, x: Tensor, *, generator: Noise = None) -> tuple[Tensor, Tensor]:
        """The terms of the ELBO, estimated with one particle.

        Args:
            x: (B, 1, H, W) binary images.
            generator: One generator, or one per image.

        Returns:
            E_q[log p(x|z)], (B,), and KL(q(z_l | z_1, ..., z_l-1, x) || p(z_l)) of each of the L layers, (L, B), never
            negative; top first. Nats per image.
        """
        check_generator(generator)
        return self._terms_by_layer(self._checked(x), generator)

    def _elbo_terms(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        reconstruction, kl = self._terms_by_layer(x, generator)
        return reconstruction, kl.sum(dim=0)

    def _terms_by_layer(self, x: Tensor, generator: Noise) -> tuple[Tensor, Tensor]:
        logits, posteriors, _ = self._infer(x, 1, generator)
        kls = [
            0.5 * (mean.square() + (2.0 * log_std).exp() - 1.0 - 2.0 * log_std).flatten(1).sum(dim=1)
            for mean, log_std in zip(*posteriors, strict=True)
        ]
        return bernoulli_log_prob(logits, x), torch.stack(kls)

    def training_loss(self, x: Tensor) -> Tensor:
        """The negative ELBO, with free bits and a warm-up of the divergence, or the bound of several particles."""
        if self.num_particles > 1 and self.global_step >= self.kl_warmup_steps:
            return super().training_loss(x)
        reconstruction, kl = self._terms_by_layer(x, None)
        divergence = kl.mean(dim=1).clamp(min=self.free_bits).sum()
        weight = 1.0 if self.global_step >= self.kl_warmup_steps else self.global_step / self.kl_warmup_steps
        return weight * divergence - reconstruction.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets a gradient above the threshold to zero, without waiting for the accelerator."""
        if self.skip_threshold is not None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            is_usual = torch.nn.utils.get_total_norm(gradients) <= self.skip_threshold
            for gradient in gradients:
                gradient.masked_fill_(~is_usual, 0.0)

    def _sample_latent(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return standard_normal(1, num_samples, (self.num_latents,), generator, like=next(self.parameters()))[0]

    def _infer(
        self, x: Tensor, num_particles: int, generator: Noise
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]], Tensor]:
        """Draws from the posterior: logits (K B, 1, H, W), means and log standard deviations of all layers, and the
        noise (K, B, D).
        """
        contexts = self._ascend(x)
        noise = standard_normal(num_particles, len(x), (self.num_latents,), generator, like=x)  # (K, B, D)
        parts = self._split(noise.flatten(0, 1))
        means: list[Tensor] = []
        log_stds: list[Tensor] = []

        def draw(layer: _Layer, h: Tensor) -> Tensor:
            context = contexts[len(means)].expand(num_particles, *[-1] * 4).flatten(0, 1)
            mean, log_std = layer.posterior(h, context)
            means.append(mean)
            log_stds.append(log_std)
            return mean + log_std.exp() * parts[len(means) - 1]

        return self._descend(num_particles * len(x), draw), (means, log_stds), noise

    def _ascend(self, x: Tensor) -> list[Tensor]:
        """The image's context for each layer, top first: (B, C', H', W') each."""
        features = []
        y = x.contiguous(memory_format=torch.channels_last)
        for stage in self.up:
            y = stage(y)
            features.append(y)
        stages = zip(self.down, reversed(features), strict=True)
        return [layer.context(feature) for stage, feature in stages for layer in stage.layers]  # type: ignore[union-attr]

    def _descend(self, rows: int, latent: Callable[[_Layer, Tensor], Tensor]) -> Tensor:
        """The generative path: logits (N, 1, H, W), with the latents of each layer, given its state, by ``latent``."""
        h = torch.empty(0)
        for stage in self.down:
            h = stage.begin(h, rows)  # type: ignore[operator]
            for layer in stage.layers:  # type: ignore[union-attr]
                h = layer(h, latent(layer, h))
        _, height, width = self.event_shape
        y = self.enlarge(F.silu(h))[..., :height, :width]
        logits: Tensor = (y if self.output is None else self.output(F.silu(y))) + self.output_bias
        return logits

    def _split(self, rows: Tensor) -> list[Tensor]:
        """Latents (N, D) of all layers, (N, Z, H', W') each."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


# Posterior means and scales grow with the state, and the state with their product: without bounds that ran away in a
# rare step, from 10^2 in one layer to 10^18 three layers below, and training was lost. Trained networks stay below.
_FARTHEST = 50.0
_WIDEST = 10.0


class _Block(nn.Module):
    """A bottleneck: 1x1, 3x3 and 1x1 convolutions, each after a SiLU (NVAE has it, too); its output starts small."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        hidden = _hidden(channels)
        self.contract = nn.Conv2d(channels, hidden, 1)
        self.convolve = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.expand = nn.Conv2d(hidden, outputs, 1)
        self.dropout = nn.Dropout2d(dropout)
        with torch.no_grad():
            self.expand.weight.mul_(0.2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.contract(F.silu(x))
        y = y if context is None else y + context
        y = self.convolve(F.silu(y))
        output: Tensor = self.expand(self.dropout(F.silu(y)))
        return output


def _hidden(channels: int) -> int:
    """Channels inside a block."""
    return -(-channels // 2)


class _StageUp(nn.Module):
    """Halves the resolution, and refines."""

    def __init__(self, inputs: int, channels: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Block(channels, channels, dropout) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shrink(x)
        for block in self.blocks:
            y = y + block(y)
        return y


class _Layer(nn.Module):
    """One layer of latent variables, on the path downwards."""

    def __init__(self, channels: int, latent_channels: int, dropout: float) -> None:
        super().__init__()
        self.from_image = nn.Conv2d(channels, _hidden(channels), 1, bias=False)
        self.to_posterior = _Block(channels, 2 * latent_channels, dropout)
        self.to_scale = nn.Conv2d(channels, latent_channels, 1)
        self.from_latent = nn.Conv2d(latent_channels, channels, 1)
        self.refine = _Block(channels, channels, dropout)

    def context(self, feature: Tensor) -> Tensor:
        """The image's share of the posterior's first convolution: once an image, however many particles."""
        context: Tensor = self.from_image(F.silu(feature))
        return context

    def posterior(self, h: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z_l|.), (N, Z, H', W') each, in at least float32."""
        mean, log_std = at_least_float32(self.to_posterior(h, context)).chunk(2, dim=1)
        return mean.clamp(-_FARTHEST, _FARTHEST), 5.0 * torch.tanh(log_std / 5.0)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        scale = F.softplus(self.to_scale(F.silu(h)) + 0.5).clamp(max=_WIDEST)
        h = h + self.from_latent(scale * z.to(scale.dtype))
        refined: Tensor = h + self.refine(h)
        return refined


class _StageDown(nn.Module):
    """The layers at one resolution, and the part of their state that depends on the position alone."""

    def __init__(
        self, resolution: tuple[int, int], layers: int, inputs: int, channels: int, latent_channels: int, dropout: float
    ) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, channels, *resolution))
        self.widen = nn.Conv2d(inputs, channels, 1, bias=False) if inputs else None
        self.layers = nn.ModuleList(_Layer(channels, latent_channels, dropout) for _ in range(layers))

    def begin(self, h: Tensor, rows: int) -> Tensor:
        """The state (N, C, H', W') at this resolution, from that at half of it; none comes to the top."""
        if self.widen is None:
            h = self.start.expand(rows, -1, -1, -1)
        else:
            h = F.interpolate(self.widen(h), size=self.start.shape[2:]) + self.start
        return h.contiguous(memory_format=torch.channels_last)
