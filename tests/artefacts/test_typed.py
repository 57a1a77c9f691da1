"""JSON becomes a dataclass or is refused by the name of its field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cdl_edge.artefacts.typed import MalformedField, parse
from cdl_edge.errors import InputError


@dataclass(frozen=True)
class Inner:
    count: int
    names: tuple[str, ...] = ()

    def check(self) -> None:
        if self.count < 0:
            raise MalformedField("count", self.count, "0 or more")


@dataclass(frozen=True)
class Outer:
    share: float
    inner: Inner | None = None
    either: Inner | int | None = None
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    flag: bool = False
    document: Mapping[str, Any] = field(default_factory=dict)


def test_what_is_there_is_read_and_what_is_absent_or_null_has_its_default():
    document = {
        "share": 1,
        "inner": {"count": 2, "names": ["a"]},
        "by_name": {"x": {"count": 3}},
        "flag": None,
        "new": 1,
    }
    found = parse(Outer, document, "file.json")
    assert found.share == 1.0 and isinstance(found.share, float)
    assert found.inner == Inner(2, ("a",)) and found.by_name == {"x": Inner(3)} and found.flag is False
    assert found.document is document, "what this version does not know is kept"
    assert parse(Outer, {"share": 0.5, "either": 7}, "file.json").either == 7
    assert parse(Outer, {"share": 0.5, "either": {"count": 7}}, "file.json").either == Inner(7)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ([], "the document"),
        ({}, "share"),
        ({"share": "high"}, "share"),
        ({"share": True}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": 10**400}, "share"),
        ({"share": 1, "inner": 3}, "inner"),
        ({"share": 1, "inner": {"count": 1.5}}, r"inner\.count"),
        ({"share": 1, "inner": {"count": -1}}, r"inner\.count"),
        ({"share": 1, "inner": {"count": 1, "names": "abc"}}, r"inner\.names"),
        ({"share": 1, "inner": {"count": 1, "names": ["a", 2]}}, r"inner\.names\[1\]"),
        ({"share": 1, "either": "x"}, "either"),
        ({"share": 1, "by_name": [1]}, "by_name"),
        ({"share": 1, "by_name": {"x": {"count": None}}}, r"by_name\.x\.count"),
        ({"share": 1, "flag": 1}, "flag"),
    ],
)
def test_what_is_malformed_is_named(document, named):
    with pytest.raises(
        InputError, match=rf"file\.json: malformed field {named}$|file\.json: malformed field {named}\n"
    ):
        parse(Outer, document, "file.json")
