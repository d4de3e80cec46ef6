#!/usr/bin/env bash
# The field's load generators, unmodified, against /v1: installs one into an environment of its own, starts a cluster of
# simulated engines that serve under SmolLM2's tokenizer (or takes yours), runs it on every route that it has requests for,
# prints one line a run. Exit status 0 only if every request of every run was answered. See docs/load-generators.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=deploy/local/common.sh
source "$ROOT/deploy/local/common.sh"

AIPERF=0.13.0 GUIDELLM=0.8.1
HOME_FOLDER=${LOADGEN_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/kvbaton/loadgen}
INPUT_TOKENS=128 OUTPUT_TOKENS=32

usage() {
    cat <<USAGE
usage: loadgen.sh aiperf|guidellm [--requests N] [--url URL --model NAME --tokenizer FOLDER [--embedding-model NAME]]

  --requests         requests of each run (default: 40)
  --url              a frontend that runs already, http://HOST:PORT; without it the script starts a cluster of simulated
                     engines and stops it again
  --model            the model to ask there, as /v1/models reports it
  --tokenizer        a folder with that model's tokenizer.json and tokenizer_config.json
  --embedding-model  the model of the embeddings run; without it there is none (with --url)

The generator goes to \$LOADGEN_HOME (default: $HOME_FOLDER), about 1.5 GB and a minute or two the first time; reports and
logs go to \$STATE_DIR, which is shown.
USAGE
}

# ensure_installed NAME VERSION: sets BIN. Hash-checked, and complete or not there at all.
ensure_installed() {
    local venv=$HOME_FOLDER/$1-$2 log=$STATE_DIR/install.log
    BIN=$venv/bin
    [[ ! -f $venv/.complete ]] || return 0
    printf 'Installing %s %s into %s (log: %s) ...\n' "$1" "$2" "$venv" "$log"
    mkdir -p "$HOME_FOLDER"
    {
        "$PYTHON" -m venv --clear "$venv"
        # The dataset loader needs torch: the CPU build, as scripts/setup-cpu.sh takes it.
        [[ $1 != guidellm ]] || install_torch
        "$BIN/python" -m pip install --no-deps --require-hashes -r "$ROOT/requirements/loadgen-$1.txt"
        touch "$venv/.complete"
    } >"$log" 2>&1 || die "$1 can't be installed; the end of $log: $(tail -n 3 "$log")"
}

install_torch() {
    local install=("$BIN/python" -m pip install --no-deps --require-hashes -r "$ROOT/requirements/cpu-torch.txt")
    if [[ -n ${KVBATON_TORCH_INDEX:-} ]]; then
        "${install[@]}" --index-url "$KVBATON_TORCH_INDEX"
    else
        "${install[@]}" || "${install[@]}" --index-url https://download.pytorch.org/whl/cpu
    fi
}

free_ports() {
    "$PYTHON" - "$1" <<'PY'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in held))
PY
}

# start_cluster: sets URL, MODEL, EMBEDDING_MODEL and TOKENIZER. The frontend's trap (common.sh) stops all of it.
start_cluster() {
    local ports etcd model_root=${XDG_CACHE_HOME:-$HOME/.cache}/kvbaton/models
    "$KVBATON" model fetch smollm2 >"$STATE_DIR/model.log" 2>&1 || die "no model: $(tail -n 3 "$STATE_DIR/model.log")"
    MODEL=smollm2 EMBEDDING_MODEL=smollm2-embeddings TOKENIZER=$model_root/smollm2
    read -ra ports <<<"$(free_ports 10)"
    etcd=127.0.0.1:${ports[0]} URL=http://127.0.0.1:${ports[1]}
    export KVBATON_ETCD_ENDPOINTS=$etcd KVBATON_HOST=127.0.0.1
    start_etcd_if_none_answers
    start frontend "$KVBATON" frontend --http-port "${ports[1]}" --port "${ports[2]}"
    # A model of the vocabulary's size with times that show in a report; --sim lists all of them.
    local sim=vocab_size=49152,context_length=8192,prefill_base=0.005,decode_step=0.002
    local worker=(--engine simulated --model-path "$TOKENIZER" --sim "$sim")
    start prefill "$KVBATON" prefill "${worker[@]}" --served-model-name "$MODEL" \
        --port "${ports[3]}" --system-port "${ports[4]}" --disaggregation-bootstrap-port "${ports[5]}"
    start decode "$KVBATON" decode "${worker[@]}" --served-model-name "$MODEL" \
        --port "${ports[6]}" --system-port "${ports[7]}"
    start worker "$KVBATON" decode --embedding-worker "${worker[@]}" --served-model-name "$EMBEDDING_MODEL" \
        --port "${ports[8]}" --system-port "${ports[9]}"
    wait_for_models "$MODEL" "$EMBEDDING_MODEL"
}

# wait_for_models NAME...: until /v1/models lists them all.
wait_for_models() {
    local name until=$((SECONDS + 60)) listed='' missing=$1
    while [[ -n $missing ]]; do
        ((SECONDS < until)) || die "no $missing after 60 s; logs: $STATE_DIR"
        for name in "${!PIDS[@]}"; do running "$name" || report_death "$name"; done
        sleep 0.2
        listed=$(get "$URL/v1/models" || true) missing=
        for name in "$@"; do [[ $listed == *"\"id\":\"$name\""* ]] || missing=$name; done
    done
}

get() { "$PYTHON" -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())' "$1" 2>/dev/null; }

serves() { [[ $ROUTES == *"\"$1\""* ]]; }

