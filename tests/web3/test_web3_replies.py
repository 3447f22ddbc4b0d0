"""What a provider sends, and what it makes of each kind of reply."""

from __future__ import annotations

import gzip
import pickle
from typing import Any

import pytest
import web3
from web3 import AsyncWeb3
from web3.exceptions import BadResponseFormat, MethodUnavailable, Web3RPCError
from web3_kit import URL, answering, failure, provider_of, reply, result, sent

import pathlb
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request, WholeBody
from pathlb.testing import ScriptedUpstream
from pathlb.web3 import AsyncBalancedProvider, BadReply

pytestmark = pytest.mark.asyncio

NO_SUPPLIER = failure(-31001, "no endpoint for the service")


class TestRequests:
    async def test_a_call_is_a_post_of_json(self) -> None:
        upstream = ScriptedUpstream([reply(result("0x10"))])
        assert await AsyncWeb3(provider_of(upstream, service="eth")).eth.block_number == 16
        [(request, _)] = upstream.calls
        assert (request.method, request.target) == ("POST", b"/v1")
        assert request.headers == [
            (b"Content-Type", b"application/json"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", f"pathlb/{pathlb.__version__} web3.py/{web3.__version__}".encode()),
            (b"Target-Service-Id", b"eth"),
        ]
        assert request.idempotent is None, "what may be sent twice is for the balancer to say"
        assert sent(upstream) == [{"jsonrpc": "2.0", "id": 0, "method": "eth_blockNumber", "params": []}]

    async def test_path_and_headers_of_ones_own(self) -> None:
        upstream = ScriptedUpstream([reply(result("0x1"))])
        provider = provider_of(upstream, path="/v2/eth?a=b", headers={"user-agent": "mine/1", "App-Address": "pokt1"})
        await AsyncWeb3(provider).eth.chain_id
        [(request, _)] = upstream.calls
        assert request.target == b"/v2/eth?a=b"
        headers = {name.lower(): value for name, value in request.headers}
        assert len(headers) == len(request.headers)
        assert headers[b"user-agent"] == b"mine/1"
        assert headers[b"app-address"] == b"pokt1"
        assert b"target-service-id" not in headers

    @pytest.mark.parametrize(
        ("field", "arguments"),
        [
            ("path", {"path": "v1"}),
            ("path", {"path": "/v 1"}),
            ("path", {"path": "/ü"}),
            ("path", {"path": None}),
            ("service", {"service": ""}),
            ("service", {"service": "e th"}),
            ("service", {"service": 1}),
            ("service", {"service": "eth", "headers": {"target-service-id": "eth"}}),
            ("headers", {"headers": [("X-Size", "1")]}),
            ("headers", {"headers": {b"X-Size": "1"}, "service": "eth"}),
            ("headers", {"headers": {"X-Größe": "1"}}),
            ("headers", {"headers": {"X-Size": 1}}),
            ("headers", {"headers": {"X-Euro": "€"}}),
            ("deadline", {"deadline": 0}),
        ],
    )
    async def test_what_cannot_work_is_refused(self, field: str, arguments: dict[str, Any]) -> None:
        with pytest.raises(pathlb.ConfigError) as caught:
            AsyncBalancedProvider([URL], **arguments)
        assert caught.value.field == field

    async def test_a_bad_header_value_is_not_quoted(self) -> None:
        with pytest.raises(pathlb.ConfigError, match="Authorization") as caught:
            AsyncBalancedProvider([URL], headers={"Authorization": "Bearer €123"})
        assert "123" not in str(caught.value)


class TestAnswers:
    async def test_an_error_in_a_200_is_the_answer(self) -> None:
        upstream = ScriptedUpstream([reply(failure(-32000, "nonce too low"))])
        with pytest.raises(Web3RPCError, match="nonce too low") as caught:
            await AsyncWeb3(provider_of(upstream)).eth.block_number
        assert caught.value.rpc_response == failure(-32000, "nonce too low")

    @pytest.mark.parametrize("status", [400, 429, 500, 503])
    async def test_an_error_in_any_other_status_is_the_answer_too(self, status: int) -> None:
        """web3's own provider raises for the status, and the gateway's code and message are lost."""
        upstream = ScriptedUpstream([reply(NO_SUPPLIER, status)])
        with pytest.raises(Web3RPCError, match="no endpoint for the service") as caught:
            await AsyncWeb3(provider_of(upstream)).eth.block_number
        assert caught.value.rpc_response == NO_SUPPLIER
        assert upstream.count == 1

    async def test_web3_sees_its_own_kinds_of_error(self) -> None:
        upstream = ScriptedUpstream([reply(failure(-32601, "no such method"), 404)])
        with pytest.raises(MethodUnavailable):
            await AsyncWeb3(provider_of(upstream)).eth.block_number

    @pytest.mark.parametrize(
        ("status", "content"),
        [
            (502, "upstream connect error\n"),
            (200, ""),
            (200, "<html>welcome</html>"),
            (403, '{"error": "forbidden"}'),
            (400, '{"code": 400, "message": "bad"}'),
            (200, '[{"jsonrpc": "2.0", "id": 0, "result": "0x1"}]'),
            (200, '{"jsonrpc": "2.0", "id": 0}'),
            (200, '{"jsonrpc": "1.0", "id": 0, "result": "0x1"}'),
            (200, '"text"'),
            (200, "null"),
        ],
    )
    async def test_anything_else_says_who_replied_what(self, status: int, content: str) -> None:
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([reply(content.encode(), status)])))
        with pytest.raises(BadReply) as caught:
            await w3.eth.block_number
        error = caught.value
        assert isinstance(error, BadResponseFormat)
        assert isinstance(error, pathlb.PathlbError)
        assert (error.status, error.endpoint, error.body) == (status, URL, content)
        assert [attempt.endpoint for attempt in error.attempts] == [URL]
        said = f"{URL} replied {status} without a JSON-RPC answer: {content!r} [tried {URL} (only candidate): {status} "
        assert str(error).startswith(said)

    async def test_a_body_that_is_no_text(self) -> None:
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([reply(b"\xff{}", 500)])))
        with pytest.raises(BadReply) as caught:
            await w3.eth.block_number
        assert caught.value.body == "\ufffd{}"

    async def test_a_long_body_is_shown_to_500_characters(self) -> None:
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([reply("ü".encode() * 10_000, 502)])))
        with pytest.raises(BadReply) as caught:
            await w3.eth.block_number
        assert caught.value.body == "ü" * 500

    async def test_the_error_survives_pickling(self) -> None:
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([reply(b"gone", 502)])))
        with pytest.raises(BadReply) as caught:
            await w3.eth.block_number
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, BadReply)
        assert (str(again), again.status, again.attempts) == (str(caught.value), 502, caught.value.attempts)

    async def test_every_attempt_is_named(self) -> None:
        down = [ScriptedUpstream(lambda request, extra: reply(b"down", 503)) for _ in range(2)]
        w3 = AsyncWeb3(provider_of(*down, retry=pathlb.Retry(attempts=2, wait_base=0, wait_max=0)))
        with pytest.raises(BadReply) as caught:
            await w3.eth.block_number
        assert {attempt.endpoint for attempt in caught.value.attempts} == {URL, f"{URL}-1"}

    async def test_a_coded_body_is_an_error_that_says_so(self) -> None:
        coded = reply(gzip.compress(b"{}"), headers=[(b"content-encoding", b"gzip")])
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([coded])))
        with pytest.raises(BadReply, match="replied 200 with a body in the content coding 'gzip'") as caught:
            await w3.eth.block_number
        assert caught.value.body is None

    async def test_identity_is_no_coding(self) -> None:
        plain = reply(result("0x2"), headers=[(b"Content-Encoding", b"Identity")])
        assert await AsyncWeb3(provider_of(ScriptedUpstream([plain]))).eth.block_number == 2

    async def test_a_body_in_memory_is_read_too(self) -> None:
        whole = Reply(200, [], WholeBody(b'{"jsonrpc": "2.0", "id": 0, "result": "0x3"}'))
        assert await AsyncWeb3(provider_of(ScriptedUpstream([whole]))).eth.block_number == 3


