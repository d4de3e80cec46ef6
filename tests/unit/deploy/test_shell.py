"""deploy/local as shellcheck reads it. What the scripts do is in tests/integration/deploy."""

from __future__ import annotations

import subprocess

from tests.support.tools import tool
from tests.unit.deploy.conftest import ROOT


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = sorted((ROOT / "deploy" / "local").glob("*.sh"))
    done = subprocess.run([tool("shellcheck"), "-x", *scripts], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
