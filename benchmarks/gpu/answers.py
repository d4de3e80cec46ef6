"""Whether two answers to one prompt are the same, and if not, whether their first difference is a near tie.

Kernels add up in another order in another batch. Where the model's two likeliest tokens are nearly as likely as each
other, that alone can swap them, and everything behind the first swap is another text. A wrong KV cache gives tokens
that were not likely at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

from benchmarks.gpu.prompts import prompt
from kvbaton.client import Answer, Client, SamplingParams

NEAR_TIE = 0.05
"""Difference of log probabilities (natural logarithm)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Tokens, for each its two likeliest candidates with their log probabilities, and what the prefix cache held."""

    tokens: list[int]
    candidates: list[list[tuple[int, float]]]
    cached_tokens: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which two answers differ; `gap` is None where neither token pair is a top-2 pair."""

    position: int
    tokens: tuple[int | None, int | None]
    gap: float | None

    @property
    def near_tie(self) -> bool:
        """Rounding may have decided."""
        return self.gap is not None and self.gap < NEAR_TIE

    def __str__(self) -> str:
        gap = "not its two likeliest" if self.gap is None else f"log probabilities {self.gap:.4f} apart"
        return f"token {self.position}: {self.tokens[0]} and {self.tokens[1]}, {gap}"


def difference(one: Answered, other: Answered) -> Difference | None:
    """None for equal tokens. The gap is the wider one of both answers' own; an answer that is shorter has none."""
    for position, tokens in enumerate(zip_longest(one.tokens, other.tokens)):
        if tokens[0] != tokens[1]:
            gaps = [_gap(each, position, tokens) for each in (one, other)]
            known = [gap for gap in gaps if gap is not None]
            return Difference(position, tokens, max(known) if len(known) == len(gaps) else None)
    return None


def _gap(answer: Answered, position: int, tokens: tuple[int | None, int | None]) -> float | None:
    top = answer.candidates[position] if position < len(answer.candidates) else []
    likely = dict(top[:2])
    if None in tokens or set(likely) != set(tokens):
        return None
    first, second = likely.values()
    return abs(first - second)


async def ask(client: Client, token_ids: Iterable[int], output_tokens: int) -> Answered:
    """Greedy, with two candidates for each token."""
    answer = await client.generate(token_ids=token_ids, sampling=greedy(output_tokens), logprobs=2)
    return answered(answer)


async def depend_on_the_context(client: Client, vocabulary: int) -> bool:
    """Whether another prompt with the same last token has another answer: else equal tokens prove nothing."""
    one = prompt(200, "one context", vocabulary)
    other = [*prompt(199, "another context", vocabulary), one[-1]]
    return (await ask(client, one, 8)).tokens != (await ask(client, other, 8)).tokens


def answered(answer: Answer) -> Answered:
    """Of a whole answer."""
    candidates = [[(top.token_id, top.logprob) for top in each.top] for each in answer.logprobs]
    usage = answer.finished.usage
    return Answered(list(answer.token_ids), candidates, usage.cached_prompt_tokens, answer.text)


def greedy(output_tokens: int) -> SamplingParams:
    """So many tokens, whatever they are."""
    return SamplingParams(max_new_tokens=output_tokens, temperature=0, ignore_eos=True)
