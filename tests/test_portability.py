"""What PyTorch's own tools make of the models, and imports where the system lacks what Unix has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.models import FVBN, GAN, MADE, NADE, VAE, Bernoulli, EoNADE, GatedPixelCNN, PixelSNAIL
from lightning_genmodels.testing import tiny


class Method(nn.Module):
    """A method of a model as a module, which is what is exported."""

    def __init__(self, model: GenerativeModel, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = getattr(self.model, self.name)(x)
        return found


def inputs(model: Any, name: str) -> Tensor:
    if name == "log_prob":
        return all_images(model.event_shape)
    return model.sample_latent(6, generator=torch.Generator().manual_seed(0))  # type: ignore[no-any-return]


@pytest.mark.slow(reason="the compiler takes a quarter of a minute each")
@pytest.mark.parametrize(("cls", "name"), [(MADE, "log_prob"), (NADE, "log_prob"), (VAE, "decode"), (GAN, "decode")])
@torch.no_grad()
def test_what_is_compiled_computes_the_same(cls: type[GenerativeModel], name: str) -> None:
    model: Any = tiny(cls).float()
    x = inputs(model, name)
    torch.testing.assert_close(torch.compile(getattr(model, name))(x), getattr(model, name)(x))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((cls, "log_prob") for cls in (Bernoulli, EoNADE, FVBN, GatedPixelCNN, MADE, PixelSNAIL)),
        *((cls, "decode") for cls in (GAN, VAE)),
    ],
)
@torch.no_grad()
def test_what_is_exported_computes_the_same(cls: type[GenerativeModel], name: str) -> None:
    model: Any = tiny(cls).float()
    x = inputs(model, name)
    program = torch.export.export(Method(model, name), (x,))
    torch.testing.assert_close(program.module()(x.flip(0)), getattr(model, name)(x.flip(0)))
    if cls in (MADE, VAE):
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(Method(model, name), (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x[:3]), getattr(model, name)(x[:3]))


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
