"""Prefixes of paths, and paths that climb."""

from __future__ import annotations

import pytest

from pathlb.asgi.headers import BadRequest
from pathlb.asgi.targets import Prefix, check_inside


@pytest.mark.parametrize(
    ("prefix", "target", "rest"),
    [
        ("/", b"/a", b"/a"),
        ("/a", b"/a", b""),
        ("/a", b"/a/", b"/"),
        ("/a", b"/a?b", b"?b"),
        ("/a/", b"/a/b", b"/b"),
        ("/a", b"/ab", None),
        ("/a", b"/b", None),
        ("/a", b"/", None),
        ("/a/b", b"/a", None),
        ("/a/b", b"/a/%62", b""),
        ("/a/b", b"/%61/%62/%63", b"/%63"),
        ("/a/b", b"/a%2Fb", None),
        ("/a/b", b"%2Fa/b", None),
        ("/a", b"/%6", None),
        ("/a", b"/%", None),
        ("/a", b"/%zz", None),
        ("/a", b"/%+1", None),
        ("/j", b"/%6A", b""),
        ("/j", b"/%6a/x", b"/x"),
        ("/%6a", b"/j", None),  # plain where the prefix is not: the other way round is what callers do
        ("/%6a", b"/j/%78", b"/%78"),
        ("/a%20b", b"/a%20b/c", b"/c"),
        ("/a%25b", b"/a%25b/c", b"/c"),
        ("/a%25b", b"/a%b", None),
        ("/%c3%a9", b"/%C3%A9/x", b"/x"),
    ],
)
def test_prefixes(prefix: str, target: bytes, rest: bytes | None) -> None:
    end = Prefix(prefix).end(target)
    assert (target[end:] if end >= 0 else None) == rest


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"/a/..",
        b"/a/../b",
        b"/a/b/../../c",
        b"/...",
        b"/..a",
        b"/a..",
        b"/a?/../..",
        b"/%2e",
        b"/.%2ea",
        b"/a%2Fb",
        b"/a/..%2fb",
        b"/a/b%5c..",
        b"/a?/..%2f..",
        b"/..%252fa",
    ],
)
def test_paths_that_stay_inside(path: bytes) -> None:
    check_inside(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/..",
        b"/../",
        b"/../a",
        b"/./..",
        b"//..",
        b"/a/../..",
        b"/%2e%2e",
        b"/%2E.",
        b"/.%2e/a",
        b"/a/%2e%2e/%2e%2e",
        b"/..?a",
        b"/..%2fa",
        b"/..%2Fa",
        b"/..%5Ca",
        b"/..\\a",
        b"/%2e%2e%2fa",
        b"/a/..%2f..%2fb",
        b"/a/..%5c../b",
        b"/a%2f../..",
        b"/a%2fb/../..",  # one segment to some
        b"/a%5cb/..%2f..",  # nginx decodes both, and only one of them is a slash to it
        b"/%2f..",
    ],
)
def test_paths_that_climb_out(path: bytes) -> None:
    with pytest.raises(BadRequest, match="root"):
        check_inside(path)
