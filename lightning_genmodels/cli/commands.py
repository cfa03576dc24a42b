"""The commands for trained models: one function each, whose arguments are the command's options."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser

from lightning_genmodels import __version__
from lightning_genmodels.base import (
    AdversarialModel,
    CompletionModel,
    ExplicitModel,
    GenerativeModel,
    LatentVariableModel,
    RepresentationModel,
)
from lightning_genmodels.cli import SUMMARIES, TRAINER_COMMANDS, listing, recipes
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.data.images import read_images, read_mask, write_array, write_images
from lightning_genmodels.errors import FileError, OptionError, UnknownNameError, at_least, first_line, within
from lightning_genmodels.evaluation.likelihood import figures_of, score
from lightning_genmodels.evaluation.run import Protocol
from lightning_genmodels.evaluation.run import evaluate as measure
from lightning_genmodels.functional import lines
from lightning_genmodels.system import check_folder, check_output, shown, write_atomically
from lightning_genmodels.testing import audit as findings
from lightning_genmodels.testing import untrained
from lightning_genmodels.training.curves import CURVES, draw_curves, read_curves
from lightning_genmodels.training.launch import hide_advice
from lightning_genmodels.weights import verify as checks
from lightning_genmodels.weights.loading import export as save_weights
from lightning_genmodels.weights.loading import load
from lightning_genmodels.weights.names import list_models, model_class
from lightning_genmodels.weights.records import list_weights

_IMAGES = (".png", ".npy")
_SEEDS = 2**63


def _on(device: str, model: GenerativeModel) -> GenerativeModel:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not there
        raise OptionError(f"cannot run on --device {device}: {first_line(error)}") from error


def sample(
    name: str,
    out: Path | None = None,
    num_samples: int = 64,
    grid: int | None = None,
    seed: int = 0,
    progress: bool = True,
    device: str = "cpu",
) -> None:
    """Draws images from a trained model.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        out: A .png file for a grid, or a .npy file. Default: NAME_samples.png.
        num_samples: Number of images.
        grid: Draw a square grid with this many images a side, instead of num_samples.
        seed: Seed of the samples.
        progress: Show a bar while a slow model draws pixel by pixel, if standard error is a terminal.
        device: Where the model runs: cpu, cuda, mps.
    """
    at_least(1, num_samples=num_samples, grid=1 if grid is None else grid)
    within(0, _SEEDS, seed=seed)
    out = check_output(out or Path(f"{Path(name).name}_samples.png"), _IMAGES)
    model = _on(device, load(name))
    count = grid**2 if grid else num_samples
    with shown(progress):
        samples = model.sample(count, generator=torch.Generator().manual_seed(seed))
    write_images(out, samples, grid)
    print(f"{count} samples of {name}: {out}")


def log_prob(
    name: str, images: Path, out: Path | None = None, num_particles: int = 100, seed: int = 0, device: str = "cpu"
) -> None:
    """Prints how likely images are: log-probabilities in nats, exact or a lower bound.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        images: A .npy or .png file of binary images.
        out: Also write the values to this .npy file.
        num_particles: Particles of the importance-weighted bound, for a latent-variable model.
        seed: Seed of its noise.
        device: Where the model runs: cpu, cuda, mps.
    """
    at_least(1, num_particles=num_particles)
    within(0, _SEEDS, seed=seed)
    if out is not None:
        check_output(out, [".npy"], images)
    model = _on(device, load(name))
    if not isinstance(model, ExplicitModel | LatentVariableModel):
        raise OptionError(f"{name} is an implicit model: it samples, and has no likelihood")
    x = read_images(images, model.event_shape).to(model.device)
    figure = next(f for f in figures_of(model, num_particles) if f.name in ("nll", f"iw{num_particles}"))
    values = score(model, x, range(len(x)), figure, seed=seed)
    for index, value in enumerate(values.tolist()):
        print(f"{index}\t{value:.4f}")
    kind = "log p(x)" if isinstance(model, ExplicitModel) else f"lower bound {figure.name} on log p(x)"
    print(f"mean {kind}: {values.mean():.4f} nats per image over {len(values)} images", file=sys.stderr)
    if out is not None:
        write_array(out, values)


def encode(name: str, images: Path, out: Path) -> None:
    """Writes the codes of images, (N, D) float32: what a latent-variable model or an autoencoder has to say of them.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        images: A .npy or .png file of binary images.
        out: The .npy file to write.
    """
    check_output(out, [".npy"], images)
    model = load(name)
    if not isinstance(model, RepresentationModel):
        raise OptionError(f"{name} has no codes: it is a {type(model).__name__}; take a model with an encoder: vae")
    with torch.no_grad():
        codes = model.encode(read_images(images, model.event_shape))
    write_array(out, codes)
    print(f"{len(codes)} codes of {codes.shape[1]} numbers: {out}")


def complete(
    name: str,
    images: Path,
    observed: str = "top",
    out: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    device: str = "cpu",
) -> None:
    """Draws what is missing from images, given the rest, with a model that has a pixel order, or a VAE.

    With an order, the draw is exact where the observed pixels come first in it, and else ignores what is observed
    later; a VAE takes a Markov chain, which is exact in the limit.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        images: A .npy or .png file of binary images.
        observed: The half that is kept: top, bottom, left or right; or a .npy file with a mask (H, W), or one per
            image (N, H, W), non-zero where a pixel is observed.
        out: A .png file for a grid, or a .npy file. Default: NAME_completed.png.
        seed: Seed of the draw.
        progress: Show a bar while a slow model draws pixel by pixel, if standard error is a terminal.
        device: Where the model runs: cpu, cuda, mps.
    """
    within(0, _SEEDS, seed=seed)
    out = check_output(out or Path(f"{Path(name).name}_completed.png"), _IMAGES, images, Path(observed))
    model = _on(device, load(name))
    if not isinstance(model, CompletionModel):
        raise OptionError(f"a {type(model).__name__} cannot complete images; take one that can: nade, pixelsnail, vae")
    x = read_images(images, model.event_shape)
    mask = read_mask(observed, model.event_shape)
    with shown(progress):
        completed = model.complete(x, mask, generator=torch.Generator().manual_seed(seed))
    write_images(out, completed, observed=mask)
    print(f"{len(x)} images completed by {name}: {out}")


def interpolate(name: str, out: Path | None = None, pairs: int = 8, steps: int = 10, seed: int = 0) -> None:
    """Draws straight lines between latent points: what lies between two images, as a model with latents sees it.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        out: A .png file for a grid, a line each row, or a .npy file. Default: NAME_interpolations.png.
        pairs: Number of lines; their ends are draws from the prior.
        steps: Images on a line. Each pixel is the more likely one of 0 and 1.
        seed: Seed of the ends.
    """
    model = load(name)
    if not isinstance(model, LatentVariableModel | AdversarialModel):
        raise OptionError(f"a {type(model).__name__} draws no latents to interpolate; take a model that does: vae, gan")
    at_least(1, pairs=pairs, steps=steps)
    within(0, _SEEDS, seed=seed)
    out = check_output(out or Path(f"{Path(name).name}_interpolations.png"), _IMAGES)
    ends = model.sample_latent(2 * pairs, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model.decode(lines(ends[0::2], ends[1::2], steps).flatten(0, 1))
    write_images(out, (logits > 0).float(), steps)
    print(f"{pairs} interpolations of {name}: {out}")


def evaluate(name: str, data: BinarizedMNISTDataModule, protocol: Protocol, out: Path | None = None) -> None:
    """Measures a trained model: the one protocol behind every published figure.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub.
        data: The data module.
        protocol: What is measured, and how.
        out: Folder for metrics.json and the values of all images. Default: only print the table.
    """
    if out is not None:
        check_folder(out)
    hide_advice()
    with shown():
        report = measure(load(name), data, protocol)
    if report is not None:
        print(report.table())
        if out is not None:
            report.write(out)
            print(f"written: {out}")


def curves(runs: list[Path], out: Path = Path("curves.png"), over_minutes: bool = False) -> None:
    """Draws learning curves: the training loss and the validation figures of one or several runs.

    Args:
        runs: Folders of training runs, or the curves.json of weights.
        out: The .png file to write.
        over_minutes: Over minutes of CPU time, and not over optimizer steps.
    """
    out = check_output(out, [".png"])
    folders = [run.parent if run.name == CURVES else run for run in runs]
    names = [folder.resolve().name for folder in folders]
    labels = names if len({*names}) == len(names) else [str(folder) for folder in folders]
    draw_curves({label: read_curves(run) for label, run in zip(labels, runs, strict=True)}, out, over_minutes)
    print(f"learning curves of {len(runs)} runs: {out}")


def export(checkpoint: Path, out: Path, data: BinarizedMNISTDataModule, half: bool = False) -> None:
    """Turns a Lightning checkpoint into weights to share: safetensors and a JSON config.

    Args:
        checkpoint: The .ckpt file; where weights were averaged, it holds the average.
        out: Folder to write.
        data: What the model was trained on; read only if an export needs it, as that of an autoencoder does, which
            fits a density to the codes of the training images.
        half: Store half-precision numbers.
    """
    check_folder(out)
    model = save_weights(checkpoint, out, data, half=half)
    print(f"{type(model).__name__} with {model.num_parameters:,} parameters: {out}")


def verify(name: str, root: str | None = None, full: bool = False, seconds: float = 60.0) -> None:
    """Recomputes published figures from their weights, image by image; status 1 if they do not agree.

    Args:
        name: Model, weight, folder, or owner/repo on the Hub.
        root: Data folder; default: $LIGHTNING_GENMODELS_DATA, else one in the user's cache.
        full: All images, however long it takes.
        seconds: Else stop after so long for each figure.
    """
    found = checks.verify(name, root, full=full, seconds=seconds)
    print("\n".join(str(verification) for verification in found))
    if not all(verification.agrees for verification in found):
        raise SystemExit(1)


def audit(name: str) -> None:
    """Checks theorems that a model must satisfy, at its real size; status 1 if one fails.

    Prints a line for each theorem: whether it holds, FAILS or is not applicable, and the evidence.

    Args:
        name: Model, weight, folder, checkpoint, or owner/repo on the Hub. A model without weights is audited untrained,
            of its default size, with random parameters.
    """
    if name in list_models() and not list_weights(name):
        cls = model_class(name)
        if not issubclass(cls, GenerativeModel):
            raise OptionError(
                f"{name} is a {cls.__name__}, which is no GenerativeModel; derive it from one of its kinds"
            )
        model = untrained(cls)
    else:
        model = load(name)
    failed = 0
    for finding in findings(model):
        print(finding, flush=True)
        failed += finding.verdict == "FAILS"
    if failed:
        raise SystemExit(1)


def publish(name: str, namespace: str, dry_run: bool = True) -> None:
    """Uploads shipped weights to the Hugging Face Hub, with a generated card; by default only says what it would do.

    Args:
        name: A weight, or a model for all of its weights.
        namespace: User or organization on the Hub.
        dry_run: False sends the files, with the token of HF_TOKEN or `hf auth login`.
    """
    from lightning_genmodels.weights.publish import publish as upload

    for publication in upload(name, namespace, dry_run=dry_run):
        print(publication)


def list_(as_json: bool = False) -> None:
    """Lists models, and the trained weights of each.

    Args:
        as_json: Print JSON.
    """
    if as_json:
        print(json.dumps({model: list_weights(model) for model in list_models()}, indent=2))
        return
    print(listing())


def recipes_(action: Literal["cp"], name: str, out: Path | None = None) -> None:
    """Copies a recipe, to change it. Without arguments, or with ls, lists all of them.

    Args:
        action: cp.
        name: The recipe to copy.
        out: The .yaml file to write. Default: NAME.yaml.
    """
    if name not in recipes():
        raise UnknownNameError("recipe", name, recipes())
    out = check_output(out or Path(f"{name}.yaml"), [".yaml"], recipes()[name])
    if out.exists():
        raise FileError(f"{out} exists already; give the copy another name with --out")
    write_atomically(out, recipes()[name].read_bytes())
    print(f"recipe {name}: {out}")


def app(host: str = "127.0.0.1", port: int = 7860, browser: bool = True) -> None:
    """Opens the models in a browser: draw a digit and see it completed, scored and varied. Ctrl-C ends it.

    Args:
        host: Address to listen at; 0.0.0.0 lets other machines in.
        port: 0 for a free one.
        browser: Open the page in a browser.
    """
    from lightning_genmodels.app.server import Server

    within(0, 2**16, port=port)
    with contextlib.suppress(KeyboardInterrupt), Server(host, port) as server:
        print(f"the app runs at {server.url}; Ctrl-C ends it", flush=True)
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()


COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "log_prob": log_prob,
    "encode": encode,
    "complete": complete,
    "interpolate": interpolate,
    "evaluate": evaluate,
    "app": app,
    "curves": curves,
    "export": export,
    "audit": audit,
    "verify": verify,
    "publish": publish,
    "list": list_,
    "recipes": recipes_,
}


def run(args: list[str]) -> None:
    """Parses a command and its options, and runs it."""
    about = "Trained generative models of binary images."
    parser = ArgumentParser(prog="genmodels", description=about, version=__version__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        sub = ArgumentParser(description=inspect.getdoc(function), exit_on_error=False)
        parameters = inspect.signature(function).parameters
        sub.add_function_arguments(function, as_positional=True, skip={*({"data", "protocol"} & parameters.keys())})
        if "protocol" in parameters:
            sub.add_class_arguments(Protocol)
        if "data" in parameters:
            sub.add_class_arguments(BinarizedMNISTDataModule, "data")
        commands.add_subcommand(name, sub, help=SUMMARIES[name])
    for name in TRAINER_COMMANDS:  # so that an error about a command's name lists all of them
        commands.add_subcommand(name, ArgumentParser(exit_on_error=False), help=SUMMARIES[name])
    if args[:1] == ["curves"]:  # several folders are one list to the parser
        folders = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args[1:]))
        args = ["curves", json.dumps(folders), *args[1 + len(folders) :]] if folders else args
    config = parser.instantiate(parser.parse_args(args))
    options = config[config.command].as_dict()
    function = COMMANDS[config.command]
    if "protocol" in inspect.signature(function).parameters:
        options["protocol"] = Protocol(**{field.name: options[field.name] for field in dataclasses.fields(Protocol)})
    function(**{key: options[key] for key in inspect.signature(function).parameters})
