# Sourced by the other scripts: finds Python, makes .venv in the repository, installs gruppo there.
# Usage: source scripts/environment.sh [extra]        (an extra of pyproject.toml, such as dev)
# Set GRUPPO_PYTHON to choose the interpreter, GRUPPO_VENV to use a virtual environment elsewhere.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${GRUPPO_VENV:-$root/.venv}"

find_python() {
    local candidate
    for candidate in "${GRUPPO_PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && command -v "$candidate" > /dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "gruppo needs Python 3.11 or newer (with venv); set GRUPPO_PYTHON to its path" >&2
    return 2
}

install_gruppo() {
    local extra="$1" python stamp
    if [ ! -x "$venv/bin/python" ]; then
        python="$(find_python)" || return 2
        echo "making $venv with $python" >&2
        "$python" -m venv "$venv" || return 3
    fi
    # Installed once for each state of the two files that say what to install.
    stamp="$venv/.gruppo-${extra:-core}"
    if [ -f "$stamp" ] && [ "$root/pyproject.toml" -ot "$stamp" ] &&
        [ "$root/constraints.txt" -ot "$stamp" ]; then
        return 0
    fi
    echo "installing gruppo into $venv (the first time takes minutes)" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" "torch==2.13.0" || return 3
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root${extra:+[$extra]}" || return 3
    touch "$stamp"
}

install_gruppo "${1:-}" || exit $?
