"""What a simulated engine can be told at its start: `--sim key=value,key=value`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


@dataclass(frozen=True, slots=True)
class SimulatedOptions:
    """Seconds, tokens and bytes. The defaults are fast; SGLang's own where they are about its rules."""

    vocab_size: int = 32000
    context_length: int = 32768
    page_size: int = 16
    max_total_tokens: int = 262144
    """The KV pool of one dp rank. A request holds pages for its prompt and all its `max_new_tokens` from the start."""
    max_running_requests: int = 64
    """The window of one dp rank; a request holds a slot from the allocation of its pages to their release."""
    chunk_tokens: int = 2048
    """Prefill runs at most this many tokens at a time."""
    dp_size: int = 1
    prefix_cache: bool = True
    """In the prefill and aggregated roles; decode never has one."""
    eos_rate: float = 0.0
    """How often a token is the end of the sequence: 0 never, 0.01 once in a hundred."""
    embedding_dimension: int = 64
    matryoshka: bool = False
    """Embedding role: numbers in a vector, and whether fewer can be asked for."""
    script: str = ""
    """A JSON file, `[{"prompt": [1, 2], "tokens": [3, 4]}]`: answers that are played instead of computed.

    An entry without "prompt" answers every prompt that has none of its own. For text, "<tool_call>" as any other, let
    the model's own tokenizer make the ids, `Tokenizer.from_file(".../tokenizer.json").encode(text,
    add_special_tokens=False).ids`, and give `vocab_size` the model's; the end of the sequence, token 2, is added.
    """
    grammars: bool = False
    """Takes grammars, checks them a little and answers as if there were none; with a script it always does."""
    tool_call_parser: str = ""
    reasoning_parser: str = ""
    """By SGLang's names: what the worker's record says of the model. The engine itself makes nothing of them."""

    start_seconds: float = 0.0
    prefill_base: float = 0.0005
    prefill_token: float = 1e-6
    """A chunk takes `prefill_base` and this much for each of its tokens."""
    decode_step: float = 0.0002
    """Every running request gets a token each."""
    transfer_base: float = 0.0002
    transfer_byte: float = 0.0
    """A transfer takes `transfer_base` and this much for each byte; a page has four bytes a token."""
    tick: float = 0.001
    """The scheduler looks no more often than this; steps that were due meanwhile come in one delta."""

    bootstrap_timeout: float = 300.0
    """Prefill waits this long for decode's page indices, decode for prefill's table (SGLang's default)."""
    waiting_timeout: float = 300.0
    """Decode waits this long for the end of a transfer, prefill's queue and compute included (SGLang's default)."""
    fetch_retries: int = 15
    fetch_interval: float = 1.0
    """Decode asks a silent prefill for its table this often and this far apart (SGLang's defaults)."""
    heartbeat_interval: float = 5.0
    heartbeat_failures: int = 2
    heartbeat_timeout: float = 2.0
    """Decode forgets a prefill after this many misses in a row, and not before (SGLang's defaults)."""
    deferred_release: bool = True
    """Decode holds slot and pages of a failed transfer until prefill confirms, or for `release_timeout`."""
    release_timeout: float = 30.0
    release_on_disconnect: bool = False
    """Also let go when the writer's connection is gone. SGLang by itself doesn't, even after a heartbeat has failed;
    hosted by Baton, 0.5.23 does when the writer's port refuses connections (`engines/sglang_writers.py`)."""
    reconnect: bool = False
    """Decode forgets a prefill as soon as a connection to it breaks, and connects anew for the next request.

    Else it sends to the broken connection until the heartbeat fails, as SGLang does to a prefill that was replaced.
    """
    abort_timeout: float = 2.0
    """An abort ends the stream after this long even if the scheduler is frozen."""
    data_port: int = 0
    """First port of prefill's data sockets, one more for each dp rank; 0 takes free ones."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "page_size", "max_running_requests", "chunk_tokens", "dp_size"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("fetch_retries", "heartbeat_failures", "embedding_dimension"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        _require(self.vocab_size >= 8, "vocab_size", "must be at least 8")
        _require(self.max_total_tokens >= self.page_size, "max_total_tokens", "holds no page")
        _require(0.0 <= self.eos_rate <= 1.0, "eos_rate", "is not in [0, 1]")
        _require(0 <= self.data_port < 65536 - self.dp_size, "data_port", "is not a port")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                _require(0.0 <= value < float("inf"), field.name, "must be a finite number, at least 0")
        for name in ("tick", "heartbeat_interval", "heartbeat_timeout", "fetch_interval"):
            _require(getattr(self, name) > 0, name, "must be more than 0")

    @property
    def pages(self) -> int:
        """Pages of one dp rank's pool."""
        return self.max_total_tokens // self.page_size

    @property
    def grammar_backend(self) -> str:
        """As in `EngineInfo`."""
        return "simulated" if self.grammars or self.script else ""

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for a token."""
        return min(self.context_length, self.pages * self.page_size) - 1


def parse_options(text: str, **defaults: Any) -> SimulatedOptions:
    """The options of `key=value,key=value`; `defaults` stand for what the text leaves out. Raises ValueError."""
    hints = typing.get_type_hints(SimulatedOptions)
    values = dict(defaults)
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, separator, raw = pair.partition("=")
        name = name.strip()
        if not separator:
            raise ValueError(f"--sim: {pair!r} is not key=value")
        if name not in hints:
            raise ValueError(f"--sim: there is no {name!r}; there are {', '.join(hints)}")
        values[name] = _parse(hints[name], name, raw.strip())
    return SimulatedOptions(**values)


def script_file(options: SimulatedOptions) -> Path | None:
    """The file of `script`, None without one."""
    return Path(options.script).expanduser() if options.script else None


def _parse(kind: Any, name: str, raw: str) -> Any:
    try:
        if kind is bool:
            if raw.lower() not in _TRUE | _FALSE:
                raise ValueError("write true or false")
            return raw.lower() in _TRUE
        return kind(raw)
    except ValueError as error:
        raise ValueError(f"--sim: {name}={raw!r}: {error}") from error


def _require(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"--sim: {name} {problem}")
