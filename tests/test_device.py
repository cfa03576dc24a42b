"""Training, evaluating, sampling and completing on a device that is not the CPU and has no float64.

It is pretended: see ``pretended_device.py``, which says how. The tests marked ``gpu`` run on a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_genmodels import list_models

STEPS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pretended_device import DEVICE, Pretend, PretendedAccelerator
import torch
from lightning import Trainer
from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.base import LatentVariableModel, RepresentationModel
from lightning_genmodels.evaluation.quality import evaluate_quality
from lightning_genmodels.evaluation.run import Protocol, evaluate
from lightning_genmodels.functional import has_float64
from lightning_genmodels.models import Bernoulli
from lightning_genmodels.weights.names import model_class

found = {}
with Pretend():
    assert not has_float64("gpu")
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        cls = model_class(name)
        shape = (1, 3, 3) if name == "chain_rule_table" else (1, 4, 4)
        model = cls(**{**cls.small, "event_shape": shape})
        data = BinarizedMNISTDataModule(source="digits", image_size=shape[1], batch_size=100)
        options = dict(devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer = Trainer(PretendedAccelerator(), max_epochs=1, limit_train_batches=3, **options)
        trainer.fit(model, datamodule=data)
        assert trainer.train_dataloader.images.device.type == "gpu"  # moved once, not batch by batch
        if model.finalizes:
            model.finalize(data.images("train"))
        seen = []
        sample = model._sample
        model._sample = lambda *args: seen.append(next(model.parameters()).device.type) or sample(*args)
        model.eval()
        ais = 3 if isinstance(model, LatentVariableModel) else 0
        report = evaluate(model, data, Protocol(accelerator=PretendedAccelerator(), limit=20, num_particles=3, ais=ais))
        del model._sample
        before = model.device.type
        model.to(DEVICE)
        x, nothing = torch.zeros(2, *shape), torch.zeros(shape, dtype=torch.bool)
        assert model.sample(2).device.type == "gpu"
        assert not hasattr(model, "complete") or model.complete(x, nothing).device.type == "gpu"
        assert not isinstance(model, RepresentationModel) or model.encode(x).device.type == "gpu"
        values = {key: [float(value) for value in values] for key, values in report.values.items()}
        found[name] = {"device": report.metrics["device"], "sampled": seen, "before": before, "values": values}
    if "bernoulli" in found:
        model, data = Bernoulli(), BinarizedMNISTDataModule(source="digits")
        model.initialize(data.images("train"))
        quality = evaluate_quality(model.to(DEVICE), data, num_samples=100, num_seeds=2)
        found["frechet"] = quality["results"]["samples"]["frechet"]
print(json.dumps(found))
"""


@pytest.mark.slow(reason="trains and evaluates every model")
@pytest.mark.parametrize("names", [list_models()[start::3] for start in range(3)], ids=lambda names: names[0])
def test_every_model_stays_on_its_device_and_needs_no_float64(names: list[str]) -> None:
    command = [sys.executable, "-c", STEPS, *names]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {*names} <= found.keys()
    for name in names:
        assert found[name]["device"] == "gpu:0"
        assert set(found[name]["sampled"]) == {"gpu"}
        assert found[name]["before"] == "cpu"  # where the model came from
        for values in found[name]["values"].values():
            assert len(values) == 20
            assert all(0 < value < 30 for value in values)
    assert "bernoulli" not in names or found["frechet"] > 0
