"""`pathlb serve URL...`: the gateways behind one address, in place of nginx or Traefik (see `pathlb.serving`)."""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

from ..core.errors import ConfigError
from ..errors import UsageError

_FLAGS = {
    "endpoints": "URL",
    "bind": "--bind",
    "admin": "--admin",
    "admin_token": "--admin-token",
    "workers": "--workers",
    "policy": "--policy",
    "profile": "--profile",
    "services": "--service",
    "access_log": "--access-log",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "SIGTERM and SIGINT end it: no new connections, requests under way have the grace time (30 s), exit status 0; "
        "a second one ends it at once, with exit status 1. SIGHUP, and a change of the file, make it read the file "
        "again; no request is lost, and a file with errors changes nothing. Exit status: 0 after a signal, 1 if it "
        "cannot listen or start, 2 for bad usage and a bad configuration."
    )
    parser.add_argument(
        "urls", nargs="*", metavar="URL", help="an instance: http://host:port, https://..., unix:///path"
    )
    parser.add_argument("--bind", metavar="HOST:PORT", help="where to listen (default 127.0.0.1:8080)")
    parser.add_argument(
        "--admin",
        metavar="[HOST:]PORT",
        help="where to answer /health, /ready, /snapshot, /drain and /undrain (default: nowhere; host 127.0.0.1)",
    )
    parser.add_argument(
        "--admin-token",
        metavar="TOKEN",
        help="what /drain and /undrain ask for; better in PATHLB_ADMIN_TOKEN, which no list of processes shows",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that serve (default 1)")
    parser.add_argument("--config", metavar="FILE", help="settings in TOML; those of the command line go before them")
    parser.add_argument("--policy", metavar="NAME", help="least-connections (default), p2c or round-robin")
    parser.add_argument("--profile", metavar="NAME", help="what kind of gateways they are: path (default: any)")
    parser.add_argument(
        "--service",
        action="append",
        metavar="ID",
        dest="services",
        help="with --profile path: a service used through it, which is probed; may be repeated",
    )
    parser.add_argument(
        "--access-log", action="store_true", default=None, help="a line a request on stdout (default: off)"
    )


def run(options: argparse.Namespace) -> int:
    # By default it would end us, and it may come at once: from whoever has just changed the file, which is read later.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        return _run(options)
    finally:
        signal.signal(signal.SIGHUP, before)


def _run(options: argparse.Namespace) -> int:
    try:
        from ..serving import supervisor
    except ModuleNotFoundError as exc:
        if exc.name != "uvicorn":
            raise
        raise UsageError("serving needs uvicorn: pip install 'pathlb[serve]'") from None
    from ..serving.worker import set_up_logging

    settings = read_flags(options)
    if options.config is None and "endpoints" not in settings:
        raise ConfigError("URL", "give the instances, or --config FILE")
    set_up_logging()
    return supervisor.serve(supervisor.Source(options.config, settings))


def read_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line. Raises `ConfigError` that names the flag."""
    from ..serving.checks import Wrong, check_table
    from ..serving.config import SETTINGS

    token = options.admin_token or os.environ.get("PATHLB_ADMIN_TOKEN")
    given = {
        "endpoints": options.urls or None,
        "admin_token": token or None,
        **{name: getattr(options, name) for name in _FLAGS if name not in ("endpoints", "admin_token")},
    }
    given = {name: value for name, value in given.items() if value is not None}
    try:
        check_table(given, SETTINGS)
    except Wrong as wrong:
        problem = wrong.problems[0]
        index = next((part for part in problem.path if isinstance(part, int)), None)
        flag = _FLAGS[str(problem.path[0])]
        raise ConfigError(flag if index is None else f"{flag} {index + 1}", problem.text) from None
    if "services" in given and options.profile is None and options.config is None:
        raise ConfigError("--service", "needs --profile path: only PATH has services")
    return given
