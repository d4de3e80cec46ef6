"""A room's remainder is the prefill rank, which SGLang reads out of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvbaton.v1 import worker_pb2
from services.frontend.request.attempt import _fresh_room  # pyright: ignore[reportPrivateUsage]
from services.frontend.router.placement import Placement
from services.requests import ROOM_LIMIT


def placement(dp_size: int, rank: int | None) -> Placement:
    record = worker_pb2.WorkerRecord(bootstrap=worker_pb2.BootstrapEndpoint(host="10.0.0.1", port=12345))
    prefill: Any = SimpleNamespace(record=record, ranks=[None] * dp_size)
    decode: Any = SimpleNamespace()
    return Placement(decode, prefill, prefill_rank=rank)


@pytest.mark.peers(12)
@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_rooms_are_in_range_never_zero_and_of_their_rank(dp_size: int) -> None:
    for rank in range(dp_size):
        for _ in range(200):
            room = _fresh_room(placement(dp_size, rank))
            assert room is not None
            assert 0 < room.room < ROOM_LIMIT
            assert room.room % dp_size == rank


def test_without_a_chosen_rank_all_of_them_get_rooms() -> None:
    rooms = [_fresh_room(placement(4, None)) for _ in range(400)]
    assert {room.room % 4 for room in rooms if room is not None} == {0, 1, 2, 3}


def test_no_room_comes_twice() -> None:
    rooms = {room.room for _ in range(1000) if (room := _fresh_room(placement(2, 1))) is not None}
    assert len(rooms) == 1000


def test_an_aggregated_worker_has_none() -> None:
    assert _fresh_room(Placement(SimpleNamespace())) is None  # type: ignore[arg-type]
