"""Dummy weights under which a prompt's answer depends on all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu.engine_probe.kvbaton_engine_probe import dummy_weights
from benchmarks.gpu.launch import GPU_FLAGS, PROBE, Setup


def model() -> torch.nn.Module:
    """Two layers of one shape."""
    return torch.nn.ModuleDict(
        {name: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8)) for name in ("first", "second")}
        | {"norm": torch.nn.LayerNorm(8)}
    )


def test_every_process_has_the_same_and_every_layer_others() -> None:
    one, other = model(), model()
    for each in (one, other):
        dummy_weights(each, low=-1e-3, high=1e-3)
    state = one.state_dict()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["first.0.weight"], state["second.0.weight"])
    assert torch.equal(state["norm.weight"], torch.ones(8))
    assert state["first.0.weight"].abs().max() > 1e-3, "SGLang's own are all smaller"


def test_all_engines_with_dummy_weights_have_them(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "model", "cuda", GPU_FLAGS)
    assert setup.worker_env()["KVBATON_DUMMY_WEIGHTS"] == "1"
    assert setup.worker_env()["PYTHONPATH"].startswith(str(PROBE))
    assert "KVBATON_ENGINE_PROBE" not in setup.worker_env()
    assert setup.with_flag("--load-format", "auto").worker_env() == {}
    probed = replace(setup, probe=True).worker_env()
    assert {"KVBATON_DUMMY_WEIGHTS", "KVBATON_ENGINE_PROBE"} <= set(probed)
