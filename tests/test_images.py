"""Images in and out: a grid that was written is read back as its images, and nothing but PNG is opened."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lightning_genmodels.data.images import read_images, write_images
from lightning_genmodels.errors import ImageError

SHAPE = (1, 5, 7)


@pytest.mark.parametrize(("count", "columns"), [(1, None), (4, None), (7, 3), (10, 10), (3, 1)])
@pytest.mark.parametrize("shaded", [False, True])
def test_a_grid_is_read_back_as_its_images(tmp_path: Path, count: int, columns: int | None, shaded: bool) -> None:
    images = (torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    observed = torch.zeros(SHAPE, dtype=torch.bool)
    observed[:, :2] = True
    write_images(tmp_path / "grid.png", images, columns, observed=observed if shaded else None)
    assert torch.equal(read_images(tmp_path / "grid.png", SHAPE), images)
    greys = set(np.unique(np.asarray(Image.open(tmp_path / "grid.png"))))
    assert greys == ({0, 64, 96, 191, 255} if shaded else {0, 96, 255}) or count == 1


def test_one_image_is_read_and_a_sheet_of_another_size_is_refused(tmp_path: Path) -> None:
    pixels = (np.random.default_rng(0).random((5, 7)) < 0.5).astype(np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "one.png")
    assert torch.equal(read_images(tmp_path / "one.png", SHAPE)[0, 0], torch.from_numpy(pixels / 255).float())
    Image.fromarray(np.tile(pixels, (2, 2))).save(tmp_path / "four.png")
    with pytest.raises(ImageError, match=r"expected images of shape \(batch, 1, 5, 7\)"):
        read_images(tmp_path / "four.png", SHAPE)


@pytest.mark.parametrize("layout", ["{", "{}", "[]", '{"count": 1e9}', '{"count": 0}'])
def test_a_grid_that_is_not_what_it_says_is_refused(tmp_path: Path, layout: str) -> None:
    said = PngInfo()
    said.add_text("lightning_genmodels.grid", layout)
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "grid.png", pnginfo=said)
    with pytest.raises(ImageError, match="layout is damaged"):
        read_images(tmp_path / "grid.png", SHAPE)


def test_nothing_but_png_is_opened_whatever_its_name(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((5, 7), dtype=np.uint8)).save(tmp_path / "image.gif")
    (tmp_path / "image.gif").rename(tmp_path / "image.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\nquit\n")
    for name in ("image.png", "script.png"):
        with pytest.raises(ImageError, match="cannot read images"):
            read_images(tmp_path / name, SHAPE)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(ImageError, match="9000x9000 pixels"):
        read_images(tmp_path / "bomb.png", SHAPE)
