"""What looking into JSON-RPC bodies costs, in CPU time: no sockets, a road that answers at once.

    python -m benchmarks.jsonrpc [--quick]

- the rules: `may_send_twice`, which a request pays for only when an attempt has failed.
- the layer: everything beyond a bare call of the road, reading and closing the reply: for a request that only gets the
  byte tests, for calls that stick to the instance of their filter, for raw transactions, for batches sent in parts.

A KiB of body is a plain call padded in its parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

from pathlb.core.model import Cause, Outcome
from pathlb.exchange import Attempt, Headers, Reply, Request, WholeBody
from pathlb.jsonrpc import JSONRPC, JSONRPCLayer, MethodRules

from .measure import Figure, Row, Step, interleaved, machine, print_rows

URL = "http://10.0.0.1:3069"
HEADERS: Headers = [(b"Content-Type", b"application/json"), (b"Target-Service-Id", b"eth"), (b"Accept", b"*/*")]
ATTEMPTS = (Attempt(URL, "least connections", 0, 5, Outcome(Cause.OK, status=200), 0.01),)
FILTER = "0x" + "ab" * 16


def compact(method: str, params: list[object]) -> bytes:
    return json.dumps(call(method, params)).encode()


def call(method: str, params: list[object], number: int = 1) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


def kib(method: str) -> bytes:
    """A call of 1 KiB."""
    bare = len(json.dumps(call(method, [{"to": "0x" + "12" * 20, "data": ""}, "latest"])))
    digits = "".join(random.Random(1).choices("0123456789abcdef", k=1024 - bare))
    return compact(method, [{"to": "0x" + "12" * 20, "data": digits}, "latest"])


def batch(count: int) -> bytes:
    return json.dumps(
        [call("eth_getBalance", ["0x" + "12" * 20, "latest"], number) for number in range(count)]
    ).encode()


# --- the rules


def rule_rows(rounds: int) -> list[Row]:
    rules = MethodRules({})
    bodies = {
        "may_send_twice, a call of 1 KiB": kib("eth_call"),
        "may_send_twice, a write of 1 KiB": kib("eth_sendTransaction"),
        "may_send_twice, a batch of 100": batch(100),
    }
    return [Row(name, timed(partial(rules.may_send_twice, body), rounds)) for name, body in bodies.items()]


def timed(step: Callable[[], object], rounds: int) -> Figure:
    count = 500
    samples: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(count):
            step()
        samples.append((time.process_time() - began) * 1e6 / count)
    return Figure(tuple(samples))


# --- the layer


class Road:
    """Answers every request at once, with what was made for its body before."""

    def __init__(self) -> None:
        self._answers: dict[bytes, bytes] = {}

    async def send(self, request: Request) -> Reply:
        body = request.body
        assert isinstance(body, bytes)
        answer = self._answers.get(body)
        if answer is None:
            answer = self._answers[body] = _answer(body)
        return Reply(200, [(b"Content-Type", b"application/json")], WholeBody(answer), attempts=ATTEMPTS)


def _answer(body: bytes) -> bytes:
    asked = json.loads(body)
    calls = asked if isinstance(asked, list) else [asked]
    answers = [{"jsonrpc": "2.0", "id": one["id"], "result": FILTER} for one in calls]
    return json.dumps(answers if isinstance(asked, list) else answers[0]).encode()


def posts(send: Callable[[Request], Awaitable[Reply]], body: bytes) -> Step:
    async def step() -> None:
        reply = await send(Request("POST", b"/v1", HEADERS, body))
        async for _ in reply.body:
            pass
        await reply.body.aclose()

    return step


async def drive(step: Step, requests: int) -> None:
    for _ in range(requests):
        await step()


CASES: dict[str, tuple[JSONRPC, bytes]] = {
    "byte tests alone, everything on, a call of 1 KiB": (
        JSONRPC(sticky_filters=True, split=25, max_batch=1000, max_body=2**20, resend_transactions=True),
        kib("eth_call"),
    ),
    "max_body alone, a call of 1 KiB": (JSONRPC(max_body=2**20), kib("eth_call")),
    "split=25, a batch of 5": (JSONRPC(split=25), batch(5)),
    "max_batch=25, a batch of 25": (JSONRPC(max_batch=25), batch(25)),
    "sticky_filters, a filter made": (JSONRPC(sticky_filters=True), compact("eth_newFilter", [{"address": FILTER}])),
    "sticky_filters, a filter asked": (JSONRPC(sticky_filters=True), compact("eth_getFilterChanges", [FILTER])),
    "resend_transactions, a transaction of 1 KiB": (JSONRPC(resend_transactions=True), kib("eth_sendRawTransaction")),
    "split=50, a batch of 100 in 2 parts": (JSONRPC(split=50), batch(100)),
    "split=10, a batch of 100 in 10 parts": (JSONRPC(split=10), batch(100)),
}


async def layer_rows(rounds: int, requests: int) -> list[Row]:
    steps: dict[str, Step] = {}
    for name, (config, body) in CASES.items():
        road = Road()
        steps[name] = posts(JSONRPCLayer(config, road.send).send, body)
        steps[f"{name}, bare"] = posts(road.send, body)
    figures = await interleaved(steps, drive, rounds=rounds, requests=requests)
    return [Row(name, figures[name].beyond(figures[f"{name}, bare"])) for name in CASES]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.jsonrpc", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: some seconds, more noise")
    options = parser.parse_args()
    rounds, requests = (5, 100) if options.quick else (25, 400)
    print(f"Python {sys.version.split()[0]}, {rounds} rounds of {requests} requests")
    print(f"this machine at this moment: {machine():.0f} ns for a call of an empty function")
    print_rows("The rules, after a failure", rule_rows(rounds))
    print_rows("The layer, beyond the road, asyncio", asyncio.run(layer_rows(rounds, requests)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
