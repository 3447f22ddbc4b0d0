"""web3.py over several PATH gateways, one of which is killed with calls in flight.

    python examples/web3_provider.py http://10.0.0.1:3069 http://10.0.0.2:3069

Without URLs it starts five emulated gateways of its own. Needs `pip install pathlb[web3]`.
"""

import asyncio
import sys
from collections.abc import Callable

from web3 import AsyncWeb3
from web3.exceptions import Web3RPCError

from pathlb.testing import Fleet
from pathlb.web3 import AsyncBalancedProvider


async def main(urls: list[str], kill_one: Callable[[], None] | None = None) -> None:
    # web3 keeps `async with AsyncWeb3(...)` for its WebSocket provider; so here the provider is what is entered.
    async with AsyncBalancedProvider(urls, service="eth", profile="path") as provider:
        w3 = AsyncWeb3(provider)
        print("chain", await w3.eth.chain_id)

        # Reads are sent again, elsewhere, when their gateway fails; transactions only when they provably never left.
        asked = [asyncio.ensure_future(w3.eth.get_block_number()) for _ in range(100)]
        if kill_one is not None:
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            kill_one()  # the others are under way
        heights = await asyncio.gather(*asked)
        print(f"{len(heights)} of {len(asked)} answered: block {max(heights)}")

        async with w3.batch_requests() as batch:
            batch.add(w3.eth.get_block_number())
            batch.add(w3.eth.get_block_number())
            print("a batch:", await batch.async_execute())

        # One balancer serves many providers: here, one a service. What a gateway says in an error reply is not lost.
        other = AsyncWeb3(AsyncBalancedProvider(provider.balancer, service="no-such-chain"))
        try:
            await other.eth.get_block_number()
        except Web3RPCError as error:
            print("refused:", error)

        for endpoint in provider.balancer.snapshot().endpoints:
            print(f"  {endpoint.url}  {endpoint.state}, {endpoint.counts['ok']} ok, {endpoint.counts['failed']} failed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(sys.argv[1:]))
    else:
        with Fleet(5, path=["eth"], workers=2) as fleet:
            asyncio.run(main(fleet.urls, kill_one=fleet[0].kill))
