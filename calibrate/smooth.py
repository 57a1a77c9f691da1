"""Channels behind a LayerNorm, made alike: what is taken from an activation is given to the weights behind it.

x / s by the LayerNorm's own weight and bias, W * s in the Linear: exact in real numbers. s_j = a_j^t / w_j^(1 - t) with
the largest absolute value a_j of channel j and w_j of what multiplies it (SmoothQuant, arXiv 2211.10438; t = 1 is what
RepQ-ViT, arXiv 2212.08254, does, up to its zero points).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from ..ranges import TensorRange
from .constants import read
from .float_graph import FloatGraph

STRENGTHS = (0.5, 0.8)
"what `calibrate` tries by itself where 8 bits fall short without: SmoothQuant's advice, and more"


@dataclass(frozen=True)
class Smoothing:
    """Smoothing factors of a whole bundle."""

    strength: float
    "t of the formula, 0 to 1"
    factors: dict[str, np.ndarray]
    "unit (`blocks.3.qkv`, `blocks.3.fc1`) -> float64 (D,)"


def smoothing(graph: FloatGraph, ranges: Mapping[str, TensorRange], strength: float) -> Smoothing:
    """One factor for query pass and prompted pass: they share the weights. graph: any of the bundle."""
    model = onnx.load(str(graph.path), load_external_data=False)
    weights: dict[str, set[str]] = defaultdict(set)
    for layer in graph.whole:
        weights[layer.unit].add(layer.weight)
    for layer in graph.layers:
        if layer.tokens == "few":
            weights.pop(layer.unit, None)  # something that stays in float reads the LayerNorm too
    initial = {t.name: t for t in model.graph.initializer}
    seen: dict[str, np.ndarray] = {}
    for name, kept in ranges.items():
        if kept.channels is not None:
            unit = name.partition(".")[2]  # behind the pass
            largest = np.abs(kept.channels.astype(np.float64)).max(axis=0)
            seen[unit] = np.maximum(seen.get(unit, 0.0), largest)
    factors = {}
    for unit, activation in seen.items():
        if unit not in weights:
            continue
        values = [read(initial[name], graph.path.parent) for name in sorted(weights[unit])]
        rows = np.abs(np.concatenate(values, axis=1)).max(axis=1)
        activation, rows = np.maximum(activation, 1e-5), np.maximum(rows.astype(np.float64), 1e-5)
        factor = activation**strength / rows ** (1 - strength)
        # A common factor changes nothing: the geometric mean is 1, so that numbers keep their size.
        factors[unit] = factor / np.exp(np.log(factor).mean())
    return Smoothing(strength, factors)
