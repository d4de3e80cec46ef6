"""Other flags or variables for the engines, to see what they do to the hand-off: `NAME=FLAGS`."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.gpu.launch import Setup

_VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Variant:
    """What is added to every engine's flags and environment."""

    name: str
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    def applied(self, setup: Setup) -> Setup:
        """The set-up with it, and with logs of its own."""
        logs = setup.logs / self.name if self.name else setup.logs
        logs.mkdir(parents=True, exist_ok=True)
        return replace(setup, logs=logs, flags=(*setup.flags, *self.flags), env={**setup.env, **self.env})


def variant(text: str) -> Variant:
    """`NAME=words`: words as UPPER_CASE=VALUE are variables, the others flags. Raises ArgumentTypeError."""
    name, equals, rest = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FLAGS")
    words = shlex.split(rest)
    variables = {match[1]: match[2] for word in words if (match := _VARIABLE.fullmatch(word))}
    return Variant(name, tuple(word for word in words if not _VARIABLE.fullmatch(word)), variables)