class TestFailures:
    async def test_pathlbs_errors_come_out_as_they_are(self) -> None:
        broken = UpstreamError(Fault.READ, Sent.MAYBE_SENT, URL, "reset")
        w3 = AsyncWeb3(provider_of(ScriptedUpstream([broken])))
        with pytest.raises(pathlb.UpstreamError) as caught:
            await w3.eth.block_number
        assert caught.value is broken
        assert len(broken.attempts) == 1

    async def test_nothing_eligible(self) -> None:
        provider = provider_of(ScriptedUpstream())
        provider.balancer.drain(URL)
        with pytest.raises(pathlb.NoEligibleEndpoint):
            await AsyncWeb3(provider).eth.block_number

    async def test_a_body_that_breaks_off_names_the_attempts(self) -> None:
        class Breaking:
            closed = False

            def __aiter__(self) -> Breaking:
                return self

            async def __anext__(self) -> bytes:
                raise UpstreamError(Fault.READ, Sent.MAYBE_SENT, URL, "broke off")

            async def aclose(self) -> None:
                self.closed = True

        body = Breaking()
        provider = provider_of(ScriptedUpstream([Reply(200, [], body)]))
        with pytest.raises(pathlb.UpstreamError, match=r"broke off.*tried") as caught:
            await AsyncWeb3(provider).eth.block_number
        assert len(caught.value.attempts) == 1
        assert body.closed
        assert provider.balancer.snapshot().in_flight == 0


