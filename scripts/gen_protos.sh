#!/usr/bin/env bash
# Generates kvbaton/v1 from protos/, or into the folder given as the first argument.
# grpcio-tools is pinned: newer output refuses to import beside an older grpcio runtime.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
export PATH="$(dirname "$(command -v "$python")"):$PATH" # protoc-gen-mypy_grpc
mkdir -p "$out/kvbaton/v1"
# Compiled from the root: aetcd registers the bare file names kv.proto and rpc.proto.
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  --mypy_grpc_out="$out" protos/kvbaton/v1/*.proto
