"""What values a setting takes. A check answers the value as it is kept, or raises `Wrong`, with every problem in it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ..asgi.headers import is_field, is_host
from ..asgi.rules import HeaderRules
from ..core.config import check_number
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..profile import PATHProfile

Path = tuple[str | int, ...]
"""Where a setting is: `("endpoints", 1, "url")`."""

Check = Callable[[Any], Any]


class Problem(NamedTuple):
    """What is wrong with one setting."""

    path: Path
    text: str

    @property
    def setting(self) -> str:
        """The path as people write it: `endpoints[1].url`."""
        written = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return written.removeprefix(".")


class Wrong(Exception):
    """A value cannot be what it is."""

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = [Problem((), problem) if isinstance(problem, str) else problem for problem in problems]

    def below(self, *path: str | int) -> list[Problem]:
        """The problems, of a value that is found at `path`."""
        return [Problem((*path, *problem.path), problem.text) for problem in self.problems]


class Address(NamedTuple):
    """Where to listen. Port 0 is a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class TLS:
    """The certificate chain and the private key of a TLS listener: PEM files."""

    certificate: str
    key: str


def unknown(key: str, known: Collection[str]) -> str:
    """What to say of a key that means nothing."""
    near = difflib.get_close_matches(key, known, 1)
    return "is no setting" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}")


def check_table(value: Any, keys: Mapping[str, Check]) -> dict[str, Any]:
    """A table with some of these keys, each as its check wants it."""
    if not isinstance(value, Mapping):
        raise Wrong(f"must be a table, not {value!r}")
    checked: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, given in value.items():
        try:
            if key not in keys:
                raise Wrong(unknown(str(key), keys))
            checked[key] = keys[key](given)
        except Wrong as wrong:
            problems += wrong.below(key)
    if problems:
        raise Wrong(*problems)
    return checked


def text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise Wrong(f"must be a string, not {value!r}")
    return value


def name(value: Any) -> str:
    if not text(value).isascii() or " " in value:
        raise Wrong(f"must be ASCII without spaces, not {value!r}")
    return str(value)


def host(value: Any) -> str:
    if not is_host(name(value)):
        raise Wrong(f"must be a host, with or without a port, not {value!r}")
    return str(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"must be true or false, not {value!r}")
    return value


def number(low: float, high: float = math.inf, *, whole: bool = False) -> Check:
    def check(value: Any) -> Any:
        try:
            check_number("", "", value, low, high, whole=whole)
        except ConfigError as exc:
            raise Wrong(exc.problem) from None
        return value

    return check


def choice(allowed: Collection[str]) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise Wrong(f"must be {_either(allowed)}, not {value!r}{hint}")
        return value

    return check


def address(value: Any, default_host: str | None = None) -> Address:
    if isinstance(value, Address):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    host, colon, port = text(value).rpartition(":")
    if not colon and default_host is not None:
        host = default_host
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise Wrong(f"must be HOST:PORT, with an IPv6 address in brackets, not {value!r}")
    if not host:
        raise Wrong(f"must be HOST:PORT, not {value!r} (0.0.0.0 stands for every IPv4 address, [::] for all)")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise Wrong(f"must be HOST:PORT, with a port up to 65535, not {value!r}")
    return Address(host, int(port))


def admin_address(value: Any) -> Address:
    return address(value, "127.0.0.1")


def endpoints(value: Any) -> tuple[Endpoint, ...]:
    if isinstance(value, str | Mapping) or not isinstance(value, Collection):
        raise Wrong(f"must be [[endpoints]] tables, not {value!r}")
    checked: dict[str, Endpoint] = {}
    problems: list[Problem] = []
    for index, given in enumerate(value):
        try:
            endpoint = _endpoint(given)
            if endpoint.url in checked:
                raise Wrong(Problem(("url",), f"{endpoint.url} is listed twice; use weight for a larger share"))
        except Wrong as wrong:
            problems += wrong.below(index)
        else:
            checked[endpoint.url] = endpoint
    if problems:
        raise Wrong(*problems)
    if not checked:
        raise Wrong("there must be at least one")
    return tuple(checked.values())


