"""What PATH instances say of their services, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..jsonrpc.text import parse_answer
from ..profile import perceived_height

_QUOTED = 200  # characters of what PATH says that are repeated


@dataclass(frozen=True, slots=True)
class Readiness:
    """What one instance says of one service at `/ready/{service}?detailed=true`."""

    ready: bool
    endpoints: int
    session: bool
    error: str
    """In PATH's words; empty when it gives none."""
    height: int | None
    """The highest block it has seen."""


def read_readiness(service: str, body: bytes) -> Readiness | None:
    """The readiness in PATH's answer; None when it is not PATH's."""
    try:
        said = parse_answer(body)
        told = said["services"][service] if "services" in said else said
        ready, error = told["ready"], told.get("error") or said.get("message") or ""
        endpoints, session = told.get("endpoint_count", 0), told.get("has_session", False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(ready, bool) or not isinstance(endpoints, int):
        return None
    return Readiness(ready, endpoints, bool(session), _one_line(str(error)), perceived_height(service, body))


def explain(told: Readiness, others: Sequence[Readiness]) -> str:
    """In words, and if it is not ready with what to do. `others` are the other instances' answers."""
    what = f"{told.endpoints} endpoint{'' if told.endpoints == 1 else 's'}"
    if told.ready:
        return what + _height(told.height, [one.height for one in others if one.height is not None])
    session = "a session" if told.session else "no session"
    said = f', "{told.error}"' if told.error else ""
    ready = sum(other.ready for other in others)
    elsewhere = f"; {ready} of {len(others)} others ready" if others else ""
    return f"not ready: {session}, {what}{said}{elsewhere}: {_what_to_do(told, ready > 0)}"


def _height(height: int | None, others: Sequence[int]) -> str:
    if height is None:
        return ", no block seen yet" if others else ""
    behind = max(others, default=height) - height
    return f", block {height}" + (f", {behind} behind the best" if behind > 0 else "")


def _what_to_do(told: Readiness, ready_elsewhere: bool) -> str:
    if told.error.startswith("error getting the selected app"):
        return "in delegated mode PATH is ready for nothing; leave --service out"
    if told.error.startswith("ZERO owned apps"):
        if ready_elsewhere:
            return "compare its owned_apps_private_keys_hex with theirs, and restart it: it looks up their stakes once"
        return "correct the service id, or stake an app for it and restart the gateway"
    if told.session:
        return "it filtered every supplier out; look at its /disqualified_endpoints, or wait for their reputation"
    if ready_elsewhere:
        return "ask again, a session may just be changing; else look at its full node and its log, or restart it"
    return "look at the full node (full_node_config), at the stake of the apps, and at the gateway's log"


def _one_line(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in text).strip()
    return line if len(line) <= _QUOTED else line[:_QUOTED] + "..."
