"""A setting that cannot work is one `ConfigError` naming it, at construction; never a surprise at the first request."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tenacity.asyncio
from io_helpers import Stack

import pathlb
from pathlb import (
    Balancer,
    Breaker,
    ConfigError,
    Endpoint,
    Health,
    Limits,
    Outlier,
    Panic,
    Retry,
    SlowStart,
)

ONE = ["http://a"]
NAN = math.nan


def bad(field: str, make: Callable[[], Any], problem: str = "") -> Any:
    return pytest.param(field, make, problem, id=f"{field}-{problem}" if problem else None)


@pytest.mark.parametrize(
    ("field", "make", "problem"),
    [
        bad("endpoints", lambda: Balancer([]), "at least one"),
        bad("endpoints", lambda: Balancer("http://a"), "must be a list"),
        bad("endpoints", lambda: Balancer(Endpoint("http://a"))),  # type: ignore[arg-type]
        bad("endpoints[1]", lambda: Balancer(["http://a", "http://A:80/"]), "listed twice"),
        bad("endpoints[0]", lambda: Balancer(["a:80"]), "must start with"),
        bad("endpoints[0]", lambda: Balancer(["ftp://a"]), "must start with"),
        bad("endpoints[0]", lambda: Balancer(["http://"]), "no host"),
        bad("endpoints[0]", lambda: Balancer(["http://a:0"]), "port"),
        bad("endpoints[0]", lambda: Balancer(["http://a:99999"]), "port"),
        bad("endpoints[0]", lambda: Balancer(["http://a:x"]), "port"),
        bad("endpoints[0]", lambda: Balancer(["http://u:p@a"]), "user info"),
        bad("endpoints[0]", lambda: Balancer(["http://a/?q"]), "query"),
        bad("endpoints[0]", lambda: Balancer(["http://a/#f"]), "fragment"),
        bad("endpoints[0]", lambda: Balancer(["http://a b"]), "spaces"),
        bad("endpoints[0]", lambda: Balancer(["unix://run/gw.sock"]), "absolute path"),
        bad("endpoints[2]", lambda: Balancer(["http://a", "http://b", 3]), "a string"),  # type: ignore[list-item]
        bad("Endpoint.weight", lambda: Endpoint("http://a", weight=0)),
        bad("Endpoint.weight", lambda: Endpoint("http://a", weight=-1)),
        bad("Endpoint.weight", lambda: Endpoint("http://a", weight=NAN)),
        bad("Endpoint.weight", lambda: Endpoint("http://a", weight=math.inf)),
        bad("Endpoint.weight", lambda: Endpoint("http://a", weight="2")),  # type: ignore[arg-type]
        bad("Endpoint.server_hostname", lambda: Endpoint("https://a", server_hostname="")),
        bad("deadline", lambda: Balancer(ONE, deadline=0)),
        bad("deadline", lambda: Balancer(ONE, deadline=-1)),
        bad("deadline", lambda: Balancer(ONE, deadline=NAN)),
        bad("deadline", lambda: Balancer(ONE, deadline="30")),  # type: ignore[arg-type]
        bad("deadline", lambda: Balancer(ONE, deadline=True)),
        bad("breaker", lambda: Balancer(ONE, breaker={"failures": 5})),  # type: ignore[arg-type]
        bad("breaker", lambda: Balancer(ONE, breaker=None)),  # type: ignore[arg-type]
        bad("outlier", lambda: Balancer(ONE, outlier=Breaker())),  # type: ignore[arg-type]
        bad("panic", lambda: Balancer(ONE, panic=True)),  # type: ignore[arg-type]
        bad("slow_start", lambda: Balancer(ONE, slow_start=10)),  # type: ignore[arg-type]
        bad("retry", lambda: Balancer(ONE, retry=3)),  # type: ignore[arg-type]
        bad("limits", lambda: Balancer(ONE, limits=httpx.Limits()), "httpx's own"),  # type: ignore[arg-type]
        bad("health", lambda: Balancer(ONE, health="/health")),  # type: ignore[arg-type]
        bad("policy", lambda: Balancer(ONE, policy="p2c")),  # type: ignore[arg-type]
        bad("policy", lambda: Balancer(ONE, policy=pathlb.P2C), "an object"),  # type: ignore[arg-type]
        bad("policy", lambda: Balancer(ONE, policy=object())),  # type: ignore[arg-type]
        bad("idempotent", lambda: Balancer(ONE, idempotent="yes")),  # type: ignore[arg-type]
        bad("idempotent", lambda: Balancer(ONE, idempotent=1)),  # type: ignore[arg-type]
        bad("upstream", lambda: Balancer(ONE, upstream=httpx.AsyncHTTPTransport())),  # type: ignore[arg-type]
        bad("Breaker.failures", lambda: Breaker(failures=0)),
        bad("Breaker.failures", lambda: Breaker(failures=2.5)),  # type: ignore[arg-type]
        bad("Breaker.success_rate", lambda: Breaker(success_rate=1.1)),
        bad("Breaker.window", lambda: Breaker(window=0)),
        bad("Breaker.jitter", lambda: Breaker(jitter=0.6)),
        bad("Breaker.open_max", lambda: Breaker(open_for=10, open_max=5), "at least open_for"),
        bad("Outlier.max_ejected", lambda: Outlier(max_ejected=0)),
        bad("Outlier.latency_clear", lambda: Outlier(latency_factor=2, latency_clear=3)),
        bad("Outlier.eject_max", lambda: Outlier(eject_for=10, eject_max=5)),
        bad("Outlier.window", lambda: Outlier(window=NAN)),
        bad("Panic.threshold", lambda: Panic(threshold=2)),
        bad("Panic.threshold", lambda: Panic(threshold=0.5, fail_closed=True), "no meaning"),
        bad("SlowStart.window", lambda: SlowStart(window=-1)),
        bad("SlowStart.floor", lambda: SlowStart(floor=0)),
        bad("Limits.concurrency", lambda: Limits(concurrency=0)),
        bad("Limits.concurrency", lambda: Limits(concurrency=None)),  # type: ignore[arg-type]
        bad("Limits.queue", lambda: Limits(queue=-1)),
        bad("Limits.queue_timeout", lambda: Limits(queue_timeout=NAN)),
        bad("Retry.attempts", lambda: Retry(attempts=0)),
        bad("Retry.statuses", lambda: Retry(statuses=[200])),
        bad("Retry.statuses", lambda: Retry(statuses=["503"])),  # type: ignore[list-item]
        bad("Retry.wait_max", lambda: Retry(wait_base=1, wait_max=0.5)),
        bad("Retry.budget_ratio", lambda: Retry(budget_ratio=-0.1)),
        bad("Retry.budget_ttl", lambda: Retry(budget_ttl=0)),
        bad("Retry.stop", lambda: Retry(stop=3), "tenacity"),  # type: ignore[arg-type]
        bad("Retry.wait", lambda: Retry(wait=0.5)),  # type: ignore[arg-type]
        bad("Retry.retry", lambda: Retry(retry=True)),  # type: ignore[arg-type]
        bad("Retry.retry", lambda: Retry(retry=tenacity.asyncio.retry_if_exception(bool)), "async"),  # type: ignore
        bad("Retry.stop", lambda: Retry(attempts=3, stop=lambda state: True), "one of the two"),
        bad("Health.path", lambda: Health("health")),
        bad("Health.path", lambda: Health("")),
        bad("Health.path", lambda: Health("/a b")),
        bad("Health.path", lambda: Health("/grün")),
        bad("Health.path", lambda: Health("/a\r\nX: y")),
        bad("Health.path", lambda: Health(None)),  # type: ignore[arg-type]
        bad("Health.statuses", lambda: Health("/", statuses=())),
        bad("Health.statuses", lambda: Health("/", statuses=200)),  # type: ignore[arg-type]
        bad("Health.statuses", lambda: Health("/", statuses="200")),  # type: ignore[arg-type]
        bad("Health.statuses", lambda: Health("/", statuses=[99])),
        bad("Health.statuses", lambda: Health("/", statuses=["200"])),  # type: ignore[list-item]
        bad("Health.wait", lambda: Health("/", wait="no")),  # type: ignore[arg-type]
        bad("Health.interval", lambda: Health("/", interval=0)),
        bad("Health.timeout", lambda: Health("/", timeout=NAN)),
        bad("Health.rise", lambda: Health("/", rise=0)),
        bad("Health.fall", lambda: Health("/", fall=1.5)),  # type: ignore[arg-type]
        bad("Health.jitter", lambda: Health("/", jitter=2)),
        bad("Health.changing_interval", lambda: Health("/", interval=1, changing_interval=2)),
    ],
)
def test_it_names_the_field(field: str, make: Callable[[], Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert str(caught.value) == f"{field}: {caught.value.problem}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("transport", {"transport": httpx.MockTransport(lambda request: httpx.Response(200))}),
        ("base_url", {"base_url": "/v1"}),
        ("base_url", {"base_url": "path-gateway"}),
        ("base_url", {"base_url": "ftp://path-gateway"}),
        ("base_url", {"base_url": "http://"}),
        ("base_url", {"base_url": "http://a:b"}),
        ("base_url", {"base_url": 5}),
        ("host", {"host": "a b"}),
        ("host", {"host": 5}),
        ("host", {"host": b"a"}),
        ("http1", {"http1": False}),
        ("limits", {"limits": httpx.Limits(max_connections=5)}),
        ("deadline", {"deadline": -1}),
        ("retry", {"retry": 3}),
        ("verify", {"verify": False, "upstream": lambda endpoint: None}),
        ("http2", {"http2": True, "upstream": lambda endpoint: None}),
        ("proxy", {"proxy": "http://127.0.0.1:1", "upstream": lambda endpoint: None}),
        ("proxy", {"proxy": "ftp://127.0.0.1:1"}),
        ("proxy", {"proxy": "http://a:b"}),
        ("proxy", {"proxy": 5}),
    ],
)
def test_the_clients_own(stack: Stack, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        stack.pathlb.AsyncClient(ONE, **options)
    assert caught.value.field == field


def test_a_proxy_leads_to_no_unix_socket(stack: Stack) -> None:
    with pytest.raises(ConfigError) as caught:
        stack.pathlb.AsyncClient(["unix:///run/gw.sock"], proxy="http://127.0.0.1:1")
    assert caught.value.field == "proxy"


def test_http2_says_what_it_needs(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install") as caught:
        stack.pathlb.AsyncClient(ONE, http2=True)
    assert caught.value.field == "http2"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("verify", {"verify": False}),
        ("cert", {"cert": "x.pem"}),
        ("http1", {"http1": False}),
        ("http2", {"http2": True}),
        ("proxy", {"proxy": "http://127.0.0.1:1"}),
        ("trust_env", {"trust_env": False}),
        ("retry", {"retry": Retry()}),
        ("deadline", {"deadline": 3}),
        ("upstream", {"upstream": lambda endpoint: None}),
    ],
)
def test_what_belongs_to_the_balancer_is_refused_beside_one(stack: Stack, field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="belongs to the Balancer") as caught:
        stack.pathlb.AsyncClient(Balancer(ONE), **options)
    assert caught.value.field == field


def test_an_unknown_option_is_pythons_own_error(stack: Stack) -> None:
    with pytest.raises(TypeError, match="retries"):
        stack.pathlb.AsyncClient(ONE, retries=3)


def test_no_message_repeats_a_secret(stack: Stack) -> None:
    makes: list[Callable[[], Any]] = [
        lambda: Balancer(["http://user:hunter2@a"]),
        lambda: Balancer(["ftp://user:hunter2@a"]),
        lambda: Balancer(["http://a/?token=hunter2"]),
        lambda: Balancer(["http://user:hunter2@a:port"]),
        lambda: stack.pathlb.AsyncClient(ONE, base_url="ftp://user:hunter2@a"),
        lambda: stack.pathlb.AsyncClient(ONE, base_url="http://user:hunter2@a:port"),
        lambda: stack.pathlb.AsyncClient(ONE, proxy="ftp://user:hunter2@a"),
    ]
    for make in makes:
        with pytest.raises(ConfigError) as caught:
            make()
        assert "hunter2" not in str(caught.value)


def test_settings_cannot_be_changed_afterwards() -> None:
    statuses = {200}
    settings: list[Any] = [Breaker(), Outlier(), Panic(), SlowStart(), Limits(), Retry(), Health("/", statuses)]
    for one in settings:
        name = next(iter(one.__dataclass_fields__))
        with pytest.raises(AttributeError):
            setattr(one, name, 1)
    statuses.add(500)
    assert settings[-1].statuses == {200}
