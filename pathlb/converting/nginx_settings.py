"""What nginx's directives in and around a location are as settings of `pathlb serve`."""

from __future__ import annotations

import re
from collections.abc import Callable

from ..asgi.forwarded import FORWARDED, Forwarding
from ..asgi.rules import HeaderRules
from ..core.errors import ConfigError
from .directives import Directive, Levels, seconds, time, whole
from .draft import NOTHING, Draft

_UNLIMITED = 2**40  # bytes: what stands for no limit
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_SILENT = frozenset(
    {
        "client_body_buffer_size",
        "daemon",
        "default_type",
        "error_log",
        "events",
        "http",
        "include",
        "load_module",
        "log_format",
        "map",
        "pid",
        "proxy_buffer_size",
        "proxy_buffering",
        "proxy_buffers",
        "proxy_busy_buffers_size",
        "proxy_http_version",
        "proxy_max_temp_file_size",
        "proxy_pass",
        "proxy_redirect",
        "proxy_request_buffering",
        "proxy_socket_keepalive",
        "real_ip_recursive",
        "sendfile",
        "server",
        "server_names_hash_bucket_size",
        "server_tokens",
        "ssl_session_cache",
        "ssl_session_timeout",
        "stream",
        "tcp_nodelay",
        "tcp_nopush",
        "types",
        "types_hash_max_size",
        "upstream",
        "user",
        "variables_hash_max_size",
        "worker_rlimit_nofile",
    }
)
"""What needs nothing to be done: pathlb streams, and the rest is about nginx itself, or is read elsewhere."""
_OWN = {
    "host": {"$host", "$http_host", "$host:$server_port", "$proxy_host"},
    "x-real-ip": {"$remote_addr"},
    "x-forwarded-for": {"$remote_addr", "$proxy_add_x_forwarded_for"},
    "x-forwarded-proto": {"$scheme"},
    "x-forwarded-host": {"$host", "$http_host"},
    "upgrade": {"$http_upgrade"},
    "connection": {"", "upgrade", "Upgrade", "$connection_upgrade", "$http_connection", "keep-alive"},
}
"""Fields that pathlb sends by itself, and the values that mean the same."""
_HINTS = {
    "gzip": "compress in the gateways, or before pathlb",
    "proxy_cache": "cache before pathlb",
    "limit_req": "there is no limit on the rate of a caller: keep it before pathlb",
    "limit_conn": "there is no limit on the connections of a caller: keep it before pathlb",
    "auth_basic": "authenticate before pathlb",
    "return": "answer it before pathlb",
    "ssl_protocols": "TLS 1.2 and 1.3 with Python's ciphers",
    "ssl_ciphers": "TLS 1.2 and 1.3 with Python's ciphers",
    "proxy_ssl_verify": "certificates of instances are always verified",
    "proxy_ssl_trusted_certificate": "set SSL_CERT_FILE to it for `pathlb serve`",
    "proxy_method": "the method passes as it is",
    "proxy_intercept_errors": "replies pass as they are",
    "error_page": "replies pass as they are; its own errors are problem+json, or JSON-RPC",
}


def convert_levels(draft: Draft, name: str, levels: Levels) -> None:
    """All but the path and the listener, as the innermost level has it."""
    done: set[str] = set()
    for level in reversed(levels):
        here: set[str] = set()
        for one in level.block:
            if one.name in done or one.name in _READ_ELSEWHERE:
                continue
            here.add(one.name)
            if one.name in _CONVERTERS:
                _CONVERTERS[one.name](draft, name, one)
            elif one.name not in _SILENT:
                draft.note(one.where, f"{one}: {_hint(one.name)}")
        done |= here


def _hint(name: str) -> str:
    near = max((key for key in _HINTS if name == key or name.startswith(f"{key}_")), key=len, default=None)
    return NOTHING if near is None else _HINTS[near]


def _set_header(draft: Draft, name: str, one: Directive) -> None:
    field, value = one.arg(), one.arg(1)
    key = field.lower()
    if key == "host" and "$" not in value:
        draft.set(one.where, "host", value)
    elif key == "host" and value == "$proxy_host":
        draft.set(one.where, "host", name)
    elif value in _OWN.get(key, ()) or value == "$http_" + key.replace("-", "_"):
        pass
    elif "$" in value:
        draft.note(one.where, f"{one}: there are no variables: see [request_headers] for fixed values")
    elif key.encode() in FORWARDED:
        draft.note(one.where, f"{one}: pathlb says where a request came from by itself")
    else:
        _header(draft, "request_headers", one, field, value or None)


def _add_header(draft: Draft, name: str, one: Directive) -> None:
    if "$" in one.arg(1):
        draft.note(one.where, f"{one}: there are no variables: see [response_headers] for fixed values")
    else:
        _header(draft, "response_headers", one, one.arg(), one.arg(1) or None)


def _hide_header(draft: Draft, name: str, one: Directive) -> None:
    _header(draft, "response_headers", one, one.arg(), None)


