"""What prompts add to a block's attention: constants where possible, otherwise gathered or mixed by their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..train.learners.base import halves
from ..train.student import PromptedViT
from .nodes import LEARNT, Graph
from .selection import PromptPool, Selection

Pair = tuple[str, str, int]
"key rows and value rows, (B, n, D) each, and n"


@dataclass(frozen=True)
class Rows:
    """Extra rows of one block's attention, in the graph's precision."""

    keys: list[str]
    values: list[str]
    lengths: list[int]
    "n of each pair of them"
    cls_key: Tensor | None = None
    "(1, D) added to the class token's key"
    cls_value: Tensor | None = None


class PromptRows:
    """Adds the rows of the student's learner, of the teacher's mapped prompts and of KDP to a graph."""

    def __init__(self, g: Graph, student: PromptedViT, selection: Selection) -> None:
        self.g, self.student, self.selection = g, student, selection
        self.width = int(student.backbone.embed_dim)
        self.pools: dict[str, PromptPool] = {}
        if student.learner.blocks():
            self.pools["prompt"] = PromptPool("prompt", student.learner, student.learner.blocks())
        if student.mapped is not None:
            teacher = student.mapped.teacher
            blocks = tuple(b for b in teacher.blocks() if b in student.mapped.blocks())
            self.pools["mapped"] = PromptPool("mapped", teacher, blocks)

    def at_block(self, index: int, query: str | None, like: str) -> Rows | None:
        """The rows of a block. query: (B, Q) in fp32; like: any value whose first axis is the batch."""
        g, student = self.g, self.student
        learner = student.learner
        pairs: list[Pair] = []
        fixed: list[tuple[Tensor, Tensor]] = []
        cls_key = cls_value = None
        if student.mapped is not None and index in student.mapped.blocks():
            if index in self.pools["mapped"].blocks:
                pairs.append(self.mapped(index, query))
            else:
                general = student.mapped.at_block(index, None)
                assert general is not None
                fixed.append(general)
        if index in learner.blocks():
            pairs.append(self.own(index, query))
        elif (prompt := learner.at_block(index, None, training=False)) is not None:  # the same for all images
            if prompt.keys is not None and prompt.values is not None:
                fixed.append((prompt.keys, prompt.values))
            if prompt.cls_key is not None and prompt.cls_value is not None:
                cls_key, cls_value = (t.detach().cpu()[None] for t in (prompt.cls_key, prompt.cls_value))
        kd = student.kd.at_block(index) if student.kd is not None else None
        if kd is not None and kd[0].shape[1]:
            fixed.append(kd)
        if fixed and self.selection.rewrites.tables:
            keys, values = (torch.cat([pair[i] for pair in fixed], dim=1) for i in range(2))
            names = [g.rows(f"rows.{index}.{n}", t, like) for n, t in (("keys", keys), ("values", values))]
            pairs.append((names[0], names[1], keys.shape[1]))
        elif fixed:
            for i, pair in enumerate(fixed):
                pairs.append(self.cut(g.rows(f"rows.{index}.{i}", torch.cat(pair, dim=1), like), pair[0].shape[1]))
        if not pairs and cls_key is None:
            return None
        keys_of, values_of, lengths = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [], [])
        return Rows(keys_of, values_of, lengths, cls_key, cls_value)

    def cut(self, rows: str, half: int) -> Pair:
        """Cut prompt rows (B, 2 n, D) into key rows and value rows, (B, n, D) each."""
        return self.g.slice(rows, 0, half, 1), self.g.slice(rows, half, 2 * half, 1), half

    def own(self, index: int, query: str | None) -> Pair:
        """The prompt rows of a block that depend on the query."""
        g, pool = self.g, self.pools["prompt"]
        prompt = pool.rows(index)[self.selection.used(pool)]
        if pool.top is None:
            weights = self.selection.raw(pool, index, query)
            length = prompt.shape[1]
            if self.selection.rewrites.tables:
                tables = [half.flatten(1) for half in halves(prompt)]
                names = ("keys", "values")
                mixed = [
                    g.op("MatMul", weights, g.constant(f"coda.{index}.{name}", table, LEARNT))
                    for name, table in zip(names, tables, strict=True)
                ]
                k, v = (g.compute(g.reshape(m, -1, length // 2, self.width)) for m in mixed)
                return k, v, length // 2
            both = g.op("MatMul", weights, g.constant(f"coda.{index}.prompt", prompt.flatten(1), LEARNT))
            return self.cut(g.compute(g.reshape(both, -1, length, self.width)), length // 2)
        return self.gathered(f"entries.{index}", pool, index, query, halves(prompt))

    def gathered(
        self, name: str, pool: PromptPool, index: int, query: str | None, tables: tuple[Tensor, Tensor]
    ) -> Pair:
        """Of key rows and value rows of all entries, (K, n, D) each, those of the selected ones."""
        g, length = self.g, tables[0].shape[1]
        assert pool.top is not None
        count = pool.top * length
        chosen = self.selection.chosen(pool, index, query)
        if self.selection.rewrites.tables:
            found = [
                g.op("Gather", g.weight(f"{name}.{what}", rows.flatten(1), LEARNT), chosen, axis=0)
                for what, rows in zip(("keys", "values"), tables, strict=True)
            ]
            k, v = (g.reshape(f, -1, count, self.width) for f in found)
            return k, v, count
        both = g.weight(f"{name}.rows", torch.cat(tables, dim=1).flatten(1), LEARNT)
        found_both = g.reshape(g.op("Gather", both, chosen, axis=0), -1, pool.top, 2 * length, self.width)
        k, v = (
            g.reshape(g.slice(found_both, i * length, (i + 1) * length, 2), -1, count, self.width) for i in range(2)
        )
        return k, v, count

    # -- the teacher's, mapped ----------------------------------------------------------------------------------------

    def mapped(self, index: int, query: str | None) -> Pair:
        """The teacher's rows at the student's width: a mapped entry is a constant; CODA's mixture is mapped here."""
        mapped, pool = self.student.mapped, self.pools["mapped"]
        assert mapped is not None
        if pool.top is None:
            return self.mapped_mixture(index, query)
        tables = mapped.table(index)
        assert tables is not None
        used = self.selection.used(pool)
        return self.gathered(
            f"mapped.{index}", pool, index, query, (tables[0].detach().cpu()[used], tables[1].detach().cpu()[used])
        )

    def mapped_mixture(self, index: int, query: str | None) -> Pair:
        """softmax(Q K^T / sqrt(t)) V of rows x_i = sum_k w_k P_ki, without a product of the teacher's width.

        q_i . k_j is quadratic in w: its coefficients, K^2 for each pair of rows, are constants, and q_i's share in the
        bias of K is the same for every j and falls out of the softmax. 2 * 4^2 K numbers a component instead of the
        16 t that Q and K of its eight rows would take: fewer from t = 2 K on, whatever the width of the teacher.
        """
        g, mapped = self.g, self.student.mapped
        assert mapped is not None
        pool = self.pools["mapped"]
        entries = self.selection.used(pool)
        weights = self.selection.raw(pool, index, query)
        attention, used = mapped.mapping(index), len(entries)
        rows = pool.rows(index)[entries].double()
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
        tables = [g.constant(f"{name}.value.{k}", t, LEARNT) for k, t in (("weight", value), ("bias", bias))]
        value_rows = g.reshape(g.op("Gemm", weights, *tables), -1, n, self.width)
        mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), value_rows)  # (2 B, n, D)
        return self.cut(g.compute(g.reshape(mixed, -1, 2 * n, self.width)), n)
