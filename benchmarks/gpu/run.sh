#!/usr/bin/env bash
# Stages on a host with two GPUs; results and logs go to $OUT (default: build/gpu), a short table is printed last.
#
#   benchmarks/gpu/run.sh smoke            tokens of the pair equal those of one aggregated worker
#   benchmarks/gpu/run.sh bench [FLAGS]    Baton's pair beside bare SGLang's pair, in one run
#
# KIT=.gpu and LAYERS: see tests/gpu/smoke.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
stage=${1:?smoke or bench}
shift
OUT=${OUT:-build/gpu}
export OUT
case "$stage" in
  smoke) exec tests/gpu/smoke.sh ;;
  bench) ;;
  *) echo "no stage $stage" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
# shellcheck source=tests/gpu/kit.sh
source tests/gpu/kit.sh
exec "$PYTHON" -P benchmarks/gpu/bench.py --out "$OUT/bench" "$@"
