"""Random replies, whole and mutated: no crash, no hang, no wrong body, no reuse of a connection in doubt.

h11 is the referee of mutated ones. It may be wrong, and so may the pool; where both are, in the same way, is unlikely.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import h11
import pytest
import uvloop
from http1_kit import End, Observed, ReplayServer, Result, Script, cut, observe, quiet
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from pathlb.core.model import Endpoint
from pathlb.upstream.http1 import Http1Upstream

T = TypeVar("T")

pytestmark = pytest.mark.timeout(240)  # a failure is made smaller before it is shown

FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


class Bench:
    """One event loop and one server for all examples; a client of its own for each."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._runner = asyncio.Runner(loop_factory=new_loop)
        self._server = ReplayServer()
        self._run(self._server.__aenter__())

    def close(self) -> None:
        self._run(self._server.__aexit__())
        self._runner.close()

    def play(self, *scripts: tuple[str, Script]) -> list[Observed]:
        """What a new client makes of these replies to requests with these methods, one after the other."""
        return self._run(self._play(scripts))

    async def _play(self, scripts: tuple[tuple[str, Script], ...]) -> list[Observed]:
        async with quiet():
            upstream = Http1Upstream(Endpoint(self._server.url))
            try:
                return [await observe(upstream, self._server, method, script) for method, script in scripts]
            finally:
                await upstream.aclose()
                await self._server.deserted()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)


@pytest.fixture(scope="module", params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


# --- the model


@dataclass(frozen=True)
class Wire:
    """A valid reply: its bytes, and what a client must make of them."""

    method: str
    raw: bytes
    end: End
    result: Result
    reusable: bool


TOKENS = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=12).map(str.encode)
VISIBLE = bytes(range(33, 127)) + bytes(range(128, 256))
WORDS = st.lists(st.sampled_from(VISIBLE), max_size=10).map(bytes)
VALUES = st.lists(WORDS, max_size=3).map(b" ".join).map(bytes.strip)
PADDING = st.sampled_from([b"", b" ", b" ", b"  ", b"\t", b" \t "])
FIELDS = st.lists(st.tuples(TOKENS.map(lambda name: b"x-" + name), VALUES), max_size=4)
INFORMATIONAL = st.lists(st.tuples(st.sampled_from([100, 102, 103, 150]), FIELDS), max_size=3)
BODIES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\r\n", b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"x" * 70_000]),
)


@st.composite
def heads(draw: st.DrawFn, line: bytes, fields: list[tuple[bytes, bytes]]) -> bytes:
    lines = [b"%b:%b%b%b" % (name, draw(PADDING), value, draw(PADDING)) for name, value in fields]
    # The pool takes no tab after `chunked`: llhttp would not see the chunks.
    lines = [line.rstrip() if line.startswith(b"Transfer-Encoding") else line for line in lines]
    return b"".join(part + b"\r\n" for part in (line, *lines, b""))


@st.composite
def chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """The body in chunks of random sizes, with extensions and trailers."""
    raw = b""
    while body:
        size = draw(st.integers(1, len(body)))
        digits = draw(st.sampled_from([b"%x", b"%X", b"0%x", b"%06x"])) % size
        extension = draw(st.sampled_from([b"", b"", b";a", b";a=b", b';a="b c"', b";a=1;b=2"]))
        raw += b"%b%b\r\n%b\r\n" % (digits, extension, body[:size])
        body = body[size:]
    trailers = draw(FIELDS)
    return raw + draw(st.sampled_from([b"0", b"000", b"0;end"])) + b"\r\n" + draw(heads(b"", trailers))[2:]


