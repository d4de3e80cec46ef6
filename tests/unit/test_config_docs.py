"""docs/configuration.md is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from services.config.flags import options_of
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.modes import MODES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_config_docs", ROOT / "scripts" / "gen_config_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == generator.document(), "run `make docs`"


def test_every_flag_variable_and_mode_is_there(generator: ModuleType) -> None:
    page = generator.document()
    for option in (*options_of(FrontendConfig), *options_of(WorkerConfig)):
        assert option.variable in page
        assert f"{option.key} " in page or f"{option.key}`" in page
    for mode in MODES:
        assert mode.selected_by in page


@pytest.mark.parametrize(
    "name",
    [
        *("model-path", "served-model-name", "page-size", "tp", "dp", "host", "port", "skip-tokenizer-init"),
        *("disaggregation-mode", "disaggregation-transfer-backend", "disaggregation-bootstrap-port"),
        *("trust-remote-code", "enable-metrics", "enable-otel"),
    ],
)
def test_the_switches_of_the_reference_are_all_baton_flags(name: str) -> None:
    assert name in {option.key for option in options_of(WorkerConfig)}
