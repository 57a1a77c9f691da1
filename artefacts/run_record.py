"""metrics.json of a RUN: what was learnt, how well, from what; read, checked and written here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_json
from .layout import METRICS, RUN_SCHEMA
from .typed import MalformedField, parse

Row = tuple[float | None, ...]
PICTURE_KINDS = ("wrong", "unsure", "drawn")
"the surest mistakes, the least sure of the right answers, some of the others drawn by the seed"
PICTURES_EACH = 12
"pictures of each kind at most"


@dataclass(frozen=True)
class Confusion:
    """Validation images by their class and the student's answer."""

    images: tuple[int, ...]
    "of each class"
    right: tuple[int, ...]
    "how many of them were named rightly"
    pairs: tuple[tuple[int, ...], ...]
    "(class, answer, images), the most confused first"
    matrix: tuple[tuple[int, ...], ...] | None = None
    "images of each class (row) by answer (column); None for many classes"

    def check_classes(self, classes: int) -> None:
        """All of it is about so many classes. Raises: MalformedField."""
        rows = {"images": self.images, "right": self.right}
        rows |= {f"matrix[{i}]": row for i, row in enumerate(self.matrix or ())}
        for name, row in rows.items():
            if len(row) != classes or min(row) < 0:
                raise MalformedField(f"student.confusion.{name}", list(row), f"{classes} counts")
        if any(r > n for r, n in zip(self.right, self.images, strict=True)):
            raise MalformedField("student.confusion.right", list(self.right), "no more than the images of each class")
        for pair in self.pairs:
            if len(pair) != 3 or min(pair) < 0 or max(pair[:2]) >= classes:
                raise MalformedField("student.confusion.pairs", list(pair), f"two classes below {classes}, and a count")
        if self.matrix is not None and [sum(row) for row in self.matrix] != list(self.images):
            raise MalformedField("student.confusion.matrix", "rows", f"{classes} rows that sum to the images of each")


@dataclass(frozen=True)
class ExamplePicture:
    """A validation image for the report: what the student answered, and how to find it in the data source again."""

    kind: str
    "one of PICTURE_KINDS"
    true: int
    answer: int
    "both positions of classes"
    probability: float
    "of the answer, 0 to 1"
    probability_of_true: float
    place: int
    "among the source's validation images of its class, 0-based"
    sha256: str
    "see splits.Split.digest"

    def check(self) -> None:
        """Kind and probabilities are possible. Raises: MalformedField."""
        if self.kind not in PICTURE_KINDS:
            raise MalformedField("kind", self.kind, f"one of {', '.join(PICTURE_KINDS)}")
        for name in ("probability", "probability_of_true"):
            if not 0 <= getattr(self, name) <= 1:
                raise MalformedField(name, getattr(self, name), "a number from 0 to 1")


@dataclass(frozen=True)
class SideResult:
    """What the student, or the teacher, came to."""

    average_accuracy: float
    "% over tasks after the last task"
    forgetting: float
    "points"
    matrix: tuple[Row, ...]
    "row i, column j: accuracy in % on task j after learning task i; None above the diagonal"
    incremental_accuracy: float | None = None
    forgetting_of_joint: float | None = None
    accuracy_after_task: tuple[float, ...] | None = None
    forgetting_after_task: tuple[float, ...] | None = None
    seconds: tuple[float, ...] | None = None
    "of training, for each task"
    loss: tuple[tuple[Any, ...], ...] | None = None
    "of each epoch, for each task"
    images_per_second: Mapping[str, float] = field(default_factory=dict)
    confusion: Confusion | None = None
    pictures: tuple[ExamplePicture, ...] | None = None
    "None in runs of early versions"
    tasks_reused: tuple[int, ...] = ()
    "whose teacher was kept from another run"

    def check(self) -> None:
        """Every row has an accuracy for the tasks learnt so far. Raises: MalformedField."""
        tasks = len(self.matrix)
        for i, row in enumerate(self.matrix):
            learnt = row[: i + 1]
            if len(row) != tasks or None in learnt or any(value is not None for value in row[i + 1 :]):
                expected = f"{i + 1} accuracies, then null up to {tasks} columns"
                raise MalformedField(f"matrix[{i}]", list(row), expected)
            if not all(value is not None and 0 <= value <= 100 for value in learnt):
                raise MalformedField(f"matrix[{i}]", list(row), "accuracies from 0 to 100 %")
        for name in ("accuracy_after_task", "forgetting_after_task", "seconds"):
            values = getattr(self, name)
            if values is not None and len(values) != tasks:
                raise MalformedField(name, f"{len(values)} values", f"{tasks}, one a task")
            if values is not None and name != "seconds" and any(abs(value) > 100 for value in values):
                raise MalformedField(name, list(values), "at most 100")


