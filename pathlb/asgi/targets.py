"""Request targets: what of a path is for the gateways, its bytes untouched."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from ..core.errors import ConfigError
from .headers import BadRequest
from .types import Scope

_PATH_SAFE = "/!$&'()*+,;=:@-._~"
_TARGET = re.compile(rb"[\x21-\x7e]+").fullmatch
# Some servers decode before they resolve the dots (nginx does), and some take a backslash for a slash.
_SLASH_TO_SOME = re.compile(rb"(?i)%2f|%5c|\\")
_DOTS = re.compile(rb"(?i)(?:/|%2f|%5c|\\)(?:\.|%2e){2}(?:/|%2f|%5c|\\|\Z)").search
_DOT = re.compile(rb"(?i)%2e")
_SLASH = ord("/")
_KEPT = 1_000
_LONGEST_KEPT = 200


class Prefix:
    """Whole segments at the beginning of a path, found however it is percent-encoded."""

    def __init__(self, path: str) -> None:
        """`path` as in a URL."""
        self.plain = path.rstrip("/").encode("ascii")
        self._decoded = unquote_to_bytes(self.plain)

    def end(self, target: bytes) -> int:
        """Where the rest of the target begins; -1 when it does not begin with this prefix."""
        end = len(self.plain)
        if not target.startswith(self.plain):
            end = self._end_encoded(target) if b"%" in target else -1
        return end if end >= 0 and target[end : end + 1] in (b"", b"/", b"?") else -1

    def _end_encoded(self, target: bytes) -> int:
        at = 0
        for byte in self._decoded:
            if target[at : at + 1] != b"%":
                if target[at : at + 1] != bytes((byte,)):
                    return -1
                at += 1
            elif byte != _SLASH and target[at + 1 : at + 3].lower() == b"%02x" % byte:
                at += 3  # an encoded slash separates nothing
            else:
                return -1
        return at


class Targets:
    """The targets of one app. `rewrite` is a prefix, and what to put in its place. Raises `ConfigError`."""

    def __init__(self, rewrite: tuple[str, str] | None) -> None:
        self._rewrite: tuple[Prefix, bytes] | None = None
        if rewrite is not None:
            if not isinstance(rewrite, tuple) or len(rewrite) != 2:
                raise ConfigError("Gateway.rewrite", f"must be (prefix, replacement), not {rewrite!r}")
            for part in rewrite:
                check_path("Gateway.rewrite", part)
            self._rewrite = Prefix(rewrite[0]), rewrite[1].rstrip("/").encode("ascii")
        # A gateway sees few paths (one, of JSON-RPC) and mounts again and again.
        self._paths: dict[tuple[bytes, str], bytes] = {}
        self._mounts: dict[str, Prefix] = {}

    def of(self, scope: Scope) -> bytes:
        """Path and query as they came, less the prefix the app is mounted at, and rewritten. Raises `BadRequest`."""
        raw: bytes = scope.get("raw_path") or quote(scope["path"], safe=_PATH_SAFE).encode("ascii")
        mount: str = scope.get("root_path", "")
        path = self._paths.get((raw, mount))
        if path is None:
            path = self._path(raw, mount)
            if len(raw) + len(mount) <= _LONGEST_KEPT:
                _make_room(self._paths)
                self._paths[raw, mount] = path
        query: bytes = scope.get("query_string", b"")
        return path + b"?" + _check(query) if query else path

    def _path(self, raw: bytes, mount: str) -> bytes:
        path = _check(raw.partition(b"?")[0])  # some servers leave the query on it
        if not path.startswith(b"/"):
            # Absolute form, most likely: the host is not the caller's to choose.
            raise BadRequest("the request target must be a path")
        if mount:
            path = strip(self._mount(mount), path)
        check_inside(path)
        if self._rewrite is not None:
            prefix, replacement = self._rewrite
            end = prefix.end(path)
            if end >= 0:
                check_inside(path[end:])
                path = replacement + path[end:] or b"/"
        return path

    def _mount(self, path: str) -> Prefix:
        mount = self._mounts.get(path)
        if mount is None:
            mount = Prefix(quote(path, safe=_PATH_SAFE))
            if len(path) <= _LONGEST_KEPT:
                _make_room(self._mounts)
                self._mounts[path] = mount
        return mount


def strip(prefix: Prefix, target: bytes) -> bytes:
    """The target without a prefix, if it has it."""
    end = prefix.end(target)
    if end <= 0:
        return target
    rest = target[end:]
    return rest if rest.startswith(b"/") else b"/" + rest


def check_inside(target: bytes) -> None:
    """A path that climbs out of where it begins would lead the gateways behind what was taken off, or put, in front.

    Raises `BadRequest`.
    """
    path = target.partition(b"?")[0]
    if not _DOTS(path):
        return
    depth = 0
    for segment in _DOT.sub(b".", path).split(b"/"):
        # What separates for some only climbs for those, and descends for none: the server may be either.
        parts = _SLASH_TO_SOME.split(segment)
        depth -= parts.count(b"..")
        if depth < 0:
            raise BadRequest("the path leads out of its root")
        if any(part not in (b"..", b".", b"") for part in parts):  # some servers take // for /
            depth += 1


def check_path(name: str, path: object) -> None:
    """Raise `ConfigError` for what cannot begin a path."""
    if not isinstance(path, str) or not path.startswith("/") or not _TARGET(path.encode("utf-8", "replace")):
        raise ConfigError(name, f"{path!r} is not the beginning of a path: it begins with / and is percent-encoded")
    if "?" in path or "#" in path:
        raise ConfigError(name, f"{path!r} is more than a path")


def _check(part: bytes) -> bytes:
    if not _TARGET(part):
        raise BadRequest("the request target contains what must be percent-encoded")
    if b"#" in part:
        raise BadRequest("the request target has a fragment")
    return part


def _make_room(known: dict[Any, Any]) -> None:
    if len(known) >= _KEPT:
        known.clear()
