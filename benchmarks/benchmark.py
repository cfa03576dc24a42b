"""Speed, as ratios measured in one run.

python benchmarks/benchmark.py
python benchmarks/benchmark.py data nade_training
python benchmarks/benchmark.py iw_bound
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_genmodels import BinarizedMNISTDataModule
from lightning_genmodels.base import AutoregressiveModel, GenerativeModel, OrderMixture
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.models import NADE, VAE, DiagonalBiLSTM, GatedPixelCNN, PixelCNN, PixelSNAIL, RowLSTM
from lightning_genmodels.nn.raster import CausalConv2d
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.system import reuse_freed_memory


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(name: str, slow: float, fast: float, unit: str = "s", than: str = "faster") -> None:
    """Prints two measures and their ratio."""
    print(f"{name}: {slow:.3f} {unit} against {fast:.3f} {unit}, {slow / fast:.1f} times {than}", flush=True)


class PerItemDataset(Dataset[Tensor]):
    """Binary images one at a time, by way of PIL, as vision data sets are commonly written."""

    def __init__(self, images: Tensor) -> None:
        self.images = images[:, 0].numpy() * np.uint8(255)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.fromarray(self.images[index])
        pixels = torch.from_numpy(np.array(image)).unsqueeze(0).float().div(255)
        return (pixels > 0.5).float()


def benchmark_data() -> None:
    """One epoch over the training images: a per-item data set in a DataLoader against the in-memory loader."""
    data = BinarizedMNISTDataModule(source="mnist")
    data.prepare_data()
    images = data.images("train")
    loader = data.train_dataloader()

    def exhaust(batches: Any) -> None:
        for batch in batches:
            assert batch.shape == (data.batch_size, 1, 28, 28)

    for workers in (0, 2):
        per_item = DataLoader(
            PerItemDataset(images), data.batch_size, shuffle=True, drop_last=True, num_workers=workers
        )
        slow = seconds(lambda loader=per_item: exhaust(loader), repeats=2)
        fast = seconds(lambda: exhaust(loader))
        report(f"epoch of {len(images):,} static images, DataLoader with {workers} workers", slow, fast)


def benchmark_load() -> None:
    """A fresh process that loads trained weights by torch.hub, against one that imports lightning."""
    root = Path(__file__).parent.parent

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    load = seconds(lambda: run(f"import torch; torch.hub.load({str(root)!r}, 'vae', source='local')"), repeats=5)
    imports = seconds(lambda: run("import lightning"), repeats=5)
    print(
        f"torch.hub.load: {load:.2f} s against {imports:.2f} s for import lightning, {load / imports:.2f} times as long"
    )


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that tensors allocated during a call had at once, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def digits_like(count: int) -> Tensor:
    """Random images with as many pixels on as MNIST has, 13 in 100, which is what NADE's training time depends on."""
    return (torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(0)) < 0.13).float()


def loop_over_pixels(model: NADE, x: Tensor) -> Tensor:
    """The loss of NADE as it is commonly written: the hidden layer of one pixel after the other."""
    pixels = x.flatten(1)[:, model.pixel_order]
    W, V, b = (parameter[model.pixel_order] for parameter in (model.W, model.V, model.b))  # noqa: N806
    a, logits = model.c.expand(len(x), -1), []
    for i in range(pixels.shape[1]):
        logits.append(torch.sigmoid(a) @ V[i] + b[i])
        a = a + pixels[:, i : i + 1] * W[i]
    errors = torch.nn.functional.binary_cross_entropy_with_logits(torch.stack(logits, 1), pixels, reduction="sum")
    return errors / len(x)


def benchmark_nade_training() -> None:
    """A training step of NADE with 500 hidden units on 100 images: a loop over pixels against the package's form."""
    model, x = NADE(), digits_like(100)

    def step(loss: Callable[[Tensor], Tensor]) -> None:
        model.zero_grad()
        loss(x).backward()

    torch.testing.assert_close(loop_over_pixels(model, x), model.training_loss(x))
    loop, ours = lambda: step(lambda x: loop_over_pixels(model, x)), lambda: step(model.training_loss)
    report("NADE training step", seconds(loop), seconds(ours))
    report("NADE training step, peak memory", peak_bytes(loop) / 2**20, peak_bytes(ours) / 2**20, "MiB", "less")


