"""Who may import what: the client needs gRPC only, the frontend neither torch nor SGLang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE_PACKAGES = {"torch", "transformers", "sglang", "nixl", "numpy"}


def imported_by(module: str) -> set[str]:
    """Top-level packages that are loaded after importing the module in a fresh interpreter."""
    program = f"import json, sys, {module}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_client_needs_grpc_only() -> None:
    foreign = imported_by("kvbaton.client") & (ENGINE_PACKAGES | {"services", "structlog", "fastapi", "aetcd"})
    assert foreign == set()


@pytest.mark.parametrize("module", ["services.frontend.process", "services.cli"])
def test_frontend_and_command_line_load_no_engine(module: str) -> None:
    assert imported_by(module) & ENGINE_PACKAGES == set()


def test_the_cpu_standins_are_unreachable_by_default() -> None:
    program = "import importlib.util, sys; print(importlib.util.find_spec('sgl_cpu_pd'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "None"
