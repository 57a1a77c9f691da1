"""Ranges of a student's tensors, collected while the images of a task are there: what INT8 needs once they are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..heartbeat import at
from ..ranges import BINS, Histogram, Ranges, TaskRanges, TensorRange, bin_grid, drift, merge_tensors, tails
from .batches import TaskImages
from .student import PromptedViT

CHUNK = 64
"images a pass: its tensors stay near the processor"
LINEARS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"name in a range -> module of a timm block"
BEHIND_NORM = ("qkv", "fc1")
"Linears that read a LayerNorm, whose channels may be scaled: their ranges are kept by channel too"

Seen = Callable[[str, Tensor], None]


@contextmanager
def watch(blocks: nn.Module, name: str, seen: Seen) -> Iterator[None]:
    """While open, every input of a block's Linears is given to seen(`{name}.blocks.{i}.{linear}`, (..., D))."""
    handles = []
    for i, block in enumerate(blocks.children()):
        for short, path in LINEARS.items():

            def hook(_: nn.Module, inputs: tuple[Any, ...], tensor: str = f"{name}.blocks.{i}.{short}") -> None:
                seen(tensor, inputs[0])

            handles.append(block.get_submodule(path).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def range_of(name: str, x: Tensor) -> TensorRange:
    """Of the tensor of that name, float32 (..., D). Raises: FloatingPointError when a value is not finite."""
    x = x.reshape(-1, x.shape[-1])
    channels = torch.stack([x.amin(0), x.amax(0)])
    low, high = channels[0].min().item(), channels[1].max().item()
    if not np.isfinite([low, high]).all():
        raise FloatingPointError(f"student, input of {name}: not finite, {low} to {high}")
    width, first = bin_grid(low, high)
    counts = torch.bincount((x / width).floor_().long().flatten() - first, minlength=BINS)
    by_channel = name.rpartition(".")[2] in BEHIND_NORM
    return TensorRange(Histogram(low, high, counts.cpu().numpy()), channels.cpu().numpy() if by_channel else None)


@torch.no_grad()
def collect(images: TaskImages, count: int, query: bool = True) -> dict[str, TensorRange]:
    """Ranges of the student in eval mode, fp32, over `count` images evenly spaced among `images`.

    query: the query pass too, where there is one.
    """
    student: PromptedViT = images.sides["student"].model
    found: dict[str, TensorRange] = {}

    def seen(name: str, x: Tensor) -> None:
        new = range_of(name, x)
        found[name] = merge_tensors([found[name], new]) if name in found else new

    wanted = np.arange(count) * len(images) // count
    for start in range(0, count, CHUNK):
        at(f"ranges for 8 bits: pictures {start:,} of {count:,}")
        # Not what `images` may have kept: another chunk could differ in the last bit, and a resumed run has kept less.
        inputs = images.prepare("student", wanted[start : start + CHUNK])
        asked = None
        if student.two_pass:
            with watch(student.backbone.blocks, "query", seen if query else lambda *_: None):
                asked = student.query(inputs)
        with watch(student.backbone.blocks, "prompted", seen):
            student(inputs, asked)
    return found


class RangeKeeper:
    """The ranges of a run's student as the tasks go by, in ranges.npz of the run folder."""

    def __init__(self, path: Path, count: int) -> None:
        """count: images a task that are looked at, where it has as many."""
        self.path, self.count = path, count
        self.kept = Ranges()
        self.before: dict[str, tuple[float, float]] = {}
        "of the task in progress: the tails of its images' tensors in the student that had not learnt it"

    def begin(self, images: TaskImages) -> None:
        """Called before a task is learnt, with the student as the task before left it."""
        self.before = {}
        if self.kept.tasks:
            found = collect(images, self._count(images), query=False)
            self.before = {name: tails(r.histogram) for name, r in found.items()}

    def end(self, images: TaskImages) -> None:
        """Called after a task, with the student as it would be deployed."""
        tensors = collect(images, self._count(images))
        moved = {n: drift(before, tails(tensors[n].histogram)) for n, before in self.before.items()}
        self.kept = Ranges((*self.kept.tasks, TaskRanges(self._count(images), tensors, moved)))
        self.kept.save(self.path)

    def restore(self, task: int, before: dict[str, list[float]]) -> None:
        """Go on within `task` after a stop; `before`: what had been kept when it began."""
        self.before = {name: (low, high) for name, (low, high) in before.items()}
        # The file may be one task ahead of the checkpoint: that one is learnt again.
        self.kept = Ranges(Ranges.load(self.path).tasks[:task]) if task else Ranges()

    def _count(self, images: TaskImages) -> int:
        return min(self.count, len(images))
