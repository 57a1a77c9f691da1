"""The statistics of a sweep: mean and spread over seeds, paired differences, and the average over learners."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..artefacts.run_record import Metrics
from ..train.distill import DISTILLERS
from ..train.metrics import DEFINITIONS as METRIC_DEFINITIONS
from .grid import Key, SweepPlan
from .presets import BEST_OTHER, KDP, NONE, POOL_LEARNERS

ALL, POOL = "all learners", "pool learners"
"families to average over; POOL has no rows of its own where all learners have a pool"
METRICS = ("average_accuracy", "forgetting", "incremental_accuracy")
COMPARED = ("average_accuracy", "forgetting")
DEFINITIONS = {
    "±": "sample standard deviation over seeds (n - 1); each seed has its own initial values, batches and "
    "(but with --compat) class order",
    "n": "seeds that are finished",
    "seconds": "wall time of a cell in s. The first cell of a learner, query and seed that needs a teacher trains it, "
    "the others use it again; cells that ran beside each other shared the machine",
    "difference": "mean over seeds of (this - baseline with the same learner, query and seed), in points",
    "frozen baseline": METRIC_DEFINITIONS["baseline"] + "; the mean over seeds, each with its class order",
    "vs frozen": "mean over seeds of (this - the frozen baseline of the same run), in points",
    "p": "two-sided paired t-test over seeds (scipy.stats.ttest_rel) that the difference is 0; it assumes that "
    "differences are roughly normal, and with 3 seeds it finds only what is large beside their spread",
    "p (Holm)": "the same after Holm's correction for the number of comparisons of this metric in this table",
    "average over learners": "mean over the learners within each seed, then the same statistics over seeds; compared "
    "with the baseline's mean over the same learners",
}

Summary = Mapping[str, Any]
"""{"student": {metric: value}, "teacher": the same or None, "frozen": {"head", "average_accuracy"} or None,
"seconds": s} of a finished cell"""
Results = Mapping[Key, Mapping[int, Summary]]
"finished cells by seed"


def summarise(metrics: Metrics) -> Summary:
    """What the table needs of a run's metrics.json."""
    sides = {name: {k: getattr(side, k) for k in METRICS} for name, side in metrics.sides.items()}
    frozen = vars(metrics.baseline) if metrics.baseline else None  # runs of early versions have none
    return {"student": None, "teacher": None, **sides, "frozen": frozen, "seconds": metrics.seconds}


def measure(values: Sequence[float]) -> dict[str, Any] | None:
    """{"mean", "std", "values"}; std is None for one value. None for no value."""
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def compare(mine: Mapping[int, float], base: Mapping[int, float]) -> dict[str, Any] | None:
    """Paired by seed: {"seeds", "mean", "std", "p", "p_holm": None, "note"}; None without a common seed.

    p is None where the test says nothing, and `note` says why.
    """
    seeds = [s for s in mine if s in base]
    if not seeds:
        return None
    differences = [mine[s] - base[s] for s in seeds]
    mean = statistics.fmean(differences)
    std = statistics.stdev(differences) if len(seeds) > 1 else None
    p, note = None, None
    if std is None:
        note = "one seed: no test"
    elif std <= 1e-9 * max(1.0, abs(mean)):  # 0 / 0, or noise of the last digit
        note = "all differences are equal: no test"
    else:
        from scipy.stats import ttest_rel

        p = float(ttest_rel([mine[s] for s in seeds], [base[s] for s in seeds]).pvalue)
    return {"seeds": seeds, "mean": mean, "std": std, "p": p, "p_holm": None, "note": note}


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction of p-values; None counts for no comparison and stays None.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted((i for i, p in enumerate(values) if p is not None), key=lambda i: values[i] or 0.0)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * (values[index] or 0.0)))
        corrected[index] = largest
    return corrected


