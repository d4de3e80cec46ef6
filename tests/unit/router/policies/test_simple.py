"""Policies that look at no prefixes: turns, chance, load."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from services.config.common import RoutingFlags
from services.frontend.router.policies.direct import Direct
from services.frontend.router.policies.least_loaded import LeastLoaded
from services.frontend.router.policies.make import make_policies
from services.frontend.router.policies.policy import Policy
from services.frontend.router.policies.power_of_two import PowerOfTwo
from services.frontend.router.policies.random_choice import Random
from services.frontend.router.policies.round_robin import MAX_PARTNERS, RoundRobin
from tests.unit.router.policies.candidates import PROMPT, chosen, ranks

RNG = random.Random(1)


def test_round_robin_goes_round() -> None:
    assert chosen(RoundRobin(), ranks(0, 0, 0), 6) == ["w0", "w1", "w2"] * 2


def test_round_robin_keeps_turns_when_candidates_come_and_go() -> None:
    policy, workers = RoundRobin(), ranks(0, 0, 0)
    assert chosen(policy, workers[:2], 2) == ["w0", "w1"]
    assert chosen(policy, workers, 2) == ["w2", "w0"]
    assert chosen(policy, workers[1:], 1) == ["w1"]


def test_round_robin_uses_every_pair_and_in_one_round_every_worker() -> None:
    policy, workers, partners = RoundRobin(), ranks(0, 0), ("d0", "d1")
    rounds = [[(partner, chosen(policy, workers, partner=partner)[0]) for partner in partners] for _ in range(2)]
    assert {worker for _, worker in rounds[0]} == {"w0", "w1"}
    assert len({*rounds[0], *rounds[1]}) == 4


def test_round_robin_forgets_the_partners_of_the_longest_time_ago() -> None:
    policy, workers = RoundRobin(), ranks(0, 0)
    chosen(policy, workers, 2, partner="first")
    chosen(policy, workers, 1, partner="first")
    for number in range(2 * MAX_PARTNERS):
        chosen(policy, workers, 2, partner=f"d{number}")
    kept = policy._last[workers[0]]  # pyright: ignore[reportPrivateUsage]
    assert len(kept) <= MAX_PARTNERS
    assert f"d{2 * MAX_PARTNERS - 1}" in kept
    assert "first" not in kept


def test_random_uses_all_alike() -> None:
    counts = Counter(chosen(Random(random.Random(1)), ranks(9, 0, 0, 0), 4000))
    assert all(900 < count < 1100 for count in counts.values())


def test_least_loaded_takes_the_least_loaded() -> None:
    assert chosen(LeastLoaded(RNG), ranks(30, 10, 20)) == ["w1"]


def test_least_loaded_counts_requests_where_tokens_are_equal() -> None:
    workers = ranks(10, 10)
    workers[0].load.add(0, 0, 1)
    assert set(chosen(LeastLoaded(RNG), workers, 50)) == {"w1"}


def test_least_loaded_is_fair_among_equals() -> None:
    assert set(chosen(LeastLoaded(RNG), ranks(5, 5, 5), 100)) == {"w0", "w1", "w2"}


def test_power_of_two_never_takes_the_most_loaded_and_not_always_the_least() -> None:
    counts = Counter(chosen(PowerOfTwo(random.Random(1)), ranks(30, 10, 20), 3000))
    assert set(counts) == {"w1", "w2"}
    assert 1800 < counts["w1"] < 2200, "two of the three pairs have it"


@pytest.mark.parametrize("policy", [RoundRobin(), Random(RNG), PowerOfTwo(RNG), LeastLoaded(RNG), Direct(RNG)])
def test_one_candidate_is_the_choice(policy: Policy) -> None:
    workers = ranks(7)
    assert policy.choose(workers, PROMPT).candidate is workers[0]


def test_the_flags_name_the_policies() -> None:
    flags = RoutingFlags(prefill_policy="least-loaded", decode_policy="direct")
    policies = make_policies(flags, None)
    assert isinstance(policies.prefill, LeastLoaded)
    assert isinstance(policies.decode, Direct)
    assert not flags.kv_aware


@pytest.mark.parametrize("name", ["round-robin", "random", "power-of-two", "least-loaded", "direct"])
def test_both_roles_have_a_policy_of_their_own(name: str) -> None:
    policies = make_policies(RoutingFlags(prefill_policy=name, decode_policy=name), None)  # type: ignore[arg-type]
    assert type(policies.prefill) is type(policies.decode)
    assert policies.prefill is not policies.decode


def test_flags_that_mean_nothing_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--kv-aware-temperature"):
        RoutingFlags(kv_aware_temperature=-1)
