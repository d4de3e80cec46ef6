"""A worker's record: who it is, where it is, what its engine turned out to be, and whom it can pair with."""

from __future__ import annotations

import hashlib
import re
import time
import uuid

from kvbaton.v1 import model_pb2, worker_pb2
from services.config.worker import WorkerConfig
from services.models.tokenizer_files import TokenizerFile, digest
from services.modes import Mode, mode_of
from services.registry.compat import compat_hash
from services.requests import Role
from services.transport import join_host_port
from services.version import own_version
from services.worker.engines.protocol import EngineInfo

# A DNS label has 63 characters; role and port take up to 17 of them.
_LONGEST_ADDRESS = 45


def new_incarnation() -> worker_pb2.Incarnation:
    """The incarnation of this process."""
    return worker_pb2.Incarnation(created_us=time.time_ns() // 1000, uuid=uuid.uuid4().hex)


def default_instance_id(role: Role, host: str, port: int) -> str:
    """Stable over restarts at the same address, so that a restarted worker replaces its own record at once.

    A DNS label: what an address has beside letters and digits becomes "-", and a long one is shortened by its hash.
    """
    address = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-")
    if len(address) > _LONGEST_ADDRESS:
        address = f"{address[: _LONGEST_ADDRESS - 9]}-{hashlib.sha256(host.encode()).hexdigest()[:8]}"
    return f"{role}-{address}-{port}"


def build_record(
    config: WorkerConfig,
    *,
    instance_id: str,
    incarnation: worker_pb2.Incarnation,
    advertise_host: str,
    bootstrap_host: str,
    grpc_port: int,
    system_port: int,
    model: worker_pb2.ModelIdentity,
    info: EngineInfo,
    has_tokenizer: bool,
) -> worker_pb2.WorkerRecord:
    """The record, state SERVING, with its compat hash."""
    mode = mode_of(config.role)
    record = worker_pb2.WorkerRecord(
        instance_id=instance_id,
        role=config.role.to_proto(),
        state=worker_pb2.WORKER_STATE_SERVING,
        incarnation=incarnation,
        grpc_endpoint=join_host_port(advertise_host, grpc_port),
        system_endpoint=join_host_port(advertise_host, system_port),
        model=model,
        runtime=_runtime(mode, info, has_tokenizer),
        needs=[role.to_proto() for role in mode.needs],
        allow_version_skew=config.allow_version_skew,
    )
    if mode.has_bootstrap:
        record.bootstrap.host = bootstrap_host
        record.bootstrap.port = config.disaggregation_bootstrap_port
    record.compat_hash = compat_hash(record)
    return record


def build_model_info(
    record: worker_pb2.WorkerRecord, info: EngineInfo, files: tuple[TokenizerFile, ...]
) -> model_pb2.ModelInfo:
    """What ModelService answers."""
    return model_pb2.ModelInfo(
        model=record.model,
        runtime=record.runtime,
        eos_token_ids=info.eos_token_ids,
        bos_token_id=info.bos_token_id,
        tokenizer_sha256=digest(files),
        rpcs=[mode_of(Role.from_proto(record.role)).rpc],
    )


def _context_length(mode: Mode, info: EngineInfo) -> int:
    """Where the answer is generated, a request can't outgrow the KV pool either; prefill holds the prompt only."""
    return min(info.context_length, info.max_total_tokens) if mode.answers else info.context_length


def _runtime(mode: Mode, info: EngineInfo, has_tokenizer: bool) -> worker_pb2.RuntimeConfig:
    return worker_pb2.RuntimeConfig(
        page_size=info.page_size,
        total_kv_pages=info.total_kv_pages,
        max_total_tokens=info.max_total_tokens,
        max_running_requests=info.max_running_requests,
        max_batched_tokens=info.max_batched_tokens,
        max_prompt_tokens=info.max_prompt_tokens,
        context_length=_context_length(mode, info),
        vocab_size=info.vocab_size,
        tp_size=info.tp_size,
        pp_size=info.pp_size,
        dp_size=info.dp_size,
        kv_cache_dtype=info.kv_cache_dtype,
        kv_bytes_per_token=info.kv_bytes_per_token,
        transfer_backend=info.transfer_backend,
        tool_call_parser=info.tool_call_parser,
        reasoning_parser=info.reasoning_parser,
        seeded_sampling=info.seeded_sampling,
        grammar_backend=info.grammar_backend,
        cache_salts=info.cache_salts,
        has_tokenizer=has_tokenizer,
        embedding=None if info.embedding is None else info.embedding.to_proto(),
        versions=worker_pb2.Versions(
            kvbaton=own_version(),
            engine=info.engine,
            engine_version=info.engine_version,
            nixl=info.nixl_version,
            torch=info.torch_version,
        ),
    )
