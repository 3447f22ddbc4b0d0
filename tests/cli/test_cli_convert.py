"""`pathlb convert`: what becomes of a configuration of nginx or Traefik, and what is said of the rest."""

from __future__ import annotations

import argparse
import builtins
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pathlb.cli import main, serve
from pathlb.converting import directives, nginx, traefik
from pathlb.serving.supervisor import Source

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "examples" / "docker"

Convert = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Converts a text; answers the TOML as data, which `pathlb serve --config` has read, and the notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATHLB_ADMIN_TOKEN", raising=False)

    def run(name: str, text: str, *arguments: str) -> tuple[dict[str, Any], list[str]]:
        Path(name).write_text(text, "utf-8")
        assert main(["convert", name, *arguments]) == 0
        output = capsys.readouterr()
        notes = output.err.splitlines()
        comments = [line.removeprefix("# - ") for line in output.out.splitlines() if line.startswith("# - ")]
        assert comments == notes
        Path("result.toml").write_text(output.out, "utf-8")
        data = tomllib.loads(output.out)
        if "tls" not in data:  # there are no such files
            parser = argparse.ArgumentParser()
            serve.add_arguments(parser)
            options = parser.parse_args(["--config", "result.toml"])
            config = Source(options.config, serve.read_flags(options)).read()
            assert [one.url for one in config.endpoints] == [one["url"] for one in data["endpoints"]]
        return data, notes

    return run


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Converts what cannot be converted; answers what is said."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, text: str | bytes | None, *arguments: str) -> str:
        if text is not None:
            Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
        assert main(["convert", name, *arguments]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        return output.err.strip()

    return run


# --- nginx

NGINX = """\
events {}
http {
    upstream gateways {
        %s
    }
    server {
        listen 80;
        location / {
            proxy_pass http://gateways;
            proxy_set_header Host $host;
            %s
        }
        %s
    }
}
"""
A, B = {"url": "http://a:3069"}, {"url": "http://b:3069"}
STICKY = "for JSON-RPC filters set sticky_filters = true in [jsonrpc]"


def test_the_plans_nginx_becomes_the_plans_pathlb(convert: Convert) -> None:
    servers = "least_conn; " + " ".join(f"server path-gateway-{number}:3069;" for number in range(1, 6))
    fields = "proxy_http_version 1.1; proxy_set_header Connection ''; proxy_set_header X-Real-IP $remote_addr;"
    data, notes = convert("nginx.conf", NGINX % (servers, fields, "client_max_body_size 75m;"))
    assert data == {
        "bind": "0.0.0.0:80",
        "endpoints": [{"url": f"http://path-gateway-{number}:3069"} for number in range(1, 6)],
    }
    assert notes == []


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ("server a:3069;", {"policy": "round-robin", "endpoints": [A]}),
        ("random two least_conn; server a:3069;", {"policy": "p2c", "endpoints": [A]}),
        ("least_conn; server a:3069 weight=2; server b:3069;", {"endpoints": [{**A, "weight": 2}, B]}),
        ("least_conn; server a;", {"endpoints": [{"url": "http://a"}]}),
        ("least_conn; server [::1]:3069;", {"endpoints": [{"url": "http://[::1]:3069"}]}),
        ("least_conn; server unix:/run/gw.sock;", {"endpoints": [{"url": "unix:///run/gw.sock"}]}),
        ("least_conn; server a:3069; server a:3069;", {"endpoints": [{**A, "weight": 2}]}),
        ("least_conn; zone z 64k; server a:3069 max_conns=500;", {"endpoints": [A], "limits": {"concurrency": 500}}),
    ],
)
def test_nginx_servers(convert: Convert, servers: str, expected: dict[str, Any]) -> None:
    assert convert("nginx.conf", NGINX % (servers, "", "")) == ({"bind": "0.0.0.0:80", **expected}, [])