def make_tables(plan: SweepPlan, results: Results) -> dict[str, list[dict[str, Any]]]:
    """{"frozen", "rows", "averages", "queries", "paper"} as lists of rows, in the order of the grid."""
    rows, averages, queries = [], [], []
    for key in plan.keys:
        pair, learner, distiller, query, head = key
        mine = results.get(key, {})
        row = _row(plan, key, [learner], mine)
        if distiller != plan.baseline:
            row["difference"] = _difference(mine, results.get((pair, learner, plan.baseline, query, head), {}))
        rows.append(row)
        if query != plan.queries[0]:
            other = _difference(mine, results.get((pair, learner, distiller, plan.queries[0], head), {}))
            queries.append(
                {**{k: row[k] for k in ("pair", "learner", "distiller", "query", "head")}, "difference": other}
            )
    for label, learners in _families(plan):
        for at in (
            (p.name, query, head, distiller)
            for p in plan.pairs
            for query in plan.queries
            for head in plan.heads
            for distiller in plan.distillers
        ):
            averages += _average(plan, results, label, learners, at)
    for table in (rows, averages, queries):
        correct(table)
    tables = {"rows": rows, "averages": averages, "queries": queries, "paper": _paper(plan, rows)}
    return {"frozen": _frozen(plan, results), **tables}


def _frozen(plan: SweepPlan, results: Results) -> list[dict[str, Any]]:
    """The frozen baseline of each pair of backbones: of each seed once, for all cells of a seed have the same."""
    rows = []
    for pair in plan.pairs:
        found: dict[int, Mapping[str, Any]] = {}
        for key in plan.keys:
            for seed, summary in results.get(key, {}).items() if key[0] == pair.name else ():
                if summary["frozen"]:
                    found.setdefault(seed, summary["frozen"])
        seeds = [s for s in plan.seeds if s in found]
        accuracy = measure([found[s]["average_accuracy"] for s in seeds])
        heads = list(dict.fromkeys(found[s]["head"] for s in seeds))
        rows.append({"pair": pair.name, "heads": heads, "n": len(seeds), "seeds": seeds, "average_accuracy": accuracy})
    return rows


