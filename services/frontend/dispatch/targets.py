"""Who can stream a model's answers, in view of which pairs have proven themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.router.placement import Router, Target
from services.frontend.router.worker import Worker

_LASTING = frozenset(PairState) - {PairState.REFUSED}


@dataclass(frozen=True, slots=True)
class Usable:
    """A target with the prefill workers that have handed over to it, or may try to."""

    target: Target
    proofs: int | None
    """Without a proven pair each credit goes into a proof, and it can use as many; otherwise None."""

    def within(self, count: int) -> int:
        """Of `count` credits those that could be used."""
        return count if self.proofs is None else min(count, self.proofs)


class Targets:
    """Belongs to the event loop. Computed when workers have changed, for one of them when its pairs have."""

    def __init__(self, router: Router, pairs: PairChecks) -> None:
        self._router = router
        self._pairs = pairs
        self._usable: dict[str, dict[Worker, Usable]] = {}
        self._possible: dict[str, list[Target]] = {}

    def changed(self) -> None:
        """Workers, or any pairs."""
        self._usable.clear()
        self._possible.clear()

    def pairs_changed(self, decode: Worker) -> bool:
        """Pairs of this decode worker alone; True when it is by them that it can serve more or fewer for good."""
        model = decode.record.model.name
        target = next((each for each in self._router.targets(model) if each.decode is decode), None)
        if target is None:
            return False
        if decode in self._usable.get(model, ()):
            self._usable[model][decode] = self._use_of(target)
        if model not in self._possible:
            return False
        before = next((each for each in self._possible[model] if each.decode is decode), None)
        if before == self._possible_of(target):
            return False
        del self._possible[model]
        return True

    def possible(self, model: str) -> list[Target]:
        """Without pairs that decode has refused for good; one that failed may recover."""
        if model not in self._possible:
            possible = map(self._possible_of, self._router.targets(model))
            self._possible[model] = [target for target in possible if target is not None]
        return self._possible[model]

    def usable(self, model: str) -> dict[Worker, Usable]:
        """What can be used now, by the worker that streams the answer."""
        if model not in self._usable:
            self._usable[model] = {target.decode: self._use_of(target) for target in self._router.targets(model)}
        return self._usable[model]

    def _possible_of(self, target: Target) -> Target | None:
        kept = self._with_pairs(target, _LASTING)
        return kept if kept.aggregated or kept.prefills else None

    def _use_of(self, target: Target) -> Usable:
        kept = self._with_pairs(target, frozenset({PairState.PROVEN, PairState.UNKNOWN}))
        states = [self._pairs.state(prefill, target.decode) for prefill in kept.prefills]
        return Usable(kept, None if target.aggregated or PairState.PROVEN in states else len(states))

    def _with_pairs(self, target: Target, states: frozenset[PairState]) -> Target:
        state = self._pairs.state
        return replace(target, prefills=tuple(p for p in target.prefills if state(p, target.decode) in states))
