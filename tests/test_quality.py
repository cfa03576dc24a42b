"""Sample quality: what the figures say of sets of which it is known; and the classifier behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_genmodels import BinarizedMNISTDataModule, list_models
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError, WeightsError
from lightning_genmodels.evaluation.classifier import DigitClassifier, accuracy, train_classifier
from lightning_genmodels.evaluation.classifier import main as train
from lightning_genmodels.evaluation.quality import Judge, evaluate_quality, nearest
from lightning_genmodels.evaluation.report import with_deviation
from lightning_genmodels.models import GAN, Bernoulli
from lightning_genmodels.nn.features import RandomFeatures
from lightning_genmodels.weights.card import model_card
from lightning_genmodels.weights.records import get_weights


@pytest.fixture(scope="module")
def data() -> BinarizedMNISTDataModule:
    return BinarizedMNISTDataModule(source="digits", binarization="dynamic")


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the digits that need no network, trained by the command line."""
    file = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    train([str(file), "--data.source=digits", "--data.batch_size=50", "--epochs=20"])
    return file


@pytest.fixture(scope="module")
def judge(classifier_file: Path, data: BinarizedMNISTDataModule) -> Judge:
    return Judge(DigitClassifier.load(classifier_file), data.images("train"), data.images("test"))


def test_the_classifier_learns_and_is_read_back(classifier_file: Path, data: BinarizedMNISTDataModule) -> None:
    classifier = DigitClassifier.load(classifier_file)
    value, error = accuracy(classifier, data)
    assert value > 0.9
    assert 0.0 < error < 0.03
    assert classifier.features(data.images("test")[:3]).shape == (3, 64)
    assert classifier(data.images("test")[:3]).shape == (3, 10)
    assert "digit_classifier" not in list_models()


