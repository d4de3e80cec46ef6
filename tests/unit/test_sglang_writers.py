"""Pages are free once their writers are gone, which only a refused connection proves."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from services.worker.engines import sglang_writers
from services.worker.engines.sglang_writers import Writers, release_pages_of_dead_writers

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


def test_many_that_do_not_answer_do_not_hide_one_that_is_gone() -> None:
    writers = Writers(refused_for=0.0)
    with contextlib.ExitStack() as stack:
        silent: list[tuple[str, int]] = []
        for _ in range(20):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            # The backlog is full: further connections are neither taken nor refused.
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            silent.append(listener.getsockname())
        writers.watch(ROOM, silent)
        writers.watch(OTHER, [nobody()])
        began = time.monotonic()
        assert gone_within(writers, OTHER, 30)
        assert time.monotonic() - began < 6, "twenty time-outs one behind the other are ten seconds"
        assert not writers.gone(ROOM)


class Queue:
    """SGLang's `DecodeTransferQueue`, as far as it is touched."""

    def __init__(self, *, host: bool = False) -> None:
        self.held: list[Any] = []
        self.host = host

    def _defer_release(self, decode_req: Any) -> None:
        self.held.append(decode_req)

    def _is_host_destination(self, decode_req: Any) -> bool:
        return self.host


class Manager:
    """SGLang's `CommonKVManager`: a room is safe once `acks` ranks have confirmed."""

    acks = 0
    cleared: tuple[int, ...] = ()

    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        return self.acks >= required_acks

    def clear_deferred_abort_state(self, bootstrap_room: int) -> None:
        self.cleared = (*self.cleared, bootstrap_room)


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> tuple[type[Any], type[Any]]:
    """Its two classes, as they are to be changed."""
    queue, manager = type("Queue", (Queue,), dict(vars(Queue))), type("Manager", (Manager,), dict(vars(Manager)))
    modules = {
        "sglang.srt.disaggregation.decode": SimpleNamespace(DecodeTransferQueue=queue),
        "sglang.srt.disaggregation.common.conn": SimpleNamespace(CommonKVManager=manager),
    }
    monkeypatch.setattr(sglang_writers, "import_module", modules.__getitem__)
    return queue, manager


def request(*ranks: tuple[str, int], room: int = ROOM) -> Any:
    infos = [{"rank_ip": host, "rank_port": str(port)} for host, port in ranks]
    return SimpleNamespace(req=SimpleNamespace(bootstrap_room=room), kv_receiver=SimpleNamespace(bootstrap_infos=infos))


def test_decode_takes_the_end_of_a_rank_for_its_confirmation(sglang: tuple[type[Any], type[Any]]) -> None:
    writers = Writers(refused_for=0.0)
    release_pages_of_dead_writers(writers)
    queue, manager = sglang[0](), sglang[1]()
    with listening() as alive:
        queue._defer_release(request(nobody()))
        queue._defer_release(request(nobody(), alive, room=OTHER))
        assert len(queue.held) == 2
        assert gone_within(writers, ROOM, 10)
        assert manager.is_abort_release_safe(ROOM, 1)
        assert not manager.is_abort_release_safe(OTHER, 2)
        manager.acks = 2
        assert manager.is_abort_release_safe(OTHER, 2), "SGLang's own confirmations count as before"
    for room in (ROOM, OTHER):
        manager.clear_deferred_abort_state(room)
    assert manager.cleared == (ROOM, OTHER)
    assert not writers.gone(ROOM)


@pytest.mark.parametrize("kind", ["host", "unknown"])
def test_without_known_ranks_it_waits_for_sglangs_own_deadline(sglang: tuple[type[Any], type[Any]], kind: str) -> None:
    """Of a host destination SGLang keeps account by itself; a hand-shake that didn't end names no ranks."""
    writers = Writers(refused_for=0.0)
    release_pages_of_dead_writers(writers)
    queue, manager = sglang[0](host=kind == "host"), sglang[1]()
    held = request(nobody())
    if kind == "unknown":
        held.kv_receiver.bootstrap_infos = None
    queue._defer_release(held)
    assert not gone_within(writers, ROOM, 0.6)
    assert not manager.is_abort_release_safe(ROOM, 1)


def test_a_version_that_holds_nothing_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """0.5.17's queue."""

    modules = {
        "sglang.srt.disaggregation.decode": SimpleNamespace(DecodeTransferQueue=Older),
        "sglang.srt.disaggregation.common.conn": SimpleNamespace(CommonKVManager=Older),
    }
    monkeypatch.setattr(sglang_writers, "import_module", modules.__getitem__)
    release_pages_of_dead_writers(Writers(refused_for=0.0))
    assert not hasattr(Older, "_defer_release")
