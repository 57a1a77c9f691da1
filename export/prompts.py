"""What prompts add to a block's attention: constants where possible, otherwise gathered or mixed by the query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..train.learners.apt import APT
from ..train.learners.base import Learner, halves
from ..train.learners.coda import CODAPrompt
from ..train.learners.dualprompt import GENERAL_BLOCKS, DualPrompt
from ..train.learners.l2p import L2P, TOP
from ..train.student import PromptedViT
from .nodes import LEARNT, Graph

Pair = tuple[str, str]
"key rows and value rows, (B, n, D) each"


@dataclass(frozen=True)
class Rows:
    """Extra rows of one block's attention."""

    keys: list[str]
    values: list[str]
    cls_key: str | None = None
    cls_value: str | None = None


class PromptRows:
    """Adds the rows of the student's learner, of the teacher's mapped prompts and of KDP to a graph."""

    def __init__(self, g: Graph, student: PromptedViT) -> None:
        self.g, self.student = g, student
        self.width = int(student.backbone.embed_dim)
        self.weights: list[str] = []
        "prompt weights (B, K) of each query-dependent block of the student's own learner"
        self.entries = 0
        "K, learnt entries a block"
        self._coda: dict[str, str] = {}
        "name of a pool's block -> its weights (B, K)"

    def at_block(self, index: int, count: int, query: str | None, like: str) -> Rows | None:
        """The rows of a block with `count` tokens. query: (B, Q); like: any value whose first axis is the batch."""
        g, student = self.g, self.student
        learner = student.learner
        pairs: list[Pair] = []
        fixed: list[tuple[Tensor, Tensor]] = []
        cls_key = cls_value = None
        if student.mapped is not None and index in student.mapped.blocks():
            if index in student.mapped.teacher.blocks():
                assert query is not None
                pairs.append(self.mapped(index, query))
            else:
                general = student.mapped.at_block(index, None)
                assert general is not None
                fixed.append(general)
        if isinstance(learner, APT):
            # Mask times row: the engine folds it into (N, D) when it loads, the file of what was learnt keeps one row.
            mask = g.constant(f"cls_mask.{count}", np.eye(count, 1), "")
            added = learner.merged[index].detach()
            cls_key = g.op("Mul", mask, g.constant(f"apt.{index}.key", added[:1], LEARNT))
            cls_value = g.op("Mul", mask, g.constant(f"apt.{index}.value", added[1:], LEARNT))
        elif isinstance(learner, DualPrompt) and index in GENERAL_BLOCKS:
            fixed.append(halves(learner.general[str(index)][None]))
        elif index in learner.blocks():
            assert query is not None
            pairs.append(self.own(index, query))
        kd = student.kd.at_block(index) if student.kd is not None else None
        if kd is not None and kd[0].shape[1]:
            fixed.append(kd)
        if fixed:
            keys, values = (torch.cat([pair[i] for pair in fixed], dim=1) for i in range(2))
            pairs.append((g.rows(f"rows.{index}.keys", keys, like), g.rows(f"rows.{index}.values", values, like)))
        if not pairs and cls_key is None:
            return None
        return Rows([k for k, _ in pairs], [v for _, v in pairs], cls_key, cls_value)

    # -- the student's own --------------------------------------------------------------------------------------------

    def own(self, index: int, query: str) -> Pair:
        """Rows that depend on the query (B, Q); the block's weights are noted."""
        g, learner = self.g, self.student.learner
        if isinstance(learner, CODAPrompt):
            weights = self.coda_weights("coda", learner, learner.blocks(), index, query)
            self.weights.append(weights)
            self.entries = learner.components()
            prompt = learner.prompt[str(index)][: self.entries].detach()
            mixed = g.op("MatMul", weights, g.constant(f"coda.{index}.prompt", prompt.flatten(1), LEARNT))
            k, v = g.ops("Split", 2, g.reshape(mixed, -1, prompt.shape[1], self.width), axis=1, num_outputs=2)
            return k, v
        table, key = entries_of(learner, index)
        name = "l2p" if isinstance(learner, L2P) else "dualprompt"
        length = g.op("Sqrt", g.op("ReduceSumSquare", query, g.shape(1), keepdims=1))
        length = g.op("Max", length, g.constant("tiny", np.array(1e-12), LEARNT))
        self.weights.append(g.op("Div", self.products(f"{name}.{index}", query, key), length))
        self.entries = len(key)
        return self.gathered(f"entries.{index}", self.nearest(learner, self.weights[-1]), halves(table))

    def products(self, name: str, query: str, key: Tensor) -> str:
        """(B, Q) with the keys' rows (K, Q) at unit length: (B, K), cosines but for the length of the query."""
        unit = torch.nn.functional.normalize(key.double(), dim=1)
        return self.g.op("MatMul", query, self.g.constant(f"{name}.key", unit.t(), LEARNT))

    def nearest(self, learner: Learner, similarity: str) -> str:
        """(B, K) -> int64 (B, k): the entries that the learner selects."""
        if isinstance(learner, L2P):
            return self.g.ops("TopK", 2, similarity, self.g.shape(TOP), axis=1)[1]
        return self.g.op("ArgMax", similarity, axis=1, keepdims=1)

    def gathered(self, name: str, chosen: str, tables: tuple[Tensor, Tensor]) -> Pair:
        """Of key rows and value rows of all entries, (K, n, D) each, those of the chosen ones."""
        g = self.g
        parts = []
        for what, rows in zip(("keys", "values"), tables, strict=True):
            found = g.op("Gather", g.constant(f"{name}.{what}", rows.flatten(1), LEARNT), chosen, axis=0)
            selected = TOP if isinstance(self.student.learner, L2P) else 1
            parts.append(g.reshape(found, -1, selected * rows.shape[1], self.width))
        return parts[0], parts[1]

    def coda_weights(self, name: str, learner: CODAPrompt, blocks: tuple[int, ...], index: int, query: str) -> str:
        """cos(q * A_k, K_k) = (q . (A_k * n(K_k))) / sqrt(q^2 . A_k^2): (B, K) of one block.

        With one query for all `blocks` both products are done once for all of them.
        """
        g, used = self.g, learner.components()
        together = blocks if not self.student.one_pass else (index,)
        if f"{name}.{index}" not in self._coda:
            attention = torch.cat([learner.attention[str(b)][:used] for b in together]).detach().double()
            key = torch.cat([learner.key[str(b)][:used] for b in together]).detach().double()
            unit = key / key.norm(dim=1, keepdim=True).clamp_min(1e-8)
            title = name if len(together) > 1 else f"{name}.{index}"
            product = g.op("MatMul", query, g.constant(f"{title}.key", (attention * unit).t(), LEARNT))
            squares = g.constant(f"{title}.square", (attention**2).t(), LEARNT)
            square = g.op("MatMul", g.op("Mul", query, query), squares)
            length = g.op("Max", g.op("Sqrt", square), g.constant("tiny", np.array(1e-8), LEARNT))
            weights = g.op("Div", product, length)
            each = [weights]
            if len(together) > 1:
                each = g.ops("Split", len(together), weights, axis=1, num_outputs=len(together))
            self._coda |= {f"{name}.{b}": w for b, w in zip(together, each, strict=True)}
        return self._coda[f"{name}.{index}"]

    # -- the teacher's, mapped ----------------------------------------------------------------------------------------

    def mapped(self, index: int, query: str) -> Pair:
        """The teacher's rows at the student's width: a mapped entry is a constant; CODA's mixture is mapped here."""
        mapped = self.student.mapped
        assert mapped is not None
        if isinstance(mapped.teacher, CODAPrompt):
            return self.mapped_mixture(index, query)
        _, key = entries_of(mapped.teacher, index)
        tables = mapped.table(index)
        assert tables is not None
        if isinstance(mapped.teacher, L2P):
            used = mapped.teacher.learnt_entries()
            tables = tables[0].cpu()[used], tables[1].cpu()[used]
        else:
            tables = tables[0][: len(key)], tables[1][: len(key)]
        # Only the order matters: no need to divide by the query's length.
        chosen = self.nearest(mapped.teacher, self.products(f"mapped.{index}", query, key))
        return self.gathered(f"mapped.{index}", chosen, tables)

    def mapped_mixture(self, index: int, query: str) -> Pair:
        """softmax(Q K^T / sqrt(t)) V of rows x_i = sum_k w_k P_ki, without a product of the teacher's width.

        q_i . k_j is quadratic in w: its coefficients, K^2 for each pair of rows, are constants, and q_i's share in the
        bias of K is the same for every j and falls out of the softmax. 2 * 4^2 K numbers a component instead of the
        16 t that Q and K of its eight rows would take: fewer from t = 2 K on, whatever the width of the teacher.
        """
        g, mapped = self.g, self.student.mapped
        assert mapped is not None and isinstance(mapped.teacher, CODAPrompt)
        blocks = tuple(b for b in mapped.teacher.blocks() if b in mapped.blocks())
        weights = self.coda_weights("mapped", mapped.teacher, blocks, index, query)
        attention, used = mapped.mapping(index), mapped.teacher.components()
        rows = mapped.teacher.prompt[str(index)][:used].detach().double()
        rows = torch.stack(halves(rows), dim=1)  # (K, 2, n, t)
        n, scale = rows.shape[2], rows.shape[3] ** -0.5
        w_query, b_query = (p.detach().double() * scale for p in (attention.query.weight, attention.query.bias))
        w_key, w_value = (layer.weight.detach().double() for layer in (attention.key, attention.value))
        key = rows @ w_key.t()
        quadratic = torch.einsum("ahit,bhjt->abhij", rows @ w_query.t(), key)  # (K, K, 2, n, n)
        linear = (key @ b_query)[:, :, None].expand(-1, -1, n, -1)  # (K, 2, n, n): the same for every i
        name, pairs = f"mapped.{index}", 2 * n * n
        table = g.constant(f"{name}.quadratic", quadratic.reshape(used, used * pairs), LEARNT)
        partial = g.op("Gemm", weights, table, g.constant(f"{name}.linear", linear.reshape(-1), LEARNT))
        partial = g.reshape(partial, -1, used, pairs)
        scores = g.reshape(g.op("MatMul", g.op("Unsqueeze", weights, g.shape(1)), partial), -1, n, n)
        value = (rows @ w_value.t()).flatten(1)  # (K, 2 n D)
        bias = attention.value.bias.detach().repeat(2 * n)
        value_rows = g.reshape(g.linear(f"{name}.value", weights, value.t(), bias, LEARNT), -1, n, self.width)
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), value_rows)  # (2 B, n, D)
        k, v = g.ops("Split", 2, g.reshape(mixed, -1, 2 * n, self.width), axis=1, num_outputs=2)
        return k, v


def entries_of(learner: Learner, block: int) -> tuple[Tensor, Tensor]:
    """Rows (K, n, D) and keys (K, Q) that inference may select in a block of a top-k learner."""
    if isinstance(learner, L2P):
        used = learner.learnt_entries()
        return learner.prompt.detach().cpu()[used], learner.key.detach().cpu()[used]
    if isinstance(learner, DualPrompt):
        count = max(1, learner.learnt)
        return learner.expert[str(block)].detach()[:count], learner.key[str(block)].detach()[:count]
    raise InputError("the learner cannot be exported", got=type(learner).__name__, expected="a known learner")
