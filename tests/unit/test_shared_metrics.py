"""One page of several processes' metrics: sums, exact and never lower, whatever becomes of a process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Gauge
from prometheus_client.parser import text_string_to_metric_families

from services.telemetry import metrics
from services.telemetry.shared import RemovableGauge, forget_process, shared_page

ROOT = Path(__file__).parents[2]

_PROCESS = """
import sys, time
from pathlib import Path
from services.telemetry.shared import share_metrics
share_metrics(Path(sys.argv[1]), int(sys.argv[2]))
from services.telemetry import metrics
exec(sys.argv[3])
print("done", flush=True)
sys.stdin.read()
"""


class Sharing:
    """Processes that share a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[int, subprocess.Popen[str]] = {}

    def start(self, number: int, does: str) -> None:
        """Returns when it has done that; it lives on."""
        command = [sys.executable, "-c", _PROCESS, str(self.folder), str(number), does]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        self._processes[number] = process
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"

    def kill(self, number: int) -> None:
        process = self._processes.pop(number)
        process.kill()
        process.communicate()
        forget_process(self.folder, number)

    def page(self) -> dict[tuple[str, str], float]:
        """Every sample by its name and its labels as JSON."""
        text = asyncio.run(shared_page(self.folder)).decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        page = {(sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value for sample in samples}
        assert len(page) == len(samples), "no sample twice"
        return page

    def stop(self) -> None:
        for number in list(self._processes):
            self.kill(number)


@pytest.fixture
def sharing(tmp_path: Path):
    sharing = Sharing(tmp_path)
    yield sharing
    sharing.stop()


FINISHED = ("kvbaton_requests_total", '{"model": "m", "outcome": "finished"}')
OUTCOME = "metrics.REQUESTS.labels('m', 'finished')"


def test_counters_are_the_sum_and_outlive_their_process(sharing: Sharing) -> None:
    sharing.start(1, f"{OUTCOME}.inc(3)")
    sharing.start(2, f"{OUTCOME}.inc(4)")
    assert sharing.page()[FINISHED] == 7
    sharing.kill(2)
    assert sharing.page()[FINISHED] == 7
    sharing.start(2, f"{OUTCOME}.inc(10)")
    assert sharing.page()[FINISHED] == 17
    files = {file.name for file in sharing.folder.iterdir()}
    for _ in range(2):
        sharing.kill(2)
        sharing.start(2, f"{OUTCOME}.inc()")
    assert sharing.page()[FINISHED] == 19
    assert {file.name for file in sharing.folder.iterdir()} == files, "none for each start"


def test_histograms_add_up(sharing: Sharing) -> None:
    observe = (
        "metrics.TIME_TO_FIRST_TOKEN_SECONDS.labels('m').observe(0.2)\n"
        "metrics.INTER_TOKEN_LATENCY_SECONDS.of('m').observe(0.08, 8)\n"
    )
    sharing.start(1, observe)
    sharing.start(2, observe * 2)
    sharing.kill(2)
    sharing.start(2, observe)
    page = sharing.page()
    for name, labels, value in (
        ("kvbaton_time_to_first_token_seconds_count", {}, 4),
        ("kvbaton_time_to_first_token_seconds_sum", {}, 0.8),
        ("kvbaton_time_to_first_token_seconds_bucket", {"le": "0.1"}, 0),
        ("kvbaton_time_to_first_token_seconds_bucket", {"le": "0.25"}, 4),
        ("kvbaton_time_to_first_token_seconds_bucket", {"le": "+Inf"}, 4),
        ("kvbaton_inter_token_latency_seconds_count", {}, 32),
        ("kvbaton_inter_token_latency_seconds_sum", {}, 0.32),
        ("kvbaton_inter_token_latency_seconds_bucket", {"le": "0.0075"}, 0),
        ("kvbaton_inter_token_latency_seconds_bucket", {"le": "0.01"}, 32),
        ("kvbaton_inter_token_latency_seconds_bucket", {"le": "+Inf"}, 32),
    ):
        assert page[name, json.dumps({"model": "m", **labels}, sort_keys=True)] == pytest.approx(value), (name, labels)


def test_gauges_are_of_those_that_live(sharing: Sharing) -> None:
    do = (
        "metrics.LIVE_REQUESTS.set({0})\n"
        "metrics.ROUTABLE_WORKERS.labels('decode').set({0})\n"
        "metrics.KV_INDEX_PAGES.set({0})\n"
    )
    sharing.start(1, do.format(2))
    sharing.start(2, do.format(5))

    def seen() -> tuple[float, float, float]:
        page = sharing.page()
        routable = page["kvbaton_routable_workers", '{"role": "decode"}']
        return page["kvbaton_live_requests", "{}"], routable, page["kvbaton_kv_index_pages", "{}"]

    assert seen() == (7, 2, 5)
    sharing.kill(2)
    assert seen() == (2, 2, 2)
    sharing.start(2, "")
    assert seen() == (2, 2, 2), "a new process begins without its predecessor's"


def test_a_removed_label_is_gone_once_all_have_removed_it(sharing: Sharing) -> None:
    exact = ("kvbaton_kv_index_exact", '{"role": "decode", "worker": "w"}')
    sharing.start(1, "metrics.KV_INDEX_EXACT.labels('decode', 'w').set(1)")
    sharing.start(
        2, "metrics.KV_INDEX_EXACT.labels('decode', 'w').set(0)\nmetrics.KV_INDEX_EXACT.remove('decode', 'w')"
    )
    assert sharing.page()[exact] == 1
    sharing.kill(1)
    assert exact not in sharing.page()
    sharing.start(1, "metrics.KV_INDEX_EXACT.labels('decode', 'w').set(0)")
    assert sharing.page()[exact] == 0


def test_the_age_of_the_registry_view_is_the_oldest_that_is_known(sharing: Sharing) -> None:
    age = ("kvbaton_registry_age_seconds", "{}")
    watch = "import asyncio\nasync def watch(): metrics.watch_registry(lambda: {})\nasyncio.run(watch())"
    sharing.start(1, watch.format(None))
    assert age not in sharing.page()
    sharing.start(2, watch.format(500))
    assert sharing.page()[age] == 500
    sharing.start(1, watch.format(7))
    assert sharing.page()[age] == 500


def test_each_process_has_its_own_line_of_what_it_uses(sharing: Sharing) -> None:
    sharing.start(1, "")
    sharing.start(2, "")

    def processes() -> set[str]:
        return {labels for name, labels in sharing.page() if name == "process_cpu_seconds_total"}

    assert processes() == {'{"process": "1"}', '{"process": "2"}'}
    sharing.kill(1)
    assert processes() == {'{"process": "2"}'}


def test_the_page_has_every_metric_by_its_name_and_labels(sharing: Sharing) -> None:
    """What is written in a process comes out as a process alone would show it, but for creation times."""
    does = """
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from services.telemetry.gaps import GapHistogram
for name, metric in vars(metrics).items():
    if isinstance(metric, GapHistogram):
        metric.of("a").observe(1.0, 1)
    elif isinstance(metric, (Counter, Gauge, Histogram)):
        one = metric.labels(*["a" for _ in metric._labelnames]) if metric._labelnames else metric
        (one.observe if isinstance(metric, Histogram) else one.inc)(1)
"""
    sharing.start(1, does)
    program = f"from services.telemetry import metrics\n{does}\nprint(generate_latest(REGISTRY).decode())"
    alone = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    families = text_string_to_metric_families(alone)
    expected = {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("kvbaton_") and not sample.name.endswith("_created")
    }
    assert len(expected) > 100
    assert {key: value for key, value in sharing.page().items() if key[0].startswith("kvbaton_")} == expected


def test_every_gauge_says_what_stands_for_several_processes() -> None:
    gauges = [metric for metric in vars(metrics).values() if isinstance(metric, Gauge)]
    modes = {gauge._multiprocess_mode for gauge in gauges}  # pyright: ignore[reportPrivateUsage]
    assert modes == {"livesum", "livemin", "livemax"}, "others add a label to it, or outlive their process"
    removable = [gauge for gauge in gauges if isinstance(gauge, RemovableGauge)]
    assert {gauge._multiprocess_mode for gauge in removable} == {"livemin"}  # pyright: ignore[reportPrivateUsage]


def test_a_process_alone_keeps_its_metrics_to_itself() -> None:
    assert metrics.LIVE_REQUESTS in set(REGISTRY._collector_to_names)  # pyright: ignore[reportPrivateUsage]
    metrics.KV_INDEX_EXACT.labels("decode", "gone").set(1)
    metrics.KV_INDEX_EXACT.remove("decode", "gone")
    assert REGISTRY.get_sample_value("kvbaton_kv_index_exact", {"role": "decode", "worker": "gone"}) is None
