"""Boards laid out as files: rails, counters, clocks, modes, throttling."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cdl_edge.measurement.energy import Board, Meter, _mean_watts, rails_of, throttled


def lay(root: Path, files: dict[str, object]) -> Board:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return Board(root)


ORIN_NANO = {
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": 5000,
    "sys/class/hwmon/hwmon1/curr1_input": 1800,
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": 5000,
    "sys/class/hwmon/hwmon1/curr2_input": 600,
    "sys/class/hwmon/hwmon1/in3_label": "NC",
    "sys/class/hwmon/hwmon1/in3_input": 5000,
    "sys/class/hwmon/hwmon1/curr3_input": 1,
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",  # has no current
    "sys/class/hwmon/hwmon1/in7_input": 3,
    "sys/class/hwmon/hwmon0/name": "pwmfan",
    "sys/class/hwmon/hwmon0/in1_label": "FAN",
    "sys/class/hwmon/hwmon0/in1_input": 5000,
    "sys/class/hwmon/hwmon0/curr1_input": 100,
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc1_event_cnt": 4,
    "sys/class/hwmon/hwmon3/oc1_throt_en": 1,
    "sys/class/hwmon/hwmon3/oc3_event_cnt": 27390,
    "sys/class/hwmon/hwmon3/oc3_throt_en": 0,
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "# a comment\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
    "< POWER_MODEL ID=2 NAME=MAXN_SUPER >",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 729600,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 1728000,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 1728000,
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": 1728000,
    "sys/class/devfreq/17000000.gpu/cur_freq": 306000000,
    "sys/class/devfreq/17000000.gpu/max_freq": 1020000000,
    "sys/class/devfreq/17000000.gpu/governor": "nvhost_podgov",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 48500,
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone1/temp": "",  # as a sensor of a part that is off
    "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert",
    "sys/class/thermal/cooling_device0/cur_state": 0,
    "sys/class/thermal/cooling_device1/type": "pwm-fan",
    "sys/class/thermal/cooling_device1/cur_state": 3,
}
RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": 900,
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": 1000,
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": 500,
    "sys/class/powercap/intel-rapl:1/name": "package-1",
    "sys/class/powercap/intel-rapl:1/energy_uj": 100,
    "sys/class/powercap/intel-rapl:1/max_energy_range_uj": 1000,
    "sys/class/powercap/intel-rapl:2/name": "psys",
    "sys/class/powercap/intel-rapl:2/energy_uj": 7,
}


def test_an_orin_nano(tmp_path):
    board = lay(tmp_path, ORIN_NANO)
    assert board.rails_w() == {"VDD_IN": 9.0, "VDD_CPU_GPU_CV": 3.0}
    assert board.facts()["power_mode"] == "MAXN_SUPER"
    assert board.clocks_mhz() == {
        "cpu": {"now": 1728.0, "limit": 1728.0, "governor": "schedutil"},
        "gpu": {"now": 306.0, "limit": 1020.0, "governor": "nvhost_podgov"},
    }
    assert board.temperatures_c() == {"cpu-thermal": 48.5}
    assert board.limits() == {"oc1": 4, "cpu-throttle-alert": 0}, "an event that does not throttle is none"
    json.dumps(board.facts())


def test_a_bare_machine(tmp_path):
    board = lay(tmp_path, {})
    facts = {"power_mode": None, "clocks_mhz": {}, "temperatures_c": {}, "limits": {}}
    assert board.facts() == facts and board.rails_w() == {} and board.rapl_uj() == {}
    with Meter(board, tegrastats=str(tmp_path / "not-there")) as meter:
        pass
    assert meter.result(3) == {"source": None, "reason": "the board tells nothing about its power"}


def test_thor_has_a_monitor_without_labels(tmp_path):
    files = {"hwmon4/name": "ina238", "hwmon4/power1_input": 23_500_000, "hwmon5/name": "ina3221"}
    board = lay(tmp_path, {f"sys/class/hwmon/{name}": value for name, value in files.items()})
    assert board.rails_w() == {"VIN": 23.5}


def test_power_mode_without_its_name(tmp_path):
    assert lay(tmp_path, {"var/lib/nvpmodel/status": "pmode:0003"}).facts()["power_mode"] == "3"
    assert lay(tmp_path, {"var/lib/nvpmodel/status": "what"}).facts()["power_mode"] is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"sys/class/hwmon/hwmon3/oc1_event_cnt": 5}, ["oc1"]),
        ({"sys/class/hwmon/hwmon3/oc3_event_cnt": 99999}, []),
        ({"sys/class/thermal/cooling_device0/cur_state": 1}, ["cpu-throttle-alert"]),
        ({"sys/class/thermal/cooling_device1/cur_state": 4}, []),
        ({"sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": 3}, ["core_throttle_count"]),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "0x4"}, ["get_throttled"]),
        ({"sys/devices/platform/soc/soc:firmware/get_throttled": "0x50000"}, []),
    ],
)
def test_throttling(tmp_path, change, found):
    x86 = {f"sys/devices/system/cpu/cpu{i}/thermal_throttle/core_throttle_count": 2 * i for i in (0, 1)}
    board = lay(tmp_path, {**ORIN_NANO, **x86})
    before = board.limits()
    lay(tmp_path, change)
    assert throttled(before, board.limits()) == found


def test_what_throttles_already_is_said_too(tmp_path):
    board = lay(tmp_path, {**ORIN_NANO, "sys/class/thermal/cooling_device0/cur_state": 1})
    assert throttled(board.limits(), board.limits()) == ["cpu-throttle-alert"]


def test_energy_of_rails(tmp_path):
    board = lay(tmp_path, ORIN_NANO)
    with Meter(board) as meter:
        time.sleep(0.25)
    found = meter.result(10)
    assert found["source"] == "rails VDD_IN"
    assert found["mean_w"] == pytest.approx(9.0) and found["rails_w"]["VDD_CPU_GPU_CV"] == pytest.approx(3.0)
    assert found["energy_j"] == pytest.approx(9.0 * found["seconds"])
    assert found["energy_per_image_j"] == pytest.approx(found["energy_j"] / 10)
    assert found["readings"] >= 2
    json.dumps(found)


@pytest.mark.parametrize(
    ("rails", "source", "watts"),
    [
        ({"VDD_GPU_SOC": 4, "VDD_CPU_CV": 2, "VIN_SYS_5V0": 5, "VDDQ_VDD2_1V8AO": 1}, "VDD_GPU_SOC + VDD_CPU_CV", 11),
        ({"VDD_GPU": 1, "VIN_SYS_5V0": 5, "VIN": 20}, "VIN", 20),
        ({"THIS": 1, "THAT": 2}, "THIS + THAT", 3),  # an unknown board: everything, by name
    ],
)
def test_which_rails_make_the_board(tmp_path, rails, source, watts):
    files = {"sys/class/hwmon/hwmon1/name": "ina3221"}
    for i, (name, value) in enumerate(rails.items(), 1):
        for key, content in (("in{}_label", name), ("in{}_input", 1000), ("curr{}_input", 1000 * value)):
            files["sys/class/hwmon/hwmon1/" + key.format(i)] = content
    with Meter(lay(tmp_path, files)) as meter:
        pass
    found = meter.result(1)
    assert found["source"].startswith(f"rails {source}") and found["mean_w"] == pytest.approx(watts)


def test_power_is_integrated_over_time():
    samples = [(0.0, {"A": 1.0, "B": 1.0}), (1.0, {"A": 3.0}), (4.0, {"A": 3.0})]
    assert _mean_watts(samples) == {"A": pytest.approx((2 * 1 + 3 * 3) / 4)}, "B was not always there"
    assert _mean_watts(samples[:1]) == {"A": 1.0, "B": 1.0}


def test_energy_of_counters_that_wrap(tmp_path):
    board = lay(tmp_path, RAPL)
    assert board.rapl_uj() == {"package-0": (900, 1000), "package-1": (100, 1000)}
    with Meter(board) as meter:
        lay(
            tmp_path,
            {
                "sys/class/powercap/intel-rapl:0/energy_uj": 50,
                "sys/class/powercap/intel-rapl:1/energy_uj": 400,
            },
        )
        time.sleep(0.01)
    found = meter.result(2)
    assert found["source"] == "RAPL"
    assert found["energy_j"] == pytest.approx((150 + 300) / 1e6)
    assert found["rails_w"]["package-1"] == pytest.approx(300e-6 / found["seconds"])


def test_a_counter_for_root_only(tmp_path, monkeypatch):
    board = lay(tmp_path, RAPL)
    monkeypatch.setattr(
        "cdl_edge.measurement.energy.read_line", lambda path: None if path.endswith("_uj") else "package-0"
    )
    with Meter(board, tegrastats="/nothing") as meter:
        pass
    assert "root" in meter.result(1)["reason"]


ORIN = (
    "11-21-2026 12:00:00 RAM 2210/7620MB (lfb 2x4MB) SWAP 0/3810MB (cached 0MB) CPU [2%@729,off] EMC_FREQ 0%@2133 "
    "GR3D_FREQ 0%@[305] cpu@48.5C VDD_IN 4940mW/4910mW VDD_CPU_GPU_CV 560mW/550mW VDD_SOC 1400mW/1400mW"
)


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (ORIN, {"VDD_IN": 4.94, "VDD_CPU_GPU_CV": 0.56, "VDD_SOC": 1.4}),
        (
            "RAM 1/2MB SWAP 0/1MB IRAM 0/252kB POM_5V_IN 2400/2300 POM_5V_GPU 80/40",
            {"POM_5V_IN": 2.4, "POM_5V_GPU": 0.08},
        ),
        ("VDD_GPU -392mW/0mW", {"VDD_GPU": -0.392}),
        ("", {}),
    ],
)
def test_lines_of_tegrastats(line, rails):
    assert dict(rails_of(line)) == pytest.approx(rails)


def test_tegrastats_where_there_are_no_rails(tmp_path):
    tool = tmp_path / "tegrastats"
    tool.write_text(f"#!/bin/sh\nwhile :; do echo '{ORIN}'; sleep 0.02; done\n")
    tool.chmod(0o755)
    with Meter(lay(tmp_path / "root", {}), tegrastats=str(tool)) as meter:
        deadline = time.perf_counter() + 10
        while len(meter._samples) < 2 and time.perf_counter() < deadline:
            time.sleep(0.01)
    found = meter.result(1)
    assert found["source"] == "tegrastats VDD_IN" and found["mean_w"] == pytest.approx(4.94)
    assert meter._process is not None and meter._process.poll() is not None, "it has ended"
