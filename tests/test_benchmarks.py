"""benchmarks/: each script runs on tiny sizes, and both of its sides compute the same; no timing."""
import functools
import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

import fsdp


def find():
    sys.path.insert(0, str(tiny.ROOT / "benchmarks"))


def metrics_by_title(script):
    done = tiny.fork(*script.split(), prepare=find)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    return {line["title"]: line for line in lines}


@pytest.mark.parametrize("script, titles", [
    ("bench_rm", ["RM against transformers"]), ("bench_ppo", ["PPO against transformers"]),
    ("bench_sft", ["SFT against transformers"]), ("bench_sft --peer trl", ["SFT against trl"]),
    ("bench_load", ["load"]), ("bench_dpo", ["DPO against TRL"]), ("bench_grpo", ["GRPO against TRL"]),
    ("bench_generate", ["prefill", "prefill and greedy decoding", "8 samples of a picture"]),
    ("bench_growth", ["DPO step", "answers 1 → 8", "image 28 → 56", "vocab 200 → 400", "ranks 1 → 2"])])
def test_both_sides_compute_the_same(script, titles):
    """Losses in fp32, at the first step and after updates; greedy tokens. Samples are each side's own."""
    if "trl" in titles[0].lower():
        pytest.importorskip("trl")
    found = metrics_by_title(f"{script} --tiny --rounds 1 --dtype fp32 --threads 1")
    assert [*found][:len(titles)] == titles
    for title, values in found.items():
        same = values.get("difference") is None if "samples" in title else values.get("difference", 0) < 1e-5
        assert same and values.get("flops", 2) > 1, values  # what bench_growth enlarges costs FLOPs


def test_flops_by_hand():
    find()
    import common
    text = tiny.hf.LlamaConfig(hidden_size=4, intermediate_size=5, num_hidden_layers=1, vocab_size=7,
                               num_attention_heads=2, num_key_value_heads=1)
    vision = tiny.clip_config(hidden_size=2, intermediate_size=3)
    config = tiny.hf.LlavaConfig(vision_config=vision, text_config=text, image_seq_length=4)
    patches = 4 * 2 * (3 * 8 * 8 * 2)  # 4 patches of 8 × 8 in three colours, to width 2
    layer = 5 * 2 * (4 * 4 + 2 * 6) + 2 * (2 * 5 * 5 * 2)  # linear on 5 tokens; scores and sums over 5 × 5
    llama = 10 * 2 * (16 + 8 + 8 + 16 + 3 * 20) + 2 * (2 * 33 * 4)  # q, k, v, o, MLP; 33 pairs
    assert common.forward_flops(config, images=1, tokens=10, pairs=33, read=3) == {
        "tower": patches + layer, "language": llama + 4 * 2 * (2 * 4 + 4 * 4), "head": 3 * 2 * 4 * 7}


def test_every_phase_of_a_start_is_timed(tmp_path):
    tiny.make_tokenizer(tmp_path)
    done = tiny.command("benchmarks/bench_start", "--records", 40, "--tokenizer", tmp_path)
    assert done.code == 0 and "in all" in done.out.splitlines()[-1], done.err


def measure(script, argv, path):
    """Trains for one step. Writes the bytes of rank 0's shards: models, gradients and moments."""
    world, found = fsdp.launch(SimpleNamespace(replicas=1, images="")), {"gradients": 0, "optimizer": 0}

    def measured(optimizer, *_):
        for p, state in optimizer.state.items():
            found["gradients"] += p.grad.to_local().nbytes
            found["optimizer"] += state["exp_avg"].to_local().nbytes + state["exp_avg_sq"].to_local().nbytes
    register_optimizer_step_post_hook(measured)
    models = tiny.inside(script, *argv)
    fsdp.reshard(*models)
    found["weights"] = sum(fsdp.local_tensor(p).nbytes for p in {p for m in models for p in m.parameters()})
    world.on_rank0(fsdp.write_json, path, found)
    dist.destroy_process_group()


def test_memory_table_counts_what_a_run_holds(place, trained, tmp_path):
    table = metrics_by_title(f"memory --model {trained}/model --gpus 2 --lora_rank 3 --json")
    rows, pairs = f"{trained}/rows.json", f"{place}/pairs.json"
    ppo = f"{rows} --reward_model {trained}/reward --rollout_batch 4 --ppo_epochs 1 --max_new_tokens 4"
    runs = ("sft", 0, rows), ("rm", 0, pairs), ("dpo", 3, pairs), ("ppo", 0, ppo), ("ppo", 3, ppo)
    for script, lora, data in runs:
        argv = (f"--model {trained}/model --images {place}/images --out {tmp_path}/out --overwrite"
                f" --max_steps 1 --dtype bf16 --batch_size 4 --lora_rank {lora} --data {data}")
        done = tiny.spread(functools.partial(measure, script, argv.split(), str(tmp_path / "found")), 2)
        assert done.code == 0, done.err
        row = table[f"{trained}/model: {script.upper()}, {'LoRA 3' if lora else 'full'}, 2 GPUs"]
        assert len(json.loads((tmp_path / "found").read_text()).items() & row.items()) == 3, (script, lora)
