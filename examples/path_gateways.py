"""PATH gateways: one loses a service, then all of them do; nobody's other services notice.

    python examples/path_gateways.py

It runs against five emulated gateways of its own. Needs nothing beyond pathlb.
"""

import asyncio

import pathlb
from pathlb.testing import Fleet, ServiceMode

CALL = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}


async def ask(client: pathlb.AsyncClient, service: str, times: int = 100) -> str:
    """How a service does: its statuses, and how many attempts and relays behind the gateways that took."""
    replies = [await client.post("/v1", json=CALL, headers={"Target-Service-Id": service}) for _ in range(times)]
    attempts = [attempt for reply in replies for attempt in reply.extensions["pathlb"]["attempts"]]
    relays = sum(attempt.outcome.relays or 0 for attempt in attempts)
    fine = sum(reply.status_code == 200 for reply in replies)
    return f"{service}: {fine} of {times} fine, {len(attempts)} attempts, {relays} relays"


def states(client: pathlb.AsyncClient) -> None:
    for endpoint in client.balancer.snapshot().endpoints:
        print(f"  {endpoint.url} is {endpoint.state}; services that are not: {dict(endpoint.services) or 'none'}")


async def main(fleet: Fleet) -> None:
    profile = pathlb.PATHProfile(services=["eth", "solana"])
    async with pathlb.AsyncClient(fleet.urls, profile=profile) as client:
        print("all well;", await ask(client, "eth"), "and", await ask(client, "solana"))

        fleet[0].set_service("eth", ServiceMode.NO_SESSION)
        print("eth is lost on one gateway;", await ask(client, "eth"), "and", await ask(client, "solana"))
        states(client)

        fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        print("eth's suppliers fail everywhere;", await ask(client, "eth"), "and", await ask(client, "solana"))
        states(client)


if __name__ == "__main__":
    with Fleet(5, path=["eth", "solana"]) as running:
        asyncio.run(main(running))
