"""Faults of the simulated engine: each does what it says, and pages under a running write are really at risk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from services.requests import Role
from services.worker.engines.protocol import EngineDeadError, Finish
from services.worker.engines.simulated import SimulatedEngine, SimulatedOptions
from services.worker.engines.simulated.oracle import expected_tokens
from tests.support.simulated_engines import Leg, Outcome, Pair, do, fresh_room, greedy, started, started_pair
from tests.support.waiting import eventually

PROMPT = list(range(10, 74))
OTHER = list(range(500, 564))
FAST = SimulatedOptions(bootstrap_timeout=5.0, waiting_timeout=5.0, abort_timeout=0.2)
SLOW = replace(FAST, decode_step=0.01)


def rank(engine: SimulatedEngine) -> dict[str, int]:
    (only,) = [each.state() for each in engine.scheduler.ranks]
    return only


@contextlib.asynccontextmanager
async def frozen_in_a_transfer(decode_options: SimulatedOptions) -> AsyncGenerator[tuple[Pair, Pair, Leg]]:
    """Two prefills and one decode; the first froze with half of a request's pages written. Yields that leg too."""
    async with (
        started(Role.PREFILL, FAST) as frozen,
        started(Role.PREFILL, FAST) as healthy,
        started(Role.DECODE, decode_options) as decode,
    ):
        doomed, pair = Pair(frozen, decode), Pair(healthy, decode)
        do(frozen, "stall")
        _, leg = doomed.legs(PROMPT, greedy(8))
        array = decode.scheduler.ranks[0].array
        await eventually(lambda: rank(decode)["holding"] == 1 and any(array.gather(range(array.pages))))
        do(frozen, "freeze")
        do(frozen, "stall", on=False)
        yield doomed, pair, leg


async def test_without_deferred_release_a_thawed_prefill_corrupts_another_request() -> None:
    async with frozen_in_a_transfer(replace(SLOW, deferred_release=False)) as (doomed, pair, leg):
        await leg.abort()
        assert (await leg.result()).aborted
        prefill, victim = pair.legs(OTHER, greedy(60))
        await eventually(lambda: len(victim.tokens) > 5)
        do(doomed.prefill, "thaw")
        outcome = await victim.result()
        expected = expected_tokens(OTHER, greedy(60))
        assert outcome.finish.reason is Finish.LENGTH, "nothing notices"
        assert outcome.tokens[:5] == expected[:5], "it was right until the thaw"
        assert outcome.tokens != expected
        assert (await prefill.result()).tokens == expected[:1]


async def test_with_deferred_release_it_does_not() -> None:
    async with frozen_in_a_transfer(SLOW) as (doomed, pair, leg):
        await leg.abort()
        assert (await leg.result()).aborted
        assert rank(pair.decode)["held_back"] == 1
        _, victim = pair.legs(OTHER, greedy(60))
        await eventually(lambda: len(victim.tokens) > 5)
        do(doomed.prefill, "thaw")
        assert (await victim.result()).tokens == expected_tokens(OTHER, greedy(60))
        await eventually(lambda: rank(pair.decode)["held_back"] == 0, what="prefill confirmed")
        assert rank(pair.decode)["free_pages"] == 16384


async def test_the_release_deadline_ends_the_wait_for_a_writer_that_never_confirms() -> None:
    async with frozen_in_a_transfer(replace(SLOW, release_timeout=0.3)) as (_, pair, leg):
        await leg.abort()
        await leg.result()
        assert rank(pair.decode)["held_back"] == 1
        await eventually(lambda: rank(pair.decode)["holding"] == 0, within=2)


@pytest.mark.parametrize("release", [True, False])
async def test_a_killed_prefill_confirms_nothing(release: bool) -> None:
    async with frozen_in_a_transfer(replace(SLOW, release_on_disconnect=release)) as (doomed, pair, leg):
        doomed.prefill.crash()
        await leg.abort()
        await leg.result()
        await asyncio.sleep(0.1)
        assert rank(pair.decode)["held_back"] == (0 if release else 1)


async def test_a_frozen_scheduler_gives_nothing_and_goes_on_after_the_thaw() -> None:
    async with started_pair(SLOW) as pair:
        _, leg = pair.legs(PROMPT, greedy(40))
        await eventually(lambda: leg.tokens)
        do(pair.decode, "freeze")
        (before,) = await pair.decode.loads()
        await asyncio.sleep(0.1)
        so_far = len(leg.tokens)
        await asyncio.sleep(0.1)
        assert len(leg.tokens) == so_far
        (after,) = await pair.decode.loads()
        assert after == before, "its load is as old as the freeze"
        assert after.reported_at < time.time() - 0.15
        do(pair.decode, "thaw")
        assert (await leg.result()).tokens == expected_tokens(PROMPT, greedy(40))


