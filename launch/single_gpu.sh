#!/usr/bin/env bash
# Serves a reasoning model on one GPU.
#
#   bash launch/single_gpu.sh [any launch_server flag]
#
# Defaults, each replaced by the same flag: --model-path Qwen/Qwen3-8B --reasoning-parser qwen3
# --port 30000. Metrics are on; launch/monitoring has a dashboard for them. Paused KV takes host
# memory of twice the GPU's KV pool, pinned at start, at most a quarter of what the host or the
# container has free: --pascal-host-kv-gb says otherwise.
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$pascal_root"
exec "$PASCAL_PYTHON" -m pascal_sglang.launch_server \
    --model-path Qwen/Qwen3-8B --reasoning-parser qwen3 --port 30000 --enable-metrics --sleep-on-idle "$@"
