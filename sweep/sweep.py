"""A sweep from its options to its table; the files are written again whenever a cell ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..artefacts.layout import CONFIG
from ..artefacts.layout import METRICS as METRICS_FILE
from ..artefacts.run_record import Metrics, read_metrics
from ..data import Dataset, Fingerprint, absolute, check_spelling, load_dataset
from ..errors import InputError
from ..files import hold, write_json, write_text
from ..log import LOG
from ..report.sweep_page import write_sweep_report
from ..train.config import FIRST_SCHEMA, RULES, TrainConfig
from ..train.metrics import DEFINITIONS as METRIC_DEFINITIONS
from .grid import ELSEWHERE, SETTINGS, Cell, Key, SweepPlan, differing, make_plan
from .markdown import markdown
from .processes import Process, Schedule, Slot, alone, last_lines, make_slots, run_cells
from .table import DEFINITIONS, METRICS, Summary, make_tables, summarise

SCHEMA = 1
"version of sweep.json"


def sweep(
    out: Path,
    options: Mapping[str, Any],
    parallel: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Run what is not finished of a sweep; returns the contents of OUT/sweep.json.

    Args:
        out: sweep folder: cells/ (options), runs/, logs/, teachers/, sweep.json, sweep.md, report.html.
        options: see grid.make_plan.
        parallel: cells at a time. None: what fits, see runner.make_slots.
        threads: of each cell. None: its share of the cores.

    Raises: InputError for bad input, before anything is written; KeyboardInterrupt when it was stopped.
    """
    for name, value in (("parallel", parallel), ("threads", threads)):
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"--{name} is out of range", got=repr(value), expected="a number of 1 or more")
    plan = make_plan(Path(out), _as_begun(Path(out), options))
    dataset = load_dataset(plan.settings["data"])  # a wrong path is one message now, and not one for each cell
    LOG.info(dataset.line)
    _check_folder(plan, dataset)
    with alone(plan.out):
        return _Sweep(plan, dataset).run(parallel, threads)


