"""Which runs a sweep consists of: names, options and order of the cells, and the combinations left out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, choose
from ..train.config import QUERIES, TrainConfig, head_kinds
from ..train.distill import DISTILLERS
from ..train.learners import LEARNERS
from .presets import PRESETS, Pair, Preset

LISTS: dict[str, tuple[str, Collection[str], tuple[str, ...]]] = {
    "learners": ("learner", LEARNERS, ("l2p", "dualprompt", "coda", "apt")),
    "distillers": ("distiller", DISTILLERS, ("none", "kd", "kdp")),
    "queries": ("query", QUERIES, ("two-pass",)),
    "heads": ("head", head_kinds(), ("auto",)),
}
"option -> (what one of them is called, which there are, default)"
SEEDS = (0, 1, 2)
VARIED = ("out", "learner", "distill", "query", "head", "seed", "extend")
"options of train that the grid sets, or that make no sense in one"
SETTINGS = tuple(f.name for f in fields(TrainConfig) if f.name not in VARIED)
ELSEWHERE = ("out", "devices", "teachers", "data")
"options of train that change where something runs or lies, and no number; the images are compared by their bytes"

Key = tuple[str, str, str, str, str]
"(pair, learner, distiller, query, head): a row of the table, a cell of it for each seed"
Group = tuple[str, str, str, str, int]
"(pair, learner, query, head, seed): cells that learn from the same teacher"


@dataclass(frozen=True)
class Cell:
    """One run of train."""

    name: str
    """[<pair>-]<learner>-<distiller>[-one-pass][-<head>]-<seed>; pairs have names in presets only, and the head that
    train takes by itself is not named"""
    pair: Pair
    config: TrainConfig

    @property
    def key(self) -> Key:
        """Its row."""
        return self.pair.name, self.config.learner, self.config.distill, self.config.query, self.config.head

    @property
    def group(self) -> Group:
        """Whose teacher it shares."""
        return self.pair.name, self.config.learner, self.config.query, self.config.head, self.config.seed

    @property
    def needs_teacher(self) -> bool:
        """Whether its distiller has one."""
        return DISTILLERS[self.config.distill].needs_teacher

    @property
    def run(self) -> Path:
        """Its run folder."""
        return Path(self.config.out)


@dataclass(frozen=True)
class ExcludedCombination:
    """A combination that is not run."""

    learner: str
    distiller: str
    query: str
    head: str
    reason: str
    "one line"


@dataclass(frozen=True)
class SweepPlan:
    """Everything about a sweep that is known before it starts."""

    out: Path
    pairs: tuple[Pair, ...]
    learners: tuple[str, ...]
    distillers: tuple[str, ...]
    queries: tuple[str, ...]
    heads: tuple[str, ...]
    "as the cells have them: auto has become a name"
    seeds: tuple[int, ...]
    baseline: str
    "the distiller that the others are compared with"
    settings: Mapping[str, Any]
    "options of train that all cells share, complete; teacher and student stand in the pairs"
    cells: tuple[Cell, ...]
    refused: tuple[ExcludedCombination, ...]
    preset: Preset | None
    departures: tuple[str, ...]
    "settings of a preset that were overridden, as text"

    @property
    def keys(self) -> list[Key]:
        """The rows, in the order of the grid; without what was refused."""
        there = {c.key for c in self.cells}
        rows = [
            (pair.name, learner, distiller, query, head)
            for pair in self.pairs
            for learner in self.learners
            for query in self.queries
            for head in self.heads
            for distiller in self.distillers
        ]
        return [key for key in rows if key in there]


def make_plan(out: Path, options: Mapping[str, Any]) -> SweepPlan:
    """Lay out a sweep.

    Args:
        out: sweep folder.
        options: learners, distillers, queries, heads, seeds (each a list, or text with commas), baseline, preset, and
            options of train.

    Raises: InputError for anything unknown, and when no combination is left.
    """
    for key in options:
        choose("sweep option", key, (*LISTS, "seeds", "baseline", "preset", *SETTINGS))
    name = options.get("preset")
    preset = PRESETS[choose("preset", str(name), PRESETS)]() if name is not None else None
    merged = dict(options)
    if preset is not None:
        merged = {"learners": preset.learners, "distillers": preset.distillers, **preset.settings, **options}
    lists = {key: _names(merged.get(key, default), key, kind, known) for key, (kind, known, default) in LISTS.items()}
    seeds = _seeds(merged.get("seeds", SEEDS))
    distillers = lists["distillers"]
    baseline = str(merged.get("baseline") or ("none" if "none" in distillers else distillers[0]))
    choose("baseline, which is one of --distillers", baseline, distillers)

    given = {k: v for k, v in merged.items() if k in SETTINGS}
    if "data" not in given:
        raise InputError(
            "a sweep option is missing",
            got="nothing",
            expected="data" + (" (ImageNet-R has no usual place: imagenet-r:PATH)" if preset else ""),
        )
    given.setdefault("teachers", str(out / "teachers"))
    settings = _settings(lists, {**given, "out": str(out)})
    pairs = _pairs(preset, given, settings)
    cells, refused = _cells(out, pairs, lists, seeds, settings)
    if not cells:
        raise InputError(
            "no combination of learner and distiller is left", got="; ".join(f"{r.reason}" for r in refused[:3])
        )
    return SweepPlan(
        out=out,
        pairs=pairs,
        seeds=seeds,
        baseline=baseline,
        settings={k: v for k, v in settings.items() if k not in ("teacher", "student")},
        cells=cells,
        refused=refused,
        preset=preset,
        departures=_departures(preset, settings, pairs) if preset else (),
        **{**lists, "heads": tuple(dict.fromkeys(c.config.head for c in cells))},
    )


def _settings(lists: Mapping[str, tuple[str, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of train that all cells share, complete. Raises: InputError for those that no cell can have.

    An option of one method (--exemplars) is looked at beside that method; cells of others are refused one by one.
    """
    for learner in lists["learners"]:
        for head in lists["heads"]:
            for distiller in lists["distillers"]:
                with contextlib.suppress(InputError):
                    config = TrainConfig.from_json({**given, "learner": learner, "head": head, "distill": distiller})
                    return {k: v for k, v in config.to_json().items() if k in SETTINGS}
    return {k: v for k, v in TrainConfig.from_json(dict(given)).to_json().items() if k in SETTINGS}


