"""Traefik: a loadBalancer service, and the router that uses it, from YAML files or the labels of a compose file."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from ..asgi.forwarded import Forwarding
from ..asgi.rules import HeaderRules
from ..config import DEADLINE
from ..core.errors import ConfigError
from .compose import read_compose
from .draft import NOTHING, Draft, pick
from .tree import Tree, read_yaml

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_STRATEGIES = {"wrr": "round-robin", "p2c": "p2c"}
_SILENT = ("global", "log", "version", "name", "networks", "volumes", "configs", "secrets")
_HINTS = {
    "api": "the admin listener (admin = 9901) has /snapshot in place of the dashboard",
    "ping": "the admin listener (admin = 9901) has /health and /ready",
    "metrics": "see /snapshot on the admin listener",
    "tracing": "see /snapshot on the admin listener, and the access log",
    "providers": "what is elsewhere is not read: convert that file as well",
    "certificatesresolvers": "there is no ACME: give certificate and key in [tls]",
    "tcp": "pathlb balances HTTP only",
    "udp": "pathlb balances HTTP only",
    "sticky": "there is no affinity to a cookie (for JSON-RPC filters set sticky_filters = true in [jsonrpc])",
    "cert": "callers are asked for no certificate",
    "priority": "there is one route, for everything",
    "serverstransport": "see [timeouts], server_hostname, and SSL_CERT_FILE for your own CA",
    "passiveHealthCheck".lower(): "see [breaker] and [outlier]",
    "preservepath": "the path of an endpoint's URL is always kept: it goes before the caller's",
}


def convert(file: str, upstream: str | None) -> Draft:
    """Raises `ConfigError` that names file and line."""
    draft = Draft(file)
    root = read_yaml(file)
    if root.get("services") is not None:
        root = read_compose(draft, root)
    services = {one.name: one for one in root.tables("http", "services")}
    balancers = {name: one.where for name, one in services.items() if "loadbalancer" in one.table}
    if upstream is not None and upstream in services and upstream not in balancers:
        kinds = ", ".join(one.name for one in services[upstream].table.values()) or "nothing"
        there = ", ".join(balancers) or "none"
        raise ConfigError(
            services[upstream].where, f"{upstream} is {kinds}; of those with a loadBalancer there is {there}"
        )
    if not balancers and root.get("providers", "file") is not None:
        raise ConfigError(file, "has no loadBalancer service: it is the static configuration; convert the dynamic one")
    name = pick(file, "loadBalancer service", balancers, upstream)
    draft.source = f"{file}, service {name}"
    balancer = services[name].get("loadBalancer")
    assert balancer is not None
    for other in services.values():
        if other.name != name:
            other.take()
    router = _find_router(draft, root, name)
    _convert_entry_point(draft, root, router)
    _convert_balancer(draft, root, balancer)
    _convert_certificates(draft, root)
    if router is not None:
        _convert_router(draft, root, router, name)
    _convert_rest(draft, root)
    read = draft.get("timeouts", "read")
    if read is not None and read > DEADLINE:
        draft.set(draft.place("timeouts.read"), "deadline", read)
    for left in root.left():
        if left.name.lower() not in _SILENT:
            shown = f" = {left.value}" if left.value is not None else ""
            draft.note(left.where, f"{left.path}{shown}: {_hint(left)}")
    return draft


def _hint(left: Tree) -> str:
    for part in reversed(left.path.lower().split(".")):
        if part in _HINTS:
            return _HINTS[part]
    return NOTHING


# --- the service


def _convert_balancer(draft: Draft, root: Tree, balancer: Tree) -> None:
    transport = _find(root, "serversTransports", balancer.text("serversTransport"))
    name = transport.text("serverName") if transport is not None else None
    for server in _servers(balancer):
        url, weight = server.text("url"), server.get("weight")
        if url is None:
            raise ConfigError(server.where, f"{server.path} has no url")
        share = 1.0 if weight is None else _number(weight)
        if not share:
            draft.note(server.where, f"{url} has weight 0: it is left out; add it as an endpoint when it may serve")
            continue
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigError(server.where, f"{url!r} is not a URL") from None
        if parts.path not in ("", "/") and server.text("preservePath") != "true":
            draft.note(server.where, f"{url}: the path is left out, as Traefik does without preservePath")
            url = f"{parts.scheme}://{parts.netloc}"
        draft.add(server.where, url, _plain(share), name if parts.scheme == "https" else None)
    if not draft.endpoints:
        raise ConfigError(balancer.where, f"{balancer.path} has no servers")
    strategy = (balancer.text("strategy") or "wrr").lower()
    if strategy in _STRATEGIES:
        draft.set(balancer.where, "policy", _STRATEGIES[strategy])
    else:
        draft.note(balancer.where, f"strategy {strategy}: there is p2c and round-robin; least-connections is used")
    if balancer.text("passHostHeader") == "false":
        _convert_host(draft, balancer)
    if (check := balancer.get("healthCheck")) is not None:
        _convert_health(draft, check)
    if (sticky := balancer.get("sticky")) is not None:
        sticky.take()
        draft.note(sticky.where, f"{sticky.path}: {_HINTS['sticky']}")
    if (node := balancer.get("responseForwarding")) is not None:
        node.take()  # replies stream
    if any(endpoint.scheme == "https" for endpoint in draft.endpoints):
        draft.note(balancer.where, "https: certificates of instances are verified; for your own CA set SSL_CERT_FILE")
    if transport is not None:
        for step, key in (("connect", "dialTimeout"), ("read", "responseHeaderTimeout")):
            timeout = transport.get("forwardingTimeouts", key)
            if timeout is not None and (seconds := _seconds(timeout)):
                draft.set(timeout.where, "timeouts", seconds, key=step)


def _servers(balancer: Tree) -> list[Tree]:
    node = balancer.get("servers")
    for one in node.list if node is not None else ():
        one.used = True
    return node.list if node is not None else []


def _convert_host(draft: Draft, balancer: Tree) -> None:
    node = balancer.get("passHostHeader")
    assert node is not None
    hosts = {endpoint.authority.decode("ascii") for endpoint in draft.endpoints}
    if len(hosts) == 1:
        draft.set(node.where, "host", hosts.pop())
    else:
        draft.note(node.where, "passHostHeader = false: the caller's Host is sent; or set host, one for all instances")


def _convert_health(draft: Draft, check: Tree) -> None:
    path = check.text("path") or "/"
    draft.set(check.where, "health", path if path.startswith("/") else f"/{path}", key="path")
    for name, key in (("interval", "interval"), ("unhealthyInterval", "changing_interval"), ("timeout", "timeout")):
        if (node := check.get(name)) is not None:
            draft.set(node.where, "health", _seconds(node), key=key)
    # Traefik asks every 30 s; asking less often than pathlb does is not what anybody wants by default.
    interval, changing = draft.get("health", "interval"), draft.get("health", "changing_interval")
    if (interval or 5) < (changing or 1):
        where = draft.place("health.interval" if interval else "health.changing_interval")
        draft.set(where, "health", interval or 5, key="changing_interval")
    if (status := check.get("status")) is not None and (number := _number(status)):
        draft.set(status.where, "health", [_plain(number)], key="statuses")


# --- what leads to it


def _find_router(draft: Draft, root: Tree, name: str) -> Tree | None:
    routers = root.tables("http", "routers")
    mine = [one for one in routers if _bare(one.text("service") or "") == name]
    for other in routers:
        if other not in mine:
            other.take()
    for other in mine[1:]:
        other.take()
        draft.note(other.where, f"{other.path}: another router to {name}: one `pathlb serve` is one of them")
    return mine[0] if mine else None


def _bare(name: str) -> str:
    """Without its provider: `gateways@file`."""
    return name.partition("@")[0]


def _find(root: Tree, kind: str, name: str | None) -> Tree | None:
    return None if name is None else root.get("http", kind, _bare(name))


def _convert_router(draft: Draft, root: Tree, router: Tree, name: str) -> None:
    rule = router.get("rule")
    if rule is not None and str(rule.value).strip() not in ("PathPrefix(`/`)", "HostRegexp(`.+`)"):
        draft.note(rule.where, f"rule {rule.value}: pathlb takes every request; only what is for {name} may come to it")
    router.text("ruleSyntax")
    if (tls := router.get("tls")) is not None and tls.written != "false":
        tls.take()
        if draft.get("tls") is None:
            draft.note(
                tls.where, "tls: there is no ACME, and no certificate in this file: give it with its key in [tls]"
            )
    for one in router.items("middlewares"):
        middleware = _find(root, "middlewares", str(one.value))
        if middleware is None:
            draft.note(one.where, f"middleware {one.value}: it is not in this file")
            continue
        _convert_middleware(draft, middleware)


def _convert_middleware(draft: Draft, middleware: Tree) -> None:
    prefixes = [*middleware.items("stripPrefix", "prefixes")]
    if prefixes:
        draft.set(prefixes[0].where, "rewrite", (str(prefixes[0].value).rstrip("/") or "/", "/"))
        for other in prefixes[1:]:
            draft.note(other.where, f"stripPrefix {other.value}: one prefix can be taken off")
    if (prefix := middleware.get("addPrefix", "prefix")) is not None:
        draft.set(prefix.where, "rewrite", ("/", str(prefix.value).rstrip("/") or "/"))
    for kind, table in (("customRequestHeaders", "request_headers"), ("customResponseHeaders", "response_headers")):
        for field in middleware.tables("headers", kind):
            field.used = True
            value = field.written or None
            if field.name.lower() == "host" and value is not None and table == "request_headers":
                draft.set(field.where, "host", value)
                continue
            try:
                HeaderRules(table, {field.name: value})
            except ConfigError as exc:
                draft.note(field.where, f"{field.path}: {exc.problem}")
            else:
                draft.set(field.where, table, value, key=field.name)
    if (limit := middleware.get("buffering", "maxRequestBodyBytes")) is not None and (most := _number(limit)):
        draft.set(limit.where, "max_body", int(most))
    if (attempts := middleware.get("retry", "attempts")) is not None:
        draft.set(attempts.where, "retry", _plain(_number(attempts)), key="attempts")


def _convert_entry_point(draft: Draft, root: Tree, router: Tree | None) -> None:
    points = {one.name: one for one in root.tables("entryPoints")}
    wanted = [str(one.value) for one in router.items("entryPoints")] if router is not None else []
    here = [name for name in wanted if name in points] or [name for name in points if name != "traefik"]
    for name, point in points.items():
        if name not in here[:1]:
            point.take()
            if name != "traefik":
                draft.note(point.where, f"entry point {name}: there is one listener, of {here[0]}")
    if not here:
        where = router.where if router is not None else draft.file
        draft.note(where, "no entry point is in this file: set bind to where pathlb is to listen")
        return
    point = points[here[0]]
    point.used = True
    address = point.text("address")
    if address is not None:
        node = point.get("address")
        assert node is not None
        host, _, port = address.partition("/")[0].rpartition(":")
        draft.set(node.where, "bind", f"{host or '0.0.0.0'}:{port}")
    for trusted in point.items("forwardedHeaders", "trustedIPs"):
        try:
            Forwarding([str(trusted.value)])
        except ConfigError as exc:
            raise ConfigError(trusted.where, exc.problem) from None
        draft.set(trusted.where, "trusted", (*(draft.get("trusted") or ()), str(trusted.value)))
    if (insecure := point.get("forwardedHeaders", "insecure")) is not None and insecure.written == "true":
        draft.note(insecure.where, "forwardedHeaders.insecure: list the proxies before pathlb in trusted")
    if (grace := point.get("transport", "lifeCycle", "graceTimeOut")) is not None:
        draft.set(grace.where, "grace", _seconds(grace))
    if (idle := point.get("transport", "respondingTimeouts", "idleTimeout")) is not None and _seconds(idle):
        draft.set(idle.where, "keep_alive", _seconds(idle))


def _convert_certificates(draft: Draft, root: Tree) -> None:
    certificates = root.get("tls", "certificates")
    for index, one in enumerate(certificates.list if certificates is not None else ()):
        one.used = True
        certificate, key = one.text("certFile"), one.text("keyFile")
        if index or certificate is None or key is None:
            draft.note(one.where, f"{one.path}: there is one certificate with its key, in [tls]")
            continue
        draft.set(one.where, "tls", certificate, key="certificate")
        draft.set(one.where, "tls", key, key="key")
        if not (certificate.startswith("/") and key.startswith("/")):
            draft.note(one.where, f"{one.path}: the files are now relative to the TOML: put it there, or write /...")


def _convert_rest(draft: Draft, root: Tree) -> None:
    if (log := root.get("accessLog")) is not None:
        log.take()
        if log.value is None or log.written == "true":
            draft.set(log.where, "access_log", True)
            draft.note(log.where, "accessLog: it goes to stdout, in a format of its own")
    transport = root.get("serversTransport")
    if transport is not None:
        for step, key in (("connect", "dialTimeout"), ("read", "responseHeaderTimeout")):
            timeout = transport.get("forwardingTimeouts", key)
            if timeout is not None and _seconds(timeout) and draft.get("timeouts", step) is None:
                draft.set(timeout.where, "timeouts", _seconds(timeout), key=step)
    for kind in ("middlewares", "serversTransports"):
        # Those that are not used are not missed.
        node = root.get("http", kind)
        for one in node.table.values() if node is not None else ():
            if not one.used:
                one.take()


# --- values


def _seconds(node: Tree) -> float:
    """Go's durations, 1m30s, or seconds."""
    text = str(node.value)
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        return _plain(float(text))
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+", text):
        raise ConfigError(node.where, f"{node.path}: {text!r} is no duration")
    total = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|µs|ms|s|m|h)", text))
    return _plain(round(total, 9))


def _number(node: Tree) -> float:
    try:
        return float(str(node.value))
    except ValueError:
        raise ConfigError(node.where, f"{node.path}: {node.value!r} is no number") from None


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number
