"""Adversarial models: updates that do not leak, binary outputs with gradients, exact resume, several processes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_resume as resume
import torch
from conftest import all_images
from lightning import Callback, Trainer
from torch import Tensor

from lightning_genmodels import BinarizedMNISTDataModule, list_models
from lightning_genmodels.base import AdversarialModel
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError
from lightning_genmodels.models import GAN, WGANGP
from lightning_genmodels.nn.adversarial import binarize
from lightning_genmodels.training.callbacks import last_path
from lightning_genmodels.weights.names import model_class

MODELS = [name for name in list_models() if issubclass(model_class(name), AdversarialModel)]
NETWORKS = ["mlp", "conv"]
ESTIMATORS = ["straight_through", "gumbel_sigmoid"]


def build(name: str, **arguments: Any) -> AdversarialModel:
    torch.manual_seed(0)
    cls = model_class(name)
    return cls(**{"event_shape": (1, 7, 5), "hidden_sizes": (6, 4), "latent_dim": 3, **arguments})


def copy(network: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def fit(model: AdversarialModel, *callbacks: Callback, batches: int = 11, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=batches,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, datamodule=BinarizedMNISTDataModule(source="digits", batch_size=20))
    return trainer


class Watch(Callback):
    """Notes which networks a batch has changed, and checks each update on its own."""

    def __init__(self) -> None:
        self.changed: list[tuple[bool, bool]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        update = pl_module._set_gradients

        def checked(network: torch.nn.Module, loss: Tensor) -> None:
            other = pl_module.generator if network is pl_module.discriminator else pl_module.discriminator
            pl_module.zero_grad()
            update(network, loss)
            assert all(parameter.grad is None for parameter in other.parameters())

        pl_module._set_gradients = checked

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        self.before = [copy(pl_module.discriminator), copy(pl_module.generator)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        after = [copy(pl_module.discriminator), copy(pl_module.generator)]
        self.changed.append(tuple(not same(*pair) for pair in zip(self.before, after, strict=True)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [1, 3])
def test_each_update_changes_its_own_network_alone(name: str, steps: int) -> None:
    model = build(name, event_shape=(1, 28, 28), discriminator_steps=steps)
    watch = Watch()
    trainer = fit(model, watch)
    assert watch.changed == [(True, (index + 1) % steps == 0) for index in range(11)]
    assert trainer.global_step == 11  # batches, not updates of either network
    assert [scheduler.last_epoch for scheduler in model.lr_schedulers()] == [11, 11 // steps]
    assert model.optimizers()[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)  # the cosine's end
    assert math.isfinite(trainer.callback_metrics["val/frechet"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_reach_every_parameter(name: str, network: str, estimator: str) -> None:
    model = build(name, network=network, estimator=estimator)
    real = (torch.rand(32, 1, 7, 5) < 0.5).float()
    fake = model.generate(model.sample_latent(32))
    assert set(fake.unique().tolist()) == {0.0, 1.0}
    for part, loss in (
        (model.generator, model.generator_loss(fake)),
        (model.discriminator, model.discriminator_loss(real, fake.detach())),
    ):
        parameters = dict(part.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        unmoved = [key for key, gradient in zip(parameters, gradients, strict=True) if not gradient.any()]
        # A constant added to a critic changes no difference of its values.
        constant = isinstance(model, WGANGP) and part is model.discriminator
        assert unmoved == ([list(parameters)[-1]] if constant else [])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("network", NETWORKS)
def test_samples_do_not_depend_on_those_beside_them(name: str, network: str) -> None:
    model = build(name, network=network).double().eval()
    z = model.sample_latent(9)
    assert torch.allclose(model.decode(z)[4:6], model.decode(z[4:6]), atol=1e-12)


def test_straight_through_is_a_threshold_and_gumbel_sigmoid_a_bernoulli_draw() -> None:
    logits = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64).requires_grad_()
    pixels = binarize(logits, "straight_through", 2.0)
    assert pixels.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    pixels.sum().backward()
    soft = torch.sigmoid(logits.detach() / 2)
    assert torch.allclose(logits.grad, soft * (1 - soft) / 2)  # type: ignore[arg-type]
    draws = binarize(logits.expand(40_000, 5), "gumbel_sigmoid", 0.5, torch.Generator().manual_seed(0))
    assert set(draws.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(draws.mean(0), torch.sigmoid(logits), atol=0.01)


def test_losses_are_those_of_the_papers() -> None:
    real, fake = all_images((1, 2, 3))[:20].float(), all_images((1, 2, 3))[30:50].float()
    gan = GAN(**GAN.small)
    d_real, d_fake = (torch.sigmoid(gan.discriminator(images)) for images in (real, fake))
    assert torch.allclose(gan.discriminator_loss(real, fake), -d_real.log().mean() - (1 - d_fake).log().mean())
    assert torch.allclose(gan.generator_loss(fake), -d_fake.log().mean())
    wgan = WGANGP(**WGANGP.small, network="mlp", penalty=0.0)
    difference = wgan.discriminator(fake).mean() - wgan.discriminator(real).mean()
    assert torch.allclose(wgan.discriminator_loss(real, fake), difference)


def test_slopes_of_a_linear_critic_are_the_norm_of_its_weights() -> None:
    model = WGANGP(**WGANGP.small, network="mlp")
    model.discriminator = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 1), torch.nn.Flatten(0))
    real, fake = all_images((1, 2, 3))[:8].float(), all_images((1, 2, 3))[8:16].float()
    expected = model.discriminator[1].weight.norm().expand(8)
    assert torch.allclose(model.slopes(real, fake), expected)
    with torch.autocast("cpu", torch.bfloat16):
        slopes = model.slopes(real, fake)
    assert slopes.dtype == torch.float32
    assert torch.allclose(slopes, expected)  # to float32's precision


@pytest.mark.parametrize("name", MODELS)
def test_trains_in_mixed_precision(name: str) -> None:
    model = build(name, event_shape=(1, 28, 28))
    before = copy(model)
    trainer = fit(model, batches=3, precision="bf16-mixed")
    assert math.isfinite(trainer.callback_metrics["train/discriminator_loss"])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert not same(before, copy(model))


@pytest.mark.parametrize(
    "arguments",
    [
        {"network": "cnn"},
        {"estimator": "round"},
        {"temperature": 0.0},
        {"latent_dim": 0},
        {"hidden_sizes": ()},
        {"discriminator_steps": 0},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_options_that_make_no_sense_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        build(name, **arguments)


def test_own_options_that_make_no_sense_are_refused() -> None:
    for call in (lambda: GAN(dropout=1.0), lambda: WGANGP(penalty=-1.0)):
        with pytest.raises(OptionError, match="expected"):
            call()


@pytest.mark.parametrize("name", MODELS)
def test_a_killed_run_ends_bit_identical(name: str, tmp_path: Path) -> None:
    """Resumed from a checkpoint within an epoch, with averaged weights and a schedule."""
    quick = [
        *("fit", f"--model={name}", "--model.hidden_sizes=[8,8]", "--model.latent_dim=4", "--model.warmup_steps=3"),
        *("--ema=0.9", "--data.source=digits", "--data.binarization=dynamic", "--data.batch_size=100"),
        *("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--samples.every_n_epochs=0"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--save_every_n_batches=7"),
    ]
    main([*quick, f"--trainer.default_root_dir={tmp_path / 'whole'}"])
    killed = [*quick, f"--trainer.default_root_dir={tmp_path / 'killed'}"]
    code = (
        "import os, sys\nfrom lightning_genmodels import cli\nfrom lightning_genmodels.training import callbacks\n"
        "save = callbacks.LastCheckpoint._save\n"
        "def save_and_die(self, trainer):\n    save(self, trainer)\n    os._exit(9)\n"
        "callbacks.LastCheckpoint._save = save_and_die\ncli.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *killed], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    stopped = torch.load(last_path(tmp_path / "killed"), weights_only=True)
    assert stopped["global_step"] == 7
    main([*killed, "--ckpt_path=last"])
    whole, resumed = (torch.load(last_path(tmp_path / run), weights_only=True) for run in ("whole", "killed"))
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        resume.assert_same(whole[key], resumed[key], key)
    assert whole["global_step"] == resumed["global_step"] == 24


TWO_PROCESSES = """
import atexit, sys, torch
from lightning import Trainer
from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.weights.names import model_class