async def test_an_abort_ends_the_stream_of_a_frozen_engine_and_its_request_after_the_thaw() -> None:
    async with started_pair(SLOW) as pair:
        _, leg = pair.legs(PROMPT, greedy(40))
        await eventually(lambda: leg.tokens)
        do(pair.decode, "freeze")
        await leg.abort()
        outcome = await leg.result(1.0)
        assert outcome.aborted
        assert "did not confirm" in outcome.finish.message
        assert rank(pair.decode)["holding"] == 1
        do(pair.decode, "thaw")
        await eventually(lambda: rank(pair.decode)["holding"] == 0)


async def test_pages_land_in_a_frozen_decode() -> None:
    async with started_pair(FAST) as pair:
        do(pair.prefill, "stall")
        prefill, leg = pair.legs(PROMPT, greedy(4))
        await eventually(lambda: rank(pair.decode)["holding"] == 1)
        do(pair.decode, "freeze")
        do(pair.prefill, "stall", on=False)
        assert (await prefill.result()).tokens == expected_tokens(PROMPT, greedy(1))
        assert not leg.task.done()
        do(pair.decode, "thaw")
        assert (await leg.result()).tokens == expected_tokens(PROMPT, greedy(4))


async def test_a_stalled_transfer_ends_in_the_waiting_timeout() -> None:
    options = replace(FAST, waiting_timeout=0.3)
    async with started_pair(options) as pair:
        do(pair.prefill, "stall")
        prefill, leg = pair.legs(PROMPT, greedy(4))
        outcome = await leg.result()
        assert outcome.finish.status == 500
        assert "timed out after 0.3s in KVPoll.WaitingForInput" in outcome.finish.message
        assert "Aborted by decode-side abort notification." in (await prefill.result()).finish.message
        assert rank(pair.decode)["held_back"] == 1, "what has begun isn't written to its end"
        do(pair.prefill, "clear")
        await eventually(lambda: rank(pair.decode)["held_back"] == 0)


async def test_a_dead_scheduler() -> None:
    async with started_pair(SLOW) as pair:
        prefill, leg = pair.legs(PROMPT, greedy(40))
        await prefill.result()
        await eventually(lambda: leg.tokens)
        do(pair.decode, "crash")
        with pytest.raises(EngineDeadError):
            await leg.result(1)
        assert "killed" in await asyncio.wait_for(pair.decode.wait_dead(), 1)
        with pytest.raises(EngineDeadError):
            await Leg(pair.decode, PROMPT, greedy(1), pair.room(3)).result(1)
        with pytest.raises(EngineDeadError):
            await pair.decode.loads()
        orphan = Leg(pair.prefill, PROMPT, greedy(1), pair.room(4))
        await orphan.abort()
        assert (await orphan.result()).aborted


async def test_prefill_whose_peer_dies_in_a_transfer() -> None:
    async with started_pair(FAST) as pair:
        do(pair.prefill, "stall")
        prefill, _ = pair.legs(PROMPT, greedy(4))
        await eventually(lambda: rank(pair.prefill)["holding"] == 1)
        pair.decode.crash()
        assert "nixlRemoteDisconnectError" in (await prefill.result()).finish.message
        assert rank(pair.prefill)["holding"] == 0


async def test_a_dead_prefill_fails_transfers_when_its_heartbeat_has() -> None:
    options = replace(FAST, heartbeat_interval=0.1, heartbeat_timeout=0.2)
    async with started_pair(options) as pair:
        await pair.generate(PROMPT, greedy(1))
        do(pair.prefill, "stall")
        _, leg = pair.legs(PROMPT, greedy(4))
        await eventually(lambda: rank(pair.decode)["holding"] == 1)
        pair.prefill.shutdown()
        outcome = await leg.result(3)
        assert outcome.finish.status == 500
        assert "Lost connection with prefill instance" in outcome.finish.message


async def test_a_silent_heartbeat_drops_the_peer_and_its_return_is_noticed() -> None:
    options = replace(FAST, heartbeat_interval=0.1, heartbeat_timeout=0.1, fetch_interval=0.1)
    async with started_pair(options) as pair:
        await pair.generate(PROMPT, greedy(1))
        do(pair.prefill, "silent")
        with pytest.raises(TimeoutError):
            await pair.prefill.loads()
        assert pair.decode._peers is not None
        await eventually(lambda: pair.decode._peers and not list(pair.decode._peers.known), within=2)
        do(pair.prefill, "silent", on=False)
        assert (await pair.generate(PROMPT, greedy(5))).tokens == expected_tokens(PROMPT, greedy(5))


