"""The parts of docs/ that come from the command line itself: usage, options, the list of commands.

    python docs/make.py            # write them
    python docs/make.py --check    # name the pages that are stale; exit code 1 then

A page marks where they go: `<!-- options of train -->` ... `<!-- end -->`, and `<!-- commands -->` ... `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cdl_edge.cli import cli

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- (options of [a-z -]+|commands) -->\n).*?(<!-- end -->)", re.DOTALL)
ABSENT = "(Not on the command line of this version; from Python: see below.)\n"


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command by its whole name, "pack create" included."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command
            for inner, second in getattr(command, "inner", {}).items():
                yield " ".join((*path, name, inner)), second


def options(name: str) -> str:
    """Usage and a table of the options of one command."""
    command = dict(commands()).get(name)
    if command is None:
        return ABSENT
    pieces = " ".join(command.collect_usage_pieces(click.Context(command)))
    rows = [row(p) for p in command.params if isinstance(p, click.Option)]
    table = "\n".join(["| option | takes | default | meaning |", "|---|---|---|---|", *rows])
    return f"```text\ncdl-edge {name} {pieces}\n```\n\n{table}\n"


def row(option: click.Option) -> str:
    """One option; a default that its help names in brackets gets the column for it."""
    text = option.help or ""
    stated = re.search(r"\[default: ([^\]]*)\]", text)
    default = "required" if option.required else stated[1] if stated else ""
    if not default and option.secondary_opts and option.default is not None:
        default = f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    elif not default and isinstance(option.default, (str, int, float, Path)) and not option.is_flag:
        default = str(option.default)
    meaning = " ".join((text.replace(stated[0], "") if stated else text).split()).replace(" ;", ";")
    for mark in "\\|<*_":  # Markdown's own
        meaning = meaning.replace(mark, "\\" + mark)
    names = ", ".join(f"`{n}`" for n in [*option.opts, *option.secondary_opts])
    return f"| {names} | {takes(option)} | {default} | {meaning} |"


def takes(option: click.Option) -> str:
    """What stands behind the option."""
    if option.is_flag:
        return "nothing"
    kind = option.type
    if isinstance(kind, click.IntRange):
        found = f"whole number, {kind.min} to {kind.max}" if kind.max is not None else f"whole number from {kind.min}"
    elif isinstance(kind, click.Path):
        found = "path"
    else:
        found = {"integer": "whole number", "float": "number", "text": "text"}.get(kind.name, kind.name)
    return found + (", may be repeated" if option.multiple else "")


def overview() -> str:
    """All commands with their first sentence and their page."""
    rows = [f"| [{n}]({n.split()[0]}.md) | {c.get_short_help_str(200)} |" for n, c in commands()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows]) + "\n"


def fresh(text: str) -> str:
    """A page with its blocks as they have to be."""

    def block(match: re.Match[str]) -> str:
        what = match[2]
        return match[1] + (overview() if what == "commands" else options(what.removeprefix("options of "))) + match[3]

    return BLOCK.sub(block, text)


def stale() -> list[Path]:
    """Pages that do not say what the command line says."""
    return [p for p in sorted(DOCS.glob("*.md")) if fresh(p.read_text("utf-8")) != p.read_text("utf-8")]


def main() -> int:
    """Write, or with --check only look."""
    check = "--check" in sys.argv[1:]
    found = stale()
    for page in found:
        print(f"{page.name}: {'stale, run: python docs/make.py' if check else 'written'}")
        if not check:
            page.write_text(fresh(page.read_text("utf-8")), "utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
