"""A task's images as what a model's `forward` takes: tokens of the frozen stem, and the query, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Split
from ..heartbeat import at
from ..images import Preprocessing
from . import augment
from .devices import Share
from .student import PromptedViT
from .tokens import token_count

KEPT_BYTES = 2_000_000_000
"what a task's images give is kept in memory up to this size, computed again otherwise"
VALIDATION_BYTES = 1_000_000_000
"validation images of all tasks are kept in memory up to this size, read again for each measurement otherwise"
CROP_AREA = (0.5, 1.0)
"share of the image that a random crop shows"
COMPAT_CROP_AREA = (0.08, 1.0)
"the same in the CDL authors' code"

Precision = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Batch:
    """What one step sees: this process's share of the step's images."""

    index: np.ndarray
    "int64 (B,), positions in the task"
    labels: Tensor
    "int64 (B,), learned positions of the classes"
    inputs: dict[str, Tensor]
    "model name -> what its forward takes: tokens (B, 1 + P, D), or images where the stem learns"
    queries: dict[str, Tensor | None]
    "model name -> (B, Q)"
    weight: float = 1.0
    "share of the step's images that are these: what the loss counts for"


def images_seen(count: int, batch_size: int, compat: bool) -> int:
    """TaskImages of an epoch: all; in the CDL authors' code full steps only (one step where there is no full one)."""
    return count // batch_size * batch_size if compat and count >= batch_size else count


class Pipeline:
    """A model with the way images reach it."""

    def __init__(self, model: PromptedViT, preprocessing: Preprocessing, device: torch.device) -> None:
        self.model, self.preprocessing = model, preprocessing
        self.normalise = augment.Normalise(preprocessing, device)

    @property
    def decoding(self) -> tuple[int, int, str]:
        """Two sides with the same value share their decoded pixels."""
        return self.preprocessing.size, self.preprocessing.resize, self.preprocessing.interpolation


