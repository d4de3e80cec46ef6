"""The gRPC services of a worker.

- `generate`: GenerateService
- `health`: HealthService
- `model`: ModelService
- `bootstrap`: BootstrapService as a role without one answers it; prefill and decode have their own
"""
