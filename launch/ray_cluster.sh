#!/usr/bin/env bash
# Serves from a Ray cluster: its nodes keep the scheduler processes, Ray their GPUs.
#
#   bash launch/ray_cluster.sh head [ray start flags]              on the node that serves
#   bash launch/ray_cluster.sh join HEAD:6379 [ray start flags]    on every other node
#   bash launch/ray_cluster.sh serve [any launch_server flag]      on the head, once all have joined
#
# The instances of a server (--dp-size) are on the head as far as its GPUs go. With
# --pascal-control-listen ADDRESS, an address of the head, they are on the other nodes too, each
# whole on one; one instance may also span nodes (--tp-size 16 --nnodes 2). Model files have the
# same path everywhere. Ray lets all who reach its ports run code: keep its network private, and run
# `ray get-auth-token --generate` on the head and copy ~/.ray/auth_token to the other nodes.
# On CPUs: head --num-gpus 1, join HEAD:6379 --num-gpus 1, then
# serve --device cpu --dp-size 2 --pascal-control-listen ADDRESS --model-path MODEL.
set -euo pipefail

case "${1:-}" in
head | join | serve) command="$1"; shift ;;
*) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; exit ;;
esac

. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$pascal_root"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
case "$command" in
head) exec "$PASCAL_PYTHON" -m ray.scripts.scripts start --head --port 6379 "$@" ;;
join) exec "$PASCAL_PYTHON" -m ray.scripts.scripts start --address "${1:?join wants HEAD:6379}" "${@:2}" ;;
serve)
    export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
    exec "$PASCAL_PYTHON" -m pascal_sglang.launch_server --use-ray --enable-metrics --port 30000 \
        --model-path Qwen/Qwen3-8B --reasoning-parser qwen3 "$@"
    ;;
esac
