"""Who closes what, what a cancel leaves behind, when a provider is connected, and what happens without web3."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from web3 import AsyncWeb3
from web3.exceptions import ProviderConnectionError, Web3ValidationError
from web3_kit import URL, answering, failure, provider_of, reply, result

import pathlb
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import ScriptedUpstream
from pathlb.web3 import AsyncBalancedProvider

VERSION = result("emulated/1")


@pytest.mark.asyncio
class TestClosing:
    async def test_a_provider_closes_what_it_made(self) -> None:
        upstream = answering(lambda call: result("0x1", call["id"]))
        async with provider_of(upstream) as provider:
            assert await AsyncWeb3(provider).eth.chain_id == 1
        assert upstream.closed
        with pytest.raises(pathlb.UsageError, match="closed"):
            await AsyncWeb3(provider).eth.chain_id

    async def test_disconnect_does_it_without_async_with(self) -> None:
        upstream = answering(lambda call: result("0x1", call["id"]))
        w3 = AsyncWeb3(provider_of(upstream))
        assert await w3.eth.chain_id == 1
        await w3.provider.disconnect()
        await w3.provider.disconnect()
        assert upstream.closed

    async def test_one_never_used_can_be_closed(self) -> None:
        await AsyncBalancedProvider([URL]).disconnect()

    async def test_a_balancer_is_shared_and_not_closed(self) -> None:
        upstream = answering(lambda call: result("0x1", call["id"]))
        async with pathlb.Balancer([URL], upstream=ScriptedUpstream.factory({URL: upstream})) as balancer:
            async with AsyncBalancedProvider(balancer, service="eth") as ethereum:
                assert ethereum.balancer is balancer
                assert await AsyncWeb3(ethereum).eth.chain_id == 1
            async with AsyncBalancedProvider(balancer, service="poly") as polygon:
                assert await AsyncWeb3(polygon).eth.chain_id == 1
            async with pathlb.AsyncClient(balancer) as client:
                call = {"jsonrpc": "2.0", "id": 7, "method": "eth_chainId", "params": []}
                assert (await client.post("/v1", json=call)).json() == result("0x1", 7)
            assert not upstream.closed
        assert upstream.closed
        services = [dict(request.headers).get(b"Target-Service-Id") for request, _ in upstream.calls]
        assert services == [b"eth", b"poly", None]

    async def test_options_belong_to_the_balancer(self) -> None:
        async with pathlb.Balancer([URL]) as balancer:
            with pytest.raises(pathlb.ConfigError, match="deadline: belongs to the Balancer"):
                AsyncBalancedProvider(balancer, deadline=1.0)

    async def test_web3s_own_async_with_is_not_for_providers_of_this_kind(self) -> None:
        """When it is one day, the docstring, the README and the example may use it."""
        provider = AsyncBalancedProvider([URL])
        with pytest.raises(Web3ValidationError, match="PersistentConnectionProvider"):
            await AsyncWeb3(provider).__aenter__()


class Slow:
    """A body that suspends before each of its parts, and while it is closed."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.closing = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._content), 20):
            await asyncio.sleep(0)
            yield self._content[start : start + 20]

    async def aclose(self) -> None:
        self.closing = True
        await asyncio.sleep(0)


@pytest.mark.asyncio
class TestCancelling:
    @pytest.mark.parametrize("by", ["task", "scope"])
    async def test_at_every_await_nothing_is_left_in_flight(self, by: str) -> None:
        """A task is cancelled once; a scope cancels every await that is left in it."""
        bodies: list[Slow] = []

        async def answer(request: Request, extra: Headers) -> Reply:
            await asyncio.sleep(0)
            bodies.append(Slow(json.dumps(result("0x10")).encode()))
            return Reply(200, [], bodies[-1])

        async with provider_of(ScriptedUpstream(answer)) as provider:
            w3 = AsyncWeb3(provider)

            async def ask(scope: anyio.CancelScope) -> Any:
                with scope:
                    return await w3.eth.block_number

            cancelled = 0
            for turns in itertools.count():
                scope = anyio.CancelScope()
                task = asyncio.create_task(ask(scope))
                for _ in range(turns):
                    await asyncio.sleep(0)
                if task.done():
                    break
                if by == "task":
                    task.cancel()
                else:
                    scope.cancel()
                await asyncio.wait([task])
                cancelled += task.cancelled() or task.result() is None
                [endpoint] = provider.balancer.snapshot().endpoints
                assert endpoint.in_flight == 0
                assert endpoint.counts["failed"] == 0
                assert all(body.closing for body in bodies)
            assert await task == 16
            assert cancelled >= 4, "before the attempt, in it, and in the body"
            assert len(bodies) >= 3


@pytest.mark.asyncio
class TestIsConnected:
    async def test_it_is(self) -> None:
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([reply(VERSION)])))
        assert await w3.is_connected() is True

    @pytest.mark.parametrize(
        "instead",
        [
            UpstreamError(Fault.CONNECT, Sent.NOT_SENT, URL, "refused"),
            reply(b"bad gateway", 502),
            reply(b""),
            reply(failure(-31001, "no endpoint"), 500),
        ],
    )
    async def test_it_is_not(self, instead: Any) -> None:
        upstream = ScriptedUpstream(lambda request, extra: instead)
        assert await AsyncWeb3(provider_of(upstream)).is_connected() is False

    async def test_it_says_why_not_when_asked(self) -> None:
        down = ScriptedUpstream([reply(b"bad gateway", 502)])
        with pytest.raises(ProviderConnectionError, match="replied 502 without a JSON-RPC answer") as caught:
            await AsyncWeb3(provider_of(down)).is_connected(show_traceback=True)
        assert isinstance(caught.value.__cause__, pathlb.PathlbError)

    async def test_not_after_disconnect(self) -> None:
        w3 = AsyncWeb3(provider_of(answering(lambda call: VERSION)))
        assert await w3.is_connected()
        await w3.provider.disconnect()
        assert not await w3.is_connected()


class TestImporting:
    def test_pathlb_does_not_need_web3(self) -> None:
        assert _python("import sys, pathlb; print('web3' in sys.modules)").stdout == "False\n"

    def test_without_web3_the_error_says_what_to_install(self) -> None:
        failed = _python("import sys; sys.modules['web3'] = None; import pathlb.web3")
        assert failed.stderr.endswith("ImportError: pathlb.web3 needs web3.py: pip install 'pathlb[web3]'\n")

    def test_a_web3_that_is_broken_is_not_called_missing(self) -> None:
        failed = _python("import sys; sys.modules['eth_utils'] = None; import pathlb.web3")
        assert "eth_utils" in failed.stderr
        assert "pip install" not in failed.stderr

    def test_importing_it_warns_of_nothing(self) -> None:
        assert _python("import pathlb.web3").stderr == ""


def _python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
