"""Publishing to the Hub and loading from it, against a local server, each client in a fresh process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer

from lightning_genmodels.errors import OptionError
from lightning_genmodels.evaluation.report import with_deviation
from lightning_genmodels.weights.publish import publish
from lightning_genmodels.weights.records import list_weights, registry

pytestmark = pytest.mark.hub

OWNER = "lightning-genmodels"
REPO = f"{OWNER}/bernoulli"
FILES = ["README.md", "config.json", "metrics.json", "model.safetensors", "samples.png", "values.safetensors"]

PRELUDE = """
import json, time
naps, result = [], {}
time.sleep = naps.append  # retries cost no time
from pathlib import Path
import torch
import lightning_genmodels as gm
from lightning_genmodels.errors import GenmodelsError
from lightning_genmodels.weights.publish import publish
from lightning_genmodels.weights.records import Weights

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except GenmodelsError as error:
        return f"{type(error).__name__}: {error}"

def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))

def same(model):
    return equal(model, gm.load("bernoulli"))
"""

Client = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"hf_owner": OWNER, "hf_other": "other"}) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Runs steps in a fresh Python, which put what they find into ``result``."""

    def run(steps: str, token: str = "hf_owner", home: str = "home", **variables: str) -> dict[str, Any]:
        environment = {**os.environ, **hub.environment(tmp_path / home, token=token), **variables}
        code = PRELUDE + textwrap.dedent(steps) + "\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def test_publish_then_load_by_branch_tag_and_commit(hub: HubServer, client: Client) -> None:
    found = client(f"""
        planned = publish("bernoulli", "{OWNER}")
        result["dry"] = [planned[0].commit, str(planned[0])]
    """)
    assert found["dry"][0] is None
    assert "dry run, nothing was sent" in found["dry"][1]
    assert hub.requests == []

    found = client(f"""
        result["commit"] = publish("bernoulli", "{OWNER}", dry_run=False)[0].commit
        result["same"] = [same(gm.load("{REPO}", revision=r)) for r in (None, "main", "static_v1", result["commit"])]
    """)
    assert found["same"] == [True] * 4
    assert set(FILES) <= set(hub.files(REPO, "static_v1"))
    commits = hub.commits(REPO)

    again = client(f"""result["commit"] = publish("bernoulli", "{OWNER}", dry_run=False)[0].commit""")
    assert again["commit"] == found["commit"]
    assert hub.commits(REPO) == commits

    card = hub.files(REPO)["README.md"].decode()
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    metadata = yaml.safe_load(header)
    assert metadata["license"] == "apache-2.0"
    figure = registry()["bernoulli.static_v1"].metrics["figures"]["nll"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == round(figure["value"], 3)
    assert f"| nll | exact | {figure['value']:.2f} | {figure['standard_error']:.2f} |" in body
    quality = registry()["bernoulli.static_v1"].metrics["quality"]
    frechet = (quality.get(kind, {}).get("samples", {}).get("frechet") for kind in ("results", "deviations"))
    assert f"| bernoulli.static_v1 | {with_deviation(*frechet)} |" in body
    usage = body.split("```python\n")[1].split("```")[0]
    assert client(usage + "\nresult['shape'] = list(images.shape)")["shape"] == [64, 1, 28, 28]


def test_a_failure_in_the_middle_is_one_error_and_is_resumed(hub: HubServer, client: Client) -> None:
    steps = f"""result["said"] = str(attempt(publish, "bernoulli", "{OWNER}", dry_run=False))"""
    hub.fail("POST", "/commit/", status=500)
    said = client(steps)["said"]
    assert said.startswith("WeightsError: publishing to lightning-genmodels/bernoulli failed")
    assert "run it again" in said
    stored = hub.count("PUT", "/storage/")
    hub.fail("POST", "/tag/", status=500)
    assert "failed" in client(steps)["said"]
    assert (
        "published as" in client(f"""result["said"] = str(publish("bernoulli", "{OWNER}", dry_run=False)[0])""")["said"]
    )
    assert hub.count("PUT", "/storage/") == stored
    assert client(f"""result["same"] = same(gm.load("{REPO}", revision="static_v1"))""")["same"]


def test_refusals_say_the_way_out(hub: HubServer, client: Client) -> None:
    steps = f"""result["said"] = str(attempt(publish, "bernoulli", "{OWNER}", dry_run=False))"""
    assert "run `hf auth login`, or set HF_TOKEN" in client(steps, token="hf_wrong")["said"]
    assert "may not write to lightning-genmodels/bernoulli (403)" in client(steps, token="hf_other")["said"]
    hub.fail("POST", "/api/repos/create", status=429)
    assert "run it again" in client(steps)["said"]


def test_publishing_all_of_a_model_twice_changes_nothing_the_second_time(hub: HubServer, client: Client) -> None:
    names = list_weights("markov")
    assert len(names) > 1
    repo = f"{OWNER}/markov"
    found = client(f"""result["commits"] = [p.commit for p in publish("markov", "{OWNER}", dry_run=False)]""")
    assert len(hub.commits(repo)) == 2  # the Hub's own, and the default weight
    assert len(set(found["commits"])) == len(names)
    default = next(registry()[name] for name in names if registry()[name].default)
    assert hub.files(repo) == hub.files(repo, default.revision)
    state = repr(hub.repositories[repo])
    hub.log.clear()
    again = client(f"""result["commits"] = [p.commit for p in publish("markov", "{OWNER}", dry_run=False)]""")
    assert again == found
    assert repr(hub.repositories[repo]) == state
    assert list(hub.repositories[repo].branches) == ["main"]
    assert hub.count("POST", "/commit/") == 0


def test_a_weight_that_is_not_the_default_leaves_main_alone(hub: HubServer, client: Client) -> None:
    name = next(name for name in list_weights("markov") if not registry()[name].default)
    weights = registry()[name]
    repo = f"{OWNER}/markov"
    client(f"""publish("{name}", "{OWNER}", dry_run=False)""")
    assert list(hub.files(repo)) == [".gitattributes"]
    assert hashlib.sha256(hub.files(repo, weights.revision)["model.safetensors"]).hexdigest() == weights.sha256
    hub.fail("POST", "/tag/", status=500)  # from a state that a failure left
    hub.repositories[repo].tags.clear()
    client(f"""attempt(publish, "{name}", "{OWNER}", dry_run=False)""")
    client(f"""publish("{name}", "{OWNER}", dry_run=False)""")
    assert list(hub.files(repo)) == [".gitattributes"]
    assert list(hub.repositories[repo].branches) == ["main"]


def test_all_tags_are_checked_before_anything_is_sent(hub: HubServer, client: Client) -> None:
    repo, last = f"{OWNER}/markov", list_weights("markov")[-1]
    hub.commit(repo, {"model.safetensors": b"other weights"})
    hub.tag(repo, registry()[last].revision)
    state = repr(hub.repositories[repo])
    said = client(f"""result["said"] = str(attempt(publish, "markov", "{OWNER}", dry_run=False))""")["said"]
    assert "nothing was uploaded" in said
    assert repr(hub.repositories[repo]) == state
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize("namespace", ["", "a/b", "-", ".", "a b"])
def test_a_namespace_is_one_name(namespace: str) -> None:
    with pytest.raises(OptionError, match="the name of a user or an organization"):
        publish("bernoulli", namespace)


def test_a_tag_is_never_moved(hub: HubServer, client: Client) -> None:
    hub.commit(REPO, {"model.safetensors": b"other weights"})
    hub.tag(REPO, "static_v1")
    said = client(f"""result["said"] = str(attempt(publish, "bernoulli", "{OWNER}", dry_run=False))""")["said"]
    assert "tags are never moved" in said


def test_weights_that_do_not_ship_come_from_the_hub_once(hub: HubServer, client: Client) -> None:
    client(f"""publish("bernoulli", "{OWNER}", dry_run=False)""")
    absent = """
        shipped = gm.load("bernoulli").state_dict()
        Weights.folder = property(lambda self: None)  # as if they did not come with the package
        from lightning_genmodels.weights.loading import load_model
    """
    load = (
        absent
        + """
        model = attempt(load_model, "bernoulli")
        result["got"] = model if isinstance(model, str) else torch.equal(model.logits, shipped["logits"])
    """
    )
    hub.log.clear()
    assert client(load, home="fresh")["got"] is True
    assert hub.count("GET", "/resolve/static_v1/config.json") == 1
    hub.stop()
    assert client(load, home="fresh")["got"] is True  # from the cache, with the server gone
    assert client(load, home="fresh", HF_HUB_OFFLINE="1")["got"] is True
    for home, variables in (("empty", {}), ("empty", {"HF_HUB_OFFLINE": "1"})):
        said = client(load, home=home, **variables)["got"]
        assert said.startswith(
            "WeightsError: cannot get the weights of lightning-genmodels/bernoulli at revision static_v1"
        )
        assert "check the name and the network, or give a local folder" in said


def test_processes_that_load_at_once_download_once(hub: HubServer, client: Client) -> None:
    client(f"""publish("bernoulli", "{OWNER}", dry_run=False)""")
    hub.log.clear()
    hub.slow("model.safetensors", seconds=2.0, times=1)
    steps = f"""result["same"] = same(gm.load("{REPO}", revision="static_v1"))"""
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: client(steps, home="shared"), range(3)))
    assert [f["same"] for f in found] == [True] * 3
    assert hub.count("GET", "model.safetensors") == 1


