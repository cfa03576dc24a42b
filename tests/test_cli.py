"""The command line as a user calls it: every recipe, every command, every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_genmodels import list_models, load
from lightning_genmodels.base import GenerativeModel, LatentVariableModel
from lightning_genmodels.cli import SUMMARIES, main
from lightning_genmodels.cli.train import TrainingCLI
from lightning_genmodels.system import set_matmul_precision
from lightning_genmodels.training.callbacks import best_path, last_path
from lightning_genmodels.weights.names import model_class

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

SHORT = [
    "--data.source=digits",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]

KILLED = """
import os, sys
from lightning_genmodels import cli
from lightning_genmodels.training import callbacks

save = callbacks.LastCheckpoint._save

def save_and_die(self, trainer):
    save(self, trainer)
    if trainer.current_epoch == 1:
        os._exit(9)

callbacks.LastCheckpoint._save = save_and_die
cli.main(sys.argv[1:])
"""


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line with which a command fails."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short VAE run on digits."""
    root = tmp_path_factory.mktemp("run")
    recipe = str(next(path for path in RECIPES if path.name == "vae.yaml"))
    main(["fit", "--config", recipe, *SHORT, "--samples.every_n_epochs=1", f"--trainer.default_root_dir={root}"])
    return root


@pytest.mark.slow(reason="trains by every recipe")
@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_trains_and_its_checkpoint_loads(recipe: Path, run_folder: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    batch = min(config["data"]["batch_size"], 4 if recipe.stem.endswith("_gpu") else 100)
    short = [*SHORT, f"--data.batch_size={batch}", f"--data.eval_batch_size={batch}", "--samples.num_samples=4"]
    short += ["--trainer.limit_val_batches=2", "--trainer.num_sanity_val_steps=0"]
    short.append("--trainer.precision=32-true")  # bfloat16 convolutions take minutes on many CPUs
    main(["fit", "--config", str(recipe), *short, "--trainer.default_root_dir=run"])
    for path in (best_path("run"), last_path("run")):
        model = GenerativeModel.from_pretrained(path)
        if isinstance(model, GenerativeModel):
            assert model.sample(2).shape == (2, *model.event_shape)
    resolved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert resolved["data"]["source"] == "digits"
    assert resolved["model"]["class_path"].startswith("lightning_genmodels.models.")


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_opens_with_its_exact_command(recipe: Path) -> None:
    comment = "".join(line for line in recipe.read_text().splitlines(True) if line.startswith("#"))
    assert f"genmodels fit --config recipes/{recipe.relative_to(recipe.parents[0]).as_posix()}" in comment
    assert "Needs:" in comment


def test_every_model_has_a_recipe() -> None:
    used = {yaml.safe_load(path.read_text())["model"]["class_path"].rsplit(".", 1)[1] for path in RECIPES}
    assert {model_class(name).__name__ for name in list_models()} <= used


def test_training_leaves_checkpoints_config_grid_and_log(trained: Path) -> None:
    with Image.open(trained / "samples" / "epoch_0001.png") as image:
        assert image.size == (2 * (8 * 30 + 2), 2 * (8 * 30 + 2))
        assert {0, 255} <= set(np.unique(np.asarray(image)).tolist())
    metrics = (trained / "logs" / "version_0" / "metrics.csv").read_text()
    assert "val/nelbo" in metrics
    checkpoint = torch.load(best_path(trained), weights_only=True)
    assert list(checkpoint["hyper_parameters"]["event_shape"]) == [1, 28, 28]


@pytest.mark.slow(reason="the compiler takes a minute")
def test_compiled_training_keeps_the_names_of_the_weights(run_folder: Path) -> None:
    options = ["--model.hidden_size=2", "--model.num_layers=1", "--ema=0.9", "--samples.every_n_epochs=0"]
    main(["fit", "--model=pixelcnn", *options, *SHORT, "--compile=true", "--trainer.default_root_dir=run"])
    state = torch.load(last_path("run"), weights_only=True)["state_dict"]
    assert not any("_orig_mod" in key for key in state)
    assert load(last_path("run")).sample(1).shape == (1, 1, 28, 28)


def test_sampling_shows_its_progress_on_a_terminal_alone(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_class("pixelcnn")(event_shape=(1, 5, 5), hidden_size=2, num_layers=1).save_pretrained("weights")
    main(["sample", "./weights", "--grid", "2", "--out", "grid.png"])
    assert Path("grid.png").is_file()
    assert "sampling" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["sample", "./weights", "--grid", "2", "--out", "grid.png"])
    assert "sampling" in capsys.readouterr().err
    main(["sample", "./weights", "--grid", "2", "--out", "grid.png", "--progress", "false"])
    assert "sampling" not in capsys.readouterr().err


def test_annealing_shows_its_progress_on_a_terminal_alone(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_class("vae")(event_shape=(1, 5, 5), hidden_sizes=(3,), latent_dim=2).save_pretrained("weights")
    few = ("--data.source=digits", "--data.image_size=5", "--limit=2", "--num_particles=2", "--accelerator=cpu")
    main(["evaluate", "./weights", *few, "--ais=3"])
    assert "annealing" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["evaluate", "./weights", *few, "--ais=3"])
    assert "annealing" in capsys.readouterr().err


def test_averaged_weights_are_what_is_saved(run_folder: Path) -> None:
    common = ["fit", "--model=vae", *SHORT, "--samples.every_n_epochs=0"]
    main([*common, "--ema=0.9", "--trainer.default_root_dir=averaged"])
    main([*common, "--trainer.default_root_dir=plain"])
    averaged, plain = (torch.load(last_path(name), weights_only=True) for name in ("averaged", "plain"))
    for key, last in plain["state_dict"].items():
        assert torch.equal(last, averaged["current_model_state"][key])
    assert any(not torch.equal(averaged["state_dict"][key], value) for key, value in plain["state_dict"].items())
    assert torch.equal(
        load(last_path("averaged")).state_dict()["decoder.0.weight"], averaged["state_dict"]["decoder.0.weight"]
    )


def test_resume_goes_on_where_the_run_stopped(run_folder: Path) -> None:
    common = ["fit", "--model=vae", *SHORT, "--samples.every_n_epochs=0", "--ema=0.9", "--model.warmup_steps=2"]
    main([*common, "--trainer.max_epochs=4", "--trainer.default_root_dir=whole"])
    resumed = [*common, "--trainer.max_epochs=4", "--trainer.default_root_dir=parts"]
    assert subprocess.run([sys.executable, "-c", KILLED, *resumed], check=False, capture_output=True).returncode == 9
    main([*resumed, "--ckpt_path=last"])
    whole, parts = (torch.load(last_path(name), weights_only=True) for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 3
    for key, tensor in whole["current_model_state"].items():
        assert torch.equal(tensor, parts["current_model_state"][key]), key
        assert torch.equal(whole["state_dict"][key], parts["state_dict"][key]), key


def test_warm_start_from_exported_weights(trained: Path, run_folder: Path) -> None:
    main(["export", str(best_path(trained)), "exported"])
    assert sorted(path.name for path in Path("exported").iterdir()) == ["config.json", "model.safetensors"]
    quick = [
        *SHORT,
        "--model=vae",
        "--model.init_from=exported",
        "--model.learning_rate=1e-12",
        "--samples.every_n_epochs=0",
    ]
    main(["fit", *quick, "--trainer.default_root_dir=warm"])
    start, warm = load("exported").state_dict(), load(last_path("warm")).state_dict()
    assert all(torch.allclose(start[key], warm[key], atol=1e-6) for key in start)
    assert load(last_path("warm")).hparams["learning_rate"] == 1e-12


def test_warm_start_from_another_architecture_says_what_to_do(
    trained: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(best_path(trained)), "exported"])
    options = ["--model=vae", "--model.init_from=exported", "--trainer.default_root_dir=other"]
    for other in ("--model.network=conv", "--model.latent_dim=3"):  # other tensors, other shapes
        with pytest.raises(SystemExit):
            main(["fit", *SHORT, *options, other])
        assert "train a model of the options that these weights were trained with" in capsys.readouterr().err


def test_half_precision_export(trained: Path, run_folder: Path) -> None:
    main(["export", str(best_path(trained)), "half", "--half=true"])
    main(["export", str(best_path(trained)), "whole"])
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in ("half", "whole")]
    assert sizes[0] < 0.51 * sizes[1]
    assert load("half").dtype == torch.float32


