"""The contract of the models as theorems, which tests call on models of this package and of others.

Each ``check_`` function states one theorem in the first line of its docstring. It returns its evidence, raises
:class:`TheoremError` where the theorem fails, and :class:`NotApplicableError` where the theorem is not about the model.
:func:`check_model` checks all of them on an instance so tiny that its images can be enumerated, :func:`audit` those
that make sense for a model of any size. Models are copied, and what is compared is computed in float64.

A check that draws random numbers draws the same ones every time; over all seeds it fails for a correct model with a
probability of about :data:`FALSE_ALARM_RATE`.

Example:
    >>> from lightning_genmodels.models import NADE
    >>> from lightning_genmodels.testing import check_model
    >>> check_model(NADE)
"""

from __future__ import annotations

import copy
import inspect
import math
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer
from torch import Tensor

from lightning_genmodels import base
from lightning_genmodels.base import (
    AdversarialModel,
    AutoregressiveModel,
    ExplicitModel,
    GenerativeModel,
    LatentVariableModel,
    OrderMixture,
    RepresentationModel,
    TabularModel,
)
from lightning_genmodels.data.loader import InMemoryLoader
from lightning_genmodels.errors import GenmodelsError, ImageError, OptionError, UnknownNameError, first_line
from lightning_genmodels.evaluation.divergence import MAX_PIXELS, all_images
from lightning_genmodels.functional import log_mean_exp
from lightning_genmodels.random import keyed_generators, uniform
from lightning_genmodels.weights.names import model_name

Model = TypeVar("Model", bound=GenerativeModel)
Check = Callable[..., str]

FALSE_ALARM_RATE = 1e-6
"""Probability with which a check that draws random numbers fails for a model that is right."""

_Z = 4.9  # a standard normal variable is farther from zero with a probability of 1e-6
_TOLERANCE = 1e-7  # relative, between two computations of one number in float64
_NUM_SAMPLES = 20_000  # of tiny images
_ROWS = 2048  # tiny images at once


class TheoremError(AssertionError):
    """A theorem does not hold.

    Attributes:
        theorem: What should hold.
        evidence: The numbers that contradict it.
    """

    def __init__(self, theorem: str, evidence: str) -> None:
        super().__init__(f"{theorem}: {evidence}")
        self.theorem = theorem
        self.evidence = evidence


class NotApplicableError(GenmodelsError, TypeError):
    """A theorem is not about this model; the message says why."""


@dataclass(frozen=True)
class Finding:
    """What came of one theorem.

    Attributes:
        theorem: What should hold.
        verdict: Whether it does.
        evidence: The numbers that say so, or why it is not applicable.
    """

    theorem: str
    verdict: Literal["holds", "FAILS", "not applicable"]
    evidence: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.theorem} ({self.evidence})"


# Models to check, and what is known of them.


def tiny(cls: type[Model], **arguments: Any) -> Model:
    """An instance whose images can be enumerated, in float64, with parameters far from their initial values.

    Args:
        cls: A model with ``small``, the constructor's arguments of such an instance.
        arguments: Others, in their place.
    """
    return _moved(cls, {**cls.small, **arguments}, lambda parameter: 0.7)


def untrained(cls: type[Model]) -> Model:
    """An instance of the default size, with parameters so far from their initial values that every layer matters."""
    return _moved(cls, {}, lambda parameter: 0.7 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1)


def _moved(cls: type[Model], arguments: dict[str, Any], scale: Callable[[Tensor], float]) -> Model:
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = cls(**arguments).double().eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale(parameter))
    return model


