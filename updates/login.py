"""Who one is to a registry: a token from the environment, or what `docker login` has stored; and what it is traded for.

A registry answers 401 with a challenge: Basic, or Bearer with the address that gives a token for user and password.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ..errors import InputError

TOKEN = "CDL_EDGE_REGISTRY_TOKEN"
"environment variable with a bearer token"
HELPER_S = 30
"seconds that a program for credentials may take"
_PART = re.compile(r'([a-zA-Z_]+)\s*=\s*(?:"([^"]*)"|([^\s,]+))')

Fetch = Callable[[str, Mapping[str, str]], bytes]
"gives what is at an address, asked with these headers"


def config_file() -> Path:
    """Path of the file that `docker login` (and podman's `--compat-auth-file`) writes."""
    return Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"


def authorization(registry: str, challenge: str, fetch: Fetch) -> str | None:
    """The header that answers a challenge.

    Args:
        challenge: WWW-Authenticate of the answer 401. fetch: for the address of tokens; it raises what is wrong there.

    Returns: "Basic ..." or "Bearer ..."; None without credentials where there have to be some.

    Raises: InputError for credentials that cannot be read, or a challenge that nothing here answers.
    """
    token = os.environ.get(TOKEN)
    if token:
        return f"Bearer {token.strip()}"
    kind, _, rest = challenge.partition(" ")
    parts = {name.lower(): quoted or plain for name, quoted, plain in _PART.findall(rest)}
    known = credentials(registry)
    if kind.lower() == "basic":
        return None if known is None else f"Basic {known}"
    if kind.lower() != "bearer" or "realm" not in parts:
        raise InputError(
            f"{registry}: asks for a login of a kind that is not known here",
            got=repr(challenge[:200]),
            expected="Basic, or Bearer with a realm",
            fix=f"set {TOKEN} to a token of this registry",
        )
    query = urlencode({name: parts[name] for name in ("service", "scope") if name in parts})
    joint = "&" if "?" in parts["realm"] else "?"
    headers = {} if known is None else {"Authorization": f"Basic {known}"}
    answer = fetch(parts["realm"] + (joint + query if query else ""), headers)
    try:
        document = json.loads(answer)
        token = document.get("token") or document.get("access_token")
    except (ValueError, AttributeError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise InputError(f"{registry}: gives no token", got=f"{answer[:80]!r}", expected='{"token": ...}')
    return f"Bearer {token}"


def credentials(registry: str) -> str | None:
    """User and password for a registry as Basic has them, in base64; None where none are stored.

    Raises: InputError for a file of `docker login` that is no such file, or a program for credentials that fails.
    """
    file = config_file()
    try:
        config = json.loads(file.read_text("utf-8"))
        stored: dict[str, Any] = {_host(name): entry for name, entry in (config.get("auths") or {}).items()}
        helper = (config.get("credHelpers") or {}).get(registry) or config.get("credsStore")
        entry = stored.get(registry) or {}
        auth = entry.get("auth")
        if not auth and "username" in entry and "password" in entry:
            auth = _pair(entry["username"], entry["password"])
        whole = b":" in base64.b64decode(auth, validate=True) if auth else True
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(file, error) from error
    if not whole:
        raise _unreadable(file, "an entry without user and password")
    if auth:
        return str(auth)
    return _ask(str(helper), registry) if helper else None


def _ask(helper: str, registry: str) -> str | None:
    """Credentials from `docker-credential-HELPER`."""
    program = f"docker-credential-{helper}"
    if not re.fullmatch(r"[A-Za-z0-9._-]+", helper):
        raise _unreadable(config_file(), f"a program named {program!r}")
    try:
        done = subprocess.run([program, "get"], input=registry, capture_output=True, text=True, timeout=HELPER_S)
        if done.returncode != 0:  # it has none for this registry
            return None
        found = json.loads(done.stdout)
        return _pair(found["Username"], found["Secret"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{program}: gives no credentials for {registry}",
            got=str(error)[:200],
            expected=f"the program that {config_file()} names",
            fix=f"install it, log in again, or set {TOKEN}",
        ) from error


def _pair(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _host(name: str) -> str:
    """Docker stores some registries as addresses."""
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _unreadable(file: Path, error: object) -> InputError:
    return InputError(
        f"{file}: not as `docker login` writes it",
        got=str(error)[:200],
        expected='{"auths": {"REGISTRY": {"auth": ...}}}',
        fix=f"docker login REGISTRY, or mend the file, or set {TOKEN}",
    )
