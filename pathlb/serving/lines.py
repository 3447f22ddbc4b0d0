"""On which line of a TOML file a setting is: the parser does not say, so the lines are looked at."""

from __future__ import annotations

import re

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?").match
_PAIR = re.compile(rf"\s*({_DOTTED})\s*=").match
_PARTS = re.compile(_KEY).findall


def line_of(text: str, path: tuple[str | int, ...]) -> int:
    """The line of a setting, counted from 1; of the nearest one around it where it has none of its own, else 1."""
    lines = _lines(text)
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _lines(text: str) -> dict[tuple[str | int, ...], int]:
    lines: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    for line, content in enumerate(text.splitlines(), 1):
        if header := _HEADER(content):
            table = ()
            for name in _PARTS(header[2]):
                table += (name.strip("\"'"),)
                lines.setdefault(table, line)
                if table in counts and (header[1] == "[" or len(table) < len(_PARTS(header[2]))):
                    table += (counts[table] - 1,)
            if header[1] == "[[":
                counts[table] = counts.get(table, 0) + 1
                table += (counts[table] - 1,)
            lines.setdefault(table, line)
        elif pair := _PAIR(content):
            path = table
            for name in _PARTS(pair[1]):
                path += (name.strip("\"'"),)
                lines.setdefault(path, line)
    return lines
