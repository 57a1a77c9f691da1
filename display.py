"""What the terminal shows: plain tables and the few sentences around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .artefacts.layout import SCHEMES_KEY

if TYPE_CHECKING:
    from .artefacts.run_record import Metrics, SideResult


def printable(text: str) -> str:
    """Text for a terminal: what would command it (escape sequences, changes of direction) becomes \\x1b and the like.

    Class names and paths are whatever somebody has written into a folder or a manifest.
    """
    kept = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(kept)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces; the first to the left, the others to the right."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *(line(r) for r in cells[1:])])


def accuracy_table(metrics: Metrics) -> str:
    """Accuracy after each task for teacher and student."""
    sides = [(name, side) for name in ("teacher", "student") if (side := metrics.side(name)) is not None]
    header = ["after task", *(f"{name} accuracy %" for name, _ in sides), *(f"{name} forgetting" for name, _ in sides)]
    columns = [side.accuracy_after_task or () for _, side in sides]
    columns += [side.forgetting_after_task or () for _, side in sides]
    return table(header, [[i + 1, *(f"{v:.2f}" for v in row)] for i, row in enumerate(zip(*columns, strict=True))])


def baseline_line(accuracy: float, baseline: Mapping[str, Any] | None) -> str:
    """The student's average accuracy in % beside that of the frozen baseline, as metrics.json has it."""
    if baseline is None:
        return f"student {accuracy:.2f} %, frozen baseline unknown: the run is of a version without one"
    other = baseline["average_accuracy"]
    return (
        f"student {accuracy:.2f} %, frozen baseline ({baseline['head']}) {other:.2f} %: {accuracy - other:+.2f} points"
    )


def baseline_warning(
    accuracy: float, baseline: Mapping[str, Any] | None, config: Mapping[str, Any] | None = None
) -> str | None:
    """What to try where the student is below the frozen baseline; None where it is not.

    config: of the run, so that nothing is proposed that it has already.
    """
    if baseline is None or (short := baseline["average_accuracy"] - accuracy) < 0.005:
        return None
    tried = config or {}
    ideas = {"learner": "frozen", "head": baseline["head"]}
    options = [f"--{name} {value}" for name, value in ideas.items() if tried.get(name) != value]
    if tried.get("learner") == "frozen" and options:
        return f"note: {options[0]} is {short:.2f} points better on these validation images"
    return (
        f"warning: the student is {short:.2f} points below the frozen baseline, the bare backbone with a "
        f"{baseline['head']} head, which trains in seconds. Try {', '.join([*options, 'more images of each class'])}"
    )


def forgetting_line(student: SideResult) -> str | None:
    """Forgetting beside that of the same head made from all images at once; None where that is not known."""
    joint = student.forgetting_of_joint
    if joint is None:
        return None
    return (
        f"forgetting {student.forgetting:.2f} points; the same head, made from all images at once, has {joint:.2f}: "
        "so much comes from more classes to choose among"
    )


def latency_table(profile: dict[str, Any]) -> str:
    """Percentiles of each stage in ms, from `profile --json`."""
    rows = []
    for stage in ("preprocess_ms", "compute_ms", "end_to_end_ms"):
        values = profile[stage]
        rows.append([stage[:-3].replace("_", " "), *(f"{values[k]:.3f}" for k in ("p50", "p90", "p99", "mean", "std"))])
    return table(["stage (ms)", "p50", "p90", "p99", "mean", "std"], rows)


def prediction_line(prediction: Mapping[str, Any], name: str) -> str:
    """What a prediction says, see runtime.predict.predict, of the picture of that name."""
    known = "  looks like none of the classes" if prediction["unknown"] else ""
    share = f"{prediction['label']} ({100 * prediction['probability']:.1f} %)"
    prompts = f"  prompts {selected}" if (selected := prediction["prompts"]["selected"]) else ""
    sure = f"confidence {100 * prediction['confidence']:.1f} %"
    return f"{name}: {share}, {sure}{known}  task {prediction['task'] + 1}{prompts}"


def parity_line(parity: dict[str, Any]) -> str:
    """One sentence from the manifest's parity entry."""
    return (
        f"parity: max |difference of logits| {parity['max_abs_error']:.2e}, mean {parity['mean_abs_error']:.2e} "
        f"over {parity['images']} real images (tolerance {parity['tolerance']:.0e}), "
        f"top-1 agreement {parity['top1_agreement']:.2f} %"
    )


def quantisation_table(result: dict[str, Any]) -> str:
    """What `calibrate` found, a line for each quantisation scheme and each precision."""
    lines, images = [], 0
    for name, found in result[SCHEMES_KEY].items():
        images = found["images"]  # the same for every scheme
        line = f"{name}: {found['layers_int8']} layers in 8 bits, {len(found['layers_float'])} left in float"
        line += f"; same answer as fp32 on {found['agreement']:.2f} % of {found['images']} images"
        if found["after"] is not None:
            drop = found["drop"]["average"]
            line += (
                f"; accuracy {found['before']['average_accuracy']:.2f} -> {found['after']['average_accuracy']:.2f} %"
            )
            worst = max(d for d in found["drop"]["per_task"] if d is not None)
            pair = found["paired"]
            line += f" (loses {drop:.2f} points, the worst task {worst:.2f}; "
            line += f"{pair['lost']} answers lost, {pair['won']} won, p = {pair['p']:.2f})"
        if found["gate"] is not None:
            line += f"; within --max-drop {result['max_drop']:g}: {found['gate']['verdict']}"
        lines.append(line)
    if result["smooth"] is not None:
        lines.append(f"channels after LayerNorms smoothed with strength {result['smooth']:g}")
    for entry in result["latency"]:
        label = f"{entry['backend']} {entry['precision']}"
        lines.append(f"{label:20s} {entry['compute_ms']:8.2f} ms  {1 / entry['ratio']:.2f}x")
    lines += [f"not recommended: {r['backend']} {r['precision']}: {r['reason']}" for r in result["refused"]]
    advice = result["recommended"]
    compared = "" if advice["precision"] == "fp32" else f", by the answers to {images} image(s)"
    lines.append(f"recommended here: --backend {advice['backend']} --precision {advice['precision']}{compared}")
    return "\n".join(lines)