@pytest.mark.parametrize(
    ("servers", "urls", "said"),
    [
        ("server a:3069 max_fails=3;", 1, "server a:3069 max_fails=3: the circuit breaker decides"),
        ("server a:3069 fail_timeout=30s;", 1, "see failures and open_for in [breaker]"),
        ("server a:3069; server b:3069 backup;", 1, "server b:3069 backup: there are no backups: it is left out"),
        ("server a:3069; server b:3069 down;", 1, "server b:3069 down: it is left out"),
        ("server a:3069; keepalive 32;", 1, "keepalive 32: "),
        ("server a:3069; ip_hash;", 1, f"ip_hash: there is no affinity to an address, key or cookie ({STICKY}): "),
        ("server a:3069 route=a;", 1, STICKY),
        ("server a:3069; nonsense x;", 1, "nonsense x: `pathlb serve` has nothing like it"),
        ("server a:3069 max_conns=5; server b:3069 max_conns=9;", 2, "max_conns differ: the least, 5"),
    ],
)
def test_what_nginxs_servers_lose(convert: Convert, servers: str, urls: int, said: str) -> None:
    data, [note] = convert("nginx.conf", NGINX % (servers, "", ""))
    assert len(data["endpoints"]) == urls
    assert re.match(r"nginx.conf:[34]: ", note)
    assert said in note


@pytest.mark.parametrize(
    ("inside", "expected", "said"),
    [
        ("proxy_read_timeout 10s;", {"timeouts": {"read": 10}}, []),
        ("proxy_connect_timeout 500ms;", {"timeouts": {"connect": 0.5}}, []),
        ("proxy_send_timeout 1m5s;", {"timeouts": {"write": 65}}, []),
        ("proxy_read_timeout 60;", {"timeouts": {"read": 60}, "deadline": 60}, ["a request has 60 s with all"]),
        ("client_max_body_size 10m;", {"max_body": 10 * 2**20}, []),
        ("client_max_body_size 0;", {"max_body": 2**40}, []),
        ("proxy_set_header X-Environment prod;", {"request_headers": {"X-Environment": "prod"}}, []),
        ("proxy_set_header Accept-Encoding '';", {"request_headers": {"Accept-Encoding": False}}, []),
        ("proxy_set_header X-Trace $request_id;", {}, ["X-Trace $request_id: there are no variables"]),
        ("proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;", {}, ["list the proxies before pathlb"]),
        ("add_header X-Served-By lb;", {"response_headers": {"X-Served-By": "lb"}}, []),
        ("proxy_hide_header Server;", {"response_headers": {"Server": False}}, []),
        ("proxy_next_upstream off;", {"retry": {"attempts": 1}}, []),
        ("proxy_next_upstream error http_502 http_503;", {"retry": {"statuses": [502, 503]}}, []),
        ("proxy_next_upstream_tries 2;", {"retry": {"attempts": 2}}, []),
        ("set_real_ip_from 10.0.0.0/8;", {"trusted": ["10.0.0.0/8"]}, []),
        ("health_check uri=/health interval=2 fails=3;", {"health": {"path": "/health", "interval": 2, "fall": 3}}, []),
        ("access_log /var/log/x;", {"access_log": True}, ["it goes to stdout"]),
        ("gzip on;", {}, ["gzip on: compress in the gateways"]),
        ("proxy_set_header Host gw.example;", {"host": "gw.example"}, []),
        ("proxy_set_header Host $proxy_host;", {"host": "gateways"}, []),
        ("proxy_set_header X-Forwarded-Port 80;", {}, ["pathlb says where a request came from by itself"]),
        ("proxy_set_header TE trailers;", {}, ["says where a message goes or ends"]),
        ("add_header X-At $time_local;", {}, ["there are no variables"]),
        ("proxy_next_upstream error non_idempotent;", {"retry": {"statuses": []}}, ["not safe to send twice"]),
        ("proxy_next_upstream_timeout 9s;", {}, ["see deadline"]),
        ("keepalive_timeout 60;", {"keep_alive": 60}, []),
        ("keepalive_timeout 0;", {}, ["connections of callers are kept"]),
        ("access_log off;", {}, []),
        ("set_real_ip_from gw.example;", {}, ["list the addresses in trusted"]),
        ("real_ip_header X-Mine;", {}, ["are to say it in X-Forwarded-For or X-Real-IP"]),
        ("real_ip_header X-Real-IP;", {}, []),
        (
            "health_check interval=500ms passes=3 match=ok;",
            {"health": {"path": "/", "interval": 0.5, "changing_interval": 0.5, "rise": 3}},
            ["health_check match=ok: see [health]"],
        ),
        ("limit_req zone=one;", {}, ["no limit on the rate"]),
        ("if ($request_method = PUT) { return 405; }", {}, ["has nothing like it"]),
    ],
)
def test_nginx_locations(convert: Convert, inside: str, expected: dict[str, Any], said: list[str]) -> None:
    data, notes = convert("nginx.conf", NGINX % ("least_conn; server a:3069;", inside, ""))
    assert data == {"bind": "0.0.0.0:80", "endpoints": [A], **expected}
    assert len(notes) == len(said)
    for note, part in zip(notes, said, strict=True):
        assert note.startswith("nginx.conf:11: ")
        assert part in note


