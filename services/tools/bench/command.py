"""`kvbaton bench`: flags in, load, report out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import uvloop

from kvbaton.errors import RequestError
from kvbaton.v1 import model_pb2
from services.config.flags import ConfigError, add_flags, build
from services.tools.bench.load import Load, warm_up
from services.tools.bench.monitor import Monitor
from services.tools.bench.options import BenchFlags
from services.tools.bench.report import Report
from services.tools.bench.results import Results
from services.tools.bench.sender import CancelTimes, Sender
from services.tools.bench.workload import Workload
from services.tools.terminal import say
from services.transport import make_channel

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

T = TypeVar("T")


def add_arguments(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `kvbaton bench`."""
    parser = commands.add_parser(
        "bench",
        help="generate load and measure what its clients see",
        allow_abbrev=False,
        epilog="Exit status 0 when every request finished, was cancelled as planned, or failed as --expect-errors "
        "says; 1 otherwise; 130 after Ctrl-C, with the report of what ran until then. Definitions: docs/bench.md.",
    )
    add_flags(parser, BenchFlags)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace, _: list[str]) -> int:
    """The exit status: see the epilog above."""
    flags = build(BenchFlags, parsed, os.environ)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(flags))


async def _run(flags: BenchFlags) -> int:
    stop = _Stop.on_signals()
    try:
        report = await bench(flags, stop.event)
    except RequestError as error:
        say(sys.stderr, f"kvbaton bench: {flags.client.endpoint} doesn't say what it serves: {error}")
        return 1
    if report is None:
        return stop.exit_status
    say(sys.stdout, report.as_text())
    for warning in report.warnings():
        say(sys.stderr, f"kvbaton bench: warning: {warning}")
    if not await asyncio.to_thread(_write, report):
        return 1
    if report.interrupted:
        return stop.exit_status
    return 0 if report.succeeded else 1


async def bench(flags: BenchFlags, stop: asyncio.Event) -> Report | None:
    """Runs the load until its bounds or until `stop`; None when `stop` came before the first measured request.

    Raises RequestError when the server can't be asked for its model, ConfigError when the flags don't fit it.
    """
    run, started = f"bench-{uuid.uuid4().hex[:8]}", datetime.now(UTC)
    texts = await asyncio.to_thread(_texts, flags)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(flags.client.client())
        model = await _unless(stop, client.model_info(flags.model))
        if model is None:
            return None
        channels = [make_channel(flags.client.endpoint, tls=flags.tls()) for _ in range(flags.channels)]
        for channel in channels:
            stack.push_async_callback(channel.close)
        sender = Sender(channels, flags.timeout, CancelTimes(flags.cancel_window), flags.client.api_key)
        workload = _workload(flags, model, texts, run)
        warmed = await _unless(stop, warm_up(flags, workload, sender))
        if warmed is None:
            return None
        results = Results(flags.objectives)
        async with Monitor() as monitor:
            ended = await _unless(stop, _true(Load(flags, workload, sender, results).run()))
        return Report(flags, run, started, model, results, warmed, monitor, interrupted=ended is None)


def _texts(flags: BenchFlags) -> list[str]:
    if flags.text_file is None:
        return []
    try:
        lines = flags.text_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text-file: {error}") from error
    if not (texts := [line for line in lines if line.strip()]):
        raise ConfigError(f"--text-file: no prompt in {flags.text_file}")
    return texts


def _workload(flags: BenchFlags, model: model_pb2.ModelInfo, texts: list[str], run: str) -> Workload:
    try:
        return Workload(flags, vocab_size=model.runtime.vocab_size, texts=texts, run=run)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _write(report: Report) -> bool:
    if report.flags.json is None:
        return True
    try:
        report.flags.json.write_text(json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        say(sys.stderr, f"kvbaton bench: --json: {error}")
        return False
    return True


@dataclass(slots=True)
class _Stop:
    """Set by the first signal; the second one ends the process as usual."""

    event: asyncio.Event
    exit_status: int = 130

    @classmethod
    def on_signals(cls) -> _Stop:
        stop, loop = cls(asyncio.Event()), asyncio.get_running_loop()

        def received(number: int) -> None:
            stop.exit_status = 128 + number
            stop.event.set()
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, received, number)
        return stop


async def _true(work: Coroutine[Any, Any, None]) -> bool:
    await work
    return True


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None when `stop` came first: `work` is then cancelled, and has ended."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait({working, stopping})
    return None
