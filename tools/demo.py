"""Trains a VAE on handwritten digits that need no network, in about a minute on two cores, and loads a trained one.

python tools/demo.py [--seconds 60] [--out demo]
"""

from __future__ import annotations

import argparse
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, Timer

from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.data.images import write_images
from lightning_genmodels.evaluation.run import Protocol, evaluate
from lightning_genmodels.models import VAE
from lightning_genmodels.system import reuse_freed_memory

ROOT = Path(__file__).parent.parent


def bound(model: VAE, data: BinarizedMNISTDataModule) -> str:
    """The importance-weighted bound on the validation images, as text."""
    report = evaluate(model.eval(), data, Protocol("val", num_particles=100, accelerator="cpu"))
    assert report is not None
    figure = report.metrics["figures"]["iw100"]
    return f"{figure['value']:.1f} +- {figure['standard_error']:.1f} nats per image"


def main() -> None:
    """Trains, evaluates, samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    reuse_freed_memory()

    seed_everything(0)
    data = BinarizedMNISTDataModule(source="digits", binarization="threshold", batch_size=64)
    model = VAE(data.event_shape, learning_rate=5e-4)
    print(f"A VAE with {model.num_parameters:,} parameters and {len(data.images('train')):,} training images.")
    before = bound(model, data)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[Timer(timedelta(seconds=options.seconds)), EarlyStopping("val/nelbo", patience=5)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        check_val_every_n_epoch=4,
        num_sanity_val_steps=0,
    )
    trainer.fit(model.train(), datamodule=data)
    after = bound(model, data)
    print(f"Bound on -log p(x) (IW-100, validation) before training: {before}")
    print(f"Bound on -log p(x) (IW-100, validation) after training:  {after}")
    grid = options.out / "samples.png"
    write_images(grid, model.sample(64, generator=torch.Generator().manual_seed(0)))
    print(f"Samples: {grid}")

    trained = torch.hub.load(str(ROOT), "vae", source="local")
    grid = options.out / "trained_vae.png"
    write_images(grid, trained.sample(64, generator=torch.Generator().manual_seed(0)))
    print(f"Samples of the VAE that was trained on MNIST and ships with the package, loaded by torch.hub: {grid}")


if __name__ == "__main__":
    main()