def _header(draft: Draft, table: str, one: Directive, field: str, value: str | None) -> None:
    try:
        HeaderRules(table, {field: value})
    except ConfigError as exc:
        draft.note(one.where, f"{one}: {exc.problem}")
    else:
        draft.set(one.where, table, value, key=field)


def _timeout(step: str) -> Callable[[Draft, str, Directive], None]:
    def put(draft: Draft, name: str, one: Directive) -> None:
        draft.set(one.where, "timeouts", seconds(one), key=step)

    return put


def _max_body(draft: Draft, name: str, one: Directive) -> None:
    found = re.fullmatch(r"(\d+)([kmg]?)", one.arg().lower())
    if found is None:
        raise ConfigError(one.where, f"{one} is no size")
    draft.set(one.where, "max_body", int(found[1]) * _SIZES[found[2]] or _UNLIMITED)


def _next_upstream(draft: Draft, name: str, one: Directive) -> None:
    if "off" in one.args:
        draft.set(one.where, "retry", 1, key="attempts")
        return
    statuses = [int(arg.removeprefix("http_")) for arg in one.args if re.fullmatch(r"http_[45]\d\d", arg)]
    draft.set(one.where, "retry", statuses, key="statuses")
    if "non_idempotent" in one.args:
        draft.note(one.where, f"{one}: what is not safe to send twice is sent again only when it was not sent at all")


def _tries(draft: Draft, name: str, one: Directive) -> None:
    if tries := whole(one, one.arg()):
        draft.set(one.where, "retry", tries, key="attempts")


def _next_timeout(draft: Draft, name: str, one: Directive) -> None:
    if limit := seconds(one):
        draft.note(one.where, f"{one}: see deadline, the seconds that all attempts may take ({limit:g} here)")


def _keepalive_timeout(draft: Draft, name: str, one: Directive) -> None:
    if idle := seconds(one):
        draft.set(one.where, "keep_alive", idle)
    else:
        draft.note(one.where, f"{one}: connections of callers are kept, for 75 s: see keep_alive")


def _access_log(draft: Draft, name: str, one: Directive) -> None:
    if one.arg() == "off":
        draft.set(one.where, "access_log", False)
    else:
        draft.set(one.where, "access_log", True)
        draft.note(one.where, f"{one}: it goes to stdout, in a format of its own")


def _workers(draft: Draft, name: str, one: Directive) -> None:
    if one.arg() == "auto":
        draft.note(one.where, f"{one}: set workers to the number of cores that pathlb may use")
    else:
        draft.set(one.where, "workers", whole(one, one.arg()))


def _real_ip_from(draft: Draft, name: str, one: Directive) -> None:
    try:
        Forwarding([one.arg()])
    except ConfigError as exc:
        draft.note(one.where, f"{one}: {exc.problem}: list the addresses in trusted")
    else:
        draft.set(one.where, "trusted", (*(draft.get("trusted") or ()), one.arg()))


def _real_ip_header(draft: Draft, name: str, one: Directive) -> None:
    if one.arg().lower() not in ("x-real-ip", "x-forwarded-for"):
        draft.note(one.where, f"{one}: proxies in trusted are to say it in X-Forwarded-For or X-Real-IP")


def _health_check(draft: Draft, name: str, one: Directive) -> None:
    draft.set(one.where, "health", "/", key="path")
    draft.set(one.where, "health", 5, key="interval")
    for param in one.args:
        key, _, value = param.partition("=")
        if key == "uri":
            draft.set(one.where, "health", value, key="path")
        elif key == "interval":
            interval = time(one, value)
            draft.set(one.where, "health", interval, key="interval")
            if interval < 1:
                draft.set(one.where, "health", interval, key="changing_interval")
        elif key in ("fails", "passes"):
            draft.set(one.where, "health", whole(one, value), key={"fails": "fall", "passes": "rise"}[key])
        else:
            draft.note(one.where, f"health_check {param}: see [health]")


_CONVERTERS: dict[str, Callable[[Draft, str, Directive], None]] = {
    "proxy_set_header": _set_header,
    "add_header": _add_header,
    "proxy_hide_header": _hide_header,
    "proxy_connect_timeout": _timeout("connect"),
    "proxy_read_timeout": _timeout("read"),
    "proxy_send_timeout": _timeout("write"),
    "client_max_body_size": _max_body,
    "proxy_next_upstream": _next_upstream,
    "proxy_next_upstream_tries": _tries,
    "proxy_next_upstream_timeout": _next_timeout,
    "keepalive_timeout": _keepalive_timeout,
    "access_log": _access_log,
    "worker_processes": _workers,
    "set_real_ip_from": _real_ip_from,
    "real_ip_header": _real_ip_header,
    "health_check": _health_check,
}
_READ_ELSEWHERE = frozenset(
    {"listen", "location", "server_name", "ssl_certificate", "ssl_certificate_key", "proxy_ssl_name"}
)
