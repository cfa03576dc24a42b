"""The scripts in recipes/ run as the README says."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_genmodels.weights.records import list_weights

ROOT = Path(__file__).parent.parent


def run(script: str, *args: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow(reason="trains for some seconds, with the start of a process")
def test_demo_improves_the_bound_and_draws_a_grid(run_folder: Path) -> None:
    printed = run("tools/demo.py", "--seconds=4", cwd=run_folder)
    before, after = (float(value) for value in re.findall(r"training: +([\d.]+) \+-", printed))
    assert after < before - 100
    for name in ("samples.png", "trained_vae.png"):
        assert (run_folder / "demo" / name).stat().st_size > 500


@pytest.mark.slow(reason="a benchmark")
@pytest.mark.data
def test_loader_benchmark_prints_ratios(data_root: Path, run_folder: Path) -> None:
    printed = run("benchmarks/benchmark.py", "data", cwd=run_folder)
    assert len(re.findall(r"[\d.]+ times faster", printed)) == 2


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of tools/, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


def test_every_mutation_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    mutations = tool("mutations", monkeypatch)
    for mutation in mutations.MUTATIONS:
        text = (ROOT / mutations.PACKAGE / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation.what


def test_figures_in_documents_are_those_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tool("tables", monkeypatch)
    for file in tables.FILES:
        text = file.read_text(encoding="utf-8")
        assert tables.updated(text) == text, "run python tools/tables.py"
    assert all(f"`{name}`" in text for name in list_weights())
