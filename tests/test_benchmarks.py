"""benchmarks/: that each script runs on tiny sizes, and that both of its sides compute the same; no timing.

In fp32 the losses of two implementations agree to rounding, at the first step and after updates; greedy
tokens are equal. What is sampled, and what only one side does (growth), has no difference to look at.
"""
import functools
import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist

import fsdp

TINY = ["--tiny", "--rounds", "1", "--dtype", "fp32", "--threads", "1"]


def find():
    sys.path.insert(0, str(tiny.ROOT / "benchmarks"))


def figures(done):
    """The JSON lines that a script prints: title → figures."""
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    return {line["title"]: line for line in lines}


fork = functools.partial(tiny.fork, prepare=find)


@pytest.mark.parametrize("script, options, titles", [
    ("bench_rm", [], ["RM against transformers"]),
    ("bench_generate", [], ["prefill", "prefill and greedy decoding", "8 samples of a picture"]),
    ("bench_ppo", [], ["PPO against transformers"]),
    ("bench_load", [], ["load"]),
    ("bench_sft", ["--peer", "trl"], ["SFT against trl"]),
    ("bench_dpo", [], ["DPO against TRL"]),
])
def test_both_sides_compute_the_same(script, options, titles):
    if any("trl" in title.lower() for title in titles):
        pytest.importorskip("trl")
    found = figures(fork(script, *options, *TINY))
    assert list(found) == titles
    for title in titles:
        if title == "8 samples of a picture":  # each side's own draws
            assert found[title]["difference"] is None
        else:
            assert found[title]["difference"] < 1e-5, found[title]


def test_as_a_user_runs_it():
    """From another folder, in a process of its own."""
    found = figures(tiny.command("benchmarks/bench_sft", *TINY))["SFT against transformers"]
    assert found["difference"] < 1e-5 and min(found["memory"]) > 0


def test_growth():
    """Every axis is reported, each with its growth of FLOPs; the profile has its table."""
    done = fork("bench_growth", *TINY, "--profile")
    found = figures(done)
    assert list(found) == ["DPO step", "answers 1 → 8", "image 28 → 56", "vocab 200 → 400", "ranks 1 → 2",
                           "memory at vocabulary 200", "memory at vocabulary 400"]
    assert all(found[title]["flops"] > 1 for title in list(found)[1:4])
    assert "Self CPU time total" in done.out


def test_flops_by_hand(monkeypatch):
    """One layer of each kind at width 2: every term of the formula counted by hand."""
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    import common
    config = tiny.hf.LlavaConfig(
        vision_config=tiny.clip_config(hidden_size=2, intermediate_size=3, num_hidden_layers=2),
        text_config=tiny.hf.LlamaConfig(hidden_size=4, intermediate_size=5, num_hidden_layers=1, vocab_size=7,
                                        num_attention_heads=2, num_key_value_heads=1),
        image_seq_length=4, vision_feature_layer=-2)
    patches = 4 * 2 * (3 * 8 * 8 * 2)  # 4 patches of 8 × 8 in three colours, to width 2
    layer = 5 * 2 * (4 * 4 + 2 * 6) + 2 * (2 * 5 * 5 * 2)  # linear on 5 tokens; scores and sums over 5 × 5
    projector = 4 * 2 * (2 * 4 + 4 * 4)
    llama = 10 * 2 * (16 + 8 + 8 + 16 + 3 * 20) + 2 * (2 * 33 * 4)  # q, k, v, o, MLP; 33 pairs
    assert common.forward_flops(config, images=1, tokens=10, pairs=33, read=3) == {
        "tower": patches + layer, "language": projector + llama, "head": 3 * 2 * 4 * 7}


def test_what_a_start_costs(tmp_path):
    """bench_start.py times every phase of a start, for all its records."""
    tiny.make_tokenizer(tmp_path)
    done = tiny.command("benchmarks/bench_start", "--records", 40, "--tokenizer", tmp_path)
    assert done.code == 0, done.err
    phases = [line.split("  ")[0] for line in done.out.splitlines()]
    assert phases[-5:] == ["reading", "checking", "tokenising", "steps", "in all"]
    assert " 40 records, " in done.out


def measure(runs, path):
    """Trains for one step per run. Writes the bytes of rank 0's shards: of all models, and of the gradients
    and moments at the step of each optimizer."""
    world, step = fsdp.launch(SimpleNamespace(replicas=1, images="")), torch.optim.AdamW.step
    found = {}
    for title, (script, argv) in runs.items():
        sizes = found[title] = {"weights": 0, "gradients": 0, "optimizer": 0}

        def measured(optimizer, sizes=sizes):
            step(optimizer)
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                sizes["gradients"] += p.grad.to_local().nbytes
                sizes["optimizer"] += sum(optimizer.state[p][moment].to_local().nbytes
                                          for moment in ("exp_avg", "exp_avg_sq"))
        torch.optim.AdamW.step = measured
        models = tiny.inside(script, *argv)
        fsdp.reshard(*models)
        shards = {p for model in models for p in model.parameters()}
        sizes["weights"] = sum(fsdp.local_tensor(p).nbytes for p in shards)
    world.on_rank0(fsdp.write_json, path, found)
    dist.destroy_process_group()


def test_the_memory_table_counts_what_a_run_holds(place, trained, tmp_path):
    """Weights, gradients and moments per rank, of every script on two ranks, full and with LoRA: the table's
    bytes are those of the run."""
    data = {"sft": trained / "rows.json", "dpo": place / "pairs.json", "rm": place / "pairs.json",
            "ppo": trained / "rows.json"}
    more = {"ppo": ["--reward_model", trained / "reward", "--rollout_batch", 4, "--max_new_tokens", 4,
                    "--ppo_epochs", 1]}
    runs = {}
    for script, file in data.items():
        for way, lora in {"full": 0, "LoRA 3": 3}.items():
            title = f"{trained / 'model'}: {script.upper()}, {way}, 2 GPUs"
            runs[title] = script, [
                "--model", trained / "model", "--data", file, "--images", place / "images", "--workers", 0,
                "--out", tmp_path / script / way, "--batch_size", 4, "--micro_batch", 2, "--max_steps", 1,
                "--dtype", "bf16", "--lora_rank", lora, *more.get(script, [])]
    done = tiny.spread(functools.partial(measure, runs, str(tmp_path / "measured.json")), 2)
    assert done.code == 0, done.err
    table = fork("memory", "--model", trained / "model", "--gpus", 2, "--lora_rank", 3, "--json")
    predicted = figures(table)
    for title, sizes in json.loads((tmp_path / "measured.json").read_text()).items():
        assert min(sizes.values()) > 0 and sizes.items() <= predicted[title].items(), title
    assert len(predicted) == 5 * 3 and "PPO, --rollout sharded" in table.out
