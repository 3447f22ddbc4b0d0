"""A picking policy of your own: stay in this zone while somebody there is eligible.

python examples/custom_policy.py
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import pathlb
from pathlb.core.model import Rng
from pathlb.core.policy import Candidate
from pathlb.testing import Fleet

C = TypeVar("C", bound=Candidate)


class PreferZone:
    """Least connections among the candidates of one zone; among all, when it has none.

    Health, breakers, ejections and retries are not a policy's business: it sees the eligible endpoints only.
    """

    def __init__(self, zone: str) -> None:
        self.name = f"prefer zone {zone}"  # the reason given for each pick
        self._zone = zone
        self._inner = pathlb.LeastConnections()

    def pick(self, candidates: Sequence[C], rng: Rng, /) -> C:
        near = [one for one in candidates if one.endpoint.metadata.get("zone") == self._zone]
        return self._inner.pick(near or candidates, rng)


async def main(fleet: Fleet) -> None:
    zones = dict(zip(fleet.urls, ("a", "a", "b"), strict=True))
    endpoints = [pathlb.Endpoint(url, metadata={"zone": zone}) for url, zone in zones.items()]
    async with pathlb.AsyncClient(endpoints, policy=PreferZone("a")) as client:

        async def zones_of(requests: int) -> dict[str, int]:
            responses = [await client.get("/v1/status") for _ in range(requests)]
            return dict(Counter(zones[one.extensions["pathlb"]["attempts"][-1].endpoint] for one in responses))

        print("all well:", await zones_of(12))
        fleet[0].kill()
        fleet[1].kill()
        print("zone a is down:", await zones_of(12))


if __name__ == "__main__":
    with Fleet(3) as fleet:
        asyncio.run(main(fleet))