def test_the_innermost_level_counts_and_another_location_is_told_of(convert: Convert) -> None:
    outer = (
        "proxy_read_timeout 5s; proxy_connect_timeout 2s; proxy_set_header X-Outer yes; location /static { root /; }"
    )
    data, [note] = convert("nginx.conf", NGINX % ("least_conn; server a:3069;", "proxy_read_timeout 7s;", outer))
    assert data["timeouts"] == {"read": 7, "connect": 2}
    assert "request_headers" not in data
    assert note.startswith("nginx.conf:13: location /static: not converted")


@pytest.mark.parametrize(
    ("snippet", "expected", "said"),
    [
        ("", {}, ["no proxy_pass to gw is there: set bind"]),
        ("server { location / { proxy_pass http://gw; } }", {"bind": "0.0.0.0:80", "host": "gw"}, []),
        ("server { listen 127.0.0.1:81; location / { proxy_pass http://gw; } }", {"bind": "127.0.0.1:81"}, []),
        (
            "server { listen [::]:80; listen 80; location / { proxy_pass http://gw; } }",
            {"bind": "[::]:80"},
            ["[::]:PORT"],
        ),
        ("server { location /rpc/ { proxy_pass http://gw/; } }", {"rewrite": ["/rpc", "/"]}, ["every path to gw"]),
        ("server { location / { proxy_pass http://gw/v1/; } }", {"rewrite": ["/", "/v1"]}, []),
        ("server { location / { proxy_pass http://gw/v1; } }", {}, ["none of whole segments"]),
        (
            "server { server_name rpc.example; location / { proxy_pass https://gw; proxy_ssl_name gw.example; } }",
            {"endpoints": [{"url": "https://a:3069", "server_hostname": "gw.example"}]},
            ["https: certificates", "server_name rpc.example: pathlb answers for every Host"],
        ),
        (
            "server { listen unix:/run/x; listen localhost; listen 81; location / { proxy_pass http://gw; } }",
            {"bind": "localhost:80"},
            ["listens on TCP only", "there is one listener, of the first listen"],
        ),
        (
            "server { listen 443 ssl http2; location / { proxy_pass http://gw; } }",
            {"tls": {"certificate": "CERTIFICATE.pem", "key": "KEY.pem"}},
            ["no ssl_certificate is", "no ssl_certificate_key is", "listen http2: "],
        ),
        (
            "server { location /a { proxy_pass http://gw; }\nlocation / { proxy_pass http://gw; } }",
            {"bind": "0.0.0.0:80"},
            ["location /a: not converted", "another use of gw, in location /a"],
        ),
    ],
)
def test_an_nginx_snippet_as_in_conf_d(
    convert: Convert, snippet: str, expected: dict[str, Any], said: list[str]
) -> None:
    data, notes = convert("gateways.conf", f"upstream gw {{ least_conn; server a:3069; }}\n{snippet}\n")
    assert {**data, **expected} == data
    assert len(notes) == len(said)
    assert all(part in note for note, part in zip(notes, said, strict=True))


def test_nginx_tls_and_workers(convert: Convert, tmp_path: Path) -> None:
    text = """worker_processes 4;
    http { upstream gw { least_conn; server a:3069; }
    server { listen 443 ssl; ssl_certificate tls/chain.pem; ssl_certificate_key /etc/key.pem;
    location / { proxy_pass http://gw; } } }"""
    data, notes = convert("nginx.conf", text)
    assert (data["bind"], data["workers"]) == ("0.0.0.0:443", 4)
    assert data["tls"] == {"certificate": str(tmp_path / "tls/chain.pem"), "key": "/etc/key.pem"}
    assert notes == []


def test_https_servers_without_a_port_or_on_a_unix_socket(convert: Convert) -> None:
    text = (
        "upstream gw { least_conn; server a; server unix:/run/gw; }\n\nserver { location / { proxy_pass https://gw; } }"
    )
    data, notes = convert("nginx.conf", text)
    assert data["endpoints"] == [{"url": "https://a:80"}, {"url": "unix:///run/gw"}]
    assert "there is no TLS over a unix socket" in notes[0]


def test_workers_auto(convert: Convert) -> None:
    _, notes = convert("nginx.conf", "worker_processes auto;" + NGINX % ("server a:3069;", "", ""))
    assert [note.partition(", ")[0] for note in notes] == [
        "nginx.conf:1: worker_processes auto: set workers to the number of cores that pathlb may use"
    ]


