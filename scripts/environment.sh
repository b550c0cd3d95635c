#!/bin/sh
# Makes a virtual environment with pip and the wanted torch build in it:  scripts/environment.sh FOLDER cpu|cuda
# PYTHON=... names the interpreter; otherwise the first of python3, python3.14 ... python3.11 that is new enough.
set -eu
here=$(dirname "$0")/..
folder=$1
build=$2
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*" >&2; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

case "$build" in
    cpu | cuda) ;;
    *) say "TORCH=$build is not a torch build this installs. Use TORCH=cpu (the default) or TORCH=cuda."; exit 2 ;;
esac

if [ ! -x "$folder/bin/python" ] || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python3.14 python3.13 python3.12 python3.11
    fi
    python=
    for candidate in "$@"; do
        if new_enough "$candidate"; then python=$candidate; break; fi
    done
    if [ -z "$python" ]; then
        say "No Python 3.11 or newer found (tried: $*)."
        say "Rorqual needs one. On Debian 12+ or Ubuntu 24.04+: sudo apt install python3 python3-venv"
        say "Elsewhere install Python 3.11+ and name it: make install PYTHON=/path/to/python3"
        exit 1
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        say "$version has no venv module with pip, so no environment can be made."
        say "On Debian or Ubuntu: sudo apt install python3-venv   (or $version-venv), then try again."
        exit 1
    fi
    say "Making $folder with $("$python" --version)"
    "$python" -m venv --clear "$folder"
fi

quiet=--quiet
if [ -t 1 ]; then quiet=; fi # somebody watches: show the download
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
cpu_index_answers() ( # asked by pip, which knows the proxy and has certificates; other sources must not answer for it
    export PIP_EXTRA_INDEX_URL="$cpu_index" PIP_FIND_LINKS="$folder"
    pip index versions torch --index-url "$cpu_index" --retries 0 --timeout 10 >/dev/null 2>&1
)
had=$(cat "$folder/.torch" 2>/dev/null || echo "$build")
if [ "$had" != "$build" ]; then pip uninstall --yes --quiet torch; fi

wanted=$(sed -n 's/^torch==//p' "$here/constraints-cpu.txt")
present=$("$folder/bin/python" -c "import importlib.metadata as m; print(m.version('torch').split('+')[0])" \
    2>/dev/null || true)

if [ "$build" = cpu ] && [ "$present" = "$wanted" ]; then
    : # nothing to fetch
elif [ "$build" = cuda ]; then
    say "Installing torch with CUDA (several gigabytes)"
    pip install $quiet "torch>=2.11"
elif [ "$(uname -s)" != Linux ]; then
    say "Installing torch (on this system the ordinary build is the CPU build)"
    pip install $quiet -r "$here/constraints-cpu.txt"
elif cpu_index_answers; then
    say "Installing torch, CPU build (about 200 MB)"
    pip install $quiet --index-url "$cpu_index" -r "$here/constraints-cpu.txt"
else
    say "PyTorch's CPU index ($cpu_index) did not answer, so torch comes from pip's own index."
    say "If that is PyPI, it is the CUDA build: several gigabytes, and it works without a GPU."
    pip install $quiet -r "$here/constraints-cpu.txt"
fi
echo "$build" >"$folder/.torch"
