#!/usr/bin/env bash
# Would pip find all that the runtime needs on JetPack 6 (Python 3.10, aarch64)? A dry run: nothing is installed or run.
# usage: benchmarks/check_jetson.sh   after `make wheel`, with a pip on the PATH
set -euo pipefail
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_aarch64"); done
pip install --quiet --dry-run --report - --target "$(mktemp -d -u)" --only-binary=:all: \
  --implementation cp --python-version 3.10 --abi cp310 --abi abi3 --abi none "${platforms[@]}" \
  "mge[cpu,jetson,serve] @ file://$(realpath "$(ls -t dist/*.whl | head -n 1)")" |
  python -c '
import json, sys
for package in sorted(item["metadata"]["name"] + " " + item["metadata"]["version"] for item in json.load(sys.stdin)["install"]):
    print(package)
'