def test_nginx_files_that_include_others(convert: Convert, tmp_path: Path) -> None:
    Path(tmp_path, "up.conf").write_text("\nupstream gw { least_conn; server a:3069; keepalive 2; }")
    data, notes = convert("nginx.conf", "http { include up.conf;\ninclude missing.conf; }")
    assert data == {"endpoints": [A]}
    assert [note.split(": ")[:2] for note in notes] == [
        ["nginx.conf:2", "include missing.conf"],
        ["up.conf:2", "no proxy_pass to gw is there"],
        ["up.conf:2", "keepalive 2"],
    ]


def test_several_upstreams_are_chosen_from(convert: Convert, refuse: Callable[..., str]) -> None:
    text = "upstream one { least_conn; server a:3069; }\nupstream two { least_conn; server b:3069; }\n"
    said = "pathlb: nginx.conf: has several: choose with --upstream NAME: one (nginx.conf:1), two (nginx.conf:2)"
    assert refuse("nginx.conf", text) == said
    assert "no upstream block 'three'; there is one" in refuse("nginx.conf", text, "--upstream", "three")
    assert convert("nginx.conf", text, "--upstream", "two")[0] == {"endpoints": [B]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "nginx.conf: cannot be read: No such file or directory"),
        ("", "nginx.conf: has no upstream block"),
        ("stream { upstream x { server a:1; } }", "nginx.conf: has no upstream block"),
        ("http {\nserver {", 'nginx.conf:2: unexpected end of file, expecting "}"'),
        ("upstream x {\n server a:99999; }", "nginx.conf:2: "),
        ("upstream x {\n server a:1 weight=two; }", "nginx.conf:2: server a:1 weight=two: 'two' is no whole number"),
        ("upstream x {\n server a:1 down; }", "nginx.conf:1: upstream x has no server that is neither backup nor down"),
        (
            "upstream x { server a:1; }\nserver { location / { proxy_pass http://x;\nproxy_read_timeout soon; } }",
            "nginx.conf:3: proxy_read_timeout soon: 'soon' is no time",
        ),
        (
            "upstream x { server a:1; }\nserver { listen 70000;\nlocation / { proxy_pass http://x; } }",
            "nginx.conf:2: bind: must be HOST:PORT, with a port up to 65535",
        ),
    ],
)
def test_nginx_errors_have_a_place(refuse: Callable[..., str], text: str | None, said: str) -> None:
    assert refuse("nginx.conf", text).startswith(f"pathlb: {said}")


# --- Traefik


TLS = {"certificate": "/c", "key": "/k"}
V1 = {"rewrite": ["/", "/v1"]}


def service(balancer: dict[str, Any], *, middlewares: Any = None, router: Any = None, **more: Any) -> str:
    """A file with static and dynamic configuration."""
    balancer = {"servers": [{"url": "http://a:3069"}], **balancer}
    routers = {"r": {"rule": "PathPrefix(`/`)", "service": "gw", **(router or {})}}
    http: dict[str, Any] = {"services": {"gw": {"loadBalancer": balancer}}, "routers": routers}
    if middlewares is not None:
        http["middlewares"] = middlewares
    return json.dumps({"entryPoints": {"web": {"address": ":80"}}, "http": http, **more}, indent=1)


