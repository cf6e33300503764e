#!/usr/bin/env bash
# Runs every fast test, the linter and the type checker: bash scripts/test.sh [PYTEST ARGUMENT]...
# Slow tests: bash scripts/test.sh -m slow        GPU tests: bash scripts/test.sh -m gpu
# The report in Chromium (Debian: apt-get install chromium): bash scripts/test.sh -m browser
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
extra=test
case " $* " in *" browser "*) extra=test,browser ;; esac
environment "$extra"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses 2 --dist worksteal "$@"
