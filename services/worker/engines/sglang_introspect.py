"""What an SGLang engine turned out to be: its sizes, its model's special tokens, the bytes of its KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from services.embedding_requests import EmbeddingSize
from services.worker.engines.protocol import EngineInfo
from services.worker.engines.sglang_compat import resolved, takes_cache_salts

_NIXL_PACKAGES = ("nixl-cu13", "nixl-cu12", "nixl")


def engine_info(
    engine: Any,
    *,
    scheduler_info: Mapping[str, Any],
    max_running_requests: int,
    seeds_always: bool,
    tells_kv_events: bool,
    has_grammars: bool,
) -> EngineInfo:
    """Describe a started `sglang.Engine`. `max_running_requests` is per data-parallel rank.

    `has_grammars`: its schedulers have built a grammar backend, of whatever kind.
    """
    args = resolved(engine.server_args)
    model: Any = engine.tokenizer_manager.model_config
    kv_dtype = kv_cache_dtype(str(args["kv_cache_dtype"]), str(model.dtype))
    bos = getattr(model.hf_text_config, "bos_token_id", None)
    return EngineInfo(
        engine="sglang",
        engine_version=_version_of("sglang"),
        torch_version=_version_of("torch"),
        nixl_version=next((found for name in _NIXL_PACKAGES if (found := _version_of(name))), ""),
        page_size=int(args["page_size"]),
        max_total_tokens=int(scheduler_info["max_total_num_tokens"]),
        max_running_requests=max_running_requests,
        max_batched_tokens=max_batched_tokens(args["chunked_prefill_size"], args["max_prefill_tokens"]),
        max_prompt_tokens=int(scheduler_info["max_req_input_len"]),
        context_length=int(model.context_len),
        vocab_size=int(model.vocab_size),
        tp_size=int(args["tp_size"]),
        pp_size=int(args["pp_size"]),
        dp_size=int(args["dp_size"]),
        kv_cache_dtype=kv_dtype,
        kv_bytes_per_token=kv_bytes_per_token(model, args, kv_dtype),
        transfer_backend="" if args["disaggregation_mode"] == "null" else str(args["disaggregation_transfer_backend"]),
        eos_token_ids=tuple(sorted(model.hf_eos_token_id or ())),
        bos_token_id=bos if isinstance(bos, int) else None,
        seeded_sampling=seeds_always or bool(args["enable_deterministic_inference"]),
        tool_call_parser=str(args["tool_call_parser"] or ""),
        reasoning_parser=str(args["reasoning_parser"] or ""),
        grammar_backend=str(args["grammar_backend"]) if has_grammars else "",
        cache_salts=takes_cache_salts(engine),
        has_kv_events=tells_kv_events and not args["disable_radix_cache"],
        embedding=embedding_size(model) if args["is_embedding"] else None,
    )


def embedding_size(model: Any) -> EmbeddingSize:
    """What SGLang's pooler gives, and what its check of `dimensions` lets through."""
    named = tuple(sorted(int(each) for each in getattr(model, "matryoshka_dimensions", None) or ()))
    return EmbeddingSize(
        dimension=int(model.hidden_size),
        matryoshka=bool(getattr(model, "is_matryoshka", False)),
        matryoshka_dimensions=named,
    )


def kv_cache_dtype(asked: str, model_dtype: str) -> str:
    """The type of the KV cache: the model's own for "auto", without torch's prefix."""
    return (model_dtype if asked == "auto" else asked).removeprefix("torch.")


def max_batched_tokens(chunked_prefill_size: int | None, max_prefill_tokens: int) -> int:
    """Tokens of one prefill batch: SGLang stops at whichever is reached first; a chunk size of -1 is none."""
    if chunked_prefill_size is None or chunked_prefill_size <= 0:
        return max_prefill_tokens
    return min(chunked_prefill_size, max_prefill_tokens)


def kv_bytes_per_token(model: Any, args: Mapping[str, Any], kv_dtype: str) -> int:
    """KV cache of one token over all layers of one tp rank, in bytes; 0 where it isn't one number per token."""
    size = _bytes_of(kv_dtype)
    if size == 0 or getattr(model, "is_hybrid_swa", False) or int(args["pp_size"]) > 1:
        return 0
    layers = int(model.num_attention_layers)
    arch = getattr(getattr(model, "attention_arch", None), "name", "MHA")
    if arch == "MLA":
        return layers * (int(model.kv_lora_rank) + int(model.qk_rope_head_dim)) * size
    if arch != "MHA":
        return 0
    # Data-parallel attention splits the tp ranks among the replicas.
    ranks = int(args["tp_size"])
    if args.get("enable_dp_attention"):
        ranks = max(1, ranks // int(args["dp_size"]))
    heads = int(model.get_num_kv_heads(ranks))
    return layers * heads * (int(model.head_dim) + int(model.v_head_dim)) * size


def _bytes_of(dtype: str) -> int:
    torch: Any = import_module("torch")
    named = {"fp8_e5m2": "float8_e5m2", "fp8_e4m3": "float8_e4m3fn", "bf16": "bfloat16"}.get(dtype, dtype)
    found: Any = getattr(torch, named, None)
    return int(getattr(found, "itemsize", 0))


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