@pytest.mark.parametrize("late", ["prefill", "decode"])
async def test_a_late_bootstrap(late: str) -> None:
    async with started_pair(replace(FAST, bootstrap_timeout=0.4)) as pair:
        await pair.generate(PROMPT, greedy(1))
        engine = pair.prefill if late == "prefill" else pair.decode
        do(engine, "late_bootstrap", seconds=0.2)
        began = time.monotonic()
        assert (await pair.generate(PROMPT, greedy(2))).tokens == expected_tokens(PROMPT, greedy(2))
        assert time.monotonic() - began >= 0.2
        do(engine, "late_bootstrap", seconds=1.0)
        prefill, decode = pair.legs(PROMPT, greedy(2))
        assert "KVPoll.Bootstrapping" in (await prefill.result()).finish.message
        await decode.abort()
        await decode.result()


async def test_slow_steps() -> None:
    async with started_pair(replace(FAST, decode_step=0.002)) as pair:
        await pair.generate(PROMPT, greedy(1))
        do(pair.decode, "slow", factor=20)
        began = time.monotonic()
        await pair.generate(PROMPT, greedy(11))
        assert time.monotonic() - began >= 0.4


async def test_wrong_first_tokens() -> None:
    async with started_pair(FAST) as pair:
        expected = expected_tokens(PROMPT, greedy(4))
        do(pair.prefill, "wrong_first_token")
        prefill, decode = pair.legs(PROMPT, greedy(4))
        assert (await prefill.result()).tokens == [expected[0] + 1]
        assert (await decode.result()).tokens == expected
        do(pair.decode, "wrong_first_token", count=1)
        _, decode = pair.legs(PROMPT, greedy(4))
        assert (await decode.result()).tokens[0] == expected[0] + 1
        assert (await pair.generate(PROMPT, greedy(4))).tokens == expected


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_an_abort_chunk_at_once(side: str) -> None:
    async with started_pair(replace(FAST, waiting_timeout=0.3, bootstrap_timeout=0.3)) as pair:
        do(pair.prefill if side == "prefill" else pair.decode, "abort_chunk", status=503, message="because")
        prefill, decode = pair.legs(PROMPT, greedy(4))
        outcome = await (prefill if side == "prefill" else decode).result()
        assert outcome.aborted
        assert outcome.tokens == []
        assert (outcome.finish.status, outcome.finish.message) == (503, "because")
        assert (await (decode if side == "prefill" else prefill).result()).aborted
        assert (await pair.generate(PROMPT, greedy(4))).tokens == expected_tokens(PROMPT, greedy(4))


async def test_ends_in_the_middle() -> None:
    async with started_pair(FAST) as pair:
        do(pair.decode, "abort_chunk", after_tokens=3)
        outcome = await _decode(pair)
        assert outcome.aborted
        assert outcome.tokens == expected_tokens(PROMPT, greedy(3))
        do(pair.decode, "early_length", after_tokens=5)
        outcome = await _decode(pair)
        assert outcome.finish.reason is Finish.LENGTH
        assert outcome.tokens == expected_tokens(PROMPT, greedy(5))
        assert (await _decode(pair)).tokens == expected_tokens(PROMPT, greedy(8))


async def test_a_finish_that_hides_an_abort() -> None:
    async with started_pair(SLOW) as pair:
        do(pair.decode, "finish_after_abort")
        _, leg = pair.legs(PROMPT, greedy(40))
        await eventually(lambda: leg.tokens)
        await leg.abort()
        outcome = await leg.result()
        assert outcome.finish.reason is Finish.LENGTH
        assert 0 < len(outcome.tokens) < 40


@pytest.mark.peers(6)
async def test_aborts_in_every_phase_free_everything() -> None:
    options = replace(SLOW, decode_step=0.002, transfer_byte=1e-4, prefill_base=0.01, max_running_requests=4)
    async with started_pair(options) as pair:
        for delay in range(0, 60, 2):
            legs = [leg for _ in range(6) for leg in pair.legs(PROMPT, greedy(20))]
            await asyncio.sleep(delay / 1000)
            for leg in legs:
                await leg.abort()
            for leg in legs:
                await leg.result()
        for engine in (pair.prefill, pair.decode):
            await eventually(lambda engine=engine: rank(engine)["holding"] == 0, what="everything let go")
            assert rank(engine)["live"] == 0
            assert rank(engine)["free_pages"] + rank(engine)["evictable_pages"] == 16384
        assert rank(pair.decode)["free_pages"] == 16384
        assert (await pair.generate(PROMPT, greedy(9))).tokens == expected_tokens(PROMPT, greedy(9))
        sender = pair.prefill.scheduler.ranks[0]
        assert not sender._registrations  # type: ignore[attr-defined]
        assert not sender._sender._under_way  # type: ignore[attr-defined]


