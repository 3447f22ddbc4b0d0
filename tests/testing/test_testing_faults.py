from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx
import pytest

from pathlb.testing import (
    Close,
    FaultServer,
    Fin,
    HalfClose,
    Hang,
    Read,
    ReadRequest,
    Reset,
    Send,
    SendSlowly,
    WaitFor,
    black_hole,
    http_reply,
    refused_url,
)

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n"
LENGTH = b"POST /c HTTP/1.1\r\ncontent-length: 6\r\n\r\nab\r\ncd"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def test_reads_whole_requests_and_records_them_raw() -> None:
    with (
        FaultServer([[ReadRequest(), ReadRequest(), ReadRequest(), Send(b"done")]]) as server,
        connect(server.port) as sock,
    ):
        # Torn apart and glued together: the boundaries are the server's to find.
        for piece in (GET[:5], GET[5:] + CHUNKED[:-4], CHUNKED[-4:] + LENGTH):
            sock.sendall(piece)
        assert read_all(sock) == b"done"
        assert server.requests == [GET, CHUNKED, LENGTH]
        assert server.connections == 1


def test_an_unfinished_request_is_not_recorded() -> None:
    with FaultServer([[ReadRequest(), Send(b"never")]]) as server:
        for part in (GET[:-2], CHUNKED[:-2], LENGTH[:-1]):
            with connect(server.port) as sock:
                sock.sendall(part)
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b""
        assert server.requests == []


def test_serves_a_real_client_and_keeps_the_connection() -> None:
    script = [ReadRequest(), Send(http_reply(headers=[(b"X-A", b"1")])), ReadRequest(), Send(http_reply(404, b"no"))]
    with FaultServer([script]) as server, httpx.Client(trust_env=False) as client:
        first = client.post(f"{server.url}/x", content=iter([b"a", b"b"]))
        assert (first.status_code, first.text, first.headers["x-a"]) == (200, "ok", "1")
        assert client.get(server.url).status_code == 404
        assert server.connections == 1
        assert server.requests[0].endswith(b"\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n")


def test_each_connection_has_its_script_and_the_last_one_goes_on() -> None:
    with FaultServer([[Send(b"first")], [Send(b"other")]]) as server:
        replies = []
        for _ in range(3):
            with connect(server.port) as sock:
                replies.append(read_all(sock))
        assert replies == [b"first", b"other", b"other"]


def test_scripts_may_be_a_function_of_the_index() -> None:
    with FaultServer(lambda index: [Send(b"%d" % index)]) as server:
        for index in range(3):
            with connect(server.port) as sock:
                assert read_all(sock) == b"%d" % index
        assert server.connections == 3


def test_reset_is_a_reset() -> None:
    with FaultServer([[ReadRequest(), Reset()]]) as server, connect(server.port) as sock:
        sock.sendall(GET)
        with pytest.raises(ConnectionResetError):
            read_all(sock)


def test_close_is_a_clean_end() -> None:
    with FaultServer([[Send(b"x"), Close(), Send(b"y")]]) as server, connect(server.port) as sock:
        assert read_all(sock) == b"x"


def test_fin_stays_clean_whatever_the_client_sends() -> None:
    with FaultServer([[Read(), Fin()]]) as server, connect(server.port) as sock:
        sock.sendall(GET)
        assert sock.recv(1) == b""
        # Bytes that nobody reads would be answered with a RST, and the second of these sends would fail.
        sock.sendall(b"a" * 1_000_000)
        sock.sendall(b"b" * 1_000_000)
        assert sock.recv(1) == b""


def test_half_close_still_reads() -> None:
    with FaultServer([[HalfClose(), ReadRequest(), Hang()]]) as server, connect(server.port) as sock:
        assert sock.recv(1) == b""
        sock.sendall(GET)
        server.wait_for_requests(1)
        assert server.requests == [GET]


def test_sends_slowly_byte_by_byte() -> None:
    with FaultServer([[SendSlowly(b"abc", gap=0.001)]]) as server, connect(server.port) as sock:
        assert read_all(sock) == b"abc"


def test_a_slow_send_does_not_delay_the_end() -> None:
    with FaultServer([[SendSlowly(b"abc", gap=3600)]]) as server, connect(server.port) as sock:
        assert sock.recv(10) == b"a"


def test_hang_lasts_until_released() -> None:
    with FaultServer([[ReadRequest(), Hang(), Send(b"x")]]) as server, connect(server.port) as sock:
        sock.sendall(GET)
        server.wait_for_requests(1)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(20)
        server.release()
        assert read_all(sock) == b"x"


def test_events_sequence_a_script() -> None:
    script = [WaitFor("a"), Send(b"1"), WaitFor("b"), Send(b"2")]
    with FaultServer([script]) as server, connect(server.port) as sock:
        server.set("a")
        assert sock.recv(10) == b"1"
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(20)
        server.set("b")
        assert read_all(sock) == b"2"
    with FaultServer([[WaitFor("a")]]) as server:
        server.set("b")
        with connect(server.port) as sock:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)


@pytest.mark.parametrize("step", [Hang(), WaitFor("never"), ReadRequest(), Read(), Fin()])
def test_stopping_ends_every_script(step: Hang | WaitFor | ReadRequest | Read | Fin) -> None:
    with FaultServer([[Send(b"!"), step]]) as server:
        sock = connect(server.port)
        assert sock.recv(1) == b"!"
    with sock:
        assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(server.port)


def test_waiting_for_requests_gives_up() -> None:
    with FaultServer([[Hang()]]) as server, pytest.raises(TimeoutError, match="0 of 1"):
        server.wait_for_requests(1, timeout=0)


def test_needs_a_script() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FaultServer([])


def test_http_reply_leaves_the_framing_to_headers_that_have_it() -> None:
    assert http_reply() == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    assert http_reply(599, b"") == b"HTTP/1.1 599 \r\nContent-Length: 0\r\n\r\n"
    lying = http_reply(body=b"ok", headers=[(b"content-length", b"9")])
    assert lying == b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok"
    assert b"Content-Length" not in http_reply(body=b"0\r\n\r\n", headers=[(b"Transfer-Encoding", b"chunked")])


def test_refused_url_refuses() -> None:
    with refused_url() as url, refused_url() as other:
        assert url != other
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                connect(urlsplit(url).port or 0)


def test_black_hole_neither_accepts_nor_refuses() -> None:
    with black_hole() as url, pytest.raises(httpx.ConnectTimeout):
        httpx.get(url, timeout=httpx.Timeout(None, connect=0.2), trust_env=False)
