"""``torch.hub``: from a folder, and from a GitHub archive with no network, in fresh processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightning_genmodels.weights.names import MODELS
from lightning_genmodels.weights.records import list_weights

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path, **variables: str) -> dict[str, object]:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_loads_from_a_folder_and_samples_encodes_scores(run_folder: Path) -> None:
    found = run(
        f"""
import json, sys, torch
model = torch.hub.load({str(ROOT)!r}, "vae", source="local")
x = model.sample(3)
print(json.dumps({{
    "shapes": [list(x.shape), list(model.encode(x).shape), list(model.iw_bound(x, 5).shape)],
    "training": model.training,
    "imported": sorted({{"wandb", "jsonargparse", "sklearn", "huggingface_hub"}} & set(sys.modules)),
}}))""",
        run_folder,
    )
    assert found == {"shapes": [[3, 1, 28, 28], [3, 50], [3]], "training": False, "imported": []}


@pytest.mark.slow(reason="starts processes")
def test_loads_from_a_github_archive_without_the_package_installed(run_folder: Path) -> None:
    archive = run_folder / "main.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.mkdir("lightning_genmodels-main")
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.splitlines():
            if name == "hubconf.py" or name.startswith("lightning_genmodels/"):
                file.write(ROOT / name, f"lightning_genmodels-main/{name}")
    found = run(
        f"""
import json, sys, torch
sys.path = [path for path in sys.path if path != {str(ROOT)!r}]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
torch.hub.set_dir({str(run_folder / "hub")!r})
torch.hub._git_archive_link = lambda *args: {archive.as_uri()!r}
options = dict(force_reload=True, skip_validation=True, trust_repo=True)
model = torch.hub.load("owner/lightning_genmodels:main", "bernoulli", **options)
print(json.dumps({{"file": sys.modules["lightning_genmodels"].__file__, "pixels": model.logits.numel()}}))""",
        run_folder,
    )
    assert str(found["file"]).startswith(str(run_folder / "hub"))
    assert found["pixels"] == 784


def test_entry_points_are_the_models_and_nothing_else(run_folder: Path) -> None:
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); import hubconf\n"
        "public = [n for n in dir(hubconf) if callable(getattr(hubconf, n)) and not n.startswith('_')]\n"
        "print(json.dumps({'public': public, 'documented': all(getattr(hubconf, n).__doc__ for n in public)}))"
    )
    found = run(code, run_folder)
    assert found["public"] == sorted(MODELS)
    assert found["documented"]


@pytest.mark.slow(reason="starts processes")
def test_arguments_of_an_entry_point(run_folder: Path) -> None:
    found = run(
        f"""
import json, torch
def said(**options):
    try:
        return type(torch.hub.load({str(ROOT)!r}, "vae", source="local", **options)).__name__
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
print(json.dumps([
    said(weights="vae.static_v1", latent_dim=50),
    said(latent_dim=3),
    said(weights="bernoulli.static_v1"),
    said(pretrained=False, latent_dim=3),
    said(pretrained=False, latent_dims=3),
]))""",
        run_folder,
    )
    assert isinstance(found, list)
    assert found[0] == found[3] == "VAE"
    assert found[1].startswith("WeightsError: latent_dim=3 contradicts the weights")
    assert found[2].startswith("WeightsError: bernoulli.static_v1 is a weight of 'bernoulli'")
    assert "latent_dims" in found[4]


@pytest.mark.slow(reason="starts processes")
def test_dependencies_are_what_inference_imports(run_folder: Path) -> None:
    """Each is imported by loading and sampling, so that torch.hub's check names what is missing."""
    found = run(
        f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import hubconf
hubconf.vae().sample(1)
print(json.dumps({{name: name in sys.modules for name in hubconf.dependencies}}))""",
        run_folder,
    )
    assert all(found.values()), found


@pytest.mark.slow(reason="starts processes")
def test_loading_imports_nothing_heavy_beyond_lightning(run_folder: Path) -> None:
    """What makes loading as fast as ``import lightning``; benchmarks/benchmark.py measures it."""
    modules = "print(json.dumps({'top': sorted({name.split('.')[0] for name in sys.modules})}))"
    load = f"torch.hub.load({str(ROOT)!r}, 'vae', source='local').sample(1)"
    loaded = run(f"import json, sys, torch; {load}; {modules}", run_folder)
    lightning = run(f"import json, sys, lightning; {modules}", run_folder)
    added = {name for name in set(loaded["top"]) - set(lightning["top"]) if not name.startswith("_")}
    added -= set(sys.stdlib_module_names)
    assert added <= {"lightning_genmodels", "hubconf", "safetensors"}, added


@pytest.mark.slow(reason="builds and installs the package")
def test_a_wheel_holds_every_shipped_weight_and_recipe(run_folder: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", str(ROOT)]
    subprocess.run(build, cwd=run_folder, check=True)
    wheel = next((run_folder / "dist").glob("*.whl"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "site", str(wheel)],
        cwd=run_folder,
        check=True,
    )
    code = """
import json, lightning_genmodels as gm
from lightning_genmodels.cli import recipes
models = {name: [gm.__file__, list(gm.load(name).sample(1).shape)] for name in gm.list_weights()}
print(json.dumps({"models": models, "recipes": sorted(map(str, recipes().values()))}))"""
    got: Any = run(code, run_folder, PYTHONPATH=str(run_folder / "site"))
    inside = run_folder / "site" / "lightning_genmodels" / "recipes"
    assert got["recipes"] == sorted(str(inside / path.name) for path in (ROOT / "recipes").glob("*.yaml"))
    found = got["models"]
    assert set(found) == set(list_weights())
    for file, shape in found.values():
        assert re.match(str(run_folder / "site"), file)
        assert len(shape) == 4
