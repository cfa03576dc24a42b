"""Muon: what it does to a matrix, which weights it takes, what it leaves alone; and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from lightning_genmodels import BinarizedMNISTDataModule, list_models
from lightning_genmodels.base import GenerativeModel
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError
from lightning_genmodels.models import FVBN, MADE, NADE, VAE, EoNADE, GatedPixelCNN, PixelCNN
from lightning_genmodels.training.callbacks import before_fall_path, last_path
from lightning_genmodels.training.optimizers import Muon, orthogonalized, schedule_factor, weight_matrices
from lightning_genmodels.weights.names import model_class


def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for rows, columns in [(6, 20), (20, 6), (9, 9)]:
        u, _, vh = torch.linalg.svd(torch.randn(4, rows, columns), full_matrices=False)
        values = torch.linspace(3.0, 0.5, min(rows, columns))
        found = u.mT @ orthogonalized(u * values @ vh) @ vh.mT
        diagonal = found.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=1e-4)
        assert bool(((diagonal > 0.6) & (diagonal < 1.3)).all())
    assert not orthogonalized(torch.zeros(1, 3, 4)).any()


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], gradients: Tensor) -> None:
    for gradient in gradients:
        for parameter in parameters:
            parameter.grad = gradient.flatten()[: parameter.numel()].view(parameter.shape).clone()
        optimizer.step()


def hidden_group(parameters: list[nn.Parameter], **options: Any) -> dict[str, Any]:
    return {"params": parameters, "shapes": [(1, *p.shape) for p in parameters], "muon": True, **options}


def test_its_steps_are_those_of_torch_optim_muon_but_for_bfloat16() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(30, 20)) for _ in range(2))
    gradients = torch.randn(10, 30, 20)
    steps(Muon([hidden_group([ours], lr=0.02, weight_decay=0.1)]), [ours], gradients)
    steps(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1), [theirs], gradients)
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_the_other_parameters_take_the_steps_of_adamw() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(10, 12)
    ours, theirs = ([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))] for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    steps(Muon([{"params": ours}], **options), ours, gradients)
    steps(torch.optim.AdamW(theirs, **options), theirs, gradients)
    assert not torch.equal(ours[0], torch.ones(4, 3))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_length_of_a_gradient_does_not_matter_and_matrices_do_not_mix() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(3, 8, 6)
    together = [nn.Parameter(torch.zeros(8, 6)) for _ in range(3)]
    optimizer = Muon([hidden_group(together, lr=0.1)])
    for parameter, gradient, scale in zip(together, gradients, (1.0, 100.0, 0.01), strict=True):
        parameter.grad = scale * gradient
    optimizer.step()
    for parameter, gradient in zip(together, gradients, strict=True):
        alone = nn.Parameter(torch.zeros(8, 6))
        alone.grad = gradient
        Muon([hidden_group([alone], lr=0.1)]).step()
        torch.testing.assert_close(parameter, alone, rtol=0, atol=1e-5)


def fitted(model: GenerativeModel, **options: Any) -> tuple[GenerativeModel, torch.optim.Optimizer]:
    """A model after some steps on digits, and its optimizer."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    _, height, width = model.event_shape
    assert height == width
    data = BinarizedMNISTDataModule(source="digits", image_size=height, batch_size=20)
    trainer.fit(model, datamodule=data)
    return model, trainer.optimizers[0]


WITH_HIDDEN_MATRICES: dict[str, dict[str, Any]] = {
    "autoencoder": {"hidden_sizes": (5, 4)},
    "diagonal_bilstm": {},
    "eonade": {"hidden_sizes": (5, 4)},
    "gan": {"hidden_sizes": (5, 4)},
    "gated_pixelcnn": {},
    "iwae": {"hidden_sizes": ((5, 4), (3,))},
    "ladder_vae": {},
    "made": {"hidden_sizes": (7, 6)},
    "pixelcnn": {},
    "pixelsnail": {},
    "row_lstm": {},
    "vae": {"hidden_sizes": (5, 4)},
    "wgan_gp": {"network": "mlp", "hidden_sizes": (5, 4)},
}


