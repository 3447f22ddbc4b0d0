"""A fleet of emulated gateways to balance over."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pathlb.errors import UsageError

from .gateway.chain import Answer
from .gateway.commands import decode_request, decode_stats
from .gateway.control import NOT_RUNNING, Control, LocalControl, LoopThread, ProcessControl
from .gateway.model import (
    DEFAULT_SERVICE_TIME,
    Mode,
    PathSettings,
    ReceivedRequest,
    ServiceMode,
    ServiceTime,
    Settings,
    Stats,
)


class FleetGateway:
    """One gateway of a running fleet.

    Every call may come from any thread, blocks for about a millisecond and returns when the change is in effect.
    All raise `UsageError` once the fleet has stopped, `RuntimeError` when a gateway's process died.
    """

    def __init__(self, name: str, control: Control) -> None:
        self.name = name
        """What its replies carry in `X-Gateway`: `gateway-0`, `gateway-1`, ..."""
        self._control = control
        started = control.call({"do": "start"})
        self.url: str = started["url"]
        """`http://127.0.0.1:port`, or `unix:///path`."""
        self.port: int = started["port"]
        """0 for a unix socket."""

    def set_mode(self, mode: Mode, *, factor: float = 10.0, status: int = 500, retry_after: str = "1") -> None:
        """Behave like `mode` from now on, towards requests in flight too.

        `factor` multiplies SLOW's service times (default 10), `status` is FAIL's (400 to 599, default 500),
        `retry_after` THROTTLE's header value (default `1`, seconds). Raises `ValueError` for values out of range and
        `OSError` when REFUSE is left and somebody else took the port.
        """
        self._control.call(
            {"do": "set_mode", "mode": mode.value, "factor": factor, "status": status, "retry_after": retry_after}
        )

    def kill(self) -> None:
        """Connections are refused and existing ones reset, until `restore`."""
        self.set_mode(Mode.REFUSE)

    def restore(self) -> None:
        """Back to normal, on the same port."""
        self.set_mode(Mode.OK)

    def set_body(self, body: bytes) -> None:
        """The body of every 200 from now on, but `/health`'s; the default is a JSON-RPC result.

        In a fleet with services the chain answers instead.
        """
        self._control.call({"do": "set_body", "body": body.decode("latin-1")})

    def set_service(self, service: str, mode: ServiceMode, *, share: float = 1.0, factor: float = 10.0) -> None:
        """Let one of PATH's services fare as `mode` says from the next request on.

        `share` of the requests, or of the relays, are befallen by it (default 1, all; which ones is seeded), `factor`
        multiplies SLOW's service times (default 10). Raises `ValueError` for values out of range, a service the fleet
        has not, and a fleet without services.
        """
        self._control.call(
            {"do": "set_service", "service": service, "mode": mode.value, "share": share, "factor": factor}
        )

    def set_height(self, height: int) -> None:
        """The block height it answers and tells in `/ready?detailed=true` from now on (at first 1000).

        Raises `ValueError` in a fleet without services.
        """
        self._control.call({"do": "set_height", "height": height})

    def transactions(self) -> Counter[str]:
        """How often each raw transaction reached the chain through it: see `Fleet.transactions`."""
        return Counter(self._control.call({"do": "transactions"}))

    def stats(self) -> Stats:
        """The counters at this moment."""
        return decode_stats(self._control.call({"do": "stats"}))

    def received(self) -> list[ReceivedRequest]:
        """The latest requests, oldest first; empty unless the fleet records."""
        return [decode_request(request) for request in self._control.call({"do": "received"})]


class Fleet:
    """`n` emulated gateways on loopback, while its `with` block runs.

    A plain context manager: it works from synchronous code and from inside any event loop, since the gateways run on
    a loop in a thread of their own, or each in its own process with `processes=True` (to load more than one core;
    starting takes a second or two).

    - `n`: how many (default 5, or as many as `ports`). `ports`: where they listen (default: free ports).
    - `service_time`: how long a request takes (default a constant 10 ms).
    - `workers`: requests one gateway serves at once, `queue`: how many more may wait, in order, before it answers 503
      (defaults: None, no limit).
    - `seed`: of the service times, default 0: the same seed gives every gateway the same sequence again.
    - `record`: keep the requests for `FleetGateway.received()` (default False).
    - `uds`: listen on unix sockets in a temporary directory (default False). They have no RST: clients see a broken
      connection where a reset is due.

    With `path` the gateways behave like PATH instead of replying alike to everything:

    - `path`: the services they relay for, by id (default none). Each speaks JSON-RPC, to an emulated EVM chain.
    - `suppliers`: how many serve each service (default 5, at least 2).
    - `answer`: answers the JSON-RPC calls instead of the emulated chain, one at a time, on the fleet's thread, which
      serves nothing else meanwhile (default None; not with `processes`). What it raises becomes error -32603.

    Entering raises `OSError` naming the gateway when one of `ports` is taken. A fleet can be entered again after it was
    left, and then starts afresh.
    """

    def __init__(
        self,
        n: int | None = None,
        *,
        ports: Sequence[int] | None = None,
        processes: bool = False,
        service_time: ServiceTime = DEFAULT_SERVICE_TIME,
        workers: int | None = None,
        queue: int | None = None,
        seed: int = 0,
        record: bool = False,
        uds: bool = False,
        path: Sequence[str] = (),
        suppliers: int = 5,
        answer: Answer | None = None,
    ) -> None:
        if n is None:
            n = 5 if ports is None else len(ports)
        if n < 1:
            raise ValueError(f"a fleet has at least one gateway, not {n!r}")
        if ports is not None and len(ports) != n:
            raise ValueError(f"{len(ports)} ports for {n} gateways")
        if ports is not None and uds:
            raise ValueError("unix sockets have no ports; give ports= or uds=True")
        if isinstance(path, str):
            raise ValueError(f"path is a list of services: [{path!r}]")
        if answer is not None and (processes or not path):
            raise ValueError("answer= needs path=[...], and gateways in this process")
        make: Callable[..., Settings] = Settings
        if path:
            make = functools.partial(PathSettings, services=tuple(path), suppliers=suppliers)
        self._settings = [
            make(
                name=f"gateway-{index}",
                port=0 if ports is None else ports[index],
                service_time=service_time,
                workers=workers,
                queue=queue,
                # Fleets with neighbouring seeds must not share gateways' sequences.
                seed=seed * 1000 + index,
                record=record,
            )
            for index in range(n)
        ]
        self._answer = answer
        self._processes = processes
        self._uds = uds
        self._exit: contextlib.ExitStack | None = None
        self._gateways: list[FleetGateway] = []

    def __enter__(self) -> Fleet:
        if self._exit is not None:
            raise UsageError("the fleet is running already")
        with contextlib.ExitStack() as stack:
            settings = self._settings
            if self._uds:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pathlb-"))
                settings = [dataclasses.replace(one, uds=os.path.join(folder, f"{one.name}.sock")) for one in settings]
            controls: list[Control]
            if self._processes:
                controls = [stack.enter_context(contextlib.closing(ProcessControl(one))) for one in settings]
            else:
                thread = LoopThread()
                stack.callback(thread.stop)
                controls = [
                    stack.enter_context(contextlib.closing(LocalControl(thread, one, self._answer))) for one in settings
                ]
            # Processes import side by side: the first answer is waited for when all of them have been started.
            gateways = [FleetGateway(one.name, control) for one, control in zip(settings, controls, strict=True)]
            self._gateways = gateways
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._exit is not None:
            running, self._exit = self._exit, None
            running.close()

    @property
    def urls(self) -> list[str]:
        """What to balance over."""
        return [gateway.url for gateway in self]

    def __getitem__(self, index: int) -> FleetGateway:
        if not self._gateways:
            raise UsageError(NOT_RUNNING)
        return self._gateways[index]

    def __iter__(self) -> Iterator[FleetGateway]:
        if not self._gateways:
            raise UsageError(NOT_RUNNING)
        return iter(self._gateways)

    def __len__(self) -> int:
        return len(self._settings)

    def set_service(self, service: str, mode: ServiceMode, *, share: float = 1.0, factor: float = 10.0) -> None:
        """`FleetGateway.set_service`, on all of them."""
        for gateway in self:
            gateway.set_service(service, mode, share=share, factor=factor)

    def transactions(self) -> Counter[str]:
        """How often each payload of `eth_sendRawTransaction` reached the chain, over all gateways, whatever became of
        the reply. More than 1 means it was sent again: the gateways' own retries do not count.
        """
        return sum((gateway.transactions() for gateway in self), Counter())

    def seen(self) -> Counter[bytes]:
        """How often each `X-Request-Id` arrived, over all gateways: more than 1 means it was sent again."""
        return sum((gateway.stats().seen for gateway in self), Counter())
