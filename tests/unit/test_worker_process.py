"""What a worker's process checks and hands on before it builds an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.config.errors import ConfigError
from services.config.worker import WorkerConfig
from services.config.yaml_file import ConfigFile
from services.modes import mode_of
from services.requests import Role
from services.worker.process import _SERVICES, _check_engine_flags, _resolve_model, _simulated_engine


def simulated(**values: object) -> WorkerConfig:
    config = WorkerConfig(model_path="m", engine="simulated")
    return config.completed(mode_of(Role.DECODE), {}, **values)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (simulated(native_args=("--dtype", "half")), "--dtype half"),
        (simulated(native_file=ConfigFile(Path("f"), "", {"dtype": "half"})), "dtype"),
        (simulated(tp=2), "--tp"),
    ],
)
def test_the_simulated_engine_refuses_what_it_can_not_do(config: WorkerConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=f"--engine simulated takes no flags of SGLang: {named}"):
        _check_engine_flags(config)


def test_the_simulated_engine_takes_the_sizes_that_it_has_and_the_switches_that_mean_nothing_to_it() -> None:
    config = simulated(tp=1, dp=2, page_size=32, trust_remote_code=True, enable_metrics=True)
    _check_engine_flags(config)
    info = _simulated_engine(config, "127.0.0.1").info()
    assert (info.dp_size, info.page_size) == (2, 32)


def test_only_node_ranks_above_0_wait_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("services.worker.process.resolve_model_path", lambda *_, **__: asked.append("resolve"))
    monkeypatch.setattr("services.worker.process.wait_for_model", lambda *_, **__: asked.append("wait"))
    for rank in (None, 0, 1):
        nodes = {"nnodes": 2, "node_rank": rank, "dist_init_addr": "h:1"}
        _resolve_model(simulated(engine="sglang", **nodes))
    assert asked == ["resolve", "resolve", "wait"]


def test_every_role_has_a_name_of_its_own_in_traces() -> None:
    assert set(_SERVICES) == set(Role)
    assert len(set(_SERVICES.values())) == len(Role)