@pytest.mark.parametrize("name", WITH_HIDDEN_MATRICES)
def test_every_parameter_is_trained_by_one_of_the_two_and_only_matrices_by_muon(name: str) -> None:
    cls = model_class(name)
    small = {**cls.small, **WITH_HIDDEN_MATRICES[name], "event_shape": (1, 4, 4)}
    model, optimizer = fitted(cls(**small, optimizer="muon", weight_decay=0.1))
    network = model.discriminator if name in ("gan", "wgan_gp") else model
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(set(map(id, grouped))) == len(grouped)
    assert set(map(id, grouped)) == {id(p) for p in network.parameters() if p.requires_grad}
    muon = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    matrices = {id(p) for _, _, p in weight_matrices(network)}
    edges = {id(p) for edge in model.edges() for p in edge.parameters(recurse=False)}
    assert muon
    assert {id(p) for p in muon} == matrices - edges
    assert {id(p) for p in decayed} == matrices
    assert all(torch.isfinite(p).all() for p in grouped)


def test_biases_of_places_and_embeddings_do_not_decay() -> None:
    names = {name for name, _, _ in weight_matrices(PixelCNN((1, 4, 4), 3, 1, 3, bias_by_place=True))}
    assert "net.first.weight" in names
    assert "net.first.bias_of_places" not in names
    assert not any("order" in name for name, _, _ in weight_matrices(model_class("pixelsnail")()))
    lstm = {name for name, _, _ in weight_matrices(model_class("diagonal_bilstm")(hidden_size=2, num_layers=1))}
    assert {"net.layers.0.input_to_state", "net.layers.0.lstm.weight"} <= lstm
    assert "net.layers.0.bias" not in lstm


@pytest.mark.parametrize(
    "build",
    [
        lambda: FVBN((1, 4, 4), optimizer="muon"),
        lambda: NADE((1, 4, 4), 4, optimizer="muon"),
        lambda: MADE((1, 4, 4), (5,), optimizer="muon"),
        lambda: EoNADE((1, 4, 4), (5,), optimizer="muon"),
        lambda: VAE((1, 4, 4), (5,), 2, optimizer="muon"),
    ],
)
def test_models_without_hidden_matrices_refuse_muon_in_one_line(build: Callable[[], GenerativeModel]) -> None:
    with pytest.raises(OptionError, match="no weight matrices of hidden layers") as caught:
        fitted(build())
    assert "\n" not in str(caught.value)


def test_all_models_that_learn_by_gradients_are_covered_above() -> None:
    others = {"bernoulli", "chain_rule_table", "fvbn", "joint_table", "markov", "nade"}
    assert set(list_models()) == {*WITH_HIDDEN_MATRICES, *others}


def test_masked_weights_stay_as_they_are() -> None:
    torch.manual_seed(0)
    made = MADE((1, 4, 4), (30, 30), order="raster", optimizer="muon", learning_rate=0.01)
    before = made.hidden[1].weight.detach().clone()
    fitted(made)
    _, hidden = made.degrees[0].split(made.hidden_sizes)
    first, _ = made.degrees[0].split(made.hidden_sizes)
    masked = first > hidden.unsqueeze(1)
    assert 100 < masked.sum() < 800
    assert torch.equal(made.hidden[1].weight[masked], before[masked])
    assert not torch.equal(made.hidden[1].weight, before)
    gated = GatedPixelCNN((1, 4, 4), 4, 2, 3, 3, optimizer="muon")
    conv = gated.net.layers[1].horizontal
    before = conv.weight.detach().clone()
    fitted(gated)
    assert torch.equal(conv.weight[:, :, conv.mask == 0], before[:, :, conv.mask == 0])
    assert not torch.equal(conv.weight[:, :, conv.mask == 1], before[:, :, conv.mask == 1])


