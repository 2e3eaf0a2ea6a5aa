# Sourced by the scripts that must work on a fresh machine: makes or reuses a virtual environment
# outside the tree and leaves its python in $PASCAL_PYTHON. Wants Python 3.11+ and a package index.
#
#   PASCAL_SGLANG_VENV   where the environment lives (default ~/.cache/pascal_sglang/venv)
#   PASCAL_PYTHON        a python that has everything already: nothing is made or installed
# One environment serves the demo, the tests and the evals, so that they never disagree.

pascal_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
pascal_cache="${PASCAL_SGLANG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pascal_sglang}"
pascal_venv="${PASCAL_SGLANG_VENV:-$pascal_cache/venv}"
. "$pascal_root/launch/supervise.sh"

pascal_say() { printf '[pascal_sglang] %s\n' "$*" >&2; }
pascal_die() { pascal_say "error: $*"; exit 1; }

pascal_find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python3.13; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    pascal_die "no Python 3.11 to 3.13 found"
}

# What pip is doing, from its log: the package it fetches, or how many of all it has unpacked.
pascal_pip_progress() {
    local line packages size
    line="$(grep -aE '^ *(Downloading|Processing|Building wheel|Installing collected)' "$1" | tail -n 1 || true)"
    case "$line" in
    *"Installing collected"*)
        packages="$(find "$pascal_venv"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' ! -name 'pip-*' | wc -l)"
        size="$(du -sh "$pascal_venv" 2>/dev/null | cut -f1)"
        echo "unpacking: $packages of $(tr ',' '\n' <<<"$line" | wc -l) packages, $size" ;;
    *Building*) echo "building ${line##*wheel for }" ;;
    *[![:space:]]*)
        line="${line#"${line%%[![:space:]]*}"}"
        size="$(sed -n 's/.*(\([0-9.]* [kMG]B\))$/, \1/p' <<<"$line")"
        line="${line#* }"
        line="${line%% *}"
        echo "fetching $(basename "$line" | cut -d- -f1,2)$size" ;;
    *) echo "asking the package index" ;;
    esac
}

# Runs a pip command with its output in a log and a line of progress every ten seconds, because pip
# says nothing for minutes while it unpacks torch.
pascal_pip() {
    local log="$pascal_venv/install.log" started=$SECONDS tick
    at_exit stop_supervised
    supervised "$PASCAL_PYTHON" -m pip --disable-pip-version-check "$@" >"$log" 2>&1
    while kill -0 "$supervised" 2>/dev/null; do
        tick=0
        while [ "$tick" -lt 10 ] && kill -0 "$supervised" 2>/dev/null; do
            sleep 1
            tick=$((tick + 1))
        done
        kill -0 "$supervised" 2>/dev/null &&
            pascal_say "  $((SECONDS - started)) s, $(pascal_pip_progress "$log")"
    done
    trap - EXIT HUP INT PIPE TERM
    if ! wait "$supervised"; then
        tail -n 15 "$log" >&2
        pascal_die "installation failed; the whole log is in $log"
    fi
    stop_supervised
}

pascal_stamp() {
    printf '%s %s ' "$pascal_root" "$("$PASCAL_PYTHON" -V)"
    cksum <"$pascal_root/pyproject.toml"
}

pascal_prepare() {
    mkdir -p "$(dirname "$pascal_venv")" || pascal_die "cannot write to $(dirname "$pascal_venv")"
    exec 9>"$pascal_venv.lock" || pascal_die "cannot write to $(dirname "$pascal_venv")"
    if command -v flock >/dev/null 2>&1; then
        flock -w 1800 9 || pascal_die "another installation into $pascal_venv is still running"
    fi
    if [ ! -x "$pascal_venv/bin/python" ]; then
        local base
        base="$(pascal_find_python)" || exit 1
        pascal_say "making a virtual environment in $pascal_venv with $base"
        "$base" -m venv "$pascal_venv" ||
            pascal_die "$base -m venv failed (on Debian: apt-get install python3-venv)"
    fi
    PASCAL_PYTHON="$pascal_venv/bin/python"
    if [ "$(cat "$pascal_venv/.pascal_stamp" 2>/dev/null)" = "$(pascal_stamp)" ]; then
        pascal_say "using $pascal_venv"
    else
        local other
        other="$(cut -d' ' -f1 "$pascal_venv/.pascal_stamp" 2>/dev/null || true)"
        if [ -n "$other" ] && [ "$other" != "$pascal_root" ] && [ -d "$other" ]; then
            pascal_say "$pascal_venv was for $other and is for this checkout from now on;"
            pascal_say "  PASCAL_SGLANG_VENV=another/folder keeps both"
        fi
        pascal_say "installing SGLang and what it needs into $pascal_venv (first time: about 5 minutes, 11 GB)"
        rm -f "$pascal_venv/.pascal_stamp"
        pascal_pip install --no-compile -e "$pascal_root[dev,docs,evals]"
        # pip would do it in one process. Some files are templates, which are not Python.
        pascal_say "compiling to bytecode"
        "$PASCAL_PYTHON" -m compileall -q -j 0 "$pascal_venv/lib" >/dev/null 2>&1 || true
        pascal_stamp >"$pascal_venv/.pascal_stamp"
        pascal_say "installed"
    fi
    exec 9>&-
}

[ -n "${PASCAL_PYTHON:-}" ] || pascal_prepare
