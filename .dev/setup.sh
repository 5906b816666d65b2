#!/usr/bin/env bash
# Makes .venv with kdpipe in it: .dev/setup.sh PYTHON EXTRA, where EXTRA is cpu or cuda.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
extra=$2
torch=$(sed -n 's/^torch==//p' .dev/constraints.txt)

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"kdpipe needs Python 3.11 or 3.12, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")
CHECK
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# The CPU build of torch: taken by pip where its sources offer one, otherwise from PyTorch's own CPU index,
# which uv knows by name. Without this, pip would bring gigabytes of CUDA libraries to a machine without a GPU.
if [ "$extra" = cpu ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "Installing torch $torch (CPU build)"
    build=$(pip install --quiet --dry-run --no-deps --ignore-installed --report - "torch==$torch" |
        .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])')
    if [[ $build == *+cpu || $(uname -s) != Linux ]]; then
        pip install --quiet "torch==$torch"
    else
        pip install --quiet uv
        .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend=cpu "torch==$torch"
    fi
fi
echo "Installing kdpipe with the extras $extra, dev"
pip install --quiet --constraint .dev/constraints.txt --editable ".[$extra,dev]"
# Losses to compare with, without the trainers around them: what they depend on is not wanted, or here already.
pip install --quiet --no-deps --requirement .dev/peers.txt
.venv/bin/python -m kdpipe.pipeline.wheels
.venv/bin/kdpipe --version
