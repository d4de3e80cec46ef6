"""In turn: whoever was chosen the longest time ago."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from services.frontend.router.policies.policy import Candidate, Choice, Policy, Prompt

# Partners whose turns are kept for each candidate: partners come and go, and nobody says which are gone.
MAX_PARTNERS = 1024


class RoundRobin(Policy):
    """Prefill workers take turns for each decode worker, so that every pair is used in time.

    Of those that stand equal with the partner, the one that anybody chose the longest time ago: one round over several
    decode workers uses as many prefill workers as it can.
    """

    def __init__(self) -> None:
        self._turns = itertools.count(1)
        # When each was last chosen, by partner; "" for by anybody. Ranks of workers that are gone drop out.
        self._last: WeakKeyDictionary[Candidate, dict[str, int]] = WeakKeyDictionary()

    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """See `Policy`."""
        nothing: dict[str, int] = {}

        def turns(candidate: Candidate) -> tuple[int, int]:
            last = self._last.get(candidate, nothing)
            return last.get(partner, 0), last.get("", 0)

        chosen = min(candidates, key=turns)
        last = self._last.setdefault(chosen, {})
        turn = next(self._turns)
        for key in (partner, ""):
            last.pop(key, None)
            last[key] = turn  # the oldest turns stand first
        if len(last) > MAX_PARTNERS:
            del last[next(iter(last))]
        return Choice(chosen)
