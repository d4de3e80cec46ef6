"""deploy/k8s: valid for Kubernetes, and true of the processes that it starts."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml

from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.frontend.server import SERVICE_NAMES as FRONTEND_SERVICES
from services.registry.local import find_binary
from services.requests import Role
from services.version import own_version
from services.worker import host as worker_host
from services.worker.engines import sglang
from services.worker.host import SERVICE_NAMES as WORKER_SERVICES
from tests.support.commands import environment_names, parse
from tests.unit.deploy.conftest import ROOT, Resource, render

# Kubernetes versions that the manifests are for: the oldest with the sleep action of preStop on by default, and newer.
VERSIONS = ("1.30", "1.33", "1.37")
PREFILL, DECODE, FRONTEND = "kvbaton-prefill", "kvbaton-decode", "kvbaton-frontend"


def of_kind(resources: list[Resource], kind: str) -> dict[str, Resource]:
    return {resource["metadata"]["name"]: resource for resource in resources if resource["kind"] == kind}


def pods(resources: list[Resource]) -> dict[str, Resource]:
    """Pod templates by the name of what makes them."""
    makers = {**of_kind(resources, "Deployment"), **of_kind(resources, "StatefulSet")}
    return {name: maker["spec"]["template"] for name, maker in makers.items()}


def our_pods(resources: list[Resource]) -> dict[str, Resource]:
    return {name: pod for name, pod in pods(resources).items() if name != "kvbaton-etcd"}


def container_of(pod: Resource) -> Resource:
    (container,) = pod["spec"]["containers"]
    return container


def ports_of(pod: Resource) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(pod)["ports"]}


def environment_of(pod: Resource, resources: list[Resource]) -> dict[str, str]:
    """As the container sees it; what only a cluster knows gets a value of the same form."""
    container = container_of(pod)
    values = {"status.podIP": "10.1.2.3", "metadata.name": "kvbaton-worker-7c9f-x2v"}
    environ: dict[str, str] = {}
    for source in container["envFrom"]:
        environ |= of_kind(resources, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", []):
        if "value" in variable:
            environ[variable["name"]] = variable["value"]
        elif "fieldRef" in variable["valueFrom"]:
            environ[variable["name"]] = values[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    return environ


def config_of(pod: Resource, resources: list[Resource]) -> FrontendConfig | WorkerConfig:
    return parse(container_of(pod)["args"], environment_of(pod, resources))


def worker_configs(resources: list[Resource]) -> dict[str, WorkerConfig]:
    configs = {name: config_of(pod, resources) for name, pod in our_pods(resources).items()}
    return {name: config for name, config in configs.items() if isinstance(config, WorkerConfig)}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_valid(overlay: list[Resource], version: str) -> None:
    for resource in overlay:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_overlays_have_the_services_of_the_reference(agg: list[Resource], disagg: list[Resource]) -> None:
    assert set(pods(agg)) == {FRONTEND, DECODE, "kvbaton-etcd"}
    assert set(pods(disagg)) == {FRONTEND, PREFILL, DECODE, "kvbaton-etcd"}
    assert {name: config.role for name, config in worker_configs(agg).items()} == {DECODE: Role.AGGREGATED}
    assert {name: config.role for name, config in worker_configs(disagg).items()} == {
        PREFILL: Role.PREFILL,
        DECODE: Role.DECODE,
    }
    for maker in of_kind(agg + disagg, "Deployment").values():
        assert maker["spec"]["replicas"] == 1


def test_each_worker_has_one_gpu_and_nobody_else_any(overlay: list[Resource]) -> None:
    for name, pod in pods(overlay).items():
        gpus = container_of(pod)["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("1" if name in (PREFILL, DECODE) else None), name


def test_the_command_lines_are_accepted_and_listen_where_the_manifest_says(overlay: list[Resource]) -> None:
    for name, pod in our_pods(overlay).items():
        config = config_of(pod, overlay)
        assert container_of(pod)["command"] == ["kvbaton"]
        assert config.host == "0.0.0.0", name
        expected = {"grpc": config.port}
        if isinstance(config, FrontendConfig):
            expected["http"] = config.http_port
        else:
            expected["system"] = config.system_port
            if config.role is Role.PREFILL:
                expected["bootstrap"] = config.disaggregation_bootstrap_port
        assert ports_of(pod) == expected, name


def test_workers_advertise_their_pod_and_agree_on_what_a_page_is(overlay: list[Resource]) -> None:
    for config in worker_configs(overlay).values():
        assert config.advertise_host == "10.1.2.3"
        assert config.instance_id == "kvbaton-worker-7c9f-x2v"
        assert (config.model_path, config.served_model_name) == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
        assert (config.page_size, config.device, config.engine) == (16, "cuda", "sglang")
        assert config.disaggregation_bootstrap_port == 12345


def test_the_flags_of_the_reference_reach_the_engine(agg: list[Resource], disagg: list[Resource]) -> None:
    for config in (*worker_configs(agg).values(), *worker_configs(disagg).values()):
        assert config.native_args == (), "Baton knows them all itself"
        assert config.skip_tokenizer_init
        expected = {"tp_size": 1, "trust_remote_code": True, "page_size": 16, "enable_metrics": True}
        assert config.engine_fields == expected


def test_every_variable_is_one_that_the_process_reads(overlay: list[Resource]) -> None:
    for name, pod in our_pods(overlay).items():
        known = environment_names(type(config_of(pod, overlay)))
        ours = {variable for variable in environment_of(pod, overlay) if variable.startswith("KVBATON_")}
        assert ours, "or this test looks for the wrong thing"
        assert ours <= known, name
        # A Service called kvbaton-x would otherwise put KVBATON_X_PORT=tcp://... into every container.
        assert pod["spec"]["enableServiceLinks"] is False


def test_frontend_and_workers_meet_in_the_etcd_that_is_deployed(overlay: list[Resource]) -> None:
    etcd = of_kind(overlay, "Service")["kvbaton-etcd"]["spec"]["ports"]
    (client,) = [port["port"] for port in etcd if port["name"] == "client"]
    for pod in our_pods(overlay).values():
        config = config_of(pod, overlay)
        assert config.etcd.endpoints == [f"kvbaton-etcd:{client}"]
        assert config.etcd.namespace == "default"


def test_a_pods_probes_ask_what_exists(overlay: list[Resource]) -> None:
    for name, pod in our_pods(overlay).items():
        container, ports = container_of(pod), ports_of(pod)
        services = FRONTEND_SERVICES if name == FRONTEND else WORKER_SERVICES
        http_port = "http" if name == FRONTEND else "system"
        for probe in (container["startupProbe"], container["readinessProbe"]):
            if "grpc" in probe:
                assert probe["grpc"]["port"] == ports["grpc"]
                assert probe["grpc"]["service"] in services
        assert "grpc" in container["readinessProbe"]
        # NOT_SERVING while loading, draining or without workers is no reason to restart anything.
        assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": http_port}
        annotations = pod["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(ports[http_port])
        assert annotations["prometheus.io/path"] == "/metrics"


def test_a_worker_may_load_for_an_hour_and_a_frontend_wait_as_long_for_it(disagg: list[Resource]) -> None:
    for name in (PREFILL, DECODE):
        probe = container_of(pods(disagg)[name])["startupProbe"]
        assert "grpc" in probe
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600
        deadline = of_kind(disagg, "Deployment")[name]["spec"]["progressDeadlineSeconds"]
        assert deadline > probe["periodSeconds"] * probe["failureThreshold"]
    assert container_of(pods(disagg)[FRONTEND])["startupProbe"]["httpGet"]["path"] == "/live"


def test_the_grace_period_covers_the_whole_shutdown(overlay: list[Resource]) -> None:
    for name, pod in our_pods(overlay).items():
        config = config_of(pod, overlay)
        pre_stop = container_of(pod).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = pre_stop + config.drain_timeout
        if isinstance(config, WorkerConfig):
            record = 2 * 3.0  # RecordPublisher.withdraw and .delete, when etcd doesn't answer
            needed += config.drain_grace + worker_host._ABORT_GRACE + record + sglang._KILL_TIMEOUT_S
        else:
            assert pre_stop > 0, (
                "the Service needs a moment to forget the pod; new requests are refused from SIGTERM on"
            )
        assert pod["spec"]["terminationGracePeriodSeconds"] >= needed + 5, name


def test_nothing_runs_as_root_or_with_more_than_it_needs(overlay: list[Resource]) -> None:
    for name, pod in pods(overlay).items():
        context, container = pod["spec"]["securityContext"], container_of(pod)
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] >= 10000
        assert context["seccompProfile"]["type"] == "RuntimeDefault"
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
        assert "memory" in container["resources"]["limits"]


def test_the_hub_token_is_a_secret_that_may_be_missing(overlay: list[Resource]) -> None:
    for name in worker_configs(overlay):
        (token,) = [v for v in container_of(pods(overlay)[name])["env"] if v["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "hf-token-secret", "key": "HF_TOKEN", "optional": True}


def test_workers_have_shared_memory(overlay: list[Resource]) -> None:
    for name in worker_configs(overlay):
        pod = pods(overlay)[name]
        mounts = {mount["mountPath"]: mount["name"] for mount in container_of(pod)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_services_and_budgets_select_their_pods_and_name_their_ports(overlay: list[Resource]) -> None:
    makers = pods(overlay)
    for name, service in of_kind(overlay, "Service").items():
        pod = makers[name]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        for port in service["spec"]["ports"]:
            assert ports_of(pod)[port["targetPort"]] == port["port"]
        assert (service["spec"].get("clusterIP") == "None") == (name != FRONTEND)
    for name, budget in of_kind(overlay, "PodDisruptionBudget").items():
        assert budget["spec"]["selector"]["matchLabels"].items() <= makers[name]["metadata"]["labels"].items()
        assert budget["spec"]["maxUnavailable"] == 1
    assert set(of_kind(overlay, "PodDisruptionBudget")) == set(our_pods(overlay))


def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' label selectors, as far as the policies use them."""
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", [])
    )


