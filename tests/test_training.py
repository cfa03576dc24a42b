"""Nothing that a user does with a Trainer or a recipe ruins a model, a run or a figure without a word."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_genmodels import BinarizedMNISTDataModule, list_models, load
from lightning_genmodels.base import ExplicitModel, GenerativeModel, TabularModel
from lightning_genmodels.cli import main
from lightning_genmodels.errors import DivergenceError, ImageError, OptionError, WeightsError
from lightning_genmodels.models import (
    FVBN,
    GAN,
    MADE,
    NADE,
    VAE,
    WGANGP,
    Bernoulli,
    EoNADE,
    LadderVAE,
    PixelSNAIL,
)
from lightning_genmodels.training.callbacks import LastCheckpoint, MovingAverage, best_path, last_path
from lightning_genmodels.weights.names import model_class

SIDE = 4


def trainer(**options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(**{**quiet, **options})


def digits(**options: Any) -> BinarizedMNISTDataModule:
    return BinarizedMNISTDataModule(source="digits", **{"image_size": SIDE, "batch_size": 100, **options})


def small(name: str, **options: Any) -> GenerativeModel:
    shape = (1, 4, 4) if name != "chain_rule_table" else (1, 3, 3)
    cls = model_class(name)
    return cls(**{**cls.small, "event_shape": shape, **options})


def state(model: LightningModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


LEARNED = [name for name in list_models() if not issubclass(model_class(name), TabularModel)]


# A model is initialized once.


@pytest.mark.parametrize("name", LEARNED)
def test_fitting_a_loaded_model_without_steps_leaves_it_as_it_is(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small(name)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    before = state(loaded)
    loaded.learning_rate = 0.0
    trainer().fit(loaded, datamodule=digits())
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["fvbn", "made", "vae", "eonade", "ladder_vae", "autoencoder"])
def test_a_second_fit_goes_on_from_the_first(name: str) -> None:
    model = small(name)
    trainer().fit(model, datamodule=digits())
    before = state(model)
    model.learning_rate = 0.0
    trainer().fit(model, datamodule=digits())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_warm_start_is_made_once(tmp_path: Path) -> None:
    start = VAE((1, SIDE, SIDE), (5,), 2)
    start.save_pretrained(tmp_path)
    model = VAE((1, SIDE, SIDE), (5,), 2, init_from=str(tmp_path))
    trainer().fit(model, datamodule=digits())
    before = state(model)
    model.learning_rate = 0.0
    trainer().fit(model, datamodule=digits())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def loader(images: Tensor, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images.float()), batch_size=100, **options)


@pytest.mark.parametrize("name", ["bernoulli", "joint_table", "markov", "fvbn", "made", "nade", "vae"])
def test_a_users_own_loader_is_looked_at_and_counted(name: str) -> None:
    if name == "joint_table":
        shape, data = (1, 3, 3), digits(image_size=3)
    else:
        shape, data = (1, SIDE, SIDE), digits()
    images = data.images("train")
    model = small(
        name, event_shape=shape, **({} if name in ("bernoulli", "joint_table", "markov") else {"learning_rate": 0.0})
    )
    expected = copy.deepcopy(model)
    expected.initialize(images)
    trainer(limit_val_batches=0).fit(model, loader(images, shuffle=True))
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, msg=key)


def test_a_table_counts_anew_in_every_fit() -> None:
    images = digits().images("train")
    model = Bernoulli((1, SIDE, SIDE))
    trainer().fit(model, datamodule=digits())
    trainer().fit(model, loader(1 - images))
    expected = Bernoulli((1, SIDE, SIDE))
    expected.initialize(1 - images)
    torch.testing.assert_close(model.logits, expected.logits)


def test_a_loader_without_end_is_refused_by_a_model_that_must_see_all_images() -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(1, SIDE, SIDE)

    with pytest.raises(OptionError, match=r"endless; call model\.initialize"):
        trainer(max_epochs=-1, max_steps=3).fit(Bernoulli((1, SIDE, SIDE)), DataLoader(Endless(), batch_size=4))


# Batches.


@pytest.mark.parametrize("name", ["vae", "nade", "gan", "bernoulli", "autoencoder"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [(0.5, "binarize"), (255.0, "binarize"), (float("nan"), "NaN")],
)
def test_the_first_batch_of_every_stage_is_looked_at(name: str, stage: str, bad: float, message: str) -> None:
    images = torch.ones(200, 1, SIDE, SIDE)
    images[3] = bad
    with pytest.raises(ImageError, match=message):
        getattr(trainer(limit_val_batches=1), stage)(small(name), loader(images))


def test_a_list_or_tuple_starts_with_the_images_and_bytes_are_images_too() -> None:
    images = digits().images("train")
    bytes_ = DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=100)
    floats = DataLoader(images.float(), batch_size=100)
    found = []
    for batches in (bytes_, floats):
        torch.manual_seed(0)
        model = VAE((1, SIDE, SIDE), (5,), 2)
        trainer(limit_val_batches=0).fit(model, batches)
        found.append(state(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    with pytest.raises(ImageError, match="got dict"):
        trainer().fit(VAE((1, SIDE, SIDE), (5,), 2), DataLoader([{"x": 1.0}] * 8, batch_size=4))
    trainer().fit(VAE((1, SIDE, SIDE), (5,), 2), datamodule=digits(labelled=True))


@pytest.mark.parametrize("name", [name for name in list_models() if name not in ("gan", "wgan_gp")])
def test_predict_gives_what_the_model_makes_of_the_test_images(name: str) -> None:
    model = small(name).eval()
    data = digits(image_size=model.event_shape[1])
    found = torch.cat(trainer().predict(model, datamodule=data))  # type: ignore[arg-type]
    images = data.images("test").float()
    with torch.no_grad():
        expected = model.log_prob(images) if isinstance(model, ExplicitModel) else model.decode(model.encode(images))  # type: ignore[operator]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", list_models())
def test_validate_then_fit(name: str) -> None:
    model = small(name)
    data = digits(image_size=model.event_shape[1])
    trainer().validate(model, datamodule=data, verbose=False)
    trainer().test(model, datamodule=data, verbose=False)
    trainer().fit(model, datamodule=data)
    trainer().test(model, datamodule=data, verbose=False)


# Divergence.


class Poison(Callback):
    """Makes the loss NaN from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            for parameter in pl_module.parameters():
                parameter.data.fill_(torch.nan)


