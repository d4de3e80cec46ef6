"""`kvbaton up`: a cluster on this machine with live progress, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from services.config.flags import ConfigError, add_flags, build
from services.tools.options import FRONTEND, ClusterOptions

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

    from services.tools.cluster import LocalCluster

T = TypeVar("T")

_PROMPT = "The capital of France is"


def add_arguments(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `kvbaton up`."""
    parser = commands.add_parser(
        "up",
        help="a whole cluster on this machine, until Ctrl-C",
        allow_abbrev=False,
        epilog="What follows -- goes to every worker: its own flags and SGLang's, for example -- --tp 2",
    )
    add_flags(parser, ClusterOptions)
    parser.set_defaults(run=run, takes_native_args=True)


def run(parsed: argparse.Namespace, rest: list[str]) -> int:
    """0 when a signal ended it, 1 when a process died or never got ready."""
    if rest and rest[0] != "--":
        raise ConfigError(f"unknown arguments: {' '.join(rest)} (flags for the workers go after --)")
    options = replace(build(ClusterOptions, parsed, os.environ), native_args=tuple(rest[1:]))
    from services.telemetry.logging import configure_logging

    configure_logging(level="warning", format="console", service="up")
    return asyncio.run(_run(options))


async def _run(options: ClusterOptions) -> int:
    from services.registry.etcd import EtcdError
    from services.registry.local import EtcdNotFoundError, EtcdStartError
    from services.tools.cluster import LocalCluster, NotReadyError
    from services.tools.progress import lines, show
    from services.tools.supervisor import ChildDiedError
    from services.tools.terminal import say

    cluster = LocalCluster(options)
    stop = _on_signals(cluster)
    say(sys.stderr, f"Starting {_described(options)}. Logs: {cluster.log_dir}")
    try:
        with show(sys.stderr) as board:
            cluster.board = board
            started = await _unless(stop, cluster.start())
        if started is None:
            say(sys.stderr, "Interrupted before it was ready; everything is stopped.")
            return 130
        cluster.board = lines(sys.stderr)
        say(sys.stdout, summary(cluster))
        death = await _unless(stop, cluster.wait_for_death())
    except (ChildDiedError, NotReadyError, EtcdNotFoundError, EtcdStartError, EtcdError, OSError) as error:
        say(sys.stderr, f"\nkvbaton up: {error}")
        return 1
    say(sys.stderr, f"\nkvbaton up: {death[0]}\nStopping the rest." if death else "\nStopping (Ctrl-C again: at once).")
    await cluster.stop()
    if cluster.killed:
        say(sys.stderr, f"Had to be killed: {', '.join(cluster.killed)}")
    for leftover in cluster.leftovers():
        say(sys.stderr, f"Left behind: {leftover}")
    say(sys.stderr, f"Stopped. Logs: {cluster.log_dir}")
    return 1 if death else 0


def summary(cluster: LocalCluster) -> str:
    """Where everything is, and what to type next."""
    from services.tools.terminal import columns

    rows = [
        ["gRPC", cluster.grpc_endpoint, ""],
        ["HTTP", f"{cluster.http_url}/v1", "OpenAI API; also /health, /metrics"],
    ]
    for name, plan in cluster.plans.items():
        if name != FRONTEND:
            bootstrap = f", bootstrap port {plan.bootstrap_port}" if plan.bootstrap_port else ""
            rows.append([name, cluster.endpoint(name), f"system {cluster.system_url(name)}{bootstrap}"])
    rows += [
        ["etcd", cluster.etcd_endpoints, f"namespace {cluster.options.namespace}"],
        ["logs", str(cluster.log_dir), ""],
    ]
    model = next((record.model.name for record in cluster.workers.values()), cluster.options.model_path)
    indented = "\n".join(f"  {line}" for line in columns(rows))
    commands = "\n".join(f"  {line}" for line in _commands(cluster.grpc_endpoint, cluster.http_url, model))
    return f"\nReady: {model}. Ctrl-C stops everything.\n\n{indented}\n\nTry:\n{commands}"


def _commands(endpoint: str, http_url: str, model: str) -> list[str]:
    """One ready-made line for each way in."""
    request = {"text": _PROMPT, "sampling": {"max_new_tokens": 16, "temperature": 0}}
    completion = {"model": model, "prompt": _PROMPT, "max_tokens": 16, "temperature": 0}
    return [
        shlex.join(["kvbaton", "generate", _PROMPT, "--max-new-tokens", "16", "--temperature", "0"])
        + ("" if endpoint.endswith(":50051") else f" --endpoint {endpoint}"),
        f"grpcurl -plaintext -d {shlex.quote(json.dumps(request))} {endpoint} kvbaton.v1.GenerateService/Generate",
        f"curl {http_url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(completion))}",
    ]


def _described(options: ClusterOptions) -> str:
    workers = " + ".join(f"{count} {role.value}" for role, count in Counter(options.roles).items())
    return f"{options.model_path} on {options.engine_device}: {workers}"


def _on_signals(cluster: LocalCluster) -> asyncio.Event:
    """Set by the first SIGINT, SIGTERM or SIGHUP; the second one hurries the cluster's stop."""
    stop = asyncio.Event()

    def received() -> None:
        if stop.is_set():
            cluster.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, received)
    return stop


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> tuple[T] | None:
    """The result of `work`; None when `stop` came first: `work` is then cancelled, and has ended."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        return (working.result(),)
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    return None