def allowed(resources: list[Resource], source: str, target: str, port: int) -> bool:
    """Whether the policies let a pod of `source` (a Deployment, "prometheus" or "stranger") reach the port."""
    makers = pods(resources)
    labels = makers[target]["metadata"]["labels"]
    policies = [p["spec"] for p in of_kind(resources, "NetworkPolicy").values()]
    policies = [policy for policy in policies if selected(policy["podSelector"], labels)]
    assert policies, f"nothing protects {target}"

    def admits(peer: dict[str, Any]) -> bool:
        if "namespaceSelector" in peer:
            return source == "prometheus"
        return source in makers and selected(peer["podSelector"], makers[source]["metadata"]["labels"])

    def covers(entry: dict[str, Any]) -> bool:
        first = ports_of(makers[target])[entry["port"]] if isinstance(entry["port"], str) else entry["port"]
        return first <= port <= entry.get("endPort", first)

    return any(
        any(map(covers, rule["ports"])) and ("from" not in rule or any(map(admits, rule["from"])))
        for policy in policies
        for rule in policy["ingress"]
    )


@pytest.mark.parametrize(
    ("source", "target", "port", "expected"),
    [
        (FRONTEND, PREFILL, 50061, True),
        (FRONTEND, DECODE, 50062, True),
        (PREFILL, DECODE, 50062, True),
        (DECODE, PREFILL, 50061, True),  # CheckPeer, and the bootstrap server below
        (DECODE, PREFILL, 12345, True),
        (DECODE, PREFILL, 41234, True),  # ZMQ and NIXL, on ports of the system's choice
        (PREFILL, DECODE, 41234, True),
        (FRONTEND, PREFILL, 12345, False),
        (FRONTEND, DECODE, 41234, False),
        ("stranger", PREFILL, 50061, False),
        ("stranger", PREFILL, 12345, False),
        ("stranger", DECODE, 41234, False),
        ("stranger", DECODE, 8082, False),
        ("stranger", FRONTEND, 50051, True),
        ("stranger", FRONTEND, 8000, True),
        ("prometheus", PREFILL, 8081, True),
        ("prometheus", DECODE, 8082, True),
        ("prometheus", DECODE, 50062, False),
        (FRONTEND, "kvbaton-etcd", 2379, True),
        (PREFILL, "kvbaton-etcd", 2379, True),
        ("stranger", "kvbaton-etcd", 2379, False),
        ("prometheus", "kvbaton-etcd", 2381, True),
    ],
)
def test_who_may_reach_what(disagg: list[Resource], source: str, target: str, port: int, *, expected: bool) -> None:
    assert allowed(disagg, source, target, port) is expected


