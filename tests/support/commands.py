"""What a command line and an environment mean to `kvbaton`, by its own parser, without starting anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from services import cli
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig


class _ParsedError(Exception):
    def __init__(self, config: FrontendConfig | WorkerConfig) -> None:
        self.config = config


def parse(arguments: Sequence[str], environ: Mapping[str, str]) -> FrontendConfig | WorkerConfig:
    """The configuration that `kvbaton ARGUMENTS...` would run with. Fails the test where the command refuses them."""

    def parsed(config: FrontendConfig | WorkerConfig, _: object = ()) -> int:
        raise _ParsedError(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.worker.process.run_worker", parsed)
        patch.setattr("services.frontend.process.run_frontend", parsed)
        patch.setattr("os.environ", dict(environ))
        try:
            status: Any = cli.main(list(arguments))
        except _ParsedError as result:
            return result.config
        except SystemExit as refused:
            status = refused.code
    pytest.fail(f"kvbaton {' '.join(arguments)} ends with {status}")


def environment_names(config: type[Any]) -> set[str]:
    """The KVBATON_* variables that a process with this configuration reads."""
    names: set[str] = set()
    for field in dataclasses.fields(config):
        if field.metadata.get("group"):
            assert callable(field.default_factory)
            names |= environment_names(type(field.default_factory()))
        elif field.metadata:
            names.add("KVBATON_" + field.name.upper())
    return names
