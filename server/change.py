"""A change of the bundle on disk, in a process of its own: `python -m cdl_edge.server.change` is told by stdin.

A pack holds a graph, and a graph may crash, take all memory, or never end. Here it does so alone: the server goes on,
and ends this process when its time is over. Whatever end it takes, the bundle is whole (see `updates.packs`).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..decoders import surroundings
from ..errors import InputError

REFUSED = 2
"exit code for bad input, as of the command line"
EXTRA_S = 10
"after which a process that nobody ended ends itself: its server is gone"


def in_a_process(
    order: dict[str, Any], seconds: float, started: Callable[[subprocess.Popen[str]], None]
) -> dict[str, Any]:
    """Do what `order` says: {"do": a key of `changed`, and the arguments of that function}.

    started: gets the process, to end it early.

    Returns: what the function returns. Raises: InputError when it refuses, crashes or does not end in `seconds`.
    """
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        cwd="/",
        env=surroundings(),
    )
    started(process)
    try:
        out, err = process.communicate(json.dumps({**order, "seconds": seconds}), seconds)
    except subprocess.TimeoutExpired:
        raise InputError(
            "the new version does not come to an answer",
            got=f"none after {seconds:g} s of unpacking and self-test",
            expected="the answers of its self-test",
            fix="do not use it",
        ) from None
    finally:
        process.kill()
        process.communicate()
    if process.returncode == REFUSED:
        raise InputError(err.strip())
    if process.returncode != 0:
        raise InputError(
            "the new version ends the process that tries it",
            got=f"exit code {process.returncode}, {(err.strip().splitlines() or ['no message'])[-1][:200]}",
            expected="the answers of its self-test",
            fix="do not use it",
        )
    return dict(json.loads(out.splitlines()[-1]))


def changed(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out an order in this process, and return what its function does; see `in_a_process`."""
    from ..updates import enrol, packs

    changes: dict[str, Callable[..., dict[str, Any]]] = {
        "install": packs.install,
        "rollback": packs.rollback,
        "enrol": enrol.enrol,
        "judge": enrol.judge,
        "remove": enrol.remove,
    }
    return changes[order["do"]](**{name: value for name, value in order.items() if name != "do"})


def main() -> int:
    """Read an order from stdin, carry it out, print the result as JSON. Returns: the exit code."""
    order = json.loads(sys.stdin.read())
    seconds = order.pop("seconds")
    if hasattr(signal, "alarm"):
        signal.alarm(int(seconds + EXTRA_S))
    with contextlib.suppress(OSError):  # where memory runs out this process goes first, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        result = changed(order)
    except InputError as error:
        print(error, file=sys.stderr)
        return REFUSED
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
