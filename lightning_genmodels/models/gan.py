"""The generative adversarial network (Goodfellow et al. 2014, "Generative Adversarial Nets"), for binary images.

The convolutional networks are those of Radford, Metz and Chintala (2016), "Unsupervised Representation Learning with
Deep Convolutional Generative Adversarial Networks", with layer in place of batch normalization.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from lightning_genmodels.base import AdversarialModel, AdversarialOptions
from lightning_genmodels.functional import at_least_float32
from lightning_genmodels.nn.adversarial import Estimator
from lightning_genmodels.nn.coders import Network


class GAN(AdversarialModel):
    """A generator g(z) that a discriminator D is to take for the data, with the non-saturating loss.

    D maximizes E[log D(x)] + E[log(1 - D(g(z)))] (Goodfellow et al., eq. 1), and g maximizes E[log D(g(z))] (end of
    their section 3). Pixels are binary, so that grey does not give a sample away. With ``straight_through`` they are
    thresholds of the generator's output, and the model is implicit: its samples are all there is. With
    ``gumbel_sigmoid`` they are Bernoulli draws, an observation model of its own: given z, an image has a likelihood,
    which is not used here.

    Args:
        event_shape: (1, H, W) of one image.
        latent_dim: D, numbers in z ~ N(0, I).
        hidden_sizes: Units of the discriminator's hidden layers; the generator has them in reverse. For ``conv``:
            channels.
        network: ``mlp``: linear layers, ReLU in the generator, LeakyReLU where the paper has maxout. ``conv``: each
            hidden layer is a convolution that halves the image, and in the generator one that doubles it.
        estimator: How pixels are made binary: ``straight_through`` or ``gumbel_sigmoid``; see
            :func:`lightning_genmodels.nn.adversarial.binarize`.
        temperature: Of the relaxation that gives the gradient.
        dropout: Fraction of the discriminator's hidden units that training drops.
        discriminator_steps: k, updates of the discriminator for one of the generator; each takes a batch.
        learning_rate: Of both networks (Radford et al., section 3).
        betas: Of Adam (Radford et al., section 3).
        options: Weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size below one, an unknown network or estimator, or a fraction outside [0, 1).
    """

    small = {"event_shape": (1, 2, 3), "hidden_sizes": (5,), "latent_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 100,
        hidden_sizes: Sequence[int] = (1200, 1200),
        network: Network = "mlp",
        estimator: Estimator = "straight_through",
        temperature: float = 1.0,
        dropout: float = 0.0,
        discriminator_steps: int = 1,
        learning_rate: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        **options: Unpack[AdversarialOptions],
    ) -> None:
        super().__init__(
            event_shape,
            latent_dim,
            hidden_sizes,
            network,
            estimator,
            temperature,
            dropout,
            discriminator_steps,
            learning_rate,
            betas,
            **options,
        )

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """-E[log D(x)] - E[log(1 - D(g(z)))], where D is the sigmoid of the discriminator's output."""
        on_real, on_fake = (at_least_float32(self.discriminator(images)) for images in (real, fake))
        return F.softplus(-on_real).mean() + F.softplus(on_fake).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[log D(g(z))]."""
        return F.softplus(-at_least_float32(self.discriminator(fake))).mean()
