"""How many answers a request asks for, and what sets each of them apart."""

from __future__ import annotations

from dataclasses import replace

from kvbaton.errors import invalid
from kvbaton.v1 import generate_pb2
from services.requests import Sampling

MAX_CHOICES = 128

_SEEDS = 1 << 63
# Odd, so that its multiples are all different modulo 2^63; 2^64 divided by the golden ratio, so that the first 128 lie
# far apart: the choices of seed 7 are not those of seed 8, as they would be with seed + choice.
_SEED_STEP = 0x9E3779B97F4A7C15


def check_choices(request: generate_pb2.GenerateRequest) -> int:
    """How many. Raises RequestError naming `n`."""
    if not request.HasField("n"):
        return 1
    if not 1 <= request.n <= MAX_CHOICES:
        raise invalid("n", f"{request.n} is not in [1, {MAX_CHOICES}]")
    return request.n


def choice_seed(seed: int, choice: int) -> int:
    """The 63-bit seed of one choice, from 0, whose seed is the request's own; no two choices of a request share one."""
    return (seed + choice * _SEED_STEP) % _SEEDS


def sampling_of(sampling: Sampling, choice: int) -> Sampling:
    """One choice's; unseeded sampling stays so, and is another one in every request."""
    return sampling if sampling.seed is None else replace(sampling, seed=choice_seed(sampling.seed, choice))
