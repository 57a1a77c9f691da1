"""JSON into dataclasses: what a field may hold is said once, by its type, and refused by name where it is not."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import InputError

T = TypeVar("T")
LARGEST = 1e15
"of a number: integers that no float can hold are none of ours"


class MalformedField(ValueError):
    """A dataclass's own `check` refuses what its types allow."""

    def __init__(self, field: str, got: object, expected: str) -> None:
        super().__init__(field)
        self.field, self.got, self.expected = field, got, expected


def malformed(where: str, field: str, got: object, expected: str) -> InputError:
    """The error for a field that does not hold what it should. where: the document, for the message."""
    return InputError(f"{where}: malformed field {field}", got=f"{got!r:.160}", expected=expected, fix="write it again")


def parse(kind: type[T], value: object, where: str, at: str = "") -> T:
    """Make a dataclass of a JSON object.

    A field that is absent or null gets its default. A field named `document` gets the whole object as it was read,
    with what this version does not know. A field whose metadata has a "key" stands under that one in the document. A
    method `check` may raise MalformedField for what types cannot say.

    Args:
        where: the document, for messages. at: path of the value inside it, empty for the whole.

    Raises: InputError that names the field.
    """
    if not isinstance(value, Mapping):
        raise malformed(where, at or "the document", value, "an object")
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        key = field.metadata.get("key", field.name)
        inner, given = f"{at}.{key}".lstrip("."), value.get(key)
        if field.name == "document":
            found[field.name] = value
        elif given is not None or _required(field):
            found[field.name] = _value(hints[field.name], given, where, inner)
    made = kind(**found)
    check = getattr(made, "check", None)
    if check is not None:
        try:
            check()
        except MalformedField as error:
            raise malformed(where, f"{at}.{error.field}".lstrip("."), error.got, error.expected) from None
    return made


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(kind: Any, value: object, where: str, at: str) -> Any:
    """The value as that type. Raises: InputError."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where, at)
    if is_dataclass(kind):
        return parse(kind, value, where, at)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise malformed(where, at, value, "a list")
        return tuple(_value(inner[0], item, where, f"{at}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise malformed(where, at, value, "an object")
        return {key: _value(inner[1], item, where, f"{at}.{key}") for key, item in value.items()}
    return _plain(kind, value, where, at)


def _one_of(kinds: tuple[Any, ...], value: object, where: str, at: str) -> Any:
    """Read a value that may be one of several types: null, a number, or an object."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    objects = [kind for kind in others if is_dataclass(kind)]
    if objects and (len(others) == 1 or isinstance(value, Mapping)):
        return _value(objects[0], value, where, at)
    return _value(next(kind for kind in others if kind not in objects), value, where, at)


def _plain(kind: Any, value: object, where: str, at: str) -> Any:
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
        if not number or (kind is int and not isinstance(value, int)):
            raise malformed(where, at, value, "a whole number" if kind is int else "a finite number")
        return value if kind is int else float(value)  # type: ignore[arg-type]
    if kind in (str, bool):
        if not isinstance(value, kind):
            raise malformed(where, at, value, "a text" if kind is str else "true or false")
        return value
    return value
