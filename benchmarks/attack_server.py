"""An attack on the server, bounded and seeded: what good requests notice of it, and what it costs the server.

    python benchmarks/attack_server.py BUNDLE [--seconds 60] [--clients 32] [--bad 0.4] [--silent 300] [--seed 0]
                                       [--threads 1]

The server is a process of its own (`cdl-edge serve`), as users start it. First `--clients` clients send pictures for
`--seconds`, then the same while a share `--bad` of their requests is wrong in some way, and `--silent` connections from
other addresses of the loopback network say nothing, or half of something, and are opened anew when they are closed.
Goals (issue 13): no 5xx but 503 with a reason; p99 of good requests at most 3 times that without the attack; no process
above 600 MB. Last line of stdout: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from serve import Client  # of this folder

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


def clients(port: int, count: int, seconds: float, share: float, picture: bytes, seed: int) -> dict[str, float]:
    """Send for a time: times of the good requests, and states of all."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    times: list[float] = []
    states: dict[int, int] = {}
    lost = 0

    def run(number: int) -> None:
        nonlocal lost
        dice, client = random.Random(seed * 1000 + number), Client(port)
        while time.monotonic() < end:
            wrong = dice.random() < share
            path, body, kind = bad(dice, picture) if wrong else ("/predict", picture, "image/jpeg")
            try:
                status, _, took = client.ask(path, body, kind)
            except (OSError, IndexError, ValueError):  # closed, as some bad requests deserve
                client = Client(port)
                with lock:
                    lost += not wrong
                continue
            with lock:
                states[status] = states.get(status, 0) + 1
                if not wrong and status == 200:
                    times.append(took)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = (float(v) for v in np.percentile(times, [50, 99])) if times else (float("nan"), float("nan"))
    faults = sum(n for status, n in states.items() if status >= 500 and status != 503)
    counts = {"good": len(times), "good_lost": lost, "busy": states.get(503, 0), "5xx": faults}
    return {**counts, "requests": sum(states.values()), "p50_ms": p50, "p99_ms": p99}


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


def peak_bytes(process: int) -> int:
    """Most memory that a process held so far (Linux)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmHWM")


def main() -> None:
    """Attack, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    for name, default in (
        ("seconds", 60.0),
        ("bad", 0.4),
        ("clients", 32),
        ("silent", 300),
        ("seed", 0),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()

    from cdl_edge.measurement.profile import synthetic_jpeg

    picture, stop = synthetic_jpeg(), threading.Event()
    command = [sys.executable, "-m", "cdl_edge.cli", "serve", str(given.bundle), "--port", "0", "--name", "attacked"]
    with tempfile.TemporaryDirectory(prefix="cdl-edge-attack-") as folder:
        command += ["--token-file", f"{folder}/token", "--threads", str(given.threads)]
        log = Path(folder) / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            port = listening(process, log)
            quiet = clients(port, given.clients, given.seconds, 0.0, picture, given.seed)
            attacker = threading.Thread(target=silent, args=(port, given.silent, stop, given.seed))
            attacker.start()
            attacked = clients(port, given.clients, given.seconds, given.bad, picture, given.seed)
            stop.set()
            attacker.join()
            result = {
                "seed": given.seed,
                "clients": given.clients,
                "quiet": quiet,
                "attacked": attacked,
                "p99_ratio": attacked["p99_ms"] / quiet["p99_ms"],
                "peak_rss_mib": peak_bytes(process.pid) / 2**20,
                "ended": process.poll() is not None,
                "cpu_count": os.cpu_count(),
                "load_average": os.getloadavg()[0],
            }
        finally:
            stop.set()
            process.terminate()
            process.wait(60)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
