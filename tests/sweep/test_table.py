"""Statistics against numbers worked out by hand."""

import math

import pytest

from cdl_edge.sweep.table import averaged, compare, correct, holm, make_tables, measure


def summary(accuracy, forgetting=1.0, teacher=None, seconds=10.0, frozen=None):
    def side(value):
        return {"average_accuracy": value, "forgetting": forgetting, "incremental_accuracy": value + 1}

    baseline = {"head": "slda", "average_accuracy": frozen} if frozen is not None else None
    sides = {"student": side(accuracy), "teacher": side(teacher) if teacher else None}
    return {**sides, "frozen": baseline, "seconds": seconds}


def approx(values):
    return [v if v is None else pytest.approx(v, abs=1e-9) for v in values]


def test_mean_and_sample_standard_deviation():
    assert measure([1.0, 2.0, 4.0]) == {
        "mean": pytest.approx(7 / 3),
        "std": pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2)),  # n - 1
        "values": [1.0, 2.0, 4.0],
    }
    assert measure([5.0]) == {"mean": 5.0, "std": None, "values": [5.0]}
    assert measure([]) is None


def test_paired_test_of_three_seeds():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt(3)); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    t = 2 * math.sqrt(3)
    got = compare({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert (got["mean"], got["std"], got["seeds"]) == (pytest.approx(2.0), pytest.approx(1.0), [0, 1, 2])
    assert got["p"] == pytest.approx(1 - t / math.sqrt(t * t + 2), abs=1e-9)
    assert got["p"] == pytest.approx(0.0741799, abs=1e-6)


def test_paired_test_of_two_seeds():
    # Differences 1, 3: t = 2 with 1 degree of freedom, a Cauchy distribution: p = 1 - 2 / pi * atan(t).
    got = compare({0: 1.0, 1: 4.0}, {0: 0.0, 1: 1.0})
    assert got["p"] == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-9)


def test_only_seeds_that_both_have_are_paired():
    got = compare({0: 1.0, 2: 5.0, 3: 9.0}, {1: 0.0, 2: 1.0, 3: 2.0})
    assert got["seeds"] == [2, 3] and got["mean"] == pytest.approx(5.5)
    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({}, {0: 1.0}) is None


@pytest.mark.parametrize(
    ("mine", "base", "note"),
    [
        ({0: 3.0}, {0: 1.0}, "one seed"),
        ({0: 3.0, 1: 4.0}, {0: 1.0, 1: 2.0}, "equal"),
        ({0: 3.0, 1: 4.0}, {0: 3.0, 1: 4.0}, "equal"),  # scipy: 0 / 0
        ({0: 0.3, 1: 0.7, 2: 1.1}, {0: 0.1, 1: 0.5, 2: 0.9}, "equal"),  # but for the last digit, which made p = 1e-16
    ],
)
def test_no_test_where_it_says_nothing(mine, base, note):
    got = compare(mine, base)
    assert got["p"] is None and note in got["note"]
    assert got["mean"] == pytest.approx(mine[0] - base[0])


def test_holm():
    assert holm([0.01, 0.04, None, 0.03]) == approx([0.03, 0.06, None, 0.06])  # 3 * 0.01, then 2 * 0.03, never below
    assert holm([0.4, 0.6]) == approx([0.8, 0.8])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None]


def test_each_metric_of_a_table_is_a_family():
    rows = [
        {"difference": None},
        {"difference": {"average_accuracy": {"p": 0.01, "p_holm": None}, "forgetting": {"p": 0.02, "p_holm": None}}},
        {"difference": {"average_accuracy": {"p": 0.03, "p_holm": None}, "forgetting": None}},
    ]
    correct(rows)
    assert rows[1]["difference"]["average_accuracy"]["p_holm"] == pytest.approx(0.02)
    assert rows[1]["difference"]["forgetting"]["p_holm"] == pytest.approx(0.02)  # alone: no correction