def test_a_resumed_run_says_which_options_it_ignores(run_folder: Path) -> None:
    options = [*SHORT, "--model=vae", "--model.learning_rate=0.001"]
    main(["fit", *options])
    resumed = ["fit", *options, "--ckpt_path=last", "--trainer.max_epochs=2"]
    with pytest.warns(UserWarning, match=r"goes on with learning_rate=0.001 of its checkpoint, and not with 0.1"):
        main([*resumed, "--model.learning_rate=0.1"])
    optimizer = torch.load(last_path(Path("runs/vae")), weights_only=True)["optimizer_states"][0]
    assert optimizer["param_groups"][0]["initial_lr"] == 0.001


def test_validate_and_test_commands(trained: Path, run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model=vae",
        "--data.source=digits",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={trained}",
    ]
    main(["validate", *options, "--ckpt_path=best"])
    main(["test", *options, "--ckpt_path=last"])
    printed = capfd.readouterr().out
    assert "val/nelbo" in printed
    assert "test/iw100" in printed


def test_sample_writes_png_and_npy(trained: Path, run_folder: Path) -> None:
    name = str(best_path(trained))
    main(["sample", name, "--out=grid.png", "--grid=3"])
    with Image.open("grid.png") as image:
        assert image.size == (2 * (3 * 30 + 2), 2 * (3 * 30 + 2))
    main(["sample", name, "--out=images.npy", "--num_samples=5", "--seed=1"])
    main(["sample", name, "--out=again.npy", "--num_samples=5", "--seed=1"])
    images = np.load("images.npy")
    assert images.shape == (5, 1, 28, 28)
    assert set(np.unique(images)) == {0, 1}
    assert np.array_equal(images, np.load("again.npy"))


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_score_and_encode(trained: Path, run_folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(best_path(trained))
    main(["sample", name, "--out=images.npy", "--num_samples=4"])
    images = np.load("images.npy")
    if kind == "png":  # the grid of the same images
        main(["sample", name, "--out=images.png", "--num_samples=4"])
    capsys.readouterr()
    main(["log_prob", name, f"images.{kind}", "--out=scores.npy", "--num_particles=10"])
    scores = np.load("scores.npy")
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[1]) for line in lines] == pytest.approx(scores.tolist(), abs=1e-3)
    main(["encode", name, f"images.{kind}", "codes.npy"])
    model = load(name)
    assert isinstance(model, LatentVariableModel)
    assert torch.allclose(torch.from_numpy(np.load("codes.npy")), model.encode(torch.from_numpy(images)), atol=1e-6)


