"""A finished run that learns more: its classes and weights, in a run that has new tasks behind them.

The new run starts as if it had been restored from a checkpoint behind the last task of the old one. What a class or a
task has of its own (rows of the heads, entries of the pools) comes behind what is there, with fresh initial values.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artefacts.layout import RANGES, STUDENT_WEIGHTS, weights_of
from ..artefacts.run_record import ParentRun, Row
from ..data import Dataset, Fingerprint, check_spelling
from ..errors import InputError
from ..files import sha256
from ..log import LOG
from ..ranges import Ranges
from .checkpoint import load_state
from .closed_form import load_statistics
from .config import TrainConfig
from .distill import DISTILLERS
from .run import read_run
from .scenario import Scenario, make_scenario
from .student import PromptedViT

OWN = ("data", "out", "tasks", "teachers", "devices", "extend")
"options that are never the old run's"
FREE = ("epochs", "batch_size", "learning_rate", "seed", "limit_per_class", "augment", "precision", "range_images")
"options that are the old run's unless they are given; all others must be its"
BY_IDENTITY = ("teacher", "student", "teacher_arch", "student_arch")
"options that may name the same weights in another place"


def inherit(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training that extends a run: those given in front of the run's. Raises: InputError."""
    config, _ = read_run(Path(str(options["extend"])))
    return {**{k: v for k, v in config.to_json().items() if k not in OWN}, **options}


