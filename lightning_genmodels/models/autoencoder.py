"""The autoencoder, and the denoising one (Vincent, Larochelle, Bengio and Manzagol 2008, "Extracting and Composing
Robust Features with Denoising Autoencoders").

It learns codes, and no density. To sample all the same, a Gaussian is fitted to the codes of the training images when
the weights are exported, and draws from it are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import GenerativeModel, RepresentationModel, TrainingOptions
from lightning_genmodels.base.metrics import NegativeLogLikelihood
from lightning_genmodels.errors import OptionError, at_least
from lightning_genmodels.functional import as_float64, at_least_float32, bernoulli_log_prob, check_codes, mean_logits
from lightning_genmodels.nn.coders import Network, coders, output_bias
from lightning_genmodels.random import sample_bernoulli, standard_normal
from lightning_genmodels.training.optimizers import ends


class Autoencoder(GenerativeModel, RepresentationModel):
    """y = f(x), and prod_i Bernoulli(x_i; g_i(y)): codes from which images can be reconstructed.

    The reconstruction's log-likelihood is no likelihood of the image: a code may be as large as the image is.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units of the encoder's hidden layers; the decoder has them in reverse. For ``conv``: channels.
        code_dim: D, numbers in a code.
        corruption: Fraction of pixels that are set to 0 before encoding, in training alone (Vincent et al., section
            2.3): the clean image is to be reconstructed.
        network: ``mlp``: linear layers and tanh. ``conv``: each hidden layer is a convolution that halves the image,
            and in the decoder one that doubles it, with SiLU (Hendrycks and Gimpel 2016).
        rectify: Whether codes are rectified: none is negative, and many are 0 (Glorot, Bordes and Bengio 2011, "Deep
            Sparse Rectifier Neural Networks"). A linear map then reads more off them than off linear codes.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A size below one, an unknown network, or a fraction outside [0, 1).
    """

    monitor = "val/reconstruction"
    finalizes = True
    code_mean: Tensor
    code_scale: Tensor
    """Cholesky factor (D, D) of the covariance of the codes."""

    small = {"event_shape": (1, 2, 3), "hidden_sizes": (5,), "code_dim": 2}

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (500,),
        code_dim: int = 64,
        corruption: float = 0.0,
        network: Network = "mlp",
        rectify: bool = False,
        **options: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(event_shape, **options)
        at_least(1, code_dim=code_dim, hidden_sizes=hidden_sizes)
        if not 0.0 <= corruption < 1.0:
            raise OptionError(f"expected corruption in [0, 1), got {corruption}")
        self.corruption = corruption
        self.rectify = rectify
        self.code_dim = code_dim
        self.encoder, self.decoder = coders(network, self.event_shape, hidden_sizes, code_dim, code_dim)
        self.register_buffer("code_mean", torch.zeros(code_dim))
        self.register_buffer("code_scale", torch.eye(code_dim))
        self.val_reconstruction = NegativeLogLikelihood(self.event_shape)
        self.test_reconstruction = NegativeLogLikelihood(self.event_shape)

    def edges(self) -> list[nn.Module]:
        """First and last layers of encoder and decoder."""
        return ends(self.encoder, self.decoder)

    def _initialize(self, images: Tensor) -> None:
        """Starts the decoder at the mean image."""
        output_bias(self.decoder).copy_(mean_logits(images))

    @torch.no_grad()
    def finalize(self, images: Tensor) -> None:
        """Fits the Gaussian to the codes of the training images, (N, 1, H, W): their mean and covariance."""
        z = as_float64(torch.cat([self.encode(part) for part in images.split(1000)]))
        covariance = z.T.cov(correction=0).view(self.code_dim, self.code_dim)
        # A little of the overall variance keeps it positive definite where codes are constant.
        ridge = 1e-3 * covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(self.code_dim).to(z)
        self.code_mean.copy_(z.mean(0))
        self.code_scale.copy_(torch.linalg.cholesky(covariance + ridge))

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, D) of binary images (B, 1, H, W)."""
        return self._rectified(at_least_float32(self.encoder(self._checked(x).flatten(1))))

    def decode(self, z: Tensor) -> Tensor:
        """Logits (..., 1, H, W) of the pixels given codes (..., D).

        Raises:
            OptionError: ``z`` has another shape.
        """
        codes = check_codes(z, self.code_dim).to(self._number_type)
        logits: Tensor = self.decoder(codes).unflatten(-1, self.event_shape)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of the pixels of images, given their own codes."""
        return self.decode(self.encode(x))

    def reconstruction(self, x: Tensor) -> Tensor:
        """Log-likelihood (B,), in nats, of binary images (B, 1, H, W) given their own codes."""
        return bernoulli_log_prob(self.decode(self.encode(x)), self._checked(x))

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood of images given the codes of their corruptions (Vincent et al., eq. 5)."""
        seen = x * (torch.rand_like(x) >= self.corruption) if self.corruption else x
        return -bernoulli_log_prob(self.decode(self.encode(seen)), self._checked(x)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs and returns the training loss of a batch, images or (images, ...)."""
        return self._logged(self.training_loss(self._taken(batch)))

    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        noise = standard_normal(1, num_samples, (self.code_dim,), generator, like=self.code_mean)[0]
        codes = self.code_mean + noise @ self.code_scale.T
        return sample_bernoulli(self.decode(self._rectified(codes)), generator)

    def _rectified(self, z: Tensor) -> Tensor:
        return F.relu(z) if self.rectify else z

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the validation figure."""
        self.val_reconstruction.update(self.reconstruction(self._taken(batch)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Adds a batch to the test figure."""
        self.test_reconstruction.update(self.reconstruction(self._taken(batch)))

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/reconstruction`` in nats per image."""
        self._log_estimate("val/reconstruction", self.val_reconstruction.compute())
        self.val_reconstruction.reset()

    def on_test_epoch_end(self) -> None:
        """Logs ``test/reconstruction`` in nats per image."""
        self._log_estimate("test/reconstruction", self.test_reconstruction.compute())
        self.test_reconstruction.reset()
