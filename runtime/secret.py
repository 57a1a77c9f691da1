"""Secrets of this user on this device: made once, and kept where only the user reads them.

The token that packs are installed with, and the key that engines are sealed with.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import workspace

LEAST = 16
"characters of a token; a made one has 43, for 256 bits"


def default_file() -> Path:
    """Where a made token is kept: the service's state (systemd), else that of the user."""
    if state := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(state) / "token"
    return state_folder() / "token"


def state_folder() -> Path:
    """The folder where this user keeps state, for services and commands alike. Raises: RuntimeError without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "cdl-edge"


def private_folder(name: str) -> Path:
    """A folder in `state_folder` that only this user reads and writes; made where it is not there.

    Raises: InputError where there can be none, or others may write to it.
    """
    try:
        folder = state_folder() / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"no folder {name!r} of this user alone can be made",
            got=str(error),
            fix="set XDG_STATE_HOME to a folder of this user",
        ) from error
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022):
        raise InputError(
            f"{folder}: others may write here",
            got=f"mode {stat.S_IMODE(found.st_mode):o}, user {found.st_uid}",
            expected=f"mode 700, user {os.geteuid()}",
            fix=f"chmod 700 {folder}",
        )
    return folder


def seal(document: dict[str, Any]) -> str:
    """Hex HMAC-SHA256 of a JSON document under the key of this user on this device; its "seal" does not count.

    The key is in the file that the environment variable CDL_EDGE_ENGINE_KEY names, else in `state_folder`; it is made
    there at the first call. Whoever has the same file makes the same seals.

    Raises: InputError, as `kept`.
    """
    try:
        path = Path(os.environ.get("CDL_EDGE_ENGINE_KEY") or state_folder() / "engine-key")
    except RuntimeError as error:
        raise InputError(
            "there is no place for a key", got=str(error), fix="set CDL_EDGE_ENGINE_KEY to a file of this user"
        ) from error
    plain = {key: value for key, value in document.items() if key != "seal"}
    return hmac.new(kept(path)[0].encode(), json.dumps(plain, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def is_sealed(document: dict[str, Any]) -> bool:
    """Whether `seal` of this user made the document's "seal". Raises: InputError, as `kept`."""
    return hmac.compare_digest(str(document.get("seal", "")).encode("utf-8", "replace"), seal(document).encode())


def checked(token: str) -> str:
    """The token as it was given. Raises: InputError for one that is empty, short, or that no header can hold."""
    if len(token) < LEAST or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            "the token is empty" if not token else "the token is too short, or of characters that no header holds",
            got=f"{len(token)} characters",
            expected=f"at least {LEAST} characters of ASCII, no space",
            fix="openssl rand -hex 32, or leave --token out: then one is made",
        )
    return token


def kept(path: Path) -> tuple[str, bool]:
    """The secret in this file, and whether it was made just now.

    Raises: InputError for a file that others may read, that is another user's or no secret, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.lexists(path):
            return _read(path), False
        token = secrets.token_urlsafe(32)
        with workspace(path.parent) as work:
            made = os.open(work / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(made, "w", encoding="ascii") as stream:
                stream.write(token + "\n")
                stream.flush()
                os.fsync(made)
            try:  # whole or not at all, and never over another one: two services may start at the same time
                os.link(work / "new", path)
            except FileExistsError:
                return _read(path), False
        return token, True
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise InputError(
            f"{path}: no secret can be kept here",
            got=str(error),
            fix="for the token of packs: --token-file FILE, or the environment variable CDL_EDGE_TOKEN; for the key of "
            "engines: the environment variable CDL_EDGE_ENGINE_KEY, which names a file",
        ) from error


def _read(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), encoding="utf-8", errors="replace") as stream:
        found = os.fstat(stream.fileno())
        text = stream.read(1000).strip()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077):
        raise InputError(
            f"{path}: others may read or write this secret",
            got=f"mode {stat.S_IMODE(found.st_mode):o}, user {found.st_uid}",
            expected=f"mode 600, user {os.geteuid()}",
            fix=f"delete it: another one is made; or: chmod 600 {path}",
        )
    try:
        return checked(text)
    except InputError as error:
        raise InputError(f"{path}: holds no token", got=f"{len(text)} characters", fix="delete it") from error
