"""Pages are free once their writers are gone, which only a refused connection proves."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Generator

import pytest

from services.worker.engines.sglang_writers import Writers

ROOM, OTHER = 1, 2


@contextlib.contextmanager
def listening() -> Generator[tuple[str, int]]:
    """Somebody who accepts nothing, like a process that is frozen."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()


def nobody() -> tuple[str, int]:
    with listening() as endpoint:
        return endpoint


def gone_within(writers: Writers, room: int, seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if writers.gone(room):
            return True
        time.sleep(0.01)
    return False


def test_a_process_that_refuses_connections_is_gone() -> None:
    writers = Writers(refused_for=0.3)
    began = time.monotonic()
    writers.watch(ROOM, [nobody()])
    assert gone_within(writers, ROOM, 10)
    assert time.monotonic() - began >= 0.3


def test_a_frozen_process_is_not() -> None:
    writers = Writers(refused_for=0.0)
    with listening() as frozen:
        writers.watch(ROOM, [frozen])
        assert not gone_within(writers, ROOM, 1.5)
    assert gone_within(writers, ROOM, 10), "it has ended meanwhile"


def test_one_rank_that_lives_keeps_the_room() -> None:
    writers = Writers(refused_for=0.0)
    dead = nobody()
    with listening() as alive:
        writers.watch(ROOM, [dead, alive])
        writers.watch(OTHER, [dead])
        assert gone_within(writers, OTHER, 10)
        assert not writers.gone(ROOM)


def test_a_room_without_known_writers_is_not_proven() -> None:
    writers = Writers(refused_for=0.0)
    writers.watch(ROOM, [])
    assert not gone_within(writers, ROOM, 0.6)


def test_an_endpoint_is_looked_at_anew_for_later_rooms() -> None:
    writers = Writers(refused_for=0.0)
    endpoint = nobody()
    writers.watch(ROOM, [endpoint])
    assert gone_within(writers, ROOM, 10)
    writers.forget(ROOM)
    assert not writers.gone(ROOM)
    ends = time.monotonic() + 10
    while writers.looking and time.monotonic() < ends:
        time.sleep(0.01)
    assert not writers.looking, "nobody is watched"
    with socket.socket() as successor:
        successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        successor.bind(endpoint)
        successor.listen(64)
        writers.watch(ROOM, [endpoint])
        assert not gone_within(writers, ROOM, 1.0)


@pytest.mark.parametrize("rooms", [1, 3])
def test_rooms_of_one_dead_writer_are_free_together(rooms: int) -> None:
    writers = Writers(refused_for=0.0)
    endpoint = nobody()
    for room in range(1, rooms + 1):
        writers.watch(room, [endpoint])
    assert all(gone_within(writers, room, 10) for room in range(1, rooms + 1))