def test_images_are_pinned(overlay: list[Resource]) -> None:
    for name, pod in pods(overlay).items():
        tag = container_of(pod)["image"].rpartition(":")[2]
        assert tag == own_version() if name != "kvbaton-etcd" else re.fullmatch(r"v3\.[56]\.\d+", tag), name


def test_etcd_has_a_volume_and_flags_that_it_knows(overlay: list[Resource]) -> None:
    etcd = of_kind(overlay, "StatefulSet")["kvbaton-etcd"]
    container = container_of(etcd["spec"]["template"])
    flags = dict(argument.partition("=")[::2] for argument in container["args"])
    (claim,) = etcd["spec"]["volumeClaimTemplates"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert flags["--data-dir"].startswith(mounts[claim["metadata"]["name"]] + "/")
    done = subprocess.run([find_binary(), "--help"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"--[a-z-]+", done.stdout + done.stderr))
    assert flags.keys() <= known


def test_the_readmes_overlay_for_an_external_etcd_leaves_ours_out(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "k8s" / "README.md").read_text()
    (example,) = re.findall(r"```yaml\n(# overlays/mine.*?)```", text, re.DOTALL)
    copy = tmp_path / "k8s"
    shutil.copytree(ROOT / "deploy" / "k8s", copy)
    (copy / "overlays" / "mine").mkdir()
    (copy / "overlays" / "mine" / "kustomization.yaml").write_text(example)
    resources = render(copy / "overlays" / "mine")
    assert set(pods(resources)) == {FRONTEND, PREFILL, DECODE}
    for pod in pods(resources).values():
        config = config_of(pod, resources)
        assert config.etcd.endpoints == ["etcd-0.example.com:2379", "etcd-1.example.com:2379"]
        assert config.etcd.etcd_tls_ca is not None
        mounts = [mount["mountPath"] for mount in container_of(pod)["volumeMounts"]]
        assert str(config.etcd.etcd_tls_ca.parent) in mounts


def test_every_manifest_is_part_of_an_overlay() -> None:
    files = {path for path in (ROOT / "deploy" / "k8s").rglob("*.yaml") if path.name != "kustomization.yaml"}
    used = {
        (folder.parent / name).resolve()
        for folder in (ROOT / "deploy" / "k8s").rglob("kustomization.yaml")
        for name in yaml.safe_load(folder.read_text())["resources"]
        if name.endswith(".yaml")
    }
    assert files == used
