"""A seed's tokens don't depend on the batch: SGLang's sampler as Baton changes it, over torch where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from services.worker.engines.sglang_child import draw_alike_in_every_batch

torch: Any = pytest.importorskip("torch")

PROBS = [[0.1, 0.4, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]]
ALL = 1 << 30


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shaped like SGLang's module of both versions; what is drawn from comes back in place of tokens."""
    module: Any = ModuleType("sglang.srt.layers.sampler")
    module.top_k_top_p_min_p_sampling_from_probs_torch = lambda *_args, **_kwargs: "SGLang's own"
    module.sampling_from_probs_torch = lambda probs, _seed, _positions: probs.tolist()
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.sampler", module)
    draw_alike_in_every_batch()
    return module


def filtered(
    sampler: Any, *, top_ks: tuple[int, int] = (ALL, ALL), top_ps: tuple[float, float] = (1.0, 1.0), **more: Any
) -> Any:
    min_ps = torch.tensor(more.get("min_ps", (0.0, 0.0)))
    seeds = torch.tensor([1, 2]) if more.get("seeded", True) else None
    return sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        torch.tensor(PROBS), torch.tensor(top_ks), torch.tensor(top_ps), min_ps, "min_ps" in more, seeds, None
    )


def kept(rows: list[list[float]]) -> list[list[int]]:
    return [[token for token, probability in enumerate(row) if probability] for row in rows]


def test_a_request_without_filters_draws_as_if_it_were_alone(sampler: Any) -> None:
    rows = filtered(sampler, top_ks=(ALL, 1))
    assert rows[0] == pytest.approx(PROBS[0]), "beside a greedy request"
    assert kept(rows)[1] == [0]


def test_filters_keep_the_likeliest_in_their_places(sampler: Any) -> None:
    assert kept(filtered(sampler, top_ks=(2, ALL))) == [[1, 3], [0, 1, 2, 3]]
    assert kept(filtered(sampler, top_ps=(0.5, 0.75))) == [[1, 3], [0, 1, 2]]
    assert kept(filtered(sampler, min_ps=(0.6, 0.0))) == [[1, 3], [0, 1, 2, 3]]
    assert kept(filtered(sampler, top_ks=(3, ALL), top_ps=(0.8, 1.0), min_ps=(0.7, 0.3))) == [[1, 3], [0, 1, 2]]


def test_without_seeds_it_is_sglangs_own(sampler: Any) -> None:
    assert filtered(sampler, seeded=False) == "SGLang's own"
