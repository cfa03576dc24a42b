"""Model cards, generated from the weights' record and measured figures."""

from __future__ import annotations

import inspect
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lightning_genmodels.base import CompletionModel, ExplicitModel, LatentVariableModel, RepresentationModel
from lightning_genmodels.evaluation.report import figures_table, quality_table
from lightning_genmodels.weights.names import model_class
from lightning_genmodels.weights.published import published
from lightning_genmodels.weights.records import Weights

_USES = {
    ExplicitModel: "log_prob = model.log_prob(images)      # score: exact, (64,) nats",
    LatentVariableModel: "bound = model.iw_bound(images, 100)    # score: a lower bound on log p(x), (64,) nats",
    RepresentationModel: "codes = model.encode(images)           # represent: (64, D)",
    CompletionModel: (
        "upper = images.new_ones(images.shape[2:]).cumsum(0) <= images.shape[2] // 2\n"
        "completed = model.complete(images, upper)  # the lower half anew, given the upper: (64, 1, H, W)"
    ),
}


def model_card(weights: Weights, repo: str) -> str:
    """The README.md of a Hub repository: metadata for the Hub, usage, figures beside the published ones, protocol.

    Args:
        weights: The weight's record.
        repo: ``owner/repo`` that the card is for.
    """
    cls = model_class(weights.model)
    protocol = weights.metrics["protocol"]
    sections = [
        f"---\n{_metadata(weights).to_yaml()}\n---",
        f"# {weights.name}",
        inspect.getdoc(inspect.getmodule(cls)) or "",
        _plain(inspect.getdoc(cls) or ""),
        f"![Samples](samples.png)\n\n*64 samples of this weight, {protocol['image_size']}x{protocol['image_size']}.*",
        "## Usage",
        usage(cls, f'gm.load("{repo}", revision="{weights.revision}")'),
        "## Figures",
        figures(weights),
        *(["## Samples", sample_quality(weights)] if "quality" in weights.metrics else []),
        "## Data and training",
        f"Binarization: **{protocol['binarization']}** {protocol['source']} ({protocol['split']} figures over "
        f"{protocol['num_images']:,} images, each counted once). {weights.metrics['num_parameters']:,} parameters. "
        f"Trained by the recipe `{weights.recipe}`:\n\n"
        f"```bash\ngenmodels fit --config {weights.recipe} --data.root /path/to/data\n```",
        f"Check the figures on your machine: `genmodels {_check(weights)}`.",
        "## Citation",
        f"Please cite the paper named above. Licence: {weights.license}.",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _metadata(weights: Weights) -> ModelCardData:
    protocol = weights.metrics["protocol"]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="mnist",
            dataset_name=f"{protocol['binarization']} binarized {protocol['source']}",
            dataset_split=protocol["split"],
            metric_type=name,
            metric_name=f"negative log-likelihood in nats per image ({figure['estimator']})",
            metric_value=round(figure["value"], 3),
        )
        for name, figure in weights.metrics["figures"].items()
    ]
    return ModelCardData(
        model_name=weights.name,
        license=weights.license.lower(),
        library_name="lightning-genmodels",
        pipeline_tag="unconditional-image-generation",
        tags=["lightning", "generative-model", "binarized-mnist", weights.model],
        datasets=["mnist"],
        eval_results=results or None,
    )


def usage(cls: type, model: str) -> str:
    """What a class of models can do, as Markdown: lines of Python.

    Args:
        cls: The class.
        model: An expression for the model, as ``gm.load("vae")``.
    """
    lines = [
        "```python",
        "import lightning_genmodels as gm",
        "",
        f"model = {model}",
        "images = model.sample(64)              # generate: (64, 1, H, W), zeros and ones",
        *(text for kind, text in _USES.items() if issubclass(cls, kind)),
        "```",
    ]
    return "\n".join(lines)


def figures(weights: Weights) -> str:
    """The figures of a weight beside the published one, as Markdown."""
    if not weights.metrics["figures"]:
        return "An implicit model: it has no likelihood."
    head = "Negative log-likelihoods in nats per image, or upper bounds on them; lower is better."
    text = f"{head}\n\n{figures_table(weights.metrics)}"
    theirs = published(weights)
    if theirs is not None:
        text += f"\n\nPublished: {theirs}."
    return text


def _check(weights: Weights) -> str:
    if weights.metrics["figures"]:
        return f"verify {weights.name} --root /path/to/data"
    return f"evaluate {weights.name} --samples 10000 --data.root /path/to/data"


def sample_quality(weights: Weights) -> str:
    """The quality of a weight's samples, which was judged, as Markdown."""
    found: dict[str, Any] = weights.metrics["quality"]
    return (
        f"{found['num_samples']:,} samples beside {found['num_real']:,} {found['split']} images, in the features and "
        f"classes that `{found['extractor']}` sees; between what real images and what independent pixels get.\n\n"
        + quality_table({weights.name: found})
    )


def _plain(docstring: str) -> str:
    """A class's docstring without the sections on arguments and errors."""
    for section in ("\nArgs:", "\nRaises:", "\nReturns:"):
        docstring = docstring.split(section)[0]
    return docstring.strip()
