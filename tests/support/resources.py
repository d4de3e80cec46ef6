"""What a process holds: memory, file descriptors, and its own metrics."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


def resident_bytes(pid: int) -> int:
    """Resident set size."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def open_files(pid: int) -> int:
    """File descriptors."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def gauges(endpoint: str) -> dict[str, float]:
    """Every sample of a process's /metrics by its name, summed over its labels."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"http://{endpoint}/metrics", timeout=10.0)).raise_for_status().text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
