"""Several gateway instances behind one client, and one of them dies.

    python examples/quickstart.py http://10.0.0.1:3069 http://10.0.0.2:3069

Without URLs it starts three emulated gateways of its own.
"""

import asyncio
import sys
from collections.abc import Callable

import pathlb
from pathlb.testing import Fleet

BLOCK_NUMBER = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}


async def main(urls: list[str], kill_one: Callable[[], None] | None = None) -> None:
    # It is an httpx.AsyncClient: everything you know of that works. A JSON-RPC read is a POST that may be sent twice,
    # which only you can know.
    async with pathlb.AsyncClient(urls, headers={"Target-Service-Id": "eth"}, idempotent=True) as client:
        for number in range(10):
            if number == 5 and kill_one is not None:
                kill_one()
            response = await client.post("/v1", json=BLOCK_NUMBER)
            response.raise_for_status()
            # Every answer tells what was tried, why there, and what came of it.
            print(number, *response.extensions["pathlb"]["attempts"], sep="  ")

        print("at the end:")
        for endpoint in client.balancer.snapshot().endpoints:
            print(f"  {endpoint.url}  {endpoint.state}, {endpoint.counts['ok']} ok, {endpoint.counts['failed']} failed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(sys.argv[1:]))
    else:
        with Fleet(3) as fleet:
            asyncio.run(main(fleet.urls, kill_one=fleet[0].kill))
