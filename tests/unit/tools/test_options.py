"""What a local cluster consists of."""

import argparse
import itertools
from pathlib import Path

import pytest

from services.config.flags import ConfigError, add_flags, build
from services.requests import Role
from services.tools.options import (
    ClusterOptions,
    ProcessPlan,
    command,
    environment,
    gpus_of,
    gpus_per_worker,
    plan_processes,
)
from services.tools.ports import Ports

ETCD = "127.0.0.1:23790"


def options(*arguments: str, **environ: str) -> ClusterOptions:
    parser = argparse.ArgumentParser()
    add_flags(parser, ClusterOptions)
    return build(ClusterOptions, parser.parse_args(arguments), environ)


def planned(chosen: ClusterOptions) -> dict[str, ProcessPlan]:
    return {plan.name: plan for plan in plan_processes(chosen, Ports())}


def flags_of(line: list[str]) -> dict[str, str]:
    return {name: value for name, value in itertools.pairwise(line) if name.startswith("--")}


def test_the_default_is_a_pair_of_workers_behind_a_frontend():
    assert list(planned(options())) == ["frontend", "prefill", "decode"]


def test_aggregated_is_one_worker_that_does_both():
    plans = planned(options("--mode", "agg"))
    assert list(plans) == ["frontend", "aggregated"]
    line = command(plans["aggregated"], options("--mode", "agg"), ETCD)
    assert line[line.index("decode") + 1 :][:2] == ["--disaggregation-mode", "null"]
    assert "--disaggregation-bootstrap-port" not in line


def test_several_workers_of_a_role_are_numbered():
    plans = planned(options("--prefill-workers", "2"))
    assert list(plans) == ["frontend", "prefill-1", "prefill-2", "decode"]
    assert len({port for plan in plans.values() for port in plan.ports}) == 2 + 3 + 3 + 2


def test_every_process_hears_of_the_same_etcd_and_namespace():
    chosen = options("--namespace", "blue")
    for plan in planned(chosen).values():
        flags = flags_of(command(plan, chosen, ETCD))
        assert flags["--etcd-endpoints"] == ETCD
        assert flags["--namespace"] == "blue"


def test_workers_get_their_own_ports_the_model_and_the_operators_flags_last():
    chosen = ClusterOptions(device="cpu", model_path="org/model", native_args=("--mem-fraction-static", "0.5"))
    plan = planned(chosen)["prefill"]
    line = command(plan, chosen, ETCD)
    flags = flags_of(line)
    assert flags["--port"] == str(plan.grpc_port)
    assert flags["--system-port"] == str(plan.http_port)
    assert flags["--disaggregation-bootstrap-port"] == str(plan.bootstrap_port)
    assert (flags["--model-path"], flags["--device"]) == ("org/model", "cpu")
    assert line[-2:] == ["--mem-fraction-static", "0.5"]


def test_the_frontend_gets_none_of_the_workers_flags():
    chosen = ClusterOptions(native_args=("--tp", "2"))
    assert "--tp" not in command(planned(chosen)["frontend"], chosen, ETCD)


def test_workers_leave_the_loopback_address_only_for_an_etcd_that_others_use():
    assert options("--host", "0.0.0.0").worker_host == "127.0.0.1"
    assert options("--host", "0.0.0.0", "--etcd-endpoints", "10.0.0.1:2379").worker_host == "0.0.0.0"


def test_flags_can_come_from_the_environment():
    assert options(KVBATON_MODE="agg", KVBATON_HTTP_PORT="9000").http_port == 9000


@pytest.mark.parametrize("arguments", [("--mode", "both"), ("--decode-workers", "0"), ("--grpc-port", "70000")])
def test_nonsense_is_refused(arguments: tuple[str, str]):
    with pytest.raises(ConfigError, match=arguments[0]):
        options(*arguments)


class TestEnvironment:
    CPU = ClusterOptions(device="cpu")
    PREFILL = ProcessPlan("prefill", Role.PREFILL, 0)
    DECODE = ProcessPlan("decode", Role.DECODE, 1)

    def test_two_workers_on_a_cpu_use_one_thread_each(self):
        assert environment(self.PREFILL, self.CPU, {})["OMP_NUM_THREADS"] == "1"

    def test_the_operators_number_of_threads_stays(self):
        assert environment(self.PREFILL, self.CPU, {"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"

    def test_one_worker_alone_may_use_what_there_is(self):
        alone = ClusterOptions(mode="agg", device="cpu")
        assert "OMP_NUM_THREADS" not in environment(ProcessPlan("aggregated", Role.AGGREGATED, 0), alone, {})

    def test_each_worker_has_gpus_of_its_own(self):
        cuda = ClusterOptions(device="cuda", native_args=("--tp", "2"))
        assert environment(self.PREFILL, cuda, {})["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert environment(self.DECODE, cuda, {})["CUDA_VISIBLE_DEVICES"] == "2,3"

    def test_variables_that_contradict_our_own_etcd_are_left_out(self):
        inherited = {"KVBATON_ETCD_TLS_CA": "ca.pem", "KVBATON_TLS_CERT": "cert.pem", "KVBATON_LOG_FORMAT": "json"}
        env = environment(self.DECODE, self.CPU, inherited)
        assert {name for name in env if name.startswith("KVBATON_")} == {"KVBATON_LOG_FORMAT"}

    def test_one_process_can_have_variables_of_its_own(self):
        chosen = ClusterOptions(device="cpu", env={"prefill": {"NIXL_TELEMETRY_ENABLE": "y"}})
        assert environment(self.PREFILL, chosen, {})["NIXL_TELEMETRY_ENABLE"] == "y"
        assert "NIXL_TELEMETRY_ENABLE" not in environment(self.DECODE, chosen, {})

    def test_children_find_the_package_from_any_folder(self):
        root = Path(__file__).parents[3]
        assert environment(self.DECODE, self.CPU, {"PYTHONPATH": "x"})["PYTHONPATH"] == f"{root}:x"


def test_gpus_come_from_those_that_are_visible():
    assert gpus_of(1, 1, "4,6") == "6"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=4"):
        gpus_of(1, 1, "4")


@pytest.mark.parametrize(
    ("arguments", "gpus"),
    [
        ((), 1),
        (("--tp", "4"), 4),
        (("--tensor-parallel-size=2", "--pp", "2"), 4),
        (("--tp", "2", "--dp", "2"), 4),
        (("--tp", "2", "--dp", "2", "--enable-dp-attention"), 2),
    ],
)
def test_gpus_that_sglangs_flags_ask_for(arguments: tuple[str, ...], gpus: int):
    assert gpus_per_worker(arguments) == gpus
