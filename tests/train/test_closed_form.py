"""Heads from class statistics in the loop: the module is the numpy head, statistics depend on no order of tasks."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.errors import InputError
from cdl_edge.heads import CLOSED_FORM
from cdl_edge.train import loop
from cdl_edge.train.checkpoint import save_state
from cdl_edge.train.closed_form import StatisticsHead, load_statistics, make, statistics_heads
from cdl_edge.train.extend import inherit
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run

OLD, NEW = "abcd", "ef"
heads = pytest.mark.parametrize("head", statistics_heads())


class Stopped(Exception):
    pass


def results(run):
    """Everything of a run but times."""
    metrics = json.loads((run / "metrics.json").read_text())
    timed = ("seconds", "images_per_second")
    sides = {s: {k: v for k, v in (metrics[s] or {}).items() if k not in timed} for s in ("student", "teacher")}
    return {**sides, "baseline": metrics["baseline"], "classes": metrics["classes"]}


def files(run):
    return {p.name: p.read_bytes() for p in (run / "statistics").iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    """Folders `old` of four classes and `more` of these and two new ones."""
    root = tmp_path_factory.mktemp("photos")
    for name, classes in (("old", OLD), ("more", OLD + NEW)):
        image_folder(root / name, train=dict.fromkeys(classes, 5), val=dict.fromkeys(classes, 3))
    return root


@pytest.fixture
def run_of(tmp_path, make_config):
    """run_of(name, **options): a finished run of one or two epochs of a learner without distillation."""

    def make(name, **options):
        config = make_config(tmp_path / name, **{"epochs": 1, "learner": "apt", "distill": "none", **options})
        train(config, quiet=True)
        return tmp_path / name

    return make


# -- the module --------------------------------------------------------------------------------------------------------


@heads
@pytest.mark.parametrize("kd", [False, True])
def test_the_module_is_the_numpy_head(head, kd):
    module = StatisticsHead(head, 8, kd, 6, random_features=64)
    width = 8 * (6 if kd else 5)
    where = ("patches", "vertical", "horizontal", "diagonal")
    assert module.map.parts == (("class", "kd", *where) if kd else ("class", *where))
    weighted = StatisticsHead(head, 8, kd, 6, 64, token_weight=0.5).map
    assert weighted.token_weight == (0.5 if kd and head == "ranpac" else 1)  # one token is no too many
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((80, width)).astype(np.float32) + 1, np.arange(80) % 4
    made = make(head, ClassStatistics.of(module.map, x, labels, list("abcd")), 0)
    module.set(made)
    got = module(torch.from_numpy(x)).numpy()
    expected = module.map.apply(x) @ made.weight.T + made.bias
    assert got.shape == (80, 6) and np.abs(got[:, :4] - expected).max() < 1e-5 and not got[:, 4:].any()
    assert [n for n, _ in module.named_parameters()] == [] and set(module.state_dict()) == {"weight", "bias"}
    module.set(make(head, ClassStatistics.of(module.map, x, labels % 2, list("ab")), 0))
    assert not module.weight[2:].any() and not module.bias[2:].any()  # nothing of the head before is left


# -- in the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", statistics_heads())
@pytest.mark.parametrize(("learner", "distill"), [("apt", "none"), ("coda", "kdp"), ("l2p", "two-heads")])
def test_a_run_keeps_what_its_head_is_made_from(run_of, learner, distill, head):
    run = run_of("run", learner=learner, distill=distill, head=head)
    opened = load_run(run)
    held = load_statistics(run, "student", 2)
    assert held.classes == tuple(opened.metrics.document["classes"]) and held.counts.tolist() == [8] * 10
    made = make(head, held, opened.config.seed)
    module = opened.student.statistics_head
    assert torch.allclose(module.weight, torch.from_numpy(made.weight).float(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(module.bias, torch.from_numpy(made.bias).float(), rtol=1e-5, atol=1e-5)
    assert results(run)["student"]["average_accuracy"] > 25  # of ten classes, by a tiny random network
    names = {"frozen-slda-2.npz", "frozen-ranpac-2.npz", "student-2.npz"}
    assert set(files(run)) == names | ({"teacher-2.npz"} if distill == "kdp" else set())


@pytest.mark.slow
def test_statistics_are_of_what_inference_computes_also_where_training_was_in_bf16(run_of, monkeypatch):
    """The queries that training had kept, in bf16, chose the prompts of the features: inference asks in fp32."""
    asked = []
    real = loop.features_of

    def features(images, name, *rest):
        found = real(images, name, *rest)
        model = images.sides[name].model
        again = [model.query(images.prepare(name, np.arange(len(images))))]
        asked.append((images._queries["student"], torch.cat(again)))
        return found

    monkeypatch.setattr(loop, "features_of", features)
    run_of("run", precision="bf16", learner="coda", head="slda", tasks=1, augment="none")
    ((kept, exact),) = asked
    assert torch.allclose(kept, exact, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("head", list(CLOSED_FORM))
def test_the_order_of_tasks_changes_neither_statistics_nor_answers(run_of, monkeypatch, head):
    real = loop.make_scenario

    def reversed_tasks(*arguments, **options):
        made = real(*arguments, **options)
        half = len(made.order) // 2
        return type(made)((*made.order[half:], *made.order[:half]), made.tasks)

    options = {"learner": "frozen", "head": head}
    one = run_of("one", **options)
    monkeypatch.setattr(loop, "make_scenario", reversed_tasks)
    two = run_of("two", **options)
    a, b = (load_statistics(run, "student", 2) for run in (one, two))
    assert a.classes == (*b.classes[5:], *b.classes[:5])
    b = b.ordered(a.classes)
    assert np.array_equal(a.counts, b.counts)
    assert np.abs(a.sums - b.sums).max() <= 1e-9 * np.abs(a.sums).max()
    assert np.abs(a.moment - b.moment).max() <= 1e-9 * np.abs(a.moment).max()
    rows = [load_run(run).student.statistics_head.weight for run in (one, two)]
    assert torch.allclose(rows[0], torch.cat([rows[1][5:], rows[1][:5]]), rtol=1e-5, atol=1e-5)
    ends = [results(run)["student"]["matrix"][1] for run in (one, two)]
    assert ends[0] == pytest.approx(ends[1][::-1])
    assert results(one)["baseline"]["heads"] == pytest.approx(results(two)["baseline"]["heads"])


@pytest.mark.slow
def test_prompts_learn_in_the_first_tasks_only(run_of):
    one, two, all_ = (run_of(f"run{n}", tasks=3, prompt_tasks=n, head="slda") for n in (1, 2, 3))
    prompts = [load_run(run).student.learner.merged for run in (one, two, all_)]
    assert not torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[1], prompts[2])
    losses = [results(run)["student"]["loss"] for run in (one, two, all_)]
    assert [[len(task) for task in loss] for loss in losses] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    # Statistics go on in all tasks: ten classes are known.
    assert load_statistics(one, "student", 3).images == 80
    # The first task alone makes the same prompts, and the same statistics of its classes.
    assert losses[0][0] == losses[1][0] == losses[2][0]
    seen = load_run(one).metrics.document["classes"].index
    held = [load_statistics(run, "student", 3) for run in (one, all_)]
    first = [c for c in held[0].classes if seen(c) < 3]
    for name in first:  # of the prompts of that time: later ones would make others
        assert np.array_equal(held[0].sums[held[0].classes.index(name)], held[1].sums[held[1].classes.index(name)])


@pytest.mark.slow
def test_it_learns_nothing_more_behind_the_first_task(run_of, monkeypatch):
    states = []
    real = loop._Training._collect
    monkeypatch.setattr(
        loop._Training,
        "_collect",
        lambda self, task, images: (
            states.append({k: v.clone() for k, v in self.models["student"].learner.state_dict().items()}),
            real(self, task, images),
        ),
    )
    run_of("run", tasks=3, head="ranpac", learner="coda", distill="kdp")
    assert len(states) == 3
    for later in states[1:]:
        assert all(torch.equal(v, later[k]) for k, v in states[0].items())


# -- stopped -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", statistics_heads())
@pytest.mark.parametrize("moment", ["statistics", "checkpoint"])
def test_stopped_anywhere_it_ends_in_the_same_bytes(tmp_path, run_of, make_config, monkeypatch, head, moment):
    options = {"epochs": 2, "learner": "l2p", "distill": "kdp", "head": head, "prompt_tasks": 2}
    whole = run_of("whole", **options)
    config = make_config(tmp_path / "broken", **options)

    def stopping(real):
        def stop(*arguments):
            real(*arguments)
            raise Stopped

        return stop

    stops = 0
    while not (tmp_path / "broken" / "metrics.json").exists():
        with monkeypatch.context() as patch:
            if moment == "checkpoint":
                patch.setattr(loop, "save_state", stopping(save_state))
            elif stops % 2 == 0:  # every second time: the next one has to come further
                patch.setattr(ClassStatistics, "save", stopping(ClassStatistics.save))
            else:
                patch.setattr(loop, "save_state", stopping(save_state))
            try:
                train(config, resume=stops > 0, quiet=True)
            except Stopped:
                stops += 1
                assert stops < 40
    assert stops == {"checkpoint": 8, "statistics": 4}[moment]
    assert results(whole) == results(tmp_path / "broken") and files(whole) == files(tmp_path / "broken")
    for side in ("student", "teacher"):
        one, two = (load_file(run / f"{side}.safetensors") for run in (whole, tmp_path / "broken"))
        assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


# -- a run that is extended --------------------------------------------------------------------------------------------


@pytest.fixture
def extending(tmp_path, photos):
    """extending(run, **options): the config of a run that goes on from it."""

    def config(run, **options):
        given = {"extend": str(run), "data": f"folder:{photos / 'more'}", "out": str(tmp_path / "more"), **options}
        return loop.TrainConfig.from_json(inherit(given))

    return config


@pytest.mark.slow
@pytest.mark.parametrize("head", statistics_heads())
def test_extended_it_is_the_run_that_learnt_all_at_once(tmp_path, run_of, extending, photos, head):
    run = run_of("run", data=f"folder:{photos / 'old'}", head=head)
    data = tmp_path / "data"
    shutil.copytree(photos / "more", data)
    for name in OLD:
        shutil.rmtree(data / "train" / name)  # no image of what is known
    metrics = train(extending(run, data=f"folder:{data}", seed=5), quiet=True)
    more = tmp_path / "more"
    old, new = load_statistics(run, "student", 2), load_statistics(more, "student", 3)
    assert new.map == old.map and new.classes[:4] == old.classes and set(new.classes[4:]) == set(NEW)
    assert np.array_equal(new.sums[:4], old.sums)
    assert set(files(more)) == {"student-3.npz", "frozen-slda-3.npz", "frozen-ranpac-3.npz"}
    assert metrics["baseline"]["average_accuracy"] > 0 and None not in metrics["student"]["matrix"][2]
    # Opened again, it has the projection that its statistics are of.
    assert load_run(more).student.statistics_head.map == new.map
    made = make(head, new, 5)
    assert torch.allclose(
        load_run(more).student.statistics_head.weight, torch.from_numpy(made.weight).float(), atol=1e-4
    )
    last = tmp_path / "last"
    shutil.copytree(data, last)
    for part in ("train", "val"):
        shutil.copytree(data / part / "e", last / part / "g")
    train(extending(more, data=f"folder:{last}", out=str(tmp_path / "third"), seed=6), quiet=True)
    assert load_statistics(tmp_path / "third", "student", 4).map == old.map


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ranpac", "learned"])
def test_an_extension_that_was_stopped(tmp_path, run_of, extending, photos, monkeypatch, head):
    run = run_of("run", data=f"folder:{photos / 'old'}", head=head)
    train(extending(run, tasks=2, epochs=2, out=str(tmp_path / "whole")), quiet=True)

    def save(path, state):
        save_state(path, state)
        raise Stopped

    stops = 0
    monkeypatch.setattr(loop, "save_state", save)
    while not (tmp_path / "more" / "metrics.json").exists():
        try:
            train(extending(run, tasks=2, epochs=2), resume=stops > 0, quiet=True)
        except Stopped:
            stops += 1
            assert stops < 10
    assert results(tmp_path / "whole") == results(tmp_path / "more")
    assert files(tmp_path / "whole") == files(tmp_path / "more")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_of_an_earlier_version_is_extended_without_a_baseline(
    tmp_path, run_of, extending, photos, monkeypatch, capfd, stopped
):
    run = run_of("run", data=f"folder:{photos / 'old'}", head="learned")
    shutil.rmtree(run / "statistics")
    config = extending(run, tasks=2)
    if stopped:

        def save(path, state):
            save_state(path, state)
            raise Stopped

        monkeypatch.setattr(loop, "save_state", save)
        with pytest.raises(Stopped):
            train(config, quiet=True)
        monkeypatch.setattr(loop, "save_state", save_state)
    capfd.readouterr()
    metrics = train(config, resume=stopped)
    assert metrics["baseline"] is None and len(metrics["student"]["matrix"]) == 4
    assert capfd.readouterr().err.count("no frozen baseline") == 1
    assert not (tmp_path / "more" / "statistics").exists()
    assert load_run(tmp_path / "more").metrics.document["baseline"] is None


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_statistics_that_a_head_needs_are_missing(tmp_path, run_of, extending, photos, damage):
    run = run_of("run", data=f"folder:{photos / 'old'}", head="slda")
    path = run / "statistics" / "student-2.npz"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"student-2\.npz: no class statistics"):
        train(extending(run), quiet=True)
    assert not (tmp_path / "more").exists()
