"""Decode gives back what a broken transfer holds as soon as the processes that wrote into it are gone.

NIXL's writes are one-sided, so SGLang 0.5.23 keeps slot and pages of a failed transfer until every prefill rank has
confirmed that it writes no more, or for 30 s. A killed process confirms nothing, and a failed heartbeat proves nothing:
the process could be frozen, and go on. What tells the two apart is the rank's own port, which SGLang's prefill
scheduler, the writer itself, listens on: the kernel refuses connections to a process that has ended, accepts them for
one that is frozen, and says nothing of a host that is away. So nothing between the workers may refuse connections on
behalf of a host that lives. 0.5.17 holds nothing back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

Endpoint = tuple[str, int]

# Of `--gone-writer-timeout`, for the scheduler's process.
GONE_WRITER_TIMEOUT = "KVBATON_GONE_WRITER_TIMEOUT"

_LOOK_EVERY = 0.25
_CONNECT_TIMEOUT = 0.5
# SGLang has given the pages back long before, one way or another; a room that it doesn't say so of is not kept.
_FORGET_AFTER = 120.0


class Writers:
    """Which rooms' writers are gone. Asked by the scheduler, which must not wait; a thread of its own looks."""

    def __init__(self, refused_for: float) -> None:
        """`refused_for`: seconds that an endpoint must have refused connections all the time.

        Sockets close before a device has let go of the process; copies that were under way end in this time.
        """
        self._refused_for = refused_for
        self._rooms: dict[int, tuple[frozenset[Endpoint], float]] = {}
        self._refusing_since: dict[Endpoint, float] = {}
        self._gone: set[Endpoint] = set()
        self._lock = threading.Lock()
        self._looking = False

    def watch(self, room: int, writers: Iterable[Endpoint]) -> None:
        """From now on, until `forget`."""
        with self._lock:
            self._rooms[room] = (frozenset(writers), time.monotonic() + _FORGET_AFTER)
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look_while_watched, name="kvbaton-writers", daemon=True).start()

    def forget(self, room: int) -> None:
        """Its pages are free."""
        with self._lock:
            self._rooms.pop(room, None)

    def gone(self, room: int) -> bool:
        """Whether every process that could write for the room has ended. Without known writers nothing is proven."""
        with self._lock:
            writers, _ = self._rooms.get(room, (frozenset[Endpoint](), 0.0))
            return bool(writers) and writers <= self._gone

    @property
    def looking(self) -> bool:
        """Whether a thread looks at endpoints."""
        return self._looking

    def _look_while_watched(self) -> None:
        try:
            while watched := self._watched():
                self._seen(watched, _refusing(watched))
                time.sleep(_LOOK_EVERY)
        except Exception:
            logger.exception("Prefill's processes are not looked at; pages come back with SGLang's own deadline.")
            with self._lock:
                self._looking = False

    def _watched(self) -> frozenset[Endpoint]:
        """The endpoints of all watched rooms; without any the looking ends."""
        now = time.monotonic()
        with self._lock:
            self._rooms = {room: each for room, each in self._rooms.items() if each[1] > now}
            watched = frozenset[Endpoint]().union(*(writers for writers, _ in self._rooms.values()))
            for seen in (self._refusing_since.keys() | self._gone) - watched:
                self._refusing_since.pop(seen, None)
                self._gone.discard(seen)
            self._looking = bool(watched)
            return watched

    def _seen(self, watched: frozenset[Endpoint], refusing: set[Endpoint]) -> None:
        now = time.monotonic()
        with self._lock:
            for endpoint in watched - refusing:
                self._refusing_since.pop(endpoint, None)
                self._gone.discard(endpoint)
            for endpoint in refusing - self._gone:
                if now - self._refusing_since.setdefault(endpoint, now) >= self._refused_for:
                    logger.warning("Prefill rank %s:%d has ended; what it was writing into is free.", *endpoint)
                    self._gone.add(endpoint)


def _refusing(endpoints: Iterable[Endpoint]) -> set[Endpoint]:
    """Those that refuse a connection; all are tried at once, as one that is away takes its time to say nothing."""
    refusing: set[Endpoint] = set()
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for endpoint in endpoints:
            family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
            connection = stack.enter_context(socket.socket(family))
            connection.setblocking(False)
            error = connection.connect_ex(endpoint)
            if error == errno.EINPROGRESS:
                waiting.register(connection, selectors.EVENT_WRITE, endpoint)
            elif error == errno.ECONNREFUSED:
                refusing.add(endpoint)
        until = time.monotonic() + _CONNECT_TIMEOUT
        while waiting.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                connection: Any = key.fileobj
                if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED:
                    refusing.add(key.data)
                waiting.unregister(connection)
    return refusing


def release_pages_of_dead_writers(writers: Writers) -> None:
    """Let SGLang's decode take the end of its writers for their confirmation. For a decode scheduler's process."""
    queue: Any = import_module("sglang.srt.disaggregation.decode").DecodeTransferQueue
    manager: Any = import_module("sglang.srt.disaggregation.common.conn").CommonKVManager
    if not hasattr(queue, "_defer_release"):
        return
    hold, is_safe, clear = queue._defer_release, manager.is_abort_release_safe, manager.clear_deferred_abort_state  # noqa: SLF001

    def hold_and_watch(self: Any, decode_req: Any) -> None:
        hold(self, decode_req)
        if self._is_host_destination(decode_req):
            return  # keeps account of its writers by itself
        infos = getattr(decode_req.kv_receiver, "bootstrap_infos", None) or ()
        ranks = ((str(info["rank_ip"]), int(info["rank_port"])) for info in infos)
        writers.watch(decode_req.req.bootstrap_room, ranks)

    def safe_or_gone(self: Any, bootstrap_room: int, required_acks: int) -> bool:
        return is_safe(self, bootstrap_room, required_acks) or writers.gone(bootstrap_room)

    def clear_and_forget(self: Any, bootstrap_room: int) -> None:
        writers.forget(bootstrap_room)
        clear(self, bootstrap_room)

    queue._defer_release = hold_and_watch  # noqa: SLF001
    manager.is_abort_release_safe = safe_or_gone
    manager.clear_deferred_abort_state = clear_and_forget
