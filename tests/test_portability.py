"""What PyTorch's own tools make of the models, and imports where the system lacks what Unix has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_genmodels.base import ExplicitModel, GenerativeModel
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.models import GAN, MADE, NADE, VAE, Bernoulli
from lightning_genmodels.testing import tiny


class Decoder(nn.Module):
    """Latents to logits, as a program is exported that needs no more."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> Tensor:
        logits: Tensor = self.model.decode(z)
        return logits


class LogProb(nn.Module):
    """Images to nats."""

    def __init__(self, model: ExplicitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.log_prob(x)


@pytest.mark.slow(reason="the compiler takes half a minute")
@pytest.mark.parametrize("cls", [Bernoulli, MADE, NADE])
@torch.no_grad()
def test_log_prob_is_compiled(cls: type[ExplicitModel]) -> None:
    model = tiny(cls).float()
    x = all_images(model.event_shape)
    torch.testing.assert_close(torch.compile(model.log_prob)(x), model.log_prob(x))


@pytest.mark.slow(reason="the compiler takes half a minute")
@pytest.mark.parametrize("cls", [VAE, GAN])
@torch.no_grad()
def test_decoders_are_compiled_and_exported(cls: type[GenerativeModel]) -> None:
    model: Any = tiny(cls).float()
    z = model.sample_latent(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(model.decode)(z), model.decode(z))
    program = torch.export.export(Decoder(model), (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(z[:4]), model.decode(z[:4]))


IMPORTS = """
import builtins, importlib, pkgutil, signal, sys

UNIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog"}
for name in [name for name in vars(signal) if name.startswith("SIG") and name not in (
    "SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIGBREAK", "SIG_DFL", "SIG_IGN", "Signals"
)]:
    delattr(signal, name)
before, imported = builtins.__import__, []

def windows(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if name in UNIX and importer.startswith("lightning_genmodels"):
        raise ModuleNotFoundError(f"No module named {name!r}, which {importer} imports")
    return before(name, globals, locals, fromlist, level)

import lightning, torch, wandb  # take care of themselves
builtins.__import__ = windows
import lightning_genmodels
for module in pkgutil.walk_packages(lightning_genmodels.__path__, "lightning_genmodels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        imported.append(module.name)
print(len(imported))
"""


def test_imports_need_nothing_that_windows_lacks(run_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50
