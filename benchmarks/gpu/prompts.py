"""Prompts of random tokens, the same in every mode, system and round."""

from __future__ import annotations

import random

from services.tools.bench.workload import random_tokens


def prompt(length: int, seed: str, vocabulary: int = 150_000) -> list[int]:
    """So many token ids below `vocabulary`."""
    return random_tokens(random.Random(f"{seed}:{length}"), length, vocabulary)
