"""One page of metrics for several processes of one service: each writes its own to files that all of them read.

prometheus_client's multi-process mode, where a file belongs to a process's number instead of its pid: a process that
takes a dead one's place counts on from where that one was, so no counter goes down and no files pile up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, Metric, ProcessCollector, generate_latest, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

# prometheus_client's own. Not what tells whether we share: SGLang sets it in workers, which don't.
_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# In files nothing can be removed. The lowest of several processes' values counts, so this one never does; where the
# highest counts, -inf is a value that isn't known.
_REMOVED = math.inf
# Folder and number of this process, once it shares.
_sharing: list[tuple[Path, int]] = []
# A file that a process has just created is empty for a moment, which the reader doesn't expect.
_READ_ATTEMPTS, _READ_AGAIN_SECONDS = 5, 0.01


def share_metrics(folder: Path, number: int) -> None:
    """Every metric of this process goes to files of `folder` from now on; call it before any is made.

    Of the processes that share a folder no two that run at the same time may have the same number.
    """
    os.environ[_FOLDER_VARIABLE] = str(folder)
    _sharing.append((folder, number))
    values.ValueClass = values.MultiProcessValue(lambda: number)
    _pid_file(folder, number).write_text(str(os.getpid()))


def shared() -> bool:
    """Whether this process's metrics are in files."""
    return bool(_sharing)


@functools.cache
def shared_file(kind: str, name: str) -> MmapedDict:
    """A file of this process for the values of one metric that is not made of prometheus_client's; it counts on, too.

    `kind` is the metric's type; keys are `mmap_key`s. Belongs to one thread.
    """
    folder, number = _sharing[0]
    return MmapedDict(str(folder / f"{kind}_{name}-{number}.db"))


def forget_process(folder: Path, number: int) -> None:
    """It has ended: what it had at the moment is gone, what it has counted stays."""
    mark_process_dead(number, str(folder))
    _pid_file(folder, number).unlink(missing_ok=True)


async def shared_page(folder: Path) -> bytes:
    """The page of all processes of `folder`. Reads files, so not in the event loop."""
    registry = CollectorRegistry()
    registry.register(_SharedPage(folder))
    return await asyncio.to_thread(generate_latest, registry)


class RemovableGauge(Gauge):
    """A gauge whose label values can be removed, in files too. Its `multiprocess_mode` must be livemin."""

    def remove(self, *labelvalues: str) -> None:
        """As `Gauge`."""
        if shared():
            self.labels(*labelvalues).set(_REMOVED)
        else:
            super().remove(*labelvalues)


def refresh(gauge: Gauge, read: Callable[[], float], loop: asyncio.AbstractEventLoop, seconds: float = 1.0) -> None:
    """In files a gauge can't be read when somebody asks, so it is written every so often."""
    gauge.set(read())
    loop.call_later(seconds, refresh, gauge, read, loop, seconds)


class _SharedPage(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        for family in self._read():
            if family.type == "gauge":
                family.samples = [sample for sample in family.samples if not math.isinf(sample.value)]
            yield family
        yield from self._processes()

    def _read(self) -> Iterable[Metric]:
        for _ in range(_READ_ATTEMPTS - 1):
            with contextlib.suppress(struct.error):
                return MultiProcessCollector(None, str(self._folder)).collect()
            time.sleep(_READ_AGAIN_SECONDS)
        return MultiProcessCollector(None, str(self._folder)).collect()

    def _processes(self) -> Iterator[Metric]:
        """prometheus_client's own metrics of each process: a sum would say little, and go down when one is replaced."""
        families: dict[str, Metric] = {}
        for file in sorted(self._folder.glob("*.pid")):
            for family in ProcessCollector(pid=_reader(file), registry=None).collect():
                target = families.setdefault(family.name, family)
                samples = [sample._replace(labels={**sample.labels, "process": file.stem}) for sample in family.samples]
                target.samples = samples if target is family else target.samples + samples
        yield from families.values()

    def describe(self) -> Iterator[Metric]:
        """Nothing: collecting is all that this page is for."""
        return iter(())


def _reader(file: Path) -> Callable[[], str]:
    try:
        pid = file.read_text()
    except OSError:
        pid = "gone"
    return lambda: pid


def _pid_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.pid"
