"""Fields the operator wants set, or taken out, whatever was sent."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import ConfigError
from ..exchange import Headers
from .headers import is_field

_FRAMING = frozenset(
    {"connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade"}
)


class HeaderRules:
    """Fields to set, or with None to take out. `name` is what they are called in a `ConfigError`."""

    def __init__(self, name: str, rules: Mapping[str, str | None] | None) -> None:
        if rules is not None and not isinstance(rules, Mapping):
            raise ConfigError(name, f"must map names to values, not {rules!r}")
        self._set: Headers = []
        self._out: set[bytes] = set()
        for field, value in (rules or {}).items():
            where = f"{name}[{field!r}]"
            if not is_field(field, "" if value is None else value):
                raise ConfigError(where, f"is no field that can be sent: {value!r}")
            if field.lower() in _FRAMING:
                more = "; use host=" if field.lower() == "host" else ""
                raise ConfigError(where, f"says where a message goes or ends, which is not a matter of taste{more}")
            key = field.lower().encode("ascii")
            self._out.add(key)
            if value is not None:
                self._set.append((key, value.encode("latin-1")))

    def apply(self, headers: Headers) -> Headers:
        if not self._out:
            return headers
        return [*(pair for pair in headers if pair[0] not in self._out), *self._set]
