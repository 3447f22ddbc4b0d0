"""Every reply of the corpus against httpx's own transport and pathlb's pool: the same outcome, or a difference with a
reason; and the same outcome however the network cuts it up.
"""

from __future__ import annotations

import pytest
from http1_corpus import CASES, Case, cuts
from http1_differences import DIFFERENCES
from http1_kit import Observed, ReplayServer, Script, cut, observe, quiet

from pathlb.core.model import Endpoint
from pathlb.upstream.base import UpstreamFactory
from pathlb.upstream.http1 import Http1Upstream
from pathlb.upstream.transport import TransportUpstreams

pytestmark = pytest.mark.anyio


async def outcome(make: UpstreamFactory, case: Case) -> Observed:
    """What a new client makes of the case, delivered in one piece."""
    async with quiet(), ReplayServer() as server:
        upstream = make(Endpoint(server.url))
        try:
            return await observe(upstream, server, case.method, Script([case.reply], case.end))
        finally:
            await upstream.aclose()
            await server.deserted()


def test_names_are_unique_and_every_difference_has_a_case() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert DIFFERENCES.keys() <= names


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_as_httpx(case: Case) -> None:
    ours = await outcome(Http1Upstream, case)
    httpx = await outcome(TransportUpstreams(trust_env=False), case)
    assert ours.then in ("reused", "fresh")
    if case.name in DIFFERENCES:
        expected, _ = DIFFERENCES[case.name]
        assert str(ours) == expected
        assert ours != httpx, "no difference any more: take it off the list"
        return
    assert ours == httpx
    # Of a body that breaks off, one may have handed out more than the other.
    shorter, longer = sorted([ours.result.partial, httpx.result.partial], key=len)
    assert longer.startswith(shorter)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_same_however_it_is_cut(case: Case) -> None:
    whole = await outcome(Http1Upstream, case)
    async with quiet(), ReplayServer() as server:
        upstream = Http1Upstream(Endpoint(server.url))
        try:
            for at in cuts(case.reply):
                script = Script(cut(case.reply, at), case.end)
                assert await observe(upstream, server, case.method, script) == whole, f"cut at byte {at}"
            if len(case.reply) <= 300:
                script = Script(cut(case.reply, *range(1, len(case.reply))), case.end)
                assert await observe(upstream, server, case.method, script) == whole, "byte by byte"
        finally:
            await upstream.aclose()
            await server.deserted()
