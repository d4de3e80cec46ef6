"""What an engine tells of its prefix caches: pages that can be reused from now on, pages that can't any more.

Page hashes are the engine's own names, signed 64-bit integers; equal hashes of one engine mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class CacheKind(NamedTuple):
    """What besides its tokens tells a page from others: pages of different kinds are never shared."""

    lora_id: int | None = None
    lora_name: str = ""
    cache_salt: str = ""


PLAIN = CacheKind()


@dataclass(frozen=True, slots=True)
class BlockStored:
    """These pages, one after the other in a prompt, can be reused from now on. `block_size` is tokens per page."""

    block_hashes: Sequence[int]
    parent_block_hash: int | None
    """The page before the first; None where a prompt begins."""
    token_ids: Sequence[int]
    """Of all these pages, in order."""
    block_size: int
    kind: CacheKind = PLAIN


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These can't any more."""

    block_hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """None can."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True, slots=True)
class KvChange:
    """One event of one data-parallel rank's cache."""

    dp_rank: int
    event: KvEvent
