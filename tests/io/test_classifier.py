"""What replies and failures say about an endpoint."""

from __future__ import annotations

import pytest

from pathlb.classify.http import HTTPClassifier
from pathlb.core.model import Cause, Outcome, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Reply, Request
from pathlb.testing import Body

REQUEST = Request("GET", b"/", [])
STATUSES = (429, 500, 502, 503, 504)


def outcome_of(status: int, *headers: tuple[bytes, bytes]) -> Outcome:
    return HTTPClassifier(STATUSES).reply(REQUEST, Reply(status, list(headers), Body()))


@pytest.mark.parametrize(
    ("status", "cause", "retry"),
    [
        (200, Cause.OK, False),
        (204, Cause.OK, False),
        (304, Cause.OK, False),
        (302, Cause.OK, False),
        (400, Cause.REQUEST, False),
        (404, Cause.REQUEST, False),
        (429, Cause.OVERLOAD, True),
        (500, Cause.INSTANCE, True),
        (501, Cause.REQUEST, False),
        (502, Cause.INSTANCE, True),
        (503, Cause.INSTANCE, True),
        (504, Cause.INSTANCE, True),
        (505, Cause.REQUEST, False),
    ],
)
def test_statuses(status: int, cause: Cause, retry: bool) -> None:
    assert outcome_of(status) == Outcome(cause, retry=retry, status=status)


def test_what_is_worth_another_endpoint_is_another_question_than_whose_fault_it_is() -> None:
    classifier = HTTPClassifier([418])
    assert classifier.reply(REQUEST, Reply(503, [], Body())) == Outcome(Cause.INSTANCE, retry=False, status=503)
    assert classifier.reply(REQUEST, Reply(418, [], Body())) == Outcome(Cause.REQUEST, retry=True, status=418)


def test_retry_after_is_of_the_reply_not_of_the_status() -> None:
    classifier = HTTPClassifier(STATUSES)
    asked = classifier.reply(REQUEST, Reply(503, [(b"retry-after", b"7")], Body()))
    assert asked.retry_after == 7
    assert classifier.reply(REQUEST, Reply(503, [], Body())).retry_after is None
    assert outcome_of(200, (b"Retry-After", b"7")).retry_after is None
    assert outcome_of(429, (b"Retry-After", b"x")).retry_after is None


BROKEN = {Fault.READ, Fault.WRITE, Fault.CLOSE, Fault.REMOTE_PROTOCOL}


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("sent", list(Sent))
@pytest.mark.parametrize("fault", list(Fault))
def test_failures(fault: Fault, sent: Sent, local: bool, reused: bool) -> None:
    error = UpstreamError(fault, sent, "http://a", "why", local=local, reused=reused)
    outcome = HTTPClassifier(STATUSES).failure(REQUEST, error)
    assert outcome.sent is sent
    assert f"{fault.value}: why" in outcome.detail
    if fault in (Fault.LOCAL_PROTOCOL, Fault.UNSUPPORTED_PROTOCOL):
        assert (outcome.cause, outcome.retry) == (Cause.LOCAL, False), "no endpoint will do better"
    else:
        assert outcome.retry
        nobodys = local or fault is Fault.POOL_TIMEOUT or (reused and fault in BROKEN)
        assert outcome.cause is (Cause.LOCAL if nobodys else Cause.INSTANCE)


def test_a_failure_without_words() -> None:
    error = UpstreamError(Fault.READ, Sent.MAYBE_SENT, "http://a", "")
    assert HTTPClassifier(STATUSES).failure(REQUEST, error).detail == "ReadError"
