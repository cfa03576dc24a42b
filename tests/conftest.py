"""What all tests share."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_genmodels.data import sources

os.environ.setdefault("WANDB_MODE", "offline")


def all_images(event_shape: tuple[int, int, int]) -> Tensor:
    """Every binary image of a tiny shape, (2^n, 1, H, W)."""
    _, height, width = event_shape
    pixels = list(itertools.product([0.0, 1.0], repeat=height * width))
    return torch.tensor(pixels, dtype=torch.float64).view(-1, *event_shape)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real MNIST files; tests that need it are skipped without it."""
    root = sources.default_root()
    files = [*sources.STATIC_FILES.values(), *sources.GREY_FILES.values()]
    if any(sources.find(root, file) is None for file in files):
        pytest.skip(f"no MNIST files; name their folder in ${sources.ROOT_VARIABLE}")
    return root


@pytest.fixture(autouse=True)
def _real_data(request: pytest.FixtureRequest) -> None:
    """Skips a test marked ``data`` where the files are not there, whatever way it reads them."""
    if request.node.get_closest_marker("data"):
        request.getfixturevalue("data_root")


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
