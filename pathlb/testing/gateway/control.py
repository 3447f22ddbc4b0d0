"""A gateway run in a thread or in a process, driven by the same commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pathlb.errors import UsageError

from .chain import Answer
from .commands import Command, encode_settings, execute
from .model import PathSettings, Settings
from .path import PathGateway
from .server import Gateway

T = TypeVar("T")

NOT_RUNNING = "the fleet is not running; use it inside its `with` block"


class LoopThread:
    """An asyncio event loop in a daemon thread of its own."""

    def __init__(self) -> None:
        # A selector loop whatever the program's own policy is: its transports hand out the real socket, which a
        # reset needs.
        self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        self._loop: asyncio.AbstractEventLoop | None = self._runner.get_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._main, name="pathlb-testing", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the loop and wait for the result. Raises `UsageError` once stopped."""
        if self._loop is None:
            coroutine.close()
            raise UsageError(NOT_RUNNING)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def stop(self) -> None:
        """End the loop, then the thread."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _main(self) -> None:
        with self._runner as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stop.wait()


class Control(Protocol):
    """Whatever runs a gateway."""

    def call(self, command: Command) -> Any:
        """Carry out one command and return its result, from any thread.

        Raises what the gateway raises, and `UsageError` once closed.
        """

    def close(self) -> None: ...


class LocalControl:
    """A gateway on a loop of this process."""

    def __init__(self, thread: LoopThread, settings: Settings, answer: Answer | None = None) -> None:
        self._thread = thread
        self._gateway = PathGateway(settings, answer) if isinstance(settings, PathSettings) else Gateway(settings)
        self._lock = threading.Lock()

    def call(self, command: Command) -> Any:
        with self._lock:
            return self._thread.run(execute(self._gateway, command))

    def close(self) -> None:
        with self._lock:
            self._thread.run(self._gateway.aclose())


class ProcessControl:
    """A gateway in a process of its own, which ends when its stdin does: with this one at the latest."""

    def __init__(self, settings: Settings) -> None:
        package_root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._name = settings.name
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = subprocess.Popen(
            [sys.executable, "-m", __package__, encode_settings(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
            env={**os.environ, "PYTHONPATH": path},
            # A Ctrl-C on the terminal is for the program; the gateways end with it and not before.
            start_new_session=True,
        )

    def call(self, command: Command) -> Any:
        with self._lock:
            if self._process is None:
                raise UsageError(NOT_RUNNING)
            answer = self._ask(self._process, command)
        if "result" in answer:
            return answer["result"]
        if answer["errno"] is not None:
            raise OSError(answer["errno"], answer["message"])
        raise (ValueError if answer["error"] == "ValueError" else RuntimeError)(answer["message"])

    def _ask(self, process: subprocess.Popen[str], command: Command) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._name} ended by itself, with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdout:
            # A process that is gone already may have left a command unread in the pipe.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
