"""Variational inference made visible: what lies between log p(x) and the bounds on it.

    log p(x) = ELBO + KL(q(z|x) || p(z|x)),    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z))

For a VAE with two latent variables, all of it can be computed by quadrature. Trains one, unless it is given:

python recipes/variational_gap.py --data.source digits --out variational_gap
python recipes/variational_gap.py --weights runs/vae2/weights --data.root /path/to/data --out variational_gap

Writes gap.png (the terms, image by image), manifold.png (what the plane of latents decodes to), interpolations.png
(straight lines between codes) and gap.json. Needs matplotlib: pip install 'lightning-genmodels[plots]'.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from lightning import Trainer
from torch import Tensor

from lightning_genmodels import BinarizedMNISTDataModule, load
from lightning_genmodels.data.images import grid, write_png
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import lines
from lightning_genmodels.models import VAE
from lightning_genmodels.random import keyed_generators
from lightning_genmodels.system import reuse_freed_memory

PARTICLES = (1, 5, 50, 500)


def train(data: BinarizedMNISTDataModule, epochs: int) -> VAE:
    """A VAE with two latent variables."""
    model = VAE(data.event_shape, latent_dim=2, kl_warmup_steps=200, learning_rate=2e-3)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return model.eval()


def log_likelihood(model: VAE, x: Tensor, points: int = 101, width: float = 8.0) -> Tensor:
    """Log p(x), (B,) nats, by quadrature: coarse over the plane, then fine around the posterior's mass.

    The coarse grid covers 6 standard deviations of the prior; the fine one, for each image, ``width`` standard
    deviations of the posterior, which are estimated on the coarse one.
    """
    line = torch.linspace(-6.0, 6.0, 121, dtype=x.dtype)
    plane = torch.cartesian_prod(line, line)  # (G, 2)
    bounds = []
    for image in x.split(1):
        coarse = torch.cat([model.log_joint(image, part[:, None]) for part in plane.split(2000)])[:, 0].double()  # (G,)
        share = torch.softmax(coarse, dim=0).to(x)[:, None]
        mean = (share * plane).sum(0)
        std = (share * (plane - mean).square()).sum(0).sqrt().clamp(min=0.1)
        steps = torch.linspace(-width, width, points, dtype=x.dtype)
        fine = mean + std * torch.cartesian_prod(steps, steps)
        log_joint = torch.cat([model.log_joint(image, part[:, None]) for part in fine.split(2000)])[:, 0].double()
        cell = (steps[1] - steps[0]).square() * std.prod()
        bounds.append(torch.logsumexp(log_joint, dim=0) + cell.double().log())
    return torch.stack(bounds)


@torch.no_grad()
def terms(model: VAE, x: Tensor, draws: int = 2000) -> dict[str, Tensor]:
    """All terms of every image, (B,) nats: averages over draws, and log p(x) by quadrature."""
    log_px = log_likelihood(model, x)
    found = {"log_likelihood": log_px}
    log_weights = model.log_weights(x, draws, generator=keyed_generators(0, range(len(x)))).double()
    for k in PARTICLES:
        groups = log_weights.unflatten(0, (-1, k))
        found["elbo" if k == 1 else f"iw{k}"] = (torch.logsumexp(groups, dim=1) - math.log(k)).mean(dim=0)
    _, kl = model.elbo_terms(x)
    found["reconstruction"] = found["elbo"] + kl
    found["kl_to_prior"] = kl
    # KL(q(z|x) || p(z|x)) = E_q[log q(z|x) - log p(z|x)] = E_q[log p(x) - log weight]
    found["kl_to_posterior"] = (log_px - log_weights).mean(dim=0)
    return found


@torch.no_grad()
def manifold(model: VAE, side: int = 20) -> Tensor:
    """What a grid over the plane of latents decodes to, (side^2, 1, H, W) probabilities: equal mass of the prior."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    z = torch.stack([columns, rows], dim=-1).flatten(0, 1)
    return torch.sigmoid(model.decode(z.to(next(model.parameters()))))


@torch.no_grad()
def interpolations(model: VAE, x: Tensor, steps: int = 10) -> Tensor:
    """Straight lines between the codes of pairs of images, (pairs * steps, 1, H, W) probabilities."""
    return torch.sigmoid(model.decode(lines(model.encode(x[0::2]), model.encode(x[1::2]), steps))).flatten(0, 1)


def draw(found: dict[str, Tensor], file: Path) -> None:
    """Bars: how log p(x) splits into reconstruction, divergence from the prior and the gap; and how bounds close it."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise OptionError("plots need matplotlib: pip install 'lightning-genmodels[plots]'") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    index = range(len(found["elbo"]))
    parts = [("reconstruction", -found["reconstruction"]), ("KL(q || prior)", found["kl_to_prior"])]
    below = torch.zeros_like(found["elbo"])
    for label, part in parts:
        left.bar(index, part.tolist(), bottom=below.tolist(), label=label)
        below = below + part
    left.bar(index, (-found["kl_to_posterior"]).tolist(), bottom=below.tolist(), label="-KL(q || posterior)", alpha=0.6)
    left.plot(index, (-found["log_likelihood"]).tolist(), "k_", markersize=14, label="-log p(x)")
    left.set(xlabel="image", ylabel="nats", title="The ELBO and what it misses")
    left.legend()
    gaps = [(found["log_likelihood"] - found["elbo" if k == 1 else f"iw{k}"]).mean().item() for k in PARTICLES]
    right.loglog(PARTICLES, gaps, "o-")
    right.set(xlabel="particles k", ylabel="nats below log p(x), mean", title="Importance-weighted bounds")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(
    data: BinarizedMNISTDataModule,
    out: Path = Path("variational_gap"),
    weights: str | None = None,
    epochs: int = 20,
    num_images: int = 20,
) -> None:
    """Computes the terms, and writes pictures and figures.

    Args:
        data: The data module.
        out: Folder to write.
        weights: A VAE with two latent variables; default: one that is trained now.
        epochs: Of that training.
        num_images: Test images.
    """
    data.prepare_data()
    model = train(data, epochs) if weights is None else load(weights)
    if not isinstance(model, VAE) or model.num_latents != 2 or len(getattr(model, "latent_dims", [2])) > 1:
        raise OptionError("quadrature needs a VAE with one layer of two latent variables")
    x = data.images("test")[:num_images].float()
    found = terms(model, x)
    out.mkdir(parents=True, exist_ok=True)
    write_png(out / "manifold.png", grid(manifold(model)), scale=1)
    write_png(out / "interpolations.png", grid(interpolations(model, x[: 2 * (len(x) // 2)]), columns=10), scale=2)
    draw(found, out / "gap.png")
    means = {name: values.mean().item() for name, values in found.items()}
    (out / "gap.json").write_text(json.dumps(means, indent=2) + "\n", encoding="utf-8")
    print(f"means over {len(x)} images, in nats")
    for name, value in means.items():
        print(f"{name:16} {value:10.3f}")
    sums = means["elbo"] + means["kl_to_posterior"] - means["log_likelihood"]
    print(f"ELBO + KL(q || posterior) - log p(x) = {sums:.6f}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_function_arguments(main, skip={"data"})
    parser.add_class_arguments(BinarizedMNISTDataModule, "data")
    options = parser.instantiate(parser.parse_args())
    reuse_freed_memory()
    main(**{key: value for key, value in vars(options).items() if key != "config"})
