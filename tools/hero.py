"""Draws the README's picture: samples of the best model, and half digits completed by several models.

Writes the test digits that the app and the pages of the documentation show, too.

python tools/hero.py --data.root /path/to/data
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from lightning_genmodels import BinarizedMNISTDataModule, load
from lightning_genmodels.base import CompletionModel
from lightning_genmodels.data.images import grid, write_images, write_png

ROOT = Path(__file__).parent.parent
DOCS, APP = ROOT / "docs", ROOT / "lightning_genmodels" / "app"
COLUMNS = 16


def draw(data: BinarizedMNISTDataModule, models: tuple[str, ...] = ("pixelsnail", "gated_pixelcnn", "nade")) -> None:
    """Three rows of samples; a row of test digits; and a row for each model that saw their upper halves, in grey.

    Args:
        data: The data module.
        models: Those that complete; the first also samples.
    """
    data.prepare_data()
    generator = torch.Generator().manual_seed(7)
    rows = [load(models[0]).sample(3 * COLUMNS, generator=generator)]
    digits = data.images("test")[data.subset("test", COLUMNS)].float()
    observed = torch.zeros_like(digits[0, 0], dtype=torch.bool)
    observed[: observed.shape[0] // 2] = True
    rows.append(digits)
    for name in models:
        model = load(name)
        assert isinstance(model, CompletionModel)
        completed = model.complete(digits, observed, generator=generator)
        rows.append(torch.where(observed, 0.25 + 0.4 * completed, completed))
    write_images(APP / "digits.png", data.images("test")[data.subset("test", 40)], columns=10)
    write_png(DOCS / "hero.png", grid(torch.cat(rows), columns=COLUMNS), scale=2)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(BinarizedMNISTDataModule, "data")
    draw(parser.instantiate(parser.parse_args()).data)
