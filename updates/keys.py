"""The keys that a bundle trusts: pinned with the first signed pack, from then on changed by signed packs alone.

A pack may add keys and revoke keys. It has to be signed by a key that is trusted when it comes. What was revoked stays
revoked: no later pack, no rollback and no option brings it back. One key is always left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

MOST = 64
"keys that a pack may add, and that it may revoke"
_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Keys:
    """Public keys in hex, each 64 digits."""

    trusted: tuple[str, ...] = ()
    "none: packs are not checked for signatures"
    revoked: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        """The keys as JSON has them: {"trusted", "revoked"}, each a list of hex."""
        return {"trusted": list(self.trusted), "revoked": list(self.revoked)}

    def pinned(self, given: Iterable[str], at: object) -> Keys:
        """With the keys that the user gives: they are pinned where none was; later they have to be known here.

        at: the bundle, for the message. Raises: InputError for a key that this bundle neither trusts nor has revoked.
        """
        given = tuple(dict.fromkeys(given))
        if not self.trusted:
            return Keys(given, self.revoked)
        unknown = [key for key in given if key not in self.trusted + self.revoked]
        if unknown:
            raise InputError(
                f"{at}: trusts another key",
                got=named(unknown),
                expected=f"{named(self.trusted)}, pinned by the first signed pack or added by a later one",
                fix="use that key; a pack that is signed with it may add another one: cdl-edge pack create --add-key",
            )
        return self

    def after(self, change: KeyChange, at: object) -> Keys:
        """What is trusted once a pack that one of these keys has signed is installed.

        at: the pack, for the message.

        Raises: InputError for a pack that brings a revoked key back, or that would leave no key.
        """
        back = [key for key in change.add if key in self.revoked]
        if back:
            raise InputError(
                f"{at}: goes back to an older list of keys",
                got=f"it adds {named(back)}, revoked here",
                expected="keys that never were revoked",
                fix="do not use this pack; ask its maker for one that adds a new key",
            )
        gone = dict.fromkeys((*self.revoked, *change.revoke))
        left = tuple(key for key in dict.fromkeys((*self.trusted, *change.add)) if key not in gone)
        if not left:
            raise InputError(
                f"{at}: would revoke the last key",
                got=f"it revokes {named(change.revoke)}",
                expected=f"one key that is left, of {named(self.trusted)}",
                fix="add the next key in the same pack, or in one before it: cdl-edge pack create --add-key",
            )
        return Keys(left, tuple(gone))


@dataclass(frozen=True)
class KeyChange:
    """What a signed pack does to the keys of a bundle, in hex; installed twice it does no more than once."""

    add: tuple[str, ...] = ()
    revoke: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: object) -> KeyChange:
        """Of the field "keys" of pack.json; None: no change. Raises: ValueError for what is malformed."""
        if document is None:
            return cls()
        if not isinstance(document, Mapping) or set(document) != {"add", "revoke"}:
            raise ValueError("'keys' is not of the form {'add': [], 'revoke': []}")
        change = cls(*(_hex(document[name]) for name in ("add", "revoke")))
        if set(change.add) & set(change.revoke):
            raise ValueError("'keys' adds and revokes the same key")
        return change

    @property
    def document(self) -> dict[str, Any]:
        """The change as pack.json has it: {"add", "revoke"}, each a list of hex."""
        return {"add": list(self.add), "revoke": list(self.revoke)}

    def __bool__(self) -> bool:
        return bool(self.add or self.revoke)


def named(keys: Sequence[str]) -> str:
    """Keys for a message, by their first digits."""
    return ", ".join(f"{key:.16}..." for key in keys)


def _hex(keys: object) -> tuple[str, ...]:
    if not isinstance(keys, list) or len(keys) > MOST:
        raise ValueError(f"'keys' is no list of at most {MOST}")
    if not all(isinstance(key, str) and len(key) == 64 and set(key) <= _DIGITS for key in keys):
        raise ValueError("'keys' holds what is no key: 64 hexadecimal digits")
    return tuple(keys)
