"""Codes: the autoencoder, the density that is fitted to its codes, and linear probes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_genmodels import BinarizedMNISTDataModule, load
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.evaluation.probe import linear_probe, random_encoder
from lightning_genmodels.models import VAE, Autoencoder
from lightning_genmodels.nn.mixture import GaussianMixture
from lightning_genmodels.training.callbacks import best_path


def test_mixture_is_standard_normal_before_it_is_fitted() -> None:
    mixture = GaussianMixture(3, 2).double()
    z = torch.randn(10, 2, dtype=torch.float64)
    assert torch.allclose(mixture.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_mixture_finds_the_clusters_of_its_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    share = torch.tensor([0.5, 0.3, 0.2])
    which = torch.multinomial(share, 6000, replacement=True, generator=generator)
    z = centres[which] + 0.5 * torch.randn(6000, 2, generator=generator)
    z[:, 1] += 0.4 * z[:, 0]  # covariances are not diagonal
    mixture = GaussianMixture(3, 2)
    likelihoods = [mixture.log_prob(z).mean()]
    for steps in (0, 1, 5, 50):
        mixture.fit(z, steps=steps, seed=3)
        likelihoods.append(mixture.log_prob(z).mean())
    assert likelihoods == sorted(likelihoods)
    assert torch.allclose(mixture.log_weights.exp().sort().values, share.sort().values, atol=0.03)
    drawn = mixture.sample(20_000, generator=generator)
    assert torch.allclose(drawn.mean(0), z.mean(0), atol=0.15)
    assert torch.allclose(drawn.T.cov(), z.T.cov(), rtol=0.1, atol=0.2)


def test_one_component_is_fitted_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 3, generator=generator) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]]) + 3
    steps: list[None] = []
    log_joint = GaussianMixture._log_joint
    monkeypatch.setattr(GaussianMixture, "_log_joint", lambda *a: (steps.append(None), log_joint(*a))[1])
    mixture = GaussianMixture(1, 3)
    mixture.fit(z, steps=1000)
    assert len(steps) < 10
    assert torch.allclose(mixture.means[0], z.mean(0), atol=1e-5)
    covariance = mixture.scale_tril[0] @ mixture.scale_tril[0].T
    assert torch.allclose(covariance, z.T.cov(correction=0), atol=0.01)


def test_mixture_survives_more_components_than_codes() -> None:
    mixture = GaussianMixture(5, 3)
    mixture.fit(torch.zeros(2, 3))
    assert torch.isfinite(mixture.sample(10)).all()


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
        "fit", "--model=autoencoder", "--model.code_dim=4", "--model.mixture_components=3", "--data.source=digits",
        "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu", "--trainer.default_root_dir=run", "--samples.every_n_epochs=0",
    ])  # fmt: skip
    before, exported = load(best_path("run")), load("run/weights")
    assert torch.equal(before.density.means, torch.zeros(3, 4))
    main(["export", str(best_path("run")), "again", "--data.source=digits"])
    again = load("again")
    codes = exported.encode(BinarizedMNISTDataModule(source="digits").images("train"))
    assert exported.density.log_prob(codes).mean() > before.density.log_prob(codes).mean() + 1
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
