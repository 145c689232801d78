"""``run_serve`` under load, against a plain server of the same model."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.serving.contenders import ROOT, milliseconds, save, served

ITEMS, K = 3416, 10
GROWTH = 10  # timed events of a session
ROUNDS = 3
SECONDS_TO_START = 120.0
ENDLESS, WINDOW = "run_serve --rule endless", "run_serve"
PLAIN, IN_THREADS = "plain server", "plain server, in threads"
SERVERS = {
    ENDLESS: ["recbole_ssm.cli.run_serve", "--rule", "endless", "--port", "0", "--device", "cpu", "--checkpoint"],
    WINDOW: ["recbole_ssm.cli.run_serve", "--port", "0", "--device", "cpu", "--checkpoint"],
    PLAIN: ["benchmarks.serving.plain_server"],
    IN_THREADS: ["benchmarks.serving.plain_server", "--threads"],
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a history, number of clients and server."""
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        checkpoint = Path(name, "model.pth")
        recommender = served("Mamba4Rec", ITEMS)
        save(recommender, checkpoint)
        ports = {
            server: stack.enter_context(_started([*words, str(checkpoint)], Path(name, f"{number}.log")))
            for number, (server, words) in enumerate(SERVERS.items())
        }
        cases = [(history, clients) for history in arguments.http_histories for clients in arguments.clients]
        rounds = min(arguments.rounds, ROUNDS)
        for history, clients in cases:
            found: dict[str, list[dict[str, Any]]] = {server: [] for server in SERVERS}
            for turn in range(rounds):
                for server, port in ports.items():
                    seconds = arguments.seconds / 15  # of 30: 2 each
                    found[server].append(_load(port, clients, history, seconds, seed=len(measured) * rounds + turn))
                _check([found[server][-1]["scores"] for server in SERVERS if server != ENDLESS or history < 200])
            rates = {
                server: median(len(run["taken"]) / run["seconds"] for run in runs) for server, runs in found.items()
            }
            measured.append({"history": history, "clients": clients, "events a second": rates})
            for server, runs in found.items():
                p50, p99 = np.percentile([seconds for run in runs for seconds in run["taken"]], [50, 99])
                print(f"http, {history} events, {clients} clients, {server}: {rates[server]:,.0f} /s", flush=True)
                rows.append(
                    {
                        "server": server,
                        "events before": history,
                        "clients": clients,
                        "events a second": f"{rates[server]:,.0f}",
                        "times the better plain one": f"{rates[server] / max(rates[PLAIN], rates[IN_THREADS]):.3g}",
                        "p50, ms": milliseconds(p50),
                        "p99, ms": milliseconds(p99),
                    }
                )
    return {
        "title": "Events over HTTP",
        "settings": f"Mamba4Rec, hidden_size 64, MAX_ITEM_LIST_LENGTH 200, {ITEMS:,} items, float32, untrained; "
        "sessions in memory",
        "rows": rows,
        "measured": measured,
        "protocol": {
            "event": f"POST /sessions/{{id}}/events of one item with k {K}: the event and the answer to it, over "
            "connections that are kept; every answer's status and number of recommendations is looked at",
            "clients": "in a process of their own on the same machine, each with one request at a time",
            "events before": f"to begin with; a session takes {GROWTH} timed events more",
            "run_serve": "as shipped: past 200 events its rule reads the latest 200 anew; by --rule endless the state "
            "goes on",
            "plain server": "FastAPI and uvicorn (benchmarks/serving/plain_server.py): keeps the history, and each "
            "request is one forward pass over its latest 200 events, on the event loop or in FastAPI's threads",
            "timing": f"medians of {rounds} rounds in which all take turns; percentiles over all",
        },
    }


@contextmanager
def _started(words: Sequence[str], log: Path) -> Iterator[int]:
    """The port of a server that runs in a process of its own."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + SECONDS_TO_START
            while not (serves := re.search(r"^http://127\.0\.0\.1:(\d+) serves", log.read_text(), re.MULTILINE)):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{' '.join(words)} does not serve:\n{log.read_text()[-3000:]}")
                time.sleep(0.05)
            yield int(serves[1])
        finally:
            process.terminate()
            process.wait(60)


def _load(port: int, clients: int, history: int, seconds: float, seed: int) -> dict[str, Any]:
    """See ``load.run``."""
    given: dict[str, float] = {
        "port": port,
        "clients": clients,
        "sessions": max(64, 4 * clients),
        "history": history,
        "growth": GROWTH,
    }
    given |= {"seconds": seconds, "items": ITEMS, "k": K, "seed": seed}
    words = [sys.executable, str(Path(__file__).with_name("load.py")), json.dumps(given)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _check(scores: list[list[float]]) -> None:
    """No figure where servers of the same model give different answers to the same history."""
    for other in scores[1:]:
        if not np.allclose(other, scores[0], rtol=1e-3, atol=1e-5):
            raise RuntimeError(f"servers give different answers: {scores[0]} and {other}")
