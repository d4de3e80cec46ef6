"""deploy/observability: every metric, label, port and address in it exists in the code, in SGLang or in Prometheus."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.modes import mode_of
from services.requests import Role
from services.telemetry import metrics
from services.telemetry.gaps import GapHistogram
from tests.unit.deploy.conftest import ROOT, Resource

FOLDER = ROOT / "deploy" / "observability"
# From the scrape configuration, Prometheus itself, and prometheus_client's process collector.
COMMON_LABELS = {"job", "instance", "pod", "component", "namespace"}
OTHER_METRICS = {"up", "process_start_time_seconds"}


def own_metrics() -> dict[str, set[str]]:
    """Every sample name that services/telemetry/metrics.py can export, with its labels."""
    samples: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, GapHistogram):
            samples |= {f"{metric.name}_{part}": {"model", "le"} for part in ("bucket", "sum", "count")}
        if not isinstance(metric, Counter | Gauge | Histogram):
            continue
        labels = set(metric._labelnames)
        if isinstance(metric, Counter):
            samples[f"{metric._name}_total"] = labels
        elif isinstance(metric, Gauge):
            samples[metric._name] = labels
        else:
            samples |= {f"{metric._name}_{part}": labels | {"le"} for part in ("bucket", "sum", "count")}
    assert "kvbaton_requests_total" in samples
    return samples


def sglang_metrics() -> set[str]:
    """Names in SGLang's source, and what Prometheus makes of its histograms."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    names: set[str] = set()
    for path in (Path(spec.submodule_search_locations[0]) / "srt").rglob("*metrics_collector*.py"):
        names |= set(re.findall(r'"(sglang:\w+)"', path.read_text()))
    assert "sglang:num_running_reqs" in names
    return names | {f"{name}_{part}" for name in names for part in ("bucket", "sum", "count")}


def dashboard() -> Resource:
    return json.loads((FOLDER / "grafana-dashboard.json").read_text())


def rules() -> list[Resource]:
    return [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each one stands, and what it is."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} {target['refId']}", target["expr"].replace("$__rate_interval", "5m")
    for rule in rules():
        yield rule["alert"], rule["expr"]


def nodes(expression: Any) -> Iterator[Any]:
    """An expression of PromQL and everything below it."""
    yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        child = getattr(expression, name, None)
        if child is not None:
            yield from nodes(child)
    for child in getattr(expression, "args", None) or []:
        yield from nodes(child)


@pytest.mark.parametrize(("where", "text"), list(expressions()), ids=lambda value: value[:40])
def test_expressions_ask_for_metrics_and_labels_that_exist(where: str, text: str) -> None:
    own, foreign = own_metrics(), sglang_metrics() | OTHER_METRICS
    tree = promql_parser.parse(text)
    selectors = [node for node in nodes(tree) if isinstance(node, promql_parser.VectorSelector)]
    assert selectors, "or this test looks for the wrong thing"
    labels: set[str] = set()
    for selector in selectors:
        assert selector.name in own or selector.name in foreign, f"{where}: no metric {selector.name}"
        labels |= own.get(selector.name, {"le"})
        for matcher in selector.matchers.matchers:
            assert matcher.name in COMMON_LABELS | own.get(selector.name, set()), f"{where}: no label {matcher.name}"
    for grouping in re.findall(r"by \(([^)]*)\)", text):
        assert {name.strip() for name in grouping.split(",")} <= COMMON_LABELS | labels, where


def test_legends_and_summaries_use_labels_that_are_left() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            groupings = re.findall(r"by \(([^)]*)\)", target["expr"])
            left = {name.strip() for text in groupings for name in text.split(",")} if groupings else COMMON_LABELS
            assert used <= left, panel["title"]


def test_states_and_outcomes_are_ones_that_are_written() -> None:
    written = "\n".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    for _, text in expressions():
        for values in re.findall(r'(?:state|outcome|phase)=~?"([^"]+)"', text):
            for value in values.split("|"):
                assert re.search(rf'["._]{value}\b', written, re.IGNORECASE), value


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    text = (FOLDER / "grafana-dashboard.json").read_text()
    for name in own_metrics():
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in text, name


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_prometheus_scrapes_the_ports_that_processes_listen_on() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    ports = {
        static["labels"]["component"]: int(static["targets"][0].rpartition(":")[2])
        for static in jobs["kvbaton-local"]["static_configs"]
    }
    workers = {role: WorkerConfig(model_path="m").completed(mode=mode_of(role)) for role in (Role.PREFILL, Role.DECODE)}
    expected = {str(role): config.system_port for role, config in workers.items()}
    assert ports == expected | {"frontend": FrontendConfig().http_port}
    for name in config["rule_files"]:
        assert (FOLDER / name).is_file()


def test_prometheus_finds_the_pods_by_what_the_manifests_give_them(disagg: list[Resource]) -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]}
    (sd,) = jobs["kvbaton"]["kubernetes_sd_configs"]
    label, _, value = sd["selectors"][0]["label"].partition("=")
    sources = {name for rule in jobs["kvbaton"]["relabel_configs"] for name in rule["source_labels"]}
    makers = [resource for resource in disagg if resource["kind"] in ("Deployment", "StatefulSet")]
    for maker in makers:
        metadata = maker["spec"]["template"]["metadata"]
        assert metadata["labels"][label] == value
        for annotation in metadata["annotations"]:
            known = f"__meta_kubernetes_pod_annotation_{re.sub(r'[^a-z]', '_', annotation)}"
            assert known in sources | {rule.get("target_label") for rule in jobs["kvbaton"]["relabel_configs"]}


def test_the_collector_listens_where_the_scripts_send() -> None:
    collector = yaml.safe_load((FOLDER / "otel-collector.yaml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    for name in ("agg.sh", "disagg.sh"):
        assert f"http://localhost:{port}" in (ROOT / "deploy" / "local" / name).read_text()
    pipeline = collector["service"]["pipelines"]["traces"]
    assert set(pipeline["receivers"]) <= collector["receivers"].keys()
    assert set(pipeline["exporters"]) <= collector["exporters"].keys()
