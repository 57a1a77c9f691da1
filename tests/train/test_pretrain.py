"""Pre-training on a handful of pictures: it ends in a file, and a stopped run ends in the same one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.train import pretrain as module
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.hybrid import HybridConfig, pretrain_hybrid
from cdl_edge.train.pretrain import ARCHITECTURES, PretrainConfig, pretrain

SPEC = ((6, 4, 2, 0), (8, 3, 2, 1))


@pytest.fixture
def small(monkeypatch):
    """The same code on narrower networks."""
    wide = (*SPEC, (8, 3, 2, 1), (8, 3, 2, 1))
    monkeypatch.setattr(module, "WIDE_STEM", SPEC)
    sizes = {
        "teacher": (16, 2, wide),
        "student": (12, 2, wide),
        "student-plain": (12, 2, ()),
        "teacher-plain": (16, 2, ()),
    }
    monkeypatch.setattr(module, "VITS", sizes)
    monkeypatch.setattr(module, "_convnet", lambda n: module.ConvNet(SPEC, ((8, 1),), n))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    return f"folder:{image_folder(tmp_path_factory.mktemp('photos'), unsplit={'red': 12, 'green': 12})}"


def quiet(line):
    pass


@pytest.mark.slow
def test_the_real_student_trains_and_loads(tmp_path, photos):
    # Sizes as shipped; everything below is narrower.
    out = tmp_path / "s.safetensors"
    said = []
    with told(said.append):
        result = pretrain(PretrainConfig(photos, "student-plain", str(out), epochs=1, batch_size=16))
    got = load_backbone(f"file:{out}")
    assert (got.width, got.depth, got.preprocessing.size) == (96, 12, 64)
    assert result["out"] == str(out) and result["epochs"] == 1 and 0 <= result["val_accuracy"] <= 100
    assert any("epoch 1/1" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["convnet", "student", "student-plain"])
def test_a_stopped_run_ends_in_the_same_file(tmp_path, photos, small, monkeypatch, arch):
    def config(name):
        return PretrainConfig(photos, arch, str(tmp_path / name / "w.safetensors"), epochs=3, batch_size=8)

    whole = pretrain(config("whole"))
    real = module.save_state

    def stop_after_the_second(path, state):
        real(path, state)
        if state.get("epoch") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", stop_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config("stopped"))
    monkeypatch.setattr(module, "save_state", real)
    assert not (tmp_path / "stopped" / "w.safetensors").exists()
    said = []
    torch.manual_seed(99)
    with told(said.append):
        resumed = pretrain(config("stopped"), resume=True)
    assert "resumed after epoch 2" in said
    assert resumed["val_accuracy"] == whole["val_accuracy"] and resumed["epochs"] == 3
    one, two = (load_file(tmp_path / n / "w.safetensors") for n in ("whole", "stopped"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    curves = [json.loads((tmp_path / n / "w.curve.json").read_text())["curve"] for n in ("whole", "stopped")]
    assert [(c["epoch"], c["loss"], c["val_accuracy"]) for c in curves[0]] == [
        (c["epoch"], c["loss"], c["val_accuracy"]) for c in curves[1]
    ]


@pytest.mark.slow
def test_seeds_differ(tmp_path, photos, small):
    files = []
    for seed in (0, 1):
        out = tmp_path / f"{seed}.safetensors"
        pretrain(PretrainConfig(photos, "student-plain", str(out), epochs=1, batch_size=8, seed=seed))
        files.append(load_file(out))
    assert not torch.equal(files[0]["head.weight"], files[1]["head.weight"])


@pytest.mark.slow
def test_what_is_there_is_not_overwritten_without_resume(tmp_path, photos, small):
    config = PretrainConfig(photos, "student-plain", str(tmp_path / "vit.safetensors"), epochs=1, batch_size=8)
    pretrain(config)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(InputError, match="is there already"):
        pretrain(config)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_a_file_of_another_origin_is_not_overwritten_with_resume_either(tmp_path, photos, kind):
    out = tmp_path / "photo.jpg"
    out.write_bytes(b"years of work")
    begin, config = {
        "plain": (pretrain, PretrainConfig(photos, "student-plain", str(out), epochs=1)),
        "hybrid": (pretrain_hybrid, HybridConfig(photos, "hybrid-student", str(out), "none", "none")),
    }[kind]
    with pytest.raises(InputError, match="is there already"):
        begin(config, resume=True)
    assert out.read_bytes() == b"years of work"


@pytest.mark.slow
def test_resume_with_other_options_is_refused(tmp_path, photos, small):
    out = tmp_path / "w.safetensors"
    pretrain(PretrainConfig(photos, "student-plain", str(out), epochs=1, batch_size=8))
    before = out.read_bytes()
    with pytest.raises(InputError, match="from another configuration"):
        pretrain(PretrainConfig(photos, "student-plain", str(out), epochs=2, batch_size=8), resume=True)
    assert out.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "freeze"), [("student", False), ("teacher", False), ("teacher", True)])
def test_learning_from_a_convnet(tmp_path, photos, small, arch, freeze):
    net, out = tmp_path / "net.safetensors", tmp_path / "w.safetensors"
    pretrain(PretrainConfig(photos, "convnet", str(net), epochs=1, batch_size=8))
    config = PretrainConfig(photos, arch, str(out), epochs=2, batch_size=8, distill_from=str(net), freeze_stem=freeze)
    result = pretrain(config)
    got = load_backbone(f"file:{out}")
    assert got.width == (12 if arch == "student" else 16)
    with torch.no_grad():
        assert torch.isfinite(got.model(torch.zeros(1, 3, 64, 64))).all()
    with safe_open(str(out), "pt") as file:
        notes = file.metadata()
    assert notes["trained_on"] == photos and notes["epochs"] == "2"
    assert float(notes["val_accuracy"]) == pytest.approx(result["val_accuracy"], abs=0.006)


@pytest.mark.slow
def test_a_frozen_stem_is_the_convnets(tmp_path, photos, small):
    from cdl_edge.train.backbone import fold_batch_norm
    from cdl_edge.train.checkpoint import load_state

    net, out = tmp_path / "net.safetensors", tmp_path / "w.safetensors"
    pretrain(PretrainConfig(photos, "convnet", str(net), epochs=1, batch_size=8))
    pretrain(
        PretrainConfig(photos, "teacher", str(out), epochs=1, batch_size=8, distill_from=str(net), freeze_stem=True),
    )
    convnet = module._convnet(2)
    convnet.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_state(net)["model"].items()})
    stem = fold_batch_norm(convnet.eval().stem)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stem(x)
        got = load_backbone(f"file:{out}").model.patch_embed.backbone[: len(stem)](x)
    assert (got - expected).abs().max() < 1e-2 * expected.abs().max()


def test_unreadable_images_are_named_and_counted(tmp_path, image_folder, small):
    root = image_folder(tmp_path / "p", train={"red": 6, "green": 6}, val={"red": 2, "green": 2})
    (root / "train" / "red" / "003.png").write_bytes(b"no image")
    said = []
    out = tmp_path / "w.safetensors"
    with told(said.append):
        pretrain(PretrainConfig(f"folder:{root}", "student-plain", str(out), epochs=1, batch_size=8))
    assert any("skipped" in line and "003.png" in line for line in said)
    assert "1 unreadable image(s) skipped" in said


def refused(config, *words):
    with pytest.raises(InputError) as info:
        pretrain(config)
    for word in words:
        assert word in str(info.value), str(info.value)


def test_bad_input(tmp_path, photos, small):
    out = str(tmp_path / "w.safetensors")
    refused(PretrainConfig(photos, "studnet", out), "unknown architecture", "did you mean 'student'?")
    refused(PretrainConfig("folder:/nowhere", "student", out), "no such folder")
    missing = str(tmp_path / "none")
    refused(PretrainConfig(photos, "student", out, distill_from=missing), "no such file", "--arch convnet")
    (tmp_path / "text").write_text("x")
    refused(PretrainConfig(photos, "student", out, distill_from=str(tmp_path / "text")), "not a checkpoint")
    refused(PretrainConfig(photos, "student", out, freeze_stem=True), "--freeze-stem has no stem to keep")
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_teacher_of_other_classes_is_refused(tmp_path, photos, image_folder, small):
    three = f"folder:{image_folder(tmp_path / 'p', unsplit={'a': 4, 'b': 4, 'c': 4})}"
    net = tmp_path / "net.safetensors"
    pretrain(PretrainConfig(three, "convnet", str(net), epochs=1, batch_size=8))
    out = str(tmp_path / "w.safetensors")
    refused(PretrainConfig(photos, "student", out, distill_from=str(net)), "not a convnet for these 2 classes")


def test_a_convnet_is_no_backbone(tmp_path, photos, small):
    net = tmp_path / "net.safetensors"
    pretrain(PretrainConfig(photos, "convnet", str(net), epochs=1, batch_size=8))
    with pytest.raises(InputError, match="metadata is missing"):
        load_backbone(f"file:{net}")


def test_the_names_of_the_architectures():
    assert ARCHITECTURES == ("convnet", "teacher", "student", "teacher-plain", "student-plain")
