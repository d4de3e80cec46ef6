#!/usr/bin/env bash
# Prefill on one GPU, decode on another, then one aggregated worker: greedy tokens must be equal.
#
#   tests/gpu/smoke.sh                    with sglang, nixl and kvbaton's frontend and worker extras installed
#   KIT=.gpu tests/gpu/smoke.sh           on a host without package access: KIT holds site.tar.xz (a folder for
#                                         PYTHONPATH, with bin/etcd) and, to start faster, jit-cache.tar.xz
#
# LAYERS=4 shrinks the model for a quick check. Results go to $OUT (default: build/gpu): smoke.json and every log.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"

# shellcheck source=tests/gpu/kit.sh
source tests/gpu/kit.sh

exec "$PYTHON" -P tests/gpu/smoke.py --out "$OUT" ${LAYERS:+--layers "$LAYERS"}
