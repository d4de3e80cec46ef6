"""The simulated engine: SGLang's rules, times and failures without a model, and tokens that can't be faked.

- `engine`: the `Engine` protocol; `options`: what `--sim` takes; `control`: what /simulator takes
- `oracle`: what every correct request must answer
- `scheduler`, `rank`, `prefill_rank`, `decode_rank`: one scheduler for all data-parallel ranks
- `pages`, `prefix_cache`: the page array that tokens are read from, and what is kept of prompts
- `wire`, `bootstrap`, `peers`, `sender`: how a KV cache gets from prefill into decode's pages
- `faults`: what it does wrong on command
"""

from services.worker.engines.simulated.engine import Addresses, SimulatedEngine
from services.worker.engines.simulated.options import SimulatedOptions, parse_options

__all__ = ["Addresses", "SimulatedEngine", "SimulatedOptions", "parse_options"]
