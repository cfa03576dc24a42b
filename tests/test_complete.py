"""``genmodels complete`` as it is called, and the benchmark of NADE."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.cli import main
from lightning_genmodels.data.images import read_mask
from lightning_genmodels.errors import ImageError
from lightning_genmodels.models import NADE, EoNADE, JointTable, PixelCNN, PixelSNAIL

# Halves and random masks, in orders in which they do not come first: a warning says so, which other tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:in .* images, observed pixels come after missing ones")

ROOT = Path(__file__).parent.parent
SHAPE = (1, 6, 6)


@pytest.fixture
def images(run_folder: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 2, size=(7, 6, 6), dtype=np.uint8)
    np.save("images.npy", pixels)
    return pixels


@pytest.mark.parametrize(
    "model",
    [
        NADE(SHAPE, 4),
        EoNADE(SHAPE, (4,), num_orders=2),
        PixelCNN(SHAPE, 4, 2),
        PixelSNAIL(SHAPE, 4, 2, heads=2, orders=("patches", "patches_rot180")),
    ],
    ids=["nade", "eonade", "pixelcnn", "pixelsnail"],
)
@pytest.mark.parametrize(
    ("half", "rows", "columns"),
    [
        ("top", slice(0, 3), slice(None)),
        ("bottom", slice(3, 6), slice(None)),
        ("left", slice(None), slice(0, 3)),
        ("right", slice(None), slice(3, 6)),
    ],
)
def test_complete_keeps_the_half_that_is_observed(
    images: np.ndarray, model: GenerativeModel, half: str, rows: slice, columns: slice
) -> None:
    model.save_pretrained("weights")
    main(["complete", "./weights", "images.npy", "--observed", half, "--out", "out.npy"])
    completed = np.load("out.npy")
    assert completed.shape == (7, *SHAPE)
    assert (completed[:, 0, rows, columns] == images[:, rows, columns]).all()
    assert (completed[:, 0] != images).any()
    main(["complete", "./weights", "images.npy", "--observed", half, "--out", "again.npy"])
    assert (np.load("again.npy") == completed).all()


def test_complete_takes_a_mask_for_every_image(images: np.ndarray) -> None:
    NADE(SHAPE, 4).save_pretrained("weights")
    mask = np.random.default_rng(1).integers(0, 2, size=images.shape)
    np.save("mask.npy", mask)
    main(["complete", "./weights", "images.npy", "--observed", "mask.npy", "--out", "out.npy"])
    assert (np.load("out.npy")[:, 0] == images)[mask == 1].all()


@pytest.mark.parametrize(
    ("observed", "message"),
    [("middle", "top, bottom, left, right or a .npy file"), ("no.npy", "cannot read"), ("small.npy", "of shape")],
)
def test_complete_refuses_masks_that_make_no_sense(
    images: np.ndarray, observed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    NADE(SHAPE, 4).save_pretrained("weights")
    np.save("small.npy", np.ones((5, 5)))
    with pytest.raises(SystemExit) as caught:
        main(["complete", "./weights", "images.npy", "--observed", observed])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_complete_refuses_a_model_that_cannot(images: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    JointTable((1, 2, 2)).save_pretrained("weights")
    with pytest.raises(SystemExit):
        main(["complete", "./weights", "images.npy"])
    assert "cannot complete images" in capsys.readouterr().err


def test_masks_of_halves_do_not_overlap() -> None:
    top, bottom = read_mask("top", (1, 3, 3)), read_mask("bottom", (1, 3, 3))
    assert top.sum() == bottom.sum() == 3
    assert not (top & bottom).any()
    with pytest.raises(ImageError):
        read_mask("weights.pt", (1, 3, 3))


@pytest.mark.slow(reason="a benchmark")
def test_the_fast_forms_of_nade_are_as_much_faster_as_promised(run_folder: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "benchmark.py"), "nade_training"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    faster, less = (float(ratio) for ratio in re.findall(r"([\d.]+) times", printed))
    assert faster > 2  # 6 to 8 on a quiet machine
    assert less > 2
