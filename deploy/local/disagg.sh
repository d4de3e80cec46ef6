#!/usr/bin/env bash
# A frontend, a prefill worker and a decode worker on this machine: what `kvbaton up` does, in plain sight.
set -euo pipefail
# shellcheck source=deploy/local/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FRONTEND_PORT=${FRONTEND_PORT:-50051} HTTP_PORT=${HTTP_PORT:-8000}
PREFILL_PORT=${PREFILL_PORT:-50061} PREFILL_SYSTEM_PORT=${PREFILL_SYSTEM_PORT:-8081}
DECODE_PORT=${DECODE_PORT:-50062} DECODE_SYSTEM_PORT=${DECODE_SYSTEM_PORT:-8082}
BOOTSTRAP_PORT=${BOOTSTRAP_PORT:-12345}

usage() {
    cat <<USAGE
usage: disagg.sh [--model-path MODEL] [--enable-otel] [-h] [flags for both workers]

  --model-path   smollm2, a folder, or a hub id (default: smollm2)
  --enable-otel  traces over OTLP to OTEL_EXPORTER_OTLP_ENDPOINT (default: http://localhost:4317)

Everything else goes to both workers: --device cpu, --served-model-name NAME, --tp 2, ... Prefill uses the first half of
the GPUs of CUDA_VISIBLE_DEVICES (default: 0,1), decode the second. Ports: gRPC $FRONTEND_PORT, HTTP $HTTP_PORT; workers
$PREFILL_PORT and $DECODE_PORT, their health and metrics $PREFILL_SYSTEM_PORT and $DECODE_SYSTEM_PORT, bootstrap
$BOOTSTRAP_PORT (FRONTEND_PORT, HTTP_PORT, PREFILL_PORT, DECODE_PORT, PREFILL_SYSTEM_PORT, DECODE_SYSTEM_PORT,
BOOTSTRAP_PORT). etcd is started if none answers at KVBATON_ETCD_ENDPOINTS (default: 127.0.0.1:2379). Logs stay in
\$STATE_DIR, which is shown at the start. Ctrl-C or SIGTERM ends all of it.
USAGE
}

MODEL=smollm2 OTEL='' FORWARDED=() DEVICE=cuda
while (($#)); do
    case $1 in
        --model-path) MODEL=${2:?--model-path needs a value}; shift 2 ;;
        --model-path=*) MODEL=${1#*=}; shift ;;
        --enable-otel) OTEL=--enable-otel; shift ;;
        -h | --help) usage; exit 0 ;;
        --device) DEVICE=${2:?--device needs a value}; FORWARDED+=("$1" "$2"); shift 2 ;;
        --device=*) DEVICE=${1#*=}; FORWARDED+=("$1"); shift ;;
        *) FORWARDED+=("$1"); shift ;;
    esac
done

if [[ $DEVICE == cuda ]]; then
    IFS=, read -ra GPUS <<<"${CUDA_VISIBLE_DEVICES:-0,1}"
    EACH=$((${#GPUS[@]} / 2))
    ((EACH)) || die "two GPUs are needed, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
    join() { local IFS=,; printf '%s' "$*"; }
    PREFILL_ENV=(CUDA_VISIBLE_DEVICES="$(join "${GPUS[@]:0:EACH}")")
    DECODE_ENV=(CUDA_VISIBLE_DEVICES="$(join "${GPUS[@]:EACH:EACH}")")
else
    # Two engines on one CPU: more threads each would only be in each other's way.
    PREFILL_ENV=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
    DECODE_ENV=("${PREFILL_ENV[@]}")
fi

[[ -z $OTEL ]] || export OTEL_EXPORTER_OTLP_ENDPOINT="${OTEL_EXPORTER_OTLP_ENDPOINT:-http://localhost:4317}"
prepare disagg
start_etcd_if_none_answers

start frontend OTEL_SERVICE_NAME=kvbaton-frontend \
    "$KVBATON" frontend --port "$FRONTEND_PORT" --http-port "$HTTP_PORT" ${OTEL:+"$OTEL"}

WORKER_FLAGS=(--model-path "$MODEL" --page-size 16 --disaggregation-transfer-backend nixl)

start prefill OTEL_SERVICE_NAME=kvbaton-worker-prefill "${PREFILL_ENV[@]}" \
    "$KVBATON" prefill --disaggregation-mode prefill --disaggregation-bootstrap-port "$BOOTSTRAP_PORT" \
    --port "$PREFILL_PORT" --system-port "$PREFILL_SYSTEM_PORT" "${WORKER_FLAGS[@]}" ${OTEL:+"$OTEL"} "${FORWARDED[@]}"

start decode OTEL_SERVICE_NAME=kvbaton-worker-decode "${DECODE_ENV[@]}" \
    "$KVBATON" decode --disaggregation-mode decode \
    --port "$DECODE_PORT" --system-port "$DECODE_SYSTEM_PORT" "${WORKER_FLAGS[@]}" ${OTEL:+"$OTEL"} "${FORWARDED[@]}"

printf 'Logs: %s\n' "$STATE_DIR"
follow "$STATE_DIR/frontend" "$STATE_DIR/prefill" "$STATE_DIR/decode"
watch
