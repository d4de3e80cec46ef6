"""Puts what the stages have measured into docs/gpu.md; sections without a new result stay as they are.

Only full runs on GPUs count, unless --any-device says otherwise, with another --document to try it out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report_sections import SECTIONS
from benchmarks.sections import with_section

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/gpu.md"


def main() -> int:
    """The exit status: 1 when there was nothing to report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the stages have written")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--any-device", action="store_true", help="take results of CPU runs too")
    parsed = parser.parse_args()
    results = read(parsed.out, any_device=parsed.any_device)
    for said in merge(parsed.document, results):
        print(said)
    return 0 if results else 1


def read(folder: Path, *, any_device: bool) -> dict[str, dict[str, Any]]:
    """The stages' results that may be reported."""
    results: dict[str, dict[str, Any]] = {}
    for stage in SECTIONS:
        path = folder / f"{stage}.json"
        if not path.is_file():
            print(f"{stage}: no {path.name}; its section stays")
            continue
        result = json.loads(path.read_text())
        if not any_device and (reason := _why_not(result)):
            print(f"{stage}: {reason}; its section stays")
        else:
            results[stage] = result
    return results


def _why_not(result: dict[str, Any]) -> str:
    """Empty for a result that says something of GPUs."""
    if result["device"] != "cuda" or result["quick"] or result.get("simulated"):
        kind = "simulated " if result.get("simulated") else "quick " if result["quick"] else ""
        return f"of a {kind}run on {result['device']}"
    if not any(each["ok"] for each in result["checks"]) or not result.get("rows", True):
        return "it broke off before there was anything"
    return ""


def merge(document: Path, results: dict[str, dict[str, Any]]) -> list[str]:
    """Writes the sections, and the plot beside the document. Says what was written. Raises ValueError without marks."""
    text = document.read_text()
    for stage, result in results.items():
        text = with_section(text, stage, SECTIONS[stage](result))
    document.write_text(text)
    said = [f"{stage}: section written" for stage in results]
    if svg := results.get("timeline", {}).get("svg"):
        plot = document.with_name("gpu-timeline.svg")
        plot.write_text(svg)
        said.append(f"{plot.name} written")
    return said


if __name__ == "__main__":
    sys.exit(main())
