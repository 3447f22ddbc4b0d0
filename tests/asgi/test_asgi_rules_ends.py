"""Callers that leave, upstreams that answer before they have heard all, and pace, under real servers."""

from __future__ import annotations

import contextlib
import threading

import pytest
from rules_kit import PATIENCE, Caller, Does, Front, Gone, Reads, Upstream, get, post

from pathlb.testing import ReadRequest, Send, WaitFor, http_reply

LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000


def leave(caller: Caller, how: str) -> None:
    if how == "reset":
        caller.reset()
    else:
        caller.sock.close()


@pytest.mark.parametrize("how", ["close", "reset"])
class TestCallerLeaves:
    """What it asked for is cancelled: the connection to the upstream is closed."""

    def test_while_the_upstream_has_not_answered(self, how: str, front: Front) -> None:
        gone = Gone()
        with Upstream(gone) as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(post(b"abc"))
            upstream.wait_for_requests(1)
            leave(caller, how)
            gone.wait()

    def test_in_the_middle_of_a_reply(self, how: str, front: Front) -> None:
        gone = Gone()
        with Upstream(LONG, gone) as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get())
            caller.until(b"x" * 1000)
            leave(caller, how)
            gone.wait()

    def test_in_the_middle_of_its_body(self, how: str, front: Front) -> None:
        reads, gone = Reads(100_000), Gone()
        with Upstream(script=[reads, gone]) as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get(b"/", b"Content-Length: 1000000", method=b"POST") + b"x" * 100_000)
            reads.wait()
            leave(caller, how)
            gone.wait()

    def test_before_its_body_has_come(self, how: str, front: Front) -> None:
        with Upstream() as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get(b"/", b"Content-Length: 10", method=b"POST") + b"x" * 5)
            leave(caller, how)
            assert front.ask(get()).status == 200
            assert len(upstream.requests) == 1


class TestEarlyAnswers:
    """An upstream that answers before it has heard all."""

    @pytest.mark.parametrize("status", [200, 401])
    def test_the_caller_gets_it(self, status: int, front: Front) -> None:
        answered, gone = threading.Event(), Gone()
        early = http_reply(status, b"enough", [(b"Connection", b"close")])
        with (
            Upstream(script=[Reads(100_000), Send(early), Does(answered.set), gone]) as upstream,
            front.call() as caller,
        ):
            front.gateway(upstream)
            caller.send(get(b"/", b"Content-Length: 1000000", method=b"POST") + b"x" * 100_000)
            assert answered.wait(PATIENCE)
            for _ in range(9):
                with contextlib.suppress(ConnectionError):  # the server may not want the rest either
                    caller.send(b"x" * 100_000)
            answer = caller.answer()
            assert (answer.status, answer.body) == (status, b"enough")
            gone.wait()

    def test_a_caller_that_leaves_during_the_reply_to_half_its_body(self, front: Front) -> None:
        answered, gone = threading.Event(), Gone()
        early = LONG.replace(b"200 OK", b"400 No")
        with (
            Upstream(script=[Reads(100_000), Send(early), Does(answered.set), gone]) as upstream,
            front.call() as caller,
        ):
            front.gateway(upstream)
            caller.send(get(b"/", b"Content-Length: 1000000", method=b"POST") + b"x" * 100_000)
            assert answered.wait(PATIENCE)
            caller.send(b"x" * 100_000)
            caller.until(b"x" * 1000)
            caller.sock.close()
            gone.wait()


class TestPace:
    def test_the_head_comes_before_the_body(self, front: Front) -> None:
        for framing in (b"Content-Length: 2", b"Transfer-Encoding: chunked"):
            rest = b"ok" if b"Length" in framing else b"2\r\nok\r\n0\r\n\r\n"
            with (
                Upstream(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing, WaitFor("head"), rest) as upstream,
                front.call() as caller,
            ):
                front.gateway(upstream)
                caller.send(get())
                status, _ = caller.head()
                upstream.set("head")
                assert status == 200
                assert b"ok" in caller.read(2) or caller.until(b"ok")

    def test_each_part_comes_when_it_is_there(self, front: Front) -> None:
        steps: list[bytes | WaitFor] = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
        for number in range(5):
            steps += [b"6\r\npart-%d\r\n" % number, WaitFor(f"part-{number}")]
        with Upstream(*steps, b"0\r\n\r\n") as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get())
            for number in range(5):
                caller.until(b"part-%d" % number)
                upstream.set(f"part-{number}")
            caller.until(b"0\r\n\r\n")

    def test_a_body_streams_while_it_is_sent(self, front: Front) -> None:
        reads = [Reads(70_000), *(Reads(10_000) for _ in range(3))]
        with Upstream(script=[*reads, Send(http_reply())]) as upstream, front.call() as caller:
            front.gateway(upstream)
            head = get(b"/", b"Content-Length: 100000", method=b"POST")
            caller.send(head + b"x" * 70_000)
            reads[0].wait()
            for step in reads[1:]:
                caller.send(b"x" * 10_000)
                step.wait()
            assert caller.answer().status == 200

    def test_an_upstream_that_does_not_read_stops_its_caller(self, front: Front) -> None:
        size = 64 * 2**20
        with Upstream(script=[Reads(1), WaitFor("read"), Gone()]) as upstream, front.call() as caller:
            front.gateway(upstream, max_body=size)
            caller.send(get(b"/", b"Content-Length: %d" % size, method=b"POST"))
            caller.sock.settimeout(0.5)
            taken = 0
            with contextlib.suppress(TimeoutError):
                while taken < size:
                    taken += caller.sock.send(b"x" * 65_536)
            assert taken < size / 2  # the rest is in buffers of the system
            upstream.set("read")

    def test_a_caller_that_does_not_read_stops_its_upstream(self, front: Front) -> None:
        size = 64 * 2**20
        sent, stuck = [0], threading.Event()

        class Flood(Does):
            def play(self, channel: object) -> None:
                channel.sock.settimeout(0.5)  # type: ignore[attr-defined]
                with contextlib.suppress(TimeoutError, ConnectionError):
                    while sent[0] < size:
                        sent[0] += channel.sock.send(b"x" * 65_536)  # type: ignore[attr-defined]
                stuck.set()

        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        with Upstream(script=[ReadRequest(), Send(head), Flood(print), WaitFor("end")]) as upstream:
            front.gateway(upstream)
            with front.call() as caller:
                caller.send(get())
                caller.until(b"\r\n\r\n")
                assert stuck.wait(20)
                assert sent[0] < size / 2
