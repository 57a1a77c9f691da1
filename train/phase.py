"""One side of a run on one task: epochs of steps, and what the teacher answers to the student's images."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..heartbeat import at
from .batches import KEPT_BYTES, Batch, TaskImages, images_seen
from .config import TrainConfig
from .devices import Devices
from .distill import DistillationBatch, Distiller
from .student import PromptedViT

CHUNK = 256
"images a pass without gradient"
RETRAINING = 0.1
"share of the learning rate behind pruning (PackNet's)"


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says to a step, or to all images of a task."""

    logits: Tensor
    "float32 (N, c), the current classes"
    hidden: tuple[Tensor, ...] = ()
    "(N, 1 + P, D) behind each block"

    def at(self, index: Tensor) -> TeacherOutputs:
        """The outputs for the images at `index`."""
        return TeacherOutputs(self.logits[index], tuple(h[index] for h in self.hidden))


@dataclass(frozen=True)
class EpochDone:
    """Where a phase stands after an epoch."""

    epoch: int
    "epochs done"
    loss: float
    "mean over the epoch's images"
    seconds: float
    "of the epoch"


class Phase:
    """Train one model on the images of one task; iterate `epochs` and save between them."""

    def __init__(
        self,
        config: TrainConfig,
        devices: Devices,
        models: dict[str, PromptedViT],
        name: str,
        task: int,
        class_range: tuple[int, int],
        augmented: bool,
        distiller: Distiller,
        bar: str | None = None,
    ) -> None:
        """models: the student, and the teacher where there is one; name: whose turn it is; bar: progress title."""
        self.config, self.devices, self.models, self.name = config, devices, models, name
        self.task, self.class_range, self.augmented, self.bar = task, class_range, augmented, bar
        self.distiller = distiller
        self.model = models[name]
        self.is_student = name == "student"
        "epochs of the phase"
        if "teacher" in models:  # blockwise goes back through the teacher's blocks, not to what it has learnt
            models["teacher"].requires_grad_(not self.is_student)
        self.parameters = [*self.model.trainable(), *(distiller.parameters() if self.is_student else ())]
        # A distiller's snapshots and copies do not learn.
        self.parameters = [p for p in self.parameters if p.requires_grad]
        learning: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in self.parameters:
            learning.setdefault(self._share(parameter), []).append(parameter)
        groups = [{"params": parameters, "share": share} for share, parameters in learning.items()]
        self.optimiser = torch.optim.Adam(groups, lr=float(config.learning_rate or 0), betas=(0.9, 0.999))

    def _share(self, parameter: torch.nn.Parameter) -> float:
        """Of the learning rate that a parameter learns at."""
        network, mapped = self.model.backbone, self.model.mapped
        if any(parameter is p for p in network.parameters()):
            return self.model.learner.network_rate
        if mapped is not None and any(parameter is p for p in mapped.parameters()):
            return mapped.rate
        return 1.0

    def length(self, images: int) -> int:
        """Number of epochs that the phase has on so many images, retraining included."""
        return self.config.epochs_of(images) + (self.config.retrain_epochs if self.is_student else 0)

    def epochs(self, images: TaskImages, done: int, outputs: TeacherOutputs | None) -> Iterator[EpochDone]:
        """Train from epoch `done` on. outputs: the teacher's, of every image, where they are known already."""
        config = self.config
        taught = self.is_student and self.distiller.needs_teacher
        names = [self.name]
        if not self.augmented:
            images.keep(names, self.devices.autocast, CHUNK)
            if taught and (outputs is None or (self.distiller.needs_hidden and not outputs.hidden)):
                outputs = self._all_outputs(images)
        if taught and outputs is None:
            names = ["student", "teacher"]
        count = images_seen(len(images), config.batch_size, config.compat)
        steps = math.ceil(count / config.batch_size)
        length = self.length(len(images))
        shown = self.bar is not None and sys.stderr.isatty()
        # One bar for all epochs: its end is the end of the phase.
        bar = tqdm(
            total=steps * length,
            initial=steps * done,
            desc=self.bar,
            unit="batch",
            leave=False,
            disable=not shown,
        )
        with bar:
            yield from self._epochs(images, done, outputs, names, count, bar)
        self.optimiser.zero_grad(set_to_none=True)  # of a whole network they are as large as the network
        self.outputs = outputs

    def _epochs(
        self,
        images: TaskImages,
        done: int,
        outputs: TeacherOutputs | None,
        names: list[str],
        count: int,
        bar: tqdm,
    ) -> Iterator[EpochDone]:
        config, taught = self.config, self.is_student and self.distiller.needs_teacher
        steps = math.ceil(count / config.batch_size)
        trained, length = config.epochs_of(len(images)), self.length(len(images))
        for epoch in range(done, length):
            begun = time.perf_counter()
            if self.is_student and epoch == trained and self.distiller.begin_retraining(self.task, self.model):
                self.optimiser.state.clear()
            key = ((config.seed * 1009 + self.task) * 2 + self.is_student) * 100_003 + epoch
            generator = torch.Generator().manual_seed(key)
            total = 0.0
            batches = images.epoch(
                names,
                config.batch_size,
                self.devices.autocast,
                generator,
                self.augmented,
                self.devices.share,
                config.compat,
            )
            for step, batch in enumerate(batches):
                for group in self.optimiser.param_groups:
                    group["lr"] = group["share"] * rate(config, epoch, trained, step, steps)
                of_batch = None
                if taught:
                    index = torch.from_numpy(batch.index)
                    of_batch = outputs.at(index) if outputs else self._teacher_outputs(batch)
                loss = self._loss(batch, of_batch) * batch.weight
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self.devices.sum_gradients(self.parameters)
                if self.is_student:
                    self.distiller.before_step(self.model)
                self.optimiser.step()
                value = loss.item()
                total += value * min(config.batch_size, count - step * config.batch_size)
                state = f"epoch {epoch + 1}/{length}, loss {value:.3f}"
                bar.set_postfix_str(state, refresh=False)
                at(f"{self.bar}: {state}")
                bar.update()
            total = float(self.devices.sum(torch.tensor(total)))
            self.model.learner.synchronise(self.devices.any)
            if not math.isfinite(total):  # now, not after hours when the metrics cannot be written
                raise FloatingPointError(
                    f"{self.name}, task {self.task + 1}, epoch {epoch + 1}: the loss is not finite; "
                    "try --precision fp32 or a smaller --learning-rate, then --resume from the epoch before"
                )
            yield EpochDone(epoch + 1, total / count, time.perf_counter() - begun)

    def _loss(self, batch: Batch, outputs: TeacherOutputs | None) -> Tensor:
        inputs, query = batch.inputs[self.name], batch.queries[self.name]
        labels = batch.labels - self.class_range[0]
        with self.devices.autocast():
            hidden = self.is_student and self.distiller.needs_hidden
            output = self.model(inputs, query, training=True, hidden=hidden)
            if self.is_student:
                lesson = DistillationBatch(
                    output,
                    labels,
                    self.task,
                    self.class_range,
                    inputs,
                    query,
                    self.model,
                    outputs.logits if outputs is not None else None,
                    outputs.hidden if outputs is not None else (),
                    self.models.get("teacher"),
                )
                loss = self.distiller.loss(lesson)
            else:
                # Only the current classes' columns: the same as setting the logits of all others to -inf.
                loss = nn.functional.cross_entropy(output.cls_logits[:, slice(*self.class_range)].float(), labels)
        if output.key_loss is not None:
            # The authors train on two GPUs and sum the replicas' means: their key loss weighs twice.
            loss = loss + (2.0 if self.config.compat else 1.0) * output.key_loss
        return loss

    @torch.no_grad()
    def _teacher_outputs(self, batch: Batch) -> TeacherOutputs:
        """The frozen teacher's answer to a step."""
        teacher = self.models["teacher"]
        with self.devices.autocast():
            output = teacher(batch.inputs["teacher"], batch.queries["teacher"], hidden=self.distiller.needs_hidden)
            logits = teacher.combine(output)[:, slice(*self.class_range)].float()
        return TeacherOutputs(logits, output.hidden)

    def _all_outputs(self, images: TaskImages) -> TeacherOutputs | None:
        """Of every image of the task, once: nothing is augmented and the teacher is frozen. None: too large to keep."""
        images.keep(["teacher"], self.devices.autocast, CHUNK)
        parts: list[TeacherOutputs] = []
        for start in range(0, len(images), CHUNK):
            index = torch.arange(start, min(start + CHUNK, len(images))).numpy()
            parts.append(self._teacher_outputs(images.batch(index, ["teacher"], self.devices.autocast)))
            size = sum(h.numel() * h.element_size() for h in parts[0].hidden) * len(images) / len(parts[0].logits)
            if size > KEPT_BYTES:
                return None
        hidden = tuple(torch.cat(h) for h in zip(*(p.hidden for p in parts), strict=True))
        return TeacherOutputs(torch.cat([p.logits for p in parts]), hidden)


def rate(config: TrainConfig, epoch: int, epochs: int, step: int, steps: int) -> float:
    """Half a cosine over the task's epochs, from the peak to 0; the same again from a tenth of it for retraining.

    compat: a quarter of a cosine, one value an epoch, where epoch 1 repeats epoch 0's. The CDL authors' schedule is
    cos(99 pi e / (200 (K - 1))) for e of K epochs; it counts from -1 and is stepped from the second epoch on.
    """
    peak = float(config.learning_rate or 0)
    if epoch >= epochs:
        share = ((epoch - epochs) * steps + step) / (config.retrain_epochs * steps)
        return RETRAINING * 0.5 * peak * (1 + math.cos(math.pi * share))
    if config.compat:
        return peak * math.cos(99 * math.pi * max(0, epoch - 1) / (200 * max(1, epochs - 1)))
    share = (epoch * steps + step) / (epochs * steps)
    return 0.5 * peak * (1 + math.cos(math.pi * share))