@st.composite
def replies(draw: st.DrawFn, *, plain: bool = False) -> Wire:
    """A valid reply; a plain one has few fields of no meaning, and no informational ones before it."""
    method = draw(st.sampled_from(["GET", "GET", "POST", "HEAD"]))
    status = draw(st.one_of(st.sampled_from([200, 204, 304, 404, 503]), st.integers(200, 599)))
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]))
    reason = draw(VALUES)
    fields = draw(FIELDS)[: 1 if plain else None]
    body = draw(st.binary(max_size=10) if plain else BODIES)
    connection = draw(
        st.sampled_from([b"", b"", b"keep-alive", b"Keep-Alive, x-a", b"close", b"x-a, close"][: 4 if plain else 6])
    )
    if connection:
        fields.insert(draw(st.integers(0, len(fields))), (b"Connection", connection))
    framings = ["length", "none"] if version == b"HTTP/1.0" else ["length", "length", "chunked", "chunked", "none"]
    framing = draw(st.sampled_from(framings))
    bodiless = method == "HEAD" or status in (204, 304)
    if framing == "length" and status != 204:
        fields.insert(draw(st.integers(0, len(fields))), (b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked" and not bodiless:
        fields.insert(draw(st.integers(0, len(fields))), (b"Transfer-Encoding", b"chunked"))
    before = [] if plain else draw(INFORMATIONAL)
    raw = b"".join(draw(heads(b"HTTP/1.1 %d Wait" % code, informational)) for code, informational in before)
    raw += draw(heads(b"%b %d %b" % (version, status, reason), fields))
    if bodiless:
        body = b""
    else:
        raw += draw(chunks(body)) if framing == "chunked" else body
    until_close = framing == "none" and not bodiless
    lasting = b"close" not in connection and (version == b"HTTP/1.1" or b"eep-" in connection)
    end = End.FIN if until_close else draw(st.sampled_from([End.OPEN, End.OPEN, End.FIN]))
    result = Result("", status, reason, version, tuple(fields), body)
    return Wire(method, raw, end, result, lasting and end is End.OPEN)


@st.composite
def pieces(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    """The bytes as the network may deliver them."""
    if len(raw) < 2:
        return [raw]
    if len(raw) < 150 and draw(st.integers(0, 9)) == 9:
        return cut(raw, *range(1, len(raw)))
    return cut(raw, *sorted(draw(st.sets(st.integers(1, len(raw) - 1), max_size=6))))


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[Wire, Script]]:
    wires = draw(st.lists(replies(), min_size=1, max_size=3))
    return [(wire, Script(draw(pieces(wire.raw)), wire.end)) for wire in wires]


@FUZZ
@given(conversation=conversations())
def test_valid_replies_arrive_as_they_were_meant(bench: Bench, conversation: list[tuple[Wire, Script]]) -> None:
    observed = bench.play(*((wire.method, script) for wire, script in conversation))
    for (wire, _), one in zip(conversation, observed, strict=True):
        assert one == Observed(wire.result, False, "reused" if wire.reusable else "fresh")


# --- mutations

LINE_ENDS = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\r\n "]
BYTES = [b"\0", b" ", b"\t", b":", b";", b",", b"0", b"1", b"f", b"\xff"]
WHOLE = [b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"]
INSERTS = st.sampled_from([*LINE_ENDS, *BYTES, *WHOLE])
LENGTHS = [
    b"Content-Length: 0",
    b"Content-Length: 1",
    b"content-length: 40",
    b"Content-Length : 2",
    b" Content-Length: 3",
]
CODINGS = [b"chunked", b"CHUNKED", b"gzip", b"identity", b"chunked, gzip", b"chunked\t"]
OTHERS = [b"Connection: close", b"Connection: keep-alive", b"Upgrade: x", b"Transfer-Encoding : chunked", b"0", b""]
LINES = st.sampled_from([*LENGTHS, *(b"Transfer-Encoding: " + coding for coding in CODINGS), *OTHERS])
PLAIN = replies(plain=True)


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, Script]:
    """A reply that was damaged on its way, or whose server is broken or malicious."""
    wire = draw(PLAIN)
    raw = wire.raw
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.one_of(st.integers(0, len(raw)), st.integers(len(raw) * 3 // 4, len(raw))))
        how = draw(
            st.sampled_from(
                ["flip", "delete", "repeat", "truncate", "insert", "append", "line", "line", "line", "splice"]
            )
        )
        if how == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << draw(st.integers(0, 7))]) + raw[at + 1 :]
        elif how == "delete":
            raw = raw[:at] + raw[at + draw(st.integers(1, 8)) :]
        elif how == "repeat":
            raw = raw[: at + draw(st.integers(1, 40))] + raw[at:]
        elif how == "truncate":
            raw = raw[:at]
        elif how == "insert":
            raw = raw[:at] + draw(INSERTS) + raw[at:]
        elif how == "append":
            raw += draw(INSERTS)
        elif how == "line":
            lines = raw.split(b"\r\n")
            lines.insert(draw(st.integers(1, len(lines))), draw(LINES))
            raw = b"\r\n".join(lines)
        elif how == "splice":
            other = draw(PLAIN).raw
            raw = raw[:at] + other[draw(st.integers(0, len(other))) :]
    return wire.method, Script(draw(pieces(raw)), draw(st.sampled_from([End.OPEN] * 5 + [End.FIN])))


@dataclass(frozen=True)
class Verdict:
    """What h11 makes of the bytes, and of the end of the stream behind them if it comes to that."""

    whole: bool
    reusable: bool
    status: int = 0
    body: bytes = b""


def surplus(client: h11.Connection) -> bytes:
    """What came behind the reply. Line ends do not count: llhttp skips them, as before a head."""
    return client.trailing_data[0].strip(b"\r\n")


def judge(method: str, raw: bytes) -> Verdict:
    """The first reply that is not informational. llhttp skips line ends before each head, h11 does not."""
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=200_000)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw.lstrip(b"\r\n"))
    head, body, ended = None, b"", False
    try:
        while True:
            got = client.next_event()
            if isinstance(got, h11.Response):
                head = got
            elif isinstance(got, h11.Data):
                body += got.data
            elif isinstance(got, h11.EndOfMessage):
                assert head is not None
                return Verdict(True, lasts(head) and not ended and not surplus(client), head.status_code, body)
            elif got is h11.NEED_DATA and not ended:
                client.receive_data(b"")
                ended = True
            elif isinstance(got, h11.InformationalResponse):
                return judge(method, client.trailing_data[0])
            else:
                return Verdict(False, False)
    except h11.RemoteProtocolError:
        return Verdict(False, False)


def lasts(head: h11.Response) -> bool:
    """RFC 9112 9.3, and 6.1 for HTTP/1.0; h11 itself reuses nothing of HTTP/1.0."""
    told = [
        token.strip().lower() for name, value in head.headers if name == b"connection" for token in value.split(b",")
    ]
    if head.http_version == b"1.0" and (b"keep-alive" not in told or b"transfer-encoding" in dict(head.headers)):
        return False
    return b"close" not in told


@settings(FUZZ, max_examples=600)
@given(mutant=mutants())
def test_mutated_replies_end_and_mislead_nobody(bench: Bench, mutant: tuple[str, Script]) -> None:
    method, script = mutant
    [observed] = bench.play(mutant)
    result, verdict = observed.result, judge(method, b"".join(script.pieces))
    event(f"{result.failed or 'complete'}, h11: {'complete' if verdict.whole else 'broken'}, {observed.then}")
    assert observed.then in ("reused", "fresh")
    if observed.then == "reused":
        assert verdict.reusable
    if not result.failed:
        assert (result.status, result.body) == (verdict.status, verdict.body)
        assert verdict.whole
