"""Does the order of the pixels matter? Trains a fast model under each order, prints and plots the comparison.

python recipes/pixel_orders.py --root /path/to/data
python recipes/pixel_orders.py --model markov --options '{"memory": 8}' --epochs 1 --orders raster snake hilbert

Needs: seconds for ``markov``, about a minute an order for ``fvbn``; matplotlib for the plot (``pip install
'lightning-genmodels[plots]'``), without which there is the table alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path

from lightning import Trainer, seed_everything

from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.base import AutoregressiveModel
from lightning_genmodels.system import reuse_freed_memory
from lightning_genmodels.training.callbacks import MovingAverage
from lightning_genmodels.weights.names import model_class

ORDERS = ["raster", "raster_transpose", "raster_rot180", "snake", "spiral", "spiral_out", "hilbert", "random"]


def train(order: str, args: argparse.Namespace, data: BinarizedMNISTDataModule) -> dict[str, float]:
    """Negative log-likelihoods in nats per image on validation and test images, after training in one order."""
    seed_everything(args.seed, verbose=False)
    model = model_class(args.model)(event_shape=data.event_shape, order=order, **args.options)
    assert isinstance(model, AutoregressiveModel), f"{args.model} has no single pixel order"
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[MovingAverage(0.998)] if model.automatic_optimization else [],
        check_val_every_n_epoch=args.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    validated = float(trainer.callback_metrics["val/nll"])
    trainer.test(model, data, verbose=False)  # with the average of the weights, too
    return {
        "val": validated,
        "test": float(trainer.callback_metrics["test/nll"]),
        "stderr": float(trainer.callback_metrics["test/nll_stderr"]),
    }


def plot(found: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Bars with two standard errors, best first."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted(found, key=lambda order: found[order]["test"], reverse=True)
    values, errors = ([found[name][key] for name in names] for key in ("test", "stderr"))
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
    axes.barh(names, values, xerr=[2 * error for error in errors], color="0.6")
    axes.set_xlim(min(values) - 2, max(values) + 2)
    axes.set_xlabel("test negative log-likelihood, nats per image")
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Trains once for every order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fvbn", help="a model with one pixel order: fvbn, markov, nade")
    parser.add_argument("--options", type=json.loads, default=None, help="its constructor's arguments, as JSON")
    parser.add_argument("--orders", nargs="+", default=ORDERS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--root", default=None, help="folder with the data")
    parser.add_argument("--source", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pixel_orders.png"))
    args = parser.parse_args()
    reuse_freed_memory()
    if args.options is None:
        args.options = {"learning_rate": 0.01, "l2": 1e-4} if args.model == "fvbn" else {}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # eight runs would bury the table
    data = BinarizedMNISTDataModule(args.root, args.source)
    found = {}
    print(
        f"{args.model}, {args.epochs} epochs on {args.source}\n{'order':20} {'val':>9} {'test':>9} {'std. error':>11}"
    )
    for order in args.orders:
        found[order] = train(order, args, data)
        print(
            f"{order:20} {found[order]['val']:9.2f} {found[order]['test']:9.2f} {found[order]['stderr']:11.2f}",
            flush=True,
        )
    if importlib.util.find_spec("matplotlib") is not None:
        plot(found, f"{args.model} by pixel order", args.out)
        print(f"plotted: {args.out}")


if __name__ == "__main__":
    main()
