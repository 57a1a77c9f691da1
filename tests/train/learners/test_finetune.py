"""The whole network learns, with every distiller that can, and its run is a run like every other."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from cdl_edge import export
from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError
from cdl_edge.files import sha256
from cdl_edge.runtime import load
from cdl_edge.train import loop
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.learners import LEARNERS
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run
from cdl_edge.train.student import ModelSpec, PromptedViT

ABLE = ("none", "kd", "dkd", "fitnets", "reviewkd", "blockwise", "m2kd")


def make(backbone):
    return PromptedViT(backbone.model, ModelSpec("finetune", 6, 3, seed=0))


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def config(make_config):
    """make(out, **changes): fine-tuning at a rate that the tiny networks survive."""
    return lambda out, **changes: make_config(out, **{"learner": "finetune", "learning_rate": 0.003, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(make_config(out, learner="finetune", distill="m2kd", learning_rate=0.003), quiet=True)
    return out


def test_before_training_it_is_timms_vit(backbone):
    model, x = make(backbone), images()
    assert model.prepare(x) is x
    with torch.no_grad():
        features = backbone.model.forward_features(x)[:, 0]
        assert (model(x).cls_logits - model.head(features)).abs().max() <= 1e-5
        # A frozen part of the way can be run from its tokens, as the block-wise distiller does.
        tokens = model.embed(x)
        for block in model.backbone.blocks[:2]:
            tokens = block(tokens)
        assert (model(tokens, start=2).cls_logits - model(x).cls_logits).abs().max() <= 1e-5


def test_every_weight_but_pretrainings_own_head_learns(backbone):
    model = make(backbone)
    assert any(k.startswith("head.") for k in backbone.model.state_dict())
    names = {k for k, _ in model.named_parameters()}
    expected = {f"network.{k}" for k in backbone.model.state_dict() if not k.startswith("head.")}
    assert names == expected | {"head.weight", "head.bias"}
    assert {id(p) for p in model.trainable()} == {id(p) for p in model.parameters()}
    nn.functional.cross_entropy(model(images(), training=True).cls_logits, torch.arange(4)).backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == []


def test_the_frozen_backbone_is_not_touched(backbone):
    model = make(backbone)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    optimiser = torch.optim.Adam(model.trainable(), lr=0.1)
    model(images(), training=True).cls_logits.sum().backward()
    optimiser.step()
    assert all(torch.equal(v, before[k]) for k, v in backbone.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
    assert model.pretrained is backbone.model and model.backbone is not backbone.model
    assert not torch.equal(model.backbone.pos_embed, backbone.model.pos_embed)


@pytest.mark.quick("kdp")
@pytest.mark.parametrize("distill", DISTILLERS)
def test_it_works_with_every_distiller_or_says_why_not(tmp_path, config, distill):
    if distill not in ABLE:
        with pytest.raises(InputError, match="does not work with --learner finetune: ") as refused:
            config(tmp_path / "run", distill=distill)
        assert "finetune" not in str(refused.value).split("expected")[1]
        return
    metrics = train(config(tmp_path / "run", distill=distill, epochs=1), quiet=True)
    assert np.isfinite(metrics["student"]["loss"]).all()
    assert (metrics["teacher"] is not None) == DISTILLERS[distill].needs_teacher


@pytest.mark.slow
def test_the_teacher_is_a_whole_network_that_stands_still_while_the_student_learns(tmp_path, config, monkeypatch):
    seen = []
    real = loop.Phase.epochs

    def watch(self, *arguments):
        teacher = self.models["teacher"]
        before = [p.clone() for p in teacher.parameters()]
        yield from real(self, *arguments)
        moved = sum(not torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
        gradients = [n for n, m in self.models.items() if any(p.grad is not None for p in m.backbone.parameters())]
        seen.append((self.name, moved > 0, gradients))

    monkeypatch.setattr(loop.Phase, "epochs", watch)
    train(config(tmp_path / "run", distill="blockwise", augment="crop-flip", epochs=1), quiet=True)
    # Nor does it keep gradients of the size of a network when nobody needs them.
    assert seen == [("teacher", True, []), ("student", False, [])] * 2


@pytest.mark.slow
def test_it_learns(tmp_path, config):
    options = {"distill": "none", "tasks": 1, "epochs": 8, "limit_per_class": 20, "learning_rate": 0.1}
    metrics = train(config(tmp_path / "run", **options), quiet=True)
    assert metrics["student"]["average_accuracy"] > 60


@pytest.mark.slow
def test_a_kept_teacher_gives_the_same_student(tmp_path, config):
    options = {"distill": "kd", "teachers": str(tmp_path / "teachers")}
    one = train(config(tmp_path / "one", **options), quiet=True)
    two = train(config(tmp_path / "two", **options), quiet=True)
    assert two["teacher"]["tasks_reused"] == [0, 1]
    assert two["student"]["loss"] == one["student"]["loss"]
    assert two["student"]["matrix"] == one["student"]["matrix"]


def test_a_run_comes_back_whole(finished):
    run = load_run(finished)
    stored = json.loads((finished / "metrics.json").read_text())
    assert run.student.learner.learnt == 2 and not any(p.requires_grad for p in run.student.parameters())
    assert not torch.equal(run.student.backbone.cls_token, run.student.pretrained.cls_token)
    # What it runs on are the run's own weights, and they have the identity of their file.
    assert run.backbone.model is run.student.backbone
    assert run.backbone.identity == "sha256:" + sha256(finished / "student.safetensors")
    assert run.backbone.identity != stored["backbones"]["student"]["identity"]
    evaluated = evaluate_run(finished, "digits")
    assert evaluated["average_accuracy"] == stored["student"]["average_accuracy"]
    assert evaluated["forgetting"] == stored["student"]["forgetting"]


@pytest.mark.slow
def test_other_pretrained_weights_are_refused(tmp_path, make_config, tiny_vit):
    weights = tmp_path / "w.safetensors"
    shutil.copy(tiny_vit().removeprefix("file:"), weights)
    options = {"learner": "finetune", "distill": "none", "epochs": 1, "student": f"file:{weights}"}
    train(make_config(tmp_path / "run", **options), quiet=True)
    shutil.copy(tiny_vit(seed=1).removeprefix("file:"), weights)
    with pytest.raises(InputError, match="trained on another backbone"):
        load_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_its_export_is_equal(finished, tmp_path, dynamic_batch):
    result = export(finished, tmp_path / "bundle", dynamic_batch=dynamic_batch, images=20)
    assert result["parity"]["max_abs_error"] <= 1e-4 and result["parity"]["top1_agreement"] == 100
    stored = json.loads((finished / "metrics.json").read_text())
    assert result["accuracy"]["average_accuracy"] == pytest.approx(stored["student"]["average_accuracy"], abs=1e-9)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["learner"] == "finetune" and manifest["query"] == "none"
    assert manifest["backbone"]["identity"] == load_run(finished).backbone.identity
    run = load_run(finished)
    pixels = load_dataset("digits").val.take(np.arange(4)).decode(run.preprocessing).pixels
    with load(tmp_path / "bundle") as runner:
        got = np.concatenate([runner.infer(pixels[i : i + 1]) for i in range(4)])
    # And it is not the pre-trained network's answer.
    run.student._backbone = (run.student.pretrained,)
    run.student.network = run.student.pretrained
    from cdl_edge.train.augment import Normalise

    x = Normalise(run.preprocessing, torch.device("cpu"))(pixels)
    assert np.abs(run.student(x).cls_logits.detach().numpy() - got).max() > 1e-2


def test_the_interface():
    assert list(LEARNERS) == ["l2p", "dualprompt", "coda", "apt", "finetune", "frozen"]
    assert [n for n, learner in LEARNERS.items() if learner.whole_network] == ["finetune"]