async def test_an_abort_that_comes_at_once_and_one_for_nobody() -> None:
    async with started_pair(FAST) as pair:
        await pair.decode.abort("f" * 32)
        leg = Leg(pair.decode, PROMPT, greedy(4), pair.room(fresh_room()))
        await leg.abort()
        outcome = await leg.result(1)
        assert outcome.aborted
        assert outcome.tokens == []


@pytest.mark.parametrize(
    ("what", "arguments", "problem"),
    [
        ("dance", {}, "'dance' is not one of freeze"),
        ("", {}, "is not one of freeze"),
        ("slow", {"factor": "x"}, "factor: 'x' is not float"),
        ("slow", {"faktor": 2.0}, "unknown: faktor"),
        ("crash", {"how": "softly"}, "how: 'softly'"),
        ("script", {"prompt": [1], "tokens": "abc"}, "tokens: 'abc'"),
    ],
)
async def test_unknown_commands_are_refused(what: str, arguments: dict[str, object], problem: str) -> None:
    async with started(Role.AGGREGATED) as engine:
        with pytest.raises(ValueError, match=problem):
            do(engine, what, **arguments)


async def _decode(pair: Pair) -> Outcome:
    _, decode = pair.legs(PROMPT, greedy(8))
    return await decode.result()


@pytest.mark.parametrize("phase", ["bootstrapping", "prefilling", "transferring", "decoding"])
async def test_a_held_request_stands_still_in_its_phase_and_others_pass(phase: str) -> None:
    async with started_pair(replace(FAST, prefix_cache=False)) as pair:
        holding = pair.decode if phase == "decoding" else pair.prefill
        for engine in (pair.prefill, pair.decode):
            do(engine, "hold", phase=phase, token=PROMPT[0], count=int(engine is holding), after_tokens=3)
        prefill, decode = pair.legs(PROMPT, greedy(9))
        await eventually(lambda: rank(holding)["held"] == 1)
        assert (await pair.generate(OTHER, greedy(9))).tokens == expected_tokens(OTHER, greedy(9))
        again = await pair.generate(PROMPT, greedy(9))
        assert again.tokens == expected_tokens(PROMPT, greedy(9)), "only one was to be held"
        assert not decode.task.done()
        assert len(decode.tokens) == (3 if phase == "decoding" else 0)
        assert prefill.task.done() == (phase == "decoding")
        assert rank(pair.decode)["marked"] == 1

        do(holding, "release")
        assert (await decode.result()).tokens == expected_tokens(PROMPT, greedy(9))
        await eventually(lambda: not rank(pair.prefill)["marked"] and not rank(pair.decode)["marked"])


@pytest.mark.parametrize("phase", ["bootstrapping", "prefilling", "transferring", "decoding"])
async def test_a_held_request_can_be_aborted(phase: str) -> None:
    async with started_pair(replace(FAST, prefix_cache=False)) as pair:
        holding = pair.decode if phase == "decoding" else pair.prefill
        do(holding, "hold", phase=phase, token=PROMPT[0])
        legs = pair.legs(PROMPT, greedy(9))
        await eventually(lambda: rank(holding)["held"] == 1)
        for leg in legs:
            await leg.abort()
        for engine in (pair.prefill, pair.decode):
            await eventually(lambda engine=engine: not rank(engine)["live"] and not rank(engine)["holding"])


async def test_a_hold_without_a_phase_is_refused() -> None:
    async with started(Role.PREFILL, FAST) as engine:
        with pytest.raises(ValueError, match="phase: 'nowhere' is not one of bootstrapping"):
            do(engine, "hold", phase="nowhere")


async def test_a_broken_connection_is_opened_anew_where_the_options_say_so() -> None:
    async with started_pair(replace(FAST, reconnect=True)) as pair:
        assert (await pair.generate(PROMPT, greedy(9))).tokens == expected_tokens(PROMPT, greedy(9))
        for link in list(pair.prefill.scheduler.ranks[0].links):  # type: ignore[attr-defined]
            link.close()
        await eventually(lambda: not list(pair.decode._peers.known), what="the peer forgotten")  # type: ignore[union-attr]
        assert (await pair.generate(OTHER, greedy(9))).tokens == expected_tokens(OTHER, greedy(9))
