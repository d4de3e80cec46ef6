import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from kvbaton.v1 import generate_pb2 as _generate_pb2
from kvbaton.v1 import health_pb2 as _health_pb2
from kvbaton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("open", "aborts", "submits", "credits")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    open: OpenSession
    aborts: _containers.RepeatedScalarFieldContainer[int]
    submits: _containers.RepeatedCompositeFieldContainer[SubmitLeg]
    credits: AskCredits
    def __init__(self, open: _Optional[_Union[OpenSession, _Mapping]] = ..., aborts: _Optional[_Iterable[int]] = ..., submits: _Optional[_Iterable[_Union[SubmitLeg, _Mapping]]] = ..., credits: _Optional[_Union[AskCredits, _Mapping]] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("incarnation", "heartbeat")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    incarnation: _worker_pb2.Incarnation
    heartbeat: _duration_pb2.Duration
    def __init__(self, incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ..., heartbeat: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SubmitLeg(_message.Message):
    __slots__ = ("leg", "request", "trace_headers", "cached_tokens")
    class TraceHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LEG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TRACE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    leg: int
    request: _generate_pb2.GenerateRequest
    trace_headers: _containers.ScalarMap[str, str]
    cached_tokens: int
    def __init__(self, leg: _Optional[int] = ..., request: _Optional[_Union[_generate_pb2.GenerateRequest, _Mapping]] = ..., trace_headers: _Optional[_Mapping[str, str]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class AskCredits(_message.Message):
    __slots__ = ("up_to", "returned")
    UP_TO_FIELD_NUMBER: _ClassVar[int]
    RETURNED_FIELD_NUMBER: _ClassVar[int]
    up_to: int
    returned: int
    def __init__(self, up_to: _Optional[int] = ..., returned: _Optional[int] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("updates", "state", "live_legs", "engine_silence", "credits_granted", "window", "free_slots", "load")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIVE_LEGS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SILENCE_FIELD_NUMBER: _ClassVar[int]
    CREDITS_GRANTED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    FREE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[LegUpdate]
    state: _worker_pb2.WorkerState
    live_legs: int
    engine_silence: _duration_pb2.Duration
    credits_granted: int
    window: int
    free_slots: int
    load: LoadReport
    def __init__(self, updates: _Optional[_Iterable[_Union[LegUpdate, _Mapping]]] = ..., state: _Optional[_Union[_worker_pb2.WorkerState, str]] = ..., live_legs: _Optional[int] = ..., engine_silence: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., credits_granted: _Optional[int] = ..., window: _Optional[int] = ..., free_slots: _Optional[int] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("through_leg", "ranks")
    THROUGH_LEG_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    through_leg: int
    ranks: _containers.RepeatedCompositeFieldContainer[_health_pb2.RankLoad]
    def __init__(self, through_leg: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[_health_pb2.RankLoad, _Mapping]]] = ...) -> None: ...

class LegUpdate(_message.Message):
    __slots__ = ("leg", "first_token", "accepted", "token_ids", "finished", "error", "logprobs")
    LEG_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    leg: int
    first_token: int
    accepted: bool
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: _generate_pb2.Finished
    error: bytes
    logprobs: _containers.RepeatedCompositeFieldContainer[_generate_pb2.TokenLogprob]
    def __init__(self, leg: _Optional[int] = ..., first_token: _Optional[int] = ..., accepted: _Optional[bool] = ..., token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[_Union[_generate_pb2.Finished, _Mapping]] = ..., error: _Optional[bytes] = ..., logprobs: _Optional[_Iterable[_Union[_generate_pb2.TokenLogprob, _Mapping]]] = ...) -> None: ...
