"""Continual distillation: for each task the teacher learns and is frozen, the student learns from it, all is measured.

Source: arXiv 2407.13911, section 3. A run that was stopped anywhere continues from its last epoch to the same numbers:
everything random of an epoch is drawn from (seed, task, side, epoch).
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Dataset, load_dataset
from ..errors import InputError
from ..files import write_json
from .backbone import Backbone, load_backbone
from .batches import Images, Side
from .checkpoint import load_state, save_state
from .config import TrainConfig
from .distill import DISTILLERS
from .evaluate import accuracy
from .metrics import DEFINITIONS, AccuracyMatrix
from .run import SCHEMA, build_model, preprocessing_of, save_learnt
from .scenario import default_tasks, make_scenario
from .student import PromptedViT


def train(config: TrainConfig, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run all tasks and write the run folder; returns the contents of metrics.json.

    Raises: InputError for anything about the input, before anything is written.
    """
    return _Training(config, resume, quiet).run()


class _Training:
    """The state of a run between epochs: models, matrices, position."""

    def __init__(self, config: TrainConfig, resume: bool, quiet: bool) -> None:
        self.config, self.quiet = config, quiet
        self.out = Path(config.out)
        self.device = _device(config.devices)
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and _native_bf16(self.device))
        dataset = _limited(load_dataset(config.data), config)
        self.tasks = config.tasks or default_tasks(len(dataset.classes))
        self.scenario = make_scenario(dataset.classes, self.tasks, config.seed, shuffle=not config.compat)
        self.config = config = replace(config, tasks=self.tasks)
        self.distiller = DISTILLERS[config.distill](config.alpha, config.tau)
        self.backbones: dict[str, Backbone] = {"student": load_backbone(config.student)}
        if self.distiller.needs_teacher:
            self.backbones["teacher"] = load_backbone(config.teacher)
        for split in (dataset.train, dataset.val):
            split.check_readable(dataset.classes)
        self._claim(resume)  # nothing is written before this line
        self.dataset = dataset
        augment = config.augment
        self.augmented = augment == "crop-flip" or (augment == "auto" and dataset.source != "digits")
        self.models: dict[str, PromptedViT] = {}
        self.sides: dict[str, Side] = {}
        for name, backbone in self.backbones.items():
            backbone.model.to(self.device)
            key_width = self.backbones["student"].width
            model = build_model(config, backbone, len(dataset.classes), key_width, name == "student").to(self.device)
            self.models[name] = model
            self.sides[name] = Side(model, preprocessing_of(backbone, config.compat), self.device)
        self.matrices = {name: AccuracyMatrix(self.tasks) for name in self.models}
        self.losses: dict[str, list[list[float]]] = {name: [] for name in self.models}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.models}
        self.trained_images: dict[str, int] = dict.fromkeys(self.models, 0)
        self.skipped: list[str] = []
        self.elapsed = 0.0
        self.position: tuple[int, str, int] = (0, "", 0)
        "task, side and epochs done of the phase the last checkpoint stands in"
        self.optimiser_state: dict[str, Any] | None = None
        self.image_counts = {"train": len(self.dataset.train), "val": len(self.dataset.val)}
        self.val: list[Images] = []

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        if any(len(task) == 1 for task in self.scenario.tasks):
            self._say("warning: a task of one class teaches nothing: the loss compares the classes of one task")
        if (self.out / "metrics.json").exists():
            self._say(f"{self.out}: already finished")
            finished: dict[str, Any] = json.loads((self.out / "metrics.json").read_text())
            return finished
        started = time.perf_counter() - self._restore()
        first_task, side, _ = self.position
        for task in range(first_task, self.tasks):
            train_images = Images(self.scenario.split(self.dataset.train, task), self.sides, self.device)
            self._note_skipped(train_images)
            names: list[str] = [n for n in ("teacher", "student") if n in self.models]
            if task == first_task and side:
                names = names[names.index(side) :]
            for name in names:
                self._phase(task, name, train_images, started)
            self._measure(task)
            self.position = (task + 1, "", 0)
            self._checkpoint(started, None)
        return self._finish(time.perf_counter() - started)

    def _phase(self, task: int, name: str, images: Images, started: float) -> None:
        """Train one side on one task."""
        config, model = self.config, self.models[name]
        resumed = self.position[2] if self.position[:2] == (task, name) else 0
        if resumed == 0:
            model.learner.begin_task(task)
            self.losses[name].append([])
            self.seconds[name].append(0.0)
        optimiser = torch.optim.Adam(model.trainable(), lr=config.learning_rate, betas=(0.9, 0.999))
        if resumed and self.optimiser_state is not None:
            optimiser.load_state_dict(self.optimiser_state)
        low, high = self.scenario.tasks[task][0], self.scenario.seen(task)
        teacher_logits = None
        if not self.augmented:
            images.keep(list(self.models) if name == "student" else ["student", name], self._precision, 256)
            if name == "student" and "teacher" in self.models:
                teacher_logits = self._teacher_logits(images, low, high)
        with_teacher = name == "student" and "teacher" in self.models and teacher_logits is None
        names = ["student", "teacher"] if with_teacher else [name]
        steps = math.ceil(len(images) / config.batch_size)
        for epoch in range(resumed, config.epochs):
            begun = time.perf_counter()
            key = ((config.seed * 1009 + task) * 2 + (name == "student")) * 100_003 + epoch
            generator = torch.Generator().manual_seed(key)
            total = 0.0
            bar = tqdm(
                images.epoch(names, config.batch_size, self._precision, generator, self.augmented),
                total=steps,
                desc=f"task {task + 1}/{self.tasks} {name} epoch {epoch + 1}/{config.epochs}",
                unit="batch",
                leave=False,
                disable=self.quiet or not sys.stderr.isatty(),
            )
            for step, batch in enumerate(bar):
                _set_rate(optimiser, _rate(config, epoch, step, steps))
                target = None
                if teacher_logits is not None:
                    target = teacher_logits[torch.from_numpy(batch.index)]
                elif with_teacher:
                    target = self._answer("teacher", batch.tokens["teacher"], batch.query)[:, low:high]
                loss = self._loss(name, batch.tokens[name], batch.query, batch.labels - low, target, (low, high))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                total += loss.item() * len(batch.index)
            if not math.isfinite(total):  # now, not after hours when the metrics cannot be written
                raise FloatingPointError(
                    f"{name}, task {task + 1}, epoch {epoch + 1}: the loss is not finite; "
                    "try --precision fp32 or a smaller --learning-rate, then --resume from the epoch before"
                )
            spent = time.perf_counter() - begun
            self.losses[name][-1].append(total / len(images))
            self.seconds[name][-1] += spent
            self.trained_images[name] += len(images)
            self.position = (task, name, epoch + 1)
            if epoch + 1 < config.epochs:
                self._checkpoint(started, optimiser)
        # The authors' code merges APT's prompt after the student has trained: its teacher answers with the old one.
        if name == "student":
            model.learner.end_task(task)
            if config.compat and "teacher" in self.models:
                self.models["teacher"].learner.end_task(task)
        elif not config.compat:
            model.learner.end_task(task)
        self.position = (task, "student", 0) if name == "teacher" else (task, "measure", 0)
        if name == "teacher":
            self._checkpoint(started, None)
        rate = self.trained_images[name] / max(1e-9, sum(self.seconds[name]))
        self._say(f"task {task + 1}/{self.tasks} {name}: loss {self.losses[name][-1][-1]:.3f}, {rate:.0f} images/s")

    def _loss(
        self,
        name: str,
        tokens: Tensor,
        query: Tensor | None,
        labels: Tensor,
        target: Tensor | None,
        span: tuple[int, int],
    ) -> Tensor:
        with self._precision():
            output = self.models[name](tokens, query, training=True)
        # Only the current classes' columns: the same as setting the logits of all others to -inf.
        cls = output.cls_logits[:, span[0] : span[1]].float()
        if name == "teacher":
            loss = nn.functional.cross_entropy(cls, labels)
        else:
            kd = output.kd_logits[:, span[0] : span[1]].float() if output.kd_logits is not None else None
            loss = self.distiller.loss(cls, kd, target, labels)
        if output.key_loss is not None:
            # The authors train on two GPUs and sum the replicas' means: their key loss weighs twice.
            loss = loss + (2.0 if self.config.compat else 1.0) * output.key_loss
        return loss

    @torch.no_grad()
    def _answer(self, name: str, tokens: Tensor, query: Tensor | None) -> Tensor:
        model = self.models[name]
        with self._precision():
            return model.combine(model(tokens, query)).float()

    def _teacher_logits(self, images: Images, low: int, high: int) -> Tensor | None:
        """Of every image of the task, once: nothing is augmented and the teacher is frozen."""
        parts = []
        for start in range(0, len(images), 256):
            index = torch.arange(start, min(start + 256, len(images))).numpy()
            batch = images.batch(index, ["teacher"], self._precision)
            parts.append(self._answer("teacher", batch.tokens["teacher"], batch.query)[:, low:high])
        return torch.cat(parts)

    def _measure(self, task: int) -> None:
        for t in range(len(self.val), task + 1):
            images = Images(self.scenario.split(self.dataset.val, t), self.sides, self.device)
            self._note_skipped(images)
            self.val.append(images)
        for name, matrix in self.matrices.items():
            matrix.add([accuracy(images, name, self.scenario.seen(task)) for images in self.val])
            self._say(
                f"task {task + 1}/{self.tasks} {name}: average accuracy {matrix.accuracy_after(task):.2f} %, "
                f"forgetting {matrix.forgetting_after(task):.2f} points over {self.scenario.seen(task)} classes"
            )

    # -- start, stop, end ---------------------------------------------------------------------------------------------

    def _claim(self, resume: bool) -> None:
        """Make the folder ours, or refuse."""
        stored = self.out / "config.json"
        if not stored.exists():
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise InputError(f"{self.out}: exists and is not a run", expected="a new or empty folder for --out")
        elif not resume:
            raise InputError(f"{self.out}: a run is there already", fix="add --resume, or choose another --out")
        else:
            old = TrainConfig.from_json(json.loads(stored.read_text()))
            mine, theirs = self.config.to_json(), old.to_json()
            differing = [k for k in mine if mine[k] != theirs[k] and k not in ("out", "devices")]
            if differing:
                raise InputError(
                    f"{self.out}: was started with other options",
                    got=", ".join(f"{k}={mine[k]!r}" for k in differing),
                    expected=", ".join(f"{k}={theirs[k]!r}" for k in differing),
                    fix="give the same options, or choose another --out",
                )
        for leftover in self.out.glob(".*.part"):  # of a write that was killed
            leftover.unlink()
        write_json(stored, self.config.to_json())

    def _checkpoint(self, started: float, optimiser: torch.optim.Optimizer | None) -> None:
        save_state(
            self.out / "checkpoint.safetensors",
            {
                "models": {n: m.state_dict() for n, m in self.models.items()},
                "backbones": {n: b.identity for n, b in self.backbones.items()},
                "optimiser": optimiser.state_dict() if optimiser is not None else None,
                "matrices": {n: m.rows for n, m in self.matrices.items()},
                "losses": self.losses,
                "seconds": self.seconds,
                "trained_images": self.trained_images,
                "skipped": self.skipped,
                "position": list(self.position),
                "elapsed": time.perf_counter() - started,
            },
        )

    def _restore(self) -> float:
        """Continue from the checkpoint, if there is one; returns the seconds spent before."""
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return 0.0
        state = load_state(path)
        for name, backbone in self.backbones.items():
            if state["backbones"][name] != backbone.identity:
                raise InputError(
                    f"{path}: started on other {name} weights", got=backbone.identity, fix="choose another --out"
                )
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
        self.matrices = {n: AccuracyMatrix(self.tasks, rows) for n, rows in state["matrices"].items()}
        self.losses, self.seconds, self.skipped = state["losses"], state["seconds"], state["skipped"]
        self.trained_images = state["trained_images"]
        task, side, epochs = state["position"]
        self.position, self.optimiser_state = (task, side, epochs), state["optimiser"]
        self._say(f"resumed in task {task + 1}" + (f", {side}, after epoch {epochs}" if side else ""))
        return float(state["elapsed"])

    def _finish(self, seconds: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {
            "schema": SCHEMA,
            "config": self.config.to_json(),
            "classes": self.scenario.classes_of(self.dataset),
            "tasks": [list(t) for t in self.scenario.tasks],
            "teacher": None,
        }
        for name, matrix in self.matrices.items():
            matrix.write_csv(self.out / f"{name}_matrix.csv")
            save_learnt(self.out / f"{name}.safetensors", self.models[name], self.backbones[name])
            metrics[name] = {
                **matrix.summary(),
                "seconds": self.seconds[name],
                "loss": self.losses[name],
                "images_per_second": {"train": self.trained_images[name] / max(1e-9, sum(self.seconds[name]))},
            }
        metrics |= {
            "seconds": seconds,
            "images": self.image_counts,
            "skipped": self.skipped,
            "definitions": DEFINITIONS,
            "backbones": {
                n: {"source": b.source, "identity": b.identity, "width": b.width, "depth": b.depth}
                for n, b in self.backbones.items()
            },
            "device": str(self.device),
            "precision": "bf16 autocast" if self.bf16 else "fp32",
            "threads": torch.get_num_threads(),
            "versions": {
                **{p: version(p) for p in ("cdl-edge", "torch", "timm", "numpy")},
                "python": platform.python_version(),
            },
        }
        write_json(self.out / "metrics.json", metrics)  # last: its presence says that the run is finished
        (self.out / "checkpoint.safetensors").unlink(missing_ok=True)
        return metrics

    # -- small things -------------------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _note_skipped(self, images: Images) -> None:
        new = [s for s in images.skipped if s not in self.skipped]
        for line in new:
            self._say(f"skipped: {line}")
        if new:
            self._say(f"{len(new)} unreadable image(s) skipped")
        self.skipped += new

    def _say(self, line: str) -> None:
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)


def _limited(dataset: Dataset, config: TrainConfig) -> Dataset:
    if config.limit_per_class is None:
        return dataset
    limited = dataset.train.limited(config.limit_per_class, config.seed)
    return Dataset(dataset.source, dataset.classes, limited, dataset.val)


def _rate(config: TrainConfig, epoch: int, step: int, steps: int) -> float:
    """Half a cosine over the task; compat: one value an epoch, epoch 1 repeats epoch 0's as the authors' code."""
    if config.compat:
        share = max(0, epoch - 1) / config.epochs
    else:
        share = (epoch * steps + step) / (config.epochs * steps)
    return 0.5 * config.learning_rate * (1 + math.cos(math.pi * share))


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is usable", got=f"torch {torch.__version__}", fix="use --devices cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else ""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "AVX512" in capabilities and bool(probe and probe())
