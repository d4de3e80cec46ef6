"""SGLang goes on from any token of an answer as if it had written the beginning itself, greedy or from a seed."""

from __future__ import annotations

import pytest

from tests.e2e.failover import SAMPLING, TOKENS, Failover

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.parametrize("kind", SAMPLING)
async def test_a_prompt_with_the_beginning_of_its_answer_is_answered_with_the_rest(
    failover: Failover, kind: str
) -> None:
    assert len(failover.whole[kind]) == TOKENS
    assert failover.in_parts[kind] == failover.whole[kind]


async def test_a_seed_is_no_greedy_answer(failover: Failover) -> None:
    assert failover.whole["seeded"] != failover.whole["greedy"]


@pytest.mark.parametrize("kind", SAMPLING)
async def test_an_answer_whose_decode_worker_is_killed_goes_on_with_the_other(failover: Failover, kind: str) -> None:
    answers = failover.moved[kind]
    assert [answer.token_ids for answer in answers] == [failover.whole[kind]] * 2
    assert [answer.finished.usage.completion_tokens for answer in answers] == [TOKENS] * 2
    assert sorted(answer.finished.migrations for answer in answers) == [0, 1]
