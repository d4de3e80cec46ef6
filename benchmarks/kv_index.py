"""What the KV index costs: bytes a page, lookups, events; and what its hashes cost a worker.

    python -m benchmarks.kv_index [--pages 1000000] [--workers 64] [--prompt 4000] [--page-size 16]

One process, nothing else in it. Times are this thread's CPU time, so that a busy machine doesn't count; memory is what
the allocator says in a second, slower pass.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from services.frontend.router.kv.index import Holder, KvIndex
from services.prefixes import hashed_page_size, iter_prefix_hashes, prefix_hashes, root
from services.worker.engines.kv_events import BlockRemoved, BlockStored
from services.worker.kv_events.mirror import RankMirror

RUN = 125
"""Pages of one prompt's part that is cached by the same workers, and comes and goes with one event."""


@dataclass(frozen=True)
class Run:
    """Pages and who holds them."""

    hashes: Sequence[int]
    holders: list[Holder]


def some_runs(rng: random.Random, pages: int, workers: int) -> Iterator[Run]:
    """Half of them one worker has, the rest more, up to all."""
    holders = [Holder(f"prefill-{number}", 0) for number in range(workers)]
    for _ in range(pages // RUN):
        many = min(workers, rng.choice([1, 1, 1, 2, 8, workers]))
        yield Run(array("Q", (rng.getrandbits(60) for _ in range(RUN))), rng.sample(holders, many))


def fill(index: KvIndex, runs: Sequence[Run]) -> int:
    """Pages told of, each as often as someone holds it."""
    for run in runs:
        for holder in run.holders:
            index.stored(holder, run.hashes)
    return sum(len(run.holders) for run in runs) * RUN


def churn(index: KvIndex, rng: random.Random, runs: list[Run], coming: Sequence[Run]) -> int:
    """Replaces runs by others; pages told of."""
    told = 0
    for run in coming:
        number = rng.randrange(len(runs))
        for holder in runs[number].holders:
            index.removed(holder, runs[number].hashes)
        for holder in run.holders:
            index.stored(holder, run.hashes)
        told += (len(runs[number].holders) + len(run.holders)) * RUN
        runs[number] = run
    return told


def timed(count: int, once: Callable[[], object]) -> str:
    """Median and p99 of `count` calls."""
    seconds: list[float] = []
    for _ in range(count):
        began = time.thread_time()
        once()
        seconds.append(time.thread_time() - began)
    seconds.sort()
    return f"median {statistics.median(seconds) * 1e3:.3f} ms, p99 {seconds[len(seconds) * 99 // 100] * 1e3:.3f} ms"


def measure_memory(pages: int, workers: int) -> None:
    """Twice: as filled, and after a third has gone for others."""
    rng = random.Random(1)
    runs, coming = list(some_runs(rng, pages, workers)), list(some_runs(rng, pages // 3, workers))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = KvIndex(pages)
    fill(index, runs)
    filled = tracemalloc.get_traced_memory()[0] - before
    churn(index, rng, runs, coming)
    churned = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    print(
        f"  memory          {filled / pages:.0f} bytes a page filled, {churned / len(index):.0f} after coming and going"
    )
    print(f"                  ({index.bytes / len(index):.0f} by its own reckoning, {index.evicted} evicted)")


def measure_times(pages: int, workers: int, prompt: int, page_size: int) -> None:
    """Lookups of prompts that are cached to their end somewhere, and events."""
    rng = random.Random(1)
    runs, coming = list(some_runs(rng, pages, workers)), list(some_runs(rng, pages // 10, workers))
    index = KvIndex(pages)
    at_first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    told = fill(index, runs)
    filling = (time.thread_time() - began) / told
    began = time.thread_time()
    told = churn(index, rng, runs, coming)
    churning = (time.thread_time() - began) / told
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - at_first) * 1024
    print(f"  events          {filling * 1e6:.2f} µs a page stored, {churning * 1e6:.2f} stored or removed in turn")
    print(f"  resident        {grown / len(index):.0f} bytes a page more than without it, events included")
    prompts = [[rng.randrange(150_000) for _ in range(prompt)] for _ in range(200)]
    for tokens in prompts:
        hashes = prefix_hashes(tokens, page_size)
        for number in range(workers):  # each worker has another part of it
            index.stored(Holder(f"prefill-{number}", 0), hashes[: len(hashes) * (number + 1) // workers])
    hashed = [prefix_hashes(tokens, page_size) for tokens in prompts]
    begin = root(page_size)
    print(f"  lookups of {prompt} tokens in pages of {page_size}")
    print(f"    hashes alone  {timed(1000, lambda: prefix_hashes(rng.choice(prompts), page_size))}")
    print(f"    lookup alone  {timed(3000, lambda: index.overlap(rng.choice(hashed)))}")
    whole = timed(3000, lambda: index.overlap(iter_prefix_hashes(rng.choice(prompts), page_size, begin)))
    print(f"    both          {whole}")
    strangers = [[rng.randrange(150_000) for _ in range(prompt)] for _ in range(200)]
    fresh = timed(3000, lambda: index.overlap(iter_prefix_hashes(rng.choice(strangers), page_size, begin)))
    print(f"    unknown       {fresh}")


def measure_worker(page_size: int) -> None:
    """The worker's mirror, with the hashes that it computes of every page."""
    pages = 65_536 // page_size
    mirror = RankMirror(page_size)
    stored = [
        BlockStored(range(turn * pages, turn * pages + pages), None, range(turn, turn + pages * page_size), page_size)
        for turn in range(4)
    ]
    began = time.thread_time()
    for event in stored:
        mirror.apply(event)
    storing = (time.thread_time() - began) / len(mirror)
    began = time.thread_time()
    for event in stored:
        mirror.apply(BlockRemoved(event.block_hashes))
    removing = (time.thread_time() - began) / (4 * pages)
    print(
        f"  worker, page {page_size:>3} {storing * 1e6:.2f} µs a page stored, {removing * 1e6:.2f} removed;"
        f" a hash for {hashed_page_size(page_size)} tokens"
    )


def main() -> None:
    """Prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--page-size", type=int, default=16)
    options = parser.parse_args()
    print(f"{options.pages:,} pages, {options.workers} workers")
    measure_times(options.pages, options.workers, options.prompt, options.page_size)
    measure_memory(options.pages, options.workers)
    for page_size in (1, 16, 64):
        measure_worker(page_size)


if __name__ == "__main__":
    main()
