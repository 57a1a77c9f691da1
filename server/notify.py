"""What systemd is told by a service that it watches: sd_notify(3), without libsystemd.

Outside of systemd nothing is sent. Protocol: one datagram of KEY=VALUE lines to the socket in $NOTIFY_SOCKET, whose
name begins with "@" where it is in the abstract namespace.
"""

from __future__ import annotations

import os
import socket

TIMEOUT_S = 1.0
"for a queue that is full: a service does not stop answering because nobody listens to it"


def notify(state: str) -> bool:
    """Send a state: "READY=1", "WATCHDOG=1", "STOPPING=1", "STATUS=...", several with newlines between.

    Returns: whether it was sent; False without $NOTIFY_SOCKET, or where nobody takes it.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):  # systemd also knows vsock, for virtual machines
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(TIMEOUT_S)
            return out.sendto(state.encode("utf-8"), address) > 0
    except OSError:  # the socket is gone, or its queue stays full
        return False


def watchdog_s() -> float | None:
    """Seconds between two "WATCHDOG=1": half of WatchdogSec=, as sd_watchdog_enabled(3) advises.

    None: nobody watches, or another process than this one.
    """
    period, process = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not period.isdecimal() or int(period) == 0 or process not in ("", str(os.getpid())):
        return None
    return int(period) / 1e6 / 2
