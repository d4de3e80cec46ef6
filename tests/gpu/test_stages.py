"""Each stage on two GPUs, as `benchmarks/gpu/run.sh` runs it. Not a part of `make test`: `pytest tests/gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("smoke", "parity", "ranks", "faults", "bench", "timeline")


def gpus() -> int:
    """How many NVIDIA GPUs this machine has."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    return sum(line.startswith("GPU ") for line in listed.splitlines())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    flags = ["--quick", "--rounds", "1"] if stage == "bench" else []
    command = [str(ROOT / "benchmarks/gpu/run.sh"), stage, *flags]
    ended = subprocess.run(command, env=environment, timeout=600, check=False)
    result = json.loads((tmp_path / "out" / f"{stage}.json").read_text())
    failed = [check for check in result["checks"] if check["ok"] is False]
    assert not failed
    assert result["ok"]
    assert ended.returncode == 0