class TestResending:
    """The balancer decides, by the method; there is no second retry layer above it, as web3's own provider has one."""

    async def test_a_read_is_sent_as_often_as_the_balancer_allows(self) -> None:
        broken = ScriptedUpstream(lambda request, extra: UpstreamError(Fault.READ, Sent.MAYBE_SENT, URL, "reset"))
        provider = provider_of(broken, retry=pathlb.Retry(attempts=3, wait_base=0, wait_max=0))
        assert not hasattr(provider, "exception_retry_configuration")
        with pytest.raises(pathlb.UpstreamError) as caught:
            await AsyncWeb3(provider).eth.block_number
        assert broken.count == len(caught.value.attempts) == 3

    async def test_a_write_is_sent_once(self) -> None:
        """web3's own provider sends a transaction up to five times."""
        broken = ScriptedUpstream(lambda request, extra: UpstreamError(Fault.READ, Sent.MAYBE_SENT, URL, "reset"))
        provider = provider_of(broken, ScriptedUpstream(), policy=pathlb.RoundRobin(), retry=pathlb.Retry(attempts=3))
        with pytest.raises(pathlb.UpstreamError):
            await AsyncWeb3(provider).eth.send_raw_transaction("0x1234")
        assert broken.count == 1

    async def test_the_callers_word_counts_more(self) -> None:
        broken = ScriptedUpstream(lambda request, extra: UpstreamError(Fault.READ, Sent.MAYBE_SENT, URL, "reset"))
        provider = provider_of(broken, idempotent=False, retry=pathlb.Retry(attempts=3))
        with pytest.raises(pathlb.UpstreamError):
            await AsyncWeb3(provider).eth.block_number
        assert broken.count == 1


class TestBatches:
    async def ask(self, provider: AsyncBalancedProvider) -> list[Any]:
        w3 = AsyncWeb3(provider)
        async with w3.batch_requests() as batch:
            batch.add(w3.eth.get_block_transaction_count(1))
            batch.add(w3.eth.get_block_transaction_count(2))
            batch.add(w3.eth.get_block_transaction_count(3))
            return await batch.async_execute()

    async def test_answers_are_given_to_their_calls_in_any_order(self) -> None:
        def shuffle(request: Request, extra: Headers) -> Reply:
            return reply([result("0x3", 2), result("0x1", 0), result("0x2", 1)])

        upstream = ScriptedUpstream(shuffle)
        assert await self.ask(provider_of(upstream)) == [1, 2, 3]
        [calls] = sent(upstream)
        assert [(call["id"], call["params"]) for call in calls] == [(0, ["0x1"]), (1, ["0x2"]), (2, ["0x3"])]

    async def test_one_error_stands_for_the_batch(self) -> None:
        whole = failure(-31001, "one item has no answer", None)
        with pytest.raises(Web3RPCError, match="one item has no answer") as caught:
            await self.ask(provider_of(ScriptedUpstream([reply(whole, 500)])))
        assert caught.value.rpc_response == whole

    async def test_a_batch_of_answers_in_a_500_is_the_answers(self) -> None:
        answers = [result("0x1", 0), result("0x2", 1), failure(-32000, "pruned", 2)]
        provider = provider_of(ScriptedUpstream([reply(answers, 500)]))
        assert await provider.make_batch_request([("eth_chainId", [])] * 3) == answers

    async def test_an_error_to_no_call_in_particular(self) -> None:
        answers = [result("0x1", 0), result("0x2", 1), failure(-32600, "too large", None)]
        with pytest.raises(Web3RPCError, match="too large"):
            await self.ask(provider_of(ScriptedUpstream([reply(answers)])))

    @pytest.mark.parametrize(
        "answers",
        [
            [],
            [result("0x1", 0), result("0x2", 1)],
            [result("0x1", 0), result("0x2", 1), result("0x2", 1)],
            [result("0x1", 0), result("0x2", 1), result("0x3", 7)],
            [result("0x1", 0), result("0x2", 1), result("0x3", 2), result("0x3", 2)],
            [result("0x1", 0), result("0x2", 1), {**result("0x3"), "id": [2]}],
            [result("0x1", 0), result("0x2", 1), result("0x3", None)],
        ],
    )
    async def test_no_call_gets_the_answer_of_another(self, answers: list[Any]) -> None:
        with pytest.raises(BadReply, match="answers that do not match the 3 calls of the batch"):
            await self.ask(provider_of(ScriptedUpstream([reply(answers)])))

    @pytest.mark.parametrize("content", [b"bad gateway", b'["text"]', b'{"error": "forbidden"}'])
    async def test_no_answers(self, content: bytes) -> None:
        with pytest.raises(BadReply, match="replied 502 without JSON-RPC answers"):
            await self.ask(provider_of(ScriptedUpstream([reply(content, 502)])))


class TestWeb3:
    async def test_its_request_cache_works_when_it_is_on(self) -> None:
        upstream = answering(lambda call: result("0x5", call["id"]))
        provider = provider_of(upstream)
        w3 = AsyncWeb3(provider)
        assert [await w3.eth.chain_id for _ in range(2)] == [5, 5]
        asked = upstream.count
        provider.cache_allowed_requests = True
        assert [await w3.eth.chain_id for _ in range(10)] == [5] * 10
        assert upstream.count - asked == 2, "the first of them, and web3's own question which chain this is"
        assert asked == 2

    async def test_two_providers_do_not_share_an_answer(self) -> None:
        first, second = (answering(lambda call, n=n: result(n, call["id"])) for n in ("0x1", "0x2"))
        one, other = AsyncWeb3(provider_of(first)), AsyncWeb3(provider_of(second))
        assert (await one.eth.chain_id, await other.eth.chain_id) == (1, 2)