class _Sweep:
    """What is known of the cells while they run."""

    def __init__(self, plan: SweepPlan, dataset: Dataset) -> None:
        self.plan, self.dataset = plan, dataset
        self.metrics: dict[str, Metrics] = {}
        "metrics.json of each finished cell, by its name"
        self.failures: dict[str, str] = {}
        "name -> one line"
        self.running: set[str] = set()
        self.slots: list[Slot] = []

    def run(self, parallel: int | None, threads: int | None) -> dict[str, Any]:
        plan = self.plan
        for cell in plan.cells:
            self._find(cell)
        for refused in plan.refused:
            LOG.info(
                f"left out: {refused.learner} with {refused.distiller}, {refused.query}, head {refused.head}: "
                f"{refused.reason}"
            )
        waiting = [c for c in plan.cells if c.name not in self.metrics]
        self.slots = make_slots(plan.settings["devices"], len(waiting) or 1, parallel, threads)
        LOG.info(
            f"{len(plan.cells)} runs, {len(self.metrics)} of them finished; {len(self.slots)} at a time with "
            f"{self.slots[0].threads} thread(s) each"
        )
        for cell in waiting:
            write_json(self._options_of(cell), cell.config.to_json())
        self._write()
        try:
            run_cells(Schedule(plan.cells, self.metrics), self.slots, self._start, self._ended)
        except KeyboardInterrupt:
            self.running.clear()
            self._write()
            LOG.info(f"stopped with {len(self.metrics)} of {len(plan.cells)} runs finished; the same command continues")
            raise
        return self._write()

    def _options_of(self, cell: Cell) -> Path:
        return self.plan.out / "cells" / f"{cell.name}.json"

    def _log_of(self, cell: Cell) -> Path:
        return self.plan.out / "logs" / f"{cell.name}.log"

    def _start(self, cell: Cell, slot: Slot) -> Process | None:
        lock = hold(self.plan.out / "cells" / f".{cell.name}.lock")
        if lock is None:  # a process that an earlier sweep left behind, where the kernel does not end them with it
            return None
        process = Process(cell, slot, self._options_of(cell), self._log_of(cell), lock)
        self.running.add(cell.name)
        return process

    def _ended(self, cell: Cell, status: int) -> bool:
        self.running.discard(cell.name)
        if status == 0:
            self._read(cell)
        succeeded = cell.name in self.metrics
        count = f"[{len(self.metrics)}/{len(self.plan.cells)}]"
        if succeeded:
            metrics = self.metrics[cell.name]
            LOG.info(
                f"{count} {cell.name}: accuracy {metrics.student.average_accuracy:.2f} %, forgetting "
                f"{metrics.student.forgetting:.2f} points, {metrics.seconds or 0:.0f} s"
            )
        else:
            log = self._log_of(cell)
            lines = last_lines(log)
            how = f"killed by signal {-status}" if status < 0 else f"exit code {status}"
            self.failures[cell.name] = how + (f": {_telling(lines)}" if lines else "")
            LOG.info(f"{count} {cell.name}: FAILED, {how}; the end of {log}:")
            for line in lines:
                LOG.info(f"    {line}")
        self._write()
        return succeeded

    def _find(self, cell: Cell) -> None:
        """Take over what an earlier sweep has left.

        Raises: InputError when that was started with other options or learnt from other images.
        """
        if (cell.run / CONFIG).is_file():
            changed = differing(cell.config, TrainConfig.stored(_read_json(cell.run / CONFIG)))
            if changed:
                raise InputError(
                    f"{cell.run}: was started with other options",
                    got=changed,
                    fix="give the same options, or choose another --out",
                )
            self._read(cell)
            found = self.metrics.get(cell.name)
            if found is not None and found.data is not None:
                _check_images(cell.run, found.data, self.dataset)

    def _read(self, cell: Cell) -> None:
        """metrics.json, if the cell has finished."""
        if (cell.run / METRICS_FILE).is_file():
            self.metrics[cell.name] = read_metrics(cell.run)

    def _write(self) -> dict[str, Any]:
        document = self._document()
        out = self.plan.out
        write_text(out / "sweep.md", markdown(document))
        write_sweep_report(out / "report.html", document)
        write_json(out / "sweep.json", document)
        return document

    def _document(self) -> dict[str, Any]:
        plan = self.plan
        results: dict[Key, dict[int, Summary]] = {}
        for cell in plan.cells:
            if cell.name in self.metrics:
                results.setdefault(cell.key, {})[cell.config.seed] = summarise(self.metrics[cell.name])
        orders, notes = self._class_orders()
        names = ("teacher", "student")
        return {
            "schema": SCHEMA,
            "out": str(plan.out),
            "settings": dict(plan.settings),
            "data": self.dataset.record,
            "grid": {
                "pairs": [{"name": p.name, **{k: getattr(p, k) for k in names}} for p in plan.pairs],
                "learners": list(plan.learners),
                "distillers": list(plan.distillers),
                "queries": list(plan.queries),
                "heads": list(plan.heads),
                "seeds": list(plan.seeds),
                "baseline": plan.baseline,
            },
            "preset": {"name": plan.preset.name, "source": plan.preset.source, "departures": list(plan.departures)}
            if plan.preset
            else None,
            "cells": [self._cell(cell) for cell in plan.cells],
            "failed": sorted(self.failures),
            "refused": [vars(r) for r in plan.refused],
            **make_tables(plan, results),
            "class_orders": orders,
            "definitions": {**{k: METRIC_DEFINITIONS[k] for k in METRICS}, **DEFINITIONS},
            "notes": notes,
            "processes": {"parallel": len(self.slots), "threads": self.slots[0].threads} if self.slots else None,
            "version": __version__,
        }

    def _cell(self, cell: Cell) -> dict[str, Any]:
        state = "waiting"
        if cell.name in self.metrics:
            state = "finished"
        elif cell.name in self.failures:
            state = "failed"
        elif cell.name in self.running:
            state = "running"
        config, metrics = cell.config, self.metrics.get(cell.name)
        empty = {"student": None, "teacher": None, "frozen": None, "seconds": None}
        return {
            "name": cell.name,
            **{"pair": cell.pair.name, "learner": config.learner, "distiller": config.distill},
            **{
                "query": config.query,
                "head": config.head,
                "seed": config.seed,
                "run": config.out,
                "log": str(self._log_of(cell)),
            },
            "state": state,
            "reason": self.failures.get(cell.name),
            **(summarise(metrics) if metrics else empty),
        }

    def _class_orders(self) -> tuple[dict[str, list[str]], list[str]]:
        """Class names in learned order by seed, and a note where the runs of one seed do not agree."""
        orders: dict[str, list[str]] = {}
        notes = []
        for cell in self.plan.cells:
            if cell.name in self.metrics:
                classes = list(self.metrics[cell.name].classes)
                if orders.setdefault(str(cell.config.seed), classes) != classes:
                    notes.append(
                        f"{cell.name} learnt other classes, or in another order, than the other runs of its seed: the "
                        "data have changed in between, and paired differences mean nothing"
                    )
        return orders, notes