def test_evaluate_writes_figures_and_the_values_behind_them(
    trained: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(best_path(trained))
    main(["evaluate", name, "--data.source=digits", "--limit=60", "--num_particles=120", "--out=report"])
    printed = capsys.readouterr().out
    metrics = json.loads(Path("report/metrics.json").read_text())
    figures = metrics["figures"]
    assert list(figures) == ["nelbo", "iw120"]
    assert figures["iw120"]["value"] < figures["nelbo"]["value"]
    for name_, figure in figures.items():
        assert f"{name_} " in printed
        assert figure["bits_per_dimension"] == pytest.approx(figure["value"] / 784 / np.log(2))
    import safetensors.torch

    values = safetensors.torch.load_file("report/values.safetensors")
    assert values["iw120"].shape == (60,)
    assert values["iw120"].double().mean().item() == pytest.approx(figures["iw120"]["value"], abs=1e-4)
    assert metrics["protocol"] == {
        "source": "digits", "binarization": "static", "image_size": 28, "split": "test", "num_images": 60,
        "subset": "head of a fixed permutation",
    }  # fmt: skip


def test_list_names_models_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--as_json=true"])
    assert set(json.loads(capsys.readouterr().out)) == set(list_models())


@pytest.mark.parametrize("command", [None, *SUMMARIES])
def test_help_of_every_command(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if command is None:
        main(["--help"])
        printed = capsys.readouterr().out
        assert all(re.search(rf"^ +{name} ", printed, re.MULTILINE) for name in SUMMARIES)
    else:
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
    assert "usage:" in printed


@pytest.mark.parametrize("args", [["--version"], ["--help"], [], ["list"]])
def test_what_the_command_says_of_itself_needs_no_pytorch(args: list[str]) -> None:
    steps = f"import sys; from lightning_genmodels.cli import main; main({args}); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", steps], capture_output=True, text=True, check=True)
    *said, imported = found.stdout.splitlines()
    assert imported == "False"
    assert said


