"""The simulated engine by itself: right answers over real sockets, SGLang's rules, wrong answers where they must be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.requests import Grammar, GrammarKind, Role, Room, Sampling
from services.worker.engines.kv_events import BlockStored, KvChange
from services.worker.engines.protocol import EngineRefusedError, EngineRequest, Finish
from services.worker.engines.simulated import Addresses, SimulatedEngine, SimulatedOptions
from services.worker.engines.simulated.oracle import EOS_TOKEN, expected_answer, expected_logprobs, expected_tokens
from tests.support.ports import free_port
from tests.support.simulated_engines import Leg, Pair, do, fresh_room, greedy, started, started_pair
from tests.support.waiting import eventually

PROMPT = list(range(10, 50))
SHORT_TIMEOUTS = SimulatedOptions(bootstrap_timeout=0.3, waiting_timeout=0.3, fetch_retries=2, fetch_interval=0.05)


def ranks(engine: SimulatedEngine) -> list[dict[str, int]]:
    return [rank.state() for rank in engine.scheduler.ranks]


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(32000) for _ in range(rng.randint(1, longest))]


def random_sampling(rng: random.Random) -> Sampling:
    sampling = Sampling(max_new_tokens=rng.randint(1, 60), temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(3))
    return replace(sampling, frequency_penalty=rng.choice([0.0, 0.0, 0.5]), min_new_tokens=rng.choice([0, 1, 5]))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (SimulatedOptions(), SimulatedOptions()),
        (SimulatedOptions(dp_size=2), SimulatedOptions(dp_size=2)),
        (SimulatedOptions(dp_size=3), SimulatedOptions(dp_size=2, max_running_requests=3)),
        (SimulatedOptions(chunk_tokens=24, transfer_byte=2e-7), SimulatedOptions(max_total_tokens=2048)),
        (SimulatedOptions(page_size=1, prefix_cache=False), SimulatedOptions(page_size=1)),
        (SimulatedOptions(max_total_tokens=512, chunk_tokens=32), SimulatedOptions()),
    ],
)
async def test_every_answer_equals_the_oracles(prefill: SimulatedOptions, decode: SimulatedOptions) -> None:
    rng = random.Random(repr((prefill, decode)))
    prefixes = [[], random_prompt(rng, 100), random_prompt(rng, 50)]
    async with started_pair(replace(prefill, eos_rate=0.02), replace(decode, eos_rate=0.02)) as pair:

        async def one() -> None:
            prompt, sampling = rng.choice(prefixes) + random_prompt(rng, 200), random_sampling(rng)
            await asyncio.sleep(rng.random() * 0.2)
            outcome = await pair.generate(prompt, sampling)
            expected = expected_answer(prompt, sampling, pair.decode.model)
            assert outcome.tokens == expected.token_ids
            assert outcome.finish.reason is expected.finish
            assert outcome.finish.matched_token_id == (EOS_TOKEN if expected.finish is Finish.STOP else None)
            assert outcome.finish.completion_tokens == len(expected.token_ids)
            assert outcome.finish.prompt_tokens == len(prompt)

        await asyncio.gather(*(one() for _ in range(150)))
        for rank in ranks(pair.prefill) + ranks(pair.decode):
            assert rank["live"] == rank["holding"] == 0
            assert rank["free_pages"] + rank["evictable_pages"] > 0
        pages = decode.max_total_tokens // decode.page_size
        assert [rank["free_pages"] for rank in ranks(pair.decode)] == [pages] * decode.dp_size


async def test_the_aggregated_role_answers_alike() -> None:
    rng = random.Random(1)
    async with started(Role.AGGREGATED, SimulatedOptions(dp_size=2, max_total_tokens=2048, chunk_tokens=64)) as engine:

        async def one() -> None:
            prompt, sampling = random_prompt(rng, 300), random_sampling(rng)
            outcome = await Leg(engine, prompt, sampling).result(30)
            assert outcome.tokens == expected_tokens(prompt, sampling)

        await asyncio.gather(*(one() for _ in range(100)))
        again = await Leg(engine, PROMPT, greedy(3), dp_rank=1).result()
        again = await Leg(engine, PROMPT, greedy(3), dp_rank=1).result()
        assert again.finish.cached_tokens == 32


async def test_rooms_that_do_not_match_end_in_typed_aborts() -> None:
    async with started_pair(SHORT_TIMEOUTS) as pair:
        here = Leg(pair.prefill, PROMPT, greedy(4), pair.room(11))
        there = Leg(pair.decode, PROMPT, greedy(4), pair.room(12))
        prefill, decode = await asyncio.gather(here.result(), there.result())
        for outcome in (prefill, decode):
            assert outcome.aborted
            assert outcome.tokens == []
            assert outcome.finish.status == 500
        assert "Request 11 timed out after 0.3s in KVPoll.Bootstrapping" in prefill.finish.message
        assert "Request 12 timed out after 0.3s in KVPoll.WaitingForInput" in decode.finish.message
        assert (await pair.generate(PROMPT, greedy(4))).tokens == expected_tokens(PROMPT, greedy(4))


async def test_crossed_rooms_give_wrong_tokens() -> None:
    other = [token + 1 for token in PROMPT]
    async with started_pair() as pair:
        legs = [
            Leg(pair.prefill, PROMPT, greedy(8), pair.room(1)),
            Leg(pair.prefill, other, greedy(8), pair.room(2)),
            Leg(pair.decode, PROMPT, greedy(8), pair.room(2)),
            Leg(pair.decode, other, greedy(8), pair.room(1)),
        ]
        outcomes = [await leg.result() for leg in legs]
        assert outcomes[2].tokens == expected_tokens(other, greedy(8)), "it decodes what it was given"
        assert outcomes[2].tokens != expected_tokens(PROMPT, greedy(8))
        assert outcomes[3].tokens != expected_tokens(other, greedy(8))


async def test_a_prefill_that_is_not_who_decode_takes_it_for_gives_wrong_tokens() -> None:
    async with started_pair() as pair:
        for rank in pair.prefill.scheduler.ranks:
            rank._incarnation = bytes(16)  # type: ignore[attr-defined]
        where = pair.room(fresh_room())
        Leg(pair.prefill, PROMPT, greedy(8), where)
        wrong = await Leg(pair.decode, PROMPT, greedy(8), where).result()
        right = expected_tokens(PROMPT, greedy(8))
        assert len(wrong.tokens) == 8
        assert not set(wrong.tokens) & set(right)


async def test_a_prefill_replaced_at_its_address_is_stale_until_a_heartbeat_fails() -> None:
    addresses = Addresses(bootstrap_port=free_port())
    options = replace(SHORT_TIMEOUTS, heartbeat_interval=0.1, heartbeat_failures=2, heartbeat_timeout=0.2)
    async with started(Role.DECODE, options) as decode:
        async with started(Role.PREFILL, options, addresses) as prefill:
            assert not (await Pair(prefill, decode).generate(PROMPT, greedy(4))).aborted
        async with started(Role.PREFILL, options, addresses) as successor:
            pair = Pair(successor, decode)
            for _ in range(2):  # the successor's heartbeat is fine, so this goes on for ever
                stale = await pair.generate(PROMPT, greedy(4))
                assert stale.aborted
                assert stale.tokens == []
                assert "KVPoll.WaitingForInput" in stale.finish.message
            do(successor, "silent")
            await asyncio.sleep(1.0)
            do(successor, "clear")
            await asyncio.sleep(0.3)
            assert (await pair.generate(PROMPT, greedy(4))).tokens == expected_tokens(PROMPT, greedy(4))


async def test_no_prefill_at_the_address() -> None:
    async with started(Role.DECODE, SHORT_TIMEOUTS) as decode:
        outcome = await Leg(decode, PROMPT, greedy(4), Room("127.0.0.1", free_port(), 7)).result()
        assert outcome.finish.status == 500
        assert "Could not fetch prefill parallel info" in outcome.finish.message


async def test_page_sizes_must_agree() -> None:
    async with started_pair(SHORT_TIMEOUTS, replace(SHORT_TIMEOUTS, page_size=32)) as pair:
        outcome = await pair.generate(PROMPT, greedy(4))
        assert outcome.aborted
        assert "page size mismatch: prefill=16, decode=32" in outcome.finish.message


@pytest.mark.peers(12)
async def test_the_room_chooses_prefills_rank() -> None:
    async with started_pair(replace(SHORT_TIMEOUTS, dp_size=2)) as pair:
        for room in (4, 5):
            await pair.generate(PROMPT, greedy(2), room)
        assert [rank["requests"] for rank in ranks(pair.prefill)] == [1, 1]
        conflict = await Leg(pair.prefill, PROMPT, greedy(2), pair.room(6), dp_rank=1).result()
        assert conflict.aborted
        assert "bootstrap_room 6 implies dp_rank 0" in conflict.finish.message


async def test_probes_need_no_peer() -> None:
    for role in Role:
        async with started(role, SimulatedOptions(dp_size=2)) as engine:
            for rank in range(2):
                await engine.probe(rank)
            requests = [rank["requests"] for rank in ranks(engine)]
            # Like SGLang, it takes no rank for an embedding.
            assert sum(requests) == 2 if role is Role.EMBEDDING else requests == [1, 1]


async def test_room_zero_never_lands() -> None:
    async with started_pair(SHORT_TIMEOUTS) as pair:
        _, decode = pair.legs(PROMPT, greedy(4), 0)
        outcome = await decode.result()
        assert outcome.aborted
        assert "KVPoll.WaitingForInput" in outcome.finish.message


async def test_a_live_room_is_refused_to_another_request() -> None:
    async with started_pair(replace(SHORT_TIMEOUTS, decode_step=0.02)) as pair:
        first = pair.legs(PROMPT, greedy(20), 9)
        await eventually(lambda: first[1].tokens)
        second = Leg(pair.decode, PROMPT, greedy(2), pair.room(9))
        assert "Duplicate decode bootstrap room" in (await second.result()).finish.message
        assert (await first[1].result()).tokens == expected_tokens(PROMPT, greedy(20))


async def test_bad_requests_are_refused_before_they_run() -> None:
    options = SimulatedOptions(max_total_tokens=64, vocab_size=100)
    async with started(Role.DECODE, options) as decode, started(Role.AGGREGATED, options) as aggregated:
        room = Room("127.0.0.1", 1, 1)
        for engine, prompt, count, where, problem in (
            (decode, [1], 1, None, "without bootstrap room"),
            (aggregated, [], 1, None, "empty"),
            (aggregated, [100], 1, None, "outside"),
            (aggregated, [1] * 64, 1, None, "at most 63"),
            (aggregated, [1], 64, None, "KV pool"),
            (decode, [1], 0, room, "max_new_tokens"),
        ):
            with pytest.raises(EngineRefusedError, match=problem):
                await Leg(engine, prompt, greedy(count), where).result()
        request = EngineRequest("a" * 32, [1], greedy(5))
        first = aggregated.generate(request)
        with pytest.raises(EngineRefusedError, match="in use"):
            await anext(aggregated.generate(request))
        assert [token async for delta in first for token in delta.token_ids] == expected_tokens(
            [1], greedy(5), aggregated.model
        )


async def test_the_window_holds_and_the_rest_waits() -> None:
    async with started_pair(SimulatedOptions(), SimulatedOptions(max_running_requests=4)) as pair:
        running = [pair.generate([*PROMPT, i], greedy(30)) for i in range(32)]
        outcomes = await asyncio.gather(*running)
        for i, outcome in enumerate(outcomes):
            assert outcome.tokens == expected_tokens([*PROMPT, i], greedy(30))
        assert ranks(pair.decode)[0]["most_holding"] == 4


async def test_requests_wait_for_pages() -> None:
    options = SimulatedOptions(max_total_tokens=16 * 8, decode_step=0.001)
    async with started_pair(SimulatedOptions(), options) as pair:
        legs = [pair.legs(PROMPT, greedy(20)) for _ in range(6)]  # four pages each
        await eventually(lambda: legs[0][1].tokens)
        (load,) = await pair.decode.loads()
        assert (load.running_requests, load.waiting_requests, load.used_tokens) == (2, 4, 128)
        for leg in legs:
            assert (await leg[1].result()).tokens == expected_tokens(PROMPT, greedy(20))
        assert ranks(pair.decode)[0]["most_holding"] == 2


async def test_cached_prefixes_are_reported_and_told() -> None:
    async with started_pair(SimulatedOptions(dp_size=2)) as pair:
        changes: list[KvChange] = []

        async def listen(arriving: AsyncIterator[KvChange]) -> None:
            while True:
                changes.append(await anext(arriving))

        listening = asyncio.create_task(listen(pair.prefill.kv_events()))
        cached: list[int] = []
        for room in (2, 4, 5):
            prefill, decode = pair.legs(PROMPT, greedy(2), room)
            cached.append((await prefill.result()).finish.cached_tokens)
            assert (await decode.result()).tokens == expected_tokens(PROMPT, greedy(2))
        assert cached == [0, 32, 0]
        await eventually(lambda: len(changes) == 2)
        assert [change.dp_rank for change in changes] == [0, 1]
        stored = changes[0].event
        assert isinstance(stored, BlockStored)
        assert stored.token_ids == PROMPT[:32]
        assert await pair.prefill.flush_cache()
        await eventually(lambda: len(changes) == 4)
        assert [change async for change in pair.decode.kv_events()] == [], "decode keeps no prefixes"
        listening.cancel()


async def test_the_cache_is_not_flushed_under_running_requests() -> None:
    async with started(Role.AGGREGATED, SimulatedOptions(decode_step=0.01)) as engine:
        leg = Leg(engine, PROMPT, greedy(20))
        assert not await engine.flush_cache()
        await leg.result()
        assert (await Leg(engine, PROMPT, greedy(1)).result()).finish.cached_tokens == 32
        assert await engine.flush_cache()
        assert (await Leg(engine, PROMPT, greedy(1)).result()).finish.cached_tokens == 0


async def test_times_are_as_told() -> None:
    options = SimulatedOptions(prefill_base=0.05, prefill_token=0.001, decode_step=0.02, transfer_byte=0.0005)
    async with started_pair(options) as pair:
        loop = asyncio.get_running_loop()
        await pair.generate([1], greedy(1))
        began = loop.time()
        _, decode = pair.legs(list(range(64)), greedy(11))
        await eventually(lambda: decode.tokens, every=0.002)
        first = loop.time() - began
        await decode.result()
        rest = loop.time() - began - first
        assert 0.05 + 0.064 + 256 * 0.0005 <= first < 0.6
        assert 0.19 <= rest < 0.6


async def test_a_script_is_played_by_the_pair() -> None:
    async with started_pair() as pair:
        for engine in (pair.prefill, pair.decode):
            do(engine, "script", prompt=PROMPT, tokens=[100, 200, 300])
        outcome = await pair.generate(PROMPT, greedy(50))
        assert outcome.tokens == [100, 200, 300, EOS_TOKEN]
        assert outcome.finish.reason is Finish.STOP


async def test_log_probabilities_equal_the_oracles_in_both_roles_and_alone() -> None:
    for top in (0, 3):
        expected = expected_logprobs(PROMPT, greedy(12), top)
        async with started_pair() as pair, started(Role.AGGREGATED) as aggregated:
            prefill, decode = pair.legs(PROMPT, greedy(12), logprobs=top)
            alone = Leg(aggregated, PROMPT, greedy(12), logprobs=top)
            for leg in (prefill, decode, alone):
                await leg.result()
            assert prefill.logprobs == expected[:1]
            assert decode.logprobs == alone.logprobs == expected


async def test_without_asking_there_are_no_log_probabilities() -> None:
    async with started_pair() as pair:
        legs = pair.legs(PROMPT, greedy(4))
        for leg in legs:
            await leg.result()
            assert leg.logprobs == []


async def test_biases_reach_both_legs() -> None:
    async with started_pair() as pair:
        forced = replace(greedy(3), logit_bias=((77, 100.0),))
        assert (await pair.generate(PROMPT, forced)).tokens == [77] * 3


async def test_grammars_are_checked_a_little_and_change_nothing() -> None:
    def held_to(kind: GrammarKind, source: str) -> Sampling:
        return replace(greedy(4), grammar=Grammar(kind, source))

    async with started(Role.AGGREGATED, SimulatedOptions(grammars=True)) as engine:
        assert engine.info().grammar_backend == "simulated"
        for kind, source in ((GrammarKind.REGEX, "a+"), (GrammarKind.JSON_SCHEMA, '{"type": ["string", "null"]}')):
            outcome = await Leg(engine, PROMPT, held_to(kind, source)).result()
            assert outcome.tokens == expected_tokens(PROMPT, greedy(4))
        for kind, source in ((GrammarKind.REGEX, "(a"), (GrammarKind.JSON_SCHEMA, '{"type": "nothing"}')):
            with pytest.raises(EngineRefusedError) as caught:
                await Leg(engine, PROMPT, held_to(kind, source)).result()
            assert caught.value.field == f"sampling.{kind}"
    async with started(Role.AGGREGATED) as engine:
        assert engine.info().grammar_backend == ""
        with pytest.raises(EngineRefusedError, match="none without a script"):
            await Leg(engine, PROMPT, held_to(GrammarKind.REGEX, "a")).result()