def correct(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in p_holm: each metric of one table is one family of comparisons."""
    for metric in COMPARED:
        compared = [r["difference"][metric] for r in rows if r["difference"] and r["difference"][metric]]
        for comparison, p in zip(compared, holm([c["p"] for c in compared]), strict=True):
            comparison["p_holm"] = p
    frozen = [r["over_frozen"] for r in rows if r.get("over_frozen")]
    for comparison, p in zip(frozen, holm([c["p"] for c in frozen]), strict=True):
        comparison["p_holm"] = p


def _families(plan: SweepPlan) -> list[tuple[str, tuple[str, ...]]]:
    """Sets of learners to average over: all that learn, and those with a pool; none of a single learner."""
    learning = tuple(le for le in plan.learners if le != "frozen")
    pool = tuple(le for le in plan.learners if le in POOL_LEARNERS)
    families = [(ALL, learning)]
    if pool != learning:
        families.append((POOL, pool))
    return [(label, learners) for label, learners in families if len(learners) > 1]


def _row(plan: SweepPlan, key: Key, learners: Sequence[str], mine: Mapping[int, Summary]) -> dict[str, Any]:
    pair, learner, distiller, query, head = key
    seeds = [s for s in plan.seeds if s in mine]
    teachers = [mine[s]["teacher"] for s in seeds]
    return {
        "pair": pair,
        "learner": learner,
        "learners": list(learners),
        "without": [],
        "distiller": distiller,
        "query": query,
        "head": head,
        "n": len(seeds),
        "seeds": seeds,
        "missing": [s for s in plan.seeds if s not in mine],
        "student": {m: measure([mine[s]["student"][m] for s in seeds]) for m in METRICS},
        "teacher": {m: measure([t[m] for t in teachers]) for m in METRICS} if teachers and all(teachers) else None,
        "seconds": measure([mine[s]["seconds"] for s in seeds]),
        "difference": None,
        "over_frozen": compare(
            {s: mine[s]["student"]["average_accuracy"] for s in seeds},
            {s: mine[s]["frozen"]["average_accuracy"] for s in seeds if mine[s]["frozen"]},
        ),
    }


def _difference(mine: Mapping[int, Summary], base: Mapping[int, Summary]) -> dict[str, Any]:
    def values(of: Mapping[int, Summary], metric: str) -> dict[int, float]:
        return {seed: summary["student"][metric] for seed, summary in sorted(of.items())}

    return {metric: compare(values(mine, metric), values(base, metric)) for metric in COMPARED}


def _average(
    plan: SweepPlan, results: Results, label: str, learners: Sequence[str], at: tuple[str, str, str, str]
) -> list[dict[str, Any]]:
    """One row of the averages, or none where fewer than two learners have this combination."""
    pair, query, head, distiller = at
    having = [le for le in learners if (pair, le, distiller, query, head) in plan.keys]
    pool = [le for le in plan.learners if le in POOL_LEARNERS]
    if len(having) < 2 or (label == ALL and having == pool != list(learners)):  # that is the row of the pool learners
        return []
    mine = averaged(results, pair, having, distiller, query, head)
    row = _row(plan, (pair, label, distiller, query, head), having, mine)
    row["without"] = [le for le in learners if le not in having]
    if distiller != plan.baseline:
        row["difference"] = _difference(mine, averaged(results, pair, having, plan.baseline, query, head))
    return [row]


def averaged(
    results: Results, pair: str, learners: Sequence[str], distiller: str, query: str, head: str
) -> dict[int, dict[str, Any]]:
    """Mean over learners of each metric, for the seeds where all of them have finished."""
    cells = [results.get((pair, learner, distiller, query, head), {}) for learner in learners]
    seeds = sorted(set.intersection(*(set(c) for c in cells)))

    def side(name: str, seed: int) -> dict[str, float] | None:
        sides = [c[seed][name] for c in cells]
        return {m: statistics.fmean(s[m] for s in sides) for m in METRICS} if all(sides) else None

    return {
        seed: {
            "student": side("student", seed),
            "teacher": side("teacher", seed),
            "frozen": cells[0][seed]["frozen"],  # the same for every learner
            "seconds": statistics.fmean(c[seed]["seconds"] for c in cells),
        }
        for seed in seeds
    }


def _paper(plan: SweepPlan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Published figures of the preset beside ours; of our other distillers the one with the best mean accuracy."""
    if plan.preset is None:
        return []
    table = []
    for (pair, learner), figures in plan.preset.published.items():
        ours = [r for r in rows if _first(plan, r) == (pair, learner)]
        if not ours:
            continue
        for figure, published in figures.items():
            chosen = {NONE: ["none"], KDP: ["kdp"]}.get(
                figure, [d for d in plan.distillers if DISTILLERS[d].needs_teacher and d != "kdp"]
            )
            having = [r for r in ours if r["distiller"] in chosen and r["n"]]
            best = max(having, key=_accuracy, default=None)
            line: dict[str, Any] = {
                "pair": pair,
                "learner": learner,
                "figure": figure,
                "distiller": best["distiller"] if best else None,
                "n": best["n"] if best else 0,
                "chosen_from": len(having) if figure == BEST_OTHER else None,
            }
            for metric, value in zip(COMPARED, published, strict=True):
                mine = best["student"][metric] if best else None
                line[metric] = {
                    "ours": mine["mean"] if mine else None,
                    "std": mine["std"] if mine else None,
                    "published": value,
                    "difference": mine["mean"] - value if mine else None,
                }
            table.append(line)
    return table


def _first(plan: SweepPlan, row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Pair and learner of a row with the first query and head of the sweep; None for other rows."""
    first = (row["query"], row["head"]) == (plan.queries[0], plan.heads[0])
    return (row["pair"], row["learner"]) if first else None


def _accuracy(row: Mapping[str, Any]) -> float:
    mean: float = row["student"]["average_accuracy"]["mean"]
    return mean if math.isfinite(mean) else -math.inf
