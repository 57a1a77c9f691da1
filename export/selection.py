"""How near a query is to each entry of a pool, in the graph: what decides which prompts an image gets."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from ..errors import InputError
from ..train.learners.base import Entries, Learner
from .nodes import LEARNT, Graph
from .rewrites import Rewrites


class PromptPool:
    """The entries of one learner, the student's own or the teacher's that were mapped."""

    def __init__(self, name: str, learner: Learner, blocks: tuple[int, ...]) -> None:
        """name: `prompt` or `mapped`, in front of the name of its weights. blocks: with weights, in order.

        Raises: InputError for a learner that does not say what its prompts are made of.
        """
        self.name, self.blocks = name, blocks
        self.entries: dict[int, Entries] = {}
        for block in blocks:
            found = learner.entries(block)
            kind = learner.selection["kind"]
            if found is None or kind not in ("top-k", "weighted"):
                raise InputError(
                    f"the learner {type(learner).__name__} cannot be exported",
                    got=f"no entries of block {block}" if found is None else f"selection {kind!r}",
                    expected="entries of every block that depends on the query; see train.learners.base.Learner",
                )
            self.entries[block] = found
        self.top: int | None = int(str(learner.selection["k"])) if kind == "top-k" else None
        "entries that are selected; None: all are mixed"

    @property
    def learnt(self) -> list[int]:
        """Indices of the entries that inference may select."""
        return list(self.entries[self.blocks[0]].learnt)

    def size(self) -> int:
        """Number of entries of a block, learnt or not."""
        return len(self.entries[self.blocks[0]].keys)

    def keys(self, block: int) -> Tensor:
        """Keys of all entries of a block, (K, Q)."""
        return self.entries[block].keys.detach().cpu()

    def rows(self, block: int) -> Tensor:
        """Prompt rows of all entries of a block, (K, n, D): half key rows, half value rows."""
        return self.entries[block].rows.detach().cpu()


class Selection:
    """Weights (B, K) of each pool's blocks, fp32: computed from queries, or given from outside."""

    def __init__(self, g: Graph, rewrites: Rewrites, given: bool = False, one_query: bool = True) -> None:
        """given: weights are inputs of the graph. one_query: all blocks are asked with the same query (two-pass)."""
        self.g, self.rewrites, self.given, self.one_query = g, rewrites, given, one_query
        self._known: dict[tuple[str, int], str] = {}
        self._length: dict[str, str] = {}
        "query -> its length (B, 1)"

    def used(self, pool: PromptPool) -> list[int]:
        """Entries of a block whose rows and keys the graph holds."""
        return pool.learnt if self.rewrites.learnt or self.given else list(range(pool.size()))

    def weights(self, pool: PromptPool, block: int, query: str | None) -> str:
        """(B, K), K learnt entries in order. query: (B, Q), not needed where the weights are given."""
        weights = self.raw(pool, block, query)
        if self.used(pool) == pool.learnt:
            return weights
        return self.g.op("Gather", weights, self.g.indices(*pool.learnt), axis=1)

    def raw(self, pool: PromptPool, block: int, query: str | None) -> str:
        """(B, K) over the entries that the graph holds."""
        if (pool.name, block) not in self._known:
            if self.given:
                self._take(pool)
            else:
                assert query is not None
                self._compute(pool, block, query)
        return self._known[pool.name, block]

    def chosen(self, pool: PromptPool, block: int, query: str | None) -> str:
        """int64 (B, k): positions of the selected entries of a top-k pool, nearest first."""
        g, weights = self.g, self.raw(pool, block, query)
        if self.used(pool) != pool.learnt:
            mask = np.full(pool.size(), -10.0)  # a cosine is never below -1
            mask[pool.learnt] = 0
            weights = g.op("Add", weights, g.constant(f"{pool.name}.{block}.unlearnt", mask, LEARNT))
        if pool.top is not None and pool.top > 1:
            return g.ops("TopK", 2, weights, g.shape(pool.top), axis=1)[1]
        return g.op("ArgMax", weights, axis=1, keepdims=1)

    def stacked(self, pool: PromptPool, query: str | None) -> str:
        """Selection weights of all blocks, (B, L, K), learnt entries only."""
        return self.joined([self.weights(pool, block, query) for block in pool.blocks])

    def joined(self, weights: list[str]) -> str:
        """Join the weights of L blocks, (B, K) each, to (B, L, K)."""
        return self.g.concat([self.g.op("Unsqueeze", w, self.g.shape(1)) for w in weights], axis=1)

    def _take(self, pool: PromptPool) -> None:
        g = self.g
        stacked = g.input(f"{pool.name}_weights", TensorProto.FLOAT, len(pool.blocks), len(pool.learnt))
        parts = g.split(stacked, [1] * len(pool.blocks), axis=1)
        for block, part in zip(pool.blocks, parts, strict=True):
            self._known[pool.name, block] = g.reshape(part, 0, len(pool.learnt))

    def _compute(self, pool: PromptPool, block: int, query: str) -> None:
        if pool.entries[block].attention is not None:
            self._attended(pool, block, query)
            return
        g = self.g
        if query not in self._length:
            square = g.op("ReduceSum", g.op("Mul", query, query), g.shape(1), keepdims=1)
            self._length[query] = g.op("Max", g.op("Sqrt", square), g.constant("tiny", np.array(1e-12), LEARNT))
        unit = torch.nn.functional.normalize(pool.keys(block)[self.used(pool)].double(), dim=1)
        products = g.op("MatMul", query, g.constant(f"{pool.name}.{block}.key", unit.t(), LEARNT))
        weights = g.op("Div", products, self._length[query])
        if pool.top is None and self.used(pool) != pool.learnt:
            mask = np.zeros(pool.size())
            mask[pool.learnt] = 1
            weights = g.op("Mul", weights, g.constant(f"{pool.name}.{block}.learnt", mask, LEARNT))
        self._known[pool.name, block] = weights

    def _attended(self, pool: PromptPool, block: int, query: str) -> None:
        """cos(q * A_k, K_k) = (q . (A_k * n(K_k))) / sqrt(q^2 . A_k^2): (B, K).

        With one query for all blocks (two-pass) both products are done once for all of them.
        """
        g, used = self.g, self.used(pool)
        together = pool.blocks if self.one_query and self.rewrites.coda_products else (block,)
        found = [pool.entries[b].attention for b in together]
        attention = torch.cat([a.detach().cpu()[used] for a in found if a is not None]).double()
        key = torch.cat([pool.keys(b)[used] for b in together]).double()
        title = pool.name if len(together) > 1 else f"{pool.name}.{block}"
        if self.rewrites.coda_products:
            unit = key / key.norm(dim=1, keepdim=True).clamp_min(1e-8)
            squares = g.constant(f"{title}.square", (attention**2).t(), LEARNT)
            product = g.op("MatMul", query, g.constant(f"{title}.key", (attention * unit).t(), LEARNT))
            square = g.op("MatMul", g.op("Mul", query, query), squares)
            length = g.op("Sqrt", square)
        else:
            rows = g.op(
                "Mul", g.op("Unsqueeze", query, g.shape(1)), g.constant(f"{title}.attention", attention, LEARNT)
            )
            keys, last = g.constant(f"{title}.key", key, LEARNT), g.shape(-1)
            product = g.op("ReduceSum", g.op("Mul", rows, keys), last, keepdims=0)
            norms = [g.op("Sqrt", g.op("ReduceSum", g.op("Mul", x, x), last, keepdims=0)) for x in (rows, keys)]
            length = g.op("Mul", *norms)
        length = g.op("Max", length, g.constant("coda.tiny", np.array(1e-8), LEARNT))
        weights = g.op("Div", product, length)
        if used != pool.learnt:
            mask = np.zeros((len(together), pool.size()))
            mask[:, pool.learnt] = 1
            weights = g.op("Mul", weights, g.constant(f"{title}.learnt", mask.reshape(-1), LEARNT))
        each = g.split(weights, [len(used)] * len(together), axis=1)
        self._known |= {(pool.name, b): w for b, w in zip(together, each, strict=True)}
