"""What every model with a pixel order must satisfy, enumerated over all images of a tiny shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_genmodels.base import AutoregressiveModel, ExplicitModel, OrderMixture
from lightning_genmodels.errors import ImageError, OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.evaluation.likelihood import figures_of, score
from lightning_genmodels.functional import bernoulli_log_prob, fill_in_order, log_mean_exp
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

SHAPE = (1, 2, 3)
ORDERS = ["raster", "raster_rot180", "raster_transpose", "snake", "spiral_out", "hilbert", "random"]

IN_ONE_ORDER: dict[str, Callable[[str], ExplicitModel]] = {
    "chain_rule_table": lambda order: ChainRuleTable(SHAPE, order),
    "fvbn": lambda order: FVBN(SHAPE, order),
    "made": lambda order: MADE(SHAPE, (9, 8), order=order),
    "markov": lambda order: Markov(SHAPE, 2, order),
    "nade": lambda order: NADE(SHAPE, 4, order),
}
ROW_BY_ROW: dict[str, Callable[[str], ExplicitModel]] = {
    "pixelcnn": lambda order: PixelCNN(SHAPE, 4, 2, 3, order=order),
    "gated_pixelcnn": lambda order: GatedPixelCNN(SHAPE, 4, 2, 3, order=order),
    "row_lstm": lambda order: RowLSTM(SHAPE, 4, 2, 3, order=order),
    "diagonal_bilstm": lambda order: DiagonalBiLSTM(SHAPE, 4, 2, 3, order=order),
}
MIXTURES: dict[str, Callable[[], OrderMixture]] = {
    "eonade": lambda: EoNADE(SHAPE, (5, 4), num_orders=3),
    "eonade, one layer": lambda: EoNADE(SHAPE, (5,), num_orders=2),
    "made": lambda: MADE(SHAPE, (9,), num_orders=3),
    "made, in turn": lambda: MADE(SHAPE, (9,), num_orders=3, order=["raster", "raster_transpose"]),
    "made, deep": lambda: MADE(SHAPE, (9, 7, 8), num_orders=2, order="raster"),
}


def randomized(model: Any) -> Any:
    """Parameters far from their initial values, in float64."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.double().eval()


def factorizations(model: ExplicitModel) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor, int]]:
    """Conditional logits, pixel order and index of each order that a model knows."""
    if isinstance(model, AutoregressiveModel):
        yield model.conditional_logits, model.pixel_order, 0
    elif isinstance(model, OrderMixture):
        for index, order in enumerate(model.pixel_orders):
            yield lambda x, index=index: model.conditional_logits(x, index), order, index


@pytest.fixture(
    params=[
        *((n, o) for n in IN_ONE_ORDER for o in ORDERS),
        *((n, o) for n in ROW_BY_ROW for o in RASTER_ORDERS),
        *((n, "") for n in MIXTURES),
    ],
    ids=str,
)
def model(request: pytest.FixtureRequest) -> Any:
    name, order = request.param
    return randomized({**IN_ONE_ORDER, **ROW_BY_ROW}[name](order) if order else MIXTURES[name]())


def test_no_conditional_sees_its_own_pixel_or_a_later_one(model: Any) -> None:
    images = all_images(SHAPE).double()
    for conditional_logits, order, _ in factorizations(model):
        logits = conditional_logits(images).flatten(1)[:, order]
        sees_something = False
        for i, pixel in enumerate(order.tolist()):
            flipped = images.clone()
            flipped.flatten(1)[:, pixel] = 1 - flipped.flatten(1)[:, pixel]
            changed = conditional_logits(flipped).flatten(1)[:, order] != logits
            assert not changed[:, : i + 1].any()
            sees_something |= bool(changed[:, i + 1 :].any())
        assert sees_something


