"""Latent-variable models beyond the contract: other networks, second layers, what training adds to the bounds."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.divergence import all_images
from lightning_genmodels.functional import log_mean_exp
from lightning_genmodels.models import IWAE, VAE, LadderVAE
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.testing import FALSE_ALARM_RATE, check_model, log_likelihood_by_quadrature, p_value, tiny

VARIANTS: dict[str, tuple[type[VAE], dict[str, Any]]] = {
    "conv": (VAE, {"event_shape": (1, 2, 3), "network": "conv", "hidden_sizes": (4, 3)}),
    "one layer": (IWAE, {"latent_dims": (2,), "hidden_sizes": ((5,),)}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant: str) -> None:
    cls, options = VARIANTS[variant]
    check_model(tiny(cls, **options))


@pytest.mark.parametrize("network", ["mlp", "conv"])
@torch.no_grad()
def test_dropout_is_for_training_alone(network: Literal["mlp", "conv"]) -> None:
    torch.manual_seed(0)
    model = VAE(**VAE.small, network=network, dropout=0.5)
    x = all_images(model.event_shape).float()
    assert not torch.equal(model.encode(x), model.encode(x))
    model.eval()
    assert torch.equal(model.encode(x), model.encode(x))
    plain = VAE(**VAE.small, network=network)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.encode(x), model.encode(x))


@pytest.mark.parametrize(("cls", "figure"), [(VAE, "val/nelbo"), (IWAE, "val/iw3")])
@pytest.mark.parametrize("val_particles", [0, 20])
@torch.no_grad()
def test_the_validated_bound_is_the_one_asked_for(cls: type[VAE], figure: str, val_particles: int) -> None:
    torch.manual_seed(0)
    data = BinarizedMNISTDataModule(source="digits", batch_size=50)
    model = cls(**{**cls.small, "event_shape": (1, 28, 28)}, val_particles=val_particles).eval()
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (logged,) = trainer.validate(model, data, verbose=False)
    figure = f"val/iw{val_particles}" if val_particles else figure
    assert model.monitor == figure
    x = data.images("val").float()
    bound = model.iw_bound(x, val_particles or model.num_particles, generator=keyed_generators(0, range(len(x))))
    assert logged[figure] == pytest.approx(-bound.mean().item(), abs=0.5)
    assert logged[figure] <= logged["val/nelbo"]


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


@torch.no_grad()
def test_a_bound_of_several_blocks_is_that_of_all_their_particles() -> None:
    model = tiny(VAE)
    x, more = all_images(model.event_shape)[:4].double(), 30
    generator = torch.Generator().manual_seed(0)
    blocks = [model.log_weights(x, size, generator=generator) for size in (model.particle_block, more)]
    bound = model.iw_bound(x, model.particle_block + more, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(bound, log_mean_exp(torch.cat(blocks), dim=0))


@torch.no_grad()
def test_three_layers_have_one_elbo() -> None:
    torch.manual_seed(0)
    model = IWAE((1, 2, 2), (1, 2, 1), ((3,), (2,), ())).double().eval()
    x = all_images(model.event_shape)[[3]]
    log_weights = model.log_weights(x, 4000, generator=torch.Generator().manual_seed(0))
    elbos = model.elbo(x.expand(4000, -1, -1, -1), generator=torch.Generator().manual_seed(1))
    error = ((log_weights.var() + elbos.var()) / 4000).sqrt()
    assert abs(log_weights.mean() - elbos.mean()) < 4 * error
    assert model.encode(x).shape == model.sample_latent(1).shape == (1, 4)


def test_one_layer_and_one_particle_are_a_vae() -> None:
    vae = VAE(**VAE.small)
    iwae = IWAE(vae.event_shape, (2,), ((5,),), num_particles=1)
    iwae.load_state_dict(vae.state_dict())
    x = all_images(vae.event_shape).float()
    losses = []
    for model in (vae, iwae):
        torch.manual_seed(0)
        losses.append(model.training_loss(x))
    assert torch.allclose(*losses)
    assert torch.equal(vae.encode(x), iwae.encode(x))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (VAE, {"dropout": 1.0}), (VAE, {"network": "cnn"}), (VAE, {"beta": -1.0}), (VAE, {"latent_dim": 0}),
        (IWAE, {"latent_dims": (3, 2)}), (IWAE, {"latent_dims": ()}), (IWAE, {"latent_dims": (0,)}),
        (IWAE, {"hidden_sizes": ((0,),)}), (IWAE, {"num_particles": 0}), (IWAE, {"dropout": -0.1}),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(cls: type[VAE], arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        cls(**arguments)


@pytest.mark.parametrize("layers", [(0, 2), (2, 0), (1, 1, 1)])
@torch.no_grad()
def test_ladder_of_any_shape_fits_odd_images(layers: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = LadderVAE((1, 7, 5), layers, channels=(6, 4, 3)[: len(layers)], latent_channels=2, output_channels=2).eval()
    x = model.sample(3)
    codes = model.encode(x)
    assert codes.shape == model.sample_latent(3).shape
    assert model.decode(codes[None]).shape == (1, *x.shape)
    reconstruction, kl = model.elbo_terms(x)
    assert reconstruction.shape == (3,)
    assert kl.shape == (sum(layers), 3)
    assert bool((kl >= 0).all())


@torch.no_grad()
def test_ladder_weights_are_those_of_its_parts() -> None:
    model = tiny(LadderVAE)
    x = all_images(model.event_shape)[:5].double()
    noise = keyed_generators(0, range(5))
    log_weights = model.log_weights(x, 3, generator=noise)
    _, posteriors, epsilon = model._infer(x, 3, keyed_generators(0, range(5)))
    mean, log_std = (torch.cat([part.flatten(1) for part in parts], dim=1).view(3, 5, -1) for parts in posteriors)
    q = torch.distributions.Normal(mean, log_std.exp())
    z = mean + log_std.exp() * epsilon
    assert torch.allclose(log_weights, model.log_joint(x, z) - q.log_prob(z).sum(-1), atol=1e-9)


def test_ladder_bound_is_free_of_free_bits_and_warm_up() -> None:
    models = [LadderVAE(**LadderVAE.small, **options) for options in ({}, {"free_bits": 3.0}, {"kl_warmup_steps": 9})]
    x = all_images((1, 2, 2)).float()
    elbos, losses = [], []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        elbos.append(model.eval().elbo(x, generator=keyed_generators(0, range(len(x)))))
        torch.manual_seed(0)
        losses.append(model.training_loss(x))
    torch.manual_seed(0)
    reconstruction, kl = models[0].elbo_terms(x)
    assert torch.equal(elbos[0], elbos[1])
    assert torch.equal(elbos[0], elbos[2])
    assert torch.allclose(losses[0], kl.sum(0).mean() - reconstruction.mean())
    assert torch.allclose(losses[1], kl.mean(1).clamp(min=3.0).sum() - reconstruction.mean())
    assert torch.allclose(losses[2], -reconstruction.mean())


def test_ladder_does_not_run_away_however_large_its_state_is() -> None:
    model = LadderVAE((1, 8, 8), (3, 3), channels=(6, 6), latent_channels=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(30.0 if "to_" in name or "from_latent" in name else 3.0)
    x = torch.randint(2, (20, 1, 8, 8)).float()
    loss = model.training_loss(x)
    loss.backward()
    assert loss > 1e4  # far off
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_ladder_of_several_particles_is_trained_by_their_bound_after_the_warm_up() -> None:
    x = all_images((1, 2, 2)).float()
    model = LadderVAE(**LadderVAE.small, num_particles=3, free_bits=3.0).eval()
    warming = LadderVAE(**LadderVAE.small, num_particles=3, kl_warmup_steps=9).eval()
    warming.load_state_dict(model.state_dict())
    losses = []
    for each in (model, warming):
        torch.manual_seed(0)
        losses.append(each.training_loss(x))
    torch.manual_seed(0)
    assert torch.equal(losses[0], -model.iw_bound(x, 3).mean())
    torch.manual_seed(0)
    assert torch.allclose(losses[1], -model.elbo_terms(x)[0].mean())
    assert (model.monitor, LadderVAE(**LadderVAE.small).monitor) == ("val/iw3", "val/nelbo")


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": (0, 0)},
        {"layers": (1,), "channels": (4, 4)},
        {"dropout": 1.0},
        {"free_bits": -1.0},
        {"num_particles": 0},
        {"skip_threshold": -1.0},
    ],
)
def test_ladder_options_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        LadderVAE(**{**LadderVAE.small, **arguments})


@pytest.mark.parametrize("cls", [VAE, IWAE])
@pytest.mark.parametrize("given", [[], [0, 3], [1, 2, 3]])
@torch.no_grad()
def test_completion_is_a_draw_from_the_exact_conditional(cls: type[VAE], given: list[int]) -> None:
    """By enumeration of all images and quadrature over the latents, which an encoder proposes that knows nothing."""
    torch.manual_seed(1)
    model = cls(**cls.small).eval().double()
    for name, parameter in model.named_parameters():
        scale = 0.0 if name.startswith("encoder") else 1.5 if name.startswith("decoder.") else 0.3
        parameter.copy_(scale * torch.randn_like(parameter))
    images = all_images(model.event_shape).double()
    observed = torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(given, dtype=torch.long), True).view(2, 2)
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    agrees = ((images == x) | ~observed).flatten(1).all(1)
    exact = torch.where(agrees, log_likelihood_by_quadrature(model, images).exp(), 0.0)
    drawn = model.complete(
        x.expand(10_000, -1, -1, -1), observed, num_steps=100, generator=torch.Generator().manual_seed(2)
    )
    assert p_value(drawn, exact / exact.sum()) > FALSE_ALARM_RATE
    few = model.complete(
        x.expand(10_000, -1, -1, -1), observed, num_steps=1, generator=torch.Generator().manual_seed(2)
    )
    assert not given or p_value(few, exact / exact.sum()) < FALSE_ALARM_RATE


def test_a_completion_takes_at_least_one_step() -> None:
    model = VAE(**VAE.small)
    with pytest.raises(OptionError, match="num_steps"):
        model.complete(torch.zeros(1, 1, 2, 2), torch.zeros(2, 2), num_steps=0)
    assert model.complete(torch.zeros(0, 1, 2, 2), torch.zeros(2, 2)).shape == (0, 1, 2, 2)