@torch.no_grad()
def benchmark_nade_sampling() -> None:
    """Sampling 1,000 images from NADE: one full evaluation a pixel, extrapolated from 16 of them, against ours."""
    model = NADE()
    model.b.fill_(-1.9)  # samples with about as many pixels on as digits have
    x = model.sample(1000)
    some = range(0, 784, 49)  # full evaluations of images of which the first pixels are drawn

    def full_evaluations() -> None:
        for pixel in some:
            drawn = x.flatten(1) * (torch.arange(784) < pixel)
            torch.sigmoid(model.conditional_logits(drawn.view_as(x)))

    slow = seconds(full_evaluations, repeats=1) * 784 / len(some)
    report(
        f"sampling 1,000 NADE images, extrapolated from {len(some)} pixels", slow, seconds(lambda: model.sample(1000))
    )


ROW_BY_ROW: dict[str, Callable[[], AutoregressiveModel | OrderMixture]] = {
    "pixelcnn": lambda: PixelCNN(hidden_size=32),
    "gated_pixelcnn": lambda: GatedPixelCNN(hidden_size=32, num_layers=7, kernel_size=3),
    "row_lstm": lambda: RowLSTM(),
    "diagonal_bilstm": lambda: DiagonalBiLSTM(),
    "pixelsnail": lambda: PixelSNAIL(channels=32, num_layers=6, attention_every=3, heads=2),
}


@torch.no_grad()
def benchmark_raster_sampling() -> None:
    """Sampling 64 images from networks that go row by row: full evaluations, extrapolated from 16, against ours."""
    x = digits_like(64)
    for name, build in ROW_BY_ROW.items():
        model = build().eval()

        def full_evaluations(model: AutoregressiveModel | OrderMixture = model) -> None:
            for _ in range(16):
                if isinstance(model, OrderMixture):
                    model.conditional_logits(x, 0)
                else:
                    model.conditional_logits(x)

        drawn_at_once = model.joint_pixels if isinstance(model, OrderMixture) else 1
        slow = seconds(full_evaluations, repeats=1) * 784 / drawn_at_once / 16
        report(f"sampling 64 {name} images, extrapolated", slow, seconds(lambda model=model: model.sample(64)))


@torch.no_grad()
def benchmark_raster_scoring() -> None:
    """Scoring 500 images by networks that go row by row: all at once, against as many as an evaluation takes."""
    x = digits_like(500)
    for name, build in ROW_BY_ROW.items():
        model = build().eval()

        def in_chunks(model: AutoregressiveModel | OrderMixture = model) -> None:
            for part in x.split(model.score_chunk):
                model.log_prob(part)

        slow = seconds(lambda model=model: model.log_prob(x), repeats=1)
        report(f"scoring 500 {name} images", slow, seconds(in_chunks, repeats=1))


def training_seconds(
    model: GenerativeModel, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None, repeats: int = 3
) -> float:
    """Time of a training step without its optimizer."""

    def step() -> None:
        model.zero_grad()
        (loss or model.training_loss)(x).backward()

    return seconds(step, repeats)


def plain_convolution(conv: CausalConv2d, x: Tensor) -> Tensor:
    """A causal convolution as it is commonly written: a whole kernel, most of which is masked."""
    whole = torch.nn.functional.pad(conv.weight * conv.mask, (0, 0, 0, conv.above))
    return torch.nn.functional.conv2d(x, whole, conv.bias, padding=(conv.above, conv.side))


def plain_gated_pixelcnn(model: GatedPixelCNN, x: Tensor) -> Tensor:
    """The loss of a gated PixelCNN as it is commonly written, in PyTorch's default memory format."""
    v, h = x, None
    for layer in model.net.layers:
        y = plain_convolution(layer.vertical, v)
        above = torch.nn.functional.pad(layer.link(y), (0, 0, 1, -1))
        h = layer.add(h, plain_convolution(layer.horizontal, x if h is None else h) + above)
        f, g = y.chunk(2, dim=1)
        v = torch.tanh(f) * torch.sigmoid(g)
    return -bernoulli_log_prob(model.net._logits(h), x).mean()


