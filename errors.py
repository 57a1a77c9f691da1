"""The exceptions that are a user's to read: the input is wrong, or a gate was not passed."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable


class InputError(Exception):
    """Bad input: the command line prints the message without a trace and exits with 2.

    The message says what was got, what was expected and what to do.
    """

    def __init__(self, message: str, *, got: object = None, expected: object = None, fix: str | None = None) -> None:
        parts = [message]
        if got is not None:
            parts.append(f"  got:      {got}")
        if expected is not None:
            parts.append(f"  expected: {expected}")
        if fix is not None:
            parts.append(f"  do:       {fix}")
        super().__init__("\n".join(parts))


class GateError(InputError):
    """A gate was not passed: what was computed differs from what the trained student computes, by more than it may.

    Nothing about the input is wrong: the command line exits with 1.
    """


def command_line(*words: object) -> str:
    """`cdl-edge` with these words, to be copied into a shell: one with a space, as in a class's name, is quoted."""
    return shlex.join(["cdl-edge", *map(str, words)])


def choose(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return `name` if it is one of `choices`; otherwise raise InputError with the list and the closest match.

    Of a long list (timm knows 430 ViTs) only the length and the nearest names are shown.
    """
    names = sorted(choices)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=3)
    fix = f"did you mean {close[0]!r}?" if close else None
    expected = "one of " + ", ".join(names)
    if len(names) > 30:
        expected = f"one of {len(names)} names" + (", the nearest: " + ", ".join(close) if close else "")
    raise InputError(f"unknown {kind}", got=repr(name), expected=expected, fix=fix)
