"""Every example runs by itself, without arguments and without warnings, and shows what it says it shows."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EXPECTED = {
    "custom_policy.py": "zone a is down: {'b': 12}",
    "fastapi_service.py": "{'service': 'eth', 'height': '0x1'}",
    "openai_sdk.py": "20 of 20 answered",
    "opentelemetry_console.py": "http.request.resend_count=1",
    "path_gateways.py": "eth: 100 of 100 fine",
    "quickstart.py": "at the end:",
    "web3_provider.py": "100 of 100 answered: block 1000",
    "wrap_existing_client.py": "mounted: 200 from http://127.0.0.1:",
}


@functools.cache
def run(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str) -> None:
    result = run(name)
    assert result.returncode == 0, result.stderr
    assert EXPECTED[name] in result.stdout
    assert result.stderr == ""


def test_the_openai_sdk_loses_nothing_when_a_server_dies_and_streams() -> None:
    output = run("openai_sdk.py").stdout
    assert " 0 of them at the second attempt" not in output, "nobody was asked when the server died"
    assert "streamed: 42." in output


def test_the_quickstart_gets_all_its_answers() -> None:
    lines = run("quickstart.py").stdout.splitlines()
    answers = [line for line in lines if line[0].isdigit()]
    assert len(answers) == 10
    assert all(": 200 after" in line.split("  ")[-1] for line in answers)


def test_no_service_pays_for_another() -> None:
    lines = run("path_gateways.py").stdout.splitlines()
    assert sum("solana: 100 of 100 fine, 100 attempts" in line for line in lines) == 3
    assert all("is ready" in line for line in lines if line.startswith("  "))


def test_web3_gets_all_its_answers_and_the_gateways_own_error() -> None:
    output = run("web3_provider.py").stdout
    assert "a batch: [1000, 1000]" in output
    assert "Service 'no-such-chain' is not configured" in output
