"""The commands a gateway understands, as one-line JSON: `{"do": ..., ...}` in, a JSON value out.

Bytes travel as latin-1 text, so that what is not UTF-8 survives.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

from .model import Mode, PathSettings, ReceivedRequest, ServiceMode, ServiceTime, Settings, Stats
from .path import PathGateway
from .server import Gateway

Command = dict[str, Any]


async def execute(gateway: Gateway, command: Command) -> Any:
    """Carry out one command, on the gateway's own loop. Raises what the gateway raises."""
    do = command["do"]
    if do == "start":
        await gateway.start()
        return {"url": gateway.url, "port": gateway.port}
    if do == "set_mode":
        await gateway.set_mode(
            Mode(command["mode"]),
            factor=command["factor"],
            status=command["status"],
            retry_after=command["retry_after"],
        )
        return None
    if do == "set_body":
        gateway.set_body(command["body"].encode("latin-1"))
        return None
    if do == "stats":
        return _encode_stats(gateway.stats())
    if do == "received":
        return [_encode_request(request) for request in gateway.received()]
    if not isinstance(gateway, PathGateway):
        raise ValueError(f"{do} needs a fleet with PATH's services; give it path=[...]")
    if do == "set_service":
        gateway.set_service(
            command["service"], ServiceMode(command["mode"]), share=command["share"], factor=command["factor"]
        )
        return None
    if do == "set_height":
        gateway.set_height(command["height"])
        return None
    if do == "transactions":
        return gateway.transactions()
    raise ValueError(f"no such command: {do!r}")


def encode_settings(settings: Settings) -> str:
    return json.dumps(dataclasses.asdict(settings))


def decode_settings(text: str) -> Settings:
    fields = json.loads(text)
    fields["service_time"] = ServiceTime(**fields["service_time"])
    if "services" not in fields:
        return Settings(**fields)
    fields["services"] = tuple(fields["services"])
    return PathSettings(**fields)


def _encode_stats(stats: Stats) -> dict[str, Any]:
    # Not asdict: before Python 3.12 it takes a Counter apart.
    encoded: dict[str, Any] = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    encoded["seen"] = {value.decode("latin-1"): count for value, count in stats.seen.items()}
    return encoded


def decode_stats(encoded: dict[str, Any]) -> Stats:
    # JSON turns integer keys into text.
    by_status = Counter({int(status): count for status, count in encoded["by_status"].items()})
    seen = Counter({value.encode("latin-1"): count for value, count in encoded["seen"].items()})
    return Stats(**{**encoded, "by_path": Counter(encoded["by_path"]), "by_status": by_status, "seen": seen})


def _encode_request(request: ReceivedRequest) -> dict[str, Any]:
    return {
        "method": request.method,
        "target": request.target.decode("latin-1"),
        "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers],
        "body": request.body.decode("latin-1"),
    }


def decode_request(encoded: dict[str, Any]) -> ReceivedRequest:
    return ReceivedRequest(
        method=encoded["method"],
        target=encoded["target"].encode("latin-1"),
        headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in encoded["headers"]],
        body=encoded["body"].encode("latin-1"),
    )
