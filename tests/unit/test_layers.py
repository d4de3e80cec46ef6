"""Who may import what: the client needs gRPC only, the frontend neither torch nor SGLang nor a worker's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENGINE_PACKAGES = {"torch", "transformers", "sglang", "nixl", "numpy"}


def printed_by(program: str) -> Any:
    """The JSON that a fresh interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(module: str) -> set[str]:
    """Modules that are loaded after importing this one in a fresh interpreter."""
    return set(printed_by(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))


def imported_by(module: str) -> set[str]:
    """The top-level packages of `loaded_by`."""
    return {name.partition(".")[0] for name in loaded_by(module)}


def test_the_client_needs_grpc_only() -> None:
    foreign = imported_by("kvbaton.client") & (ENGINE_PACKAGES | {"services", "structlog", "fastapi", "aetcd"})
    assert foreign == set()


@pytest.mark.parametrize("module", ["services.frontend.process", "services.cli"])
def test_frontend_and_command_line_load_no_engine(module: str) -> None:
    assert imported_by(module) & ENGINE_PACKAGES == set()


@pytest.mark.parametrize("module", ["services.frontend.process", "services.cli"])
def test_frontend_and_command_line_load_nothing_of_a_worker(module: str) -> None:
    loaded = loaded_by(module)
    assert {name for name in loaded if f"{name}.".startswith("services.worker.")} == set()


def test_the_cpu_standins_are_unreachable_by_default() -> None:
    program = (
        "import importlib.util, json, sys\n"
        "specs = [importlib.util.find_spec(name) for name in ('sgl_kernel', 'torchvision')]\n"
        "print(json.dumps([sys.path, [spec.origin for spec in specs if spec and spec.origin]]))"
    )
    path, origins = printed_by(program)
    assert [entry for entry in path if Path(entry).name == "cpu_standins"] == []
    assert [origin for origin in origins if "cpu_standins" in Path(origin).parts] == []
    assert (ROOT / "services/worker/engines/cpu_standins/torchvision").is_dir(), (
        "or this test looks for the wrong thing"
    )