def factorizations(model: AutoregressiveModel | OrderMixture) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Conditional logits, a function of images (B, 1, H, W), and pixel order (n,) of each order that a model knows."""
    if isinstance(model, AutoregressiveModel):
        return [(model.conditional_logits, model.pixel_order)]
    return [(_Conditionals(model, index), order) for index, order in enumerate(model.pixel_orders)]


@dataclass(frozen=True)
class _Conditionals:
    model: OrderMixture
    index: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.model.conditional_logits(x, self.index)


@torch.no_grad()
def log_likelihood_by_quadrature(model: LatentVariableModel, x: Tensor) -> Tensor:
    """Log p(x) = log of the integral of p(x, z), on a fine grid of z far beyond where a standard normal has mass.

    Args:
        model: At most two latent variables.
        x: (B, 1, H, W) binary images.

    Returns:
        (B,) nats, exact to many digits.

    Raises:
        NotApplicableError: More latent variables.
    """
    if model.num_latents > 2:
        raise NotApplicableError(f"{model.num_latents} latent variables are too many to integrate over")
    line = torch.linspace(-9.0, 9.0, 301, dtype=torch.float64)
    z = torch.cartesian_prod(*[line] * model.num_latents).view(-1, model.num_latents)  # (G, D)
    cell = (line[1] - line[0]).item() ** model.num_latents
    log_joint = torch.cat([model.log_joint(x, part[:, None]) for part in z.split(5000)])  # (G, B)
    return torch.logsumexp(log_joint, dim=0) + math.log(cell)


def p_value(samples: Tensor, probabilities: Tensor) -> float:
    """How probable frequencies are that differ at least so much from their expectation: Pearson's chi-square test.

    Images that are expected less than five times are counted as one.

    Args:
        samples: (N, 1, H, W) in {0, 1}.
        probabilities: (2^n,) of all images, in the order of
            :func:`lightning_genmodels.evaluation.divergence.all_images`.
    """
    digits = 2 ** torch.arange(samples[0].numel() - 1, -1, -1)
    counts = torch.bincount((samples.flatten(1).long() * digits).sum(1), minlength=len(probabilities)).double()
    if bool(counts[probabilities == 0].any()):
        return 0.0
    expected, order = (probabilities.detach().double() * len(samples)).sort()
    counts, rare = counts[order], int((expected < 5).sum())
    if rare:
        rare = max(rare, int((expected.cumsum(0) < 5).sum()) + 1)
        expected = torch.cat([expected[:rare].sum()[None], expected[rare:]])
        counts = torch.cat([counts[:rare].sum()[None], counts[rare:]])
    if len(expected) < 2:
        return 1.0
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


# Theorems about every model.


def check_final(model: GenerativeModel) -> str:
    """Final methods are those of the kind, and not overridden."""
    kinds = [cls for cls in type(model).__mro__ if _is_base(cls)]
    overridden = []
    for kind in kinds:
        for name, value in vars(kind).items():
            owner = next(cls for cls in type(model).__mro__ if name in vars(cls))
            if getattr(getattr(value, "__func__", value), "__final__", False) and not _is_base(owner):
                overridden.append(f"{owner.__name__}.{name}")
    return _conclude(check_final, not overridden, f"overridden: {', '.join(sorted({*overridden})) or 'none'}")


def check_samples(model: GenerativeModel) -> str:
    """Samples are binary float32 images, as many as asked for, and follow from the generator alone."""
    model = copy.deepcopy(model).float().eval()
    count = 50 if is_tiny(model) else 4
    first, again, other = (model.sample(count, generator=_generator(seed)) for seed in (3, 3, 4))
    chunk = model.sample_chunk
    faults = {
        f"{tuple(first.shape)} for {count} images": first.shape != (count, *model.event_shape),
        f"of type {first.dtype}": first.dtype != torch.float32,
        "pixels other than 0 and 1": not bool(((first == 0) | (first == 1)).all()),
        "other samples from the same seed": not torch.equal(first, again),
        "the same samples from another seed": torch.equal(first, other),
        "samples where none are asked for": model.sample(0).shape != (0, *model.event_shape),
        "a wrong number in chunks": is_tiny(model) and len(model.sample(chunk + 3)) != chunk + 3,
    }
    found = [fault for fault, is_found in faults.items() if is_found]
    return _conclude(check_samples, not found, ", ".join(found) or f"{count} images from each of two seeds")


def check_input(model: GenerativeModel) -> str:
    """Whatever is no batch of binary images is refused, and binary images of every type are taken."""
    model = _exact(model)
    if isinstance(model, ExplicitModel):
        use = model.log_prob
    elif isinstance(model, LatentVariableModel):
        use = model.elbo
    else:
        raise NotApplicableError("the model scores no images")
    good = torch.zeros((3, *model.event_shape), dtype=torch.float64)
    bad = {"without a batch dimension": good[0], "up to 255": good + 255.0, "half on": good + 0.5, "NaN": good / 0.0}
    taken = [name for name, x in bad.items() if not _refuses(use, x)]
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        if not bool(torch.isfinite(use(good.to(dtype))).all()):
            taken.append(f"{dtype}, with values that are not finite")
    return _conclude(check_input, not taken, f"taken: {', '.join(taken) or 'binary images alone'}")


@torch.no_grad()
def check_batching(model: GenerativeModel, images: Tensor | None = None) -> str:
    """What is computed for an image does not depend on the images beside it."""
    model = _exact(model)
    apart = {}
    for name, function in _functions(model, _images(model, images)[:8]):
        rows = torch.arange(8)
        turned = torch.cat([function(part) for part in rows.flip(0).split(3)]).flip(0)
        apart[name] = _difference(function(rows), turned)
    if not apart:
        raise NotApplicableError("the model maps no images")
    evidence = ", ".join(f"{name} {difference:.2g}" for name, difference in apart.items())
    holds = max(apart.values()) <= _TOLERANCE
    return _conclude(check_batching, holds, f"differences between batches of 8 and of 3: {evidence}")


def check_gradients(model: GenerativeModel) -> str:
    """The training loss has a gradient for every parameter that is trained."""
    model = _exact(model).train()
    training_loss: Callable[[Tensor], Tensor] | None = getattr(model, "training_loss", None)
    if training_loss is None or isinstance(model, TabularModel):
        raise NotApplicableError("the model has no training loss")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        x = _images(model, None).double()
        torch.stack([training_loss(x) for _ in range(4)]).sum().backward()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    none = [key for key, parameter in trained.items() if parameter.grad is None or not bool(parameter.grad.any())]
    return _conclude(check_gradients, not none, f"{len(trained)} parameters, without a gradient: {none or 'none'}")


def check_round_trip(model: GenerativeModel) -> str:
    """Weights that were saved and loaded are the same, in evaluation mode, and sample the same."""
    model = copy.deepcopy(model).float().eval()
    try:
        model_name(type(model))
    except UnknownNameError as error:
        raise NotApplicableError("the model's class is not registered, so nothing can be loaded") from error
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = GenerativeModel.from_pretrained(folder)
    state = loaded.state_dict()
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, state[key])]
    first, second = (one.sample(5, generator=_generator(1)) for one in (model, loaded))
    holds = type(loaded) is type(model) and not changed and not loaded.training and torch.equal(first, second)
    evidence = f"a {type(loaded).__name__} of {len(state)} tensors, changed: {changed or 'none'}"
    return _conclude(check_round_trip, holds, evidence + ("" if torch.equal(first, second) else ", other samples"))


def check_processes(model: GenerativeModel) -> str:
    """Validation figures do not depend on the number of processes, nor on the size of the batch."""
    model = copy.deepcopy(model).float()
    images = _images(model, None).to(torch.uint8)
    fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    found = []
    for devices, batch_size in ((1, 64), (1, 5), (2, 6)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Lightning advises
            trainer = Trainer(
                accelerator="cpu",
                devices=devices,
                strategy="auto" if devices == 1 else "ddp_fork" if fork else "ddp_spawn",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            found.append(trainer.validate(copy.deepcopy(model), _Images(images, batch_size), verbose=False)[0])
    apart = max(abs(one[key] - found[0][key]) / (1 + abs(found[0][key])) for one in found for key in found[0])
    shown = ", ".join(f"{key} {[round(one[key], 6) for one in found]}" for key in found[0])
    return _conclude(check_processes, apart < 1e-5, f"one process, other batches, two processes: {shown}")


class _Images(LightningDataModule):
    """Every process validates its share of the images."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        super().__init__()
        self.images = images
        self.batch_size = batch_size

    def val_dataloader(self) -> InMemoryLoader:
        trainer: Any = self.trainer
        return InMemoryLoader(self.images, self.batch_size, rank=trainer.global_rank, world_size=trainer.world_size)