@pytest.mark.parametrize(
    ("balancer", "expected", "said"),
    [
        ({}, {}, []),
        ({"passHostHeader": True}, {}, []),
        ({"passHostHeader": False}, {"host": "a:3069"}, []),
        ({"servers": [{"url": "http://a:3069/", "weight": 3}]}, {"endpoints": [{**A, "weight": 3}]}, []),
        ({"servers": [{"url": "http://a:3069/x"}]}, {}, ["the path is left out"]),
        ({"strategy": "p2c"}, {"policy": "p2c"}, []),
        (
            {"healthCheck": {"path": "up", "interval": "500ms", "timeout": 3}},
            {"health": {"path": "/up", "interval": 0.5, "changing_interval": 0.5, "timeout": 3}},
            [],
        ),
        ({"healthCheck": {"path": "/", "status": 204}}, {"health": {"path": "/", "statuses": [204]}}, []),
        ({"healthCheck": {"path": "/", "port": 1}}, {"health": {"path": "/"}}, ["healthCheck.port = 1: "]),
        ({"sticky": {"cookie": {"name": "x"}}}, {}, [STICKY]),
        ({"responseForwarding": {"flushInterval": "1s"}}, {}, []),
        ({"passHostHeader": False, "servers": [A, B]}, {"host": None}, ["passHostHeader = false"]),
        ({"servers": [A, {**B, "weight": 0}]}, {}, ["http://b:3069 has weight 0: it is left out"]),
        ({"strategy": "leasttime"}, {"policy": None}, ["least-connections is used"]),
        ({"healthCheck": {}}, {"health": {"path": "/"}}, []),
        ({"newThing": {}}, {}, ["newThing: `pathlb serve` has nothing like it"]),
    ],
)
def test_traefik_services(
    convert: Convert, balancer: dict[str, Any], expected: dict[str, Any], said: list[str]
) -> None:
    data, notes = convert("traefik.yml", service(balancer))
    endpoints = [A, B] if expected.get("host", "") is None else [A]
    wanted = {"bind": "0.0.0.0:80", "policy": "round-robin", "endpoints": endpoints, **expected}
    # None: the default, which is not written.
    assert data == {key: value for key, value in wanted.items() if value not in (None, {})}
    assert len(notes) == len(said)
    assert all(part in note for note, part in zip(notes, said, strict=True))
    assert all(re.match(r"traefik.yml:\d+: ", note) for note in notes)


@pytest.mark.parametrize(
    ("file", "expected", "said"),
    [
        (service({}, router={"rule": "Host(`x`)"}), {}, ["rule Host(`x`): pathlb takes every request"]),
        (service({}, router={"tls": {"certResolver": "le"}}), {}, ["tls: there is no ACME"]),
        (service({}, router={"priority": 3}), {}, ["priority = 3: there is one route"]),
        (service({}, router={"middlewares": ["x@docker"]}), {}, ["middleware x@docker: it is not in this file"]),
        (
            service({}, router={"middlewares": ["m"]}, middlewares={"m": {"stripPrefix": {"prefixes": ["/rpc/"]}}}),
            {"rewrite": ["/rpc", "/"]},
            [],
        ),
        (service({}, router={"middlewares": ["m"]}, middlewares={"m": {"compress": {}}}), {}, ["m.compress: "]),
        (service({}, middlewares={"unused": {"compress": {}}}), {}, []),
        (
            service(
                {},
                router={"middlewares": "m, n"},
                middlewares={
                    "m": {"headers": {"customRequestHeaders": {"X-A": "1", "X-B": ""}}},
                    "n": {"buffering": {"maxRequestBodyBytes": 1000}, "retry": {"attempts": 2}},
                },
            ),
            {"request_headers": {"X-A": "1", "X-B": False}, "max_body": 1000, "retry": {"attempts": 2}},
            [],
        ),
        (service({}, accessLog={}), {"access_log": True}, ["accessLog: it goes to stdout"]),
        (service({}, tls={"certificates": [{"certFile": "/c", "keyFile": "/k"}]}), {"tls": TLS}, []),
        (
            service({}, tls={"certificates": [{"certFile": "/c", "keyFile": "/k"}, {"certFile": "d", "keyFile": "e"}]}),
            {"tls": TLS},
            ["tls.certificates[1]: there is one certificate"],
        ),
        (
            service({}, tls={"certificates": [{"certFile": "c", "keyFile": "k"}]}),
            {"tls": {"certificate": "c", "key": "k"}},
            ["now relative to the TOML"],
        ),
        (
            service({}, serversTransport={"forwardingTimeouts": {"dialTimeout": "2s", "responseHeaderTimeout": "45s"}}),
            {"timeouts": {"connect": 2, "read": 45}, "deadline": 45},
            [],
        ),
        (service({}, router={"middlewares": ["m"]}, middlewares={"m": {"addPrefix": {"prefix": "/v1"}}}), V1, []),
        (
            service({}, router={"middlewares": ["m"]}, middlewares={"m": {"stripPrefix": {"prefixes": ["/a", "/b"]}}}),
            {"rewrite": ["/a", "/"]},
            ["stripPrefix /b: one prefix"],
        ),
        (
            service(
                {},
                router={"middlewares": ["m"]},
                middlewares={"m": {"headers": {"customRequestHeaders": {"Host": "x", "Connection": "y"}}}},
            ),
            {"host": "x"},
            ["customRequestHeaders.Connection: says where"],
        ),
        (
            service(
                {},
                entryPoints={
                    "web": {
                        "address": ":80/tcp",
                        "forwardedHeaders": {"insecure": True},
                        "transport": {"lifeCycle": {"graceTimeOut": 5}, "respondingTimeouts": {"idleTimeout": "1m30s"}},
                    },
                    "traefik": {"address": ":8080"},
                },
            ),
            {"grace": 5, "keep_alive": 90},
            ["forwardedHeaders.insecure: list the proxies"],
        ),
        (service({}, api={"dashboard": True}), {}, ["api: the admin listener"]),
        (
            service(
                {}, entryPoints={"web": {"address": "127.0.0.1:8000", "forwardedHeaders": {"trustedIPs": ["10.0.0.1"]}}}
            ),
            {"bind": "127.0.0.1:8000", "trusted": ["10.0.0.1"]},
            [],
        ),
        (
            service({}, entryPoints={"a": {"address": ":1"}, "b": {"address": ":2"}}, router={"entryPoints": ["b"]}),
            {"bind": "0.0.0.0:2"},
            ["entry point a: there is one listener, of b"],
        ),
    ],
)
def test_what_leads_to_a_traefik_service(
    convert: Convert, file: str, expected: dict[str, Any], said: list[str]
) -> None:
    data, notes = convert("dynamic.yaml", file)
    assert data == {"bind": "0.0.0.0:80", "policy": "round-robin", "endpoints": [A], **expected}
    assert len(notes) == len(said)
    assert all(part in note for note, part in zip(notes, said, strict=True))


