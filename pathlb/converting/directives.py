"""nginx's configuration as crossplane reads it: directives, with their places, and what values they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import crossplane  # type: ignore[import-untyped]

from ..core.errors import ConfigError
from .draft import Draft

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True)
class Directive:
    """One of nginx's, with what is in its braces."""

    name: str
    args: tuple[str, ...]
    where: str
    block: tuple[Directive, ...]

    def __str__(self) -> str:
        return " ".join((self.name, *self.args))

    def all(self, *names: str) -> list[Directive]:
        return [one for one in self.block if one.name in names]

    def arg(self, index: int = 0) -> str:
        """An argument. Raises `ConfigError` when it is missing."""
        if index >= len(self.args):
            raise ConfigError(self.where, f"{self.name} lacks an argument")
        return self.args[index]


Levels = Sequence[Directive]
"""From the outermost block to the innermost one."""


def parse(file: str, draft: Draft) -> Directive:
    """The whole of a file, in a block without a name. Raises `ConfigError` that names file and line."""
    try:
        with open(file, "rb"):
            pass  # crossplane would take it for an include that is missing
        parsed = crossplane.parse(file, check_ctx=False, combine=True)
    except OSError as exc:
        raise ConfigError(file, f"cannot be read: {exc.strerror}") from None
    for error in parsed["errors"]:
        where = f"{error['file']}:{error['line']}" if error["line"] else error["file"]
        if error["error"].endswith("mime.types'"):
            continue  # of no use here
        if missing := re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", error["error"]):
            draft.note(where, f"include {missing[2]}: {missing[1]}; what is in there is not converted")
            continue
        raise ConfigError(where, error["error"].removesuffix(f" in {where}"))
    return Directive("", (), file, tuple(_directive(one) for one in parsed["config"][0]["parsed"]))


def _directive(parsed: Any) -> Directive:
    return Directive(
        parsed["directive"],
        tuple(parsed["args"]),
        f"{parsed['file']}:{parsed['line']}",
        tuple(_directive(one) for one in parsed.get("block", ())),
    )


def walk(levels: Levels) -> Iterator[tuple[Directive, Levels]]:
    """All that is below, each with the blocks around it."""
    for one in levels[-1].block:
        yield one, levels
        yield from walk((*levels, one))


def effective(levels: Levels, name: str) -> list[Directive]:
    """Those of the innermost level that has any: they are not added to those around it."""
    return next((found for level in reversed(levels) if (found := level.all(name))), [])


def last(levels: Levels, name: str) -> Directive | None:
    """The one that counts."""
    return next((found[-1] for level in reversed(levels) if (found := level.all(name))), None)


def seconds(one: Directive) -> float:
    """Its argument. Raises `ConfigError`."""
    return time(one, one.arg())


def time(one: Directive, text: str) -> float:
    """nginx's times: 60, 60s, 1m30s, 500ms. Raises `ConfigError`."""
    if not re.fullmatch(r"(?:\d+(?:ms|[smhdw]))*\d*", text) or not text:
        raise ConfigError(one.where, f"{one}: {text!r} is no time")
    total = sum(int(number) * _UNITS[unit or "s"] for number, unit in re.findall(r"(\d+)(ms|[smhdw]|)", text))
    return int(total) if total == int(total) else round(total, 3)


def whole(one: Directive, text: str) -> int:
    """Raises `ConfigError`."""
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(one.where, f"{one}: {text!r} is no whole number")
    return int(text)
