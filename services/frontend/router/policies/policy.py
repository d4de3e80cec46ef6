"""What a routing policy is asked, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from services.frontend.link.load import RankLoad
from services.frontend.router.kv.index import Holder


class Candidate(Protocol):
    """One data-parallel rank of one worker. The same rank is the same object every time."""

    @property
    def instance_id(self) -> str:
        """The worker's name."""
        ...

    @property
    def dp_rank(self) -> int:
        """From 0."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens of one KV page."""
        ...

    @property
    def cache(self) -> Holder | None:
        """Where prefixes can be found again: prefill and aggregated workers have one."""
        ...

    @property
    def load(self) -> RankLoad:
        """As known now."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What of a request matters to routing. Prefixes of different `lora_name` or `cache_salt` are never shared."""

    token_ids: Sequence[int]
    lora_name: str = ""
    cache_salt: str = ""


class Choice(NamedTuple):
    """A candidate, and how many of the prompt's tokens its prefix cache is thought to hold."""

    candidate: Candidate
    cached_tokens: int = 0


class Policy(ABC):
    """Belongs to the event loop. One instance serves one role; its state is its own."""

    needs_hint: ClassVar[bool] = False
    """A request that doesn't name its worker is refused."""

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate], prompt: Prompt, *, partner: str = "") -> Choice:
        """One of `candidates`, of which there is at least one.

        `partner` is the decode worker that the chosen prefill worker will send to; empty in the choice of a worker that
        streams the answer. Must not wait, and is called for every request.
        """

    def routed(self, candidate: Candidate, prompt: Prompt) -> None:  # noqa: B027 - most have no use for it
        """The request really goes there."""


def fewest_tokens(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with the least to do, and of those the ones with the fewest requests."""
    least = min((candidate.load.tokens, candidate.load.requests) for candidate in candidates)
    return [each for each in candidates if (each.load.tokens, each.load.requests) == least]
