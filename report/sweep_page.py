"""The page about a sweep: what its tables and dot plots show, from the contents of sweep.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import ticks
from .model_page import fill, write_page
from .words import DISTILLERS, HEADS, LEARNERS, duration_text, labelled, p_text, signed_text, source_text, spread_text

TEMPLATE = "sweep.html.j2"
Row = Mapping[str, Any]
COLUMNS = 12
"of numbers, in the table of all rows"


def write_sweep_report(out: Path, document: Mapping[str, Any]) -> Path:
    """Write the page and return its path. document: as `cdl-edge sweep` writes it, finished or not."""
    write_page(Path(out), fill(TEMPLATE, **view(document)))
    return Path(out)


def view(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the template lays out: texts and geometry only."""
    grid, cells = document["grid"], document["cells"]
    several = [k for k, many in (("query", "queries"), ("head", "heads")) if len(grid[many]) > 1]
    pairs = []
    for pair in grid["pairs"]:
        rows = [r for r in document["rows"] if r["pair"] == pair["name"]]
        averages = [r for r in document["averages"] if r["pair"] == pair["name"]]
        frozen = next(f for f in document["frozen"] if f["pair"] == pair["name"])
        low, high = _domain([*rows, *averages], frozen["average_accuracy"])
        panels = (*_panels(averages, several), *_panels(rows, several))
        plots = [dot_plot(title, of, grid["baseline"], low, high, frozen["average_accuracy"]) for title, of in panels]
        pairs.append(
            {
                "title": f"{pair['teacher']} → {pair['student']}",
                "name": pair["name"],
                "plots": plots,
                "tables": [t for t in (_table(averages, several), _table(rows, several, frozen)) if t],
                "queries": _queries(
                    [r for r in document["queries"] if r["pair"] == pair["name"]], grid["queries"][0], several
                ),
                "paper": [_beside(r) for r in document["paper"] if r["pair"] == pair["name"]],
            }
        )
    settings = {k: v for k, v in document["settings"].items() if k != "data"}
    return {
        "title": source_text(document["settings"]["data"]),
        "preset": document["preset"],
        "compat": document["settings"]["compat"],
        "baseline": _distiller(grid["baseline"]),
        "figures": _figures(document),
        "pairs": pairs,
        "failed": [c for c in cells if c["state"] == "failed"],
        "missing": [c["name"] for c in cells if c["state"] in ("waiting", "running")],
        "refused": [
            {**r, "name": f"{_learner(r['learner'])}, {_distiller(r['distiller'])}, {_head(r['head'])}"}
            for r in document["refused"]
        ],
        "notes": document["notes"],
        "settings": [("Data", document["settings"]["data"]), *labelled(settings)],
        "definitions": [(k.replace("_", " "), v) for k, v in document["definitions"].items()],
        "seeds": ", ".join(map(str, grid["seeds"])),
    }


