"""A server under attack: what good requests notice of it, and what it costs the server.

The server is a process of its own (`cdl-edge serve`), as users start it. First so many clients send a picture, each as
fast as it is answered, for a tenth of the time. Then for the whole of it a share of their requests is wrong in some
way, connections from other addresses of the loopback network say nothing, or half of something, and are opened anew
when they are closed, and the served bundle's files are overwritten with others of the same size, and put back.

Faults: an answer other than before the attack, a 5xx that is not 503, a good request that got no answer, a trace in
what the server says, its end, a process above MEMORY_MB, p99 of good requests above SLOWER times that before.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from attack_files import MEMORY_MB, Found  # of this folder
from serve import Client

SLOWER = 3.0
"p99 of good requests under attack over that without"
SHARE = 0.4
"of requests that are wrong"
HALVES = (
    b"",
    b"POST /predi",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: ",
    b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 30000000\r\n\r\nhalf",
)


def bad(dice: random.Random, picture: bytes) -> tuple[str, bytes, str]:
    """(path, body, content type) of a request that is wrong in some way."""
    lists = b"[" + b"[]," * dice.choice((10, 100_000, 3_000_000)) + b"[]]"
    cut = bytearray(picture[: dice.randrange(len(picture))])
    for _ in range(min(len(cut), dice.randrange(1, 50))):
        cut[dice.randrange(len(cut))] = dice.randrange(256)
    name = dice.choice((["images"], {"a": 1}, "\ud800", None, 7))
    tensors = json.dumps({"inputs": [{"name": name, "shape": [1], "datatype": "UINT8", "data": [1]}]}).encode()
    return dice.choice(
        (
            ("/predict", bytes(cut), "image/jpeg"),
            ("/predict", picture, "text/html"),
            ("/predict?top=x", picture, "image/jpeg"),
            ("/batch", b"--x\r\nContent-Disposition: form-data", "multipart/form-data; boundary=x; charset=punycode"),
            ("/v2/models/attacked/infer", lists, "application/json"),
            ("/v2/models/attacked/infer", tensors, "application/json"),
            ("/packs", picture, "application/octet-stream"),
            ("/" + "x" * dice.randrange(30_000), b"", "image/jpeg"),
        )
    )


@dataclass
class Heard:
    """What clients were told."""

    times_ms: list[float] = field(default_factory=list)
    "of good requests that were answered"
    ends: list[float] = field(default_factory=list)
    "when these were, time.monotonic()"
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, float]:
        """Percentiles, and the longest time in which nobody got a good answer."""
        p50, p99 = (float(v) for v in np.percentile(self.times_ms, [50, 99])) if self.times_ms else (np.inf, np.inf)
        gap = float(np.diff(sorted(self.ends)).max()) if len(self.ends) > 1 else np.inf
        return {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "longest_gap_s": round(gap, 2)}


def clients(port: int, count: int, seconds: float, share: float, picture: bytes, expected: Any, seed: int) -> Heard:
    """Ask for a time from so many threads, a share of it wrong; every good answer has to be the expected one."""
    end, lock, heard = time.monotonic() + seconds, threading.Lock(), Heard()

    def run(number: int) -> None:
        dice, client = random.Random(seed * 1000 + number), Client(port)
        while time.monotonic() < end:
            wrong = dice.random() < share
            path, body, kind = bad(dice, picture) if wrong else ("/predict", picture, "image/jpeg")
            try:
                status, content, took = client.ask(path, body, kind)
            except (OSError, IndexError, ValueError):  # closed, as some bad requests deserve
                client = Client(port)
                status, content, took = 0, b"", 0.0
            with lock:
                name = "bad" if wrong else "good"
                heard.outcomes[f"{name}: {status or 'closed'}"] += 1
                if status >= 500 and status != 503:
                    heard.wrong.append(f"{name} request: {status} {content[:300]!r}")
                if wrong:
                    continue
                if status == 200:
                    heard.times_ms.append(took)
                    heard.ends.append(time.monotonic())
                    if answer_of(content) != expected:
                        heard.wrong.append(f"another answer: {content[:300]!r}")
                elif status != 503:
                    heard.wrong.append(f"a good request got {status or 'no answer'}: {content[:300]!r}")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def answer_of(content: bytes) -> Any:
    """What may not change: predictions and version."""
    document = json.loads(content)
    return document["predictions"], document["version"]


def silent(port: int, count: int, stop: threading.Event, seed: int) -> None:
    """Keep so many connections open that wait; a few lines trickle in."""
    dice = random.Random(seed)
    held: list[socket.socket] = []
    while not stop.wait(0.05):
        while len(held) < count:
            try:
                made = socket.create_connection(("127.0.0.1", port), 5, (f"127.0.0.{dice.randrange(2, 6)}", 0))
                made.sendall(dice.choice(HALVES))
            except OSError:
                break
            held.append(made)
        for connection in dice.sample(held, min(len(held), 20)):
            try:
                connection.send(b"x")
            except OSError:
                held.remove(connection)
    for connection in held:
        connection.close()


def overwrite(bundle: Path, stop: threading.Event, seed: int) -> None:
    """Write noise of the same size over the files of a served bundle, and put them back, until it is over."""
    dice = random.Random(seed)
    contents = {path: path.read_bytes() for path in sorted(bundle.iterdir()) if path.is_file()}
    while not stop.wait(1.0):
        path = dice.choice(list(contents))
        path.write_bytes(dice.randbytes(len(contents[path])))
        stop.wait(1.0)
        path.write_bytes(contents[path])


def measure(process: int, peaks: dict[int, float], stop: threading.Event) -> None:
    """Keep the most memory in MB of a process and of its children (Linux); a child may end between two looks."""
    while not stop.wait(0.2):
        for number in family(process):
            with suppress(OSError):
                text = Path(f"/proc/{number}/status").read_text()
                peaks[number] = next((int(v.split()[1]) / 1024 for v in text.splitlines() if v.startswith("VmHWM")), 0)


def family(process: int) -> Iterator[int]:
    """The process, and those that it has started."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, task.read_text().split())