COMPOSE = """\
services:
  traefik:
    image: traefik:v3
    command:
      - --providers.docker=true
      - --entrypoints.web.address=:80
  a:
    image: path
    labels:
      - traefik.enable=true
      - traefik.http.routers.gw.rule=PathPrefix(`/`)
      - traefik.http.services.gw.loadbalancer.server.port=3069
      - traefik.http.services.gw.loadbalancer.healthcheck.path=/health
      - traefik.http.services.gw.loadbalancer.healthcheck.interval=10s
  b:
    image: path
    labels:
      traefik.http.services.gw.loadbalancer.server.port: 3069
      traefik.http.services.gw.loadbalancer.sticky.cookie: true
"""


def test_labels_of_several_containers_are_one_service(convert: Convert) -> None:
    data, notes = convert("docker-compose.yml", COMPOSE)
    assert data == {
        "bind": "0.0.0.0:80",
        "policy": "round-robin",
        "health": {"path": "/health", "interval": 10},
        "endpoints": [A, B],
    }
    assert [note.partition(": ")[0] for note in notes] == ["docker-compose.yml:19"]
    assert "no affinity to a cookie" in notes[0]


def test_https_and_the_transport_of_a_service(convert: Convert) -> None:
    text = """http:
  routers:
    one: {rule: "PathPrefix(`/`)", service: gw@file}
    two: {rule: "Host(`x`)", service: gw}
    other: {rule: "Host(`y`)", service: else}
  serversTransports:
    t: {serverName: gw.example, insecureSkipVerify: true, forwardingTimeouts: {dialTimeout: 3s}}
    unused: {serverName: x}
  services:
    gw: {loadBalancer: {serversTransport: t, servers: [{url: "https://a"}]}}
"""
    data, notes = convert("t.yml", text)
    assert data["endpoints"] == [{"url": "https://a", "server_hostname": "gw.example"}]
    assert data["timeouts"] == {"connect": 3}
    assert [note.partition(": ")[0] for note in notes] == ["t.yml:3", "t.yml:4", "t.yml:7", "t.yml:10"]
    assert "another router to gw" in notes[1]
    assert "insecureSkipVerify = True" in notes[2]


def test_labels_with_scheme_weight_and_servers_in_a_list(convert: Convert) -> None:
    text = """services:
  a:
    expose: [3069]
    ports: [{target: 9090, published: 1}]
    deploy:
      labels:
        unrelated: 1
        traefik.http.services.gw.loadbalancer.server.scheme: https
        traefik.http.services.gw.loadbalancer.server.weight: 2
  b:
    labels: ["traefik.http.services.gw.loadbalancer.servers[0].url=http://b:3069"]
"""
    data, notes = convert("compose.yaml", text)
    assert data["endpoints"] == [{"url": "https://a:3069", "weight": 2}, B]
    assert ["no entry point" in notes[0], "https: certificates" in notes[1]] == [True, True]


