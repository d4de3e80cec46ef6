"""The less loaded of two that are drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt, fewest_tokens


class PowerOfTwo(Policy):
    """Nearly as even as least-loaded, and frontends with equally old reports don't all go to the same worker.

    Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """See `Policy`."""
        two = self._rng.sample(candidates, min(2, len(candidates)))
        return Choice(fewest_tokens(two)[0])
