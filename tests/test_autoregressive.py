"""What every model with a pixel order must satisfy, enumerated over all images of a tiny shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_genmodels.base import ExplicitModel
from lightning_genmodels.errors import ImageError, OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.evaluation.likelihood import figures_of, score
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.models import (
    FVBN,
    MADE,
    NADE,
    Bernoulli,
    ChainRuleTable,
    DiagonalBiLSTM,
    EoNADE,
    GatedPixelCNN,
    Markov,
    PixelCNN,
    RowLSTM,
)
from lightning_genmodels.models.nade import nade_logits
from lightning_genmodels.orders import RASTER_ORDERS
from lightning_genmodels.testing import (
    FALSE_ALARM_RATE,
    check_chain_rule,
    check_completion,
    check_drawing,
    check_mixture,
    check_model,
    check_normalization,
    check_order,
    factorizations,
    p_value,
    tiny,
)

SHAPE = (1, 2, 3)
ORDERS = ["raster", "raster_rot180", "raster_transpose", "snake", "spiral_out", "hilbert", "random"]

Built = tuple[type[ExplicitModel], dict[str, Any]]

IN_ONE_ORDER: dict[str, Built] = {
    "chain_rule_table": (ChainRuleTable, {}),
    "fvbn": (FVBN, {}),
    "made": (MADE, {"hidden_sizes": (9, 8), "num_orders": 1}),
    "markov": (Markov, {"memory": 2}),
    "nade": (NADE, {"hidden_size": 4}),
}
ROW_BY_ROW: dict[str, Built] = {
    name: (cls, {"hidden_size": 4, "num_layers": 2, "first_kernel_size": 3})
    for name, cls in {
        "pixelcnn": PixelCNN,
        "gated_pixelcnn": GatedPixelCNN,
        "row_lstm": RowLSTM,
        "diagonal_bilstm": DiagonalBiLSTM,
    }.items()
}
MIXTURES: dict[str, Built] = {
    "eonade": (EoNADE, {"num_orders": 3, "layer_norm": False}),
    "eonade, one layer": (EoNADE, {"hidden_sizes": (5,), "num_orders": 2}),
    "made, mixture": (MADE, {"hidden_sizes": (9,), "num_orders": 3}),
    "made, in turn": (MADE, {"hidden_sizes": (9,), "num_orders": 3, "order": ["raster", "raster_transpose"]}),
    "made, connected once": (MADE, {"hidden_sizes": (9, 8), "num_orders": 3, "connectivity_agnostic": False}),
    "made, deep": (MADE, {"hidden_sizes": (9, 7, 8), "num_orders": 2, "order": "raster"}),
}


def build(name: str, **arguments: Any) -> Any:
    """Parameters far from their initial values, in float64."""
    cls, given = {**IN_ONE_ORDER, **ROW_BY_ROW, **MIXTURES}[name]
    return tiny(cls, **{"event_shape": SHAPE, **given, **arguments})


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((n, o) for n in IN_ONE_ORDER for o in ORDERS),
        *((n, o) for n in ROW_BY_ROW for o in RASTER_ORDERS),
        *((n, None) for n in MIXTURES),
    ],
)
@torch.no_grad()
def test_every_order_is_kept(name: str, order: str | None) -> None:
    model = build(name, **({} if order is None else {"order": order}))
    theorems = (check_order, check_chain_rule, check_mixture, check_drawing, check_normalization, check_completion)
    check_model(model, theorems)
    for conditional_logits, _ in factorizations(model):  # and not because nothing is seen at all
        assert conditional_logits(all_images(SHAPE).double()).std(dim=0).max() > 1e-3


def test_hidden_units_of_made_keep_their_degrees_unless_connections_are_drawn_for_each_mask() -> None:
    once, anew = build("made, connected once"), build("made, mixture")
    assert len(once.degrees.unique(dim=0)) == 1
    assert len(anew.degrees.unique(dim=0)) == len(once.pixel_orders.unique(dim=0)) == 3


@pytest.mark.parametrize("name", ["fvbn", "made", "made, mixture", "nade", "eonade"])
def test_drawing_equals_its_definition_on_larger_images(name: str) -> None:
    options = {"fvbn": {"order": "spiral"}, "nade": {"order": "hilbert", "hidden_size": 20}}
    check_drawing(build(name, event_shape=(1, 9, 7), **options.get(name, {})))


def test_eonade_completes_any_mask_in_an_order_of_its_own() -> None:
    model = build("eonade, one layer", num_orders=1)
    order = model.pixel_orders[0]
    observed = torch.zeros(6, dtype=torch.bool)
    observed[order[3:]] = True  # what is observed comes last in the stored order
    x = torch.tensor([1, 0, 1, 1, 0, 1]).expand(20_000, 6).reshape(-1, *SHAPE)
    completed = model.complete(x, observed.view(SHAPE), generator=torch.Generator().manual_seed(3))
    model.pixel_orders = torch.cat([order[3:], order[:3]]).unsqueeze(0)
    images = all_images(SHAPE)
    fits = (images.flatten(1)[:, observed] == x[0].flatten()[observed]).all(1)
    joint = torch.where(fits, model.log_prob(images).exp(), 0.0)
    assert p_value(completed, joint / joint.sum()) > FALSE_ALARM_RATE


def test_completion_checks_what_it_is_given() -> None:
    model = NADE(SHAPE, 4)
    x = torch.full((2, *SHAPE), 0.5)
    observed = torch.zeros(SHAPE, dtype=torch.bool)
    assert model.complete(x, observed).unique().tolist() in ([0.0], [1.0], [0.0, 1.0])  # nothing of x is looked at
    with pytest.raises(ImageError, match="binarize"):
        model.complete(x, ~observed)
    with pytest.raises(ImageError, match="mask of zeros and ones"):
        model.complete(x, observed + 0.5)
    with pytest.raises(ImageError, match="does not fit"):
        model.complete(x, observed[..., :2])
    with pytest.raises(ImageError, match="expected images of shape"):
        model.complete(x[0], observed)


def test_training_leaves_masked_weights_as_they_are() -> None:
    model = FVBN(SHAPE, "random")
    model.training_loss(torch.randint(2, (8, *SHAPE)).float()).backward()
    position = model.pixel_order.argsort()
    is_present = position < position.unsqueeze(1)
    assert not model.weight.grad[~is_present].any()
    assert is_present.sum() == 6 * 5 / 2


def plain_loop(x: Tensor, weight_in: Tensor, weight_out: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """NADE as its paper writes it: one pixel after the other."""
    a, logits = c.expand(len(x), -1), []
    for i in range(x.shape[1]):
        logits.append(b[i] + torch.sigmoid(a) @ weight_out[i])
        a = a + x[:, i : i + 1] * weight_in[i]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("on", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("block", [1, 4, 5, 28])
def test_the_fast_form_of_nade_equals_the_loop_over_pixels(block: int, on: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand((6, 13), generator=generator) < on).double()
    shapes = [(13, 3), (13, 3), (13,), (3,)]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    fast, slow = nade_logits(x, *weights, block=block), plain_loop(x, *weights)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    signs = torch.randn(fast.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((fast * signs).sum(), weights),
        torch.autograd.grad((slow * signs).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *w: nade_logits(x[:2], *w, block=block), weights)


def test_the_loss_of_eonade_estimates_the_mean_over_all_orders() -> None:
    shape = (1, 1, 3)
    model = build("eonade, one layer", event_shape=shape, num_orders=6)
    model.pixel_orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    x = torch.tensor([[[[1.0, 0.0, 1.0]]]], dtype=torch.float64)
    exact = -model.log_prob_by_order(x).mean().item()
    torch.manual_seed(0)
    with torch.no_grad():
        losses = torch.stack([model.training_loss(x.expand(1000, -1, -1, -1)) for _ in range(50)])
    assert abs(losses.mean().item() - exact) < 4 * losses.std().item() / math.sqrt(50)


@pytest.mark.parametrize("model", [FVBN(SHAPE), NADE(SHAPE, 4), MADE(SHAPE, (9,)), EoNADE(SHAPE, (5,), num_orders=2)])
def test_training_starts_at_the_mean_image(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand((500, *SHAPE), generator=generator) < torch.linspace(0, 0.9, 6).view(SHAPE)).to(torch.uint8)
    before = -model.log_prob(images).mean()
    model.initialize(images)
    independent = Bernoulli(SHAPE)
    independent.fit_statistics(independent.statistics(images))
    floor = -independent.log_prob(images).mean()
    after = -model.log_prob(images).mean()
    assert after < before
    if isinstance(model, FVBN):  # its weights start at zero
        torch.testing.assert_close(after, floor)


@pytest.mark.parametrize("name", [*IN_ONE_ORDER, *MIXTURES])
def test_orders_and_masks_are_computed_and_no_part_of_the_weights(name: str) -> None:
    model = build(name, **({} if name in MIXTURES else {"order": "random"}))
    assert all(tensor.is_floating_point() for tensor in model.state_dict().values())
    twin = type(model)(**model.hparams)
    twin.double().load_state_dict(model.state_dict())
    x = torch.randint(2, (5, *SHAPE))
    assert torch.equal(twin.log_prob(x), model.log_prob(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: NADE(SHAPE, 0),
        lambda: NADE(SHAPE, order="sideways"),
        lambda: MADE(SHAPE, ()),
        lambda: MADE(SHAPE, (4,), num_orders=0),
        lambda: MADE(SHAPE, (4,), dropout=1.0),
        lambda: EoNADE(SHAPE, (4, 0)),
        lambda: EoNADE(SHAPE, num_orders=0),
        lambda: Markov(SHAPE, memory=-1),
        lambda: Markov(SHAPE, pseudo_count=0.0),
        lambda: ChainRuleTable((1, 5, 5)),
    ],
)
def test_options_without_sense_are_refused(build: Callable[[], ExplicitModel]) -> None:
    with pytest.raises(OptionError):
        build()


def test_eonade_sees_centred_inputs() -> None:
    """Its conditionals are a network of (x - mean image) * m and m - mean(m), m the mask of the pixels before."""
    model = build("eonade", num_orders=2, layer_norm=True)
    x = all_images(SHAPE).double()
    model.initialize(x[-20:].to(torch.uint8))
    for index, order in enumerate(model.pixel_orders):
        logits = model.conditional_logits(x, index).flatten(1)
        for d, pixel in enumerate(order):
            mask = torch.zeros(6, dtype=torch.float64).index_fill(0, order[:d], 1.0)
            a = (x.flatten(1) - model.mean_image) * mask @ model.W + (mask - mask.mean()) @ model.U + model.c
            hidden = model.norms[1](model.hidden[0](model.norms[0](a).relu())).relu()
            assert torch.allclose(logits[:, pixel], hidden @ model.V[pixel] + model.b[pixel])


def test_a_mixture_is_evaluated_beside_its_first_order() -> None:
    model = build("made, mixture")
    x = all_images(SHAPE)
    assert [figure.name for figure in figures_of(model, 1)] == ["nll", "nll_first_order"]
    found = {figure.name: score(model, x, range(len(x)), figure) for figure in figures_of(model, 1)}
    assert torch.allclose(found["nll"], model.log_prob(x))
    assert torch.allclose(found["nll_first_order"], bernoulli_log_prob(model.conditional_logits(x.double(), 0), x))
    assert [figure.name for figure in figures_of(MADE(SHAPE, num_orders=1), 1)] == ["nll"]


@pytest.mark.parametrize("order", ORDERS)
def test_given_pixels_after_the_first_missing_one_are_ignored(order: str) -> None:
    model = NADE(SHAPE, 5, order)
    for mask in all_images(SHAPE).bool():
        in_order = mask.flatten()[model.pixel_order]
        first = int((~in_order).long().argmax()) if not in_order.all() else mask.numel()
        late = model.pixel_order[first:][in_order[first:]]
        assert model.num_ignored(mask).tolist() == [len(late)]
    assert model.num_ignored(all_images(SHAPE)).shape == (64,)


def test_a_mixture_ignores_what_its_best_order_ignores() -> None:
    bottom = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert MADE(SHAPE, (5,), order="raster").num_ignored(bottom).tolist() == [3]
    assert MADE(SHAPE, (5,), 2, ("raster", "raster_rot180")).num_ignored(bottom).tolist() == [0]
    assert EoNADE(SHAPE, (5,)).num_ignored(bottom).tolist() == [0]
    with pytest.raises(ImageError, match="does not fit"):
        EoNADE(SHAPE, (5,)).num_ignored(torch.zeros(3, 3))
