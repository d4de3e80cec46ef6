"""How a leg reaches its worker.

- `protocol`: `WorkerLink`, and what comes back
- `streams`: one gRPC stream per leg
- `session`: one gRPC stream per worker; `outgoing`: what waits to be sent in it; `credits`: decode's credits
- `load`: what the worker has to do, by its reports and by what was sent there since
- `broken`: why a stream broke
- `proof`: whether a worker has let go of a leg whose stream broke
"""
