from __future__ import annotations

from typing import Any

import anyio
import pytest

from pathlb.core.model import Endpoint
from pathlb.errors import UsageError
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Body, ScriptedUpstream
from pathlb.upstream.base import Upstream

REQUEST = Request("GET", b"/x", [])


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Any:
    return lambda function, *args: anyio.run(function, *args, backend=request.param)


async def read(body: Any) -> bytes:
    return b"".join([chunk async for chunk in body])


def test_without_a_script_every_call_is_a_fresh_200(run: Any) -> None:
    async def main() -> None:
        upstream: Upstream = (scripted := ScriptedUpstream())
        first = await upstream.send(REQUEST, [(b"traceparent", b"1")])
        first.headers.append((b"changed", b"by the caller"))
        second = await upstream.send(REQUEST, [])
        assert (second.status, second.headers) == (200, [(b"content-length", b"2")])
        assert await read(first.body) == await read(second.body) == b"ok"
        assert list(scripted.calls) == [(REQUEST, [(b"traceparent", b"1")]), (REQUEST, [])]
        assert scripted.count == 2

    run(main)


def test_a_script_is_played_in_order_and_then_the_default(run: Any) -> None:
    async def main() -> None:
        upstream = ScriptedUpstream([Reply(503, [], Body()), ValueError("scripted")])
        assert (await upstream.send(REQUEST, [])).status == 503
        with pytest.raises(ValueError, match="scripted"):
            await upstream.send(REQUEST, [])
        assert (await upstream.send(REQUEST, [])).status == 200

    run(main)


def test_a_function_decides_from_the_request() -> None:
    def answer(request: Request, extra_headers: Headers) -> Reply | Exception:
        return Reply(404, extra_headers, Body()) if request.target == b"/x" else KeyError("other")

    async def main() -> None:
        upstream = ScriptedUpstream(answer)
        reply = await upstream.send(REQUEST, [(b"a", b"b")])
        assert (reply.status, reply.headers) == (404, [(b"a", b"b")])
        with pytest.raises(KeyError):
            await upstream.send(Request("GET", b"/y", []), [])

    anyio.run(main)


@pytest.mark.parametrize("failing", [False, True])
def test_an_async_function_may_wait(run: Any, failing: bool) -> None:
    async def main() -> None:
        go = anyio.Event()

        async def answer(request: Request, extra_headers: Headers) -> Reply | Exception:
            await go.wait()
            return OSError("late") if failing else Reply(204, [], Body())

        upstream = ScriptedUpstream(answer)
        replies: list[Reply | Exception] = []

        async def call() -> None:
            try:
                replies.append(await upstream.send(REQUEST, []))
            except OSError as exc:
                replies.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            assert (upstream.count, replies) == (1, [])
            go.set()
        [reply] = replies
        assert isinstance(reply, OSError) if failing else isinstance(reply, Reply) and reply.status == 204

    run(main)


def test_a_closed_upstream_refuses_to_be_used_until_it_joins_again() -> None:
    async def main() -> None:
        upstream = ScriptedUpstream()
        make = ScriptedUpstream.factory({"http://gateway:80": upstream})
        endpoint = Endpoint("http://gateway/")
        assert make(endpoint) is upstream
        await upstream.aclose()
        assert upstream.closed
        with pytest.raises(UsageError, match="closed"):
            await upstream.send(REQUEST, [])
        assert upstream.count == 0
        assert (await make(endpoint).send(REQUEST, [])).status == 200
        with pytest.raises(LookupError, match="http://other; there are http://gateway"):
            make(Endpoint("http://other"))

    anyio.run(main)


def test_a_body_yields_its_bytes_once_and_nothing_when_closed(run: Any) -> None:
    async def main() -> None:
        body = Body(b"data")
        assert (await read(body), await read(body), body.closed) == (b"data", b"", False)
        assert await read(Body()) == b""
        body = Body(b"data")
        await body.aclose()
        await body.aclose()
        assert (await read(body), body.closed) == (b"", True)

    run(main)
