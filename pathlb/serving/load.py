"""Reading a configuration file. Everything that is wrong with it is told at once, each with the file and the line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .checks import Problem
from .config import ServeConfig, check_all
from .lines import line_of


def load(file: str, overrides: Mapping[str, Any] | None = None) -> ServeConfig:
    """The configuration in a TOML file, with what the command line says put in its place.

    Paths in it are relative to the file. Raises `ConfigError`, and `OSError` for a file that cannot be read.
    """
    data = Path(file).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{file}:{line}", "is not UTF-8") from None
    return read(text, file, overrides)


def read(text: str, file: str, overrides: Mapping[str, Any] | None = None) -> ServeConfig:
    """The configuration in this text, which is that of `file`. Raises `ConfigError`."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise _syntax_error(exc, text, file) from None
    except RecursionError:
        raise ConfigError(file, "is nested too deeply") from None
    if "endpoints" in given and overrides and "endpoints" in overrides:
        where = _where(text, file, Problem(("endpoints",), ""))
        raise ConfigError(where, "are given on the command line as well; give them in one place")
    values, problems = check_all({**given, **(overrides or {})})
    if problems:
        # `ConfigError` writes "field: problem": here a line for each.
        first, *more = problems
        rest = "".join(f"\n{_where(text, file, problem)}: {problem.text}" for problem in more)
        raise ConfigError(_where(text, file, first), first.text + rest)
    if values.get("tls") is not None:
        here = Path(file).parent
        values["tls"] = {name: str(here / getattr(values["tls"], name)) for name in ("certificate", "key")}
    return ServeConfig(**values)


def place_of(file: str, *path: str | int) -> str:
    """How to name a setting of a file in a message, with its line as far as that can be told."""
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    return _where(text, file, Problem(path, ""))


def _where(text: str, file: str, problem: Problem) -> str:
    return f"{file}:{line_of(text, problem.path)}: {problem.setting}"


def _syntax_error(error: tomllib.TOMLDecodeError, text: str, file: str) -> ConfigError:
    said = str(error)
    found = re.search(r" \(at line (\d+), column (\d+)\)$", said)
    if found is None:  # "(at end of document)"
        return ConfigError(f"{file}:{max(1, len(text.splitlines()))}", said)
    return ConfigError(f"{file}:{found[1]}", f"{said[: found.start()]} (column {found[2]})")
