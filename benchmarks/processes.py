"""Programs started for a measurement: on the cores they are to have, ended with it, and the CPU time they took."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_END_WITHIN = 5.0  # seconds


def free_ports(count: int) -> list[int]:
    """So many ports of loopback that nobody has."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Be on these cores inside the `with` block; what is started there stays on them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str], *, cores: Collection[int], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs inside the `with` block, all it says in `log`; `environment` adds to this process's own."""
    with log.open("wb") as told, on_cores(cores):
        # In a session of its own a Ctrl-C does not reach it before the measurement has ended.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    members = family(process.pid)
    process.terminate()
    try:
        process.wait(_END_WITHIN)
    except subprocess.TimeoutExpired:
        for pid in members:  # the workers too, which a killed master leaves behind
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def family(pid: int) -> list[int]:
    """A process and all that descend from it: masters have their workers do the work."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            children[int(_fields(path)[1])].append(int(path.parent.name))
    found = [pid]
    for one in found:  # which grows while it is gone through
        found += children[one]
    return found


def cpu_us_of(pids: Collection[int]) -> float:
    """CPU time of these processes in microseconds, user and system, all threads of theirs; to a tick of 10 ms."""
    ticks = 0
    for pid in pids:
        fields = _fields(Path(f"/proc/{pid}/stat"))
        ticks += int(fields[11]) + int(fields[12])
    return ticks * 1e6 / os.sysconf("SC_CLK_TCK")


def _fields(stat: Path) -> list[str]:
    """Those after the name of the command, in parentheses, which may have spaces in it."""
    return stat.read_text().rpartition(")")[2].split()
