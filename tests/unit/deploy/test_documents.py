"""docs/operations.md and docs/troubleshooting.md say what the code does."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.modes import mode_of
from services.requests import Role
from services.tools.client_flags import ClientFlags
from tests.support.commands import environment_names
from tests.unit.deploy.conftest import ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
BLOCKS = re.findall(r"```text\n(.*?)```", TROUBLESHOOTING, re.DOTALL)
MESSAGES = [line for block in BLOCKS for line in block.splitlines()]
SHORTEST = 4  # characters of a fixed part that says anything


def source_strings() -> list[str]:
    """Every string of the services, and the scripts' text; f-strings in their fixed parts."""
    strings = [path.read_text() for path in (ROOT / "deploy" / "local").glob("*.sh")]
    for path in (ROOT / "services").rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        strings.extend(value for value in constants if isinstance(value, str))
    return strings


STRINGS = source_strings()


def occurs(text: str) -> bool:
    """In one string, or put together of two: a message may begin with a variable that holds its first words."""
    if any(text in string for string in STRINGS):
        return True
    for index, character in enumerate(text):
        left, right = text[:index], text[index:]
        if character == " " and min(len(left), len(right)) >= SHORTEST:
            whole_left = any(string.endswith(left) for string in STRINGS)
            if whole_left and any(string.startswith(right) for string in STRINGS):
                return True
    return False


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    fixed = [part for part in re.split(r"<[^>]*>", message) if len(part.strip()) >= SHORTEST]
    assert fixed, "a message without fixed words helps nobody"
    for part in fixed:
        assert occurs(part) or occurs(part.strip()), f"nothing says {part!r}"


def test_the_references_four_cases_are_there() -> None:
    headings = re.findall(r"^## (.+)", TROUBLESHOOTING, re.MULTILINE)
    for case in ("health check", "Prefill and decode", "memory", "downloaded"):
        assert any(case in heading for heading in headings), case


def test_the_ports_are_the_defaults() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| `--([\w-]+)` \|", OPERATIONS, re.MULTILINE)
    table = {(process, flag): int(port) for port, process, flag in rows}
    frontend = FrontendConfig()
    prefill, decode = (
        WorkerConfig(model_path="m").completed(mode=mode_of(role)) for role in (Role.PREFILL, Role.DECODE)
    )
    assert table == {
        ("frontend", "port"): frontend.port,
        ("frontend", "http-port"): frontend.http_port,
        ("prefill", "port"): prefill.port,
        ("prefill", "system-port"): prefill.system_port,
        ("prefill", "disaggregation-bootstrap-port"): prefill.disaggregation_bootstrap_port,
        ("decode", "port"): decode.port,
        ("decode", "system-port"): decode.system_port,
        ("etcd", "etcd-endpoints"): int(frontend.etcd.endpoints[0].rpartition(":")[2]),
    }


def test_flags_and_variables_exist() -> None:
    variables = environment_names(FrontendConfig) | environment_names(WorkerConfig)
    variables |= environment_names(ClientFlags)
    # SGLang's own, the mode of `kvbaton prefill|decode`, and the flag that exports traces.
    others = {"--tp", "--mem-fraction-static", "--disaggregation-mode", "--enable-otel"}
    for text in (OPERATIONS, TROUBLESHOOTING, (ROOT / "deploy" / "k8s" / "README.md").read_text()):
        for flag in set(re.findall(r"`(--[a-z][a-z-]+)", text)) - others:
            assert "KVBATON_" + flag[2:].replace("-", "_").upper() in variables, flag
        for variable in re.findall(r"\bKVBATON_[A-Z_]+", text):
            assert variable in variables, variable


def test_every_alert_has_its_row() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "observability" / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert set(re.findall(r"`(Kvbaton\w+)`", OPERATIONS)) == alerts


def test_the_grace_periods_are_the_manifests() -> None:
    (worker, frontend) = re.findall(r"Kubernetes: (\d+) s\s+for workers, (\d+) s for frontends", OPERATIONS)[0]
    for name, seconds in (("prefill", worker), ("decode", worker), ("frontend", frontend)):
        manifest = (ROOT / "deploy" / "k8s" / name / f"{name}.yaml").read_text()
        assert f"terminationGracePeriodSeconds: {seconds}\n" in manifest