def test_swapped_weights_on_the_hub_are_refused(hub: HubServer, client: Client) -> None:
    """Files that fit each other but not the registry, as someone would upload who took over the repository."""
    steps = """
        import io, tempfile
        from lightning_genmodels.models import Bernoulli
        with tempfile.TemporaryDirectory() as folder:
            Bernoulli().save_pretrained(folder)
            for file in Path(folder).iterdir():
                result[file.name] = file.read_bytes().hex()
    """
    hub.commit(REPO, {name: bytes.fromhex(content) for name, content in client(steps).items()})
    hub.tag(REPO, "static_v1")
    said = client("""
        Weights.folder = property(lambda self: None)
        result["said"] = str(attempt(gm.load, "bernoulli"))
    """)["said"]
    assert "is not the published one: expected sha256 " + registry()["bernoulli.static_v1"].config_sha256 in said


def test_failures_of_downloads_are_one_error_and_leave_no_file(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client(f"""publish("bernoulli", "{OWNER}", dry_run=False)""")
    load = f"""result["said"] = str(attempt(gm.load, "{REPO}"))"""
    names = {"missing": ("nobody/nothing", "nobody/nothing"), "revision": (REPO, "gone")}
    for name, revision in names.values():
        said = client(f"""result["said"] = str(attempt(gm.load, "{name}", revision="{revision}"))""", home="a")["said"]
        assert said.startswith(f"WeightsError: cannot get the weights of {name} at revision {revision}")
    hub.fail("*", "model.safetensors", status=500, times=10**6)
    assert "cannot get the weights" in client(load, home="b")["said"]
    hub.heal()
    hub.cut("model.safetensors", after_bytes=1000, times=10**6)
    assert "cannot get the weights" in client(load, home="c")["said"]
    kept = [path for path in (tmp_path / "c").rglob("*") if path.is_file() and path.stat().st_size >= 1000]
    assert not [path for path in kept if "blobs" in path.parts and path.stat().st_size < 3000]
    hub.heal()
    hub.slow("/resolve/", seconds=0.5, times=2)
    hub.fail("HEAD", "/resolve/", status=429, times=1)
    assert "Bernoulli(" in client(load, home="c")["said"]


def test_push_to_hub_and_from_pretrained(hub: HubServer, client: Client) -> None:
    found = client("""
        from lightning_genmodels.models import VAE, Bernoulli
        model = VAE((1, 3, 3), hidden_sizes=(4,), latent_dim=2, learning_rate=0.5)
        result["address"] = model.push_to_hub("lightning-genmodels/mine")
        again = VAE.from_pretrained("lightning-genmodels/mine")
        result["equal"] = equal(model, again)
        result["rate"] = again.hparams["learning_rate"]
        result["wrong"] = attempt(Bernoulli.from_pretrained, "lightning-genmodels/mine")
        result["refused"] = attempt(model.push_to_hub, "other/mine")
    """)
    assert found["address"].endswith("lightning-genmodels/mine")
    assert found["equal"]
    assert found["rate"] == 0.5
    assert "not a Bernoulli" in found["wrong"]
    assert "(403)" in found["refused"]


def test_publish_command(hub: HubServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_genmodels.cli", "publish", "bernoulli", OWNER]
    environment = {**os.environ, **hub.environment(tmp_path, token="hf_owner")}
    dry = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(name in dry for name in FILES)
    assert hub.requests == []
    done = subprocess.run([*command, "--dry_run=false"], env=environment, capture_output=True, text=True, check=True)
    assert f"published as {hub.commits(REPO)[-1]}" in done.stdout
    refused = subprocess.run(
        [*command[:-1], "someone-else", "--dry_run=false"], env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "genmodels: error: publishing to someone-else/bernoulli failed" in refused.stderr
