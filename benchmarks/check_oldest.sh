#!/usr/bin/env bash
# The tests of training and export with the oldest packages that pyproject allows, torch and timm included; about 6 GB.
# usage: benchmarks/check_oldest.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet uv
uv=$folder/tools/bin/uv
"$uv" venv --quiet --python "$python" "$folder/venv"
# Direct dependencies at their lower bounds, what those need at its newest; the package itself comes after, without any.
# Not [rtx]: tests of engines are skipped.
"$uv" pip install --quiet --python "$folder/venv" --cache-dir "$folder/cache" --resolution lowest-direct \
  -r pyproject.toml --extra train --extra export --extra calibrate --extra cpu --extra serve --extra video --extra hf \
  'pytest>=8.2' 'pytest-timeout>=2.3' 'scikit-image>=0.24' 'hypothesis>=6.100'
"$uv" pip install --quiet --python "$folder/venv" --no-deps .
"$uv" pip freeze --quiet --python "$folder/venv" |
  grep -E '^(torch|torchvision|timm|lightning|onnx|onnxscript|onnxruntime|numpy|pillow|scipy|safetensors)=='
# Warnings of old packages about new ones are not ours to mend.
OMP_NUM_THREADS=1 MPLCONFIGDIR=$folder "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider \
  -o filterwarnings=default tests/mge tests/export tests/runtime/test_{run,serve,video,hub}.py
