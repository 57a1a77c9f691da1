"""Weights from where timm's users have them: the hub and its cache, a folder, a file with or without its config."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import save, save_file

from cdl_edge import evaluate, export, predict
from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.loop import train

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 6, "num_heads": 2}
PREPROCESSING = {
    "input_size": [3, 32, 32],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "crop_pct": 0.9,
    "interpolation": "bilinear",
}


def load_hub():
    spec = importlib.util.spec_from_file_location("tests_hub", Path(__file__).parent / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(name=NAME, **changes):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=3, **{**SMALL, **changes})
    for value in model.state_dict().values():
        value.add_(0.1 * torch.randn(value.shape))
    return model.eval()


def config_of(name=NAME, legacy=False, **changes):
    if legacy:
        return {"architecture": name, "num_classes": 3, **PREPROCESSING}
    return {"architecture": name, "num_classes": 3, "model_args": {**SMALL, **changes}, "pretrained_cfg": PREPROCESSING}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def folder(tmp_path, model):
    """As a repository of the hub is downloaded."""
    target = tmp_path / "repository"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config_of()))
    save_file(model.state_dict(), target / "model.safetensors", {"format": "pt"})
    return target


def refused(source, *words, **options):
    with pytest.raises(InputError) as info:
        load_backbone(source, **options)
    for word in words:
        assert word in str(info.value), str(info.value)
    return str(info.value)


def assert_same(backbone, model):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone.model.forward_features(x), model.forward_features(x))


# -- folders and files ------------------------------------------------------------------------------------------------


def test_a_folder(folder, model):
    got = load_backbone(f"local-dir:{folder}")
    assert_same(got, model)
    assert got.identity == "sha256:" + sha256(folder / "model.safetensors")
    assert (got.preprocessing.size, got.preprocessing.resize) == (32, 35)
    assert (got.preprocessing.mean, got.preprocessing.interpolation) == ((0.4, 0.5, 0.6), "bilinear")


def test_a_file_with_its_config_beside_it(folder, model):
    got = load_backbone(f"file:{folder}/model.safetensors")
    assert_same(got, model)
    assert got.preprocessing == load_backbone(f"local-dir:{folder}").preprocessing


@pytest.mark.slow
def test_a_file_and_the_name_of_its_model(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=12)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    got = load_backbone(f"file:{tmp_path}/w.safetensors", architecture="vit_tiny_patch16_224")
    assert torch.equal(got.model.blocks[11].mlp.fc2.weight, model.blocks[11].mlp.fc2.weight)
    assert (got.preprocessing.size, got.preprocessing.resize) == (224, 248)  # timm's own of this model
    file = f"file:{tmp_path}/w.safetensors"
    refused(file, "do not fit vit_small_patch16_224", "size mismatch", architecture="vit_small_patch16_224")
    refused(file, "unknown timm model", "did you mean", architecture="vit_tiny_patch16_225")
    refused(file, "which ViT is it", "--student-arch", "config.json")
    # What is missing must not stay random.
    save_file({k: v for k, v in model.state_dict().items() if k != "blocks.3.mlp.fc2.bias"}, tmp_path / "w.safetensors")
    refused(file, "do not fit", "1 missing: blocks.3.mlp.fc2.bias", architecture="vit_tiny_patch16_224")


def test_an_architecture_is_for_files_that_do_not_say_theirs(folder):
    refused("builtin:student", "says itself which ViT it is", architecture=NAME)
    refused(f"local-dir:{folder}", "says itself which ViT it is", architecture=NAME)


def test_names_that_timm_converts(tmp_path):
    """LayerScale as the DeiT III authors call it, and a model in a `model` prefix of OpenCLIP."""
    model = make_model("deit3_small_patch16_224")
    renamed = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in model.state_dict().items()
    }
    assert set(renamed) != set(model.state_dict())
    (tmp_path / "config.json").write_text(json.dumps(config_of("deit3_small_patch16_224")))
    save_file(renamed, tmp_path / "w.safetensors")
    assert_same(load_backbone(f"file:{tmp_path}/w.safetensors"), model)
    prefixed = {f"visual.trunk.{k}": v for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(prefixed, tmp_path / "w.safetensors")
    assert_same(load_backbone(f"file:{tmp_path}/w.safetensors"), model)


def test_a_config_of_older_versions(folder, model):
    # One level, no model_args: the sizes are those of the architecture.
    (folder / "config.json").write_text(json.dumps(config_of(legacy=True)))
    refused(f"local-dir:{folder}", "the tensors do not fit vit_tiny_patch16_224", "size mismatch")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["damaged"]),
        ("[1]", ["not a config of timm"]),
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', ["one of transformers", "hf-hub:timm/"]),
        ('{"architecture": "vit_tiny_patch16_223"}', ["unknown timm model", NAME]),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"depht": 3}}', ["timm cannot build", "depht"]),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": 3}', ["damaged"]),
        ('{"architecture": "vit_tiny_patch16_224", "input_size": [3, 224, 192]}', ["not for square images"]),
    ],
)
def test_configs_that_are_none(folder, content, words):
    (folder / "config.json").write_text(content)
    refused(f"local-dir:{folder}", *words)


def test_folders_that_are_none(tmp_path, folder):
    refused(f"local-dir:{tmp_path}/none", "no such folder")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert load_backbone(f"local-dir:{folder}").depth == 6  # one file of another name is the weights
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    refused(f"local-dir:{folder}", "which weights", "a.safetensors, b.safetensors")


@pytest.mark.slow
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path, model, folder, monkeypatch):
    import shlex
    import subprocess
    import sys

    pickle = tmp_path / "w.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, pickle)
    text = refused(f"file:{pickle}", "not a safetensors file", "a pickle, which can run programs", "weights_only=True")
    command = shlex.split(text.split("do:")[1].strip())
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    assert_same(load_backbone(f"file:{tmp_path}/w.safetensors"), model)
    (folder / "model.safetensors").unlink()
    pickle.rename(folder / "pytorch_model.bin")
    refused(f"local-dir:{folder}", "no weights that can be read", "pytorch_model.bin", "weights_only=True")


def test_damaged_weights(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    refused(f"local-dir:{folder}", "not a safetensors file")
    path.write_bytes(b"<html>not found</html>")
    refused(f"file:{path}", "not a safetensors file", "download it again")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path, model):
    """A hub with org/tiny, as HF_ENDPOINT would name it, and an empty cache."""
    server = load_hub().Hub()
    server.repositories["org/tiny"] = {
        "config.json": json.dumps(config_of()).encode(),
        "model.safetensors": save(model.state_dict(), {"format": "pt"}),
    }
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 0.2,
        "HF_HUB_DOWNLOAD_TIMEOUT": 0.2,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # Where nothing is in the cache huggingface_hub asks again, six times, with a time-out of its own of a minute.
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.2, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    yield server
    server.close()


def test_from_the_hub_then_from_its_cache_then_without_a_network(hub, model, monkeypatch):
    first = load_backbone("hf-hub:org/tiny")
    assert_same(first, model)
    assert first.preprocessing.mean == (0.4, 0.5, 0.6)
    fetched = [path for kind, path in hub.requests if kind == "GET" and not path.startswith("/api/agent")]
    assert fetched == ["/org/tiny/resolve/main/config.json", "/cdn/org/tiny/model.safetensors"]  # a redirect on the way
    hub.requests.clear()
    assert load_backbone("hf-hub:org/tiny").identity == first.identity
    assert [path for kind, path in hub.requests if kind == "GET" and not path.startswith("/api/agent")] == []
    assert load_backbone("hf-hub:org/tiny@main").identity == first.identity
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load_backbone("hf-hub:org/tiny").identity == first.identity
    assert hub.requests == []
    refused("hf-hub:org/other", "could not be fetched", "HF_HUB_OFFLINE is set")


@pytest.mark.slow
def test_a_network_that_is_gone_is_no_harm_once_it_is_cached(hub):
    first = load_backbone("hf-hub:org/tiny")
    hub.close()
    assert load_backbone("hf-hub:org/tiny").identity == first.identity
    refused("hf-hub:org/other", "could not be fetched", "check the network", "HF_ENDPOINT", hub.url)


@pytest.mark.slow
def test_a_full_tag_from_the_hub(hub):
    tag = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model(NAME, depth=12)
    hub.repositories[f"timm/{tag}"] = {"model.safetensors": save(model.state_dict())}
    got = load_backbone(tag)
    assert got.identity == tag  # as runs of earlier versions have it
    assert torch.equal(got.model.blocks[11].mlp.fc2.weight, model.blocks[11].mlp.fc2.weight)
    assert got.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_what_the_hub_may_answer(hub):
    files = hub.repositories["org/tiny"]
    for name in ("refused", "gated", "slow", "broken"):
        hub.repositories[f"org/{name}"], hub.behave[f"org/{name}"] = files, name
    hub.repositories["org/pickle"] = {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x02."}
    hub.repositories["org/empty"] = {"model.safetensors": files["model.safetensors"]}
    refused("hf-hub:org/none", "could not be fetched", "check the name", "HF_TOKEN")
    refused("hf-hub:org/refused", "could not be fetched", "401", "HF_TOKEN")
    refused("hf-hub:org/gated", "could not be fetched", "gated", "HF_TOKEN")
    refused("hf-hub:org/empty", "no config.json")
    refused("hf-hub:org/pickle", "no safetensors file", "weights_only=True")
    refused("hf-hub:org/slow", "could not be fetched", "check the network")
    refused("hf-hub:org/broken", "could not be fetched")
    for name in ("tiny", "a/b/c", "/tiny", ""):
        refused(f"hf-hub:{name}", "hf-hub:ORG/NAME")
    hub.behave.pop("org/broken")  # what was half there is not taken for the whole
    assert load_backbone("hf-hub:org/broken").depth == 6


def test_weights_of_another_model_on_the_hub(hub):
    hub.repositories["org/other"] = {
        "config.json": json.dumps(config_of(depth=5)).encode(),
        "model.safetensors": hub.repositories["org/tiny"]["model.safetensors"],
    }
    refused("hf-hub:org/other", "do not fit", "too many: blocks.5.")


# -- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "hub", "file"])
def test_from_such_weights_to_an_answer(way, hub, folder, model, tmp_path, photo, short_training, monkeypatch):
    student = {
        "folder": {"student": f"local-dir:{folder}", "image_size": 24},
        "hub": {"student": "hf-hub:org/tiny"},
        "file": {"student": f"file:{folder}/model.safetensors"},
    }[way]
    options = {**short_training, "learner": "l2p", "tasks": 2, "limit_per_class": 4, "batch_size": 16, **student}
    if way == "folder":
        options["teacher_image_size"] = 32
    train(TrainConfig("digits", str(tmp_path / "run"), **options), quiet=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # an export needs the cache only
    result = export(tmp_path / "run", tmp_path / "bundle", images=8)
    assert result["parity"]["max_abs_error"] <= 1e-4
    text = (tmp_path / "bundle" / "manifest.json").read_text()
    assert str(tmp_path) not in text and str(folder) not in text  # a bundle goes out of the house
    manifest = json.loads(text)
    assert manifest["backbone"]["source"].startswith(options["student"].partition(":")[0])
    side = 24 if way == "folder" else 32
    assert manifest["input"]["shape"] == [1, side, side, 3]
    assert manifest["backbone"]["identity"].startswith("sha256:")
    assert manifest["backbone"]["identity"].endswith(" at 24 pixels") == (way == "folder")
    assert manifest["training"]["config"]["image_size"] == (24 if way == "folder" else None)
    answer = predict(tmp_path / "bundle", [photo(tmp_path / "a.png", 1)])
    assert answer["predictions"][0]["label"] in manifest["classes"]
    assert evaluate(tmp_path / "bundle", "digits")["images"] > 0
    if way == "file":
        (folder / "model.safetensors").write_bytes(save(make_model(embed_dim=16).half().float().state_dict()))
        with pytest.raises(InputError, match="trained on another backbone"):
            export(tmp_path / "run", tmp_path / "again")
