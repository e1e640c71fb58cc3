#!/usr/bin/env bash
# The full chain on the shapes data set: make it, fine-tune, rank the model's samples, learn a reward, align by DPO and by PPO,
# take the best of eight, compare all answers to held-out images with the truth, and show them in DIR/report.html.
#   bash examples/shapes.sh [SEED] [DIR] [study]     DIR: what it writes, from the project's root (default runs/chain-SEED)
# With `study` also GRPO, mDPO and the controls: DPO without its SFT term, SFT on the same best answers, blank and shuffled images.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0} dir=${2:-runs/chain-${1:-0}} study=${3:-} python=${PYTHON:-python}
world="$dir/world"

stage() { echo; echo "== $*"; }
train() {  # SCRIPT NAME options: trains from the fine-tuned model
  $python "$1.py" --out "$dir/$2" --images "$world/images" --seed "$seed" --overwrite "${@:3}"
}
answer() {  # MODEL NAME options: answers, or scores, of the test images
  $python predict.py --model "$dir/$1" --data "$world/test.json" --images "$world/images" --out "$dir/$2.jsonl" \
    --seed "$seed" --max_new_tokens 32 --micro_batch 64 --overwrite "${@:3}"
}

stage "The data set: images, captions, preferences, and a model whose tower sees the objects (23 s on two cores)"
$python examples/shapes.py --out "$world" --seed "$seed" --if_missing
stage "SFT learns to name what an image shows, from captions of which 40 % are wrong; then it answers (79 s)"
train sft sft --model "$world/model" --data "$world/sft.json" --batch_size 64 --micro_batch 64 --lr 2e-3 --warmup 40 --max_steps 350
answer sft sft-greedy
answer sft sft-sampled --num_samples 4 --temperature 1

stage "Preferences: the model's own samples ranked by the truth, and as many synthetic pairs (21 s)"
answer sft samples --data "$world/prompts.json" --num_samples 2 --temperature 1 --micro_batch 256
$python examples/shapes.py --world "$world" --rank "$dir/samples.jsonl" --mix --pairs_out "$dir/pairs.json"
$python examples/shapes.py --world "$world" --rank "$dir/sft-sampled.jsonl" --pairs_out "$dir/test-sampled.json"

stage "The reward model learns to score answers from ranked ones (105 s)"
train rm rm --model "$dir/sft" --data "$dir/pairs.json" --eval_data "$world/test_pairs.json" --eval_every 0 --batch_size 64 --micro_batch 64 --lr 7e-4 --warmup 60 --max_steps 350
stage "DPO learns the same preferences without a reward model (44 s)"
train dpo dpo --model "$dir/sft" --data "$dir/pairs.json" --batch_size 64 --micro_batch 64 --lr 3e-4 --warmup 10 --max_steps 80 --sft_coef 1
stage "PPO samples answers and learns from the reward model's scores (85 s)"
train ppo ppo --model "$dir/sft" --reward_model "$dir/rm" --data "$world/prompts.json" --rollout_batch 128 --batch_size 128 \
  --micro_batch 128 --max_new_tokens 28 --max_steps 40 --lr 2e-4 --critic_lr 3e-4 --ppo_epochs 2 --critic_warmup 2 --kl_coef 0.05 \
  --missing_eos_score -3 --normalize_scores --save_rollouts
stage "All models answer the test images; the reward model picks the best of eight and scores pairs (49 s)"
for name in dpo ppo; do
  answer $name $name-greedy
  answer $name $name-sampled --num_samples 4 --temperature 1
done
answer sft best-of-8 --num_samples 8 --temperature 1 --reward_model "$dir/rm"
answer sft rewards --data "$world/test_pairs.json" --score --reward_model "$dir/rm"
answer sft rewards-sampled --data "$dir/test-sampled.json" --score --reward_model "$dir/rm"
captioned="sft-greedy sft-sampled best-of-8 dpo-greedy dpo-sampled ppo-greedy ppo-sampled" scored="rewards rewards-sampled"
shown=("SFT=$dir/sft-sampled.jsonl" "best of 8=$dir/best-of-8.jsonl" "DPO=$dir/dpo-sampled.jsonl" "PPO=$dir/ppo-sampled.jsonl")
logs=("SFT=$dir/sft/log.jsonl" "reward model=$dir/rm/log.jsonl" "DPO=$dir/dpo/log.jsonl" "PPO=$dir/ppo/log.jsonl")
notes=("SFT learns captions of which 40 % are wrong. All answers below are sampled at temperature 1."
  "The reward model learns to score answers from ranked ones; best of 8 is the answer of highest score among eight by SFT."
  "DPO learns from the same ranked answers, without a reward model."
  "PPO samples answers and learns from their scores. Its CHAIR-s and coverage compare them with the truth, which it never sees.")

if [ "$study" = study ]; then
  train dpo dpo-alone --model "$dir/sft" --data "$dir/pairs.json" --batch_size 64 --micro_batch 64 --lr 3e-4 --warmup 10 --max_steps 80
  train sft sft-best --model "$dir/sft" --data "$dir/pairs.json" --batch_size 64 --micro_batch 64 --lr 3e-4 --warmup 10 --max_steps 80
  train dpo mdpo --model "$dir/sft" --data "$dir/pairs.json" --batch_size 64 --micro_batch 64 --lr 3e-4 --warmup 10 --max_steps 80 \
    --sft_coef 1 --image_coef 1
  train ppo grpo --model "$dir/sft" --reward_model "$dir/rm" --data "$world/prompts.json" --advantage grpo --samples_per_prompt 8 \
    --rollout_batch 16 --batch_size 16 --micro_batch 16 --ppo_epochs 1 --max_new_tokens 28 --max_steps 40 --lr 3e-4 \
    --kl_coef 0.05 --missing_eos_score -3 --normalize_scores
  for name in dpo-alone sft-best mdpo grpo; do
    answer $name $name-greedy
    answer $name $name-sampled --num_samples 4 --temperature 1
    captioned="$captioned $name-greedy $name-sampled"
  done
  for images in blank shuffled; do
    answer dpo dpo-$images --num_samples 4 --temperature 1 --images "$world/images_$images"
    answer sft rewards-$images --data "$world/test_pairs.json" --score --reward_model "$dir/rm" --images "$world/images_$images"
    answer mdpo mdpo-$images --num_samples 4 --temperature 1 --images "$world/images_$images"
    captioned="$captioned dpo-$images mdpo-$images" scored="$scored rewards-$images"
  done
  shown+=("mDPO=$dir/mdpo-sampled.jsonl" "GRPO=$dir/grpo-sampled.jsonl")
  logs+=("mDPO=$dir/mdpo/log.jsonl" "GRPO=$dir/grpo/log.jsonl")
  notes+=("mDPO adds a loss to DPO by which an answer needs its image." "GRPO is PPO with eight answers per prompt in place of a critic.")
fi
files() { for name in $1; do echo "$dir/$name.jsonl"; done; }
$python examples/shapes.py --world "$world" --evaluate $(files "$captioned") --pairs $(files "$scored") --json "$dir/figures.json" > "$dir/figures.txt"
$python examples/shapes.py --summary "$dir/figures.json"
$python examples/shapes.py --world "$world" --curve "$dir/ppo" --json "$dir/ppo-truth.jsonl"
$python examples/page.py "${shown[@]}" --logs "${logs[@]}" "PPO=$dir/ppo-truth.jsonl" --metrics "$dir/figures.json" \
  --images "$world/images" --limit 24 --title "What each stage gains" --notes "${notes[@]}" --out "$dir/report.html"
echo "the chain took $SECONDS s"
