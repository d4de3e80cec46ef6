"""Which requests are sent, and when: a function of flags and seed alone, whatever the server does."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from kvbaton.client import SamplingParams
from kvbaton.v1.generate_pb2 import GenerateRequest
from services.tools.bench.options import BenchFlags


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. `cancel_at` is a share of the cancel window in [0, 1), or None."""

    index: int
    message: GenerateRequest
    cancel_at: float | None


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds after the beginning, without end; `rate` per second."""
    draw = random.Random(f"{seed}:arrivals")
    return accumulate(iter(lambda: draw.expovariate(rate), None))


def random_tokens(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    """`count` token ids, uniform over the vocabulary (but for a bias below vocab_size / 2^32)."""
    words = array("I", draw.randbytes(4 * count))
    return [word % vocab_size for word in words]


class Workload:
    """Requests by their index. Raises ValueError when `vocab_size` is missing and needed."""

    def __init__(self, flags: BenchFlags, *, vocab_size: int, texts: Sequence[str] = (), run: str = "bench") -> None:
        if not texts and vocab_size < 1:
            raise ValueError("the server doesn't say how large its vocabulary is; use --text-file")
        self._flags, self._vocab_size, self._texts, self._run = flags, vocab_size, texts, run
        self._input, self._output = flags.input_length, flags.output_length
        draw = random.Random(f"{flags.seed}:prefixes")
        self._prefixes = [
            array("I", random_tokens(draw, flags.prefix_length, vocab_size)) for _ in range(flags.prefix_count)
        ]
        self._zipf = list(accumulate((rank + 1) ** -flags.prefix_zipf for rank in range(flags.prefix_count)))

    def planned(self, index: int, stream: str = "") -> Planned:
        """The request with this index; other streams have other requests, over the same prefixes."""
        draw = random.Random(f"{self._flags.seed}:{stream}:{index}")
        message = GenerateRequest(
            request_id=f"{self._run}{stream}-{index}",
            model=self._flags.model,
            sampling=SamplingParams(
                max_new_tokens=draw.randint(self._output.low, self._output.high),
                temperature=self._flags.temperature,
                ignore_eos=self._flags.ignore_eos,
            ),
        )
        cancelled, cancel_at = draw.random() < self._flags.cancel_rate, draw.random()
        if self._texts:
            message.text = draw.choice(self._texts)
        else:
            message.token_ids.ids.extend(self._prompt(draw))
        return Planned(index, message, cancel_at if cancelled else None)

    def _prompt(self, draw: random.Random) -> list[int]:
        length = draw.randint(self._input.low, self._input.high)
        if not self._prefixes:
            return random_tokens(draw, length, self._vocab_size)
        (prefix,) = draw.choices(self._prefixes, cum_weights=self._zipf)
        return [*prefix, *random_tokens(draw, length - len(prefix), self._vocab_size)]
