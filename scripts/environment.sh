# Sourced by the other scripts: makes .venv with the pinned packages, once. Usage: environment EXTRA ('' or test)
environment() {
    local extra="$1" python stamp
    stamp=".venv/.installed${extra:+-$extra}"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(cat pyproject.toml constraints.txt | cksum)" ]; then
        return
    fi
    for python in python3.12 python3.11 python3.13 python3; do
        if command -v "$python" >/dev/null && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            break
        fi
        python=""
    done
    if [ -z "$python" ]; then
        echo "error: no Python of version 3.11 or newer on the path; install one" >&2
        exit 2
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    echo "installing the packages (several GB the first time: PyTorch with its GPU libraries)"
    local package=".${extra:+[$extra]}"
    if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
        uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable "$package"
    elif .venv/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
        .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable "$package"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$package"
    fi
    cat pyproject.toml constraints.txt | cksum >"$stamp"
}