def test_an_unknown_model_of_a_recipe_is_one_line_with_the_nearest_name(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown model 'vea'; did you mean 'vae'?" in error_of(capsys, "fit", "--model", "vea")
    assert "unknown model 'pixelcn'; did you mean 'pixelcnn'?" in error_of(capsys, "fit", "--model=pixelcn")


def test_recipes_are_listed_copied_and_found_by_name(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    assert capsys.readouterr().out.split() == [path.stem for path in RECIPES]
    main(["recipes", "cp", "vae"])
    assert Path("vae.yaml").read_bytes() == RECIPES[0].with_name("vae.yaml").read_bytes()
    assert "vae.yaml exists already" in error_of(capsys, "recipes", "cp", "vae")
    assert "unknown recipe 'vea'; did you mean 'vae'?" in error_of(capsys, "recipes", "cp", "vea")
    quick = ["--data.source=digits", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu"]
    main(["fit", "--config", "bernoulli", *quick])
    main(["fit", "--config=bernoulli", "--trainer.default_root_dir=other", *quick])


def test_a_device_that_is_not_there_is_one_line(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda:99", "xpu9", "abacus"):
        assert f"cannot run on --device {device}: " in error_of(capsys, "sample", "bernoulli", f"--device={device}")
    main(["sample", "bernoulli", "--device=cpu", "--num_samples=1", "--out=x.npy"])


def test_recipes_train_py_is_the_same_program() -> None:
    script = RECIPES[0].parent / "train.py"
    found = subprocess.run([sys.executable, str(script), "list"], capture_output=True, text=True, check=True)
    assert all(name in found.stdout for name in list_models())


# Mistakes.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["sample", "vae", "--num_samples=0"], "expected num_samples to be a whole number of at least 1, got 0"),
        (["sample", "vae", "--grid=0"], "expected grid to be a whole number of at least 1, got 0"),
        (["sample", "vae", "--grid=-3"], "got -3"),
        (["sample", "vae", "--seed=-1"], "expected seed to be from 0"),
        (["sample", "vae", f"--seed={2**70}"], "expected seed to be from 0"),
        (["log_prob", "vae", "images.npy", "--num_particles=0"], "num_particles"),
        (["evaluate", "vae", "--limit=1"], "expected limit to be a whole number of at least 2, got 1"),
        (["evaluate", "vae", "--ais=-1"], "expected ais"),
        (["fit", "--model=vae", "--model.learning_rate=-1", "--data.source=digits"], "expected learning_rate"),
        (["fit", "--model=vae", "--model.weight_decay=-1", "--data.source=digits"], "expected weight_decay"),
        (["fit", "--model=vae", "--model.warmup_steps=-1", "--data.source=digits"], "expected warmup_steps"),
        (["fit", "--model=vae", "--model.betas=[2, 3]", "--data.source=digits"], "expected betas"),
        (["fit", "--model=vae", "--ema=2", "--data.source=digits"], "expected ema to be from 0 to below 1, got 2"),
        (["fit", "--model=vae", "--save_every_n_batches=-1", "--data.source=digits"], "expected save_every_n_batches"),
        (["fit", "--model=vae", "--samples.every_n_epochs=-1", "--data.source=digits"], "expected every_n_epochs"),
        (["fit", "--model=gan", "--trainer.gradient_clip_val=1", "--data.source=digits"], "clip"),
        (["fit", "--model=gan", "--trainer.accumulate_grad_batches=2", "--data.source=digits"], "larger --data.batch"),
        (["fit", "--model=markov", "--trainer.accumulate_grad_batches=2"], "larger --data.batch"),
        (["sample"], "required: sample.name"),
        (["sample", "vae", "--num_samples=x"], "--num_samples: expected int, got x"),
        (["sample", "vae", "--bogus"], "unrecognized arguments: --bogus"),
        (["fit", "--trainer.max_epochs=many"], "--trainer.max_epochs: expected int or NoneType, got many"),
        (["fit", "--model=vae", "--model.latent_dim=x"], "--latent_dim: expected int, got x"),
        (["fit", "--model=vae", "--bogus=1"], "unrecognized arguments"),
        (["fit", "--config=nowhere.yaml"], "File does not exist"),
        (["fit", "--model=vae", "--data.source=x"], "expected typing.Literal['mnist', 'digits'], got x"),
        (["fit", "--model=vae", "--trainer.precision=foo"], "got foo"),
        (["fit", "--model=vae", "--trainer.accelerator=cpu", "--trainer.devices=0"], "devices"),
    ],
)
def test_a_wrong_option_is_one_line(
    run_folder: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, *args)
    assert said in line
    assert "usage:" not in line


def test_unknown_names(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown model or weight 'vea'; did you mean 'vae'?" in error_of(capsys, "sample", "vea")
    assert "no checkpoint at gone.ckpt" in error_of(capsys, "sample", "gone.ckpt")
    assert "no folder of weights at gone; it should hold config.json" in error_of(capsys, "sample", "./gone")
    assert "no checkpoint at" in error_of(
        capsys, "fit", "--model=vae", "--data.source=digits", "--ckpt_path=last", "--trainer.default_root_dir=none"
    )


def test_unknown_options_name_the_option(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hiden_sizes" in error_of(capsys, "fit", "--model=vae", "--model.hiden_sizes=[3]", "--data.source=digits")
    assert "bacth_size" in error_of(capsys, "fit", "--model=vae", "--data.bacth_size=3")
    assert "expected sizes of at least 1" in error_of(capsys, "fit", "--model=vae", "--model.latent_dim=0")


def test_wrong_images(trained: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = str(best_path(trained))
    np.save("wrong.npy", np.zeros((3, 1, 14, 14)))
    np.save("grey.npy", np.full((3, 1, 28, 28), 0.5))
    np.save("nan.npy", np.full((3, 1, 28, 28), np.nan))
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    Path("text.npy").write_text("no array")
    Path("text.png").write_text("no picture")
    for file, message in {
        "wrong.npy": "expected images of shape (batch, 1, 28, 28), got (3, 1, 14, 14)",
        "grey.npy": "expected pixels in {0, 1}, got values from 0.5 to 0.5",
        "nan.npy": "NaN",
        "objects.npy": "cannot read images from objects.npy",
        "text.npy": "cannot read images from text.npy",
        "text.png": "cannot read images from text.png",
        "gone.npy": "cannot read images from gone.npy",
        "images.jpg": "expected a .npy or .png file",
    }.items():
        assert message in error_of(capsys, "log_prob", name, file)
    assert "ends in .png or .npy" in error_of(capsys, "sample", name, "--out=x.jpg")


def test_unwritable_output(trained: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("in the way")
    assert "cannot write into file" in error_of(capsys, "sample", str(best_path(trained)), "--out=file/x.png")
    assert sorted(path.name for path in Path().iterdir()) == ["file"]


def test_models_without_the_asked_for_use(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--model=bernoulli", *SHORT, "--trainer.default_root_dir=run"])
    np.save("x.npy", np.zeros((1, 1, 28, 28)))
    assert "has no codes" in error_of(capsys, "encode", str(last_path("run")), "x.npy", "codes.npy")


def test_image_size_that_does_not_fit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "evaluate", str(best_path(trained)), "--data.source=digits", "--data.image_size=14")
    assert "choose --data.image_size 28" in message


def test_damaged_checkpoint(run_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cut.ckpt").write_bytes(best_path(trained).read_bytes()[:5000])
    assert "is no checkpoint of this package, or it is damaged" in error_of(capsys, "sample", "cut.ckpt")


def test_flags_store_weights_channels_last_and_allow_tf32(run_folder: Path) -> None:
    run = ["fit", "--config", "vae_conv", "--data.source=digits", "--trainer.fast_dev_run=true"]
    try:
        cli = TrainingCLI([*run, "--channels_last=true", "--matmul_precision=high", "--trainer.accelerator=cpu"])
        weights = [p for p in cli.model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        set_matmul_precision()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "sweep", sorted((Path(__file__).parent.parent / "recipes" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_trial_of_every_sweep_trains(sweep: Path, run_folder: Path) -> None:
    found = yaml.safe_load(sweep.read_text())
    values = [entry["values"][0] if "values" in entry else entry["min"] for entry in found["parameters"].values()]
    options = [f"--{name}={value}" for name, value in zip(found["parameters"], values, strict=True)]
    quick = [
        "--trainer.fast_dev_run=2",
        "--trainer.accelerator=cpu",
        "--data.source=digits",
        "--data.binarization=dynamic",
    ]
    main([*found["command"][1:-1], *options, *quick])
    assert found["metric"]["name"] in ("val/nelbo", "val/nll")
    assert "wandb sweep" in sweep.read_text()
