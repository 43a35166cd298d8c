#!/usr/bin/env bash
# Installs dist_llm and what it needs into a virtual environment.   tools/setup.sh VENV [dev]
#
# torch comes first and by itself: whatever resolves it together with other packages may choose another build of it, and packages
# that compile against it (our extension, deepspeed) must see the one that will run, hence --no-build-isolation.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/setup.sh VENV [dev]}
what=${2:-}
python=${PYTHON:-python3}

fail() { echo "setup: $*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old, dist_llm needs 3.11 or newer: make setup PYTHON=python3.12"

pip_install() { "$venv/bin/python" -m pip install --quiet --progress-bar off --disable-pip-version-check "$@"; }

if [ ! -x "$venv/bin/python" ]; then
    # A torch that the machine provides (a cluster's module, a container) was built for its GPUs: use that one.
    site=()
    if "$python" -c 'import sys, torch; sys.exit(tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 11))' 2>/dev/null; then
        site=(--system-site-packages)
        echo "setup: using the torch of $python"
    fi
    echo "setup: making $venv"
    "$python" -m venv "${site[@]}" "$venv" || fail "cannot make $venv; on Debian, apt-get install python3-venv"
fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "setup: installing torch (the largest download)"
    pip_install "torch==${TORCH_VERSION:-2.13.0}" numpy
fi
extras=''
[ "$what" = dev ] && extras='[dev]'
echo "setup: installing dist_llm${extras} and its dependencies, compiling the extension"
pip_install 'setuptools>=77' wheel ninja
DS_BUILD_OPS=0 pip_install --no-build-isolation --editable ".${extras}"
"$venv/bin/python" - <<'EOF'
import json, pathlib
info = pathlib.Path("dist_llm/_build_info.json")
said = json.loads(info.read_text()) if info.exists() else {}
print("setup: extension", "built" if said.get("built") else f"not built, the PyTorch reference path is used ({said.get('reason')})")
EOF
touch "$venv/.ready"
[ "$what" != dev ] || touch "$venv/.ready-dev"
echo "setup: done, $venv/bin/dist-llm"
