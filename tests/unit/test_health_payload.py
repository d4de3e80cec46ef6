"""--health-check-payload: fields of a GenerateRequest, checked like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.requests import Limits, Role
from services.worker.engines.protocol import ProbePayload
from services.worker.health.payload import HealthCheck

LIMITS = Limits(context_length=64, max_prompt_tokens=32, vocab_size=100, seeded_sampling=True)


def test_one_greedy_token_unless_told_otherwise() -> None:
    payload = HealthCheck.parse("", Role.AGGREGATED).payload(LIMITS)
    assert (len(payload.token_ids), payload.sampling.max_new_tokens, payload.sampling.temperature) == (1, 1, 0.0)
    payload = HealthCheck.parse('{"tokenIds": {"ids": [5, 6]}}', Role.AGGREGATED).payload(LIMITS)
    assert (payload.token_ids, payload.sampling.max_new_tokens, payload.sampling.temperature) == ((5, 6), 1, 0.0)


def test_json_and_file_say_the_same(tmp_path: Path) -> None:
    text = '{"token_ids": {"ids": [7]}, "sampling": {"max_new_tokens": 3, "temperature": 0.5, "seed": 1}}'
    (tmp_path / "payload.json").write_text(text)
    given, read = (
        HealthCheck.parse(flag, Role.AGGREGATED).payload(LIMITS) for flag in (text, f"@{tmp_path}/payload.json")
    )
    assert given == read != ProbePayload()
    assert (given.sampling.max_new_tokens, given.sampling.temperature, given.sampling.seed) == (3, 0.5, 1)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("{", "Failed to load JSON"),
        ("@/nowhere", "/nowhere"),
        ('{"prompt": "x"}', "prompt"),
        ('{"token_ids": {"ids": [1]}, "bootstrap": {"host": "h"}}', "bootstrap"),
        ('{"text": "x"}', "text"),
        ('{"sampling": {"max_new_tokens": 1}}', "token_ids.ids"),
        ('{"token_ids": {"ids": [1]}, "sampling": {"stop": ["x"]}}', "sampling.stop"),
    ],
)
def test_what_is_no_payload_is_refused_at_once_by_name(flag: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"--health-check-payload.*{named}"):
        HealthCheck.parse(flag, Role.AGGREGATED)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ('{"token_ids": {"ids": [100]}}', "vocabulary"),
        ('{"token_ids": {"ids": [1]}, "sampling": {"max_new_tokens": 64}}', "max_new_tokens"),
    ],
)
def test_what_the_model_cannot_take_is_refused_by_name(flag: str, named: str) -> None:
    check = HealthCheck.parse(flag, Role.AGGREGATED)
    with pytest.raises(ValueError, match=f"--health-check-payload.*{named}"):
        check.payload(LIMITS)


def test_an_embedding_worker_samples_nothing() -> None:
    assert HealthCheck.parse('{"tokenIds": {"ids": [5]}}', Role.EMBEDDING).payload(LIMITS).token_ids == (5,)
    with pytest.raises(ValueError, match="sampling: an embedding worker"):
        HealthCheck.parse('{"tokenIds": {"ids": [5]}, "sampling": {"maxNewTokens": 2}}', Role.EMBEDDING)
