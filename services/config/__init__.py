"""Configuration of each process: frozen dataclasses, one flag and one environment variable per field.

- `flags`: dataclass fields to argparse flags and KVBATON_* variables
- `common`: what every process has (listening, etcd, TLS, logs)
- `worker`, `frontend`: one dataclass per process
"""
