"""What it costs to tell what a reply means, in CPU time: no sockets, no event loop.

    python -m benchmarks.classification [--quick]

- the head decides: the key of the request and the verdict on a reply, as for every request that is answered. The heads
  are PATH's and httpx's own, 12 and 7 fields.
- the body decides: both calls of `reply`, for the JSON-RPC error of 1 KiB in a failed request's reply.
- the profile: what `PATHProfile.prepare` does to every request before it is sent.

Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from pathlb import PATHProfile
from pathlb.classify import Classifier, JSONRPCClassifier, NeedBody, PATHClassifier
from pathlb.classify.http import HTTPClassifier
from pathlb.exchange import Headers, Reply, Request, WholeBody

from .measure import Figure, Row, machine, print_rows

HEAD_TARGET = 5.0
BODY_TARGET = 20.0
CALL = b'{"jsonrpc":"2.0","id":1,"method":"eth_call","params":[{"to":"0x5fbdb2315678afecb367f032d93f64"},"latest"]}'
RESULT = b'{"jsonrpc":"2.0","id":1,"result":"0x000000000000000000000000000000000000000000000000000000000000002a"}'
SENT: Headers = [
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"gzip, deflate"),
    (b"Connection", b"keep-alive"),
    (b"User-Agent", b"python-httpx/0.28.1"),
    (b"Content-Length", b"%d" % len(CALL)),
    (b"Content-Type", b"application/json"),
    (b"Target-Service-Id", b"eth"),
]
_SUPPLIERS = b"pokt1zj7xkq2f3v5w8y0a9d4c6e1g0h2j4k6l8n0p2,pokt1qy5rn7t9v1x3z5b7d9f1h3j5l7n9p1r3t5v7x"


def path_head(body: bytes, tried: bytes) -> Headers:
    """The fields of an answer of PATH's relay handler, in Go's order and spelling."""
    return [
        (b"Access-Control-Allow-Headers", b"*"),
        (b"Access-Control-Allow-Methods", b"*"),
        (b"Access-Control-Allow-Origin", b"*"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Content-Type", b"application/json"),
        (b"Date", b"Thu, 23 Jul 2026 10:00:00 GMT"),
        (b"X-App-Address", b"pokt1a2b4c6d8e0f2g4h6j8k0l2m4n6p8q0r2s4t6"),
        (b"X-Archival-Request", b"false"),
        (b"X-Hedge-Result", b"primary_only"),
        (b"X-Retry-Count", b"0"),
        (b"X-Session-Id", b"4f1c9d7e2b5a8063"),
        (b"X-Suppliers-Tried", tried),
    ]


def path_error(why: str) -> bytes:
    """An error that PATH constructs, 1 KiB of it."""
    data = {"error": why, "retryable": "true"}
    bare = {"id": 1, "jsonrpc": "2.0", "error": {"code": -31001, "message": f"internal error: {why}", "data": data}}
    data["error"] = why + "x" * (1024 - len(json.dumps(bare)))
    return json.dumps(bare).encode()


# --- the head decides


def head_rows(rounds: int, count: int) -> list[Row]:
    cases = {
        "200 of one supplier": Reply(200, path_head(RESULT, _SUPPLIERS[:43]), WholeBody(RESULT)),
        "200 of two": Reply(200, path_head(RESULT, _SUPPLIERS), WholeBody(RESULT)),
        "429": Reply(429, path_head(b"slow down", _SUPPLIERS), WholeBody(b"slow down")),
        "500, suppliers listed": Reply(500, path_head(RESULT, _SUPPLIERS), WholeBody(RESULT)),
    }
    rows = [
        Row(f"PATHClassifier, {name}", timed(keyed(PATHClassifier(), reply), rounds, count), HEAD_TARGET)
        for name, reply in cases.items()
    ]
    other = cases["200 of one supplier"]
    rows.append(Row("HTTPClassifier, 200, to compare", timed(keyed(HTTPClassifier(), other), rounds, count)))
    return rows


def keyed(classifier: Classifier, reply: Reply) -> Callable[[], object]:
    """Key and verdict, as the balancer asks for them."""
    request = Request("POST", b"/v1", SENT, CALL)
    assert not isinstance(classifier.reply(request, reply, None), NeedBody)

    def step() -> object:
        classifier.key(request)
        return classifier.reply(request, reply, None)

    return step


# --- the body decides


def body_rows(rounds: int, count: int) -> list[Row]:
    refused = path_error("no valid endpoints available for service: service eth: ")
    reverted = refused.replace(b"-31001", b"3")
    cases: dict[str, tuple[Classifier, Reply, bytes]] = {
        "PATHClassifier, 500 with an error of 1 KiB": (
            PATHClassifier(),
            Reply(500, path_head(refused, b""), WholeBody(refused)),
            refused,
        ),
        "JSONRPCClassifier, 500 with an error of 1 KiB": (
            JSONRPCClassifier(),
            Reply(500, path_head(reverted, b""), WholeBody(reverted)),
            reverted,
        ),
        "JSONRPCClassifier, 200 with an error of 1 KiB": (
            JSONRPCClassifier(),
            Reply(200, path_head(reverted, _SUPPLIERS), WholeBody(reverted)),
            reverted,
        ),
    }
    rows = [Row(name, timed(with_body(*case), rounds, count), BODY_TARGET) for name, case in cases.items()]
    result = RESULT[:-2] + b"0" * (1024 - len(RESULT)) + RESULT[-2:]
    answered = with_body(JSONRPCClassifier(), Reply(200, path_head(result, _SUPPLIERS), WholeBody(result)), result)
    rows.append(Row("JSONRPCClassifier, 200 with a result of 1 KiB", timed(answered, rounds, count)))
    return rows


def with_body(classifier: Classifier, reply: Reply, body: bytes) -> Callable[[], object]:
    """Both calls."""
    request = Request("POST", b"/v1", SENT, CALL)
    assert isinstance(classifier.reply(request, reply, None), NeedBody)

    def step() -> object:
        classifier.reply(request, reply, None)
        return classifier.reply(request, reply, body)

    return step


# --- the profile


def profile_rows(rounds: int, count: int) -> list[Row]:
    types = {"eth": "json_rpc", "solana": "json_rpc"}
    cases = {
        "several services": PATHProfile(services=["eth", "solana"]),
        "one service, given": PATHProfile(services=["eth"]),
        "RPC types": PATHProfile(services=types),
        "RPC types, delegated": PATHProfile(services=types, app_address="pokt1app"),
    }
    bare = timed(lambda: Request("POST", b"/v1", SENT, CALL), rounds, count)
    return [
        Row(f"PATHProfile.prepare, {name}", timed(prepared(profile), rounds, count).beyond(bare))
        for name, profile in cases.items()
    ]


def prepared(profile: PATHProfile) -> Callable[[], object]:
    """A fresh request each time: it is added to."""

    def step() -> object:
        request = Request("POST", b"/v1", SENT, CALL)
        profile.prepare(request)
        return request

    return step


def timed(step: Callable[[], object], rounds: int, count: int) -> Figure:
    """Microseconds of CPU for each call."""
    samples: list[float] = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(count):
            step()
        samples.append((time.process_time() - began) * 1e6 / count)
    return Figure(tuple(samples[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.classification", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a second, more noise")
    options = parser.parse_args()
    rounds, count = (5, 2_000) if options.quick else (15, 20_000)
    print(f"Python {sys.version.split()[0]}, {rounds} rounds of {count:,}, bodies a quarter of them")
    print(f"this machine at this moment: {machine():.0f} ns for a call of an empty function")
    tables = {
        "The head decides": head_rows(rounds, count),
        "The body decides": body_rows(rounds, count // 4),
        "The profile, beyond making a request": profile_rows(rounds, count),
    }
    for title, rows in tables.items():
        print_rows(title, rows)
    return int(any(row.missed for rows in tables.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
