"""A short slice of `make attack`; the figures of docs/security.md come from the whole of it."""

from __future__ import annotations

import importlib
import sys

import pytest

from cdl_edge.updates import packs


@pytest.fixture(scope="module")
def suite(root):
    """suite(name) -> that module of benchmarks/."""
    sys.path.insert(0, str(root / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(root / "benchmarks"))


@pytest.fixture(scope="module")
def attack(suite):
    """benchmarks/attack_files.py as a module."""
    return suite("attack_files")


@pytest.mark.slow
def test_changed_bundles(attack, make_version, tmp_path):
    found = attack.attack_bundles(make_version(1), 60, tmp_path)
    assert found.faults == [] and found.cases == 60
    assert set(found.outcomes) == {"refused", "answered"}


@pytest.mark.slow
def test_changed_packs(attack, make_version, tmp_path):
    old, new = make_version(1), make_version(2)
    packs.create(old, new, tmp_path / "update.pack")
    found = attack.attack_packs(tmp_path / "update.pack", old, 40, tmp_path)
    assert found.faults == [] and found.outcomes["refused"] > 10


def test_changed_pictures(attack):
    found = attack.attack_pictures(70)
    assert found.faults == [] and set(found.outcomes) == {"refused", "read"}


def test_a_fault_is_found(attack, tmp_path):
    def case(number: int) -> str:
        if number == 3:
            raise KeyError("three")
        return "fine"

    found = attack.attack(attack.Found(), 5, case)
    assert found.outcomes["fine"] == 4 and "case 3" in found.faults[0] and "KeyError" in found.faults[0]


@pytest.mark.slow
def test_kills_find_what_is_half_written(suite, tmp_path):
    kills, out = suite("attack_kills"), tmp_path / "out"
    slow = "import pathlib, time; p = pathlib.Path({!r}); p.write_text('half'); time.sleep(0.3); p.write_text('whole')"
    command = [sys.executable, "-c", slow.format(str(out))]

    def check(finished):
        return "half of it" if out.exists() and out.read_text() == "half" else None

    found = kills.kill(command, 8, check, 0, lambda: out.unlink(missing_ok=True))
    assert found.cases == 8 and found.outcomes["killed"] >= 1
    assert all("half of it" in fault and "after the next command" not in fault for fault in found.faults)
    assert found.faults, "eight kills, and none of them within the 0.3 s"


@pytest.mark.slow
def test_a_server_under_attack(suite, make_version):
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'cdl-edge[serve]'")
    found = suite("attack_server").attack(make_version(0), 2.0, 4, 20)
    assert [fault for fault in found.faults if "p99" not in fault] == []  # the clock of a busy machine proves nothing
    assert found.outcomes["good: 200"] > 5 and any(name.startswith("bad: 4") for name in found.outcomes)
