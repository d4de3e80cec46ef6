"""`kvbaton generate`: one prompt, its answer streamed to stdout, what happened on stderr."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from google.protobuf import json_format

from kvbaton.client import Answer, GenerateOptions, SamplingParams
from kvbaton.errors import Reason, RequestError
from kvbaton.v1 import generate_pb2
from services.config.flags import add_flags, build
from services.tools.client_flags import ClientFlags
from services.tools.terminal import say

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]


def add_arguments(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `kvbaton generate`."""
    parser = commands.add_parser(
        "generate", help="send one prompt and stream the answer to the terminal", allow_abbrev=False
    )
    parser.add_argument("prompt", help='the prompt; "-" reads it from stdin')
    parser.add_argument("--chat", action="store_true", help="as a user's message, through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it (with --chat)")
    parser.add_argument("--model", default="", metavar="NAME", help="needed where several are served")
    parser.add_argument("--max-new-tokens", type=int, metavar="INTEGER", help="default: what the context leaves")
    parser.add_argument("--temperature", type=float, metavar="NUMBER", help="0 is greedy; default: 1")
    parser.add_argument("--top-p", type=float, metavar="NUMBER", help="default: 1")
    parser.add_argument("--seed", type=int, metavar="INTEGER", help="of this request's sampling")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    parser.add_argument("--priority", type=int, metavar="INTEGER", help="higher waits less; default: 0")
    parser.add_argument("--prefill-worker", default="", metavar="ID", help="must run it (kvbaton status lists them)")
    parser.add_argument("--decode-worker", default="", metavar="ID", help="the same; also an aggregated worker")
    parser.add_argument("--cache-salt", default="", metavar="TEXT", help="shares cached prefixes only with its like")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of the stream")
    add_flags(parser, ClientFlags)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace, _: list[str]) -> int:
    """0 when the answer ended, 1 when it failed, 130 when Ctrl-C cancelled it."""
    if parsed.system and not parsed.chat:
        say(sys.stderr, "kvbaton generate: --system goes with --chat")
        return 2
    prompt = sys.stdin.read() if parsed.prompt == "-" else str(parsed.prompt)
    flags = build(ClientFlags, parsed, os.environ)
    try:
        return asyncio.run(_run(parsed, prompt, flags))
    except KeyboardInterrupt:
        say(sys.stderr, "\nCancelled.")
        return 130
    except BrokenPipeError:
        # Nobody reads any more; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


async def _run(parsed: argparse.Namespace, prompt: str, flags: ClientFlags) -> int:
    shown = _Shown(None if parsed.json else sys.stdout)
    async with flags.client(timeout=parsed.timeout) as client:
        chunks = client.stream(**request_options(parsed, prompt))
        try:
            async with contextlib.aclosing(chunks):  # type: ignore[type-var]
                async for chunk in chunks:
                    shown.add(chunk)
        except RequestError as error:
            shown.end_line()
            say(sys.stderr, describe_error(error))
            return 1
    if parsed.json:
        say(sys.stdout, json.dumps(as_json(shown), indent=2, ensure_ascii=False))
    else:
        shown.end_line()
        say(sys.stderr, describe_answer(shown.answer, shown.time_to_first_token, shown.tokens_per_second))
    return 0


def request_options(parsed: argparse.Namespace, prompt: str) -> GenerateOptions:
    """What the client is asked for."""
    return GenerateOptions(
        text=None if parsed.chat else prompt,
        chat=messages(prompt, parsed.system) if parsed.chat else None,
        sampling=sampling(parsed),
        model=parsed.model,
        priority=parsed.priority,
        prefill_worker=parsed.prefill_worker,
        decode_worker=parsed.decode_worker,
        cache_salt=parsed.cache_salt,
    )


def messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The chat that `--chat` stands for."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def sampling(parsed: argparse.Namespace) -> SamplingParams:
    """What was given on the command line, and nothing else: the server has the defaults."""
    params = SamplingParams(stop=parsed.stop)
    for name in ("max_new_tokens", "temperature", "top_p", "seed"):
        if (value := getattr(parsed, name)) is not None:
            setattr(params, name, value)
    return params


@dataclass(slots=True)
class _Shown:
    """An answer on its way to the terminal, and when its tokens came."""

    stream: TextIO | None
    answer: Answer = field(default_factory=Answer)
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    first_tokens: int = 0
    last: float = 0.0

    def add(self, chunk: generate_pb2.GenerateResponse) -> None:
        self.answer.add(chunk)
        if chunk.token_ids:
            self.last = time.monotonic()
            if self.first is None:
                self.first, self.first_tokens = self.last, len(chunk.token_ids)
        if self.stream is not None and chunk.text:
            self.stream.write(chunk.text)
            self.stream.flush()

    def end_line(self) -> None:
        if self.stream is not None and self.answer.text and not self.answer.text.endswith("\n"):
            say(self.stream, "")

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds."""
        return None if self.first is None else self.first - self.began

    @property
    def tokens_per_second(self) -> float | None:
        """After the first message with tokens; None where there was only that one."""
        later = len(self.answer.token_ids) - self.first_tokens
        return None if self.first is None or not later else later / max(self.last - self.first, 1e-9)


def describe_answer(answer: Answer, time_to_first_token: float | None, tokens_per_second: float | None) -> str:
    """One line: what came, how fast, why it ended, who did it."""
    finished, usage = answer.finished, answer.finished.usage
    parts = [f"{usage.completion_tokens} tokens after a prompt of {usage.prompt_tokens}"]
    if usage.cached_prompt_tokens:
        parts[0] += f" ({usage.cached_prompt_tokens} cached)"
    if time_to_first_token is not None:
        parts.append(f"first after {time_to_first_token * 1000:.0f} ms")
    if tokens_per_second is not None:
        parts.append(f"then {tokens_per_second:.1f} tokens/s")
    parts.append(f"ended by {_ending(finished)}")
    if finished.prefill_worker:
        parts.append(f"{finished.prefill_worker} -> {finished.decode_worker}")
    elif finished.decode_worker:
        parts.append(finished.decode_worker)
    return "; ".join(parts)


def describe_error(error: RequestError) -> str:
    """The error with everything that says where it came from."""
    about = ", ".join(f"{key}: {value}" for key, value in error.metadata().items())
    lines = [f"kvbaton generate: {error}"] + ([f"  {about}"] if about else [])
    if error.reason is Reason.UNTYPED and "failed to connect" in error.message:
        lines.append(
            "  is a frontend running there? `kvbaton up` starts a whole cluster, --endpoint names another address"
        )
    if error.retry_after is not None:
        lines.append(f"  worth a retry after {error.retry_after:g} s")
    return "\n".join(lines)


def as_json(shown: _Shown) -> dict[str, object]:
    """The whole answer for programs."""
    finished = json_format.MessageToDict(
        shown.answer.finished, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {
        "text": shown.answer.text,
        "token_ids": shown.answer.token_ids,
        **finished,
        "time_to_first_token": shown.time_to_first_token,
        "tokens_per_second": shown.tokens_per_second,
    }


def _ending(finished: generate_pb2.Finished) -> str:
    reason = generate_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
    match finished.WhichOneof("matched"):
        case "matched_stop":
            return f"{reason} ({finished.matched_stop!r})"
        case "matched_token_id":
            return f"{reason} (token {finished.matched_token_id})"
        case _:
            return reason
