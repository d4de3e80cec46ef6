from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
    WORKER_ROLE_AGGREGATED: _ClassVar[WorkerRole]
    WORKER_ROLE_EMBEDDING: _ClassVar[WorkerRole]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_WARMING: _ClassVar[WorkerState]
    WORKER_STATE_SERVING: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
    WORKER_STATE_FAILED: _ClassVar[WorkerState]
    WORKER_STATE_UNHEALTHY: _ClassVar[WorkerState]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole
WORKER_ROLE_AGGREGATED: WorkerRole
WORKER_ROLE_EMBEDDING: WorkerRole
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_WARMING: WorkerState
WORKER_STATE_SERVING: WorkerState
WORKER_STATE_DRAINING: WorkerState
WORKER_STATE_FAILED: WorkerState
WORKER_STATE_UNHEALTHY: WorkerState

class WorkerRecord(_message.Message):
    __slots__ = ("instance_id", "role", "state", "incarnation", "grpc_endpoint", "system_endpoint", "model", "runtime", "bootstrap", "compat_hash", "needs", "allow_version_skew")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GRPC_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    COMPAT_HASH_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_VERSION_SKEW_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: WorkerRole
    state: WorkerState
    incarnation: Incarnation
    grpc_endpoint: str
    system_endpoint: str
    model: ModelIdentity
    runtime: RuntimeConfig
    bootstrap: BootstrapEndpoint
    compat_hash: str
    needs: _containers.RepeatedScalarFieldContainer[WorkerRole]
    allow_version_skew: bool
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., incarnation: _Optional[_Union[Incarnation, _Mapping]] = ..., grpc_endpoint: _Optional[str] = ..., system_endpoint: _Optional[str] = ..., model: _Optional[_Union[ModelIdentity, _Mapping]] = ..., runtime: _Optional[_Union[RuntimeConfig, _Mapping]] = ..., bootstrap: _Optional[_Union[BootstrapEndpoint, _Mapping]] = ..., compat_hash: _Optional[str] = ..., needs: _Optional[_Iterable[_Union[WorkerRole, str]]] = ..., allow_version_skew: _Optional[bool] = ...) -> None: ...

class Incarnation(_message.Message):
    __slots__ = ("created_us", "uuid")
    CREATED_US_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    created_us: int
    uuid: str
    def __init__(self, created_us: _Optional[int] = ..., uuid: _Optional[str] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("name", "path", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    revision: str
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., revision: _Optional[str] = ...) -> None: ...

class RuntimeConfig(_message.Message):
    __slots__ = ("page_size", "total_kv_pages", "max_total_tokens", "max_running_requests", "max_batched_tokens", "max_prompt_tokens", "context_length", "vocab_size", "tp_size", "pp_size", "dp_size", "kv_cache_dtype", "kv_bytes_per_token", "transfer_backend", "versions", "tool_call_parser", "reasoning_parser", "seeded_sampling", "has_tokenizer", "embedding", "grammar_backend", "cache_salts")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DP_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BACKEND_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_PARSER_FIELD_NUMBER: _ClassVar[int]
    REASONING_PARSER_FIELD_NUMBER: _ClassVar[int]
    SEEDED_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_BACKEND_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALTS_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    total_kv_pages: int
    max_total_tokens: int
    max_running_requests: int
    max_batched_tokens: int
    max_prompt_tokens: int
    context_length: int
    vocab_size: int
    tp_size: int
    pp_size: int
    dp_size: int
    kv_cache_dtype: str
    kv_bytes_per_token: int
    transfer_backend: str
    versions: Versions
    tool_call_parser: str
    reasoning_parser: str
    seeded_sampling: bool
    has_tokenizer: bool
    embedding: EmbeddingConfig
    grammar_backend: str
    cache_salts: bool
    def __init__(self, page_size: _Optional[int] = ..., total_kv_pages: _Optional[int] = ..., max_total_tokens: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., context_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_size: _Optional[int] = ..., dp_size: _Optional[int] = ..., kv_cache_dtype: _Optional[str] = ..., kv_bytes_per_token: _Optional[int] = ..., transfer_backend: _Optional[str] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ..., tool_call_parser: _Optional[str] = ..., reasoning_parser: _Optional[str] = ..., seeded_sampling: _Optional[bool] = ..., has_tokenizer: _Optional[bool] = ..., embedding: _Optional[_Union[EmbeddingConfig, _Mapping]] = ..., grammar_backend: _Optional[str] = ..., cache_salts: _Optional[bool] = ...) -> None: ...

class EmbeddingConfig(_message.Message):
    __slots__ = ("dimension", "matryoshka", "matryoshka_dimensions")
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    MATRYOSHKA_FIELD_NUMBER: _ClassVar[int]
    MATRYOSHKA_DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    dimension: int
    matryoshka: bool
    matryoshka_dimensions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dimension: _Optional[int] = ..., matryoshka: _Optional[bool] = ..., matryoshka_dimensions: _Optional[_Iterable[int]] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("kvbaton", "engine", "engine_version", "nixl", "torch")
    KVBATON_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    TORCH_FIELD_NUMBER: _ClassVar[int]
    kvbaton: str
    engine: str
    engine_version: str
    nixl: str
    torch: str
    def __init__(self, kvbaton: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., nixl: _Optional[str] = ..., torch: _Optional[str] = ...) -> None: ...

class BootstrapEndpoint(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...
