"""nginx: an upstream block, and the location with the proxy_pass that uses it. Read by crossplane."""

from __future__ import annotations

import os
import re

from ..config import DEADLINE
from ..core.errors import ConfigError
from .directives import Directive, Levels, effective, last, parse, walk, whole
from .draft import NOTHING, Draft, pick
from .nginx_settings import convert_levels


def convert(file: str, upstream: str | None) -> Draft:
    """Raises `ConfigError` that names file and line."""
    draft = Draft(file)
    root = parse(file, draft)
    blocks = {
        one.arg(): (one, levels)
        for one, levels in walk((root,))
        if one.name == "upstream" and all(level.name != "stream" for level in levels)
    }
    name = pick(file, "upstream block", {key: one.where for key, (one, _) in blocks.items()}, upstream)
    draft.source = f"{file}, upstream {name}"
    block, around = blocks[name]
    users = [
        (one, levels)
        for one, levels in walk((root,))
        if one.name == "proxy_pass" and re.fullmatch(rf"https?://{re.escape(name)}(?:/.*)?", one.arg())
    ]
    # Of several the one for everything.
    users.sort(key=lambda user: user[1][-1].args != ("/",))
    scheme, server_hostname = "http", None
    if users:
        scheme, server_hostname = _convert_location(draft, name, *users[0])
        for one, levels in users[1:]:
            draft.note(one.where, f"another use of {name}, in {levels[-1]}: one `pathlb serve` is one of them")
    else:
        draft.note(block.where, f"no proxy_pass to {name} is there: set bind to where pathlb is to listen")
        convert_levels(draft, name, around)
    _convert_upstream(draft, block, scheme, server_hostname)
    _fit_deadline(draft)
    return draft


# --- the upstream block


_POLICIES = {"least_conn": "least-connections", "random": "p2c"}
_NO_AFFINITY = (
    "there is no affinity to an address, key or cookie (for JSON-RPC filters set sticky_filters = true in [jsonrpc])"
)
_UPSTREAM = {
    "ip_hash": f"{_NO_AFFINITY}: least-connections is used",
    "hash": f"{_NO_AFFINITY}: least-connections is used",
    "sticky": f"{_NO_AFFINITY}: least-connections is used",
    "least_time": "there is p2c (latency and load), and least-connections, which is used: choose by policy",
    "keepalive": "as many connections are kept as are needed: nothing to do, there is no limit on the idle ones",
    "keepalive_time": "a connection is used for an hour: nothing to do",
    "keepalive_requests": "a connection is used for an hour, for any number of requests: nothing to do",
    "keepalive_timeout": "an idle connection to an instance is closed after 4 s: nothing to do",
    "queue": "requests wait in a queue by themselves: see queue and queue_timeout in [limits]",
}
_SERVER = {
    "max_fails": "the circuit breaker decides instead: see failures and open_for in [breaker]",
    "fail_timeout": "the circuit breaker decides instead: see failures and open_for in [breaker]",
    "slow_start": "all have a slow start: see window in [slow_start]",
    "resolve": "names are resolved for every new connection, and each is one endpoint: list instances one by one",
    "service": "there are no SRV records: write the port",
    "route": _NO_AFFINITY,
    "drain": "it is an endpoint like the others: leave it out, or drain it on the admin listener",
}


def _convert_upstream(draft: Draft, block: Directive, scheme: str, server_hostname: str | None) -> None:
    policy = "round-robin"
    caps: list[int | None] = []
    for one in block.block:
        if one.name == "server":
            caps += _convert_server(draft, one, scheme, server_hostname)
        elif one.name in _POLICIES:
            policy = _POLICIES[one.name]
        elif one.name not in ("zone", "state"):
            if one.name in ("ip_hash", "hash", "sticky", "least_time"):
                policy = "least-connections"
            draft.note(one.where, f"{one}: {_UPSTREAM.get(one.name, NOTHING)}")
    draft.set(block.where, "policy", policy)
    least = min((cap for cap in caps if cap is not None), default=None)
    if least is not None:
        draft.set(block.where, "limits", least, key="concurrency")
        if set(caps) != {least}:
            draft.note(block.where, f"max_conns differ: the least, {least}, is now that of every endpoint")
    if not draft.endpoints:
        raise ConfigError(block.where, f"upstream {block.arg()} has no server that is neither backup nor down")


def _convert_server(draft: Draft, one: Directive, scheme: str, server_hostname: str | None) -> list[int | None]:
    """Answers its max_conns, in a list, unless it is left out."""
    address = one.arg()
    weight, cap = 1, None
    for param in one.args[1:]:
        key, _, value = param.partition("=")
        if key in ("backup", "down"):
            what = {
                "backup": "there are no backups: it is left out; as an endpoint with a small weight it would serve too",
                "down": "it is left out: add it as an endpoint when it is up",
            }
            draft.note(one.where, f"server {address} {key}: {what[key]}")
            return []
        if key == "weight":
            weight = whole(one, value)
        elif key == "max_conns":
            cap = whole(one, value) or None
        else:
            draft.note(one.where, f"server {address} {param}: {_SERVER.get(key, NOTHING)}")
    if address.startswith("unix:"):
        if scheme == "https":
            draft.note(one.where, f"server {address}: there is no TLS over a unix socket: it is plain HTTP now")
        draft.add(one.where, f"unix://{address.removeprefix('unix:')}", weight)
    else:
        if scheme == "https" and not re.search(r":\d+$", address):
            address += ":80"  # that is nginx's default here too
        draft.add(one.where, f"{scheme}://{address}", weight, server_hostname if scheme == "https" else None)
    return [cap]


