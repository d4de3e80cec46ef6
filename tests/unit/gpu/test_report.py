"""The report changes the sections that were measured, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import DOCUMENT, merge, read
from benchmarks.gpu.report_sections import SECTIONS
from benchmarks.sections import fenced, section_of, with_section

HEAD: dict[str, Any] = {
    "device": "cuda",
    "quick": False,
    "ok": True,
    "when": "2026-12-01 10:00:00",
    "gpus": ["2 x H200"],
    "checks": [{"name": "5 tokens", "ok": True, "said": ""}],
}
SMOKE: dict[str, Any] = {
    **HEAD,
    "versions": "sglang 0.5.17",
    "rows": [{"input_tokens": 5, "equal": True, "ttft_agg_ms": 26.71, "ttft_disagg_ms": 32.4}],
}


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "gpu.md"
    sections = "".join(f"About {stage}.\n\n{fenced(stage, f'old {stage}')}\n" for stage in SECTIONS)
    path.write_text(f"# GPU runs\n\n{sections}The end.\n")
    return path


def test_a_measured_section_is_written_and_the_others_stay(document: Path) -> None:
    before = document.read_text()
    merge(document, {"smoke": SMOKE})
    after = document.read_text()
    assert "| 5 | yes | 26.7 ms | 32.4 ms |" in section_of(after, "smoke")
    assert "Measured on 2026-12-01 on 2 x H200, sglang 0.5.17; all held." in after
    assert with_section(after, "smoke", "old smoke") == before


def test_the_same_twice_changes_nothing_more(document: Path) -> None:
    merge(document, {"smoke": SMOKE})
    once = document.read_text()
    merge(document, {"smoke": SMOKE})
    assert document.read_text() == once


def test_failures_and_what_was_skipped_are_said(document: Path) -> None:
    checks = [
        {"name": "4000 tokens alone", "ok": False, "said": "token 3: 7 and 9"},
        {"name": "real text", "ok": None, "said": "no model"},
    ]
    merge(document, {"parity": {**HEAD, "ok": False, "checks": checks}})
    section = section_of(document.read_text(), "parity")
    assert "NOT all held" in section
    assert "- failed: 4000 tokens alone: token 3: 7 and 9" in section
    assert "- not shown: real text: no model" in section


def test_the_timeline_brings_its_plot(document: Path) -> None:
    row = {"system": "baton", "input_tokens": 500, "moments": {"first_token": 35.25}, "stages": {"prefill": 22.0}}
    merge(document, {"timeline": {**HEAD, "rows": [row], "svg": "<svg/>"}})
    assert document.with_name("gpu-timeline.svg").read_text() == "<svg/>"
    section = section_of(document.read_text(), "timeline")
    assert "| first_token | 35.25 |" in section
    assert "| prefill | 22.00 |" in section


def test_ranks_say_what_held_and_what_could_not_be_shown(document: Path) -> None:
    rows = [{"plan": "tp 2", "mode": "disagg", "ready_s": 51.2, "workers": 2}]
    checks = [
        {"name": "tp 2: every rank writes its heads", "ok": True, "said": "2 processes"},
        {"name": "GPUs of their own for all", "ok": None, "said": "2 of 4 GPUs"},
    ]
    merge(document, {"ranks": {**HEAD, "rows": rows, "checks": checks}})
    section = section_of(document.read_text(), "ranks")
    assert "| tp 2 | pairs | 51 | 2 |" in section
    assert "| tp 2: every rank writes its heads | yes | 2 processes |" in section
    assert "2 of 4 GPUs" in section


@pytest.mark.parametrize("run", [{"device": "cpu"}, {"quick": True}])
def test_runs_on_a_cpu_and_quick_ones_are_not_reported(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "smoke.json").write_text(json.dumps({**SMOKE, **run}))
    assert read(tmp_path, any_device=False) == {}
    assert set(read(tmp_path, any_device=True)) == {"smoke"}


def test_the_page_has_a_section_for_each_stage() -> None:
    text = DOCUMENT.read_text()
    for stage in SECTIONS:
        assert section_of(text, stage).strip()


def test_a_document_without_marks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    path.write_text("# GPU runs\n")
    with pytest.raises(ValueError, match="substring not found"):
        merge(path, {"smoke": SMOKE})


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cpu"},
        {"quick": True},
        {"simulated": True},
        {"rows": []},
        {"checks": [{"name": "bench", "ok": False, "said": "TimeoutError"}]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_says_nothing_of_gpus_replaces_nothing(tmp_path: Path, changed: dict[str, Any]) -> None:
    (tmp_path / "smoke.json").write_text(json.dumps(SMOKE))
    assert set(read(tmp_path, any_device=False)) == {"smoke"}
    (tmp_path / "smoke.json").write_text(json.dumps({**SMOKE, **changed}))
    assert not read(tmp_path, any_device=False)
    assert set(read(tmp_path, any_device=True)) == {"smoke"}
