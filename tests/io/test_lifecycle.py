"""Where and for how long the objects live: loops, forks, processes' ends, dropped replies."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import anyio
import pytest
from io_helpers import LARGE_BODY, Held, Stack, scripted, until

import pathlb
from pathlb.exchange import Request
from pathlb.testing import Fleet, ScriptedUpstream

pytestmark = pytest.mark.anyio


async def test_works_and_closes_without_async_with(stack: Stack, fleet: Fleet) -> None:
    client = stack.pathlb.AsyncClient(fleet.urls)
    assert (await client.get("/")).status_code == 200
    await client.aclose()
    await until(lambda: sum(gateway.stats().open_connections for gateway in fleet) == 0)


async def test_closing_what_was_never_used(stack: Stack) -> None:
    client = stack.pathlb.AsyncClient(["http://a"])
    await client.aclose()
    await client.aclose()
    balancer = pathlb.Balancer(["http://a"])
    await balancer.aclose()
    await balancer.aclose()
    with pytest.raises(pathlb.UsageError, match="this Balancer is closed"):
        await balancer.send(Request("GET", b"/", []))
    with pytest.raises(pathlb.UsageError, match="this Balancer is closed"):
        balancer.update(["http://b"])
    with pytest.raises(pathlb.UsageError, match="this Balancer is closed"):
        await balancer.__aenter__()


@pytest.mark.parametrize("ending", ["closed", "left open"])
@pytest.mark.parametrize("probing", [False, True])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_may_end_without_warnings(fleet: Fleet, backend: str, probing: bool, ending: str) -> None:
    """In its own process: what is said at the interpreter's end counts too."""
    script = f"""
        import anyio, pathlb
        async def main():
            client = pathlb.AsyncClient({fleet.urls!r}, health={"pathlb.Health('/health')" if probing else None})
            assert (await client.get("/")).status_code == 200
            {"await client.aclose()" if ending == "closed" else ""}
        anyio.run(main, backend={backend!r})
    """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    if ending == "closed":
        assert done.stderr == ""
    else:
        assert "pathlb" not in done.stderr, "sockets left open are Python's to complain about, tasks would be ours"
        assert "Task was destroyed" not in done.stderr


@pytest.mark.parametrize("second", ["asyncio", "trio"])
@pytest.mark.parametrize("first", ["asyncio", "trio"])
def test_another_event_loop_is_a_clear_error(first: str, second: str) -> None:
    balancer = scripted(ScriptedUpstream())
    client = pathlb.AsyncClient(balancer)

    async def use() -> None:
        assert (await client.get("/")).status_code == 200

    async def use_again() -> None:
        with pytest.raises(pathlb.UsageError, match="another event loop"):
            await client.get("/")
        with pytest.raises(pathlb.UsageError, match="another event loop"):
            await balancer.aclose()

    anyio.run(use, backend=first)
    anyio.run(use_again, backend=second)


def test_making_it_outside_of_any_loop_is_fine() -> None:
    client = pathlb.AsyncClient(scripted(ScriptedUpstream()))

    async def use() -> int:
        async with client:
            return (await client.get("/")).status_code

    assert asyncio.run(use()) == 200


@pytest.mark.parametrize("how", ["used before", "made before"])
def test_after_a_fork(fleet: Fleet, how: str) -> None:
    script = f"""
        import asyncio, os, pathlb
        client = pathlb.AsyncClient({fleet.urls!r})
        async def parent():
            if {how == "used before"}:
                assert (await client.get("/")).status_code == 200
            child = os.fork()
            if child:
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) == 0, status
                await client.aclose()
                return
            asyncio.events._set_running_loop(None)
            try:
                asyncio.run(after())
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        async def after():
            if {how == "made before"}:
                assert (await client.get("/")).status_code == 200
                return
            try:
                await client.get("/")
            except pathlb.UsageError as exc:
                assert "before a fork" in str(exc), exc
            else:
                raise AssertionError("the child used the parent's connections")
        asyncio.run(parent())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


async def test_after_a_fork_in_short(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.pathlb.AsyncClient(scripted(ScriptedUpstream())) as client:
        await client.get("/")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(stack.http.UnsupportedProtocol, match="before a fork"):
                await client.get("/")


def test_after_a_fork_on_the_same_loop(fleet: Fleet) -> None:
    """As with a fork from inside a coroutine: the loop looks the same, the connections are shared."""
    script = f"""
        import asyncio, os, pathlb
        async def main():
            client = pathlb.AsyncClient({fleet.urls!r})
            assert (await client.get("/")).status_code == 200
            child = os.fork()
            if child:
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) == 7, status
                await client.aclose()
                return
            try:
                await client.get("/")
            except pathlb.UsageError as exc:
                os._exit(7 if "before a fork" in str(exc) else 1)
            os._exit(2)
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


