"""Writes that are whole or absent, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
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


UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"what only a place for writing says: full, over a quota, read-only, too small for the file, failing"
PREFIX, OWNER = ".cdl-edge-", "owner"
"of a folder for unfinished work, and the file in it that says whose it is"
_MARK = b"Unfinished work of cdl-edge; the next command that writes here removes it.\n"


@contextmanager
def writable(path: Path, numbers: Collection[int] | None = None) -> Iterator[None]:
    """Turn what the system says about a path that the user chose into one message.

    numbers: of the errors that are meant; None: all.
    """
    try:
        yield
    except OSError as error:
        if numbers is not None and error.errno not in numbers:
            raise
        raise InputError(
            f"{path}: cannot be written",
            got=error.strerror or str(error),
            expected="a path in a folder that may be written, on a disk with room",
            fix="choose another path, make room, or mend the permissions of this one",
        ) from error


def check_out(
    path: Path, what: str, foreign: Callable[[Path], str | None] | None = None, replace: bool = False
) -> None:
    """The one rule of every --out: what is there stays, unless all of it is ours and the user said so.

    Args:
        what: is written there, as "a bundle". foreign: says what in an existing file or folder is not of that kind, by
            its content; None when all of it is. Left out: nothing that is there is ever replaced.
        replace: the user wants it replaced.

    Raises: InputError for a path that holds something else, or that may not be replaced.
    """
    with writable(path):
        free = not path.is_symlink() and (not path.exists() or (path.is_dir() and not any(path.iterdir())))
        if free:
            return
        reason = "a link" if path.is_symlink() else foreign(path) if foreign else "not empty"
    if reason is not None:
        raise InputError(
            f"{path}: is there already, and is not just {what} of ours",
            got=reason,
            expected="a new path, or an empty folder",
            fix="choose another path; nothing that is there was touched",
        )
    if not replace:
        raise InputError(
            f"{path}: {what} is there already",
            expected="a new path, or an empty folder",
            fix="choose another --out, or add --force to replace it",
        )


@contextmanager
def workspace(parent: Path, name: str = "") -> Iterator[Path]:
    """Yield a hidden folder in `parent` for unfinished work; afterwards it is gone.

    Also after a kill: every call first removes what processes that are dead have left in `parent`. What is theirs tells
    the owner's file, and that nobody holds its lock any more.

    name: of what is replaced from here; what a killed process had moved aside, as "old", goes back to it.

    Raises: InputError for a place that cannot be written to.
    """
    with writable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _clear(parent)
        folder, lock = _reserve(parent, name)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _reserve(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        try:
            lock = os.open(folder / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # another process took the empty folder for a leftover
            continue
        if _lock(lock) is not False and os.fstat(lock).st_nlink:
            try:
                os.write(lock, _MARK + name.encode("utf-8", "surrogateescape"))
            except OSError:  # a full disk
                _remove(folder)
                os.close(lock)
                raise
            return folder, lock
        os.close(lock)


def _lock(handle: int) -> bool | None:
    """True: held from now on, until the process ends. False: another process holds it. None: no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clear(parent: Path) -> None:
    """Remove the leftovers of dead processes; a folder of another content, or in use, stays."""
    with os.scandir(parent) as entries:
        found = [Path(e.path) for e in entries if e.name.startswith(PREFIX) and e.is_dir(follow_symlinks=False)]
    for folder in found:
        try:
            handle = os.open(folder / OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            with suppress(OSError):  # not empty
                folder.rmdir()
            continue
        except OSError:
            continue
        try:
            if _lock(handle) is not True:
                continue
            content = os.read(handle, 1 << 16)
            if content.startswith(_MARK):
                name = content[len(_MARK) :].decode("utf-8", "surrogateescape")
                old, target = folder / "old", parent / name
                if name and old.exists() and not os.path.lexists(target):
                    os.replace(old, target)
                _remove(folder)
            elif not content and os.listdir(folder) == [OWNER]:
                _remove(folder)
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    """All but the owner's file first: whoever is killed here leaves a folder that still says whose it is."""
    try:
        for entry in folder.iterdir():
            if entry.name == OWNER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        (folder / OWNER).unlink(missing_ok=True)
        folder.rmdir()
    except OSError:  # the disk went away: the next call tries again
        pass


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the filesystem of `path`; on success it replaces `path`, on error it disappears.

    Raises: InputError for a place that cannot be written to, or that is full.
    """
    path = Path(path)
    with writable(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with workspace(path.parent) as work, writable(path, UNWRITABLE):
        temporary = work / "new"
        temporary.touch(0o666)  # the user's umask has the last word
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        with writable(path):
            os.replace(temporary, path)


@contextmanager
def atomic_folder(path: Path, foreign: Callable[[Path], str | None] | None = None) -> Iterator[Path]:
    """Yield a temporary folder on the filesystem of `path`; on success it takes its place, on error it disappears.

    A folder cannot be swapped in one system call portably: the old one is moved aside, the new one in, the old one
    deleted. After a crash between the two moves the next call here puts the old one back.

    foreign: as in `check_out`, which is asked before anything is moved, and of the folder again once it is aside; left
        out, only an empty folder is replaced.

    Raises: InputError for a place that cannot be written to, that is full, or that holds what is not ours.
    """
    path = Path(path)
    check_out(path, "what is written there", foreign, replace=True)
    with workspace(path.parent, path.name) as work, writable(path, UNWRITABLE):
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        with writable(path):
            check_out(path, "what is written there", foreign, replace=True)
            if os.path.lexists(path):
                os.replace(path, old)
            try:
                if old.exists():  # whatever came in meanwhile is in there too
                    check_out(old, "what is written there", foreign, replace=True)
                os.replace(new, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise


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
