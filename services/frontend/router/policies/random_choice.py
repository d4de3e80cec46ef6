"""Any of them, with equal probability."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt


class Random(Policy):
    """Needs to know nothing, so frontends that know nothing of each other can't get into step."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """See `Policy`."""
        return Choice(self._rng.choice(candidates))
