"""The masked autoencoder for distribution estimation (Germain, Gregor, Murray and Larochelle 2015, "MADE").

The paper's notation: m^l(k) is the degree of unit k of layer l, the number of pixels it may depend on; W^l are the
weights into layer l, V those into the outputs, A the direct ones from inputs to outputs, c the outputs' biases.

Not the paper's: masks that share the weights each have a scale and a shift of every hidden unit, and a c, of their own.
The paper offers a second matrix as large as W to tell a layer its mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_genmodels.base import OrderMixture, TrainingOptions
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import bernoulli_log_prob, draw_pixel, mean_logits
from lightning_genmodels.nn.masked import MaskedLinear
from lightning_genmodels.orders import autoregressive_mask
from lightning_genmodels.random import derive_seed


class MADE(OrderMixture):
    """An autoencoder whose masks leave output i the inputs before i alone: one pass computes all conditionals.

    With one order it is an autoregressive model. With several it is trained on one of them in every step, drawn at
    random (the paper's order-agnostic training), and is the mixture of all of them: the very masks it was trained with,
    which follow from ``order_seed``. They share the weights; how strong each hidden unit is, and its bias, is learned
    for each mask.

    Args:
        event_shape: (1, H, W) of one image.
        hidden_sizes: Units of the hidden layers, first to last.
        num_orders: M, how many masks are stored.
        order: Name of the pixel order, or several names, which the masks take in turn; ``random`` gives each mask an
            order of its own. See :func:`lightning_genmodels.orders.pixel_order`.
        order_seed: Seed of orders and connections.
        connectivity_agnostic: Whether the degrees of hidden units are drawn anew for each mask, too (Germain et al.,
            section 4.3). Without it a hidden unit sees equally many pixels in every order; many orders are then learned
            in fewer steps.
        dropout: Probability with which a hidden unit is dropped in training.
        options: Learning rate, weight decay, warm-up; see :class:`lightning_genmodels.base.GenerativeModel`.

    Raises:
        OptionError: A number below one, or a dropout probability outside of [0, 1).
    """

    small = {"event_shape": (1, 2, 3), "hidden_sizes": (7, 6), "num_orders": 2}

    degrees: Tensor

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        hidden_sizes: Sequence[int] = (500,),
        num_orders: int = 1,
        order: str | Sequence[str] = "random",
        order_seed: int = 0,
        dropout: float = 0.0,
        connectivity_agnostic: bool = True,
        **options: Unpack[TrainingOptions],
    ) -> None:
        names = [order] if isinstance(order, str) else list(order)
        super().__init__(event_shape, [*itertools.islice(itertools.cycle(names), num_orders)], order_seed, **options)
        if min([num_orders, *hidden_sizes]) < 1 or not hidden_sizes or not 0.0 <= dropout < 1.0:
            raise OptionError(
                f"expected at least one hidden layer, sizes and num_orders of at least 1 and a dropout in [0, 1), got "
                f"hidden_sizes={tuple(hidden_sizes)}, num_orders={num_orders}, dropout={dropout}"
            )
        pixels = math.prod(self.event_shape)
        self.hidden_sizes = tuple(hidden_sizes)
        self.dropout = dropout
        sizes = itertools.pairwise([pixels, *hidden_sizes])
        self.hidden = nn.ModuleList(MaskedLinear(inputs, outputs, bias=False) for inputs, outputs in sizes)  # W
        self.output = MaskedLinear(hidden_sizes[-1], pixels, bias=False)  # V
        # Those of one mask after those of another in one dimension: like all biases, they do not decay.
        self.scale = nn.Parameter(torch.ones(num_orders * sum(hidden_sizes)))
        self.shift = nn.Parameter(torch.zeros(num_orders * sum(hidden_sizes)))
        self.c = nn.Parameter(torch.zeros(num_orders * pixels))
        self.direct = MaskedLinear(pixels, pixels, bias=False)  # A
        nn.init.zeros_(self.direct.weight)
        seeds = [derive_seed(order_seed + (m if connectivity_agnostic else 0)) for m in range(num_orders)]
        degrees = [_hidden_degrees(self.hidden_sizes, pixels, seed) for seed in seeds]
        self.register_buffer("degrees", torch.stack(degrees), persistent=False)  # (M, all hidden units)

    def edges(self) -> list[nn.Module]:
        """The layers that read pixels or write logits."""
        return [self.hidden[0], self.output, self.direct]

    def _initialize(self, images: Tensor) -> None:
        """Starts at the mean image."""
        self.c.view(len(self.pixel_orders), -1).copy_(mean_logits(images).flatten())

    def training_loss(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats per image under one of the orders, drawn anew in every step."""
        logits = self.conditional_logits(x, int(torch.randint(len(self.pixel_orders), ())))
        return -bernoulli_log_prob(logits, x).mean()

    def conditional_logits(self, x: Tensor, index: int) -> Tensor:
        """Log-odds of p(x_i = 1 | x_<i) in order ``index``, (B, 1, H, W), of binary images of that shape."""
        pixels = self.pixel_orders[index].argsort() + 1  # (n,) degrees of the inputs
        hidden, inputs = x.flatten(1), pixels
        layers = zip(self.hidden, *self._by_layer(index), strict=True)
        for layer, degrees, scale, shift in layers:
            hidden = F.relu(torch.addcmul(shift, layer(hidden, autoregressive_mask(degrees, inputs)), scale))
            hidden, inputs = F.dropout(hidden, self.dropout, self.training), degrees
        logits: Tensor = self._of(self.c, index) + self.output(hidden, autoregressive_mask(pixels, inputs, strict=True))
        logits = logits + self.direct(x.flatten(1), autoregressive_mask(pixels, pixels, strict=True))
        return logits.view_as(x)

    def _of(self, parameter: Tensor, index: int) -> Tensor:
        """The part of ``scale``, ``shift`` or ``c`` that belongs to one mask."""
        return parameter.view(len(self.pixel_orders), -1)[index]

    def _by_layer(self, index: int) -> list[tuple[Tensor, ...]]:
        """Degrees, scales and shifts of the units under one mask; of each, a tensor for every hidden layer."""
        of_all = (self.degrees[index], self._of(self.scale, index), self._of(self.shift, index))
        return [units.split(self.hidden_sizes) for units in of_all]

    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        filled = torch.empty_like(x)
        for index in which.unique().tolist():  # images of one order share their masks
            rows = (which == index).nonzero().squeeze(1)
            filled[rows] = self._fill_in_one_order(x[rows], observed[rows], uniforms[rows], index)
        return filled

    def _fill_in_one_order(self, x: Tensor, observed: Tensor, uniforms: Tensor, index: int) -> Tensor:
        """Computes every hidden unit once, as soon as the pixels it depends on are drawn: one evaluation in all.

        With pixels and hidden units sorted by degree the masks are staircases: what is known lies to the left.
        """
        order = self.pixel_orders[index]
        pixels, known = x.flatten(1)[:, order], observed.flatten(1)[:, order]  # (N, n), first pixel first
        all_degrees, scales, shifts = self._by_layer(index)
        by_degree = [degrees.argsort() for degrees in all_degrees]
        steps = torch.arange(len(order) + 1, device=x.device)
        # ready[l][i]: how many units of layer l depend on the first i pixels alone.
        ready = [torch.searchsorted(degrees.sort().values, steps, right=True).tolist() for degrees in all_degrees]
        columns = [order, *by_degree]
        weights = [
            (w * scale[:, None])[rows][:, inputs]
            for w, scale, rows, inputs in zip(self.hidden.parameters(), scales, by_degree, columns, strict=False)
        ]
        biases = [shift[rows] for shift, rows in zip(shifts, by_degree, strict=True)]
        bias = self._of(self.c, index)[order]
        output, direct = self.output.weight[order][:, columns[-1]], self.direct.weight[order][:, order]
        hidden = [pixels.new_zeros((len(x), size)) for size in self.hidden_sizes]
        for i in range(len(order)):
            below, seen = pixels, i
            for layer, unit in enumerate(hidden):
                done, now = ready[layer][max(i - 1, 0)], ready[layer][i]
                if now > done:
                    w = weights[layer][done:now, :seen]
                    unit[:, done:now] = F.relu(F.linear(below[:, :seen], w, biases[layer][done:now]))
                below, seen = unit, now
            logits = bias[i] + below[:, :seen] @ output[i, :seen] + pixels[:, :i] @ direct[i, :i]
            pixels[:, i] = draw_pixel(logits, uniforms[:, i], pixels[:, i], known[:, i])
        return torch.empty_like(pixels).index_copy_(1, order, pixels).view_as(x)


def _hidden_degrees(sizes: Sequence[int], pixels: int, seed: int) -> Tensor:  # (sum of sizes,)
    """Degrees from 1 to n - 1 of all hidden units, layer after layer.

    The paper draws them uniformly; here they are spread evenly, so that no conditional is left short of units, and
    what is drawn is which unit has which.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    layers = []
    for size in sizes:
        even = torch.linspace(1, max(1, pixels - 1), size, device="cpu").round().long()
        layers.append(even[torch.randperm(size, generator=generator, device="cpu")])
    return torch.cat(layers)
