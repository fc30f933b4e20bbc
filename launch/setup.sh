# Functions for the scripts in this folder, which source it: find a Python with llmtrain, or create an environment.

launch_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$launch_folder")

say() { echo "llmtrain: $1"; }

fail() { # MESSAGE: print one line and exit with the code of a user error
    echo "llmtrain: $1" >&2
    exit 2
}

# Set $python to the first Python with llmtrain and torch: that of the active environment, on PATH, in the .venv of the
# checkout, or in the environment where these scripts are installed.
find_python() {
    local candidates=("${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" python python3) folder=$launch_folder
    while [[ $folder != / ]]; do
        [[ ! -x $folder/.venv/bin/python ]] || candidates+=("$folder/.venv/bin/python")
        [[ ! -e $folder/pyvenv.cfg ]] || candidates+=("$folder/bin/python")
        folder=$(dirname "$folder")
    done
    for python in "${candidates[@]}"; do
        python=$(command -v "${python:-none}") || continue
        "$python" - 2>/dev/null <<'PYTHON' && return
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("torch", "hydra", "llmtrain"))))
PYTHON
    done
    fail "got no Python with llmtrain; activate the environment where it is installed, or pip install it"
}

# Set $python to that of an environment with llmtrain[EXTRA] of this repository: the active one, or .venv, which is
# created if necessary. Fast if nothing has changed since the last time.
set_up() { # EXTRA
    local extra=$1 environment wanted stamp log
    [[ -e $repository/pyproject.toml ]] || fail "got scripts outside of a checkout; pip install 'llmtrain[$1]' instead"
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        environment=$VIRTUAL_ENV
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        environment=$CONDA_PREFIX
    else
        environment=$repository/.venv
        [[ -x $environment/bin/python ]] && "$environment/bin/python" -m pip --version >/dev/null 2>&1 ||
            make_environment "$environment"
    fi
    python=$environment/bin/python
    supported "$python" || fail "got $("$python" --version 2>&1) in $environment; allowed: Python 3.10 or later"

    # A checksum of the inputs of pip: if it is unchanged, pip need not run.
    wanted=$({ cat "$repository/pyproject.toml" "$launch_folder"/constraints/*; "$python" --version; echo "$repository"; } | cksum)
    stamp=$environment/.llmtrain-$extra
    if [[ ! -x $environment/bin/llmtrain || $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
        log=$environment/llmtrain-setup.log
        "$python" "$launch_folder/constraints.py" >"$environment/llmtrain-constraints.txt" ||
            fail "$(cat "$environment/llmtrain-constraints.txt")"
        say "installing llmtrain[$extra] into $environment (some minutes at first; log: $log)"
        install_editable "$extra" "$log" "$environment/llmtrain-constraints.txt" || {
            tail -n 20 "$log" >&2
            fail "pip could not install llmtrain[$extra]; the whole log is $log"
        }
        echo "$wanted" >"$stamp"
        # The extra `test` includes `demo`.
        [[ $extra != test ]] || echo "$wanted" >"$environment/.llmtrain-demo"
    fi
    say "using $("$python" --version 2>&1) of $environment"
}

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

make_environment() { # FOLDER
    local name base= shared=
    for name in python3 python python3.{10..20}; do
        if base=$(command -v "$name") && supported "$base"; then break; fi
        base=
    done
    [[ -n $base ]] || fail "got no Python 3.10 or later on PATH; install one (apt-get install python3 python3-pip)"
    # The torch of a container fits its drivers: create the environment on top of its Python.
    local torch
    torch=$("$base" "$launch_folder/constraints.py" --torch 2>/dev/null) || torch=
    [[ -z $torch ]] || shared=--system-site-packages
    say "creating $1 with $("$base" --version 2>&1)${torch:+ and its torch $torch}"
    rm -rf "$1"
    if ! "$base" -m venv $shared "$1" >/dev/null 2>&1; then
        # Without the package python3-venv, Debian's Python cannot install pip into an environment, but its pip can.
        rm -rf "$1"
        "$base" -m venv $shared --without-pip "$1" &&
            "$base" -m pip --quiet --python "$1/bin/python" install pip >/dev/null ||
            fail "$base cannot create an environment; install its venv module (apt-get install python3-venv)"
    fi
}

install_editable() { # EXTRA LOG CONSTRAINTS
    local -a pip=("$python" -m pip --disable-pip-version-check install --no-compile --constraint "$3"
        --editable "$repository[$1]")
    if [[ -t 1 ]]; then
        # Show the latest line of pip's output, always on the same line of the terminal.
        "${pip[@]}" 2>&1 | tee "$2" | while read -r line; do printf '\r\e[K%.*s' "${COLUMNS:-80}" "$line"; done
        local code=${PIPESTATUS[0]}
        printf '\r\e[K'
        ((code == 0)) || return "$code"
    else
        "${pip[@]}" >"$2" 2>&1 || return
    fi
    # Compile on all cores: pip would use one, for half of its time. Ignore failures: some .py files of packages are not
    # valid Python.
    "$python" -m compileall -qq -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}
