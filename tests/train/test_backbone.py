"""Backbones: what is written can be read, what cannot be supported is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from torch import nn

from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.images import Preprocessing
from cdl_edge.train.backbone import BUILTIN, Architecture, conv_stem, fold_batch_norm, load_backbone, save_backbone
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.loop import train

STEM = ((6, 4, 2, 0), (8, 3, 2, 1), (8, 3, 1, 1))


def refused(source, *words):
    with pytest.raises(InputError) as info:
        load_backbone(str(source))
    text = str(info.value)
    for word in words:
        assert word in text, text
    assert len(text) < 1500
    return text


def images(side=16):
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))


# -- files ------------------------------------------------------------------------------------------------------------


def test_round_trip_of_a_plain_vit(tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(16, 8, 16, 5, 2, 7)
    model = architecture.build().eval()
    preprocessing = Preprocessing(16, 18, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    path = tmp_path / "w.safetensors"
    save_backbone(path, architecture, model, preprocessing, {"trained_on": "nothing", "val_accuracy": "1.00"})
    got = load_backbone(f"file:{path}")
    assert got.preprocessing == preprocessing
    assert (got.width, got.depth, got.source) == (16, 5, f"file:{path}")
    assert got.identity == "sha256:" + sha256(path)
    with torch.no_grad():
        assert (got.model(images()) - model(images())).abs().max() < 5e-3  # fp16 weights
        assert got.model(images()).shape == (4, 7)  # the head is kept: its accuracy can be measured again
    assert all(t.dtype == torch.float16 for t in read_tensors(path).values())
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    assert metadata["trained_on"] == "nothing" and all(isinstance(v, str) for v in metadata.values())


def trained_batch_norm(stem):
    """Give BatchNorm statistics and scales that matter."""
    generator = torch.Generator().manual_seed(3)
    for layer in stem:
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(generator=generator)
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)


def test_a_folded_stem_is_the_same_function():
    torch.manual_seed(0)
    stem = conv_stem(STEM, batch_norm=True).eval()
    trained_batch_norm(stem)
    folded = fold_batch_norm(stem)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        assert (folded(images()) - stem(images())).abs().max() < 1e-4
    plain = conv_stem(STEM, batch_norm=False)
    plain.load_state_dict(folded.state_dict())  # the keys that a file is read with


def test_round_trip_of_a_stem_with_batch_norm(tmp_path):
    torch.manual_seed(0)
    architecture = Architecture(18, 4, 16, 5, 2, 3, STEM)
    model = architecture.build(batch_norm=True).eval()
    trained_batch_norm(model.patch_embed.backbone)
    path = tmp_path / "w.safetensors"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_backbone(path, architecture, model, Preprocessing(18, 18), {})
    got = load_backbone(f"file:{path}")
    with torch.no_grad():
        x = images(18)
        assert (got.model(x) - model(x)).abs().max() < 2e-3
        patches, expected = got.model.patch_embed(x), model.patch_embed(x)
        assert expected.std() > 0.1 and (patches - expected).abs().max() < 5e-3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key  # saving is not training: the model may be used on
    assert not any(isinstance(m, nn.BatchNorm2d) for m in got.model.modules())


@pytest.mark.parametrize("name", BUILTIN)
def test_the_pair_that_is_shipped(name):
    got = load_backbone(f"builtin:{name}")
    assert got.identity == "sha256:" + sha256(BUILTIN[name])
    side = {"teacher": 160, "student": 128, "student-v1": 64}[name]
    assert got.preprocessing.size == side
    assert not got.model.training
    assert not any(p.requires_grad for p in got.model.parameters())
    with torch.no_grad():
        assert torch.isfinite(got.model(torch.zeros(1, 3, side, side))).all()


@pytest.mark.slow
def test_the_teacher_is_the_larger_one():
    teacher, student = load_backbone("builtin:teacher"), load_backbone("builtin:student")
    assert teacher.width > student.width and teacher.depth == student.depth == 4


def rewrite(source, target, drop=(), tensors=None, **metadata):
    path = source.removeprefix("file:")
    with safe_open(path, "pt") as file:
        kept = {k: v for k, v in file.metadata().items() if k not in drop}
    save_file(tensors or read_tensors(path), target, metadata={**kept, **metadata})
    return f"file:{target}"


def test_metadata_missing(tmp_path, tiny_vit):
    refused(rewrite(tiny_vit(), tmp_path / "a", drop=("depth", "mean")), "metadata is missing", "depth, mean")
    save_file({"w": torch.ones(1)}, tmp_path / "b")
    refused(f"file:{tmp_path}/b", "metadata is missing", "cdl-edge pretrain", "--student-arch")


@pytest.mark.parametrize(
    "change", [{"depth": "six"}, {"stem": "{"}, {"stem": "[1]"}, {"mean": "a,b,c"}, {"resize": ""}, {"mean": "0.5"}]
)
def test_metadata_damaged(tmp_path, tiny_vit, change):
    refused(rewrite(tiny_vit(), tmp_path / "a", **change))


def test_preprocessing_left_out_has_a_default(tmp_path, tiny_vit):
    got = load_backbone(rewrite(tiny_vit(), tmp_path / "a", drop=("resize", "interpolation", "stem")))
    assert (got.preprocessing.resize, got.preprocessing.interpolation) == (16, "bicubic")


def test_tensors_that_do_not_fit(tmp_path, tiny_vit):
    refused(rewrite(tiny_vit(), tmp_path / "a", embed_dim="32"), "do not fit the metadata", "size mismatch")
    tensors = read_tensors(tiny_vit().removeprefix("file:"))
    del tensors["norm.weight"]
    refused(rewrite(tiny_vit(), tmp_path / "b", tensors=tensors), "do not fit", "norm.weight")


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x80\x03}q\x00." * 10)
    refused(f"file:{tmp_path}/a.safetensors", "not a safetensors file")
    (tmp_path / "a.safetensors").write_bytes(b"")
    refused(f"file:{tmp_path}/a.safetensors", "not a safetensors file")
    refused(f"file:{tmp_path}/none.safetensors", "no such file")
    refused(f"file:{tmp_path}", "no such file")
    refused("file:none.safetensors", "no such file", "it is looked for in", "where the run was trained")


def test_a_cut_off_file(tmp_path, tiny_vit):
    content = Path(tiny_vit().removeprefix("file:")).read_bytes()
    (tmp_path / "a").write_bytes(content[:-100])
    refused(f"file:{tmp_path}/a", "not a safetensors file")


# -- names ------------------------------------------------------------------------------------------------------------


def test_unknown_names_with_a_close_match():
    refused("builtin:techer", "unknown builtin backbone", "did you mean 'teacher'?")
    refused("vit_tiny_patch16_223", "unknown timm model", "vit_tiny_patch16_224")
    refused("vit_tiny_patch16_224.augreg", "unknown timm tag", "did you mean 'vit_tiny_patch16_224.augreg_in21k'?")
    refused("student", "unknown timm model")
    refused("", "unknown timm model")


def test_a_name_without_its_tag_lists_the_tags():
    # Trap 9: timm's default tag changes between releases.
    refused("vit_tiny_patch16_224", "the tag is missing", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    refused("deit_tiny_patch16_224", "the tag is missing", "deit_tiny_patch16_224.fb_in1k")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_tiny_patch16_224", None),
        ("vit_small_patch14_reg4_dinov2", None),
        ("deit3_small_patch16_224", None),
        ("vit_base_patch32_clip_224", None),
        ("vit_tiny_r_s16_p8_224", "HybridEmbed"),  # a ViT behind a small ResNet: not exported
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_base_patch16_siglip_224", "without a class token"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("eva02_tiny_patch14_224", "normalises after pooling"),
        ("beit_base_patch16_224", "Beit"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
        ("resnet18", "ResNet"),
    ],
)
def test_what_is_supported(name, part):
    with torch.device("meta"):  # shapes are enough
        if part is None:
            assert load_backbone(f"random:{name}").depth == 12
        else:
            refused(f"random:{name}", "not supported", part, "a plain timm ViT")


@pytest.mark.slow
def test_random_weights_are_the_same_every_time():
    # A run on `random:` is exported by another process.
    torch.manual_seed(1)
    one = load_backbone("random:vit_tiny_patch16_224").model.blocks[3].attn.qkv.weight
    following = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(following, torch.rand(1))  # and nobody's random numbers are spent
    torch.manual_seed(2)
    assert torch.equal(one, load_backbone("random:vit_tiny_patch16_224").model.blocks[3].attn.qkv.weight)


def test_preprocessing_of_a_timm_model_is_its_own():
    got = load_backbone("random:vit_tiny_patch16_224").preprocessing
    assert (got.size, got.resize, got.interpolation) == (224, 248, "bicubic")
    assert (got.mean, got.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # trap 10: AugReg is not trained on raw [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k"])
def test_without_the_hub_there_is_one_message(tag):
    text = refused(tag, "the weights could not be fetched", "check the network", "builtin:student")
    assert len(text.splitlines()) == 3


def test_without_the_hub_nothing_is_written(tmp_path):
    tag = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(InputError, match="could not be fetched"):
        train(TrainConfig("digits", str(tmp_path / "run"), student=tag), quiet=True)
    assert not (tmp_path / "run").exists()


def test_pixels_reach_the_model_as_training_saw_them(backbone):
    # Straight through: uint8, resize, normalise, timm.
    from cdl_edge.train.augment import Normalise

    pixels = np.full((1, 16, 16, 3), 128, dtype=np.uint8)
    x = Normalise(backbone.preprocessing, torch.device("cpu"))(pixels)
    expected = (128 / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.25, 0.3])
    assert np.allclose(x[0, :, 3, 3].numpy(), expected, atol=1e-6)
