"""What `benchmarks.frontend` starts, on free ports of loopback: the Next.js app, `pathlb serve`, nginx."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from .environment import find_program
from .processes import free_ports, running

_APP = Path(__file__).parents[1] / "examples" / "nextjs"
_SOURCES = ("package.json", "package-lock.json", "next.config.js", "app/**/*.js")
_CALL = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
_CALL_HEADERS = {"Content-Type": "application/json", "Target-Service-Id": "eth"}

_READY_WITHIN = 30.0  # seconds
_NEXT = str(_APP / "node_modules" / ".bin" / "next")
_QUIET = {"NEXT_TELEMETRY_DISABLED": "1"}
_SAID = 1_000  # characters of a log that are repeated

_NGINX = """
daemon off;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream gateways {{
        least_conn;
        {servers}
        keepalive 64;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://gateways;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


def build_app() -> None:
    """Install and build the app, unless that has been done since it was changed. Ends the program where it fails."""
    npm = find_program("npm")
    if npm is None or find_program("node") is None:
        sys.exit("node and npm are not installed; nothing is measured. See https://nodejs.org, 20.11 or later")
    if not _is_newer(_APP / "node_modules" / ".package-lock.json", ["package-lock.json"]):
        print("npm ci ...", flush=True)
        _run([npm, "ci", "--prefix", str(_APP), "--no-audit", "--no-fund"])
    if not _is_newer(_APP / ".next" / "BUILD_ID", _SOURCES):
        print("next build ...", flush=True)
        _run([_NEXT, "build", str(_APP)])


@contextmanager
def serve(gateways: Sequence[str], logs: Path, *, access_log: bool) -> Iterator[str]:
    """The URL of `pathlb serve` in front of these PATH gateways, with its defaults."""
    url, port = _free_url()
    command = [sys.executable, "-m", "pathlb", "serve", *gateways, "--bind", f"127.0.0.1:{port}"]
    command += ["--profile", "path", "--service", "eth", *(["--access-log"] if access_log else [])]
    with _ready(command, _call(url), logs / "pathlb.log"):
        yield url


@contextmanager
def nginx(gateways: Sequence[str], logs: Path) -> Iterator[str]:
    """The URL of an nginx in front of these gateways, as one writes it down without further thought."""
    program = find_program("nginx")
    assert program is not None, "environment.require has looked"
    url, port = _free_url()
    servers = " ".join(f"server {gateway.removeprefix('http://')};" for gateway in gateways)
    folder = logs / "nginx"
    folder.mkdir(exist_ok=True)
    (folder / "nginx.conf").write_text(_NGINX.format(servers=servers, port=port))
    # Its own log is stderr: what it says before it has read the configuration goes there too.
    command = [program, "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr"]
    with _ready(command, _call(url), logs / "nginx.log"):
        yield url


@contextmanager
def next_app(gateway: str, log: Path) -> Iterator[str]:
    """The URL of the app, whose LOCAL_GATEWAY_URL is `gateway`."""
    url, port = _free_url()
    command = [_NEXT, "start", str(_APP), "--hostname", "127.0.0.1", "--port", str(port)]
    page = httpx.Request("GET", f"{url}/api/height")
    with _ready(command, page, log, environment={**_QUIET, "LOCAL_GATEWAY_URL": gateway}):
        yield url


def _is_newer(made: Path, sources: Sequence[str]) -> bool:
    """Whether it exists, and none of the app's files has changed since."""
    if not made.exists():
        return False
    changed = max(file.stat().st_mtime for pattern in sources for file in _APP.glob(pattern))
    return made.stat().st_mtime >= changed


def _run(command: Sequence[str]) -> None:
    """Wait for its end. Ends the program with what it said if it failed."""
    with tempfile.TemporaryDirectory(prefix="pathlb-build-") as folder:
        log = Path(folder, "log")
        with running(command, cores=os.sched_getaffinity(0), log=log, environment=_QUIET) as process:
            process.wait()
        if process.returncode:
            said = log.read_text(errors="replace").strip()
            sys.exit(f"{said}\n{' '.join(command)}: exit status {process.returncode}; nothing is measured")


@contextmanager
def _ready(
    command: Sequence[str], request: httpx.Request, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A program that runs and answers this request with 200. Raises `RuntimeError` with what it said if it does not."""
    with running(command, cores=os.sched_getaffinity(0), log=log, environment=environment) as process:
        if problem := _wait_until_ok(request, process):
            said = log.read_text(errors="replace").strip()[-_SAID:]
            raise RuntimeError(f"{' '.join(command)}: {request.url}: {problem}\n{said}")
        yield


def _wait_until_ok(request: httpx.Request, process: subprocess.Popen[bytes]) -> str:
    """Ask until the status is 200; else what there was instead."""
    until = time.monotonic() + _READY_WITHIN
    with httpx.Client(trust_env=False, timeout=5) as client:
        while True:
            try:
                status = client.send(request).status_code
                problem = f"status {status}"
            except httpx.HTTPError as exc:
                status, problem = 0, f"{type(exc).__name__}: {exc}"
            if status == 200:
                return ""
            if process.poll() is not None or time.monotonic() > until:
                return problem
            time.sleep(0.05)


def _call(url: str) -> httpx.Request:
    return httpx.Request("POST", f"{url}/v1", content=_CALL, headers=_CALL_HEADERS)


def _free_url() -> tuple[str, int]:
    [port] = free_ports(1)
    return f"http://127.0.0.1:{port}", port