def differing(mine: TrainConfig, theirs: TrainConfig) -> str:
    """The options in which two runs differ so much that their numbers do, as text; empty when in none."""
    one, other = mine.to_json(), theirs.to_json()
    # Where nothing was asked for, train stores what it came to (the number of tasks, the temperature).
    keys = [k for k in one if one[k] is not None and one[k] != other[k] and k not in ELSEWHERE]
    return ", ".join(f"{k}={other[k]!r} (now {one[k]!r})" for k in keys)


def _names(value: object, option: str, kind: str, known: Iterable[str]) -> tuple[str, ...]:
    parts = [p.strip() for p in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(p, str) for p in parts):
        raise InputError(f"--{option} is no list of names", got=repr(value), expected="names with commas between them")
    for part in parts:
        choose(kind, part, known)
    return _unlike(parts, option)


def _seeds(value: object) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        seeds = [int(p) for p in parts]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise InputError("--seeds is no list of numbers", got=repr(value), expected="for example 0,1,2") from error
    if not seeds or min(seeds) < 0:
        raise InputError("--seeds is out of range", got=repr(value), expected="numbers of 0 or more")
    return _unlike(seeds, "seeds")


def _unlike(parts: Iterable[Any], option: str) -> tuple[Any, ...]:
    parts = tuple(parts)
    if len(set(parts)) < len(parts):
        raise InputError(f"--{option} names something twice", got=", ".join(map(str, parts)), expected="each once")
    return parts


def _pairs(preset: Preset | None, given: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Pair, ...]:
    """One pair, or the preset's with --teacher and --student in place of theirs; pairs that have become equal once."""
    if preset is None:
        return (Pair("", settings["teacher"], settings["student"]),)
    published = {(p.teacher, p.student): p for p in preset.pairs}
    pairs: dict[tuple[str, str], Pair] = {}
    for pair in preset.pairs:
        models = (given.get("teacher", pair.teacher), given.get("student", pair.student))
        # Naming both backbones of a published pair chooses that pair.
        pairs.setdefault(models, published.get(models, Pair(pair.name, *models)))
    return tuple(pairs.values())


def _cells(
    out: Path,
    pairs: tuple[Pair, ...],
    lists: Mapping[str, tuple[str, ...]],
    seeds: tuple[int, ...],
    settings: Mapping[str, Any],
) -> tuple[tuple[Cell, ...], tuple[ExcludedCombination, ...]]:
    """Seed by seed, so that after the first one the table has a row for everything."""
    cells: list[Cell] = []
    refused: dict[tuple[str, str, str, str], ExcludedCombination] = {}
    grid = [
        (seed, pair, learner, query, head, distiller)
        for seed in seeds
        for pair in pairs
        for learner in lists["learners"]
        for query in lists["queries"]
        for head in lists["heads"]
        for distiller in lists["distillers"]
    ]
    names: set[str] = set()
    for seed, pair, learner, query, head, distiller in grid:
        first = lists["queries"][0]
        if query != first and not LEARNERS[learner].needs_query:
            reason = f"{learner} has no query: the run would be the {first} one again"
            refused[learner, distiller, query, head] = ExcludedCombination(learner, distiller, query, head, reason)
            continue
        options = {
            **settings,
            **{"out": "", "teacher": pair.teacher, "student": pair.student},
            **{"learner": learner, "distill": distiller, "query": query, "seed": seed},
        }
        try:
            config = TrainConfig.from_json({**options, "head": head})
            config.check_tasks(config.tasks or 1)
        except InputError as error:
            reason = " ".join(str(error).split())
            refused[learner, distiller, query, head] = ExcludedCombination(learner, distiller, query, head, reason)
            continue
        suffix = [*([query] if query != "two-pass" else []), *([head] if config.head != config.usual_head else [])]
        name = "-".join([*([pair.name] if pair.name else []), learner, distiller, *suffix, str(seed)])
        if name not in names:  # auto is a head that may be named beside it
            names.add(name)
            cells.append(Cell(name, pair, replace(config, out=str(out / "runs" / name))))
    return tuple(cells), tuple(refused.values())


def _departures(preset: Preset, settings: Mapping[str, Any], pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """What is not as published: settings that differ from the preset's, other backbones."""
    # What compat brings with it is none of them either.
    usual = TrainConfig(data="", out="", compat=settings["compat"]).to_json() | dict(preset.settings)
    # compat is no departure: the paper's code is one thing, its text the other. The table says which it was.
    names = [k for k in SETTINGS if k not in (*ELSEWHERE, "teacher", "student", "precision", "compat")]
    lines = [*preset.unlike]
    lines += [f"{k.replace('_', '-')} {settings[k]} (there {usual[k]})" for k in names if settings[k] != usual[k]]
    if settings["data"].partition(":")[0] != preset.data:
        lines.append(f"data {settings['data']}")
    there = {p.name: p for p in preset.pairs}
    for pair in pairs:
        if pair != there[pair.name]:
            lines.append(f"{pair.name}: {pair.teacher} -> {pair.student}")
    return tuple(lines)
