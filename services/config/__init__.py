"""Configuration of each process: frozen dataclasses, one flag, one environment variable and one YAML key per field.

- `flags`: dataclass fields to argparse flags, KVBATON_* variables and YAML keys, in their order of precedence
- `yaml_file`: the file of --config and the sections in it
- `common`: what every process has (listening, etcd, TLS, logs, traces, the file itself)
- `worker`, `frontend`: one dataclass per process
- `report`: the configuration in force, logged and dumped without secrets
- `errors`: the one error of all of them
"""