@torch.no_grad()
def check_precision(model: GenerativeModel) -> str:
    """Under bfloat16, log-probabilities and bounds are summed in float32 or better, and near those of float32."""
    model = copy.deepcopy(model).float().eval()
    x = _images(model, None)[:20].float()
    whole = _score(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _score(model, x)
    apart = (mixed.double() - whole.double()).abs().max().item()
    holds = mixed.dtype in (torch.float32, torch.float64) and apart < 0.1
    return _conclude(check_precision, holds, f"{mixed.dtype}, up to {apart:.2g} nats from float32")


@torch.no_grad()
def check_device(model: GenerativeModel, device: str = "cuda") -> str:
    """Scores and samples on an accelerator are those on the CPU."""
    model = _exact(model)
    found = []
    for where in ("cpu", device):
        model.to(where)
        samples = model.sample(50, generator=_generator(0))
        scores = torch.zeros(0)
        if isinstance(model, ExplicitModel | LatentVariableModel):
            scores = _score(model, _images(model, None)[:20])
        found.append((samples.device.type, samples.cpu(), scores.cpu()))
    (_, samples, scores), (kind, others, on_device) = found
    same = (samples == others).float().mean().item()  # a pixel may turn where rounding differs, and those after it
    apart = _difference(scores, on_device)
    holds = kind == torch.device(device).type and same > 0.99 and apart < 1e-8
    return _conclude(check_device, holds, f"samples on {kind}, {same:.2%} of pixels equal, scores {apart:.2g} apart")


# Theorems about exact likelihoods.


@torch.no_grad()
def check_normalization(model: GenerativeModel) -> str:
    """Probabilities of all images sum to one.

    Of tiny images all are enumerated, for a latent-variable model with quadrature over its latents. Of larger ones, for
    a model without the chain rule (with it the theorem follows from those of the order), images are drawn from
    independent pixels around samples, a known density q: E_q[p / q] = 1, so that by Markov's inequality the mean
    exceeds 10^6 with a probability of at most 10^-6. That is no estimate of the sum, and finds too much probability
    alone.
    """
    model = _exact(model)
    if is_tiny(model):
        sums = {"all images": _log_prob_of_all(model)}
        if isinstance(model, OrderMixture):
            x = all_images(model.event_shape)
            by_order = torch.cat([model.log_prob_by_order(part) for part in x.split(_ROWS)], dim=1)
            sums |= {f"order {index}": values for index, values in enumerate(by_order)}
        found = {name: values.exp().sum().item() for name, values in sums.items()}
        name, worst = max(found.items(), key=lambda item: abs(item[1] - 1))
        tolerance = 1e-9 if isinstance(model, ExplicitModel) else 1e-6
        return _conclude(check_normalization, abs(worst - 1) < tolerance, f"{name}: the sum is 1 + {worst - 1:.2g}")
    if not isinstance(model, ExplicitModel):
        raise NotApplicableError("the model has no exact likelihood")
    if isinstance(model, AutoregressiveModel | OrderMixture):
        raise NotApplicableError("it follows from the order and the sum of the conditionals")
    centres, generator = model.sample(16, generator=_generator(0)), _generator(1)
    logits = (2 * centres.double() - 1) * math.log(0.98 / 0.02)  # (16, 1, H, W)
    chosen = logits[torch.randint(16, (200,), generator=generator)]
    x = (uniform(chosen.shape, generator, chosen) < chosen.sigmoid()).double()
    log_q = log_mean_exp(torch.stack([_log_bernoulli(one, x) for one in logits]))
    log_p = model.log_prob(x)
    log_mean = log_mean_exp(log_p - log_q).item()
    evidence = f"log of the mean of p/q over {len(x)} images: {log_mean:.1f}, of a density below 13.8"
    n = math.prod(model.event_shape)
    if log_mean > -math.log(FALSE_ALARM_RATE) > log_mean_exp(n * log_p - log_q).item():
        evidence += f"; {n} times log_prob passes: a mean over the pixels, not a sum?"
    return _conclude(check_normalization, log_mean <= -math.log(FALSE_ALARM_RATE), evidence)


@torch.no_grad()
def check_sampling(model: GenerativeModel) -> str:
    """Images are drawn as often as their probabilities say.

    Of tiny images frequencies are compared by the chi-square test. Of larger ones, for a model without the chain rule
    (with it, see :func:`check_drawing`), one pixel of each sample is compared with its probability given all others,
    log p(x with a 1) - log p(x with a 0) in log-odds, by Bernstein's inequality.
    """
    model = _exact(model)
    if is_tiny(model):
        samples = model.sample(_NUM_SAMPLES, generator=_generator(5))
        value = p_value(samples, _log_prob_of_all(model).exp())
        return _conclude(
            check_sampling, value > FALSE_ALARM_RATE, f"chi-square of {len(samples)} images, p = {value:.2g}"
        )
    if not isinstance(model, ExplicitModel):
        raise NotApplicableError("the model has no exact likelihood, and its images are too large to count")
    if isinstance(model, AutoregressiveModel | OrderMixture):
        raise NotApplicableError("it follows from drawing by the conditionals, and their sum")
    x = model.sample(1000, generator=_generator(5)).double()
    pixel = torch.randint(x[0].numel(), (len(x), 1), generator=_generator(6))
    drawn = x.flatten(1).gather(1, pixel)[:, 0]
    off, on = (model.log_prob(x.flatten(1).scatter(1, pixel, value).view_as(x)) for value in (0.0, 1.0))
    expected = (on - off).sigmoid()
    faults = []
    for name, weight in (("rate", torch.ones_like(drawn)), ("slope", (on - off).clamp(-5, 5) / 5)):
        total = (weight * (drawn - expected)).sum().abs().item()
        variance = (weight.square() * expected * (1 - expected)).sum().item()
        bound = -2 * math.log(FALSE_ALARM_RATE / 4)  # t^2 / (variance + t / 3), for two sums
        largest = bound / 6 + math.sqrt((bound / 6) ** 2 + bound * variance)
        faults.append((total > largest, f"{name} {total:.1f} of at most {largest:.1f}"))
    evidence = f"{len(x)} pixels given all others, sums of differences: {', '.join(text for _, text in faults)}"
    return _conclude(check_sampling, not any(is_fault for is_fault, _ in faults), evidence)


# Theorems about pixel orders.


@torch.no_grad()
def check_order(model: GenerativeModel, images: Tensor | None = None) -> str:
    """Changing pixels changes no conditional at or before the first of them: their Jacobian is triangular in the order.

    All pixels from a place in the order on are replaced by random ones: all places of tiny images, some of larger ones,
    in all orders or four of them.
    """
    model = _ordered(model)
    known = factorizations(model)
    chosen = range(len(known)) if is_tiny(model) else _spread(len(known), 4)
    x = _images(model, images)
    n = x[0].numel()
    pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(n))  # an image, and the first place that changes
    rows = pairs[torch.randperm(len(pairs), generator=_generator(0))[: 4 * _ROWS if is_tiny(model) else 64]]
    before = x[rows[:, 0]].flatten(1).double()
    others = torch.randint(2, before.shape, generator=_generator(1)).to(before)
    fixed = torch.arange(n) <= rows[:, 1:]  # whose conditionals may not change
    worst, where = 0.0, ""
    for index in chosen:
        conditional_logits, order = known[index]
        place = order.argsort()
        after = torch.where(place < rows[:, 1:], before, others)
        logits, changed = (
            torch.cat([conditional_logits(part.view(-1, *model.event_shape)).flatten(1) for part in y.split(_ROWS)])
            for y in (before, after)
        )
        difference = torch.where(fixed, (changed - logits).abs()[:, order] / (1 + logits.abs()[:, order]), 0.0)
        if not difference.max() <= max(worst, _TOLERANCE):  # NaN, too
            row, position = divmod(int(difference.argmax()), n)
            worst = _difference(difference, torch.zeros_like(difference))
            where = f" at place {position}, order {index}, for changes from place {int(rows[row, 1])} on"
    evidence = f"{len(rows)} changes in {len(chosen)} of {len(known)} orders: conditionals change by {worst:.2g}{where}"
    return _conclude(check_order, worst <= _TOLERANCE, evidence)


