"""Every metric that Baton exports. Seconds and tokens are in the names.

A gauge's `multiprocess_mode` says what stands for several processes of one frontend: the sum of those that live, or the
lowest or highest of their values.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from services.telemetry.gaps import GapHistogram
from services.telemetry.shared import RemovableGauge, refresh, shared

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Choosing workers takes microseconds, tokenizing and handing over milliseconds, waiting and generating minutes.
_PHASE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *_SECONDS)
_TOKEN_GAP_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 30),
)

# Worker: legs, by role and outcome: finished, aborted, refused (by the engine), dead (the engine), INTERNAL.
WORKER_LEGS = Counter("kvbaton_worker_legs", "Legs that a worker has ended.", ["role", "outcome"])
WORKER_LIVE_LEGS = Gauge(
    "kvbaton_worker_live_legs", "Legs that a worker has accepted and not ended.", ["role"], multiprocess_mode="livesum"
)
WORKER_FREE_SLOTS = Gauge(
    "kvbaton_worker_free_slots",
    "Legs that a decode worker would take beside those it has and those that it has promised to frontends.",
    multiprocess_mode="livesum",
)
WORKER_STATE = Gauge(
    "kvbaton_worker_state", "1 for the state that the worker is in.", ["role", "state"], multiprocess_mode="livesum"
)
# Canaries are no legs: they stand in no other metric. Outcome: answered, failed.
CANARIES = Counter("kvbaton_worker_canaries", "Probes of an engine without traffic.", ["role", "outcome"])
# Worker: the mirror of its engine's prefix caches. Kind: BlockStored, BlockRemoved, AllBlocksCleared.
KV_CHANGES = Counter("kvbaton_worker_kv_changes", "Changes told to KV event subscribers.", ["role", "kind"])
KV_MIRRORED_PAGES = Gauge(
    "kvbaton_worker_kv_mirrored_pages", "Pages known to be reusable.", ["role", "dp_rank"], multiprocess_mode="livesum"
)
KV_SUBSCRIBERS = Gauge(
    "kvbaton_worker_kv_subscribers", "Open KV event subscriptions.", ["role"], multiprocess_mode="livesum"
)
KV_GAPS = Counter("kvbaton_worker_kv_gaps", "Gaps in an engine's KV events: filled, or lost.", ["outcome"])

# Frontend: requests, by model and outcome (finished, or the gRPC status name of the error).
REQUESTS = Counter("kvbaton_requests", "Requests that the frontend has ended.", ["model", "outcome"])
LIVE_REQUESTS = Gauge("kvbaton_live_requests", "Requests accepted and not ended.", multiprocess_mode="livesum")
QUEUED_REQUESTS = Gauge(
    "kvbaton_queued_requests",
    "Requests that wait for a decode worker's credit, retries among them.",
    ["model"],
    multiprocess_mode="livesum",
)
PROMPT_TOKENS = Counter("kvbaton_prompt_tokens", "Prompt tokens of finished requests.", ["model"])
COMPLETION_TOKENS = Counter("kvbaton_completion_tokens", "Tokens generated for finished requests.", ["model"])
# Of finished requests, and of each of their choices. Tokenization and routing are parts of the queue phase.
PHASE_SECONDS = Histogram(
    "kvbaton_phase_seconds",
    "Seconds in each phase: tokenization, queue, routing, prefill, transfer, decode.",
    ["model", "phase"],
    buckets=_PHASE_SECONDS,
)
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "kvbaton_time_to_first_token_seconds", "Received until the first token.", ["model"], buckets=_SECONDS
)
# Of every request that streams, while it streams. The mean is what others call time per output token.
INTER_TOKEN_LATENCY_SECONDS = GapHistogram(
    "kvbaton_inter_token_latency_seconds",
    "From one token to the next; tokens that came together share the time since those before them.",
    _TOKEN_GAP_SECONDS,
)
REQUEST_DURATION_SECONDS = Histogram(
    "kvbaton_request_duration_seconds",
    "Received until workers have let go of the request.",
    ["model", "outcome"],
    buckets=_SECONDS,
)
# Of answers whose worker failed behind the first token. Outcome: continued, failed (also: nobody took it), inexact (it
# could not go on as it would have), limit (--max-migrations).
MIGRATIONS = Counter("kvbaton_migrations", "Times an answer went on elsewhere, or could not.", ["model", "outcome"])
# Call: Tokenize, Detokenize.
TEXT_REQUESTS = Counter("kvbaton_text_requests", "Calls of TextService, over HTTP too.", ["call", "outcome"])
ROUTABLE_WORKERS = Gauge(
    "kvbaton_routable_workers", "Workers that requests can be sent to.", ["role"], multiprocess_mode="livemin"
)
# State: closed, open, half_open. A worker with an open breaker that is not ejected is its pool's last resort.
BREAKERS = Gauge(
    "kvbaton_breakers", "Workers by the state of their breaker.", ["role", "state"], multiprocess_mode="livemax"
)
BREAKER_OPENINGS = Counter("kvbaton_breaker_openings", "Times a worker's breaker has opened.", ["role", "worker"])
EJECTED_WORKERS = Gauge(
    "kvbaton_ejected_workers", "Workers that their breaker keeps requests from.", ["role"], multiprocess_mode="livemax"
)
REGISTRY_AGE_SECONDS = Gauge(
    "kvbaton_registry_age_seconds",
    "Seconds since etcd last proved that all workers are known; NaN before it has.",
    multiprocess_mode="livemax",
)
# Frontend: the index of what its workers' KV caches hold. Why: first, missed (away for too long), doubt.
KV_INDEX_PAGES = Gauge("kvbaton_kv_index_pages", "Different pages in the KV index.", multiprocess_mode="livemax")
KV_INDEX_EVICTED = Counter("kvbaton_kv_index_evicted_pages", "Pages that left the full KV index for others.")
KV_INDEX_EXACT = RemovableGauge(
    "kvbaton_kv_index_exact",
    "1 while all that a worker's KV events tell is known.",
    ["role", "worker"],
    multiprocess_mode="livemin",
)
KV_INDEX_SNAPSHOTS = Counter("kvbaton_kv_index_snapshots", "Times a worker's pages were learnt anew.", ["why"])

# Frontend: embedding requests, by model and outcome as above.
EMBEDDINGS = Counter("kvbaton_embeddings", "Embedding requests that the frontend has ended.", ["model", "outcome"])
LIVE_EMBEDDINGS = Gauge(
    "kvbaton_live_embeddings", "Embedding requests accepted and not ended.", multiprocess_mode="livesum"
)
EMBEDDED_INPUTS = Counter("kvbaton_embedded_inputs", "Inputs of finished embedding requests.", ["model"])
EMBEDDED_TOKENS = Counter("kvbaton_embedded_tokens", "Tokens of finished embedding requests.", ["model"])
EMBEDDING_SECONDS = Histogram(
    "kvbaton_embedding_seconds", "Received until all vectors were there.", ["model"], buckets=_SECONDS
)

# Frontend: requests that the gate of --api-keys kept out. Key: the name of its entry, empty for one that has none.
ACCESS_REFUSALS = Counter("kvbaton_refused_by_access", "Requests that their API key did not allow.", ["key", "reason"])

# Frontend with --processes: 1 for each of them, and one more each time that another had to take its place.
PROCESS_STARTS = Counter("kvbaton_process_starts", "Times a process of this frontend was started.", ["process"])
EVENT_LOOP_TASKS = Gauge(
    "kvbaton_event_loop_tasks",
    "Tasks of the process's event loop; flat when nothing leaks.",
    multiprocess_mode="livesum",
)


def watch_registry(age: Callable[[], float | None]) -> None:
    """From now on `kvbaton_registry_age_seconds` is this age in seconds, when it is read."""

    def seconds() -> float:
        known = age()
        if known is None:
            # Of several processes the oldest view counts, and NaN compares with nothing.
            return -math.inf if shared() else math.nan
        return known

    if shared():
        refresh(REGISTRY_AGE_SECONDS, seconds, asyncio.get_running_loop())
    else:
        REGISTRY_AGE_SECONDS.set_function(seconds)


def watch_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """From now on `kvbaton_event_loop_tasks` counts this loop's tasks, when it is read."""
    if shared():
        refresh(EVENT_LOOP_TASKS, lambda: len(asyncio.all_tasks(loop)), loop)
    else:
        EVENT_LOOP_TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
