"""What moved between the GPUs: the engine probe's lines, NIXL's telemetry page, and the memory in use."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from services.tools.ports import Ports

_SENT = "agent_tx_bytes_total"


class ProbeLines:
    """Lines that engines with the probe have written since the last look, oldest first by file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new(self) -> list[dict[str, Any]]:
        """Whole lines only, each with its `process`: what is being written is for the next look."""
        lines: list[dict[str, Any]] = []
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            lines += [{"process": path.stem, **json.loads(line)} for line in whole.splitlines()]
        return lines


@dataclass(frozen=True, slots=True)
class Moved:
    """All NIXL writes of one request. Bytes, milliseconds; `transfer_ms` is the sum of NIXL's own durations.

    `span_ms` is from the first write's posting until SGLang saw the last one complete: with a chunked prompt the
    computing of later chunks is in it.
    """

    writes: int
    bytes: int
    descriptors: int
    post_ms: float
    transfer_ms: float
    span_ms: float

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second while NIXL was at it; 0 without a duration."""
        return self.bytes / (self.transfer_ms * 1e6) if self.transfer_ms else 0.0

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "gb_per_s": self.gb_per_s}


def moved(lines: Iterable[dict[str, Any]]) -> Moved | None:
    """Of the lines of one request; None without a write."""
    every = list(lines)
    posted = [line["time"] for line in every if line["event"] == "posted"]
    written = [line for line in every if line["event"] == "written"]
    if not posted or not written:
        return None
    total = {name: sum(line.get(name, 0) for line in written) for name in ("bytes", "descriptors", "post_us")}
    return Moved(
        len(written),
        int(total["bytes"]),
        int(total["descriptors"]),
        total["post_us"] / 1e3,
        sum(line.get("transfer_us", 0) for line in written) / 1e3,
        (max(line["time"] for line in written) - min(posted)) * 1e3,
    )


class NixlTelemetry:
    """NIXL's own count of bytes sent by one process, on a port of its own."""

    def __init__(self, port: int = 0) -> None:
        """0: any."""
        self._port = port or Ports().pick("127.0.0.1", 0)

    @property
    def page(self) -> str:
        """The URL of its metrics."""
        return f"http://127.0.0.1:{self._port}/metrics"

    @property
    def env(self) -> dict[str, str]:
        """Of the process that sends."""
        return {
            "NIXL_TELEMETRY_ENABLE": "y",
            "NIXL_TELEMETRY_EXPORTER": "prometheus",
            "NIXL_TELEMETRY_PROMETHEUS_LOCAL": "y",
            "NIXL_TELEMETRY_PROMETHEUS_PORT": str(self._port),
        }

    async def sent_bytes(self) -> int | None:
        """So far; None where it doesn't answer. It is brought up to date every 100 ms."""
        await asyncio.sleep(0.3)
        try:
            async with httpx.AsyncClient(timeout=5.0) as http:
                page = await http.get(self.page)
        except httpx.HTTPError:
            return None
        return sent_bytes(page.text)


def sent_bytes(page: str) -> int | None:
    """`agent_tx_bytes_total` of a page in Prometheus's text format, over all agents; None where it is not there."""
    found = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == _SENT
    ]
    return int(sum(found)) if found else None


def gpu_memory() -> list[dict[str, int]] | None:
    """MiB in use and there, of every GPU; None without nvidia-smi."""
    csv = _nvidia_smi("index,memory.used,memory.total")
    return None if csv is None else list(gpu_rows(csv))


def gpu_names() -> list[str]:
    """One for each GPU; none without nvidia-smi."""
    return (_nvidia_smi("name") or "").splitlines()


def _nvidia_smi(fields: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout if answer.returncode == 0 else None


def gpu_rows(csv: str) -> Iterator[dict[str, int]]:
    """Of lines as `0, 22310, 143771`."""
    for line in csv.splitlines():
        if line.strip():
            index, used, total = (int(cell) for cell in line.split(","))
            yield {"gpu": index, "used_mib": used, "total_mib": total}
