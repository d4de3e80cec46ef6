"""The Kubernetes overlays as kubectl renders them, once a session."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tools import tool

ROOT = Path(__file__).parents[3]
OVERLAYS = ("agg", "disagg")

Resource = dict[str, Any]


@functools.cache
def kustomize(folder: Path) -> str:
    """`kubectl kustomize`: needs no cluster."""
    done = subprocess.run([tool("kubectl"), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(folder: Path) -> list[Resource]:
    """Every resource of a kustomization."""
    return [resource for resource in yaml.safe_load_all(kustomize(folder)) if resource]


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Resource]:
    return render(ROOT / "deploy" / "k8s" / "overlays" / request.param)


@pytest.fixture
def disagg() -> list[Resource]:
    return render(ROOT / "deploy" / "k8s" / "overlays" / "disagg")


@pytest.fixture
def agg() -> list[Resource]:
    return render(ROOT / "deploy" / "k8s" / "overlays" / "agg")
