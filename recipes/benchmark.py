"""Speed, as ratios measured in one run.

python recipes/benchmark.py data
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_genmodels import BinarizedMNISTDataModule


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(name: str, slow: float, fast: float) -> None:
    """Prints two times and their ratio."""
    print(f"{name}: {slow:.3f} s against {fast:.3f} s, {slow / fast:.1f} times faster")


class PerItemDataset(Dataset[Tensor]):
    """Binary images one at a time, by way of PIL, as vision data sets are commonly written."""

    def __init__(self, images: Tensor) -> None:
        self.images = images[:, 0].numpy() * np.uint8(255)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(image)).unsqueeze(0).float().div(255)
        return (pixels > 0.5).float()


def benchmark_data() -> None:
    """One epoch over the training images: a per-item data set in a DataLoader against the in-memory loader."""
    data = BinarizedMNISTDataModule(source="mnist")
    data.prepare_data()
    images = data.images("train")
    loader = data.train_dataloader()

    def exhaust(batches: Any) -> None:
        for batch in batches:
            assert batch.shape == (data.batch_size, 1, 28, 28)

    for workers in (0, 2):
        per_item = DataLoader(
            PerItemDataset(images), data.batch_size, shuffle=True, drop_last=True, num_workers=workers
        )
        slow = seconds(lambda loader=per_item: exhaust(loader), repeats=2)
        fast = seconds(lambda: exhaust(loader))
        report(f"epoch of {len(images):,} static images, DataLoader with {workers} workers", slow, fast)


BENCHMARKS = {"data": benchmark_data}


def main() -> None:
    """Runs the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], default=list(BENCHMARKS))
    for name in parser.parse_args().names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