@pytest.mark.parametrize(
    "model", [VAE((1, SIDE, SIDE), (5,), 2), GAN((1, SIDE, SIDE), 2, (4,)), NADE((1, SIDE, SIDE), 3)]
)
def test_a_run_that_diverges_stops_and_names_the_step(model: GenerativeModel) -> None:
    with pytest.raises(DivergenceError, match=r"not finite at step 3: .*learning_rate"):
        trainer(callbacks=[Poison(3)], limit_val_batches=0).fit(model, datamodule=digits(batch_size=20))


RUN = [
    *("fit", "--model=vae", "--model.hidden_sizes=[5]", "--model.latent_dim=2", "--data.source=digits"),
    *("--data.image_size=4", "--data.batch_size=200", "--trainer.accelerator=cpu", "--samples.every_n_epochs=0"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--trainer.default_root_dir=run", "--trainer.max_epochs=2"),
]


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_that_diverges_ends_with_an_error_and_exports_nothing(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([*RUN, "--model.learning_rate=1e30"], capsys)
    assert "training diverged" in line or "not finite" in line
    assert not Path("run/weights").exists()
    assert not best_path("run").exists()


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path) -> None:
    import safetensors.torch

    model = VAE((1, SIDE, SIDE), (5,), 2)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.encoder[0].weight[0, 0] = torch.inf
    with pytest.raises(WeightsError, match=r"1 of 80 numbers of 'encoder\.0\.weight' are not finite"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    torch.save(
        {
            "lightning_genmodels": {"model": "vae"},
            "hyper_parameters": dict(model.hparams),
            "state_dict": model.state_dict(),
        },
        tmp_path / "bad.ckpt",
    )
    with pytest.raises(WeightsError, match="not finite"):
        load(tmp_path / "bad.ckpt")
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")


# Folders and checkpoints.


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_a_second_run_into_a_folder_is_refused_unless_it_resumes_or_overwrites(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(RUN)
    before = contents("run")
    assert "holds a run" in refused([*RUN, "--model.learning_rate=0.1"], capsys)
    assert contents("run") == before
    first = load(Path("run/weights"))
    main([*RUN, "--overwrite=true", "--model.learning_rate=0.1", "--trainer.limit_val_batches=0"])
    second = load(Path("run/weights"))  # of this run, though it validated nothing
    assert not torch.equal(first.encoder[0].weight, second.encoder[0].weight)
    assert torch.equal(load(last_path("run")).encoder[0].weight, second.encoder[0].weight)
    assert "not both" in refused([*RUN, "--overwrite=true", "--ckpt_path=last"], capsys)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--ckpt_path=nowhere.ckpt"],
        ["--ckpt_path=truncated.ckpt"],
        ["--ckpt_path=last", "--model.hidden_sizes=[6]"],
        ["--model=nade", "--model.hidden_size=3", "--ckpt_path=run/checkpoints/last.ckpt"],
    ],
)
def test_a_resume_that_fails_changes_nothing(
    run_folder: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(RUN)
    Path("truncated.ckpt").write_bytes(last_path("run").read_bytes()[:2000])
    before = contents("run")
    args = [argument for argument in RUN if not (wrong[0] == "--model=nade" and argument.startswith("--model"))]
    assert refused([*args, *wrong], capsys).startswith("genmodels: error:")
    assert contents("run") == before


def test_a_checkpoint_is_given_by_its_path(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(RUN)
    main([*RUN, "--trainer.max_epochs=3", f"--ckpt_path={last_path('run')}"])
    assert torch.load(last_path("run"), weights_only=True)["epoch"] == 2
    for stage in ("validate", "test"):
        args = [argument for argument in RUN[1:] if not argument.startswith("--samples")]
        main([stage, *args, f"--ckpt_path={best_path('run')}"])
    assert isinstance(VAE.load_from_checkpoint(best_path("run"), weights_only=True), VAE)


@pytest.mark.parametrize("epochs", [3, 4])
def test_a_run_whose_validations_were_rarer_than_its_epochs_is_prolonged_exactly(run_folder: Path, epochs: int) -> None:
    run = [*RUN, "--trainer.check_val_every_n_epoch=5", "--model.schedule=linear_fall", "--model.fall=0.001"]
    main(run)
    main([*run, f"--trainer.max_epochs={epochs}", "--ckpt_path=last"])
    main([*run, f"--trainer.max_epochs={epochs}", "--trainer.default_root_dir=whole"])
    prolonged, whole = (torch.load(last_path(root), weights_only=True) for root in ("run", "whole"))
    assert prolonged["global_step"] == whole["global_step"] == 6 * epochs
    # The last step of the shorter run had fallen to a lower learning rate, and no other.
    for key, tensor in whole["state_dict"].items():
        torch.testing.assert_close(prolonged["state_dict"][key], tensor, rtol=0, atol=0.003)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_checkpoints_fall_on_optimizer_steps(run_folder: Path, accumulate: int) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.fit_loop.total_batch_idx == 10:
                raise Stopped

    data = digits(batch_size=50)

    def fit(root: str, *callbacks: Callback, resume: str | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        model = VAE((1, 4, 4), (5,), 2)
        Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=2,
            accumulate_grad_batches=accumulate,
            default_root_dir=root,
            callbacks=[*callbacks, LastCheckpoint(3)],
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
        return torch.load(last_path(root), weights_only=True)

    expected = fit("straight")
    with pytest.raises(Stopped):
        fit("stopped", Stop())
    found = fit("stopped", resume=str(last_path("stopped")))
    assert found["global_step"] == expected["global_step"]
    for key, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], tensor), key


def test_the_average_is_that_of_lightning(tmp_path: Path) -> None:
    averages = []
    for average in (MovingAverage(0.9), WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.9))):
        torch.manual_seed(0)
        model = VAE((1, 4, 4), (5,), 2)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            max_epochs=2,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
            callbacks=[average],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(model, datamodule=digits(batch_size=200))
        averages.append(model.state_dict())  # the average, once fitting is over
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


