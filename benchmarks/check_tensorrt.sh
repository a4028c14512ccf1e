#!/usr/bin/env bash
# Do the Python bindings of full TensorRT, oldest to newest, hold every name of its API that the runtime uses?
# The bindings are on PyPI; the libraries they load are not, so they are searched, not imported.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for distribution in tensorrt-cu12-bindings==10.3.0 tensorrt-cu13-bindings==10.16.1.11 tensorrt-cu13-bindings==11.4.0.106; do
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --dest "$folder" "$distribution"
done
for wheel in "$folder"/*.whl; do
  "$python" -m zipfile --extract "$wheel" "${wheel%.whl}"
done
cd "$folder"
"$OLDPWD/$python" "$OLDPWD/tests/helpers/tensorrt_calls.py" ./*/tensorrt_bindings/tensorrt.so
