"""Which workers can hand a KV cache to each other, and what keeps two of them apart?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from kvbaton.v1 import worker_pb2

_ANY_VERSION = "any (--allow-version-skew)"
_DESCRIBED_PAIRS = 3


def compat_hash(record: worker_pb2.WorkerRecord) -> str:
    """Equal for workers that can hand a KV cache to each other."""
    return hashlib.sha256(json.dumps(compat_parts(record), sort_keys=True).encode()).hexdigest()[:32]


def compat_parts(record: worker_pb2.WorkerRecord) -> dict[str, str | int]:
    """What two workers must have in common: all that shapes a page, or speaks the hand-shake.

    NIXL agrees on its wire format within one major.minor version. The layout of a page is its bytes per token and the
    sizes that cut it up; the one layout that SGLang names beyond them (DeepSeek V4's) it compares by itself.
    """
    runtime = record.runtime
    skew = record.allow_version_skew
    return {
        "model": record.model.name,
        "revision": record.model.revision,
        "page_size": runtime.page_size,
        "kv_cache_dtype": runtime.kv_cache_dtype,
        "kv_bytes_per_token": runtime.kv_bytes_per_token,
        "tp_size": runtime.tp_size,
        "pp_size": runtime.pp_size,
        "transfer_backend": runtime.transfer_backend,
        "engine": runtime.versions.engine,
        "engine_version": _ANY_VERSION if skew else runtime.versions.engine_version,
        "nixl": _ANY_VERSION if skew else ".".join(runtime.versions.nixl.split(".")[:2]),
    }


def describe_difference(decode: worker_pb2.WorkerRecord, prefill: worker_pb2.WorkerRecord) -> str:
    """Which of the fields behind the compat hash differ, with both values."""
    ours, theirs = compat_parts(decode), compat_parts(prefill)
    different = [f"{name}: decode {ours[name]}, prefill {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    return "; ".join(different) or "the compat hashes differ"


def describe_differences(
    decodes: Iterable[worker_pb2.WorkerRecord], prefills: Iterable[worker_pb2.WorkerRecord]
) -> str:
    """What keeps the pairs apart that can't be made of these workers; each difference once, and not many of them."""
    prefill_records = list(prefills)
    apart = [
        describe_difference(decode, prefill)
        for decode in decodes
        for prefill in prefill_records
        if decode.compat_hash != prefill.compat_hash
    ]
    found = list(dict.fromkeys(apart))
    more = f" (and {len(found) - _DESCRIBED_PAIRS} other differences)" if len(found) > _DESCRIBED_PAIRS else ""
    return " | ".join(found[:_DESCRIBED_PAIRS]) + more
