"""Plants bugs in a copy of the tree, one at a time, and tells which of them the tests catch.

    python tools/mutations.py            # all of them, about half an hour on one core
    python tools/mutations.py nade made  # those whose description or file has one of these words

A mutation is a file, a text in it, another text in its place, and the test files that should notice. The status is 1
if a mutation survives, or no longer applies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_genmodels"


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        what: What is wrong with it.
        file: Path within the package.
        old: Text that occurs once.
        new: What stands in its place.
        tests: Files of tests, by their names, that should fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = [
    # Likelihoods.
    Mutation(
        "log-likelihood: the mean over the pixels, not their sum",
        "functional.py",
        "return F.logsigmoid(-against).sum(dim=-1)",
        "return F.logsigmoid(-against).mean(dim=-1)",
        ("functional", "contract"),
    ),
    Mutation(
        "log-likelihood: an odd factor of the product is left out",
        "functional.py",
        "        if odd:\n            break\n",
        "",
        ("functional", "contract"),
    ),
    Mutation(
        "log-mean-exp without the number of terms",
        "functional.py",
        "return torch.logsumexp(values, dim=dim) - math.log(values.shape[dim])",
        "return torch.logsumexp(values, dim=dim)",
        ("functional", "contract"),
    ),
    Mutation(
        "mixture of orders: log-probabilities are averaged",
        "base/autoregressive.py",
        "return log_mean_exp(self.log_prob_by_order(x), dim=0)",
        "return self.log_prob_by_order(x).mean(dim=0)",
        ("contract",),
    ),
    Mutation(
        "importance-weighted bound: blocks of particles are averaged by their number",
        "base/latent.py",
        "bound = bound - math.log(num_particles)",
        "bound = bound - math.log(len(sizes) * sizes[0])",
        ("latent",),
    ),
    Mutation(
        "ELBO: the divergence has the weight of the training loss",
        "models/vae.py",
        "return reconstruction - kl\n",
        "return reconstruction - 0.98 * kl\n",
        ("contract",),
    ),
    Mutation(
        "VAE: log q without the standard deviation",
        "models/vae.py",
        "log_prob = standard_normal_log_prob(noise) - gaussian.stddev.log().sum(dim=-1)",
        "log_prob = standard_normal_log_prob(noise)",
        ("contract",),
    ),
    # Samplers.
    Mutation(
        "a pixel is drawn with the probability of the other value",
        "functional.py",
        "(uniforms < torch.sigmoid(at_least_float32(logits)))",
        "(uniforms > torch.sigmoid(at_least_float32(logits)))",
        ("contract",),
    ),
    Mutation(
        "MADE: hidden units are computed a pixel too early",
        "models/made.py",
        "done, now = ready[layer][max(i - 1, 0)], ready[layer][i]",
        "done, now = ready[layer][i], ready[layer][min(i + 1, len(order))]",
        ("contract",),
    ),
    Mutation(
        "NADE: the state is updated with the pixel of before",
        "models/nade.py",
        "a.addr_(drawn, self.W[pixel])",
        "a.addr_(drawn, self.W[self.pixel_order[i - 1]])",
        ("contract",),
    ),
    Mutation(
        "EoNADE: observed pixels stay where they are in the order",
        "models/eonade.py",
        "orders = orders.gather(1, is_drawn.argsort(dim=1, stable=True))",
        "orders = orders.gather(1, torch.arange(orders.shape[1]).expand_as(orders))",
        ("autoregressive",),
    ),
    Mutation(
        "mixture of orders: samples come from all orders but the last",
        "base/autoregressive.py",
        "which = uniform((num_samples,), generator, x) * len(self.pixel_orders)",
        "which = uniform((num_samples,), generator, x) * max(1, len(self.pixel_orders) - 1)",
        ("contract",),
    ),
    Mutation(
        "completion in the order that suits the mask least",
        "base/autoregressive.py",
        "self.joint_pixels).min(dim=1)",
        "self.joint_pixels).max(dim=1)",
        ("contract", "complete"),
    ),
    Mutation(
        "uniform numbers of keyed generators are all the same row",
        "random.py",
        "rows = [torch.rand(tuple(shape)[1:], generator=g, device=g.device, dtype=dtype) for g in generator]",
        "rows = [torch.rand(tuple(shape)[1:], generator=generator[0], device='cpu', dtype=dtype)] * len(generator)",
        ("contract", "processes"),
    ),
    Mutation(
        "keyed noise forgets its seed",
        "random.py",
        "derive_seed(seed, int(index))",
        "derive_seed(0, int(index))",
        ("contract",),
    ),
    # Orders and masks.
    Mutation(
        "masks of outputs let a pixel see itself",
        "orders.py",
        "return inputs < outputs.unsqueeze(1) if strict else",
        "return inputs <= outputs.unsqueeze(1) if strict else",
        ("orders", "contract"),
    ),
    Mutation(
        "masks of hidden units are strict",
        "orders.py",
        "else inputs <= outputs.unsqueeze(1)",
        "else inputs < outputs.unsqueeze(1)",
        ("orders",),
    ),
    Mutation(
        "rot90 turns the other way",
        "orders.py",
        '"rot90": lambda grid: grid.T.flip(0)',
        '"rot90": lambda grid: grid.T.flip(1)',
        ("orders",),
    ),
    Mutation(
        "snake: the first row backwards, not the second",
        "orders.py",
        "if row % 2 else indices",
        "if row % 2 == 0 else indices",
        ("orders",),
    ),
    Mutation(
        "random orders forget their seed",
        "orders.py",
        'derive_seed("pixel order", seed)',
        'derive_seed("pixel order")',
        ("orders",),
    ),
    # Metrics.
    Mutation(
        "standard error without the correction for the mean",
        "base/metrics.py",
        "/ (self.count - 1)",
        "/ self.count",
        ("metrics",),
    ),
    Mutation(
        "validation images of a process have the indices of the first",
        "random.py",
        "range(start * world_size + rank, (start + count) * world_size + rank, world_size)",
        "range(start * world_size, (start + count) * world_size, world_size)",
        ("contract",),
    ),
    Mutation(
        "values per image in the order in which they came",
        "base/metrics.py",
        "return values[order]",
        "return values",
        ("metrics", "processes"),
    ),
    Mutation(
        "bits per dimension in nats",
        "functional.py",
        "return nats / (math.prod(event_shape) * math.log(2))",
        "return nats / math.prod(event_shape)",
        ("functional", "metrics"),
    ),
    # Loading.
    Mutation(
        "loaded models are left in training mode",
        "weights/files.py",
        "    model.load_state_dict(state, strict=True)\n    return model.eval()",
        "    model.load_state_dict(state, strict=True)\n    return model",
        ("contract",),
    ),
    Mutation(
        "the checksum of the weights is not compared",
        "weights/files.py",
        "    if found != expected:\n",
        "    if found == '':\n",
        ("weights",),
    ),
    Mutation(
        "the checksum of the config is not compared",
        "weights/files.py",
        "if digest != _digest(config):",
        "if not digest:",
        ("weights",),
    ),
    Mutation(
        "options that contradict the weights are ignored",
        "weights/files.py",
        "if _plain(value) != _plain(hyper_parameters[key]):",
        "if key == '':",
        ("weights",),
    ),
    Mutation(
        "weights that are not finite are loaded",
        "weights/files.py",
        "if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):",
        "if tensor.is_floating_point() and tensor.numel() == 0:",
        ("training",),
    ),
    Mutation(
        "verify tolerates any difference",
        "weights/verify.py",
        "if difference > TOLERANCE:",
        "if difference > 1e9:",
        ("figures",),
    ),
]


def run(mutation: Mutation, tree: Path) -> str:
    """Applies a mutation to a copy of the tree, runs its tests, and takes it back."""
    file = tree / PACKAGE / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return f"DOES NOT APPLY: the text occurs {text.count(mutation.old)} times in {mutation.file}"
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    files = [f"tests/test_{name}.py" for name in mutation.tests]
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout", "600", *files]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return "SURVIVED"
    if done.returncode != 1:  # pytest's status for tests that failed
        return f"BROKEN: pytest ended with status {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"caught by {failed[0].split(' - ')[0].removeprefix('FAILED ')}"


def main() -> None:
    """Runs the mutations that the arguments choose, and prints a line for each."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word.lower() in f"{m.what} {m.file}".lower() for word in words)]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "dist", "build", "demo", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for mutation in chosen:
            began = time.monotonic()
            verdicts.append(run(mutation, tree))
            print(f"{mutation.what}: {verdicts[-1]} ({time.monotonic() - began:.0f} s)", flush=True)
    caught = sum(verdict.startswith("caught") for verdict in verdicts)
    print(f"{caught} of {len(chosen)} mutations caught")
    raise SystemExit(caught != len(chosen))


if __name__ == "__main__":
    main()
