"""What a worker record promises: its key, its readable value, and which incarnation is newer."""

import json

import pytest

from kvbaton.v1.worker_pb2 import (
    WORKER_ROLE_AGGREGATED,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    WORKER_ROLE_UNSPECIFIED,
    WORKER_STATE_SERVING,
    Incarnation,
    WorkerRecord,
    WorkerRole,
)
from services.registry.records import RecordError, WorkerKey, decode, encode, is_newer, workers_prefix

KEY = WorkerKey("default", WORKER_ROLE_PREFILL, "prefill-0")


def a_record(instance_id: str = "prefill-0", role: WorkerRole = WORKER_ROLE_PREFILL) -> WorkerRecord:
    return WorkerRecord(
        instance_id=instance_id,
        role=role,
        state=WORKER_STATE_SERVING,
        incarnation=Incarnation(created_us=1_700_000_000_000_000, uuid="ab" * 16),
        grpc_endpoint="10.0.0.1:50061",
    )


@pytest.mark.parametrize(
    ("role", "word"),
    [(WORKER_ROLE_PREFILL, "prefill"), (WORKER_ROLE_DECODE, "decode"), (WORKER_ROLE_AGGREGATED, "aggregated")],
)
def test_key_names_namespace_role_and_instance(role: WorkerRole, word: str) -> None:
    key = WorkerKey("team-a", role, "w1")
    assert key.path == f"/kvbaton/v1/team-a/workers/{word}/w1"
    assert WorkerKey.parse(key.path) == key
    assert key.path.startswith(workers_prefix("team-a"))


def test_no_namespace_is_a_prefix_of_another() -> None:
    assert not WorkerKey("team-ab", WORKER_ROLE_DECODE, "w").path.startswith(workers_prefix("team-a"))


@pytest.mark.parametrize("bad", ["", "A", "a_b", "-a", "a-", "a/b", "a" * 64, "ä", "a\n", "a."])
def test_namespace_and_instance_id_are_dns_labels(bad: str) -> None:
    with pytest.raises(RecordError, match="namespace"):
        WorkerKey(bad, WORKER_ROLE_DECODE, "w")
    with pytest.raises(RecordError, match="instance id"):
        WorkerKey("default", WORKER_ROLE_DECODE, bad)
    with pytest.raises(RecordError, match="instance id"):
        encode(a_record(bad))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/kvbaton/v1/default/workers/prefill",
        "/kvbaton/v1/default/workers/router/w",
        "/kvbaton/v1/default/workers/prefill/w/x",
        "/kvbaton/v2/default/workers/prefill/w",
        "kvbaton/v1/default/workers/prefill/w",
        "/kvbaton/v1/default/requests/prefill/w",
    ],
)
def test_other_keys_are_refused(path: str) -> None:
    with pytest.raises(RecordError):
        WorkerKey.parse(path)


def test_a_role_is_required() -> None:
    with pytest.raises(RecordError, match="role"):
        encode(a_record(role=WORKER_ROLE_UNSPECIFIED))


def test_value_is_json_with_proto_names_and_reads_back_equal() -> None:
    value = encode(a_record())
    assert json.loads(value)["grpc_endpoint"] == "10.0.0.1:50061"
    assert json.loads(value)["state"] == "WORKER_STATE_SERVING"
    assert b"\n" not in value
    assert decode(KEY, value) == a_record()


def test_unknown_fields_and_enum_values_of_a_newer_worker_are_ignored() -> None:
    fields = json.loads(encode(a_record())) | {"colour": "red", "state": "WORKER_STATE_ASLEEP"}
    fields["runtime"] = {"page_size": 16, "quantum": True}
    record = decode(KEY, json.dumps(fields).encode())
    assert record.grpc_endpoint == "10.0.0.1:50061"
    assert record.runtime.page_size == 16
    assert record.state == 0


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}", b'{"grpc_endpoint": 3}', b"[" * 20_000]
)
def test_a_corrupt_value_is_a_typed_error(value: bytes) -> None:
    with pytest.raises(RecordError):
        decode(KEY, value)


def test_a_value_under_another_workers_key_is_refused() -> None:
    with pytest.raises(RecordError, match="belongs to decode worker 'decode-0'"):
        decode(KEY, encode(a_record("decode-0", WORKER_ROLE_DECODE)))


def test_a_record_needs_an_incarnation() -> None:
    record = a_record()
    record.incarnation.uuid = "not-hex"
    with pytest.raises(RecordError, match="incarnation"):
        encode(record)


def test_the_newer_incarnation_started_later_and_uuids_break_ties() -> None:
    first = Incarnation(created_us=1, uuid="f" * 32)
    second = Incarnation(created_us=2, uuid="0" * 32)
    assert is_newer(second, first)
    assert not is_newer(first, second)
    assert not is_newer(first, first)
    assert is_newer(Incarnation(created_us=1, uuid="f" * 32), Incarnation(created_us=1, uuid="e" * 32))