def test_averages_are_taken_within_a_seed_first():
    results = {
        ("", "l2p", "kd", "two-pass", "ranpac"): {0: summary(10, teacher=30, seconds=1), 1: summary(20, teacher=40)},
        ("", "apt", "kd", "two-pass", "ranpac"): {1: summary(40, teacher=50), 0: summary(30, teacher=40, seconds=3)},
    }
    got = averaged(results, "", ["l2p", "apt"], "kd", "two-pass", "ranpac")
    assert list(got) == [0, 1]
    assert [got[s]["student"]["average_accuracy"] for s in got] == [20, 30]
    assert got[0]["teacher"]["average_accuracy"] == 35 and got[0]["seconds"] == 2


def test_a_seed_counts_for_the_average_when_all_learners_have_it():
    results = {
        ("", "l2p", "kd", "two-pass", "ranpac"): {0: summary(10), 1: summary(20)},
        ("", "apt", "kd", "two-pass", "ranpac"): {1: summary(40)},
    }
    got = averaged(results, "", ["l2p", "apt"], "kd", "two-pass", "ranpac")
    assert list(got) == [1] and got[1]["teacher"] is None
    assert averaged(results, "", ["l2p", "coda"], "kd", "two-pass", "ranpac") == {}


def results_of(plan, value):
    """{key: {seed: summary}} with accuracy value(learner, distiller, seed)."""
    results = {}
    for cell in plan.cells:
        c = cell.config
        results.setdefault(cell.key, {})[c.seed] = summary(value(c.learner, c.distill, c.seed))
    return results


def test_rows_and_averages(plan_of):
    plan = plan_of(learners="l2p,coda,apt", distillers="none,kd,kdp", seeds="0,1,2")
    level = {"l2p": 10, "coda": 20, "apt": 60}
    gain = {"none": (0, 0, 0), "kd": (1, 2, 3), "kdp": (4, 6, 5)}
    tables = make_tables(plan, results_of(plan, lambda le, d, s: level[le] + 7 * s + gain[d][s]))
    rows = {(r["learner"], r["distiller"]): r for r in tables["rows"]}
    assert list(rows) == [(le, d) for le in ("l2p", "coda", "apt") for d in ("none", "kd", "kdp")]
    assert rows["l2p", "none"]["difference"] is None
    assert rows["l2p", "none"]["student"]["average_accuracy"]["std"] == pytest.approx(7.0)
    kd = rows["coda", "kd"]["difference"]["average_accuracy"]
    # The spread of the class orders is large, that of the differences is not: this is what pairing is for.
    assert (kd["mean"], kd["std"]) == (pytest.approx(2.0), pytest.approx(1.0))
    assert kd["p_holm"] == pytest.approx(min(1.0, 3 * kd["p"]))  # after three smaller ones of kdp
    averages = {(r["learner"], r["distiller"]): r for r in tables["averages"]}
    assert averages["all learners", "kdp"]["learners"] == ["l2p", "coda", "apt"]
    assert averages["all learners", "kdp"]["student"]["average_accuracy"]["mean"] == pytest.approx(30 + 7 + 5)
    assert averages["pool learners", "kdp"]["learners"] == ["l2p", "coda"]
    assert averages["pool learners", "kdp"]["student"]["average_accuracy"]["mean"] == pytest.approx(15 + 7 + 5)
    assert averages["pool learners", "kdp"]["difference"]["average_accuracy"]["mean"] == pytest.approx(5)
    assert tables["queries"] == tables["paper"] == []


