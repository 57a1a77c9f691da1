"""The student's graph, written by hand: what its eval mode computes, with all that is constant folded.

`rewrites.py` lists the exactness-preserving rewrites, `profiles.py` the dialects. Three graphs come from here: the
whole student, and its two passes apart for a runtime that keeps or is told the selection: "query" (images -> prompt
weights) and "prompted" (images, prompt weights -> logits).

Tokens travel as (B * N, D), so that every linear layer is one Gemm with its bias; extra key and value rows are
concatenated behind those of the tokens.

Measured: onnxruntime 1.31.1, one thread of an EPYC (AVX512), ViT-T/16 at 224, CODA + KDP, batch 1, CPU time of the
thread, medians of 60 interleaved calls, 2026-11-21. MatMul-Softmax-MatMul takes 1.03 of what `Attention` takes
(com.microsoft MultiHeadAttention 1.02, twelve bare blocks); one packed QKV Gemm with Split 1.01 of three Gemms.
"""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from ..errors import InputError
from ..images import Preprocessing
from ..train.attention import RotaryAttention, head_normed, output_norm
from ..train.closed_form import StatisticsHead
from ..train.student import SPREAD_EPS, PromptedViT
from ..train.tokens import pooling, token_count
from .layers import activation, head_norm, turned
from .nodes import FROZEN, LEARNT, Graph, Reads
from .profiles import PROFILES, Profile
from .prompts import PromptRows, Rows
from .rewrites import ALL, LAST_TOKENS, Rewrites
from .selection import Selection
from .stem import Stem


