"""The one error type of Baton, on both sides of the wire.

A failed call is a gRPC status whose details hold google.rpc.ErrorInfo (domain "kvbaton") and, where a retry helps,
google.rpc.RetryInfo. Servers raise `RequestError`; clients get the same object back from `RequestError.from_rpc_error`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvbaton"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# Characters of a message on the wire: trailers are limited to a few KiB and hold it twice.
MAX_MESSAGE = 1024


class Reason(StrEnum):
    """Machine-readable cause, `ErrorInfo.reason`."""

    INVALID_FIELD = "INVALID_FIELD"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    NO_TOKENIZER = "NO_TOKENIZER"
    API_KEY_MISSING = "API_KEY_MISSING"
    INVALID_API_KEY = "INVALID_API_KEY"
    MODEL_NOT_ALLOWED = "MODEL_NOT_ALLOWED"
    RATE_LIMIT_EXCEEDED = "RATE_LIMIT_EXCEEDED"
    CONCURRENCY_LIMIT_EXCEEDED = "CONCURRENCY_LIMIT_EXCEEDED"
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    # gRPC says so itself, and has no details: `RequestError.from_rpc_error` knows it by its words.
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    QUEUE_FULL = "QUEUE_FULL"
    NO_CREDIT = "NO_CREDIT"
    CLIENT_TOO_SLOW = "CLIENT_TOO_SLOW"
    NO_PREFILL_WORKER = "NO_PREFILL_WORKER"
    NO_DECODE_WORKER = "NO_DECODE_WORKER"
    NO_WORKER = "NO_WORKER"
    WORKER_NOT_FOUND = "WORKER_NOT_FOUND"
    NO_COMPATIBLE_PAIR = "NO_COMPATIBLE_PAIR"
    WRONG_ROLE = "WRONG_ROLE"
    PEER_NOT_REGISTERED = "PEER_NOT_REGISTERED"
    PEER_REPLACED = "PEER_REPLACED"
    PEER_INCOMPATIBLE = "PEER_INCOMPATIBLE"
    REGISTRY_UNAVAILABLE = "REGISTRY_UNAVAILABLE"
    PEER_UNREACHABLE = "PEER_UNREACHABLE"
    PAIR_UNPROVEN = "PAIR_UNPROVEN"
    WORKER_UNREACHABLE = "WORKER_UNREACHABLE"
    WORKER_SILENT = "WORKER_SILENT"
    WORKER_NOT_SERVING = "WORKER_NOT_SERVING"
    WORKER_DRAINING = "WORKER_DRAINING"
    ENGINE_DEAD = "ENGINE_DEAD"
    ENGINE_ABORTED = "ENGINE_ABORTED"
    ENGINE_REFUSED = "ENGINE_REFUSED"
    NO_KV_EVENTS = "NO_KV_EVENTS"
    SLOW_SUBSCRIBER = "SLOW_SUBSCRIBER"
    REQUESTS_RUNNING = "REQUESTS_RUNNING"
    LEG_ENDED_EARLY = "LEG_ENDED_EARLY"
    FIRST_TOKEN_MISMATCH = "FIRST_TOKEN_MISMATCH"
    NOT_MIGRATABLE = "NOT_MIGRATABLE"
    DEADLINE_QUEUE = "DEADLINE_QUEUE"
    DEADLINE_PREFILL = "DEADLINE_PREFILL"
    DEADLINE_TRANSFER = "DEADLINE_TRANSFER"
    DEADLINE_TOKEN_GAP = "DEADLINE_TOKEN_GAP"
    DEADLINE_TOTAL = "DEADLINE_TOTAL"
    CANCELLED = "CANCELLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"
    # The status came without our ErrorInfo: from gRPC itself, or from a foreign server.
    UNTYPED = "UNTYPED"


@dataclass(slots=True, eq=False)
class RequestError(Exception):
    """One typed failure of one request.

    `leg` is "prefill", "decode" or "aggregated"; `worker` an instance id; `retry_after` seconds. Empty strings, room 0
    and None mean "does not apply".
    """

    code: grpc.StatusCode
    reason: Reason
    message: str
    field: str = ""
    leg: str = ""
    worker: str = ""
    room: int = 0
    request_id: str = ""
    retry_after: float | None = None

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message}"

    def metadata(self) -> dict[str, str]:
        """The entries of `ErrorInfo.metadata`, without the empty ones."""
        entries = {
            "field": self.field,
            "leg": self.leg,
            "worker": self.worker,
            "room": str(self.room) if self.room else "",
            "request_id": self.request_id,
        }
        return {key: value for key, value in entries.items() if value}

    def with_context(self, *, leg: str = "", worker: str = "", room: int = 0, request_id: str = "") -> RequestError:
        """The same error with what a caller further out knows; what is already known stays, except the request id."""
        return RequestError(
            code=self.code,
            reason=self.reason,
            message=self.message,
            field=self.field,
            leg=self.leg or leg,
            worker=self.worker or worker,
            room=self.room or room,
            request_id=request_id or self.request_id,
            retry_after=self.retry_after,
        )

    def to_status(self) -> grpc.Status:
        """For `context.abort_with_status`."""
        return rpc_status.to_status(self.to_rpc_status())

    def to_rpc_status(self) -> status_pb2.Status:
        """As a message, for a stream that carries more than one request."""
        # Built once per failed request, never on the token path.
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + "..."
        status = status_pb2.Status(code=self.code.value[0], message=message)
        info = error_details_pb2.ErrorInfo(reason=self.reason.value, domain=DOMAIN, metadata=self.metadata())
        packed = any_pb2.Any()
        packed.Pack(info)
        status.details.append(packed)
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_after * 1e9))
            packed = any_pb2.Any()
            packed.Pack(retry)
            status.details.append(packed)
        return status

    @classmethod
    def from_rpc_error(cls, error: grpc.RpcError) -> RequestError:
        """Reads the typed error out of a failed call; `Reason.UNTYPED` when the status carries no ErrorInfo of ours."""
        code, message, details = _status_of(error)
        typed = cls._from_details(code, message, details)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not details and "message larger than max" in message:
            typed.reason = Reason.MESSAGE_TOO_LARGE
        return typed

    @classmethod
    def from_rpc_status(cls, status: status_pb2.Status) -> RequestError:
        """The inverse of `to_rpc_status`."""
        return cls._from_details(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, status.details)

    @classmethod
    def _from_details(cls, code: grpc.StatusCode, message: str, details: Iterable[any_pb2.Any]) -> RequestError:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        reason, retry_after = Reason.UNTYPED, None
        metadata: dict[str, str] = {}
        for detail in details:
            if detail.Unpack(info) and info.domain == DOMAIN:
                reason, metadata = _reason(info.reason), dict(info.metadata)
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        room = metadata.get("room", "")
        return cls(
            code=code,
            reason=reason,
            message=message,
            field=metadata.get("field", ""),
            leg=metadata.get("leg", ""),
            worker=metadata.get("worker", ""),
            room=int(room) if room.isdigit() else 0,
            request_id=metadata.get("request_id", ""),
            retry_after=retry_after,
        )


def _status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, list[any_pb2.Any]]:
    code = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    message = (error.details() if hasattr(error, "details") else str(error)) or code.name
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            status = status_pb2.Status.FromString(value)
            return code, message, list(status.details)
    return code, message, []


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        return Reason.UNTYPED


def invalid(field: str, message: str) -> RequestError:
    """INVALID_ARGUMENT that names the field, dotted as in the proto (for example `sampling.top_p`)."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD, f"{field}: {message}", field=field)


def cancelled(how: str = "cancelled") -> RequestError:
    """The error of a request that its caller ended."""
    return RequestError(grpc.StatusCode.CANCELLED, Reason.CANCELLED, f"the request was {how}")
