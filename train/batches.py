"""A task's images as what the prompted blocks start from: tokens of the frozen stems, and the query, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import Split
from ..images import Preprocessing
from . import augment
from .student import PromptedViT

KEPT_BYTES = 2_000_000_000
"a task's tokens are kept in memory up to this size, computed again otherwise"


@dataclass(frozen=True)
class Batch:
    """What one step sees."""

    index: np.ndarray
    "int64 (B,), positions in the task"
    labels: Tensor
    "int64 (B,), learned positions of the classes"
    query: Tensor | None
    "(B, Q)"
    tokens: dict[str, Tensor]
    "model name -> (B, 1 + P, D)"


class Side:
    """A model with the way images reach it."""

    def __init__(self, model: PromptedViT, preprocessing: Preprocessing, device: torch.device) -> None:
        self.model, self.preprocessing = model, preprocessing
        self.normalise = augment.Normalise(preprocessing, device)

    @property
    def decoding(self) -> tuple[int, int, str]:
        """Two sides with the same value share their decoded pixels."""
        return self.preprocessing.size, self.preprocessing.resize, self.preprocessing.interpolation


class Images:
    """The images of one task, decoded once for each way of decoding that the sides need."""

    def __init__(self, split: Split, sides: dict[str, Side], device: torch.device) -> None:
        self.device, self.sides = device, sides
        decoded = {d: split.decode(p) for d, p in {s.decoding: s.preprocessing for s in sides.values()}.items()}
        first = next(iter(decoded.values()))
        self.labels, self.skipped = first.labels, first.skipped
        self._pixels = {d: torch.from_numpy(v.pixels) for d, v in decoded.items()}
        self._tokens: dict[str, Tensor] = {}
        self._query: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def keep(self, names: list[str], precision: Callable[[], AbstractContextManager[object]], chunk: int) -> None:
        """Compute tokens and query of every image now: without augmentation once is enough."""
        size = sum(len(self) * s.model.backbone.pos_embed[0].numel() * 4 for n, s in self.sides.items() if n in names)
        if size > KEPT_BYTES:
            return
        student = self.sides["student"].model
        for name in names:
            if name in self._tokens:
                continue
            parts = [self._embed(name, np.arange(i, min(i + chunk, len(self)))) for i in range(0, len(self), chunk)]
            self._tokens[name] = torch.cat(parts)
        if student.two_pass and self._query is None and "student" in self._tokens:
            with precision():
                parts = [student.query(t) for t in self._tokens["student"].split(chunk)]
            self._query = torch.cat(parts).float()

    def _embed(self, name: str, index: np.ndarray) -> Tensor:
        side = self.sides[name]
        return side.model.embed(side.normalise(self._pixels[side.decoding][index]))

    @torch.no_grad()
    def batch(
        self,
        index: np.ndarray,
        names: list[str],
        precision: Callable[[], AbstractContextManager[object]],
        generator: torch.Generator | None = None,
    ) -> Batch:
        """The images at `index` for the models in `names`; with a generator every model sees the same random crops."""
        labels = torch.from_numpy(self.labels[index]).to(self.device)
        student = self.sides["student"].model
        rows = torch.from_numpy(index)
        if generator is None and all(n in self._tokens for n in names):
            query = self._query[rows] if self._query is not None else None
            return Batch(index, labels, query, {n: self._tokens[n][rows] for n in names})
        wanted = names if not student.two_pass or "student" in names else [*names, "student"]
        tokens: dict[str, Tensor] = {}
        crops: dict[tuple[int, int, str], Tensor] = {}
        state = generator.get_state() if generator is not None else None
        for name in wanted:
            side = self.sides[name]
            x = crops.get(side.decoding)
            if x is None:
                x = self._pixels[side.decoding][rows].to(self.device).permute(0, 3, 1, 2).float()
                if generator is not None and state is not None:
                    generator.set_state(state)
                    x = augment.random_resized_crop_flip(x, generator, (0.5, 1.0))
                crops[side.decoding] = x
            with precision():
                tokens[name] = side.model.embed(side.normalise.floats(x)).float()
        query = None
        if student.two_pass:
            with precision():
                query = student.query(tokens["student"]).float()
        return Batch(index, labels, query, {n: tokens[n] for n in names})

    def epoch(
        self,
        names: list[str],
        batch_size: int,
        precision: Callable[[], AbstractContextManager[object]],
        generator: torch.Generator,
        augmented: bool,
    ) -> Iterator[Batch]:
        """Every image once, in an order drawn from the generator."""
        order = torch.randperm(len(self), generator=generator).numpy()
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size], names, precision, generator if augmented else None)
