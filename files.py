"""Writes that are whole or absent, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing guards against two processes in one folder
    fcntl = None  # type: ignore[assignment]


def first_process() -> bool:
    """Whether this is the process that writes and talks, of those that torchrun started or on its own."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn what the system says about a path that the user chose into one message."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written",
            got=error.strerror or str(error),
            expected="a path in a folder that may be written",
            fix="choose another path, or mend the permissions of this one",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it disappears.

    Raises: InputError for a place that cannot be written to.
    """
    path = Path(path)
    with writable(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on error it disappears.

    A folder cannot be swapped in one system call portably: the old one is moved aside, the new one in, the old one
    deleted; a crash between the two moves leaves both complete on disk.

    Raises: InputError for a place that cannot be written to.
    """
    path = Path(path)
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, aside / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(aside / path.name, path)
                aside.rmdir()
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hold(path: Path) -> IO[str] | None:
    """Lock a file for as long as the stream, or a process that inherits it, lives; None when somebody else holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "a")  # noqa: SIM115 (closed by the caller)
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    return stream


def write_json(path: Path, document: Any) -> None:
    """Write JSON atomically, keys in the given order, one trailing newline."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(stream)


def _slow(stream: Any) -> str:  # Python 3.10 (JetPack 6) has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
