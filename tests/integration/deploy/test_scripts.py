"""deploy/local's scripts around a stand-in for `kvbaton` that only notes how it was started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.requests import Role
from tests.support.commands import parse
from tests.support.scripts import LOCAL, Script

# Notes its arguments and environment, and ends a moment after SIGTERM; with DIE=name that process ends by itself.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
name = os.environ["OTEL_SERVICE_NAME"]
def stop(*_):
    print(name, "ends", time.monotonic(), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("DEAF") == name else stop)
note = pathlib.Path(os.environ["STATE_DIR"]) / (name + ".json")
note.with_suffix(".tmp").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
note.with_suffix(".tmp").rename(note)
print("no GPU: the cause", flush=True)
if os.environ.get("DIE") == name:
    time.sleep(0.5)
    sys.exit(int(os.environ["STATUS"]))
time.sleep(60)
"""


@dataclass
class Started:
    """One process as it was started."""

    arguments: list[str]
    environ: dict[str, str]

    def config(self) -> FrontendConfig | WorkerConfig:
        return parse(self.arguments, self.environ)

    def worker(self) -> WorkerConfig:
        config = self.config()
        assert isinstance(config, WorkerConfig)
        return config


NAMES = {
    "agg.sh": ("kvbaton-frontend", "kvbaton-worker"),
    "disagg.sh": ("kvbaton-frontend", "kvbaton-worker-prefill", "kvbaton-worker-decode"),
}
Run = Callable[..., Script]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Starts a script; what a failed test leaves of it is ended."""
    scripts: list[Script] = []

    def start(name: str, *arguments: str, **env: str) -> Script:
        script = Script(name, tmp_path / str(len(scripts)), STAND_IN, *arguments, **env)
        scripts.append(script)
        return script

    yield start
    for script in scripts:
        script.clean_up()


def started(script: Script, name: str) -> dict[str, Started]:
    """By service name, once all run."""
    until = time.monotonic() + 30
    notes = {service: script.state_dir / f"{service}.json" for service in NAMES[name]}
    while not all(note.exists() for note in notes.values()):
        assert time.monotonic() < until, script.text()
        time.sleep(0.05)
    return {service: Started(*json.loads(note.read_text())) for service, note in notes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_help_names_every_flag_and_starts_nothing(name: str) -> None:
    done = subprocess.run(
        [LOCAL / name, "-h"], capture_output=True, text=True, check=True, env={"PATH": "/bin:/usr/bin"}
    )
    for word in ("--model-path", "--enable-otel", "50051", "8000", "8081"):
        assert word in done.stdout
    assert (name == "disagg.sh") == all(word in done.stdout for word in ("8082", "12345"))


def test_agg_starts_a_frontend_and_an_aggregated_worker(run: Run) -> None:
    script = run("agg.sh", "--model-path", "org/model", "--tp", "2", "--served-model-name=m")
    processes = started(script, "agg.sh")
    frontend, worker = processes["kvbaton-frontend"].config(), processes["kvbaton-worker"].worker()
    assert isinstance(frontend, FrontendConfig)
    assert (frontend.port, frontend.http_port) == (script.ports["FRONTEND_PORT"], script.ports["HTTP_PORT"])
    assert (worker.role, worker.model_path, worker.served_model_name) == (Role.AGGREGATED, "org/model", "m")
    assert worker.tp == 2
    assert (worker.port, worker.system_port) == (script.ports["WORKER_PORT"], script.ports["SYSTEM_PORT"])


def test_disagg_starts_a_pair_that_shares_flags_and_nothing_else(run: Run) -> None:
    script = run("disagg.sh", "--model-path=org/model", "--trust-remote-code", CUDA_VISIBLE_DEVICES="4,5,6,7")
    processes = started(script, "disagg.sh")
    prefill, decode = processes["kvbaton-worker-prefill"], processes["kvbaton-worker-decode"]
    for process, role in ((prefill, Role.PREFILL), (decode, Role.DECODE)):
        config = process.worker()
        assert (config.role, config.model_path, config.page_size) == (role, "org/model", 16)
        assert config.disaggregation_transfer_backend == "nixl"
        assert config.trust_remote_code
        ports = (script.ports[f"{role.upper()}_PORT"], script.ports[f"{role.upper()}_SYSTEM_PORT"])
        assert (config.port, config.system_port) == ports
    assert prefill.worker().disaggregation_bootstrap_port == script.ports["BOOTSTRAP_PORT"]
    assert prefill.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert decode.environ["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_two_engines_on_a_cpu_do_not_take_each_others_threads(run: Run) -> None:
    for process in started(run("disagg.sh", "--device", "cpu", OMP_NUM_THREADS=""), "disagg.sh").values():
        if "worker" in process.environ["OTEL_SERVICE_NAME"]:
            assert process.environ["OMP_NUM_THREADS"] == "1"
            assert process.worker().device == "cpu"


def test_one_gpu_is_too_few_for_a_pair(run: Run) -> None:
    script = run("disagg.sh", CUDA_VISIBLE_DEVICES="0")
    assert script.wait() == 1
    assert "two GPUs are needed" in script.text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("endpoint", ["", "http://collector:4317"])
def test_traces_have_an_endpoint_and_each_process_its_service_name(run: Run, name: str, endpoint: str) -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if endpoint else {}
    for process in started(run(name, "--enable-otel", **env), name).values():
        assert "--enable-otel" in process.arguments
        assert process.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == (endpoint or "http://localhost:4317")
    for process in started(run(name), name).values():
        assert "--enable-otel" not in process.arguments
        assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in process.environ


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ends_is_named_with_its_log_and_takes_the_rest_along(run: Run, status: int) -> None:
    script = run("disagg.sh", DIE="kvbaton-worker-decode", STATUS=str(status))
    assert script.wait() == (status or 1)
    told = script.text().partition(f"disagg.sh: decode ended with status {status}. The end of ")[2]
    assert "no GPU: the cause" in told
    assert script.left() == []


def test_the_frontend_ends_before_its_workers(run: Run) -> None:
    script = run("disagg.sh")
    started(script, "disagg.sh")
    script.process.send_signal(signal.SIGINT)
    assert script.wait() == 130
    ends = {
        name: float((script.state_dir / f"{name}.log").read_text().split()[-1])
        for name in ("frontend", "prefill", "decode")
    }
    assert ends["frontend"] < min(ends["prefill"], ends["decode"])
    assert script.left() == []


def test_what_ignores_sigterm_is_killed_in_the_end(run: Run) -> None:
    script = run("agg.sh", DEAF="kvbaton-worker", STOP_SECONDS="1")
    started(script, "agg.sh")
    script.process.terminate()
    assert script.wait() == 143
    assert "agg.sh: worker did not end in time and is killed" in script.text()
    assert script.left() == []


def test_a_killed_script_takes_its_processes_along(run: Run) -> None:
    script = run("disagg.sh")
    started(script, "disagg.sh")
    script.process.kill()
    until = time.monotonic() + 10
    while script.left():
        assert time.monotonic() < until, script.left()
        time.sleep(0.05)


def test_an_etcd_elsewhere_that_does_not_answer_is_an_error(run: Run) -> None:
    script = run("agg.sh", KVBATON_ETCD_ENDPOINTS="127.0.0.2:1")
    assert script.wait() == 1
    assert "no etcd answers at 127.0.0.2:1" in script.text()
    assert not (script.state_dir / "kvbaton-frontend.json").exists()


def test_a_running_etcd_is_used_and_left_alone(run: Run) -> None:
    first = run("agg.sh")
    started(first, "agg.sh")
    second = run("disagg.sh", KVBATON_ETCD_ENDPOINTS=first.env["KVBATON_ETCD_ENDPOINTS"])
    started(second, "disagg.sh")
    second.process.terminate()
    assert second.wait() == 143
    assert not (second.state_dir / "etcd.log").exists()
    assert any("etcd" in line for line in first.left())


def test_without_a_kvbaton_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    copy = tmp_path / "deploy" / "local"
    copy.mkdir(parents=True)
    for file in LOCAL.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
        (copy / file.name).chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([copy / "agg.sh"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert "no kvbaton command on PATH" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["deploy"]
