"""SGLang's prefill is killed amid a transfer: nothing is lost, decode's pages come back, the next one is taken."""

from __future__ import annotations

import pytest

from tests.e2e.lost_prefill import PROMPT, SAMPLING, LostPrefill

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

# The promise, and how much longer a busy machine may take. SGLang by itself holds them for 30 s.
FREE_WITHIN, SLACK = 5.0, 3.0


async def test_the_worker_was_killed_amid_the_transfer(lost_prefill: LostPrefill) -> None:
    assert 0 < lost_prefill.sent < lost_prefill.whole_cache
    assert lost_prefill.held >= len(PROMPT)
    assert len(lost_prefill.said["frontend"]) == 1, "its attempt was not over"


@pytest.mark.peers(1)
async def test_decode_gives_the_pages_back_although_nobody_confirms(lost_prefill: LostPrefill) -> None:
    assert lost_prefill.said["decode"], "because the process had ended"
    assert lost_prefill.free_after < SLACK * FREE_WITHIN


@pytest.mark.peers(2)
async def test_the_request_is_answered_by_the_worker_that_comes_back(lost_prefill: LostPrefill) -> None:
    assert len(lost_prefill.undisturbed) == SAMPLING.max_new_tokens
    assert lost_prefill.retried.token_ids == lost_prefill.undisturbed
    assert lost_prefill.retried.finished.prefill_worker == "prefill-0"


async def test_a_request_that_came_while_it_was_away_waits_for_it(lost_prefill: LostPrefill) -> None:
    assert len(lost_prefill.next.token_ids) == SAMPLING.max_new_tokens
