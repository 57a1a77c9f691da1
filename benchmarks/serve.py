"""The server beside the runner: what HTTP costs, how it holds under clients, what an exchange of bundles disturbs.

    python benchmarks/serve.py BUNDLE [OTHER] [--minutes 10] [--clients 16] [--swaps 100] [--calls 2000] [--threads 1]
                               [--backend auto] [--image FILE]

The server is a process of its own, the clients another, all on this machine and its loopback address.
- overhead: one client, one kept connection, `--calls` pictures to /predict, in turn with the same calls of
  `runtime.predict` in the server's process (no HTTP). Turns of 50, so that both see the same machine: p50 of each,
  and p10 and the processor time of the server a call, which other processes disturb less.
- load: `--clients` clients for `--minutes`, each as fast as it is answered: errors, p50, p99, p99 / p50, and the
  memory that the server holds, after a tenth of the time and at the end.
- swaps: the same clients while BUNDLE and OTHER (by default BUNDLE under another name) are exchanged `--swaps` times:
  failed requests, and answers whose number of classes, label and logits are not those of the version they name.

Goals (issue 6): overhead <= 1 ms p50; no error; memory growth < 2 %; no failed request, no mixed answer.
Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

TURN = 50
"calls with and without HTTP, by turns"


def served(listening: socket.socket, bundle: Path, options: dict[str, Any], orders: Connection) -> None:
    """Process of the server; does what `orders` says beside it."""
    import uvicorn

    from cdl_edge.runtime.predict import predict
    from cdl_edge.server.app import build_app
    from cdl_edge.server.live_model import LiveModel, version_name
    from cdl_edge.server.request_metrics import resident_bytes
    from cdl_edge.server.server import Server

    live = LiveModel(bundle, **options)
    server = uvicorn.Server(
        uvicorn.Config(build_app(Server(live, bundle)), log_level="warning", access_log=False, proxy_headers=False)
    )
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    orders.send({"runner": live.runner.describe(), "version": version_name(live.runner.bundle)})
    while True:
        order, argument = orders.recv()
        if order == "predict":  # (picture, times) -> milliseconds of each
            picture, times = argument
            samples = []
            for _ in range(times):
                begin = time.perf_counter()
                json.dumps(predict(live.runner, [picture]))
                samples.append((time.perf_counter() - begin) * 1e3)
            orders.send(samples)
        elif order == "cpu":
            orders.send(time.process_time())
        elif order == "rss":
            orders.send(resident_bytes())
        elif order == "swap":
            orders.send(live.swap(argument))
        else:
            server.should_exit = True
            return


class Client:
    """One kept connection, and as little of a client as HTTP allows: its own time counts as the server's."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, path: str, body: bytes, kind: str) -> tuple[int, bytes, float]:
        """(status, body, milliseconds). Raises: OSError when the server closes the connection."""
        begin = time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket.sendall(head.encode() + body)
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._more()
        fields, _, content = got.partition(b"\r\n\r\n")
        length = int(fields.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        while len(content) < length:
            content += self._more()
        return int(fields[9:12]), content, (time.perf_counter() - begin) * 1e3

    def _more(self) -> bytes:
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionError("closed by the server")
        return got


def overhead(port: int, orders: Connection, picture: bytes, calls: int) -> dict[str, float]:
    """p50 with and without HTTP, in turns."""
    client = Client(port)
    with_http: list[float] = []
    without: list[float] = []
    cpu = np.zeros(3)

    def order(name: str, argument: object = None) -> Any:
        orders.send((name, argument))
        return orders.recv()

    for turn in range(1 + calls // TURN):
        start = order("cpu")
        times = [client.ask("/predict", picture, "image/jpeg")[2] for _ in range(TURN)]
        between = order("cpu")
        own = order("predict", (picture, TURN))
        if turn:  # the first warms up
            with_http += times
            without += own
            cpu += (between - start, order("cpu") - between, 1)
    http_cpu, runner_cpu = 1e3 * cpu[:2] / (TURN * cpu[2])
    result: dict[str, float] = {
        "calls": len(with_http),
        "http_cpu_ms": float(http_cpu),
        "runner_cpu_ms": float(runner_cpu),
        "overhead_cpu_ms": float(http_cpu - runner_cpu),
    }
    for name, share in (("p10", 10), ("p50", 50)):
        http, runner = (float(np.percentile(times, share)) for times in (with_http, without))
        result |= {f"http_{name}_ms": http, f"runner_{name}_ms": runner, f"overhead_{name}_ms": http - runner}
    return result


def load(port: int, clients: int, seconds: float, picture: bytes, watch: Any) -> dict[str, Any]:
    """`clients` threads until the time is over; `watch(elapsed)` is called meanwhile."""
    stop, lock = threading.Event(), threading.Lock()
    times: list[float] = []
    errors: list[str] = []

    def run() -> None:
        client = Client(port)
        own, wrong = [], []
        while not stop.is_set():
            try:
                status, content, took = client.ask("/predict", picture, "image/jpeg")
            except OSError as error:
                wrong.append(repr(error))
                client = Client(port)
                continue
            own.append(took)
            if status != 200:
                wrong.append(content.decode()[:200])
        with lock:
            times.extend(own)
            errors.extend(wrong)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while (elapsed := time.monotonic() - begin) < seconds:
        watch(elapsed)
        time.sleep(min(0.5, seconds / 20))
    stop.set()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(times, [50, 99])
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - begin, 1),
        "requests": len(times),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "p99_over_p50": float(p99 / p50),
    }


