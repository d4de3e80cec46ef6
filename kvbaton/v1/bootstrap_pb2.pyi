from kvbaton.v1 import worker_pb2 as _worker_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetEndpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEndpointResponse(_message.Message):
    __slots__ = ("endpoint", "dp_size", "incarnation")
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    DP_SIZE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    endpoint: _worker_pb2.BootstrapEndpoint
    dp_size: int
    incarnation: _worker_pb2.Incarnation
    def __init__(self, endpoint: _Optional[_Union[_worker_pb2.BootstrapEndpoint, _Mapping]] = ..., dp_size: _Optional[int] = ..., incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ...) -> None: ...

class CheckPeerRequest(_message.Message):
    __slots__ = ("instance_id", "incarnation")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: _worker_pb2.Incarnation
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ...) -> None: ...

class CheckPeerResponse(_message.Message):
    __slots__ = ("endpoint",)
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    endpoint: _worker_pb2.BootstrapEndpoint
    def __init__(self, endpoint: _Optional[_Union[_worker_pb2.BootstrapEndpoint, _Mapping]] = ...) -> None: ...
