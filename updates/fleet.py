"""Packs for many devices: pushed to a registry once, pulled by every device that may read it.

A tag is a step: SEQUENCE-FROM-TO, the order of the pack and the first 16 digits of the two versions. So one list of
tags tells a device the way from the version that it runs to the newest one. The registry is trusted with nothing: every
pack goes through `packs.install` as a file would.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefacts.bundle import Bundle
from ..errors import InputError
from ..files import sha256, writable
from ..log import LOG
from .packfile import MAX_BYTES, open_pack
from .packs import REFUSED, install
from .registry import MANIFEST_TYPE, Place, Registry
from .store import State, read_store

PACK_TYPE = "application/vnd.cdl-edge.pack.v1"
LAYER_TYPE = f"{PACK_TYPE}+zip"
EMPTY = b"{}"
"what the specification has for an artefact without a configuration"
PULLED = ".pull"
"folder in the bundle for packs that are on their way"
_TAG = re.compile(r"([1-9][0-9]{0,18})-([0-9a-f]{16})-([0-9a-f]{16})")
_PART = re.compile(r"[0-9a-f]{64}\.part")


@dataclass(frozen=True)
class Step:
    """What a tag says of its pack. It is a hint where to look: what counts is in the signed pack."""

    sequence: int
    base: str
    "version that the pack is for"
    target: str
    "version that it makes; the same as `base` where it changes keys alone"

    @property
    def tag(self) -> str:
        """Name of the step in the registry, SEQUENCE-FROM-TO."""
        return f"{self.sequence}-{self.base}-{self.target}"

    @classmethod
    def all_of(cls, tags: Iterable[str]) -> list[Step]:
        """The steps that these tags name; tags that are not ours are passed over."""
        found = [match for tag in tags if (match := _TAG.fullmatch(tag))]
        return [cls(int(m[1]), m[2], m[3]) for m in found]


def way(steps: Iterable[Step], version: str, sequence: int) -> list[Step]:
    """The steps from a version to the newest one: as few as lead there, with those that change keys on the way.

    sequence: the highest that was installed; a step has to be above the one before it.
    """
    ways: dict[str, list[list[Step]]] = {}
    "from each version"

    def best(base: str, above: int) -> list[Step]:
        return max((way for way in ways.get(base, []) if way[0].sequence > above), key=_rank, default=[])

    for step in sorted(set(steps), key=lambda s: s.sequence, reverse=True):
        ways.setdefault(step.base, []).append([step, *best(step.target, step.sequence)])
    return best(version, sequence)


def _rank(steps: list[Step]) -> tuple[int, int, int]:
    moves = [s.sequence for s in steps if s.base != s.target]
    return max(moves, default=0), -len(moves), len(steps)


def push(pack: Path | str, to: str, plain_http: bool = False, replace: bool = False) -> dict[str, Any]:
    """Put a pack into a repository, under the tag of its step. What the registry has already is not sent again.

    Args:
        to: REGISTRY/REPOSITORY. plain_http: without TLS, which registries on this machine never have.
        replace: another pack that is there under the same tag, as one that was signed with another key.

    Returns: {"pack", "repository", "tag", "digest", "bytes", "from", "to", "sequence", "signed", "sent", "reached":
        whether a pack there makes the version that this one is for, or there is no other}.

    Raises: InputError for a file that is no pack, a repository that cannot be written to, another pack under the tag.
    """
    place = Place.of(to, plain_http)
    registry = Registry(place)
    with open_pack(Path(pack)) as opened:
        document, path = opened.document, opened.path
    source, target = document["from"], document["to"]
    step = Step(document["sequence"], source[:16], target[:16])
    if not _TAG.fullmatch(step.tag):
        raise InputError(f"{pack}: no pack that a tag can name", got=step.tag, expected="SEQUENCE-FROM-TO")
    others = [s for s in Step.all_of(registry.tags() or []) if s != step]
    layer = {"mediaType": LAYER_TYPE, "digest": f"sha256:{sha256(path)}", "size": path.stat().st_size}
    there = None if replace else registry.manifest(step.tag)
    if there is not None and (digest := _layer(there, place, step)[0]) != layer["digest"]:
        raise InputError(
            f"{place}:{step.tag}: another pack is there already",
            got=digest,
            expected=layer["digest"],
            fix="give it a higher --sequence; or add --force to replace it for devices that have not taken it",
        )
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "size": len(EMPTY)}
    empty |= {"digest": f"sha256:{hashlib.sha256(EMPTY).hexdigest()}"}
    registry.put_blob(str(empty["digest"]), EMPTY)
    sent = registry.put_blob(str(layer["digest"]), path)
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": PACK_TYPE, "config": empty}
    title = {"org.opencontainers.image.title": f"{step.tag}.pack"}
    digest = registry.put_manifest(step.tag, {**manifest, "layers": [{**layer, "annotations": title}]})
    return {
        "pack": str(pack),
        "repository": str(place),
        "tag": step.tag,
        "digest": digest,
        "bytes": layer["size"],
        "from": source,
        "to": target,
        "sequence": step.sequence,
        "signed": document["signature"] is not None,
        "sent": sent,
        "reached": not others or any(step.base in (s.base, s.target) for s in others),
    }


def pull(
    source: str,
    bundle: Path | str,
    public_key: Path | str | Sequence[Path | str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    plain_http: bool = False,
) -> dict[str, Any]:
    """Install pack after pack from a repository, until the newest version runs that leads on from the present one.

    Each step is whole: killed or refused in between, the version that the last step made runs, and the next call goes
    on there, also within a pack that was not loaded to its end.

    Args:
        source: REGISTRY/REPOSITORY. public_key, backend, threads: as for `packs.install`.
        plain_http: without TLS, which registries on this machine never have.

    Returns: {"bundle", "repository", "previous", "version", "sequence", "steps": [what `packs.install` returns, and
        "tag", "bytes", "kept": bytes of an earlier call]}; no steps: nothing is newer.

    Raises: InputError for a repository that is not there or knows nothing of this bundle, a registry that is gone, a
        digest that does not fit, and whatever `install` refuses. GateError for a self-test that is not passed.
    """
    place = Place.of(source, plain_http)
    registry, bundle = Registry(place), Path(bundle)
    opened, state = read_store(bundle)
    tags = registry.tags()
    known = Step.all_of(tags or [])
    if not known:
        raise InputError(
            f"{place}: no packs there",
            got="no such repository" if tags is None else f"{len(tags)} other tag(s)",
            expected="packs that were sent by `cdl-edge pack push`",
            fix="check the name of the repository",
        )
    if not {*_bases(opened, state)} & {version for step in known for version in (step.base, step.target)}:
        raise InputError(
            f"{place}: no pack there is for the version that runs, or makes it",
            got=f"{' on '.join(_bases(opened, state))} runs in {bundle}",
            expected=f"one of {', '.join(list(dict.fromkeys(s.base for s in known))[-8:])}",
            fix="check the name of the repository; or push a pack from that version",
        )
    first, done = state.current, []
    if _way_on(known, opened, state):
        with _folder(bundle) as folder:
            while steps := _way_on(known, opened, state):
                done.append(_step(registry, steps[0], len(steps), folder, bundle, public_key, backend, threads))
                opened, state = read_store(bundle)
    return {
        "bundle": str(bundle),
        "repository": str(place),
        "previous": first,
        "version": state.current,
        "sequence": state.sequence,
        "steps": done,
    }


def _bases(opened: Bundle, state: State) -> list[str]:
    """The versions whose packs `install` takes: the one that runs, and what its classes were enrolled on."""
    return [v for v in (state.current, opened.manifest.enrolled_on) if v is not None]


def _way_on(known: list[Step], opened: Bundle, state: State) -> list[Step]:
    """The best way from one of them; no step makes what runs already, as on the device that has taught the others."""
    steps = [step for step in known if step.target != state.current or step.base == step.target]
    return max((way(steps, base, state.sequence) for base in _bases(opened, state)), key=_rank)


def _step(
    registry: Registry,
    step: Step,
    left: int,
    folder: Path,
    bundle: Path,
    public_key: Path | str | Sequence[Path | str] | None,
    backend: str,
    threads: int | None,
) -> dict[str, Any]:
    """Load one pack and install it."""
    place, name = registry.place, f"{registry.place}:{step.tag}"
    manifest = registry.manifest(step.tag)
    if manifest is None:
        raise InputError(f"{name}: is not there any more", fix="run the same command again")
    digest, size = _layer(manifest, place, step)
    part = folder / f"{digest.removeprefix('sha256:')}.part"
    for other in folder.iterdir():  # of a pack that was replaced meanwhile
        if _PART.fullmatch(other.name) and other != part:
            other.unlink()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{bundle}: the disk is full", got=f"{free} bytes free", expected=f"{size}", fix="make room")
    LOG.info(f"{left} pack(s) to go: {step.base} -> {step.target}, {size} bytes")
    kept = registry.get_blob(digest, size, part)
    try:
        result = install(part, bundle, public_key, backend, threads)
    except InputError as error:  # the user knows nothing of this file
        raise type(error)(str(error).replace(str(part), name)) from error
    finally:
        part.unlink(missing_ok=True)
    return {**result, "tag": step.tag, "bytes": size, "kept": kept}


def _layer(manifest: dict[str, Any], place: Place, step: Step) -> tuple[str, int]:
    """(digest, bytes) of the pack that a manifest names. Raises: InputError for one of something else."""
    try:
        (layer,) = manifest["layers"]
        digest, size = layer["digest"], layer["size"]
        fits = layer["mediaType"] == LAYER_TYPE and type(size) is int and 0 < size <= MAX_BYTES
        fits = fits and re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is not None
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError(
            f"{place}:{step.tag}: holds no pack",
            got=f"{manifest.get('layers')!r:.200}",
            expected=f"one layer of type {LAYER_TYPE}, its sha256, and at most {MAX_BYTES} bytes",
            fix="push the pack again: cdl-edge pack push PACK REGISTRY/REPOSITORY --force",
        )
    return digest, size


@contextmanager
def _folder(bundle: Path) -> Iterator[Path]:
    """Where packs are loaded to, for one process at a time; it goes when it is empty.

    Raises: InputError while another process pulls.
    """
    folder = bundle / PULLED
    with writable(folder, REFUSED):
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{bundle}: another command is pulling into it", fix="wait for its end") from error
        yield folder
    finally:
        with suppress(OSError):  # it holds what the next call goes on with
            folder.rmdir()
        os.close(handle)
