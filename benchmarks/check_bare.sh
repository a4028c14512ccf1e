#!/usr/bin/env bash
# The runtime as a device gets it: the wheel and its base dependencies, then onnxruntime; never torch.
# usage: benchmarks/check_bare.sh [PYTHON]   after `make wheel`
set -euo pipefail
python=${1:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheel=$(ls -t dist/*.whl | head -n 1)
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "$wheel"
cd "$folder" # away from the sources: what is imported is what was installed
bin=$folder/venv/bin

if "$bin/python" -c 'import torch' 2>/dev/null; then
  echo "error: torch is in the bare environment"
  exit 1
fi
"$bin/python" - <<'PYTHON'
import subprocess, sys, time
from pathlib import Path

def best(*command):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return min(times)

run = Path(sys.executable).parent / "mge-run"
nothing = best(sys.executable, "-c", "pass")
for name, command in (("import mge_runtime", (sys.executable, "-c", "import mge_runtime")), ("mge-run --help", (run, "--help"))):
    seconds = best(*command)
    print(f"{name}: {seconds:.3f} s (an empty Python: {nothing:.3f} s)")
    if seconds > 0.3:
        sys.exit(f"error: {name} took {seconds:.2f} s; expected under 0.3 s")
PYTHON
# Without onnxruntime the answer is one line that says what to install.
if message=$("$bin/mge-run" --engine nothing.plan nothing.jpg 2>&1); then
  echo "error: mge-run answered from a bundle that does not exist"
  exit 1
fi
grep -q "^error: .*nothing.plan" <<<"$message" || { echo "error: unclear message: $message"; exit 1; }
echo "bare environment: ok"
