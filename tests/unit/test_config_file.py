"""--config, --config-key and --dump-config-to: which value counts, what is refused by name, what is kept secret."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import cli
from services.config.common import FileFlags
from services.config.flags import ConfigError, Resolved, add_flags, build, keys_of, resolve
from services.config.report import HIDDEN, Setting, dump, for_log, hide, native_settings, settings_of
from services.config.worker import WorkerConfig
from services.config.yaml_file import ConfigFile, read_config_file
from services.tools.cluster import _PORT_LOST

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return path

    return write


def worker(path: Path, *arguments: str, environ: dict[str, str] | None = None) -> Resolved[WorkerConfig]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, FileFlags)
    add_flags(parser, WorkerConfig)
    parsed = parser.parse_args([f"--config={path}", *arguments])
    return resolve(WorkerConfig, parsed, environ or {}, build(FileFlags, parsed, environ or {}).read())


class TestPrecedence:
    def test_flag_then_environment_then_file_then_default(self, write: Any) -> None:
        path = write("port: 3\nsystem-port: 3\nlease-ttl: 3\n")
        resolved = worker(path, "--port", "1", environ={"KVBATON_PORT": "2", "KVBATON_SYSTEM_PORT": "2"})
        config = resolved.config
        assert (config.port, config.system_port, config.lease_ttl, config.drain_grace) == (1, 2, 3.0, 1.0)
        assert [resolved.sources[name] for name in ("port", "system_port", "lease_ttl", "drain_grace")] == [
            "--port",
            "KVBATON_SYSTEM_PORT",
            f"{path}: lease-ttl",
            "default",
        ]

    def test_the_file_itself_can_come_from_the_environment(self, write: Any) -> None:
        files = build(FileFlags, argparse.Namespace(), {"KVBATON_CONFIG": str(write("port: 3"))})
        assert (file := files.read()) is not None
        assert file.values == {"port": 3}

    @pytest.mark.parametrize("key", ["system-port", "system_port"])
    def test_keys_with_dashes_or_underscores(self, write: Any, key: str) -> None:
        assert worker(write(f"{key}: 9")).config.system_port == 9

    @pytest.mark.parametrize("key", ["tp", "tp-size", "tensor_parallel_size"])
    def test_every_name_of_a_flag_is_a_key(self, write: Any, key: str) -> None:
        assert worker(write(f"{key}: 2")).config.tp == 2

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("tls-client-auth: true", True),
            ("tls-client-auth: false", False),
            ("no-tls-client-auth: true", False),
            ("no_tls_client_auth: false", True),
        ],
    )
    def test_switches_and_their_negation(self, write: Any, text: str, expected: bool) -> None:
        assert worker(write(text)).config.tls.tls_client_auth is expected

    def test_a_switch_of_the_file_is_switched_off_by_a_flag(self, write: Any) -> None:
        assert worker(write("trust-remote-code: true"), "--no-trust-remote-code").config.trust_remote_code is False

    def test_null_is_a_disaggregation_mode(self, write: Any) -> None:
        assert worker(write("disaggregation-mode: null")).config.disaggregation_mode == "null"

    def test_an_empty_file_changes_nothing(self, write: Any) -> None:
        assert worker(write("# nothing\n")).config == WorkerConfig()


class TestSections:
    TEXT = "workers:\n  prefill:\n    port: 4\n  decode: {port: 5}\nname: x\n"

    def test_a_nested_section(self, write: Any) -> None:
        resolved = worker(write(self.TEXT), "--config-key", "workers.decode")
        assert resolved.config.port == 5
        assert resolved.sources["port"].endswith("workers.decode.port")

    @pytest.mark.parametrize(
        ("section", "named"),
        [
            ("worker", r"has no worker; the keys there are: workers, name"),
            ("workers.encode", r"has no encode below workers; the keys there are: prefill, decode"),
            ("name.x", r"has no x below name; the keys there are: none"),
            ("name", r"--config-key name: .*is text and not a mapping"),
        ],
    )
    def test_errors_list_the_keys_that_exist(self, write: Any, section: str, named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            worker(write(self.TEXT), "--config-key", section)

    def test_a_section_of_no_file(self) -> None:
        with pytest.raises(ConfigError, match="--config-key needs --config"):
            build(FileFlags, argparse.Namespace(config_key="a"), {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("port: '50061'", r"c\.yaml: port: '50061' is text and not a whole number"),
        ("port: true", r"port: True is true or false and not a whole number"),
        ("port: 1.5", r"port: 1.5 is a number and not a whole number"),
        ("port: [1, 2]", r"port: \[1, 2\] is a list and not a whole number"),
        ("lease_ttl: soon", r"lease-ttl: 'soon' is text and not a number"),
        ("trust-remote-code: 'yes'", r"trust-remote-code: 'yes' is text and not true or false"),
        ("namespace: 7", r"namespace: 7 is a whole number and not text \(write it in quotes\)"),
        ("namespace: 2026-01-01", r"namespace: .* is a date and not text"),
        ("model-path:", r"model-path: None is nothing and not text"),
        ("device: tpu", r"c\.yaml: device: 'tpu' is not one of cuda, cpu"),
        ("disaggregation-mode: [prefill]", r"disaggregation-mode: \['prefill'\] is not one of"),
        ("tp: 0", r"--tp must be at least 1"),
        ("tp: 1\ntp-size: 2", r"tp and tp-size are the same setting"),
        ("tp-size: 1\ntp_size: 2", r"tp-size stands there twice"),
        ("port: 1\nport: 2", r"port stands there twice"),
        ("- port", r"the file is a list and not a mapping"),
        ("port: [", r"--config .*not YAML"),
    ],
)
def test_mistakes_name_file_and_key(write: Any, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        worker(write(text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none\.yaml: No such file"):
        read_config_file(tmp_path / "none.yaml")


def test_keys_that_are_not_ours_are_left_for_sglang(write: Any) -> None:
    file = read_config_file(write("port: 1\nmem_fraction_static: 0.5\nno-enable-metrics: true\n"))
    assert file.without(keys_of(WorkerConfig)).values == {"mem-fraction-static": 0.5}


class TestCommandLine:
    """Through the real command, which stops before anything is started."""

    def test_the_frontend_refuses_unknown_keys_by_name(self, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
        path = write("port: 0\nhttp_prot: 1\n")
        assert cli.main(["frontend", "--config", str(path)]) == 2
        assert f"{path}: http-prot: there is no such setting; did you mean http-port?" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (
                ("prefill", "--disaggregation-mode", "decode"),
                "--disaggregation-mode decode contradicts `kvbaton",
            ),
            (("decode", "--disaggregation-mode", "both"), "--disaggregation-mode: 'both' is not one of"),
            (("prefill", "--disaggregation-transfer-backend", "none"), "--disaggregation-transfer-backend none"),
            (("decode", "--disaggregation-transfer-backend", "none"), "--disaggregation-transfer-backend none"),
            (("decode", "--embedding-worker", "--disaggregation-mode", "decode"), "contradicts --embedding-worker"),
            (("prefill", "--embedding-worker"), "--embedding-worker is not for `kvbaton prefill`"),
            (
                ("decode", "--embedding-worker", "--disaggregation-bootstrap-port", "12345"),
                "a worker in embedding mode has no bootstrap server",
            ),
            (
                ("decode", "--disaggregation-bootstrap-port", "12345"),
                "--disaggregation-bootstrap-port: a worker",
            ),
            (("prefill", "--tp", "0"), "--tp must be at least 1"),
        ],
    )
    def test_contradictions_are_refused_by_name(
        self, arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*arguments, "--model-path", "m"]) == 2
        assert named in capsys.readouterr().err

    def test_a_bootstrap_port_in_a_decode_workers_file_is_refused(
        self, write: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = write("disaggregation-bootstrap-port: 12345\nmodel-path: m\n")
        assert cli.main(["decode", "--config", str(path)]) == 2
        assert f"{path}: disaggregation-bootstrap-port: a worker in decode mode" in capsys.readouterr().err

    def test_a_taken_bootstrap_port_is_a_start_error_that_names_flag_and_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            flags = ("--engine", "simulated", "--model-path", "m", "--disaggregation-bootstrap-port", port)
            done = kvbaton("prefill", *flags, "--etcd-endpoints", "127.0.0.1:1")
        assert done.returncode == 1
        line = done.stderr.splitlines()[-1]
        assert f"127.0.0.1:{port}" in line
        assert "--disaggregation-bootstrap-port" in line
        assert _PORT_LOST in line, "or `kvbaton up` doesn't try again with another port"

    def test_a_workers_configuration_is_dumped_and_read_again(self, write: Any, tmp_path: Path) -> None:
        """The worker itself then ends at once: SGLang's flags mean nothing to the simulated engine."""
        path = write("prefill:\n  model_path: m\n  tp_size: 1\n  dtype: half\n  log-requests-target: [a, b]\n")
        first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
        flags = ["--engine", "simulated", "--port", "0", "--api-key=hush", "--etcd-endpoints", "127.0.0.1:1"]
        kvbaton("prefill", f"--config={path}", "--config-key=prefill", f"--dump-config-to={first}", *flags)
        text = first.read_text()
        assert "port: 50061  # --port" in text
        assert f"model-path: m  # {path}: prefill.model-path" in text
        assert f"log-requests-target: [a, b]  # {path}: prefill.log-requests-target" in text
        assert "lease-ttl: 10.0  # default" in text
        assert "hush" not in text
        kvbaton("prefill", f"--config={first}", f"--dump-config-to={second}")
        assert yaml.safe_load(second.read_text()) == yaml.safe_load(text)

    def test_the_log_has_the_configuration_and_no_secrets(self) -> None:
        done = kvbaton(
            *("prefill", "--engine", "simulated", "--model-path", "m", "--log-format", "json"),
            *("--tls-key", "/secret/place.pem", "--api-key", "hush", "--etcd-endpoints", "127.0.0.1:1"),
        )
        line = next(line for line in done.stderr.splitlines() if '"event": "configuration"' in line)
        assert '"level": "info"' in line
        assert '"tls-key": "***"' in line
        assert '"tls-key": "--tls-key"' in line, "where it comes from is no secret"
        assert '"model-path": "m"' in line
        assert "hush" not in line
        assert "/secret/place.pem" not in line


