"""The options of `train` and `sweep` as types, so that an editor completes them and a type checker sees them.

What each means stands in config.py; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict


class SharedOptions(TypedDict, total=False):
    """What every run of a sweep has alike."""

    tasks: int | None
    epochs: int
    batch_size: int
    learning_rate: float | None
    min_steps: int | None
    limit_per_class: int | None
    augment: str
    alpha: float
    tau: float | None
    query_regulariser: float
    random_features: int
    token_weight: float
    prompt_tasks: int | None
    kd_blocks: int
    kd_length: int
    kd_head: str
    apt_momentum: float
    exemplars: int
    retrain_epochs: int
    pruned: str
    compat: bool
    compat_schema: int
    resize_rule: str
    decoder: int
    precision: str
    range_images: int
    devices: str
    teacher: str
    student: str
    teacher_arch: str | None
    student_arch: str | None
    image_size: int | None
    teacher_image_size: int | None


class NeededOptions(TypedDict):
    """Options of `train` that have no default."""

    data: str
    out: str


class TrainOptions(NeededOptions, SharedOptions, total=False):
    """The fields of config.TrainConfig."""

    learner: str
    distill: str
    query: str
    head: str
    seed: int
    teachers: str | None
    extend: str | None


class SweepOptions(SharedOptions, total=False):
    """What a grid varies, and what its runs have alike; several as a list, or as one text with commas."""

    data: str
    learners: str | Sequence[str]
    distillers: str | Sequence[str]
    queries: str | Sequence[str]
    heads: str | Sequence[str]
    seeds: str | int | Sequence[int]
    baseline: str
    preset: str
    teachers: str | None
