"""The app as a page uses it: over HTTP, with trained models."""

from __future__ import annotations

import http.client
import json
import math
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_genmodels import load
from lightning_genmodels.app.server import Server
from lightning_genmodels.app.studio import Studio
from lightning_genmodels.base import ExplicitModel
from lightning_genmodels.errors import ImageError, OptionError

N = 784
TOP = "1" * 392 + "0" * 392
BOTTOM = TOP[::-1]


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


@pytest.fixture(scope="module")
def digit(studio: Studio) -> str:
    text: str = studio.describe()["digits"][0]
    return text


def ask(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    text = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
    connection.request(method, path, text)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if "json" in response.headers["Content-Type"] else content


def use(server: Server, use_: str, **options: Any) -> tuple[int, Any]:
    """Status and result of a use, waited for."""
    return wait(server, ask(server, "POST", f"/api/{use_}", options))


def wait(server: Server, answer: tuple[int, Any]) -> tuple[int, Any]:
    job = answer[1].get("job")
    while answer[0] == 202:
        answer = ask(server, "GET", f"/api/jobs/{job}")
    return answer


@pytest.mark.parametrize("name", ["nade.static_v1", "eonade.static_v2", "made.static_v1", "vae.static_v1"])
def test_a_completion_keeps_what_is_given_and_draws_the_rest(server: Server, digit: str, name: str) -> None:
    status, found = use(server, "complete", name=name, image=digit, observed=TOP, draws=3, seed=5)
    assert status == 200
    assert len(found["images"]) == len(set(found["images"])) == 3
    assert all(image[:392] == digit[:392] and "1" in image[392:] for image in found["images"])
    assert use(server, "complete", name=name, image=digit, observed=TOP, draws=3, seed=5)[1] == found


@pytest.mark.parametrize(
    ("name", "observed", "badge", "said"),
    [
        ("nade.static_v1", TOP, "exact", "exact for this mask"),
        ("nade.static_v1", BOTTOM, "ignores", "392 given pixels come too late"),
        ("pixelsnail.static_v4", BOTTOM, "one_order", "one of the 8 orders that it averages"),
        ("eonade.static_v2", BOTTOM, "one_order", "exact for an order of its own"),
        ("vae.static_v1", TOP, "chain", "exact in the limit"),
    ],
)
def test_a_badge_says_whether_a_completion_is_exact(
    studio: Studio, digit: str, name: str, observed: str, badge: str, said: str
) -> None:
    found = studio.complete(name, digit, observed, draws=1)
    assert found["badge"] == badge
    assert said in found["note"]


def test_a_surprise_per_pixel_adds_up_to_the_likelihood(server: Server, digit: str) -> None:
    model = load("nade")
    assert isinstance(model, ExplicitModel)
    x = torch.tensor([float(pixel) for pixel in digit]).view(1, 1, 28, 28)
    status, found = use(server, "score", name="nade.static_v1", image=digit)
    assert status == 200
    assert found["nats"] == pytest.approx(-model.log_prob(x).item(), abs=0.01)
    assert sum(found["surprise"]) == pytest.approx(found["nats"], abs=0.5)
    assert not found["is_bound"]


@pytest.mark.parametrize("name", ["nade.static_v1", "bernoulli.static_v1", "vae.static_v1", "made.static_v1"])
def test_noise_is_less_likely_than_a_digit(studio: Studio, digit: str, name: str) -> None:
    noise = "".join(map(str, torch.randint(2, (N,), generator=torch.Generator().manual_seed(0)).tolist()))
    real, noisy = studio.score(name, digit), studio.score(name, noise)
    assert noisy["nats"] > real["nats"] + 100
    assert noisy["percentile"] == 0 < real["percentile"] < 100
    assert len(real["surprise"]) == N
    assert all(math.isfinite(value) for value in noisy["surprise"])


def test_independent_pixels_are_as_surprising_as_the_whole(studio: Studio, digit: str) -> None:
    found = studio.score("bernoulli.static_v1", digit)
    assert sum(found["surprise"]) == pytest.approx(found["nats"], abs=0.5)


def test_every_model_samples_by_its_seed(studio: Studio) -> None:
    for name in studio.records:
        images = studio.sample(name, 2, seed=3)["images"]
        assert all(len(image) == N and set(image) == {"0", "1"} for image in images)
        assert images == studio.sample(name, 2, seed=3)["images"]
        assert images != studio.sample(name, 2, seed=4)["images"]


@pytest.mark.parametrize("name", ["nade.static_v1", "markov.static_hilbert10_v1", "made.static_v1"])
def test_drawing_pixel_by_pixel_tells_the_order_and_the_chances(studio: Studio, name: str) -> None:
    found = studio.draw(name, seed=1)
    assert sorted(found["order"]) == list(range(N))
    chance = [
        share if pixel == "1" else 1 - share for pixel, share in zip(found["image"], found["probability"], strict=True)
    ]
    assert all(0 <= share <= 1 for share in found["probability"])
    assert sum(chance) / N > 0.7  # what was drawn was likely


@pytest.mark.parametrize("name", ["vae.static_v1", "gan.static_v1", "autoencoder.dynamic_v1"])
def test_the_corners_of_the_plane_are_the_codes_themselves(server: Server, name: str) -> None:
    _, corners = use(server, "corners", name=name, seed=2)
    status, plane = use(server, "plane", name=name, codes=corners["codes"])
    assert status == 200
    size, greys = plane["size"], plane["greys"]
    assert len(greys) == size**2
    for code, index in zip(corners["codes"], [0, size - 1, size * (size - 1), size**2 - 1], strict=True):
        assert use(server, "decode", name=name, code=code)[1]["grey"] == greys[index]


CODE = [0.0] * 50
WRONG: list[tuple[str, Any, int, str]] = [
    ("complete", {}, 400, "expected an object with name, image, observed, draws, seed"),
    ("complete", [], 400, "expected an object"),
    ("complete", "{", 400, "expected JSON"),
    ("complete", b"\xff", 400, "expected JSON"),
    ("complete", {"name": "nade.static_v1", "image": 3, "observed": TOP}, 400, "expected image to be text"),
    ("complete", {"name": "nade.static_v1", "image": "01", "observed": TOP}, 400, "784 characters 0 and 1"),
    ("complete", {"name": "nade.static_v1", "image": TOP, "observed": "1" * N}, 400, "expected hidden pixels"),
    ("complete", {"name": "nade.static_v1", "image": TOP, "observed": TOP, "draws": 99}, 400, "expected draws"),
    ("complete", {"name": "nade.static_v1", "image": TOP, "observed": TOP, "seed": -1}, 400, "expected seed"),
    ("complete", {"name": "gan.static_v1", "image": TOP, "observed": TOP}, 400, "cannot complete images; take one"),
    ("complete", {"name": "/etc/passwd", "image": TOP, "observed": TOP}, 404, "unknown weight '/etc/passwd'"),
    ("score", {"name": "gan.static_v1", "image": TOP}, 400, "has no likelihood"),
    ("sample", {"name": "nade.static_v1", "count": 10**9}, 400, "expected count"),
    ("sample", {"name": "nade.static_v1", "count": True}, 400, "expected count to be a whole number"),
    ("draw", {"name": "vae.static_v1"}, 400, "draws all pixels at once"),
    ("corners", {"name": "nade.static_v1"}, 400, "has no codes"),
    ("decode", {"name": "vae.static_v1", "code": [1.0]}, 400, "expected codes"),
    ("decode", '{"name": "vae.static_v1", "code": [' + "NaN," * 49 + "NaN]}", 400, "finite numbers"),
    ("plane", {"name": "vae.static_v1", "codes": [CODE] * 3}, 400, "expected four codes"),
    ("plane", {"name": "vae.static_v1", "codes": [[]] * 4}, 400, "expected codes"),
    ("__init__", {}, 404, "there is no use"),
]


@pytest.mark.parametrize(("name", "body", "status", "said"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_request_gets_one_sentence(server: Server, name: str, body: Any, status: int, said: str) -> None:
    found, answer = wait(server, ask(server, "POST", f"/api/{name}", body))
    assert found == status
    assert said in answer["error"]
    assert "\n" not in answer["error"]


def test_other_addresses_and_large_bodies_are_refused(server: Server) -> None:
    assert ask(server, "GET", "/../server.py")[0] == 404
    assert ask(server, "GET", "/api/jobs/none")[0] == 404
    assert ask(server, "POST", "/api/sample", "x" * 300_000)[0] == 413


def test_the_page_asks_no_other_machine(server: Server) -> None:
    for path in ("/", "/app.js", "/style.css"):
        status, content = ask(server, "GET", path)
        assert status == 200
        assert b"http://" not in content
        assert b"https://" not in content
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request("GET", "/")
    assert "default-src 'self'" in connection.getresponse().headers["Content-Security-Policy"]


def test_visitors_queue_and_hear_how_many_are_ahead(server: Server) -> None:
    slow = {"name": "gated_pixelcnn.static_v2", "count": 64}
    jobs = [ask(server, "POST", "/api/sample", {**slow, "seed": seed})[1]["job"] for seed in range(3)]
    found: dict[str, Any] = {}
    waited = []
    while len(found) < len(jobs):  # a page asks for all of its jobs
        for job in jobs:
            status, answer = ask(server, "GET", f"/api/jobs/{job}")
            if status == 202:
                waited.append(answer)
            else:
                found[job] = answer
    assert all(len(answer["images"]) == 64 for answer in found.values())
    assert {1, 2} & {answer["ahead"] for answer in waited}
    assert any(0 < answer["share"] < 1 for answer in waited)


def test_a_taken_port_is_one_sentence(server: Server) -> None:
    with pytest.raises(OptionError, match=r"cannot listen at 127\.0\.0\.1.*choose another --port"):
        Server(port=int(server.server_address[1]))


def test_nothing_given_is_a_sample_and_all_given_is_refused(studio: Studio) -> None:
    assert studio.complete("nade.static_v1", "0" * N, "0" * N, draws=1)["badge"] == "exact"
    with pytest.raises(ImageError, match="hide some"):
        studio.complete("nade.static_v1", "0" * N, "1" * N)


@pytest.mark.slow(reason="starts a process")
def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_genmodels.cli", "app", "--port=0", "--browser=false"]
    # A shell's background jobs ignore SIGINT, and so would a process that this one starts from such a job.
    options: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": tmp_path}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, **options) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            port = int(said.split("127.0.0.1:")[1].split(";")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=30):
                pass
            process.send_signal(signal.SIGINT)
            complaints = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert said.startswith("the app runs at http://127.0.0.1:")
    assert process.returncode == 0
    assert "Traceback" not in complaints