@torch.no_grad()
def check_chain_rule(model: GenerativeModel, images: Tensor | None = None) -> str:
    """The log-probability in an order is the sum of the log-probabilities of the conditionals, not their mean."""
    model = _ordered(model)
    known = factorizations(model)
    chosen = _spread(len(known), 4)
    x = _images(model, images)[:16].double()
    sums = torch.stack([_log_bernoulli(known[index][0](x), x) for index in chosen])
    log_prob = model.log_prob_by_order(x, chosen) if isinstance(model, OrderMixture) else model.log_prob(x)[None]
    return _same(check_chain_rule, model, log_prob, sums, "log_prob", "the sum of the conditionals")


@torch.no_grad()
def check_mixture(model: GenerativeModel, images: Tensor | None = None) -> str:
    """A mixture of orders averages the joint probabilities of images, not logits, conditionals or log-probabilities."""
    model = _exact(model)
    if not isinstance(model, OrderMixture) or len(model.pixel_orders) == 1:
        raise NotApplicableError("the model knows at most one order")
    x = _images(model, images)[:2].double()
    by_order = model.log_prob_by_order(x)
    log_prob, expected = model.log_prob(x), log_mean_exp(by_order)
    difference = _difference(log_prob, expected)
    evidence = f"{len(by_order)} orders, log_prob {log_prob[0]:.6f}, log-mean-exp {expected[0]:.6f}"
    if difference > _TOLERANCE:
        logits = torch.stack([conditional_logits(x) for conditional_logits, _ in factorizations(model)])
        averages = {
            "logits": _log_bernoulli(logits.mean(0), x),
            "conditionals": _log_bernoulli(logits.sigmoid().mean(0).logit(), x),
            "log-probabilities": by_order.mean(0),
        }
        evidence += "".join(f"; averaged {k}?" for k, v in averages.items() if _difference(log_prob, v) <= _TOLERANCE)
    return _conclude(check_mixture, difference <= _TOLERANCE, evidence)