def test_labels_with_server_urls_as_in_the_plan(convert: Convert) -> None:
    labels = "".join(
        f"      - traefik.http.services.gw.loadbalancer.server.url=http://path-gateway-{number}:3069\n"
        for number in range(1, 6)
    )
    data, notes = convert("compose.yml", f"services:\n  lb:\n    image: traefik\n    labels:\n{labels}")
    assert [one["url"] for one in data["endpoints"]] == [f"http://path-gateway-{number}:3069" for number in range(1, 6)]
    assert [note.partition(": ")[0] for note in notes] == ["compose.yml", "compose.yml:6"]
    assert "no entry point" in notes[0]
    assert "Traefik takes the last" in notes[1]


def test_a_container_without_a_port_label_has_the_lowest_it_exposes(convert: Convert) -> None:
    text = "services:\n  a:\n    ports: ['80:9090', '127.0.0.1:1:3069/tcp']\n    deploy: {replicas: 3}\n    labels: "
    data, notes = convert("c.yml", f"{text}['traefik.http.services.gw.loadbalancer.passhostheader=true']\n")
    assert data["endpoints"] == [A]
    assert any("3 replicas behind one name" in note for note in notes)


def test_several_services_are_chosen_from(convert: Convert, refuse: Callable[..., str]) -> None:
    text = """http:
  services:
    one: {loadBalancer: {servers: [{url: "http://a:3069"}]}}
    two.x: {loadBalancer: {servers: [{url: "http://b:3069"}]}}
    all: {weighted: {services: [{name: one}]}}
"""
    assert "--upstream NAME: one (t.yml:3), two.x (t.yml:4)" in refuse("t.yml", text)
    assert refuse("t.yml", text, "--upstream", "all").startswith("pathlb: t.yml:5: all is weighted; ")
    assert convert("t.yml", text, "--upstream", "two.x")[0]["endpoints"] == [B]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "t.yml: cannot be read: No such file"),
        ("", "t.yml: has no loadBalancer service"),
        ("- 1", "t.yml:1: must be a table"),
        ("a: 1\nb: [", "t.yml:2: expected the node content"),
        ("a: 1\n\tb: 2", "t.yml:2: found character '\\t'"),
        (b"a: 1\nb: \x01", "t.yml:2: is no YAML: special characters are not allowed"),
        ("a: 1\nb: !python/object:os.system x", "t.yml:2: could not determine a constructor"),
        ("a: &x\n  b: *x", "t.yml:2: a.b: its aliases"),
        ("a: &x\n  - *x", "t.yml:1: a[0]: its aliases"),
        ("providers: {file: {filename: d.yml}}", "t.yml: has no loadBalancer service: it is the static configuration"),
        (
            "services:\n a:\n  labels:\n   - traefik.http.services.x.loadbalancer.passhostheader=true",
            "t.yml:4: x: no loadbalancer.server.port, and a exposes none",
        ),
        (
            "services:\n a:\n  labels:\n   - traefik.http.services.x.loadbalancer.servers[5000].url=http://a",
            "t.yml:4: http.services.x.loadbalancer.servers[5000].url: there cannot be so many",
        ),
        (
            "entryPoints: {w: {address: ':1', forwardedHeaders: {trustedIPs: [x]}}}\n"
            "http: {services: {x: {loadBalancer: {servers: [{url: 'http://a'}]}}}}",
            "t.yml:1: 'x' is not a network",
        ),
        ("http: {services: {x: {loadBalancer: {\nservers: [{url: {a: 1}}]}}}}", "t.yml:2: http.services.x.load"),
        (
            "http: {services: {x: {loadBalancer: {\nservers: [{url: 'http://[a'}]}}}}",
            "t.yml:2: 'http://[a' is not a URL",
        ),
        (
            "http: {services: {x: {loadBalancer: {\nservers: [{url: 'http://a', weight: much}]}}}}",
            "t.yml:2: http.services.x.loadBalancer.servers[0].weight: 'much' is no number",
        ),
        ("http: {services: {x: {loadBalancer: {\nservers: [{weight: 1}]}}}}", "t.yml:2: http.services.x.loadBalancer"),
        (
            "http: {services: {x: {loadBalancer: {\nservers: [{url: 'ftp://a'}]}}}}",
            "t.yml:2: 'ftp://a' must start with",
        ),
        ("http: {services: {x: {loadBalancer: {\n}}}}", "t.yml:1: http.services.x.loadBalancer has no servers"),
        (
            "http: {services: {x: {loadBalancer: {servers: [{url: 'http://a'}],\nhealthCheck: {interval: soon}}}}}",
            "t.yml:2: http.services.x.loadBalancer.healthCheck.interval: 'soon' is no duration",
        ),
        (
            "http: {services: {x: {loadBalancer: {servers: [{url: 'http://a'}],\nhealthCheck: {timeout: 0}}}}}",
            "t.yml:2: health.timeout: must be at least 0.001",
        ),
    ],
)
def test_traefik_errors_have_a_place(refuse: Callable[..., str], text: str | bytes | None, said: str) -> None:
    assert refuse("t.yml", text).startswith(f"pathlb: {said}")


