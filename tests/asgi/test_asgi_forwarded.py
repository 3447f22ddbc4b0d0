"""Who a request came from, as the gateways are told."""

from __future__ import annotations

import pytest

from pathlb import ConfigError
from pathlb.asgi.forwarded import FORWARDED, Forwarding
from pathlb.exchange import Headers

PEER = "10.0.0.1"
TRUSTED = ["10.0.0.0/8", "2001:db8::/32"]
STANDARD = ["forwarded:10.0.0.0/8", "forwarded:2001:db8::/32"]


def told(headers: Headers, peer: str = PEER, trusted: list[str] = TRUSTED) -> dict[str, str]:
    """What goes out, with what came in of a peer."""
    fields = Forwarding(trusted).apply(headers, peer, "http", b"www.test")
    said = {name.decode().removeprefix("x-forwarded-"): value.decode() for name, value in fields}
    assert len(said) == len(fields)
    return said


def xff(*values: str, **others: str) -> Headers:
    fields = [(b"x-forwarded-for", value.encode()) for value in values]
    return fields + [(f"x-forwarded-{name}".encode(), value.encode()) for name, value in others.items()]


def test_a_caller_without_proxies() -> None:
    expected = {"for": "192.0.2.7", "proto": "http", "host": "www.test", "x-real-ip": "192.0.2.7"}
    assert told([], "192.0.2.7") == told([], "192.0.2.7", trusted=[]) == expected


def test_the_word_of_others_does_not_count() -> None:
    headers: Headers = [(name, b"203.0.113.9") for name in FORWARDED]
    assert told(headers, "192.0.2.7") == told([], "192.0.2.7")
    assert told(headers, trusted=[]) == told([], trusted=[])


def test_all_spellings_are_known() -> None:
    assert {b"x-forwarded-for", b"x_forwarded_for", b"x-forwarded_for", b"x-real_ip", b"forwarded"} <= FORWARDED
    assert not any(b"/" in name or name.isupper() for name in FORWARDED)
    assert len(FORWARDED) == 1 + 4 + 6 * 4


class TestTrusted:
    @pytest.mark.parametrize(
        ("values", "source"),
        [
            (["192.0.2.7"], "192.0.2.7"),
            (["203.0.113.9, 192.0.2.7"], "192.0.2.7"),  # the first is the caller's own word
            (["192.0.2.7, 10.0.0.2"], "192.0.2.7"),
            (["192.0.2.7", "10.0.0.2,10.0.0.3"], "192.0.2.7"),
            (["10.0.0.3, 10.0.0.2"], "10.0.0.3"),  # a caller from within
            (["2001:db9::7, 2001:db8::1"], "2001:db9::7"),
            (["::ffff:192.0.2.7, ::ffff:10.0.0.2"], "::ffff:192.0.2.7"),
            (["192.0.2.7:4711"], "192.0.2.7"),
            (["[2001:db9::7]:4711, [2001:db8::1]:80"], "2001:db9::7"),
            (["10.0.0.9, unknown"], "unknown"),
            (["10.0.0.9, \xe9"], "\xe9"),
            ([""], PEER),
            ([" , "], PEER),
        ],
    )
    def test_are_walked_from_the_right(self, values: list[str], source: str) -> None:
        assert told(xff(*values))["x-real-ip"] == source

    def test_the_chain_goes_on(self) -> None:
        assert told(xff("1.2.3.4,  192.0.2.7", "10.0.0.2"))["for"] == "1.2.3.4, 192.0.2.7, 10.0.0.2, 10.0.0.1"

    def test_the_address_they_say(self) -> None:
        said = told([(b"x-real-ip", b"192.0.2.7")])
        assert (said["x-real-ip"], said["for"]) == ("192.0.2.7", "192.0.2.7, 10.0.0.1")

    def test_what_they_say_once(self) -> None:
        said = told(xff("192.0.2.7, 10.0.0.2", proto="https", host="shop.test", port="443", prefix="/shop", server="a"))
        assert said == {
            "for": "192.0.2.7, 10.0.0.2, 10.0.0.1",
            "proto": "https",
            "host": "shop.test",
            "port": "443",
            "prefix": "/shop",
            "x-real-ip": "192.0.2.7",
        }

    def test_what_they_say_without_a_chain(self) -> None:
        said = told(xff(proto="https", host="shop.test"))
        assert said == {"for": PEER, "proto": "https", "host": "shop.test", "x-real-ip": PEER}

    @pytest.mark.parametrize(
        ("chain", "protos", "proto"),
        [
            ("192.0.2.7", "https", "https"),
            ("192.0.2.7", "https, http", "http"),  # the first is the caller's own word
            ("192.0.2.7, 10.0.0.2", "https, http", "https"),
            ("1.2.3.4, 192.0.2.7, 10.0.0.2", "http, https, http", "https"),
        ],
    )
    def test_what_they_say_hop_by_hop(self, chain: str, protos: str, proto: str) -> None:
        assert told(xff(chain, proto=protos))["proto"] == proto

    def test_peers_on_a_unix_socket(self) -> None:
        headers = xff("192.0.2.7", proto="https")
        said = told(headers, "", ["unix:"])
        assert said == {
            "for": "192.0.2.7, unknown",
            "proto": "https",
            "host": "www.test",
            "x-real-ip": "192.0.2.7",
        }
        assert told(headers, "") == {"for": "unknown", "proto": "http", "host": "www.test"}