def test_sharded_weights_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole = torch.zeros(4, 6)
        sharded = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(OptionError, match="sharded"):
            Muon([hidden_group([sharded])])
        flat = {**hidden_group([]), "params": [nn.Parameter(torch.zeros(12))], "shapes": [(1, 4, 6)]}
        with pytest.raises(OptionError, match="sharded"):
            Muon([flat])
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_clipped_in_mixed_precision() -> None:
    model, _ = fitted(PixelCNN((1, 4, 4), 3, 1, 3, optimizer="muon"), precision="bf16-mixed", gradient_clip_val=1.0)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"schedule": "step"}, {"fall": 0.0}, {"fall": 1.5}])
def test_options_without_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"expected {next(iter(options))} "):
        VAE(**options)


def test_a_cosine_depends_on_the_length_of_the_run_and_a_linear_fall_not_before_it_falls() -> None:
    def rates(schedule: Any, total: float) -> list[float]:
        return [schedule_factor(schedule, step, warmup_steps=4, total_steps=total, fall=0.6) for step in range(101)]

    for schedule in ("cosine", "linear_fall"):
        assert rates(schedule, 100)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert rates(schedule, 100)[100] == pytest.approx(0.0, abs=1e-12)
        assert rates(schedule, math.inf)[4:] == [1.0] * 97
        assert all(a >= b for a, b in zip(rates(schedule, 100)[4:], rates(schedule, 100)[5:], strict=False))
    assert rates("linear_fall", 100)[4:41] == [1.0] * 37
    assert rates("linear_fall", 100)[70] == pytest.approx(0.5)
    assert rates("linear_fall", 200)[:41] == rates("linear_fall", 100)[:41]
    assert rates("cosine", 200)[10] != rates("cosine", 100)[10]


RUN = [
    *("fit", "--model=pixelsnail", "--data.source=digits", "--data.image_size=8", "--data.batch_size=200"),
    *("--model.channels=8", "--model.num_layers=2", "--model.attention_every=2", "--model.heads=2"),
    *("--model.optimizer=muon", "--model.schedule=linear_fall", "--model.warmup_steps=3", "--model.dropout=0.1"),
    *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    *("--samples.every_n_epochs=0", "--ema=0.9"),
]


@pytest.mark.slow(reason="trains four times")
def test_a_run_prolonged_from_before_the_fall_equals_a_longer_one_bit_for_bit(run_folder: Path) -> None:
    main([*RUN, "--trainer.max_epochs=5", "--trainer.default_root_dir=short"])
    short = torch.load(last_path("short"), weights_only=True)
    kept = torch.load(before_fall_path("short"), weights_only=True)
    assert kept["global_step"] == 0.4 * short["global_step"]
    main([*RUN, "--trainer.max_epochs=9", "--trainer.default_root_dir=short", "--ckpt_path=before_fall"])
    main([*RUN, "--trainer.max_epochs=9", "--trainer.default_root_dir=long"])
    prolonged, whole = (torch.load(last_path(root), weights_only=True) for root in ("short", "long"))
    assert prolonged["global_step"] == whole["global_step"]
    for key in ("state_dict", "current_model_state", "averaging_state"):
        for name, tensor in whole[key].items():
            assert torch.equal(prolonged[key][name], tensor), f"{key} {name}"
    for one, other in zip(prolonged["optimizer_states"], whole["optimizer_states"], strict=True):
        for index, state in other["state"].items():
            assert all(torch.equal(one["state"][index][key], value) for key, value in state.items())


def test_a_run_without_such_a_schedule_keeps_no_checkpoint_from_before(run_folder: Path) -> None:
    main([*RUN, "--model.schedule=cosine", "--trainer.max_epochs=1", "--trainer.default_root_dir=run"])
    assert last_path("run").is_file()
    assert not before_fall_path("run").exists()
