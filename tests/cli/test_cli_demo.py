"""`pathlb demo` on real sockets: nothing lost, everything reported, nothing left running."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathlb.cli import demo
from pathlb.cli.scenario import ANY, PATH, Phase, Scenario
from pathlb.testing import Fleet, ServiceMode

ROOT = Path(__file__).parents[2]
PHASES = ["steady", r":\d+ killed", r":\d+ restored", r":\d+ 10x slower", r":\d+ recovered"]


class Program:
    """`pathlb demo` as a user starts it; the mark is inherited by every process it starts."""

    def __init__(self, *arguments: str) -> None:
        self._mark = f"PATHLB_TEST_MARK={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pathlb", "demo", "--port", "0", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, part: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if part in line:
                return line
        raise AssertionError(f"it ended without {part!r}: {self.process.communicate()}")

    def still_running(self) -> list[str]:
        """Command lines of the processes of this demo."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text())
        return found


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[Program]:
    running = Program(*arguments)
    with running.process:
        try:
            yield running
        finally:
            running.process.kill()  # does nothing once it has ended


def test_a_short_demo_loses_nothing_and_leaves_nothing() -> None:
    with program("--seconds-per-phase", "1", "--rate", "100") as running:
        output, errors = running.process.communicate(timeout=50)
        left = running.still_running()
    assert errors == ""
    assert running.process.returncode == 0, output
    report = output[output.rindex("requests in") :]
    assert ": 0 lost, " in report
    for phase in PHASES:
        assert len(re.findall(f"^{phase} .*", report, re.MULTILINE)) == 2, phase  # the figures, and the shares
    assert left == []


def test_a_short_demo_of_path_loses_only_what_nobody_could_serve() -> None:
    with program("--profile", "path", "--seconds-per-phase", "1", "--rate", "100") as running:
        output, errors = running.process.communicate(timeout=50)
        left = running.still_running()
    assert errors == ""
    assert running.process.returncode == 0, output
    # Whichever is faster.
    assert re.search(r" s\] :\d+ for eth: (breaker closed -> open|probes say it is down)", output)
    assert " for poly: " not in output, "an outage of the suppliers is no instance's fault"
    report = output[output.rindex("requests in") :]
    services = report[report.index("lost and retried per service") : report.index("share of the answers")]
    rows = [re.split("  +", line) for line in services.splitlines()[2:-1]]
    assert len(rows) == 9
    assert {row[2] for row in rows} == {"0"}, "eth loses nothing"
    asked, lost = {row[0]: int(row[4]) for row in rows}, {row[0]: int(row[5]) for row in rows}
    assert abs(sum(int(row[1]) for row in rows) - sum(asked.values())) <= 1, "both services get their half"
    assert lost["poly: all suppliers fail"] > 0
    assert f"\nlost while nobody could serve poly: {sum(lost.values())}\n" in report
    assert left == []


def test_ctrl_c_ends_it_with_the_report_so_far() -> None:
    with program("--seconds-per-phase", "50", "--rate", "50") as running:
        running.read_until("] steady: ")
        running.process.send_signal(signal.SIGINT)
        output, errors = running.process.communicate(timeout=20)
        left = running.still_running()
    assert errors == ""
    assert running.process.returncode == 0
    assert output.count("\nsteady ") == 2
    assert "interrupted: waiting for the last answers" in output
    assert "killed" not in output
    assert left == []


def options(**changed: object) -> argparse.Namespace:
    usual = {"rate": 50.0, "seconds_per_phase": 0.3, "gateways": 2, "port": 0, "profile": None, "plain": True}
    return argparse.Namespace(**{**usual, **changed})


def only(*phases: Phase) -> Scenario:
    return dataclasses.replace(ANY, phases=lambda fleet: list(phases))


def test_a_lost_request_is_status_1_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    def all_dead(fleet: Fleet) -> list[Phase]:
        def kill() -> None:
            for gateway in fleet:
                gateway.kill()

        return [Phase("all dead", kill)]

    assert demo.run(options(), dataclasses.replace(ANY, phases=all_dead)) == 1
    output = capsys.readouterr().out
    assert re.search(r"15 requests in .* s: 15 lost, 1[45] retried", output)
    assert "lost because:" in output
    assert "Connect call failed" in output


def test_a_taken_port_is_replaced_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo.run(options(port=port), only(Phase("steady"))) == 0
    output = capsys.readouterr().out
    assert re.search(rf"port {port} is taken: gateway-0 is on \d+\n", output)
    assert "15 requests in" in output
    assert ": 0 lost, 0 retried" in output


def test_the_ports_follow_the_first() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([]).port == 3069
    assert parser.parse_args(["--port", "0"]).port == 0


def test_the_rate_is_the_highest_this_machine_can_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_RATES", (10_000_000.0, 20.0))
    monkeypatch.setattr(demo, "_TRIAL", 0.2)
    assert demo.run(options(rate=None), only(Phase("steady"))) == 0
    output = capsys.readouterr().out
    assert "1e+07 requests/s: more than this machine can" in output
    assert "20 requests/s of 20 ms through one pathlb.AsyncClient" in output
    assert "6 requests in" in output, "the trials are not in the report"


def test_what_is_lost_beside_an_outage_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def both_out(fleet: Fleet) -> list[Phase]:
        def fail() -> None:
            for service in PATH.services:
                fleet.set_service(service, ServiceMode.SUPPLIERS_FAIL)

        return [Phase("both out", fail, ("poly",))]

    assert demo.run(options(profile="path"), dataclasses.replace(PATH, phases=both_out)) == 1
    output = capsys.readouterr().out
    assert re.search(r"15 requests in .* s: 15 lost", output)
    assert "lost while nobody could serve poly: 7\n" in output
    assert "nobody could serve eth" not in output
    assert "  8 x eth: status 500" in output
