"""A local server that speaks enough of the Hugging Face Hub's protocol for `huggingface_hub` to work with it.

It keeps model repositories in memory: branches and tags, without merges. There are no private repositories, pull
requests, or Xet transfers. Contents of LFS files are served, as by the Hub, from
another host name than the API, which refuses an Authorization header.

Example:
    >>> with HubServer() as hub:
    ...     hub.commit("tester/model", {"config.json": b"{}"})
    ...     hub.fail("HEAD", r"/resolve/.*/config\\.json", status=500, times=1)
    ...     subprocess.run([sys.executable, "client.py"], env={**os.environ, **hub.environment(tmp_path)}, check=True)
    ...     assert hub.count("HEAD", r"config\\.json") == 2
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Generic, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".ckpt", ".npz", ".pt", ".safetensors")
LFS_SIZE = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What a client sent: `path` is as it stood in the request line, header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.path).query))

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    """What the server answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An error to be answered in the Hub's form; `code` is one of EntryNotFound, RevisionNotFound, RepoNotFound."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        if code:
            headers["X-Error-Code"] = code
        self.response = Response.of({"error": message}, status, {"X-Error-Message": message, **headers})


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit; an LFS file is stored in git as a pointer to its content."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def content_oid(self) -> str:
        """Changes with the content; the client compares its own files with it, and names cached files by it."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    date: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """Commits, and the branches and tags that name some of them."""

    name: str
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag or commit id names."""
        oid = self.branches.get(revision) or self.tags.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """A commit and all before it, newest first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.find(parent))
        return found

    def append(self, files: Mapping[str, StoredFile], title: str, branch: str = "main") -> Commit:
        """A new commit on a branch, or its last one if nothing has changed."""
        parent = self.branches.get(branch)
        if parent is None or dict(self.find(parent).files) != dict(files):
            state = [self.name, title, str(parent)]
            state += [f"{path} {file.git_oid}" for path, file in sorted(files.items())]
            oid = hashlib.sha1("\n".join(state).encode()).hexdigest()
            date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            self.commits.append(Commit(oid, parent, title, date, dict(files)))
            self.branches[branch] = oid
        return self.find(branch)


@dataclass
class Fault(Generic[T]):
    """Something that goes wrong with the next `times` requests that match."""

    method: str
    path: re.Pattern[str]
    times: float
    effect: T

    def matches(self, request: Request) -> bool:
        return self.times > 0 and self.method in ("*", request.method) and bool(self.path.search(request.path))


Handler = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
FIELDS = {"{repo}": r"(?P<repo>[^/]+/[^/]+)", "{revision}": "(?P<revision>[^/]+)", "{path}": "(?P<path>.+)"}


def route(methods: str, *patterns: str) -> Callable[[Handler], Handler]:
    """Register a method of `HubServer` for HTTP methods and paths; fields of the path become its arguments."""

    def register(handler: Handler) -> Handler:
        for pattern in patterns:
            expression = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
            for name, group in FIELDS.items():
                expression = expression.replace(name, group)
            ROUTES.extend((method, re.compile(expression), handler) for method in methods.split())
        return handler

    return register


class HubServer:
    """The server; as a context manager it runs while the block does.

    Args:
        tokens: the valid tokens and the user each one belongs to. A user owns the namespace of that name.

    Attributes:
        log: every request, in order of arrival, those of injected faults included.
        repositories: by name, "namespace/name".
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.tokens = dict(tokens or {"hf_tester": "tester"})
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self._objects: dict[str, bytes] = {}  # contents of LFS files by their SHA-256
        self._failures: list[Fault[Response]] = []
        self._delays: list[Fault[float]] = []
        self._cuts: list[Fault[int]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server: _Server | None = None
        self._port = 0

    # Life cycle

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, after `stop` on the same port as before."""
        if self._server is None:
            self._stopping.clear()
            self._server = _Server(("127.0.0.1", self._port), _HttpHandler)
            self._server.hub = self
            self._port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port and every connection; repositories, faults and the log stay."""
        if self._server is not None:
            self._stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.close_connections()
            self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """What a client needs in its environment *before* it imports `huggingface_hub`.

        Args:
            cache: becomes HF_HOME.
            token: by default the first of the server's tokens; an empty one for an anonymous client.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN": next(iter(self.tokens)) if token is None else token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # Repositories, without a client

    def commit(self, repo: str, files: Mapping[str, bytes | None], title: str = "Upload files") -> str:
        """Add or replace files (None removes one), creating the repository where needed; returns the commit's id."""
        with self._lock:
            repository = self.repositories.get(repo) or self._new_repository(repo)
            changed = dict(repository.find().files)
            for path, content in files.items():
                changed.pop(path, None)
                if content is not None:
                    file = StoredFile(content, _is_lfs(path, len(content), content[:512]))
                    changed[path] = file
                    if file.lfs:
                        self._objects[file.sha256] = content
            return repository.append(changed, title).oid

    def tag(self, repo: str, name: str, revision: str = "main") -> None:
        """Name a commit."""
        with self._lock:
            self.repositories[repo].tags[name] = self.repositories[repo].find(revision).oid

    def commits(self, repo: str) -> list[str]:
        """Ids of the commits on the main branch, oldest first; the first is the Hub's own, of .gitattributes."""
        with self._lock:
            return [commit.oid for commit in reversed(self.repositories[repo].history("main"))]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a commit."""
        with self._lock:
            return {path: file.content for path, file in self.repositories[repo].find(revision).files.items()}

    # Faults, and what was asked

    def fail(
        self, method: str, path_regex: str, status: int, times: float = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next `times` matching requests ("*" is any method, `math.inf` for ever) with an error."""
        response = HubError(status, "Injected failure", **(headers or {})).response
        self._failures.append(Fault(method, re.compile(path_regex), times, response))

    def slow(self, path_regex: str, seconds: float, times: float = 1) -> None:
        """Wait before answering the next `times` matching requests."""
        self._delays.append(Fault("*", re.compile(path_regex), times, seconds))

    def cut(self, path_regex: str, after_bytes: int, times: float = 1) -> None:
        """Close the connection in the body of the next `times` matching answers that are longer than `after_bytes`."""
        self._cuts.append(Fault("*", re.compile(path_regex), times, after_bytes))

    def heal(self) -> None:
        """Forget all faults."""
        for faults in (self._failures, self._delays, self._cuts):
            faults.clear()

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Method and path (with its query) of every request."""
        return [(request.method, request.path) for request in self.log]

    def count(self, method: str = "*", path_regex: str = "") -> int:
        """How many requests match."""
        return sum(method in ("*", sent) and bool(re.search(path_regex, path)) for sent, path in self.requests)

    # Answers

    def _respond(self, request: Request) -> Response:
        with self._lock:
            self.log.append(request)
            delay, failure = self._take(self._delays, request), self._take(self._failures, request)
        if delay is not None:
            self._stopping.wait(delay)
        if failure is not None:
            return failure
        try:
            with self._lock:
                return self._route(request)
        except HubError as error:
            return error.response
        except Exception:  # a 500 would only make the client wait and ask again
            traceback.print_exc()
            return HubError(501, "The test server has a bug: see its traceback").response

    def _cut_after(self, request: Request, response: Response) -> int | None:
        with self._lock:
            return self._take(self._cuts, request, lambda after: after < len(response.body))

    @staticmethod
    def _take(faults: list[Fault[T]], request: Request, applies: Callable[[T], bool] = lambda _: True) -> T | None:
        for fault in faults:
            if fault.matches(request) and applies(fault.effect):
                fault.times -= 1
                return fault.effect
        return None

    def _route(self, request: Request) -> Response:
        path = urlsplit(request.path).path
        for method, pattern, handler in ROUTES:
            if method == request.method and (match := pattern.fullmatch(path)):
                return handler(self, request, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(501, f"The test server does not know {request.method} {path}")

    def _reader(self, request: Request) -> str | None:
        """The user whose token was sent, if one was."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _writer(self, request: Request) -> str:
        user = self._reader(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return user

    def _readable(self, request: Request, repo: str) -> Repository:
        self._reader(request)
        if repo not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo]

    def _writable(self, request: Request, repo: str) -> Repository:
        user = self._writer(request)
        repository = self._readable(request, repo)
        if not repo.startswith(f"{user}/"):
            raise HubError(403, f"{user} may not write to {repo}")
        return repository

    def _new_repository(self, repo: str) -> Repository:
        self.repositories[repo] = repository = Repository(repo)
        repository.append({".gitattributes": StoredFile(GIT_ATTRIBUTES, lfs=False)}, "initial commit")
        return repository

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Response:
        return Response.of({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Response:
        data, user = request.json(), self._writer(request)
        if data.get("type", "model") != "model":
            raise HubError(501, "The test server has models only")
        if data.get("organization") not in (None, user):
            raise HubError(403, f"{user} may not create repositories in the namespace {data['organization']}")
        repo = f"{user}/{data['name']}"
        answer = {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}
        if repo in self.repositories:
            return Response.of({**answer, "error": "You already created this model repo"}, 409)
        self._new_repository(repo)
        return Response.of(answer)

    @route("GET", "/api/models/{repo}", "/api/models/{repo}/revision/{revision}")
    def _model_info(self, request: Request, repo: str, revision: str = "main") -> Response:
        repository = self._readable(request, repo)
        commit = repository.find(revision)
        info: dict[str, Any] = {"id": repo, "author": repo.partition("/")[0], "sha": commit.oid, "tags": []}
        info |= {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        info |= {"createdAt": repository.commits[0].date, "lastModified": commit.date}
        info["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
        return Response.of(info)

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, repo: str) -> Response:
        repository = self._readable(request, repo)
        heads = repository.branches.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in heads]
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        return Response.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("POST DELETE", "/api/models/{repo}/branch/{revision}")
    def _branch(self, request: Request, repo: str, revision: str) -> Response:
        repository = self._writable(request, repo)
        if request.method == "DELETE":
            if repository.branches.pop(revision, None) is None:
                raise HubError(404, f"No branch {revision}", "RevisionNotFound")
        elif revision in repository.branches:
            raise HubError(409, f"Branch {revision!r} already exists")
        else:
            start = request.json().get("startingPoint", "main") if request.body else "main"
            repository.branches[revision] = repository.find(start).oid
        return Response.of({})

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def _create_tag(self, request: Request, repo: str, revision: str) -> Response:
        repository, tag = self._writable(request, repo), request.json()["tag"]
        if tag in repository.tags:
            raise HubError(409, f"Tag {tag!r} already exists")
        repository.tags[tag] = repository.find(revision).oid
        return Response.of({})

    # Uploads: preupload says which files go to LFS, those are put and verified, then the commit names them all.

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, repo: str, revision: str) -> Response:
        stored = self._writable(request, repo).find(revision).files
        answers = []
        for entry in request.json()["files"]:
            path = entry["path"]
            lfs = _is_lfs(path, entry["size"], base64.b64decode(entry.get("sample", "")))
            oid = stored[path].content_oid if path in stored else None
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Response.of({"files": answers})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo: str) -> Response:
        self._writable(request, repo)
        objects = []
        for entry in request.json()["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self._objects:
                upload = {"href": f"{self._storage}/{entry['oid']}"}
                verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return Response.of({"transfer": "basic", "objects": objects})

    @route("POST", "/{repo}.git/info/lfs/verify")
    def _lfs_verify(self, request: Request, repo: str) -> Response:
        self._writable(request, repo)
        wanted = request.json()
        if len(self._objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "The LFS object was not uploaded")
        return Response.of({})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _create_commit(self, request: Request, repo: str, revision: str) -> Response:
        repository = self._writable(request, repo)
        if revision not in repository.branches or "create_pr" in request.query:
            raise HubError(501, "The test server takes commits on branches only, and no pull requests")
        head = repository.find(revision)
        files, title = dict(head.files), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in self._objects:
                files[value["path"]] = StoredFile(self._objects[value["oid"]], lfs=True)
            elif key == "lfsFile":
                raise HubError(400, f"The LFS object of {value['path']} was not uploaded")
        oid = repository.append(files, title, revision).oid
        return Response.of({"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"})

    # Contents

    @property
    def _storage(self) -> str:
        return f"http://localhost:{self._port}/storage"

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        commit = self._readable(request, repo).find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        etag = f'"{file.content_oid}"'
        if not file.lfs:
            return self._content(file.content, {**headers, "ETag": etag})
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(file.content))}
        headers["Location"] = f"{self._storage}/{file.sha256}?filename={quote(path, safe='')}"
        return Response(302, b"Found. Redirecting", headers)

    @route("GET HEAD PUT", "/storage/{path}")
    def _object(self, request: Request, path: str) -> Response:
        if "authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed: a token was sent to another host")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != path:
                raise HubError(400, "The content does not have the SHA-256 that was announced")
            self._objects[path] = request.body
            return Response()
        if path not in self._objects:
            raise HubError(404, "No such object")
        return self._content(self._objects[path], {"ETag": f'"{path}"'})

    @staticmethod
    def _content(content: bytes, headers: Mapping[str, str]) -> Response:
        return Response(200, content, {"Content-Type": "application/octet-stream", **headers})


def _is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


class _Server(ThreadingTCPServer):
    """A thread for each connection, none of which outlives `close_connections`."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    hub: HubServer

    def __init__(self, *args: Any) -> None:
        self._connections: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or a connection that was closed on purpose; answers have their own errors."""


class _HttpHandler(BaseHTTPRequestHandler):
    """HTTP, with persistent connections, around `HubServer._respond`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._read_body())
        response = self.server.hub._respond(request)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.server.hub._cut_after(request, response)
            self.wfile.write(response.body[:cut])
            self.close_connection = self.close_connection or cut is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, *_: object) -> None:
        """Keep quiet: `HubServer.log` has it all."""
