"""The `kvbaton` command: one subcommand per process, and the tools around them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from services.config.flags import ConfigError, add_flags, build
from services.config.frontend import FrontendConfig
from services.config.worker import WorkerConfig
from services.models import command as model_command
from services.requests import Role
from services.tools import generate as generate_command
from services.tools import status as status_command
from services.tools import up as up_command
from services.tools.bench import command as bench_command
from services.version import own_version

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="kvbaton",
        description="Serves large language models with prefill and decode on different GPUs.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvbaton {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_frontend(commands)
    _add_worker(commands, Role.PREFILL, "prefill worker: computes KV caches and hands them to decode workers")
    _add_worker(commands, Role.DECODE, "decode worker; with --disaggregation-mode null the aggregated worker")
    for command in (up_command, generate_command, status_command, bench_command, model_command):
        command.add_arguments(commands)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not getattr(parsed, "takes_native_args", False):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace, list[str]], int] = parsed.run
    try:
        return run(parsed, rest)
    except ConfigError as error:
        print(f"kvbaton {parsed.command}: {error}", file=sys.stderr)
        return 2


def _add_frontend(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("frontend", help="frontend: router, gRPC and OpenAI HTTP", allow_abbrev=False)
    add_flags(parser, FrontendConfig)
    parser.set_defaults(run=_run_frontend)


def _run_frontend(parsed: argparse.Namespace, _: list[str]) -> int:
    config = build(FrontendConfig, parsed, os.environ)
    from services.frontend.process import run_frontend

    return run_frontend(config)


def _add_worker(commands: _SubParsersAction[argparse.ArgumentParser], role: Role, help: str) -> None:
    parser = commands.add_parser(
        role.value,
        help=help,
        allow_abbrev=False,
        epilog="Every other flag is SGLang's own and is parsed by SGLang (--tp, --dtype, --trust-remote-code, ...).",
    )
    add_flags(parser, WorkerConfig)
    modes = [role.value] if role is Role.PREFILL else [role.value, "null"]
    parser.add_argument("--disaggregation-mode", choices=modes, default=role.value, help="default: %(default)s")
    parser.set_defaults(run=_run_worker, takes_native_args=True)


def _run_worker(parsed: argparse.Namespace, native_args: list[str]) -> int:
    mode = parsed.disaggregation_mode
    role = Role.AGGREGATED if mode == "null" else Role(mode)
    try:
        config = build(WorkerConfig, parsed, os.environ).completed(role=role, native_args=tuple(native_args))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    from services.worker.process import run_worker

    status = run_worker(config)
    # Nothing is left to do, and taking torch apart costs the interpreter seconds of a pod's termination grace.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
