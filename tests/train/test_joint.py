"""Forgetting beside that of the same head made from what the final student sees."""

import numpy as np
import pytest

from cdl_edge.data import load_dataset
from cdl_edge.train.closed_form import make
from cdl_edge.train.joint import SAME
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run


def side(metrics):
    return metrics["student"]["forgetting"], metrics["student"]["forgetting_of_joint"]


@pytest.mark.slow
def test_prompts_of_the_first_task_only_lose_nothing_more(tmp_path, make_config):
    metrics = train(make_config(tmp_path / "run", head="slda", distill="none"), quiet=True)
    own, joint = side(metrics)
    assert own == joint and metrics["student"]["forgetting_of_joint_note"] == SAME
    assert "forgetting_of_joint" in metrics["definitions"]


@pytest.mark.slow
def test_learnt_heads_have_none(tmp_path, make_config):
    metrics = train(make_config(tmp_path / "run", distill="none"), quiet=True)
    assert "forgetting_of_joint" not in metrics["student"]


@pytest.mark.slow
def test_prompts_that_go_on_learning_are_measured_against_the_final_student(tmp_path, make_config):
    config = make_config(
        tmp_path / "run", head="slda", distill="none", learner="apt", prompt_tasks=2, learning_rate=0.5
    )
    metrics = train(config, quiet=True)
    own, joint = side(metrics)
    assert metrics["student"]["forgetting_of_joint_note"] == "measured"
    # A second way: statistics of each task with the finished run's student, the head in numpy.
    from cdl_edge.class_statistics import ClassStatistics, merged
    from cdl_edge.train.batches import Pipeline, TaskImages
    from cdl_edge.train.closed_form import as_numpy
    from cdl_edge.train.evaluate import features_of
    from cdl_edge.train.scenario import make_scenario

    run = load_run(tmp_path / "run")
    dataset = load_dataset("digits")
    scenario = make_scenario(dataset.classes, 2, 0)
    sides = {"student": Pipeline(run.student, run.preprocessing, next(run.student.parameters()).device)}

    def features(split, task):
        images = TaskImages(scenario.split(split, task), sides, next(run.student.parameters()).device)
        return as_numpy(features_of(images, "student")), images.labels

    names, parts, after = metrics["classes"], [], []
    head_map = run.student.statistics_head.map
    for task in range(2):
        x, y = features(dataset.train.limited(8, 0), task)
        first, seen = scenario.tasks[task][0], scenario.seen(task)
        parts.append(ClassStatistics.of(head_map, x, y - first, names[first:seen]))
        made = make("slda", merged(parts), 0)
        x, y = features(dataset.val, 0)
        after.append(100 * np.mean((x @ made.weight.T + made.bias).argmax(1) == y))
    assert joint == pytest.approx((after[0] - after[1]) / 2, abs=1e-6)
    assert joint != pytest.approx(own, abs=1e-6)  # the prompts have moved: otherwise this test would show nothing
    # The head that answers is the run's, not the one of this measurement.
    x, y = features(dataset.val, 1)
    head = run.student.statistics_head
    logits = x @ head.weight.numpy().T + head.bias.numpy()
    assert 100 * np.mean(logits.argmax(1) == y) == pytest.approx(metrics["student"]["matrix"][1][1])
