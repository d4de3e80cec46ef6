"""Generated from protos/kvbaton/v1 by scripts/gen_protos.sh. Never edited."""
