"""The frozen baseline is what a frozen learner with the same head and no distiller gets."""

import json

import numpy as np
import pytest

from cdl_edge.train.closed_form import load_statistics
from cdl_edge.train.loop import train


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("head", ["slda", "ranpac"])
def test_it_is_the_frozen_learner_with_that_head(tmp_path, make_config, head):
    run = tmp_path / head
    metrics = train(make_config(run, learner="frozen", distill="none", head=head), quiet=True)
    baseline = metrics["baseline"]
    assert baseline["heads"][head] == pytest.approx(metrics["student"]["average_accuracy"])
    best = max(baseline["heads"], key=baseline["heads"].get)
    assert (baseline["head"], baseline["average_accuracy"]) == (best, baseline["heads"][best])
    mine, frozen = (load_statistics(run, side, 2) for side in ("student", f"frozen-{head}"))
    assert mine.map == frozen.map and mine.classes == frozen.classes
    assert np.allclose(mine.sums, frozen.sums, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_does_not_depend_on_what_is_trained_beside_it(tmp_path, make_config):
    found = []
    for name, options in {
        "a": {"learner": "apt", "distill": "none", "head": "learned"},
        "b": {"learner": "coda", "distill": "kdp", "head": "ncm"},
        "c": {"learner": "finetune", "distill": "none", "head": "learned"},
    }.items():
        found.append(train(make_config(tmp_path / name, epochs=1, **options), quiet=True)["baseline"])
    assert found[0] == found[1] == found[2]


def test_a_run_of_the_frozen_learner_names_it_too(tmp_path, make_config):
    train(make_config(tmp_path / "run", learner="frozen", distill="none", head="slda", tasks=1), quiet=True)
    assert set(metrics_of(tmp_path / "run")["baseline"]) == {"head", "average_accuracy", "heads"}
