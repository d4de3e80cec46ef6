"""The parts of the SGLang engine that need no SGLang: arguments, environment, chunks, aborts, sizes, death."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from services.config.yaml_file import ConfigFile
from services.embedding_requests import EmbeddingSize
from services.requests import Grammar, GrammarKind, TokenLogprob, TopLogprob
from services.telemetry.otlp import OtlpTarget
from services.transport import PortTakenError
from services.worker.engines import sglang_death
from services.worker.engines.protocol import (
    EngineDelta,
    EngineRefusedError,
    EngineRequest,
    Finish,
    Role,
    Room,
    Sampling,
)
from services.worker.engines.sglang import SglangEngine, spans_target
from services.worker.engines.sglang_compat import (
    NativeArgumentError,
    build_server_args,
    field_names,
    file_arguments,
    is_dispatched,
    load_of,
    resolved,
    why_no_spans,
)
from services.worker.engines.sglang_death import DeathWatch, EngineLaunchError, on_sigquit
from services.worker.engines.sglang_grammar import TOO_SLOW
from services.worker.engines.sglang_introspect import (
    embedding_size,
    kv_bytes_per_token,
    kv_cache_dtype,
    max_batched_tokens,
)
from services.worker.engines.sglang_launch import (
    CPU_STANDINS,
    SglangOptions,
    TmpDir,
    default_fields,
    environment,
    forced_fields,
    prepare_import_path,
    remove_stale_tmp_dirs,
)
from services.worker.engines.sglang_logging import WithoutNoise, logging_config
from services.worker.engines.sglang_stream import LiveRequest, call_arguments, check_request, sampling_params

ENGINE_ID = "0" * 32


def options(role: Role = Role.AGGREGATED, **values: Any) -> SglangOptions:
    return SglangOptions(role=role, model_path="org/model", served_model_name="model", **values)


def request(**values: Any) -> EngineRequest:
    plain = EngineRequest(engine_id=ENGINE_ID, token_ids=[1, 2, 3], sampling=Sampling(8))
    return dataclasses.replace(plain, **values)


# Arguments


@dataclass
class OlderServerArgs:
    """Shaped like 0.5.17's: a dataclass whose constructor resolves in place."""

    model_path: str = ""
    disaggregation_mode: str = "null"
    page_size: int | None = None
    log_level: str = "info"
    load_balance_method: str = "auto"
    mem_fraction_static: float | None = None
    custom_sigquit_handler: Any = None
    config_updates: list[str] = field(default_factory=list)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model-path", "--model", type=str, required=True)
        parser.add_argument("--disaggregation-mode", choices=["null", "prefill", "decode"], default="null")
        parser.add_argument("--page-size", type=int, default=None)
        parser.add_argument("--log-level", default="info")
        parser.add_argument("--load-balance-method", default="auto")
        parser.add_argument("--mem-fraction-static", type=float, default=None)

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> OlderServerArgs:
        return cls(**{name: getattr(namespace, name) for name in field_names(cls) if hasattr(namespace, name)})


class NewerServerArgs(OlderServerArgs):
    """Shaped like 0.5.23's: fields stay as they were asked for, what is in force is elsewhere."""

    def resolved_dict(self) -> dict[str, Any]:
        return {"page_size": self.page_size or 64}


def build(*native: str, defaults: dict[str, Any] | None = None, forced: dict[str, Any] | None = None) -> Any:
    return build_server_args(
        OlderServerArgs, native, defaults=defaults or {}, forced={"model_path": "m", **(forced or {})}
    )


class TestServerArgs:
    def test_passed_through_flags_beat_our_defaults_and_sglangs(self) -> None:
        args = build("--page-size", "32", defaults={"page_size": 16, "log_level": "warning"})
        assert (args.page_size, args.log_level, args.model_path) == (32, "warning", "m")

    def test_a_flag_that_equals_sglangs_default_still_counts_as_given(self) -> None:
        assert build("--log-level", "info", defaults={"log_level": "warning"}).log_level == "info"

    def test_what_baton_decides_is_refused_by_name(self) -> None:
        with pytest.raises(NativeArgumentError, match="--disaggregation-mode belongs to Baton"):
            build("--disaggregation-mode", "prefill", forced={"disaggregation_mode": "decode"})

    def test_repeating_what_baton_decides_is_no_contradiction(self) -> None:
        args = build("--disaggregation-mode=decode", "--model", "m", forced={"disaggregation_mode": "decode"})
        assert args.disaggregation_mode == "decode"

    def test_unknown_flags_are_an_error_and_no_exit(self) -> None:
        with pytest.raises(NativeArgumentError, match="--no-such-flag"):
            build("--no-such-flag")

    def test_fields_without_a_flag_reach_the_constructor(self) -> None:
        assert build(forced={"custom_sigquit_handler": on_sigquit}).custom_sigquit_handler is on_sigquit

    def test_a_field_that_only_the_newer_version_has_is_left_out(self) -> None:
        build(defaults={"disaggregation_decode_retraction_backup": "cpu_tensor"})

    def test_a_field_that_no_version_has_is_an_error(self) -> None:
        with pytest.raises(NativeArgumentError, match="no_such_field"):
            build(defaults={"no_such_field": 1})

    def test_values_in_force_of_both_versions(self) -> None:
        assert resolved(OlderServerArgs(page_size=16))["page_size"] == 16
        assert resolved(NewerServerArgs())["page_size"] == 64


