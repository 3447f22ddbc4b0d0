"""Codings taken off, or found unreadable; never half of a body."""

from __future__ import annotations

import gzip
import zlib

import pytest
from jsonrpc_helpers import reply

from pathlb.exchange import Headers
from pathlb.jsonrpc import coding
from pathlb.jsonrpc.coding import asking_for_readable, decoded, with_content

TEXT = b'{"a":"' + b"x" * 1000 + b'"}'
BARE = zlib.compressobj(wbits=-zlib.MAX_WBITS)
DEFLATED = BARE.compress(TEXT) + BARE.flush()


def coded(name: bytes, content: bytes) -> bytes:
    return decoded(reply(b"", headers=[(b"content-encoding", name)]), content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"gzip", gzip.compress(TEXT)),
        (b"GZIP ", gzip.compress(TEXT)),
        (b"x-gzip", gzip.compress(TEXT[:7]) + gzip.compress(TEXT[7:])),
        (b"deflate", zlib.compress(TEXT)),
        (b"deflate", DEFLATED),
        (b"identity", TEXT),
        (b"", TEXT),
    ],
    ids=[
        "gzip",
        "upper case and a space",
        "several members",
        "deflate",
        "deflate without its frame",
        "identity",
        "nothing",
    ],
)
def test_read(name: bytes, content: bytes) -> None:
    assert coded(name, content) == TEXT


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"br", TEXT),
        (b"zstd", TEXT),
        (b"gzip, gzip", gzip.compress(gzip.compress(TEXT))),
        (b"gzip", TEXT),
        (b"gzip", b""),
        (b"gzip", gzip.compress(TEXT)[:-1]),
        (b"gzip", gzip.compress(TEXT) + b"more"),
        (b"gzip", gzip.compress(TEXT)[:-6] + b"\0" * 6),
        (b"deflate", b""),
        (b"deflate", zlib.compress(TEXT)[:-1]),
        (b"deflate", zlib.compress(TEXT) + b"more"),
    ],
    ids=[
        "br",
        "zstd",
        "two codings",
        "gzip that is none",
        "empty gzip",
        "gzip cut off",
        "gzip and more",
        "gzip with a wrong check",
        "empty deflate",
        "deflate cut off",
        "deflate and more",
    ],
)
def test_unreadable(name: bytes, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        coded(name, content)


def test_codings_of_several_headers_are_unreadable() -> None:
    twice = reply(b"", headers=[(b"Content-Encoding", b"gzip"), (b"Content-Encoding", b"gzip")])
    with pytest.raises(ValueError, match="several"):
        decoded(twice, gzip.compress(gzip.compress(TEXT)))


def test_a_bomb_goes_off_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_MOST", 1000)
    with pytest.raises(ValueError, match="too large"):
        coded(b"gzip", gzip.compress(b"0" * 1_000_000))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], []),
        ([b"gzip, deflate"], [b"gzip, deflate"]),
        ([b"gzip, deflate, br, zstd"], [b"gzip, deflate"]),
        ([b"br;q=1.0, GZIP;q=0.5"], [b"GZIP;q=0.5"]),
        ([b"br"], [b"identity"]),
        ([b"*"], [b"identity"]),
        ([b"br", b"gzip"], [b"gzip"]),
        ([b"identity"], [b"identity"]),
    ],
)
def test_only_what_can_be_read_is_asked_for(asked: list[bytes], expected: list[bytes]) -> None:
    headers: Headers = [(b"Accept", b"*/*"), *[(b"accept-encoding", value) for value in asked]]
    given = headers.copy()
    found = asking_for_readable(headers)
    assert [value for name, value in found if name.lower() == b"accept-encoding"] == expected
    assert found[0] == (b"Accept", b"*/*")
    assert headers == given


def test_headers_of_another_body_are_dropped() -> None:
    old: Headers = [(b"Transfer-Encoding", b"chunked"), (b"ETag", b'"x"'), (b"X-Suppliers-Tried", b"a")]
    new = with_content(reply(b"", headers=[*old, (b"Content-Encoding", b"gzip")], status=500), b"[]")
    assert new.status == 200
    assert new.headers == [
        (b"Content-Type", b"application/json"),
        (b"X-Suppliers-Tried", b"a"),
        (b"Content-Length", b"2"),
    ]
