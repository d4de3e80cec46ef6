import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from kvbaton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BreakerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BREAKER_STATE_UNSPECIFIED: _ClassVar[BreakerState]
    BREAKER_STATE_CLOSED: _ClassVar[BreakerState]
    BREAKER_STATE_OPEN: _ClassVar[BreakerState]
    BREAKER_STATE_HALF_OPEN: _ClassVar[BreakerState]
BREAKER_STATE_UNSPECIFIED: BreakerState
BREAKER_STATE_CLOSED: BreakerState
BREAKER_STATE_OPEN: BreakerState
BREAKER_STATE_HALF_OPEN: BreakerState

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("state", "detail", "role", "instance_id", "incarnation", "model", "versions", "load", "started_at", "workers", "registry")
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    state: _worker_pb2.WorkerState
    detail: str
    role: _worker_pb2.WorkerRole
    instance_id: str
    incarnation: _worker_pb2.Incarnation
    model: _worker_pb2.ModelIdentity
    versions: _worker_pb2.Versions
    load: Load
    started_at: _timestamp_pb2.Timestamp
    workers: _containers.RepeatedCompositeFieldContainer[KnownWorker]
    registry: RegistryView
    def __init__(self, state: _Optional[_Union[_worker_pb2.WorkerState, str]] = ..., detail: _Optional[str] = ..., role: _Optional[_Union[_worker_pb2.WorkerRole, str]] = ..., instance_id: _Optional[str] = ..., incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ..., model: _Optional[_Union[_worker_pb2.ModelIdentity, _Mapping]] = ..., versions: _Optional[_Union[_worker_pb2.Versions, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[KnownWorker, _Mapping]]] = ..., registry: _Optional[_Union[RegistryView, _Mapping]] = ...) -> None: ...

class RegistryView(_message.Message):
    __slots__ = ("age", "problem", "problem_for")
    AGE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FOR_FIELD_NUMBER: _ClassVar[int]
    age: _duration_pb2.Duration
    problem: str
    problem_for: _duration_pb2.Duration
    def __init__(self, age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., problem: _Optional[str] = ..., problem_for: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("live_requests", "running_requests", "waiting_requests", "used_tokens", "total_tokens", "ranks")
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    live_requests: int
    running_requests: int
    waiting_requests: int
    used_tokens: int
    total_tokens: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankLoad]
    def __init__(self, live_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., used_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ...) -> None: ...

class RankLoad(_message.Message):
    __slots__ = ("dp_rank", "running_requests", "waiting_requests", "used_tokens", "total_tokens", "prefill_tokens")
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    running_requests: int
    waiting_requests: int
    used_tokens: int
    total_tokens: int
    prefill_tokens: int
    def __init__(self, dp_rank: _Optional[int] = ..., running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., used_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ...) -> None: ...

class KnownWorker(_message.Message):
    __slots__ = ("record", "routable", "reason", "registered", "live_requests", "ranks", "breaker")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ROUTABLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BREAKER_FIELD_NUMBER: _ClassVar[int]
    record: _worker_pb2.WorkerRecord
    routable: bool
    reason: str
    registered: bool
    live_requests: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankLoad]
    breaker: BreakerState
    def __init__(self, record: _Optional[_Union[_worker_pb2.WorkerRecord, _Mapping]] = ..., routable: _Optional[bool] = ..., reason: _Optional[str] = ..., registered: _Optional[bool] = ..., live_requests: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankLoad, _Mapping]]] = ..., breaker: _Optional[_Union[BreakerState, str]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("dp_rank",)
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    def __init__(self, dp_rank: _Optional[int] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("elapsed",)
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    elapsed: _duration_pb2.Duration
    def __init__(self, elapsed: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
