"""The scripts in recipes/ run as the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"


def run(script: str, *args: str, cwd: Path) -> str:
    command = [sys.executable, str(RECIPES / script), *args]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.slow
def test_demo_improves_the_bound_and_draws_a_grid(run_folder: Path) -> None:
    printed = run("demo.py", "--seconds=4", cwd=run_folder)
    before, after = (float(value) for value in re.findall(r"training: +([\d.]+) \+-", printed))
    assert after < before - 100
    assert (run_folder / "demo" / "samples.png").stat().st_size > 500


@pytest.mark.slow
@pytest.mark.data
def test_loader_benchmark_prints_ratios(data_root: Path, run_folder: Path) -> None:
    printed = run("benchmark.py", "data", cwd=run_folder)
    assert len(re.findall(r"[\d.]+ times faster", printed)) == 2
