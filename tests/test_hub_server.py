"""The local Hub, asked by the real client: every client runs in a fresh process, as its settings are read once.

The tests also record what `huggingface_hub` itself does when the Hub fails, for the code that builds on it. Clients do
not sleep between attempts: `naps` holds the seconds that they would have slept.
"""

import json
import math
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

pytestmark = pytest.mark.hub

REPO = "tester/model"
WEIGHTS = random.Random(0).randbytes(3 * 2**20)
CARD = b"---\nlicense: apache-2.0\n---\n# Model\n"
FILES = {"README.md": CARD, "config.json": b'{"width": 8}', "w.safetensors": WEIGHTS}

PRELUDE = """
import hashlib, json, os, pathlib, time
naps, result = [], {}
time.sleep = naps.append
import huggingface_hub as hf
from huggingface_hub import errors
api = hf.HfApi()

def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()

def attempt(function, *args, **kwargs):
    # [name of the exception, status of the response, status of its cause's response, message]
    try:
        return function(*args, **kwargs)
    except Exception as error:
        statuses = [getattr(getattr(e, "response", None), "status_code", None) for e in (error, error.__cause__)]
        return [type(error).__name__, *statuses, str(error)]
"""

Client = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"hf_tester": "tester", "hf_other": "other"}) as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """Run steps in a fresh Python; returns what they put into `result`."""

    def run(steps: str, *, home: str = "home", token: str | None = None, **settings: str) -> dict[str, Any]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**inherited, **hub.environment(tmp_path / home, token), **settings}
        code = f"{PRELUDE}\n{textwrap.dedent(steps)}\nprint(json.dumps(result))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture
def model(hub: HubServer) -> str:
    """The commit of a repository that holds FILES, tagged v1."""
    oid = hub.commit(REPO, FILES)
    hub.tag(REPO, "v1")
    return oid


