"""The student's graph, written by hand: what its eval mode computes, with all that is constant folded.

Exactness-preserving rewrites: image normalisation in the first convolution, attention scale in Q, layer scale in the
projections; stem, LayerNorm and QKV of block 0 shared by the query pass and the prompted pass; the last block only for
the rows that are read; keys normalised; pools and heads cut to what has been learnt; CODA's cosines as two matrix
products for all blocks; the teacher's entries mapped beforehand; both heads and alpha in one matrix.

Tokens travel as (B * N, D), so that every linear layer is one Gemm with its bias; attention is ONNX `Attention`
(opset 23) on (B, N, D), extra key and value rows are concatenated in front of it.

Measured: onnxruntime 1.31.1, one thread of an EPYC (AVX512), ViT-T/16 at 224, CODA + KDP, batch 1, CPU time of the
thread, medians of 60 interleaved calls, 2026-11-21. MatMul-Softmax-MatMul takes 1.03 of what `Attention` takes
(com.microsoft MultiHeadAttention 1.02, twelve bare blocks); one packed QKV Gemm with Split 1.01 of three Gemms.
"""

from __future__ import annotations

import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from ..errors import InputError
from ..images import Preprocessing
from ..train.student import PromptedViT
from .nodes import FROZEN, LEARNT, Graph
from .prompts import PromptRows, Rows

OPSET = 23


