"""The KV index of this process, kept equal to what its workers' caches hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from services.frontend.router.kv.follower import FollowedWorker, KvFollower
from services.frontend.router.kv.index import Holder, KvIndex, cache_owner
from services.prefixes import iter_prefix_hashes, prefix_hashes, root
from services.requests import Role

# Decode engines keep no prefixes.
_ROLES = (Role.PREFILL, Role.AGGREGATED)


class KvIndexes:
    """Use it as an async context manager, inside the worker set's; see the package's docstring."""

    def __init__(
        self,
        workers: Callable[[], Iterable[FollowedWorker]],
        *,
        max_pages: int = 1_000_000,
        assumed_seconds: float = 120.0,
        events: bool = True,
    ) -> None:
        """`workers` are all that are known now. Without `events` nobody is asked: all is guessed from what is sent."""
        self.index = KvIndex(max_pages, assumed_seconds=assumed_seconds)
        self._workers = workers
        self._events = events
        self._followers: dict[str, KvFollower] = {}
        self._stopped: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.workers_changed()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._followers):
            self._stop(worker)
        await asyncio.gather(*self._stopped, return_exceptions=True)

    def workers_changed(self) -> None:
        """To be called after every change of what `workers` says."""
        caching = (worker for worker in self._workers() if worker.role in _ROLES)
        known = {cache_owner(worker.role, worker.instance_id): worker for worker in caching}
        for name, follower in list(self._followers.items()):
            if name not in known or known[name].record.incarnation != follower.incarnation:
                self._stop(name)
        for name, worker in known.items():
            if name not in self._followers:
                self._followers[name] = KvFollower(self.index, worker, events=self._events)

    def cached_tokens(
        self, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = ""
    ) -> dict[Holder, int]:
        """How many tokens, from the beginning of the prompt, each holder has in its KV cache; only who has any."""
        found: dict[Holder, int] = {}
        for size in {follower.page_size for follower in self._followers.values()}:
            begin = root(size, lora_name=lora_name, cache_salt=cache_salt)
            pages = self.index.overlap(iter_prefix_hashes(token_ids, size, begin))
            found |= {holder: count * size for holder, count in pages.items()}
        return found

    def routed(self, holder: Holder, token_ids: Sequence[int], *, lora_name: str = "", cache_salt: str = "") -> None:
        """The prompt was sent there: assumed to be cached there from now on, unless the worker's own events tell."""
        follower = self._followers.get(holder.worker)
        if follower is None or follower.exact:
            return
        hashes = prefix_hashes(token_ids, follower.page_size, lora_name=lora_name, cache_salt=cache_salt)
        self.index.routed(holder, hashes, capacity=follower.capacity)

    def exact(self, worker: str) -> bool:
        """Whether what is known of this `cache_owner` is what it holds, as far as the index has room for it."""
        return worker in self._followers and self._followers[worker].exact

    def _stop(self, worker: str) -> None:
        follower = self._followers.pop(worker)
        follower.stop()
        task = asyncio.create_task(follower.ended(), name=f"kv events of {worker} end")
        self._stopped.add(task)
        task.add_done_callback(self._stopped.discard)