def swaps(port: int, orders: Connection, bundles: list[Path], clients: int, count: int) -> dict[str, Any]:
    """`count` exchanges under load; tensors in, logits out, compared with those of the version that is named."""
    from cdl_edge.runtime import load as load_runner
    from cdl_edge.server.live_model import version_name

    expected = {}
    for bundle in bundles:
        with load_runner(bundle, threads=1) as runner:
            side = runner.bundle.preprocessing.size
            image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
            expected[version_name(runner.bundle)] = runner.infer(image)[0]
    fields = {"name": "images", "datatype": "UINT8", "shape": list(image.shape), "data": image.ravel().tolist()}
    body = json.dumps({"inputs": [fields], "outputs": [{"name": "logits"}]}).encode()
    path = f"/v2/models/{bundles[0].resolve().name}/infer"
    stop, lock = threading.Event(), threading.Lock()
    seen: dict[str, int] = dict.fromkeys(expected, 0)
    failed: list[str] = []
    mixed = 0

    def run() -> None:
        nonlocal mixed
        client = Client(port)
        while not stop.is_set():
            try:
                status, content, _ = client.ask(path, body, "application/json")
                answer = json.loads(content)
                logits, version = np.array(answer["outputs"][0]["data"]), answer["model_version"]
            except (OSError, ValueError, KeyError) as error:
                with lock:
                    failed.append(repr(error))
                client = Client(port)
                continue
            want = expected[version]
            with lock:
                seen[version] += 1
                mixed += logits.shape != want.shape or not np.allclose(logits, want, atol=1e-3)
                if status != 200:
                    failed.append(str(status))

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    seconds = []
    for i in range(count):
        orders.send(("swap", bundles[(i + 1) % 2]))
        seconds.append(orders.recv()["seconds"])
    stop.set()
    for thread in threads:
        thread.join()
    a, b = expected.values()
    return {
        "swaps": count,
        "swap_p50_s": float(np.median(seconds)),
        "requests": sum(seen.values()),
        "answered_by": seen,
        "failed": len(failed),
        "first_failure": failed[0] if failed else None,
        "mixed": mixed,
        "versions_differ_by": float(np.abs(a - b).max()) if a.shape == b.shape else None,
    }


def shifted(bundle: Path, out: Path) -> Path:
    """The bundle under another name: another version with the same answers."""
    from cdl_edge.artefacts.bundle import write_bundle
    from cdl_edge.runtime import open_bundle

    opened = open_bundle(bundle)
    files = {name: opened.path / name for name in opened.manifest.files}
    return write_bundle(out, {**opened.manifest.document, "name": f"{opened.name} again"}, files).path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--image", type=Path)
    given = parser.parse_args()

    from cdl_edge.measurement.profile import synthetic_jpeg
    from cdl_edge.server import listen

    picture = given.image.read_bytes() if given.image else synthetic_jpeg()
    listening = listen("127.0.0.1", 0)
    orders, theirs = multiprocessing.Pipe()
    options = {"backend": given.backend, "threads": given.threads}
    context = multiprocessing.get_context("fork")  # the socket goes along
    process = context.Process(target=served, args=(listening, given.bundle, options, theirs))
    process.start()
    work = Path(tempfile.mkdtemp(prefix="cdl-edge-serve-"))
    try:
        facts = orders.recv()
        port = listening.getsockname()[1]
        result: dict[str, Any] = {
            **facts,
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
            "picture_bytes": len(picture),
            "load_average": os.getloadavg()[0],
        }
        result["overhead"] = overhead(port, orders, picture, given.calls)
        show("overhead", result["overhead"])

        memory: list[tuple[float, int]] = []

        def watch(elapsed: float) -> None:
            orders.send(("rss", None))
            memory.append((elapsed, orders.recv()))

        seconds = 60 * given.minutes
        result["load"] = load(port, given.clients, seconds, picture, watch)
        early = next(size for elapsed, size in memory if elapsed >= seconds / 10)
        result["load"] |= {"rss_mib": memory[-1][1] / 2**20, "rss_growth_percent": 100 * (memory[-1][1] / early - 1)}
        show("load", result["load"])

        other = given.other or shifted(given.bundle, work / "other")
        result["swaps"] = swaps(port, orders, [given.bundle, other], given.clients, given.swaps)
        show("swaps", result["swaps"])
        result["load_average_end"] = os.getloadavg()[0]
        orders.send(("stop", None))
        process.join(20)
    finally:
        process.kill()
        shutil.rmtree(work)
    print(json.dumps(result))


def show(title: str, values: dict[str, Any]) -> None:
    """A small table."""
    print(title)
    for key, value in values.items():
        print(f"  {key:20s} {value:.3f}" if isinstance(value, float) else f"  {key:20s} {value}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