class SwitchingServerArgs(OlderServerArgs):
    """With every kind of flag that SGLang's parser has."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        OlderServerArgs.add_cli_args(parser)
        parser.add_argument("--enable-metrics", action="store_true")
        parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=None)
        parser.add_argument("--buckets", type=float, nargs="+")
        parser.add_argument("--extra-config", type=str)


class TestFile:
    """SGLang's keys of a --config file."""

    @staticmethod
    def arguments(**values: Any) -> list[str]:
        file = ConfigFile(Path("f.yaml"), "", {key.replace("_", "-"): value for key, value in values.items()})
        return file_arguments(SwitchingServerArgs, file)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"enable_metrics": True}, ["--enable-metrics"]),
            ({"enable_metrics": False}, []),
            ({"overlap": True}, ["--overlap"]),
            ({"overlap": False}, ["--no-overlap"]),
            ({"buckets": [1, 2.5]}, ["--buckets", "1", "2.5"]),
            ({"buckets": []}, []),
            ({"page_size": 32}, ["--page-size=32"]),
            ({"page_size": "32"}, ["--page-size=32"]),
            ({"extra_config": {"a": [1]}}, ['--extra-config={"a": [1]}']),
            ({"extra_config": "-x"}, ["--extra-config=-x"]),
        ],
    )
    def test_each_kind_of_value(self, values: dict[str, Any], expected: list[str]) -> None:
        assert self.arguments(**values) == expected

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"no_such": 1}, "f.yaml: no-such: neither Baton nor SGLang"),
            ({"enable_metrics": "yes"}, "f.yaml: enable-metrics: 'yes' is not true or false"),
            ({"page_size": "many"}, "f.yaml: page-size: .*invalid int"),
            ({"page_size": [1, 2]}, "f.yaml: page-size: a list"),
            ({"page_size": None}, "f.yaml: page-size: there is no value"),
            ({"buckets": ["x"]}, "f.yaml: buckets: .*invalid float"),
        ],
    )
    def test_mistakes_name_file_and_key(self, values: dict[str, Any], named: str) -> None:
        with pytest.raises(NativeArgumentError, match=named):
            self.arguments(**values)

    def test_flags_win_over_the_file_and_the_file_over_our_defaults(self) -> None:
        file = ConfigFile(Path("f.yaml"), "", {"page-size": 32, "log-level": "debug"})
        args = build_server_args(
            OlderServerArgs, ["--page-size", "64"], file, defaults={"log_level": "warning"}, forced={"model_path": "m"}
        )
        assert (args.page_size, args.log_level) == (64, "debug")


