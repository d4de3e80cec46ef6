"""What prefill and decode workers share.

- `process`: the process: main thread builds the engine, serving thread runs the event loop, signals end it
- `host`: from loading to serving to drained, in order
- `follower`: the same for the nodes behind the first of an engine; `engine_host`: what both have
- `credits`: the window that frontends share
- `health/`: canary, payload; `kv_events/`: what the prefix caches hold
- `lifecycle`: the worker's state, and everyone who must hear of it
- `role`: what a role adds (services/prefill, services/decode)
- `legs`: the requests this worker runs, by id
- `leg_runner`: one leg from its request to its last token
- `registration`: the worker's record
- `servicers/`: the gRPC services
- `engines/`: the `Engine` protocol and its implementations
"""
