"""A model of another package, found by its entry point, is trained, loaded, evaluated and pushed like ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_server import HubServer

from lightning_genmodels.weights import records as weights

HERE = Path(__file__).parent


def run(*command: str, cwd: Path, **variables: str) -> str:
    path = os.pathsep.join([str(HERE / "third_party"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.hub
def test_from_training_to_the_hub(run_folder: Path) -> None:
    genmodels = ("-m", "lightning_genmodels.cli")
    assert "shared_rows" in run(*genmodels, "list", cwd=run_folder)
    run(
        *(*genmodels, "fit", "--model=shared_rows", "--data.source=digits", "--trainer.max_epochs=3"),
        *("--trainer.accelerator=cpu", "--model.learning_rate=0.1"),
        cwd=run_folder,
    )
    best = "runs/shared_rows/checkpoints/best.ckpt"
    run(*genmodels, "export", best, "weights", cwd=run_folder)
    table = run(*genmodels, "evaluate", "weights", "--data.source=digits", cwd=run_folder)
    assert "shared_rows: 28 parameters" in table
    assert "exact" in table
    run(*genmodels, "sample", "weights", "--out=x.png", cwd=run_folder)
    with HubServer({"hf_me": "me"}) as hub:
        code = (
            "import lightning_genmodels as gm\n"
            "model = gm.load('weights'); model.push_to_hub('me/rows'); again = gm.load('me/rows')\n"
            "print(type(again).__name__, bool((again.rows == model.rows).all()))"
        )
        environment = hub.environment(run_folder / "home", token="hf_me")
        assert run("-c", code, cwd=run_folder, **environment).strip() == "SharedRows True"


def test_it_passes_the_contract(run_folder: Path) -> None:
    """As a test file of that package would check it."""
    Path("test_models.py").write_text(
        textwrap.dedent("""
        import pytest
        from lightning_genmodels.testing import check_model
        from third_party_models import DropoutVAE, SharedRows

        @pytest.mark.parametrize("cls", [DropoutVAE, SharedRows])
        def test_contract(cls):
            check_model(cls)
        """)
    )
    assert "2 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_models.py", cwd=run_folder)


@pytest.mark.slow(reason="starts processes")
@pytest.mark.parametrize("content", ["raise SystemExit(3)", "import nothing_of_this_name", "", "1 / 0"])
def test_a_package_that_cannot_be_imported_harms_itself_alone(run_folder: Path, content: str) -> None:
    package = run_folder / "site"
    (package / "broken-1.0.dist-info").mkdir(parents=True)
    (package / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    entry = "[lightning_genmodels.models]\nbroken = broken_models:Broken\n"
    (package / "broken-1.0.dist-info" / "entry_points.txt").write_text(entry)
    (package / "broken_models.py").write_text(content + "\n")
    steps = """
        import sys, warnings
        from lightning_genmodels.cli import main
        import lightning_genmodels as gm
        from lightning_genmodels.errors import ModelError
        from lightning_genmodels.models import Bernoulli
        from lightning_genmodels.weights.names import model_class
        assert "broken" in gm.list_models()
        Bernoulli((1, 2, 2)).save_pretrained("weights")
        assert type(gm.load("./weights")) is Bernoulli
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            main(["fit", "--model=bernoulli", "--data.source=digits", "--data.image_size=2", "--trainer.max_epochs=1",
                  "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
        assert any("'broken' cannot be imported" in str(warning.message) for warning in caught)
        try:
            model_class("broken")
        except ModelError as error:
            print("one error:", error)
    """
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    printed = run("-c", textwrap.dedent(steps), cwd=run_folder, PYTHONPATH=path)
    assert "one error: the model 'broken' cannot be imported from broken_models:Broken" in printed


def test_a_damaged_record_is_left_out_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(weights.SHIPPED, tmp_path / "shipped")
    (tmp_path / "shipped" / "nade.static_v1" / "weights.json").write_text("{")
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "shipped")
    weights.registry.cache_clear()
    try:
        with pytest.warns(UserWarning, match="nade.static_v1.weights.json is damaged"):
            names = weights.list_weights()
        assert "nade.static_v1" not in names
        assert "vae.static_v1" in names
    finally:
        weights.registry.cache_clear()
