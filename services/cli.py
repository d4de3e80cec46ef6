"""The `kvbaton` command: one subcommand per process, and the tools around them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from services.config.common import FileFlags
from services.config.flags import ConfigError, add_flags, build, keys_of, resolve
from services.config.frontend import FrontendConfig
from services.config.report import dump, native_settings, settings_of
from services.config.worker import WorkerConfig
from services.models import command as model_command
from services.modes import MODES, Command, select_mode
from services.tools import apikey as apikey_command
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
    _add_worker(commands, "prefill")
    _add_worker(commands, "decode")
    for command in (up_command, generate_command, status_command, bench_command, apikey_command, model_command):
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
    add_flags(parser, FileFlags)
    add_flags(parser, FrontendConfig)
    parser.set_defaults(run=_run_frontend)


def _run_frontend(parsed: argparse.Namespace, _: list[str]) -> int:
    files = build(FileFlags, parsed, os.environ)
    file = files.read()
    resolved = resolve(FrontendConfig, parsed, os.environ, file)
    if file is not None:
        known = keys_of(FrontendConfig)
        file.without(known).require_empty(known)
    settings = settings_of(resolved.config, resolved.sources)
    if files.dump_config_to is not None:
        dump(settings, files.dump_config_to)
    from services.frontend.process import run_frontend

    return run_frontend(resolved.config, settings)


def _add_worker(commands: _SubParsersAction[argparse.ArgumentParser], command: Command) -> None:
    modes = [mode for mode in MODES if mode.command == command]
    parser = commands.add_parser(
        command,
        help="; ".join(f"{mode.name} worker: {mode.summary}" for mode in modes),
        allow_abbrev=False,
        epilog="Every other flag is SGLang's own and is parsed by SGLang (--dtype, --mem-fraction-static, ...).",
    )
    add_flags(parser, FileFlags)
    add_flags(parser, WorkerConfig)
    parser.set_defaults(run=_run_worker, takes_native_args=True)


def _run_worker(parsed: argparse.Namespace, native_args: list[str]) -> int:
    files = build(FileFlags, parsed, os.environ)
    file = files.read()
    resolved = resolve(WorkerConfig, parsed, os.environ, file)
    native_file = None if file is None else file.without(keys_of(WorkerConfig))
    chosen = resolved.config
    try:
        mode = select_mode(parsed.command, chosen.disaggregation_mode, chosen.embedding_worker)
        config = chosen.completed(mode, resolved.sources, native_args=tuple(native_args), native_file=native_file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    settings = (*settings_of(config, resolved.sources), *native_settings(native_args, native_file))
    if files.dump_config_to is not None:
        dump(settings, files.dump_config_to)
    from services.worker.process import run_worker

    status = run_worker(config, settings)
    # Nothing is left to do, and taking torch apart costs the interpreter seconds of a pod's termination grace.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
