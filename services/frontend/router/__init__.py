"""Which workers there are, and which of them run a request.

- `worker`: one incarnation of one worker: its connection, its state, whether it can be routed to
- `worker_set`: all of them, kept equal to the registry
- `placement`: who could run a model's requests together, and the pair (or the aggregated worker) of one attempt
- `policies`: who of those gets a request; `kv`: who holds which prefix; `hints`: whom a request names itself
"""