class TestFields:
    def test_prefill_alone_has_a_bootstrap_address(self) -> None:
        fields = forced_fields(options(Role.PREFILL, bootstrap_host="10.0.0.1", bootstrap_port=12345))
        assert (fields["host"], fields["disaggregation_bootstrap_port"]) == ("10.0.0.1", 12345)
        assert "host" not in forced_fields(options(Role.DECODE))

    def test_a_prefill_leg_runs_on_the_rank_of_its_room_and_another_method_is_refused(self) -> None:
        method = forced_fields(options(Role.PREFILL))["load_balance_method"]
        assert method == "follow_bootstrap_room"
        with pytest.raises(NativeArgumentError, match="--load-balance-method belongs to Baton"):
            build("--load-balance-method", "round_robin", forced={"load_balance_method": method})
        assert build(forced={"load_balance_method": method}).load_balance_method == method
        for role in (Role.DECODE, Role.AGGREGATED, Role.EMBEDDING):
            assert "load_balance_method" not in forced_fields(options(role))

    def test_roles(self) -> None:
        assert forced_fields(options(Role.DECODE))["disaggregation_mode"] == "decode"
        assert forced_fields(options(Role.DECODE))["disaggregation_transfer_backend"] == "nixl"
        assert forced_fields(options())["disaggregation_mode"] == "null"

    def test_an_embedding_engine_pools_over_whole_inputs(self) -> None:
        embedding = options(Role.EMBEDDING)
        assert forced_fields(embedding)["is_embedding"] is True
        assert forced_fields(embedding)["disaggregation_mode"] == "null"
        chosen = default_fields(embedding)
        assert (chosen["disable_radix_cache"], chosen["chunked_prefill_size"]) == (True, -1)
        assert not embedding.tells_kv_events
        assert "is_embedding" not in forced_fields(options())
        assert "disable_radix_cache" not in default_fields(options())

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, EmbeddingSize(576)),
            ({"is_matryoshka": False, "matryoshka_dimensions": None}, EmbeddingSize(576)),
            ({"is_matryoshka": True}, EmbeddingSize(576, matryoshka=True)),
            ({"is_matryoshka": [256, 64], "matryoshka_dimensions": [256, 64]}, EmbeddingSize(576, True, (64, 256))),
        ],
    )
    def test_vectors_may_be_cut_where_the_models_configuration_says_so(
        self, config: dict[str, Any], expected: EmbeddingSize
    ) -> None:
        assert embedding_size(SimpleNamespace(hidden_size=576, **config)) == expected

    def test_a_page_size_of_ours_is_forced_and_none_is_sglangs_choice(self) -> None:
        assert forced_fields(options(fields={"page_size": 64}))["page_size"] == 64
        assert "page_size" not in forced_fields(options())

    def test_an_ipv6_address_is_bound_without_brackets(self) -> None:
        assert forced_fields(options(Role.PREFILL, bootstrap_host="[::1]"))["host"] == "::1"
        assert environment(options(transfer_host="[fd00::1]"), Path("/t"), {})["SGLANG_HOST_IP"] == "fd00::1"

    def test_sglangs_own_grammar_backend_is_used_everywhere(self) -> None:
        for device in ("cpu", "cuda"):
            assert "grammar_backend" not in default_fields(options(device=device))

    def test_log_probabilities_are_of_one_distribution_at_every_temperature(self) -> None:
        inherited = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"}
        assert environment(options(), Path("/t"), inherited)["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"

    def test_on_cuda_nothing_but_the_log_level_is_a_default_of_ours(self) -> None:
        assert default_fields(options(Role.DECODE)) == {"log_level": "warning"}

    def test_on_a_cpu_both_roles_go_without_the_overlap_scheduler(self) -> None:
        assert default_fields(options(Role.PREFILL, device="cpu"))["disable_overlap_schedule"] is True
        assert "disable_overlap_schedule" not in default_fields(options(device="cpu"))


class TestSpans:
    GRPC = OtlpTarget("grpc", "http://collector:4317")
    HTTP = OtlpTarget("http/protobuf", "https://collector:4318/v1/traces")

    def test_sglang_exports_none_unless_told(self) -> None:
        assert "enable_trace" not in default_fields(options())
        assert not {name for name in environment(options(), Path("/t"), {}) if name.startswith("OTEL_")}

    @pytest.mark.parametrize(("target", "endpoint"), [(GRPC, "collector:4317"), (HTTP, HTTP.endpoint)])
    def test_they_go_where_batons_go(self, target: OtlpTarget, endpoint: str) -> None:
        fields = default_fields(options(spans=target))
        assert (fields["enable_trace"], fields["otlp_traces_endpoint"]) == (True, endpoint)
        variables = environment(options(spans=target), Path("/t"), {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
        assert variables["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == target.protocol

    def test_tokens_are_no_spans_unless_the_operator_wants_them(self) -> None:
        assert environment(options(spans=self.GRPC), Path("/t"), {})["SGLANG_TRACE_LEVEL"] == "2"
        assert "SGLANG_TRACE_LEVEL" not in environment(
            options(spans=self.GRPC), Path("/t"), {"SGLANG_TRACE_LEVEL": "3"}
        )

    def test_what_sglang_could_not_do_is_found_before_it_fails_to_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert why_no_spans(self.GRPC) == why_no_spans(self.HTTP) == ""
        assert "without TLS" in why_no_spans(OtlpTarget("grpc", "https://collector:4317"))
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        assert "opentelemetry.exporter.otlp.proto.http.trace_exporter is missing" in why_no_spans(self.GRPC)

    @pytest.mark.parametrize("variable", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
    def test_the_variables_that_switch_export_off_hold_for_sglang_too(self, variable: dict[str, str]) -> None:
        assert spans_target({}) == OtlpTarget("grpc", "http://localhost:4317")
        assert spans_target(variable) is None

    def test_sglang_gets_the_context_of_the_leg_and_none_without_one(self) -> None:
        headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        assert call_arguments(request(trace_headers=headers), seeded=False)["external_trace_header"] == headers
        assert call_arguments(request(), seeded=False)["external_trace_header"] is None

    def test_the_salt_is_handed_on_where_there_is_one(self) -> None:
        assert call_arguments(request(cache_salt="tenant"), seeded=False)["cache_salt"] == "tenant"
        assert "cache_salt" not in call_arguments(request(), seeded=False)


class TestBootstrapPort:
    """After the launch, which takes minutes in which somebody else may have taken the port."""

    def test_a_server_of_our_own_is_fine(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as own:
            engine = SglangEngine(options(Role.PREFILL, bootstrap_port=own.getsockname()[1]))
            engine._require_own_bootstrap_server()

    def test_no_server_of_our_own_is_a_lost_port(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.worker.engines.sglang._BOOTSTRAP_LISTEN_TIMEOUT_S", 0.1)
        engine = SglangEngine(options(Role.PREFILL, bootstrap_port=1))
        with pytest.raises(PortTakenError, match=r"127\.0\.0\.1:1: .*--disaggregation-bootstrap-port"):
            engine._require_own_bootstrap_server()


class TestEnvironment:
    def test_time_outs_are_sglangs_backstop(self) -> None:
        values = environment(options(backstop_timeout_s=42.9), Path("/t"), {})
        assert values["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "42"
        assert values["SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"] == "42"

    def test_the_operator_may_set_heartbeats_but_not_the_temporary_folder(self) -> None:
        values = environment(options(), Path("/t"), {"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "9", "TMPDIR": "/x"})
        assert "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL" not in values
        assert values["TMPDIR"] == "/t"

    def test_compiled_kernels_outlive_the_temporary_folder(self) -> None:
        assert environment(options(), Path("/t"), {"TMPDIR": "/keep"})["TORCHINDUCTOR_CACHE_DIR"].startswith("/keep/")

    def test_the_hub_is_off_for_a_local_model_alone(self, tmp_path: Path) -> None:
        local = SglangOptions(role=Role.DECODE, model_path=str(tmp_path), served_model_name="m")
        assert environment(local, Path("/t"), {})["HF_HUB_OFFLINE"] == "1"
        assert "HF_HUB_OFFLINE" not in environment(options(), Path("/t"), {})

    def test_children_of_a_cpu_engine_find_the_stand_ins_first(self) -> None:
        values = environment(options(device="cpu"), Path("/t"), {"PYTHONPATH": "/a"})
        assert values["PYTHONPATH"] == f"{CPU_STANDINS}{os.pathsep}/a"
        assert values["SGLANG_USE_CPU_ENGINE"] == "1"

    def test_on_cuda_there_is_no_trace_of_the_cpu_engine(self) -> None:
        values = environment(options(), Path("/t"), {})
        assert not {"PYTHONPATH", "SGLANG_USE_CPU_ENGINE", "UCX_MEM_MMAP_HOOK_MODE"} & values.keys()


class TestStandIns:
    def test_the_folder_is_data_and_not_a_package(self) -> None:
        assert not (CPU_STANDINS / "__init__.py").exists()
        assert {each.name for each in CPU_STANDINS.iterdir() if each.is_dir()} >= {"sgl_kernel", "torchvision"}

    def test_a_cpu_engine_gets_them_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        prepare_import_path("cpu")
        prepare_import_path("cpu")
        assert sys.path.count(str(CPU_STANDINS)) == 1

    def test_cuda_refuses_to_start_where_they_would_be_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [str(CPU_STANDINS), *sys.path])
        for name in ("sgl_kernel", "torchvision"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(RuntimeError, match="stand-ins for machines without a GPU"):
            prepare_import_path("cuda")

    def test_cuda_refuses_to_start_where_they_are_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("sgl_kernel")
        module.__file__ = str(CPU_STANDINS / "sgl_kernel" / "__init__.py")
        monkeypatch.setitem(sys.modules, "sgl_kernel", module)
        with pytest.raises(RuntimeError, match="sgl_kernel"):
            prepare_import_path("cuda")

    def test_cuda_starts_without_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "path", [each for each in sys.path if Path(each) != CPU_STANDINS])
        monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        prepare_import_path("cuda")


class TestTmpDir:
    def test_it_is_deleted_with_its_content(self, tmp_path: Path) -> None:
        folder = TmpDir(tmp_path)
        (folder.path / "socket").touch()
        folder.remove()
        assert list(tmp_path.iterdir()) == []

    def test_a_root_that_is_too_long_for_sockets_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="too long for socket paths"):
            TmpDir(tmp_path / ("x" * 90))

    def test_folders_of_the_dead_are_removed_and_those_of_the_living_kept(self, tmp_path: Path) -> None:
        dead, living, fresh = tmp_path / "kvb-aaaaaaaa", TmpDir(tmp_path), tmp_path / "kvb-bbbbbbbb"
        dead.mkdir()
        fresh.mkdir()
        hour_ago = time.time() - 3600
        os.utime(dead, (hour_ago, hour_ago))
        os.utime(living.path, (hour_ago, hour_ago))
        remove_stale_tmp_dirs(tmp_path)
        assert {each.name for each in tmp_path.iterdir()} == {living.path.name, fresh.name}
        living.remove()


class TestLogging:
    def test_the_hosts_root_logger_stays_as_it_is(self) -> None:
        assert "root" not in logging_config("warning")
        assert logging_config("warning")["loggers"]["sglang"]["level"] == "WARNING"

    def test_lines_of_every_healthy_start_are_dropped(self) -> None:
        def passes(message: str) -> bool:
            return WithoutNoise().filter(logging_record(message))

        assert not passes("Using custom SIGQUIT handler: <function>")
        assert passes("Scheduler hit an exception")


def logging_record(message: str) -> Any:
    return SimpleNamespace(getMessage=lambda: message)


# Requests


class TestSampling:
    def test_every_parameter_is_sent(self) -> None:
        params = sampling_params(Sampling(7, temperature=0.0, stop_token_ids=(3,)), seeded=False)
        assert params["max_new_tokens"] == 7
        assert params["stop_token_ids"] == [3]
        assert "sampling_seed" not in params

    def test_a_seeded_engine_gets_a_fresh_seed_where_the_client_asks_for_none(self) -> None:
        seeds = {sampling_params(Sampling(7), seeded=True)["sampling_seed"] for _ in range(8)}
        assert len(seeds) == 8
        assert sampling_params(Sampling(7, seed=-5), seeded=True)["sampling_seed"] == -5

    def test_a_minimum_is_left_out_where_nothing_can_stop_earlier(self) -> None:
        def minimum(sampling: Sampling) -> int:
            return sampling_params(sampling, seeded=False)["min_new_tokens"]

        assert minimum(Sampling(8, min_new_tokens=8, ignore_eos=True)) == 0
        assert minimum(Sampling(8, min_new_tokens=8)) == 8
        assert minimum(Sampling(8, min_new_tokens=8, ignore_eos=True, stop_token_ids=(1,))) == 8

    def test_biases_and_grammars_have_sglangs_names(self) -> None:
        assert not {"logit_bias", "json_schema", "regex"} & sampling_params(Sampling(8), seeded=False).keys()
        biased = sampling_params(Sampling(8, logit_bias=((3, -100.0), (7, 1.5))), seeded=False)
        assert biased["logit_bias"] == {"3": -100.0, "7": 1.5}
        for kind in GrammarKind:
            assert sampling_params(Sampling(8, grammar=Grammar(kind, "g")), seeded=False)[kind.value] == "g"

    def test_every_field_of_the_sampling_reaches_sglang(self) -> None:
        """Compared by effect, so that a new field that is forgotten fails here."""
        plain = Sampling(8)
        other: dict[str, Any] = {
            "max_new_tokens": 9,
            "min_new_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.5,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.5,
            "seed": 5,
            "ignore_eos": True,
            "stop_token_ids": (5,),
            "logit_bias": ((5, 1.0),),
            "grammar": Grammar(GrammarKind.REGEX, "a"),
        }
        assert other.keys() == {each.name for each in dataclasses.fields(Sampling)}
        sent = {name: sampling_params(dataclasses.replace(plain, **{name: other[name]}), seeded=True) for name in other}
        seedless = sampling_params(dataclasses.replace(plain, seed=1), seeded=True)
        assert [name for name, params in sent.items() if params == seedless] == []


class TestCallArguments:
    def test_log_probabilities_are_asked_for_by_their_number(self) -> None:
        assert "return_logprob" not in call_arguments(request(), seeded=False)
        for number in (0, 20):
            arguments = call_arguments(request(logprobs=number), seeded=False)
            assert (arguments["return_logprob"], arguments["top_logprobs_num"]) == (True, number)

    def test_a_room_names_all_three_bootstrap_parameters(self) -> None:
        arguments = call_arguments(request(room=Room("10.0.0.1", 12345, 99), dp_rank=1), seeded=False)
        assert [arguments[f"bootstrap_{name}"] for name in ("host", "port", "room")] == ["10.0.0.1", 12345, 99]
        assert (arguments["rid"], arguments["routed_dp_rank"], arguments["stream"]) == (ENGINE_ID, 1, True)

    def test_a_prefill_rank_is_told_that_the_room_is_its_own(self) -> None:
        """Plain data parallelism: SGLang would otherwise refuse every room but those of rank 0."""
        room = Room("10.0.0.1", 12345, 99)
        assert call_arguments(request(room=room), seeded=False, prefill_ranks=2)["disagg_prefill_dp_rank"] == 1
        assert call_arguments(request(room=room), seeded=False, prefill_ranks=3)["disagg_prefill_dp_rank"] == 0
        for ranks in (0, 1):  # decode, and prefill of one rank
            assert "disagg_prefill_dp_rank" not in call_arguments(request(room=room), seeded=False, prefill_ranks=ranks)

    def test_an_aggregated_request_names_none(self) -> None:
        assert not any(name.startswith("bootstrap") for name in call_arguments(request(), seeded=False))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_ids": []}, "empty"),
        ({"token_ids": [1, 100]}, "outside"),
        ({"token_ids": [-1]}, "outside"),
        ({"sampling": Sampling(0)}, "max_new_tokens"),
        ({"sampling": Sampling(1, stop_token_ids=(100,))}, "stop_token_ids"),
        ({"sampling": Sampling(1, seed=2**63)}, "64 bits"),
        ({"sampling": Sampling(1, logit_bias=((100, 1.0),))}, "logit_bias"),
    ],
)
def test_what_would_end_the_scheduler_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineRefusedError, match=message):
        check_request(request(**values), 100, seeded=True)


def test_a_seed_is_refused_by_an_engine_that_would_ignore_it() -> None:
    with pytest.raises(EngineRefusedError, match="enable-deterministic-inference"):
        check_request(request(sampling=Sampling(1, seed=1)), 100, seeded=False)


# Chunks


def chunk(tokens: list[int], reason: dict[str, Any] | None = None, **meta: Any) -> dict[str, Any]:
    return {"output_ids": tokens, "meta_info": {"finish_reason": reason, **meta}}


async def outcome(
    *chunks: dict[str, Any], error: Exception | None = None, aborting: bool = False, **request: Any
) -> list[EngineDelta]:
    live = LiveRequest(ENGINE_ID, prompt_tokens=3, **request)
    live.aborting = aborting

    async def stream() -> AsyncIterator[dict[str, Any]]:
        for each in chunks:
            yield each
        if error is not None:
            raise error

    async def open_stream() -> AsyncIterator[dict[str, Any]]:
        return stream()

    await live.pump(open_stream)
    return [delta async for delta in live.deltas()]


def tokens_of(deltas: Iterable[EngineDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


class TestChunks:
    async def test_deltas_and_a_stop(self) -> None:
        deltas = await outcome(
            chunk([5, 6]),
            chunk([7], {"type": "stop", "matched": 7}, prompt_tokens=3, cached_tokens=2, completion_tokens=3),
        )
        finish = deltas[-1].finish
        assert finish is not None
        assert tokens_of(deltas) == [5, 6, 7]
        assert (finish.reason, finish.matched_token_id) == (Finish.STOP, 7)
        assert (finish.prompt_tokens, finish.cached_tokens, finish.completion_tokens) == (3, 2, 3)

    async def test_empty_chunks_are_no_deltas(self) -> None:
        deltas = await outcome(chunk([]), chunk([5], {"type": "length", "length": 1}, completion_tokens=1))
        assert [delta.token_ids for delta in deltas] == [[5]]

    async def test_an_abort_repeats_no_token(self) -> None:
        """SGLang puts the last token once more into the chunk of an abort that its scheduler echoes."""
        deltas = await outcome(
            chunk([5, 6]), chunk([6], {"type": "abort", "message": "Abort in waiting queue"}, completion_tokens=2)
        )
        finish = deltas[-1].finish
        assert finish is not None
        assert tokens_of(deltas) == [5, 6]
        assert (finish.reason, finish.message, finish.completion_tokens) == (Finish.ABORT, "Abort in waiting queue", 2)

    async def test_an_aborts_own_new_tokens_are_kept(self) -> None:
        deltas = await outcome(chunk([5]), chunk([6], {"type": "abort", "message": "Aborted"}, completion_tokens=2))
        assert tokens_of(deltas) == [5, 6]

    async def test_a_time_out_keeps_message_and_status(self) -> None:
        deltas = await outcome(chunk([], {"type": "abort", "message": "timed out", "status_code": 500}))
        finish = deltas[-1].finish
        assert finish is not None
        assert (finish.reason, finish.message, finish.status, finish.prompt_tokens) == (
            Finish.ABORT,
            "timed out",
            500,
            3,
        )

    async def test_a_bad_request_found_by_the_scheduler_is_refused(self) -> None:
        with pytest.raises(EngineRefusedError, match="too long"):
            await outcome(chunk([], {"type": "abort", "message": "too long", "status_code": 400}))

    async def test_sglangs_validation_is_refused(self) -> None:
        with pytest.raises(EngineRefusedError, match="top_p"):
            await outcome(error=ValueError("top_p must be in (0, 1]"))

    async def test_the_same_error_of_an_aborted_request_is_its_abort(self) -> None:
        live_abort = await outcome(error=ValueError("was aborted"), aborting=True)
        assert live_abort[-1].finish is not None
        assert live_abort[-1].finish.reason is Finish.ABORT

    async def test_other_errors_come_through(self) -> None:
        with pytest.raises(OSError, match="socket"):
            await outcome(error=OSError("socket"))

    async def test_a_stream_without_an_end_is_an_abort(self) -> None:
        deltas = await outcome(chunk([5]))
        assert deltas[-1].finish is not None
        assert deltas[-1].finish.reason is Finish.ABORT


def logprobs_of(*tokens: int, top: int = 0) -> dict[str, Any]:
    """As SGLang cuts them to a chunk: each token at -0.5, and the likeliest from token 10 on."""
    meta: dict[str, Any] = {"output_token_logprobs": [(-0.5, token, None) for token in tokens]}
    if top:
        meta["output_top_logprobs"] = [[(-0.1 * place, 10 + place, None) for place in range(top)] for _ in tokens]
    return meta


class TestLogProbabilities:
    async def test_each_token_comes_with_its_own(self) -> None:
        deltas = await outcome(
            chunk([5, 6], **logprobs_of(5, 6, top=2)),
            chunk([7], {"type": "length"}, completion_tokens=3, **logprobs_of(7, top=2)),
            logprobs=True,
        )
        found = [each for delta in deltas for each in delta.logprobs]
        assert [each.token_id for each in found] == tokens_of(deltas) == [5, 6, 7]
        assert [len(delta.logprobs) for delta in deltas] == [2, 1]
        assert found[0] == TokenLogprob(5, -0.5, (TopLogprob(10, 0.0), TopLogprob(11, -0.1)))

    async def test_none_of_the_likeliest_where_none_are_asked_for(self) -> None:
        deltas = await outcome(chunk([5], {"type": "length"}, **logprobs_of(5)), logprobs=True)
        assert deltas[-1].logprobs == [TokenLogprob(5, -0.5)]

    async def test_none_at_all_where_the_request_asks_for_none(self) -> None:
        deltas = await outcome(chunk([5], {"type": "length"}))
        assert list(deltas[-1].logprobs) == []

    async def test_what_a_grammar_keeps_away_is_none_of_the_likeliest(self) -> None:
        meta = logprobs_of(5)
        meta["output_top_logprobs"] = [[(0.0, 5, None), (float("-inf"), 6, None), (-3.4e38, 7, None)]]
        deltas = await outcome(chunk([5], {"type": "length"}, **meta), logprobs=True)
        assert deltas[-1].logprobs[0].top == (TopLogprob(5, 0.0),)

    async def test_an_abort_repeats_none(self) -> None:
        deltas = await outcome(
            chunk([5, 6], **logprobs_of(5, 6)),
            chunk([6], {"type": "abort", "message": "Aborted"}, completion_tokens=2, **logprobs_of(6)),
            logprobs=True,
        )
        assert [len(delta.logprobs) for delta in deltas] == [2, 0]
        assert tokens_of(deltas) == [5, 6]

    async def test_an_aborts_tokens_without_any_are_left_out(self) -> None:
        deltas = await outcome(
            chunk([5], **logprobs_of(5)),
            chunk([6], {"type": "abort", "message": "Aborted"}, completion_tokens=2),
            logprobs=True,
        )
        assert tokens_of(deltas) == [5]

    @pytest.mark.parametrize("meta", [{}, logprobs_of(6), logprobs_of(5, 6)])
    async def test_those_of_other_tokens_are_never_given_out(self, meta: dict[str, Any]) -> None:
        with pytest.raises(RuntimeError, match="log probabilities"):
            await outcome(chunk([5], **meta), logprobs=True)


class TestGrammarRefusals:
    """What only the scheduler finds wrong with a grammar."""

    GRAMMAR = Grammar(GrammarKind.EBNF, "root ::= x")

    @pytest.mark.parametrize(
        ("message", "status", "named"),
        [
            ("Failed to compile ebnf grammar: x", 400, "Failed to compile ebnf grammar: x"),
            ("Grammar preprocessing timed out: req.grammar_key=...", 400, "timed out"),
            ("Grammar accept_token failed for req 1 with token 2: Tokens not accepted", 500, "no token .* goes on"),
            (f"Grammar accept_token failed for req 1 with token 2: {TOO_SLOW}", 500, "^the grammar takes too long"),
        ],
    )
    async def test_names_the_field_also_behind_the_first_tokens(self, message: str, status: int, named: str) -> None:
        abort = {"type": "abort", "message": message, "status_code": status}
        with pytest.raises(EngineRefusedError, match=named) as caught:
            await outcome(chunk([5]), chunk([], abort, completion_tokens=1), grammar=self.GRAMMAR)
        assert caught.value.field == "sampling.ebnf"

    @pytest.mark.parametrize("status", [{}, {"status_code": None}])
    async def test_an_abort_without_a_reason_that_nobody_asked_for_is_the_grammars(
        self, status: dict[str, None]
    ) -> None:
        abort = {"type": "abort", "message": "Aborted", **status}
        with pytest.raises(EngineRefusedError, match=r"no token .* goes on") as caught:
            await outcome(chunk([5]), chunk([], abort, completion_tokens=1), grammar=self.GRAMMAR)
        assert caught.value.field == "sampling.ebnf"
        deltas = await outcome(chunk([], abort))
        assert deltas[-1].finish is not None, "without a grammar it stays an abort"

    async def test_an_abort_that_was_asked_for_is_not_the_grammars(self) -> None:
        engine = engine_over(FakeSglang())
        deltas = engine.generate(request(sampling=Sampling(8, grammar=self.GRAMMAR)))
        await anext(deltas)
        await engine.abort(ENGINE_ID)
        assert (await finish_of(deltas)).reason is Finish.ABORT

    async def test_another_abort_of_a_request_with_a_grammar_is_none(self) -> None:
        abort = {"type": "abort", "message": "Aborted", "status_code": 500}
        deltas = await outcome(chunk([], abort), grammar=self.GRAMMAR)
        assert deltas[-1].finish is not None
        assert deltas[-1].finish.reason is Finish.ABORT


# The engine, over a fake of SGLang's


class FakeSglang:
    """Streams one token a turn until it is aborted; knows a request only from its first turn on, as SGLang does."""

    def __init__(self, *, echo: bool = True) -> None:
        self.rid_to_state: dict[str, SimpleNamespace] = {}
        self.aborts: list[str] = []
        self.opened: list[str] = []
        self.tokenizer_manager = self
        self.send_to_rpc = None
        self._echo = echo

    def abort_request(self, rid: str) -> None:
        assert rid in self.rid_to_state, "an abort that the scheduler would never see"
        self.aborts.append(rid)

    async def async_generate(self, *, rid: str, **_arguments: Any) -> AsyncIterator[dict[str, Any]]:
        self.opened.append(rid)

        async def stream() -> AsyncIterator[dict[str, Any]]:
            self.rid_to_state[rid] = SimpleNamespace(dispatched=False)
            await asyncio.sleep(0.02)
            self.rid_to_state[rid].dispatched = True
            sent = 0
            while not (self._echo and rid in self.aborts):
                sent += 1
                yield chunk([sent])
                await asyncio.sleep(0.001)
            yield chunk([], {"type": "abort", "message": "Aborted"}, completion_tokens=sent)

        return stream()


def engine_over(fake: FakeSglang, **values: Any) -> SglangEngine:
    engine = SglangEngine(options(**values))
    engine._sglang = fake
    engine._info = SimpleNamespace(vocab_size=100, seeded_sampling=False, dp_size=1)  # pyright: ignore[reportAttributeAccessIssue]
    return engine


async def finish_of(deltas: AsyncIterator[EngineDelta]) -> Any:
    async with asyncio.timeout(2):
        return [delta async for delta in deltas][-1].finish


class TestAborts:
    async def test_before_the_engine_saw_the_request_it_is_never_sent(self) -> None:
        fake = FakeSglang()
        engine = engine_over(fake)
        deltas = engine.generate(request())
        await engine.abort(ENGINE_ID)
        assert (await finish_of(deltas)).reason is Finish.ABORT
        assert fake.opened == []

    async def test_before_the_scheduler_has_the_request_it_waits_for_it(self) -> None:
        fake = FakeSglang()
        engine = engine_over(fake)
        deltas = engine.generate(request())
        await asyncio.sleep(0.005)
        assert ENGINE_ID in fake.rid_to_state
        assert not is_dispatched(fake, ENGINE_ID)
        await engine.abort(ENGINE_ID)
        assert fake.aborts == []
        assert (await finish_of(deltas)).reason is Finish.ABORT
        assert fake.aborts == [ENGINE_ID]

    async def test_mid_stream(self) -> None:
        engine = engine_over(FakeSglang())
        deltas = engine.generate(request())
        await anext(deltas)
        await engine.abort(ENGINE_ID)
        await engine.abort(ENGINE_ID)
        assert (await finish_of(deltas)).message == "Aborted"

    async def test_the_iterator_ends_even_if_the_engine_says_nothing(self) -> None:
        engine = engine_over(FakeSglang(echo=False), abort_timeout_s=0.05)
        deltas = engine.generate(request())
        await engine.abort("f" * 32)
        await anext(deltas)
        await engine.abort(ENGINE_ID)
        assert "did not confirm" in (await finish_of(deltas)).message

    async def test_a_dropped_iterator_aborts_nothing_and_can_be_aborted_later(self) -> None:
        fake = FakeSglang()
        engine = engine_over(fake)
        deltas = engine.generate(request())
        await anext(deltas)
        await deltas.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        await asyncio.sleep(0.05)
        assert fake.aborts == []
        await engine.abort(ENGINE_ID)
        assert fake.aborts == [ENGINE_ID]

    async def test_a_prefill_leg_without_a_peer_is_aborted_by_the_backstop(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("services.worker.engines.sglang._BACKSTOP_MARGIN_S", 0.01)
        fake = FakeSglang()
        engine = engine_over(fake, role=Role.PREFILL, backstop_timeout_s=0.05)
        assert (await finish_of(engine.generate(request(room=Room("h", 1, 2))))).reason is Finish.ABORT
        assert fake.aborts == [ENGINE_ID]

    async def test_an_id_in_use_is_refused_and_free_again_afterwards(self) -> None:
        engine = engine_over(FakeSglang())
        first = engine.generate(request())
        with pytest.raises(EngineRefusedError, match="in use"):
            await anext(engine.generate(request()))
        await engine.abort(ENGINE_ID)
        await finish_of(first)
        await asyncio.sleep(0)
        second = engine.generate(request())
        await anext(second)
        await engine.abort(ENGINE_ID)
        await finish_of(second)


class TestGrammars:
    async def test_a_grammar_is_tried_before_sglang_sees_the_request(self) -> None:
        fake = FakeSglang()
        engine = engine_over(fake)
        tried: list[Grammar] = []

        async def require(grammar: Grammar) -> None:
            tried.append(grammar)
            if grammar.source == "bad":
                raise EngineRefusedError("no", field=grammar.field)

        engine._grammars = SimpleNamespace(require=require)  # pyright: ignore[reportAttributeAccessIssue]
        bad, good = Grammar(GrammarKind.REGEX, "bad"), Grammar(GrammarKind.REGEX, "good")
        with pytest.raises(EngineRefusedError) as caught:
            await anext(engine.generate(request(sampling=Sampling(8, grammar=bad))))
        assert (caught.value.field, fake.opened) == ("sampling.regex", [])
        await asyncio.sleep(0)
        await anext(engine.generate(request(sampling=Sampling(8, grammar=good))))
        await engine.abort(ENGINE_ID)
        assert (tried, fake.opened) == ([bad, good], [ENGINE_ID])

    @pytest.mark.parametrize("verdict_first", [False, True])
    async def test_an_abort_during_a_trial_ends_the_request_at_once_and_for_good(self, verdict_first: bool) -> None:
        fake = FakeSglang()
        engine, tried = engine_over(fake), asyncio.Event()

        async def require(_grammar: Grammar) -> None:
            await tried.wait()

        engine._grammars = SimpleNamespace(require=require)  # pyright: ignore[reportAttributeAccessIssue]
        deltas = engine.generate(request(sampling=Sampling(8, grammar=Grammar(GrammarKind.REGEX, "slow"))))
        await asyncio.sleep(0.01)
        if verdict_first:  # in the same turn of the loop
            tried.set()
        await engine.abort(ENGINE_ID)
        async with asyncio.timeout(0.2):
            assert (await finish_of(deltas)).reason is Finish.ABORT
        tried.set()
        await asyncio.sleep(0.05)
        assert (fake.opened, engine._live, engine._pumps) == ([], {}, {})


# Death


class TestDeath:
    def test_a_child_that_ends_is_noticed_at_once(self) -> None:
        watch, causes = DeathWatch(), list[str]()
        watch.listen(causes.append)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        watch.watch([child.pid])
        child.kill()
        child.wait()
        deadline = time.monotonic() + 2
        while not causes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert causes == [f"SGLang's process {child.pid} ended"]

    def test_a_late_listener_hears_the_first_cause(self) -> None:
        watch, causes = DeathWatch(), list[str]()
        watch.declare("first")
        watch.declare("second")
        watch.listen(causes.append)
        assert causes == ["first"]
        assert watch.cause == "first"

    def test_sigquit_ends_a_launch_and_marks_a_running_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        watch = DeathWatch()
        monkeypatch.setattr(sglang_death, "_watched", watch)
        previous = signal.signal(signal.SIGQUIT, on_sigquit)
        try:
            watch.launching = True
            with pytest.raises(EngineLaunchError):
                signal.raise_signal(signal.SIGQUIT)
            watch.launching = False
            signal.raise_signal(signal.SIGQUIT)
        finally:
            signal.signal(signal.SIGQUIT, previous)
        assert watch.cause is not None

    async def test_live_requests_and_later_calls_fail(self) -> None:
        engine = engine_over(FakeSglang())
        await asyncio.sleep(0)
        deltas = engine.generate(request())
        await anext(deltas)
        engine._dead = asyncio.get_running_loop().create_future()
        engine._death.declare("SGLang's process 1 ended")
        engine._end_everything("SGLang's process 1 ended")
        assert await engine.wait_dead() == "SGLang's process 1 ended"
        for failing in (deltas, engine.generate(request(engine_id="1" * 32))):
            with pytest.raises(Exception, match="process 1 ended"):
                await finish_of(failing)
        with pytest.raises(Exception, match="process 1 ended"):
            await engine.loads()


# What was built


def model(**values: Any) -> SimpleNamespace:
    """SmolLM2-135M."""
    return SimpleNamespace(
        **{
            "num_attention_layers": 30,
            "head_dim": 64,
            "v_head_dim": 64,
            "attention_arch": SimpleNamespace(name="MHA"),
            "is_hybrid_swa": False,
            "get_num_kv_heads": lambda ranks: max(1, 3 // ranks),
            **values,
        }
    )


ONE_RANK = {"tp_size": 1, "pp_size": 1, "dp_size": 1}


class TestSizes:
    def test_smollm2_in_float32(self) -> None:
        pytest.importorskip("torch")
        assert kv_bytes_per_token(model(), ONE_RANK, "float32") == 46_080

    def test_per_tp_rank_and_type(self) -> None:
        pytest.importorskip("torch")
        assert kv_bytes_per_token(model(), {**ONE_RANK, "tp_size": 3}, "bfloat16") == 7_680
        assert kv_bytes_per_token(model(), ONE_RANK, "fp8_e4m3") == 11_520

    def test_latent_attention_has_one_vector_for_all_heads(self) -> None:
        pytest.importorskip("torch")
        latent = model(attention_arch=SimpleNamespace(name="MLA"), kv_lora_rank=512, qk_rope_head_dim=64)
        assert kv_bytes_per_token(latent, ONE_RANK, "bfloat16") == 30 * 576 * 2

    def test_unknown_where_it_is_not_one_number(self) -> None:
        pytest.importorskip("torch")
        assert kv_bytes_per_token(model(is_hybrid_swa=True), ONE_RANK, "bfloat16") == 0
        assert kv_bytes_per_token(model(), ONE_RANK, "fp4_e2m1") == 0

    def test_kv_cache_type(self) -> None:
        assert kv_cache_dtype("auto", "torch.bfloat16") == "bfloat16"
        assert kv_cache_dtype("fp8_e4m3", "torch.bfloat16") == "fp8_e4m3"

    def test_a_prefill_batch_ends_at_the_nearer_limit(self) -> None:
        assert max_batched_tokens(4096, 16384) == 4096
        assert max_batched_tokens(-1, 16384) == 16384
        assert max_batched_tokens(None, 16384) == 16384

    def test_load(self) -> None:
        snapshot = SimpleNamespace(
            dp_rank=1,
            num_running_reqs=2,
            num_waiting_reqs=3,
            num_used_tokens=160,
            max_total_num_tokens=16384,
            timestamp=12.5,
        )
        load = load_of(snapshot)
        assert (load.dp_rank, load.running_requests, load.waiting_requests) == (1, 2, 3)
        assert (load.used_tokens, load.total_tokens, load.reported_at) == (160, 16384, 12.5)
