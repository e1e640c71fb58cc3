#!/usr/bin/env bash
# The whole chain on the small world: make it, fine-tune, answer the held-out pictures, compare with the truth.
#   bash examples/shapes.sh [SEED] [DIR]     DIR: what it writes, from the project's root (default runs/chain-SEED)
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0} dir=${2:-runs/chain-$seed} python=${PYTHON:-python}
world="$dir/world" test="--data $dir/world/test.json --images $dir/world/images --max_new 32 --micro_batch 64"

$python examples/shapes.py --out "$world" --seed "$seed" --if_missing
$python sft.py --model "$world/model" --data "$world/sft.json" --images "$world/images" --out "$dir/sft" \
  --eval_data "$world/test.json" --batch_size 64 --micro_batch 64 --lr 2e-3 --adam_beta2 0.98 --warmup 40 \
  --max_steps 350 --seed "$seed" --overwrite
$python predict.py --model "$dir/sft" $test --seed "$seed" --overwrite --out "$dir/sft-greedy.jsonl"
$python predict.py --model "$dir/sft" $test --seed "$seed" --overwrite --num_samples 4 --temperature 1 --out "$dir/sft-sampled.jsonl"
$python examples/shapes.py --world "$world" --evaluate "$dir/sft-greedy.jsonl" "$dir/sft-sampled.jsonl"
