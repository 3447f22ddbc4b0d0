"""URLs of endpoints, and the set of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.endpoints import Admin, EndpointSet, EndpointState, check_endpoints
from pathlb.core.errors import ConfigError
from pathlb.core.health import HealthState
from pathlb.core.load import ReportedLoad
from pathlb.core.model import Endpoint


@pytest.mark.parametrize(
    ("url", "normal", "scheme", "host", "port", "authority", "base"),
    [
        ("http://gw", "http://gw", "http", "gw", 80, b"gw", b""),
        ("HTTP://GW.Example/", "http://gw.example", "http", "gw.example", 80, b"gw.example", b""),
        ("http://gw:80/", "http://gw", "http", "gw", 80, b"gw", b""),
        ("https://gw:443", "https://gw", "https", "gw", 443, b"gw", b""),
        ("https://gw:80", "https://gw:80", "https", "gw", 80, b"gw:80", b""),
        ("http://127.0.0.1:3069", "http://127.0.0.1:3069", "http", "127.0.0.1", 3069, b"127.0.0.1:3069", b""),
        ("http://[::1]:3069/", "http://[::1]:3069", "http", "::1", 3069, b"[::1]:3069", b""),
        ("https://[2001:db8::1]", "https://[2001:db8::1]", "https", "2001:db8::1", 443, b"[2001:db8::1]", b""),
        ("http://[fe80::1%25eth0]", "http://[fe80::1%25eth0]", "http", "fe80::1%25eth0", 80, b"[fe80::1%25eth0]", b""),
        ("http://gw/base/path/", "http://gw/base/path", "http", "gw", 80, b"gw", b"/base/path"),
        ("http://gw/p%40th/@x", "http://gw/p%40th/@x", "http", "gw", 80, b"gw", b"/p%40th/@x"),
        ("http://bücher.example", "http://xn--bcher-kva.example", "http", "xn--bcher-kva.example", 80, None, b""),
        ("http://my_host-1:65535", "http://my_host-1:65535", "http", "my_host-1", 65535, b"my_host-1:65535", b""),
    ],
)
def test_urls(url: str, normal: str, scheme: str, host: str, port: int, authority: bytes | None, base: bytes) -> None:
    endpoint = Endpoint(url)
    assert endpoint.url == normal
    assert (endpoint.scheme, endpoint.host, endpoint.port) == (scheme, host, port)
    assert endpoint.authority == (authority or host.encode())
    assert (endpoint.base_path, endpoint.uds) == (base, None)
    assert Endpoint(normal) == endpoint
    assert hash(Endpoint(normal)) == hash(endpoint)


def test_unix_sockets() -> None:
    endpoint = Endpoint("unix:///run/gw.sock")
    assert (endpoint.url, endpoint.uds) == ("unix:///run/gw.sock", "/run/gw.sock")
    assert (endpoint.scheme, endpoint.host, endpoint.port) == ("http", "localhost", 80)
    assert (endpoint.authority, endpoint.base_path) == (b"localhost", b"")
    assert Endpoint("unix:/run/gw.sock") == endpoint


BAD_URLS = [
    "", "gw", "gw:3069", "//gw", "/path", "ftp://gw", "http//gw", "http:/gw", "http://", "http:///path", "http://:80",
    "http://gw:", "http://gw:0", "http://gw:65536", "http://gw:-1", "http://gw:abc", "http://gw:+80", "http://gw:٣",
    "http://user@gw", "http://user:pw@gw", "https://:@gw", "http://gw?", "http://gw/?q=1", "http://gw/#f", "http://gw#",
    "http://g w", "http://gw\n", " http://gw", "http://gw\x7f", "http://gw\x00", "http://[::1", "http://::1", "http://[gw]",
    "http://g!w", "http://gw\\x", "http://gw,gw2", "http://gw/päth", "http://a..ü", "http://ü\u00a0b", "http://gw\u2100",
    "unix://run/gw.sock", "unix:///", "unix://", "unix:gw.sock", "unix:///run/gw.sock?x", "unix://u@/run/gw.sock",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url)
    assert caught.value.field == "Endpoint.url"


@pytest.mark.parametrize(
    "url",
    [
        "http://user:s3cret@gw", "user:s3cret@gw", "ftp://user:s3cret@gw", "http:/user:s3cret@gw", "//user:s3cret@gw",
        "http://user:s3cret@gw\u2100", "http://user:s3cret@[gw", "http://gw?token=s3cret", "gw?token=s3cret",
        "gw#s3cret", "ftp://gw/?s3cret", "http:///@?token=s3cret", "http://user:s3cret@gw:99999", "unix://u:s3cret@/x",
    ],
)  # fmt: skip
def test_no_message_repeats_a_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@given(st.text(max_size=30) | st.text(max_size=20).map(lambda text: "http://" + text))
def test_any_text_is_an_endpoint_or_a_config_error(url: str) -> None:
    try:
        endpoint = Endpoint(url)
    except ConfigError:
        return
    assert Endpoint(endpoint.url) == endpoint
    assert not set(endpoint.authority) & set(b" /?#@\\")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("weight", value) for value in (0, -1, float("nan"), float("inf"), True, "2", None)),
        *(("server_hostname", value) for value in ("", 5)),
        *(("metadata", value) for value in (5, "abc", [("a", 1)], None)),
    ],
)
def test_bad_fields(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint("http://gw", **{field: value})
    assert caught.value.field == f"Endpoint.{field}"


@pytest.mark.parametrize("url", [None, 5, b"http://gw", ["http://gw"]])
def test_a_url_is_a_string(url: Any) -> None:
    with pytest.raises(ConfigError, match="must be a string") as caught:
        Endpoint(url)
    assert caught.value.field == "Endpoint.url"


def test_settings_of_an_endpoint() -> None:
    metadata = {"zone": "a"}
    endpoint = Endpoint("https://10.0.0.1", weight=2, metadata=metadata, server_hostname="gw.example")
    metadata["zone"] = "b"
    assert endpoint.metadata == {"zone": "a"}
    with pytest.raises(TypeError):
        endpoint.metadata["zone"] = "c"  # type: ignore[index]
    assert (endpoint.weight, endpoint.server_hostname) == (2, "gw.example")
    assert endpoint == Endpoint("https://10.0.0.1")


def test_check_endpoints() -> None:
    made = Endpoint("http://b", weight=3)
    assert check_endpoints(["http://a/", made]) == [Endpoint("http://a"), made]
    assert check_endpoints(iter(["http://a"])) == [Endpoint("http://a")]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ([], "endpoints"),
        ("http://a", "endpoints"),
        (Endpoint("http://a"), "endpoints"),
        (None, "endpoints"),
        (5, "endpoints"),
        (["http://a", "http://b", "nonsense"], "endpoints[2]"),
        (["http://a", 5], "endpoints[1]"),
        (["http://a", "http://A:80/"], "endpoints[1]"),
        (["http://a", Endpoint("http://a", weight=2)], "endpoints[1]"),
        (b"http", "endpoints[0]"),
    ],
)
def test_bad_sets(given: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_endpoints(given)
    assert caught.value.field == field


def fresh(*urls: str) -> list[EndpointState]:
    return [EndpointState(Endpoint(url), HealthState(probed=False)) for url in urls]


def names(states: list[EndpointState]) -> list[str]:
    return [state.endpoint.host for state in states]


def test_apply_keeps_the_state_of_those_known() -> None:
    members = EndpointSet()
    first = members.apply(fresh("http://a", "http://b"))
    assert (names(first.added), first.removed, first.kept) == (["a", "b"], [], [])
    a = members.get("http://a")
    assert a is not None
    a.in_flight = 3
    change = members.apply(
        [EndpointState(Endpoint("http://a", weight=5), HealthState(probed=False)), *fresh("http://c")]
    )
    assert (names(change.added), names(change.removed), names(change.kept)) == (["c"], ["b"], ["a"])
    assert members.get("http://a") is a
    assert (a.in_flight, a.endpoint.weight) == (3, 5)
    assert [state.endpoint.host for state in members] == ["a", "c"]
    assert len(members) == 2
    assert members.get("http://b") is None


def test_a_removed_endpoint_stays_until_its_requests_end() -> None:
    members = EndpointSet()
    a, b = members.apply(fresh("http://a", "http://b")).added
    a.in_flight = 1
    members.apply(fresh("http://c"))
    assert (a.admin, b.admin) == (Admin.REMOVED, Admin.REMOVED)
    assert names(list(members.everyone())) == ["c", "a"]
    members.forget(a)
    members.forget(a)
    assert names(list(members.everyone())) == ["c"]
    assert repr(a) == "<EndpointState http://a removed in_flight=1>"


def test_a_removed_endpoint_that_comes_back_is_the_same() -> None:
    members = EndpointSet()
    (a,) = members.apply(fresh("http://a")).added
    a.in_flight = 1
    members.apply(fresh("http://b"))
    change = members.apply(fresh("http://a", "http://b"))
    assert change.added == [a]
    assert a.admin is Admin.READY
    assert names(list(members.everyone())) == ["a", "b"]


def test_a_removed_endpoint_at_rest_comes_back_as_new() -> None:
    members = EndpointSet()
    (a,) = members.apply(fresh("http://a")).added
    members.apply(fresh("http://b"))
    (again,) = members.apply(fresh("http://a", "http://b")).added
    assert again is not a


def test_what_an_endpoint_says_of_its_load_is_kept_until_it_says_more() -> None:
    (state,) = fresh("http://a")
    assert (state.reported_load, state.report_due) == (None, -math.inf)
    load = ReportedLoad(1.0, utilization=0.5)
    state.take_report(1.0, load)
    state.take_report(2.0, None)
    assert state.reported_load is load
    assert state.report_due == pytest.approx(2.01)
