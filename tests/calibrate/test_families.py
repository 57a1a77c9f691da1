"""8 bits of ViTs with other parts: gated MLPs, registers, rotary positions, norms inside."""

from __future__ import annotations

import numpy as np
import pytest
import timm

from cdl_edge.calibrate.schemes import SCHEMES
from cdl_edge.train.families import plain_vit

SIZES = {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
FAMILIES = {
    "registers, LayerScale": "vit_small_patch14_reg4_dinov2",
    "norm in front": "vit_base_patch32_clip_224",
    "RoPE, gated MLP": "vit_small_plus_patch16_dinov3",
    "norms in attention and MLP": "eva02_base_patch16_clip_224",
}


@pytest.fixture(scope="module")
def graphs(students, tools):
    """name -> Graphs of a small student."""
    made = {}

    def make(name, learner="coda"):
        if (name, learner) not in made:
            vit = plain_vit(timm.create_model(FAMILIES[name], **SIZES))
            students.randomise(vit)
            made[name, learner] = tools.make(learner, backbone=vit.eval().requires_grad_(False))
        return made[name, learner]

    return make


def assert_near(tools, graphs, folder, tolerance=0.15):
    expected, got = (
        tools.run(p, {"images": graphs.pixels})["logits"] for p in (graphs.path(), folder / "student.onnx")
    )
    assert np.isfinite(got).all() and not np.array_equal(got, expected)
    assert np.abs(got - expected).max() <= tolerance * np.ptp(expected), np.abs(got - expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_in_every_scheme(tools, graphs, name, scheme):
    made = graphs(name)
    parts = set(made.whole())
    assert {f"prompted.blocks.2.{p}" for p in ("q", "k", "v", "proj", "fc1", "fc2")} <= parts
    assert_near(tools, made, made.write(made.quantise(scheme)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RoPE, gated MLP", "norms in attention and MLP"])
def test_smoothing_leaves_the_norms_alone_whose_channels_are_not_known(tools, graphs, name):
    made = graphs(name, "apt")
    assert_near(tools, made, made.write(made.quantise(smooth=0.5)))
