"""What differs between the SGLang versions that Baton hosts: 0.5.17 (GPU image) and 0.5.23 (CPU tests).

The only module that knows. SGLang is untyped, so its objects are `Any` here and nowhere become more than arguments of
these functions.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from services.config.yaml_file import ConfigFile
from services.telemetry.otlp import OtlpTarget
from services.worker.engines.protocol import EngineLoad

# Fields that the older version lacks; without them it behaves as Baton needs.
_OPTIONAL_FIELDS = frozenset({"disaggregation_decode_retraction_backup"})


class NativeArgumentError(ValueError):
    """SGLang's parser refuses a flag that was passed through to it; the message is the parser's."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise NativeArgumentError(message)


def server_args_class() -> Any:
    """SGLang's `ServerArgs`: a dataclass in 0.5.17, a msgspec Struct in 0.5.23."""
    return import_module("sglang.srt.server_args").ServerArgs


def why_no_spans(target: OtlpTarget) -> str:
    """Why SGLang could not export spans there; empty if it can. With `enable_trace` it would otherwise not start.

    Both versions import both exporters, whichever is used, and open gRPC without TLS.
    """
    try:
        for protocol in ("grpc", "http"):
            import_module(f"opentelemetry.exporter.otlp.proto.{protocol}.trace_exporter")
    except ImportError as error:
        return f"{error.name or error} is missing"
    if target.protocol == "grpc" and target.encrypted:
        return "SGLang sends OTLP over gRPC without TLS only"
    return ""


def engine_class() -> Any:
    """SGLang's in-process `Engine`, imported past the lazy attribute of the package."""
    return import_module("sglang.srt.entrypoints.engine").Engine


def takes_cache_salts(engine: Any) -> bool:
    """Whether requests can have a salt, and KV events tell it: not every version knows both."""
    stored = import_module("sglang.srt.disaggregation.kv_events").BlockStored
    return "cache_salt" in inspect.signature(engine.async_generate).parameters and hasattr(stored, "cache_salt")


def field_names(server_args: Any) -> frozenset[str]:
    """Names of the fields of a `ServerArgs` class of either version."""
    if dataclasses.is_dataclass(server_args):
        return frozenset(field.name for field in dataclasses.fields(server_args))
    return frozenset(server_args.__struct_fields__)


def given_fields(server_args: Any, native_args: Sequence[str]) -> dict[str, Any]:
    """The fields that `native_args` set, by SGLang's own parser. Raises NativeArgumentError."""
    parser = _parser(server_args)
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to leave unset flags out
        action.default = argparse.SUPPRESS
        action.required = False
    return vars(parser.parse_args(list(native_args)))


def file_arguments(server_args: Any, file: ConfigFile | None) -> list[str]:
    """SGLang's keys of a file as flags, by what its parser says of each: switches, lists, JSON.

    Raises NativeArgumentError naming file and key.
    """
    if file is None:
        return []
    parser = _parser(server_args)
    actions = {option: action for action in parser._actions for option in action.option_strings}  # noqa: SLF001
    arguments: list[str] = []
    for key, value in file.values.items():
        action = actions.get(f"--{key}") or actions.get(f"--{key.replace('-', '_')}")
        if action is None:
            raise NativeArgumentError(f"{file.where(key)}: neither Baton nor SGLang has such a setting")
        words = _as_arguments(action, key, value, file.where(key))
        try:
            if words:
                given_fields(server_args, words)
        except NativeArgumentError as error:
            raise NativeArgumentError(f"{file.where(key)}: {error}") from error
        arguments += words
    return arguments


def _as_arguments(action: argparse.Action, key: str, value: Any, where: str) -> list[str]:
    flag = next(option for option in action.option_strings if option[2:].replace("_", "-") == key)
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise NativeArgumentError(f"{where}: {value!r} is not true or false, and {flag} is a switch")
        negated = f"--no-{key}"
        return [flag] if value else [negated] if negated in action.option_strings else []
    if value is None:
        raise NativeArgumentError(f"{where}: there is no value")
    if isinstance(value, list):
        if action.nargs is None:
            raise NativeArgumentError(f"{where}: a list, and {flag} takes one value")
        return [flag, *map(_as_word, value)] if value else []
    # With "=": a value may begin with a dash.
    return [f"{flag}={_as_word(value)}"]


