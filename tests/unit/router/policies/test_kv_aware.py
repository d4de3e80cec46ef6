"""The cost of a candidate: what it would have to compute, what it has to compute already, what it holds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from services.config.common import RoutingFlags
from services.frontend.router.kv.index import Holder
from services.frontend.router.policies.kv_aware import KvAware
from services.frontend.router.policies.make import make_policies
from services.frontend.router.policies.policy import Prompt
from tests.unit.router.policies.candidates import PROMPT, Rank, chosen, ranks


class Index:
    """Holds what the test says."""

    def __init__(self, **cached: int) -> None:
        self.cached = {Holder(name, 0): tokens for name, tokens in cached.items()}
        self.asked: list[tuple[Sequence[int], str, str]] = []
        self.routes: list[tuple[Holder, str]] = []

    def cached_tokens(
        self, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = ""
    ) -> Mapping[Holder, int]:
        self.asked.append((token_ids, lora_name, cache_salt))
        return self.cached

    def routed(self, holder: Holder, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = "") -> None:
        self.routes.append((holder, cache_salt))


def policy(index: Index, *, weight: float = 1.0, temperature: float = 0.0) -> KvAware:
    return KvAware(index, random.Random(1), weight=weight, temperature=temperature)


def test_the_holder_of_the_longest_prefix_gets_it() -> None:
    choice = policy(Index(w1=512, w2=768)).choose(ranks(0, 0, 0), PROMPT)
    assert (choice.candidate.instance_id, choice.cached_tokens) == ("w2", 768)


def test_a_queue_is_worth_a_prefix_of_its_length() -> None:
    index = Index(w1=800)
    assert chosen(policy(index), ranks(0, 799)) == ["w1"]
    assert chosen(policy(index), ranks(0, 801)) == ["w0"]


def test_the_weight_says_how_much_queue_a_prefix_is_worth() -> None:
    index = Index(w1=800)
    assert chosen(policy(index, weight=2.0), ranks(0, 1599)) == ["w1"]
    assert chosen(policy(index, weight=0.5), ranks(0, 401)) == ["w0"]
    assert set(chosen(policy(index, weight=0.0), ranks(0, 0), 50)) == {"w0", "w1"}


def test_pages_in_use_count_as_pages() -> None:
    workers = ranks(0, 0)
    workers[0].load.add(0, 160, 1)  # ten pages of 16 tokens
    assert chosen(policy(Index(w0=9)), workers) == ["w1"]
    assert chosen(policy(Index(w0=11)), workers) == ["w0"]


def test_equal_costs_are_shared_fairly() -> None:
    counts = Counter(chosen(policy(Index(w0=100, w1=100)), ranks(0, 0, 0), 2000))
    assert set(counts) == {"w0", "w1"}
    assert all(900 < count < 1100 for count in counts.values())


def test_temperature_draws_and_a_low_one_nearly_always_draws_the_best() -> None:
    index, workers = Index(w1=1000), ranks(0, 0)  # a whole prompt's difference
    cold = Counter(chosen(policy(index, temperature=0.1), workers, 1000))
    warm = Counter(chosen(policy(index, temperature=1.0), workers, 10_000))
    hot = Counter(chosen(policy(index, temperature=100.0), workers, 10_000))
    assert cold["w1"] > 995
    assert 0.70 < warm["w1"] / 10_000 < 0.76, "e times as likely"
    assert 0.48 < hot["w1"] / 10_000 < 0.53


def test_ranks_of_one_worker_are_told_apart() -> None:
    index = Index()
    index.cached = {Holder("w0", 1): 512}
    first = ranks(0)[0]
    second = Rank("w0", 1, 16, Holder("w0", 1), first.load)
    choice = policy(index).choose([first, second], PROMPT)
    assert (choice.candidate.dp_rank, choice.cached_tokens) == (1, 512)


def test_decode_workers_hold_no_prefixes_so_nobody_asks() -> None:
    index = Index(w0=512)
    workers = ranks(0, 0, cached=False)
    workers[0].load.add(0, 1600, 1)
    assert chosen(policy(index), workers) == ["w1"]
    assert index.asked == []
    policy(index).routed(workers[0], PROMPT)
    assert index.routes == []


def test_the_index_hears_of_what_separates_caches() -> None:
    index = Index()
    prompt = Prompt([1, 2, 3], lora_name="french", cache_salt="tenant")
    kv_aware = policy(index)
    kv_aware.choose(ranks(0), prompt)
    kv_aware.routed(ranks(0)[0], prompt)
    assert index.asked == [([1, 2, 3], "french", "tenant")]
    assert index.routes == [(("w0", 0), "tenant")]


def test_the_flags_reach_it() -> None:
    index = Index(w1=800)
    flags = RoutingFlags(prefill_policy="kv-aware", kv_aware_weight=0.5, kv_aware_temperature=0.0)
    policies = make_policies(flags, index)
    assert flags.kv_aware
    assert chosen(policies.prefill, ranks(0, 401)) == ["w0"]
