"""What does a worker write into etcd, and under which key?

Key `/kvbaton/v1/{namespace}/workers/{role}/{instance_id}`, value a `WorkerRecord` as protobuf JSON, so that
`etcdctl get --prefix /kvbaton` is readable. Unknown fields are ignored: an older reader survives a newer worker.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from google.protobuf import json_format

from kvbaton.v1.worker_pb2 import (
    WORKER_ROLE_AGGREGATED,
    WORKER_ROLE_DECODE,
    WORKER_ROLE_EMBEDDING,
    WORKER_ROLE_PREFILL,
    Incarnation,
    WorkerRecord,
    WorkerRole,
)

ROOT = "/kvbaton/v1"

LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_UUID = re.compile(r"[0-9a-f]{32}")

_ROLE_NAMES: dict[WorkerRole, str] = {
    WORKER_ROLE_PREFILL: "prefill",
    WORKER_ROLE_DECODE: "decode",
    WORKER_ROLE_AGGREGATED: "aggregated",
    WORKER_ROLE_EMBEDDING: "embedding",
}
_ROLES = {name: role for role, name in _ROLE_NAMES.items()}


class RecordError(ValueError):
    """A key or value that is not a worker record."""


def check_label(what: str, text: str) -> str:
    """`text` when it is a DNS label (1 to 63 of a-z, 0-9 and inner hyphens); RecordError naming `what` otherwise."""
    if not LABEL.fullmatch(text):
        raise RecordError(f"{what} {text!r} is not a DNS label (1 to 63 characters of a-z, 0-9, inner hyphens)")
    return text


def role_name(role: WorkerRole) -> str:
    """The word for a role in keys and logs: prefill, decode, aggregated or embedding."""
    try:
        return _ROLE_NAMES[role]
    except KeyError:
        raise RecordError(f"no such worker role: {role}") from None


def workers_prefix(namespace: str) -> str:
    """What the keys of every worker of a namespace start with."""
    return f"{ROOT}/{check_label('namespace', namespace)}/workers/"


@dataclass(frozen=True, slots=True)
class WorkerKey:
    """Where a worker's record lives. Outlives incarnations: a restarted worker may keep its instance id."""

    namespace: str
    role: WorkerRole
    instance_id: str

    def __post_init__(self) -> None:
        check_label("namespace", self.namespace)
        role_name(self.role)
        check_label("instance id", self.instance_id)

    @classmethod
    def of(cls, namespace: str, record: WorkerRecord) -> WorkerKey:
        return cls(namespace, record.role, record.instance_id)

    @classmethod
    def parse(cls, path: str) -> WorkerKey:
        """The inverse of `path`; RecordError for any other text."""
        parts = path.split("/")
        if len(parts) != 7 or parts[:3] != ROOT.split("/") or parts[4] != "workers" or parts[5] not in _ROLES:
            raise RecordError(f"not a worker key: {path!r}")
        return cls(namespace=parts[3], role=_ROLES[parts[5]], instance_id=parts[6])

    @property
    def path(self) -> str:
        return f"{workers_prefix(self.namespace)}{role_name(self.role)}/{self.instance_id}"

    def __str__(self) -> str:
        return self.path


def encode(record: WorkerRecord) -> bytes:
    """Protobuf JSON on one line, with every field's proto name; equal records give equal bytes."""
    _check(record)
    text = json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None, sort_keys=True)
    return text.encode()


def decode(key: WorkerKey, value: bytes) -> WorkerRecord:
    """The record that `value` holds; RecordError when it is none, or belongs under another key."""
    record = WorkerRecord()
    try:
        json_format.Parse(value.decode(), record, ignore_unknown_fields=True)
    except (UnicodeDecodeError, json_format.ParseError) as error:
        raise RecordError(f"value of {key} is not a WorkerRecord: {error}") from error
    _check(record)
    if WorkerKey.of(key.namespace, record) != key:
        raise RecordError(f"value of {key} belongs to {role_name(record.role)} worker {record.instance_id!r}")
    return record


def is_newer(incarnation: Incarnation, other: Incarnation) -> bool:
    """Whether `incarnation` started after `other`; equal creation times are ordered by uuid."""
    return (incarnation.created_us, incarnation.uuid) > (other.created_us, other.uuid)


def _check(record: WorkerRecord) -> None:
    check_label("instance id", record.instance_id)
    role_name(record.role)
    if not record.incarnation.created_us or not _UUID.fullmatch(record.incarnation.uuid):
        raise RecordError(f"worker {record.instance_id!r} has no incarnation (creation time and 32 hex digits)")
