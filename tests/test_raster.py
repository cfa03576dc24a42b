"""Networks that go row by row: which pixels each conditional sees, cached against naive drawing, orders, layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genmodels.base import RasterModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.models import DiagonalBiLSTM, GatedPixelCNN, PixelCNN, RowLSTM
from lightning_genmodels.nn.raster import CausalConv2d
from lightning_genmodels.nn.recurrent import LineLSTM
from lightning_genmodels.orders import RASTER_ORDERS, pixel_order, raster_shape
from lightning_genmodels.testing import check_drawing

SIDE = 12
MODELS: dict[str, Callable[..., RasterModel]] = {
    "pixelcnn": lambda shape, order="raster": PixelCNN(shape, 6, 3, 5, order=order),
    "gated_pixelcnn": lambda shape, order="raster": GatedPixelCNN(shape, 5, 3, 5, 5, order=order),
    "pixelcnn_by_place": lambda shape, order="raster": _by_place(
        PixelCNN(shape, 4, 2, 3, order=order, bias_by_place=True)
    ),
    "gated_by_place": lambda shape, order="raster": _by_place(
        GatedPixelCNN(shape, 4, 2, 3, 3, order=order, bias_by_place=True)
    ),
    "row_by_place": lambda shape, order="raster": _by_place(RowLSTM(shape, 3, 2, 3, order=order, bias_by_place=True)),
    "diagonal_by_place": lambda shape, order="raster": _by_place(
        DiagonalBiLSTM(shape, 3, 2, 3, order=order, bias_by_place=True)
    ),
    "row_lstm": lambda shape, order="raster": RowLSTM(shape, 5, 2, 5, order=order),
    "diagonal_bilstm": lambda shape, order="raster": DiagonalBiLSTM(shape, 5, 2, 5, order=order),
}


def _by_place(model: RasterModel) -> RasterModel:
    """Gives the biases of the places, which start at zero, something to say."""
    (bias,) = (parameter for name, parameter in model.named_parameters() if name.endswith("bias_of_places"))
    torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("name", ["pixelcnn_by_place", "gated_by_place", "row_by_place", "diagonal_by_place"])
@torch.no_grad()
def test_the_bias_of_a_place_reaches_its_pixel_and_none_before(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]((1, 5, 6)).double().eval()
    (bias,) = (parameter for key, parameter in model.named_parameters() if key.endswith("bias_of_places"))
    x = torch.randint(2, (8, 1, 5, 6)).double()
    before = model.conditional_logits(x)
    bias[:, 2, 3] += 1.0
    changed = (model.conditional_logits(x) != before).flatten(1).any(0)
    assert changed.nonzero()[0].item() == 2 * 6 + 3


def context(model: RasterModel, row: int, column: int) -> Tensor:
    """Which pixels (H, W) the gradient of one conditional reaches, for any of some random images."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) / parameter.flatten(1).shape[1] ** 0.5 if parameter.ndim > 1 else 0
            )
    x = torch.randint(2, (8, 1, SIDE, SIDE)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(model.conditional_logits(x)[:, 0, row, column].sum(), x)
    return (gradient != 0).any(0)[0]


def offsets(row: int, column: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows above a pixel, columns to its right, and whether a pixel comes before it, (H, W) each."""
    up = row - torch.arange(SIDE).view(-1, 1).expand(SIDE, SIDE)
    right = torch.arange(SIDE).view(1, -1).expand(SIDE, SIDE) - column
    return up, right, (up > 0) | ((up == 0) & (right < 0))


@pytest.mark.parametrize(("row", "column"), [(8, 4), (11, 0), (5, 11)])
def test_a_plain_pixelcnn_has_a_blind_spot_to_the_right(row: int, column: int) -> None:
    up, right, earlier = offsets(row, column)
    seen = context(PixelCNN((1, SIDE, SIDE), 8, 12, 3), row, column)
    assert torch.equal(seen, earlier & (right <= up))
    assert (earlier & ~seen).any() == (column < SIDE - 2)


@pytest.mark.parametrize(("row", "column"), [(8, 4), (11, 0), (5, 11), (1, 0)])
def test_a_gated_pixelcnn_sees_every_earlier_pixel(row: int, column: int) -> None:
    _, _, earlier = offsets(row, column)
    assert torch.equal(context(GatedPixelCNN((1, SIDE, SIDE), 8, 12, 3, 3), row, column), earlier)


@pytest.mark.parametrize(("row", "column"), [(8, 4), (11, 0), (5, 11)])
def test_a_row_lstm_sees_a_triangle(row: int, column: int) -> None:
    up, right, earlier = offsets(row, column)
    seen = context(RowLSTM((1, SIDE, SIDE), 8, 1, 3), row, column)
    assert torch.equal(seen, earlier & (right <= up) & (right >= -up - 2))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("row", "column"), [(8, 4), (11, 0), (5, 11), (1, 0)])
def test_a_diagonal_bilstm_sees_every_earlier_pixel(row: int, column: int, layers: int) -> None:
    _, _, earlier = offsets(row, column)
    assert torch.equal(context(DiagonalBiLSTM((1, SIDE, SIDE), 8, layers, 3), row, column), earlier)


@pytest.mark.parametrize("order", ["raster", "raster_rot90"])
@pytest.mark.parametrize("name", list(MODELS))
def test_drawing_from_caches_equals_full_evaluations(name: str, order: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]((1, 9, 7), order)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    check_drawing(model)


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_from_caches_equal_those_of_a_full_evaluation(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]((1, 9, 7)).double().eval()
    x = torch.randint(2, (5, 1, 9, 7)).double()
    with torch.no_grad():
        kept = torch.stack(list(model.net.conditionals(x)), dim=1).view_as(x)
        torch.testing.assert_close(kept, model.net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("order", ["snake", "hilbert", "random", "snake_rot90"])
def test_other_orders_are_refused(name: str, order: str) -> None:
    with pytest.raises(OptionError, match="row by row"):
        MODELS[name]((1, 4, 4), order)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PixelCNN(hidden_size=0),
        lambda: PixelCNN(kernel_size=4),
        lambda: PixelCNN(dropout=1.0),
        lambda: GatedPixelCNN(num_layers=0),
        lambda: GatedPixelCNN(first_kernel_size=6),
        lambda: RowLSTM(num_layers=0),
        lambda: RowLSTM(first_kernel_size=2),
        lambda: DiagonalBiLSTM(dropout=-0.1),
    ],
)
def test_options_without_sense_are_refused(build: Callable[[], RasterModel]) -> None:
    with pytest.raises(OptionError, match="expected"):
        build()


@pytest.mark.parametrize("order", RASTER_ORDERS)
def test_an_image_is_turned_so_that_its_order_is_the_raster(order: str) -> None:
    shape = raster_shape(order, 3, 5)
    turned = torch.arange(15)[pixel_order(order, 3, 5)].view(shape)
    row_step, column_step = turned[1, 0] - turned[0, 0], turned[0, 1] - turned[0, 0]
    rows, columns = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    assert torch.equal(turned, turned[0, 0] + rows * row_step + columns * column_step)


@pytest.mark.parametrize("mask", ["A", "B"])
@pytest.mark.parametrize("kernel", [1, 3, 5, (1, 3), (3, 5)])
def test_a_causal_convolution_and_its_cache_equal_a_masked_one(mask: str, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = CausalConv2d(2, 3, kernel, mask).double()  # type: ignore[arg-type]
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    full = torch.zeros(3, 2, rows, columns, dtype=torch.float64)
    full[:, :, : rows // 2 + 1] = conv.weight
    full[:, :, rows // 2, columns // 2 + (mask == "B") :] = 0
    expected = F.conv2d(x, full, conv.bias, padding=(rows // 2, columns // 2))
    torch.testing.assert_close(conv(x), expected)
    cache = conv.cache(4, 6, 5)
    for i in range(6):
        conv.start_row(cache, x[:, :, i - 1] if i else None)
        for j in range(5):
            seen = x[:, :, i, j if mask == "B" else max(0, j - 1)]
            torch.testing.assert_close(conv.step(seen, cache, i, j), expected[:, :, i, j])


def plain_scan(gates: Tensor, weight: Tensor, lines: Sequence[range], places: Sequence[int]) -> Tensor:
    """The equations of the paper, by autograd, with states of the line before at places that are looked up."""
    directions, size = gates.shape[0], gates.shape[1] // 4
    nothing = torch.zeros(directions, size, gates.shape[3], dtype=gates.dtype)
    hidden: dict[int, Tensor] = {}
    cells: dict[int, Tensor] = {}
    outputs, columns = [], iter(gates.unbind(2))
    for line in lines:
        new_hidden, new_cells = {}, {}
        for place in line:
            seen = [hidden.get(place + offset, nothing) for offset in places]
            a = next(columns) + sum(w @ h for w, h in zip(weight, seen, strict=True))
            o, f, i, g = a.chunk(4, dim=1)
            new_cells[place] = f.sigmoid() * cells.get(place, nothing) + i.sigmoid() * g.tanh()
            new_hidden[place] = o.sigmoid() * new_cells[place].tanh()
            outputs.append(new_hidden[place])
        hidden, cells = new_hidden, new_cells
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize(
    ("lines", "places", "directions"),
    [
        ([range(4)] * 3, (0, -1, 1), 1),
        ([range(max(0, d - 3), min(d + 1, 3)) for d in range(6)], (0, -1), 2),
        ([range(1)] * 3, (0, -1, 1), 1),
    ],
)
def test_the_scan_and_its_gradient_equal_the_plain_recurrence(
    lines: list[range], places: tuple[int, ...], directions: int
) -> None:
    torch.manual_seed(0)
    lstm = LineLSTM(3, lines, places, directions).double()
    shape = (directions, 12, sum(map(len, lines)), 2)
    gates = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, plain = lstm(gates), plain_scan(gates, lstm.weight, lines, places)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    signs = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * signs).sum(), [gates, lstm.weight]),
        torch.autograd.grad((plain * signs).sum(), [gates, lstm.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