_ENDPOINT = {"url": text, "weight": number(0), "server_hostname": name}


def _endpoint(given: Any) -> Endpoint:
    if isinstance(given, Endpoint):
        return given
    settings = check_table({"url": given} if isinstance(given, str) else given, _ENDPOINT)
    if "url" not in settings:
        raise Wrong("has no url")
    try:
        return Endpoint(**settings)
    except ConfigError as exc:
        raise Wrong(Problem((exc.field.rpartition(".")[2],), exc.problem)) from None


def services(value: Any) -> Mapping[str, str | None]:
    """Service ids, with their RPC-Type or None."""
    typed = isinstance(value, Mapping) and any(rpc_type is not None for rpc_type in value.values())
    ids: Any = dict(value) if typed else texts(value)
    try:
        PATHProfile(services=ids)
    except ConfigError as exc:
        wrong = next((one for one in ids if repr(one) in exc.field), None)
        raise Wrong(Problem((wrong,) if wrong else (), exc.problem)) from None
    return ids if typed else dict.fromkeys(ids)


def app_address(value: Any) -> str:
    try:
        PATHProfile(app_address=value)
    except ConfigError as exc:
        raise Wrong(exc.problem) from None
    return str(value)


def texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise Wrong(f"must be a list of strings, not {value!r}")
    return tuple(text(one) for one in value)


def rewrite(value: Any) -> tuple[str, str]:
    pair = texts(value)
    if len(pair) != 2:
        raise Wrong(f"must be a prefix and what to put in its place, not {value!r}")
    for part in pair:
        if not part.startswith("/") or not part.isascii() or any(ch in " ?#" for ch in part):
            raise Wrong(f"must be two paths, not {value!r}")
    return pair[0], pair[1]


def header_rules(value: Any) -> Mapping[str, str | None]:
    """Fields to set; with false (None) to take out."""
    if not isinstance(value, Mapping):
        raise Wrong(f"must be a table of fields, not {value!r}")
    rules: dict[str, str | None] = {}
    for field, given in value.items():
        rules[field] = None if given is False else given
        if not is_field(field, rules[field] or ""):
            raise Wrong(Problem((field,), f"must be a field with its value, or false to take it out, not {given!r}"))
        try:
            HeaderRules("", {field: rules[field]})
        except ConfigError as exc:
            raise Wrong(Problem((field,), exc.problem)) from None
    return rules


def tls(value: Any) -> TLS:
    if isinstance(value, TLS):
        return value
    settings = check_table(value, {"certificate": text, "key": text})
    if len(settings) < 2:
        raise Wrong("needs certificate and key, two PEM files")
    return TLS(**settings)


def section(make: Callable[..., object], *, leave: Collection[str] = (), off: bool = False, **base: Any) -> Check:
    """Settings of one of pathlb's dataclasses, kept as they are given. With `off` there may be a false instead."""
    fields = {field.name: field for field in dataclasses.fields(make) if field.init}  # type: ignore[arg-type]
    keys = [key for key in fields if key not in leave]

    def check(value: Any) -> Any:
        if off and value is False:
            return False
        settings = check_table(value, dict.fromkeys(keys, lambda given: given))
        try:
            make(**{**base, **settings})
        except ConfigError as exc:
            # "Limits.queue" is queue, and so is "Health.statuses" for one of them.
            raise Wrong(Problem((exc.field.rpartition(".")[2],), exc.problem)) from None
        return settings

    return check


def timeouts(value: Any) -> Mapping[str, float]:
    return check_table(value, dict.fromkeys(("connect", "read", "write"), number(1e-3)))


def _either(allowed: Collection[str]) -> str:
    *others, last = (repr(one) for one in allowed)
    return f"{', '.join(others)} or {last}" if others else last
