"""ViTs of other kinds become plain ones that compute the same; the prompted pass reads them as timm does."""

import pytest
import timm
import torch

from cdl_edge.errors import InputError
from cdl_edge.train.attention import RotaryAttention
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.families import plain_vit, refusal
from cdl_edge.train.loop import train
from cdl_edge.train.student import ModelSpec, PromptedViT, patch_query
from cdl_edge.train.tokens import embed, registers, token_count

SMALL = {"img_size": 32, "patch_size": 8, "depth": 5, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
FAMILIES = {
    "deit3_small_patch16_224": 0,  # LayerScale, class token without a position
    "vit_small_patch14_reg4_dinov2": 4,
    "vit_giant_patch14_dinov2": 0,  # SwiGLU, packed
    "vit_base_patch32_clip_224": 0,  # norm in front, no bias in the patch embedding
    "vit_small_patch16_dinov3": 4,  # rotary, halves, registers, no k bias
    "vit_small_plus_patch16_dinov3": 4,  # and SwiGLU in two layers
    "vit_small_patch16_rope_mixed_224": 0,  # rotary, another table for each block
    "eva02_base_patch16_clip_224": 0,  # rotary, neighbours, norms in attention and MLP
    "vit_pe_core_tiny_patch16_384": 0,
}


def small(name, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **changes}).eval()
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape) * (0.3 if value.ndim < 2 or "token" in key or "pos" in key else 0.2)
        value.data = noise + 1 if "gamma" in key or ("norm" in key and key.endswith("weight")) else noise
    return model.requires_grad_(False)


def images(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_vit_computes_the_same(name):
    model = small(name)
    expected = model.forward_features(images())
    assert refusal(model) is None
    vit = plain_vit(model).eval()
    assert expected.std() > 0.1
    torch.testing.assert_close(vit.forward_features(images()), expected, atol=2e-5, rtol=1e-4)
    student = PromptedViT(vit, ModelSpec("coda", 4, 2, 0)).eval()
    tokens = student.embed(images())
    assert tokens.shape[1] == token_count(vit) == 1 + FAMILIES[name] + 16
    assert registers(vit) == FAMILIES[name]
    torch.testing.assert_close(student.query(tokens), expected[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norms"])
def test_normalised_queries(norm):
    model = small("vit_tiny_patch16_224", qk_norm=norm, scale_attn_norm=norm, scale_mlp_norm=norm)
    expected = model.forward_features(images())[:, 0]
    vit = plain_vit(model)
    torch.testing.assert_close(PromptedViT(vit, ModelSpec("apt", 4, 2, 0)).query(embed(vit, images())), expected)


@pytest.mark.parametrize(
    "name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_another_image_size_is_what_timm_makes_of_it(name):
    model = small(name)
    model.set_input_size(img_size=(48, 48))
    expected = model.forward_features(images(48))
    vit = plain_vit(model)
    torch.testing.assert_close(vit.forward_features(images(48)), expected, atol=2e-5, rtol=1e-4)
    assert token_count(vit) == vit.num_prefix_tokens + 36


def test_only_patches_are_turned():
    attention = plain_vit(small("vit_small_patch16_dinov3")).blocks[2].attn
    assert isinstance(attention, RotaryAttention)
    x = torch.randn(2, 1 + 4 + 16 + 1, 32, generator=torch.Generator().manual_seed(0))
    turned = attention.turn(x)
    assert torch.equal(turned[:, :5], x[:, :5]) and torch.equal(turned[:, -1], x[:, -1])  # KD token last
    assert (turned[:, 5:-1] - x[:, 5:-1]).abs().max() > 0.1
    torch.testing.assert_close(turned.square().sum(-1), x.square().sum(-1))  # a rotation


def test_queries_and_distillers_do_not_see_registers():
    vit = plain_vit(small("vit_small_patch14_reg4_dinov2"))
    student = PromptedViT(vit, ModelSpec("coda", 4, 2, 0, kd=(3, 2), one_pass=True, query_of="patches")).eval()
    tokens = student.embed(images())
    hidden = student(tokens, hidden=True).hidden
    assert {h.shape[1] for h in hidden} == {1 + 16}
    seen = torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1)
    weights = student.learner.at_block(0, patch_query(seen), False).weights
    torch.testing.assert_close(student(tokens).prompt_weights[:, 0], weights)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        (
            "vit_tiny_patch16_224",
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            "without a class token",
        ),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "normalises after pooling"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "RmsNorm"),
        ("vit_tiny_patch16_224", {"act_layer": "hard_swish"}, "Hardswish"),
        ("vit_tiny_patch16_224", {"img_size": (32, 48)}, "4 x 6 patches"),
        ("eva02_tiny_patch14_224", {}, "normalises after pooling"),
    ],
)
def test_what_is_refused(name, changes, word):
    assert word in refusal(small(name, **changes))


def test_image_sizes_that_patches_do_not_divide():
    for size, near in ((100, "96 or 112"), (8, "16 or 32"), (0, "16 or 32")):
        with pytest.raises(InputError, match=f"a multiple of 16 pixels(.|\n)*{near}"):
            load_backbone("builtin:student-v1", size)


@pytest.mark.slow
def test_another_size_of_a_convolutional_stem():
    native, larger = load_backbone("builtin:student-v1"), load_backbone("builtin:student-v1", 96)
    assert (larger.grid, larger.preprocessing.size, larger.preprocessing.resize) == (6, 96, 96)
    assert larger.identity == f"{native.identity} at 96 pixels"
    assert load_backbone("builtin:student-v1", 64).identity == native.identity
    assert torch.isfinite(larger.model(torch.zeros(1, 3, 96, 96))).all()


def test_positions_are_resampled_and_the_view_stays():
    native, smaller = (load_backbone("random:vit_tiny_patch16_224", size) for size in (None, 160))
    kept = smaller.preprocessing
    assert (kept.size, kept.resize) == (160, 177)  # the centre 90 % of an image, as at 224
    expected = timm.layers.resample_abs_pos_embed(native.model.pos_embed, new_size=(10, 10))
    assert torch.equal(smaller.model.pos_embed, expected)


@pytest.mark.slow
def test_blockwise_needs_a_teacher_without_registers(tmp_path, tiny_vit):
    options = {"teacher": "random:vit_small_patch14_reg4_dinov2", "teacher_image_size": 28}
    options |= {"student": tiny_vit(), "distill": "blockwise", "learner": "apt"}
    with pytest.raises(InputError, match="register tokens"):
        train(TrainConfig("digits", str(tmp_path / "run"), **options), quiet=True)
    assert not (tmp_path / "run").exists()
