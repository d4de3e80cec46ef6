"""`kvbaton apikey`: a fresh API key, shown once, and what of it goes into the file of --api-keys."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from services.config.errors import ConfigError
from services.frontend.access.keys import as_entry, check_name, digest_of, fresh_key
from services.tools.terminal import say

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]


def add_arguments(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `kvbaton apikey`."""
    parser = commands.add_parser(
        "apikey",
        help="make an API key for clients of a frontend",
        allow_abbrev=False,
        epilog="The key goes to stdout and is kept nowhere; its entry for the file of --api-keys goes to stderr.",
    )
    parser.add_argument("name", help="whose key it is, in logs and metrics")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace, _: list[str]) -> int:
    """0; raises ConfigError for a name that the file could not have."""
    try:
        name = check_name(parsed.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    key = fresh_key()
    say(sys.stderr, f"The key of {name}. It is shown only now; give it to its owner:\n")
    say(sys.stdout, key)
    say(sys.stderr, f"\nAdd this to the file of --api-keys:\n\n{as_entry(name, digest_of(key.encode()))}")
    return 0
