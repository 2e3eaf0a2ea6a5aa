#!/usr/bin/env bash
# Serves DeepSeek-R1-Distill-Qwen-32B on eight GPUs of one host: eight instances, as in the paper.
#
#   bash launch/eight_gpus.sh [any launch_server flag]
#
# Requests are placed by phase; with --pascal-migration adaptive they may also move at the end of
# their thinking. Fewer and larger instances: --dp-size 4 --tp-size 2. Metrics are on;
# launch/monitoring has a dashboard for them. Paused KV takes pinned host memory:
# --pascal-host-kv-gb says how much per instance.
set -euo pipefail

case "${1:-}" in
-h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$pascal_root"
exec "$PASCAL_PYTHON" -m pascal_sglang.launch_server \
    --model-path deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --reasoning-parser deepseek-r1 \
    --dp-size 8 --port 30000 --enable-metrics --sleep-on-idle "$@"