# Runs after what registers later; in one write, for both processes write to the same pipe.
atexit.register(lambda: sys.stdout.write(f"in a group: {torch.distributed.is_initialized()}\\n"))
model = model_class(sys.argv[1])(hidden_sizes=(8, 8), latent_dim=4, discriminator_steps=2)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, limit_train_batches=7, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(model, datamodule=BinarizedMNISTDataModule(source="digits", batch_size=20))
weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
apart = [(weights - other).abs().max().item() for other in trainer.strategy.all_gather(weights)]
assert apart == [0.0, 0.0], apart
assert trainer.global_step == 7
if trainer.is_global_zero:
    print("val/frechet", trainer.callback_metrics["val/frechet"].item())
"""


@pytest.mark.cluster
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_stay_in_step(name: str, run_folder: Path) -> None:
    Path("train.py").write_text(TWO_PROCESSES)
    done = subprocess.run([sys.executable, "train.py", name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val/frechet") == 1
    assert done.stdout.count("in a group: False") == 2  # gloo's threads may abort a process that ends in its group


def test_gradients_are_means_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gan")
    calls = []

    class Strategy:
        def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
            calls.append((tensor.numel(), reduce_op))
            return tensor / 2

    monkeypatch.setattr(type(model), "trainer", type("Fake", (), {"strategy": Strategy(), "world_size": 1})())
    loss = model.generator_loss(model.generate(model.sample_latent(8)))
    expected = torch.autograd.grad(loss, list(model.generator.parameters()), retain_graph=True)
    model._set_gradients(model.generator, loss)
    assert calls == [(sum(p.numel() for p in model.generator.parameters()), "mean")]
    for parameter, gradient in zip(model.generator.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient / 2)


def test_interpolations_start_and_end_at_the_draws(run_folder: Path) -> None:
    import numpy as np

    from lightning_genmodels.functional import lines

    ends = torch.randn(4, 3)
    between = lines(ends[0::2], ends[1::2], 5)
    assert between.shape == (2, 5, 3)
    assert torch.equal(between[:, 0], ends[0::2])
    assert torch.allclose(between[:, 2], (ends[0::2] + ends[1::2]) / 2)
    build("gan", event_shape=(1, 6, 6)).save_pretrained("weights")
    main(["interpolate", "./weights", "--pairs=3", "--steps=4", "--out=x.npy"])
    assert np.load("x.npy").shape == (12, 1, 6, 6)


def test_models_without_latents_are_not_interpolated(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["interpolate", "bernoulli"])
    assert "a Bernoulli draws no latents to interpolate" in capsys.readouterr().err
