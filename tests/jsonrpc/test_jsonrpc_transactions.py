"""A raw transaction may go to a second endpoint, and "already known" from there is the success it stands for."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import Any

import pytest
from eth_account import Account
from eth_utils import keccak
from jsonrpc_helpers import (
    JSON,
    LOST,
    NOT_SENT,
    OK,
    A,
    B,
    Parts,
    Road,
    answer,
    attempt,
    call,
    error,
    header,
    layer,
    post,
    read,
    reply,
)

import pathlb
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request, WholeBody
from pathlb.jsonrpc import JSONRPC, JSONRPCLayer
from pathlb.testing import ScriptedUpstream

pytestmark = pytest.mark.anyio

KEY = "0x" + "11" * 32
COMMON: dict[str, Any] = {"nonce": 3, "gas": 21_000, "to": "0x" + "22" * 20, "value": 1, "chainId": 1}
FEES = {"maxFeePerGas": 10, "maxPriorityFeePerGas": 1}
SIGNED = {
    "legacy": Account.sign_transaction({**COMMON, "gasPrice": 10}, KEY),
    "type 1": Account.sign_transaction({**COMMON, "gasPrice": 10, "type": 1, "accessList": []}, KEY),
    "type 2": Account.sign_transaction({**COMMON, **FEES, "type": 2}, KEY),
}
RAW = {name: "0x" + bytes(signed.raw_transaction).hex() for name, signed in SIGNED.items()}
HASH = {name: "0x" + bytes(signed.hash).hex() for name, signed in SIGNED.items()}
FAILED_OVER = [attempt(A, LOST), attempt(B)]

KNOWN = [
    "already known",
    "ALREADY_EXISTS: already known",
    "AlreadyKnown",
    "Known transaction",
    "known transaction: 4f2a",
    "INTERNAL_ERROR: existing tx with same hash",
    "Transaction with the same hash was already imported.",
]
NOT_KNOWN = [
    "nonce too low",
    "nonce too low: next nonce 4, tx nonce 3",
    "replacement transaction underpriced",
    "transaction underpriced",
    "unknown transaction type",
    "Unknown transaction",
    "sender already knowns better",
    "could not replace existing tx",
    "",
]


def resending(road: Road) -> JSONRPCLayer:
    return layer(road, resend_transactions=True)


def sent(raw: str = RAW["type 2"], **options: Any) -> Request:
    return post(call("eth_sendRawTransaction", raw), **options)


class TestSending:
    async def test_it_may_be_sent_twice(self) -> None:
        road = Road(lambda request: reply(answer(1, HASH["type 2"])))
        request = sent()
        found = await resending(road).send(request)
        assert road.requests[0].idempotent is True
        assert request.idempotent is None
        assert found.body is road.bodies[0]  # still streaming: a success costs no look into the reply
        assert found.body.closed == 0

    async def test_not_if_the_caller_says_no(self) -> None:
        road = Road(lambda request: reply(error(1, "already known"), attempts=FAILED_OVER))
        request = sent(idempotent=False)
        found = await resending(road).send(request)
        assert road.requests[0] is request
        assert await read(found) == error(1, "already known")

    async def test_not_in_a_batch(self) -> None:
        road = Road(lambda request: reply([error(1, "already known")], attempts=FAILED_OVER))
        request = post([call("eth_sendRawTransaction", RAW["type 2"])])
        found = await resending(road).send(request)
        assert road.requests[0] is request
        assert await read(found) == [error(1, "already known")]


class TestAlreadyKnown:
    @pytest.mark.parametrize("kind", list(SIGNED))
    async def test_the_reply_becomes_the_hash(self, kind: str) -> None:
        road = Road(lambda request: reply(error(1, "already known"), attempts=FAILED_OVER, headers=[(b"X", b"1")]))
        found = await resending(road).send(sent(RAW[kind]))
        assert found.status == 200
        assert header(found, b"x") == b"1"
        assert header(found, b"content-length") == b"%d" % len(b"".join([part async for part in found.body]))
        assert isinstance(found.body, WholeBody)
        assert json.loads(found.body.content) == answer(1, HASH[kind])
        assert list(found.attempts) == FAILED_OVER
        assert road.closed_once

    async def test_a_type_4_transaction_has_the_hash_of_all_its_bytes(self) -> None:
        road = Road(lambda request: reply(error(1, "already known"), attempts=FAILED_OVER))
        result = (await read(await resending(road).send(sent("0x04c0"))))["result"]
        assert result == "0x" + keccak(b"\x04\xc0").hex()

    @pytest.mark.parametrize("message", KNOWN)
    async def test_in_the_words_of_any_node(self, message: str) -> None:
        road = Road(lambda request: reply(error(1, message), attempts=FAILED_OVER))
        assert await read(await resending(road).send(sent())) == answer(1, HASH["type 2"])

    @pytest.mark.parametrize("status", [400, 500])
    async def test_whatever_the_status(self, status: int) -> None:
        road = Road(lambda request: reply(error(1, "already known"), status=status, attempts=FAILED_OVER))
        found = await resending(road).send(sent())
        assert (found.status, found.reason) == (200, b"OK")

    @pytest.mark.parametrize("key", ["a\u00e9\n", 0, -1, 2**60, "1"])
    async def test_the_id_is_the_requests(self, key: Any) -> None:
        road = Road(lambda request: reply(error(None, "already known"), attempts=FAILED_OVER))
        found = await read(await resending(road).send(post(call("eth_sendRawTransaction", RAW["type 2"], id=key))))
        assert found == answer(key, HASH["type 2"])

    async def test_a_compressed_reply(self) -> None:
        content = gzip.compress(json.dumps(error(1, "already known")).encode())
        road = Road(lambda request: reply(content, headers=[(b"Content-Encoding", b"gzip")], attempts=FAILED_OVER))
        request = post(call("eth_sendRawTransaction", RAW["type 2"]), [*JSON, (b"Accept-Encoding", b"br, gzip")])
        found = await resending(road).send(request)
        assert header(road.requests[0], b"accept-encoding") == b"gzip"
        assert header(found, b"content-encoding") is None
        assert await read(found) == answer(1, HASH["type 2"])


class TestAsItCame:
    @pytest.mark.parametrize("message", NOT_KNOWN)
    async def test_other_errors(self, message: str) -> None:
        road = Road(lambda request: reply(error(1, message), attempts=FAILED_OVER))
        found = await resending(road).send(sent())
        assert await read(found) == error(1, message)
        assert road.closed_once

    @pytest.mark.parametrize(
        "attempts",
        [
            [attempt(A)],
            [attempt(A, NOT_SENT), attempt(B)],
            [attempt(A, NOT_SENT), attempt(B, LOST)],
            [attempt(A, replace(OK, status=500, unprocessed=True)), attempt(B)],
        ],
    )
    async def test_known_before_anybody_can_have_had_it_from_us(self, attempts: Any) -> None:
        road = Road(lambda request: reply(error(1, "already known"), attempts=attempts))
        found = await resending(road).send(sent())
        assert found.body is road.bodies[0]
        assert await read(found) == error(1, "already known")

    @pytest.mark.parametrize(
        "content",
        [
            answer(1, "0xab"),
            [error(1, "already known")],
            {"error": "already known"},
            {"error": {"message": 7}},
            {"error": {}},
            b"already known",
            b"",
            b"\xff",
        ],
    )
    async def test_replies_that_are_no_error_object(self, content: Any) -> None:
        expected = content if isinstance(content, bytes) else json.dumps(content).encode()
        road = Road(lambda request: reply(content, attempts=FAILED_OVER))
        found = await resending(road).send(sent())
        assert b"".join([part async for part in found.body]) == expected

    @pytest.mark.parametrize(
        "params",
        [
            ["0x03" + "c0" * 40],  # with its blobs, which the hash leaves out
            ["0x71c0"],  # zkSync's
            ["0xff"],
            ["0x"],
            ["0x0"],
            ["0xzz"],
            [RAW["type 2"][2:]],
            [1],
            [],
            [RAW["type 2"], 1],
            None,
            {"raw": RAW["type 2"]},
        ],
        ids=lambda params: json.dumps(params)[:30],
    )
    async def test_transactions_whose_hash_is_not_known_here(self, params: Any) -> None:
        road = Road(lambda request: reply(error(1, "already known"), attempts=FAILED_OVER))
        found = await resending(road).send(post(call("eth_sendRawTransaction") | {"params": params}))
        assert await read(found) == error(1, "already known")
        assert road.requests[0].idempotent is True

    @pytest.mark.parametrize("key", [None, 1.5, [1], True])
    async def test_ids_that_are_no_ids(self, key: Any) -> None:
        road = Road(lambda request: reply(error(key, "already known"), attempts=FAILED_OVER))
        found = await resending(road).send(post(call("eth_sendRawTransaction", RAW["type 2"], id=key)))
        assert await read(found) == error(key, "already known")

    async def test_a_reply_that_breaks_off_is_an_error(self) -> None:
        broken = UpstreamError(Fault.READ, Sent.MAYBE_SENT, B, "scripted")
        road = Road(lambda request: reply(b"", body=Parts(b"{", error=broken), attempts=FAILED_OVER))
        with pytest.raises(UpstreamError) as caught:
            await resending(road).send(sent())
        assert list(caught.value.attempts) == FAILED_OVER
        assert road.closed_once


class TestOverABalancer:
    async def test_failed_over_and_known(self) -> None:
        def lose(request: Request, extra: Headers) -> Exception:
            return UpstreamError(Fault.READ, Sent.MAYBE_SENT, A, "scripted")

        def knows(request: Request, extra: Headers) -> Reply:
            return reply(error(1, "already known"))

        upstreams = {A: ScriptedUpstream(lose), B: ScriptedUpstream(knows)}
        factory = ScriptedUpstream.factory(upstreams)
        async with pathlb.Balancer([A, B], policy=pathlb.RoundRobin(), upstream=factory) as balancer:
            wrapped = JSONRPCLayer(JSONRPC(resend_transactions=True), balancer.send)
            for _ in range(2):
                found = await wrapped.send(sent())
                failed_over = len(found.attempts) == 2
                assert await read(found) == (answer(1, HASH["type 2"]) if failed_over else error(1, "already known"))
            assert upstreams[A].count > 0
            assert all(endpoint["in_flight"] == 0 for endpoint in balancer.snapshot().to_dict()["endpoints"])
