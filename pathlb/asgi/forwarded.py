"""Who the caller is, past the proxies that are trusted, told to the gateways (RFC 7239, and the X- fields)."""

from __future__ import annotations

import ipaddress
import itertools
import operator
import re
from collections.abc import Iterable
from typing import NamedTuple

from ..core.errors import ConfigError
from ..exchange import Headers


def _spellings(name: str) -> Iterable[bytes]:
    """What a server that takes _ for - reads as this name."""
    first, *rest = name.split("-")
    for marks in itertools.product("-_", repeat=len(rest)):
        yield "".join([first, *map(operator.add, marks, rest)]).encode("ascii")


_ASPECTS = ("for", "host", "port", "prefix", "proto", "server")
_NAMES = ("forwarded", "x-real-ip", *(f"x-forwarded-{aspect}" for aspect in _ASPECTS))
FORWARDED = frozenset(spelling for name in _NAMES for spelling in _spellings(name))
"""The fields that say where a request came from."""

UNIX = "unix:"
STANDARD = "forwarded:"
"""Before a network: its proxies write Forwarded."""
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_ADDRESSES_KEPT = 10_000
_LONGEST_ADDRESS = 64
_UNKNOWN = b"unknown"
# Linear in what they read, whatever that is.
_ELEMENT = re.compile(rb'(?:"(?:[^"\\]|\\.)*+"?|[^,"])++')
_PARAMETER = re.compile(rb'(?<![A-Za-z])([A-Za-z]++)=(?:"((?:[^"\\]|\\.)*+)"|([^;," \t]*))')


class _Hop(NamedTuple):
    """What one proxy says about the request it got; empty is nothing."""

    source: bytes
    proto: bytes
    host: bytes


class Forwarding:
    """Replaces what a peer says about where a request came from by what is known.

    `trusted` are the networks (CIDR, or single addresses, or `unix:` for peers on a unix socket) of proxies in front,
    whose word counts; nobody else's does, and what others sent is taken out. Most proxies write X-Forwarded fields,
    and hand on a Forwarded (RFC 7239) as their caller made it up: so that is not read. Of `forwarded:10.0.0.0/8` it is
    the other way round: those proxies write Forwarded, and nothing else is read. Raises `ConfigError`.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        if isinstance(trusted, str):
            raise ConfigError("trusted", f"must be a list of networks: [{trusted!r}]")
        networks = [str(network) for network in trusted]
        self._trusted = _Peers(network.removeprefix(STANDARD) for network in networks)
        self._standard = _Peers(network.removeprefix(STANDARD) for network in networks if network.startswith(STANDARD))

    def trusts(self, address: str) -> bool:
        """Whether the peer at this address is one of the trusted proxies; it has none on a unix socket."""
        return self._trusted.include(address)

    def apply(self, told: Headers, peer: str, scheme: str, host: bytes) -> Headers:
        """The fields to send. `told` are those of `FORWARDED` that came, `peer` the address the request came from."""
        source = chain = peer.encode("latin-1") or _UNKNOWN
        proto, asked = scheme.encode("latin-1"), host
        kept: Headers = []
        if told and self.trusts(peer):
            if self._standard.include(peer):
                hops, elements = _hops(told)
                if elements:
                    kept = [(b"forwarded", b", ".join([*elements, b"for=" + _node(source)]))]
            else:
                hops = _x_hops(told)
                kept = [pair for pair in told if pair[0] in (b"x-forwarded-port", b"x-forwarded-prefix")]
            first = self._first_untrusted(hops)
            chain = b", ".join([*(hop.source for hop in hops if hop.source), source])
            source, proto, asked = first.source or source, first.proto or proto, first.host or asked
        fields = [(b"x-forwarded-for", chain), (b"x-forwarded-proto", proto), (b"x-forwarded-host", asked), *kept]
        if source is not _UNKNOWN:
            fields.append((b"x-real-ip", _address(source)))
        return fields

    def _first_untrusted(self, hops: list[_Hop]) -> _Hop:
        """Walk from the right: the first address that is not a trusted proxy's is the caller's."""
        for hop in reversed(hops):
            if not self.trusts(_address(hop.source).decode("latin-1") or "?"):
                return hop
        return hops[0] if hops else _Hop(b"", b"", b"")


class _Peers:
    """Networks, and peers on unix sockets. Raises `ConfigError`."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._unix = False
        self._networks: list[_Network] = []
        self._known: dict[str, bool] = {}
        for network in networks:
            if network == UNIX:
                self._unix = True
                continue
            try:
                self._networks.append(ipaddress.ip_network(network, strict=False))
            except ValueError as exc:
                raise ConfigError("trusted", f"{network!r} is not a network: {exc}") from None

    def include(self, address: str) -> bool:
        """Whether a peer with this address, or none, is among them."""
        if not address:
            return self._unix
        if not self._networks:
            return False
        known = self._known.get(address)
        if known is None:
            known = self._find(address)
            if len(self._known) >= _ADDRESSES_KEPT:
                self._known.clear()
            if len(address) <= _LONGEST_ADDRESS:
                self._known[address] = known
        return known

    def _find(self, address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        return any(parsed in network for network in self._networks)


def _x_hops(told: Headers) -> list[_Hop]:
    """The proxies before the peer, by the X-Forwarded fields, the peer's own word last."""
    protos, hosts = _values(told, b"x-forwarded-proto"), _values(told, b"x-forwarded-host")
    sources = _values(told, b"x-forwarded-for")
    if not sources:
        sources = _values(told, b"x-real-ip")[-1:] or ([b""] if protos or hosts else [])
    back = range(len(sources), 0, -1)
    return [_Hop(source, _at(protos, at), _at(hosts, at)) for source, at in zip(sources, back, strict=True)]


def _hops(told: Headers) -> tuple[list[_Hop], list[bytes]]:
    """The same by Forwarded, and its elements."""
    value = b",".join(value for name, value in told if name == b"forwarded")
    elements = [element.strip() for element in _ELEMENT.findall(value) if element.strip()]
    hops = []
    for element in elements:
        said = {name.lower(): quoted or plain for name, quoted, plain in _PARAMETER.findall(element)}
        hops.append(_Hop(said.get(b"for", b""), said.get(b"proto", b""), said.get(b"host", b"")))
    return hops, elements


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [part.strip() for name, value in headers if name == wanted for part in value.split(b",") if part.strip()]


def _at(values: list[bytes], back: int) -> bytes:
    """So many from the right, or the first: most proxies say it once, for all of the chain."""
    return values[max(len(values) - back, 0)] if values else b""


def _address(node: bytes) -> bytes:
    """An address without its port."""
    if node.startswith(b"["):
        return node[1:].partition(b"]")[0]
    return node.partition(b":")[0] if node.count(b":") == 1 else node


def _node(address: bytes) -> bytes:
    return b'"[%b]"' % address if b":" in address else address
