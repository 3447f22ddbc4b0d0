"""web3.py, all of it, on a real chain (eth-tester on py-evm) behind five emulated PATH gateways on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
import pytest_asyncio
from eth_account import Account
from eth_typing import ChecksumAddress
from web3 import AsyncWeb3
from web3.exceptions import ContractLogicError, Web3RPCError
from web3.middleware import SignAndSendRawMiddlewareBuilder
from web3_chain import CHAIN_ID, COUNTER_ABI, COUNTER_BYTECODE, KEY, NOBODY, RICH, WEALTH, Chain

import pathlb
from pathlb.testing import Fleet, Mode, ServiceMode
from pathlb.web3 import AsyncBalancedProvider, BadReply

pytestmark = pytest.mark.asyncio

W3 = AsyncWeb3[AsyncBalancedProvider]

TRANSFER = {
    "to": NOBODY,
    "value": 5,
    "gas": 21_000,
    "maxFeePerGas": 10**10,
    "maxPriorityFeePerGas": 10**9,
    "chainId": CHAIN_ID,
}


@pytest.fixture(params=["no profile", "path"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"profile": "path"} if request.param == "path" else {}


@pytest_asyncio.fixture
async def w3(fleet: Fleet, options: dict[str, Any]) -> AsyncIterator[W3]:
    async with AsyncBalancedProvider(fleet.urls, service="eth", **options) as provider:
        yield AsyncWeb3(provider)


def signed_transfer(nonce: int) -> bytes:
    return bytes(Account.sign_transaction({**TRANSFER, "nonce": nonce}, KEY).raw_transaction)


def requests(fleet: Fleet) -> list[int]:
    return [sum(gateway.stats().by_status.values()) for gateway in fleet]


async def reads_go_on(w3: W3, then: Callable[[], object]) -> list[int]:
    """Twenty readers at once; in the midst of it something happens. The answers."""
    answers: list[int] = []
    well_under_way = asyncio.Event()

    async def read() -> None:
        for _ in range(20):
            answers.append(await w3.eth.get_balance(RICH))
            if len(answers) == 100:
                well_under_way.set()

    readers = [asyncio.create_task(read()) for _ in range(20)]
    await well_under_way.wait()
    await asyncio.to_thread(then)
    assert len(answers) < 400
    await asyncio.gather(*readers)
    return answers


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 (what changes is in another thread)
            await asyncio.sleep(0.001)


class TestReading:
    async def test_the_state_of_the_chain(self, w3: W3, fleet: Fleet) -> None:
        assert await w3.eth.chain_id == CHAIN_ID
        assert await w3.eth.block_number == 0
        assert await w3.eth.get_balance(RICH) == WEALTH
        assert await w3.eth.get_transaction_count(RICH) == 0
        block = await w3.eth.get_block("latest")
        assert block.number == (await w3.eth.get_block(block["hash"]))["number"] == 0
        assert (await w3.client_version).startswith("EthereumTester")
        for gateway in fleet:
            for request in gateway.received():
                if request.method == "POST":
                    assert (b"Target-Service-Id", b"eth") in request.headers

    async def test_reads_are_spread_over_the_gateways(self, w3: W3, fleet: Fleet) -> None:
        before = requests(fleet)
        assert await asyncio.gather(*(w3.eth.get_balance(RICH) for _ in range(50))) == [WEALTH] * 50
        assert all(after - since >= 5 for after, since in zip(requests(fleet), before, strict=True))


class TestWriting:
    async def test_a_signed_transaction_and_its_receipt(self, w3: W3, chain: Chain) -> None:
        sent = await w3.eth.send_raw_transaction(signed_transfer(0))
        receipt = await w3.eth.wait_for_transaction_receipt(sent)
        assert (receipt["status"], receipt["blockNumber"], receipt["transactionHash"]) == (1, 1, sent)
        assert await w3.eth.get_balance(NOBODY) == 5
        assert (await w3.eth.get_transaction(sent))["to"] == NOBODY
        assert chain.calls["eth_sendRawTransaction"] == 1

    async def test_a_contract(self, w3: W3) -> None:
        """Deployed and used through middleware that signs, with web3 asking for nonce, gas and fees by itself."""
        account = Account.from_key(KEY)
        w3.middleware_onion.inject(SignAndSendRawMiddlewareBuilder.build(account), layer=0)
        w3.eth.default_account = account.address
        deployed = await w3.eth.contract(abi=COUNTER_ABI, bytecode=COUNTER_BYTECODE).constructor().transact()
        address = (await w3.eth.wait_for_transaction_receipt(deployed))["contractAddress"]
        counter = w3.eth.contract(address, abi=COUNTER_ABI)
        assert await counter.functions.number().call() == 0
        for amount in (5, 2):
            added = await counter.functions.add(amount).transact()
            assert (await w3.eth.wait_for_transaction_receipt(added))["status"] == 1
        assert await counter.functions.number().call() == 7
        with pytest.raises(ContractLogicError, match="execution reverted"):
            await counter.functions.add(0).call()

    async def test_a_write_whose_answer_is_lost_is_not_made_twice(self, w3: W3, fleet: Fleet, chain: Chain) -> None:
        for gateway in fleet:
            gateway.set_mode(Mode.RESET)
        with pytest.raises(pathlb.UpstreamError):
            await w3.eth.send_raw_transaction(signed_transfer(0))
        assert chain.calls["eth_sendRawTransaction"] == 1
        for gateway in fleet:
            gateway.restore()
        assert await w3.eth.get_transaction_count(RICH) == 1


class TestBatches:
    async def test_each_call_gets_its_own_answer(self, w3: W3) -> None:
        """PATH gives the answers in any order."""
        await w3.eth.send_raw_transaction(signed_transfer(0))
        for _ in range(20):
            async with w3.batch_requests() as batch:
                batch.add(w3.eth.get_block_number())
                batch.add(w3.eth.get_balance(NOBODY))
                batch.add(w3.eth.get_transaction_count(RICH))
                batch.add(w3.eth.get_block(0))
                number, balance, count, block = await batch.async_execute()
            assert (number, balance, count, block["number"]) == (1, 5, 1, 0)

    async def test_the_error_of_one_is_raised(self, w3: W3) -> None:
        async with w3.batch_requests() as batch:
            batch.add(w3.eth.get_block_number())
            batch.add(w3.eth.get_code("0x" + "11" * 20, 99))
            with pytest.raises(Web3RPCError) as caught:
                await batch.async_execute()
        assert caught.value.rpc_response is not None
        assert caught.value.rpc_response["error"]["code"] == -32000

    async def test_the_gateways_error_for_a_batch_is_kept(self, w3: W3, fleet: Fleet) -> None:
        fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.9)
        async with w3.batch_requests() as batch:
            for _ in range(50):
                batch.add(w3.eth.get_block_number())
            with pytest.raises(Web3RPCError, match="Failed to marshal batch response"):
                await batch.async_execute()


class TestFailing:
    async def test_an_error_in_a_200_is_the_chains_word(self, w3: W3, chain: Chain) -> None:
        await w3.eth.send_raw_transaction(signed_transfer(0))
        with pytest.raises(Web3RPCError, match="nonce") as caught:
            await w3.eth.send_raw_transaction(signed_transfer(0))
        assert caught.value.rpc_response is not None
        assert caught.value.rpc_response["error"]["code"] == -32000
        assert chain.calls["eth_sendRawTransaction"] == 2

    @pytest.mark.parametrize("mode", [ServiceMode.NO_SESSION, ServiceMode.SUPPLIERS_FAIL])
    async def test_the_error_in_a_500_is_kept(self, w3: W3, fleet: Fleet, mode: ServiceMode) -> None:
        fleet.set_service("eth", mode)
        with pytest.raises(Web3RPCError, match=r"internal error: .*service") as caught:
            await w3.eth.block_number
        assert caught.value.rpc_response is not None
        assert caught.value.rpc_response["error"]["code"] == -31001

    async def test_a_service_that_fails_on_one_instance_is_asked_of_another(self, w3: W3, fleet: Fleet) -> None:
        fleet[0].set_service("eth", ServiceMode.NO_SESSION)
        assert await asyncio.gather(*(w3.eth.get_balance(RICH) for _ in range(20))) == [WEALTH] * 20

    async def test_a_service_nobody_has(self, fleet: Fleet, options: dict[str, Any]) -> None:
        async with AsyncBalancedProvider(fleet.urls, service="solana", **options) as provider:
            with pytest.raises(Web3RPCError, match="Service 'solana' is not configured"):
                await AsyncWeb3(provider).eth.block_number

    async def test_replies_of_something_in_between(self, w3: W3, fleet: Fleet) -> None:
        for gateway in fleet:
            gateway.set_mode(Mode.FAIL, status=502)
        with pytest.raises(BadReply, match=r"replied 502 without a JSON-RPC answer: .*Bad Gateway") as caught:
            await w3.eth.block_number
        assert caught.value.endpoint in fleet.urls
        assert len(caught.value.attempts) > 1

    async def test_an_empty_200(self, w3: W3, fleet: Fleet) -> None:
        fleet.set_service("eth", ServiceMode.EMPTY)
        with pytest.raises(BadReply, match="replied 200 without a JSON-RPC answer: ''"):
            await w3.eth.block_number


class TestFaults:
    async def test_one_gateway_is_killed_with_reads_going_on(self, w3: W3, fleet: Fleet) -> None:
        assert await reads_go_on(w3, fleet[0].kill) == [WEALTH] * 400

    async def test_one_gateway_hangs_with_reads_going_on(self, w3: W3, fleet: Fleet) -> None:
        assert await reads_go_on(w3, lambda: fleet[0].set_mode(Mode.HANG)) == [WEALTH] * 400

    async def test_one_gateway_fails_fast_with_reads_going_on(self, w3: W3, fleet: Fleet) -> None:
        assert await reads_go_on(w3, lambda: fleet[0].set_mode(Mode.FAIL, status=502)) == [WEALTH] * 400

    async def test_a_cancelled_call_leaves_nothing_in_flight(self, w3: W3, fleet: Fleet) -> None:
        for gateway in fleet:
            gateway.set_mode(Mode.HANG)
        calls = [asyncio.create_task(w3.eth.get_balance(RICH)) for _ in range(10)]
        await until(lambda: sum(gateway.stats().in_flight for gateway in fleet) == 10)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        snapshot = w3.provider.balancer.snapshot()
        assert sum(endpoint.in_flight for endpoint in snapshot.endpoints) == 0


class TestConnected:
    async def test_as_long_as_one_gateway_answers(self, w3: W3, fleet: Fleet) -> None:
        assert await w3.is_connected()
        for gateway in list(fleet)[1:]:
            gateway.kill()
        assert await w3.is_connected()

    async def test_not_when_none_does(self, w3: W3, fleet: Fleet) -> None:
        for gateway in fleet:
            gateway.kill()
        assert not await w3.is_connected()


class TestDefaults:
    async def test_the_middleware_of_web3_is_all_there(self, w3: W3) -> None:
        assert [name for _, name in w3.middleware_onion.middleware] == [
            name for _, name in w3.manager.get_default_middleware()
        ]
        block = await w3.eth.get_block("latest")
        assert block.baseFeePerGas == block["baseFeePerGas"] > 0  # attrdict

    async def test_names_are_resolved(self, fleet: Fleet) -> None:
        class Names:
            w3: Any = None

            async def address(self, name: str) -> ChecksumAddress | None:
                return {"rich.eth": ChecksumAddress(RICH)}.get(name)

        async with AsyncBalancedProvider(fleet.urls, service="eth") as provider:
            w3 = AsyncWeb3(provider, ens=Names())
            assert await w3.eth.get_balance("rich.eth") == WEALTH

    async def test_filters_with_sticky_filters(self) -> None:
        """Every one of these gateways has filters of its own, as real ones do."""
        with Fleet(5, path=["eth"]) as fleet:
            sticky = pathlb.JSONRPC(sticky_filters=True)
            async with AsyncBalancedProvider(fleet.urls, service="eth", jsonrpc=sticky) as provider:
                w3 = AsyncWeb3(provider)
                filters = [await w3.eth.filter("latest") for _ in range(5)]
                for one in filters * 3:
                    assert await one.get_new_entries() == []
                assert await w3.eth.uninstall_filter(filters[0].filter_id)