# Noise and figures.


def test_the_users_seed_decides_the_noise_and_fitting_takes_one_draw_from_it() -> None:
    def fitted(seed: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(7)
        model = VAE((1, SIDE, SIDE), (5,), 2)
        torch.manual_seed(seed)
        trainer().fit(model, datamodule=digits())
        return state(model), torch.rand(3)

    (one, after), (same, again), (other, _) = fitted(1), fitted(1), fitted(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["encoder.0.weight"], other["encoder.0.weight"])
    assert torch.equal(after, again)
    torch.manual_seed(1)
    torch.randint(2**62, ())
    assert torch.equal(after, torch.rand(3))


def test_a_resumed_run_takes_the_seed_of_its_checkpoint(tmp_path: Path) -> None:
    def fit(seed: int, epochs: int, path: Path | None = None) -> Trainer:
        torch.manual_seed(7)
        model = VAE((1, SIDE, SIDE), (5,), 2, schedule="linear_fall", fall=0.001)
        torch.manual_seed(seed)
        run = trainer(max_epochs=epochs)
        run.fit(model, datamodule=digits(), ckpt_path=path, weights_only=True)
        return run

    fit(1, 1).save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert isinstance(checkpoint["base_seed"], int)
    resumed = fit(2, 2, tmp_path / "one.ckpt")
    resumed.save_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["base_seed"] == checkpoint["base_seed"]


@pytest.mark.parametrize(
    "model",
    [
        EoNADE((1, 8, 8), (5,), num_orders=2),
        PixelSNAIL((1, 8, 8), 8, 2, heads=2),
        GAN((1, 8, 8), 2, (4,)),
        GAN((1, 8, 8), 2, (4,), estimator="gumbel_sigmoid"),
        WGANGP((1, 8, 8), 2, (4,), network="mlp"),
        VAE((1, 8, 8), (5,), 2),
        MADE((1, 8, 8), (9,), num_orders=2),
        FVBN((1, 8, 8)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_is_monitored_does_not_depend_on_the_batch(model: GenerativeModel) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    found = []
    for size in (7, 100, 250):
        run = trainer()
        run.validate(model, datamodule=digits(image_size=8, eval_batch_size=size), verbose=False)
        found.append(float(run.callback_metrics[model.monitor]))
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_k_steps_of_the_critic_come_before_one_of_the_generator() -> None:
    model = WGANGP((1, 8, 8), 2, (4,), network="mlp", discriminator_steps=3)
    before = state(model.generator)
    trainer(max_epochs=-1, max_steps=2, limit_val_batches=0).fit(model, datamodule=digits(image_size=8))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.generator.state_dict().items())
    trainer(max_epochs=-1, max_steps=3, limit_val_batches=0).fit(model, datamodule=digits(image_size=8))
    assert not all(torch.equal(tensor, before[key]) for key, tensor in model.generator.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_above_the_skip_threshold_teaches_nothing(optimizer: str) -> None:
    class WithOneOddStep(LadderVAE):
        factor = 1.0

        def training_loss(self, x: Tensor) -> Tensor:
            return super().training_loss(x) * (self.factor if self.global_step == 3 else 1.0)

    def after_training(factor: float, skip_threshold: float | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        sizes = {**LadderVAE.small, "event_shape": (1, SIDE, SIDE)}
        model = WithOneOddStep(**sizes, optimizer=optimizer, skip_threshold=skip_threshold, dropout=0.0)
        model.factor = factor
        trainer().fit(model, datamodule=digits())
        return state(model)

    nothing, skipped, followed = after_training(0.0, None), after_training(1e6, 1e4), after_training(1e6, None)
    assert all(torch.equal(skipped[key], tensor) for key, tensor in nothing.items())
    assert any(not torch.allclose(followed[key], tensor, atol=1e-4) for key, tensor in nothing.items())
