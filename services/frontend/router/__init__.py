"""Which workers there are, and which of them run a request.

- `worker`: one incarnation of one worker: its connection, its state, whether it can be routed to
- `worker_set`: all of them, kept equal to the registry
- `placement`: the pair (or the aggregated worker) for one request
"""
