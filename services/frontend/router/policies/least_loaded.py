"""The one with the least to do."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt, fewest_tokens


class LeastLoaded(Policy):
    """Fewest tokens queued and running, then fewest requests; equal ones at random."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """See `Policy`."""
        return Choice(self._rng.choice(fewest_tokens(candidates)))
