"""Balancers for the handlers of an app: shared, started and closed with it, and bound to who is waiting."""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import fastapi
import httpx
import pytest
import starlette.applications
import starlette.background
import starlette.requests
import starlette.responses
import starlette.routing
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from socket_kit import serving

import pathlb
from pathlb.asgi import BalancerMiddleware, Gateway, lifespan
from pathlb.asgi.shedding import Limiter
from pathlb.asgi.types import ASGIApp, Message, Receive, Scope, Send
from pathlb.deadline import BOUND, deadline_scope
from pathlb.exchange import Headers, Reply, Request
from pathlb.runner import make_runner
from pathlb.testing import ScriptedUpstream

pytestmark = pytest.mark.anyio

STARTED = {"type": "lifespan.startup.complete"}
ENDED = {"type": "lifespan.shutdown.complete"}
START, END = {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}
EMPTY = {"type": "http.request", "body": b"", "more_body": False}
LEFT = {"type": "http.disconnect"}
OK = {"type": "http.response.start", "status": 200, "headers": []}
TRACEPARENT = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Server:
    """One call of an app, and the server it comes from. An app must not be in `receive` twice at once."""

    def __init__(self, app: ASGIApp, *said: Message, kind: str = "http", headers: Headers | None = None) -> None:
        self.app = app
        self.scope: Scope = {"type": kind, "method": "GET", "path": "/", "headers": headers or []}
        self.said: deque[Message] = deque(said)
        self.heard: list[Message] = []
        self.receiving = False
        self.taken = 0
        self.over = False
        self._news = anyio.Event()

    def say(self, *messages: Message) -> None:
        self.said.extend(messages)
        self._news.set()

    async def receive(self) -> Message:
        assert not self.receiving
        self.receiving = True
        try:
            while not self.said:
                self._news = anyio.Event()
                await self._news.wait()
        finally:
            self.receiving = False
        self.taken += 1
        # Servers repeat it, but not all do.
        return self.said.popleft()

    async def send(self, message: Message) -> None:
        self.heard.append(message)
        await anyio.lowlevel.checkpoint()

    async def run(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
        finally:
            self.over = True

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.heard if message["type"] == "http.response.start"), None)


class Held:
    """An upstream whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.upstream = ScriptedUpstream(self._answer)
        self.waiting = 0
        self._gate = anyio.Semaphore(0)

    async def _answer(self, request: Request, extra: Headers) -> Reply:
        self.waiting += 1
        try:
            await self._gate.acquire()
        finally:
            self.waiting -= 1
        return Reply(200, [(b"content-length", b"0")], _Nothing())

    def let_go(self) -> None:
        self._gate.release()


class _Nothing:
    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in ():
            yield part

    async def aclose(self) -> None:
        pass


def balanced(upstream: ScriptedUpstream | None = None, **options: Any) -> pathlb.Balancer:
    table = {"http://a": upstream or ScriptedUpstream()}
    return pathlb.Balancer(list(table), upstream=ScriptedUpstream.factory(table), **options)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await anyio.sleep(0.001)


async def answer(send: Send, body: bytes = b"") -> None:
    await send(OK)
    await send({"type": "http.response.body", "body": body})


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that answers, and knows no lifespan."""
    assert scope["type"] == "http"
    await answer(send)


