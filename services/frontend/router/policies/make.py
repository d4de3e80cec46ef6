"""The policies that the flags name."""

from __future__ import annotations

import random
from dataclasses import dataclass

from services.config.common import RoutingFlags
from services.frontend.router.policies.direct import Direct
from services.frontend.router.policies.kv_aware import KvAware, PrefixIndex
from services.frontend.router.policies.least_loaded import LeastLoaded
from services.frontend.router.policies.policy import Policy
from services.frontend.router.policies.power_of_two import PowerOfTwo
from services.frontend.router.policies.random_choice import Random
from services.frontend.router.policies.round_robin import RoundRobin


@dataclass(frozen=True, slots=True)
class Policies:
    """`prefill` chooses prefill workers; `decode` who streams the answer: decode workers and aggregated ones."""

    prefill: Policy
    decode: Policy


def make_policies(flags: RoutingFlags, index: PrefixIndex | None, rng: random.Random | None = None) -> Policies:
    """Two instances, also of the same policy. `index` is needed where `flags.kv_aware`."""
    rng = rng or random.Random()
    return Policies(_make(flags.prefill_policy, flags, index, rng), _make(flags.decode_policy, flags, index, rng))


def _make(name: str, flags: RoutingFlags, index: PrefixIndex | None, rng: random.Random) -> Policy:
    match name:
        case "round-robin":
            return RoundRobin()
        case "random":
            return Random(rng)
        case "power-of-two":
            return PowerOfTwo(rng)
        case "least-loaded":
            return LeastLoaded(rng)
        case "direct":
            return Direct(rng)
        case "kv-aware":
            assert index is not None
            return KvAware(index, rng, weight=flags.kv_aware_weight, temperature=flags.kv_aware_temperature)
        case _:
            raise ValueError(f"there is no policy {name!r}")
