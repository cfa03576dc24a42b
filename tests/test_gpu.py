"""On a CUDA device: the same figures as on the CPU, images on the device, mixed precision, CPU generators."""

from __future__ import annotations

import pytest
import torch
from lightning import Trainer

from lightning_genmodels import list_models
from lightning_genmodels.data import BinarizedMNISTDataModule
from lightning_genmodels.models import VAE
from lightning_genmodels.testing import check_device, tiny
from lightning_genmodels.weights.names import model_class

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", list_models())
def test_scores_and_samples_are_those_of_the_cpu(name: str) -> None:
    check_device(tiny(model_class(name)), "cuda")


@pytest.mark.parametrize("name", ["pixelcnn", "gated_pixelcnn", "row_lstm", "diagonal_bilstm", "pixelsnail"])
def test_networks_that_go_row_by_row_learn_in_mixed_precision(name: str) -> None:
    torch.manual_seed(0)
    model = model_class(name)(dropout=0.0).to("cuda")
    x = (torch.rand(16, 1, 28, 28, device="cuda") < 0.2).float()
    expected = model.training_loss(x)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model.training_loss(x)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.01 * expected.item()
    loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
    assert model.sample(3).shape == (3, 1, 28, 28)


def test_mixed_precision_trains_with_images_on_the_device() -> None:
    data = BinarizedMNISTDataModule(source="digits", binarization="dynamic")
    model = VAE(learning_rate=2e-3)
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    before = trainer.validate(model, datamodule=data, verbose=False)[0]["val/nelbo"]
    trainer.fit(model, datamodule=data)
    assert trainer.train_dataloader.images.device.type == "cuda"
    assert trainer.validate(model, datamodule=data, verbose=False)[0]["val/nelbo"] < before - 50
