"""Which workers with an open breaker get no new requests: never more than half of those that could do the same work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from services.frontend.router.worker import Worker


def ejected(workers: Iterable[Worker]) -> set[Worker]:
    """Of each pool (role, model and compat hash), at most half of the workers that answer, rounded down.

    The first to open go. So the one whose breaker opened last is the last resort, and a pool of one is never empty.
    """
    pools: defaultdict[tuple[str, str, str], list[Worker]] = defaultdict(list)
    for worker in workers:
        if worker.answering:
            record = worker.record
            pools[worker.role, record.model.name, record.compat_hash].append(worker)
    found: set[Worker] = set()
    for pool in pools.values():
        opened = [worker for worker in pool if not worker.breaker.closed]
        opened.sort(key=lambda worker: worker.breaker.opened_at)
        found.update(opened[: len(pool) // 2])
    return found
