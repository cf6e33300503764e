#!/usr/bin/env bash
# Trains a small dual encoder on the embedded image-caption pairs and evaluates it: bash scripts/quickstart.sh [KEY=VALUE]...
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
environment ""
rm -rf runs/quickstart
.venv/bin/mmssl train configs/quickstart.yaml "$@"
echo "metrics:  runs/quickstart/results.json"
echo "images:   runs/quickstart/emoji-unseen-style/zero_shot/*.png runs/quickstart/emoji-unseen-concepts/zero_shot/*.png"
echo "use it:   .venv/bin/python -c 'import mmssl; print(mmssl.load(\"runs/quickstart\").encode_text(\"a red apple\").shape)'"
