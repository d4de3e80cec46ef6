"""The gRPC services of a worker.

- `generate`: GenerateService, one stream per leg
- `session`: WorkerSessionService, one stream for all legs of a frontend
- `health`: HealthService
- `admin`: AdminService
- `kv_events`: KvEventService
- `model`: ModelService
- `bootstrap`: BootstrapService as a role without one answers it; prefill and decode have their own
"""
