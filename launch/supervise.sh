# Sourced: commands that end with this shell, whatever ends it. Wants $PASCAL_PYTHON.

supervised=
supervise_py="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/supervise.py"

# Starts a command in the background; $supervised is the process that watches it and has its exit
# code. Descriptor 8 is the pipe that keeps it running: close it (8>&-) for whatever may outlive this
# shell.
supervised() {
    exec 8> >(exec "$PASCAL_PYTHON" "$supervise_py" "$@")
    supervised=$!
}

# Stops that command and waits until it is gone.
stop_supervised() {
    [ -n "$supervised" ] || return 0
    exec 8>&-
    wait "$supervised" || true
    supervised=
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
