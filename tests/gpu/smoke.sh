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

if [ -n "${KIT:-}" ]; then
  # The compile cache's keys hold the folder's name, so it is always the same one.
  SITE=$(dirname "$(mktemp -u)")/site
  if [ ! -d "$SITE/sglang" ]; then
    mkdir -p "$SITE"
    tar xJf "$KIT/site.tar.xz" -C "$SITE"
    [ ! -f "$KIT/jit-cache.tar.xz" ] || tar xJf "$KIT/jit-cache.tar.xz" -C ~
  fi
  export PYTHONPATH="$SITE" CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} PATH="$SITE/bin:$PATH"
fi

exec "$PYTHON" -P tests/gpu/smoke.py --out "$OUT" ${LAYERS:+--layers "$LAYERS"}
