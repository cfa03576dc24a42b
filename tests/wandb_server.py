"""A local server that speaks enough of Weights & Biases' protocol for its client to send runs to it, which are kept."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class WandbServer(ThreadingHTTPServer):
    """The server; as a context manager it runs while the block does.

    Attributes:
        queries: Variables of every query, by the name of its field.
        history: Rows of every run, by its id.
        uploads: Contents of uploaded files, by path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.queries: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.uploads: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away."""

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client talk to this server."""
        address = f"http://127.0.0.1:{self.server_address[1]}"
        return {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a query."""
        name = next((field for field in _ANSWERS if field in query), "")
        self.queries.append((name or query[:200], variables))
        data = _ANSWERS[name](variables, self.environment["WANDB_BASE_URL"]) if name else {}
        if name == "model(" and (rows := self.history.get(variables.get("name", ""))):
            data["model"]["bucket"] = self._resumable(variables["name"], rows)
        return data

    @staticmethod
    def _resumable(name: str, rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """What a run that is resumed asks for."""
        counts = {"historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0}
        last = json.dumps([json.dumps(rows[max(rows)])])
        texts = {"historyTail": last, "eventsTail": "[]", "config": "{}", "wandbConfig": json.dumps({"t": 1})}
        return {"id": name, "name": name, "summaryMetrics": json.dumps(rows[max(rows)]), **counts, **texts, "tags": []}


def _run(v: dict[str, Any], base: str) -> dict[str, Any]:
    project = {"id": "p", "name": v.get("project") or "digits", "entity": {"id": "e", "name": "me"}}
    name = v.get("name") or "run"
    bucket = {"id": name, "name": name, "displayName": v.get("displayName") or name, "description": "", "config": "{}"}
    return {"upsertBucket": {"bucket": {**bucket, "project": project, "historyLineCount": 0}, "inserted": True}}


def _files(v: dict[str, Any], base: str) -> dict[str, Any]:
    files = [{"name": file, "uploadUrl": f"{base}/upload/{v.get('run')}/{file}"} for file in v.get("files", [])]
    return {"createRunFiles": {"runID": v.get("run"), "uploadHeaders": [], "files": files}}


def _artifact_files(v: dict[str, Any], base: str) -> dict[str, Any]:
    nodes = []
    for spec in v.get("artifactFiles") or v["input"]["artifactFiles"]:
        file = {**_file(spec["name"], base), "storagePath": spec["name"], "uploadMultipartUrls": None}
        nodes.append({"node": {**file, "artifact": {"id": spec.get("artifactID", "a")}}})
    return {"createArtifactFiles": {"files": {"edges": nodes}}}


def _file(name: str, base: str) -> dict[str, Any]:
    return {"id": name, "name": name, "displayName": name, "uploadUrl": f"{base}/upload/{name}", "uploadHeaders": []}


def _manifest(v: dict[str, Any], base: str) -> dict[str, Any]:
    return {"artifactManifest": {"id": "m", "file": _file("manifest", base)}}


_ME = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
_USED = {"id": "a", "digest": "d", "description": "", "state": "COMMITTED", "createdAt": "", "metadata": "{}"}
_PROJECT = {
    "__typename": "Project",
    "id": "UHJvamVjdDox",
    "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ==",
    "name": "digits",
    "entity": {"id": "e", "name": "me"},
}
_STORED = {
    **_USED, "__typename": "Artifact", "versionIndex": 0, "artifactType": {"name": "model"}, "ttlDurationSeconds": -2,
    "artifactSequence": {"__typename": "ArtifactSequence", "id": "s", "name": "weights", "project": _PROJECT},
    "ttlIsInherited": True, "tags": [], "historyStep": None, "size": 1, "digestAlgorithm": "MANIFEST_MD5",
    "commitHash": "c", "fileCount": 2, "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": [],
}  # fmt: skip
_SERVER = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
_ANSWERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "upsertBucket": _run,
    "createRunFiles": _files,
    "createArtifactFiles": _artifact_files,
    "createArtifactManifest": lambda v, base: {"createArtifactManifest": _manifest(v, base)},
    "updateArtifactManifest": lambda v, base: {"updateArtifactManifest": _manifest(v, base)},
    "createArtifact(": lambda v, base: {
        "createArtifact": {
            "artifact": {"id": "a", "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
        }
    },
    "commitArtifact": lambda v, base: {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}},
    "useArtifact": lambda v, base: {"useArtifact": {"artifact": _USED}},
    "query ArtifactByID": lambda v, base: {"artifact": _STORED},
    "artifactType {": lambda v, base: {"project": None},
    "model(": lambda v, base: {
        "model": {"id": "p", "name": "digits", "entity": {"id": "e", "name": "me"}, "bucket": None}
    },
    "viewer": lambda v, base: {"viewer": _ME},
    "serverInfo": lambda v, base: {"serverInfo": _SERVER},
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            for name, chunk in (json.loads(body).get("files") or {}).items():
                if name.endswith("history.jsonl"):
                    rows = self.server.history.setdefault(run, {})
                    rows.update({chunk["offset"] + i: json.loads(line) for i, line in enumerate(chunk["content"])})
        elif self.command == "PUT":
            self.server.uploads[self.path.removeprefix("/upload/")] = body
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = _any  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: what was asked is kept."""