def listening(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port, once the server answers there."""
    while process.poll() is None:
        if "http://127.0.0.1:" in (said := log.read_text()):
            port = int(said.split("http://127.0.0.1:")[1].split("/")[0])
            try:
                socket.create_connection(("127.0.0.1", port), 5).close()
                return port
            except OSError:
                pass
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


@contextmanager
def served(bundle: Path, folder: Path, threads: int) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """(process, port, its log) of a server, which is stopped at the end."""
    command = [sys.executable, "-m", "cdl_edge.cli", "serve", str(bundle), "--port", "0", "--name", "attacked"]
    command += ["--token-file", str(folder / "token"), "--threads", str(threads)]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield process, listening(process, log), log
    finally:
        process.terminate()
        process.wait(60)


def attack(source: Path, seconds: float, count: int, waiting: int, share: float = SHARE, seed: int = 0) -> Found:
    """A copy of this bundle, served; see the module. waiting: connections that say nothing, or half of something."""
    from cdl_edge.measurement.profile import synthetic_jpeg

    picture, stop, found = synthetic_jpeg(), threading.Event(), Found()
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="cdl-edge-attack-") as name:
        folder = Path(name)
        bundle = Path(shutil.copytree(source, folder / "bundle"))
        with served(bundle, folder, 1) as (process, port, log):
            status, content, _ = Client(port).ask("/predict", picture, "image/jpeg")
            if status != 200:
                raise RuntimeError(f"no answer before the attack: {content!r}")
            expected = answer_of(content)
            others = [
                threading.Thread(target=silent, args=(port, waiting, stop, seed)),
                threading.Thread(target=overwrite, args=(bundle, stop, seed)),
                threading.Thread(target=measure, args=(process.pid, peaks, stop)),
            ]
            try:
                quiet = clients(port, count, seconds / 10, 0.0, picture, expected, seed)
                for other in others:
                    other.start()
                attacked = clients(port, count, seconds, share, picture, expected, seed)
            finally:
                stop.set()
                for other in others:
                    if other.ident is not None:
                        other.join()
            if process.poll() is not None:
                found.faults.append(f"the server ended with {process.returncode}")
            if "Traceback" in (said := log.read_text()):
                found.faults.append(f"a trace: {said[-2000:]}")
    before, during = quiet.facts(), attacked.facts()
    ratio = during["p99_ms"] / before["p99_ms"]
    found.cases, found.outcomes, found.peak_mb = attacked.outcomes.total(), attacked.outcomes, max(peaks.values())
    found.facts = {"clients": count, "waiting": waiting, "share": share, "before": before, "during": during}
    found.facts |= {"p99_ratio": round(ratio, 2), "load_average": os.getloadavg()[0]}
    found.faults += quiet.wrong + attacked.wrong
    if ratio > SLOWER:
        found.faults.append(f"p99 of good requests {ratio:.1f} times that without the attack")
    found.faults += [f"process {number}: {peak:.0f} MB" for number, peak in peaks.items() if peak > MEMORY_MB]
    return found
