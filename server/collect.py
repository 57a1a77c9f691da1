"""Pictures worth keeping: those that the student does not know or is not sure of, one of each scene, bounded on disk.

    DIR/new/<time>-<content>.jpg      with what was answered beside it, as .json
    DIR/sorted/<class>/*.jpg          sorted by hand: an image folder, as `train --data folder:DIR/sorted` reads it

All of it is private: folders have mode 700, files 600. Off unless somebody asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import writable
from ..log import LOG
from ..runtime.scene import Scene
from ..updates.enrolment_record import check_folder, check_name

UNSURE = 0.5
"confidence below which an answer is worth a look"
MOST_PICTURES, MOST_BYTES = 500, 256 << 20
"that are kept, those that were sorted included; the oldest that nobody sorted goes first"
LARGEST = 16 << 20
"bytes of one picture"
WAITING = 8
"pictures that may wait for the disk; more are let go"
REMEMBERED = 1000
"scenes that are not kept again, discarded ones too"
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"BM": "bmp", b"II": "tif", b"MM": "tif", b"GI": "gif"}
_SUFFIXES |= {b"\xff\x4f": "jp2", b"\0\0\0\x0cjP": "jp2"}
_OURS = re.compile(
    rf"\d{{8}}T\d{{6}}-[0-9a-f]{{16}}\.({'|'.join({*_SUFFIXES.values(), 'avif', 'heic', 'pnm', 'img'})})"
)


@dataclass(frozen=True)
class Kept:
    """One picture that nobody has sorted."""

    path: Path
    scene: Scene
    bytes: int
    answer: Mapping[str, Any]
    "label, confidence, unknown, version, at (UTC)"


class Collection:
    """The folder. Any thread may call it.

    Raises: InputError where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "cdl-edge-collect")
        self._waiting = 0
        self._failed = ""
        with writable(folder):
            for place in (folder, self.new, self.sorted):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept = {kept.path.name: kept for kept in self._found()}
        self._scenes: deque[Scene] = deque((k.scene for k in self._kept.values()), REMEMBERED)

    @property
    def new(self) -> Path:
        """Folder of the pictures that nobody has sorted."""
        return self.folder / "new"

    @property
    def sorted(self) -> Path:
        """Folder with a folder for each class into which pictures were sorted."""
        return self.folder / "sorted"

    def _found(self) -> Iterable[Kept]:
        """What is there from before, oldest first; what a killed process left half written goes."""
        for path in sorted(self.new.iterdir()):
            part = path.name.endswith(".part") and _OURS.fullmatch(path.name[1:-5].removesuffix(".json"))
            alone = path.suffix == ".json" and _OURS.fullmatch(path.stem) and not path.with_suffix("").exists()
            if part or alone:
                path.unlink(missing_ok=True)
            elif _OURS.fullmatch(path.name) and path.is_file():
                try:
                    answer = json.loads(self._note(path).read_text(encoding="utf-8"))
                    yield Kept(path, Scene.from_json(answer.pop("scene")), path.stat().st_size, answer)
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    unknown = {"label": "", "confidence": 0.0, "unknown": True}
                    yield Kept(path, Scene(0, (0, 0, 0)), path.stat().st_size, unknown)

    @staticmethod
    def _note(path: Path) -> Path:
        return path.with_name(f"{path.name}.json")

    def offer(self, content: bytes, pixels: np.ndarray, prediction: Mapping[str, Any], version: str) -> None:
        """Keep a picture if it is worth it. content: its file; pixels: uint8 (S, S, 3). Returns at once."""
        if not (prediction["unknown"] or prediction["confidence"] < UNSURE) or len(content) > LARGEST:
            return
        with self._lock:
            if self._waiting >= WAITING:
                return
            self._waiting += 1
        answer = {key: prediction[key] for key in ("label", "confidence", "unknown")}
        self._writer.submit(self._keep, content, pixels, {**answer, "version": version})

    def _keep(self, content: bytes, pixels: np.ndarray, answer: dict[str, Any]) -> None:
        try:
            scene = Scene.of(pixels)
            with self._lock:
                if any(scene.same(other) for other in self._scenes):
                    return
            if not self._make_room(len(content)):
                raise OSError(f"there is room for no more, and all were sorted: move folders of {self.sorted} away")
            self.new.mkdir(mode=0o700, exist_ok=True)
            now = time.gmtime()
            digest = hashlib.sha256(content).hexdigest()[:16]
            name = f"{time.strftime('%Y%m%dT%H%M%S', now)}-{digest}.{_suffix(content)}"
            answer["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
            path = self.new / name
            note = json.dumps({**answer, "scene": scene.to_json()}, ensure_ascii=True)
            _write(self._note(path), note.encode())
            _write(path, content)
            with self._lock:
                self._kept[name] = Kept(path, scene, len(content), answer)
                self._scenes.append(scene)
            self._failed = ""
        except (OSError, InputError) as error:  # no answer waits for this, and none fails with it
            if self._failed != str(error):
                LOG.warning(f"{self.folder}: a picture could not be kept: {error}")
            self._failed = str(error)
        finally:
            with self._lock:
                self._waiting -= 1

    def _make_room(self, size: int) -> bool:
        """Let the oldest go until one more fits; False where all room is taken by what was sorted."""
        sorted_ = [size for sizes in self._sorted().values() for size in sizes]
        while True:
            with self._lock:
                kept = list(self._kept.values())
            count = len(kept) + len(sorted_)
            if count < MOST_PICTURES and sum(k.bytes for k in kept) + sum(sorted_) + size <= MOST_BYTES:
                return True
            if not kept:
                return False
            self.discard([min(k.path.name for k in kept)])

    def listed(self) -> dict[str, Any]:
        """{"pictures": [{"id", "bytes", and the answer}], newest first, "sorted": {class: pictures}, "bytes"}."""
        with self._lock:
            kept = sorted(self._kept.values(), key=lambda k: k.path.name, reverse=True)
        classes = self._sorted()
        return {
            "pictures": [{"id": k.path.name, "bytes": k.bytes, **k.answer} for k in kept],
            "sorted": {name: len(sizes) for name, sizes in classes.items()},
            "bytes": sum(k.bytes for k in kept) + sum(map(sum, classes.values())),
            "most_bytes": MOST_BYTES,
            "most_pictures": MOST_PICTURES,
        }

    def _sorted(self) -> dict[str, list[int]]:
        """Class -> bytes of each of its pictures, as they lie there now: people take them, and the folders, away."""
        found: dict[str, list[int]] = {}
        for path in sorted(self.sorted.glob("*/*")):
            if path.name.startswith(".") or path.parent.name.startswith("."):
                continue
            with contextlib.suppress(OSError):
                about = path.stat()
                if stat.S_ISREG(about.st_mode):
                    found.setdefault(path.parent.name, []).append(about.st_size)
        return found

    def read(self, id: str) -> bytes:
        """One picture. Raises: InputError for one that is not there."""
        (kept,) = self._of([id])
        with writable(kept.path):
            return kept.path.read_bytes()

    def sort(self, ids: Iterable[str], name: str) -> int:
        """Move pictures into the folder of a class; returns how many. Raises: InputError, as `read`, for a bad name."""
        check_name(name)
        check_folder(name)
        chosen = self._of(ids)
        with writable(self.sorted):
            self.sorted.mkdir(mode=0o700, exist_ok=True)
            (self.sorted / name).mkdir(mode=0o700, exist_ok=True)
            for kept in chosen:
                os.replace(kept.path, self.sorted / name / kept.path.name)
                self._forget(kept)
        return len(chosen)

    def discard(self, ids: Iterable[str]) -> int:
        """Delete pictures that nobody has sorted; returns how many. Raises: InputError, as `read`."""
        chosen = self._of(ids)
        for kept in chosen:
            kept.path.unlink(missing_ok=True)
            self._forget(kept)
        return len(chosen)

    def _forget(self, kept: Kept) -> None:
        self._note(kept.path).unlink(missing_ok=True)
        with self._lock:
            self._kept.pop(kept.path.name, None)

    def _of(self, ids: Iterable[str]) -> list[Kept]:
        with self._lock:
            found = {id: self._kept.get(id) for id in ids}
        for id, kept in found.items():
            if kept is not None and not kept.path.is_file():  # somebody took it away
                self._forget(kept)
                found[id] = None
        missing = [id for id, kept in found.items() if kept is None]
        if missing:
            raise InputError("no such picture", got=repr(missing[0][:100]), expected="an id of GET /collected")
        return [kept for kept in found.values() if kept is not None]

    def close(self) -> None:
        """Write the pictures that wait for the disk, and end the thread."""
        self._writer.shutdown()


def _suffix(content: bytes) -> str:
    """Of the name of a picture that was decoded: one that folders of pictures know, or they would leave it out."""
    if content[4:8] == b"ftyp":
        return "avif" if content[8:11] == b"avi" else "heic"
    known = next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), None)
    return known or "pnm"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, for this user only."""
    part = path.with_name(f".{path.name}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