def test_another_baseline_and_missing_cells(plan_of):
    plan = plan_of(learners="l2p", distillers="none,kd,kdp", seeds="0,1", baseline="kd")
    results = results_of(plan, lambda le, d, s: {"none": 1, "kd": 2, "kdp": 4}[d] + s * s)
    del results["", "l2p", "none", "two-pass", "ranpac"], results["", "l2p", "kdp", "two-pass", "ranpac"][1]
    none, kd, kdp = make_tables(plan, results)["rows"]
    assert (none["n"], none["missing"], none["seconds"], none["teacher"]) == (0, [0, 1], None, None)
    assert none["student"]["average_accuracy"] is None and none["difference"]["average_accuracy"] is None
    assert kd["difference"] is None
    assert kdp["n"] == 1 and kdp["difference"]["average_accuracy"]["mean"] == 2
    assert "one seed" in kdp["difference"]["average_accuracy"]["note"]


def test_one_learner_has_no_average_and_pool_learners_alone_have_one(plan_of):
    def labels(learners):
        plan = plan_of(learners=learners, seeds="0")
        return {r["learner"] for r in make_tables(plan, {})["averages"]}

    assert labels("l2p") == set()
    assert labels("l2p,coda") == {"all learners"}
    assert labels("l2p,apt") == {"all learners"}
    assert labels("l2p,coda,apt") == {"all learners", "pool learners"}


def test_an_average_is_compared_over_the_learners_it_has(plan_of):
    plan = plan_of(learners="l2p,dualprompt,coda,apt", distillers="none,cdl-prompt", seeds="0,1")
    assert {r.learner for r in plan.refused} == {"apt"}
    value = {"l2p": 10, "dualprompt": 20, "coda": 30, "apt": 1000}
    tables = make_tables(plan, results_of(plan, lambda le, d, s: value[le] + s + 3 * (d != "none") * (1 + s)))
    averages = {(r["learner"], r["distiller"]): r for r in tables["averages"]}
    # "all learners" of a distiller without APT would be the pool learners again, beside a baseline with APT.
    assert ("all learners", "cdl-prompt") not in averages
    assert averages["pool learners", "cdl-prompt"]["difference"]["average_accuracy"]["mean"] == pytest.approx(4.5)


def test_queries_are_compared_with_the_first(plan_of):
    plan = plan_of(learners="l2p,apt", distillers="none,kdp", queries="two-pass,one-pass", seeds="0,1")
    results = {
        c.key: {s: summary(10 + 2 * s - (c.config.query == "one-pass") * (1 + s)) for s in (0, 1)} for c in plan.cells
    }
    queries = make_tables(plan, results)["queries"]
    assert [(r["learner"], r["distiller"], r["query"]) for r in queries] == [
        ("l2p", "none", "one-pass"),
        ("l2p", "kdp", "one-pass"),
    ]
    assert [r["difference"]["average_accuracy"]["mean"] for r in queries] == [-1.5, -1.5]


def test_published_figures_beside_ours(plan_of):
    plan = plan_of(preset="paper-cifar100", data="cifar100:x", learners="l2p,coda", seeds="0,1")
    gain = {"none": 0, "kd": 1, "fitnets": 3, "kdp": 5}
    results = results_of(plan, lambda le, d, s: 70 + gain.get(d, 0.5) + s)
    paper = {(r["pair"], r["learner"], r["figure"]): r for r in make_tables(plan, results)["paper"]}
    assert len(paper) == 2 * 2 * 3
    kdp = paper["vitb-vits", "l2p", "kdp"]
    assert kdp["average_accuracy"] == {
        "ours": 75.5,
        "std": pytest.approx(math.sqrt(0.5)),
        "published": 81.79,
        "difference": pytest.approx(75.5 - 81.79),
    }
    assert kdp["forgetting"]["difference"] == pytest.approx(1.0 - 4.31)
    best = paper["vitl-vitb", "coda", "best other KD"]
    assert best["distiller"] == "fitnets" and best["average_accuracy"]["published"] == 86.78
    assert best["chosen_from"] == len(plan.distillers) - 2
    nothing = make_tables(plan, {})["paper"][0]
    assert nothing["average_accuracy"] == {"ours": None, "std": None, "published": 82.18, "difference": None}


