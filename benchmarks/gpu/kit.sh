# Sourced: on a host without package access, SGLang and what it needs from $KIT. Nothing without KIT.
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
