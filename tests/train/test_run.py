"""The RUN folder read back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cdl_edge.errors import InputError
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.loop import train
from cdl_edge.train.run import build_model, load_run
from cdl_edge.train.student import LinearHead, NormalisedHead


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(make_config(out, learner="dualprompt", seed=5, alpha=0.25), quiet=True)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refused(path, *words):
    with pytest.raises(InputError) as info:
        load_run(path)
    for word in words:
        assert word in str(info.value), str(info.value)


def test_a_run_comes_back_whole(run):
    got = load_run(run)
    assert got.path == run and got.config.seed == 5
    assert got.metrics.document == json.loads((run / "metrics.json").read_text())
    assert got.student.learner.learnt == 2 and got.student.classes == 10 and got.student.alpha == 0.25
    assert got.student.kd is not None and got.student.two_pass
    assert got.preprocessing == got.backbone.preprocessing
    assert not any(p.requires_grad for p in got.student.parameters()) and not got.student.training
    stored = load_file(run / "student.safetensors")
    assert sum(v.numel() for v in stored.values()) == sum(v.numel() for v in got.student.state_dict().values())


@pytest.mark.slow
def test_the_student_answers_as_it_did_in_training(run, make_config, tmp_path, monkeypatch):
    from cdl_edge.train import loop

    models = {}
    real = loop.save_learnt
    monkeypatch.setattr(loop, "save_learnt", lambda p, m, b: models.update({p.stem: m}) or real(p, m, b))
    train(make_config(tmp_path / "again", learner="coda"), quiet=True)
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    student, loaded = models["student"], load_run(tmp_path / "again").student
    with torch.no_grad():
        assert torch.equal(student.combine(student(tokens)), loaded.combine(loaded(tokens)))


@pytest.mark.slow
def test_a_kd_head_of_another_kind_comes_back(make_config, tmp_path):
    train(make_config(tmp_path / "run", kd_head="normalised"), quiet=True)
    run = load_run(tmp_path / "run")
    assert (type(run.student.head), type(run.student.kd_head)) == (LinearHead, NormalisedHead)
    measured, trained = evaluate_run(tmp_path / "run", "digits"), run.metrics.document["student"]
    assert measured["average_accuracy"] == pytest.approx(trained["average_accuracy"], abs=1e-6)
    with pytest.raises(InputError, match="other options"):
        train(make_config(tmp_path / "run"), resume=True, quiet=True)


@pytest.mark.slow
def test_a_run_from_before_there_was_a_choice_of_kd_head(run, make_config):
    config = json.loads((run / "config.json").read_text())
    del config["kd_head"]
    (run / "config.json").write_text(json.dumps(config))
    student = load_run(run).student
    assert type(student.kd_head) is type(student.head) is LinearHead
    (run / "metrics.json").unlink()  # as stopped just in front of the end
    train(make_config(run, learner="dualprompt", seed=5, alpha=0.25), resume=True, quiet=True)
    again = load_run(run).student
    assert torch.equal(again.kd_head.weight, student.kd_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["apt", "dualprompt"])
def test_a_compat_run_of_before_opens_as_it_was(tmp_path, make_config, backbone, learner):
    """Its heads were those of today's default, its entries were masked, its test images were the backbone's."""
    options = {"learner": learner, "compat": True, "distill": "none"}
    train(make_config(tmp_path / "run", **options, compat_schema=1), quiet=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("compat_schema", "apt_momentum", "exemplars", "retrain_epochs", "pruned"):
        del config[name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    run = load_run(tmp_path / "run")
    assert run.preprocessing.resize == backbone.preprocessing.resize and not run.student.compat
    with pytest.raises(InputError, match="compat_schema"):  # it cannot go on under another meaning
        train(make_config(tmp_path / "run", **options), resume=True, quiet=True)


def test_teacher_and_student_of_one_width_start_apart(backbone):
    config = TrainConfig("digits", "x", distill="kd")
    one = build_model(config, backbone, 10, backbone.width, True)
    two = build_model(config, backbone, 10, backbone.width, False)
    assert not torch.equal(one.head.weight, two.head.weight)
    assert one.kd is None and two.kd is None
    kdp = TrainConfig("digits", "x", distill="kdp", kd_blocks=3, kd_length=4)
    assert build_model(kdp, backbone, 10, backbone.width, True).kd.rows.shape == (2, 4, 16)
    assert build_model(kdp, backbone, 10, backbone.width, False).kd is None  # a teacher learns from labels alone


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "student.safetensors"])
def test_an_unfinished_run(run, name):
    (run / name).unlink()
    refused(run, "not a finished run", f"no {name}", *([] if name == "config.json" else ["--resume"]))


def test_no_run_at_all(tmp_path):
    refused(tmp_path, "not a finished run")
    refused(tmp_path / "none", "not a finished run")


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_damaged_json(run, name):
    (run / name).write_text((run / name).read_text()[:-5])
    refused(run, "damaged run")


def test_a_newer_schema(run):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "schema": 2}))
    refused(run, "newer cdl-edge", "upgrade")


def test_damaged_weights(run):
    path = run / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(run, "student.safetensors", "not a checkpoint")


@pytest.mark.slow
def test_other_backbone_weights(tmp_path, make_config, tiny_vit):
    weights = tmp_path / "w.safetensors"
    shutil.copy(tiny_vit().removeprefix("file:"), weights)
    train(make_config(tmp_path / "run", student=f"file:{weights}", distill="none", epochs=1), quiet=True)
    load_run(tmp_path / "run")
    shutil.copy(tiny_vit(seed=1).removeprefix("file:"), weights)
    refused(tmp_path / "run", "trained on another backbone", str(weights))
    weights.unlink()
    refused(tmp_path / "run", "no such file")
