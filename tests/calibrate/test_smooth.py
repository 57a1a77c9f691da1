"""Factors of channels behind a LayerNorm: the formula, shared by both passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cdl_edge.calibrate.smooth import smoothing
from cdl_edge.ranges import TensorRange


@pytest.mark.slow
def test_the_formula(tools):
    """s_j = a_j^t / w_j^(1 - t), over its geometric mean; a over both passes, w over Q, K and V."""
    graphs = tools.make("coda")
    weights = tools.constants(graphs.path())
    for strength in (0.0, 0.3, 1.0):
        found = smoothing(graphs.graph(), graphs.ranges, strength)
        assert found.strength == strength
        for unit, names in (("blocks.2.qkv", "qkv"), ("blocks.3.fc1", ["fc1"])):
            block = unit.rpartition(".")[0]
            channels = [graphs.ranges[f"{scope}.{unit}"].channels for scope in ("query", "prompted")]
            a = np.max([np.abs(c).max(axis=0) for c in channels], axis=0).astype(np.float64)
            w = np.max([np.abs(weights[f"{block}.{n}.weight"]).max(axis=1) for n in names], axis=0)
            expected = a**strength / w.astype(np.float64) ** (1 - strength)
            expected /= np.exp(np.log(expected).mean())
            assert found.factors[unit] == pytest.approx(expected, rel=1e-5), unit


def test_only_what_stands_behind_a_layer_norm(tools):
    found = smoothing(tools.make("coda").graph(), tools.make("coda").ranges, 0.5)
    assert {u.rpartition(".")[2] for u in found.factors} == {"qkv", "fc1"}
    for factor in found.factors.values():
        assert factor.shape == (32,) and (factor > 0).all()
        assert np.log(factor).mean() == pytest.approx(0, abs=1e-9)


def test_the_largest_channel_comes_nearer_to_the_others(tools):
    graphs = tools.make("coda")
    found = smoothing(graphs.graph(), graphs.ranges, 1.0)
    for unit in ("blocks.1.qkv", "blocks.1.fc1"):
        for scope in ("query", "prompted"):
            a = np.abs(graphs.ranges[f"{scope}.{unit}"].channels).max(axis=0)
            both = a / found.factors[unit]
            assert both.max() / np.median(both) < a.max() / np.median(a)


@pytest.mark.slow
def test_dead_channels_and_blocks_without_keys(tools):
    graphs = tools.make("coda", patch=4)
    found = smoothing(graphs.graph(), graphs.ranges, 0.5)
    assert "blocks.5.qkv" not in found.factors  # its K and V are never made
    name = "query.blocks.1.qkv"
    channels = graphs.ranges[name].channels.copy()
    channels[:, 3] = 0
    other = {n: TensorRange(r.histogram, channels if n.endswith("blocks.1.qkv") else r.channels)
             for n, r in graphs.ranges.items()}  # fmt: skip
    factors = smoothing(graphs.graph(), other, 1.0).factors["blocks.1.qkv"]
    assert np.isfinite(factors).all() and (factors > 0).all()
    changed = replace(graphs, ranges=other)
    folder = changed.write(changed.quantise(smooth=1.0))
    assert np.isfinite(tools.run(folder / "student.onnx", {"images": graphs.pixels})["logits"]).all()
