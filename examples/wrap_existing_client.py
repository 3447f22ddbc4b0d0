"""Putting pathlb under an httpx client you already have: under all of it, or under one URL prefix.

    python examples/wrap_existing_client.py http://10.0.0.1:3069 http://10.0.0.2:3069

Without URLs it starts emulated gateways of its own.
"""

import asyncio
import sys

import httpx

import pathlb
from pathlb.testing import Fleet


async def main(gateways: list[str], elsewhere: str) -> None:
    # The balancer is yours: several clients may share it, and closing them does not close it.
    async with pathlb.Balancer(gateways) as balancer:
        transport = pathlb.BalancedTransport(balancer)

        # All of a client: one argument more. The host is a logical name; it is sent as the Host header.
        async with httpx.AsyncClient(transport=transport, base_url="http://path-gateway") as client:
            response = await client.get("/v1/status")
            print("whole client:", response.status_code, "from", answered_by(response))

        # One URL prefix of a client: everything else goes where it always went.
        async with httpx.AsyncClient(mounts={"all://path-gateway": transport}) as client:
            response = await client.get("http://path-gateway/v1/status")
            print("mounted:", response.status_code, "from", answered_by(response))
            response = await client.get(elsewhere)
            print("elsewhere:", response.status_code, "from", response.url, "as ever")


def answered_by(response: httpx.Response) -> str:
    """The instance that answered: the last attempt's."""
    return str(response.extensions["pathlb"]["attempts"][-1].endpoint)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(main(sys.argv[1:], elsewhere=sys.argv[1]))
    else:
        with Fleet(4) as fleet:
            *gateways, other = fleet.urls
            asyncio.run(main(gateways, elsewhere=other))
