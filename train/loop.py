"""Continual distillation: for each task the teacher learns and is frozen, the student learns from it, all is measured.

Source: arXiv 2407.13911, section 3. A run that was stopped anywhere continues from its last epoch to the same numbers:
everything random of an epoch is drawn from (seed, task, side, epoch).
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from ..artefacts.layout import CONFIG, METRICS, RANGES, RUN_SCHEMA, weights_of
from ..artefacts.run_record import read_metrics, write_metrics
from ..class_statistics import ClassStatistics
from ..data import absolute, held_out_early, load_dataset
from ..errors import InputError
from ..log import LOG, told
from ..splits import Split, copies, joined
from .backbone import Backbone
from .baseline import FrozenBaseline
from .batches import Pipeline, TaskImages, Validation
from .checkpoint import keep_before, load_state, remove_kept, save_state
from .closed_form import StatisticsKeeper, as_numpy, make
from .config import TrainConfig
from .confusion import Answered
from .devices import Devices
from .distill import DISTILLERS
from .evaluate import accuracy, features_of
from .extend import Parent
from .folder import RunFolder
from .joint import forgetting_of_joint
from .metrics import DEFINITIONS, AccuracyMatrix
from .phase import Phase, TeacherOutputs
from .range_keeper import RangeKeeper
from .run import backbone_of, build_model, check_tail, distill_spec, preprocessing_of, save_learnt
from .scenario import make_scenario
from .sides import SIDES, TrainedSide, restore, state_of
from .teachers import TaughtTask, Teachers, teacher_key


def train(config: TrainConfig, resume: bool = False, quiet: bool = False, keep_threads: bool = False) -> dict[str, Any]:
    """Run all tasks and write the run folder; returns the contents of metrics.json.

    keep_threads: a resumed run too keeps the threads that torch has; False: it gets those that it began with, for sums
    in another order end in other numbers.

    Raises: InputError for anything about the input, before anything is written.
    """
    with told(_nobody if quiet else _terminal):
        training = _Training(config, resume, quiet, keep_threads)
        try:
            return training.run()
        finally:
            training.close()


def _nobody(line: str) -> None:
    """For progress that is not wanted."""


def _terminal(line: str) -> None:
    """Above the progress bar, where there is one."""
    tqdm.write(line, file=sys.stderr)


class _Training:
    """The state of a run between epochs: models, matrices, position."""

    def __init__(self, config: TrainConfig, resume: bool, quiet: bool, keep_threads: bool = False) -> None:
        self.quiet, self.keep_threads = quiet, keep_threads
        self.out = Path(config.out)
        self.folder = RunFolder(self.out)
        if resume and (self.out / CONFIG).is_file():
            config = config.with_rules_of(TrainConfig.read(self.out / CONFIG))
        # The authors train in fp32.
        auto = config.compat and config.precision == "auto"
        self.devices = Devices(config.devices, "fp32" if auto else config.precision)
        self.parent = Parent(config) if config.extend is not None else None
        early = held_out_early(self.parent.metrics.document if self.parent else None)
        dataset = load_dataset(config.data, learning=self.parent is None, early=early)
        if self.parent is not None:
            dataset, tasks = self.parent.new_images(dataset), config.tasks or 1
            self.scenario = self.parent.scenario(dataset, tasks, config.seed, shuffle=not config.compat)
        else:
            tasks = config.tasks or 1
            self.scenario = make_scenario(dataset.classes, tasks, config.seed, shuffle=not config.compat)
        self._say(dataset.line)
        for name, why in config.without_effect.items():
            if self.parent is not None and getattr(config, name) == getattr(self.parent.config, name):
                continue  # nobody gave it: it is the run's
            self._say(f"note: --{name.replace('_', '-')} changes nothing: {why}")
        whole, self.tasks = dataset, len(self.scenario.tasks)
        config.check_tasks(self.tasks)
        kind = DISTILLERS[config.distill]
        self.config = config = replace(
            config, data=absolute(config.data), tasks=tasks, tau=kind.tau if config.tau is None else config.tau
        )
        backbones: dict[str, Backbone] = {"student": backbone_of(config, "student")}
        if kind.needs_teacher:
            backbones["teacher"] = backbone_of(config, "teacher")
            check_tail(config, backbones["teacher"])
        if self.parent is not None:
            self.parent.check(config, {n: b.identity for n, b in backbones.items()})
        for split in (dataset.train, dataset.val):
            split.check_readable(dataset.classes)
        by_default = dataset.source != "digits" and config.head == "learned"
        self.augmented = config.augment == "crop-flip" or (config.augment == "auto" and by_default)
        self.data = dataset.record | (self.parent.images if self.parent else {})
        "what is learnt from, for checkpoints and metrics.json"
        if (warning := copies(dataset.train, dataset.val)) is not None:
            self._say(warning)
        if config.limit_per_class is not None:
            dataset = replace(dataset, train=dataset.train.limited(config.limit_per_class, config.seed))
        self.dataset = dataset
        self.teachers = self._teachers(backbones)
        self.devices.on_main(lambda: self.folder.claim(config, resume, whole))  # nothing is written before this line
        self.sides: dict[str, TrainedSide] = {}
        student, teacher = backbones["student"], backbones.get("teacher")
        for name, backbone in backbones.items():
            backbone.model.to(self.devices.device)
            model = build_model(
                config,
                backbone,
                len(dataset.classes),
                student.width,
                name == "student",
                (teacher.width, teacher.depth) if teacher else None,
                self.parent.record if self.parent else None,
            ).to(self.devices.device)
            pipeline = Pipeline(model, preprocessing_of(backbone, config), self.devices.device)
            self.sides[name] = TrainedSide(name, backbone, pipeline, AccuracyMatrix(self.tasks))
        self.student, self.teacher = self.sides["student"], self.sides.get("teacher")
        self.models = {name: side.model for name, side in self.sides.items()}
        self.pipelines = {name: side.pipeline for name, side in self.sides.items()}
        class_ranges = tuple((t[0], t[-1] + 1) for t in self.scenario.tasks)
        spec = distill_spec(config, student, teacher, len(dataset.classes), class_ranges)
        self.distiller = kind(spec).to(self.devices.device)
        self.reused: list[int] = []
        "tasks whose teacher came from --teachers"
        # Of the one process that writes: every process holds all images and the same student.
        self.ranges: RangeKeeper | None = None
        if config.range_images and self.devices.is_main:
            self.ranges = RangeKeeper(self.out / RANGES, config.range_images)
        self.statistics = StatisticsKeeper(self.out, self.devices.is_main)
        self.baseline: FrozenBaseline | None = FrozenBaseline(student, config.random_features, self.statistics)
        self.skipped: list[str] = []
        self.position: tuple[int, str, int] = (0, "", 0)
        "task, side and epochs done of the phase the last checkpoint stands in"
        self.optimiser_state: dict[str, Any] | None = None
        learnt = (self.parent.metrics.counts.train or 0) if self.parent else 0
        self.image_counts = {"train": learnt + len(self.dataset.train), "val": len(self.dataset.val)}
        self.val = Validation(self._validation)

    def _teachers(self, backbones: dict[str, Backbone]) -> Teachers | None:
        """The kept teachers of this run's kind."""
        config = self.config
        if config.teachers is None or "teacher" not in backbones:
            return None
        key = teacher_key(
            config,
            {name: backbone.identity for name, backbone in backbones.items()},
            self.data["fingerprint"]["sha256"],
            self.scenario.classes_of(self.dataset),
            augmented=self.augmented,
            precision="bf16 autocast" if self.devices.bf16 else "fp32",
            device=self.devices.device.type,
        )
        return Teachers(Path(config.teachers), key)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        begun = len(self.parent.tasks) if self.parent else 0
        ahead = [task for task in range(begun, self.tasks) if self.config.learns_prompts(task)]
        if self.devices.is_main and any(len(self.scenario.tasks[task]) == 1 for task in ahead):
            LOG.warning("a task of one class teaches prompts nothing: the loss compares the classes of one task")
        if self.devices.is_main and len(self.dataset.classes) == 1:
            LOG.warning("there is one class alone: every answer is that class, so 100 % accuracy says nothing")
        if (self.out / METRICS).exists():
            self._say(f"{self.out}: already finished")
            return dict(read_metrics(self.out).document)
        started = time.perf_counter() - self._restore()
        self.devices.wait()  # before the first process writes or removes what the others read
        first_task, side, _ = self.position
        for task in range(first_task, self.tasks):
            images = TaskImages(self._images_of(task), self.pipelines, self.devices.device)
            self._note_skipped(images)
            names = [n for n in SIDES if n in self.sides]
            if task == first_task and side:
                names = names[names.index(side) :] if side in names else []
            learns = self.config.learns_prompts(task)
            if not learns:
                names = self._pass_over(names, images)
            taught = self.teachers.load(task) if self.teachers and learns else None
            outputs = TeacherOutputs(taught.logits) if taught is not None and taught.logits is not None else None
            for turn in (self.sides[name] for name in names):
                if turn is self.teacher and taught is not None:
                    self._reuse(task, turn, taught)
                else:
                    outputs = self._phase(task, turn, images, started, outputs) or outputs
                self.val.models_changed()
            self._collect(task, images)
            self._measure(task, taught, outputs, len(images))
            self.position = (task + 1, "", 0)
            self._checkpoint(started, None)
        return self._finish(time.perf_counter() - started)

    def _images_of(self, task: int) -> Split:
        """The training images of a task, those kept of earlier classes behind them."""
        kept = self.config.exemplars
        own = self.scenario.split(self.dataset.train, task)
        if not kept or task == 0:
            return own
        drawn = self.dataset.train.limited(kept, self.config.seed)
        return joined([own, *(self.scenario.split(drawn, t) for t in range(task))])

    def _pass_over(self, names: list[str], images: TaskImages) -> list[str]:
        """A task in which no prompt learns; nobody is left to train."""
        for name in names:
            self.sides[name].begin_task()
        if self.ranges is not None:
            self.ranges.begin(images)
            self.ranges.end(images)
        return []

    def _collect(self, task: int, images: TaskImages) -> None:
        """The statistics of a task's classes, and every head made new from those of all tasks so far."""
        classes, first = self.scenario.classes_of(self.dataset), self.scenario.tasks[task][0]
        names = classes[first : self.scenario.seen(task)]
        own = images.labels >= first  # M2KD's exemplars of earlier classes are in their statistics already
        if self.devices.bf16:  # the queries that were kept for training; whoever answers later asks in fp32
            images.forget()
        for name, model in self.models.items():
            head = model.statistics_head
            if head is not None:
                x = as_numpy(features_of(images, name))
                self.statistics.add(
                    name, task + 1, ClassStatistics.of(head.map, x[own], images.labels[own] - first, names)
                )
                head.set(make(self.config.head, self.statistics.totals[name], self.config.seed))
        if self.baseline is not None:
            self.baseline.learn(task, images, first, names)

    def _reuse(self, task: int, teacher: TrainedSide, taught: TaughtTask) -> None:
        """The teacher as another run left it after this task."""
        teacher.take_over(task, taught)
        self.reused.append(task)
        self.position = (task, "student", 0)
        self._say(f"task {task + 1}/{self.tasks} teacher: kept, from {self.config.teachers}")

    def _phase(
        self, task: int, side: TrainedSide, images: TaskImages, started: float, outputs: TeacherOutputs | None
    ) -> TeacherOutputs | None:
        """Train one side on one task; returns the teacher's answers to its images where they were all asked for."""
        config, name, model = self.config, side.name, side.model
        is_student = side is self.student
        resumed = self.position[2] if self.position[:2] == (task, name) else 0
        if resumed == 0:
            if is_student and self.ranges is not None:
                self.ranges.begin(images)
            model.learner.begin_task(task)
            if is_student:
                self.distiller.begin_task(task, model, self.teacher.model if self.teacher else None)
            side.begin_task()
        class_range = (self.scenario.tasks[task][0], self.scenario.seen(task))
        title = None if self.quiet or not self.devices.is_main else f"task {task + 1}/{self.tasks} {name}"
        phase = Phase(config, self.devices, self.models, name, task, class_range, self.augmented, self.distiller, title)
        if resumed and self.optimiser_state is not None:
            phase.optimiser.load_state_dict(self.optimiser_state)
        for done in phase.epochs(images, resumed, outputs if is_student else None):
            side.epoch_done(done.loss, done.seconds, len(images))
            self.position = (task, name, done.epoch)
            if done.epoch < phase.length(len(images)):
                self._checkpoint(started, phase.optimiser)
        # The authors' code merges APT's prompt after the student has trained: its teacher answers with the old one.
        if is_student or not config.compat:
            model.learner.end_task(task)
        if is_student:
            self.distiller.end_task(task, model)
            if self.ranges is not None:
                self.ranges.end(images)
            self.position = (task, "measure", 0)
        else:
            self.position = (task, "student", 0)
            self._checkpoint(started, None)
        left = self._left(task, side)
        told = f"loss {side.losses[-1][-1]:.3f}, {side.images_per_second:.0f} images/s"
        if (epochs := config.epochs_of(len(images))) > config.epochs:
            told += f", {epochs} epochs instead of {config.epochs} (--min-steps {config.min_steps})"
        self._say(f"task {task + 1}/{self.tasks} {name}: {told}" + (f", about {left} left" if left else ""))
        return phase.outputs

    def _left(self, task: int, now: TrainedSide) -> str | None:
        """How long the phases that are still to come take, if each is like the mean of its side so far."""
        seconds = 0.0
        for side in self.sides.values():
            behind = task + 1 if side is now or side is self.teacher else task
            if self.tasks - behind > 0 and not side.seconds:
                return None  # nobody knows yet
            seconds += (self.tasks - behind) * sum(side.seconds) / max(1, len(side.seconds))
        if seconds <= 0:
            return None
        return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:,.0f} min"

    def _measure(self, task: int, taught: TaughtTask | None, outputs: TeacherOutputs | None, count: int) -> None:
        """A row of each matrix; keeps a teacher that was trained here. count: training images of the task."""
        teacher = self.teacher
        state = {k: v.clone() for k, v in teacher.model.state_dict().items()} if teacher and self.teachers else {}
        if teacher is not None and self.config.compat:
            teacher.model.learner.end_task(task)
        rows: dict[str, list[float]] = {name: [] for name in self.sides}
        for images in self.val.each(task + 1):
            for name, row in rows.items():
                if name != "teacher" or taught is None:
                    row.append(accuracy(images, name, self.scenario.seen(task), self.devices))
        for name, side in self.sides.items():
            side.matrix.add(taught.row if side is teacher and taught is not None else rows[name])
            self._say(
                f"task {task + 1}/{self.tasks} {name}: average accuracy {side.matrix.accuracy_after(task):.2f} %, "
                f"forgetting {side.matrix.forgetting_after(task):.2f} points over {self.scenario.seen(task)} classes"
            )
        new = taught is None and self.config.learns_prompts(task)
        if self.teachers is not None and teacher is not None and new and self.devices.is_main:
            known = [a for a in teacher.matrix.rows[task] if a is not None]
            logits = outputs.logits if outputs is not None else None
            losses, seconds = teacher.losses[task], teacher.seconds[task]
            self.teachers.store(task, TaughtTask(state, known, losses, seconds, len(losses) * count, logits))

    # -- start, stop, end ---------------------------------------------------------------------------------------------

    def _validation(self, task: int) -> TaskImages:
        images = TaskImages(self.scenario.split(self.dataset.val, task), self.pipelines, self.devices.device)
        self._note_skipped(images)
        return images

    def close(self) -> None:
        """Let another training into the folder, leave the group of processes."""
        self.folder.release()
        self.devices.close()

    def _checkpoint(self, started: float, optimiser: torch.optim.Optimizer | None) -> None:
        if not self.devices.is_main:
            return
        keep_before(self.folder.checkpoint)
        save_state(
            self.folder.checkpoint,
            {
                "data": self.data,
                **state_of(self.sides),
                "distiller": self.distiller.state_dict(),
                "optimiser": optimiser.state_dict() if optimiser is not None else None,
                "skipped": self.skipped,
                "reused": self.reused,
                "threads": torch.get_num_threads(),
                "tails_before": self.ranges.before if self.ranges is not None else {},
                "position": list(self.position),
                "extends": self.parent.record.to_json() if self.parent else None,
                "elapsed": time.perf_counter() - started,
            },
        )

    def _restore(self) -> float:
        """Continue from the checkpoint, if there is one; returns the seconds spent before."""
        path = self.folder.checkpoint
        resumed = path.exists()
        if resumed:
            state = load_state(path)
            self._check_checkpoint(path, state)
            if not self.keep_threads and "threads" in state:
                torch.set_num_threads(state["threads"])
            self.distiller.load_state_dict(state["distiller"])
        elif self.parent is not None:
            state = self.parent.state(self.models, self.tasks)
            if self.ranges is not None:
                self.parent.copy_ranges(self.ranges.path)
        else:
            return 0.0
        restore(self.sides, state, self.tasks)
        self.skipped, self.reused = state["skipped"], state["reused"]
        task, side, epochs = state["position"]
        self.position, self.optimiser_state = (task, side, epochs), state["optimiser"]
        self._restore_statistics(task)
        if self.ranges is not None:
            self.ranges.restore(task, state["tails_before"])
        if resumed:
            self._say(f"resumed in task {task + 1}" + (f", {side}, after epoch {epochs}" if side else ""))
        else:
            self._say(f"{task} tasks learnt already, in {self.config.extend}")
        return float(state["elapsed"])

    def _restore_statistics(self, task: int) -> None:
        """Those of the tasks in front of `task`; those of the run that is extended stay in its own folder."""
        run = self.parent.path if self.parent and task == len(self.parent.tasks) else None
        self.statistics.restore([n for n, m in self.models.items() if m.statistics_head is not None], task, run)
        if self.baseline is not None and self.statistics.has(self.baseline.sides, task, run):
            self.statistics.restore(self.baseline.sides, task, run)
        elif self.baseline is not None:
            self.baseline = None
            self._say("no frozen baseline: the run began before there were class statistics")

    def _check_checkpoint(self, path: Path, state: dict[str, Any]) -> None:
        for name, side in self.sides.items():
            if state["backbones"][name] != side.backbone.identity:
                got = side.backbone.identity
                raise InputError(f"{path}: started on other {name} weights", got=got, fix="choose another --out")
        if self.parent is not None and state["extends"]["student_sha256"] != self.parent.student_sha256:
            raise InputError(
                f"{path}: {self.parent.path} is another run than the one that it started from",
                got=self.parent.student_sha256,
                expected=state["extends"]["student_sha256"],
                fix="bring that run back, or choose another --out",
            )

    def _finish(self, seconds: float) -> dict[str, Any]:
        classes = self.scenario.classes_of(self.dataset)
        answered = Answered(self.val.each(self.tasks), "student", len(classes), self.devices)
        baseline = self.baseline.measure(answered) if self.baseline is not None else None
        metrics: dict[str, Any] = {
            "config": self.config.to_json(),
            "classes": classes,
            "tasks": [list(t) for t in self.scenario.tasks],
            "teacher": None,
        }
        metrics |= {name: side.summary() for name, side in self.sides.items()}
        metrics["student"]["confusion"] = answered.confusion()
        metrics["student"]["pictures"] = answered.pictures(self.config.seed)
        head, own = self.student.model.statistics_head, metrics["student"]["forgetting"]
        if head is not None:
            train = (TaskImages(self._images_of(t), self.pipelines, self.devices.device) for t in range(self.tasks))
            images = (train, self.val.each(self.tasks)) if self.parent is None else None
            metrics["student"] |= forgetting_of_joint(self.config, own, head, self.scenario, classes, images)
        if metrics["teacher"]:
            metrics["teacher"]["tasks_reused"] = self.reused
        if self.parent is not None:
            metrics["extends"] = self.parent.record.to_json()
        metrics |= {
            "seconds": seconds,
            "images": self.image_counts,
            "data": self._data_read(),
            "skipped": self.skipped,
            "baseline": baseline,
            "definitions": DEFINITIONS,
            "backbones": {
                n: {"source": b.source, "identity": b.identity, "width": b.width, "depth": b.depth}
                for n, b in ((name, side.backbone) for name, side in self.sides.items())
            },
            "distiller": self.distiller.report(),
            "device": str(self.devices.device),
            "processes": self.devices.share.processes,
            "precision": "bf16 autocast" if self.devices.bf16 else "fp32",
            "threads": torch.get_num_threads(),
            "versions": {
                "cdl-edge": __version__,
                **{p: version(p) for p in ("torch", "timm", "numpy")},
                "python": platform.python_version(),
            },
        }
        self.devices.on_main(lambda: self._write(metrics))
        return {"schema": RUN_SCHEMA, **metrics}  # as it is written

    def _write(self, metrics: dict[str, Any]) -> None:
        for name, side in self.sides.items():
            side.matrix.write_csv(self.out / f"{name}_matrix.csv")
            save_learnt(self.out / weights_of(name), side.model, side.backbone)
        self.statistics.finish(self.tasks)
        write_metrics(self.out, metrics)  # last: its presence says that the run is finished
        remove_kept(self.folder.checkpoint)

    def _data_read(self) -> dict[str, Any]:
        """`data`, with the files that turned out to be unreadable."""
        unreadable = {"unreadable": len(self.skipped)} if self.skipped else {}
        return {**self.data, "left_out": {**self.data["left_out"], **unreadable}}

    # -- small things -------------------------------------------------------------------------------------------------

    def _note_skipped(self, images: TaskImages) -> None:
        new = [s for s in images.skipped if s not in self.skipped]
        for line in new:
            self._say(f"skipped: {line}")
        if new:
            self._say(f"{len(new)} unreadable image(s) skipped")
        self.skipped += new

    def _say(self, line: str) -> None:
        if self.devices.is_main:
            LOG.info(line)
