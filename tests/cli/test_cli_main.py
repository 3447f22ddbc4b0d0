"""The command line as a whole: finding the command, version, usage errors, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pathlb
from pathlb.cli import COMMANDS, check, main
from pathlb.errors import UsageError

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pathlb {pathlb.__version__}\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "demo" in output
    assert "check" in output


@pytest.mark.parametrize("command", ["demo", "check"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: pathlb {command}")
    assert "Exit status: 0" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"pathlb: give a command: {', '.join(COMMANDS)} (see pathlb --help)"),
        (["fly"], "pathlb: argument COMMAND: invalid choice: 'fly'"),
        (["check"], "pathlb check: the following arguments are required: URL (see pathlb check --help)"),
        (["check", "--timeout", "soon", "http://a"], "argument --timeout: invalid number value: 'soon'"),
        (["check", "--timeout", "0", "http://a"], "argument --timeout: must be at least 0.001, not 0"),
        (["check", "--timeout", "nan", "http://a"], "argument --timeout: must be at least 0.001, not nan"),
        (["check", "--timeout", "inf", "http://a"], "argument --timeout: must be at least 0.001, not inf"),
        (["check", "--path", "health", "http://a"], "pathlb: Health.path: must start with /"),
        (["check", "--service", "eth", "http://a"], "pathlb: --service: needs --profile path"),
        (["check", "--profile", "nginx", "http://a"], "argument --profile: invalid choice: 'nginx'"),
        (["check", "--profile", "path", "--service", "e/h", "http://a"], "--service: 'e/h' is not a service id"),
        (["check", "--profile", "path", "--service", "", "http://a"], "--service: '' is not a service id"),
        (["demo", "--profile", "nginx"], "argument --profile: invalid choice: 'nginx'"),
        (["demo", "--port", "65486"], "argument --port: must be from 0 to 65485, not 65486"),
        (["demo", "--port", "http"], "argument --port: invalid port_number value: 'http'"),
        (["demo", "--rate", "0"], "argument --rate: must be from 1 to 10000, not 0"),
        (["demo", "--gateways", "1"], "argument --gateways: invalid choice: 1"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("cannot be"), 1, "pathlb: cannot be\n"),
        (OSError(98, "port taken"), 1, "pathlb: [Errno 98] port taken\n"),
        (ExceptionGroup("", [ExceptionGroup("", [OSError("deep")])]), 1, "pathlb: deep\n"),
        (pathlb.ConfigError("Breaker.failures", "must be at least 1"), 2, "pathlb: Breaker.failures: must be at least"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_command_raises_becomes_a_line_and_a_status(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(check, "run", fail)
    assert main(["check", "http://a"]) == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("bug", [TypeError("oh"), ExceptionGroup("", [TypeError("oh")])])
def test_a_bug_keeps_its_traceback(bug: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> int:
        raise bug

    monkeypatch.setattr(check, "run", fail)
    with pytest.raises(type(bug)):
        main(["check", "http://a"])


def test_as_a_module_the_return_value_is_the_exit_status() -> None:
    assert python("-m", "pathlb", "--version").stdout == f"pathlb {pathlb.__version__}\n"
    failed = python("-m", "pathlb", "check", "no-url")
    assert failed.returncode == 1
    assert failed.stderr == ""


def test_a_command_is_imported_when_it_is_asked_for() -> None:
    seen = python("-c", "import sys, pathlb.cli; pathlb.cli.main(['--help']); print('pathlb.testing' in sys.modules)")
    assert seen.stdout.endswith("False\n")


def test_output_that_nobody_reads_any_more_is_no_traceback() -> None:
    command = [sys.executable, "-m", "pathlb", "check", "no-url"]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        command,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(write)
    assert process.stderr == ""
