"""What a stage has seen: checks, numbers and tables, kept as they come: a stage that breaks off still says them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Seconds. A call on the GPU host is ten minutes, and unpacking SGLang and stopping it are part of it.
LIMIT = 480.0
_STOPPING = 25.0


@dataclass
class Outcome:
    """Of one run of a stage. A check with `ok` None was skipped, and says why."""

    stage: str
    limit: float = LIMIT
    checks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    tables: list[str] = field(default_factory=list[str])
    began: float = field(default_factory=time.monotonic)
    keep: Callable[[], None] = lambda: None
    """Called after every check: what was seen is on disk, whatever becomes of the stage."""

    @property
    def ok(self) -> bool:
        """Something was checked, and nothing failed."""
        verdicts = [each["ok"] for each in self.checks]
        return False not in verdicts and True in verdicts

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds that may still be used, without those for stopping everything."""
        return self.limit - _STOPPING - self.seconds

    def check(self, name: str, ok: bool, said: str = "") -> None:
        """A promise, whether it held, and what was seen."""
        self.checks.append({"name": name, "ok": bool(ok), "said": said})
        self.keep()
        print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' if said else ''}{said}", flush=True)

    def skip(self, name: str, reason: str) -> None:
        """What this run can't show."""
        self.checks.append({"name": name, "ok": None, "said": reason})
        self.keep()
        print(f"skip {name}: {reason}", flush=True)

    async def part(self, name: str, work: Coroutine[Any, Any, None], *, needs: float = 0.0) -> None:
        """Does it in the time that is left. It fails as a check, so that the other parts are done.

        `needs` is how long it takes; with less than that left it is skipped.
        """
        if self.left < needs:
            work.close()
            self.skip(name, f"{self.left:.0f} s of {self.limit:g} s were left, it needs {needs:.0f}")
            return
        try:
            async with asyncio.timeout(max(1.0, self.left)):
                await work
        except Exception as error:  # noqa: BLE001 - it stands in the report
            self.check(name, False, "; ".join(f"{type(each).__name__}: {each}"[:4000] for each in _leaves(error)))

    def write(self, path: Path, **about: Any) -> None:
        """As JSON, with the host's particulars in `about`."""
        head = {"stage": self.stage, "ok": self.ok, "seconds": round(self.seconds, 1), **about}
        path.write_text(json.dumps({**head, "checks": self.checks, **self.data}, indent=1) + "\n")

    def text(self) -> str:
        """For a terminal: the tables and a line for each check."""
        signs = {True: "ok", False: "FAIL", None: "skipped"}
        lines = [f"{signs[each['ok']]:<8} {each['name']}: {each['said']}"[:200] for each in self.checks]
        end = f"{self.stage}: {'passed' if self.ok else 'FAILED'} after {self.seconds:.0f} s"
        return "\n".join(["", *self.tables, *lines, end])


def _leaves(error: BaseException) -> list[BaseException]:
    """What went wrong in tasks of a group."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
