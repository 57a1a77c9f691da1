"""Trained teachers, kept: a teacher depends on nothing of its student but the query, so many students can share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..files import write_json
from .checkpoint import load_state, save_state
from .config import TrainConfig
from .learners import LEARNERS

SCHEMA = 2
"to be raised when the code that trains a teacher changes what comes out"


@dataclass(frozen=True)
class TeacherKey:
    """Everything a trained teacher depends on."""

    data: str
    "fingerprint of the images and their names, see Dataset.fingerprint"
    limit_per_class: int | None
    "training images of each class that are taken of them"
    classes: tuple[str, ...]
    "in learned order"
    tasks: int
    "parts they are cut into"
    teacher: str
    "identity of its backbone"
    student: str | None
    "identity of the backbone that gives the query; None where the teacher asks no other"
    learner: str
    "prompt learner"
    apt_momentum: float
    "c of APT's merge"
    query: str
    "two-pass | one-pass | one-pass-patches"
    query_regulariser: float
    "weight of the one-pass term"
    epochs: int
    "a task"
    batch_size: int
    "images a step"
    learning_rate: float
    "Adam's peak"
    min_steps: int
    "of a task"
    head: str
    "what answers, and with how many random features"
    seed: int
    "of initial values, batches, augmentation"
    augmented: bool
    "random crops and mirrors"
    compat: bool
    "the authors' behaviour"
    resize_rule: str
    "cut | pad | squash"
    decoder: int
    "rule of decoding"
    precision: str
    "of training"
    device: str
    "cpu | cuda: their floats differ"
    schema: int = SCHEMA
    "of this file"

    @property
    def name(self) -> str:
        """Name of the folder of the teacher: 16 hex digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def teacher_key(
    config: TrainConfig,
    identities: Mapping[str, str],
    data: str,
    classes: Sequence[str],
    augmented: bool,
    precision: str,
    device: str,
) -> TeacherKey:
    """The key of a run's teacher. identities: of both backbones; data: fingerprint; classes: in learned order."""
    asks_student = LEARNERS[config.learner].needs_query and config.query == "two-pass"
    return TeacherKey(
        data=data,
        limit_per_class=config.limit_per_class,
        classes=tuple(classes),
        tasks=config.tasks or 1,
        teacher=identities["teacher"],
        student=identities["student"] if asks_student else None,
        learner=config.learner,
        apt_momentum=config.apt_momentum,
        query=config.query,
        query_regulariser=config.query_regulariser,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=float(config.learning_rate or 0),
        min_steps=config.min_steps or 0,
        head=f"{config.head} {config.random_features}",
        seed=config.seed,
        augmented=augmented,
        compat=config.compat,
        resize_rule=config.resize_rule,
        decoder=config.decoder,
        precision=precision,
        device=device,
    )


@dataclass
class TaughtTask:
    """A teacher just after it has learnt a task."""

    state: dict[str, Any]
    "of the model, before the student's phase"
    row: list[float]
    "accuracy in % on tasks 0.. after this one"
    losses: list[float]
    "mean training loss of each epoch"
    seconds: float
    "of training"
    images: int
    "trained on, counted once an epoch"
    logits: Tensor | None
    "float32 (N, c) of the task's training images, where nothing is augmented"


class Teachers:
    """A folder DIR/<key>/task-NN.safetensors; every file is written atomically and says whose it is."""

    def __init__(self, folder: Path, key: TeacherKey) -> None:
        """Raises: InputError where `folder` is a file."""
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a folder", expected="a folder for --teachers")
        self.folder, self.key = folder / key.name, key

    def path(self, task: int) -> Path:
        """Path of the file with the teacher after a task, counted from 0."""
        return self.folder / f"task-{task + 1:02d}.safetensors"

    def load(self, task: int) -> TaughtTask | None:
        """The teacher after `task`, or None. Raises: InputError for a file of another key or a damaged one."""
        path = self.path(task)
        if not path.is_file():
            return None
        stored = load_state(path)
        if stored.get("key") != json.loads(json.dumps(asdict(self.key))):
            raise InputError(f"{path}: the teacher of another run", fix="delete the folder, it will be made again")
        return TaughtTask(**{f.name: stored[f.name] for f in fields(TaughtTask)})

    def store(self, task: int, taught: TaughtTask) -> None:
        """Keep the teacher after `task`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", asdict(self.key))
        entry = {f.name: getattr(taught, f.name) for f in fields(TaughtTask)}
        save_state(self.path(task), {"key": asdict(self.key), **entry})
