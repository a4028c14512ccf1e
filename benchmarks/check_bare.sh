#!/usr/bin/env bash
# The runtime as a device gets it: the wheel and its base dependencies, then onnxruntime; never torch.
# usage: benchmarks/check_bare.sh BUNDLE [PYTHON]   after `make wheel`
set -euo pipefail
bundle=$(realpath "$1")
python=${2:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
wheel=$(realpath "$(ls -t dist/*.whl | head -n 1)")
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
"$bin/python" -c 'from PIL import Image; Image.effect_noise((320, 240), 80).convert("RGB").save("noise.png")'

# Without an inference engine mge-run prints one line that says what to install.
if message=$("$bin/mge-run" --engine "$bundle" noise.png 2>&1); then
  echo "error: mge-run predicted without onnxruntime: $message"
  exit 1
fi
grep -q '^error: .*onnxruntime is not installed: install mge again, with its extra cpu' <<<"$message" || { echo "error: unclear message: $message"; exit 1; }
echo "without onnxruntime: $message"

"$bin/pip" install --quiet "$wheel[cpu]"
"$bin/mge-run" --engine "$bundle" noise.png --save drawn --json | "$bin/python" -c '
import json, sys
found = json.loads(sys.stdin.readline())
print("predicted", found["class_name"], "with", found["experts_used"], "experts")
'
test -s drawn/noise.mge.png
! "$bin/python" -c 'import torch' 2>/dev/null
echo "bare environment: ok"
