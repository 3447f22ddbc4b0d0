"""What the measurements against real servers need of the machine, and what they say when it is not there."""

from __future__ import annotations

import importlib.util
import resource
import shutil
import signal
import sys
from collections.abc import Iterable

_SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"  # where servers are installed, and which an ordinary user's PATH leaves out


def find_program(name: str) -> str | None:
    """Path of a program, also of one that is meant for the superuser."""
    return shutil.which(name) or shutil.which(name, path=_SYSTEM)


def require(packages: Iterable[str], programs: Iterable[str] = ()) -> None:
    """End the program with the commands that install what is missing of PyPI's `packages` and Debian's `programs`."""
    no_package = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    no_program = [name for name in programs if find_program(name) is None]
    if not no_package and not no_program:
        return
    lines = [f"not installed: {', '.join([*no_package, *no_program])}; nothing is measured. To install:"]
    if no_package:
        lines.append(f"    {sys.executable} -m pip install {' '.join(no_package)}")
    if no_program:
        lines.append(f"    apt-get install {' '.join(no_program)}")
    sys.exit("\n".join(lines))


def require_descriptors(count: int) -> None:
    """Let this process, and those it starts, open so many files; end the program where that is not allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            sys.exit(f"this needs {count} file descriptors and may have {hard}; raise the hard limit (ulimit -Hn)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def unwind_on_sigterm() -> None:
    """Let SIGTERM end the program as Ctrl-C does, through every `finally`: the servers it started end with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` has had ignored
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