class Parent:
    """The finished run that a new one extends with more tasks."""

    def __init__(self, config: TrainConfig) -> None:
        """config: of the new run. Raises: InputError where there is no such run, or it cannot be extended."""
        self.path = Path(str(config.extend))
        self.config, self.metrics = read_run(self.path)
        kind = DISTILLERS[self.config.distill]
        if kind.remembers:
            raise InputError(
                f"{self.path}: a run with --distill {self.config.distill} cannot be extended: its distiller needs what "
                "a finished run does not keep",
                fix="train again with all classes",
            )
        if config.teachers is not None:
            raise InputError(
                "--extend does not work with --teachers: a kept teacher has learnt all tasks in one run",
                got=config.teachers,
                expected="no --teachers",
            )
        self.student_sha256 = sha256(self.path / STUDENT_WEIGHTS)
        "what of it the new run stands on"
        self.classes, self.tasks = self.metrics.classes, self.metrics.tasks

    @property
    def record(self) -> ParentRun:
        """What metrics.json and checkpoints say of the run that is extended."""
        before = self.metrics.extends
        tasks = len(self.tasks)
        pool_tasks = before.pool_tasks if before else tasks
        return ParentRun(str(self.path), self.student_sha256, tasks, len(self.classes), pool_tasks)

    @property
    def images(self) -> dict[str, Any]:
        """{"before": for this run and those that it extends, newest first, what "data" says of their images}.

        The new run's own record has the learnt classes as they are measured now, not what was learnt from.
        """
        if not (record := self.metrics.data):  # a run of an early version
            return {}
        own = {k: record[k] for k in ("given", "source", "fingerprint")}
        return {"before": [own, *(record.get("before") or ())]}

    def new_images(self, dataset: Dataset) -> Dataset:
        """The source without the training images of the classes that are learnt: they are never read.

        Raises: InputError where a class of the run is missing, nothing is new, or a new class has nothing to learn.
        """
        check_spelling(dataset.source, dataset.classes, self.classes)
        measured = {dataset.classes[c] for c in set(dataset.val.labels.tolist())}
        missing = [c for c in self.classes if c not in measured]
        if missing:
            raise InputError(
                f"{dataset.source}: {len(missing)} of the {len(self.classes)} classes that {self.path} has learnt are "
                "missing",
                got="without " + ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else ""),
                expected="validation images of every class learnt, by name: accuracy and forgetting are measured on "
                "them (their training images are not read)",
                fix="bring back at least PATH/val/<class> of each",
            )
        self._warn_changed(dataset)
        new = self._new(dataset)
        if not new:
            raise InputError(
                f"{dataset.source}: no new class",
                got=f"the {len(self.classes)} classes that {self.path} has learnt",
                expected="these and at least one more",
            )
        train = dataset.train.of_classes([dataset.classes.index(c) for c in new])
        learnt = {dataset.classes[c] for c in set(train.labels.tolist())}
        absent = [c for c in new if c not in learnt or c not in measured]
        if absent:
            part, kind = ("val", "validation") if absent[0] in learnt else ("train", "training")
            raise InputError(
                f"{dataset.source}: {len(absent)} new class(es) without a {kind} image",
                got=", ".join(absent[:8]),
                expected="training and validation images of every new class",
                fix=f"add {part}/{absent[0]} with at least one image, or remove the class",
            )
        return replace(dataset, train=train)

    def _warn_changed(self, dataset: Dataset) -> None:
        """Say which learnt classes are measured on other images than in the run: that difference is no forgetting."""
        record = self.metrics.data
        if not record or "fingerprint" not in record:  # a run of an early version
            return
        learnt, now = Fingerprint.from_json(record["fingerprint"]).val, dataset.val.hashes(dataset.classes)
        changed = [c for c in self.classes if learnt.get(c, now[c]) != now[c]]
        if changed:
            names = ", ".join(changed[:5]) + (" ..." if len(changed) > 5 else "")
            seen = "; some of them may have been learnt from" if dataset.held_out else ""
            LOG.warning(
                f"{len(changed)} learnt class(es) have other validation images than {self.path} was measured on "
                f"({names}): forgetting compares different images{seen}"
            )

    def _new(self, dataset: Dataset) -> list[str]:
        return [c for c in dataset.classes if c not in set(self.classes)]

    def scenario(self, dataset: Dataset, tasks: int, seed: int, shuffle: bool) -> Scenario:
        """The run's classes and tasks as they were learnt, then the new classes in `tasks` parts."""
        new, offset = self._new(dataset), len(self.classes)
        drawn = make_scenario(new, tasks, seed, shuffle)
        names = [*self.classes, *(new[i] for i in drawn.order)]
        more = tuple(tuple(offset + p for p in task) for task in drawn.tasks)
        return Scenario(tuple(dataset.classes.index(n) for n in names), (*self.tasks, *more))

    def check(self, config: TrainConfig, identities: Mapping[str, str]) -> None:
        """config: of the new run, as it will be stored; identities: of its backbones. Raises: InputError."""
        mine, theirs = config.to_json(), self.config.to_json()
        fixed = [f.name for f in fields(TrainConfig) if f.name not in (*OWN, *FREE, *BY_IDENTITY)]
        differing = [k for k in fixed if mine[k] != theirs[k]]
        if differing:
            raise InputError(
                f"{self.path}: was trained with other options, which its weights depend on",
                got=", ".join(f"{k}={mine[k]!r}" for k in differing),
                expected=", ".join(f"{k}={theirs[k]!r}" for k in differing),
                fix="leave them out: they are the run's",
            )
        for name, identity in identities.items():
            expected = self.metrics.backbones[name].identity
            if identity != expected:
                raise InputError(
                    f"{self.path}: the {name} was trained on another backbone",
                    got=f"{getattr(config, name)} = {identity}",
                    expected=expected,
                    fix=f"leave --{name} out, or name these weights",
                )
            if not (self.path / weights_of(name)).is_file():
                raise InputError(f"{self.path}: no {weights_of(name)}", fix="bring it back, or train again")
        if config.range_images:
            self._check_ranges()
        if config.head != "learned":
            for name in identities:
                load_statistics(self.path, name, len(self.tasks))  # refused now, before anything is written

    def _check_ranges(self) -> None:
        path = self.path / RANGES
        kept = len(Ranges.load(path).tasks) if path.is_file() else 0
        if kept != len(self.tasks):
            raise InputError(
                f"{path}: no ranges of the tasks that are learnt",
                got=f"{kept} tasks",
                expected=f"{len(self.tasks)} tasks",
                fix="give --range-images 0",
            )

    def copy_ranges(self, path: Path) -> None:
        """Put the run's ranges where the new run's will be."""
        shutil.copyfile(self.path / RANGES, path)

    def state(self, models: Mapping[str, PromptedViT], tasks: int) -> dict[str, Any]:
        """What a checkpoint behind the run's last task would hold. models: the new run's; tasks: all of its tasks.

        Raises: InputError where the weights do not fit.
        """
        sides = {name: self.metrics.sides[name] for name in models}
        seconds = {name: list(side.seconds or ()) for name, side in sides.items()}
        return {
            "models": {name: self._grown(name, model.state_dict()) for name, model in models.items()},
            "matrices": {name: [_widened(row, tasks) for row in side.matrix] for name, side in sides.items()},
            "losses": {name: [list(task) for task in side.loss or ()] for name, side in sides.items()},
            "seconds": seconds,
            "trained_images": {
                name: round(side.images_per_second["train"] * sum(seconds[name])) for name, side in sides.items()
            },
            "skipped": list(self.metrics.skipped),
            "reused": list(sides["teacher"].tasks_reused) if "teacher" in sides else [],
            "tails_before": {},
            "position": [len(self.tasks), "", 0],
            "optimiser": None,
            "elapsed": self.metrics.seconds,
        }

    def _grown(self, name: str, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        path = self.path / weights_of(name)
        learnt: dict[str, Tensor] = load_state(path)["state"]
        try:
            return grown(learnt, fresh)
        except ValueError as error:
            raise InputError(f"{path}: does not fit its own options", got=str(error), fix="train again") from error


def grown(learnt: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a larger model: (R, ...) of the smaller one's in front of the rest of its own (R + N, ...).

    Raises: ValueError where the two differ in anything but the number of rows.
    """
    if odd := sorted(set(learnt) ^ set(fresh)):
        raise ValueError(f"tensor {odd[0]}")
    found = {}
    for key, value in fresh.items():
        old, found[key] = learnt[key], value.clone()
        if old.shape == value.shape:
            found[key].copy_(old)
        elif old.shape[1:] == value.shape[1:] and len(old) < len(value):
            found[key][: len(old)] = old
        else:
            raise ValueError(f"tensor {key} of {tuple(old.shape)} in {tuple(value.shape)}")
    return found


def _widened(row: Row, tasks: int) -> list[float | None]:
    return [*row, *[None] * (tasks - len(row))]
