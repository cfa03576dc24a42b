"""A loader over images in memory: a batch is one index operation on the device that holds the images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_genmodels.errors import OptionError
from lightning_genmodels.random import derive_seed

Batch = Tensor | tuple[Tensor, Tensor]
"""Images, or images and labels."""


class InMemoryLoader:
    """Yields (B, 1, H, W) float32 batches of binary images, the share of one process of every global batch.

    Given labels, it yields pairs of such images and their labels (B,).

    In training, every process takes the same permutation of (seed, epoch) and every ``world_size``-th image of each
    global batch, so that shares differ by at most one image; :attr:`weight` is what a mean over one counts. Grey images
    are binarized anew, by noise that is drawn for the whole global batch, so that one and eight processes see the same
    images. In evaluation every image is counted once: process r has the images r, r + world_size, ..., cut into the
    same number of batches on every process.

    Its state (epoch, position) goes into Lightning's checkpoints, so that a killed run goes on with the very next
    batch.

    Args:
        images: (N, 1, H, W) uint8: bits, or grey values 0..255 if ``binarize``.
        batch_size: Size of the global batch.
        train: Shuffle, and drop the incomplete last batch.
        binarize: Draw each pixel as a Bernoulli variable with mean grey / 255.
        labels: (N,) int64, to be handed out with the images.
        seed: Seed of permutations and binarization.
        rank: This process.
        world_size: Number of processes.

    Raises:
        OptionError: There are fewer images in a batch than processes, or too few images.
    """

    batch_sampler = None  # Lightning asks for it; None says that nothing is to be injected.

    def __init__(
        self,
        images: Tensor,
        batch_size: int,
        *,
        train: bool = False,
        binarize: bool = False,
        labels: Tensor | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise OptionError(f"expected batch_size of at least 1, got {batch_size}")
        if train and batch_size < world_size:
            raise OptionError(
                f"the global batch_size {batch_size} gives not every one of {world_size} processes an image; choose "
                f"at least {world_size} with --data.batch_size"
            )
        if train and len(images) < batch_size:
            raise OptionError(f"batch_size {batch_size} is larger than the {len(images)} training images")
        if len(images) < world_size:
            raise OptionError(f"{len(images)} images do not give every one of {world_size} processes at least one")
        self.images = images
        self.batch_size = batch_size
        self.train = train
        self.binarize = binarize
        self.labels = labels
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0

    @property
    def sampler(self) -> InMemoryLoader:
        """Itself: Lightning calls ``loader.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next pass; a new epoch starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    @property
    def weight(self) -> float:
        """What the mean loss of this process's share counts in the mean over processes: 1 if shares are equal."""
        share = len(range(self.rank, self.batch_size, self.world_size))
        return share * self.world_size / self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and number of batches already handed out in it."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the loader that gave ``state`` stood."""
        self.epoch, self.position = state["epoch"], state["position"]

    def __len__(self) -> int:
        """Batches of a full epoch, the same on every process."""
        if self.train:
            return len(self.images) // self.batch_size
        # At most one batch per image of the smallest share, so that no process ever has an empty batch.
        return min(-(-len(self.images) // self.batch_size), len(self.images) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._train_batches() if self.train else self._eval_batches()

    def _eval_batches(self) -> Iterator[Batch]:
        for indices in torch.arange(self.rank, len(self.images), self.world_size).tensor_split(len(self)):
            chosen = indices.to(self.images.device)
            yield self._batch(self.images[chosen], chosen)

    def _train_batches(self) -> Iterator[Batch]:
        if self.position >= len(self):
            self.position = 0
        generator = torch.Generator().manual_seed(derive_seed("permutation", self.seed, self.epoch))
        permutation = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        while self.position < len(self):
            position = self.position
            batch = permutation[position * self.batch_size : (position + 1) * self.batch_size]
            chosen = batch[self.rank :: self.world_size]
            images = self.images[chosen]
            if self.binarize:
                images = self._threshold(position) < images
            self.position += 1  # before the yield: nothing after the last yield of an epoch runs
            yield self._batch(images, chosen)

    def _batch(self, images: Tensor, chosen: Tensor) -> Batch:
        return images.float() if self.labels is None else (images.float(), self.labels[chosen])

    def _threshold(self, position: int) -> Tensor:
        """Uniform integers 0..254 for this process's share of a global batch: P(threshold < grey) = grey / 255."""
        seed = derive_seed("binarization", self.seed, self.epoch, position)
        generator = torch.Generator(self.images.device).manual_seed(seed)
        shape = (self.batch_size, *self.images.shape[1:])
        noise = torch.randint(255, shape, generator=generator, device=self.images.device, dtype=torch.uint8)
        return noise[self.rank :: self.world_size]
