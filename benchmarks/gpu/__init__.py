"""Baton beside bare SGLang on the same GPUs, in one run: `benchmarks/gpu/run.sh bench`."""