def test_upload_and_download(hub: HubServer, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    wrote = client(
        """
        repo = "tester/model"
        result["user"] = hf.whoami()["name"]
        result["existed"] = api.repo_exists(repo)
        result["url"] = str(api.create_repo(repo))
        result["again"] = str(api.create_repo(repo, exist_ok=True))
        result["conflict"] = attempt(api.create_repo, repo)[:2]
        result["first"] = api.upload_folder(repo_id=repo, folder_path="folder").oid
        api.create_tag(repo, tag="v1")
        result["same tag"] = attempt(api.create_tag, repo, tag="v1")[:2]
        result["second"] = api.upload_folder(repo_id=repo, folder_path="folder").oid
        upload = dict(repo_id=repo, path_in_repo="config.json", path_or_fileobj="folder/config.json")
        result["same file"] = api.upload_file(**upload).oid
        copy = hf.CommitOperationAdd("copy.safetensors", "folder/w.safetensors")
        delete = hf.CommitOperationDelete("README.md")
        result["third"] = api.create_commit(repo, [copy, delete], commit_message="Third").oid
        stale = [hf.CommitOperationAdd("a.txt", b"a")]
        result["stale"] = attempt(api.create_commit, repo, stale, commit_message="a", parent_commit=result["first"])[:2]
        """
    )
    assert (wrote["user"], wrote["existed"]) == ("tester", False)
    assert wrote["url"] == wrote["again"] == f"{hub.endpoint}/{REPO}"
    assert wrote["conflict"] == wrote["same tag"] == ["HfHubHTTPError", 409]
    assert wrote["stale"] == ["HfHubHTTPError", 412]
    assert wrote["first"] == wrote["second"] == wrote["same file"]
    assert hub.commits(REPO)[1:] == [wrote["first"], wrote["third"]]
    assert hub.count("POST", "/commit/") == 3  # one of which was refused
    assert hub.count("PUT") == hub.count("POST", "lfs/verify") == 1  # the copy's content was there already
    assert hub.files(REPO, "v1").items() >= FILES.items()
    assert hub.files(REPO).keys() == {".gitattributes", "config.json", "copy.safetensors", "w.safetensors"}

    read = client(
        """
        repo, first = "tester/model", os.environ["FIRST"]
        def download(name, revision):
            return sha256(hf.hf_hub_download(repo, name, revision=revision))
        result["branch"] = download("copy.safetensors", "main")
        result["tag"] = [download(name, "v1") for name in ("README.md", "config.json", "w.safetensors")]
        result["commit"] = [download(name, first) for name in ("README.md", "config.json", "w.safetensors")]
        result["snapshot"] = sorted(os.listdir(hf.snapshot_download(repo, revision="v1")))
        info = api.model_info(repo, revision="v1")
        result["info"] = [info.sha, sorted(file.rfilename for file in info.siblings)]
        result["exists"] = [api.file_exists(repo, "README.md", revision=revision) for revision in ("v1", "main")]
        result["revisions"] = [api.revision_exists(repo, revision) for revision in ("v1", "v2")]
        result["list"] = sorted(api.list_repo_files(repo))
        lfs = next(file.lfs for file in api.list_repo_tree(repo, recursive=True) if file.path == "w.safetensors")
        result["lfs"] = [lfs.sha256, lfs.size]
        refs = api.list_repo_refs(repo)
        result["refs"] = {ref.name: ref.target_commit for ref in refs.branches + refs.tags}
        result["history"] = [commit.commit_id for commit in api.list_repo_commits(repo)]
        """,
        home="another",
        token="",
        FIRST=wrote["first"],
    )
    hashes = [hub.repositories[REPO].find("v1").files[name].sha256 for name in FILES]
    assert read["tag"] == read["commit"] == hashes
    assert read["branch"] == hashes[2]
    assert read["lfs"] == [hashes[2], len(WEIGHTS)]
    assert read["info"] == [wrote["first"], sorted([".gitattributes", *FILES])]
    assert read["snapshot"] == sorted([".gitattributes", *FILES])
    assert read["exists"] == read["revisions"] == [True, False]
    assert read["list"] == sorted(hub.files(REPO))
    assert read["refs"] == {"main": wrote["third"], "v1": wrote["first"]}
    assert read["history"] == hub.commits(REPO)[::-1]


@pytest.mark.usefixtures("model")
def test_errors_are_the_clients_own(hub: HubServer, client: Client) -> None:
    steps = """
        repo, add = "tester/model", [hf.CommitOperationAdd("a.txt", b"a")]
        result["commit"] = attempt(api.create_commit, repo, add, commit_message="a")[:2]
        result["create"] = attempt(api.create_repo, "tester/another")[:2]
        result["tag"] = attempt(api.create_tag, repo, tag="v2")[:2]
        result["read"] = attempt(hf.hf_hub_download, repo, "config.json")[:2]
        result["entry"] = attempt(hf.hf_hub_download, repo, "absent.json")[:2]
        result["revision"] = attempt(hf.hf_hub_download, repo, "config.json", revision="v9")[:2]
        result["repository"] = attempt(hf.hf_hub_download, "tester/absent", "config.json")[:2]
        result["info"] = attempt(api.model_info, "tester/absent")[:2]
        result["info revision"] = attempt(api.model_info, repo, revision="0" * 40)[:2]
        result["snapshot"] = attempt(hf.snapshot_download, repo, revision="v9")[:2]
        result["naps"] = naps
        """
    not_found = {
        "entry": ["RemoteEntryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
        "repository": ["RepositoryNotFoundError", 404],
        "info": ["RepositoryNotFoundError", 404],
        "info revision": ["RevisionNotFoundError", 404],
        "snapshot": ["RevisionNotFoundError", 404],
    }
    writes = ("commit", "create", "tag")
    anonymous = client(steps, home="anonymous", token="")
    assert isinstance(anonymous.pop("read")[0], str)  # a path
    assert anonymous == not_found | {name: ["HfHubHTTPError", 401] for name in writes} | {"naps": []}

    other = client(steps, home="other", token="hf_other")
    assert isinstance(other.pop("read")[0], str)
    assert other == not_found | {name: ["HfHubHTTPError", 403] for name in writes} | {"naps": []}

    invalid = client(steps, home="invalid", token="hf_invalid")
    assert invalid.pop("naps") == []
    assert all(error == ["HfHubHTTPError", 401] for error in invalid.values())
    assert len(hub.commits(REPO)) == 2


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.usefixtures("model")
def test_one_failure(hub: HubServer, client: Client, status: int) -> None:
    """Most requests are repeated; create_repo, model_info and the commit itself are not, nor is a GET of content."""
    headers = {"Retry-After": "3"} if status == 429 else {}
    hub.commit("tester/absent", {"a.txt": b"a"})
    for method, path in [
        ("HEAD", "/resolve/main/config.json"),
        ("GET", "/storage/"),
        ("GET", "/api/models/tester/model$"),
        ("POST", "/api/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/storage/"),
        ("POST", "/commit/"),
    ]:
        hub.fail(method, path, status, headers=headers)
    got = client(
        """
        def record(name, function, *args, **kwargs):
            naps.clear()
            answer = attempt(function, *args, **kwargs)
            result[name] = [answer[:2] if isinstance(answer, list) else "done", list(naps)]
        repo = "tester/model"
        record("head", hf.hf_hub_download, repo, "config.json")
        record("content", hf.hf_hub_download, repo, "w.safetensors")
        record("info", api.model_info, repo)
        record("create", api.create_repo, "tester/new")
        def upload():
            return api.upload_file(repo_id=repo, path_in_repo="x.bin", path_or_fileobj=b"new")
        record("upload", upload)
        record("upload again", upload)
        """
    )
    # The first HEAD is asked without retries and, as nothing is cached, a second time with them.
    error, nap = ["HfHubHTTPError", status], 4.0 if status == 429 else 1
    assert got["head"] == ["done", []]
    assert got["content"] == (["done", [nap]] if status == 429 else [error, []])
    assert got["info"] == got["create"] == [error, []]
    assert got["upload"] == [error, [nap, nap, nap]]  # preupload, batch and PUT were repeated, the commit was not
    assert got["upload again"] == ["done", []]
    assert hub.count("PUT", "/storage/") == 2
    assert hub.files(REPO)["x.bin"] == b"new"


@pytest.mark.usefixtures("model")
def test_failing_for_good(hub: HubServer, client: Client) -> None:
    """The client gives up after one attempt and six more; a file in the cache is used at once."""
    steps = """
        answer = attempt(hf.hf_hub_download, "tester/model", "config.json")
        result.update(answer=answer[:3] if isinstance(answer, list) else "done", naps=naps)
        """
    hub.fail("HEAD", "/resolve/", status=500, times=math.inf)
    assert client(steps) == {"answer": ["LocalEntryNotFoundError", None, 500], "naps": [1, 2, 4, 8, 8]}
    assert hub.count("HEAD") == 7
    hub.heal()
    assert client(steps) == {"answer": "done", "naps": []}
    hub.fail("HEAD", "/resolve/", status=500, times=math.inf)
    assert client(steps) == {"answer": "done", "naps": []}


@pytest.mark.usefixtures("model")
def test_cut_connection(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """The client goes on after the last whole chunk that it has; chunks are 10 MB unless one says otherwise."""
    steps = """
        hf.constants.DOWNLOAD_CHUNK_SIZE = int(os.environ.get("CHUNK", hf.constants.DOWNLOAD_CHUNK_SIZE))
        answer = attempt(hf.hf_hub_download, "tester/model", "w.safetensors")
        result.update(error=answer[0]) if isinstance(answer, list) else result.update(sha256=sha256(answer))
        result["naps"] = naps
        """
    hub.cut("/storage/", after_bytes=10**6, times=math.inf)
    assert client(steps, home="home") == {"error": "RemoteProtocolError", "naps": [1] * 5}
    assert not any((tmp_path / "home").rglob("*.incomplete"))
    assert not any((tmp_path / "home").rglob("*.safetensors"))
    assert not any(path.is_file() for path in (tmp_path / "home").glob("hub/models--*/blobs/*"))

    sha256 = hub.repositories[REPO].find().files["w.safetensors"].sha256
    for home, settings, ranges in [
        ("large", {}, [None, None, None]),
        ("small", {"CHUNK": "65536"}, [None, "bytes=983040-", "bytes=1966080-"]),
    ]:
        hub.heal()
        hub.log.clear()
        hub.cut("w.safetensors", after_bytes=10**6, times=2)
        assert client(steps, home=home, **settings) == {"sha256": sha256, "naps": [1, 1]}
        assert [request.headers.get("range") for request in hub.log if request.method == "GET"] == ranges
    assert client(steps, home="home") == {"sha256": sha256, "naps": []}


def test_slow_server(hub: HubServer, client: Client, model: str) -> None:
    steps = """
        answer = attempt(hf.hf_hub_download, "tester/model", "config.json")
        result["got"] = answer[0] if isinstance(answer, list) else pathlib.Path(answer).parent.name
        """
    assert client(steps) == {"got": model}
    hub.commit(REPO, {"config.json": b"{}"})
    hub.slow("/resolve/main/config.json", seconds=30)
    assert client(steps, HF_HUB_ETAG_TIMEOUT="1") == {"got": model}  # from the cache
    assert client(steps) == {"got": hub.commits(REPO)[-1]}


def test_server_gone(hub: HubServer, client: Client, model: str) -> None:
    steps = """
        def record(name, function, *args, **kwargs):
            answer = attempt(function, *args, **kwargs)
            result[name] = answer[0] if isinstance(answer, list) else "done"
        repo, commit = "tester/model", os.environ["COMMIT"]
        record("pinned", hf.hf_hub_download, repo, "w.safetensors", revision=commit)
        record("branch", hf.hf_hub_download, repo, "config.json")
        record("snapshot", hf.snapshot_download, repo, revision=commit)
        """
    done = {"pinned": "done", "branch": "done", "snapshot": "done"}
    assert client(steps, COMMIT=model) == done
    hub.log.clear()
    endpoint = hub.endpoint
    hub.stop()
    assert client(steps, COMMIT=model) == done
    assert client(steps, COMMIT=model, HF_HUB_OFFLINE="1") == done
    for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
        cold = client(steps, COMMIT=model, home="cold", **settings)
        assert cold["pinned"] == cold["branch"] == "LocalEntryNotFoundError"
        # huggingface_hub 1.30 lets the cause through when the snapshot is named by its commit.
        assert cold["snapshot"] in ("LocalEntryNotFoundError", "OfflineModeIsEnabled" if settings else "ConnectError")
    hub.start()
    assert hub.endpoint == endpoint
    assert hub.requests == []
    assert client(steps, COMMIT=model, home="cold") == done


def test_offline_with_a_cold_cache_says_so(client: Client) -> None:
    got = client(
        """
        result["download"] = attempt(hf.hf_hub_download, "tester/model", "config.json")[3]
        result["snapshot"] = attempt(hf.snapshot_download, "tester/model")[3]
        result["info"] = attempt(api.model_info, "tester/model")[::3]
        """,
        HF_HUB_OFFLINE="1",
    )
    assert "cannot find the requested files" in got["download"]
    assert "HF_HUB_OFFLINE=0" in got["snapshot"]
    assert got["info"][0] == "OfflineModeIsEnabled"
    assert "HF_HUB_OFFLINE" in got["info"][1]


def test_stop_closes_open_connections(hub: HubServer, model: str) -> None:
    connection = HTTPConnection("127.0.0.1", int(hub.endpoint.rpartition(":")[2]), timeout=10)

    def get(span: str) -> tuple[int, str | None, bytes]:
        connection.request("GET", f"/{REPO}/resolve/{model}/config.json", headers={"Range": span})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Range"), response.read()

    assert get("bytes=2-6") == (206, "bytes 2-6/12", b"width")
    assert get("bytes=9-") == (206, "bytes 9-11/12", b" 8}")
    assert get("bytes=12-")[:2] == (416, "bytes */12")
    hub.stop()
    with pytest.raises((ConnectionError, HTTPException)):
        get("bytes=2-6")
    connection.close()
    hub.start()
    assert get("bytes=2-6")[0] == 206
