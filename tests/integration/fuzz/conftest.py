"""One cluster of processes for the whole folder, and the seed of everything that is drawn at random."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fuzz_target import Target

SEED = int(os.environ.get("KVBATON_FUZZ_SEED", "20260101"))


def pytest_report_header() -> str:
    return f"fuzz: KVBATON_FUZZ_SEED={SEED}"


@pytest.fixture(scope="session")
def seed() -> int:
    """The same in every run, unless KVBATON_FUZZ_SEED is set."""
    return SEED


@pytest.fixture(scope="session")
def target(etcd_endpoint: str, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(etcd_endpoint, tmp_path_factory.mktemp("fuzz"), model_folder)
    try:
        target.start()
        yield target
    finally:
        target.stop()
