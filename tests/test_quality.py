"""Sample quality: what the figures say of sets of which it is known; and the classifier behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_genmodels import BinarizedMNISTDataModule, list_models, list_weights
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError, WeightsError
from lightning_genmodels.evaluation.quality import Judge, nearest, with_deviation
from lightning_genmodels.evaluation.run import evaluate_classifier, evaluate_quality
from lightning_genmodels.models import GAN, Bernoulli, DigitClassifier
from lightning_genmodels.nn.features import RandomFeatures
from lightning_genmodels.training.callbacks import best_path
from lightning_genmodels.weights.card import model_card
from lightning_genmodels.weights.records import get_weights

RUN = [
    *("fit", "--model=digit_classifier", "--data.source=digits", "--data.binarization=dynamic"),
    *("--data.batch_size=50", "--model.learning_rate=0.003", "--trainer.max_epochs=12", "--trainer.accelerator=cpu"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


@pytest.fixture(scope="module")
def data() -> BinarizedMNISTDataModule:
    return BinarizedMNISTDataModule(source="digits", binarization="dynamic")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the digits that need no network, trained by the command line."""
    root = tmp_path_factory.mktemp("classifier")
    main([*RUN, "--data.labelled=true", f"--trainer.default_root_dir={root}"])
    return root / "weights"


@pytest.fixture(scope="module")
def judge(weights: Path, data: BinarizedMNISTDataModule) -> Judge:
    return Judge(DigitClassifier.from_pretrained(weights), data.images("train"), data.images("test"))


def test_the_classifier_learns_and_is_loaded_as_a_weight(weights: Path, data: BinarizedMNISTDataModule) -> None:
    classifier = DigitClassifier.from_pretrained(weights)
    metrics = evaluate_classifier(classifier, data)
    assert metrics["accuracy"]["value"] > 0.9
    assert 0.0 < metrics["accuracy"]["standard_error"] < 0.03
    assert classifier.features(data.images("test")[:3]).shape == (3, 64)
    assert classifier(data.images("test")[:3]).shape == (3, 10)
    assert json.loads((weights / "config.json").read_text())["model"] == "digit_classifier"
    assert "digit_classifier" not in list_models()
    checkpoint = DigitClassifier.from_pretrained(best_path(weights.parent))
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.parameters(), classifier.parameters(), strict=True))


def test_a_classifier_needs_labels(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*RUN, "--trainer.default_root_dir=run"])
    assert "set --data.labelled true" in capsys.readouterr().err


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


def test_the_floor_is_below_the_ceiling(weights: Path, data: BinarizedMNISTDataModule) -> None:
    results = evaluate_quality(GAN(hidden_sizes=(8,)).eval(), data, num_samples=250, extractor=weights)["results"]
    floor, ceiling, samples = (results[name] for name in ("floor", "ceiling", "samples"))
    assert floor["frechet"] < 0.2 * ceiling["frechet"]
    assert floor["frechet"] < samples["frechet"]  # nobody has trained it
    assert floor["recall"] > 0.5 > ceiling["recall"]
    assert floor["coverage"] > 0.5 > ceiling["coverage"]
    assert floor["classes"] == 10
    assert floor["copies"] <= 0.015


def test_a_figure_has_no_more_digits_than_its_deviation_carries() -> None:
    said = [with_deviation(35.4712, spread) for spread in (None, 0.0, 0.0347, 0.61, 1.9, 12.0)]
    assert said == ["35.5", "35.5", "35.47 ± 0.03", "35.5 ± 0.6", "35 ± 2", "35 ± 12"]


def test_the_quality_of_samples_is_a_mean_over_seeds_with_its_deviation(
    weights: Path, data: BinarizedMNISTDataModule
) -> None:
    model = Bernoulli()
    model.initialize(data.images("train"))
    found = evaluate_quality(model, data, num_samples=250, num_seeds=4, extractor=weights)
    frechet, spread = (found[kind]["samples"]["frechet"] for kind in ("results", "deviations"))
    single = [
        evaluate_quality(model, data, num_samples=250, num_seeds=2, extractor=weights, seed=seed)["results"]
        for seed in (1, 2, 3)
    ]
    others = [results["samples"]["frechet"] for results in single]
    assert 0 < spread < 0.2 * frechet
    assert all(abs(other - frechet) < 5 * spread for other in others)
    with pytest.raises(OptionError, match="num_seeds of at least 2"):
        evaluate_quality(model, data, num_samples=250, num_seeds=1, extractor=weights)


def test_nearest_counts_differing_pixels() -> None:
    train = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    images = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).view(3, 1, 2, 2)
    assert nearest(images, train).tolist() == [0.0, 1.0, 2.0]


def test_evaluate_prints_and_writes_quality(
    weights: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Bernoulli().save_pretrained("weights")
    common = ["evaluate", "./weights", "--data.source=digits", "--limit=50", f"--extractor={weights}", "--out=report"]
    main([*common, "--samples=200"])
    printed = capsys.readouterr().out
    quality = json.loads(Path("report/metrics.json").read_text())["quality"]
    assert (quality["num_samples"], quality["num_real"]) == (200, 250)
    assert list(quality["results"]) == ["samples", "floor", "ceiling"]
    for kind in ("samples", "floor: real images", "ceiling: independent"):
        assert f"\n{kind} " in printed
    with pytest.raises(SystemExit) as caught:
        main([*common, "--samples=5"])
    assert caught.value.code == 2
    assert "expected samples of at least 100, got 5" in capsys.readouterr().err


def test_what_cannot_judge_is_refused(weights: Path, data: BinarizedMNISTDataModule, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"takes images of shape \(1, 28, 28\)"):
        evaluate_quality(GAN(**GAN.small), data, extractor=weights)
    with pytest.raises(OptionError, match="at least 100 images to judge, got 3"):
        Judge(DigitClassifier.from_pretrained(weights), data.images("train"), data.images("test")[:3])
    Bernoulli().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="holds a Bernoulli, not a DigitClassifier"):
        evaluate_quality(Bernoulli(), data, extractor=tmp_path)


def test_the_shipped_classifier_judges_where_no_other_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "bernoulli", "--data.source=digits", "--limit=50", "--samples=100"])
    assert "as digit_classifier sees them" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digit_classifier", "digit_classifier.dynamic_v1"])
@pytest.mark.parametrize("command", [["publish", "me"], ["verify"], ["sample"]])
def test_the_shipped_classifier_is_no_generative_model(
    name: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert name not in [*list_models(), *list_weights(), *list_weights("digit_classifier")]
    with pytest.raises(SystemExit) as caught:
        main([command[0], name, *command[1:]])
    assert caught.value.code == 2
    said = {"publish": "is no registered weight of a generative model", "verify": "has no values", "sample": "holds a"}
    assert said[command[0]] in capsys.readouterr().err


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