FORGED = [*xff("1.1.1.1", proto="http", host="evil.test", prefix="/evil", port="1"), (b"x-real-ip", b"1.1.1.1")]


class TestRFC7239:
    def test_is_read_and_continued(self) -> None:
        headers: Headers = [(b"forwarded", b'for=1.2.3.4, For="[2001:db9::7]:4711";proto=https;host="shop.test"')]
        said = told(headers, trusted=STANDARD)
        assert said == {
            "for": "1.2.3.4, [2001:db9::7]:4711, 10.0.0.1",
            "proto": "https",
            "host": "shop.test",
            "x-real-ip": "2001:db9::7",
            "forwarded": 'for=1.2.3.4, For="[2001:db9::7]:4711";proto=https;host="shop.test", for=10.0.0.1',
        }

    def test_an_ipv6_peer_is_quoted(self) -> None:
        said = told([(b"forwarded", b"for=192.0.2.7")], "2001:db8::1", STANDARD)
        assert said["forwarded"] == 'for=192.0.2.7, for="[2001:db8::1]"'

    @pytest.mark.parametrize("forged", [FORGED, *([field] for field in FORGED)])
    def test_who_writes_it_may_hand_on_other_fields_unseen(self, forged: Headers) -> None:
        headers: Headers = [(b"forwarded", b"for=192.0.2.7;proto=https")]
        assert told([*forged, *headers], trusted=STANDARD) == told(headers, trusted=STANDARD)
        assert told(forged, trusted=STANDARD) == told([])

    def test_who_writes_the_other_fields_may_hand_it_on_unseen(self) -> None:
        """nginx does, and many others."""
        forged: Headers = [(b"forwarded", b"for=1.1.1.1;proto=https;host=evil.test")]
        assert told([*forged, *xff("192.0.2.7")]) == told(xff("192.0.2.7"))
        assert told(forged) == told([])

    def test_one_network_of_several(self) -> None:
        headers: Headers = [(b"forwarded", b"for=192.0.2.7"), *xff("192.0.2.8")]
        trusted = ["10.0.0.0/8", "forwarded:10.9.0.0/16", "forwarded:unix:"]
        assert told(headers, "10.0.0.1", trusted)["x-real-ip"] == "192.0.2.8"
        assert told(headers, "10.9.0.1", trusted)["for"] == "192.0.2.7, 10.9.0.1"
        assert told(headers, "", trusted)["for"] == "192.0.2.7, unknown"

    @pytest.mark.parametrize(
        ("value", "source"),
        [
            (b"for=192.0.2.7;by=10.0.0.1", "192.0.2.7"),
            (b'for="a,b;proto=https"', "a,b;proto=https"),
            (b"proto=https", PEER),
            (b"", PEER),
            (b",,", PEER),
            (b'for="', PEER),
            (b"xfor=1.2.3.4", PEER),
        ],
    )
    def test_what_is_said_oddly(self, value: bytes, source: str) -> None:
        assert told([(b"forwarded", value)], trusted=STANDARD)["x-real-ip"] == source

    @pytest.mark.parametrize(
        "value", [b'"\\' * 30_000, b'a="' * 20_000, b" " * 60_000, b"a" * 60_000, b'="a"' * 15_000]
    )
    def test_is_read_in_one_go_whatever_it_is(self, value: bytes) -> None:
        told(
            [(b"forwarded", value)], trusted=STANDARD
        )  # in milliseconds; going back for every byte would take longer than a test may


class TestMemory:
    def test_of_addresses_is_bounded(self) -> None:
        forwarding = Forwarding(TRUSTED)
        for number in range(10_500):
            assert forwarding.trusts(f"10.0.{number // 250}.{number % 250}")
        assert not forwarding.trusts("x" * 100)
        known = forwarding._trusted._known
        assert len(known) <= 10_000
        assert max(map(len, known)) < 20

    def test_without_trust_there_is_none(self) -> None:
        forwarding = Forwarding()
        assert not forwarding.trusts(PEER)
        assert forwarding._trusted._known == {}


@pytest.mark.parametrize(
    "trusted", ["10.0.0.0/8", ["10.0.0.0/40"], ["proxy.test"], [""], [5], ["forwarded:proxy.test"], ["forwarded:"]]
)
def test_networks_that_are_none(trusted: object) -> None:
    with pytest.raises(ConfigError, match="trusted"):
        Forwarding(trusted)  # type: ignore[arg-type]