def calling(balancer: pathlb.Balancer, ended: list[Any]) -> ASGIApp:
    """An app that makes a balanced call, looks for nothing, and notes how the call ended."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await balancer.send(Request("GET", b"/", []))
        except pathlb.PathlbError as exc:
            ended.append(exc)
        else:
            await reply.body.aclose()
            ended.append(reply)
        await answer(send)

    return app


def open_now(balancer: pathlb.Balancer) -> bool:
    return balancer._runner is not None and not balancer._closed


class TestLifespan:
    async def test_they_live_from_the_apps_start_to_its_end(self) -> None:
        upstream = ScriptedUpstream()
        balancer = balanced(upstream)
        seen: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(await receive())
            await send(STARTED)
            seen.append(open_now(balancer))
            seen.append(await receive())
            reply = await balancer.send(Request("POST", b"/goodbye", []))
            await reply.body.aclose()
            await send(ENDED)
            seen.append(upstream.closed)

        server = Server(BalancerMiddleware(app, balancer), START, END, kind="lifespan")
        await server.run()
        assert seen == [START, True, END, True]
        assert server.heard == [STARTED, ENDED]
        assert upstream.count == 1

    @pytest.mark.parametrize("silent", [False, True])
    async def test_an_app_without_a_lifespan_gets_one(self, silent: bool) -> None:
        async def ignorant(scope: Scope, receive: Receive, send: Send) -> None:
            if not silent:
                await nothing(scope, receive, send)

        balancer = balanced()
        server = Server(BalancerMiddleware(ignorant, balancer), START, kind="lifespan")
        async with anyio.create_task_group() as group:
            group.start_soon(server.run)
            await until(lambda: server.heard)
            assert open_now(balancer)
            server.say(END)
        assert server.heard == [STARTED, ENDED]
        assert balancer._closed

    async def test_starlettes(self) -> None:
        balancer = balanced()
        seen = []

        @asynccontextmanager
        async def own(app: starlette.applications.Starlette) -> AsyncIterator[dict[str, int]]:
            yield {"own": 1}
            seen.append(balancer._closed)

        app = starlette.applications.Starlette(lifespan=own)
        app.add_middleware(BalancerMiddleware, balancers=balancer)
        server = Server(app, START, END, kind="lifespan")
        server.scope["state"] = {}
        await server.run()
        assert server.heard == [STARTED, ENDED]
        assert seen == [False]
        assert balancer._closed
        assert server.scope["state"] == {"own": 1, "balancer": balancer}

    async def test_an_app_that_cannot_start(self) -> None:
        balancer = balanced()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "no"})

        server = Server(BalancerMiddleware(app, balancer), START, kind="lifespan")
        await server.run()
        assert server.heard == [{"type": "lifespan.startup.failed", "message": "no"}]

    async def test_an_app_that_breaks_at_its_start_is_the_servers_to_judge(self) -> None:
        balancer = balanced()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            raise KeyError("start")

        server = Server(BalancerMiddleware(app, balancer), START, kind="lifespan")
        with pytest.raises(KeyError, match="start"):
            await server.run()
        assert server.heard == []
        # uvicorn takes that for an app without a lifespan, and serves.
        assert not balancer._closed

    @pytest.mark.parametrize("how", ["fails", "breaks", "returns", "returns early"])
    async def test_however_the_app_ends_they_are_closed(self, how: str) -> None:
        balancer = balanced()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send(STARTED)
            if how == "returns early":
                return
            await receive()
            if how == "fails":
                await send({"type": "lifespan.shutdown.failed", "message": "no"})
                assert balancer._closed
            if how == "breaks":
                raise KeyError("end")

        server = Server(BalancerMiddleware(app, balancer), START, END, kind="lifespan")
        if how == "breaks":
            with pytest.raises(KeyError, match="end"):
                await server.run()
        else:
            await server.run()
        assert balancer._closed
        last = {"fails": {"type": "lifespan.shutdown.failed", "message": "no"}, "breaks": STARTED}.get(how, ENDED)
        assert server.heard[-1] == last

    async def test_one_that_breaks_while_serving_keeps_them_until_the_server_ends(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        balancer, ended = balanced(), []
        gone = anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await calling(balancer, ended)(scope, receive, send)
                return
            await receive()
            await send(STARTED)
            await gone.wait()
            raise KeyError("a task of the app")

        wrapped = BalancerMiddleware(app, balancer)
        server = Server(wrapped, START, kind="lifespan")

        async def run() -> None:
            with pytest.raises(KeyError, match="a task of the app"):
                await server.run()

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until(lambda: server.heard)
            gone.set()
            await anyio.wait_all_tasks_blocked()
            assert "its balancers stay open" in caplog.text
            await Server(wrapped, EMPTY).run()
            assert isinstance(ended[0], Reply)
            server.say(END)
        assert balancer._closed
        assert server.heard == [STARTED]

    async def test_one_that_is_cancelled_closes_them(self) -> None:
        balancer = balanced()
        server = Server(BalancerMiddleware(nothing, balancer), START, kind="lifespan")
        async with anyio.create_task_group() as group:
            group.start_soon(server.run)
            await until(lambda: server.heard)
            group.cancel_scope.cancel()
        assert balancer._closed

    async def test_one_that_cannot_start_fails_the_start(self) -> None:
        first, second = balanced(), balanced()
        await second.aclose()
        told = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            told.append(await receive())
            await send(STARTED)
            told.append(await receive())
            await send(ENDED)

        server = Server(BalancerMiddleware(app, {"first": first, "second": second}), START, kind="lifespan")
        await server.run()
        (heard,) = server.heard
        assert heard["type"] == "lifespan.startup.failed"
        assert "is closed" in heard["message"]
        assert told == [START, END], "the app can clean up"
        assert first._closed

    async def test_without_the_app_as_well(self) -> None:
        balancer = balanced()
        await balancer.aclose()
        server = Server(BalancerMiddleware(nothing, balancer), START, kind="lifespan")
        await server.run()
        assert [message["type"] for message in server.heard] == ["lifespan.startup.failed"]

    async def test_for_the_host_of_mounted_apps(self) -> None:
        one, two = balanced(), balanced()
        async with lifespan(one, two):
            assert open_now(one)
            assert open_now(two)
        assert one._closed
        assert two._closed

    async def test_the_host_may_fail(self) -> None:
        one = balanced()
        with pytest.raises(KeyError):
            async with lifespan(one):
                raise KeyError
        assert one._closed

    async def test_without_any_they_start_with_the_first_request(self) -> None:
        balancer, ended = balanced(), []
        async with balancer:
            await Server(BalancerMiddleware(calling(balancer, ended), balancer), EMPTY).run()
        assert isinstance(ended[0], Reply)
        assert BOUND.get() is None, "nothing is left of the request"


class TestWhereHandlersFindThem:
    @pytest.mark.parametrize("kind", ["http", "websocket"])
    @pytest.mark.parametrize("state", [None, {}, {"db": 1}])
    async def test_in_the_state(self, kind: str, state: dict[str, Any] | None) -> None:
        one, two = balanced(), balanced()
        seen = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["state"])

        server = Server(BalancerMiddleware(app, {"one": one, "two": two}), kind=kind)
        if state is not None:
            server.scope["state"] = dict(state)
        await server.run()
        assert seen == [{**(state or {}), "one": one, "two": two}]

    async def test_a_single_one_is_called_balancer_in_mounted_apps_too(self) -> None:
        balancer = balanced()
        seen = []

        async def handler(request: starlette.requests.Request) -> starlette.responses.Response:
            seen.append(request.state.balancer)
            return starlette.responses.Response()

        inner = starlette.applications.Starlette(routes=[starlette.routing.Route("/", handler)])
        outer = starlette.applications.Starlette(routes=[starlette.routing.Mount("/in", inner)])
        server = Server(BalancerMiddleware(outer, balancer), EMPTY)
        server.scope |= {"path": "/in/", "query_string": b"", "root_path": ""}
        await server.run()
        assert server.status == 200
        assert seen == [balancer]

    async def test_an_unknown_kind_of_scope_passes(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send(await receive())

        server = Server(BalancerMiddleware(app, balanced(), concurrency=1), EMPTY, kind="pigeon")
        await server.run()
        assert server.heard == [EMPTY]
        assert "state" not in server.scope

    @pytest.mark.parametrize(
        ("balancers", "options", "field"),
        [
            ("http://a", {}, "balancers"),
            ({"a b": 1}, {}, "balancers"),
            ({5: 1}, {}, "balancers"),
            ({"a": 1}, {}, r"balancers\['a'\]"),
            ({}, {"deadline_header": "X Timeout"}, "deadline_header"),
            ({}, {"deadline_header": 5}, "deadline_header"),
            ({}, {"max_deadline": 0}, "max_deadline"),
            ({}, {"max_deadline": math.nan}, "max_deadline"),
            ({}, {"concurrency": 0}, "concurrency"),
            ({}, {"concurrency": 1.5}, "concurrency"),
            ({}, {"queue": 1}, "queue"),
            ({}, {"concurrency": 1, "queue": -1}, "queue"),
            ({}, {"concurrency": 1, "queue_timeout": -1}, "queue_timeout"),
        ],
    )
    async def test_what_cannot_work_is_refused(self, balancers: Any, options: dict[str, Any], field: str) -> None:
        with pytest.raises(pathlb.ConfigError, match=rf"^BalancerMiddleware\.{field}:"):
            BalancerMiddleware(nothing, balancers, **options)


class TestTheDeadline:
    @pytest.mark.parametrize(
        ("field", "told", "seconds"),
        [
            ("X-Request-Timeout", "2.5", 2.5),
            ("X-Request-Timeout", " 3 ", 3),
            ("X-Request-Timeout", "600", 20),
            ("X-Request-Timeout", "0", None),
            ("X-Request-Timeout", "-1", None),
            ("X-Request-Timeout", "soon", None),
            ("X-Request-Timeout", "nan", None),
            ("X-Request-Timeout", "1e3", None),
            ("X-Request-Timeout", "1.2.3", None),
            ("X-Request-Timeout", "", None),
            ("X-Request-Timeout", ".", None),
            ("X-Request-Timeout", "9" * 400, None),
            ("X-Envoy-Expected-Rq-Timeout-Ms", "1500", 1.5),
            ("grpc-timeout", "700m", 0.7),
            ("grpc-timeout", "2S", 2),
            ("grpc-timeout", "1H", 20),
            ("grpc-timeout", "2", None),
            ("grpc-timeout", "2s", None),
        ],
    )
    async def test_what_a_caller_may_say(
        self, field: str, told: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pathlb.asgi.middleware.time", SimpleNamespace(monotonic=lambda: 0.0))
        monkeypatch.setattr("pathlb.deadline.time", SimpleNamespace(monotonic=lambda: 0.0))
        upstream, ended = ScriptedUpstream(), []
        async with balanced(upstream) as balancer:
            app = BalancerMiddleware(calling(balancer, ended), balancer, deadline_header=field, max_deadline=20)
            await Server(app, EMPTY, headers=[(field.lower().encode(), told.encode())]).run()
        assert [request.deadline for request, _ in upstream.calls] == [pytest.approx(seconds)]

    async def test_a_call_ends_by_it(self) -> None:
        held, ended = Held(), []
        async with balanced(held.upstream) as balancer:
            app = BalancerMiddleware(calling(balancer, ended), balancer, deadline_header="X-Request-Timeout")
            server = Server(app, EMPTY, headers=[(b"x-request-timeout", b"0.02")])
            await server.run()
        (error,) = ended
        assert isinstance(error, pathlb.DeadlineExceeded)
        assert server.status == 200

    async def test_without_the_field_or_without_asking_there_is_none(self) -> None:
        upstream, ended = ScriptedUpstream(), []
        async with balanced(upstream) as balancer:
            app = calling(balancer, ended)
            await Server(BalancerMiddleware(app, balancer, deadline_header="X-Request-Timeout"), EMPTY).run()
            headers = [(b"x-request-timeout", b"2")]
            await Server(BalancerMiddleware(app, balancer), EMPTY, headers=headers).run()
        assert [request.deadline for request, _ in upstream.calls] == [None, None]

    async def test_it_ends_with_the_response(self) -> None:
        upstream = ScriptedUpstream()
        async with balanced(upstream) as balancer:

            async def later() -> None:
                await balancer.send(Request("GET", b"/", []))

            response = starlette.responses.Response(background=starlette.background.BackgroundTask(later))
            app = BalancerMiddleware(response, balancer, deadline_header="X-Request-Timeout")
            await Server(app, EMPTY, headers=[(b"x-request-timeout", b"2")]).run()
        assert [request.deadline for request, _ in upstream.calls] == [None]

    async def test_an_outer_one_counts_too(self) -> None:
        upstream, ended = ScriptedUpstream(), []
        async with balanced(upstream) as balancer:
            inner = BalancerMiddleware(calling(balancer, ended), balancer)
            outer = BalancerMiddleware(inner, balancer, deadline_header="X-Request-Timeout")
            await Server(outer, EMPTY, headers=[(b"x-request-timeout", b"2")]).run()
        assert upstream.calls[0][0].deadline is not None


class TestACallerThatLeaves:
    @asynccontextmanager
    async def under_way(self, app: ASGIApp, *said: Message, **options: Any) -> AsyncIterator[Server]:
        server = Server(app, *said, **options)
        async with anyio.create_task_group() as group:
            group.start_soon(server.run)
            yield server
            await until(lambda: server.over)
            assert not server.receiving, "nobody is left behind"

    async def test_its_calls_are_cancelled_although_nobody_looks(self) -> None:
        held, ended = Held(), []
        async with balanced(held.upstream) as balancer:
            app = BalancerMiddleware(calling(balancer, ended), balancer)
            async with self.under_way(app, EMPTY) as server:
                await until(lambda: held.waiting)
                server.say(LEFT)
            (error,) = ended
            assert isinstance(error, pathlb.DeadlineExceeded)
            assert "has left" in str(error)
            assert held.waiting == 0
            assert balancer.snapshot().in_flight == 0
            assert server.status == 200, "the app went on"

    async def test_so_are_those_to_come_but_for_the_freed(self) -> None:
        upstream = ScriptedUpstream()
        ended: list[Any] = []
        balancer = balanced(upstream)
        go_on = anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            with deadline_scope(None):
                await calling(balancer, ended)(scope, receive, _nowhere)
            await calling(balancer, ended)(scope, receive, send)

        async with balancer:
            async with self.under_way(BalancerMiddleware(app, balancer), EMPTY, LEFT) as server:
                await until(lambda: server.taken == 2)
                go_on.set()
        assert isinstance(ended[0], Reply)
        assert isinstance(ended[1], pathlb.DeadlineExceeded)

    async def test_what_is_read_ahead_is_the_apps_still(self) -> None:
        parts = [{"type": "http.request", "body": bytes([65 + n]), "more_body": n < 3} for n in range(4)]
        got, go_on = [], anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            got.extend([await receive() for _ in range(6)])
            await answer(send)

        async with self.under_way(BalancerMiddleware(app, balanced()), *parts) as server:
            await until(lambda: server.taken == 4)
            go_on.set()
            await anyio.wait_all_tasks_blocked()
            server.say(LEFT)
        assert got == [*parts, LEFT, LEFT]
        assert server.taken == 5, "said once, told as often as the app asks"

    async def test_no_more_than_so_much_is_read_ahead(self) -> None:
        part = {"type": "http.request", "body": bytes(30_000), "more_body": True}
        got, go_on, looks = [], anyio.Event(), [0]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            got.extend([await receive() for _ in range(10)])
            await answer(send)

        app = _counting(BalancerMiddleware(app, balanced()), looks)
        async with self.under_way(app, *[part] * 10) as server:
            await until(lambda: server.taken == 3)
            seen = looks[0]
            await until(lambda: looks[0] > seen + 2)
            assert server.taken == 3
            go_on.set()
        assert got == [part] * 10

    async def test_a_body_that_waits_to_be_asked_for_is_not_read_ahead(self) -> None:
        go_on, looks = anyio.Event(), [0]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            await answer(send)

        app = _counting(BalancerMiddleware(app, balanced()), looks)
        async with self.under_way(app, EMPTY, headers=[(b"expect", b"100-continue")]) as server:
            await until(lambda: looks[0] > 2)
            go_on.set()
        assert server.taken == 0

    async def test_once_it_was_asked_for_it_is(self) -> None:
        held, ended = Held(), []
        async with balanced(held.upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                assert await receive() == EMPTY
                await calling(balancer, ended)(scope, receive, send)

            expecting: Headers = [(b"expect", b"100-continue")]
            async with self.under_way(BalancerMiddleware(app, balancer), EMPTY, headers=expecting) as server:
                await until(lambda: held.waiting)
                server.say(LEFT)
        assert isinstance(ended[0], pathlb.DeadlineExceeded)

    async def test_an_app_that_listens_itself_hears_it_first(self) -> None:
        held, ended, heard = Held(), [], []
        async with balanced(held.upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                async with anyio.create_task_group() as group:
                    group.start_soon(calling(balancer, ended), scope, receive, send)
                    while (message := await receive()) != LEFT:
                        heard.append(message)
                    assert ended == []
                    heard.append(message)

            async with self.under_way(BalancerMiddleware(app, balancer), EMPTY) as server:
                await until(lambda: held.waiting and server.receiving)
                server.say(LEFT)
        assert heard == [EMPTY, LEFT]
        assert isinstance(ended[0], pathlb.DeadlineExceeded)

    async def test_an_app_that_polls(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = starlette.requests.Request(scope, receive)
            assert await request.body() == b"hello"
            while not await request.is_disconnected():  # noqa: ASYNC110  as people do
                await anyio.sleep(0.001)

        hello = {"type": "http.request", "body": b"hello", "more_body": False}
        async with self.under_way(BalancerMiddleware(app, balanced()), hello) as server:
            await until(lambda: server.receiving)
            server.say(LEFT)

    async def test_one_that_stops_listening_is_listened_for(self) -> None:
        held, ended = Held(), []
        async with balanced(held.upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                with anyio.move_on_after(0.001):
                    while True:
                        await receive()
                await calling(balancer, ended)(scope, receive, send)

            async with self.under_way(BalancerMiddleware(app, balancer), EMPTY) as server:
                await until(lambda: held.waiting and server.receiving)
                server.say(LEFT)
        assert isinstance(ended[0], pathlb.DeadlineExceeded)

    async def test_a_response_that_streams_is_cut_at_its_source(self) -> None:
        source = _Endless()
        balancer = balanced(ScriptedUpstream(lambda request, extra: Reply(200, [], source)))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with pathlb.AsyncClient(balancer) as client, client.stream("GET", "/") as response:
                parts = response.aiter_raw()
                await send(OK)
                await send({"type": "http.response.body", "body": await anext(parts), "more_body": True})
                with pytest.raises(httpx.ReadError, match="has left"):
                    await anext(parts)

        async with balancer:
            async with self.under_way(BalancerMiddleware(app, balancer), EMPTY) as server:
                await until(lambda: len(server.heard) == 2)
                server.say(LEFT)
            assert source.closed
            assert balancer.snapshot().in_flight == 0

    async def test_a_server_that_raises_from_send(self) -> None:
        held, ended = Held(), []
        async with balanced(held.upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                with pytest.raises(BrokenPipeError):
                    await send(OK)
                await calling(balancer, ended)(scope, receive, _nowhere)

            async def sending(scope: Scope, receive: Receive, send: Send) -> None:
                async def broken(message: Message) -> None:
                    raise BrokenPipeError

                await BalancerMiddleware(app, balancer)(scope, receive, broken)

            async with self.under_way(sending, EMPTY):
                pass
        assert isinstance(ended[0], pathlb.DeadlineExceeded)

    async def test_what_runs_after_the_response_is_not_its_business(self) -> None:
        held, ended, looks = Held(), [], [0]
        async with balanced(held.upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await answer(send)
                await calling(balancer, ended)(scope, receive, _nowhere)
                assert await receive() == LEFT

            async def keep_looking(scope: Scope, receive: Receive, send: Send) -> None:
                await looked.wait()
                await answer(send)

            looked, middleware = anyio.Event(), BalancerMiddleware(app, balancer)
            counted = _counting(middleware, looks)
            async with self.under_way(counted, LEFT) as server:
                await until(lambda: held.waiting)
                middleware.app = keep_looking
                async with self.under_way(counted, EMPTY):
                    await until(lambda: looks[0] > 2)
                    looked.set()
                assert server.taken == 0
                held.let_go()
        assert isinstance(ended[0], Reply)

    async def test_one_that_has_its_answer_is_not_listened_to_any_more(self) -> None:
        go_on = anyio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            await answer(send)

        async with self.under_way(BalancerMiddleware(app, balanced()), EMPTY) as server:
            await until(lambda: server.taken and server.receiving)
            go_on.set()
            await until(lambda: not server.receiving)

    async def test_a_server_that_breaks_while_it_is_read_ahead(self, caplog: pytest.LogCaptureFixture) -> None:
        upstream, ended, broken = ScriptedUpstream(), [], anyio.Event()
        async with balanced(upstream) as balancer:

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                await broken.wait()
                await calling(balancer, ended)(scope, receive, send)
                with pytest.raises(ZeroDivisionError):
                    await receive()

            async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
                async def fail() -> Message:
                    broken.set()
                    raise ZeroDivisionError

                await BalancerMiddleware(app, balancer)(scope, fail, send)

            async with self.under_way(breaking):
                pass
        assert isinstance(ended[0], Reply)


class TestTraces:
    @pytest.fixture
    def exporter(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
        exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        yield exporter
        provider.shutdown()

    @pytest.mark.parametrize("kind", ["http", "websocket"])
    async def test_calls_join_the_one_the_request_came_with(self, kind: str, exporter: InMemorySpanExporter) -> None:
        ended: list[Any] = []
        async with balanced() as balancer:
            app = BalancerMiddleware(calling(balancer, ended), balancer)
            await Server(app, EMPTY, kind=kind, headers=[TRACEPARENT]).run()
            await balancer.send(Request("GET", b"/", []))
        inside, outside = exporter.get_finished_spans()
        assert inside.context is not None
        assert outside.context is not None
        assert inside.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
        assert inside.parent is not None
        assert inside.parent.span_id == 0xB7AD6B7169203331
        assert outside.context.trace_id != inside.context.trace_id

    async def test_a_span_that_is_there_goes_before(self, exporter: InMemorySpanExporter) -> None:
        ended: list[Any] = []
        async with balanced() as balancer:
            app = BalancerMiddleware(calling(balancer, ended), balancer)
            with trace.get_tracer("test").start_as_current_span("server") as around:
                await Server(app, EMPTY, headers=[TRACEPARENT]).run()
        inside, _ = exporter.get_finished_spans()
        assert inside.parent == around.get_span_context()

    async def test_without_one_calls_begin_their_own(self, exporter: InMemorySpanExporter) -> None:
        ended: list[Any] = []
        async with balanced() as balancer:
            await Server(BalancerMiddleware(calling(balancer, ended), balancer), EMPTY).run()
        (span,) = exporter.get_finished_spans()
        assert span.parent is None

    async def test_without_an_sdk_nothing_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
        seen = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(dict(otel_context.get_current()))

        await Server(BalancerMiddleware(app, balanced()), headers=[TRACEPARENT]).run()
        assert seen == [{}]


class Busy:
    """An app whose requests are done when they are told to be, in any order; and a middleware that limits it."""

    def __init__(self, **limits: Any) -> None:
        self.app = BalancerMiddleware(self._app, balanced(), **limits)
        self.inside: list[str] = []
        self.most = 0
        self._done: dict[str, anyio.Event] = {}
        self._how: dict[str, Exception | None] = {}

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"]
        self.inside.append(name)
        self.most = max(self.most, len(self.inside))
        self._done[name] = anyio.Event()
        try:
            await self._done[name].wait()
        finally:
            self.inside.remove(name)
        error = self._how[name]
        if error is not None:
            raise error
        await answer(send, name.encode())

    def end(self, name: str, error: Exception | None = None) -> None:
        self._how[name] = error
        self._done[name].set()

    def request(self, name: str) -> Server:
        server = Server(self.app, EMPTY)
        server.scope["path"] = name
        return server

    @property
    def free(self) -> int:
        assert self.app._limiter is not None
        assert not self.app._limiter._waiting
        return self.app._limiter._free


class TestShedding:
    async def test_what_is_too_much_is_refused_and_the_rest_served_in_order(self) -> None:
        busy = Busy(concurrency=2, queue=2)
        servers = {name: busy.request(name) for name in "abcdef"}
        async with anyio.create_task_group() as group:
            for name in "abcd":
                group.start_soon(servers[name].run)
                await anyio.wait_all_tasks_blocked()
            assert busy.inside == ["a", "b"]
            for name in "ef":
                await servers[name].run()
            for name, follows in (("b", ["a", "c"]), ("a", ["c", "d"])):
                busy.end(name)
                await until(lambda: busy.inside == follows)  # noqa: B023
            for name in "cd":
                busy.end(name)
        assert [server.status for server in servers.values()] == [200, 200, 200, 200, 503, 503]
        start, body = servers["e"].heard
        assert dict(start["headers"])[b"retry-after"] == b"1"
        assert dict(start["headers"])[b"content-type"] == b"application/problem+json"
        assert b"this service is at its limit" in body["body"]
        assert (busy.most, busy.free) == (2, 2)

    async def test_a_wait_has_an_end(self) -> None:
        busy = Busy(concurrency=1, queue=1, queue_timeout=0.01)
        first, second, third = map(busy.request, "abc")
        async with anyio.create_task_group() as group:
            group.start_soon(first.run)
            await until(lambda: busy.inside)
            await second.run()
            assert second.status == 503
            await third.run()
            assert third.status == 503
            busy.end("a")
        assert busy.free == 1

    async def test_the_callers_deadline_ends_the_wait_too(self) -> None:
        busy = Busy(concurrency=1, queue=1, deadline_header="X-Request-Timeout", queue_timeout=100)
        first, second = map(busy.request, "ab")
        second.scope["headers"] = [(b"x-request-timeout", b"0.01")]
        async with anyio.create_task_group() as group:
            group.start_soon(first.run)
            await until(lambda: busy.inside)
            await second.run()
            assert second.status == 503
            busy.end("a")

    async def test_one_that_leaves_while_it_waits_makes_room(self) -> None:
        busy = Busy(concurrency=1, queue=1, queue_timeout=1_000)
        first, second, third = map(busy.request, "abc")
        async with anyio.create_task_group() as group:
            group.start_soon(first.run)
            await until(lambda: busy.inside)
            group.start_soon(second.run)
            await until(lambda: second.receiving)
            second.say(LEFT)
            await until(lambda: second.over)
            assert second.heard == [], "there is nobody to tell"
            group.start_soon(third.run)
            await anyio.wait_all_tasks_blocked()
            busy.end("a")
            await until(lambda: busy.inside == ["c"])
            busy.end("c")
        assert (third.status, busy.free) == (200, 1)

    async def test_an_error_frees_the_place(self) -> None:
        busy = Busy(concurrency=1)
        first = busy.request("a")
        async with anyio.create_task_group() as group:

            async def fails() -> None:
                with pytest.raises(KeyError):
                    await first.run()

            group.start_soon(fails)
            await until(lambda: busy.inside)
            busy.end("a", KeyError())
        assert busy.free == 1

    async def test_a_cancellation_frees_the_place(self) -> None:
        busy = Busy(concurrency=1, queue=1)
        first, second = map(busy.request, "ab")
        async with anyio.create_task_group() as group:
            group.start_soon(first.run)
            await until(lambda: busy.inside)
            group.start_soon(second.run)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert busy.free == 1

    @pytest.mark.parametrize("anyio_backend", ["asyncio"])
    async def test_one_granted_and_cancelled_at_once_passes_it_on(self) -> None:
        limiter, runner = Limiter(1, 2), make_runner()
        turns = [limiter.enter() for _ in range(3)]
        _, second, third = (asyncio.create_task(limiter.wait(turn, runner.scope(10))) for turn in turns if turn)
        await anyio.wait_all_tasks_blocked()
        limiter.leave()
        second.cancel()
        assert await third
        assert second.cancelled()
        limiter.leave()
        assert limiter._free == 1

    async def test_websockets_are_not_limited(self) -> None:
        seen = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])
            if len(seen) < 3:
                await server.run()

        middleware = BalancerMiddleware(app, balanced(), concurrency=1)
        server = Server(middleware, kind="websocket")
        await server.run()
        assert len(seen) == 3

    async def test_whatever_happens_every_place_comes_back(self) -> None:
        limiter, runner, rng = Limiter(3, 5), make_runner(), random.Random(7)
        inside, most, refused = 0, 0, 0

        async def request(patience: float, life: float) -> None:
            nonlocal inside, most, refused
            with anyio.move_on_after(life):
                turn = limiter.enter()
                if turn is None or not (turn.granted or await limiter.wait(turn, runner.scope(patience))):
                    refused += 1
                    return
                inside += 1
                most = max(most, inside)
                try:
                    await anyio.sleep(rng.random() * 0.003)
                finally:
                    inside -= 1
                    limiter.leave()

        async with anyio.create_task_group() as group:
            for _ in range(20):
                for _ in range(20):
                    group.start_soon(request, rng.random() * 0.004, rng.random() * 0.004)
                await anyio.sleep(rng.random() * 0.01)
        assert (inside, most, limiter._free, len(limiter._waiting)) == (0, 3, 3, 0)
        assert refused


SERVERS = ["uvicorn-httptools", "uvicorn-h11", "hypercorn", "granian"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestUnderRealServers:
    """A FastAPI app mounted in a Starlette app, behind the middleware."""

    def app(self, balancer: pathlb.Balancer, ended: list[Any], **options: Any) -> ASGIApp:
        inner = fastapi.FastAPI()

        @inner.post("/call")
        async def call(request: fastapi.Request) -> str:
            await request.body()
            assert request.state.balancer is balancer
            try:
                reply = await request.state.balancer.send(Request("GET", b"/", []))
            except pathlb.DeadlineExceeded as exc:
                ended.append(exc)
                raise fastapi.HTTPException(504) from exc
            await reply.body.aclose()
            return "done"

        host = starlette.applications.Starlette(routes=[starlette.routing.Mount("/in", inner)])
        return BalancerMiddleware(host, balancer, **options)

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_it_lives_with_the_server(self, kind: str) -> None:
        upstream = ScriptedUpstream()
        balancer = balanced(upstream)
        async with serving(self.app(balancer, []), kind) as port, httpx.AsyncClient() as client:
            assert open_now(balancer)
            response = await client.post(f"http://127.0.0.1:{port}/in/call", content=b"hello")
            assert response.json() == "done"
        assert balancer._closed

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_the_deadline(self, kind: str) -> None:
        held, ended = Held(), []
        balancer = balanced(held.upstream)
        app = self.app(balancer, ended, deadline_header="X-Request-Timeout")
        async with serving(app, kind) as port, httpx.AsyncClient() as client:
            headers = {"X-Request-Timeout": "0.05"}
            response = await client.post(f"http://127.0.0.1:{port}/in/call", content=b"hello", headers=headers)
            assert response.status_code == 504
        assert len(ended) == 1

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_a_caller_that_leaves(self, kind: str) -> None:
        held, ended = Held(), []
        balancer = balanced(held.upstream)
        async with serving(self.app(balancer, ended, concurrency=1), kind) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /in/call HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello")
            await until(lambda: held.waiting)
            writer.close()
            await until(lambda: ended)
            assert "has left" in str(ended[0])
            assert (held.waiting, balancer.snapshot().in_flight) == (0, 0)
            async with httpx.AsyncClient() as client:
                held.let_go()
                response = await client.post(f"http://127.0.0.1:{port}/in/call")
                assert response.status_code == 200, "the place is free again"

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_a_gateway_in_the_app_sees_to_its_callers_itself(self, kind: str) -> None:
        held, raised = Held(), []
        balancer = balanced(held.upstream)
        host = starlette.applications.Starlette(routes=[starlette.routing.Mount("/rpc", Gateway(balancer))])

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await host(scope, receive, send)
            except Exception as exc:
                raised.append(exc)
                raise

        async with serving(BalancerMiddleware(app, balancer), kind) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /rpc/ HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello")
            await until(lambda: held.waiting)
            writer.close()
            await until(lambda: not held.waiting)
            async with httpx.AsyncClient() as client:
                held.let_go()
                assert (await client.post(f"http://127.0.0.1:{port}/rpc/")).status_code == 200
        assert raised == []

    @pytest.mark.parametrize("kind", SERVERS)
    async def test_what_is_too_much_is_refused(self, kind: str) -> None:
        held = Held()
        balancer = balanced(held.upstream)
        async with serving(self.app(balancer, [], concurrency=1), kind) as port, httpx.AsyncClient() as client:
            async with asyncio.TaskGroup() as group:
                first = group.create_task(client.post(f"http://127.0.0.1:{port}/in/call"))
                await until(lambda: held.waiting)
                refused = await client.post(f"http://127.0.0.1:{port}/in/call", content=b"hello")
                held.let_go()
            assert first.result().status_code == 200
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["status"] == 503


async def _nowhere(message: Message) -> None:
    """A `send` whose messages are not the response's."""


class _Endless:
    """A reply body with a first part, and no second."""

    closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"first"
        await anyio.sleep_forever()

    async def aclose(self) -> None:
        self.closed = True


def _counting(app: BalancerMiddleware, looks: list[int]) -> ASGIApp:
    """Counts how often the middleware has looked for callers that may have left."""
    look = app._lookout._look

    def counted() -> bool:
        looks[0] += 1
        return look()

    app._lookout._look = counted  # type: ignore[method-assign]
    return app
