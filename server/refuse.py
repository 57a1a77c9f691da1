"""Requests that are refused: what was wrong with them, and the HTTP status that says so."""

from __future__ import annotations

from ..errors import InputError


class Refused(InputError):
    """A request that is wrong in a way that has an HTTP status of its own; a plain InputError is a 400."""

    def __init__(
        self, status: int, message: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        super().__init__(message, got=got, expected=expected, fix=fix)
        self.status = status
