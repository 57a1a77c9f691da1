"""A sweep as text: tables that read well in a terminal and are Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.words import p_text, signed_text, spread_text

NOTHING = "-"
"in a cell of a table where there is no number"


def markdown(document: Mapping[str, Any]) -> str:
    """sweep.md from the contents of sweep.json."""
    states = [c["state"] for c in document["cells"]]
    preset = document["preset"]
    parts = [
        f"# Sweep of {document['settings']['data']}",
        f"{states.count('finished')} of {len(states)} runs finished, {states.count('failed')} failed; seeds "
        f"{', '.join(map(str, document['grid']['seeds']))}, baseline {document['grid']['baseline']}.",
        _rows("Every learner and distiller", document["rows"], document, document["frozen"]),
    ]
    if document["averages"]:
        parts.append(_rows("Average over learners", document["averages"], document))
    if document["queries"]:
        parts.append(_queries(document))
    if preset:
        parts.append(_paper(document))
    if failed := [c for c in document["cells"] if c["state"] == "failed"]:
        parts.append("## Failed\n\n" + "\n".join(f"- {c['name']}: {c['reason']} (log: {c['log']})" for c in failed))
    if document["refused"]:
        lines = [
            f"- {r['learner']}, {r['distiller']}, {r['query']}, {r['head']}: {r['reason']}" for r in document["refused"]
        ]
        parts.append("## Left out\n\n" + "\n".join(lines))
    if document["notes"]:
        parts.append("## Notes\n\n" + "\n".join(f"- {n}" for n in document["notes"]))
    parts.append("## Definitions\n\n" + "\n".join(f"- {k}: {v}" for k, v in document["definitions"].items()))
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], lines: Sequence[Sequence[str | None]], left: int) -> str:
    """A Markdown table with aligned columns; the first `left` of them to the left, the others to the right."""
    rows = [[NOTHING if c is None else c for c in line] for line in lines]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def text(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text(header), rule, *(text(r) for r in rows)])


def _of(row: Mapping[str, Any], metric: str, key: str) -> float | None:
    comparison = (row["difference"] or {}).get(metric)
    value: float | None = comparison[key] if comparison else None
    return value


def _names(document: Mapping[str, Any]) -> list[str]:
    """The columns that say which row it is; those with one value in the whole sweep are left out."""
    keys = ["learner", "distiller"]
    keys += [k for k, many in (("query", "queries"), ("head", "heads")) if len(document["grid"][many]) > 1]
    if len(document["grid"]["pairs"]) > 1:
        keys.insert(0, "pair")
    return keys


def _label(row: Mapping[str, Any], key: str) -> str:
    """A cell of the first columns; an average says which learners it lacks."""
    text = str(row[key])
    return f"{text} but {', '.join(row['without'])}" if key == "learner" and row["without"] else text


def _frozen(row: Mapping[str, Any], keys: Sequence[str], columns: int) -> list[str | None]:
    """The frozen baseline of a pair as the first line of the table."""
    texts = {"pair": row["pair"], "learner": "frozen baseline", "head": ", ".join(row["heads"])}
    cells = [*(texts.get(k) for k in keys), str(row["n"]), spread_text(row["average_accuracy"])]
    return [*cells, *[None] * (columns - len(cells))]


def _rows(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    document: Mapping[str, Any],
    frozen: Sequence[Mapping[str, Any]] = (),
) -> str:
    keys = _names(document)
    base = document["grid"]["baseline"]
    header = [*keys, "n", "accuracy %", "vs frozen", "p (Holm)", f"vs {base}", "p", "p (Holm)", "forgetting"]
    header += [f"vs {base}", "incremental %", "teacher %", "seconds"]
    lines = [_frozen(row, keys, len(header)) for row in frozen]
    for row in rows:
        over = row["over_frozen"] or {}
        student, teacher = row["student"], row["teacher"]
        lines.append(
            [
                *(_label(row, k) for k in keys),
                str(row["n"]),
                spread_text(student["average_accuracy"]),
                signed_text(over.get("mean")),
                p_text(over.get("p_holm")),
                signed_text(_of(row, "average_accuracy", "mean")),
                p_text(_of(row, "average_accuracy", "p")),
                p_text(_of(row, "average_accuracy", "p_holm")),
                spread_text(student["forgetting"]),
                signed_text(_of(row, "forgetting", "mean")),
                spread_text(student["incremental_accuracy"]),
                spread_text(teacher["average_accuracy"] if teacher else None),
                spread_text(row["seconds"], 0),
            ]
        )
    text = f"## {title}\n\n{table(header, lines, len(keys))}"
    families = {r["learner"]: r["learners"] for r in rows if len(r["learners"]) > 1 and not r["without"]}
    text += "".join(f"\n\n{label[:1].upper()}{label[1:]}: {', '.join(of)}." for label, of in families.items())
    for of in (f for f in frozen if f["heads"]):
        text += f"\n\nFrozen baseline{' of ' + of['pair'] if of['pair'] else ''}: head {', '.join(of['heads'])}."
    notes = {c["note"] for r in rows for c in (r["difference"] or {}).values() if c and c["note"]}
    return text + ("\n\nNo p: " + "; ".join(sorted(notes)) + "." if notes else "")


def _queries(document: Mapping[str, Any]) -> str:
    keys = _names(document)
    first = document["grid"]["queries"][0]
    header = [*keys, f"accuracy vs {first}", "p", "p (Holm)", f"forgetting vs {first}"]
    lines = [
        [
            *(str(row[k]) for k in keys),
            signed_text(_of(row, "average_accuracy", "mean")),
            p_text(_of(row, "average_accuracy", "p")),
            p_text(_of(row, "average_accuracy", "p_holm")),
            signed_text(_of(row, "forgetting", "mean")),
        ]
        for row in document["queries"]
    ]
    return f"## Other queries against {first}\n\n{table(header, lines, len(keys))}"


def _paper(document: Mapping[str, Any]) -> str:
    preset = document["preset"]
    header = ["backbones", "learner", "distiller", "n", "accuracy %", "published", "difference"]
    header += ["forgetting", "published", "difference"]
    lines = []
    for row in document["paper"]:
        name = row["figure"]
        if row["chosen_from"]:
            name += f" ({row['distiller']}, of {row['chosen_from']})"
        cells = [row["pair"], row["learner"], name, str(row["n"])]
        for metric in ("average_accuracy", "forgetting"):
            value = row[metric]
            ours = spread_text({"mean": value["ours"], "std": value["std"]})
            cells += [ours, f"{value['published']:.2f}", signed_text(value["difference"])]
        lines.append(cells)
    compat = "as the authors' code does (--compat)" if document["settings"]["compat"] else "corrected (--no-compat)"
    text = f"## Beside the published figures of {preset['source']}\n\n{table(header, lines, 3)}\n\n"
    text += f"Behaviour: {compat}. The published figures have no standard deviation."
    if preset["departures"]:
        text += "\n\nNot as published: " + "; ".join(preset["departures"]) + "."
    return text