def test_the_frozen_baseline_stands_on_top_and_beside_every_row(plan_of):
    plan = plan_of(learners="l2p,apt,frozen", distillers="none,kdp", seeds="0,1,2")
    level = {"none": 50.0, "kdp": 60.0}
    frozen = {0: 55.0, 1: 58.0, 2: 58.0}
    results = {}
    for c in plan.cells:
        seed = c.config.seed
        value = frozen[seed] if c.config.learner == "frozen" else level[c.config.distill] + seed
        results.setdefault(c.key, {})[seed] = summary(value, frozen=frozen[seed])
    tables = make_tables(plan, results)
    (top,) = tables["frozen"]
    assert (top["heads"], top["n"], top["average_accuracy"]["mean"]) == (["slda"], 3, pytest.approx(57.0))
    rows = {(r["learner"], r["distiller"]): r["over_frozen"] for r in tables["rows"]}
    assert rows["l2p", "none"]["mean"] == pytest.approx(-6.0) and rows["l2p", "kdp"]["mean"] == pytest.approx(4.0)
    assert rows["frozen", "none"]["mean"] == 0 and "no test" in rows["frozen", "none"]["note"]
    ps = sorted(o["p"] for o in rows.values() if o["p"] is not None)
    assert len(ps) == 4 and min(o["p_holm"] for o in rows.values() if o["p"]) == pytest.approx(min(1.0, 4 * ps[0]))
    # A backbone that learns nothing is no learner to average over.
    assert {tuple(r["learners"]) for r in tables["averages"]} == {("l2p", "apt")}
    assert tables["averages"][0]["over_frozen"]["mean"] == pytest.approx(-6.0)


def test_runs_of_before_have_no_frozen_baseline(plan_of):
    plan = plan_of(learners="l2p", distillers="none", seeds="0,1")
    results = {c.key: {0: summary(50), 1: summary(51, frozen=40)} for c in plan.cells}
    tables = make_tables(plan, results)
    assert tables["frozen"][0]["seeds"] == [1]
    assert tables["rows"][0]["over_frozen"]["seeds"] == [1] and tables["rows"][0]["over_frozen"]["mean"] == 11
    (top,) = make_tables(plan, {c.key: {0: summary(50)} for c in plan.cells})["frozen"]
    assert top["n"] == 0 and top["average_accuracy"] is None


def test_heads_are_rows_of_their_own(plan_of):
    plan = plan_of(learners="l2p", distillers="none,kdp", heads="learned,ranpac", seeds="0,1")
    results = {}
    for c in plan.cells:
        value = 30 * (c.config.head == "ranpac") + 10 + c.config.seed * (1 + (c.config.distill == "kdp"))
        results.setdefault(c.key, {})[c.config.seed] = summary(value + (c.config.distill == "kdp"))
    rows = {(r["head"], r["distiller"]): r for r in make_tables(plan, results)["rows"]}
    assert list(rows) == [(h, d) for h in ("learned", "ranpac") for d in ("none", "kdp")]
    assert rows["learned", "kdp"]["difference"]["average_accuracy"]["mean"] == pytest.approx(1.5)
    assert rows["ranpac", "none"]["student"]["average_accuracy"]["mean"] == pytest.approx(40.5)
    assert rows["ranpac", "none"]["difference"] is None


def test_a_control_without_a_teacher_is_no_other_kd(plan_of):
    options = {"preset": "paper-cifar100", "data": "cifar100:x", "learners": "apt", "seeds": "0"}
    plan = plan_of(**options, distillers="none,two-heads,kd,kdp")
    results = results_of(plan, lambda le, d, s: {"two-heads": 90, "kd": 80}.get(d, 70))
    (best, *_) = [r for r in make_tables(plan, results)["paper"] if r["figure"] == "best other KD"]
    assert (best["distiller"], best["chosen_from"]) == ("kd", 1)