@dataclass(frozen=True)
class Baseline:
    """The bare student backbone with the best head in closed form."""

    head: str
    average_accuracy: float
    "%"

    def check(self) -> None:
        """Raises: MalformedField."""
        if not 0 <= self.average_accuracy <= 100:
            raise MalformedField("average_accuracy", self.average_accuracy, "an accuracy from 0 to 100 %")


@dataclass(frozen=True)
class ImageCounts:
    """Images that a run read."""

    train: int | None = None
    val: int | None = None


@dataclass(frozen=True)
class BackboneRecord:
    """Which backbone, so that no other takes its place."""

    source: str | None = None
    identity: str | None = None
    width: int = 0
    depth: int = 0
    heads: int | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ParentRun:
    """The run that a run goes on from."""

    run: str
    student_sha256: str
    tasks: int
    classes: int
    pool_tasks: int
    "tasks whose entries the prompt pool had when it was made"

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values, as a run writes it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Metrics:
    """A finished run in numbers."""

    config: Mapping[str, Any]
    "options, as config.json has them"
    classes: tuple[str, ...]
    "names in learned order"
    tasks: tuple[tuple[int, ...], ...]
    "of each task, positions of its classes"
    student: SideResult
    schema: int = RUN_SCHEMA
    teacher: SideResult | None = None
    baseline: Baseline | None = None
    seconds: float | None = None
    images: ImageCounts | int | None = None
    data: Mapping[str, Any] | None = None
    "what was read, and its fingerprint; None in runs of early versions"
    skipped: tuple[str, ...] = ()
    extends: ParentRun | None = None
    backbones: Mapping[str, BackboneRecord] = field(default_factory=dict)
    definitions: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    "all of it, as it was read"

    @classmethod
    def of(cls, document: object, where: str) -> Metrics:
        """Check a document. where: for messages. Raises: InputError that names the field."""
        schema = document.get("schema", RUN_SCHEMA) if isinstance(document, Mapping) else RUN_SCHEMA
        if isinstance(schema, int) and schema > RUN_SCHEMA:
            fix = "upgrade cdl-edge, then repeat"
            raise InputError(f"{where}: written by a newer cdl-edge", got=schema, expected=RUN_SCHEMA, fix=fix)
        return parse(cls, document, where)

    def side(self, name: str) -> SideResult | None:
        """ "student" or "teacher"; None for a teacher that there was not."""
        return self.student if name == "student" else self.teacher

    @property
    def sides(self) -> dict[str, SideResult]:
        """Those that there are, the student first."""
        return {name: side for name in ("student", "teacher") if (side := self.side(name)) is not None}

    @property
    def counts(self) -> ImageCounts:
        """Images by their use; runs of early versions have none."""
        return self.images if isinstance(self.images, ImageCounts) else ImageCounts()

    def check(self) -> None:
        """Classes, tasks and matrices agree. Raises: MalformedField."""
        count = len(self.classes)
        if not count:
            raise MalformedField("classes", [], "names")
        if sorted(c for task in self.tasks for c in task) != list(range(count)):
            raise MalformedField("tasks", [list(t) for t in self.tasks], f"each of 0 to {count - 1} in one task")
        for name, side in self.sides.items():
            if len(side.matrix) != len(self.tasks):
                rows = f"{len(self.tasks)} rows, one a task"
                raise MalformedField(f"{name}.matrix", f"{len(side.matrix)} rows", rows)
        if self.student.confusion is not None:
            self.student.confusion.check_classes(count)
        for i, picture in enumerate(self.student.pictures or ()):
            if not (0 <= picture.true < count and 0 <= picture.answer < count):
                raise MalformedField(f"student.pictures[{i}]", vars(picture), f"classes from 0 to {count - 1}")


def read_metrics(run: Path) -> Metrics:
    """RUN/metrics.json. Raises: InputError where it is missing, damaged, or not what `train` writes."""
    path = Path(run) / METRICS
    if not path.is_file():
        raise InputError(
            f"{path}: missing",
            got="no such folder" if not path.parent.is_dir() else "a folder without it",
            expected="the folder of a finished run",
            fix="check the path; an unfinished run is continued with: cdl-edge train ... --resume",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read", got=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged run", got=str(error), expected="JSON written by train") from error
    return Metrics.of(document, str(path))


def write_metrics(run: Path, document: Mapping[str, Any]) -> None:
    """Write RUN/metrics.json, which says that the run is finished."""
    write_json(Path(run) / METRICS, {"schema": RUN_SCHEMA, **document})
