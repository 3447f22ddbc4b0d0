"""This process runs out of descriptors: a local fault, which no endpoint is blamed for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pathlb.testing import Fleet, ServiceTime

CHILD = """
import json, os, resource, sys
import anyio, httpx
import pathlb
from pathlb.core.events import BreakerChanged, Ejected, Observed
from pathlb.core.model import Cause, Sent

backend, *urls = sys.argv[1:]

async def main():
    seen = []
    statuses, errors = [], []
    async with pathlb.AsyncClient(urls, trust_env=False, timeout=httpx.Timeout(20.0), deadline=20.0) as client:
        client.balancer.subscribe(seen.append)
        await client.get("/")  # imports and whatever else needs descriptors

        async def one(method, index):
            try:
                response = await client.request(method, "/", headers={"X-Request-Id": f"{method}-{index}"})
                statuses.append(response.status_code)
            except httpx.ConnectError as exc:
                errors.append([[a.outcome.cause.value, a.sent.value] for a in exc.attempts])

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
        async with anyio.create_task_group() as group:
            for index in range(30):
                group.start_soon(one, "GET", index)
                group.start_soon(one, "POST", index)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for index in range(10):
            assert (await client.get("/")).status_code == 200
        snapshot = client.balancer.snapshot().to_dict()
    local = [e for e in seen if isinstance(e, Observed) and e.outcome.cause is Cause.LOCAL]
    print(json.dumps({
        "statuses": statuses,
        "errors": errors,
        "local": len(local),
        "unsent": sum(e.outcome.sent is Sent.NOT_SENT for e in local),
        "blamed": [repr(e) for e in seen if isinstance(e, (BreakerChanged, Ejected))],
        "endpoints": snapshot["endpoints"],
    }))

anyio.run(main, backend=backend)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_out_of_descriptors(backend: str) -> None:
    with Fleet(2, service_time=ServiceTime.constant(0.05)) as fleet:
        child = subprocess.run(
            [sys.executable, "-W", "error", "-c", CHILD, backend, *fleet.urls],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        assert child.stderr == ""
        told = json.loads(child.stdout)
        assert told["local"] > 0  # it did run out
        assert told["unsent"] == told["local"]
        assert told["blamed"] == []
        assert [one["counts"]["failed"] for one in told["endpoints"]] == [0, 0]
        assert {one["state"] for one in told["endpoints"]} == {"ready"}
        assert {one["in_flight"] for one in told["endpoints"]} == {0}
        assert set(told["statuses"]) == {200}
        assert len(told["statuses"]) + len(told["errors"]) == 60
        for attempts in told["errors"]:
            assert attempts
            assert all(attempt == ["local fault", "not sent"] for attempt in attempts)
        assert max(fleet.seen().values()) == 1