def test_probabilities_of_all_images_sum_to_one(model: Any) -> None:
    images = all_images(SHAPE)
    torch.testing.assert_close(model.log_prob(images).exp().sum().item(), 1.0, rtol=0, atol=1e-12)
    if isinstance(model, OrderMixture):
        by_order = model.log_prob_by_order(images)
        torch.testing.assert_close(by_order.exp().sum(1), torch.ones(len(by_order), dtype=torch.float64))
        assert torch.equal(log_mean_exp(by_order), model.log_prob(images))


def test_drawing_equals_its_definition_from_the_same_random_numbers(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand((300, 6), generator=generator, dtype=torch.float64)
    x = torch.randint(2, (300, *SHAPE), generator=generator).double()
    nothing = torch.zeros_like(x, dtype=torch.bool)
    if isinstance(model, OrderMixture):
        which = torch.randint(len(model.pixel_orders), (300,), generator=generator)
        drawn = model._fill(x, nothing, uniforms, which)
        for conditional_logits, order, index in factorizations(model):
            expected = fill_in_order(conditional_logits, order, x, nothing, uniforms)
            assert torch.equal(drawn[which == index], expected[which == index])
    else:
        for observed in (nothing, torch.rand(x.shape, generator=generator) < 0.4):
            expected = fill_in_order(model.conditional_logits, model.pixel_order, x, observed, uniforms)
            assert torch.equal(model._fill(x, observed, uniforms), expected)


@pytest.mark.parametrize("name", ["fvbn", "made", "made, mixture", "nade", "eonade"])
def test_drawing_equals_its_definition_on_larger_images(name: str) -> None:
    shape = (1, 9, 7)
    models = {
        "fvbn": lambda: FVBN(shape, "spiral"),
        "nade": lambda: NADE(shape, 20, "hilbert"),
        "made": lambda: MADE(shape, (40, 90)),
        "made, mixture": lambda: MADE(shape, (40,), num_orders=2),
        "eonade": lambda: EoNADE(shape, (30, 20), num_orders=2),
    }
    model = models[name]().double().eval()
    uniforms = torch.rand((20, 63), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.zeros((20, *shape), dtype=torch.float64)
    observed = torch.zeros_like(x, dtype=torch.bool)
    for conditional_logits, order, index in factorizations(model):
        which = (torch.full((20,), index),) if isinstance(model, OrderMixture) else ()
        expected = fill_in_order(conditional_logits, order, x, observed, uniforms)
        assert torch.equal(model._fill(x, observed, uniforms, *which), expected)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean."""
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    freedom = int(possible.sum()) - 1
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return ((statistic - freedom) / math.sqrt(2 * freedom)).item()


def row(x: Tensor) -> Tensor:
    return (x.flatten(1).long() * 2 ** torch.arange(5, -1, -1)).sum(1)


def gently_randomized(model: Any) -> Any:
    """Parameters that leave every image likely enough to be counted."""
    model = randomized(model)
    for parameter in model.parameters():
        parameter.data *= 0.4
    return model


@pytest.mark.parametrize("name", [*IN_ONE_ORDER, *MIXTURES])
def test_samples_have_the_frequencies_that_the_probabilities_say(name: str) -> None:
    model = gently_randomized(MIXTURES[name]() if name in MIXTURES else IN_ONE_ORDER[name]("snake"))
    samples = model.sample(20_000, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(row(samples), minlength=64)
    assert abs(chi_square(counts, model.log_prob(all_images(SHAPE)).exp())) < 4


@pytest.mark.parametrize("name", list(IN_ONE_ORDER))
def test_completion_keeps_what_is_observed_and_is_exact_where_that_comes_first(name: str) -> None:
    model = gently_randomized(IN_ONE_ORDER[name]("raster_flip"))  # the bottom row comes first
    observed = torch.tensor([[False] * 3, [True] * 3])
    x = torch.tensor([[[[0, 0, 0], [1, 0, 1]]]]).expand(20_000, -1, -1, -1)
    completed = model.complete(x, observed, generator=torch.Generator().manual_seed(3))
    assert torch.equal(completed[..., 1, :], x[..., 1, :].float())
    images = all_images(SHAPE)
    fits = (images[:, 0, 1] == torch.tensor([1.0, 0.0, 1.0])).all(1)
    joint = torch.where(fits, model.log_prob(images).exp(), 0.0)
    counts = torch.bincount(row(completed), minlength=64)
    assert abs(chi_square(counts, joint / joint.sum())) < 4


def test_a_mixture_completes_in_the_order_that_has_the_observed_pixels_first() -> None:
    class Rows(MADE):
        """A mixture whose orders are known: from the top and from the bottom."""

        def __init__(self) -> None:
            super().__init__(SHAPE, (9,), num_orders=2, order="raster")
            self.pixel_orders = torch.stack([torch.arange(6), torch.tensor([3, 4, 5, 0, 1, 2])])

    model = gently_randomized(Rows())
    observed = torch.tensor([[False] * 3, [True] * 3])
    x = torch.tensor([[[[0, 0, 0], [1, 0, 1]]]]).expand(20_000, -1, -1, -1)
    completed = model.complete(x, observed, generator=torch.Generator().manual_seed(3))
    assert torch.equal(completed[..., 1, :], x[..., 1, :].float())
    images = all_images(SHAPE)
    fits = (images[:, 0, 1] == torch.tensor([1.0, 0.0, 1.0])).all(1)
    joint = torch.where(fits, model.log_prob_by_order(images)[1].exp(), 0.0)
    assert abs(chi_square(torch.bincount(row(completed), minlength=64), joint / joint.sum())) < 4


def test_eonade_completes_any_mask_in_an_order_of_its_own() -> None:
    model = gently_randomized(EoNADE(SHAPE, (5, 4), num_orders=1))
    order = model.pixel_orders[0]
    observed = torch.zeros(6, dtype=torch.bool)
    observed[order[3:]] = True  # what is observed comes last in the stored order
    x = torch.tensor([1, 0, 1, 1, 0, 1]).expand(20_000, 6).reshape(-1, *SHAPE)
    completed = model.complete(x, observed.view(SHAPE), generator=torch.Generator().manual_seed(3))
    model.pixel_orders = torch.cat([order[3:], order[:3]]).unsqueeze(0)
    images = all_images(SHAPE)
    fits = (images.flatten(1)[:, observed] == x[0].flatten()[observed]).all(1)
    joint = torch.where(fits, model.log_prob(images).exp(), 0.0)
    assert abs(chi_square(torch.bincount(row(completed), minlength=64), joint / joint.sum())) < 4


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


@pytest.mark.parametrize("name", ["fvbn", "made", "nade", "eonade"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = MIXTURES["eonade"]() if name == "eonade" else IN_ONE_ORDER[name]("raster")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_()
    for _ in range(20):  # the loss of a mixture is that of one order, drawn at random
        model.training_loss(torch.randint(2, (64, *SHAPE)).float()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


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
    model = gently_randomized(EoNADE(shape, (5,), num_orders=6))
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
    model: Any = MIXTURES[name]() if name in MIXTURES else IN_ONE_ORDER[name]("random")
    assert all(tensor.is_floating_point() for tensor in model.state_dict().values())
    twin = type(model)(**model.hparams)
    twin.load_state_dict(model.state_dict())
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
    model = randomized(EoNADE(SHAPE, (5, 4), num_orders=2, layer_norm=True))
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
    model = randomized(MIXTURES["made"]())
    x = all_images(SHAPE)
    assert [figure.name for figure in figures_of(model, 1)] == ["nll", "nll_first_order"]
    found = {figure.name: score(model, x, range(len(x)), figure) for figure in figures_of(model, 1)}
    assert torch.allclose(found["nll"], model.log_prob(x))
    assert torch.allclose(found["nll_first_order"], bernoulli_log_prob(model.conditional_logits(x.double(), 0), x))
    assert [figure.name for figure in figures_of(MADE(SHAPE, num_orders=1), 1)] == ["nll"]
