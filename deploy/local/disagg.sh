#!/usr/bin/env bash
# A frontend, a prefill worker and a decode worker on this machine, started by hand: what `kvbaton up` does, without its
# supervision. etcd must run (KVBATON_ETCD_ENDPOINTS, default 127.0.0.1:2379).
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: disagg.sh [--model-path MODEL] [--device cpu|cuda] [-h] [flags for both workers]

  --model-path  smollm2, a folder, or a hub id (default: smollm2)
  --device      cuda: prefill on the first GPU of CUDA_VISIBLE_DEVICES, decode on the second (default: cuda)

gRPC on 50051, HTTP on 8000; workers' gRPC on 50061 and 50062, health and metrics on 8081 and 8082; bootstrap on 12345.
Ctrl-C or SIGTERM ends all of it.
USAGE
}

MODEL=smollm2
DEVICE=cuda
NATIVE=()
while (($#)); do
    case $1 in
        --model-path) MODEL=${2:?--model-path needs a value}; shift 2 ;;
        --device) DEVICE=${2:?--device needs a value}; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) NATIVE+=("$1"); shift ;;
    esac
done

if [[ $DEVICE == cuda ]]; then
    IFS=, read -ra GPUS <<<"${CUDA_VISIBLE_DEVICES:-0,1}"
    PREFILL_ENV=(CUDA_VISIBLE_DEVICES="${GPUS[0]}")
    DECODE_ENV=(CUDA_VISIBLE_DEVICES="${GPUS[1]:?two GPUs are needed}")
else
    # Two engines on one CPU: more threads each would only be in each other's way.
    PREFILL_ENV=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
    DECODE_ENV=("${PREFILL_ENV[@]}")
fi

# Background jobs of a script ignore SIGINT, so Ctrl-C reaches them as SIGTERM from here. The frontend ends first, because
# its requests need the workers.
FRONTEND=
WORKERS=()
stop() {
    trap '' INT TERM
    [[ -z $FRONTEND ]] || { kill -TERM "$FRONTEND" 2>/dev/null && wait "$FRONTEND"; } || true
    ((${#WORKERS[@]} == 0)) || kill -TERM "${WORKERS[@]}" 2>/dev/null || true
    wait || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

kvbaton frontend --port 50051 --http-port 8000 &
FRONTEND=$!

env "${PREFILL_ENV[@]}" kvbaton prefill --model-path "$MODEL" --device "$DEVICE" \
    --port 50061 --system-port 8081 --disaggregation-bootstrap-port 12345 "${NATIVE[@]}" &
WORKERS+=($!)

env "${DECODE_ENV[@]}" kvbaton decode --model-path "$MODEL" --device "$DEVICE" \
    --port 50062 --system-port 8082 "${NATIVE[@]}" &
WORKERS+=($!)

# Any process that ends takes the rest along.
wait -n
