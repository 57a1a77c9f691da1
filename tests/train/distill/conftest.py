"""Lessons made by hand, and the terms that most losses share in plain Python: one sample, one class at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cdl_edge.train.distill import DistillationBatch, DistillSpec
from cdl_edge.train.student import PromptedViT, StudentOutput

Rows = Sequence[Sequence[float]]


class Plain:
    """The published formulas."""

    @staticmethod
    def softmax(row: Sequence[float], tau: float = 1.0) -> list[float]:
        e = [math.exp((v - max(row)) / tau) for v in row]
        return [v / sum(e) for v in e]

    @classmethod
    def cross_entropy(cls, rows: Rows, labels: Sequence[int]) -> float:
        return sum(-math.log(cls.softmax(r)[y]) for r, y in zip(rows, labels, strict=True)) / len(rows)

    @classmethod
    def kl(cls, student: Rows, teacher: Rows, tau: float) -> float:
        """tau^2 KL(teacher || student)."""
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            p, q = cls.softmax(t, tau), cls.softmax(s, tau)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        return tau * tau * total / len(student)

    @classmethod
    def kd(cls, student: Rows, teacher: Rows, labels: Sequence[int], alpha: float, tau: float) -> float:
        return (1 - alpha) * cls.cross_entropy(student, labels) + alpha * cls.kl(student, teacher, tau)


@pytest.fixture(scope="session")
def plain() -> type[Plain]:
    """`Plain`."""
    return Plain


@pytest.fixture(scope="session")
def spec() -> Callable[..., DistillSpec]:
    """spec(alpha=.., tau=.., ...): a student of 6 blocks of 16, a teacher of 6 blocks of 24, 2 x 2 patches both."""

    def make(**changes: Any) -> DistillSpec:
        sizes = {"student_width": 16, "student_depth": 6, "student_grid": 2}
        teacher = {"teacher_width": 24, "teacher_depth": 6, "teacher_grid": 2}
        rest = {"alpha": 0.5, "tau": 2.0, "classes": 9, "class_ranges": ((0, 3), (3, 6), (6, 9)), "seed": 0}
        return DistillSpec(**{**sizes, **teacher, **rest, **changes})

    return make


@pytest.fixture(scope="session")
def distill_batch() -> Callable[..., DistillationBatch]:
    """distill_batch(cls=rows, labels=[..], kd=rows, said=rows, class_range=(low, high), ...) from lists or tensors."""

    def make(
        cls: Any,
        labels: Sequence[int],
        kd: Any = None,
        said: Any = None,
        class_range: tuple[int, int] | None = None,
        hidden: Sequence[Tensor] = (),
        teacher_hidden: Sequence[Tensor] = (),
        teacher: PromptedViT | None = None,
        query: Tensor | None = None,
    ) -> DistillationBatch:
        rows = [None if v is None else torch.as_tensor(v) for v in (cls, kd, said)]
        assert rows[0] is not None
        output = StudentOutput(rows[0], rows[1], None, None, tuple(hidden))
        class_range = class_range or (0, rows[0].shape[1])
        # No model: what a distiller asks of it is its own matter.
        return DistillationBatch(
            output,
            torch.as_tensor(labels),
            task=0,
            class_range=class_range,
            inputs=rows[0],
            query=query,
            student_model=None,  # type: ignore[arg-type]
            teacher_logits=rows[2],
            teacher_hidden=tuple(teacher_hidden),
            teacher=teacher,
        )

    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., tuple[Tensor, ...]]:
    """tokens(batch, blocks, width, grid=2, seed=0): (B, 1 + grid^2, width) behind each block."""

    def make(batch: int, blocks: int, width: int, grid: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, 1 + grid * grid, width, generator=generator) for _ in range(blocks))

    return make
