"""From the tokens of an answer to what its client reads: text, reasoning, tool calls, the bytes of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from services.frontend.parsers.protocol import NOTHING, Parsed, StreamParser
from services.frontend.request.api import ToolCallDelta
from services.frontend.text import (
    IncrementalDetokenizer,
    StopStringMatcher,
    TextDelta,
    TextOutput,
    TextTokenizer,
    token_bytes,
)
from services.requests import TokenLogprob, TopLogprob


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How an answer's tokens become what its client reads. Immutable: every choice starts a reply of its own."""

    tokenizer: TextTokenizer
    skip_special_tokens: bool = True
    prompt: Sequence[int] = ()
    """What the text goes on from; empty for one that starts afresh."""
    stops: tuple[str, ...] = ()
    parser: Callable[[], StreamParser] | None = None
    """None: all text is content."""
    markers: tuple[str, ...] = ()
    """What the parser must see even if it is a special token."""
    single: bool = False
    """Whether the parser may end the answer."""

    def start(self) -> Reply:
        """One answer's."""
        return Reply(self)


class ReplyDelta(NamedTuple):
    """What one more message of tokens brought."""

    text: str
    reasoning: str
    tool_calls: Sequence[ToolCallDelta]
    ended: bool
    """Whether the answer ends here, although the engine goes on."""
    stopped: str | None
    """The stop string that ended it."""
    token_count_used: int
    """See `TextDelta`."""


class Reply:
    """The text of one answer. Stop strings are looked for in what the model wrote, before anything is parsed."""

    def __init__(self, form: ReplyFormat) -> None:
        ids = (form.tokenizer.token_id(marker) for marker in form.markers)
        detokenizer = IncrementalDetokenizer(
            form.tokenizer,
            skip_special_tokens=form.skip_special_tokens,
            keep=frozenset(token_id for token_id in ids if token_id is not None),
            prompt_ids=form.prompt,
        )
        self._tokenizer = form.tokenizer
        self._output = TextOutput(detokenizer, StopStringMatcher(form.stops) if form.stops else None)
        self._parser = None if form.parser is None else form.parser()
        self._single = form.single

    @property
    def called(self) -> bool:
        """Whether the model has called a tool."""
        return self._parser is not None and self._parser.called

    def push(self, token_ids: Sequence[int], *, last: bool) -> ReplyDelta:
        """Takes more tokens; with `last` there are no others. Nothing may be pushed behind the end."""
        if self._parser is None:
            return self._plain(token_ids, last=last)
        return self._parsed(self._parser, token_ids, last=last)

    def with_bytes(self, logprobs: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """The same, with what each token stands for."""
        spell = token_bytes(self._tokenizer)
        return [
            TokenLogprob(
                each.token_id,
                each.logprob,
                tuple(TopLogprob(top.token_id, top.logprob, spell[top.token_id]) for top in each.top),
                spell[each.token_id],
            )
            for each in logprobs
        ]

    def _plain(self, token_ids: Sequence[int], *, last: bool) -> ReplyDelta:
        delta = self._output.push(token_ids)
        text = delta.text
        if last and delta.stopped is None:
            delta = self._output.finish()
            text += delta.text
        return ReplyDelta(text, "", (), delta.stopped is not None, delta.stopped, delta.token_count_used)

    def _parsed(self, parser: StreamParser, token_ids: Sequence[int], *, last: bool) -> ReplyDelta:
        taken = _Taken()
        # Where the answer may end behind a call, no token behind that one counts.
        pieces = [token_ids[i : i + 1] for i in range(len(token_ids))] if self._single else [token_ids]
        delta = TextDelta("", None, 0)
        for piece in pieces or [token_ids]:
            delta = self._output.push(piece)
            taken.add(parser.push(delta.text) if delta.text else NOTHING)
            if delta.stopped is not None or parser.complete:
                break
        if last and delta.stopped is None and not parser.complete:
            delta = self._output.finish()
            taken.add(parser.push(delta.text) if delta.text else NOTHING)
        ended = delta.stopped is not None or parser.complete
        if last or ended:
            taken.add(parser.finish())
        content, reasoning = "".join(taken.content), "".join(taken.reasoning)
        return ReplyDelta(content, reasoning, taken.calls, ended, delta.stopped, delta.token_count_used)


class _Taken:
    """What the parser has given for one message, with one delta for each call."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[ToolCallDelta] = []

    def add(self, parsed: Parsed) -> None:
        self.content.append(parsed.content)
        self.reasoning.append(parsed.reasoning)
        for delta in parsed.tool_calls:
            if self.calls and self.calls[-1].index == delta.index:
                first = self.calls.pop()
                self.calls.append(replace(first, arguments=first.arguments + delta.arguments))
            else:
                self.calls.append(delta)
