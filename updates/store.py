"""The store: versions of a bundle side by side, and a link to the one that runs.

    BUNDLE/versions/<first 16 digits of manifest_sha256>/   whole bundle folders; equal files are hard links
    BUNDLE/current -> versions/...                          replaced by one rename: the only moment that counts
    BUNDLE/store.json                                       order of installs, highest sequence number, keys

A plain bundle folder becomes a store in place: its files are linked into versions/ beside the new version, and from
the moment `current` appears that is what readers open; before, they open the plain files. The next command removes
those. So a process killed at any moment leaves a folder that opens as the old or as the new version, on every
filesystem with links, without moving the folder itself. POSIX only (flock, symlinks).
"""

from __future__ import annotations

import calendar
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..artefacts.bundle import CURRENT, STATE, VERSIONS, Bundle, open_bundle
from ..artefacts.layout import ENGINES, MANIFEST
from ..artefacts.manifest import Manifest, canonical
from ..errors import InputError
from ..files import atomic_file, sha256
from .keys import Keys

SCHEMA = 2
"2: several keys, and revoked ones; of schema 1 are stores with one key"
KEEP = 2
"versions before the one that runs"
_OURS = re.compile(r"[0-9a-f]{16}|\.(new|old)-.*")
"names in the folder of versions"
_NEXT_LINK = ".current.new"


@dataclass(frozen=True)
class Installed:
    """One version that is kept."""

    version: str
    "first 16 digits of its manifest_sha256"
    sequence: int
    at: str
    "UTC"


@dataclass(frozen=True)
class State:
    """What a store knows besides its versions."""

    current: str
    versions: tuple[Installed, ...]
    "oldest first"
    sequence: int
    "the highest that was ever installed; it never falls, also not by a rollback"
    keys: Keys = field(default_factory=Keys)
    "packs have to be signed by one of them; like `sequence` they do not go back in a rollback"
    left: tuple[str, ...] = ()
    "files of the plain bundle that this store was, not removed yet"
    beneath: tuple[str, ...] = ()
    "versions that never ran: classes were carried over to them, and the version with these ran instead"

    def past(self) -> list[Installed]:
        """The versions that ran, up to the one that runs."""
        names = [v.version for v in self.versions]
        until = self.versions[: names.index(self.current) + 1]
        return [v for v in until if v.version == self.current or v.version not in self.beneath]

    def before(self) -> str | None:
        """The version that a rollback goes to."""
        past = self.past()
        return past[-2].version if len(past) > 1 else None


