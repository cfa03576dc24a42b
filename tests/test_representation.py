"""Codes: the autoencoder, the density that is fitted to its codes, and linear probes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_genmodels import BinarizedMNISTDataModule, load
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.evaluation.probe import linear_probe, random_encoder
from lightning_genmodels.models import VAE, Autoencoder
from lightning_genmodels.training.callbacks import best_path


def test_draws_of_codes_have_the_mean_and_the_covariance_of_the_training_codes() -> None:
    torch.manual_seed(0)
    model = Autoencoder((1, 4, 4), hidden_sizes=(20,), code_dim=3)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    images = torch.randint(2, (5000, 1, 4, 4), dtype=torch.uint8)
    z = model.encode(images).detach().double()
    model.finalize(images)
    covariance = model.code_scale @ model.code_scale.T
    assert torch.allclose(model.code_mean.double(), z.mean(0), atol=1e-5)
    assert torch.allclose(covariance.double(), z.T.cov(correction=0), atol=2e-3 * z.var(0).mean().item())
    codes: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda module, given: codes.append(given[0]))
    model.sample(50_000)
    drawn = torch.cat(codes).double()
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.03 * z.std(0).mean().item())
    assert torch.allclose(drawn.T.cov(), z.T.cov(), atol=0.03 * z.var(0).mean().item())


def test_constant_codes_can_be_drawn() -> None:
    model = Autoencoder(**Autoencoder.small)
    model.finalize(torch.zeros(2, *model.event_shape))
    assert torch.isfinite(model.code_scale).all()
    assert model.sample(10).shape == (10, *model.event_shape)


def test_corruption_is_for_training_alone() -> None:
    torch.manual_seed(0)
    model = Autoencoder(**Autoencoder.small, corruption=0.5)
    x = all_images(model.event_shape).float()
    assert not torch.equal(model.training_loss(x), model.training_loss(x))
    assert torch.equal(model.reconstruction(x), model.reconstruction(x))
    plain = Autoencoder(**Autoencoder.small)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.training_loss(x), -model.reconstruction(x).mean())


def test_rectified_codes_are_those_of_a_plain_model_above_zero() -> None:
    torch.manual_seed(0)
    plain = Autoencoder(**Autoencoder.small)
    model = Autoencoder(**Autoencoder.small, rectify=True)
    model.load_state_dict(plain.state_dict())
    x = all_images(model.event_shape).float()
    assert (plain.encode(x) < 0).any()
    assert torch.equal(model.encode(x), plain.encode(x).clamp(min=0))
    decoded: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    model.sample(100)
    assert decoded[0].min() == 0 < decoded[0].max()


@pytest.mark.parametrize("arguments", [{"corruption": 1.0}, {"code_dim": 0}, {"network": "cnn"}])
def test_options_that_make_no_sense_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="expected"):
        Autoencoder(**arguments)  # type: ignore[arg-type]


def test_export_fits_the_density_and_keeps_it(run_folder: Path) -> None:
    main([
        "fit", "--model=autoencoder", "--model.code_dim=4", "--data.source=digits",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu", "--trainer.default_root_dir=run", "--samples.every_n_epochs=0",
    ])  # fmt: skip
    before, exported = load(best_path("run")), load("run/weights")
    assert torch.equal(before.code_mean, torch.zeros(4))
    main(["export", str(best_path("run")), "again", "--data.source=digits"])
    again = load("again")
    codes = exported.encode(BinarizedMNISTDataModule(source="digits").images("train"))
    assert torch.allclose(exported.code_mean, codes.mean(0), atol=1e-5)
    for key, value in exported.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    first, second = (m.sample(9, generator=torch.Generator().manual_seed(0)) for m in (exported, again))
    assert torch.equal(first, second)
    main(["sample", "again", "--out=x.npy", "--num_samples=3"])
    main(["encode", "again", "x.npy", "codes.npy"])


def test_probe_says_what_codes_are_worth() -> None:
    torch.manual_seed(1)
    data = BinarizedMNISTDataModule(source="digits", binarization="threshold")
    model = VAE(hidden_sizes=(50,), latent_dim=8).eval()
    results = linear_probe(model, data)
    assert {kind: result.dim for kind, result in results.items()} == {"codes": 8, "pixels": 784, "random_encoder": 8}
    assert results["pixels"].accuracy > 0.85
    assert results["codes"].accuracy < results["pixels"].accuracy  # it is not trained either
    assert 0.0 < results["pixels"].standard_error < 0.03
    first, second = random_encoder(model), random_encoder(model)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encode(data.images("test")), model.encode(data.images("test")))


def test_evaluate_with_probe_and_ais(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = VAE(hidden_sizes=(10,), latent_dim=2)
    model.save_pretrained("weights")
    main([
        "evaluate", "weights", "--data.source=digits", "--data.binarization=threshold", "--limit=2", "--ais=20",
        "--probe=true", "--num_particles=10", "--out=report",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    metrics = json.loads(Path("report/metrics.json").read_text())
    assert metrics["ais"]["num_images"] == metrics["ais"]["simulated"]["num_images"] == 2
    assert metrics["ais"]["value"] < metrics["figures"]["nelbo"]["value"] + 5
    assert set(metrics["probe"]["results"]) == {"codes", "pixels", "random_encoder"}
    assert "annealed importance sampling, 20 temperatures, 10 chains" in printed
    assert "linear probe on codes (2 numbers, threshold binarization)" in printed


def test_models_without_codes_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_genmodels.models import Bernoulli

    Bernoulli().save_pretrained("weights")
    for option, message in {"ais=5": "no latent variables", "probe=true": "no codes"}.items():
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", "weights", "--data.source=digits", "--limit=5", f"--{option}"])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
