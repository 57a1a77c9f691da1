"""Sweeps whose cells are not trained: a fake process writes the run folder with numbers that the test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdl_edge.log import told
from cdl_edge.sweep import processes, sweep
from cdl_edge.sweep.grid import Cell, SweepPlan, make_plan
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.scenario import make_scenario

Numbers = Callable[[TrainConfig], tuple[float, float]]
"(accuracy, forgetting) of a cell's student"


def usual_numbers(config: TrainConfig) -> tuple[float, float]:
    """Every distiller has its own gain, every learner its level, every seed its luck."""
    gain = {"none": 0.0, "kd": 1.0, "kdp": 5.0}.get(config.distill, 2.0)
    level = {"l2p": 50.0, "dualprompt": 55.0, "coda": 60.0, "apt": 65.0}.get(config.learner, 40.0)
    luck = {0: 0.0, 1: 3.0, 2: -2.0}.get(config.seed, 1.0)
    noise = 0.1 * ((7 * config.seed + 3 * len(config.distill) + len(config.learner)) % 5)
    return level + gain + luck + noise, 8.0 - gain + noise


def metrics_of(config: TrainConfig, numbers: Numbers) -> dict[str, Any]:
    """metrics.json of a finished run over the ten digits."""
    accuracy, forgetting = numbers(config)
    matrix = [[accuracy, None], [accuracy, accuracy]]
    side = {
        "matrix": matrix,
        "average_accuracy": accuracy,
        "forgetting": forgetting,
        "incremental_accuracy": accuracy + 3,
    }
    scenario = make_scenario([str(d) for d in range(10)], 2, config.seed, shuffle=not config.compat)
    return {
        "schema": 1,
        "config": config.to_json(),
        "classes": [str(c) for c in scenario.order],
        "tasks": [list(t) for t in scenario.tasks],
        "student": side,
        "teacher": {**side, "average_accuracy": accuracy + 10} if DISTILLERS[config.distill].needs_teacher else None,
        "baseline": {"head": "ranpac", "average_accuracy": 57.0 + config.seed, "heads": {}},
        "seconds": 12.0,
    }


class Fakes:
    """What stands for `cdl-edge train`; a test may change how it behaves and look at what was started."""

    def __init__(self) -> None:
        self.numbers: Numbers = usual_numbers
        self.exit_codes: dict[str, int] = {}
        "name -> what the cell ends with; 0 where it is not named"
        self.writes = True
        "whether a cell leaves its results"
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.most = 0
        "cells that ran at one time"
        self.running = 0
        self.on_poll: Callable[[Cell], None] = lambda cell: None

    def process(self, cell: Cell, slot: processes.Slot, options: Path, log: Path, lock: Any) -> FakeProcess:
        """Stands for processes.Process."""
        config = TrainConfig.from_json(json.loads(options.read_text()))
        assert config == cell.config
        self.started.append(cell.name)
        self.running += 1
        self.most = max(self.most, self.running)
        return FakeProcess(self, cell, log, lock)


class FakeProcess:
    """Runs for two looks at it, then leaves a run folder, or an error in its log."""

    def __init__(self, fakes: Fakes, cell: Cell, log: Path, lock: Any) -> None:
        self.fakes, self.cell, self.log, self.lock = fakes, cell, log, lock
        self.looks = 0

    def poll(self) -> int | None:
        self.fakes.on_poll(self.cell)
        self.looks += 1
        if self.looks < 2:
            return None
        self.fakes.running -= 1
        code = self.fakes.exit_codes.get(self.cell.name, 0)
        if code == 0 and self.fakes.writes:
            write_run(self.cell, self.fakes.numbers)
        elif code != 0:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text("first line\nerror: no good\n  got:      something\n")
        self.lock.close()
        return code

    def stop(self) -> None:
        self.fakes.running -= 1
        self.fakes.stopped.append(self.cell.name)
        self.lock.close()


def write_run(cell: Cell, numbers: Numbers = usual_numbers) -> None:
    """The folder that train leaves, as far as a sweep reads it."""
    cell.run.mkdir(parents=True, exist_ok=True)
    (cell.run / "config.json").write_text(json.dumps(cell.config.to_json()))
    (cell.run / "metrics.json").write_text(json.dumps(metrics_of(cell.config, numbers)))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """No process is started in this test."""
    made = Fakes()
    monkeypatch.setattr(sweep, "Process", made.process)
    monkeypatch.setattr(processes, "PAUSE_S", 0.0)
    return made


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., SweepPlan]:
    """make_plan(out, options) of digits; out is a folder that is not there yet."""

    def make(out: Path | None = None, **options: Any) -> SweepPlan:
        return make_plan(out or tmp_path / "sweep", {"data": "digits", **options})

    return make


@pytest.fixture
def run_sweep(tmp_path: Path, fakes: Fakes) -> Callable[..., dict[str, Any]]:
    """sweep(...) of fake cells; `lines` collects what it says."""

    def call(out: Path | None = None, lines: list[str] | None = None, **options: Any) -> dict[str, Any]:
        sizes = {k: options.pop(k, v) for k, v in (("parallel", 2), ("threads", 1))}
        said = lines if lines is not None else []
        with told(said.append):
            return sweep.sweep(out or tmp_path / "sweep", {"data": "digits", **options}, **sizes)

    return call
