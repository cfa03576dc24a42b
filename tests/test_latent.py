"""Latent-variable models beyond the contract: other networks, second layers, what training adds to the bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_contract as contract
import torch
from conftest import all_images

from lightning_genmodels.base import LatentVariableModel
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import keyed_generators
from lightning_genmodels.models import VAE

VARIANTS: dict[str, tuple[type[LatentVariableModel], str, dict[str, Any]]] = {
    "conv": (VAE, "vae", {"event_shape": (1, 2, 3), "network": "conv", "hidden_sizes": (4, 3)}),
    "two layers": (VAE, "vae", {"latent_dim": 1, "top_latent_dim": 1, "top_hidden_sizes": (1,)}),
    "importance weighted": (VAE, "vae", {"num_particles": 3}),
}

CONTRACT: list[Callable[[str], None]] = [
    contract.test_gradients_reach_every_trained_parameter,
    contract.test_marginals_of_all_images_sum_to_one,
    contract.test_sample_frequencies_match_marginals,
    contract.test_mean_log_weight_is_the_elbo,
    contract.test_bounds_grow_with_particles_and_stay_below_the_likelihood,
    contract.test_keyed_bounds_do_not_depend_on_the_batch,
    contract.test_encode_and_decode_shapes,
]


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(
    variant: str, check: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, name, arguments = VARIANTS[variant]
    monkeypatch.setattr(cls, "small", {**cls.small, **arguments})
    check(name)


@torch.no_grad()
def test_dropout_is_for_training_alone() -> None:
    torch.manual_seed(0)
    model = VAE(**VAE.small, dropout=0.5)
    x = all_images(model.event_shape).float()
    assert not torch.equal(model.encode(x), model.encode(x))
    model.eval()
    assert torch.equal(model.encode(x), model.encode(x))
    plain = VAE(**VAE.small)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.encode(x), model.encode(x))


def test_the_bound_is_free_of_beta_and_warm_up() -> None:
    models = [VAE(**VAE.small, **options) for options in ({}, {"beta": 4.0}, {"kl_warmup_steps": 100})]
    x = all_images((1, 2, 2)).float()
    elbos, losses = [], []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        elbos.append(model.elbo(x, generator=keyed_generators(0, range(len(x)))))
        torch.manual_seed(0)
        losses.append(model.training_loss(x))
    torch.manual_seed(0)
    reconstruction, kl = models[0].elbo_terms(x)
    assert torch.equal(elbos[0], elbos[1])
    assert torch.equal(elbos[0], elbos[2])
    assert torch.allclose(losses[0], (kl - reconstruction).mean())
    assert torch.allclose(losses[1], (4 * kl - reconstruction).mean())
    assert torch.allclose(losses[2], -reconstruction.mean())  # the first step: no weight yet


def test_closed_form_divergences_are_not_negative() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = VAE(**VAE.small)
        _, kl = model.elbo_terms(all_images(model.event_shape).float())
        assert bool((kl >= 0).all())


@pytest.mark.parametrize(
    "arguments", [{"dropout": 1.0}, {"network": "cnn"}, {"beta": -1.0}, {"beta": 2.0, "num_particles": 5}]
)
def test_options_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        VAE(**arguments)
