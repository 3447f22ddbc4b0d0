"""What a conversion has come to so far, and the TOML of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..serving.build import make_balancer, make_gateway
from ..serving.config import SETTINGS, ServeConfig
from ..serving.load import read
from ..serving.render import render

NOTHING = "`pathlb serve` has nothing like it: do it before or behind it, or do without"
"""What to say of what there is nothing more to say of."""


class Note(NamedTuple):
    """Something that could not be carried over, or not quite, and what to do about it."""

    where: str
    text: str

    def __str__(self) -> str:
        # Both go into a comment of TOML, which takes no control characters.
        return "".join(ch if ch.isprintable() else "?" for ch in f"{self.where}: {self.text}")


def _in_order(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (where, 0)


class Draft:
    """Settings of `pathlb serve`, where each comes from, and notes. `source` says what of `file` is converted."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.source = file
        self._notes: list[Note] = []
        self._endpoints: dict[str, Endpoint] = {}
        self._settings: dict[str, Any] = {}
        self._places: dict[str, str] = {}

    @property
    def notes(self) -> list[Note]:
        """In the order of the places."""
        return sorted(self._notes, key=lambda note: _in_order(note.where))

    @property
    def endpoints(self) -> list[Endpoint]:
        return list(self._endpoints.values())

    def note(self, where: str, text: str) -> None:
        note = Note(where, text)
        if note not in self._notes:
            self._notes.append(note)

    def add(self, where: str, url: str, weight: float = 1, server_hostname: str | None = None) -> None:
        """Another endpoint. Raises `ConfigError` that names the place, for what cannot be one."""
        try:
            endpoint = Endpoint(url, weight=weight, server_hostname=server_hostname)
        except ConfigError as exc:
            raise ConfigError(where, exc.problem) from None
        before = self._endpoints.get(endpoint.url)
        if before is not None:
            # There each of them has a share.
            endpoint = Endpoint(url, weight=before.weight + weight, server_hostname=server_hostname)
        self._endpoints[endpoint.url] = endpoint

    def set(self, where: str, name: str, value: Any, *, key: str | None = None) -> None:
        """A setting; with `key` one in the table `name`. Raises `ConfigError` that names the place."""
        if key is not None:
            value = {**self._settings.get(name, {}), key: value}
        self._settings[name] = value
        self._places[name if key is None else f"{name}.{key}"] = where

    def get(self, name: str, key: str | None = None) -> Any:
        """A setting as it is so far; None for none."""
        value = self._settings.get(name)
        if key is None or value is None:
            return value
        return value.get(key)

    def place(self, name: str) -> str:
        """Where a setting comes from; `timeouts.read` for one in a table."""
        return self._places.get(name, self.file)

    def finish(self) -> ServeConfig:
        """The configuration. Raises `ConfigError` that names the place of what `pathlb serve` cannot take."""
        if not self._endpoints:
            raise ConfigError(self.file, "no server is left to convert")
        # In the order of the documentation, whatever that of the source.
        settings = {name: self._settings[name] for name in SETTINGS if name in self._settings}
        try:
            config = ServeConfig(endpoints=tuple(self._endpoints.values()), **settings)
            make_gateway(config, make_balancer(config), "pathlb-convert")
        except ConfigError as exc:
            raise ConfigError(self._place(exc.field), exc.problem) from None
        return config

    def render(self) -> str:
        """The TOML, with the notes in comments at the top. Raises `ConfigError`."""
        config = self.finish()
        comments = [f"Made by pathlb convert from {self.source}.".replace("\n", "?")]
        if self.notes:
            comments += ["", "Not carried over, or not quite:", *(f"- {note}" for note in self.notes)]
        text = render(config, comments=comments)
        read(text, "the result")  # what does not load must not be written
        return text

    def _place(self, field: str) -> str:
        """The place of a setting, as far as it is known, with its name."""
        field = field.removeprefix("Gateway.").removeprefix("set_").replace("['", ".").replace("']", "")
        head = field.partition(".")[0]
        for name in (field, head, *(known for known in self._places if known.partition(".")[0] == head)):
            if name in self._places:
                return f"{self._places[name]}: {field}"
        return f"{self.file}: {field}"


def pick(where: str, kind: str, there: Mapping[str, str], wanted: str | None) -> str:
    """The one to convert; `there` says where each is. Raises `ConfigError` that lists them."""
    listed = ", ".join(f"{name} ({place})" for name, place in there.items())
    if not there:
        raise ConfigError(where, f"has no {kind}")
    if wanted is None:
        if len(there) > 1:
            raise ConfigError(where, f"has several: choose with --upstream NAME: {listed}")
        return next(iter(there))
    if wanted not in there:
        raise ConfigError(where, f"has no {kind} {wanted!r}; there is {listed}")
    return wanted
