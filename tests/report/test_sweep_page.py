"""The page about a sweep: complete, self-contained, also with one seed, missing runs and hostile names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.report.sweep_page import dot_plot, view, write_sweep_report

METRICS = ("average_accuracy", "forgetting", "incremental_accuracy")


def measure(values: list[float]) -> dict[str, Any] | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    std = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "std": std, "values": values}


def make_row(learner: str, distiller: str, values: list[float], **changes: Any) -> dict[str, Any]:
    compared = {"seeds": [0, 1], "mean": -1.5, "std": 1.0, "p": 0.0123, "p_holm": 0.0246, "note": None}
    return {
        "pair": "",
        "learner": learner,
        "learners": [learner],
        "without": [],
        "distiller": distiller,
        "query": "two-pass",
        "head": "ranpac",
        "n": len(values),
        "seeds": list(range(len(values))),
        "missing": list(range(len(values), 3)),
        "student": {m: measure(values) for m in METRICS},
        "teacher": {m: measure([v + 10 for v in values]) for m in METRICS} if distiller != "none" and values else None,
        "seconds": measure([100.0 for _ in values]),
        "difference": dict.fromkeys(METRICS[:2], compared if values else None) if distiller != "none" else None,
        "over_frozen": {**compared, "mean": -7.25} if values else None,
        **changes,
    }


@pytest.fixture
def document() -> dict[str, Any]:
    """Two learners, one of them without a finished run of KDP."""

    def cell(learner: str, distiller: str, seed: int, state: str) -> dict[str, Any]:
        name = f"{learner}-{distiller}-{seed}"
        return {
            "name": name,
            "state": state,
            "reason": "exit code 1: error: <b>no</b>" if state == "failed" else None,
            "log": f"logs/{name}.log",
            "seconds": 100.0 if state == "finished" else None,
        }

    both = ["l2p", "apt"]
    return {
        "settings": {"data": "folder:/data/insects & more", "compat": False, "epochs": 5, "tasks": None},
        "grid": {
            "pairs": [{"name": "", "teacher": "builtin:teacher", "student": "builtin:student"}],
            "learners": both,
            "distillers": ["none", "kdp", "kd"],
            "queries": ["two-pass"],
            "heads": ["ranpac"],
            "seeds": [0, 1, 2],
            "baseline": "none",
        },
        "preset": None,
        "cells": [
            *(cell(le, "none", s, "finished") for le in both for s in range(3)),
            *(cell("l2p", "kdp", s, "finished") for s in range(3)),
            *(cell("apt", "kdp", s, state) for s, state in enumerate(("failed", "running", "waiting"))),
        ],
        "refused": [
            {"learner": "apt", "distiller": "kd", "query": "two-pass", "head": "ranpac", "reason": "<i>because</i>"}
        ],
        "frozen": [
            {"pair": "", "heads": ["slda"], "n": 2, "seeds": [0, 1], "average_accuracy": measure([58.25, 58.75])}
        ],
        "rows": [
            make_row("l2p", "none", [50.0, 52.0, 54.0]),
            make_row("l2p", "kdp", [60.25, 61.0, 59.5]),
            make_row("apt", "none", [70.0, 71.0, 72.0]),
            make_row("apt", "kdp", []),
        ],
        "averages": [
            make_row("all learners", "none", [60.0, 61.5, 63.0], learners=both),
            make_row("all learners", "kdp", [], learners=both),
        ],
        "queries": [],
        "paper": [],
        "class_orders": {},
        "definitions": {"forgetting": "mean drop in points", "p": "a test"},
        "notes": ["<script>alert(1)</script>"],
    }


def test_page(tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]) -> None:
    page = read_page(write_sweep_report(tmp_path / "report.html", document))
    assert page.sections == {"pair-1", "record"}
    for expected in (
        "insects & more",
        "9 of 12",
        "1 running, 1 waiting, 1 failed",
        "L2P",
        "50.00",
        "52.00 ± 2.00",
        "60.25 ± 0.75",
        "70.25 ± 0.75",  # the teacher
        "−1.50",
        "0.012",
        "0.025",
        "no finished run",
        "apt-kdp-0 : exit code 1: error: <b>no</b>",
        "apt-kdp-1, apt-kdp-2",
        "<i>because</i>",
        "mean drop in points",
        "All learners: L2P, APT.",
        "builtin:teacher → builtin:student",
        "15 min 0 s",
        "58.50 ± 0.35",
        "−7.25",
        "bare student, SLDA",
    ):
        assert expected in page.text, expected
    again = (tmp_path / "report.html").read_bytes()
    assert write_sweep_report(tmp_path / "report.html", document).read_bytes() == again
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_self_contained(tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]) -> None:
    page = read_page(write_sweep_report(tmp_path / "report.html", document))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "i", "b"} - {"b"}
    assert "<script" not in page.html and "alert(1)" in page.text
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not re.findall(r"(?:src|href)=\"(?!#)|url\(|@import|https?://", page.html)


def test_one_seed_has_no_bar(tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]) -> None:
    note = {"seeds": [0], "mean": 5.0, "std": None, "p": None, "p_holm": None, "note": "one seed: no test"}
    document["rows"] = [
        make_row("l2p", "none", [50.0]),
        make_row("l2p", "kdp", [55.0], difference=dict.fromkeys(METRICS[:2], note)),
    ]
    document["averages"] = []
    document["frozen"][0] |= {"n": 1, "average_accuracy": measure([58.5])}
    page = read_page(write_sweep_report(tmp_path / "report.html", document))
    assert "Where there is no p: one seed: no test." in page.text and "+5.00" in page.text
    assert "±" not in page.text.partition("What the columns mean")[0]
    assert 'class="whisker"' not in page.html and page.html.count('class="student dot"') == 2


def test_nothing_has_finished(tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]) -> None:
    document["cells"] = [{**c, "state": "waiting", "seconds": None} for c in document["cells"]]
    document["rows"] = [make_row(r["learner"], r["distiller"], []) for r in document["rows"]]
    document["averages"] = []
    document["frozen"][0] |= {"n": 0, "heads": [], "average_accuracy": None}
    page = read_page(write_sweep_report(tmp_path / "report.html", document))
    assert "0 of 12" in page.text and page.html.count("no finished run") >= 4


def test_heads_where_there_are_several(
    tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]
) -> None:
    document["grid"]["heads"] = ["ranpac", "learned"]
    document["rows"].append(make_row("l2p", "none", [20.0, 21.0, 22.0], head="learned"))
    shown = view(document)
    assert [p["title"] for p in shown["pairs"][0]["plots"]] == [
        *("All learners, RanPAC", "L2P, RanPAC", "APT, RanPAC", "L2P, learnt head")
    ]
    first = shown["pairs"][0]["tables"][1]["rows"][0]
    assert first["learner"] == "Frozen baseline" and len(first["cells"]) == 12
    assert all(len(r["cells"]) == 12 for t in shown["pairs"][0]["tables"] for r in t["rows"])
    text = read_page(write_sweep_report(tmp_path / "report.html", document)).text
    assert "learnt head" in text and "Head" in text


def test_the_frozen_baseline_is_drawn_inside_the_scale(document: dict[str, Any]) -> None:
    document["frozen"][0]["average_accuracy"] = measure([95.0])
    plot = view(document)["pairs"][0]["plots"][0]
    assert plot["left"] < plot["frozen_x"] <= plot["right"]
    assert "Frozen baseline 95.0 %" in plot["alt"]


def test_dot_plot() -> None:
    rows = [make_row("l2p", "none", [50.0, 52.0, 54.0]), make_row("l2p", "kdp", [60.0]), make_row("l2p", "kd", [])]
    plot = dot_plot("L2P", rows, "none", 50.0, 60.0)
    none, kdp, kd = plot["lines"]
    middle = (plot["left"] + plot["right"]) / 2
    assert kdp["x"] == plot["right"] and plot["baseline_x"] == none["x"] < middle
    # The bar is one standard deviation (2 points of 10) to each side.
    assert none["bar"][1] - none["x"] == pytest.approx((plot["right"] - plot["left"]) / 5, abs=0.02)
    assert none["x"] - none["bar"][0] == pytest.approx((plot["right"] - plot["left"]) / 5, abs=0.02)
    assert none["seeds"][0]["x"] == plot["left"] and "seed 0: 50.00 %" in none["seeds"][0]["title"]
    assert kdp["bar"] is None and "x" not in kd and kd["text"] == "no finished run"
    assert none["y"] < kdp["y"] < kd["y"] < plot["floor"]
    assert "KDP 60.00 %, 1 seed." in plot["alt"]


def test_all_panels_have_one_scale_and_only_what_is_comparable(document: dict[str, Any]) -> None:
    partial = make_row("all learners", "kd", [99.0, 99.0], learners=["l2p"], without=["apt"])
    document["averages"].append(partial)
    shown = view(document)
    plots = shown["pairs"][0]["plots"]
    assert [p["title"] for p in plots] == ["All learners", "L2P", "APT"]
    assert len({tuple(t["text"] for t in p["x_ticks"]) for p in plots}) == 1
    assert [line["name"] for line in plots[0]["lines"]] == ["no distillation", "KDP"]
    assert shown["pairs"][0]["tables"][0]["rows"][-1]["learner"] == "All learners but APT"
    # The best is a row of the table: no average over learners, of these or of others.
    best = max(r["student"]["average_accuracy"]["mean"] for r in document["rows"] if r["n"])
    assert next(t for t in shown["figures"] if t["label"] == "Best accuracy")["value"] == f"{best:.2f}"


def test_queries_pairs_and_published_figures(
    tmp_path: Path, document: dict[str, Any], read_page: Callable[[Path], Any]
) -> None:
    document["grid"]["queries"] = ["two-pass", "one-pass"]
    document["grid"]["pairs"] = [
        {"name": name, "teacher": f"teacher-{name}", "student": f"student-{name}"} for name in ("a", "b")
    ]
    document["rows"] = [make_row("l2p", d, [50.0, 51.0], pair=p) for p in "ab" for d in ("none", "kdp")]
    document["averages"] = []
    document["frozen"] = [{**document["frozen"][0], "pair": name} for name in "ab"]
    document["queries"] = [make_row("l2p", "kdp", [50.0, 51.0], pair="a", query="one-pass")]
    document["preset"] = {"name": "paper-x", "source": "arXiv 1", "departures": ["epochs 1 (there 20)"]}
    value = {"ours": 50.5, "std": 0.5, "published": 79.64, "difference": -29.14}
    absent = {"ours": None, "std": None, "published": 6.35, "difference": None}
    entry = {"pair": "a", "learner": "l2p", "figure": "best other KD", "distiller": "kd", "n": 2, "chosen_from": 3}
    document["paper"] = [{**entry, "average_accuracy": value, "forgetting": absent}]
    page = read_page(write_sweep_report(tmp_path / "report.html", document))
    assert page.sections == {"pair-1", "pair-2", "record"}
    for expected in (
        "teacher-a → student-a",
        "L2P, two-pass",
        "Other queries against two-pass",
        "best other KD (KD, of 3)",
        "50.50 ± 0.50 79.64 −29.14 – 6.35 –",
        "arXiv 1; corrected behaviour, not compat",
        "Not as published: epochs 1 (there 20).",
    ):
        assert expected in page.text, expected
