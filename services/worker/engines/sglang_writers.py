"""Decode gives back what a broken transfer holds as soon as the processes that wrote into it are gone.

NIXL's writes are one-sided, so SGLang 0.5.23 keeps slot and pages of a failed transfer until every prefill rank has
confirmed that it writes no more, or for 30 s. A killed process confirms nothing, and a failed heartbeat proves nothing:
the process could be frozen, and go on. What tells the two apart is the rank's own port, which SGLang's prefill
scheduler, the writer itself, listens on: the kernel refuses connections to a process that has ended, accepts them for
one that is frozen, and says nothing of a host that is away. 0.5.17 holds nothing back.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

Endpoint = tuple[str, int]

_LOOK_EVERY = 0.25
_CONNECT_TIMEOUT = 0.5
# Sockets close before a device has let go of the process: copies that were under way end in this time.
_REFUSED_FOR = 1.0


class Writers:
    """Which rooms' writers are gone. Asked by the scheduler, which must not wait; a thread of its own looks."""

    def __init__(self, refused_for: float = _REFUSED_FOR) -> None:
        """`refused_for`: seconds that an endpoint must have refused connections all the time."""
        self._refused_for = refused_for
        self._rooms: dict[int, frozenset[Endpoint]] = {}
        self._refusing_since: dict[Endpoint, float] = {}
        self._gone: set[Endpoint] = set()
        self._lock = threading.Lock()
        self._looking = False

    def watch(self, room: int, writers: Iterable[Endpoint]) -> None:
        """From now on, until `forget`."""
        with self._lock:
            self._rooms[room] = frozenset(writers)
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
            writers = self._rooms.get(room)
            return bool(writers) and writers <= self._gone

    @property
    def looking(self) -> bool:
        """Whether a thread looks at endpoints."""
        return self._looking

    def _look_while_watched(self) -> None:
        while True:
            with self._lock:
                watched = frozenset[Endpoint]().union(*self._rooms.values())
                for seen in (self._refusing_since.keys() | self._gone) - watched:
                    self._refusing_since.pop(seen, None)
                    self._gone.discard(seen)
                if not watched:
                    self._looking = False
                    return
            for endpoint in watched:
                self._look_at(endpoint)
            time.sleep(_LOOK_EVERY)

    def _look_at(self, endpoint: Endpoint) -> None:
        refuses, now = _refuses(endpoint), time.monotonic()
        with self._lock:
            if not refuses:
                self._refusing_since.pop(endpoint, None)
                self._gone.discard(endpoint)
            elif now - self._refusing_since.setdefault(endpoint, now) >= self._refused_for:
                if endpoint not in self._gone:
                    logger.warning("Prefill rank %s:%d has ended; what it was writing into is free.", *endpoint)
                self._gone.add(endpoint)


def _refuses(endpoint: Endpoint) -> bool:
    try:
        socket.create_connection(endpoint, timeout=_CONNECT_TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def release_pages_of_dead_writers() -> None:
    """Let SGLang's decode take the end of a writer for its confirmation. For a decode scheduler's process."""
    queue: Any = import_module("sglang.srt.disaggregation.decode").DecodeTransferQueue
    manager: Any = import_module("sglang.srt.disaggregation.common.conn").CommonKVManager
    if not hasattr(queue, "_defer_release"):
        return
    writers = Writers()
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
