"""What all tests share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_genmodels.app.server import Server
from lightning_genmodels.data import sources

os.environ.setdefault("WANDB_MODE", "offline")


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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The app, at a port of its own."""
    with Server(port=0) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _assert_same(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            _assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, int | float | str):
        assert one == other, where


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares two structures: the same keys, with the same bits."""
    return _assert_same


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every ``slow`` mark tells why."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: mark it @pytest.mark.slow(reason=...)")