# --- the command


def test_the_output_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "nginx.conf", tmp_path / "pathlb.toml"
    source.write_text(NGINX % ("server a:3069;", "", ""))
    assert main(["convert", str(source), "-o", str(target)]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"wrote {target}: pathlb serve --config {target}\n"
    assert Source(str(target), {}).read().policy == "round-robin"
    assert main(["convert", str(source), "-o", str(tmp_path / "no" / "where")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_notes_cannot_break_out_of_their_comment(convert: Convert) -> None:
    data, [note] = convert("nginx.conf", NGINX % ("server a:3069;", 'return 200 "a\n\x01[endpoints]";', ""))
    assert data["endpoints"] == [A]
    assert "return 200 a??[endpoints]" in note


def test_traefiks_toml_is_refused(refuse: Callable[..., str]) -> None:
    assert refuse("traefik.toml", "") == "pathlb: traefik.toml: Traefik's TOML is not read: write it as YAML"


@pytest.mark.parametrize(
    ("file", "module", "package"), [("nginx.conf", "crossplane", "crossplane"), ("t.yml", "yaml", "pyyaml")]
)
def test_without_the_extra_it_says_what_to_install(
    file: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, *rest)

    for name in (nginx.__name__, directives.__name__, traefik.__name__, "pathlb.converting.tree"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["convert", file]) == 1
    assert f"needs {package}: pip install 'pathlb[convert]'" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: pathlb convert")
    assert "Exit status: 0" in output


# --- examples/docker


def test_the_compose_file_has_the_shape_of_the_plan() -> None:
    compose = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
    gateways = {f"path-gateway-{number}" for number in range(1, 6)}
    assert set(compose["services"]) == {"path-gateway-lb", *gateways}
    lb = compose["services"]["path-gateway-lb"]
    config = Source(str(DOCKER / "pathlb.toml"), {}).read()
    assert [endpoint.url for endpoint in config.endpoints] == [f"http://{name}:3069" for name in sorted(gateways)]
    assert all(compose["services"][name]["expose"] == ["3069"] for name in gateways)
    assert set(lb["depends_on"]) == gateways
    assert lb["ports"] == [f"80:{config.bind.port}"]
    assert config.bind.host == "0.0.0.0"
    source, target, mode = lb["volumes"][0].split(":")
    assert (DOCKER / source).is_file()
    assert mode == "ro"
    assert lb["command"][-1] == target
    assert int(lb["stop_grace_period"].removesuffix("s")) > config.grace
    assert config.admin is not None
    assert f"http://127.0.0.1:{config.admin.port}/ready" in lb["healthcheck"]["test"][-1]
    compile(lb["healthcheck"]["test"][-1], "healthcheck", "exec")
    build = lb["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_the_commands_are_those_of_pathlb() -> None:
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    instructions = [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]
    value = dict(instructions)
    lb = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())["services"]["path-gateway-lb"]
    assert json.loads(value["ENTRYPOINT"]) == ["pathlb"]
    assert json.loads(value["CMD"]) == lb["command"]
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    command, *arguments = lb["command"]
    assert command == "serve"
    assert parser.parse_args(arguments).config == "/etc/pathlb/pathlb.toml"
    assert value["USER"] == "10001:10001"
    assert value["STOPSIGNAL"] == lb["stop_signal"] == "SIGTERM"
    test = json.loads(value["HEALTHCHECK"].partition("CMD ")[2])
    assert ["CMD", *test] == lb["healthcheck"]["test"]


def test_what_the_image_copies_is_there() -> None:
    kept = {
        line.removeprefix("!")
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = []
    for line in (DOCKER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            copied += [Path(source) for source in line.split()[1:-1]]
    assert {str(source) for source in copied} == kept
    assert all((ROOT / source).exists() for source in copied)
    # What hatchling reads besides.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= kept
    [extra] = re.findall(r'install .* "\.\[(\w+)\]"', (DOCKER / "Dockerfile").read_text())
    assert extra in project["optional-dependencies"]