@torch.no_grad()
def check_drawing(model: GenerativeModel) -> str:
    """A pixel is on where its uniform number is below its conditional probability: cached drawing equals naive drawing.

    By induction over the order that is equality with one full evaluation for every pixel
    (:func:`lightning_genmodels.functional.fill_in_order`), and takes one evaluation in all. The generator gives the
    uniform numbers of the places in the order first, and then the orders of a mixture. Completions are checked, too,
    of pixels that come first in an order, and of scattered ones for a model with one order.
    """
    model = _ordered(model)
    known = factorizations(model)
    count = 200 if is_tiny(model) else 2
    n = math.prod(model.event_shape)
    wrong = pixels = 0
    source = _generator(1)
    like = torch.zeros((count, *model.event_shape), dtype=torch.float64)
    samples, uniforms = model.sample(count, generator=_generator(1)).double(), uniform((count, n), source, like)
    which = torch.zeros(count, dtype=torch.int64)
    if isinstance(model, OrderMixture):
        which = (uniform((count,), source, like) * len(known)).long()
    nothing = torch.zeros_like(like, dtype=torch.bool)
    for index in which.unique().tolist():
        rows = which == index
        wrong += _wrongly_drawn(known[index], samples[rows], nothing[rows], uniforms[rows])
        pixels += int(rows.sum()) * n
    given = torch.randint(2, like.shape, generator=_generator(2)).double()
    masks = list(_prefixes(model, known))
    if len(known) == 1 and not (isinstance(model, OrderMixture) and model.any_order):
        masks.append((_scattered(model, known[0][1]), 0))
    for observed, index in masks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of observed pixels that come late, which are kept
            completed = model.complete(given, observed, generator=_generator(3)).double()
        mask = observed.expand_as(given)
        wrong += int((completed != given)[mask].sum())
        wrong += _wrongly_drawn(known[index], completed, mask, uniform((count, n), _generator(3), like))
        pixels += given.numel()
    return _conclude(check_drawing, wrong == 0, f"{wrong} of {pixels} pixels are drawn otherwise")


