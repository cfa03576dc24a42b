"""Writes one page for each model, in docs/models, from its docstrings, its weights' records and its recipes."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning_genmodels.evaluation.report import probe_table
from lightning_genmodels.training.curves import CURVES, draw_curves, read_curves
from lightning_genmodels.weights.card import figures, sample_quality, usage
from lightning_genmodels.weights.names import list_models, model_class
from lightning_genmodels.weights.records import Weights, get_weights, list_weights

DOCS = Path(__file__).parent
PAGES = DOCS / "models"


def write() -> None:
    """Write all pages, with an index; those of models that are gone go, too."""
    PAGES.mkdir(exist_ok=True)
    expected = {PAGES / "index.md"}
    (PAGES / "index.md").write_text(_index(), encoding="utf-8")
    for name in list_models():
        if not model_class(name).__module__.startswith("lightning_genmodels."):
            continue
        page = PAGES / f"{name}.md"
        text = _page(name)
        if not page.is_file() or page.read_text(encoding="utf-8") != text:  # pages that are the same are not built anew
            page.write_text(text, encoding="utf-8")
        expected.add(page)
    for page in set(PAGES.glob("*.md")) - expected:
        page.unlink()


def _index() -> str:
    names = [name for name in list_models() if model_class(name).__module__.startswith("lightning_genmodels.")]
    lines = "\n".join(f"| [`{name}`]({name}.md) | {_summary(name)} | {len(list_weights(name))} |" for name in names)
    pages = "\n".join(names)
    return (
        "# Models\n\nOne page a model: its paper, figures, samples, recipes and interface.\n\n"
        f"| model | | weights |\n| --- | --- | --- |\n{lines}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
    )


def _summary(name: str) -> str:
    module = inspect.getdoc(inspect.getmodule(model_class(name))) or ""
    return " ".join(module.split("\n\n")[0].split())


def _page(name: str) -> str:
    cls = model_class(name)
    module = cls.__module__.rpartition(".")[2]
    sections = [
        f"# `{name}`",
        inspect.getdoc(inspect.getmodule(cls)) or "",
        *_lecture(module),
        "## Load it",
        _usage(name, cls),
        "## Train it",
        *_recipes(name),
        "## Weights",
        *([section for weights in _weights(name) for section in _weight(weights)] or ["None yet."]),
        "## Interface",
        f"```{{eval-rst}}\n.. autoclass:: lightning_genmodels.{cls.__name__}\n   :members:\n   :show-inheritance:\n```",
        "What the kind adds is in [the interface of the kinds](../api.md).",
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _lecture(module: str) -> Iterator[str]:
    """Links to the pages that show lines of this model's file."""
    pages = [page for page in sorted(DOCS.glob("lecture/*.md")) if f"/models/{module}.py" in page.read_text("utf-8")]
    if pages:
        yield "In the lecture: " + ", ".join(f"[](../lecture/{page.name})" for page in pages) + "."


def _usage(name: str, cls: type) -> str:
    code = usage(cls, f'gm.load("{name}")' if list_weights(name) else f"gm.{cls.__name__}()")
    hub = f'torch.hub.load("lightning-genmodels/lightning-genmodels", "{name}", trust_repo=True)'
    return f"{code}\n\nWith `torch.hub`: `{hub}`."


def _recipes(name: str) -> Iterator[str]:
    """The recipe of the default weight, and the names of the others."""
    known = {path.stem: path for path in DOCS.parent.glob("recipes/*.yaml")}
    used = {Path(get_weights(weight).recipe).stem for weight in list_weights(name)}
    cls = model_class(name)
    stems = sorted(
        stem for stem, path in known.items() if stem in used or f".{cls.__name__}\n" in path.read_text(encoding="utf-8")
    )
    shown = name if name in stems else stems[0]
    yield f"```bash\ngenmodels fit --config {shown} --data.root /path/to/data\n```"
    yield f"```{{literalinclude}} ../../recipes/{shown}.yaml\n:language: yaml\n```"
    if len(stems) > 1:
        yield "Other recipes: " + ", ".join(f"`{stem}`" for stem in stems if stem != shown) + "."


def _weights(name: str) -> list[Weights]:
    """The default first."""
    return sorted((get_weights(weight) for weight in list_weights(name)), key=lambda weights: not weights.default)


def _weight(weights: Weights) -> Iterator[str]:
    """Samples, figures beside the published one, learning curve."""
    metrics, folder = weights.metrics, weights.folder
    assert folder is not None
    yield f"### `{weights.name}`"
    protocol = metrics["protocol"]
    yield (
        f"{metrics['num_parameters']:,} parameters; trained by `{weights.recipe}` on {weights.binarization} binarized "
        f"{protocol['source']}, {protocol['image_size']}x{protocol['image_size']}. "
        + ("It is what the model's bare name loads." if weights.default else "")
    )
    shutil.copyfile(folder / "samples.png", PAGES / f"{weights.name}.png")
    yield f"![64 samples of {weights.name}]({weights.name}.png){{.pixelated}}"
    yield f"*64 samples of `{weights.name}`.*"
    yield figures(weights)
    if metrics["figures"]:
        yield f"Recompute it: `genmodels verify {weights.name} --root /path/to/data`."
    if "quality" in metrics:
        yield "Quality of samples ([explained](../leaderboard.md)): " + sample_quality(weights)
    if "probe" in metrics:
        yield probe_table({f"`{weights.name}`": metrics["probe"]})
    if (folder / CURVES).is_file():
        draw_curves(
            {weights.name: read_curves(folder / CURVES)}, PAGES / f"{weights.name}.curves.png", over_minutes=True
        )
        yield f"![Learning curves of {weights.name}]({weights.name}.curves.png)"