def _telling(lines: list[str]) -> str:
    """The one of a log's last lines that names the error."""
    named = [line for line in lines if line.lower().startswith("error:")]
    return (named or lines)[-1].strip()


def _as_begun(out: Path, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options, with the RULES of the sweep that is continued, if there is one: its cells are compared."""
    if not (out / "sweep.json").is_file():
        return options
    settings = _read_json(out / "sweep.json").get("settings")
    begun = settings if isinstance(settings, dict) else {}
    return {name: begun.get(name, FIRST_SCHEMA[name]) for name in RULES} | dict(options)


def _check_images(path: Path, record: Mapping[str, Any], dataset: Dataset) -> None:
    """record: "data" of what has run. Raises: InputError where that learnt from other images."""
    learnt = Fingerprint.from_json(record["fingerprint"])
    check_spelling(dataset.source, dataset.classes, list(learnt.val))
    if changes := learnt.changes(dataset.fingerprint):
        raise InputError(
            f"{dataset.source}: not the images that {path} was started with",
            got=changes,
            expected="the same class names, file names and bytes: a paired test over old and new would mean nothing",
            fix="bring these images back, or choose another --out",
        )


def _check_folder(plan: SweepPlan, dataset: Dataset) -> None:
    """Raises: InputError when the folder holds something else, or a sweep with other options or images."""
    path = plan.out / "sweep.json"
    if not path.is_file():
        if plan.out.exists() and not plan.out.is_dir():
            raise InputError(f"{plan.out}: is a file", expected="a folder for --out")
        # cells/ is the first thing a sweep writes: it may have been killed then.
        entries = [p.name for p in plan.out.iterdir() if not p.name.startswith(".")] if plan.out.exists() else []
        if set(entries) - {"cells", "runs", "logs", "teachers", "sweep.md", "report.html"}:
            raise InputError(
                f"{plan.out}: exists and is not a sweep",
                got=", ".join(sorted(entries)[:5]),
                expected="a new or empty folder for --out, or that of a sweep",
            )
        return
    stored = _read_json(path)
    mine = {**plan.settings, **{p.name: (p.teacher, p.student) for p in plan.pairs}}
    try:
        settings = TrainConfig.stored({**stored["settings"], "out": ""}).to_json()
        theirs = {k: settings[k] for k in SETTINGS}
        theirs |= {p["name"]: (p["teacher"], p["student"]) for p in stored["grid"]["pairs"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged", got=repr(error), expected="a file written by sweep") from error
    # The grid may grow, shrink, or get another seed: only what all runs share must stay.
    changed = [k for k in mine if k in theirs and mine[k] != theirs[k] and k not in ELSEWHERE]
    record = stored.get("data")
    if record is None and absolute(mine["data"]) != absolute(theirs["data"]):  # of an early version: no fingerprint
        changed.append("data")
    if changed:
        raise InputError(
            f"{plan.out}: was started with other options",
            got=", ".join(f"{k or 'backbones'}={mine[k]!r}" for k in changed),
            expected=", ".join(f"{k or 'backbones'}={theirs[k]!r}" for k in changed),
            fix="give the same options, or choose another --out",
        )
    if record is not None:
        _check_images(plan.out, record, dataset)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged", got=str(error), fix="remove it, then repeat") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: damaged", got=type(document).__name__, expected="an object")
    return document