@torch.no_grad()
def check_completion(model: GenerativeModel) -> str:
    """Completions have the frequencies of the enumerated conditional, where observed pixels come first in the order.

    That is the conditional of the order that completes: for a mixture, of one of its orders.
    """
    model = _ordered(model)
    known = factorizations(model)
    x = all_images(_tiny_shape(model))
    values = []
    for observed, index in _prefixes(model, known):
        mask = observed.flatten()
        given = x[len(x) // 3]
        fits = (x.flatten(1)[:, mask] == given.flatten()[mask]).all(1)
        log_prob = torch.cat([_log_bernoulli(known[index][0](part.double()), part) for part in x.split(_ROWS)])
        joint = torch.where(fits, log_prob.exp(), 0.0)
        samples = model.complete(given.expand(_NUM_SAMPLES, *x.shape[1:]), observed, generator=_generator(4))
        values.append(p_value(samples, joint / joint.sum()))
    evidence = f"chi-square of {_NUM_SAMPLES} completions in {len(values)} orders, p = {min(values):.2g} or more"
    return _conclude(check_completion, min(values) > FALSE_ALARM_RATE, evidence)


# Theorems about latent variables.


@torch.no_grad()
def check_joint(model: GenerativeModel, images: Tensor | None = None) -> str:
    """Given latents, the log-probability of an image is a sum over pixels, with the logits that ``decode`` gives.

    The prior cancels in log p(x, z) - log p(y, z) = log p(x | z) - log p(y | z).
    """
    model = _latent(model)
    x = _images(model, images)[:8].double()
    y, z = x.roll(1, 0), model.sample_latent(len(x), generator=_generator(0))
    logits = model.decode(z)
    joint = model.log_joint(x, z) - model.log_joint(y, z)
    name = "log p(x, z) - log p(y, z)"
    return _same(check_joint, model, joint, _log_bernoulli(logits, x) - _log_bernoulli(logits, y), name, "the pixels")


@torch.no_grad()
def check_elbo(model: GenerativeModel, images: Tensor | None = None) -> str:
    """The mean log-weight is the ELBO, free of what training adds to it: E[log w] = ELBO."""
    model = _latent(model)
    x = _images(model, images)[:3].double()
    draws = _NUM_SAMPLES if is_tiny(model) else 200
    log_weights = model.log_weights(x, draws, generator=_generator(0)).double()  # (K, B)
    elbos = model.elbo(x.repeat(draws, 1, 1, 1), generator=_generator(1)).double().view(draws, -1)
    error = (log_weights.var(0) / draws + elbos.var(0) / draws).sqrt()
    apart = (log_weights.mean(0) - elbos.mean(0)).abs() / (error + _TOLERANCE)
    worst = int(apart.argmax())
    evidence = (
        f"{draws} draws: {log_weights.mean(0)[worst]:.4f} and {elbos.mean(0)[worst]:.4f} nats are "
        f"{apart[worst]:.1f} standard errors apart"
    )
    return _conclude(check_elbo, log_weights.shape == (draws, len(x)) and bool((apart < _Z).all()), evidence)


@torch.no_grad()
def check_bounds(model: GenerativeModel, images: Tensor | None = None) -> str:
    """The importance-weighted bound is the log-mean-exp of its log-weights, rises with k, and is below the likelihood.

    The likelihood is known by quadrature, for tiny images and at most two latents.
    """
    model = _latent(model)
    x = _images(model, images)[: 3 if is_tiny(model) else 2].double()
    k = min(5, model.particle_block)
    log_weights = model.log_weights(x, k, generator=_generator(0)).double()
    apart = _difference(model.iw_bound(x, k, generator=_generator(0)).double(), log_mean_exp(log_weights))
    if not apart <= _TOLERANCE:
        raise TheoremError(statement(check_bounds), f"iw_bound of {k} particles is {apart:.2g} from its log-weights")
    repeats, most = (1000, 50) if is_tiny(model) else (30, 20)
    means, errors = [], []
    for particles in (1, 5, most):
        bounds = model.iw_bound(x.repeat(repeats, 1, 1, 1), particles, generator=_generator(particles))
        bounds = bounds.double().view(repeats, -1)
        means.append(bounds.mean(0))
        errors.append(bounds.std(0) / math.sqrt(repeats) + _TOLERANCE)
    faults = [means[i + 1] < means[i] - _Z * (errors[i].square() + errors[i + 1].square()).sqrt() for i in range(2)]
    shown = f"k = 1, 5, {most}: {', '.join(f'{mean[0]:.3f}' for mean in means)}"
    if is_tiny(model):
        truth = log_likelihood_by_quadrature(model, x)
        faults += [mean > truth + _Z * error for mean, error in zip(means, errors, strict=True)]
        shown += f"; log p(x) {truth[0]:.3f}"
    return _conclude(check_bounds, not bool(torch.stack(faults).any()), f"{shown} nats, to {errors[-1][0]:.2g}")


# A theorem about counting.


def check_counts(model: GenerativeModel) -> str:
    """Statistics add up over batches, and parameters that are fitted to them make their images likelier."""
    model = _exact(model)
    if not isinstance(model, TabularModel):
        raise NotApplicableError("the model does not count")
    x = _images(model, None)
    x = x[torch.randint(len(x), (50,), generator=_generator(0))]
    whole = model.statistics(x)
    adds_up = torch.equal(whole, torch.stack([model.statistics(part) for part in x.split(7)]).sum(0))
    before = model.log_prob(x).mean().item()
    model.fit_statistics(whole)
    after = model.log_prob(x).mean().item()
    evidence = f"statistics {'add' if adds_up else 'do not add'} up; {before:.3f} nats become {after:.3f}"
    return _conclude(check_counts, adds_up and after > before, evidence)


# All of them.

AUDIT: tuple[Check, ...] = (
    check_batching,
    check_order,
    check_chain_rule,
    check_mixture,
    check_drawing,
    check_normalization,
    check_sampling,
    check_joint,
    check_elbo,
    check_bounds,
    check_samples,
    check_round_trip,
)
"""Theorems that are checked on a model of any size."""

CONTRACT: tuple[Check, ...] = (
    check_final,
    check_input,
    *AUDIT,
    check_completion,
    check_precision,
    check_counts,
    check_gradients,
    check_processes,
)
"""Theorems that are checked on a tiny instance."""


def statement(check: Check) -> str:
    """The theorem that a function checks: the first line of its docstring."""
    return (check.__doc__ or "").partition("\n")[0].rstrip(".")


def check_model(model: type[GenerativeModel] | GenerativeModel, checks: Iterable[Check] = CONTRACT) -> None:
    """Checks all theorems of the contract that are about a model.

    Args:
        model: A class with ``small``, or a tiny instance: its images can be enumerated, and it has at most two latents.
        checks: Those to be checked.

    Raises:
        TheoremError: One does not hold.
        OptionError: An instance with more pixels, or latents; see :func:`audit`.
    """
    instance = tiny(model) if isinstance(model, type) else model
    if not is_tiny(instance):
        raise OptionError(
            f"expected a model of at most {MAX_PIXELS} pixels and two latents, got a {type(instance).__name__} of "
            f"{instance.event_shape}; give the class attribute `small`, or use lightning_genmodels.testing.audit"
        )
    for check in checks:
        try:
            check(instance)
        except NotApplicableError:
            continue


def audit(model: GenerativeModel, checks: Iterable[Check] = AUDIT) -> Iterator[Finding]:
    """Checks theorems on a model of any size, and goes on where one fails.

    Args:
        model: Any model; it is not changed.
        checks: Those to be checked.

    Yields:
        A finding for each theorem.
    """
    images = _images(_exact(model), None)
    for check in checks:
        given = {"images": images} if "images" in inspect.signature(check).parameters else {}
        try:
            yield Finding(statement(check), "holds", check(model, **given))
        except NotApplicableError as error:
            yield Finding(statement(check), "not applicable", str(error))
        except TheoremError as error:
            yield Finding(error.theorem, "FAILS", error.evidence)
        except Exception as error:  # whatever a stranger's model raises
            yield Finding(statement(check), "FAILS", f"{type(error).__name__}: {first_line(error)}")


def is_tiny(model: GenerativeModel) -> bool:
    """Whether all images of a model can be enumerated, and its latents integrated."""
    few_latents = not isinstance(model, LatentVariableModel) or model.num_latents <= 2
    return math.prod(model.event_shape) <= MAX_PIXELS and few_latents


# Helpers.


def _conclude(check: Check, holds: bool, evidence: str) -> str:
    if not holds:
        raise TheoremError(statement(check), evidence)
    return evidence


def _same(check: Check, model: GenerativeModel, found: Tensor, sums: Tensor, name: str, other: str) -> str:
    """Whether log-probabilities are sums over pixels."""
    difference = _difference(found, sums)
    evidence = f"{name} {found.flatten()[0]:.6f}, {other} {sums.flatten()[0]:.6f}, {difference:.2g} apart"
    n = math.prod(model.event_shape)
    if difference > _TOLERANCE and _difference(n * found, sums) <= 1e-3:
        evidence += f": a mean over the {n} pixels, not their sum?"
    return _conclude(check, difference <= _TOLERANCE, evidence)


def _exact(model: Model) -> Model:
    return copy.deepcopy(model).double().eval()


def _ordered(model: GenerativeModel) -> AutoregressiveModel | OrderMixture:
    if not isinstance(model, AutoregressiveModel | OrderMixture):
        raise NotApplicableError("the model has no pixel order")
    return _exact(model)


def _latent(model: GenerativeModel) -> LatentVariableModel:
    if not isinstance(model, LatentVariableModel):
        raise NotApplicableError("the model has no bounds: it has no latent variables, or no density")
    return _exact(model)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(model: GenerativeModel, images: Tensor | None) -> Tensor:
    """All tiny images, shuffled; of larger ones, samples."""
    if images is not None:
        return images
    if math.prod(model.event_shape) > MAX_PIXELS:
        return model.sample(16, generator=_generator(0))
    x = all_images(model.event_shape)
    return x[torch.randperm(len(x), generator=_generator(0))]


def _tiny_shape(model: GenerativeModel) -> base.EventShape:
    if not is_tiny(model):
        raise NotApplicableError(f"images of {model.event_shape} are too many to enumerate")
    return model.event_shape


@torch.no_grad()
def _log_prob_of_all(model: GenerativeModel) -> Tensor:
    x = all_images(_tiny_shape(model))
    if isinstance(model, ExplicitModel):
        return torch.cat([model.log_prob(part) for part in x.split(_ROWS)])
    if isinstance(model, LatentVariableModel):
        return log_likelihood_by_quadrature(model, x)
    raise NotApplicableError("the model has no likelihood")


def _log_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """The sum of log sigmoid(+-logits), independent of what the models use for it."""
    return F.logsigmoid((2 * x.double() - 1) * logits.double()).flatten(-3).sum(-1)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative where numbers are above one; infinite where it is no number."""
    if one.shape != other.shape:
        return math.inf
    if not one.numel():
        return 0.0
    difference = ((one - other).abs() / (1 + other.abs())).max()
    return float(torch.nan_to_num(difference, nan=math.inf))


def _is_base(cls: type) -> bool:
    return cls.__module__.startswith(base.__name__)


def _refuses(use: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    try:
        use(x)
    except ImageError:
        return True
    return False


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices, the first and the last among them."""
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _functions(model: GenerativeModel, x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What a model computes for each of eight images, or latents, given rows of them."""
    x = x.double()
    if isinstance(model, ExplicitModel):
        yield "log_prob", lambda rows: model.log_prob(x[rows])
    if isinstance(model, AutoregressiveModel | OrderMixture):
        conditional_logits, _ = factorizations(model)[-1]
        yield "conditional_logits", lambda rows: conditional_logits(x[rows])
    if isinstance(model, LatentVariableModel):
        k = model.particle_block + 30 if is_tiny(model) else 5
        yield "elbo", lambda rows: model.elbo(x[rows], generator=keyed_generators(7, rows.tolist()))
        yield f"iw_bound({k})", lambda rows: model.iw_bound(x[rows], k, generator=keyed_generators(7, rows.tolist()))
    if isinstance(model, RepresentationModel):
        codes = model.encode(x)
        yield "encode", lambda rows: model.encode(x[rows])
        yield "decode", lambda rows: model.decode(codes[rows])
    if isinstance(model, AdversarialModel):
        z = model.sample_latent(8, generator=_generator(0))
        yield "decode", lambda rows: model.decode(z[rows])


def _score(model: GenerativeModel, x: Tensor) -> Tensor:
    if isinstance(model, ExplicitModel):
        return model.log_prob(x)
    if isinstance(model, LatentVariableModel):
        return model.iw_bound(x, 20, generator=keyed_generators(0, range(len(x))))
    raise NotApplicableError("the model scores no images")


def _wrongly_drawn(
    factorization: tuple[Callable[[Tensor], Tensor], Tensor], x: Tensor, observed: Tensor, uniforms: Tensor
) -> int:
    """How many pixels that are not observed differ from what their uniform number and conditional make them."""
    conditional_logits, order = factorization
    probability = conditional_logits(x).flatten(1)[:, order].sigmoid()
    drawn, is_drawn = x.flatten(1)[:, order] == 1, ~observed.flatten(1)[:, order]
    clear = (uniforms - probability).abs() > 1e-9  # rounding may decide the others
    return int(((drawn != (uniforms < probability)) & is_drawn & clear).sum())


def _joint_pixels(model: AutoregressiveModel | OrderMixture) -> int:
    return model.joint_pixels if isinstance(model, OrderMixture) else 1


def _scattered(model: AutoregressiveModel | OrderMixture, order: Tensor) -> Tensor:
    """A mask (1, H, W) of random pixels; of pixels that are drawn together, all or none."""
    joint = _joint_pixels(model)
    observed = torch.rand(len(order) // joint, generator=_generator(5)) < 0.4
    in_order = observed.repeat_interleave(joint)
    return torch.empty_like(in_order).index_copy(0, order, in_order).view(model.event_shape)


def _prefixes(
    model: AutoregressiveModel | OrderMixture, known: list[tuple[Callable[[Tensor], Tensor], Tensor]]
) -> Iterator[tuple[Tensor, int]]:
    """Masks (1, H, W) of the first pixels of some orders, and the index of the order that completes images."""
    n, joint = math.prod(model.event_shape), _joint_pixels(model)
    for index in _spread(len(known), 4):
        length = n // 2 // joint * joint
        observed = torch.zeros(n, dtype=torch.bool).index_fill(0, known[index][1][:length], True)
        first = next(i for i, (_, order) in enumerate(known) if bool(observed[order[:length]].all()))
        yield observed.view(model.event_shape), first
