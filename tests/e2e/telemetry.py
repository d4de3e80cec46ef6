"""Metrics of engines and of NIXL, as Prometheus would read them."""

from __future__ import annotations

import asyncio

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def sample(url: str, name: str, **labels: str) -> float:
    """The sum of a Prometheus metric's samples with these labels."""
    async with httpx.AsyncClient(timeout=10) as http:
        text = (await http.get(url)).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def settled(url: str, name: str) -> float:
    """The metric once it has not changed for a second: NIXL publishes what earlier requests moved with a delay."""
    value = await sample(url, name)
    while True:
        await asyncio.sleep(1.0)
        previous, value = value, await sample(url, name)
        if value == previous:
            return value
