"""The RUN folder while a training works in it: claimed by one process, and only for what was begun in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from ..artefacts.layout import CONFIG, METRICS
from ..data import Dataset, Fingerprint, absolute, check_spelling
from ..errors import InputError
from ..files import hold, writable, write_json
from .checkpoint import before, load_kept
from .config import TrainConfig

ELSEWHERE = ("out", "devices", "teachers", "data")
"options that a resumed run may name anew; the images themselves are compared"


class RunFolder:
    """A folder for one training at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics = path / CONFIG, path / METRICS
        self.checkpoint = path / "checkpoint.safetensors"
        self._lock: IO[str] | None = None

    def claim(self, config: TrainConfig, resume: bool, dataset: Dataset) -> None:
        """Make the folder ours and write the options, or refuse and write nothing. dataset: before `limit_per_class`.

        Raises: InputError for a folder that is something else, a run that is there already or at work, and a resumed
        run that was started with other options or other images.
        """
        self._check_free(resume)
        with writable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path / ".lock")
        if self._lock is None:
            raise InputError(
                f"{self.path}: another training works there now", fix="wait for it, or choose another --out"
            )
        try:
            self._check_free(resume)  # again, now that nobody else can change it
            if self.config.exists():
                self._check_same(config, dataset)
        except BaseException:
            self.release()
            raise
        for leftover in self.path.glob(".*.part"):  # of a write that was killed
            leftover.unlink()
        write_json(self.config, config.to_json())

    def release(self) -> None:
        """Let another training in; a second call does nothing."""
        if self._lock is not None:
            # First the name, then the lock: whoever opens it in between must not lock a file that is about to go.
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _check_free(self, resume: bool) -> None:
        if self.config.exists():
            if not resume:
                raise InputError(f"{self.path}: a run is there already", fix="add --resume, or choose another --out")
        elif self.path.exists() and (not self.path.is_dir() or any(not _ours(p.name) for p in self.path.iterdir())):
            raise InputError(f"{self.path}: exists and is not a run", expected="a new or empty folder for --out")

    def _check_same(self, config: TrainConfig, dataset: Dataset) -> None:
        try:
            old = TrainConfig.read(self.config)
            metrics = json.loads(self.metrics.read_text(encoding="utf-8")) if self.metrics.exists() else None
        except ValueError as error:
            raise InputError(f"{self.path}: damaged run", got=str(error), expected="JSON") from error
        there = self.checkpoint.exists() or before(self.checkpoint).exists()
        state = metrics or (load_kept(self.checkpoint) if there else None)
        mine, theirs = config.to_json(), old.to_json()
        early = state is not None and "data" not in state
        free = [k for k in ELSEWHERE if not early or k != "data"]
        differing = [k for k in mine if mine[k] != theirs[k] and k not in free]
        if early and absolute(config.data) == absolute(old.data):
            differing = [k for k in differing if k != "data"]
        if differing:
            raise InputError(
                f"{self.path}: was started with other options",
                got=", ".join(f"{k}={mine[k]!r}" for k in differing),
                expected=", ".join(f"{k}={theirs[k]!r}" for k in differing),
                fix="give the same options, or choose another --out",
            )
        if early and metrics is None and dataset.held_out:
            raise InputError(
                f"{self.path}: stopped by an earlier version, which held other images of {dataset.source} out",
                fix="finish it with that version, or start again with another --out",
            )
        if state is not None and not early:
            check_images(self.path, Fingerprint.from_json(state["data"]["fingerprint"]), dataset)


def check_images(path: Path, learnt: Fingerprint, dataset: Dataset) -> None:
    """Raises: InputError where `dataset` is not what the run in `path` has learnt from."""
    check_spelling(dataset.source, dataset.classes, list(learnt.val))
    if changes := learnt.changes(dataset.fingerprint):
        raise InputError(
            f"{dataset.source}: not the images that {path} was started with",
            got=changes,
            expected="the same class names, file names and bytes; the folder itself may have moved",
            fix="bring these images back, or start again with another --out",
        )


def _ours(name: str) -> bool:
    """Whether a training leaves a file of that name when it is killed before it has written its options."""
    return name == ".lock" or (name.startswith(".config.json.") and name.endswith(".part"))
