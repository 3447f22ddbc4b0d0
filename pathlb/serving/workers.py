"""The supervisor's view of its workers: it starts them, tells them, starts them again, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .board import BoardFile
from .channel import Asker, ChannelClosed, Refused

logger = logging.getLogger("pathlb.serving")

TOKEN_VARIABLE = "PATHLB_ADMIN_TOKEN"
_FIRST_PAUSE = 0.1  # seconds before a worker that ended is replaced; doubles while they do not last
_LAST_PAUSE = 10.0
_LASTED = 10.0  # seconds a worker runs that is no failure of the start
_ANSWER_WITHIN = 10.0  # seconds
_TELL_WITHIN = 2.0  # seconds: somebody waits for it
_MARGIN = 2.0  # seconds a worker gets beyond its grace time and its own alarm
_PACKAGE = Path(__file__).resolve().parents[1]


class StartFailed(Exception):
    """A worker did not come up, and none has before."""


class WorkerProcess:
    """One worker."""

    def __init__(self, process: asyncio.subprocess.Process, asker: Asker) -> None:
        self._process = process
        self.pid = process.pid
        self.ask = asker.ask
        self.ready = False
        """It accepts, with the present configuration."""

    @classmethod
    async def spawn(cls, listener: socket.socket, board: BoardFile, slot: int, count: int) -> WorkerProcess:
        """A fresh interpreter, and no fork: nothing of this process is in it but what it is given."""
        ours, theirs = socket.socketpair()
        descriptors = theirs.fileno(), listener.fileno(), board.descriptor
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # nothing from the current directory, which may be anybody's
                    "-m",
                    "pathlb.serving.worker",
                    *map(str, (*descriptors, slot, count)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=descriptors,
                    env=_environment(),
                    start_new_session=True,  # a terminal's signals are the supervisor's
                )
            except OSError:
                ours.close()
                raise
        return cls(process, await Asker.open(ours))

    async def wait(self) -> str:
        """Wait for its end; the answer says how it ended."""
        status = await self._process.wait()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)


class Workers:
    """As many as there should be, all with the same state."""

    def __init__(self, count: int, listener: socket.socket, state: dict[str, Any]) -> None:
        self._count = count
        self._listener = listener
        self._state = state
        self._version = 0
        self._board = BoardFile(count)
        self._processes: dict[int, WorkerProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._up = asyncio.Event()
        self._once_up = False
        self._stopping = asyncio.Event()

    @property
    def _ready(self) -> list[WorkerProcess]:
        return [process for _, process in sorted(self._processes.items()) if process.ready]

    async def start(self) -> None:
        """Start them and wait until all are up. Raises `StartFailed`."""
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self._count)]
        up = asyncio.create_task(self._up.wait())
        await asyncio.wait({up, *self._keepers}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        for keeper in self._keepers:
            if keeper.done() and not keeper.cancelled():
                keeper.result()

    async def publish(self, state: dict[str, Any]) -> list[str]:
        """Make this their state, and that of those to come; the answer is what went wrong."""
        return await self._tell(state, "apply", **state)

    async def drain(self, state: dict[str, Any]) -> list[str]:
        """The same where nothing but `drained` is new, which waits for no probe."""
        return await self._tell(state, "drain", drained=state["drained"])

    async def snapshots(self) -> list[dict[str, Any]]:
        """What each knows, or why it does not say."""
        told: list[dict[str, Any]] = []
        for pid, answer in await self._ask_all("snapshot", within=_TELL_WITHIN):
            failed = isinstance(answer, Exception)
            told.append({"pid": pid, "error": _reason(answer)} if failed else {"pid": pid, **answer})
        return told

    async def stop(self, grace: float) -> None:
        """End them: each stops accepting at once, and has `grace` seconds for what is under way."""
        self._stopping.set()
        self._listener.close()
        for process in self._processes.values():
            if not process.ready:
                process.signal(signal.SIGKILL)  # it serves nobody yet
        asking = asyncio.create_task(self._ask_all("stop", grace=grace))
        late: set[asyncio.Task[None]] = set()
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=grace + _ANSWER_WITHIN + _MARGIN)
        if late:
            logger.error("%d workers do not end; they are killed", len(late))
            self.kill()
            await asyncio.wait(late)
        await asyncio.gather(asking, *self._keepers, return_exceptions=True)  # who has failed has been told of
        self._board.close()

    def kill(self) -> None:
        """End them now, requests under way or not."""
        for process in self._processes.values():
            process.signal(signal.SIGKILL)

    async def _tell(self, state: dict[str, Any], do: str, **what: Any) -> list[str]:
        self._state = state
        self._version += 1
        said = await self._ask_all(do, **what)
        return [f"worker {pid}: {_reason(answer)}" for pid, answer in said if isinstance(answer, Exception)]

    async def _ask_all(self, do: str, within: float = _ANSWER_WITHIN, **what: Any) -> list[tuple[int, Any]]:
        async def ask(process: WorkerProcess) -> tuple[int, Any]:
            try:
                async with asyncio.timeout(within):
                    return process.pid, await process.ask(do, **what)
            except (ChannelClosed, Refused, TimeoutError) as exc:
                return process.pid, exc

        return await asyncio.gather(*map(ask, self._ready))

    async def _keep(self, slot: int) -> None:
        """One worker after the other, until all are to end. Raises `StartFailed`."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            began = time.monotonic()
            how = await self._run_one(slot)
            if self._stopping.is_set():
                return
            if not self._once_up:
                raise StartFailed(how)
            pause = _FIRST_PAUSE if time.monotonic() - began > _LASTED else min(2 * pause, _LAST_PAUSE)
            logger.error("%s; another one starts in %g s", how, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stopping.wait()

    async def _run_one(self, slot: int) -> str:
        """Start one and wait for its end; the answer says how that came."""
        try:
            process = self._processes[slot] = await WorkerProcess.spawn(self._listener, self._board, slot, self._count)
        except OSError as exc:
            return f"a worker could not be started: {exc}"
        if self._stopping.is_set():  # meanwhile
            process.signal(signal.SIGKILL)
        refused = ""
        try:
            await self._bring_up(process)
        except Refused as exc:
            refused = f" ({exc})"
            process.signal(signal.SIGKILL)
        except ChannelClosed:
            pass  # it has ended
        how = await process.wait()
        del self._processes[slot]
        self._board.board.clear(slot)
        return f"worker {process.pid} {how}{refused}"

    async def _bring_up(self, process: WorkerProcess) -> None:
        version = -1
        while version != self._version:  # it may change meanwhile
            version = self._version
            await process.ask("apply", **self._state)
        process.ready = True
        logger.debug("worker %d is up", process.pid)
        if len(self._ready) == self._count:
            self._once_up = True
            self._up.set()


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop(TOKEN_VARIABLE, None)  # none of theirs
    if not _is_found_by_workers():
        root = str(_PACKAGE.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def _is_found_by_workers() -> bool:
    """Whether this package is, by themselves: what PYTHONPATH adds would go before the standard library."""
    theirs = sys.path if sys.flags.safe_path else sys.path[1:]  # because of -P
    found = importlib.machinery.PathFinder.find_spec(_PACKAGE.name, theirs)
    return found is not None and found.origin is not None and _PACKAGE.samefile(Path(found.origin).parent)


def _reason(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or "it ended"
