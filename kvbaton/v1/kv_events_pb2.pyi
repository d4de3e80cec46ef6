import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from kvbaton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubscribeRequest(_message.Message):
    __slots__ = ("after_sequence", "incarnation", "hashes_only", "gather")
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HASHES_ONLY_FIELD_NUMBER: _ClassVar[int]
    GATHER_FIELD_NUMBER: _ClassVar[int]
    after_sequence: int
    incarnation: _worker_pb2.Incarnation
    hashes_only: bool
    gather: _duration_pb2.Duration
    def __init__(self, after_sequence: _Optional[int] = ..., incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ..., hashes_only: _Optional[bool] = ..., gather: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SubscribeResponse(_message.Message):
    __slots__ = ("sequence", "dp_rank", "opened", "snapshot", "stored", "removed", "cleared", "changes")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    dp_rank: int
    opened: KvOpened
    snapshot: KvSnapshotChunk
    stored: KvStored
    removed: KvRemoved
    cleared: KvCleared
    changes: KvChanges
    def __init__(self, sequence: _Optional[int] = ..., dp_rank: _Optional[int] = ..., opened: _Optional[_Union[KvOpened, _Mapping]] = ..., snapshot: _Optional[_Union[KvSnapshotChunk, _Mapping]] = ..., stored: _Optional[_Union[KvStored, _Mapping]] = ..., removed: _Optional[_Union[KvRemoved, _Mapping]] = ..., cleared: _Optional[_Union[KvCleared, _Mapping]] = ..., changes: _Optional[_Union[KvChanges, _Mapping]] = ...) -> None: ...

class KvOpened(_message.Message):
    __slots__ = ("incarnation", "resumed", "dp_size", "page_size", "hashed_page_size")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    DP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    HASHED_PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    incarnation: _worker_pb2.Incarnation
    resumed: bool
    dp_size: int
    page_size: int
    hashed_page_size: int
    def __init__(self, incarnation: _Optional[_Union[_worker_pb2.Incarnation, _Mapping]] = ..., resumed: _Optional[bool] = ..., dp_size: _Optional[int] = ..., page_size: _Optional[int] = ..., hashed_page_size: _Optional[int] = ...) -> None: ...

class KvSnapshotChunk(_message.Message):
    __slots__ = ("stored", "last")
    STORED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    stored: _containers.RepeatedCompositeFieldContainer[KvStored]
    last: bool
    def __init__(self, stored: _Optional[_Iterable[_Union[KvStored, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class KvChanges(_message.Message):
    __slots__ = ("changes",)
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[KvChange]
    def __init__(self, changes: _Optional[_Iterable[_Union[KvChange, _Mapping]]] = ...) -> None: ...

class KvChange(_message.Message):
    __slots__ = ("dp_rank", "stored", "removed", "cleared")
    DP_RANK_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    dp_rank: int
    stored: KvStored
    removed: KvRemoved
    cleared: KvCleared
    def __init__(self, dp_rank: _Optional[int] = ..., stored: _Optional[_Union[KvStored, _Mapping]] = ..., removed: _Optional[_Union[KvRemoved, _Mapping]] = ..., cleared: _Optional[_Union[KvCleared, _Mapping]] = ...) -> None: ...

class KvStored(_message.Message):
    __slots__ = ("block_hashes", "parent_hash", "token_ids", "page_size", "lora_id", "lora_name", "cache_salt", "prefix_hashes")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENT_HASH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_NAME_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[int]
    parent_hash: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    page_size: int
    lora_id: int
    lora_name: str
    cache_salt: str
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_hashes: _Optional[_Iterable[int]] = ..., parent_hash: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., page_size: _Optional[int] = ..., lora_id: _Optional[int] = ..., lora_name: _Optional[str] = ..., cache_salt: _Optional[str] = ..., prefix_hashes: _Optional[_Iterable[int]] = ...) -> None: ...

class KvRemoved(_message.Message):
    __slots__ = ("block_hashes", "prefix_hashes")
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HASHES_FIELD_NUMBER: _ClassVar[int]
    block_hashes: _containers.RepeatedScalarFieldContainer[int]
    prefix_hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, block_hashes: _Optional[_Iterable[int]] = ..., prefix_hashes: _Optional[_Iterable[int]] = ...) -> None: ...

class KvCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
