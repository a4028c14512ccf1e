#!/usr/bin/env bash
# The table of groceries in docs/lab/results.md: the chain, one network trained alike, one network at equal GMACs.
# usage: benchmarks/groceries.sh DATA WEIGHTS OUT [SEED...]
#   DATA     a folder with train/, val/ and test/ in ImageFolder layout
#   WEIGHTS  tf_efficientnet_lite0 as .safetensors, or "timm" to download them
#   OUT      for checkpoints, logs and predictions; a run that is already finished there is not trained again
# Run it in the environment (. .venv/bin/activate). About 45, 12 and 45 minutes a seed on two cores. Nothing is chosen on test: thresholds follow the crop area on val,
# and the last epoch predicts, where the one-cycle schedule ends.
set -euo pipefail
data=$1 weights=$2 out=$3
shift 3
seeds=("${@:-0}")

train() { # name seed options...
  local folder=$out/$1-s$2 seed=$2
  shift 2
  [ -e "$folder/test.npz" ] && return
  local resume=()
  [ -e "$folder/last.pt" ] && resume=(--resume "$folder/last.pt")
  mge-train --data "$data" --out "$folder" --arch tf_efficientnet_lite0 --init "$weights" --seed "$seed" \
    --epochs 8 --batch-size 24 --schedule onecycle --backbone-lr 0.02 --head-lr 0.1 --label-smoothing 0.1 --clip-norm 5 \
    --recipe paper --crop-area 0.5 --accelerator cpu --workers 1 "$@" "${resume[@]}"
  mge-eval --ckpt "$folder/last.pt" --data "$data" --predictions "$folder/test.npz" | tee "$folder/table.txt"
}

for seed in "${seeds[@]}"; do
  train chain "$seed" --image-size 160 --resize 184 --crop-area 0.55
  train single "$seed" --image-size 160 --resize 184 --experts 1
  train large "$seed" --image-size 320 --resize 368 --experts 1 # four times the pixels: the GMACs of four backbones
done

runs() { for seed in "${seeds[@]}"; do echo "$out/$1-s$seed/test.npz"; done; }
compare() { # the chain's head, the other run, its head
  # shellcheck disable=SC2046 # the names are ours and hold no spaces
  python -m benchmarks.predictions --first $(runs chain) --head "$1" --second $(runs "$2") --second-head "$3"
}
for other in single large; do
  compare mixture $other "expert 1 global" # the plain classifier: average pooling and a linear layer
  compare mixture $other "expert 1"        # the same backbone with the part head
done
compare mixture chain average
compare mixture chain "expert 3"
