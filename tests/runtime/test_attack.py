"""A short slice of `make attack`; the figures of docs/security.md come from the whole of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from cdl_edge.updates import packs


@pytest.fixture(scope="module")
def attack():
    path = Path(__file__).parents[2] / "benchmarks" / "attack.py"
    spec = importlib.util.spec_from_file_location("attack_suite", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_changed_bundles(attack, make_version, tmp_path):
    found = attack.attack_bundles(make_version(1), 60, tmp_path)
    assert found.faults == [] and found.cases == 60
    assert set(found.outcomes) == {"refused", "answered"}


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