def _as_word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def build_server_args(
    server_args: Any,
    native_args: Sequence[str],
    file: ConfigFile | None = None,
    *,
    defaults: Mapping[str, Any],
    forced: Mapping[str, Any],
) -> Any:
    """A `ServerArgs`: SGLang's defaults, then ours, then the `file`, then `native_args`, then `forced`.

    Raises NativeArgumentError for flags that SGLang refuses or that contradict `forced`, and whatever 0.5.17's
    constructor raises for a combination that it refuses (0.5.23 checks combinations when the engine is built).
    """
    native_args = [*file_arguments(server_args, file), *native_args]
    given = given_fields(server_args, native_args)
    for name in sorted(forced.keys() & given.keys()):
        if given[name] != forced[name]:
            raise NativeArgumentError(
                f"--{name.replace('_', '-')} belongs to Baton and can't be passed through to SGLang "
                f"(asked for {given[name]!r}, Baton sets {forced[name]!r})"
            )
    model = [] if "model_path" in given else ["--model-path", str(forced["model_path"])]
    namespace = _parser(server_args).parse_args([*model, *native_args])
    known = field_names(server_args)
    chosen = {**{name: value for name, value in defaults.items() if name not in given}, **forced}
    for name, value in chosen.items():
        if name in known:
            setattr(namespace, name, value)
        elif name not in _OPTIONAL_FIELDS:
            raise NativeArgumentError(f"this version of SGLang has no field {name!r}")
    if "radix_eviction_policy" in given:
        # 0.5.23's own entry point records this beside the fields.
        namespace._radix_eviction_policy_explicitly_set = True  # noqa: SLF001
    return server_args.from_cli_args(namespace)


def _parser(server_args: Any) -> argparse.ArgumentParser:
    parser = _Parser(prog="sglang", add_help=False)
    server_args.add_cli_args(parser)
    return parser


def resolved(server_args: Any) -> Mapping[str, Any]:
    """The values that are in force. 0.5.17 writes them back into the fields, 0.5.23 keeps what was asked for there."""
    if hasattr(server_args, "resolved_dict"):
        return server_args.resolved_dict()
    return {name: getattr(server_args, name) for name in field_names(type(server_args))}


def allow_min_new_tokens() -> None:
    """Let `min_new_tokens` through in this process: both versions refuse it without a tokenizer of their own.

    The schedulers count it from the model's configuration (`sglang_child`).
    """
    module: Any = import_module("sglang.srt.sampling.sampling_params")
    require = module.raise_if_tokenizer_required
    if getattr(require, "allows_min_new_tokens", False):
        return

    def require_for_strings(tokenizer: Any, stop_strs: Any, stop_regex_strs: Any, min_new_tokens: int = 0) -> None:
        require(tokenizer, stop_strs, stop_regex_strs)

    require_for_strings.allows_min_new_tokens = True  # pyright: ignore[reportFunctionMemberAccess]
    module.raise_if_tokenizer_required = require_for_strings


async def handle_outputs(tokenizer_manager: Any) -> None:
    """SGLang's output loop, which never returns; started here in place of `auto_create_handle_loop`.

    SGLang's own start, the same in both versions, wraps the loop so that an exception SIGKILLs the process, and in a
    main thread it also takes SIGTERM and SIGQUIT. It does nothing once `event_loop` is set.
    """
    tokenizer_manager.event_loop = asyncio.get_running_loop()
    await tokenizer_manager.handle_loop()


def is_dispatched(tokenizer_manager: Any, engine_id: str) -> bool:
    """True once a request was handed to the scheduler.

    An abort before that is lost in both versions: 0.5.17 ends the call with an exception, 0.5.23 sends the abort ahead
    of the request and then ignores every further one.
    """
    state = tokenizer_manager.rid_to_state.get(engine_id)
    return state is not None and bool(state.dispatched)


def embedding_stream(
    tokenizer_manager: Any,
    *,
    engine_id: str,
    token_ids: list[int],
    dimensions: int | None,
    trace_headers: Mapping[str, str],
) -> AsyncIterator[Mapping[str, Any]]:
    """The one chunk of an embedding, which has `embedding` beside `meta_info`.

    This is what `Engine.async_encode` does inside, which takes only text in both versions. Neither takes a dp rank.
    """
    request_class = import_module("sglang.srt.managers.io_struct").EmbeddingReqInput
    request = request_class(
        rid=engine_id,
        input_ids=token_ids,
        dimensions=dimensions,
        external_trace_header=dict(trace_headers) or None,
    )
    return tokenizer_manager.generate_request(request, None)


def load_of(snapshot: Any) -> EngineLoad:
    """Load of one rank from SGLang's snapshot, which has the same fields in both versions.

    `num_used_tokens` leaves out what the radix cache holds without a running request (evictable pages), so it returns
    to its baseline when the last request ends.
    """
    return EngineLoad(
        dp_rank=snapshot.dp_rank,
        running_requests=snapshot.num_running_reqs,
        waiting_requests=snapshot.num_waiting_reqs,
        used_tokens=snapshot.num_used_tokens,
        total_tokens=snapshot.max_total_num_tokens,
        reported_at=snapshot.timestamp,
    )


def stop_host_side(engine: Any) -> None:
    """The part of SGLang's own `Engine.shutdown` that concerns this process and not its children."""
    watchdog = engine.tokenizer_manager._subprocess_watchdog  # noqa: SLF001
    if watchdog is not None:
        watchdog.stop()
    if engine.send_to_rpc is not None:
        engine.send_to_rpc.close(linger=0)
        engine.send_to_rpc = None


def snapshot_file(engine: Any) -> str | None:
    """The shared-memory file of the load snapshots, which SGLang leaves behind in /dev/shm."""
    reader = engine.tokenizer_manager.load_snapshot_reader
    return getattr(reader, "path", None) or getattr(reader, "_shm_path", None)
