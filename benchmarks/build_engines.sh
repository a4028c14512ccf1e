#!/usr/bin/env bash
# Size, time and memory of TensorRT-RTX engines, built ahead of time on this machine: for one compute capability, for
# three together, and for batch 1 alone. The bundle is copied, not changed.
# usage: benchmarks/build_engines.sh BUNDLE [mge-build]
set -euo pipefail
bundle=$1
build=${2:-.venv/bin/mge-build}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
date -u +%F
grep -m1 'model name' /proc/cpuinfo || true
echo "bundle: $(stat -c %s "$bundle") bytes"
for request in "rtx:sm86 1,1,8" "rtx:sm86,sm89,sm120 1,1,8" "rtx:sm86 1"; do
  read -r target batch <<<"$request"
  cp "$bundle" "$folder/mge.plan"
  before=$(stat -c %s "$folder/mge.plan")
  echo "$target, batch $batch"
  python3 - "$build" "$folder/mge.plan" "$target" "$batch" <<'PYTHON'
import resource, subprocess, sys, time
build, bundle, target, batch = sys.argv[1:]
start = time.perf_counter()
subprocess.run([build, bundle, "--target", target, "--batch", batch, "--into-bundle"], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
print(f"  whole command {time.perf_counter() - start:.1f} s, {peak:.0f} MB at the peak")
PYTHON
  echo "  engines: $(($(stat -c %s "$folder/mge.plan") - before)) bytes"
done
