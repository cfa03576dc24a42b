"""Seconds from a click in the app to its result, as a browser asks for it, and the memory of the server.

python benchmarks/app.py
python benchmarks/app.py --clicks 3 --visitors 1 8
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TOP = "1" * 392 + "0" * 392


def ask(port: int, method: str, path: str, body: Any = None) -> Any:
    """The answer of the server, which is no error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    found = json.loads(response.read())
    connection.close()
    assert response.status < 400, found
    return response.status, found


def click(port: int, use: str, options: dict[str, Any]) -> float:
    """Seconds that one use takes."""
    start = time.perf_counter()
    status, found = ask(port, "POST", f"/api/{use}", options)
    job = found["job"]
    while status == 202:
        status, found = ask(port, "GET", f"/api/jobs/{job}")
    return time.perf_counter() - start


def megabytes(pid: int, key: str) -> float:
    """A line of the system's account of a process, on Linux."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main(clicks: int, visitors: list[int]) -> None:
    """Prints a Markdown table."""
    command = [sys.executable, "-m", "lightning_genmodels.cli", "app", "--port=0", "--browser=false"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split("127.0.0.1:")[1].split(";")[0])
        print(f"started in {time.perf_counter() - start:.1f} s, {megabytes(server.pid, 'VmRSS'):.0f} MB", flush=True)
        found = ask(port, "GET", "/api/models")[1]
        digit, models = found["digits"][0], found["models"]
        given = {"image": digit, "observed": TOP, "draws": 4}
        uses: list[tuple[str, str, dict[str, Any]]] = [
            *(
                (f"complete, 4 draws of {model['name']}", "complete", {"name": model["name"], **given})
                for model in models
                if model["completes"]
            ),
            *(
                (f"score, {model['name']}", "score", {"name": model["name"], "image": digit})
                for model in models
                if model["nats"]
            ),
            ("sample, 16 of vae.static_v1", "sample", {"name": "vae.static_v1"}),
            ("sample, 16 of pixelsnail.static_v4", "sample", {"name": "pixelsnail.static_v4"}),
            ("plane of vae.static_v1", "plane", {"name": "vae.static_v1", "codes": [[0.1 * k] * 50 for k in range(4)]}),
        ]
        print(f"| seconds, median of {clicks} clicks | {' | '.join(f'{count} at once' for count in visitors)} |")
        print("| --- |" + " --- |" * len(visitors))
        for label, use, options in uses:
            click(port, use, options)  # the first loads the model
            medians = []
            for count in visitors:
                with ThreadPoolExecutor(count) as pool:
                    rounds = [
                        list(pool.map(click, [port] * count, [use] * count, [options] * count)) for _ in range(clicks)
                    ]
                medians.append(f"{statistics.median(itertools.chain(*rounds)):.3g}")
            print(f"| {label} | {' | '.join(medians)} |", flush=True)
        print(f"{megabytes(server.pid, 'VmRSS'):.0f} MB, at most {megabytes(server.pid, 'VmHWM'):.0f} MB")
        server.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=10)
    parser.add_argument("--visitors", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    main(arguments.clicks, arguments.visitors)
