"""Greedy tokens are equal: disaggregated, aggregated, and transformers on the same weights."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Answers, Pair, ask_all
from tests.e2e.reference import NEW_TOKENS, PROMPT_LENGTHS, Reference

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def check(reference: Reference, answers: Answers) -> None:
    check_few(reference.differences(answers.alone) + reference.differences(answers.at_once))


def check_few(differences: list[str]) -> None:
    total = 2 * len(PROMPT_LENGTHS) * NEW_TOKENS
    print(f"{len(differences)} of {total} tokens decided otherwise at a near tie", *differences, sep="\n  ")
    assert len(differences) <= total / 100


async def test_aggregated_equals_transformers(reference: Reference, aggregated_answers: Answers) -> None:
    check(reference, aggregated_answers)


async def test_disaggregated_equals_transformers_and_aggregated(
    reference: Reference, aggregated_answers: Answers, pair: Pair, prompts: dict[int, list[int]]
) -> None:
    async with pair.client() as client:
        answers = await ask_all(client, prompts)
    check(reference, answers)
    check_few(
        reference.differences_between(answers.alone, aggregated_answers.alone)
        + reference.differences_between(answers.at_once, aggregated_answers.at_once)
    )
