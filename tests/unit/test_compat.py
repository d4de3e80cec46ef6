"""Which workers can pair, and what is said of those that can't."""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.v1 import worker_pb2
from services.registry.compat import compat_hash, describe_difference, describe_differences


def record(*, skew: bool = False, **changes: Any) -> worker_pb2.WorkerRecord:
    """A worker's record; `changes` by the name of the field, wherever it stands."""
    made = worker_pb2.WorkerRecord(
        model=worker_pb2.ModelIdentity(name="m", path="/a", revision="r1"),
        runtime=worker_pb2.RuntimeConfig(
            page_size=16,
            kv_cache_dtype="bfloat16",
            kv_bytes_per_token=1024,
            tp_size=1,
            pp_size=1,
            transfer_backend="nixl",
            max_running_requests=8,
            versions=worker_pb2.Versions(engine="sglang", engine_version="0.5.23", nixl="1.5.1"),
        ),
        allow_version_skew=skew,
    )
    for name, value in changes.items():
        parts = (made.runtime.versions, made.runtime, made.model)
        owner = next(part for part in parts if name in part.DESCRIPTOR.fields_by_name)
        setattr(owner, name, value)
    made.compat_hash = compat_hash(made)
    return made


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 32},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_bytes_per_token": 512},
        {"tp_size": 2},
        {"revision": "r2"},
        {"engine_version": "0.5.17"},
        {"nixl": "1.6.0"},
    ],
)
def test_what_keeps_two_workers_apart_is_named_with_both_values(change: dict[str, Any]) -> None:
    decode, prefill = record(), record(**change)
    assert decode.compat_hash != prefill.compat_hash
    (name,) = change
    said = describe_difference(decode, prefill)
    assert said.startswith(f"{name}: decode ")
    assert "; " not in said, "nothing else differs"


@pytest.mark.parametrize("change", [{"nixl": "1.5.9"}, {"path": "/b"}, {"max_running_requests": 64}])
def test_what_keeps_nobody_apart(change: dict[str, Any]) -> None:
    assert record().compat_hash == record(**change).compat_hash


def test_version_skew_is_allowed_by_both_or_not_at_all() -> None:
    old, new = record(skew=True, engine_version="0.5.17", nixl="1.4.0"), record(skew=True)
    assert old.compat_hash == new.compat_hash
    assert old.compat_hash != record(skew=True, page_size=32).compat_hash, "versions only"
    one_sided = describe_difference(old, record())
    assert "engine_version: decode any (--allow-version-skew), prefill 0.5.23" in one_sided


def test_several_workers_are_described_once_per_difference() -> None:
    decodes = [record(), record()]
    assert describe_differences(decodes, [record(page_size=32)]) == "page_size: decode 16, prefill 32"
    many = [record(page_size=size) for size in (1, 2, 4, 8, 32)]
    assert describe_differences(decodes, many).endswith("(and 2 other differences)")
    assert describe_differences(decodes, [record()]) == ""
