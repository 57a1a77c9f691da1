"""What every prompt learner offers to the student's forward pass and to the loop over tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LearnerSpec:
    """Sizes that a learner is built for."""

    width: int
    "channels of the backbone the prompts go into, D"
    depth: int
    "blocks of that backbone"
    key_width: int
    "channels of the query, Q: the student's width, also for the teacher (one-pass: the own width)"
    tasks: int
    "number of tasks T of the whole scenario"
    seed: int
    "of initial values"
    pool_tasks: int = 0
    "tasks that a pool of fixed size is shared by: those of the run that came first where others extend it; 0: T"
    compat: bool = False
    "as the CDL authors' code: entries not yet learnt may be selected, key losses are sums, APT goes on unmerged"
    apt_momentum: float = 0.7
    "APT only: c, the share of the old prompt in the merged one"


@dataclass(frozen=True)
class BlockPrompt:
    """What one block adds to its attention. Rows are behind the projection: they are keys and values themselves."""

    keys: Tensor | None = None
    "(B or 1, n, D) rows added to the keys"
    values: Tensor | None = None
    "(B or 1, n, D) rows added to the values"
    cls_key: Tensor | None = None
    "(D,) added to the class token's key (APT)"
    cls_value: Tensor | None = None
    "(D,) added to the class token's value (APT)"
    loss: Tensor | None = None
    "scalar: pulls keys to queries; only while training"
    weights: Tensor | None = None
    "(B, K) cosine or weight of each learnt entry, for whoever wants to know what was selected"


@dataclass(frozen=True)
class Entries:
    """The entries that the prompt of a block is made of: what a graph of the student is built from.

    An entry weighs the cosine of the query to its key, and inference uses it as `Learner.selection` says: the rows of
    the k nearest ("top-k"), or the sum of the rows of all, each times its weight ("weighted").
    """

    rows: Tensor
    "(K, n, D) of every entry, half of them key rows, half value rows"
    keys: Tensor
    "(K, Q)"
    learnt: tuple[int, ...]
    "entries that inference may use, in order; the same in all blocks"
    attention: Tensor | None = None
    "(K, Q): by what the query is multiplied for each entry; None: it is taken as it is"


class Learner(nn.Module):
    """Base of the learners. Counts are buffers: a reloaded learner is the learner that was saved.

    A learner is one file of this folder: the class, with `@register`. What export needs to know of it is in
    `selection`, `blocks` and `entries`; of a learner that asks no query it needs nothing more than `at_block`.
    """

    needs_query: ClassVar[bool] = True
    "whether blocks() want the query"
    whole_network: ClassVar[bool] = False
    "whether the backbone itself learns, in a copy of its own"
    network_rate: ClassVar[float] = 0.0
    "share of --learning-rate that the weights of a whole network learn at; head and prompts: 1"
    head: ClassVar[str] = "linear"
    "key of student.HEADS"
    selection: ClassVar[dict[str, object]] = {"kind": "none", "k": 0}
    "how `weights` are to be read: see runtime/select.py"

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tasks_learnt: Tensor
        self.register_buffer("tasks_learnt", torch.zeros((), dtype=torch.int64))

    @property
    def learnt(self) -> int:
        """Tasks whose training has begun, 0..T."""
        return int(self.tasks_learnt)

    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks whose prompt depends on the query, in order; the others have one for all images."""
        return ()

    def begin_task(self, task: int) -> None:
        """Called before task `task` (0-based) is trained."""
        self.tasks_learnt.fill_(task + 1)

    def end_task(self, task: int) -> None:
        """Called after its training; what inference uses from now on."""

    def at_block(self, block: int, query: Tensor | None, training: bool) -> BlockPrompt | None:
        """The prompt of one block. query: (B, Q) or None when `needs_query` is false."""
        raise NotImplementedError

    def entries(self, block: int) -> Entries | None:
        """The entries of one of `blocks()`; None: they cannot be told so, and the learner cannot be exported."""
        return None

    def similarity(self, block: int, query: Tensor) -> Tensor:
        """(B, Q) -> (B, K): how near the query is to each entry of a query-dependent block."""
        raise NotImplementedError

    def reference_loss(self, block: int, query: Tensor, reference: Tensor) -> Tensor | None:
        """|| softmax(cos(K, q)) - softmax(cos(K, r)) ||^2, mean over the batch (OS-Prompt, ECCV 2024); or None.

        query: the block's own (B, Q), reference: the full query (B, Q). One-pass training only.
        """
        if block not in self.blocks():
            return None
        own, full = (self.similarity(block, q).softmax(dim=1) for q in (query, reference))
        return (own - full).pow(2).sum(dim=1).mean()

    def synchronise(self, any_process: Callable[[Tensor], Tensor]) -> None:
        """Make what the processes of a distributed run have noted one. any_process: bool tensor -> or over all."""

    def generator(self, task: int) -> torch.Generator:
        """Random numbers of a task's initial values: the same however often the run was stopped."""
        return torch.Generator().manual_seed(self.spec.seed * 7919 + task)


LEARNERS: dict[str, type[Learner]] = {}
"by name, as `--learner` takes them; filled by `register`"
Kind = TypeVar("Kind", bound=type[Learner])


def register(name: str) -> Callable[[Kind], Kind]:
    """Make a class known as the learner of that name. Raises: ValueError for a name that is taken."""

    def add(kind: Kind) -> Kind:
        if name in LEARNERS:
            raise ValueError(f"two learners of the name {name!r}: {LEARNERS[name].__name__} and {kind.__name__}")
        LEARNERS[name] = kind
        return kind

    return add


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> nn.Parameter:
    """U(0, 1), the initial values in the CODA-Prompt code base, from which the three pool learners come."""
    return nn.Parameter(torch.rand(shape, generator=generator))


def cosine(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine similarity of queries (B, Q) and keys (K, Q): (B, K)."""
    return F.normalize(query, dim=1) @ F.normalize(keys, dim=1).t()


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n, D) -> its first half as key rows and its second half as value rows."""
    half = rows.shape[-2] // 2
    return rows[..., :half, :], rows[..., half:, :]
