"""The app's server: static files, and a queue of uses of models that one thread works off.

A page posts a use to ``/api/complete`` (``score``, ``sample``, ...) and receives the number of a job; ``GET
/api/jobs/NUMBER`` answers within half a second with its result, or with how many are ahead of it and how much of it is
done. A job that nobody asks for is dropped, so that a page that was closed keeps no one waiting.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lightning_genmodels.app.studio import Studio, as_json
from lightning_genmodels.errors import GenmodelsError, OptionError, UnknownNameError, check_arguments
from lightning_genmodels.system import reported

FOLDER = Path(__file__).parent
PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
USES = ("complete", "score", "sample", "draw", "corners", "decode", "plane")
MOST_BYTES, MOST_JOBS = 2**18, 200
PATIENCE = 20.0  # seconds after which a job that nobody asks for is dropped
WAIT = 0.5  # seconds that a request for a job waits for its result


class _DroppedError(Exception):
    """Nobody waits for the job."""


class Job:
    """One use of a model, queued, running or done."""

    def __init__(self, work: Callable[[], dict[str, Any]]) -> None:
        self.name = secrets.token_hex(8)
        self.work = work
        self.done = threading.Event()
        self.status, self.result = 200, b""
        self.share = 0.0
        self.asked = time.monotonic()

    def report(self, share: float) -> None:
        """Notes the share that is done, and ends the job if nobody waits."""
        self.share = share
        if time.monotonic() - self.asked > PATIENCE:
            raise _DroppedError

    def run(self) -> None:
        """Works, and keeps the result, or the error in one sentence."""
        try:
            with reported(self.report):
                self.report(0.0)
                self.result = as_json(self.work())
        except _DroppedError:
            self.status, self.result = 410, as_json({"error": "nobody waited for this job, and it was dropped"})
        except GenmodelsError as error:
            self.status, self.result = _status(error), as_json({"error": " ".join(str(error).split())})
        except Exception:
            traceback.print_exc(file=sys.stderr)
            self.status, self.result = 500, as_json({"error": "this is a defect of the app; its terminal says more"})
        self.done.set()


class Queue:
    """Jobs in the order in which they came, and the thread that works them off."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, work: Callable[[], dict[str, Any]]) -> Job:
        """Queues a job.

        Raises:
            OptionError: Too many wait already.
        """
        with self._changed:
            now = time.monotonic()
            self._jobs = {name: job for name, job in self._jobs.items() if now - job.asked < PATIENCE}
            if len(self._waiting) >= MOST_JOBS:
                raise OptionError(f"{len(self._waiting)} uses wait already; try again in a minute")
            job = Job(work)
            self._jobs[job.name] = job
            self._waiting.append(job)
            self._changed.notify()
        return job

    def find(self, name: str) -> Job:
        """A job that is known.

        Raises:
            UnknownNameError: There is none, or nobody asked for it in time.
        """
        with self._changed:
            if name not in self._jobs:
                raise UnknownNameError("job", name, [])
            job = self._jobs[name]
            job.asked = time.monotonic()
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs are worked on before this one."""
        with self._changed:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def close(self) -> None:
        """Drops all jobs, and waits for the end of the one that runs: PyTorch aborts a process that ends before."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            for job in self._jobs.values():
                job.asked = -math.inf
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                job = self._waiting.popleft()
            job.run()


class Server(ThreadingHTTPServer):
    """Serves the app.

    Args:
        host: Address to listen at; 127.0.0.1 for this machine alone.
        port: 0 for a free one.

    Raises:
        OptionError: The address cannot be listened at.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str = "127.0.0.1", port: int = 7860) -> None:
        self.studio, self.queue = Studio(), Queue()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            self.queue.close()
            raise OptionError(f"cannot listen at {host}, port {port}: {error}; choose another --port") from error
        self.pages = {path: ((FOLDER / name).read_bytes(), kind) for path, (name, kind) in PAGES.items()}
        self.description = as_json(self.studio.describe())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what went wrong, unless a page, or the server, was closed while it was answered."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Closes the address, and ends what runs."""
        super().server_close()
        self.queue.close()

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        host, port = self.server_address[:2]
        name = str(host)
        return f"http://{'127.0.0.1' if name == '0.0.0.0' else name}:{port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """Answers with a page, the models, or the state of a job."""
        path = self.path.partition("?")[0]
        if path in self.server.pages:
            self._send(200, *self.server.pages[path])
        elif path == "/api/models":
            self._send(200, self.server.description)
        elif found := re.fullmatch(r"/api/jobs/(\w+)", path):
            self._answer(lambda: self._state(found[1]))
        else:
            self._fail(404, f"there is nothing at {path}")

    def do_POST(self) -> None:
        """Queues a use of a model."""
        use = self.path.removeprefix("/api/")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True  # what the body holds is not read
            self._fail(413, f"expected a body of known length, {MOST_BYTES:,} bytes at most")
            return
        body = self.rfile.read(int(length))
        if use not in USES:
            self._fail(404, f"there is no use {use!r}; there are {', '.join(USES)}")
            return
        self._answer(lambda: (202, as_json({"job": self.server.queue.add(self._work(use, body)).name})))

    def _work(self, use: str, body: bytes) -> Callable[[], dict[str, Any]]:
        """A use with the arguments in a request."""
        method: Callable[..., dict[str, Any]] = getattr(self.server.studio, use)
        try:
            options = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"expected JSON, got {body[:40]!r}") from error
        known = inspect.signature(method).parameters
        needed = {name for name, parameter in known.items() if parameter.default is inspect.Parameter.empty}
        if not isinstance(options, dict) or not needed <= options.keys() <= known.keys():
            raise OptionError(f"expected an object with {', '.join(known)}, got {str(options)[:80]}")
        check_arguments(options, method)
        return lambda: method(**options)

    def _state(self, name: str) -> tuple[int, bytes]:
        job = self.server.queue.find(name)
        if job.done.wait(WAIT):
            return job.status, job.result
        return 202, as_json({"ahead": self.server.queue.ahead(job), "share": round(job.share, 3)})

    def _answer(self, answer: Callable[[], tuple[int, bytes]]) -> None:
        try:
            status, body = answer()
        except GenmodelsError as error:
            self._fail(_status(error), " ".join(str(error).split()))
        else:
            self._send(status, body)

    def _fail(self, status: int, message: str) -> None:
        self._send(status, as_json({"error": message}))

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "default-src 'self'; img-src 'self' data:")
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the page was closed

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Prints nothing: a page asks several times a second."""


def _status(error: GenmodelsError) -> int:
    return 404 if isinstance(error, UnknownNameError) else 400
