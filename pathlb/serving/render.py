"""A configuration as the TOML text that `load` reads back as the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from ..core.model import Endpoint
from .checks import TLS, Address
from .config import ServeConfig

_BARE = re.compile(r"[A-Za-z0-9_-]+").fullmatch


def render(config: ServeConfig, *, comments: Iterable[str] = ()) -> str:
    """`config` as TOML: what differs from the defaults, the endpoints first. `comments` are lines to put at the top."""
    head = [f"# {line}".rstrip() for comment in comments for line in comment.splitlines() or [""]]
    plain: list[str] = []
    tables: list[list[str]] = [_endpoint(endpoint) for endpoint in config.endpoints]
    for one in fields(config):
        value = getattr(config, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name == "endpoints" or value == default:
            continue
        if isinstance(value, TLS):
            value = {"certificate": value.certificate, "key": value.key}
        if one.name == "services" and None in value.values():
            value = list(value)
        if isinstance(value, Mapping):
            tables.append([f"[{one.name}]", *(_pair(key, part) for key, part in value.items())])
        else:
            plain.append(_pair(one.name, value))
    blocks = [block for block in (head, plain, *tables) if block]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _endpoint(endpoint: Endpoint) -> list[str]:
    lines = ["[[endpoints]]", _pair("url", endpoint.url)]
    if endpoint.weight != 1:
        lines.append(_pair("weight", endpoint.weight))
    if endpoint.server_hostname is not None:
        lines.append(_pair("server_hostname", endpoint.server_hostname))
    return lines


def _pair(key: str, value: Any) -> str:
    return f"{key if _BARE(key) else _string(key)} = {_value(value)}"


def _value(value: Any) -> str:
    if value is None:  # a header rule: take it out
        return "false"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Address):
        return _string(str(value))
    if isinstance(value, str):
        return _string(value)
    return f"[{', '.join(_value(part) for part in (sorted(value) if isinstance(value, frozenset) else value))}]"


def _string(text: str) -> str:
    # JSON's escapes are all TOML's too; DEL is the one character that TOML wants escaped and JSON does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
