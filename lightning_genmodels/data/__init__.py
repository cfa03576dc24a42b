"""Binary images: sources, binarization and loading."""

from lightning_genmodels.data.datamodule import BinarizedMNISTDataModule
from lightning_genmodels.data.loader import Batch, InMemoryLoader

__all__ = ["Batch", "BinarizedMNISTDataModule", "InMemoryLoader"]
