"""Binary images: where they come from, how they are binarized, and how they reach the model."""

from lightning_genmodels.data.datamodule import BinarizedMNISTDataModule
from lightning_genmodels.data.loader import Batch, InMemoryLoader

__all__ = ["Batch", "BinarizedMNISTDataModule", "InMemoryLoader"]
