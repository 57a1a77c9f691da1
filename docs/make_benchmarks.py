"""The tables of docs/benchmarks.md that come from kept results: one table a benchmark and machine.

    python benchmarks/end_to_end.py | tail -1 > benchmarks/results/NAME.json
    python docs/make_benchmarks.py            # write them
    python docs/make_benchmarks.py --check    # exit code 1 where the page is stale

Every file of benchmarks/results/ is the last line that a benchmark printed. The page marks where a table goes:
`<!-- results of end_to_end -->` ... `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "benchmarks.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- results of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
UNITS = {"amx_tile": "AMX", "avx512_vnni": "VNNI", "avx512f": "AVX512", "avx2": "AVX2"}
"flags of a CPU that decide how fast its products are, fastest first"


def documents(benchmark: str) -> Iterator[dict[str, Any]]:
    """The kept results of one benchmark, by file name. Raises: ValueError for a file that is no result."""
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if "benchmark" not in document or "machine" not in document:
            raise ValueError(f"{path}: expected the last line of a benchmark, with `benchmark` and `machine`")
        if document["benchmark"] == benchmark:
            yield document


def heading(document: dict[str, Any]) -> str:
    """What it was measured on, and the fastest products there."""
    machine, top = document["machine"], document["ceiling"]
    top = top[0] if isinstance(top, list) else top
    flags = [name for flag, name in UNITS.items() if flag in machine["cpu_flags"]]
    rates = []
    for precision, ways in top["gflop_per_second"].items():
        found = [rate for rate in ways.values() if rate]
        if found:
            rates.append(f"{precision} {max(found):.0f}")
    return (
        f"{machine['cpu']} ({', '.join(flags) or 'none of ' + ', '.join(UNITS.values())}), one thread. "
        f"Fastest products in the same run, GFLOP/s: {', '.join(rates)}.\n"
    )


def end_to_end(document: dict[str, Any]) -> str:
    """Milliseconds and ratio of each way; a column for each kind of picture."""
    cases = document["cases"]
    ways = list(dict.fromkeys(way for rows in cases.values() for way in rows))
    lines = ["| | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    for way in ways:
        cells = [cell(rows[way]) if way in rows else "-" for rows in cases.values()]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def export(document: dict[str, Any]) -> str:
    """Ratio of each graph to one pass of the bare ViT; a table for each size of model and batch."""
    parts = []
    for field in document["races"]:
        parts.append(
            f"ViT-{field['model']}, batch {field['batch']}, {field['threads']} thread(s); 1.00 is "
            f"{field['graphs'][document['reference']]['median_ms']:.1f} ms.\n"
        )
        parts.append("| graph | ratio | 95 % interval |\n|---|---|---|")
        for name, row in field["graphs"].items():
            found = f"{row['ratio']:.2f} | {row['interval'][0]:.2f} .. {row['interval'][1]:.2f}" if row else "not run |"
            parts.append(f"| {name} | {found} |")
    return "\n".join(parts) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"end_to_end": end_to_end, "export": export}


def cell(row: dict[str, Any] | None) -> str:
    """ "36.1 ms, 0.57 (0.56 .. 0.58)"; a comparison has no milliseconds."""
    if row is None:
        return "not run"
    time = f"{row['median_ms']:.1f} ms, " if "median_ms" in row else ""
    return f"{time}{row['ratio']:.2f} ({row['interval'][0]:.2f} .. {row['interval'][1]:.2f})"


def written() -> str:
    """The page as it should be."""

    def block(found: re.Match[str]) -> str:
        parts = [f"{heading(d)}\n{TABLES[found[2]](d)}" for d in documents(found[2])]
        return f"{found[1]}\n" + "\n".join(parts or ["not run\n"]) + f"\n{found[3]}"

    return BLOCK.sub(block, PAGE.read_text("utf-8"))


if __name__ == "__main__":
    text = written()
    if "--check" in sys.argv[1:]:
        sys.exit(text != PAGE.read_text("utf-8"))
    PAGE.write_text(text, "utf-8")
