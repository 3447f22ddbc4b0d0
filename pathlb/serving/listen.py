"""Listening sockets, and what to say when there is none to be had."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
import sys

from .checks import Address

BACKLOG = 2048
"""Connections that may wait to be accepted."""
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it

_HINTS = {
    errno.EADDRINUSE: "; another process listens there",
    errno.EACCES: "; ports below 1024 are for root, or for CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "; this machine has no such address",
}


def listen(address: Address) -> socket.socket:
    """A socket that listens on `address`, for this process and those that inherit it. Raises `OSError`."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as exc:
        raise OSError(f"cannot listen on {address}: {exc.strerror}") from None
    # Of a name with both kinds of addresses the IPv4 one: `localhost` is 127.0.0.1 to everybody.
    family, kind, protocol, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        hint = _HINTS.get(exc.errno or 0, "")
        raise OSError(f"cannot listen on {address}: {exc.strerror}{hint}") from None
    return listener


def refuse_new(listener: socket.socket) -> None:
    """Let nobody begin to connect any more, where the system can: what came between the last accept and the close would
    be connected, and lost. Who tries meanwhile tries again a second later, and is refused.
    """
    if sys.platform != "linux":
        return
    # Classic BPF, from the TCP header on (tcp(7), SO_ATTACH_FILTER): drop what has SYN and not ACK.
    program = [
        (0x30, 0, 0, 13),  # the flags
        (0x54, 0, 0, 0x12),  # ACK and SYN of them
        (0x15, 0, 1, 0x02),  # SYN alone
        (0x06, 0, 0, 0),  # is dropped
        (0x06, 0, 0, 0xFFFFFFFF),  # all else passes
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filtering = struct.pack("HP", len(program), ctypes.addressof(code))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filtering)


def address_of(listener: socket.socket) -> Address:
    """Where it listens; the port is known by now."""
    host, port = listener.getsockname()[:2]
    return Address(host, port)
