# shellcheck shell=bash
# Sourced: on a host without package access, SGLang and what it needs from $KIT. Nothing without KIT.
if [ -n "${KIT:-}" ]; then
  # The compile cache's keys hold the folder's name, so it is always the same one.
  SITE=$(dirname "$(mktemp -u)")/site
  if [ ! -d "$SITE/sglang" ] && [ -f "$KIT/site.tar.xz" ]; then
    mkdir -p "$SITE"
    tar xJf "$KIT/site.tar.xz" -C "$SITE"
    [ ! -f "$KIT/jit-cache.tar.xz" ] || tar xJf "$KIT/jit-cache.tar.xz" -C ~
  fi
  # Wheels in parts, NAME.whl.00 and so on, with NAME.whl.sha256: kept until all are there.
  parts=$(dirname "$SITE")/site-parts
  for sum in "$KIT"/*.whl.sha256; do
    [ -f "$sum" ] || continue
    mkdir -p "$parts" "$SITE"
    wheel=$(basename "$sum" .sha256)
    cp "$KIT/$wheel".[0-9]* "$parts/"
    if cat "$parts/$wheel".[0-9]* | sha256sum --check --status "$sum"; then
      cat "$parts/$wheel".[0-9]* > "$parts/$wheel"
      "$PYTHON" -m zipfile -e "$parts/$wheel" "$SITE"
      rm "$parts/$wheel"*
    fi
  done
  export PYTHONPATH="$SITE" CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} PATH="$SITE/bin:$PATH"
fi
