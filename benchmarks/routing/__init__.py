"""Which routing policy serves prompts with shared prefixes best, on a committed trace.

    python -m benchmarks.routing [--policies round-robin,kv-aware] [--plot routing.svg]

Every policy plays the same trace (`trace.jsonl`) against workers of its own: 16 aggregated ones, which hold the same
eighths of the prefixes before the first request. Queue, credits, sessions, load reports, KV events, index and policies
are the product's; gRPC, registry and clients are left out. The engines are simulated: prefill takes as long as its
tokens that are not in the prefix cache. Time is simulated too, so the numbers are the same on a busy machine.

- `trace`: the requests; `workers`: who serves them; `play`: one policy's turn; `report`: table, promises, plot
- `clock`: simulated time; `cost`: what one decision costs in real time (`--cost`)
"""
