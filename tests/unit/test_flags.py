"""Flag over environment over default; every mistake names its flag or variable."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from services.config.flags import ConfigError, add_flags, build
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.modes import mode_of
from services.requests import Role


def parse(*arguments: str, environ: dict[str, str] | None = None) -> tuple[WorkerConfig, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, WorkerConfig)
    parsed, rest = parser.parse_known_args(arguments)
    return build(WorkerConfig, parsed, environ or {}), rest


def test_precedence() -> None:
    environ = {"KVBATON_PORT": "2", "KVBATON_NAMESPACE": "env"}
    config, _ = parse("--port", "1", environ=environ)
    assert (config.port, config.etcd.namespace, config.lease_ttl) == (1, "env", 10.0)


def test_foreign_flags_are_left_for_sglang() -> None:
    config, rest = parse("--device", "cpu", "--pp-size", "2", "--enable-dp-attention")
    assert (config.device, rest) == ("cpu", ["--pp-size", "2", "--enable-dp-attention"])


@pytest.mark.parametrize("name", ["--tp", "--tp-size", "--tensor-parallel-size"])
def test_each_name_of_a_flag_is_the_same_flag(name: str) -> None:
    config, rest = parse(name, "2")
    assert (config.tp, rest) == (2, [])


def test_what_sglang_owns_and_baton_knows_is_handed_on_when_it_is_set() -> None:
    config, _ = parse("--tp", "2", "--dp-size=4", "--trust-remote-code", "--enable-metrics", "--page-size", "32")
    assert config.engine_fields == {
        "tp_size": 2,
        "dp_size": 4,
        "trust_remote_code": True,
        "enable_metrics": True,
        "page_size": 32,
    }
    assert parse()[0].engine_fields == {}, "SGLang's own defaults stay SGLang's"


def test_sglangs_short_flags_are_not_taken_for_ours() -> None:
    _, rest = parse("--tls", "x")
    assert rest == ["--tls", "x"], "no abbreviation of --tls-cert"


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (("--port", "x"), {}, "--port"),
        (("--port", "70000"), {}, "--port"),
        ((), {"KVBATON_PORT": "x"}, "KVBATON_PORT"),
        ((), {"KVBATON_TLS_CLIENT_AUTH": "maybe"}, "KVBATON_TLS_CLIENT_AUTH"),
        (("--device", "tpu"), {}, "--device"),
        (("--drain-timeout", "0"), {}, "--drain-timeout"),
        (("--page-size", "0"), {}, "--page-size"),
        (("--tp", "0"), {}, "--tp"),
        (("--dp", "-1"), {}, "--dp"),
        ((), {"KVBATON_TP": "two"}, "KVBATON_TP"),
        (("--disaggregation-mode", "both"), {}, "--disaggregation-mode.*prefill, decode, null"),
        (("--disaggregation-transfer-backend", "pigeon"), {}, "--disaggregation-transfer-backend"),
        (("--disaggregation-bootstrap-port", "0"), {}, "--disaggregation-bootstrap-port"),
        (("--no-skip-tokenizer-init",), {}, "--no-skip-tokenizer-init"),
        (("--node-rank", "1"), {}, "--node-rank 1 is not one of --nnodes 1"),
        (("--nnodes", "2"), {}, "--dist-init-addr"),
    ],
)
def test_mistakes_name_their_source(arguments: tuple[str, ...], environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(*arguments, environ=environ)


@pytest.mark.parametrize(("raw", "expected"), [("1", True), ("true", True), ("off", False), ("no", False)])
def test_switches_from_the_environment(raw: str, expected: bool) -> None:
    config, _ = parse(environ={"KVBATON_TLS_CLIENT_AUTH": raw})
    assert config.tls.tls_client_auth is expected


def test_a_switch_can_be_switched_off_again() -> None:
    config, _ = parse("--no-tls-client-auth", environ={"KVBATON_TLS_CLIENT_AUTH": "1"})
    assert config.tls.tls_client_auth is False


def test_default_ports_follow_the_role() -> None:
    config, _ = parse("--model-path", "smollm2")
    prefill, decode = config.completed(mode_of(Role.PREFILL)), config.completed(mode_of(Role.DECODE))
    assert (prefill.port, prefill.system_port) == (50061, 8081)
    assert (decode.port, decode.system_port) == (50062, 8082)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match="--model-path"):
        parse()[0].completed(mode_of(Role.DECODE))


@pytest.mark.parametrize("config", [WorkerConfig, FrontendConfig])
def test_every_field_has_help_and_a_variable(config: type) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, config)
    for action in parser._actions:
        if action.dest != "help":
            assert action.help is not None
            assert "KVBATON_" in action.help


def test_tls_files_must_exist(tmp_path: Path) -> None:
    config, _ = parse("--tls-cert", str(tmp_path / "no.pem"), "--tls-key", str(tmp_path / "no.key"))
    with pytest.raises(ValueError, match="--tls-cert"):
        config.tls.server()
