"""What pathlb is tested with, for testing what uses it: nothing here leaves loopback.

- `Fleet` emulates gateways on real sockets: slow, failing, hanging, resetting, refusing or throttling ones, switched
  while they run, with counters of what arrived.
- `FaultServer` plays a script of raw bytes, resets and silences on each connection; `refused_url` and `black_hole` are
  addresses that fail the connect itself.
- `ScriptedUpstream` answers in memory, without sockets; `FakeClock` moves when told to.

All of them are plain objects and context managers that work under asyncio, under trio and without either:

    from pathlb.testing import Fleet, Mode

    with Fleet(3) as fleet:
        client = httpx.Client()
        fleet[0].set_mode(Mode.FAIL, status=502)
        assert client.get(fleet.urls[0]).status_code == 502
        fleet[1].kill()
        with pytest.raises(httpx.ConnectError):
            client.get(fleet.urls[1])
        assert fleet[0].stats().by_status == {502: 1}

A fleet with services behaves like PATH gateways: routes, headers, errors, retries of its own, a chain behind it that
counts the transactions that reached it:

    with Fleet(3, path=["eth", "solana"]) as fleet:
        fleet[0].set_service("eth", ServiceMode.NO_SESSION)
        fleet.set_service("solana", ServiceMode.SUPPLIERS_FAIL, share=0.3)
        ...
        assert set(fleet.transactions().values()) <= {1}

`Gateway` is one server of a fleet without the thread around it, for code that has an asyncio loop to run it on.
"""

from __future__ import annotations

from .addresses import black_hole, refused_url
from .clock import FakeClock
from .faults import (
    Close,
    FaultServer,
    Fin,
    HalfClose,
    Hang,
    Read,
    ReadRequest,
    Reset,
    Script,
    Send,
    SendSlowly,
    Step,
    WaitFor,
    http_reply,
)
from .fleet import Fleet, FleetGateway
from .gateway import Gateway, Mode, ReceivedRequest, ServiceMode, ServiceTime, Settings, Stats
from .scripted import Body, ScriptedUpstream

__all__ = [
    "Body",
    "Close",
    "FakeClock",
    "FaultServer",
    "Fin",
    "Fleet",
    "FleetGateway",
    "Gateway",
    "HalfClose",
    "Hang",
    "Mode",
    "Read",
    "ReadRequest",
    "ReceivedRequest",
    "Reset",
    "Script",
    "ScriptedUpstream",
    "Send",
    "SendSlowly",
    "ServiceMode",
    "ServiceTime",
    "Settings",
    "Stats",
    "Step",
    "WaitFor",
    "black_hole",
    "http_reply",
    "refused_url",
]