class StudentGraph:
    """Builds one graph from one student."""

    def __init__(
        self,
        student: PromptedViT,
        preprocessing: Preprocessing,
        classes: int,
        batch: int | None,
        profile: Profile = PROFILES["ort"],
        precision: str = "fp32",
        rewrites: Rewrites = ALL,
        features: bool = False,
    ) -> None:
        """classes: learnt so far. batch: images a call, None: any number. precision: key of nodes.TYPES.

        features: whether the student's graph also gives what a head from class statistics reads, see FeatureMap.
        """
        self.student, self.preprocessing, self.classes = student, preprocessing, classes
        self.features = features
        self.rewrites = rewrites
        self.vit = student.backbone
        self.g = Graph(batch, profile, precision)
        self.width = int(self.vit.embed_dim)
        self.depth = len(self.vit.blocks)
        self.prefix, self.tokens = int(self.vit.num_prefix_tokens), token_count(self.vit)
        self.stem = Stem(self.g, self.vit, preprocessing, rewrites.input)

    # -- one block ----------------------------------------------------------------------------------------------------

    def folds_scale(self, index: int) -> bool:
        """Whether the attention scale of a block lies in the weights of Q: not if a norm would take it away again."""
        return self.rewrites.scale and isinstance(self.vit.blocks[index].attn.q_norm, nn.Identity)

    def is_plain(self, index: int) -> bool:
        """Whether scores and answers of a block's attention are linear in its weights."""
        attention = self.vit.blocks[index].attn
        norms = (attention.q_norm, attention.k_norm, output_norm(attention))
        return not isinstance(attention, RotaryAttention) and all(isinstance(n, nn.Identity) for n in norms)

    def qkv_weights(self, index: int) -> tuple[Tensor, Tensor]:
        """(3D, D) and (3D,), with the attention scale in Q where it can lie there."""
        attention = self.vit.blocks[index].attn
        factor = torch.ones(3 * self.width, 1)
        if self.folds_scale(index):
            factor[: self.width] = attention.scale
        bias = attention.qkv.bias if attention.qkv.bias is not None else torch.zeros(3 * self.width)
        return attention.qkv.weight * factor, bias * factor[:, 0]

    def scaled(
        self, name: str, x: str, layer: nn.Linear, scale: nn.Module, few: bool, shift: Tensor | None = None
    ) -> str:
        """A linear layer and the layer scale behind it, where there is one.

        few: x has the rows that the last block answers for. shift: what its input lacks, (in,).
        """
        reads = Reads(name, few)
        gamma = getattr(scale, "gamma", None)
        weight = layer.weight
        lacking = (weight.double() @ shift.double()).float() if shift is not None else 0
        bias = (layer.bias if layer.bias is not None else torch.zeros(len(weight))) + lacking
        if gamma is None or not self.rewrites.scale:
            x = self.g.linear(name, x, weight, bias, reads)
            return x if gamma is None else self.g.op("Mul", x, self.g.weight(f"{name}.gamma", gamma, FROZEN))
        return self.g.linear(name, x, weight * gamma[:, None], bias * gamma, reads)

    def pick(self, x: str, count: int, rows: list[int]) -> str:
        """Pick the same tokens of each image: (B * count, D) -> (B * len(rows), D)."""
        x = self.g.reshape(x, -1, count, self.width)
        return self.g.reshape(self.g.concat([self.g.slice(x, r, r + 1, 1) for r in rows], axis=1), -1, self.width)

    def own_query(self, x: str, count: int) -> str:
        """(B * count, D) -> (B, D): what a block asks with when there is no query pass; see train.student.OWN_QUERY."""
        if self.student.query_of == "class":
            return self.pick(x, count, [0])
        g = self.g
        patches = g.slice(g.reshape(g.single(x), -1, count, self.width), self.prefix, self.tokens, 1)
        mean = g.op("ReduceMean", patches, g.indices(1), keepdims=1)
        away = g.op("Sub", patches, mean)
        variance = g.op("ReduceMean", g.op("Mul", away, away), g.indices(1), keepdims=1)
        spread = g.op("Sqrt", g.op("Add", variance, g.constant("query.eps", torch.tensor(SPREAD_EPS), "")))
        scale, shift = (g.constant(f"query.{k}", torch.full([self.width], v), "") for k, v in (("w", 1.0), ("b", 0.0)))
        parts = [g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=1e-5) for x in (mean, spread)]
        return g.reshape(g.op("Add", *parts), -1, self.width)

    def normed(self, index: int, x: str) -> str:
        """Apply the first LayerNorm of a block."""
        return self.g.compute(self.g.norm(f"blocks.{index}.norm1", x, self.vit.blocks[index].norm1))

    def qkv(
        self, index: int, x: str, count: int, keep: list[int] | None = None, computed_in: str | None = None
    ) -> tuple[str, ...]:
        """LayerNorm of (B * count, D), then Q, K and V, (B, count, D) each; Q only of the rows in `keep`.

        computed_in: the pass whose range x has; None: the one that is built.
        """
        g, width = self.g, self.width
        weight, bias = self.qkv_weights(index)
        h = self.normed(index, x)
        parts = []
        for part, w, b in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            rows, number, few = h, count, part == "q" and keep is not None
            if keep is not None and few:
                rows, number = self.pick(h, count, keep), len(keep)
            reads = Reads(f"blocks.{index}.qkv", few, computed_in)
            rows = g.reshape(g.linear(f"blocks.{index}.{part}", rows, w, b, reads), -1, number, width)
            parts.append(self.ready(index, part, rows, number) if part in "qk" else rows)
        return tuple(parts)

    def ready(self, index: int, part: str, x: str, count: int) -> str:
        """Queries or keys (B, count, D) behind their norm and turned, where the ViT does so."""
        attention = self.vit.blocks[index].attn
        x = head_norm(self.g, f"blocks.{index}.{part}_norm", x, getattr(attention, f"{part}_norm"), attention.num_heads)
        # A choice of rows has no patch among them.
        if isinstance(attention, RotaryAttention) and count >= self.tokens:
            first = self.vit.blocks[0].attn
            alike = torch.equal(first.rope_sin, attention.rope_sin) and torch.equal(first.rope_cos, attention.rope_cos)
            x = turned(self.g, "rope" if alike else f"blocks.{index}.rope", x, attention, count)
        return x

    def first_rows(self, name: str, row: Tensor, count: int) -> str:
        """A row (1, D) for the class token and zeros for the others: (count, D), made by the engine when it loads."""
        mask = self.g.weight(f"cls_mask.{count}", torch.eye(count, 1), "")
        return self.g.op("Mul", mask, self.g.weight(name, row, LEARNT))

    def attend(self, index: int, qkv: tuple[str, ...], count: int, rows: Rows | None, few: bool) -> str:
        """Attention of (B, n, D) each with the extra rows of a block. few: Q has one or two rows."""
        g = self.g
        q, k, v = qkv
        if rows is not None and rows.cls_key is not None and rows.cls_value is not None:
            k = g.op("Add", k, self.first_rows(f"apt.{index}.key", rows.cls_key, count))
            v = g.op("Add", v, self.first_rows(f"apt.{index}.value", rows.cls_value, count))
        if rows is not None and rows.keys:
            k, v = g.op("Concat", k, *rows.keys, axis=1), g.op("Concat", v, *rows.values, axis=1)
        attention = self.vit.blocks[index].attn
        scale = 1.0 if self.folds_scale(index) else float(attention.scale)
        return g.attention(q, k, v, attention.num_heads, self.width, scale, few)

    def last(self, index: int, x: str, count: int, rows: Rows | None, keep: list[int]) -> tuple[str, Tensor]:
        """Attention of a few of (B * count, D) rows without keys and values: (B, len(keep), D), and what it lacks (D,).

        A head's scores are q W_k . h_j + q . b_k. A softmax does not see what all scores share: b_k is taken off the
        extra rows instead of being added to all tokens. Its weights sum to 1: b_v is taken off the extra rows too and
        added once behind, by the bias of the projection.
        """
        g, width, heads = self.g, self.width, self.vit.blocks[index].attn.num_heads
        size, name, asked = width // heads, f"blocks.{index}", len(keep)
        weight, bias = self.qkv_weights(index)
        (w_q, w_k, w_v), (b_q, b_k, b_v) = weight.chunk(3), bias.chunk(3)
        if not self.rewrites.scale:
            w_q, b_q = (t * self.vit.blocks[index].attn.scale for t in (w_q, b_q))
        h = self.normed(index, x)
        q = g.linear(f"{name}.q", self.pick(h, count, keep), w_q, b_q, Reads(f"{name}.qkv", few=True))
        h = g.reshape(h, -1, count, width)
        q = g.heads(g.reshape(q, -1, asked, width), heads, width)  # (B, H, R, D / H)
        w_k = w_k.reshape(1, heads, size, width)
        w_v = w_v.reshape(heads, size, width).transpose(1, 2)[None]
        u = g.reshape(g.op("MatMul", q, g.weight(f"{name}.k.heads", w_k, FROZEN)), -1, heads * asked, width)
        scores = g.op("MatMul", u, g.op("Transpose", h, perm=[0, 2, 1]))
        scores = g.reshape(scores, -1, heads, asked, count)
        if rows is not None and rows.cls_key is not None:
            row = g.weight(f"apt.{index}.key.heads", rows.cls_key.reshape(1, heads, size, 1), LEARNT)
            mask = g.weight(f"cls_mask.row.{count}", torch.eye(1, count), "")
            scores = g.op("Add", scores, g.op("Mul", g.op("MatMul", q, row), mask))
        values, parts, sizes = [], [scores], [count]
        # Made whether or not there are extra rows: backbone.bin depends on the backbone only.
        b_key, b_value = (g.weight(f"{name}.{n}.bias", b, FROZEN) for n, b in (("k", b_k), ("v", b_v)))
        extra = zip(rows.keys, rows.values, rows.lengths, strict=True) if rows is not None else ()
        for key, value, length in extra:
            key = g.op("Sub", key, b_key)
            value = g.op("Sub", value, b_value)
            parts.append(g.op("MatMul", q, g.heads(key, heads, width, keys=True)))
            values.append(g.heads(value, heads, width))
            sizes.append(length)
        shares = g.split(g.softmax(g.concat(parts, axis=3)), sizes, axis=3)
        mixed = g.op("MatMul", g.reshape(shares[0], -1, heads * asked, count), h)
        out = g.op("MatMul", g.reshape(mixed, -1, heads, asked, width), g.weight(f"{name}.v.heads", w_v, FROZEN))
        if rows is not None and rows.cls_value is not None:
            row = g.weight(f"apt.{index}.value.heads", rows.cls_value.reshape(1, heads, 1, size), LEARNT)
            out = g.op("Add", out, g.op("Mul", g.slice(shares[0], 0, 1, 3), row))
        for share, value in zip(shares[1:], values, strict=True):
            out = g.op("Add", out, g.op("MatMul", share, value))
        return g.reshape(g.op("Transpose", out, perm=[0, 2, 1, 3]), -1, asked, width), b_v

    def block(
        self, index: int, x: str, count: int, rows: Rows | None, keep: list[int] | None, qkv: tuple[str, ...] | None
    ) -> str:
        """One block of (B * count, D) tokens -> the same, or the rows in `keep`. qkv: what `qkv` gave, if shared."""
        g, block, width = self.g, self.vit.blocks[index], self.width
        name, shift = f"blocks.{index}", None
        read = keep if self.rewrites.last_rows else None
        few = read is not None
        products = self.rewrites.last_products and self.tokens >= LAST_TOKENS and self.is_plain(index)
        if qkv is None and read is not None and products:
            mixed, shift = self.last(index, x, count, rows, read)
        else:
            mixed = self.attend(index, qkv or self.qkv(index, x, count, read), count, rows, few)
        if read is not None:
            x = self.pick(x, count, read)
        mixed = self.maybe_norm(f"{name}.attn_norm", g.reshape(mixed, -1, width), output_norm(block.attn))
        x = g.op("Add", x, self.scaled(f"{name}.proj", mixed, block.attn.proj, block.ls1, few, shift))
        h = g.compute(g.norm(f"{name}.norm2", x, block.norm2))
        fc1, reads = block.mlp.fc1, Reads(f"{name}.fc1", few)
        h = activation(g, g.linear(f"{name}.fc1", h, fc1.weight, fc1.bias, reads), block.mlp)
        h = self.maybe_norm(f"{name}.mlp_norm", h, block.mlp.norm)
        x = g.op("Add", x, self.scaled(f"{name}.fc2", h, block.mlp.fc2, block.ls2, few))
        return x if keep is None or read is not None else self.pick(x, count, keep)

    def maybe_norm(self, name: str, x: str, norm: nn.Module) -> str:
        """Apply a LayerNorm that few ViTs have, in the graph's precision; without one `x` is returned."""
        return self.g.compute(self.g.norm(name, x, norm)) if isinstance(norm, nn.LayerNorm) else x

    def flat(self, x: str) -> str:
        """Reshape tokens (B, N, D) to (B * N, D)."""
        return self.g.reshape(x, -1, self.width)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def build(self, part: str = "student") -> Graph:
        """Nodes from the inputs to the outputs of "student", "query" or "prompted"."""
        g, student = self.g, self.student
        if part != "student" and not student.two_pass:
            raise InputError(f"there is no {part} graph", got="a student of one pass", expected="a two-pass learner")
        size = self.preprocessing.size
        g.input("images", TensorProto.UINT8, size, size, 3)
        selection = Selection(g, self.rewrites, given=part == "prompted", one_query=not student.one_pass)
        prompts = PromptRows(g, student, selection)
        g.scope = "query" if student.two_pass and part != "prompted" else "prompted"
        tokens = self.stem.tokens()
        # Both passes of a two-pass student read the same tokens here: the range is the query pass's in either graph.
        pass_of = "query" if student.two_pass else None
        shared = self.qkv(0, self.flat(tokens), self.tokens, computed_in=pass_of) if self.depth > 1 else None
        query = None
        if student.two_pass and part != "prompted":
            x = self.flat(tokens)
            for i in range(self.depth):
                x = self.block(
                    i, x, self.tokens, None, [0] if i == self.depth - 1 else None, shared if i == 0 else None
                )
            query = g.norm("norm", x, self.vit.norm)
            g.scope = "prompted"
            if not self.rewrites.shared_stem:
                tokens, shared = self.stem.tokens(), None
        if part == "query":
            for pool in prompts.pools.values():
                g.output(f"{pool.name}_weights", selection.stacked(pool, query), len(pool.blocks), len(pool.learnt))
            return g
        weights = self.prompted(tokens, shared, query, prompts)
        if weights and part == "student":
            pool = prompts.pools["prompt"]
            g.output("prompt_weights", selection.joined(weights), len(weights), len(pool.learnt))
        return g

    def prompted(
        self, tokens: str, shared: tuple[str, ...] | None, query: str | None, prompts: PromptRows
    ) -> list[str]:
        """The prompted pass to `logits`; returns the weights (B, K) of each block that has some."""
        g, student, count = self.g, self.student, self.tokens
        x, qkv, weights = tokens, shared, []
        if student.kd is not None:
            token = student.kd.token.detach().cpu()
            x = g.op("Concat", x, g.rows("kd.token", token, tokens), axis=1)
            if shared is not None:
                added = (g.rows(f"kd.token.{p}", r, tokens) for p, r in zip("qkv", self.kd_rows(token), strict=True))
                qkv = tuple(g.op("Concat", s, r, axis=1) for s, r in zip(shared, added, strict=True))
            count += 1
        x = self.flat(x)
        read = [0] if student.kd is None else [0, count - 1]
        for i in range(self.depth):
            if student.one_pass and i in student.learner.blocks():
                query = g.single(self.own_query(x, count))
            rows = prompts.at_block(i, query, tokens)
            if i in student.learner.blocks():
                weights.append(prompts.selection.weights(prompts.pools["prompt"], i, query))
            if i == self.depth - 1 and student.statistics_head is not None:
                patches = self.pooled_patches(x, count)
            x = self.block(i, x, count, rows, read if i == self.depth - 1 else None, qkv if i == 0 else None)
        x = g.norm("norm", x, self.vit.norm)
        if student.statistics_head is None:
            self.heads(x, len(read))
        else:
            self.statistics_head(student.statistics_head, x, len(read), patches)
        return weights

    def pooled_patches(self, x: str, count: int) -> str:
        """The normalised patches in front of the last block, see tokens.pooling: (B * count, D) -> (B, 4 D) in fp32."""
        g = self.g
        normed = g.reshape(g.norm("norm", x, self.vit.norm), -1, count, self.width)
        patches = g.slice(normed, self.prefix, self.tokens, 1)
        mixed = g.op("MatMul", g.constant("head.pooling", pooling(self.vit), FROZEN), patches)
        return g.reshape(mixed, -1, 4 * self.width)

    def statistics_head(self, head: StatisticsHead, x: str, rows: int, patches: str) -> None:
        """A head made from class statistics, in fp32: (B * rows, D) and (B, 4 D) -> `logits` (B, C)."""
        g = self.g
        classes = self.classes if self.rewrites.learnt else self.student.classes
        x = g.op("Concat", g.reshape(x, -1, rows * self.width), patches, axis=1)
        if self.features:  # no more than a second name for a value that is computed anyway
            g.output("features", x, head.map.width)
        if head.map.kind == "unit":
            size = g.op("ReduceL2", x, g.indices(1), keepdims=1)
            x = g.op("Div", x, g.op("Max", size, g.constant("head.least", np.array([1e-12]), "")))
        elif head.projection is not None:
            x = g.op("Relu", g.op("MatMul", x, g.constant("head.projection", head.projection, FROZEN)))
        weight = g.constant("head.weight", head.weight[:classes].t(), LEARNT)
        logits = g.op("Gemm", x, weight, g.constant("head.bias", head.bias[:classes], LEARNT))
        if classes > self.classes:
            logits = g.slice(logits, 0, self.classes, 1)
        g.output("logits", logits, self.classes)

    def kd_rows(self, token: Tensor) -> list[Tensor]:
        """Query, key and value (1, 1, D) of the KD token in block 0: constants."""
        weight, bias = self.qkv_weights(0)
        q, k, v = torch.nn.functional.linear(self.vit.blocks[0].norm1(token), weight, bias).chunk(3, dim=2)
        attention = self.vit.blocks[0].attn
        return [head_normed(attention, attention.q_norm, q), head_normed(attention, attention.k_norm, k), v]

    def heads(self, x: str, rows: int) -> None:
        """Add the heads: tokens (B * rows, D) in fp32 -> the output `logits` (B, C) in fp32."""
        g, student = self.g, self.student
        classes = self.classes if self.rewrites.learnt else student.classes
        sides = [(student.head, 1.0)]
        if student.kd_head is not None:
            sides = [(student.head, 1 - student.alpha), (student.kd_head, student.alpha)]
        folded = [head.folded() for head, _ in sides]
        # Rows side by side are one reshape, unless a norm stands in front of one of them.
        apart = not self.rewrites.heads or any(norm is not None for *_, norm in folded)
        parts, weights, biases = [], [], []
        for i, ((weight, bias, norm), (_, share)) in enumerate(zip(folded, sides, strict=True)):
            weights.append(weight[:classes].detach().cpu() * (share if self.rewrites.heads else 1))
            biases.append(bias[:classes].detach().cpu() * (share if self.rewrites.heads else 1))
            part = self.pick(x, rows, [i]) if apart else ""
            if norm is not None:
                scale, shift = (
                    g.constant(f"head.{i}.norm.{k}", t, LEARNT) for k, t in zip(("w", "b"), norm[:2], strict=True)
                )
                part = g.op("LayerNormalization", part, scale, shift, axis=-1, epsilon=norm[2])
            parts.append(part)
        if self.rewrites.heads:
            x = g.concat(parts, axis=1) if apart else g.reshape(x, -1, rows * self.width)
            weight = g.constant("head.weight", torch.cat(weights, dim=1).t(), LEARNT)
            logits = g.op("Gemm", x, weight, g.constant("head.bias", torch.stack(biases).sum(0), LEARNT))
        else:
            answers = []
            for i, (part, weight, bias) in enumerate(zip(parts, weights, biases, strict=True)):
                constants = [
                    g.constant(f"head.{i}.{k}", t, LEARNT) for k, t in (("weight", weight.t()), ("bias", bias))
                ]
                answer = g.op("Gemm", part, *constants)
                answers.append(g.op("Mul", answer, g.constant(f"head.{i}.share", torch.tensor(sides[i][1]), LEARNT)))
            logits = answers[0] if len(answers) == 1 else g.op("Add", *answers)
        if classes > self.classes:
            logits = g.slice(logits, 0, self.classes, 1)
        g.output("logits", logits, self.classes)
