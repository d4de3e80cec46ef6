"""Lets the policies choose for one request; whom they choose has it as load from then on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import cast

from services.frontend.dispatch.line import Ticket
from services.frontend.dispatch.pair_checks import PairChecks, PairState
from services.frontend.link.load import LegShare
from services.frontend.link.protocol import Credit
from services.frontend.router.hints import Hints, required
from services.frontend.router.placement import Placement, Target
from services.frontend.router.policies.make import Policies
from services.frontend.router.policies.policy import Policy, Prompt
from services.frontend.router.worker import Worker, WorkerRank


class Chooser:
    """Belongs to the event loop."""

    def __init__(self, policies: Policies, pairs: PairChecks) -> None:
        self._policies = policies
        self._pairs = pairs

    def require_hints(self, hints: Hints, targets: Sequence[Target]) -> None:
        """Raises RequestError where a policy needs a name that is missing; `targets` could serve the request."""
        if hints.optional:
            return
        if self._policies.decode.needs_hint and not hints.decode:
            raise required("decode_worker")
        if self._policies.prefill.needs_hint and not hints.prefill and not all(each.aggregated for each in targets):
            raise required("prefill_worker")

    def streaming(self, prompt: Prompt, workers: Iterable[Worker]) -> tuple[WorkerRank, LegShare]:
        """Who streams the answer, of these decode and aggregated workers."""
        ranks = [rank for worker in workers for rank in worker.ranks]
        rank, cached = _choose(self._policies.decode, ranks, prompt)
        return rank, _share(rank, prompt, cached)

    def place(self, ticket: Ticket, target: Target, credit: Credit) -> Placement:
        """The request's workers, with the target's credit. A pair that is not proven has no shares: it can't be used.

        What was chosen for the ticket before is taken over: only the chosen worker's credits are for it.
        """
        began = time.monotonic()
        prompt = ticket.prompt
        assert prompt is not None
        prefill: WorkerRank | None = None
        prefill_share: LegShare | None = None
        if not target.aggregated:
            ranks = [rank for worker in self._prefills(ticket, target) for rank in worker.ranks]
            prefill, cached = _choose(self._policies.prefill, ranks, prompt, partner=target.decode.instance_id)
            if self._pairs.state(prefill.worker, target.decode) is not PairState.PROVEN:
                return Placement(target.decode, prefill.worker, credit)
            self._policies.prefill.routed(prefill, prompt)
            prefill_share = _share(prefill, prompt, cached)
        decode, decode_share = self._decode(ticket, prompt, target)
        self._policies.decode.routed(decode, prompt)
        return Placement(
            target.decode,
            None if prefill is None else prefill.worker,
            credit,
            routing=ticket.routing + time.monotonic() - began,
            decode_rank=decode.dp_rank,
            prefill_rank=None if prefill is None else prefill.dp_rank,
            decode_share=decode_share,
            prefill_share=prefill_share,
        )

    def _decode(self, ticket: Ticket, prompt: Prompt, target: Target) -> tuple[WorkerRank, LegShare]:
        if ticket.rank is not None and ticket.share is not None:
            return ticket.rank, ticket.share
        return self.streaming(prompt, [target.decode])

    def _prefills(self, ticket: Ticket, target: Target) -> list[Worker]:
        """Those that can serve it; the preferred one alone, if its pair has been proven."""
        fitting = list(ticket.prefills(target))
        for worker in fitting if ticket.prefers else ():
            preferred = worker.instance_id == ticket.prefers
            if preferred and self._pairs.state(worker, target.decode) is PairState.PROVEN:
                return [worker]
        return fitting


def _choose(
    policy: Policy, ranks: Sequence[WorkerRank], prompt: Prompt, *, partner: str = ""
) -> tuple[WorkerRank, int]:
    """A rank, and how many of the prompt's tokens it is thought to have in its cache."""
    chosen, cached = policy.choose(ranks, prompt, partner=partner)
    return cast("WorkerRank", chosen), cached


def _share(rank: WorkerRank, prompt: Prompt, cached: int) -> LegShare:
    """From now on the leg counts as the worker's load. A decode worker computes no prompts."""
    tokens = len(prompt.token_ids)
    computed = max(0, tokens - cached) if rank.cache is not None else 0
    return LegShare(rank.worker.load, rank.dp_rank, prefill_tokens=computed, kv_tokens=tokens, cached=cached)
