"""The token that packs are installed with: given, or made once and kept where only this user reads it."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from ..errors import InputError

LEAST = 16
"characters of a token; a made one has 43, for 256 bits"


def default_file() -> Path:
    """Where a made token is kept: the service's state (systemd), else that of the user."""
    if state := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(state) / "token"
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "cdl-edge" / "token"


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
    """The token in this file, and whether it was made just now.

    Raises: InputError for a file that others may read, that is another user's or no token, or cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except FileExistsError:
            return _read(path), False
        with open(made, "w", encoding="ascii") as stream:
            token = secrets.token_urlsafe(32)
            stream.write(token + "\n")
        return token, True
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise InputError(
            f"{path}: no token can be kept here",
            got=str(error),
            fix="give --token-file FILE, or the environment variable CDL_EDGE_TOKEN",
        ) from error


def _read(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), encoding="utf-8", errors="replace") as stream:
        found = os.fstat(stream.fileno())
        text = stream.read(1000).strip()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077):
        raise InputError(
            f"{path}: others may read or write the token",
            got=f"mode {stat.S_IMODE(found.st_mode):o}, user {found.st_uid}",
            expected=f"mode 600, user {os.geteuid()}",
            fix=f"delete it: another one is made; or: chmod 600 {path}",
        )
    try:
        return checked(text)
    except InputError as error:
        raise InputError(f"{path}: holds no token", got=f"{len(text)} characters", fix="delete it") from error
