"""How long a worker took until it was registered, and how much of that was its engine, from its own log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from benchmarks.gpu.launch import Running


def startups(running: Running) -> list[dict[str, Any]]:
    """Of every worker of a cluster."""
    rows: list[dict[str, Any]] = []
    for name in running.cluster.workers:
        found = startup(running.log(name).read_text(errors="replace").splitlines())
        if found is not None:
            rows.append({"system": name, "ready_s": running.ready, **found})
    return rows


def startup(lines: Iterable[str]) -> dict[str, float] | None:
    """Seconds: `loading_s` for SGLang's imports and the engine, `registered_s` from the process's first state to its
    record in etcd, `beyond_s` the difference. None where it never got there."""
    loading, began = 0.0, None
    for line in _events(lines):
        now = datetime.fromisoformat(line["timestamp"]).timestamp()
        if line["event"] == "worker state":
            began = now - line["seconds"] if began is None else began
            loading += line["seconds"] if line["previous"] == "loading" else 0.0
        elif line["event"] == "registered" and began is not None:
            return {"loading_s": loading, "registered_s": now - began, "beyond_s": now - began - loading}
    return None


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Baton's own lines, a JSON object each; SGLang's among them are none."""
    for line in lines:
        if line.startswith("{") and ('"worker state"' in line or '"registered"' in line):
            yield json.loads(line)
