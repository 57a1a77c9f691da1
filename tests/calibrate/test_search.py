"""The gate, the order of layers, and the fewest that have to stay in float."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.calibrate.search import refusal, search, sensitivities
from cdl_edge.errors import GateError

UNITS = [f"blocks.{i}.{part}" for i in range(4) for part in ("qkv", "proj", "fc1", "fc2")]


@pytest.mark.parametrize("needed", range(1, 16))
def test_the_fewest_are_found(needed):
    asked = []

    def failing(units):
        asked.append(len(units))
        assert list(units) == UNITS[: len(units)]
        return [] if len(units) >= needed else ["task 1 loses 2.00 points"]

    assert search(failing, UNITS) == UNITS[:needed]
    assert needed in asked  # what is returned has been tried
    assert len(asked) <= 5 and 0 not in asked and 16 not in asked


def test_it_gives_up_with_reasons():
    with pytest.raises(GateError, match=r"task 3 loses 9\.00 points.*most sensitive: blocks\.0\.qkv.*nothing was"):
        search(lambda units: ["task 3 loses 9.00 points"], UNITS)
    with pytest.raises(GateError, match="one layer"):
        search(lambda units: ["task 1 loses 9.00 points"], UNITS[:1])


def test_sensitivity_is_the_change_through_one_layer_alone():
    harm = {"blocks.0.qkv": 0.1, "blocks.1.fc2": 3.0, "blocks.2.proj": 1.0}
    expected = np.ones((5, 3), np.float32)

    def answers(in_float):
        (alone,) = set(harm) - set(in_float)
        return expected + harm[alone]

    found = sensitivities(answers, list(harm), expected)
    assert list(found) == ["blocks.1.fc2", "blocks.2.proj", "blocks.0.qkv"]
    assert found == pytest.approx({u: h**2 for u, h in harm.items()}, rel=1e-5)


def test_a_refusal_names_tasks_and_layers():
    ranking = {unit: 1.0 / (i + 1) for i, unit in enumerate(UNITS)}
    text = str(refusal("int8-x86", 0.5, ["task 2 loses 3.00 points"], ranking))
    for words in ("int8-x86", "0.5 points", "task 2 loses 3.00 points", "blocks.0.qkv (1.0e+00)", "--max-drop"):
        assert words in text
    assert "blocks.1.proj" not in text  # five are enough