class TestDroppedReplies:
    async def test_one_that_nobody_reads_is_collected_and_ends_its_request(self, stack: Stack, fleet: Fleet) -> None:
        fleet[0].set_body(LARGE_BODY)
        async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
            response = await client.send(client.build_request("GET", "/"), stream=True)
            assert client.balancer.snapshot().in_flight == 1
            ref = weakref.ref(response)
            del response
            gc.collect()
            assert ref() is None
            await until(lambda: client.balancer.snapshot().in_flight == 0)
            assert (await client.get("/")).status_code == 200

    async def test_its_body_is_closed(self) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream) as balancer:
            dropped = await balancer.send(Request("GET", b"/", []))
            inner: Any = dropped.body.inner  # type: ignore[attr-defined]
            del dropped
            gc.collect()
            await until(lambda: inner.closed)
            await until(lambda: balancer.snapshot().in_flight == 0)

    async def test_those_the_balancer_outlived_say_nothing(self) -> None:
        balancer = scripted(ScriptedUpstream())
        kept = await balancer.send(Request("GET", b"/", []))
        dropped = await balancer.send(Request("GET", b"/", []))
        await balancer.aclose()
        del dropped
        gc.collect()
        await kept.body.aclose()


async def test_closing_in_the_middle_of_requests(stack: Stack, fleet: Fleet) -> None:
    """They end, one way or another; nothing hangs and nothing leaks."""
    for gateway in fleet:
        gateway.set_mode(pathlb.testing.Mode.HANG)
    client = stack.http.AsyncClient(
        transport=stack.pathlb.BalancedTransport(balancer := pathlb.Balancer(fleet.urls)), base_url="http://gw"
    )
    ended: list[Exception] = []

    async def get() -> None:
        try:
            await client.get("/")
        except (stack.http.HTTPError, anyio.ClosedResourceError) as exc:
            ended.append(exc)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(get)
        await until(lambda: sum(gateway.stats().in_flight for gateway in fleet) == 6)
        await balancer.aclose()
    assert len(ended) == 6
    assert balancer.snapshot().in_flight == 0
    await client.aclose()


async def test_a_reply_can_be_closed_after_its_balancer(stack: Stack, fleet: Fleet) -> None:
    balancer = pathlb.Balancer(fleet.urls)
    client = stack.http.AsyncClient(transport=stack.pathlb.BalancedTransport(balancer))
    response = await client.send(client.build_request("GET", "http://gw/"), stream=True)
    await balancer.aclose()
    await response.aclose()
    assert balancer.snapshot().in_flight == 0
    await client.aclose()


async def test_the_balancer_of_a_client_that_failed_to_enter(stack: Stack) -> None:
    async with stack.pathlb.AsyncClient(scripted(ScriptedUpstream())) as client:
        with pytest.raises(RuntimeError, match="more than once"):
            await client.__aenter__()


async def test_background_work_ends_with_the_balancer() -> None:
    held = Held()
    async with scripted(held.upstream) as balancer, pathlb.AsyncClient(balancer) as client:
        with anyio.move_on_after(0.01):
            await client.get("/")
        assert balancer.snapshot().in_flight == 0
    # Nothing is left on the loop that keeps it from being idle.
    await anyio.wait_all_tasks_blocked()
