"""A load that costs the server nothing of its own core: wrk, one thread, a closed loop of POSTs."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from .environment import find_program
from .processes import on_cores

_MARGIN = 20.0  # seconds beyond its length after which wrk hangs

_LOAD = """
wrk.method = "POST"
wrk.body = [[{body}]]
{headers}
function done(summary, latency)
    local failed = summary.errors
    io.stderr:write(string.format(
        '{{"requests": %d, "us": %d, "p50": %d, "p99": %d, "failed": {{"not connected": %d, "not read": %d, '
            .. '"not written": %d, "not below 400": %d, "timed out": %d}}}}\\n',
        summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
        failed.connect, failed.read, failed.write, failed.status, failed.timeout))
end
"""

# A function that sees every answer slows wrk down, so this one is for checking and not for measuring.
_TALLY = """
local threads = {}
answers = {}
function setup(thread)
    table.insert(threads, thread)
end
function response(status, headers, body)
    local answer = status .. " " .. body
    answers[answer] = (answers[answer] or 0) + 1
end
function done()
    for _, thread in ipairs(threads) do
        for answer, count in pairs(thread:get("answers")) do
            io.stderr:write(count, " ", (answer:gsub("%c", " ")), "\\n")
        end
    end
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What became of one."""

    rate: float
    """Requests answered a second,"""
    requests: int
    """and in all."""
    p50: float
    p99: float
    """Latency in microseconds."""
    failed: Mapping[str, int]
    """How many of what, if any."""


class Wrk:
    """wrk on cores of its own, sending one request again and again."""

    def __init__(self, body: bytes, headers: Mapping[str, str], cores: Collection[int]) -> None:
        program = find_program("wrk")
        assert program is not None, "environment.require has looked"
        self._program = program
        self._cores = cores
        fields = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items())
        self._load = _LOAD.format(body=body.decode("ascii"), headers=fields)

    def load(self, url: str, concurrency: int, seconds: int) -> Load:
        """Send from so many connections. Raises `RuntimeError` when nothing is answered."""
        (line,) = self._run(self._load, url, concurrency, seconds)[-1:] or ["{}"]
        found = json.loads(line)
        failed = {what: count for what, count in found.get("failed", {}).items() if count}
        if not found.get("requests"):
            raise RuntimeError(f"nothing answered in {seconds} s; {failed or 'no word of wrk'}")
        rate = found["requests"] * 1e6 / found["us"]
        return Load(rate, found["requests"], found["p50"], found["p99"], failed)

    def answers(self, url: str, concurrency: int, seconds: int) -> Counter[str]:
        """The same, for what was answered: status and body, and how often."""
        found: Counter[str] = Counter()
        for line in self._run(self._load + _TALLY, url, concurrency, seconds):
            count, _, answer = line.partition(" ")
            found[answer] += int(count)
        return found

    def _run(self, script: str, url: str, concurrency: int, seconds: int) -> list[str]:
        """What the script has written."""
        with tempfile.TemporaryDirectory(prefix="pathlb-wrk-") as folder:
            file = Path(folder, "load.lua")
            file.write_text(script)
            command = [self._program, "-t1", f"-c{concurrency}", f"-d{seconds}s", "-s", str(file), url]
            with on_cores(self._cores):
                done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _MARGIN)
        if done.returncode:
            raise RuntimeError(f"wrk: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
        return done.stderr.splitlines()