def normalised(layer: nn.Conv2d, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, with x * scale + shift (by channel) in front of them."""
    weight = layer.weight.detach().double()
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros(len(weight), dtype=torch.float64)
    if scale is None or shift is None:
        return weight, bias
    return weight * scale.view(1, 3, 1, 1), bias + torch.einsum("ocij,c->o", weight, shift)


class StudentGraph:
    """Builds one graph from one student."""

    def __init__(self, student: PromptedViT, preprocessing: Preprocessing, classes: int, batch: int | None) -> None:
        self.student, self.preprocessing, self.classes = student, preprocessing, classes
        self.vit = student.backbone
        self.g = Graph(batch)
        self.width = int(self.vit.embed_dim)
        self.tokens = int(self.vit.pos_embed.shape[1])
        self.prompts = PromptRows(self.g, student)

    @property
    def weights(self) -> list[str]:
        """Prompt weights (B, K) of each query-dependent block."""
        return self.prompts.weights

    @property
    def entries(self) -> int:
        """K, learnt entries a block."""
        return self.prompts.entries

    # -- parts of the backbone ----------------------------------------------------------------------------------------

    def stem(self) -> str:
        """uint8 (B, S, S, 3) -> (B, N, D) tokens with positions."""
        g, vit = self.g, self.vit
        embed = vit.patch_embed
        layers = [embed.proj]
        if hasattr(embed, "backbone"):
            if not isinstance(embed.backbone, nn.Sequential):
                raise InputError(
                    "the stem cannot be exported", got=type(embed.backbone).__name__, expected="Sequential"
                )
            layers = [*embed.backbone, embed.proj]
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (self.preprocessing.mean, self.preprocessing.std))
        scale, shift = (1 / (255 * std)), -mean / std
        if len(layers) == 1 and layers[0].stride == layers[0].kernel_size and not any(layers[0].padding):
            x = self.patches(layers[0], scale, shift)
        else:
            x = self.convolutions(layers, scale, shift)
        x = g.op("Add", x, g.constant("pos_embed", vit.pos_embed[:, 1:], FROZEN))
        cls = vit.cls_token + vit.pos_embed[:, :1]
        if g.batch is not None:
            first_row = g.constant("cls_token", cls.expand(g.batch, -1, -1), FROZEN)
        else:
            size = g.op("Concat", g.op("Shape", x, start=0, end=1), g.shape(1, self.width), axis=0)
            first_row = g.op("Expand", g.constant("cls_token", cls, FROZEN), size)
        return g.op("Concat", first_row, x, axis=1)

    def patches(self, layer: nn.Conv2d, scale: Tensor, shift: Tensor) -> str:
        """A plain patch embedding as one Gemm over patches unfolded while they are bytes: (B, N - 1, D)."""
        g, (high, wide) = self.g, layer.kernel_size
        rows, columns = (self.preprocessing.size // s for s in (high, wide))
        x = g.op("Transpose", g.reshape("images", -1, rows, high, columns, wide * 3), perm=[0, 1, 3, 2, 4])
        x = g.op("Cast", g.reshape(x, -1, high * wide * 3), to=TensorProto.FLOAT)
        weight, bias = normalised(layer, scale, shift)
        x = g.linear("stem.0", x, weight.permute(0, 2, 3, 1).flatten(1), bias)
        return g.reshape(x, -1, rows * columns, self.width)

    def convolutions(self, layers: list[nn.Module], scale: Tensor, shift: Tensor) -> str:
        """A convolutional stem: (B, N - 1, D)."""
        g = self.g
        x = g.op("Transpose", g.op("Cast", "images", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU):
                x = g.op("Relu", x)
                continue
            if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or set(layer.dilation) != {1}:
                raise InputError("the stem cannot be exported", got=str(layer), expected="plain Conv2d and ReLU")
            weight, bias = normalised(layer, None, None)
            if i == 0 and any(layer.padding):
                # Padding is zero behind the normalisation: only what multiplies can move into this convolution.
                weight = weight * scale.view(1, 3, 1, 1)
                if torch.any(shift != 0):
                    x = g.op("Add", x, g.constant("input.shift", (shift / scale).view(1, 3, 1, 1), FROZEN))
            elif i == 0:
                weight, bias = normalised(layer, scale, shift)
            x = g.op(
                "Conv",
                x,
                g.constant(f"stem.{i}.weight", weight, FROZEN),
                g.constant(f"stem.{i}.bias", bias, FROZEN),
                kernel_shape=list(layer.kernel_size),
                strides=list(layer.stride),
                pads=[*layer.padding, *layer.padding],
            )
        return g.op("Transpose", g.reshape(x, -1, self.width, self.tokens - 1), perm=[0, 2, 1])

    def qkv_weights(self, index: int) -> tuple[Tensor, Tensor]:
        """(3D, D) and (3D,) with the attention scale in Q."""
        attention = self.vit.blocks[index].attn
        factor = torch.ones(3 * self.width, 1)
        factor[: self.width] = attention.scale
        bias = attention.qkv.bias if attention.qkv.bias is not None else torch.zeros(3 * self.width)
        return attention.qkv.weight * factor, bias * factor[:, 0]

    def block(
        self, index: int, x: str, count: int, rows: Rows | None, keep: list[int] | None, qkv: tuple[str, ...] | None
    ) -> str:
        """One block. x: (B, count, D) -> (B, count, D), or the rows in `keep`. qkv: what `qkv` gave, if shared."""
        g, block, width = self.g, self.vit.blocks[index], self.width
        name = f"blocks.{index}"
        q, k, v = qkv or self.qkv(index, x, count, keep)
        if keep is not None:
            x, count = self.pick(x, keep), len(keep)
        if rows is not None:
            if rows.cls_key is not None and rows.cls_value is not None:
                k, v = g.op("Add", k, rows.cls_key), g.op("Add", v, rows.cls_value)
            if rows.keys:
                k, v = g.op("Concat", k, *rows.keys, axis=1), g.op("Concat", v, *rows.values, axis=1)
        heads = block.attn.num_heads
        mixed = g.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=1.0)
        proj, fc2 = self.scaled(block.attn.proj, block.ls1), self.scaled(block.mlp.fc2, block.ls2)
        flat = g.op("Add", g.reshape(x, -1, width), g.linear(f"{name}.proj", g.reshape(mixed, -1, width), *proj))
        h = g.norm(f"{name}.norm2", flat, block.norm2)
        h = g.op("Gelu", g.linear(f"{name}.fc1", h, block.mlp.fc1.weight, block.mlp.fc1.bias))
        return g.reshape(g.op("Add", flat, g.linear(f"{name}.fc2", h, *fc2)), -1, count, width)

    def qkv(self, index: int, x: str, count: int, keep: list[int] | None = None) -> tuple[str, ...]:
        """LayerNorm, then Q, K and V, (B, count, D) each; Q only of the rows in `keep`."""
        g, width, name = self.g, self.width, f"blocks.{index}"
        weight, bias = self.qkv_weights(index)
        h = g.norm(f"{name}.norm1", g.reshape(x, -1, width), self.vit.blocks[index].norm1)
        parts = []
        for part, w, b in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            rows, number = h, count
            if part == "q" and keep is not None:
                rows, number = g.reshape(self.pick(g.reshape(h, -1, count, width), keep), -1, width), len(keep)
            parts.append(g.reshape(g.linear(f"{name}.{part}", rows, w, b), -1, number, width))
        return tuple(parts)

    @staticmethod
    def scaled(layer: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight and bias with the layer scale behind them, where there is one."""
        gamma = getattr(scale, "gamma", None)
        if gamma is None:
            return layer.weight, layer.bias
        return layer.weight * gamma[:, None], layer.bias * gamma

    def pick(self, x: str, rows: list[int]) -> str:
        """(B, N, D) -> (B, len(rows), D)."""
        g = self.g
        parts = [g.op("Slice", x, g.shape(r), g.shape(r + 1), g.shape(1)) for r in rows]
        return parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=1)

    # -- the whole ----------------------------------------------------------------------------------------------------

    def build(self) -> Graph:
        """Nodes from `images` to `logits` (and `prompt_weights`)."""
        g, student, count = self.g, self.student, self.tokens
        depth = len(self.vit.blocks)
        tokens = self.stem()
        shared = self.qkv(0, tokens, count) if depth > 1 else None
        query = None
        if student.two_pass:
            x = tokens
            for i in range(depth):
                x = self.block(i, x, count, None, [0] if i == depth - 1 else None, shared if i == 0 else None)
            query = g.norm("norm", g.reshape(x, -1, self.width), self.vit.norm)
        x, qkv = tokens, shared
        if student.kd is not None:
            token = student.kd.token.detach().cpu()
            x = g.op("Concat", x, g.rows("kd.token", token, tokens), axis=1)
            if shared is not None:
                weight, bias = self.qkv_weights(0)
                row = torch.nn.functional.linear(self.vit.blocks[0].norm1(token), weight, bias)
                added = (g.rows(f"kd.token.{p}", r, tokens) for p, r in zip("qkv", row.chunk(3, dim=2), strict=True))
                qkv = tuple(g.op("Concat", s, r, axis=1) for s, r in zip(shared, added, strict=True))
            count += 1
        read = [0] if student.kd is None else [0, count - 1]
        for i in range(depth):
            if student.one_pass and i in student.learner.blocks():
                query = g.reshape(self.pick(x, [0]), -1, self.width)
            rows = self.prompts.at_block(i, count, query, tokens)
            x = self.block(i, x, count, rows, read if i == depth - 1 else None, qkv if i == 0 else None)
        self.heads(g.norm("norm", x, self.vit.norm), len(read))
        if self.weights:
            stacked = [g.op("Unsqueeze", w, g.shape(1)) for w in self.weights]
            joined = stacked[0] if len(stacked) == 1 else g.op("Concat", *stacked, axis=1)
            g.nodes.append(helper.make_node("Identity", [joined], ["prompt_weights"], name="prompt_weights"))
        return g

    def heads(self, x: str, rows: int) -> None:
        """(B, rows, D) -> `logits` (B, C)."""
        g, student, classes = self.g, self.student, self.classes
        sides = [(student.head, 1.0)]
        if student.kd_head is not None:
            sides = [(student.head, 1 - student.alpha), (student.kd_head, student.alpha)]
        parts, weights, bias = [], [], torch.zeros(classes)
        for i, (head, share) in enumerate(sides):
            weight, b, norm = head.folded()
            weights.append(share * weight[:classes].detach())
            bias = bias + share * b[:classes].detach().cpu()
            if norm is not None:
                part = self.pick(x, [i])
                scale, shift = (
                    g.constant(f"head.{i}.norm.{k}", t, LEARNT) for k, t in zip(("w", "b"), norm[:2], strict=True)
                )
                parts.append(g.op("LayerNormalization", part, scale, shift, axis=-1, epsilon=norm[2]))
        if parts:
            x = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=1)
        flat = g.reshape(x, -1, rows * self.width)
        g.nodes.append(
            helper.make_node(
                "Gemm",
                [
                    flat,
                    g.constant("head.weight", torch.cat(weights, dim=1).t(), LEARNT),
                    g.constant("head.bias", bias, LEARNT),
                ],
                ["logits"],
                name="logits",
            )
        )
