"""The uses of trained models that the app offers: complete, score, sample, draw pixel by pixel, decode latents.

An image is a text of 0 and 1, row by row from the top left; a mask of given pixels is one, too.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_genmodels.base import (
    AdversarialModel,
    AutoregressiveModel,
    CompletionModel,
    ExplicitModel,
    GenerativeModel,
    LatentVariableModel,
    OrderMixture,
    RepresentationModel,
)
from lightning_genmodels.data.images import read_images
from lightning_genmodels.errors import ImageError, OptionError, UnknownNameError, within
from lightning_genmodels.evaluation.likelihood import figures_of, score
from lightning_genmodels.evaluation.report import VALUES
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.system import tracked
from lightning_genmodels.weights.loading import load
from lightning_genmodels.weights.names import model_class
from lightning_genmodels.weights.records import Weights, registry

SIDE = 28
SHAPE = (1, SIDE, SIDE)
DIGITS = Path(__file__).parent / "digits.png"
MOST_IMAGES, MOST_DRAWS, MOST_SEED = 64, 8, 2**31
SLIDERS, PLANE = 8, 13

IDEAS = {
    "bernoulli": "Every pixel is ink with a chance of its own, whatever the others are.",
    "markov": "Every pixel looks at a few pixels before it, by a table of counts.",
    "fvbn": "Every pixel is a weighted vote of all pixels before it.",
    "nade": "Every pixel asks a small neural network that has read the pixels before it.",
    "made": "One network predicts all pixels at once, with the later ones masked; it averages several orders.",
    "eonade": "One network that can continue from any set of pixels, in any order.",
    "pixelcnn": "Every pixel looks at its neighbourhood above and to the left, through stacked filters.",
    "gated_pixelcnn": "A deeper PixelCNN with gates, that sees all pixels before.",
    "row_lstm": "A memory reads the picture row by row.",
    "diagonal_bilstm": "A memory reads the picture along its diagonals.",
    "pixelsnail": "Filters, and attention to any earlier part of the picture; draws patches of 2x2 pixels.",
    "vae": "A picture is a short code plus noise; one network reads codes, another draws from them.",
    "iwae": "A VAE trained with several guesses of the code.",
    "ladder_vae": "Codes at several scales, from the rough shape to fine strokes.",
    "autoencoder": "Squeezes a picture into a short code and unfolds it again.",
    "gan": "A forger and a detective, trained against each other.",
    "wgan_gp": "A GAN whose detective is kept smooth, so that the forger learns more steadily.",
}
"""By model, a sentence for somebody who has not heard of it."""


class Studio:
    """Trained models of 28x28 images, loaded when they are first used and kept."""

    def __init__(self) -> None:
        self._loaded: dict[str, GenerativeModel] = {}

    # The models.

    @cached_property
    def records(self) -> dict[str, Weights]:
        """Shipped weights of 28x28 images by name."""
        found = {name: record for name, record in registry().items() if record.folder is not None}
        return {name: record for name, record in found.items() if _size(record) == SIDE}

    @cached_property
    def digits(self) -> Tensor:
        """Test digits to start from, (40, 1, 28, 28)."""
        return read_images(DIGITS, SHAPE)

    def describe(self) -> dict[str, Any]:
        """Digits, and for each weight its name, idea, figure, size and uses; no model is loaded."""
        return {"digits": _texts(self.digits), "models": [_described(record) for record in self.records.values()]}

    def model(self, name: str) -> GenerativeModel:
        """A trained model by the name of its weights.

        Raises:
            UnknownNameError: No such weights, or of images of another size.
        """
        if name not in self.records:
            raise UnknownNameError("weight", name, self.records)
        if name not in self._loaded:
            self._loaded[name] = load(name)
        return self._loaded[name]

    # The uses. Arguments are what a page may send; results are JSON.

    def complete(self, name: str, image: str, observed: str, draws: int = 4, seed: int = 0) -> dict[str, Any]:
        """Draws the hidden pixels of an image, given the others.

        Args:
            name: Weights.
            image: 784 characters, 0 or 1.
            observed: 784 characters, 1 where a pixel is given.
            draws: Number of draws.
            seed: Seed of the draws.

        Returns:
            ``images``; ``badge``: exact, one_order, chain or ignores; ``note``: the same in words.

        Raises:
            OptionError: The model cannot complete, or a number is out of its range.
            ImageError: A text is no image, or nothing is hidden.
        """
        within(1, MOST_DRAWS + 1, draws=draws)
        model, x, mask = self.model(name), _image(image), _image(observed, "observed").bool()
        if bool(mask.all()):
            raise ImageError("expected hidden pixels, got an image that is given in full; hide some with the brush")
        if not isinstance(model, CompletionModel):
            raise OptionError(f"{name} cannot complete images; take one that can: nade, pixelsnail, vae")
        x, generator = x.expand(draws, *SHAPE), _generator(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say, the note says
            completed = model.complete(x, mask, generator=generator)
        badge, note = _exactness(model, mask)
        return {"images": _texts(completed), "badge": badge, "note": note}

    def score(self, name: str, image: str) -> dict[str, Any]:
        """How likely a model finds an image.

        Args:
            name: Weights.
            image: 784 characters, 0 or 1.

        Returns:
            ``nats``, of the negative log-likelihood or the bound on it that is published; ``is_bound``; ``estimator``;
            ``percentile``: percent of the test digits that are less likely; ``typical``: the median test digit's nats;
            ``surprise``: nats of each pixel; ``map``: how they are computed.

        Raises:
            OptionError: The model has no likelihood.
            ImageError: The text is no image.
        """
        model, x = self.model(name), _image(image)
        key = _figure(self.records[name])
        if key is None or not isinstance(model, ExplicitModel | LatentVariableModel):
            raise OptionError(f"{name} has no likelihood: it only draws; take one that scores: nade, pixelsnail, vae")
        values = self._values(name, key)
        particles = self.records[name].metrics["figures"][key].get("particles", 1)
        figure = next(one for one in figures_of(model, particles) if one.name == key)
        nats = -float(score(model, x, [0], figure))
        surprise, how = _surprise(model, x)
        return {
            "nats": round(nats, 2),
            "is_bound": isinstance(model, LatentVariableModel),
            "estimator": figure.estimator,
            "percentile": round(100 * float((values > nats).double().mean()), 1),
            "typical": round(float(values.median()), 2),
            "surprise": [round(value, 3) for value in surprise.flatten().tolist()],
            "map": how,
        }

    def sample(self, name: str, count: int = 16, seed: int = 0) -> dict[str, Any]:
        """Draws images.

        Raises:
            OptionError: A number is out of its range.
        """
        within(1, MOST_IMAGES + 1, count=count)
        return {"images": _texts(self.model(name).sample(count, generator=_generator(seed)))}

    def draw(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Draws one image, and says in which order, and how probable ink was at each pixel when its turn came.

        Returns:
            ``image``; ``order``: row-major indices of the pixels, first to last; ``probability``: of ink, by pixel.

        Raises:
            OptionError: The model does not draw pixel by pixel.
        """
        model, generator = self.model(name), _generator(seed)
        nothing = torch.zeros(SHAPE)
        if not isinstance(model, AutoregressiveModel | OrderMixture):
            raise OptionError(f"{name} draws all pixels at once; take one that draws pixel by pixel: nade, pixelcnn")
        x = model.complete(nothing[None], nothing, generator=generator)  # a mixture takes its first order
        order = model.pixel_orders[0] if isinstance(model, OrderMixture) else model.pixel_order
        with torch.no_grad():
            probability = _conditionals(model, x, 0).sigmoid()
        shares = [round(value, 3) for value in probability.flatten().tolist()]
        return {"image": _texts(x)[0], "order": order.tolist(), "probability": shares}

    def corners(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Four points between which to travel: codes of test digits, or latents drawn at random.

        Returns:
            ``codes``: four of them; ``sliders``: indices of the numbers that vary most among digits; ``spread``: their
            standard deviations.

        Raises:
            OptionError: The model has no codes.
        """
        model, generator = self.model(name), _generator(seed)
        if isinstance(model, AdversarialModel):
            codes = model.sample_latent(256, generator=generator)
        elif isinstance(model, RepresentationModel):
            with torch.no_grad():
                codes = model.encode(self.digits[torch.randperm(len(self.digits), generator=generator)])
        else:
            raise OptionError(f"{name} has no codes; take one that has: vae, gan, autoencoder")
        spread = codes.std(dim=0)
        sliders = spread.argsort(descending=True)[:SLIDERS]
        rounded = [[round(value, 4) for value in code] for code in codes[:4].tolist()]
        return {"codes": rounded, "sliders": sliders.tolist(), "spread": spread[sliders].tolist()}

    def decode(self, name: str, code: Sequence[float]) -> dict[str, Any]:
        """The image of one code: the probability of ink by pixel.

        Raises:
            OptionError: The model has no codes, or of another length.
        """
        return {"grey": self._grey(name, torch.tensor([list(code)], dtype=torch.float32))[0]}

    def plane(self, name: str, codes: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Images on a square grid between four codes, top left, top right, bottom left, bottom right.

        Returns:
            ``size``: of the grid; ``greys``: the probability of ink by pixel, row after row.

        Raises:
            OptionError: Not four codes, or of another length.
        """
        if len(codes) != 4 or len({len(code) for code in codes}) != 1:
            raise OptionError(
                f"expected four codes of the same length, got {len(codes)} of lengths {[*map(len, codes)]}"
            )
        share = torch.linspace(0.0, 1.0, PLANE)
        one, two, three, four = torch.tensor([list(code) for code in codes], dtype=torch.float32)
        top, bottom = (torch.lerp(a, b, share[:, None]) for a, b in ((one, two), (three, four)))
        points = torch.lerp(top[None], bottom[None], share[:, None, None]).flatten(0, 1)
        return {"size": PLANE, "greys": self._grey(name, points)}

    def _grey(self, name: str, codes: Tensor) -> list[str]:
        """Probabilities of ink, a letter a pixel: a for 0 to z for 1."""
        model = self.model(name)
        if not isinstance(model, AdversarialModel | RepresentationModel):
            raise OptionError(f"{name} has no codes; take one that has: vae, gan, autoencoder")
        if not bool(torch.isfinite(codes).all()):
            raise OptionError("expected codes of finite numbers, got NaN or infinities")
        with torch.no_grad():
            parts = codes.split(13)
            logits = torch.cat([model.decode(part) for part in tracked(parts, len(parts), "decoding", "part")])
        if isinstance(model, AdversarialModel) and model.estimator != "gumbel_sigmoid":
            logits = torch.where(logits > 0, torch.inf, -torch.inf)  # it draws ink or paper, and has no chances
        letters = (25 * logits.sigmoid()).round().int().flatten(1) + ord("a")
        return [bytes(row).decode() for row in letters.tolist()]

    def _values(self, name: str, figure: str) -> Tensor:
        """Nats of each test digit, as published."""
        folder = self.records[name].folder
        assert folder is not None
        return safetensors.torch.load_file(folder / VALUES)[figure].double()


def _size(record: Weights) -> int:
    return int(record.metrics.get("protocol", {}).get("image_size", 0))


def _figure(record: Weights) -> str | None:
    """The likelihood, or the tightest bound, that was published of a weight."""
    figures = record.metrics.get("figures", {})
    return next((key for key in figures if key == "nll" or key.startswith("iw")), None)


def _described(record: Weights) -> dict[str, Any]:
    cls, key = model_class(record.model), _figure(record)
    figure = record.metrics["figures"][key] if key else None
    return {
        "name": record.name,
        "model": record.model,
        "default": record.default,
        "idea": IDEAS.get(record.model, ""),
        "parameters": record.metrics["num_parameters"],
        "nats": figure and round(figure["value"], 2),
        "estimator": figure and figure["estimator"],
        "completes": issubclass(cls, CompletionModel),
        "draws": issubclass(cls, AutoregressiveModel | OrderMixture),
        "codes": issubclass(cls, AdversarialModel | RepresentationModel),
    }


def _image(text: str, what: str = "image") -> Tensor:  # (1, 1, 28, 28)
    if not re.fullmatch(f"[01]{{{SIDE * SIDE}}}", text):
        raise ImageError(f"expected {what} as {SIDE * SIDE} characters 0 and 1, row by row, got {len(text)} characters")
    return torch.tensor([float(character) for character in text]).view(1, *SHAPE)


def _texts(images: Tensor) -> list[str]:
    return ["".join(map(str, row)) for row in images.int().flatten(1).tolist()]


def _generator(seed: int) -> torch.Generator:
    within(0, MOST_SEED, seed=seed)
    return torch.Generator().manual_seed(seed)


def _conditionals(model: AutoregressiveModel | OrderMixture, x: Tensor, index: int) -> Tensor:
    return model.conditional_logits(x, index) if isinstance(model, OrderMixture) else model.conditional_logits(x)


def _exactness(model: CompletionModel, observed: Tensor) -> tuple[str, str]:
    if not isinstance(model, AutoregressiveModel | OrderMixture):
        return "chain", "approximate: a few hundred steps of a chain that is exact in the limit of many"
    ignored = int(model.num_ignored(observed))
    if ignored:
        pixels = "1 given pixel comes" if ignored == 1 else f"{ignored} given pixels come"
        note = f"not exact: {pixels} too late in its order, so pixels drawn before could not look at them"
        return "ignores", note
    if isinstance(model, OrderMixture) and model.any_order:
        return "one_order", "exact for an order of its own, in which all given pixels come first"
    if isinstance(model, OrderMixture) and len(model.pixel_orders) > 1:
        return "one_order", f"exact for one of the {len(model.pixel_orders)} orders that it averages"
    return "exact", "exact for this mask: every given pixel comes before the hidden ones in its order"


@torch.no_grad()
def _surprise(model: ExplicitModel | LatentVariableModel, x: Tensor) -> tuple[Tensor, str]:
    """Nats of each pixel of one image, (28, 28), and how they are computed."""
    if isinstance(model, LatentVariableModel):
        logits, how = model(x), "each pixel given the picture's own code; the cost of the code is not in the map"
    elif isinstance(model, OrderMixture):
        index = int(model.log_prob_by_order(x)[:, 0].argmax())
        logits = _conditionals(model, x, index)
        how = "each pixel given those before it, in the order in which the picture is likeliest"
    elif isinstance(model, AutoregressiveModel):
        logits, how = model.conditional_logits(x), "each pixel given those before it; the map adds up to the number"
    else:  # a model that knows the whole image alone: turn over one pixel at a time
        logits, how = _flips(model, x), "each pixel given all others"
    return -bernoulli_log_prob(logits.view(-1, 1), x.view(-1, 1), event_dims=1).view(SIDE, SIDE), how


def _flips(model: ExplicitModel, x: Tensor) -> Tensor:
    """Log-odds of ink at each pixel given all others, (784,), from the likelihoods of images with one pixel turned."""
    turned = x.flatten().repeat(x.numel(), 1)
    turned.fill_diagonal_(0.0)
    paper = model.log_prob(turned.view(-1, *SHAPE))
    ink = model.log_prob(turned.fill_diagonal_(1.0).view(-1, *SHAPE))
    return ink - paper


def as_json(result: dict[str, Any]) -> bytes:
    """A result as a page receives it."""
    return json.dumps(result, separators=(",", ":"), allow_nan=False).encode()
