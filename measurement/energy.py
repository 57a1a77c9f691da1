"""What the board tells about power, clocks and heat; a fact that it does not tell is left out.

Everything is read from files below `root`, so that a test can lay out any board; no rights are needed, and nothing is
changed. Sources: NVIDIA Jetson Linux Developer Guide, "Platform Power and Performance" (rails, over-current events);
kernel documentation of hwmon, cpufreq, devfreq and powercap.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..jetson import power_mode
from ..machine import read_line

PERIOD_S = 0.1
"between two readings of the rails: each goes over I2C and costs about a millisecond"
INPUTS = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX: the whole module
    ("VIN",),  # Thor: the whole board
    ("POM_5V_IN",),  # Nano
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin has no single one: NVIDIA's guide adds these up
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
"rails that together are what the board draws; the first set that is there counts"
RAIL = re.compile(r"\b([A-Z][A-Z0-9_]+) (-?\d+)(?:mW)?/-?\d+(?:mW)?")
"a rail in a line of tegrastats: VDD_IN 4940mW/4940mW, without units before JetPack 5: now and on average"
POLICIES = "sys/devices/system/cpu/cpu*/cpufreq"


class Board:
    """Reads one machine. root: of its file system."""

    def __init__(self, root: Path | str = "/") -> None:
        self.root = Path(root)

    def _number(self, path: Path) -> int | None:
        line = read_line(str(path))
        return int(line) if line is not None and line.lstrip("-").isdigit() else None

    def _found(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern))

    def rails_w(self) -> dict[str, float]:
        """Watts of each rail that a power monitor (INA3221, INA238, ...) watches, by the name the board gives it."""
        rails = {}
        for chip in self._found("sys/class/hwmon/hwmon*"):
            if not (read_line(str(chip / "name")) or "").startswith("ina"):
                continue
            for label in sorted(chip.glob("in[0-9]*_label")):
                name, number = read_line(str(label)), label.name[2:-6]
                millivolt, milliampere = (self._number(chip / f"{k}{number}_input") for k in ("in", "curr"))
                if name and name != "NC" and millivolt is not None and milliampere is not None:
                    rails[name] = millivolt * milliampere / 1e6
            microwatt = self._number(chip / "power1_input")
            if microwatt is not None:
                rails[read_line(str(chip / "power1_label")) or read_line(str(chip / "label")) or "VIN"] = (
                    microwatt / 1e6
                )
        return rails

    def rapl_uj(self) -> dict[str, tuple[int, int]]:
        """Energy counters of the processor packages: name -> (microjoules so far, where the counter wraps)."""
        counters = {}
        for zone in self._found("sys/class/powercap/intel-rapl:*"):
            name = read_line(str(zone / "name")) or ""
            if name.startswith("package"):  # the others are parts of a package, or (psys) hold it
                value, wraps = self._number(zone / "energy_uj"), self._number(zone / "max_energy_range_uj")
                if value is not None:
                    counters[name] = (value, wraps or 0)
        return counters

    def unreadable(self) -> str | None:
        """Why there is no energy to be had although the board has a counter."""
        if self._found("sys/class/powercap/intel-rapl:*/energy_uj") and not self.rapl_uj():
            return "the energy counter is for root only: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        return None

    def clocks_mhz(self) -> dict[str, dict[str, float | str | None]]:
        """{"cpu": {"now" (the fastest core), "limit", "governor"}, "gpu": the same}, what is there."""
        clocks: dict[str, dict[str, float | str | None]] = {}
        cores = self._found(POLICIES)
        if cores:
            now, limit = (
                [v for v in (self._number(core / f"scaling_{k}_freq") for core in cores) if v is not None]
                for k in ("cur", "max")
            )
            clocks["cpu"] = {
                "now": max(now) / 1e3 if now else None,
                "limit": max(limit) / 1e3 if limit else None,
                "governor": read_line(str(cores[0] / "scaling_governor")),
            }
        for device in self._found("sys/class/devfreq/*"):
            if re.search("gpu|gm20b|gp10b|gv11b|ga10b", device.name):
                now_hz, limit_hz = (self._number(device / f"{k}_freq") for k in ("cur", "max"))
                clocks["gpu"] = {
                    "now": None if now_hz is None else now_hz / 1e6,
                    "limit": None if limit_hz is None else limit_hz / 1e6,
                    "governor": read_line(str(device / "governor")),
                }
                break
        return clocks

    def temperatures_c(self) -> dict[str, float]:
        """Temperature in degrees Celsius of each zone, by its name."""
        zones = {}
        for zone in self._found("sys/class/thermal/thermal_zone*"):
            value = self._number(zone / "temp")
            if value is not None:
                zones[read_line(str(zone / "type")) or zone.name] = value / 1e3
        return zones

    def limits(self) -> dict[str, int]:
        """Counters and switches that move when the board lowers its clocks: name -> value."""
        found = {}
        for counter in self._found("sys/class/hwmon/hwmon*/oc[0-9]_event_cnt"):  # Jetson: over-current, under-voltage
            if self._number(counter.with_name(counter.name.replace("event_cnt", "throt_en"))) != 0:
                found[counter.name[:3]] = self._number(counter)
        for device in self._found("sys/class/thermal/cooling_device*"):  # Jetson: cpu-throttle-alert, ...
            kind = read_line(str(device / "type")) or ""
            if "throttle" in kind:
                found[kind] = self._number(device / "cur_state")
        for name in ("core", "package"):  # x86
            counters = self._found(f"sys/devices/system/cpu/cpu*/thermal_throttle/{name}_throttle_count")
            values = [v for v in map(self._number, counters) if v is not None]
            if values:
                found[f"{name}_throttle_count"] = sum(values)
        line = read_line(str(self.root / "sys/devices/platform/soc/soc:firmware/get_throttled"))  # Raspberry Pi
        if line is not None and re.fullmatch(r"(0x)?[0-9a-f]+", line):
            found["get_throttled"] = int(line, 16) & 0xF  # the upper bits are about the past
        return {name: value for name, value in found.items() if value is not None}

    def facts(self) -> dict[str, Any]:
        """{"power_mode" (of nvpmodel, as "15W"), "clocks_mhz", "temperatures_c", "limits"} as they are now."""
        mode = power_mode(self.root)
        return {
            "power_mode": None if mode is None else mode.name or str(mode.number),
            "clocks_mhz": self.clocks_mhz(),
            "temperatures_c": self.temperatures_c(),
            "limits": self.limits(),
        }


def throttled(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Names of what says that the clocks were lowered between two calls of `Board.limits`."""
    switches = {name for name in after if "throttle-alert" in name or name == "get_throttled"}
    return sorted(name for name, value in after.items() if value > (0 if name in switches else before.get(name, value)))


