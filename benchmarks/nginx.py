"""A server that costs the client nothing: nginx on loopback, one worker, on a core of its own."""

from __future__ import annotations

import grp
import os
import pwd
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .environment import find_program
from .processes import free_ports, running

_READY_WITHIN = 5.0  # seconds

_CONFIG = """
{user}
daemon off;
worker_processes 1;
pid nginx.pid;
events {{ worker_connections 16384; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    sendfile on;
    server {{
        {listen}
        location = /v1 {{ default_type application/json; return 200 '{reply}'; }}
        location = /64k {{ default_type application/octet-stream; root .; }}
    }}
}}
"""


@contextmanager
def nginx(ports: int, reply: bytes, large: bytes, core: int | None) -> Iterator[list[str]]:
    """The URLs of one nginx on so many free ports, each answering `/v1` with `reply` and `GET /64k` with `large`.

    `core` is the one it runs on, None any. Raises `RuntimeError` with nginx's own words when it does not start.
    """
    program = find_program("nginx")
    assert program is not None, "environment.require has looked"
    with tempfile.TemporaryDirectory(prefix="pathlb-nginx-") as folder:
        numbers = free_ports(ports)
        Path(folder, "64k").write_bytes(large)
        Path(folder, "nginx.conf").write_text(
            _CONFIG.format(
                user=_user(),
                listen=" ".join(f"listen 127.0.0.1:{number} backlog=4096;" for number in numbers),
                reply=reply.decode("ascii"),
            )
        )
        log = Path(folder, "error.log")
        command = [program, "-p", f"{folder}/", "-c", "nginx.conf", "-e", "error.log"]
        cores = os.sched_getaffinity(0) if core is None else {core}
        with running(command, cores=cores, log=Path(folder, "said")) as process:
            _wait_until_ready(process, numbers, log)
            yield [f"http://127.0.0.1:{number}" for number in numbers]


def _user() -> str:
    """The worker stays who we are: started by root it would turn into somebody who cannot read the folder."""
    if os.geteuid() != 0:
        return ""  # the directive would only earn a warning
    return f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getegid()).gr_name};"


def _wait_until_ready(process: subprocess.Popen[bytes], ports: list[int], log: Path) -> None:
    until = time.monotonic() + _READY_WITHIN
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError as exc:
                if process.poll() is not None or time.monotonic() > until:
                    said = log.read_text().strip() if log.exists() else ""
                    raise RuntimeError(f"nginx does not answer on port {port}: {said or exc}") from exc
                time.sleep(0.01)