# run NAME COMMAND...: one run of the generator, its output in a log; what it reports is judged by `results`, since both
# generators exit with 0 when requests fail.
run() {
    local name=$1 status=0
    shift
    mkdir -p "$STATE_DIR/$name"
    printf '%q ' "$@" >"$STATE_DIR/$name/command.txt"
    # aiperf refuses a tokenizer's folder when the hub is declared offline; neither asks the hub for one that is a folder.
    (cd "$STATE_DIR/$name" && env -u HF_HUB_OFFLINE "$@" </dev/null >output.log 2>&1) || status=$?
    results "$name" "$status" || FAILED+=("$name")
}

results() {
    "$PYTHON" "$ROOT/scripts/loadgen_results.py" "$GENERATOR" "$STATE_DIR/$1" --requests "$REQUESTS" --status "$2"
}

# with_aiperf NAME MODEL ENDPOINT-TYPE CONCURRENCY [FLAGS]
with_aiperf() {
    run "$1" "$BIN/aiperf" profile --url "$URL" --model "$2" --tokenizer "$TOKENIZER" --endpoint-type "$3" \
        --concurrency "$4" --request-count "$REQUESTS" --isl "$INPUT_TOKENS" "${@:5}" \
        --ui none --no-gpu-telemetry --output-artifact-dir "$STATE_DIR/$1"
}

# with_guidellm NAME MODEL ROUTE STREAMS [BACKEND OPTIONS]
with_guidellm() {
    run "$1" "$BIN/guidellm" run --backend "kind=openai_http,target=$URL,model=$2,request_format=$3${5:+,$5}" \
        --profile "kind=concurrent,streams=$4" --constraint "kind=max_requests,count=$REQUESTS" \
        --tokenizer "kind=huggingface_auto,model=$TOKENIZER" \
        --data "kind=synthetic_text,prompt_tokens=$INPUT_TOKENS,output_tokens=$OUTPUT_TOKENS" \
        --output "kind=json,path=$STATE_DIR/$1/report.json" --output kind=console --disable-console-interactive
}

all_with_aiperf() {
    local streamed=(--streaming --osl "$OUTPUT_TOKENS" --use-server-token-count --extra-inputs ignore_eos:true)
    with_aiperf chat-1 "$MODEL" chat 1 "${streamed[@]}"
    with_aiperf chat-8 "$MODEL" chat 8 "${streamed[@]}"
    with_aiperf chat-usage-8 "$MODEL" chat 8 "${streamed[@]}" --per-chunk-usage
    with_aiperf chat-plain-8 "$MODEL" chat 8 --osl "$OUTPUT_TOKENS"
    with_aiperf completions-8 "$MODEL" completions 8 "${streamed[@]}"
    [[ -z $EMBEDDING_MODEL ]] || with_aiperf embeddings-4 "$EMBEDDING_MODEL" embeddings 4 --prompt-batch-size 4
    ! serves /v1/responses || with_aiperf responses-8 "$MODEL" responses 8 --streaming --osl "$OUTPUT_TOKENS"
}

all_with_guidellm() {
    with_guidellm chat-1 "$MODEL" /v1/chat/completions 1
    with_guidellm chat-8 "$MODEL" /v1/chat/completions 8
    with_guidellm chat-plain-8 "$MODEL" /v1/chat/completions 8 stream=false
    with_guidellm completions-8 "$MODEL" /v1/completions 8
    [[ -z $EMBEDDING_MODEL ]] || with_guidellm embeddings-4 "$EMBEDDING_MODEL" /v1/embeddings 4
    ! serves /v1/responses || with_guidellm responses-8 "$MODEL" /v1/responses 8
}

GENERATOR='' URL='' MODEL='' EMBEDDING_MODEL='' TOKENIZER='' REQUESTS=40 FAILED=()
while (($#)); do
    case $1 in
        aiperf | guidellm) GENERATOR=$1; shift ;;
        --url) URL=${2:?--url needs a value}; shift 2 ;;
        --model) MODEL=${2:?--model needs a value}; shift 2 ;;
        --embedding-model) EMBEDDING_MODEL=${2:?--embedding-model needs a value}; shift 2 ;;
        --tokenizer) TOKENIZER=${2:?--tokenizer needs a value}; shift 2 ;;
        --requests) REQUESTS=${2:?--requests needs a value}; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
[[ -n $GENERATOR ]] || { usage >&2; exit 2; }
[[ $REQUESTS =~ ^[1-9][0-9]*$ ]] || die "--requests $REQUESTS is no number of requests"
[[ -z $URL || (-n $MODEL && -n $TOKENIZER) ]] || die "--url goes with --model and --tokenizer"
[[ -n $URL || -z $MODEL$TOKENIZER$EMBEDDING_MODEL ]] || die "--model, --tokenizer and --embedding-model go with --url"

prepare "loadgen-$GENERATOR"
PYTHON=$(dirname "$KVBATON")/python
printf 'Reports and logs: %s\n' "$STATE_DIR"
if [[ $GENERATOR == aiperf ]]; then ensure_installed aiperf "$AIPERF"; else ensure_installed guidellm "$GUIDELLM"; fi
[[ -n $URL ]] || start_cluster
ROUTES=$(get "$URL/openapi.json") || die "nothing answers at $URL/openapi.json"

"$PYTHON" "$ROOT/scripts/loadgen_results.py" --header
"all_with_$GENERATOR"
((${#FAILED[@]} == 0)) || die "failed: ${FAILED[*]} (output.log and command.txt of each: $STATE_DIR)"