def kvbaton(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)


class TestReport:
    @pytest.mark.parametrize("name", ["api-key", "hf_token", "admin-api-key", "ssl-keyfile-password", "client_secret"])
    def test_secrets_are_hidden_by_name(self, name: str) -> None:
        assert hide(name, "hush") == HIDDEN

    @pytest.mark.parametrize("name", ["max-total-tokens", "skip-tokenizer-init", "disable-monkey", "page-size"])
    def test_names_that_only_look_alike_are_shown(self, name: str) -> None:
        assert hide(name, 7) == 7

    def test_secrets_inside_of_values_are_hidden(self) -> None:
        assert hide("extra-config", {"url": "http://u:p@h/", "token": "t", "n": 1}) == {
            "url": f"http://{HIDDEN}@h/",
            "token": HIDDEN,
            "n": 1,
        }
        assert hide("extra-config", '{"api_key": "k", "n": 1}') == f'{{"api_key": "{HIDDEN}", "n": 1}}'

    def test_an_unset_secret_says_so(self) -> None:
        assert hide("tls-key", None) is None

    def test_sglangs_flags_as_settings(self) -> None:
        file = ConfigFile(Path("f"), "", {"dtype": "half", "pp-size": 2})
        arguments = ("--pp-size", "4", "--enable-x", "--buckets", "1", "2", "--api-key=k")
        assert native_settings(arguments, file) == (
            Setting("pp-size", "4", "--pp-size"),
            Setting("enable-x", True, "--enable-x"),
            Setting("buckets", ["1", "2"], "--buckets"),
            Setting("api-key", HIDDEN, "--api-key"),
            Setting("dtype", "half", "f: dtype"),
        )

    def test_the_log_names_sources_of_what_was_set(self) -> None:
        fields = for_log(settings_of(WorkerConfig(port=7), {"port": "--port"}))
        assert fields["values"]["port"] == 7
        assert fields["sources"] == {"port": "--port"}

    def test_a_dump_that_can_not_be_written_names_its_flag(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="--dump-config-to"):
            dump((), tmp_path / "no" / "file")

    def test_text_that_would_change_its_type_stays_text(self, tmp_path: Path) -> None:
        values = {"a": "null", "b": "7", "c": "x: y # z", "d": "1\n2", "e": 1e-06, "f": ["1", 2], "g": {"h": [True]}}
        dump([Setting(key, value, "default") for key, value in values.items()], tmp_path / "d.yaml")
        assert yaml.safe_load((tmp_path / "d.yaml").read_text()) == values
