"""Pre-training of blocks behind a frozen trunk, on a handful of pictures and random checkpoints."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.train import hybrid as module
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.hybrid import Hybrid, HybridConfig, pretrain_hybrid
from cdl_edge.train.trunk import load_trunk


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of two random networks."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("weights") / f"{seed}.safetensors"
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
        made.append(str(path))
    return made


@pytest.fixture(scope="module")
def opened():
    """`load_trunk` that opens a file once: timm takes half a second for a network, all of them frozen."""
    return functools.cache(load_trunk)


@pytest.fixture(autouse=True)
def small(monkeypatch, opened):
    """The same code at smaller sizes."""
    monkeypatch.setattr(module, "load_trunk", opened)
    monkeypatch.setattr(module, "HYBRIDS", {"hybrid-student": Hybrid("efficientnet_lite0", 64, 16, 2, depth=2)})
    monkeypatch.setattr(module, "ANSWERS", Hybrid("efficientnet_lite0", 40, 0, 0))
    monkeypatch.setattr(module, "CHUNK", 5)


@pytest.fixture
def photos(tmp_path, image_folder):
    return image_folder(tmp_path / "photos", train={"red": 4, "green": 4}, val={"red": 2, "green": 2})


@pytest.fixture
def config(tmp_path, photos, weights):
    def make(name, **options):
        given = {"epochs": 2, "batch_size": 4, "trunk": weights[0], "distill_from": weights[1], **options}
        return HybridConfig(f"folder:{photos}", "hybrid-student", str(tmp_path / name / "w.safetensors"), **given)

    return make


def quiet(line):
    pass


@pytest.mark.slow
def test_it_ends_in_a_backbone_with_that_trunk(config, tmp_path, weights):
    said = []
    with told(said.append):
        made = pretrain_hybrid(config("a"))
    assert "2 classes, 8 train, 4 validation" in said[0]
    assert made["epochs"] == 2 and made["data"]["train"] == 8 and 0 <= made["val_accuracy"] <= 100
    got = load_backbone(f"file:{tmp_path / 'a' / 'w.safetensors'}")
    assert (got.width, got.depth, got.grid, got.preprocessing.size) == (16, 2, 2, 64)
    trunk, _ = load_trunk("efficientnet_lite0", Path(weights[0]))
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    expected = trunk(x)
    assert (got.model.patch_embed.backbone(x) - expected).abs().max() < 0.02 * expected.abs().max()  # kept in fp16


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_file_and_takes_moved_images(config, tmp_path, photos, monkeypatch):
    pretrain_hybrid(config("whole"))
    real = module.save_state

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(module, "save_state", save)
    with pytest.raises(Stopped):
        pretrain_hybrid(config("broken"))
    monkeypatch.setattr(module, "save_state", real)
    (tmp_path / "broken" / "w.checkpoint").stat()
    with pytest.raises(InputError, match="is there already"):
        pretrain_hybrid(config("broken"))
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    said = []
    given = HybridConfig(**{**vars(config("broken")), "data": f"folder:{moved}"})
    with told(said.append):
        pretrain_hybrid(given, resume=True)
    assert "resumed after epoch 1" in said and not any("of 8 images" in line for line in said)  # nothing is made anew
    one, two = (load_file(tmp_path / name / "w.safetensors") for name in ("whole", "broken"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    for changed, words in (
        ({"epochs": 3}, "another configuration"),
        ({"trunk": given.distill_from}, "another configuration"),
    ):
        with pytest.raises(InputError, match=words):
            pretrain_hybrid(HybridConfig(**{**vars(given), **changed}), resume=True)
    Image.new("RGB", (30, 30)).save(moved / "train" / "red" / "000.png")
    with pytest.raises(InputError, match="other pictures of red in training"):
        pretrain_hybrid(given, resume=True)


@pytest.mark.slow
def test_features_that_were_kept_are_not_those_of_other_images(config, tmp_path, photos):
    pretrain_hybrid(config("a", epochs=1))
    (tmp_path / "a" / "w.safetensors").unlink()
    (tmp_path / "a" / "w.checkpoint").unlink()
    rng = np.random.default_rng(0)
    for path in (photos / "train").rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(path)
    pretrain_hybrid(config("a", epochs=1))
    pretrain_hybrid(config("b", epochs=1))
    one, two = (load_file(tmp_path / name / "w.safetensors") for name in "ab")
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.slow
def test_an_unreadable_picture_is_named_each_time(config, photos):
    (photos / "train" / "red" / "broken.png").write_bytes(b"no picture")
    for name in ("a", "a"):
        said = []
        with told(said.append):
            made = pretrain_hybrid(config(name, epochs=1), resume=True)
        assert sum("broken.png" in line for line in said) == 1 and made["data"]["unreadable"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trunk", "distill_from"])
def test_a_wrong_checkpoint_is_one_message(config, tmp_path, which):
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.ones(3)}, wrong)
    with pytest.raises(InputError, match=r"wrong\.safetensors: not a checkpoint of efficientnet_lite0"):
        pretrain_hybrid(config("a", **{which: str(wrong)}))
    assert not (tmp_path / "a").exists()
