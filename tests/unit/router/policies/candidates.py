"""Ranks of workers that nobody runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.frontend.link.load import RankLoad
from services.frontend.router.kv.index import Holder
from services.frontend.router.policies.policy import Policy, Prompt

PROMPT = Prompt(list(range(1000)))


@dataclass(frozen=True, eq=False)
class Rank:
    instance_id: str
    dp_rank: int
    page_size: int
    cache: Holder | None
    load: RankLoad


def ranks(*tokens: int, cached: bool = True) -> list[Rank]:
    """Workers w0, w1, ... with so many prompt tokens to compute."""
    made: list[Rank] = []
    for number, each in enumerate(tokens):
        load = RankLoad()
        load.add(each, 0, 0)
        made.append(Rank(f"w{number}", 0, 16, Holder(f"w{number}", 0) if cached else None, load))
    return made


def chosen(policy: Policy, candidates: Sequence[Rank], times: int = 1, *, partner: str = "") -> list[str]:
    """Whom it chooses, so many times."""
    return [policy.choose(candidates, PROMPT, partner=partner).candidate.instance_id for _ in range(times)]