# --- what uses it


def _convert_location(draft: Draft, name: str, passed: Directive, levels: Levels) -> tuple[str, str | None]:
    """The location, and the blocks around it. Answers scheme and TLS name of the servers."""
    location = levels[-1]
    scheme, _, rest = passed.arg().partition("://")
    _convert_path(draft, name, passed, location, rest.removeprefix(name))
    tls_name = last(levels, "proxy_ssl_name")
    server_hostname = None
    if scheme == "https":
        if last(levels, "proxy_ssl_verify") is None:
            draft.note(passed.where, "https: certificates of instances are verified; for your own CA set SSL_CERT_FILE")
        if tls_name is not None and "$" not in tls_name.arg():
            server_hostname = tls_name.arg()
    server = next((one for one in reversed(levels) if one.name == "server"), None)
    if server is not None:
        _convert_listen(draft, server)
    convert_levels(draft, name, levels)
    fields = {one.arg().lower(): one for one in effective(levels, "proxy_set_header")}
    if "host" not in fields:
        draft.set(passed.where, "host", name)  # what nginx says unless it is told otherwise
    chain = fields.get("x-forwarded-for")
    if chain is not None and "$proxy_add_x_forwarded_for" in chain.args and not draft.get("trusted"):
        text = "what callers say in it counts only if they are in trusted: list the proxies before pathlb"
        draft.note(chain.where, f"{chain}: {text}")
    for other in server.all("location") if server is not None else ():
        if other is not location and passed not in [one for one, _ in walk((other,))]:
            draft.note(other.where, f"{other}: not converted, and its paths go to {name} like all others")
    return scheme, server_hostname


def _convert_path(draft: Draft, name: str, passed: Directive, location: Directive, uri: str) -> None:
    path = location.args[-1] if location.name == "location" and location.args else "/"
    if path != "/" or len(location.args) > 1:
        draft.note(location.where, f"{location}: pathlb hands every path to {name}, not these only")
    if not uri or uri == path:
        return
    plain = len(location.args) == 1 and path.startswith("/")
    if plain and "$" not in uri and path.endswith("/") == uri.endswith("/"):
        draft.set(passed.where, "rewrite", (path.rstrip("/") or "/", uri.rstrip("/") or "/"))
    else:
        draft.note(passed.where, f"{passed}: this change of the path is none of whole segments: see rewrite")


def _convert_listen(draft: Draft, server: Directive) -> None:
    first = None
    for one in server.all("listen"):
        address, *params = one.arg(), *one.args[1:]
        port = address.isdigit()
        if address.startswith("unix:"):
            draft.note(one.where, f"{one}: pathlb listens on TCP only: set bind")
            continue
        if first is not None:
            hint = ' (bind = "[::]:PORT" takes IPv4 and IPv6)' if "[" in f"{address}{first.arg()}" else ""
            draft.note(one.where, f"{one}: there is one listener, of the first listen{hint}")
            continue
        first = one
        host, _, number = ("*", "", address) if port else address.rpartition(":")
        if not number.isdigit():  # a host alone
            host, number = address, "80"
        draft.set(one.where, "bind", f"{'0.0.0.0' if host == '*' else host}:{number}")
        for param in params:
            if param == "ssl":
                _convert_certificate(draft, one, server)
            elif param not in ("default_server", "reuseport", "deferred") and not param.startswith("backlog="):
                draft.note(one.where, f"listen {param}: {NOTHING}")
    if first is None:
        draft.set(server.where, "bind", "0.0.0.0:80")
    names = [name for one in server.all("server_name") for name in one.args if name not in ("_", "", "localhost")]
    if names:
        where = server.all("server_name")[0].where
        draft.note(where, f"server_name {' '.join(names)}: pathlb answers for every Host")


def _convert_certificate(draft: Draft, listen: Directive, server: Directive) -> None:
    for key, name in (("certificate", "ssl_certificate"), ("key", "ssl_certificate_key")):
        found = server.all(name)
        if not found:
            draft.note(listen.where, f"listen ssl: no {name} is in the server block: complete [tls]")
            draft.set(listen.where, "tls", f"{key.upper()}.pem", key=key)
            continue
        # nginx takes it as relative to its main file, pathlb as relative to the TOML.
        folder = os.path.dirname(os.path.abspath(draft.file))
        draft.set(found[0].where, "tls", os.path.join(folder, found[0].arg()), key=key)


def _fit_deadline(draft: Draft) -> None:
    """An attempt that may take longer than all of them together would be cut off."""
    read, where = draft.get("timeouts", "read"), draft.place("timeouts.read")
    if read is not None and read > DEADLINE:
        draft.set(where, "deadline", read)
        draft.note(where, f"a request has {read:g} s with all its attempts (deadline), not each of them")