def test_the_same_seed_trains_the_same_classifier_and_leaves_the_global_generator_alone() -> None:
    few = BinarizedMNISTDataModule(source="digits", binarization="threshold", batch_size=500, labelled=True)
    before = torch.get_rng_state()
    one, two = (train_classifier(few, epochs=2, seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_classifier_needs_labels(data: BinarizedMNISTDataModule) -> None:
    with pytest.raises(OptionError, match=r"set --data\.labelled true"):
        train_classifier(data)


def test_labels_stay_with_their_images(data: BinarizedMNISTDataModule) -> None:
    labelled = BinarizedMNISTDataModule(source="digits", binarization="threshold", batch_size=50, labelled=True)
    images, labels = labelled.images("train"), labelled.labels("train")
    by_image: dict[bytes, set[int]] = {}
    for image, label in zip(images, labels.tolist(), strict=True):
        by_image.setdefault(image.numpy().tobytes(), set()).add(label)
    seen = 0
    for batch, classes in labelled.train_dataloader():
        for image, label in zip(batch.to(torch.uint8), classes.tolist(), strict=True):
            assert label in by_image[image.numpy().tobytes()]
            seen += 1
    assert seen == 1250
    assert torch.equal(
        torch.cat([classes for _, classes in labelled.test_dataloader()]), labelled.labels("test").long()
    )


def test_a_set_is_no_distance_from_itself(judge: Judge, data: BinarizedMNISTDataModule) -> None:
    quality = judge.judge(data.images("test"))
    assert quality.frechet == pytest.approx(0.0, abs=1e-4)
    assert quality.precision == quality.recall == quality.coverage == 1.0
    assert quality.classes == 10
    assert quality.label_kl == pytest.approx(0.0, abs=1e-9)
    assert quality.nearest > 10
    assert quality.copies <= 0.015


def test_training_images_are_found_to_be_copies(judge: Judge, data: BinarizedMNISTDataModule) -> None:
    quality = judge.judge(data.images("train")[:300])
    assert quality.nearest == 0.0
    assert quality.copies == 1.0


def test_a_constant_generator_has_one_class_and_no_recall(judge: Judge, data: BinarizedMNISTDataModule) -> None:
    quality = judge.judge(data.images("test")[:1].expand(250, -1, -1, -1))
    assert quality.classes == 1
    assert quality.commonest_class == pytest.approx(10.0)
    assert quality.rarest_class == 0.0
    assert quality.precision == 1.0
    assert quality.recall < 0.05
    assert quality.coverage < 0.1
    assert quality.label_kl > 1.5


def test_the_floor_is_below_the_ceiling(classifier_file: Path, data: BinarizedMNISTDataModule) -> None:
    results = evaluate_quality(GAN(hidden_sizes=(8,)).eval(), data, num_samples=250, extractor=classifier_file)[
        "results"
    ]
    floor, ceiling, samples = (results[name] for name in ("floor", "ceiling", "samples"))
    assert floor["frechet"] < 0.2 * ceiling["frechet"]
    assert floor["frechet"] < samples["frechet"]  # nobody has trained it
    assert floor["recall"] > 0.5 > ceiling["recall"]
    assert floor["coverage"] > 0.5 > ceiling["coverage"]
    assert floor["classes"] == 10
    assert floor["copies"] <= 0.015


def test_a_figure_has_no_more_digits_than_its_deviation_carries() -> None:
    said = [with_deviation(35.4712, spread) for spread in (None, 0.0, 6e-6, 0.0347, 0.61, 1.9, 12.0)]
    assert said == ["35.5", "35.5", "35.5", "35.47 ± 0.03", "35.5 ± 0.6", "35 ± 2", "35 ± 12"]


def test_the_quality_of_samples_is_a_mean_over_seeds_with_its_deviation(
    classifier_file: Path, data: BinarizedMNISTDataModule
) -> None:
    model = Bernoulli()
    model.initialize(data.images("train"))
    found = evaluate_quality(model, data, num_samples=250, num_seeds=4, extractor=classifier_file)
    frechet, spread = (found[kind]["samples"]["frechet"] for kind in ("results", "deviations"))
    single = [
        evaluate_quality(model, data, num_samples=250, num_seeds=2, extractor=classifier_file, seed=seed)["results"]
        for seed in (1, 2, 3)
    ]
    others = [results["samples"]["frechet"] for results in single]
    assert 0 < spread < 0.2 * frechet
    assert all(abs(other - frechet) < 5 * spread for other in others)
    with pytest.raises(OptionError, match="num_seeds of at least 2"):
        evaluate_quality(model, data, num_samples=250, num_seeds=1, extractor=classifier_file)


def test_nearest_counts_differing_pixels() -> None:
    train = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    images = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).view(3, 1, 2, 2)
    assert nearest(images, train).tolist() == [0.0, 1.0, 2.0]


def test_evaluate_prints_and_writes_quality(
    classifier_file: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Bernoulli().save_pretrained("weights")
    common = [
        "evaluate",
        "./weights",
        "--data.source=digits",
        "--limit=50",
        f"--extractor={classifier_file}",
        "--out=report",
    ]
    main([*common, "--samples=200"])
    printed = capsys.readouterr().out
    quality = json.loads(Path("report/metrics.json").read_text())["quality"]
    assert (quality["num_samples"], quality["num_real"]) == (200, 250)
    assert list(quality["results"]) == ["samples", "floor", "ceiling"]
    for kind in ("samples", "*floor: real training images*", "*ceiling: independent pixels*"):
        assert f"\n| {kind} |" in printed
    with pytest.raises(SystemExit) as caught:
        main([*common, "--samples=5"])
    assert caught.value.code == 2
    assert "expected samples of at least 100, got 5" in capsys.readouterr().err


def test_what_cannot_judge_is_refused(classifier_file: Path, data: BinarizedMNISTDataModule, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"takes images of shape \(1, 28, 28\)"):
        evaluate_quality(GAN(**GAN.small), data, extractor=classifier_file)
    with pytest.raises(OptionError, match="at least 100 images to judge, got 3"):
        Judge(DigitClassifier.load(classifier_file), data.images("train"), data.images("test")[:3])
    Bernoulli().save_pretrained(tmp_path)
    (tmp_path / "cut").write_bytes(classifier_file.read_bytes()[:1000])
    for wrong in (tmp_path, tmp_path / "model.safetensors", tmp_path / "cut", tmp_path / "gone"):
        with pytest.raises(WeightsError, match="holds no digit classifier"):
            evaluate_quality(Bernoulli(), data, extractor=wrong)


def test_the_shipped_classifier_judges_where_no_other_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "bernoulli", "--data.source=digits", "--limit=50", "--samples=100"])
    assert "as digit_classifier sees them" in capsys.readouterr().out


def test_a_weight_without_likelihood_is_judged_not_verified(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", "gan"])
    assert caught.value.code == 2
    assert "judge its samples anew with: genmodels evaluate gan --samples 10000" in capsys.readouterr().err
    weights = get_weights("gan.static_v1")
    card, quality = model_card(weights, "me/gan"), weights.metrics["quality"]
    frechet = (quality.get(kind, {}).get("samples", {}).get("frechet") for kind in ("results", "deviations"))
    assert f"| gan.static_v1 | {with_deviation(*frechet)} |" in card
    assert "`genmodels evaluate gan.static_v1 --samples 10000 --data.root /path/to/data`" in card


def test_random_features_are_the_same_everywhere_and_not_saved() -> None:
    torch.manual_seed(1)
    first = RandomFeatures()
    torch.manual_seed(2)
    x = (torch.rand(4, 1, 28, 28) < 0.5).float()
    assert torch.equal(first(x), RandomFeatures()(x))
    assert first(x).shape == (4, 256)
    assert first.state_dict() == {}
    assert not list(first.parameters())
