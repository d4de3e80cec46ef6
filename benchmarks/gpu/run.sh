#!/usr/bin/env bash
# One stage on a host with two GPUs. To $OUT (default: build/gpu) go STAGE.json and STAGE-logs.tar.gz; a short table is
# printed last, and each stage ends within eight minutes, start-up and all.
#
#   benchmarks/gpu/run.sh smoke [--layers 4]    tokens of the pair equal those of one aggregated worker
#   benchmarks/gpu/run.sh parity                the same at many lengths, at once, cached, page sizes, real text; bytes moved
#   benchmarks/gpu/run.sh ranks                 two pairs, tp 2 and dp 2; with four GPUs each worker has its own
#   benchmarks/gpu/run.sh faults                prefill and decode killed, prefill replaced, a storm of cancellations
#   benchmarks/gpu/run.sh bench [--systems …]   Baton's pair beside bare SGLang's pair, and its HTTP edge, in one run
#   benchmarks/gpu/run.sh timeline              one request at a time, taken apart: Baton and bare SGLang
#   benchmarks/gpu/run.sh report                the results in $OUT into docs/gpu.md; needs no GPU
#
# --help behind a stage says its flags. --quick --device cpu tries a stage out with real engines on a CPU; SGLang's (or the
# simulated engine's) own flags go behind --.
#
# KIT=.gpu on a host without package access: KIT holds site.tar.xz (a folder for PYTHONPATH, with bin/etcd) and, to start
# faster, jit-cache.tar.xz. What doesn't fit into one call comes in several: `KIT=.gpu-1 benchmarks/gpu/run.sh kit` only
# unpacks, and a wheel may come in parts (docs/gpu.md: real text).
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=${1:?smoke, parity, ranks, faults, bench, timeline, report or kit}
shift
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
export PYTHONUNBUFFERED=1
# shellcheck source=benchmarks/gpu/kit.sh
source benchmarks/gpu/kit.sh
case "$stage" in
  kit) echo "unpacked to ${SITE:?needs KIT}" ;;
  report) exec "$PYTHON" -P benchmarks/gpu/report.py --out "$OUT" "$@" ;;
  *) exec "$PYTHON" -P benchmarks/gpu/stage.py "$stage" --out "$OUT" "$@" ;;
esac
