"""How a leg reaches its worker.

- `protocol`: `WorkerLink`, and what comes back
- `streams`: one gRPC stream per leg
"""
