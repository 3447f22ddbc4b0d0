"""The Next.js app of the examples: what it pins, and that it loses no page when gateways go bad under it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "nextjs"


def test_it_installs_the_versions_it_names_and_nothing_from_elsewhere() -> None:
    wanted = json.loads((APP / "package.json").read_text())["dependencies"]
    locked = json.loads((APP / "package-lock.json").read_text())["packages"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values()), "a range is no pin"
    assert locked[""]["dependencies"] == wanted
    assert {name: locked[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all(
        package["resolved"].startswith("https://registry.npmjs.org/") and package["integrity"]
        for name, package in locked.items()
        if name
    )


@pytest.mark.skipif(
    shutil.which("node") is None or not (APP / ".next" / "BUILD_ID").exists(),
    reason="examples/nextjs is not built: npm ci && npm run build there",
)
def test_no_page_is_lost_when_gateways_die_hang_and_slow_down() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.frontend", "--only", "pathlb", "--rate", "10", "--seconds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^pathlb +all +140 +0 ", result.stdout, re.MULTILINE), result.stdout
    assert result.stdout.endswith("no page lost through pathlb\n")
