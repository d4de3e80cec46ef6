"""An answer as its client has it in the end, and every way of dividing a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from services.frontend.parsers.protocol import Parsed, StreamParser

# On a busy machine the time of one example says nothing.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Call:
    """One call, its pieces joined."""

    name: str = ""
    arguments: str = ""
    id: str = field(default="", compare=False)


@dataclass
class Read:
    """What a client has collected."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list[Call])

    def add(self, parsed: Parsed) -> None:
        """As the contract has it: the first delta of a call, and no other, has its id and its name."""
        self.content += parsed.content
        self.reasoning += parsed.reasoning
        for delta in parsed.tool_calls:
            if delta.index == len(self.calls):
                assert delta.id
                assert delta.name
                self.calls.append(Call(delta.name, "", delta.id))
            else:
                assert not delta.id + delta.name, "neither is said twice"
                assert delta.arguments, "no delta is empty"
            self.calls[delta.index].arguments += delta.arguments


def read(parser: StreamParser, pieces: Iterable[str]) -> Read:
    """All pieces, and the end."""
    answer = Read()
    for piece in pieces:
        answer.add(parser.push(piece))
    answer.add(parser.finish())
    assert parser.called == bool(answer.calls)
    return answer


def cut(text: str, borders: Iterable[int]) -> list[str]:
    """The text, divided at these places."""
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[start:end] for start, end in pairwise(places)]


def borders() -> st.SearchStrategy[Sequence[int]]:
    """Where to divide a text: anywhere, often in many places."""
    return st.lists(st.integers(0, 10_000), max_size=60)
