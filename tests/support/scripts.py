"""deploy/local's scripts as an operator runs them, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "deploy" / "local"

PORTS = (
    "FRONTEND_PORT",
    "HTTP_PORT",
    "WORKER_PORT",
    "SYSTEM_PORT",
    "PREFILL_PORT",
    "PREFILL_SYSTEM_PORT",
    "DECODE_PORT",
    "DECODE_SYSTEM_PORT",
    "BOOTSTRAP_PORT",
)


class Script:
    """One run of agg.sh or disagg.sh; its processes are known by the STATE_DIR that they inherit."""

    def __init__(self, name: str, folder: Path, command: str, *arguments: str, **env: str) -> None:
        """`command` is the text of the `kvbaton` program that the script finds on PATH."""
        (folder / "bin").mkdir(parents=True)
        program = folder / "bin" / "kvbaton"
        program.write_text(command)
        program.chmod(0o755)
        self.worker = "decode" if name == "disagg.sh" else "worker"
        self.ports = {name: free_port() for name in PORTS}
        self.etcd_port = free_port()
        self.state_dir = folder / "state"
        self.output = folder / "output"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KVBATON_", "OTEL_"))}
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), inherited["PATH"]])
        self.env = {
            **inherited,
            **{name: str(port) for name, port in self.ports.items()},
            "KVBATON_ETCD_ENDPOINTS": f"127.0.0.1:{self.etcd_port}",
            "STATE_DIR": str(self.state_dir),
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            **env,
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(LOCAL / name), *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # In the background of a script SIGINT is ignored, and a shell can't trap what was ignored at its start.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    def left(self) -> list[str]:
        """Command lines of everything that it started and that still runs, itself included."""
        mark = f"STATE_DIR={self.state_dir}".encode()
        lines: list[str] = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                alive = not re.search(r"^State:\s+[ZX]", (folder / "status").read_text(), re.MULTILINE)
                if alive and mark in (folder / "environ").read_bytes().split(b"\0"):
                    lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return lines

    def pid_of(self, subcommand: str) -> int:
        """The process of one subcommand of kvbaton."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                ours = f"STATE_DIR={self.state_dir}".encode() in (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if ours and subcommand in words and "setsid" not in words[0]:
                    return int(folder.name)
        raise AssertionError(f"{subcommand} does not run; the script said: {self.text()}")

    def text(self) -> str:
        """What it printed so far."""
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float = 60) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def clean_up(self) -> None:
        """Ends what a failed test left: SIGTERM to the script, then SIGKILL to all of it."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        until = time.monotonic() + 10
        while self.left() and time.monotonic() < until:
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if f"STATE_DIR={self.state_dir}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                        os.kill(int(folder.name), 9)
            time.sleep(0.1)
