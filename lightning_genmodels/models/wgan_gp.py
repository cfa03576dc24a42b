"""The Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, "Improved Training of Wasserstein GANs"), for
binary images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_genmodels.base import AdversarialModel, AdversarialOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import at_least_float32
from lightning_genmodels.nn.adversarial import Estimator
from lightning_genmodels.nn.coders import Network


class WGANGP(AdversarialModel):
    """A generator whose critic D estimates the Wasserstein distance to the data: E[D(x)] - E[D(g(z))].

    That holds for a critic of slope at most 1, which a penalty asks for on lines between images of the data and of the
    generator (Gulrajani et al., eq. 3). Both ends are binary; the points between them are grey, and the penalty alone
    sees them. What ``estimator`` says of the pixels of :class:`lightning_genmodels.models.GAN` holds here too.

    Args:
        event_shape: (1, H, W) of one image.
        latent_dim: D, numbers in z ~ N(0, I).
        hidden_sizes: Channels of the critic's hidden layers; the generator has them in reverse. For ``mlp``: units.
        network: ``conv``: each hidden layer is a convolution that halves the image, and in the generator one that
            doubles it. ``mlp``: linear layers.
        estimator: How pixels are made binary: ``straight_through`` or ``gumbel_sigmoid``; see
            :func:`lightning_genmodels.nn.adversarial.binarize`.
        temperature: Of the relaxation that gives the gradient.
        penalty: lambda, weight of the gradient penalty.
        discriminator_steps: n_critic, updates of the critic for one of the generator; each takes a batch.
        learning_rate: Of both networks (algorithm 1).
        betas: Of Adam (algorithm 1).
        options: Weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size below one, an unknown network or estimator, or a negative penalty.
    """

    small = {"event_shape": (1, 2, 3), "hidden_sizes": (4,), "latent_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 100,
        hidden_sizes: Sequence[int] = (64, 128),
        network: Network = "conv",
        estimator: Estimator = "straight_through",
        temperature: float = 1.0,
        penalty: float = 10.0,
        discriminator_steps: int = 5,
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.9),
        **options: Unpack[AdversarialOptions],
    ) -> None:
        super().__init__(
            event_shape,
            latent_dim,
            hidden_sizes,
            network,
            estimator,
            temperature,
            0.0,
            discriminator_steps,
            learning_rate,
            betas,
            **options,
        )
        if penalty < 0.0:
            raise OptionError(f"expected a penalty of at least 0, got {penalty}")
        self.penalty = penalty

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """E[D(g(z))] - E[D(x)] + lambda E[(||grad D(x')|| - 1)^2], x' between x and g(z)."""
        on_real, on_fake = (at_least_float32(self.discriminator(images)) for images in (real, fake))
        return on_fake.mean() - on_real.mean() + self.penalty * (self.slopes(real, fake) - 1.0).square().mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[D(g(z))]."""
        return -at_least_float32(self.discriminator(fake)).mean()

    def slopes(self, real: Tensor, fake: Tensor) -> Tensor:
        """Norms (B,) of the critic's gradient, one random point each on the lines from ``real`` to ``fake``, both
        (B, 1, H, W); in float32 in mixed precision, too.
        """
        with torch.autocast(real.device.type, enabled=False):
            share = torch.rand((len(real), 1, 1, 1), device=real.device, dtype=real.dtype)
            between = torch.lerp(real, fake, share).requires_grad_()
            (gradient,) = torch.autograd.grad(self.discriminator(between).sum(), between, create_graph=True)
            slopes: Tensor = gradient.flatten(1).norm(dim=1)
            return slopes