def dot_plot(
    title: str, rows: Sequence[Row], baseline: str, low: float, high: float, frozen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Geometry of one panel: a line for each distiller with its mean, its standard deviation and every seed.

    Args:
        rows: of one learner and query; one of them may be the baseline's.
        frozen: accuracy of the frozen baseline, as in a row.
        low, high: ends of the scale in %, the same for all panels so that they can be compared.
    """
    width, left, right, top, step, bottom = 480, 132, 62, 14, 30, 44
    floor = top + step * len(rows)
    marks = ticks(low, high)

    def x(value: float) -> float:
        return round(left + (width - left - right) * (value - marks[0]) / (marks[-1] - marks[0]), 2)

    lines = []
    for i, row in enumerate(rows):
        accuracy = row["student"]["average_accuracy"]
        line: dict[str, Any] = {
            "name": _distiller(row["distiller"]),
            "y": top + step * i + step / 2,
            "baseline": row["distiller"] == baseline,
            "text": "no finished run",
        }
        if accuracy is not None:
            mean, std = accuracy["mean"], accuracy["std"]
            line |= {
                "x": x(mean),
                "bar": (x(max(marks[0], mean - std)), x(min(marks[-1], mean + std))) if std is not None else None,
                "seeds": [
                    {"x": x(v), "title": f"{line['name']}, seed {s}: {v:.2f} %"}
                    for s, v in zip(row["seeds"], accuracy["values"], strict=True)
                ],
                "text": f"{mean:.1f} %",
                "title": f"{line['name']}: {spread_text(accuracy)} %, {_seeds(row['n'])}",
            }
        lines.append(line)
    at = next((line["x"] for line in lines if line["baseline"] and "x" in line), None)
    return {
        "title": title,
        "width": width,
        "height": floor + bottom,
        "left": left,
        "right": width - right,
        "top": top,
        "floor": floor,
        "baseline_x": at,
        "frozen_x": x(frozen["mean"]) if frozen else None,
        "lines": lines,
        "x_ticks": [{"x": x(m), "text": f"{m:g}"} for m in marks],
        "alt": f"{title}: final average accuracy in %. "
        + (f"Frozen baseline {frozen['mean']:.1f} %. " if frozen else "")
        + " ".join(f"{r['name']} {r['title'].partition(': ')[2] if 'title' in r else r['text']}." for r in lines),
    }


def _domain(rows: Sequence[Row], frozen: Mapping[str, Any] | None) -> tuple[float, float]:
    """Ends of the scale in %: everything that is drawn is inside, and they are at least 4 points apart."""
    measures = [m for r in rows if (m := r["student"]["average_accuracy"]) is not None]
    measures += [frozen] if frozen else []
    values = [v for m in measures for v in (*m["values"], m["mean"] - (m["std"] or 0), m["mean"] + (m["std"] or 0))]
    if not values:
        return 0.0, 100.0
    missing = max(0.0, 4.0 - (max(values) - min(values))) / 2
    return max(0.0, min(values) - missing), min(100.0, max(values) + missing)


def _panels(rows: Sequence[Row], several: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each learner or average, and of each query and head where there are several.

    An average that lacks a learner is no neighbour for one that has it: it stands in the table only.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row["without"]:
            title = ", ".join([_learner(row["learner"]), *_which(row, several)])
            groups.setdefault(title, []).append(row)
    return list(groups.items())


def _which(row: Row, several: Sequence[str]) -> list[str]:
    """Query and head of a row, each where the sweep has several of them."""
    return [_head(row[k]) if k == "head" else row[k] for k in several]


def _table(rows: Sequence[Row], several: Sequence[str], frozen: Row | None = None) -> dict[str, Any] | None:
    if not rows:
        return None
    average = len(rows[0]["learners"]) > 1
    lines: list[dict[str, Any]] = []
    if frozen is not None and frozen["n"]:
        heads = "bare student, " + ", ".join(map(_head, frozen["heads"]))
        cells = [str(frozen["n"]), spread_text(frozen["average_accuracy"]), *[None] * (COLUMNS - 2)]
        lines.append({"learner": "Frozen baseline", "distiller": heads, "which": ["" for _ in several], "cells": cells})
    for row in rows:
        student, teacher = row["student"], row["teacher"]
        over = row["over_frozen"] or {}
        difference = row["difference"] or {}
        accuracy, forgetting = (difference.get(m) for m in ("average_accuracy", "forgetting"))
        name = _learner(row["learner"])
        lines.append(
            {
                "learner": name + (f" but {', '.join(map(_learner, row['without']))}" if row["without"] else ""),
                "distiller": _distiller(row["distiller"]),
                "which": _which(row, several),
                "cells": [
                    str(row["n"]),
                    spread_text(student["average_accuracy"]),
                    _minus(signed_text(over.get("mean"))),
                    p_text(over.get("p_holm")),
                    _minus(signed_text(accuracy["mean"])) if accuracy else None,
                    p_text(accuracy["p"]) if accuracy else None,
                    p_text(accuracy["p_holm"]) if accuracy else None,
                    spread_text(student["forgetting"]),
                    _minus(signed_text(forgetting["mean"])) if forgetting else None,
                    spread_text(student["incremental_accuracy"]),
                    spread_text(teacher["average_accuracy"]) if teacher else None,
                    spread_text(row["seconds"], 0),
                ],
            }
        )
    no_test = sorted({c["note"] for r in rows for c in (r["difference"] or {}).values() if c and c["note"]})
    notes = [f"Where there is no p: {'; '.join(no_test)}."] if no_test else []
    families = {r["learner"]: r["learners"] for r in rows if average and not r["without"]}
    notes += [f"{_learner(label)}: {', '.join(map(_learner, of))}." for label, of in families.items()]
    return {
        "title": "Average over learners" if average else "Every learner and distiller",
        "which": [k.capitalize() for k in several],
        "rows": lines,
        "notes": notes,
    }


def _queries(rows: Sequence[Row], first: str, several: Sequence[str]) -> dict[str, Any] | None:
    if not rows:
        return None
    lines = []
    for row in rows:
        accuracy, forgetting = (row["difference"][m] for m in ("average_accuracy", "forgetting"))
        name = ", ".join([_learner(row["learner"]), *_which(row, [k for k in several if k == "head"])])
        cells: list[str | None] = [name, _distiller(row["distiller"]), row["query"]]
        cells += [_minus(signed_text(accuracy["mean"])), p_text(accuracy["p_holm"])] if accuracy else [None, None]
        lines.append([*cells, _minus(signed_text(forgetting["mean"])) if forgetting else None])
    return {"first": first, "rows": lines}


def _beside(row: Row) -> dict[str, Any]:
    """One published figure and ours."""
    name = {"none": DISTILLERS["none"], "kdp": DISTILLERS["kdp"]}.get(row["figure"], row["figure"])
    if row["chosen_from"]:
        name = f"{name} ({_distiller(row['distiller'])}, of {row['chosen_from']})"
    cells: list[str | None] = []
    for metric in ("average_accuracy", "forgetting"):
        value = row[metric]
        cells += [
            spread_text({"mean": value["ours"], "std": value["std"]}),
            f"{value['published']:.2f}",
            _minus(signed_text(value["difference"])),
        ]
    return {"learner": _learner(row["learner"]), "distiller": name, "cells": [str(row["n"]), *cells]}


def _figures(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The tiles at the top: {"label", "value", "unit", "note"}."""
    cells, grid = document["cells"], document["grid"]
    done = [c for c in cells if c["state"] == "finished"]
    seconds = sum(c["seconds"] for c in done)
    tiles = [
        {"label": "Runs finished", "value": f"{len(done)} of {len(cells)}", "unit": "", "note": _states(cells)},
        {
            "label": "Seeds",
            "value": str(len(grid["seeds"])),
            "unit": "",
            "note": "each with its own class order"
            if not document["settings"]["compat"]
            else "one class order (compat)",
        },
    ]
    for frozen in (f for f in document["frozen"] if f["n"]):
        heads = "bare student, " + ", ".join(map(_head, frozen["heads"]))
        value = f"{frozen['average_accuracy']['mean']:.2f}"
        tiles.append({"label": "Frozen baseline", "value": value, "unit": "%", "note": heads})
    rows = [r for r in document["rows"] if r["n"]]  # an average over learners is nothing that one could deploy
    if rows:
        best = max(rows, key=lambda r: r["student"]["average_accuracy"]["mean"])
        accuracy = best["student"]["average_accuracy"]
        note = f"{_distiller(best['distiller'])}, {_learner(best['learner'])}, {_head(best['head'])}"
        tiles.append({"label": "Best accuracy", "value": f"{accuracy['mean']:.2f}", "unit": "%", "note": note})
        gain = (best["difference"] or {}).get("average_accuracy")
        if gain:
            p = p_text(gain["p_holm"])
            note = f"over {_distiller(grid['baseline'])}" + (f", p (Holm) {p}" if p else "")
            value = _minus(signed_text(gain["mean"])) or ""
            tiles.append({"label": "Its gain", "value": value, "unit": "points", "note": note})
    if done:
        tiles.append(
            {"label": "Training time", "value": duration_text(seconds), "unit": "", "note": "of all runs, added"}
        )
    return tiles


def _states(cells: Sequence[Mapping[str, Any]]) -> str:
    states = [c["state"] for c in cells]
    parts = [f"{states.count(s)} {s}" for s in ("running", "waiting", "failed") if s in states]
    return ", ".join(parts) or "nothing is missing"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _learner(name: str) -> str:
    text = LEARNERS.get(name, name)
    return text[:1].upper() + text[1:]


def _head(name: str) -> str:
    return HEADS.get(name, name)


def _distiller(name: str) -> str:
    return DISTILLERS.get(name, name)


def _minus(text: str | None) -> str | None:
    """Replace the hyphen by the minus sign that is as wide as a plus."""
    return None if text is None else text.replace("-", "−")
