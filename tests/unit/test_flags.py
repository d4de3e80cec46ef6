"""Flag over environment over default; every mistake names its flag or variable."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from services.config.flags import ConfigError, add_flags, build
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
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
    config, rest = parse("--device", "cpu", "--tp", "2", "--trust-remote-code")
    assert (config.device, rest) == ("cpu", ["--tp", "2", "--trust-remote-code"])


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
    prefill, decode = config.completed(role=Role.PREFILL), config.completed(role=Role.DECODE)
    assert (prefill.port, prefill.system_port) == (50061, 8081)
    assert (decode.port, decode.system_port) == (50062, 8082)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ValueError, match="--model-path"):
        parse()[0].completed(role=Role.DECODE)


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
