"""Theorems fail for models that break them, and name what is wrong; ``genmodels audit`` finds planted defects."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_genmodels.base import ExplicitModel, GenerativeModel
from lightning_genmodels.cli import main
from lightning_genmodels.errors import OptionError
from lightning_genmodels.functional import bernoulli_log_prob
from lightning_genmodels.models import MADE, NADE, VAE, Bernoulli, Markov
from lightning_genmodels.random import Noise, sample_bernoulli
from lightning_genmodels.testing import (
    FALSE_ALARM_RATE,
    Check,
    NotApplicableError,
    TheoremError,
    audit,
    check_batching,
    check_bounds,
    check_chain_rule,
    check_completion,
    check_counts,
    check_drawing,
    check_elbo,
    check_final,
    check_gradients,
    check_input,
    check_joint,
    check_mixture,
    check_model,
    check_normalization,
    check_order,
    check_precision,
    check_processes,
    check_round_trip,
    check_samples,
    check_sampling,
    p_value,
    tiny,
)

FLAWED = Path(__file__).parent / "flawed"
spec = importlib.util.spec_from_file_location("flawed_models", FLAWED / "flawed_models.py")
assert spec is not None
assert spec.loader is not None
flawed_models = importlib.util.module_from_spec(spec)  # not on the path: other tests are about other registries
spec.loader.exec_module(flawed_models)


class Overriding(NADE):
    def log_prob(self, x: Tensor) -> Tensor:  # type: ignore[misc]
        return self._log_prob(x.double())


class NoGenerator(Bernoulli):
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return super()._sample(num_samples, None)


class SeesItself(NADE):
    def conditional_logits(self, x: Tensor) -> Tensor:
        return super().conditional_logits(x) + 0.01 * x


class OtherDraws(NADE):
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        return super()._fill(x, observed, 1 - uniforms)


class ForgetsWhatIsObserved(NADE):
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor) -> Tensor:
        return torch.where(observed, x, super()._fill(torch.zeros_like(x), observed, uniforms))


class TooLikely(NADE):
    def _log_prob(self, x: Tensor) -> Tensor:
        return super()._log_prob(x) + 1e-6


class OtherOrders(MADE):
    def _fill(self, x: Tensor, observed: Tensor, uniforms: Tensor, which: Tensor) -> Tensor:
        return super()._fill(x, observed, uniforms, which * 0)


class Brighter(Bernoulli):
    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli((self.logits + 0.5).expand(num_samples, *self.event_shape), generator)


class InBfloat16(NADE):
    def _log_prob(self, x: Tensor) -> Tensor:
        return super()._log_prob(x).bfloat16()


class CountsBatches(Markov):
    def statistics(self, x: Tensor) -> Tensor:
        return super().statistics(x) + 1


class Unused(NADE):
    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), hidden_size: int = 4) -> None:
        super().__init__(event_shape, hidden_size)
        self.unused = nn.Parameter(torch.zeros(3))


class NoisyValidation(NADE):
    def _validation_log_prob(self, x: Tensor, indices: range) -> Tensor:
        return super()._log_prob(x) * (1 + 0.1 * (len(x) % 2))


class Beta(VAE):
    def _elbo(self, x: Tensor, generator: Noise) -> Tensor:
        reconstruction, kl = self._elbo_terms(x, generator)
        return reconstruction - 0.9 * kl


class MeanOfLogWeights(VAE):
    def _iw_bound(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        return self._log_weights(x, num_particles, generator).mean(0)


class AboveTheLikelihood(VAE):
    def _log_weights(self, x: Tensor, num_particles: int, generator: Noise) -> Tensor:
        return super()._log_weights(x, num_particles, generator) + 3.0


def with_state_that_is_not_saved() -> NADE:
    model = tiny(NADE)
    model.pixel_order = model.pixel_order.flip(0)
    return model


@pytest.mark.parametrize(
    ("check", "flawed", "evidence"),
    [
        (check_final, lambda: tiny(Overriding), "Overriding.log_prob"),
        (check_samples, lambda: tiny(NoGenerator), "other samples from the same seed"),
        (check_input, lambda: tiny(Overriding), "taken: without a batch dimension, up to 255, half on, NaN"),
        (check_batching, lambda: flawed_models.BatchStatistics((1, 2, 2)), "encode"),
        (check_order, lambda: tiny(SeesItself), "conditionals change by"),
        (check_chain_rule, lambda: flawed_models.MeanOverPixels((1, 2, 3)), "a mean over the 6 pixels"),
        (check_mixture, lambda: flawed_models.AveragedLogits((1, 2, 3)), "averaged logits?"),
        (check_drawing, lambda: tiny(OtherDraws), "pixels are drawn otherwise"),
        (check_drawing, lambda: tiny(OtherOrders), "pixels are drawn otherwise"),
        (check_completion, lambda: tiny(ForgetsWhatIsObserved), "chi-square"),
        (check_normalization, lambda: tiny(TooLikely), "the sum is 1 + 1e-06"),
        (check_sampling, lambda: tiny(Brighter), "chi-square"),
        (check_sampling, lambda: Brighter((1, 9, 9)).double(), "1000 pixels given all others"),
        (check_precision, lambda: tiny(InBfloat16), "torch.bfloat16"),
        (check_counts, lambda: tiny(CountsBatches), "statistics do not add up"),
        (check_gradients, lambda: tiny(Unused), "unused"),
        (check_round_trip, with_state_that_is_not_saved, "other samples"),
        (check_processes, lambda: tiny(NoisyValidation), "two processes"),
        (check_joint, lambda: flawed_models.MeanInTheBound((1, 3, 3)), "a mean over the 9 pixels"),
        (check_elbo, lambda: tiny(Beta), "standard errors apart"),
        (check_bounds, lambda: tiny(MeanOfLogWeights), "from its log-weights"),
        (check_bounds, lambda: tiny(AboveTheLikelihood), "log p(x)"),
    ],
)
def test_a_theorem_fails_for_a_model_that_breaks_it(
    check: Check, flawed: Callable[[], GenerativeModel], evidence: str
) -> None:
    with pytest.raises(TheoremError) as caught:
        check(flawed())
    assert evidence in caught.value.evidence
    assert str(caught.value) == f"{caught.value.theorem}: {caught.value.evidence}"


class Half(ExplicitModel):
    """Independent pixels, at a scale of the log-probability."""

    small = {"event_shape": (1, 2, 2)}

    def __init__(self, event_shape: Sequence[int] = (1, 28, 28), scale: float = 1.0, **options: Any) -> None:
        super().__init__(event_shape, **options)
        self.logits = nn.Parameter(torch.linspace(-4, 1, self.event_shape[1] * self.event_shape[2]))
        self.scale = scale

    def _logits(self, count: int) -> Tensor:
        return self.logits.view(self.event_shape).expand(count, *self.event_shape)

    def _log_prob(self, x: Tensor) -> Tensor:
        return bernoulli_log_prob(self._logits(len(x)), x) * self.scale

    def _sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        return sample_bernoulli(self._logits(num_samples), generator)


@pytest.mark.parametrize("check", [check_normalization, check_sampling])
def test_large_images_without_an_order_need_no_enumeration(check: Check) -> None:
    check(Half())
    with pytest.raises(TheoremError) as caught:
        check(Half(scale=1 / 784))
    assert check is check_sampling or "a mean over the pixels" in caught.value.evidence


def test_a_theorem_about_other_models_says_so() -> None:
    with pytest.raises(NotApplicableError, match="no pixel order"):
        check_order(tiny(VAE))
    with pytest.raises(NotApplicableError, match="too many to enumerate"):
        check_completion(NADE((1, 9, 9), 3))
    with pytest.raises(OptionError, match="at most 16 pixels and two latents"):
        check_model(NADE((1, 9, 9), 3))


def test_the_chi_square_test_has_its_false_alarm_rate() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.1, 0.07, 0.0297, 1e-4, 1e-4, 1e-4, *[0.0] * 8]).double()
    generator = torch.Generator().manual_seed(0)
    digits = 2 ** torch.arange(3, -1, -1)

    def value(of: Tensor) -> float:
        drawn = torch.multinomial(of, 1000, replacement=True, generator=generator)
        return p_value(((drawn[:, None] & digits) > 0).float().view(-1, 1, 2, 2), probabilities)

    values = torch.tensor([value(probabilities) for _ in range(2000)])
    assert 0.03 < (values < 0.05).double().mean() < 0.07
    assert values.min() > FALSE_ALARM_RATE
    assert value(torch.tensor([0.4, 0.4, 0.1, 0.07, 0.03]).double()) < FALSE_ALARM_RATE
    assert value(torch.tensor([*probabilities[:8], 0.01, *[0.0] * 7]).double()) == 0.0


def test_an_audit_changes_nothing_and_goes_on_after_an_error() -> None:
    class Broken(NADE):
        def conditional_logits(self, x: Tensor) -> Tensor:
            raise KeyError("nothing")

    model = Broken((1, 3, 3), 4).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = list(audit(model))
    assert any(finding.verdict == "FAILS" and "KeyError: 'nothing'" in finding.evidence for finding in found)
    assert any(finding.verdict == "holds" for finding in found)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.slow(reason="audits models of real size")
@pytest.mark.parametrize("name", ["bernoulli", "nade", "made", "vae", "gated_pixelcnn"])
def test_no_false_alarm(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", name])
    verdicts = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert "FAILS" not in verdicts
    assert verdicts.count("holds") >= 4


AUDITS = """
import sys
from lightning_genmodels.cli import main
for name in sys.argv[1:]:
    print("audit", name)
    try:
        main(["audit", name])
    except SystemExit as end:
        print("status", end.code)
"""

DEFECTS = {  # the theorem that fails, and the evidence
    "batch_statistics": ["does not depend on the images beside it .*elbo"],
    "averaged_logits": ["A mixture of orders averages the joint probabilities .*averaged logits"],
    "mean_over_pixels": ["is the sum of the log-probabilities of the conditionals.*a mean over the 784 pixels"],
    "mean_in_the_bound": ["is a sum over pixels.*a mean over the 784 pixels", r"E\[log w\] = ELBO"],
}


def test_an_audit_names_the_defects_of_published_code(run_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FLAWED), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", AUDITS, *DEFECTS]
    done = subprocess.run(command, cwd=run_folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    audits = done.stdout.split("audit ")[1:]
    for printed, (name, patterns) in zip(audits, DEFECTS.items(), strict=True):
        lines = printed.splitlines()
        assert lines[0] == name
        assert lines[-1] == "status 1"
        failed = [line for line in lines if line.startswith("FAILS")]
        assert len(failed) == len(patterns)
        assert all(re.search(pattern, line) for pattern, line in zip(patterns, failed, strict=True))
