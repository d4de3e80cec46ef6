"""When a request got where, put together from its client, the frontend's timings and what the engine probe wrote."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Name, the engine that tells it (client: who asked), and its name among the probe's times.
_TOLD = (
    ("prefill_entered", "prefill", "created"),
    ("decode_entered", "decode", "created"),
    ("prefill_received", "prefill", "scheduler_recv"),
    ("decode_received", "decode", "scheduler_recv"),
    ("decode_bootstrapped", "decode", "bootstrap_done"),
    ("metadata_sent", "decode", "decode_transfer_queue_entry"),
    ("prefill_bootstrapped", "prefill", "bootstrap_done"),
    ("prefill_started", "prefill", "forward_entry"),
    ("prefill_finished", "prefill", "prefill_finished"),
    ("transfer_seen", "decode", "wait_queue_entry"),
    ("decode_started", "decode", "forward_entry"),
)
MOMENTS = (
    *("dispatched", "prefill_entered", "decode_entered", "prefill_received", "decode_received"),
    *("decode_bootstrapped", "metadata_sent"),
    *("prefill_bootstrapped", "prefill_started", "transfer_started", "prefill_finished", "transfer_finished"),
    *("transfer_seen", "decode_started", "first_token"),
)
"""In the order in which they are shown; with a chunked prompt the transfer starts before prefill has finished."""

STAGES = (
    ("to the engine", "sent", "prefill_entered"),
    ("to its scheduler", "prefill_entered", "prefill_received"),
    ("bootstrap", "prefill_received", "prefill_started"),
    ("prefill", "prefill_started", "prefill_finished"),
    ("rest of the transfer", "prefill_finished", "transfer_finished"),
    ("decode notices", "transfer_finished", "decode_started"),
    ("to the client", "decode_started", "first_token"),
)
"""What follows what: name, from, to. Together they are the time to first token."""


def moments(
    sent: float, first_token: float, queue: float | None, lines: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Milliseconds since the client sent it, of every moment that somebody told of. `lines` are the probe's of this
    one request, `queue` the frontend's seconds until it dispatched; canaries, which have room 0, are passed over."""
    every = list(lines)
    times = {line["role"]: line["times"] for line in every if line["event"] == "request" and line["room"]}
    found = {name: times[role][field] for name, role, field in _TOLD if field in times.get(role, {})}
    if posted := [line["time"] for line in every if line["event"] == "posted"]:
        found["transfer_started"] = min(posted)
    if written := [line["time"] for line in every if line["event"] == "written"]:
        found["transfer_finished"] = max(written)
    found["first_token"] = first_token
    if queue is not None:
        found["dispatched"] = sent + queue
    return {name: (found[name] - sent) * 1e3 for name in MOMENTS if name in found}


def complete(lines: Iterable[Mapping[str, Any]]) -> bool:
    """Both engines have told of their leg."""
    return {line["role"] for line in lines if line["event"] == "request" and line["room"]} >= {"prefill", "decode"}


def middle(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each moment that every request has."""
    shared = [name for name in MOMENTS if requests and all(name in each for each in requests)]
    return {name: statistics.median(each[name] for each in requests) for name in shared}


def stages(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median milliseconds of each stage, of requests that have both of its ends."""
    found: dict[str, float] = {}
    for name, begin, end in STAGES:
        whole = [{"sent": 0.0, **each} for each in requests]
        spans = [each[end] - each[begin] for each in whole if begin in each and end in each]
        if spans:
            found[name] = statistics.median(spans)
    return found
