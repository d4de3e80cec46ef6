"""Names for prefixes: one 60-bit hash for every full page of a prompt, chained, equal on workers and frontends.

A page's hash depends on its tokens, on every page before it, on the page size, and on what else separates KV caches:
the LoRA adapter and the cache salt. So equal hashes mean equal prefixes, on whatever machine they were computed.

Hashes are 60 bits: CPython holds such an integer in 32 bytes, a longer one in 48. Among a million pages two share a
hash with a probability of 4e-7; a prompt then looks cached where it isn't, which costs time and never an answer.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import Struct, iter_unpack

# Smaller pages are hashed several together: SGLang's own default on a GPU is one token a page.
MIN_HASHED_TOKENS = 16
_TOKEN_BYTES = 4
_HASH = Struct("<Q")
_UNUSED_BITS = 4


def hashed_page_size(page_size: int) -> int:
    """Tokens that one hash stands for, where the engine's pages have `page_size`: whole pages, at least 16 tokens."""
    return -(-MIN_HASHED_TOKENS // page_size) * page_size


def prefix_hashes(
    token_ids: Sequence[int],
    page_size: int,
    *,
    lora_id: int | None = None,
    lora_name: str = "",
    cache_salt: str = "",
) -> list[int]:
    """The hash of every full page of the prompt, from its beginning. `page_size` is tokens per hash.

    `lora_id` is one engine's number for an adapter, `lora_name` the name that all workers know it by.
    """
    begin = root(page_size, lora_id=lora_id, lora_name=lora_name, cache_salt=cache_salt)
    return list(iter_prefix_hashes(token_ids, page_size, begin))


def iter_prefix_hashes(token_ids: Sequence[int], page_size: int, begin: int) -> Iterator[int]:
    """The same one by one, from a `root` on: who looks for the end of a match need not hash what follows it."""
    step, parent = page_size * _TOKEN_BYTES, begin
    content = page_bytes(token_ids)
    pages = iter_unpack(f"{step}s", content[: len(content) // step * step])
    pack, unpack = _HASH.pack, _HASH.unpack
    # `chained`, written out: a call for each page would take a fifth of the time.
    for (page,) in pages:
        parent = unpack(blake2b(pack(parent) + page, digest_size=8).digest())[0] >> _UNUSED_BITS
        yield parent


def page_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed: four bytes each, little endian."""
    tokens = token_ids if isinstance(token_ids, array) and token_ids.typecode == "I" else array("I", token_ids)
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()


def chained(parent: int, content: bytes) -> int:
    """The hash of the page with these `page_bytes` after the page (or `root`) with the hash `parent`."""
    digest = blake2b(parent.to_bytes(8, "little") + content, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> _UNUSED_BITS


@lru_cache(maxsize=1024)
def root(page_size: int, *, lora_id: int | None = None, lora_name: str = "", cache_salt: str = "") -> int:
    """What the first page's hash is chained to: no two kinds of KV cache have the same."""
    digest = blake2b(b"kvbaton prefix 1", digest_size=8)
    for part in (str(page_size), "" if lora_id is None else str(lora_id), lora_name, cache_salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> _UNUSED_BITS
