"""The command line: `pathlb demo`, `pathlb check`; one module per command, imported when it is asked for.

A command's module has `add_arguments(parser)` and `run(options) -> int`, the exit status: 0 is fine, 1 is a finding
(a request was lost, an instance is down), 2 bad usage.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from ..core.errors import ConfigError
from ..errors import PathlbError

COMMANDS = {
    "demo": "five emulated gateways, steady traffic, one killed, one slowed, both brought back",
    "check": "probe instances and say what is wrong with each",
    "serve": "put the instances behind one address, in place of nginx or Traefik",
    "convert": "turn a configuration of nginx or Traefik into one of `pathlb serve`",
}
"""Name of each command, and of its module here, with what `--help` says about it."""

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; `argv` defaults to the program's own arguments."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(arguments)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); Python must not complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except ConfigError as exc:
        print(f"pathlb: {exc}", file=sys.stderr)
        return 2
    except (PathlbError, OSError, ExceptionGroup) as exc:
        cause: Exception = exc
        while isinstance(cause, ExceptionGroup):  # what a task group makes of the first failure in it
            cause = cause.exceptions[0]
        if not isinstance(cause, PathlbError | OSError):
            raise
        print(f"pathlb: {cause}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="pathlb", description="Client-side load balancing for HTTP gateways.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Parser)
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    # Options before the command take no values, so the first other word is the command.
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    command = import_module(f".{chosen}", __name__) if chosen in COMMANDS else None
    if command is not None:
        command.add_arguments(parsers[str(chosen)])
    try:
        options = parser.parse_args(arguments)
        if not options.version and command is None:
            parser.error(f"give a command: {', '.join(COMMANDS)}")
    except SystemExit as exc:  # argparse's way to end after --help or an error
        return exc.code if isinstance(exc.code, int) else 2
    if options.version:
        from .. import __version__

        print(f"pathlb {__version__}")
        return 0
    assert command is not None  # parse_args has seen to it
    status = command.run(options)
    assert isinstance(status, int)
    return status


class _Parser(argparse.ArgumentParser):
    """Errors are one line: what is wrong, and where the rest is to be found."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")
        return value

    parse.__name__ = "number"  # argparse: "invalid number value"
    return parse
