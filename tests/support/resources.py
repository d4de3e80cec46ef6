"""What a process holds: memory, file descriptors, and its own metrics."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import Processes

# glibc gives a thread an arena of its own, and keeps freed memory at an arena's end: both differ from run to run. One
# arena that is trimmed at once makes resident memory follow what is in use. It hides no leak: what the program still
# holds can't be trimmed.
ONE_TRIMMED_ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
_LOOKS = 10


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process holds at rest."""

    resident: int
    files: int
    tasks: int


async def footprints(processes: Processes, names: Iterable[str] | None = None) -> dict[str, Footprint]:
    """Of every process; the smallest of some looks, since heartbeats and the looks themselves open connections."""
    found: dict[str, Footprint] = {}
    for name in names or processes.metrics_endpoints:
        endpoint = processes.metrics_endpoints[name]
        looks = [await _look(processes.pid(name), endpoint) for _ in range(_LOOKS)]
        found[name] = Footprint(
            resident=min(look.resident for look in looks),
            files=min(look.files for look in looks),
            tasks=min(look.tasks for look in looks),
        )
    return found


async def settled(
    processes: Processes, before: Mapping[str, Footprint], *, fluctuation: int = 0, within: float = 60.0
) -> dict[str, Footprint]:
    """The footprints, once they are what they were: what waits for a broken peer gives up within a minute."""
    until = time.monotonic() + within
    while True:
        found = await footprints(processes, before)
        if time.monotonic() > until or all(_is_flat(before[name], found[name], fluctuation) for name in before):
            return found


def check_flat(
    before: Mapping[str, Footprint], after: Mapping[str, Footprint], *, growth: float, fluctuation: int = 0
) -> None:
    """Tasks and files are no more than before, but for the `fluctuation`, and memory has not grown by a larger part."""
    for name in before:
        grown = after[name].resident / before[name].resident - 1
        print(f"{name}: {before[name]} -> {after[name]}, memory {grown:+.2%}")
    for name in before:
        assert _is_flat(before[name], after[name], fluctuation), name
        assert after[name].resident <= before[name].resident * (1 + growth), name


def _is_flat(before: Footprint, after: Footprint, fluctuation: int) -> bool:
    return after.tasks <= before.tasks + fluctuation and after.files <= before.files + fluctuation


async def _look(pid: int, endpoint: str) -> Footprint:
    tasks = int((await gauges(endpoint))["kvbaton_event_loop_tasks"])
    await asyncio.sleep(0.1)  # the connection of the line above is closed
    return Footprint(resident_bytes(pid), open_files(pid), tasks)


def resident_bytes(pid: int) -> int:
    """Resident set size."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def open_files(pid: int) -> int:
    """File descriptors."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def gauges(endpoint: str) -> dict[str, float]:
    """Every sample of a process's /metrics by its name, summed over its labels; 0 of a metric without any yet."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://{endpoint}/metrics", timeout=10.0)).raise_for_status().text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        if not family.samples:
            sums[family.name + "_total" * (family.type == "counter")] = 0.0
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
