#!/usr/bin/env bash
# The runtime's tests on another Python, such as the 3.10 of JetPack 6: the wheel with [cpu,rtx,serve], no torch.
# usage: benchmarks/check_python.sh PYTHON   after `make wheel`
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?name the Python to test with, such as python3.10}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheel=$(realpath "$(ls -t dist/*.whl | head -n 1)")
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "$wheel[cpu,rtx,serve]" tensorrt-lean onnx scikit-image pytest pytest-timeout
"$folder/venv/bin/pip" install --quiet --no-deps 'tensorrt-stubs==10.13.*'
# Beside a copy of the tests the sources cannot be imported by mistake, but for the list of what they call.
mkdir "$folder/runtime"
cp -r tests examples pyproject.toml "$folder"
cp -r runtime/mge_runtime "$folder/runtime"
cd "$folder"
# test_preprocess compares with torchvision.
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider -o pythonpath= tests/runtime \
  --ignore tests/runtime/test_preprocess.py
