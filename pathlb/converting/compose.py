"""A compose file: what its labels, and the arguments of Traefik itself, say, as one tree."""

from __future__ import annotations

import re

from ..core.errors import ConfigError
from .draft import Draft
from .tree import Tree


def read_compose(draft: Draft, compose: Tree) -> Tree:
    """What the files would have in them. Raises `ConfigError`."""
    root = Tree(compose.where)
    for service in compose.tables("services"):
        image = service.text("image") or ""
        if re.search(r"(?:^|/)traefik(?::|@|$)", image):
            for one in [*service.items("command"), *service.items("entrypoint")]:
                for word in str(one.value).split():
                    key, _, value = word.partition("=")
                    if key.startswith("--"):
                        root.put(key.removeprefix("--"), one.where, value or "true")
        labels = [*_labels(service.get("labels")), *_labels(service.get("deploy", "labels"))]
        own = Tree(service.where)
        urls: dict[str, list[tuple[str, str]]] = {}
        for key, value, where in labels:
            if not key.lower().startswith("traefik.") or key.lower() in ("traefik.enable", "traefik.docker.network"):
                continue
            dotted = key.partition(".")[2]
            if found := re.fullmatch(r"(?i)http\.services\.([^.]+)\.loadbalancer\.server\.url", dotted):
                urls.setdefault(found[1], []).append((value, where))
            else:
                own.put(dotted, where, value)
        _add_servers(draft, service, own, urls)
        if len(mine := own.tables("http", "services")) == 1:
            for router in own.tables("http", "routers"):
                if router.get("service") is None:
                    own.put(f"http.routers.{router.name}.service", router.where, mine[0].name)
        _merge(root, own)
    if (docker := root.get("providers", "docker")) is not None:
        docker.take()  # that is what has been read
    return root


def _labels(node: Tree | None) -> list[tuple[str, str, str]]:
    if node is None:
        return []
    if node.table:
        return [(one.name, one.written, one.where) for one in node.table.values()]
    pairs = [(str(one.value).partition("="), one.where) for one in node.list]
    return [(key.strip(), value.strip(), where) for (key, _, value), where in pairs]


def _add_servers(draft: Draft, service: Tree, own: Tree, urls: dict[str, list[tuple[str, str]]]) -> None:
    """The servers that the labels of one compose service stand for, in the list where the files have them."""
    names = {one.name: one for one in own.tables("http", "services")}
    for name, given in urls.items():
        if len(given) > 1:
            draft.note(given[1][1], f"server.url of {name} several times: all are taken, where Traefik takes the last")
        for index, (url, where) in enumerate(given):
            own.put(f"http.services.{name}.loadbalancer.servers[{index}].url", where, url)
    for name, node in names.items():
        if name in urls or node.get("loadBalancer", "servers") is not None or "loadbalancer" not in node.table:
            continue
        port = node.text("loadBalancer", "server", "port") or _exposed(service)
        if port is None:
            raise ConfigError(node.where, f"{name}: no loadbalancer.server.port, and {service.name} exposes none")
        scheme = node.text("loadBalancer", "server", "scheme") or "http"
        where = node.where
        if (said := node.get("loadBalancer", "server", "port")) is not None:
            where = said.where
        own.put(f"http.services.{name}.loadbalancer.servers[0].url", where, f"{scheme}://{service.name}:{port}")
        if (weight := node.get("loadBalancer", "server", "weight")) is not None:
            own.put(f"http.services.{name}.loadbalancer.servers[0].weight", weight.where, weight.value)
        replicas = service.text("deploy", "replicas") or service.text("scale") or "1"
        if replicas != "1":
            text = "is one endpoint: give each a name of its own, and an endpoint"
            draft.note(service.where, f"{service.name}: {replicas} replicas behind one name: it {text}")


def _exposed(service: Tree) -> str | None:
    ports = [str(one.value) for one in service.items("expose")]
    ports += [
        str(one.value).rpartition(":")[2] if one.value is not None else one.text("target") or ""
        for one in service.items("ports")
    ]
    numbers = [int(found[0]) for port in ports if (found := re.match(r"\d+", port))]
    return str(min(numbers)) if numbers else None


def _merge(into: Tree, other: Tree) -> None:
    """Labels of several containers are about the same things; their servers come together."""
    for key, node in other.table.items():
        if key not in into.table:
            into.table[key] = node
            continue
        known = into.table[key]
        known.list += node.list
        known.value = node.value if known.value is None else known.value
        _merge(known, node)