class Store:
    """A store, or a bundle folder that may become one, under its lock; see `locked`."""

    def __init__(self, path: Path) -> None:
        """Raises: InputError for what is no bundle, is damaged, has lost what it knows, or is a version of a store."""
        self.path = path
        whole = path.resolve().parent.parent
        if path.resolve().parent == whole / VERSIONS and (whole / CURRENT).is_symlink():
            raise InputError(
                f"{path}: one version of a store: it is never changed, the next one lies beside it",
                expected="the folder of the store",
                fix=f"name that: {whole}",
            )
        self.bundle = open_bundle(path)
        self.plain = self.bundle.path == path
        self.state = _first(self.bundle) if self.plain else _read(path, self.bundle.path.name)

    def folder(self, version: str) -> Path:
        """Path of the folder of one version."""
        return self.path / VERSIONS / version

    def clean(self) -> None:
        """Remove what a killed command has left, and the files of the plain bundle that this was."""
        kept = set() if self.plain else {v.version for v in self.state.versions}
        versions = self.path / VERSIONS
        for entry in list(versions.iterdir()) if versions.is_dir() else []:
            if _OURS.fullmatch(entry.name) and entry.name not in kept:
                shutil.rmtree(entry)
        for part in (self.path / _NEXT_LINK, *self.path.glob(f".{STATE}.*.part")):
            part.unlink(missing_ok=True)
        if self.plain:
            (self.path / STATE).unlink(missing_ok=True)
            if versions.is_dir() and not any(versions.iterdir()):
                versions.rmdir()
            return
        for name in self.state.left:
            if self._kept_too(name):
                (self.path / name).unlink(missing_ok=True)
            for parent in list((self.path / name).parents)[: name.count("/")]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        self._settle(replace(self.state, left=()))

    def _kept_too(self, name: str) -> bool:
        """Whether a file beside the versions is one of theirs; another one was put there by somebody, and stays."""
        path = self.path / name
        others = [o for v in self.state.versions if (o := self.folder(v.version) / name).is_file()]
        return path.is_file() and any(o.samefile(path) or sha256(o) == sha256(path) for o in others)

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A new folder on the same filesystem, where no reader looks; it is gone afterwards unless committed.

        It holds the engines of the version that runs: where no shape has changed the new prompts are put into them in
        seconds, otherwise they are built again, in minutes, with the same options and what is known of the kernels.
        """
        versions = self.path / VERSIONS
        versions.mkdir(exist_ok=True)
        folder = versions / f".new-{os.urandom(8).hex()}"
        folder.mkdir()  # readable for whom the umask says
        try:
            for name in self._engines():
                try:
                    link(self.bundle.path / name, folder / name)
                except OSError:  # another user's, or no room: it can be built
                    (folder / name).unlink(missing_ok=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if self.plain and not any(versions.iterdir()):
                versions.rmdir()

    def install(self, proven: Bundle, sequence: int, keys: Keys, beneath: Bundle | None = None) -> State:
        """Make a bundle in a folder of `stage`, opened and proven, the version that runs.

        beneath: what its classes were enrolled on, in another such folder: it is kept too, and never runs by itself.
        """
        for bundle in (beneath, proven) if beneath is not None else (proven,):
            target = bundle.manifest.version
            _sync_folders(bundle.path)
            if self.folder(target).exists():  # kept after a rollback
                os.replace(self.folder(target), self.path / VERSIONS / f".old-{target}")
            os.replace(bundle.path, self.folder(target))
        left = self._adopt() if self.plain else ()
        made = [Installed(b.manifest.version, sequence, _now()) for b in (beneath, proven) if b is not None]
        others = [v for v in self.state.versions if v.version not in {m.version for m in made}]
        past, beneath_before = self.state.past(), self.state.beneath
        recent = [v for v in past if v in others][-KEEP:]
        # What classes were enrolled on stays: every later version with enrolments is made from it.
        needed = {proven.manifest.enrolled_on, *(self._enrolled_on(v.version) for v in recent)}
        kept = [v for v in others if v in recent or v.version in needed]
        kept.sort(key=lambda v: v in past or v.version in beneath_before)  # the one that runs stays the one before
        names = {v.version for v in kept}
        after = State(
            current=proven.manifest.version,
            versions=(*kept, *made),
            sequence=max(sequence, self.state.sequence),
            keys=keys,
            left=left,
            beneath=(*(v for v in beneath_before if v in names), *(m.version for m in made[:-1])),
        )
        self._swap(after)
        return after

    def _enrolled_on(self, version: str) -> str | None:
        """What the classes of a kept version were enrolled on; None also for one that is damaged."""
        if version == self.bundle.manifest.version:
            return self.bundle.manifest.enrolled_on
        try:
            return open_bundle(self.folder(version), verify=False).manifest.enrolled_on
        except InputError:
            return None

    def _adopt(self) -> tuple[str, ...]:
        """Link the files of the plain bundle that this is into a version. Returns: their names."""
        files = (*self.bundle.manifest.files, MANIFEST)
        with self.stage() as folder:
            for name in files:
                if (self.path / name).is_file():
                    link(self.path / name, folder / name)
            _sync_folders(folder)
            os.replace(folder, self.folder(self.state.current))
        return (*files, *self._engines())

    def _engines(self) -> list[str]:
        """Names of the files of the engines that the version that runs has."""
        return [f"{ENGINES}/{p.name}" for p in sorted((self.bundle.path / ENGINES).glob("*")) if p.is_file()]

    def trust(self, sequence: int, keys: Keys) -> State:
        """Change what is trusted, and the sequence number, alone: the same version runs on."""
        after = replace(self.state, sequence=max(sequence, self.state.sequence), keys=keys)
        if self.plain:  # a store from now on: a plain folder remembers nothing
            self._swap(replace(after, left=self._adopt()))
        else:
            self._settle(after)
        return self.state

    def rollback(self, proven: Bundle, newest: bool = False) -> State:
        """Make a kept version, opened and proven, run again.

        newest: it counts as installed now, so that the next rollback goes to the one that runs at this moment.
        """
        name, order = proven.manifest.version, list(self.state.versions)
        if newest:
            (mine,) = (v for v in order if v.version == name)
            order.remove(mine)
            order.insert([v.version for v in order].index(self.state.current) + 1, mine)
        beneath = tuple(v for v in self.state.beneath if v != name)  # it has run from now on
        after = replace(self.state, current=name, versions=tuple(order), beneath=beneath)
        self._swap(after)
        return after

    def _swap(self, after: State) -> None:
        """Exchange the state: it is written down first, beside the old one, and holds once `current` is renamed."""
        _sync(self.path / VERSIONS)
        _write(self.path, self.state, after)
        _sync(self.path)
        link_path = self.path / _NEXT_LINK
        link_path.unlink(missing_ok=True)
        try:
            link_path.symlink_to(f"{VERSIONS}/{after.current}")
        except OSError as error:
            raise InputError(
                f"{self.path}: no symbolic links here",
                got=error.strerror,
                expected="a filesystem that has them, as ext4 (not FAT)",
                fix="move the bundle to one",
            ) from error
        os.replace(link_path, self.path / CURRENT)
        # What follows is tidying up: the state as it was written holds now, and no full disk may say otherwise.
        self.plain, self.state = False, after
        with suppress(OSError, InputError):
            _sync(self.path)
            for entry in (self.path / VERSIONS).iterdir():
                if _OURS.fullmatch(entry.name) and entry.name not in {v.version for v in after.versions}:
                    shutil.rmtree(entry)
            self._settle(after)

    def _settle(self, state: State) -> None:
        """Write a state that holds now, with nothing to come."""
        self.state = state
        _write(self.path, state, None)
        _sync(self.path)


@contextmanager
def locked(path: Path) -> Iterator[Store]:
    """Open a store for changing it. Raises: InputError as `Store` does, or while another command changes it."""
    path = Path(path)
    if not path.is_dir():
        open_bundle(path)  # says what is missing
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{path}: another command is changing it", expected="one at a time", fix="wait, then run it again"
            ) from error
        yield Store(path)
    finally:
        os.close(handle)  # and the lock with it, also when the process is killed


def read_store(path: Path) -> tuple[Bundle, State]:
    """The version that runs, its hashes not checked, and what the store knows. Raises: InputError as `Store` does."""
    path = Path(path)
    bundle = open_bundle(path, verify=False)
    return bundle, _first(bundle) if bundle.path == path else _read(path, bundle.path.name)


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the filesystem has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        _sync(target)


def write_file(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file of a staged version, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.writelines(blocks)
        stream.flush()
        os.fsync(stream.fileno())


def sequence_of(manifest: Manifest) -> int:
    """Seconds since 1970 of `created`, and one more for each time that a class was enrolled; 0 without the date.

    So what was enrolled later is newer, and the workshop's next version, made minutes later at least, is newer still.
    """
    try:
        seconds = calendar.timegm(time.strptime(str(manifest.created), "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return 0
    return seconds + len(manifest.enrolments)


def _first(bundle: Bundle) -> State:
    """The state of a bundle folder that never was a store."""
    own, sequence = bundle.manifest.version, sequence_of(bundle.manifest)
    return State(own, (Installed(own, sequence, str(bundle.manifest.created)),), sequence)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(path: Path, current: str) -> State:
    """What the store knows, given what `current` names: a state that was written but not reached does not count."""
    file = path / STATE
    try:
        text = file.read_bytes()
        document = json.loads(text.decode("utf-8"))
        if canonical(document).encode("utf-8") != text or document["sha256"] != _hash(document):
            raise ValueError("changed since it was written")
        if document["schema"] > SCHEMA:
            raise ValueError(f"schema {document['schema']}, this cdl-edge knows {SCHEMA}")
        now, then = (_state(document[key]) for key in ("now", "next"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: the store does not know its past",
            got=str(error),
            expected=f"{STATE} as the last command wrote it: order of versions, sequence number, pinned key",
            fix=f"what runs is not touched; to start anew, copy {path / VERSIONS / current} to a new folder",
        ) from error
    state = then if then is not None and then.current == current else now
    assert state is not None
    kept = tuple(v for v in state.versions if (path / VERSIONS / v.version).is_dir())
    if current not in {v.version for v in kept}:
        raise InputError(
            f"{path / CURRENT}: names a version that was never installed here",
            got=current,
            expected=", ".join(v.version for v in kept),
            fix=f"ln -sfn {VERSIONS}/VERSION {path / CURRENT}",
        )
    return replace(state, current=current, versions=kept)


def _state(fields: dict[str, Any] | None) -> State | None:
    if fields is None:
        return None
    versions = tuple(Installed(**v) for v in fields["versions"])
    known = {name: fields[name] for name in ("current", "sequence")}
    if "public_key" in fields:  # schema 1
        keys = Keys(() if fields["public_key"] is None else (fields["public_key"],))
    else:
        keys = Keys(*(tuple(fields["keys"][name]) for name in ("trusted", "revoked")))
    beneath = tuple(fields.get("beneath", ()))  # not in stores of earlier releases
    return State(**known, versions=versions, keys=keys, left=tuple(fields["left"]), beneath=beneath)


def _write(path: Path, now: State, then: State | None) -> None:
    document: dict[str, Any] = {"schema": SCHEMA, "kind": "store", "now": asdict(now)}
    document |= {"next": asdict(then) if then is not None else None, "sha256": ""}
    document = json.loads(canonical(document))  # tuples become lists
    document["sha256"] = _hash(document)
    with atomic_file(path / STATE) as temporary:
        temporary.write_bytes(canonical(document).encode("utf-8"))


def _hash(document: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({**document, "sha256": ""}).encode("utf-8")).hexdigest()


def _sync_folders(folder: Path) -> None:
    """Push the names in a folder to the disk."""
    for inside in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _sync(inside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