class TaskImages:
    """The images of one task, decoded once for each way of decoding that the sides need."""

    def __init__(self, split: Split, sides: dict[str, Pipeline], device: torch.device) -> None:
        self.device, self.sides = device, sides
        decoded = {d: split.decode(p) for d, p in {s.decoding: s.preprocessing for s in sides.values()}.items()}
        first = next(iter(decoded.values()))
        self.labels, self.skipped = first.labels, first.skipped
        self.split, self.read = split, first.read
        "what they come from, and where each of them stands in it, int64 (N,)"
        self._pixels = {d: torch.from_numpy(v.pixels) for d, v in decoded.items()}
        self._inputs: dict[str, Tensor] = {}
        self._queries: dict[str, Tensor] = {}
        self.features: dict[tuple[str, int | None, int | None], list[Tensor]] = {}
        "(model, first and last + 1 image) -> what its head made from statistics reads of these, in chunks"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_bytes(self) -> int:
        """Memory of what is kept: pixels, inputs, queries, features."""
        features = (part for parts in self.features.values() for part in parts)
        kept = (*self._pixels.values(), *self._inputs.values(), *self._queries.values(), *features)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def forget(self) -> None:
        """Keep the pixels only."""
        for kept in (self._inputs, self._queries, self.features):
            kept.clear()

    def querying(self, name: str) -> str | None:
        """The model whose bare pass gives the query of model `name`: the student in two passes, itself as reference."""
        model = self.sides[name].model
        if model.two_pass:
            return "student"
        return name if model.reads_reference else None

    @torch.no_grad()
    def keep(self, names: list[str], precision: Precision, chunk: int) -> None:
        """Compute inputs and query of every image now: without augmentation once is enough.

        Inputs are float32; a query is computed in `precision` and kept as float32.
        """
        sources = {s for s in map(self.querying, names) if s is not None}
        wanted = [n for n in dict.fromkeys([*names, *sorted(sources)]) if n in self.sides]
        if len(self) * sum(self._bytes_each(n) for n in wanted) > KEPT_BYTES:
            return
        chunks = [np.arange(i, min(i + chunk, len(self))) for i in range(0, len(self), chunk)]
        for name in wanted:
            if name not in self._inputs:
                at(f"{name}: {len(self):,} pictures through the stem")
                self._inputs[name] = torch.cat([self.prepare(name, index) for index in chunks])
        for name in sources - set(self._queries):
            model = self.sides[name].model
            with precision():
                parts = [model.query(t) for t in self._inputs[name].split(chunk)]
            self._queries[name] = torch.cat(parts).float()

    def _bytes_each(self, name: str) -> int:
        side = self.sides[name]
        if side.model.learner.whole_network:
            return 12 * side.preprocessing.size**2
        vit = side.model.backbone
        return 4 * token_count(vit) * int(vit.embed_dim)

    @torch.no_grad()
    def prepare(self, name: str, index: np.ndarray) -> Tensor:
        """What the forward of model `name` takes of the images at `index`, computed now."""
        side = self.sides[name]
        return side.model.prepare(side.normalise(self._pixels[side.decoding][index]))

    @torch.no_grad()
    def bare_tokens(self, name: str, index: np.ndarray) -> Tensor:
        """Tokens (B, 1 + P, D) that the pretrained backbone of a model starts from, float32."""
        kept = self._inputs.get(name)
        side = self.sides[name]
        if kept is not None and not side.model.learner.whole_network:
            return kept[torch.from_numpy(index)]
        return side.model.embed(side.normalise(self._pixels[side.decoding][index]))

    @torch.no_grad()
    def batch(
        self,
        index: np.ndarray,
        names: list[str],
        precision: Precision,
        boxes: Tensor | None = None,
        weight: float = 1.0,
    ) -> Batch:
        """The images at `index` for the models in `names`; every model sees the crops in `boxes` (B, 2, 3)."""
        labels = torch.from_numpy(self.labels[index]).to(self.device)
        rows = torch.from_numpy(index)
        sources = {n: self.querying(n) for n in names}
        wanted = list(dict.fromkeys([*names, *(s for s in sources.values() if s is not None)]))
        if boxes is None and all(n in self._inputs for n in names):
            queries = {n: self._queries[s][rows] if s is not None else None for n, s in sources.items()}
            return Batch(index, labels, {n: self._inputs[n][rows] for n in names}, queries, weight)
        inputs: dict[str, Tensor] = {}
        crops: dict[tuple[int, int, str], Tensor] = {}
        for name in wanted:
            side = self.sides[name]
            x = crops.get(side.decoding)
            if x is None:
                x = self._pixels[side.decoding][rows].to(self.device).permute(0, 3, 1, 2).float()
                if boxes is not None:
                    x = augment.cut_out(x, boxes)
                crops[side.decoding] = x
            with precision():
                inputs[name] = side.model.prepare(side.normalise.floats(x)).float()
        found: dict[str, Tensor] = {}
        for source in {s for s in sources.values() if s is not None}:
            with precision():
                found[source] = self.sides[source].model.query(inputs[source]).float()
        queries = {n: found[s] if s is not None else None for n, s in sources.items()}
        return Batch(index, labels, {n: inputs[n] for n in names}, queries, weight)

    def epoch(
        self,
        names: list[str],
        batch_size: int,
        precision: Precision,
        generator: torch.Generator,
        augmented: bool,
        share: Share = Share(),  # noqa: B008 (frozen)
        compat: bool = False,
    ) -> Iterator[Batch]:
        """Every image once over all processes, in an order drawn from the generator; this process's share of each step.

        Order and crops are drawn for the whole step by every process: the step does not change with their number.
        compat: as the CDL authors' code, smaller crops, and no last step of fewer than batch_size images.
        """
        order = torch.randperm(len(self), generator=generator).numpy()
        order = order[: images_seen(len(self), batch_size, compat)]
        area = COMPAT_CROP_AREA if compat else CROP_AREA
        for start in range(0, len(order), batch_size):
            step = order[start : start + batch_size]
            boxes = augment.random_boxes(len(step), generator, area) if augmented else None
            mine, weight = share.of(len(step))
            yield self.batch(step[mine], names, precision, boxes[mine] if boxes is not None else None, weight)


class Validation:
    """The validation images of the tasks, which are measured again after every task."""

    def __init__(self, read: Callable[[int], TaskImages], limit_bytes: int = VALIDATION_BYTES) -> None:
        """read: the images of a task. limit_bytes: what may be kept; beyond it pixels only, then nothing."""
        self.read, self.limit_bytes = read, limit_bytes
        self.kept: dict[int, TaskImages] = {}

    def models_changed(self) -> None:
        """Prompts have learnt: the features that are kept are no longer those of the models."""
        for images in self.kept.values():
            images.features.clear()

    def each(self, tasks: int) -> Iterator[TaskImages]:
        """The images of tasks 0.. in their order; those that do not fit are read again each time."""
        for task in range(tasks):
            images = self.kept.pop(task) if task in self.kept else self.read(task)
            yield images
            room = self.limit_bytes - sum(other.size_bytes for other in self.kept.values())
            if images.size_bytes > room:
                images.forget()
            if images.size_bytes <= room:
                self.kept[task] = images
