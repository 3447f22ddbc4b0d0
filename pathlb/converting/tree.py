"""YAML, and the labels of a compose file, as one tree that knows its lines, and what of it has been looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import ConfigError

_MOST = 100_000  # nodes: aliases can make a small file a large tree


class Tree:
    """One node: a table, a list or a value. Traefik takes its keys in any case."""

    def __init__(self, where: str, path: str = "", value: Any = None, *, name: str | None = None) -> None:
        self.where = where
        self.name = path.rpartition(".")[2] if name is None else name
        self.path = path
        self.value = value
        self.used = False
        self.table: dict[str, Tree] = {}
        self.list: list[Tree] = []

    def get(self, *names: str) -> Tree | None:
        """What is below; it counts as looked at."""
        node: Tree = self
        for name in names:
            below = node.table.get(name.lower())
            if below is None:
                return None
            below.used = True
            node = below
        return node

    def items(self, *names: str) -> list[Tree]:
        """A list below, or a value as a list of one, or of several in a string, as labels have them."""
        node = self.get(*names)
        if node is None:
            return []
        if isinstance(node.value, str):
            return [Tree(node.where, node.path, one.strip()) for one in node.value.split(",")]
        for below in node.list:
            below.used = True
        return [node] if node.value is not None else node.list

    def tables(self, *names: str) -> list[Tree]:
        """The tables in a table; each counts as looked at."""
        node = self.get(*names)
        if node is None:
            return []
        for below in node.table.values():
            below.used = True
        return list(node.table.values())

    def text(self, *names: str) -> str | None:
        node = self.get(*names)
        if node is None or (node.value is None and not node.below()):
            return None
        if node.value is None:
            raise ConfigError(node.where, f"{node.path} must be a value")
        return node.written

    @property
    def written(self) -> str:
        """The value as it is in the file; empty where there is none."""
        if isinstance(self.value, bool):
            return "true" if self.value else "false"
        return "" if self.value is None else str(self.value)

    def take(self) -> None:
        """All of it counts as looked at."""
        self.used = True
        for below in self.below():
            below.take()

    def below(self) -> list[Tree]:
        return [*self.table.values(), *self.list]

    def left(self) -> Iterator[Tree]:
        """What has not been looked at, the outermost of it."""
        for below in self.below():
            if below.used:
                yield from below.left()
            else:
                yield below

    def put(self, dotted: str, where: str, value: Any) -> None:
        """A label: `http.routers.x.rule`, `...servers[0].url`."""
        node = self
        for name in re.sub(r"\[(\d+)\]", r".\1", dotted).split("."):
            if name.isdigit() and node.name.lower() in ("servers", "certificates"):
                while len(node.list) <= int(name) < 1_000:
                    node.list.append(Tree(where, f"{node.path}[{len(node.list)}]"))
                if int(name) >= len(node.list):
                    raise ConfigError(where, f"{dotted}: there cannot be so many")
                node = node.list[int(name)]
                continue
            path = f"{node.path}.{name}".removeprefix(".")
            node = node.table.setdefault(name.lower(), Tree(where, path, name=name))
        node.value, node.where = value, where


def read_yaml(file: str) -> Tree:
    """The whole file. Raises `ConfigError` that names the line."""
    try:
        data = Path(file).read_bytes()
    except OSError as exc:
        raise ConfigError(file, f"cannot be read: {exc.strerror}") from None
    try:
        loader = yaml.SafeLoader(data)
        try:
            node = loader.get_single_node()
            tree = Tree(f"{file}:1") if node is None else _Builder(file, loader).build(node, f"{file}:1", "")
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = file if mark is None else f"{file}:{mark.line + 1}"
        raise ConfigError(where, exc.problem or exc.context or "is no YAML") from None
    except yaml.reader.ReaderError as exc:
        line = data[: exc.position].count(b"\n") + 1 if isinstance(exc.position, int) else 1
        raise ConfigError(f"{file}:{line}", f"is no YAML: {exc.reason}") from None
    except RecursionError:
        raise ConfigError(file, "is nested too deeply") from None
    if tree.value is not None or tree.list:
        raise ConfigError(f"{file}:1", "must be a table")
    return tree


class _Builder:
    def __init__(self, file: str, loader: yaml.SafeLoader) -> None:
        self._file = file
        self._loader = loader
        self._count = 0
        self._within: list[yaml.Node] = []

    def build(self, node: yaml.Node, where: str, path: str) -> Tree:
        self._count += 1
        if self._count > _MOST or any(node is around for around in self._within):
            raise ConfigError(where, f"{path}: its aliases make it too large")
        tree = Tree(where, path)
        self._within.append(node)
        if isinstance(node, yaml.MappingNode):
            self._loader.flatten_mapping(node)
            for key, value in node.value:
                name = str(key.value)
                below = f"{path}.{name}".removeprefix(".")
                tree.table[name.lower()] = one = self.build(value, self._where(key), below)
                one.name = name
        elif isinstance(node, yaml.SequenceNode):
            for index, one in enumerate(node.value):
                tree.list.append(self.build(one, self._where(one), f"{path}[{index}]"))
        else:
            try:
                tree.value = self._loader.construct_object(node)
            except ValueError:  # 2026-13-45 looks like a date
                tree.value = node.value
        self._within.pop()
        return tree

    def _where(self, node: yaml.Node) -> str:
        return f"{self._file}:{node.start_mark.line + 1}"
