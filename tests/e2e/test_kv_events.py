"""What the aggregated SGLang worker tells of itself while it answers: the pages it can reuse, and its metrics."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Aggregated
from tests.e2e.reference import NEW_TOKENS, PROMPT_LENGTHS

PAGE = 16


def test_the_pages_of_every_repeated_prompt_and_its_answer_are_in_the_snapshot(
    aggregated: Aggregated, prompts: dict[int, list[int]]
) -> None:
    """Token by token: `cached_tokens` finds pages by what is in them. The last token of an answer is never computed."""
    for length in PROMPT_LENGTHS:
        sequence = [*prompts[length], *aggregated.answers.alone[length]]
        cached = aggregated.at_the_end.cached_tokens(sequence)
        assert cached == (length + NEW_TOKENS - 1) // PAGE * PAGE, f"prompt of {length} tokens"


def test_what_was_never_asked_is_not(aggregated: Aggregated, prompts: dict[int, list[int]]) -> None:
    longest = prompts[max(PROMPT_LENGTHS)]
    assert aggregated.at_the_end.cached_tokens([*longest[1:], 0]) == 0


def test_whoever_followed_knows_the_same_as_who_came_late(aggregated: Aggregated) -> None:
    assert aggregated.followed.ranks == aggregated.at_the_end.ranks
    assert aggregated.followed.changes > 0 == aggregated.at_the_end.changes


def test_sglangs_metrics_and_ours_are_one_page_that_agrees_with_the_load(aggregated: Aggregated) -> None:
    families = {family.name: family for family in text_string_to_metric_families(aggregated.metrics)}
    requests = 2 * len(PROMPT_LENGTHS)

    def total(name: str, **labels: str) -> float:
        samples = families[name.removesuffix("_total")].samples
        return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())

    assert total("kvbaton_worker_legs_total", outcome="finished") == requests
    assert total("kvbaton_worker_live_legs") == 0
    assert total("kvbaton_worker_kv_mirrored_pages") == len(aggregated.at_the_end.ranks[0])
    # SGLang counts probes too: the warm-up's, the one through the worker's own socket, and canaries on a slow machine.
    probes = 2 + total("kvbaton_worker_canaries_total")
    assert total("sglang:num_requests_total") == requests + probes
    assert total("sglang:generation_tokens_total") == requests * NEW_TOKENS + probes
    assert "sglang:token_usage" in families, "from the scheduler's process"
