"""Which images a figure is of, in which precision, and in how much memory."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lightning_genmodels import BinarizedMNISTDataModule, list_models, load
from lightning_genmodels.base import AdversarialModel, ExplicitModel, LatentVariableModel
from lightning_genmodels.cli import main
from lightning_genmodels.errors import GenmodelsError, WeightsError
from lightning_genmodels.evaluation.run import Protocol, evaluate
from lightning_genmodels.functional import draw_pixel
from lightning_genmodels.models import NADE, VAE, Bernoulli
from lightning_genmodels.random import keyed_generators, sample_bernoulli
from lightning_genmodels.weights.names import model_class
from lightning_genmodels.weights.records import get_weights, registry
from lightning_genmodels.weights.verify import verify


@pytest.fixture
def digits() -> BinarizedMNISTDataModule:
    return BinarizedMNISTDataModule(source="digits", image_size=8)


# Subsets.


def test_a_subset_is_the_head_of_one_permutation(digits: BinarizedMNISTDataModule) -> None:
    assert torch.equal(digits.subset("test"), torch.arange(250))
    assert torch.equal(digits.subset("test", 250), torch.arange(250))
    some = digits.subset("test", 100)
    assert torch.equal(some[:40], digits.subset("test", 40))
    assert len(some.unique()) == 100
    assert not torch.equal(some, torch.arange(100))
    assert not torch.equal(some, digits.subset("val", 100))


def test_an_evaluation_of_some_images_takes_that_subset_and_says_so(digits: BinarizedMNISTDataModule) -> None:
    torch.manual_seed(0)
    model = NADE((1, 8, 8), 5).eval()
    report = evaluate(model, digits, Protocol(limit=60, accelerator="cpu"))
    assert report is not None
    expected = -model.log_prob(digits.images("test")[digits.subset("test", 60)])
    torch.testing.assert_close(report.values["nll"].float(), expected)
    assert "60 images, the head of a fixed permutation" in report.table()
    vae = VAE((1, 8, 8), (5,), 2).eval()
    few, many = (
        evaluate(vae, digits, Protocol(limit=limit, num_particles=20, accelerator="cpu")) for limit in (30, 60)
    )
    assert few is not None
    assert many is not None
    for name in ("nelbo", "iw20"):  # the noise is that of the image, not of its place in the subset
        torch.testing.assert_close(few.values[name], many.values[name][:30])
    whole = evaluate(model, digits, Protocol(accelerator="cpu"))
    assert whole is not None
    assert "permutation" not in whole.table()


@pytest.mark.data
def test_the_first_static_test_images_are_one_class_and_a_subset_is_not() -> None:
    data = BinarizedMNISTDataModule()
    model = load("bernoulli")
    values = -model.log_prob(data.images("test")).detach()
    head, subset = values[:200], values[data.subset("test", 200)]
    error = values.std() / math.sqrt(200)
    assert abs(subset.mean() - values.mean()) < 4 * error
    assert abs(head.mean() - values.mean()) > 8 * error  # all zeros


def test_verify_draws_the_images_that_it_recomputes(digits: BinarizedMNISTDataModule, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NADE((1, 8, 8), 5).eval()
    model.save_pretrained(tmp_path)
    report = evaluate(model, digits, Protocol(accelerator="cpu", limit=200))
    assert report is not None
    report.write(tmp_path)
    (whole,) = verify(str(tmp_path), full=True)
    assert whole.agrees
    assert whole.num_images == 200
    values = safetensors.torch.load_file(tmp_path / "values.safetensors")
    values["nll"][:40] = values["nll"][:40].flip(0)  # forty of two hundred are wrong, and the mean is right
    safetensors.torch.save_file(values, tmp_path / "values.safetensors")
    verdicts = [verify(str(tmp_path), seconds=0.0, batch=3, seed=seed)[0] for seed in range(30)]
    assert {found.num_images for found in verdicts} == {3}
    assert {found.agrees for found in verdicts} == {True, False}
    assert not verify(str(tmp_path), full=True)[0].agrees


@pytest.fixture
def reported(digits: BinarizedMNISTDataModule, tmp_path: Path) -> Path:
    """A folder with weights, and a report on 60 images."""
    torch.manual_seed(0)
    model = VAE((1, 8, 8), (5,), 2).eval()
    model.save_pretrained(tmp_path)
    report = evaluate(model, digits, Protocol(accelerator="cpu", limit=60, num_particles=10))
    assert report is not None
    report.write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("key", ["value", "standard_error"])
def test_a_report_that_contradicts_itself_does_not_agree(reported: Path, key: str) -> None:
    assert all(found.agrees for found in verify(str(reported), seconds=0.0))
    metrics = json.loads((reported / "metrics.json").read_text())
    metrics["figures"]["iw10"][key] -= 0.5
    (reported / "metrics.json").write_text(json.dumps(metrics))
    nelbo, bound = verify(str(reported), seconds=0.0)
    assert nelbo.agrees
    assert "of the stored values is" in str(bound)


def test_a_perturbed_weight_does_not_agree(reported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(reported), "--seconds=0"])
    assert capsys.readouterr().out.count("agrees on") == 2
    model = load(reported)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.save_pretrained(reported)
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(reported), "--seconds=0"])
    assert caught.value.code == 1
    assert capsys.readouterr().out.count("DOES NOT AGREE: stored and recomputed values differ") == 2


def test_values_of_fewer_images_than_the_report_says_are_refused(reported: Path) -> None:
    values = safetensors.torch.load_file(reported / "values.safetensors")
    for tensors in ({"nelbo": values["nelbo"], "iw10": values["iw10"][:0]}, {"nelbo": values["nelbo"]}, {}):
        safetensors.torch.save_file(tensors, reported / "values.safetensors")
        with pytest.raises(WeightsError, match="holds no valid report"):
            verify(str(reported), seconds=0.0)


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with something wrong in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(value[key], rng)}
    wrong = [None, "x", -1, 0, 1e400, math.nan, [], {}, True, 2**70, "../..", [1], 0.5, "iw0", "train"]
    return rng.choice(wrong)


def test_damaged_reports_end_with_one_error_or_do_not_agree(reported: Path) -> None:
    content, rng = (reported / "metrics.json").read_text(), random.Random(0)
    refused = 0
    for _ in range(500 if os.environ.get("GENMODELS_SOAK") else 60):
        (reported / "metrics.json").write_text(json.dumps(mutated(json.loads(content), rng)))
        try:
            verify(str(reported), seconds=0.0, batch=5)
        except GenmodelsError as error:
            refused += "\n" not in str(error)
    assert refused > 10


# Configs.


@pytest.mark.parametrize(("model", "key", "value"), [("nade", "order", "raster_flip"), ("made", "order_seed", 1)])
def test_a_config_that_is_not_the_published_one_is_refused(
    model: str, key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    import shutil

    weights = get_weights(model)
    assert weights.folder is not None
    shutil.copytree(weights.folder, tmp_path / weights.name)
    config = json.loads((tmp_path / weights.name / "config.json").read_text())
    config["hyper_parameters"][key] = value
    del config["config_sha256"]
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    config["config_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    (tmp_path / weights.name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    monkeypatch.setattr("lightning_genmodels.weights.records.SHIPPED", tmp_path)
    with pytest.raises(WeightsError, match="is not the published one"):
        load(model)


def test_every_record_pins_both_files() -> None:
    assert all(len(weights.sha256) == len(weights.config_sha256) == 64 for weights in registry().values())


# Precision.


def test_a_pixel_is_drawn_with_its_probability_whatever_the_precision_of_its_logit() -> None:
    logits = torch.full((100_000,), 6.5, dtype=torch.bfloat16)  # its sigmoid, 0.9985, would round to 1 in bfloat16
    drawn = sample_bernoulli(logits, torch.Generator().manual_seed(0))
    assert 80 < (drawn == 0).sum() < 230
    uniforms = torch.tensor([0.999])
    assert draw_pixel(logits[:1], uniforms, torch.zeros(1), torch.zeros(1, dtype=torch.bool)) == 0


@pytest.mark.parametrize("name", list_models())
def test_every_model_works_in_bfloat16(name: str) -> None:
    cls = model_class(name)
    torch.manual_seed(0)
    model = cls(**cls.small).bfloat16().eval()
    x = (torch.rand(5, *model.event_shape) < 0.5).float()
    with torch.no_grad():
        assert model.sample(4).dtype == torch.float32
        if isinstance(model, ExplicitModel):
            assert model.log_prob(x).dtype == torch.float32
        if isinstance(model, LatentVariableModel):
            assert model.elbo(x).dtype == model.iw_bound(x, 3).dtype == torch.float32
            model.encode(x)
    half = x.bfloat16()
    if isinstance(model, AdversarialModel):
        fake = model.generate(model.sample_latent(5))
        model.discriminator_loss(half, fake.detach()).backward()
        model.generator_loss(fake).backward()
    elif not isinstance(model, AdversarialModel) and any(p.requires_grad for p in model.parameters()):
        model.training_loss(half).backward()


@pytest.mark.parametrize("name", list_models())
def test_no_image_at_all_is_no_error(name: str) -> None:
    cls = model_class(name)
    model = cls(**cls.small).eval()
    nothing = torch.zeros((0, *model.event_shape))
    assert model.sample(0).shape == nothing.shape
    if isinstance(model, ExplicitModel):
        assert model.log_prob(nothing).shape == (0,)
    if isinstance(model, LatentVariableModel):
        assert model.iw_bound(nothing, 3).shape == (0,)
    if hasattr(model, "complete"):
        assert model.complete(nothing, torch.zeros(model.event_shape, dtype=torch.bool)).shape == nothing.shape


def test_no_image_at_all_is_no_error_for_convolutions() -> None:
    assert VAE((1, 4, 4), (6,), 2, network="conv").iw_bound(torch.zeros(0, 1, 4, 4), 3).shape == (0,)


# Memory.


def saved_bytes(model: VAE, x: Tensor, num_particles: int) -> int:
    """What autograd keeps of a bound."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.iw_bound(x, num_particles, generator=torch.Generator().manual_seed(0))
    return sum(kept.values())


