"""The one data module that every model is trained and evaluated on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from lightning import LightningDataModule
from torch import Tensor

from lightning_genmodels.data import sources
from lightning_genmodels.data.loader import InMemoryLoader
from lightning_genmodels.errors import OptionError, at_least, check_arguments, within
from lightning_genmodels.functional import resize_area
from lightning_genmodels.random import derive_seed

Source = Literal["mnist", "digits"]
Binarization = Literal["static", "dynamic", "threshold"]
Split = Literal["train", "val", "test"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_EVALUATION_SEED = 20080705  # validation and test draws are part of the protocol: no option changes them


class BinarizedMNISTDataModule(LightningDataModule):
    """Binary digits; a batch is the images alone, (B, 1, H, W) float32 in {0, 1}, unless labels are asked for.

    Binarizations, which are different protocols and never mixed in one table:

    - ``static``: the public fixed binarization (Salakhutdinov and Murray 2008; files by Larochelle),
      50,000/10,000/10,000 images, without labels. For ``digits``: one draw from a fixed seed.
    - ``dynamic``: every training image is drawn from its grey values each time it is seen; validation and test are
      drawn once, from a fixed seed.
    - ``threshold``: grey > 0.5.

    Args:
        root: Folder with ``mnist/`` and ``binarized_mnist/``; what is missing is downloaded into it. Default: the
            environment variable ``LIGHTNING_GENMODELS_DATA``, else a folder in the user's cache.
        source: ``mnist``, or ``digits``: scikit-learn's embedded 1,797 digits, enlarged to 28x28, with no network.
        binarization: ``static``, ``dynamic`` or ``threshold``.
        batch_size: Images of the *global* batch, over all processes: 1 and 8 GPUs take the same steps.
        eval_batch_size: Global batch of validation and test; it changes speed and memory, never a figure.
        image_size: Side of the images; below 28 they are shrunk by area averaging (static: the bits, then > 0.5).
        seed: Seed of the shuffling and of dynamic binarization in training.
        labelled: A batch is (images, labels), the labels (B,) int64, as a classifier takes it.

    Raises:
        OptionError: A value that no option has.
        DataError: Data missing and not to be had, or corrupt.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        source: Source = "mnist",
        binarization: Binarization = "static",
        batch_size: int = 100,
        eval_batch_size: int = 500,
        image_size: int = 28,
        seed: int = 0,
        labelled: bool = False,
    ) -> None:
        check_arguments(locals(), BinarizedMNISTDataModule.__init__)
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, seed=seed)
        within(1, 29, image_size=image_size)
        self.root = Path(root).expanduser() if root is not None else sources.default_root()
        self.source = source
        self.binarization = binarization
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.image_size = image_size
        self.seed = seed
        self.labelled = labelled
        self._images: dict[Split, Tensor] = {}
        self._labels: dict[Split, Tensor] = {}

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(1, H, W) of one image."""
        return (1, self.image_size, self.image_size)

    @property
    def protocol(self) -> dict[str, str | int]:
        """What makes a figure comparable: source, binarization and image size."""
        return {"source": self.source, "binarization": self.binarization, "image_size": self.image_size}

    def prepare_data(self) -> None:
        """Downloads what is missing; Lightning calls it once per node."""
        for file in self._files():
            sources.fetch(self.root, file)

    def setup(self, stage: str | None = None) -> None:
        """Reads all splits into memory as uint8; every process does, and only once."""
        if self._images:
            return
        if self.source == "mnist" and self.binarization == "static":
            bits = {s: sources.read_amat(sources.read(self.root, sources.STATIC_FILES[s])) for s in _SPLITS}
            self._images = {split: self._shrink_bits(images) for split, images in bits.items()}
            return
        grey, self._labels = self._read_grey()
        self._images = {split: self._binarize(split, self._shrink_grey(images)) for split, images in grey.items()}

    def images(self, split: Split) -> Tensor:
        """All images of a split as they are evaluated, (N, 1, H, W) uint8 in {0, 1}.

        For ``dynamic`` training images, which have no fixed bits, this is one draw from a fixed seed.
        """
        self.setup()
        images = self._images[_known(split)]
        return _draw(images, split) if self._is_drawn_anew(split) else images

    def subset(self, split: Split, count: int | None = None) -> Tensor:
        """Indices of ``count`` images of a split: the head of one fixed permutation, whatever the order of the file.

        The file of the static test images is sorted by class, so that its own head would hold zeros alone.

        Args:
            split: train, val or test.
            count: How many; None for all, in the order of the file.

        Returns:
            (count,) int64, at most as many as there are.
        """
        self.setup()
        total = len(self._images[_known(split)])
        if count is None or count >= total:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(derive_seed("subset", split, _EVALUATION_SEED))
        return torch.randperm(total, generator=generator)[:count]

    def labels(self, split: Split) -> Tensor:
        """Digit classes of a split, (N,) uint8, in the order of the images.

        Raises:
            OptionError: The static binarization of MNIST, whose files have no labels.
        """
        self.setup()
        if not self._labels:
            raise OptionError("static binarized MNIST has no labels; choose --data.binarization dynamic or threshold")
        return self._labels[_known(split)]

    def loader(self, split: Split, *, train: bool = False) -> InMemoryLoader:
        """A loader over a split, for this process: shuffled if ``train``, else every image once and in order."""
        self.setup()
        images = self._images[split] if train else self.images(split)
        trainer = self.trainer
        return InMemoryLoader(
            self._place(images),
            self.batch_size if train else self.eval_batch_size,
            train=train,
            binarize=train and self._is_drawn_anew(split),
            labels=self._place(self.labels(split).long()) if self.labelled else None,
            seed=self.seed,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
        )

    def train_dataloader(self) -> InMemoryLoader:
        """Shuffled training batches."""
        return self.loader("train", train=True)

    def val_dataloader(self) -> InMemoryLoader:
        """Validation images, each once."""
        return self.loader("val")

    def test_dataloader(self) -> InMemoryLoader:
        """Test images, each once."""
        return self.loader("test")

    def predict_dataloader(self) -> InMemoryLoader:
        """Test images, each once."""
        return self.loader("test")

    def _files(self) -> list[sources.DataFile]:
        if self.source == "digits":
            return []
        return list((sources.STATIC_FILES if self.binarization == "static" else sources.GREY_FILES).values())

    def _read_grey(self) -> tuple[dict[Split, Tensor], dict[Split, Tensor]]:
        if self.source == "digits":
            grey, labels = sources.load_digits()
            generator = torch.Generator().manual_seed(derive_seed("digits", _EVALUATION_SEED))
            order = torch.randperm(len(grey), generator=generator)
            parts: dict[Split, Tensor] = dict(zip(_SPLITS, order.split([1297, 250, 250]), strict=True))
            return {s: grey[part] for s, part in parts.items()}, {s: labels[part] for s, part in parts.items()}
        content = {name: sources.read_idx(sources.read(self.root, file)) for name, file in sources.GREY_FILES.items()}
        images, labels = content["train_images"], content["train_labels"]
        return (
            {"train": images[:50_000], "val": images[50_000:], "test": content["test_images"]},
            {"train": labels[:50_000], "val": labels[50_000:], "test": content["test_labels"]},
        )

    def _is_drawn_anew(self, split: Split) -> bool:
        return self.binarization == "dynamic" and split == "train"

    def _binarize(self, split: Split, grey: Tensor) -> Tensor:
        if self.binarization == "threshold":
            return (grey > 127).to(torch.uint8)
        return grey if self._is_drawn_anew(split) else _draw(grey, split)

    def _shrink_grey(self, grey: Tensor) -> Tensor:
        if self.image_size == 28:
            return grey
        return resize_area(grey, self.image_size).round().to(torch.uint8)

    def _shrink_bits(self, bits: Tensor) -> Tensor:
        if self.image_size == 28:
            return bits
        return (resize_area(bits, self.image_size) > 0.5).to(torch.uint8)

    def _place(self, images: Tensor) -> Tensor:
        """Moves images or labels to the trainer's accelerator if they take at most a quarter of its free memory."""
        if self.trainer is None:
            return images
        device = self.trainer.strategy.root_device
        if device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(device)[0] // 4:
            return images
        return images.to(device)


def _known(split: Split) -> Split:
    if split not in _SPLITS:
        raise OptionError(f"expected split 'train', 'val' or 'test', got {split!r}")
    return split


def _draw(grey: Tensor, split: Split) -> Tensor:
    """One Bernoulli draw of grey images, the same on every machine."""
    generator = torch.Generator().manual_seed(derive_seed("binarize", split, _EVALUATION_SEED))
    noise = torch.randint(255, grey.shape, generator=generator, dtype=torch.uint8)
    return (noise < grey).to(torch.uint8)
