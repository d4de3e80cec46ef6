"""From a request that waits to workers that will take it.

- `queue`: requests wait for a decode worker's credit, by priority, then arrival
- `line`: the requests of one model that wait; `patience`: retries that wait for workers to come back
- `targets`: who could serve them, in view of the pairs; `chooser`: asks the policies for one request
- `pair_checks`: whether two workers have proven that they can hand over a KV cache
"""
