#!/usr/bin/env bash
# The longer training on the field guide in docs/lab/results.md: the demo's recipe on all 36 species with more epochs.
# usage: benchmarks/field_guide.sh OUT [EPOCHS]   in the environment (. .venv/bin/activate)
# About 20 minutes of one core's computing.
set -euo pipefail
out=$1
export OMP_NUM_THREADS=1 # the networks are too small to share over cores
mge-field-guide "$out/field-guide" --species 36 --train 3600 --val 360 --test 1200
mge-train --data "$out/field-guide" --out "$out/run" --overwrite --epochs "${2:-20}" \
  --recipe paper --arch plainnet_w16 --init none --image-size 112 --resize 128 --batch-size 16 --schedule onecycle \
  --backbone-lr 0.05 --head-lr 0.05 --weight-decay 5e-4 --label-smoothing 0.1 --diversity none --parts-per-class 4 \
  --box-threshold 0.3 --workers 1 --accelerator cpu
mge-eval --ckpt "$out/run/last.pt" --data "$out/field-guide" --predictions "$out/run/test.npz"
