"""Two SGLang prefill workers behind the kv-aware policy: a repeated long prefix lands where it is."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Routed

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

PAGE, PREFIX_TOKENS = 16, 900
WHOLE_PAGES = PREFIX_TOKENS // PAGE * PAGE


async def test_a_repeated_prefix_lands_on_the_worker_that_holds_it_and_sglang_finds_it_there(routed: Routed) -> None:
    assert routed.first.usage.cached_prompt_tokens == 0
    for finished in routed.later:
        assert finished.prefill_worker == routed.first.prefill_worker
        assert finished.usage.cached_prompt_tokens >= WHOLE_PAGES


async def test_the_other_worker_would_have_had_to_compute_it(routed: Routed) -> None:
    assert routed.elsewhere.prefill_worker != routed.first.prefill_worker
    assert routed.elsewhere.usage.cached_prompt_tokens == 0
