# Sourced: commands that end with this shell, whatever ends it. Wants $PASCAL_PYTHON.

supervised=
supervised_pids=()
supervised_pipes=()
supervise_py="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/../evals/load/supervise.py"

# Starts a command in the background; $supervised is the process that watches it and has its exit
# code.
supervised() {
    local pipe
    exec {pipe}> >(close_supervised; exec "$PASCAL_PYTHON" "$supervise_py" "$@")
    supervised=$!
    supervised_pids+=("$supervised")
    supervised_pipes+=("$pipe")
}

# Lets go of the pipes that keep those commands running: call it in the subshell of whatever may
# outlive this shell.
close_supervised() {
    local pipe
    for pipe in ${supervised_pipes[@]+"${supervised_pipes[@]}"}; do exec {pipe}>&-; done
    supervised_pipes=()
}

# Stops those commands and waits until they are gone.
stop_supervised() {
    local pid
    close_supervised
    for pid in ${supervised_pids[@]+"${supervised_pids[@]}"}; do wait "$pid" || true; done
    supervised=
    supervised_pids=()
}

# Runs a function whatever ends this shell, SIGKILL excepted. Its output may have no reader any more;
# a signal that comes while it runs is ignored.
at_exit() {
    trap "trap '' HUP INT PIPE TERM; $1" EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 141' PIPE
    trap 'exit 143' TERM
}
