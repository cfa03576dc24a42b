"""Reading and writing images: NumPy files, PNG files, grids."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_genmodels.errors import ImageError
from lightning_genmodels.functional import check_images
from lightning_genmodels.system import write_atomically

_GAP, _GAP_GREY = 2, 96
_SCALE = 2  # of a grid's pixels
_SHADE = 0.25  # how far observed pixels are from black and white
_LAYOUT = "lightning_genmodels.grid"
_MAX_PIXELS = 2**26  # of a file that is read


def grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """Arranges images in rows, with a thin grey line between them.

    Args:
        images: (N, 1, H, W) in [0, 1].
        columns: Images in a row; default: as square as possible.

    Returns:
        (H', W') uint8, black to white.
    """
    count, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), max(count, 1))
    rows = -(-count // columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP)
    canvas = np.full(shape, _GAP_GREY, dtype=np.uint8)
    for index, image in enumerate((images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()):
        row, column = divmod(index, columns)
        top, left = row * (height + _GAP) + _GAP, column * (width + _GAP) + _GAP
        canvas[top : top + height, left : left + width] = image[0]
    return canvas


def write_png(path: Path, pixels: np.ndarray, scale: int = 1, text: Mapping[str, str] | None = None) -> None:
    """Writes an (H, W) uint8 array, each pixel enlarged to ``scale`` x ``scale``, and what the file says of itself.

    Raises:
        FileError: The folder cannot be written.
    """
    buffer, said = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        said.add_text(key, value)
    image = Image.fromarray(np.kron(pixels, np.ones((scale, scale), dtype=np.uint8)))
    image.save(buffer, format="PNG", pnginfo=said)
    write_atomically(path, buffer.getvalue())


def write_images(path: Path, images: Tensor, columns: int | None = None, observed: Tensor | None = None) -> None:
    """Writes images (N, 1, H, W) in {0, 1}: ``.npy`` as uint8 of that shape, ``.png`` as a grid.

    The grid's layout is in the file, from which :func:`read_images` reads the images again. Pixels that ``observed``, a
    mask that broadcasts to the images, says were given are shaded.

    Raises:
        ImageError: Another ending.
    """
    if path.suffix == ".png":
        shown = images if observed is None else torch.where(observed.to(images.device), _shaded(images), images)
        count, _, height, width = images.shape
        columns = min(columns or math.ceil(math.sqrt(count)), max(count, 1))
        layout = {"count": count, "height": height, "width": width, "columns": columns, "gap": _GAP, "scale": _SCALE}
        write_png(path, grid(shown, columns), scale=_SCALE, text={_LAYOUT: json.dumps(layout)})
    elif path.suffix == ".npy":
        write_array(path, images.to(torch.uint8))
    else:
        raise ImageError(f"expected a file that ends in .png or .npy, got {path}")


def write_array(path: Path, values: Tensor) -> None:
    """Writes a tensor as a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, values.detach().cpu().numpy(), allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_mask(observed: str, event_shape: tuple[int, int, int]) -> Tensor:
    """A mask of observed pixels.

    Args:
        observed: ``top``, ``bottom``, ``left`` or ``right`` half (the smaller one, of an odd size), or a ``.npy`` file
            with (H, W), (N, H, W) or (N, 1, H, W) numbers, non-zero where a pixel is observed.
        event_shape: (1, H, W) of the images.

    Returns:
        (1, H, W) or (N, 1, H, W) bool.

    Raises:
        ImageError: No such half and no such file, or another shape.
    """
    _, height, width = event_shape
    mask = torch.zeros(event_shape, dtype=torch.bool)
    half_height, half_width = height // 2, width // 2
    halves = {
        "top": mask[:, :half_height],
        "bottom": mask[:, height - half_height :],
        "left": mask[:, :, :half_width],
        "right": mask[:, :, width - half_width :],
    }
    if observed in halves:
        halves[observed].fill_(True)
        return mask
    if not observed.endswith(".npy"):
        raise ImageError(f"expected {', '.join(halves)} or a .npy file with a mask of observed pixels, got {observed}")
    try:
        array = np.load(observed, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ImageError(f"cannot read a mask from {observed}: {error}") from error
    if array.dtype.kind not in "biuf" or array.shape[-2:] != (height, width) or array.ndim > 4:
        raise ImageError(
            f"{observed}: expected a mask of shape ({height}, {width}), or one per image, got numbers of type "
            f"{array.dtype} and shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ImageError(f"{observed}: expected a mask of finite numbers, got NaN or infinities")
    found = torch.from_numpy(array != 0)
    return found.unsqueeze(-3) if found.ndim < 4 else found


def read_images(path: Path, event_shape: tuple[int, int, int]) -> Tensor:
    """Reads binary images for a model.

    Args:
        path: ``.npy`` with (N, 1, H, W), (N, H, W), (H, W) or (N, H * W) zeros and ones, or ``.png``: a grid that
            :func:`write_images` wrote, or one black and white image.
        event_shape: (1, H, W) that the model takes.

    Returns:
        (N, 1, H, W) float32 in {0, 1}.

    Raises:
        ImageError: No such file, another kind of file, a wrong shape, or pixels that are not binary.
    """
    _, height, width = event_shape
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".png":
            with Image.open(path, formats=["PNG"]) as image:  # by its name alone, Pillow would start Ghostscript
                if image.width * image.height > _MAX_PIXELS:
                    raise ImageError(
                        f"{path} has {image.width}x{image.height} pixels; expected {_MAX_PIXELS:,} at most"
                    )
                layout = image.info.get(_LAYOUT)
                array = np.asarray(image.convert("L"), dtype=np.float32) / 255.0
                if layout is not None:
                    array = _cells(array, layout)
        else:
            raise ImageError(f"expected a .npy or .png file, got {path}")
    except (OSError, ValueError, EOFError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read images from {path}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ImageError(f"expected numbers in {path}, got an array of type {array.dtype}")
    tensor = torch.from_numpy(np.array(array, dtype=np.float32))
    if tensor.shape == (height, width):
        tensor = tensor.view(1, *event_shape)
    elif tensor.ndim == 2 and tensor.shape[1] == height * width:
        tensor = tensor.view(-1, *event_shape)
    elif tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    try:
        return check_images(tensor, event_shape)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error


def _shaded(images: Tensor) -> Tensor:
    """Zeros and ones in two greys that are neither, and that rounding to black and white takes back."""
    return images * (1.0 - 2.0 * _SHADE) + _SHADE


def _cells(array: np.ndarray, layout: str) -> np.ndarray:
    """The images (N, H, W) in a grid that :func:`write_images` wrote, black and white again.

    Raises:
        ImageError: The file is not the grid that it says it is.
    """
    try:
        numbers = json.loads(layout)
        count, height, width, columns, gap, scale = (
            int(numbers[key]) for key in ("count", "height", "width", "columns", "gap", "scale")
        )
        rows = -(-count // columns)
        expected = ((rows * (height + gap) + gap) * scale, (columns * (width + gap) + gap) * scale)
        if array.shape != expected or min(count, height, width, columns, scale) < 1:
            raise ValueError(f"{array.shape} pixels, not {expected}")
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ImageError(f"a grid whose layout is damaged ({error}); write it again, or give a .npy file") from error
    small = array[::scale, ::scale]
    cells = [divmod(index, columns) for index in range(count)]
    corners = [(row * (height + gap) + gap, column * (width + gap) + gap) for row, column in cells]
    return np.stack([small[top : top + height, left : left + width] > 0.5 for top, left in corners])
