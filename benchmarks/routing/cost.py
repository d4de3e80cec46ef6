"""What one routing decision costs: 16 workers, a prompt of 2,000 tokens, the prefixes of the trace in the index."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.routing.trace import Trace
from services.frontend.link.load import WorkerLoad
from services.frontend.router.kv.index import Holder, KvIndex
from services.frontend.router.policies.kv_aware import KvAware
from services.frontend.router.policies.least_loaded import LeastLoaded
from services.frontend.router.policies.policy import Policy, Prompt
from services.frontend.router.policies.power_of_two import PowerOfTwo
from services.frontend.router.policies.random_choice import Random
from services.frontend.router.policies.round_robin import RoundRobin
from services.frontend.router.worker import WorkerRank
from services.prefixes import prefix_hashes

PAGE = 16
_ROUNDS, _CALLS = 9, 200


class _Hashed:
    """An index that is asked with hashes that are there already, so that hashing can be stated by itself."""

    def __init__(self, index: KvIndex, hashes: list[int]) -> None:
        self._index, self._hashes = index, hashes

    def cached_tokens(
        self, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = ""
    ) -> Mapping[Holder, int]:
        return {holder: pages * PAGE for holder, pages in self._index.overlap(self._hashes).items()}

    def routed(self, holder: Holder, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = "") -> None:
        """Its events tell."""


def measure(trace: Trace) -> str:
    """The table; microseconds, median of several rounds."""
    rng = random.Random(1)
    index = KvIndex(1_000_000)
    for worker, held in enumerate(trace.held):
        for prefix in held:
            index.routed(Holder(_name(worker), 0), prefix_hashes(trace.prefixes[prefix], PAGE), capacity=100_000)
    ranks = [_rank(worker, rng) for worker in range(trace.setting.workers)]
    prompt = Prompt(trace.prefixes[0])
    hashes = prefix_hashes(prompt.token_ids, PAGE)
    policies: dict[str, Policy] = {
        "round-robin": RoundRobin(),
        "random": Random(rng),
        "power-of-two": PowerOfTwo(rng),
        "least-loaded": LeastLoaded(rng),
        "kv-aware, overlap included": KvAware(_Hashed(index, hashes), rng, temperature=0.1),
    }
    lines = [f"one decision among {len(ranks)} workers, prompt of {len(prompt.token_ids):,} tokens, pages of {PAGE}"]
    for name, policy in policies.items():
        lines.append(f"  {name:<28}{_microseconds(lambda policy=policy: policy.choose(ranks, prompt)):>8.1f} us")
    hashing = _microseconds(lambda: prefix_hashes(prompt.token_ids, PAGE))
    lines.append(f"  {'hashing the prompt':<28}{hashing:>8.1f} us")
    return "\n".join(lines)


def _microseconds(call: Callable[[], object]) -> float:
    rounds: list[float] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(_CALLS):
            call()
        rounds.append((time.perf_counter() - began) / _CALLS)
    return statistics.median(rounds) * 1e6


def _name(worker: int) -> str:
    return f"prefill-{worker:02}"


def _rank(worker: int, rng: random.Random) -> WorkerRank:
    load = WorkerLoad(1).ranks[0]
    load.add(rng.randrange(8000), rng.randrange(8000), rng.randrange(8))
    return WorkerRank(None, _name(worker), 0, PAGE, Holder(_name(worker), 0), load)  # type: ignore[arg-type]
