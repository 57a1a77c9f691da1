"""A finished run learns more: what it knew stays, what is new is learnt, the rest is refused and writes nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError
from cdl_edge.export.export_bundle import _portable
from cdl_edge.log import told
from cdl_edge.ranges import Ranges
from cdl_edge.scored import find_scored
from cdl_edge.train import loop
from cdl_edge.train.augment import Normalise
from cdl_edge.train.checkpoint import load_state, save_state
from cdl_edge.train.evaluate import evaluate_run
from cdl_edge.train.extend import Parent, grown, inherit
from cdl_edge.train.loop import _Training, train
from cdl_edge.train.run import load_run

OLD, NEW = "abcd", "ef"
KINDS = (
    {"learner": "coda"},
    {"learner": "coda", "query": "one-pass"},
    {"learner": "coda", "distill": "cdl-prompt"},
    {"learner": "dualprompt"},
    {"learner": "dualprompt", "distill": "cdl-prompt"},
    {"learner": "dualprompt", "query": "one-pass", "distill": "none"},
    {"learner": "l2p"},
    {"learner": "l2p", "distill": "cdl-prompt"},
    {"learner": "apt", "compat": True},
    {"learner": "apt", "distill": "fitnets"},
    {"learner": "finetune", "distill": "kd"},
)


def name_of(options):
    return "-".join(str(v) for v in options.values())


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    """Folders `old` of four classes and `more` of these and two new ones."""
    root = tmp_path_factory.mktemp("photos")
    for name, classes in (("old", OLD), ("more", OLD + NEW)):
        image_folder(root / name, train=dict.fromkeys(classes, 5), val=dict.fromkeys(classes, 3))
    return root


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config, photos):
    """finished(**options): a run of two tasks, made once; not to be written to."""
    made = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            train(make_config(made[key], data=f"folder:{photos / 'old'}", **{"epochs": 1, **options}), quiet=True)
        return made[key]

    return make


@pytest.fixture
def extending(tmp_path, photos):
    """extending(run, **options): the config of a run that goes on from it."""

    def make(run, **options):
        given = {"extend": str(run), "data": f"folder:{photos / 'more'}", "out": str(tmp_path / "more"), **options}
        return loop.TrainConfig.from_json(inherit(given))

    return make


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def refused(config, *words):
    with pytest.raises(InputError) as info:
        train(config(), quiet=True)
    for word in words:
        assert word in str(info.value), str(info.value)


@torch.no_grad()
def logits(model, preprocessing):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    return model.eval().combine(model(model.prepare(Normalise(preprocessing, torch.device("cpu"))(pixels))))


# -- what was learnt stays --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_what_a_run_says_of_its_classes_is_the_same_before_the_new_task(finished, extending, options):
    run = finished(**options)
    made = _Training(extending(run), False, True)
    assert made._restore() == metrics_of(run)["seconds"]
    old = load_run(run)
    before, after = logits(old.student, old.preprocessing), logits(made.models["student"], old.preprocessing)
    assert before.shape == (6, 4) and after.shape == (6, 6)
    assert torch.allclose(before, after[:, :4], atol=1e-6)
    for name, model in made.models.items():
        learnt, state = load_state(run / f"{name}.safetensors")["state"], model.state_dict()
        larger = {k for k, v in learnt.items() if v.shape != state[k].shape}
        assert all(torch.equal(v, state[k][: len(v)] if v.dim() else state[k]) for k, v in learnt.items())
        assert {k.split(".")[0] for k in larger} >= {"head"} and all(len(state[k]) > len(learnt[k]) for k in larger)
    assert made.position == (2, "", 0) and made.tasks == 3


@pytest.mark.quick("coda")
@pytest.mark.parametrize("options", KINDS, ids=name_of)
def test_it_learns_on_and_is_a_run_like_any_other(finished, extending, photos, options):
    run = finished(**options)
    before, metrics = metrics_of(run), train(extending(run, tasks=2), quiet=True)
    more = load_run(extending(run).out)
    assert metrics["classes"][:4] == before["classes"] and sorted(metrics["classes"][4:]) == list(NEW)
    assert metrics["tasks"] == [[0, 1], [2, 3], [4], [5]] and metrics["images"] == {"train": 30, "val": 18}
    for side in ("teacher", "student"):
        if (old := before[side]) is None:
            assert metrics[side] is None
            continue
        new = metrics[side]
        assert [row[:2] for row in new["matrix"][:2]] == old["matrix"] and len(new["matrix"]) == 4
        assert all(row[2:] == [None, None] for row in new["matrix"][:2]) and None not in new["matrix"][3]
        assert new["loss"][:2] == old["loss"] and new["seconds"][:2] == old["seconds"] and len(new["loss"]) == 4
    assert evaluate_run(more.path, f"folder:{photos / 'more'}")["per_task"] == metrics["student"]["matrix"][3]
    assert more.student.learner.learnt == 4


def test_tables_of_other_shapes_are_not_mixed():
    small, large = {"a": torch.ones(2, 3), "n": torch.tensor(2)}, {"a": torch.zeros(4, 3), "n": torch.tensor(0)}
    got = grown(small, large)
    assert got["a"].sum(1).tolist() == [3, 3, 0, 0] and int(got["n"]) == 2 and large["a"].sum() == 0
    for other in ({"a": torch.zeros(4, 2)}, {"a": torch.zeros(1, 3)}, {"a": torch.zeros(4)}, {"b": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match="tensor"):
            grown(small, {**other, "n": small["n"]})


@pytest.mark.slow
def test_codas_share_of_the_pool_stays_through_a_chain(tmp_path, finished, extending, image_folder):
    one = finished(learner="coda")
    train(extending(one), quiet=True)
    last = image_folder(tmp_path / "last", train=dict.fromkeys("abcdefgh", 3), val=dict.fromkeys("abcdefgh", 2))
    two = tmp_path / "more"
    metrics = train(extending(two, data=f"folder:{last}", out=str(tmp_path / "last-run")), quiet=True)
    assert [len(t) for t in metrics["tasks"]] == [2, 2, 2, 2]
    assert metrics["extends"]["pool_tasks"] == 2 and metrics["extends"]["tasks"] == 3
    pools = [load_run(run).student.learner for run in (one, two, tmp_path / "last-run")]
    assert [p.per_task for p in pools] == [50] * 3 and [p.components() for p in pools] == [100, 150, 200]
    assert torch.equal(pools[2].key["0"][:100], pools[0].key["0"])  # what is not a current task's is frozen


@pytest.mark.slow
def test_where_it_comes_from_is_recorded(finished, extending):
    from cdl_edge.files import sha256

    run = finished(learner="coda")
    config = extending(run, epochs=2, seed=5)
    metrics = train(config, quiet=True)
    assert metrics["extends"] == {
        "run": str(run),
        "student_sha256": sha256(run / "student.safetensors"),
        "tasks": 2,
        "classes": 4,
        "pool_tasks": 2,
    }
    old, new = metrics_of(run)["config"], metrics["config"]
    assert {k for k in new if new[k] != old[k]} == {"data", "out", "tasks", "extend", "epochs", "seed"}
    assert new["tasks"] == 1 and "extends" not in metrics_of(run)


@pytest.mark.slow
def test_ranges_go_on(finished, extending, tmp_path):
    run = finished(learner="coda")
    train(extending(run), quiet=True)
    old, new = (Ranges.load(p / "ranges.npz").tasks for p in (run, tmp_path / "more"))
    assert (len(old), len(new)) == (2, 3) and new[2].drift
    for a, b in zip(old, new[:2], strict=True):
        assert all(np.array_equal(r.histogram.counts, b.tensors[n].histogram.counts) for n, r in a.tensors.items())
    train(extending(run, range_images=0, out=str(tmp_path / "none")), quiet=True)
    assert not (tmp_path / "none" / "ranges.npz").exists()


# -- images of what is learnt -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["damaged", "gone"])
def test_training_images_of_learnt_classes_are_never_read(tmp_path, finished, extending, photos, there):
    run, data = finished(learner="coda"), tmp_path / "data"
    shutil.copytree(photos / "more", data)
    for name in OLD:
        for path in (data / "train" / name).iterdir():
            path.write_bytes(b"no picture")
        if not there:
            shutil.rmtree(data / "train" / name)
    metrics = train(extending(run, data=f"folder:{data}"), quiet=True)
    assert metrics["skipped"] == [] and None not in metrics["student"]["matrix"][2]
    assert evaluate_run(tmp_path / "more", f"folder:{data}")["per_task"] == metrics["student"]["matrix"][2]
    train(extending(run, out=str(tmp_path / "whole")), quiet=True)
    assert metrics_of(tmp_path / "whole")["student"]["loss"] == metrics["student"]["loss"]


# -- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"learner": "coda"}, {"learner": "dualprompt", "distill": "cdl-prompt"}, {"learner": "apt", "distill": "fitnets"}],
    ids=name_of,
)
def test_stopped_at_every_checkpoint_it_ends_in_the_same_numbers(tmp_path, finished, extending, monkeypatch, options):
    run, given = finished(**options), {"tasks": 2, "epochs": 2}
    train(extending(run, **given, out=str(tmp_path / "unbroken")), quiet=True)
    real, stops = save_state, 0

    def save(path, state):
        real(path, state)
        raise Stopped

    def ended(config, **how):
        try:
            train(config, quiet=True, **how)
        except Stopped:
            return False
        return True

    monkeypatch.setattr(loop, "save_state", save)
    while not ended(extending(run, **given), resume=stops > 0):
        stops += 1
        assert stops < 20
    assert stops == 2 * 4
    one, two = (metrics_of(tmp_path / name) for name in ("unbroken", "more"))
    for side in ("teacher", "student"):
        assert one[side]["loss"] == two[side]["loss"] and one[side]["matrix"] == two[side]["matrix"]
        ours, theirs = (load_file(tmp_path / name / f"{side}.safetensors") for name in ("unbroken", "more"))
        assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert one["extends"] == two["extends"]
    assert (tmp_path / "unbroken" / "ranges.npz").read_bytes() == (tmp_path / "more" / "ranges.npz").read_bytes()


@pytest.mark.slow
def test_another_run_under_the_same_name_is_refused_on_resume(tmp_path, finished, extending, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished(learner="coda"), run)

    def save(path, state):
        save_state(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    with pytest.raises(Stopped):
        train(extending(run), quiet=True)
    monkeypatch.undo()
    shutil.copy(finished(learner="coda", seed=1) / "student.safetensors", run)
    with pytest.raises(InputError, match="another run than the one that it started from"):
        train(extending(run), resume=True, quiet=True)
    refused(lambda: extending(finished(learner="coda")), "a run is there already")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learner": "l2p"}, ("learner='l2p'", "learner='coda'", "leave them out")),
        ({"distill": "kd", "alpha": 0.1}, ("distill='kd', alpha=0.1", "distill='kdp', alpha=0.5")),
        ({"query": "one-pass"}, ("query='two-pass'",)),
        ({"kd_length": 4}, ("kd_length=6",)),
        ({"teachers": "kept"}, ("--extend does not work with --teachers",)),
        ({"tasks": 3}, ("2 classes, 3 tasks",)),
        ({"extend": "nowhere"}, ("nowhere: not a finished run",)),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_options_that_do_not_fit(tmp_path, finished, extending, options, words):
    run = finished(learner="coda")
    refused(lambda: extending(run, **options), *words)
    assert list(tmp_path.iterdir()) == []


def test_other_weights(tmp_path, finished, extending, tiny_vit):
    run = finished(learner="coda")
    refused(
        lambda: extending(run, student=tiny_vit(seed=3)), "the student was trained on another backbone", "--student"
    )
    refused(lambda: extending(run, teacher=tiny_vit("teacher", 24, seed=3)), "the teacher was trained on another")
    moved = tmp_path / "moved.safetensors"
    shutil.copy(tiny_vit().removeprefix("file:"), moved)
    _Training(extending(run, student=f"file:{moved}"), False, True)  # the same ones in another place


def test_classes_that_do_not_fit(tmp_path, finished, extending, photos):
    run = finished(learner="coda")
    refused(lambda: extending(run, data=f"folder:{photos / 'old'}"), "no new class", "the 4 classes")
    data = tmp_path / "data"
    shutil.copytree(photos / "more", data)
    shutil.rmtree(data / "train" / "f")
    refused(lambda: extending(run, data=f"folder:{data}"), "1 new class(es) without a training image", "train/f")
    shutil.rmtree(data / "train" / "b")
    shutil.rmtree(data / "val" / "b")
    refused(lambda: extending(run, data=f"folder:{data}"), "1 of the 4 classes", "without b", "val/<class>")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_learnt_class_in_another_spelling(tmp_path, finished, extending, image_folder):
    parent = Parent(extending(finished(learner="frozen", distill="none", head="ncm", epochs=3, range_images=0)))
    parent.classes = ("\u00e4", "b")
    spelt = image_folder(tmp_path / "spelt", unsplit=dict.fromkeys(("a\u0308", "b", "new"), 2))
    with pytest.raises(InputError, match="reads like the class"):
        parent.new_images(load_dataset(f"folder:{spelt}"))


@pytest.mark.slow
def test_other_validation_images_of_learnt_classes_are_said(tmp_path, finished, extending, photos):
    """Forgetting then compares different images; of one folder a class, some may be training images of before."""
    run, lines = finished(learner="apt", distill="none"), []
    more = shutil.copytree(photos / "more", tmp_path / "grown")
    with told(lines.append):
        _Training(extending(run, data=f"folder:{more}", out=str(tmp_path / "one")), False, True).close()
        assert not [line for line in lines if "other validation images" in line]
        (more / "val" / "a" / "new.png").write_bytes((more / "val" / "a" / "000.png").read_bytes() + b" ")
        _Training(extending(run, data=f"folder:{more}", out=str(tmp_path / "two")), False, True).close()
    (line,) = [line for line in lines if "other validation images" in line]
    assert line.startswith("warning: 1 learnt class(es)") and "(a): forgetting compares different images" in line


def test_what_the_extended_run_has_learnt_is_not_scored(tmp_path, make_config, image_folder):
    """Old classes are measured on other pictures now; the folder that they were learnt from is no test set."""
    old = image_folder(tmp_path / "old", unsplit={"a": 10, "b": 10})
    more = image_folder(tmp_path / "more", train={"c": 4}, val={"a": 3, "b": 3, "c": 3})
    options = {"learner": "frozen", "distill": "none", "head": "ncm", "tasks": 1, "range_images": 0}
    first = train(make_config(tmp_path / "first", data=f"folder:{old}", **options), quiet=True)
    further = {"extend": str(tmp_path / "first"), "data": f"folder:{more}", "out": str(tmp_path / "more-run")}
    metrics = train(loop.TrainConfig.from_json(inherit(further)), quiet=True)
    (before,) = metrics["data"]["before"]
    assert before["fingerprint"] == first["data"]["fingerprint"] and before["given"] == f"folder:{old}"
    bundle = {"data": _portable(metrics["data"])}
    assert "source" not in json.dumps(bundle) and "train" not in bundle["data"]["before"][0]["fingerprint"]
    old = old.rename(tmp_path / "elsewhere")
    for training in (metrics, bundle):
        found = find_scored(f"folder:{old}", "auto", training, metrics["classes"])
        assert found.which == "validation images, a fifth of each class" and len(found.images) == 4
        assert not found.grown and not found.comparable
        with_new = shutil.copytree(old, tmp_path / "grown", dirs_exist_ok=True)
        for i in range(8):
            (with_new / "a" / f"new{i}.png").write_bytes((with_new / "a" / "000.png").read_bytes() + b" " * i)
        assert find_scored(f"folder:{with_new}", "auto", training, metrics["classes"]).grown


def test_nobody_is_told_of_options_that_were_not_given(tmp_path, finished, extending, photos):
    """Those of the run that is extended were named when it was trained; and a class is no task without prompts."""
    run, lines = finished(learner="frozen", distill="none", head="ncm", epochs=3, range_images=0), []
    with told(lines.append):
        train(extending(run, tasks=2))
    assert not [line for line in lines if "changes nothing" in line or "teaches prompts nothing" in line], lines
    with told(lines.append):
        _Training(extending(run, out=str(tmp_path / "other"), batch_size=3), False, True).close()
    assert [line for line in lines if line.startswith("note: --batch-size changes nothing")]


def test_a_distiller_that_remembers(tmp_path, finished, extending):
    run = finished(learner="apt", distill="m2kd")
    refused(lambda: extending(run), "--distill m2kd cannot be extended", "train again with all classes")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_without_some_of_its_files(tmp_path, finished, extending):
    for name, words in (("teacher.safetensors", "no teacher.safetensors"), ("ranges.npz", "--range-images 0")):
        run = tmp_path / name
        shutil.copytree(finished(learner="coda"), run)
        (run / name).unlink()
        refused(lambda run=run: extending(run), words)
    run = finished(learner="coda", range_images=0)
    refused(lambda: extending(run, range_images=8), "no ranges of the tasks that are learnt", "--range-images 0")
    assert not (tmp_path / "more").exists()


# -- from the command line to the device ------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_a_run_to_a_device_that_knows_a_new_class(tmp_path, image_folder, tiny_vit, cli):
    old, more = tmp_path / "old", tmp_path / "photos"
    image_folder(old, unsplit=dict.fromkeys("abcd", 12))
    shutil.copytree(old, more)
    rng = np.random.default_rng(0)
    for name, (low, high) in {"black": (0, 20), "white": (235, 255)}.items():
        (more / name).mkdir()
        for i in range(12):
            pixels = rng.integers(low, high, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(more / name / f"{i}.png")
    options = ["--student", tiny_vit(), "--teacher", tiny_vit("teacher", 24), "--augment", "none", "--tasks", 2]
    settings = ["--epochs", 8, "--learning-rate", 0.02, "--batch-size", 16, "--threads", 1, "--json"]
    run, new = tmp_path / "run", tmp_path / "new"
    assert cli("train", "--data", f"folder:{old}", *options, *settings, "--out", run).code == 0
    answer = cli("train", "--extend", run, "--data", f"folder:{more}", "--out", new, "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    assert len(answer.json["student"]["matrix"]) == 3 and "2 tasks learnt already" in answer.err
    assert (new / "report.html").is_file() and run.as_posix() in (new / "report.html").read_text()
    for source in (run, new):
        assert cli("export", source, "--out", tmp_path / f"{source.name}-bundle", "--images", 8).code == 0
    pack, device = tmp_path / "update.pack", tmp_path / "device"
    shutil.copytree(tmp_path / "run-bundle", device)
    assert cli("pack", "create", tmp_path / "run-bundle", tmp_path / "new-bundle", "--out", pack).code == 0
    assert pack.stat().st_size < 0.5 * sum(p.stat().st_size for p in device.rglob("*") if p.is_file())
    assert cli("pack", "install", pack, device).code == 0
    found = cli("predict", device, more / "white" / "3.png", "--json").json
    assert "white" in json.dumps(found["predictions"][0]), found
    assert cli("evaluate", device, "--data", f"folder:{more}", "--json").json["per_task"][2] > 70
    assert cli("calibrate", tmp_path / "new-bundle", "--out", tmp_path / "int8").code == 0
    answer = cli("train", "--extend", run, "--data", f"folder:{old}", "--out", tmp_path / "no")
    answer.assert_refused("no new class", "expected:")
    assert not (tmp_path / "no").exists()
