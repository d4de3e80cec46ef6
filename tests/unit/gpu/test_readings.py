"""Numbers out of what other programs print: NIXL's telemetry, nvidia-smi, workers' and frontends' logs."""

import argparse
import json

import pytest

from benchmarks.gpu.fleet import attempts_in
from benchmarks.gpu.startup import startup
from benchmarks.gpu.transfers import gpu_rows, sent_bytes
from benchmarks.gpu.variants import variant

# As a prefill worker wrote it, SGLang's lines between.
WORKER_LOG = """\
[2026-11-23 05:22:51 sglang 30819] INFO sglang.srt.server_args: "worker state" of another kind
{"state": "loading", "previous": "starting", "seconds": 0.04, "event": "worker state", "timestamp": "2026-11-23T05:22:49.446990Z"}
{"state": "warming", "previous": "loading", "seconds": 57.74, "event": "worker state", "timestamp": "2026-11-23T05:23:47.188549Z"}
{"state": "serving", "previous": "warming", "seconds": 0.24, "event": "worker state", "timestamp": "2026-11-23T05:23:47.430834Z"}
{"instance_id": "prefill-0", "event": "registered", "level": "info", "timestamp": "2026-11-23T05:23:47.438503Z"}
{"state": "draining", "previous": "serving", "seconds": 30.58, "event": "worker state", "timestamp": "2026-11-23T05:24:18.012852Z"}
""".splitlines()  # noqa: E501 - as it was
TELEMETRY = """\
# TYPE agent_tx_bytes_total counter
agent_tx_bytes_total{category="NIXL_TELEMETRY_TRANSFER",hostname="vm",agent_name="a"} 738880
agent_tx_bytes_total{category="NIXL_TELEMETRY_TRANSFER",hostname="vm",agent_name="b"} 1600
# TYPE agent_rx_bytes_total counter
agent_rx_bytes_total{agent_name="a"} 5
"""


def test_start_up_beyond_the_engine() -> None:
    found = startup(WORKER_LOG)
    assert found is not None
    assert found["loading_s"] == 57.74
    assert found["registered_s"] == pytest.approx(58.03, abs=0.01)
    assert found["beyond_s"] == pytest.approx(0.29, abs=0.01)


def test_a_worker_that_was_never_registered_has_no_start_up() -> None:
    assert startup(WORKER_LOG[:4]) is None
    assert startup([]) is None


def test_bytes_sent_are_those_of_all_agents() -> None:
    assert sent_bytes(TELEMETRY) == 740_480
    assert sent_bytes("# TYPE agent_rx_bytes_total counter\nagent_rx_bytes_total 5\n") is None


def test_memory_of_each_gpu() -> None:
    assert list(gpu_rows("0, 22310, 143771\n1, 5, 143771\n")) == [
        {"gpu": 0, "used_mib": 22310, "total_mib": 143771},
        {"gpu": 1, "used_mib": 5, "total_mib": 143771},
    ]


def test_attempts_of_one_request() -> None:
    ended = [
        {"event": "request ended", "request_id": name, "attempts": count} for name, count in (("a-2", 1), ("a", 3))
    ]
    lines = ["listening on a", *map(json.dumps, ended)]
    assert attempts_in(lines, "a") == 3
    assert attempts_in(lines, "b") is None


def test_a_variant_is_flags_and_variables() -> None:
    found = variant("early=--optimistic-prefill-attempts 1 SGLANG_DISAGG_STAGING_BUFFER=1 --kv-cache-dtype=auto")
    assert found.name == "early"
    assert found.flags == ("--optimistic-prefill-attempts", "1", "--kv-cache-dtype=auto")
    assert found.env == {"SGLANG_DISAGG_STAGING_BUFFER": "1"}


@pytest.mark.parametrize("text", ["--flag", "no name=--flag", "=--flag"])
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=FLAGS"):
        variant(text)
