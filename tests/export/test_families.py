"""ViTs with other parts: LayerScale, registers, norms in front, gated MLPs, normalised queries, rotary positions."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from cdl_edge.export.profiles import PROFILES
from cdl_edge.export.student_graph import LAST_TOKENS
from cdl_edge.train.closed_form import StatisticsHead
from cdl_edge.train.families import plain_vit

TOLERANCE = 1e-4
FAMILIES = {
    "LayerScale, deit3": ("deit3_small_patch16_224", {}),
    "registers, DINOv2": ("vit_small_patch14_reg4_dinov2", {}),
    "packed SwiGLU, DINOv2": ("vit_giant_patch14_dinov2", {}),
    "norm in front, CLIP": ("vit_base_patch32_clip_224", {}),
    "QuickGELU": ("vit_base_patch32_clip_quickgelu_224", {}),
    "tanh GELU": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norms inside": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "no bias behind attention": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "RoPE, DINOv3": ("vit_small_patch16_dinov3", {}),
    "RoPE, SwiGLU, DINOv3": ("vit_small_plus_patch16_dinov3", {}),
    "RoPE by block": ("vit_small_patch16_rope_mixed_224", {}),
    "RoPE, norms, EVA-02": ("eva02_base_patch16_clip_224", {}),
}
PASSES = [("apt", None, "ort"), ("coda", (12, 6), "ort"), ("coda", (12, 6), "trt10"), ("apt", (12, 6), "trt11")]
PASSES += [("dualprompt", (12, 6), "openvino"), ("l2p", None, "ort")]


@pytest.fixture(scope="module")
def family(lab):
    """name -> a small ViT with parts that matter."""
    made = {}

    def make(name, patch=8):
        if (name, patch) not in made:
            architecture, changes = FAMILIES[name]
            sizes = {"img_size": 32, "patch_size": patch, "depth": 6, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
            made[name, patch] = lab.randomise(plain_vit(timm.create_model(architecture, **{**sizes, **changes})))
        return made[name, patch]

    return make


def assert_equal(lab, student, **options):
    pixels = lab.pixels(3)
    expected, got = lab.truth(student, pixels), lab.export(student, **options).each(pixels)
    assert set(got) == set(expected)
    assert np.ptp(expected["logits"], axis=0).max() > 0.05, "the logits must depend on the image"
    for name, value in expected.items():
        difference = np.abs(got[name] - value)
        assert difference.max() <= TOLERANCE, f"{name}: max {difference.max():.2e}, mean {difference.mean():.2e}"


ONCE = [
    pytest.param(name, *each, marks=[] if i % len(PASSES) == j else pytest.mark.slow)
    for i, name in enumerate(FAMILIES)
    for j, each in enumerate(PASSES)
]
"every family, and every pass: together only in the slow cases"


@pytest.mark.parametrize(("name", "learner", "kd", "profile"), ONCE)
def test_every_family(lab, family, name, learner, kd, profile):
    assert_equal(lab, lab.student(learner, kd, backbone=family(name)), profile=PROFILES[profile])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["registers, DINOv2", "RoPE, DINOv3"])
def test_patches_that_ask_are_without_registers(lab, family, name):
    assert_equal(lab, lab.student("coda", (12, 6), True, query_of="patches", backbone=family(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["registers, DINOv2", "norm in front, CLIP", "q/k norm", "RoPE, DINOv3"])
def test_many_tokens_and_any_batch(lab, family, name):
    """From LAST_TOKENS on the last block makes no keys, where it is linear."""
    vit = family(name, patch=4)
    assert vit.patch_embed.num_patches >= LAST_TOKENS
    assert_equal(lab, lab.student("coda", (12, 6), backbone=vit), batch=None)
    assert_equal(lab, lab.student("apt", (12, 6), backbone=vit))


@pytest.mark.parametrize("head", ["ncm", "ranpac"])
def test_heads_from_statistics_do_not_read_registers(lab, family, head):
    student = lab.student("coda", (12, 6), backbone=family("registers, DINOv2"))
    student.statistics_head = StatisticsHead(head, 32, True, lab.classes)
    weight = student.statistics_head.weight
    weight.normal_(generator=torch.Generator().manual_seed(0)).div_(weight.shape[1] ** 0.5)
    assert_equal(lab, student)


def test_blocks_that_turn_alike_share_their_table(lab, family):
    def tables(name):
        graph, _ = lab.artefact(lab.student("apt", None, backbone=family(name)))
        return len(graph.constants["backbone.bin"])

    one = 4 * 2 * 16 * 32  # bytes of sines and cosines of 16 patches of 32 channels
    assert tables("RoPE by block") - tables("RoPE, DINOv3") > 4 * one
