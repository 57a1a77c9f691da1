"""Numbers as a person reads them."""

from __future__ import annotations

from cdl_edge.report import words


def test_numbers_in_words() -> None:
    assert [words.size_text(n) for n in (0, 999, 312_345, 9_550_000, 2.5e9)] == [
        "0 bytes",
        "999 bytes",
        "312 kB",
        "9.55 MB",
        "2.5 GB",
    ]
    assert [words.duration_text(s) for s in (3.14159, 65, 3725)] == ["3.14 s", "1 min 5 s", "1 h 2 min"]
    assert [words.ms_text(v) for v in (0.0042, 0.5, 4.5, 1234.5)] == ["0.0042", "0.500", "4.50", "1,234"]