@pytest.mark.parametrize("keyed", [False, True])
def test_a_bound_with_gradients_keeps_one_block_of_particles_at_most(keyed: bool) -> None:
    torch.manual_seed(0)
    model = VAE((1, 4, 4), (20,), 2).double()
    x = (torch.rand(6, 1, 4, 4) < 0.5).double()
    assert saved_bytes(model, x, 1000) < saved_bytes(model, x, 100)

    def noise() -> Any:
        return keyed_generators(0, range(6)) if keyed else torch.Generator().manual_seed(0)

    with torch.no_grad():
        expected = model.iw_bound(x, 250, generator=noise())
    bound = model.iw_bound(x, 250, generator=noise())
    torch.testing.assert_close(bound, expected)
    gradients = torch.autograd.grad(bound.sum(), list(model.parameters()))
    generator, blocks = noise(), []
    for size in (100, 100, 50):  # the same, every block's graph kept
        blocks.append(torch.logsumexp(model.log_weights(x, size, generator=generator), dim=0))
    plain = torch.autograd.grad(torch.logsumexp(torch.stack(blocks), dim=0).sum(), list(model.parameters()))
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_the_command_says_which_images_it_took(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Bernoulli((1, 8, 8)).save_pretrained("weights")
    main(["evaluate", "./weights", "--data.source=digits", "--data.image_size=8", "--limit=50", "--accelerator=cpu"])
    assert "the head of a fixed permutation" in capsys.readouterr().out
