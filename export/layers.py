"""Layers that only some ViTs have: other activations, gated MLPs, norms of queries and keys, rotary positions."""

from __future__ import annotations

import numpy as np
from timm.layers import GELUTanh, GluMlp, QuickGELU
from torch import nn

from ..errors import InputError
from ..train.attention import RotaryAttention
from .nodes import FROZEN, Graph

QUICK = 1.702
"x sigmoid(1.702 x): QuickGELU, as CLIP was trained"


def activation(g: Graph, x: str, mlp: nn.Module) -> str:
    """What an MLP does between its two linear layers. (M, H) -> (M, H), or (M, H / 2) of a gated one."""
    if not isinstance(mlp, GluMlp):
        return _pointwise(g, x, mlp.act)  # type: ignore[arg-type]
    half = mlp.fc2.in_features
    gate, other = g.split(x, [half, half], axis=1)
    return g.op("Mul", _pointwise(g, gate, mlp.act), other)


def _pointwise(g: Graph, x: str, layer: nn.Module) -> str:
    if isinstance(layer, GELUTanh) or (isinstance(layer, nn.GELU) and layer.approximate == "tanh"):
        return _gelu_tanh(g, x)
    if isinstance(layer, nn.GELU):
        return g.gelu(x)
    if isinstance(layer, QuickGELU):
        return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, g.weight("gelu.quick", np.array(QUICK), ""))))
    if isinstance(layer, nn.SiLU):
        return g.op("Mul", x, g.op("Sigmoid", x))
    raise InputError("an activation cannot be exported", got=type(layer).__name__)


def _gelu_tanh(g: Graph, x: str) -> str:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if g.profile.gelu:
        return g.op("Gelu", x, approximate="tanh")
    cubic, root, half, one = (
        g.weight(f"gelu.{n}", np.array(v), "")
        for n, v in (("cubic", 0.044715), ("tanh", (2 / np.pi) ** 0.5), ("half", 0.5), ("one", 1.0))
    )
    # x (1 + 0.044715 x^2) instead of x + 0.044715 x^3: no x^3 that could leave fp16's range.
    inner = g.op("Add", g.op("Mul", g.op("Mul", x, x), cubic), one)
    inner = g.op("Tanh", g.op("Mul", g.op("Mul", x, root), inner))
    return g.op("Mul", g.op("Mul", x, half), g.op("Add", inner, one))


def head_norm(g: Graph, name: str, x: str, norm: nn.Module, heads: int) -> str:
    """LayerNorm of each head's channels, (B, n, D) -> (B, n, D); no norm: x itself."""
    if not isinstance(norm, nn.LayerNorm):
        return x
    size = norm.normalized_shape[0]
    x = g.compute(g.norm(name, g.reshape(x, 0, 0, heads, size), norm))
    return g.reshape(x, 0, 0, heads * size)


def turned(g: Graph, name: str, x: str, attention: RotaryAttention, count: int) -> str:
    """(B, count, D) queries or keys, the patches among them turned; see train.attention.RotaryAttention.

    name: of the tables, which blocks share that turn alike.
    """
    heads, (patches, width) = attention.num_heads, attention.rope_cos.shape
    start = attention.prefix
    parts = [start, patches, count - start - patches]
    cut = g.split(x, parts if parts[2] else parts[:2], axis=1)
    middle = g.reshape(cut[1], -1, patches, heads, 2, width // heads // 2)
    first, second = g.split(middle, [1, 1], axis=3)
    swapped = g.reshape(g.op("Concat", second, first, axis=3), -1, patches, width)
    tables = (("cos", attention.rope_cos), ("sin", attention.rope_sin))
    cos, sin = (g.weight(f"{name}.{k}", t, FROZEN) for k, t in tables)
    both = g.op("Add", g.op("Mul", cut[1], cos), g.op("Mul", swapped, sin))
    return g.op("Concat", cut[0], both, *cut[2:], axis=1)
