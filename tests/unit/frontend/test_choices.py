"""How many answers a request may ask for, with which seeds, and when one of them computes the prompt for all."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from kvbaton.errors import RequestError
from kvbaton.v1 import worker_pb2
from kvbaton.v1.generate_pb2 import GenerateRequest
from services.frontend.request.choices import MAX_CHOICES, check_choices, choice_seed, sampling_of
from services.frontend.request.fan_out import first_alone
from services.frontend.router.placement import Target
from services.requests import Role, Sampling


def test_one_answer_unless_asked_for_more() -> None:
    assert check_choices(GenerateRequest()) == 1
    assert [check_choices(GenerateRequest(n=n)) for n in (1, 2, MAX_CHOICES)] == [1, 2, 128]


@pytest.mark.parametrize("n", [0, MAX_CHOICES + 1, 2**32 - 1])
def test_no_answer_and_too_many_are_refused_by_name(n: int) -> None:
    with pytest.raises(RequestError) as caught:
        check_choices(GenerateRequest(n=n))
    assert (caught.value.code, caught.value.field) == (grpc.StatusCode.INVALID_ARGUMENT, "n")


@pytest.mark.parametrize("seed", [0, 1, 42, 2**62, 2**63 - 1])
def test_every_choice_has_a_63_bit_seed_of_its_own_and_the_first_the_requests(seed: int) -> None:
    seeds = [choice_seed(seed, choice) for choice in range(MAX_CHOICES)]
    assert seeds[0] == seed
    assert len(set(seeds)) == MAX_CHOICES
    assert all(0 <= each < 2**63 for each in seeds)


def test_requests_with_neighbouring_seeds_share_no_choice() -> None:
    seeds = [choice_seed(seed, choice) for seed in range(1000) for choice in range(MAX_CHOICES)]
    assert len(set(seeds)) == len(seeds)


def test_only_the_seed_differs_and_no_seed_stays_none() -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0.7, seed=3)
    assert sampling_of(sampling, 0) == sampling
    assert sampling_of(sampling, 1) == Sampling(max_new_tokens=5, temperature=0.7, seed=choice_seed(3, 1))
    unseeded = Sampling(max_new_tokens=5)
    assert sampling_of(unseeded, 4) == unseeded


class FakeWorker:
    def __init__(self, role: Role, batch: int = 2048) -> None:
        self.role = role
        self.record = worker_pb2.WorkerRecord(runtime=worker_pb2.RuntimeConfig(max_batched_tokens=batch, page_size=16))


def pair(*batches: int) -> Target:
    prefills = tuple(FakeWorker(Role.PREFILL, batch) for batch in batches)
    return Target(cast("Any", FakeWorker(Role.DECODE)), cast("Any", prefills))


def aggregated(batch: int = 2048) -> Target:
    return Target(cast("Any", FakeWorker(Role.AGGREGATED, batch)))


def test_one_computes_for_all_what_is_more_than_a_batch_of_any_worker() -> None:
    assert not first_alone([pair(2048)], prompt_tokens=512, choices=4)
    assert first_alone([pair(2048)], prompt_tokens=513, choices=4)
    assert first_alone([pair(2048, 1024)], prompt_tokens=512, choices=4)
    assert first_alone([aggregated()], prompt_tokens=513, choices=4)


def test_nobody_waits_in_vain() -> None:
    assert not first_alone([pair(2048)], prompt_tokens=100_000, choices=1)
    assert not first_alone([pair(16)], prompt_tokens=16, choices=4), "less than a page stays in no cache"
    others = [aggregated(), aggregated()]
    assert not first_alone(others, prompt_tokens=100_000, choices=4), "the others may go to the other worker"