class Meter:
    """Energy between `__enter__` and `__exit__`: of the board's rails, else of the processor packages, else of nothing.

    Rails are read by a thread ten times a second and integrated; a counter is read twice. Where the board has
    tegrastats but no readable rails, its lines are read instead.
    """

    def __init__(self, board: Board | None = None, tegrastats: str | None = None) -> None:
        """tegrastats: its path; None looks for it."""
        self.board = board or Board()
        self._rails = bool(self.board.rails_w())
        self._counters = {} if self._rails else self.board.rapl_uj()
        self._tegrastats = tegrastats or (None if self._rails or self._counters else shutil.which("tegrastats"))
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._begin = self._end = 0.0
        self._joules: dict[str, float] = {}

    def __enter__(self) -> Meter:
        self._begin = time.perf_counter()
        if self._counters:
            self._counters = self.board.rapl_uj()
        elif self._rails:
            self._start(self._read_rails)
        elif self._tegrastats is not None:
            command = [self._tegrastats, "--interval", str(round(PERIOD_S * 1e3))]
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                return self  # there and not to be run: as if it were absent
            self._start(self._read_lines)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = time.perf_counter()
        self._stop.set()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        for name, (before, wraps) in self._counters.items():
            now = self.board.rapl_uj().get(name, (before, wraps))[0]
            self._joules[name] = (now - before + (wraps if now < before else 0)) / 1e6

    def result(self, images: int) -> dict[str, Any]:
        """{"source", "seconds", "mean_w", "energy_j", "energy_per_image_j", "rails_w", "readings"}, of all that the
        board or the package drew, idle power included; {"source": None, "reason"} where nothing can be read."""
        seconds = self._end - self._begin
        if self._counters:
            watts = {name: joules / seconds for name, joules in self._joules.items()}
            total, source, readings = sum(watts.values()), "RAPL", 2
        elif self._samples:
            watts = _mean_watts(self._samples)
            inside = next((names for names in INPUTS if set(names) <= set(watts)), tuple(watts))
            total, readings = sum(watts[name] for name in inside), len(self._samples)
            source = ("rails " if self._process is None else "tegrastats ") + " + ".join(inside)
        else:
            return {"source": None, "reason": self.board.unreadable() or "the board tells nothing about its power"}
        return {
            "source": source,
            "seconds": seconds,
            "mean_w": total,
            "energy_j": total * seconds,
            "energy_per_image_j": total * seconds / images,
            "rails_w": watts,
            "readings": readings,
        }

    def _start(self, target: Any) -> None:
        self._thread = threading.Thread(target=target, name="power", daemon=True)
        self._thread.start()

    def _read_rails(self) -> None:
        while True:
            self._samples.append((time.perf_counter(), self.board.rails_w()))
            if self._stop.wait(PERIOD_S):
                return

    def _read_lines(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if rails := dict(rails_of(line)):
                self._samples.append((time.perf_counter(), rails))


def rails_of(line: str) -> Iterator[tuple[str, float]]:
    """(name, watts) of the rails in a line of tegrastats; its SWAP, RAM and the like have other units."""
    for name, milliwatt in RAIL.findall(line):
        if name not in ("RAM", "SWAP", "IRAM"):
            yield name, int(milliwatt) / 1e3


def _mean_watts(samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Mean over time (trapezoids) of the rails that every reading has."""
    names = [name for name in samples[0][1] if all(name in rails for _, rails in samples)]
    at = np.array([t for t, _ in samples])
    if len(samples) < 2 or at[-1] <= at[0]:
        return {name: samples[0][1][name] for name in names}
    means = {}
    for name in names:
        watts = np.array([rails[name] for _, rails in samples])
        means[name] = float(((watts[1:] + watts[:-1]) / 2 * np.diff(at)).sum() / (at[-1] - at[0]))
    return means
