"""Which grammars an engine may be given: tried out first where they can hurt nobody.

A grammar of a few hundred bytes can take minutes and gigabytes to compile, and nothing can stop a compiler that runs
in a scheduler. So each is compiled once in a process of its own, which ends itself at its limits, and the engine gets
only what came through. `TrialServer` runs in a process that the first scheduler of a host forks before it loads the
model: it shares that one's modules, has no device and no threads, and forks a child for each grammar. `GrammarTrials`
is the host's side.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import resource
import signal
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import structlog

from services.requests import Grammar, GrammarKind
from services.worker.engines.protocol import EngineRefusedError

# Of processor time, so that a busy host refuses nothing that compiles.
CPU_LIMIT_S = 5.0
WALL_LIMIT_S = 15.0
MEMORY_BYTES = 1 << 30
# Tokens that a trial lets a grammar take: enough to see one that is slow from the start.
_STEPS = 64
_AT_ONCE = 2
_REMEMBERED = 4096
# The child died without a word: the grammar's fault most likely, but not for certain.
_SILENCE_REMEMBERED_S = 60.0
# For a server that is itself out of breath.
_MARGIN_S = 5.0
# Where in xgrammar's own source an error was found.
_SOURCE_POSITION = re.compile(r"^\[[0-9:]+\] \S+:\d+: ")
_KEY_TYPES = {GrammarKind.JSON_SCHEMA: "json"}

_log = structlog.get_logger(__name__)


def trial_socket(folder: Path) -> Path:
    """Where the trials of an engine with this private folder are."""
    return folder / "grammars"


@dataclass(frozen=True, slots=True)
class _Verdict:
    refusal: str
    """Why it is refused; empty if it isn't."""
    remembered_s: float | None = None
    """None: for good."""


class GrammarTrials:
    """Verdicts on grammars, of one engine; remembered, and each asked for once however many requests wait for it."""

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._socket = trial_socket(folder)
        self._header = {"vocab_size": vocab_size, "eos_token_ids": list(eos_token_ids)}
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._verdicts: OrderedDict[bytes, asyncio.Task[_Verdict]] = OrderedDict()

    async def require(self, grammar: Grammar) -> None:
        """Raises EngineRefusedError, naming the field, for a grammar that the engine is better off without."""
        digest = hashlib.sha256(f"{grammar.kind} {grammar.source}".encode()).digest()
        verdict = self._verdicts.get(digest)
        if verdict is None:
            verdict = self._verdicts[digest] = asyncio.create_task(self._try(grammar), name="grammar trial")
            verdict.add_done_callback(lambda task: self._tried(digest, task))
            while len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(digest)
        if refusal := (await asyncio.shield(verdict)).refusal:
            raise EngineRefusedError(refusal, field=grammar.field)

    def _tried(self, digest: bytes, task: asyncio.Task[_Verdict]) -> None:
        def forget() -> None:
            if self._verdicts.get(digest) is task:
                del self._verdicts[digest]

        if task.cancelled() or task.exception() is not None or (seconds := task.result().remembered_s) == 0:
            forget()
        elif seconds is not None:
            asyncio.get_running_loop().call_later(seconds, forget)

    async def _try(self, grammar: Grammar) -> _Verdict:
        key_type = _KEY_TYPES.get(grammar.kind, grammar.kind.value)
        question = json.dumps({**self._header, "key_type": key_type, "source": grammar.source}).encode() + b"\n"
        async with self._slots:
            try:
                async with asyncio.timeout(WALL_LIMIT_S + _MARGIN_S):
                    reader, writer = await asyncio.open_unix_connection(str(self._socket))
                    with contextlib.closing(writer):
                        writer.write(question)
                        answer = await reader.read()
                if not answer:
                    limits = f"{CPU_LIMIT_S:g} s or {MEMORY_BYTES >> 20} MiB"
                    return _Verdict(f"takes more than {limits} to compile", _SILENCE_REMEMBERED_S)
                return _Verdict(str(json.loads(answer)["refusal"]))
            except (OSError, ValueError, LookupError, TypeError) as error:  # includes TimeoutError
                # Let through, and tried again the next time: the engine's own time-outs stand behind this one.
                _log.warning("grammar_not_tried", error=repr(error))
                return _Verdict("", remembered_s=0)


class TrialServer:
    """Answers one question per connection, each in a forked child."""

    def __init__(self, listener: socket.socket, load_tokenizer: Callable[[], Any]) -> None:
        self._listener = listener
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Any = None
        self._backend: Any = None

    def run(self) -> None:
        """Until this process is killed. Raises what loading the tokenizer raises."""
        logging.disable(logging.CRITICAL)  # SGLang logs every grammar that it refuses, whole
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        self._tokenizer = self._load_tokenizer()  # while the model is loaded: nobody waits for it then
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(CPU_LIMIT_S)
                # Whatever was wrong with one question, the next one is to be answered.
                with contextlib.suppress(Exception):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            question: dict[str, Any] = json.loads(lines.readline())
        if self._backend is None:
            self._backend = self._build(question["vocab_size"], question["eos_token_ids"])
        if os.fork():
            return
        try:
            limit_this_process()
            refusal = self._refusal(question["key_type"], question["source"], question["vocab_size"])
            connection.sendall(json.dumps({"refusal": refusal}).encode())
        finally:
            os._exit(0)

    def _build(self, vocab_size: int, eos_token_ids: list[int]) -> Any:
        backend: Any = import_module("sglang.srt.constrained.xgrammar_backend").XGrammarGrammarBackend
        return backend(self._tokenizer, vocab_size=vocab_size, model_eos_token_ids=eos_token_ids)

    def _refusal(self, key_type: str, source: str, vocab_size: int) -> str:
        try:
            grammar = self._backend._init_value_dispatch((key_type, source), False)  # noqa: SLF001
        except MemoryError:
            os._exit(1)  # as where the allocation was the compiler's
        except Exception as error:  # noqa: BLE001 - the compiler's word on a grammar, whatever its type
            return _readable(str(error))
        matcher = getattr(grammar, "matcher", None)
        if matcher is None:
            return _readable(str(getattr(grammar, "error_message", "")))
        return "allows no text at all" if leads_nowhere(matcher, vocab_size) else ""


def leads_nowhere(matcher: Any, vocab_size: int) -> bool:
    """Whether no token of the vocabulary can be the first. Also takes some tokens, for the time that it takes."""
    numpy: Any = import_module("numpy")
    xgrammar: Any = import_module("xgrammar")
    mask = xgrammar.allocate_token_bitmask(1, vocab_size)
    for step in range(_STEPS):
        if matcher.is_terminated():
            return False
        mask.fill_(-1)
        matcher.fill_next_token_bitmask(mask)
        bits = numpy.unpackbits(mask[0].numpy().view(numpy.uint8), bitorder="little")
        allowed = bits[:vocab_size].nonzero()[0]
        if not len(allowed):
            return step == 0
        matcher.accept_token(int(allowed[7919 * step % len(allowed)]))
    return False


def limit_this_process() -> None:
    """End this process at its limits of time, whatever it does then; let it have so much more memory, and one core."""
    os.sched_setaffinity(0, {random.choice(sorted(os.sched_getaffinity(0)))})
    for timer, ends, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, CPU_LIMIT_S),
        (signal.ITIMER_REAL, signal.SIGALRM, WALL_LIMIT_S),
    ):
        signal.signal(ends, signal.SIG_DFL)
        signal.setitimer(timer, seconds)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _readable(message: str) -> str:
    return _SOURCE_POSITION.sub("", message).strip() or "does not compile"
