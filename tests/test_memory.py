"""Programs keep the memory that they free, for their next tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_genmodels.system import reuse_freed_memory

MEASURE = """
import resource, torch
from lightning_genmodels.models import VAE
torch.manual_seed(0)
model, images = VAE(), torch.zeros(100, 1, 28, 28)
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model.iw_bound(images, 100)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with torch.no_grad():
    pages()
    print(sum(pages() for _ in range(5)))
"""


def faults(program: str) -> int:
    """Pages that the system hands to a process that scores the same images again, after it ran a program."""
    done = subprocess.run(
        [sys.executable, "-c", program + MEASURE], check=True, capture_output=True, text=True, timeout=120
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow(reason="processes of 20 seconds")
@pytest.mark.skipif(not reuse_freed_memory(), reason="needs the GNU C library")
@pytest.mark.parametrize(
    "program",
    [
        "from lightning_genmodels.system import reuse_freed_memory\nassert reuse_freed_memory()",
        "from lightning_genmodels.cli import main\nmain(['list', '--as_json=true'])",
    ],
)
def test_memory_that_was_freed_is_used_again(program: str) -> None:
    assert faults(program) < faults("") / 5
