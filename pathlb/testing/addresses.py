"""Addresses that fail a connect, each in its own way."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

_ANSWERED_WITHIN = 0.1


@contextlib.contextmanager
def refused_url() -> Iterator[str]:
    """URL of a loopback port that refuses connections and is given to nobody else inside the `with` block."""
    with socket.socket() as held:
        # Bound without listening: the kernel refuses for it, and does not hand the port out.
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """URL of a loopback port where connects hang, neither accepted nor refused, inside the `with` block (Linux).

    Raises `RuntimeError` on systems that go on accepting.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(64):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            # On loopback a handshake takes microseconds: no answer by now means the backlog is full.
            if not select.select([], [filler], [], _ANSWERED_WITHIN)[1]:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
                return
    raise RuntimeError("the backlog of a listening socket cannot be filled on this system")