def convolutional_seconds(reuse: bool) -> float:
    """Time of a training step of a convolutional VAE on 100 images, in a process that keeps freed memory or not."""
    if reuse:
        reuse_freed_memory()
    return training_seconds(VAE(network="conv", hidden_sizes=(32, 64)), digits_like(100), repeats=31)


def benchmark_memory() -> None:
    """A training step in a process as it is, against one in a process that keeps the memory it freed."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        plain, reusing = processes.map(convolutional_seconds, [False, True])
    report("VAE training step, convolutional", plain, reusing)


def benchmark_gated_training() -> None:
    """A training step of the gated PixelCNN on 50 images: as commonly written, against ours, compiled."""
    model, x = GatedPixelCNN(hidden_size=32, num_layers=7, kernel_size=3), digits_like(50)
    torch.testing.assert_close(plain_gated_pixelcnn(model, x), model.training_loss(x))
    plain = training_seconds(model, x, lambda x: plain_gated_pixelcnn(model, x))
    report("gated PixelCNN training step", plain, training_seconds(model, x))
    model.net.compile()
    report("gated PixelCNN training step, compiled", plain, training_seconds(model, x))


def benchmark_lstm_training() -> None:
    """A training step of the recurrent models on 50 images, against one of a PixelCNN with as many layers."""
    x = digits_like(50)
    pixelcnn = training_seconds(PixelCNN(hidden_size=16), x)
    for model in (DiagonalBiLSTM(), RowLSTM()):
        report(f"{type(model).__name__} training step", training_seconds(model, x), pixelcnn, than="a PixelCNN's")


def image_by_image(model: VAE, images: Tensor, num_particles: int, rows: int = 100) -> Tensor:
    """The importance-weighted bound as it is commonly written: every image repeated for each particle, by way of
    encoder, distribution objects and decoder, some rows at a time.
    """
    bounds = []
    for image in images:
        log_weights = []
        for _ in range(num_particles // rows):
            x = image.expand(rows, 1, 28, 28).contiguous()
            posterior = model.posterior(x)
            z = posterior.rsample()
            prior = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
            errors = torch.nn.functional.binary_cross_entropy_with_logits(model.decode(z), x, reduction="none")
            log_prior, log_q = prior.log_prob(z).sum(1), posterior.log_prob(z).sum(1)
            log_weights.append(log_prior - log_q - errors.sum((1, 2, 3)))
        bounds.append(torch.logsumexp(torch.cat(log_weights), 0) - math.log(num_particles))
    return torch.stack(bounds)


@torch.no_grad()
def benchmark_iw_bound() -> None:
    """IW-5000 of a VAE, 200-200-50: a loop over images against the package's form, and its memory."""
    model, images, particles = VAE().eval(), digits_like(10), 5000

    def ours() -> Tensor:
        return model.iw_bound(images, particles, generator=keyed_generators(0, range(len(images))))

    def loop() -> Tensor:
        return image_by_image(model, images, particles)

    torch.testing.assert_close(loop().mean(), ours().mean(), rtol=0.0, atol=5.0)  # other random numbers
    slow, fast = seconds(loop), seconds(ours)
    print(f"IW-{particles}, image by image: {len(images) / slow:.1f} images/s; ours: {len(images) / fast:.1f} images/s")
    report(f"IW-{particles} of {len(images)} images", slow, fast)
    print(f"peak memory of ours: {peak_bytes(ours) / 2**20:.0f} MiB, whatever the numbers of images and particles")


BENCHMARKS = {
    "data": benchmark_data,
    "load": benchmark_load,
    "memory": benchmark_memory,
    "nade_training": benchmark_nade_training,
    "nade_sampling": benchmark_nade_sampling,
    "raster_sampling": benchmark_raster_sampling,
    "raster_scoring": benchmark_raster_scoring,
    "gated_training": benchmark_gated_training,
    "lstm_training": benchmark_lstm_training,
    "iw_bound": benchmark_iw_bound,
}


def main() -> None:
    """Runs the named benchmarks, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(BENCHMARKS)}; default: all")
    names = parser.parse_args().names
    reuse_freed_memory()
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
