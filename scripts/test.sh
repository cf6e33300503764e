#!/usr/bin/env bash
# Runs every fast test, the linter and the type checker: bash scripts/test.sh [PYTEST ARGUMENT]...
# Slow tests: bash scripts/test.sh -m slow        GPU tests: bash scripts/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
