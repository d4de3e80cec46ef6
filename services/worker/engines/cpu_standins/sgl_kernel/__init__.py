"""Torch versions of the `sgl_kernel` entry points that SGLang uses on a CPU without the native build.

`assign_req_to_token_pool_cpu` is called for every batch, `murmur_hash32_cpu` for seeded sampling. Anything else can be
imported and raises when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

__version__ = "0.0.0+kvbaton"

_WORD = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new KV slots into its row: `req_to_token[request, start:end]` takes the next `end - start`."""
    taken = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def _rotated(word: torch.Tensor, bits: int) -> torch.Tensor:
    return ((word << bits) | (word >> (32 - bits))) & _WORD


def _mixed(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = (_rotated((block * 0xCC9E2D51) & _WORD, 15) * 0x1B873593) & _WORD
    return (_rotated(state ^ block, 13) * 5 + 0xE6546B64) & _WORD


def _finalized(state: torch.Tensor) -> torch.Tensor:
    state = state ^ (state >> 16)
    state = (state * 0x85EBCA6B) & _WORD
    state = state ^ (state >> 13)
    state = (state * 0xC2B2AE35) & _WORD
    return state ^ (state >> 16)


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, position, column): shape (rows, columns), values of 32 bits in int64.

    The same blocks in the same order as SGLang's Triton kernel (sglang/kernels/ops/sampling/murmur_hash.py). int64 holds
    every product because one factor is masked to 32 bits and wrapping keeps the low word right.
    """
    seeds = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = torch.zeros_like(seeds)
    state = _mixed(state, seeds & _WORD)
    state = _mixed(state, (seeds >> 32) & _WORD)
    state = _mixed(state, positions.to(torch.int64) & _WORD)
    rows = _mixed(state.unsqueeze(1), (col_indices.to(torch.int64) & _WORD).unsqueeze(0))
    return _finalized(rows ^ 16)


_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def _missing(name: str) -> Callable[..., NoReturn]:
    def call(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

    call.__name__ = name
    return call


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)
