"""JSON-RPC calls as they are written: method, id and parameters, or the finding that nobody can tell."""

from __future__ import annotations

from typing import Any, NamedTuple

_FIELDS = frozenset({"method", "id", "params"})

Id = str | int
"""The ids that can be matched. The specification advises against null and against numbers with fractions."""


class Call(NamedTuple):
    """One call. `id` is None for a notification, and for an id that cannot be matched."""

    method: str
    id: Id | None
    params: Any


def read_call(value: Any) -> Call:
    """The call a parsed value is, its objects as `text.Pairs`.

    Raises `ValueError` when it is none, or when servers may disagree on what it says: Go's take `Method` for `method`,
    and of two members with one name some servers take the first and some the last.
    """
    if not isinstance(value, tuple):
        raise ValueError("a call is an object")
    seen: dict[str, Any] = {}
    for key, member in value:
        name = key.casefold()
        if name in _FIELDS:
            if name in seen or key != name:
                raise ValueError(f"its {name!r} can be read in two ways")
            seen[name] = member
    method = seen.get("method")
    if not isinstance(method, str):
        raise ValueError("its method is not a string")
    given = seen.get("id")
    return Call(method, given if type(given) in (str, int) else None, seen.get("params"))
