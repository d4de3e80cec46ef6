"""The one that has the answer's first token soonest: prefixes in its cache against work in its queue."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from services.frontend.router.kv.index import Holder
from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt


class PrefixIndex(Protocol):
    """Who holds how much of a prompt: `KvIndexes`."""

    def cached_tokens(
        self, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = ""
    ) -> Mapping[Holder, int]:
        """Tokens from the beginning of the prompt, for each rank that holds any."""
        ...

    def routed(self, holder: Holder, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = "") -> None:
        """The prompt goes there."""
        ...


class KvAware(Policy):
    """The lowest cost, in tokens:

        weight * prompt tokens that are not in its cache + prompt tokens that it still has to compute + KV pages in use

    Above temperature 0 a draw: a candidate whose cost is higher by `temperature` times the prompt's length is e times
    less likely. Several frontends that see the same then don't all choose the same.
    """

    def __init__(
        self, index: PrefixIndex, rng: random.Random, *, weight: float = 1.0, temperature: float = 0.0
    ) -> None:
        self._index = index
        self._rng = rng
        self._weight = weight
        self._temperature = temperature

    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """See `Policy`."""
        length = len(prompt.token_ids)
        cached = self._cached(candidates, prompt)
        held = [0 if each.cache is None else cached.get(each.cache, 0) for each in candidates]
        costs = [
            self._weight * (length - tokens) + each.load.prefill_tokens + each.load.kv_tokens / each.page_size
            for each, tokens in zip(candidates, held, strict=True)
        ]
        chosen = self._draw(costs, length)
        return Choice(candidates[chosen], held[chosen])

    def routed(self, candidate: Candidate, prompt: Prompt) -> None:
        """See `Policy`."""
        if candidate.cache is not None:
            self._index.routed(
                candidate.cache, prompt.token_ids, lora_name=prompt.lora_name, cache_salt=prompt.cache_salt
            )

    def _cached(self, candidates: Sequence[Candidate], prompt: Prompt) -> Mapping[Holder, int]:
        if all(each.cache is None for each in candidates):
            return {}
        return self._index.cached_tokens(prompt.token_ids, lora_name=prompt.lora_name, cache_salt=prompt.cache_salt)

    def _draw(self, costs: Sequence[float], length: int) -> int:
        lowest = min(costs)
        if not self._temperature:
            return self._rng.choice([index for index, cost in enumerate(costs) if cost == lowest])
        scale = self._temperature * length
        weights = [math.exp((lowest - cost) / scale) for cost in costs]
        return self._rng.choices(range(len(costs)), weights)[0]
