"""What is the same for every script: two ranks do what one does; a run that was killed and is resumed is one
that was not; what the user got wrong is one line; and what is left when a run ends early.

Runs are the scripts' own main in forked processes (tiny.py) or, where signals matter, python and torchrun
(tiny.Job), in fp32 on the CPU, over gloo. Paths in options are below `place` (conftest.py), {} is its name.
"""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import (
    assert_same_gradients,
    assert_same_log,
    assert_same_run,
    at_optimizer_step,
    at_path,
    fork,
    inside,
)

import data
import fsdp
import model as network
import ppo

DATA = {"sft": "rows", "rm": "margins", "dpo": "ranked", "ppo": "trained/rows", "predict": "trained/rows"}
FILES = {script: f"--model model --data {data}.json --images images --workers 0"
         for script, data in DATA.items()}
FILES["ppo"] += " --model trained/model --reward_model trained/reward"
FILES["predict"] += " --model trained/model --max_new_tokens 20 --micro_batch 3"
PPO = (" --batch_size 5 --rollout_batch 10 --micro_batch 5 --samples_per_prompt 2 --max_new_tokens 8"
       " --ppo_epochs 2 --max_steps 1 --lr 1e-3")


@pytest.fixture(scope="session")
def folder(place, trained):
    """`place`, with `trained` in it. Relative paths start there."""
    if not (place / "trained").exists():
        (place / "trained").symlink_to(trained)
    return place


@pytest.fixture(autouse=True)
def inside_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


# ---- two ranks and one ----

START = {  # five steps, of records of unequal lengths
    "sft": " --max_steps 5 --lr 1e-2 --save_every 0", "rm": " --max_steps 5 --lr 3e-3 --save_every 0",
    "dpo": " --max_steps 5 --lr 2e-3 --save_every 0", "predict": "",
    # five records in steps of one a rank: three rounds, and rank 1 has none in the last
    "ppo": PPO + " --micro_batch 1 --max_new_tokens 12 --ppo_epochs 1 --save_rollouts"
           " --eval_data trained/rows.json"}
LORA = "--batch_size 5 --micro_batch 2 --lora_rank 3 --lora_alpha 6"
ALL = "--train projector,llm,vision"
CASES = {
    "sft": {
        "plain": "--batch_size 6 --micro_batch 2",
        "micro 1": "--batch_size 8 --micro_batch 1",
        "micro 8": "--batch_size 8 --micro_batch 8",
        "empty": "--batch_size 5 --micro_batch 2",  # rank 1 has no record in its second micro-batch
        "one record": "--batch_size 1 --micro_batch 1",  # rank 1 has none at all
        "text": "--batch_size 4 --micro_batch 2 --data text.json",  # a rank's are text alone
        "all text": "--batch_size 4 --micro_batch 2 --data all_text.json",
        "projector": "--batch_size 4 --micro_batch 2 --data text.json --train projector",
        "llm": "--batch_size 5 --micro_batch 2 --train llm",
        "vision": "--batch_size 5 --micro_batch 2 --train vision",
        "all": f"--batch_size 5 --micro_batch 2 {ALL}",
        "recompute": f"--batch_size 5 --micro_batch 2 {ALL} --recompute",
        "lora": f"{LORA} --train projector,llm",
        "tied": "--batch_size 6 --micro_batch 2 --model tied",
        "evaluated": "--batch_size 6 --micro_batch 2 --eval_data rows.json --eval_every 2",
        "replicas": "--batch_size 6 --micro_batch 2 --replicas {ranks}",
        "short": "--batch_size 6 --micro_batch 1 --max_steps 2"},
    "rm": {
        "plain": "--batch_size 6 --micro_batch 2",
        "micro 1": "--batch_size 6 --micro_batch 1",
        "all": f"--batch_size 5 --micro_batch 2 {ALL} --recompute --center_coef 0.3 --projector_lr 1e-3",
        "lora": LORA,
        "tied": "--batch_size 5 --micro_batch 2 --model tied",
        "evaluated": "--batch_size 6 --micro_batch 2 --eval_data margins.json --eval_every 2"},
    "dpo": {
        "plain": "--data pairs.json --batch_size 6 --micro_batch 2 --sft_coef 0.5",
        "ranked": "--batch_size 5 --micro_batch 2",
        "one record": "--batch_size 1 --micro_batch 1",
        "ipo": "--data pairs.json --batch_size 5 --micro_batch 2 --loss ipo --length_norm --ref_model other",
        "lora": f"{LORA} --train projector,llm",
        "evaluated": "--data pairs.json --batch_size 6 --micro_batch 2 --sft_coef 0.5 --eval_data ranked.json"
                     " --eval_every 2"},
    "ppo": {
        "gathered": "", "sharded": "--rollout sharded",
        "normalised": "--normalize_scores --max_steps 2"},
    "predict": {
        "greedy": "", "samples": "--num_samples 3", "score": "--score --data trained/turns.json",
        "best of 3": "--num_samples 3 --reward_model trained/reward",
        "best of 3, its own tower": "--num_samples 3 --reward_model trained/tower",
        "rewarded": "--score --reward_model trained/reward --data ranked.json",
        **{f"{name}, sharded": f"--sharded {options}" for name, options in {
            "greedy": "", "samples": "--num_samples 3", "score": "--score --data trained/turns.json",
            "best of 3, its own tower": "--num_samples 3 --reward_model trained/tower",
            "rewarded": "--score --reward_model trained/reward --data ranked.json"}.items()}},
}
TRAINING = [(script, case) for script in CASES if script != "predict" for case in CASES[script]]
UNREACHED = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.encoder.layers.1.")


def recorded(script, argv):
    """A run in this process, and the gradients that each optimiser's first step has. → {name: gradient}"""
    step, gradients, stepped = torch.optim.AdamW.step, {}, set()

    def recording_step(optimizer, *args, **kwargs):
        if id(optimizer) not in stepped:
            stepped.add(id(optimizer))
            gradients.update({id(p): p.grad.full_tensor().clone() for group in optimizer.param_groups
                              for p in group["params"]})
        return step(optimizer, *args, **kwargs)
    torch.optim.AdamW.step = recording_step
    try:
        models = inside(script, *argv)
    finally:
        torch.optim.AdamW.step = step
    return {name if i == 0 else f"{i} {name}": gradients[id(p)] for i, model in enumerate(models)
            for name, p in model.named_parameters() if id(p) in gradients}


def run_cases(script, ranks, names, folder, out):
    """Cases of a script in one process group, which starts once."""
    os.chdir(folder)
    fsdp.launch(SimpleNamespace(replicas=1, images=""))
    for name in names:
        options = f"{FILES[script]}{START[script]} {CASES[script][name]}".format(ranks=ranks).split()
        target = out / (f"{name}.jsonl" if script == "predict" else name)
        gradients = recorded(script, [*options, "--out", target])
        if dist.get_rank() == 0 and script != "predict":
            torch.save(gradients, target / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def runs(folder, tmp_path_factory):
    """(script, case, ranks) → what that run leaves; all cases of a script are run at once."""
    @functools.cache
    def run(script, ranks, names):
        out = tmp_path_factory.mktemp(f"{script}-{ranks}")
        names = names or [*CASES[script]]
        return out, tiny.spread(functools.partial(run_cases, script, ranks, names, folder, out), ranks)

    def get(script, case, ranks, names=()):
        out, done = run(script, ranks, names)
        path = out / (f"{case}.jsonl" if script == "predict" else case)
        assert path.is_file() or (path / "gradients.pt").exists(), done.err
        return path
    return get


def gradients(out):
    return torch.load(out / "gradients.pt")


def weights(out):
    return load_file(out / "model.safetensors")


def options_of(script, case):
    words = f"{FILES[script]}{START[script]} {CASES[script][case]}".split()
    return {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}


def base(folder, script, case):
    return load_file(folder / options_of(script, case)["--model"] / "model.safetensors")


@pytest.mark.parametrize("script, case", TRAINING)
def test_two_ranks_do_what_one_does(script, case, folder, runs):
    """The first step's gradients, the log of every step, what was sampled and how far every exported weight
    has moved are equal to rounding: with unequal lengths, micro-batches without an image or a record, every
    part frozen in turn, adapters, tied embeddings, and two replicas."""
    one, two = (runs(script, case, ranks) for ranks in (1, 2))
    assert_same_gradients(gradients(two), gradients(one))
    assert_same_log(tiny.log(two), tiny.log(one))
    start, ours, theirs = base(folder, script, case), weights(two), weights(one)
    assert ours.keys() == theirs.keys() == start.keys()
    for name in start:
        if not name.endswith("k_proj.bias"):  # Adam makes full steps of its gradient, which is rounding alone
            far = (theirs[name] - start[name]).abs().mean()
            assert (ours[name] - theirs[name]).abs().mean() <= 0.05 * far, name
    for file in one.glob("**/*"):
        if file.suffix == ".safetensors" and file.name != "model.safetensors":  # score, adapter
            ours, theirs = load_file(two / file.relative_to(one)), load_file(file)
            for name in theirs:
                assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name
        if file.parent.name == "rollouts":
            lines = (two / "rollouts" / file.name).read_text().splitlines(), file.read_text().splitlines()
            for ours, theirs in zip(*(map(json.loads, text) for text in lines), strict=True):
                assert all(ours.pop(key) == theirs.pop(key) for key in ("id", "answer"))
                assert theirs and ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("case", CASES["predict"])
def test_two_ranks_write_the_same_file(case, runs):
    """predict.py: byte for byte, in the records' order, with a rank that runs out of records; weights sharded
    or gathered."""
    expected = runs("predict", case.removesuffix(", sharded"), 1).read_bytes()
    assert runs("predict", case, 2).read_bytes() == expected
    assert len(expected.splitlines()) >= 7 and len(set(expected.splitlines())) == len(expected.splitlines())


@pytest.mark.parametrize("ranks", [4, 8])
def test_more_ranks_than_cores_do_what_one_does(ranks, runs):
    """Four ranks, and eight of which two have no record: the losses of one."""
    many, one = runs("sft", "short", ranks, ("short",)), runs("sft", "short", 1)
    assert_same_log(tiny.log(many), tiny.log(one))
    assert_same_gradients(gradients(many), gradients(one))


def trained_by(script, case, start):
    """The names of the exported tensors that a case's options train."""
    options = options_of(script, case)
    names = set()
    if "--lora_rank" in options:
        layers = "language_model.model.layers."
        names = {name for name in start if name.startswith(layers) and "_proj." in name}
    train = options.get("--train", "llm" if names else "projector,llm").split(",")
    parts = {"projector": "multi_modal_projector.", "vision": "vision_tower.",
             "llm": "language_model.model." if script == "rm" else "language_model."}
    prefixes = tuple(parts[part] for part in train if not (names and part == "llm"))
    return names | {name for name in start if name.startswith(prefixes) and not name.startswith(UNREACHED)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script, case", TRAINING)
def test_what_is_trained_moves_and_nothing_else(script, case, ranks, folder, runs):
    """Every trained tensor is another, every frozen one the checkpoint's, bit for bit. Frozen too: what the
    forward pass does not reach (the tower's layers above the one that is used; a reward model's LM head)."""
    start, after = base(folder, script, case), weights(runs(script, case, ranks))
    moved = {name for name in start if not torch.equal(after[name], start[name])}
    expected = trained_by(script, case, start)
    assert moved == (expected if case != "all text" else {
        name for name in expected if name.startswith("language_model.")})
    if "--lora_rank" not in CASES[script][case]:
        graded = {name for name in gradients(runs(script, case, ranks)) if name in start}
        assert graded == expected


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script, many, one", [("sft", "micro 1", "micro 8"), ("rm", "micro 1", "plain")])
def test_accumulation_is_the_larger_batch(script, many, one, ranks, runs):
    """Micro-batches of one record, with few targets or many, two answers or five, are those of several."""
    many, one = runs(script, many, ranks), runs(script, one, 1)
    assert_same_gradients(gradients(many), gradients(one))
    assert_same_log(tiny.log(many), tiny.log(one))


def test_recomputed_activations_change_nothing(runs):
    """--recompute: the same gradients and losses."""
    recomputed, plain = (runs("sft", case, 1) for case in ("recompute", "all"))
    assert_same_gradients(gradients(recomputed), gradients(plain), 1e-6)
    assert_same_log(tiny.log(recomputed), tiny.log(plain), 1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_all_text_step_leaves_the_projector_alone(ranks, runs):
    """Zero-weighted images keep the ranks in step, and give the projector a gradient of exactly zero."""
    found = gradients(runs("sft", "all text", ranks))
    assert not any(t.any() for name, t in found.items() if name.startswith("multi_modal_projector"))
    assert any(t.any() for name, t in found.items() if name.startswith("language_model"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_an_evaluation_between_steps_changes_nothing(script, ranks, runs):
    """--eval_every 2 of five steps: metrics at 2, 4 and 5; log, gradients and exported files are bit for bit
    those of a run without."""
    evaluated, plain = (runs(script, case, ranks) for case in ("evaluated", "plain"))
    trace, expected = tiny.log(evaluated), tiny.log(plain)
    assert [line["step"] for line in trace if len(line) > len(expected[0])] == [2, 4, 5]
    assert [{key: line[key] for key in expected[0]} for line in trace] == expected
    for file in ("gradients.pt", "model.safetensors", *(["score.safetensors"] if script == "rm" else [])):
        assert (evaluated / file).read_bytes() == (plain / file).read_bytes(), file


RATES = {"multi_modal_projector.linear_1.weight": 1e-2, "language_model.model.norm.weight": 1e-3,
         "language_model.model.layers.0.mlp.up_proj.weight": 1e-3}


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_two_learning_rates_and_decay(script, folder, tmp_path):
    """Of the first AdamW step, which is the rate's size: the projector moves by --projector_lr, the LLaMA by
    --lr, which is what is logged; --weight_decay shrinks matrices only."""
    start, after = base(folder, script, "lora"), {}
    for decay in (0, 0.5):
        argv = (f"{FILES[script]} --batch_size 10 --max_steps 1 --warmup 0 --lr 1e-3 --projector_lr 1e-2"
                f" --weight_decay {decay}")
        done = fork(script, *argv.split(), "--out", tmp_path / str(decay))
        assert done.code == 0, done.err
        assert tiny.log(tmp_path / str(decay))[0]["lr"] == pytest.approx(1e-3)
        after[decay] = weights(tmp_path / str(decay))
    for name, rate in RATES.items():
        assert (after[0][name] - start[name]).abs().median() == pytest.approx(rate, rel=0.02)
        decayed = after[0][name] - (rate * 0.5 * start[name] if start[name].ndim > 1 else 0)
        assert torch.allclose(after[0.5][name], decayed, atol=1e-6)


@pytest.mark.parametrize("script, options, passes", [
    ("sft", "", [6]),  # the images of ten records, of which four show one of two
    ("rm", "", [6, 6]),  # and once for the bias
    ("dpo", "", [5, 5]),  # and once for the reference
    ("ppo", PPO + " --ppo_epochs 3", [6])])
def test_each_image_passes_the_tower_once(script, options, passes, world, tmp_path, monkeypatch):
    """The distinct images of a micro-batch, whatever the number of answers, records that show them, models
    and passes over the answers."""
    seen, forward = [], network.CLIPVision.forward
    monkeypatch.setattr(network.CLIPVision, "forward",
                        lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    options += " --batch_size 10 --micro_batch 10 --max_steps 1 --recompute"
    inside(script, *(FILES[script] + options).split(), "--out", tmp_path / "out")
    assert seen == passes


# ---- several data files ----

SEVERAL = {"sft": " --max_steps 2 --batch_size 5 --lr 1e-2 --eval_data FILES",
           "ppo": PPO + " --eval_data FILES", "predict": " --num_samples 2"}


@pytest.mark.parametrize("script", SEVERAL)
def test_files_in_two_folders_are_one_file(script, folder, tmp_path):
    """With images of equal names and other content in each folder, and no --images: the run is that of a
    merged file."""
    records, files = json.loads((folder / f"{DATA[script]}.json").read_text()), []
    for k, part in enumerate((records[:4], records[4:])):
        (tmp_path / f"{k}").mkdir()
        for i in range(6):
            tiny.shutil.copy(folder / "images" / f"p{i}.png", tmp_path / f"{k}" / f"p{(i + k) % 6}.png")
        text = re.sub(r"p(\d)\.png", lambda found, k=k: f"p{(int(found[1]) + k) % 6}.png", json.dumps(part))
        files.append(tmp_path / f"{k}" / "rows.json")
        files[k].write_text(text)
    options = FILES[script].replace("--images images", "") + SEVERAL[script] + " --data FILES"
    several, merged = tmp_path / "several", tmp_path / "merged"
    for out, names, more in ((several, f"{files[0]} {files[1]}", ""),
                             (merged, f"{DATA[script]}.json", " --images images")):
        done = fork(script, *(options.replace("FILES", names) + more).split(), "--out", out)
        assert done.code == 0, done.err
    if script != "predict":
        assert_same_log(tiny.log(several), tiny.log(merged))
        return
    ours, theirs = ([{**json.loads(line), "image": None} for line in out.read_text().splitlines()]
                    for out in (several, merged))
    assert ours == theirs and len(ours) == len(records)
    words = options.replace("FILES", f"{files[0]} {files[1]}").split()
    done = fork(script, *words, "--out", files[1], "--overwrite")
    assert done.code == 2 and f"got --out {files[1]}, which is --data too" in done.error


# ---- killed and resumed ----

SAVED = " --save_every 1 --lr 1e-2 --batch_size 4 --micro_batch 2"
LONG = {  # the last optimisation is that of the third epoch; evaluations and the fixed reference on the way
    "sft": FILES["sft"] + SAVED + " --epochs 3",  # of 10 records: 3 steps an epoch, the last of them short
    "rm": FILES["rm"] + SAVED + " --epochs 2 --eval_data pairs.json --eval_every 2",
    "dpo": FILES["dpo"] + SAVED + " --max_steps 5 --eval_data pairs.json --eval_every 2",
    "ppo": FILES["ppo"] + PPO + " --max_steps 3 --save_every 1 --max_new_tokens 10 --normalize_scores"
           " --critic_warmup 1 --ptx_data trained/turns.json",
}
STEPS = {"sft": 9, "rm": 6, "dpo": 5, "ppo": 3}
ADAPTERS = " --lora_rank 3 --max_steps 3"


def before_saving(step):
    """The step is logged, and nothing of its checkpoint is there."""
    return functools.partial(at_path, "os.mkdir", rf"step_{step}\.part$")


def in_update(number, act=tiny.die, rank=0):
    """Gradients are there, and no weight has moved."""
    return functools.partial(at_optimizer_step, number, act, rank=rank)


DATA_WRITTEN = functools.partial(at_path, "open", r"step_5\.part/.*metadata")
RENAME = functools.partial(at_path, "os.rename")
KILLS = {  # script, ranks and options; where the run dies; the last complete checkpoint
    "sft: before the first save": ("sft", 1, "", before_saving(1), None),
    "sft: at an epoch's last step": ("sft", 1, "", before_saving(3), 2),
    "sft: at an epoch's first step": ("sft", 1, "", before_saving(4), 3),
    "sft: data written, not what completes them": ("sft", 1, "", DATA_WRITTEN, 4),
    "sft: before the rename": ("sft", 1, "", functools.partial(RENAME, r"step_5\.part$"), 4),
    "sft: after the rename": ("sft", 1, "", functools.partial(RENAME, r"step_5\.part$", after=True), 5),
    "sft: in the export": ("sft", 1, "", functools.partial(RENAME, r"export\.part/\w"), 9),
    "sft: rank 1, in the second epoch": ("sft", 2, "", in_update(6, rank=1), 5),
    "sft: two ranks, in a save": ("sft", 2, "", DATA_WRITTEN, 4),
    "sft: two ranks, adapters": ("sft", 2, ADAPTERS, before_saving(2), 1),
    "rm: in the second epoch": ("rm", 1, "", before_saving(4), 3),
    "rm: two ranks, adapters": ("rm", 2, ADAPTERS, before_saving(2), 1),
    "dpo: before the reference is written": (
        "dpo", 1, "", functools.partial(RENAME, r"/reference\.json$"), None),
    "dpo: adapters": ("dpo", 1, ADAPTERS, before_saving(2), 1),
    "dpo: two ranks": ("dpo", 2, "", before_saving(5), 4),
    "ppo: in the first update of the policy": ("ppo", 1, "", in_update(6), 1),
    "ppo: in the last iteration": ("ppo", 1, "", in_update(16), 2),
    "ppo: two ranks": ("ppo", 2, "", in_update(16), 2),
}


def long_run(script, ranks, options, out, *more, **how):
    return fork(script, *(LONG[script] + options).split(), "--out", out, *more, ranks=ranks, **how)


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    @functools.cache
    def run(script, ranks=1, options=""):
        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        done = long_run(script, ranks, options, out)
        assert done.code == 0, done.err
        assert [line["step"] for line in tiny.log(out)] == [*range(1, 1 + (3 if options else STEPS[script]))]
        return out
    return run


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_is_uninterrupted(kill, uninterrupted, tmp_path):
    """kill -9, then --resume: the log, every exported file and the last checkpoint (weights, optimisers,
    PPO's critic and score moments) are those of a run that went through."""
    script, ranks, options, prepare, last = KILLS[kill]
    out, expected = tmp_path / "out", uninterrupted(script, ranks, options)
    done = long_run(script, ranks, options, out, prepare=prepare)
    assert done.code == -signal.SIGKILL if ranks == 1 else done.code != 0, done.err
    assert not (out / "model.safetensors").exists()
    assert (fsdp.checkpoint_steps(out) or [None])[-1] == last
    assert (out / "reference.json").exists() == (script == "dpo" and last is not None)
    done = long_run(script, ranks, options, out, "--resume")
    assert done.code == 0, done.err
    assert_same_run(out, expected)


def require_offload():
    """From now on a unit that is sharded without CPUOffloadPolicy fails the run."""
    shard = fsdp.fully_shard

    def checked(unit, *, offload_policy, **how):
        assert isinstance(offload_policy, fsdp.CPUOffloadPolicy), offload_policy
        return shard(unit, offload_policy=offload_policy, **how)
    fsdp.fully_shard = checked


@pytest.mark.parametrize("script, ranks", [("sft", 1), ("sft", 2), ("ppo", 1), ("ppo", 2)])
def test_offloading_changes_nothing(script, ranks, uninterrupted, tmp_path):
    """Killed and resumed with --offload: log, exported files and last checkpoint are bit for bit those of a
    run without it that went through."""
    out, expected = tmp_path / "out", uninterrupted(script, ranks)
    assert long_run(script, ranks, " --offload", out, prepare=in_update(6)).code != 0
    assert fsdp.checkpoint_steps(out) and not (out / "model.safetensors").exists()
    done = long_run(script, ranks, " --offload", out, "--resume", prepare=require_offload)
    assert done.code == 0, done.err
    assert re.search(r"memory per rank: weights .* GB, .*optimizer .* GB \(in host memory\)", done.out)
    assert_same_run(out, expected)


def test_one_rank_resumes_what_two_began(uninterrupted, tmp_path):
    """On another number of ranks the checkpoint loads, and the run is the same to rounding."""
    assert long_run("sft", 2, "", tmp_path / "out", prepare=before_saving(6)).code != 0
    done = long_run("sft", 1, "", tmp_path / "out", "--resume")
    assert done.code == 0, done.err
    assert_same_log(tiny.log(tmp_path / "out"), tiny.log(uninterrupted("sft", 2)), 1e-4)


@pytest.mark.parametrize("script", LONG)
def test_a_finished_run_resumes_to_itself(script, uninterrupted, tmp_path):
    """The same command with --resume (--train at its default) writes the export again, and no step more."""
    out = tmp_path / "out"
    tiny.shutil.copytree(uninterrupted(script), out)
    os.remove(out / "model.safetensors")
    done = long_run(script, 1, "", out, "--resume")
    assert done.code == 0, done.err
    assert_same_run(out, uninterrupted(script))


STOPPED = fsdp.STOPPED  # exit code of a run that SIGTERM has ended
CHECKPOINTS = 2  # that stay


def test_the_last_checkpoints_stay(tmp_path):
    """--save_every 2 of nine steps: the last step is saved too, and older ones are removed."""
    assert long_run("sft", 1, " --save_every 2", tmp_path / "out").code == 0
    assert fsdp.checkpoint_steps(tmp_path / "out") == [2, 4, 6, 8, 9][-CHECKPOINTS:]


def test_resume_with_other_options_is_refused(uninterrupted, tmp_path):
    """What would make it another run is named; what only concerns memory or saving may differ."""
    tiny.shutil.copytree(uninterrupted("sft"), tmp_path / "out")
    done = long_run("sft", 1, " --lr 2e-2 --save_every 2 --micro_batch 1", tmp_path / "out", "--resume")
    assert done.code == 2 and "--lr 0.01 then, 0.02 now" in done.error
    assert "--save_every" not in done.error and "--micro_batch" not in done.error
    assert_same_run(tmp_path / "out", uninterrupted("sft"))


def test_overwrite_starts_afresh(uninterrupted, tmp_path):
    """--overwrite leaves nothing of the earlier run: no checkpoint, log line or weights file."""
    out = tmp_path / "out"
    tiny.shutil.copytree(uninterrupted("sft"), out)
    save_file({"old": torch.ones(1)}, out / "model-00001-of-00002.safetensors")
    assert long_run("sft", 1, "", out, "--overwrite", prepare=before_saving(2)).code != 0
    assert not list(out.glob("model*")) and not (out / "config.json").exists()
    assert [line["step"] for line in tiny.log(out)] == [1, 2] and fsdp.checkpoint_steps(out) == [1]


def test_what_a_run_leaves_behind(uninterrupted):
    """args.json: resolved arguments, versions, ranks; log.jsonl: unrounded metrics of every step; nothing
    half-written."""
    out = uninterrupted("sft", 2)
    args = json.loads((out / "args.json").read_text())
    assert args["batch_size"] == 4 and args["lr"] == 1e-2 and args["ranks"] == 2 and args["seed"] == 0
    versions = {"torch": torch.__version__, "transformers": tiny.hf.__version__}
    assert args["versions"].items() >= versions.items()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert any(len(repr(line["loss"])) > 12 for line in lines)
    assert {path.name for path in out.iterdir()} == {
        "args.json", "log.jsonl", "checkpoints", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
        "processor_config.json"}


# ---- what is wrong is said ----

@pytest.fixture(scope="session")
def wrong(folder, tmp_path_factory):
    """A folder of files and folders that something is wrong with."""
    wrong = tmp_path_factory.mktemp("wrong")
    (wrong / "not.json").write_text('[{"id": 1},')
    (wrong / "images").mkdir()
    (wrong / "images" / "cut.png").write_bytes((folder / "images" / "p3.png").read_bytes()[:900])
    good = [tiny.row(i, None, "yes or no?", ["no", "yes"]) for i in range(10)]
    for name, record in {"cut": tiny.row(10, "cut.png", "What?", ["no", "a star"]),
                         "prompt": tiny.row(10, None, "What?"), "single": tiny.row(10, None, "What?", ["no"]),
                         "three": tiny.row(10, None, "What?", ["no", "yes", "a star"])}.items():
        tiny.write_rows(wrong / f"{name}.json", [*good, record])
    config = json.loads((folder / "model" / "config.json").read_text())
    for name in ("no_tokenizer", "no_template", "cut", "bad_config", "other_token", "foreign", "llama"):
        tiny.shutil.copytree(folder / "model", wrong / name)
    os.remove(wrong / "no_tokenizer" / "tokenizer.json")
    os.remove(wrong / "no_template" / "chat_template.jinja")
    os.truncate(wrong / "cut" / "model.safetensors", 100_000)
    (wrong / "bad_config" / "config.json").write_text('{"text_config": ')
    (wrong / "other_token" / "config.json").write_text(json.dumps({**config, "image_token_index": 7}))
    (wrong / "llama" / "config.json").write_text(json.dumps(config["text_config"]))
    tiny.swap_tokens(wrong / "foreign")
    make_larger_model(wrong / "larger")
    (wrong / "unrelated").mkdir()
    (wrong / "unrelated" / "thesis.tex").write_text("years of work")
    (wrong / "file").write_text("")
    (wrong / "earlier").mkdir()
    (wrong / "earlier" / "args.json").write_text(json.dumps({"lr": 1}))
    (wrong / "earlier" / "model.safetensors").write_text("weeks of work")
    return wrong


def make_larger_model(folder):
    """One whose tower takes images of another size."""
    tiny.make_model(folder)
    config = tiny.llava_config(tiny.make_tokenizer(folder))
    config.vision_config, config.image_seq_length = tiny.clip_config(image_size=24), 9
    config.save_pretrained(folder)
    tiny.write(folder, tiny.named(tiny.randomise(tiny.hf.LlavaForConditionalGeneration(config)), tiny.HUB))
    tiny.write_processor(folder, 24)


WRONG = {  # options that come after good ones, and what is said. {} is the folder `wrong`
    "sft": {  # and what is shared by every script
        "--model {}/nowhere": "need a checkpoint folder or a hub id; there is no such folder",
        "--model nobody/nothing": "got 'nobody/nothing', need a checkpoint folder or a hub id",
        "--model {}/llama": "got --model of the kind 'llama', need LLaVA-1.5 as transformers has it",
        "--model {}/images": "no config.json, need a checkpoint folder",
        "--model {}/bad_config": "bad_config/config.json",
        "--model {}/no_tokenizer": "no tokenizer.json or tokenizer.model: give --tokenizer",
        "--model {}/other_token": "the tokenizer is of another checkpoint",
        "--model {}/no_template": "has no chat template: give --template vicuna|llama2|llama3|pl",
        "--template vicunna": "got --template vicunna, need auto, vicuna, llama2, llama3, plain or a .jinja",
        "--model {}/cut": "cut/model.safetensors",
        "--model model --llm model": "got --model and --llm",
        "--data {}/nowhere.json": "need a .json, .jsonl or .txt file: no such file",
        "--data {}/not.json": "not.json: not JSON",
        "--data {}/cut.json --images {}/images": "(id row 10): cannot read the ",
        "--data {}/prompt.json": "(id row 10): got no answer",
        "--data rows.json {}/prompt.json": "prompt.json: record 10 (id row 10): got no answer",
        "--eval_data rows.json {}/prompt.json": "prompt.json: record 10 (id row 10): got no answer",
        "--max_len 20": "fits --max_len 20: raise it",
        "--train projector,llama": "argument --train: got projector,llama, need any of projector,llm,vision",
        "--train=": "need any of projector,llm,vision",
        "--train llm --projector_lr 1": "but --train llm has no projector",
        "--replicas 3": "got --replicas 3, need a divisor of the ",
        "--wandb project": "pip install wandb",
        "--lora_rank 2 --train projector": "got --lora_rank 2 without llm in --train",
        "--batch_size 0": "argument --batch_size: got 0, need a whole number of at least 1",
        "--lora_rank -1": "argument --lora_rank: got -1, need a whole number of at least 0",
        "--workers -1": "argument --workers: got -1, need a whole number of at least 0",
        "--lr nan": "argument --lr: got nan, need a number of at least 0",
        "--epochs inf": "argument --epochs: got inf, need a number above 0",
        "--grad_clip 2": "unknown option --grad_clip: no option: gradients are scaled"},
    "rm": {
        "--data {}/single.json": "single.json: record 10 (id row 10): got 1 answer, need 2 or more, best",
        "--eval_data {}/single.json": "(id row 10): got 1 answer, need 2 or more, best first",
        "--train projector,head": "argument --train: got projector,head, need any of projector,llm,vision",
        "--train llm --projector_lr 1": "but --train llm has no projector"},
    "dpo": {
        "--data {}/single.json": "(id row 10): got 1 answer, need 2 or more, best first",
        "--data {}/three.json --loss ipo": "(id row 10): got 3 answers, need two; only --loss sigmoid",
        "--data {}/three.json --label_smoothing 0.1": "(id row 10): got 3 answers, need two",
        "--data pairs.json --eval_data {}/three.json --loss hinge": "(id row 10): got 3 answers, need two",
        "--label_smoothing 0.7": "got --label_smoothing 0.7 with --loss sigmoid, need 0 … 0.5",
        "--loss hinge --label_smoothing 0.1": "0.1 with --loss hinge, need 0 … 0.5",
        "--loss robust": "got --loss robust without --label_smoothing, need the share",
        "--loss kto": "argument --loss: invalid choice: 'kto'",
        "--beta 0": "argument --beta: got 0, need a number above 0",
        "--ref_model {}/foreign": "foreign: its tokenizer is not that of model",
        "--ref_model {}/larger": "got --ref_model {}/larger, need the policy's image size and mode",
        "--train head": "argument --train: got head, need any of projector,llm,vision",
        "--train llm --projector_lr 1": "but --train llm has no projector"},
    "ppo": {
        "--rollout_batch 7": "got --rollout_batch 7, need a multiple of --batch_size 5",
        "--reward_model=": "--reward_model is needed: what rm.py leaves, or FILE.py:F",
        "--reward_model model": "model: no score.safetensors, need a reward model: what rm.py leaves",
        "--reward_model trained/foreign": "foreign: its tokenizer is not that of trained/model",
        "--reward_model {}/nowhere.py:f": "no such file {}/nowhere.py",
        "--reward_model trained/rewards.py:absent": "no function absent in trained/rewards.py",
        "--reward_model trained/rewards.py:number": "no function number in trained/rewards.py",
        "--reward_model trained/rewards.py:short": "give --critic policy",
        "--temperature 0": "argument --temperature: got 0, need a number above 0",
        "--train vision": "argument --train: got vision, need any of projector,llm, joined by",
        "--ptx_data {}/prompt.json": "(id row 10): got no answer",
        "--eval_data {}/nowhere.json": "no such file",
        "--max_new_tokens 0": "argument --max_new_tokens: got 0, need a whole number of at least 1",
        "--clip_range 0": "argument --clip_range: got 0, need a number above 0",
        "--lam 1.1": "argument --lam: got 1.1, need a number from 0 to 1",
        "--missing_eos_score nan": "argument --missing_eos_score: got nan, need a finite number"},
    "predict": {
        "--out {}": "which is a folder, need a .jsonl file",
        "--num_samples 2 --temperature 0": "need a temperature above 0",
        "--num_samples 0": "argument --num_samples: got 0, need a whole number of at least 1",
        "--data {}/prompt.json --score": "(id row 10): got no answer",
        "--top_k 5": "got --top_k or --top_p, but greedy decoding: give --temperature, or",
        "--score --num_samples 2": "got --score with options of sampling",
        "--score --temperature 0.5": "got --score with options of sampling",
        "--score --top_k 5": "got --score with options of sampling",
        "--score --top_p 0.5": "got --score with options of sampling",
        "--reward_model model": "model: no score.safetensors, need a reward model: what rm.py leaves",
        "--reward_model trained/foreign": "foreign: its tokenizer is not that of trained/model"},
}


def wrong_run(script, options, wrong, out, **how):
    start = FILES[script] + (PPO if script == "ppo" else " --max_steps 1" if script != "predict" else "")
    given = [word.replace("{}", str(wrong)) for word in options.split()]
    return fork(script, *start.split(), "--out", out, *given, **how)


def assert_said(done, message):
    """One line says it, last, on every rank that says anything; no traceback, and exit code 2."""
    assert message in done.error and "\n" not in done.error, done.err
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert all(line.endswith(done.error) for line in done.err.splitlines() if "error: " in line), done.err


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "script, options", [(script, options) for script in WRONG for options in WRONG[script]])
def test_what_is_wrong_is_said(script, options, ranks, wrong, tmp_path):
    """In one line, before anything is written; on two ranks the same, whoever finds it."""
    done = wrong_run(script, options, wrong, tmp_path / "out", ranks=ranks)
    assert_said(done, WRONG[script][options].replace("{}", str(wrong)))
    assert not list(tmp_path.iterdir())


UNKNOWN = {  # options that no script has, or not that one, and what is said of them
    "--learning_rate 1e-5": {"predict": "--lr is an option of training", "": "use --lr"},
    "--learning-rate=1e-5": {"predict": "--lr is an option of training", "": "use --lr"},
    "--per_device_train_batch_size 4": {"predict": "--batch_size (records per optimiser step, over all ranks",
                                        "": "use --batch_size (records per optimiser step, over all ranks"},
    "--gradient_accumulation_steps 4": {"": "use --micro_batch (records per forward pass on one rank"},
    "--bf16 True --output_dir x": {"": "unknown option --output_dir: use --out"},
    "--max-length 512": {"": "use --max_len (prompt, image and answer"},
    "--vision_tower x": {"": "use --clip, with --llm"},
    "--deepspeed zero3.json": {"": "no option: FSDP2 always shards"},
    "--adam_offload": {"": "use --offload", "predict": "--offload is an option of training"},
    "--lora_r 8": {"predict": "--lora_rank is an option of training", "": "use --lora_rank"},
    "--micro-batch 2": {"": "use --micro_batch"},
    "--micro_bach 2": {"": "did you mean --micro_batch?"},
    "--micro 2": {"": "did you mean --micro_batch?"},
    "--beta 1 --critic policy --score": {
        "dpo": "--critic: --critic is an option of ppo.py", "": "--beta: --beta is an option of dpo.py"},
    "--load_in_4bit": {"": "no option: weights are not quantised"},
    "--save_adapter": {"": "no option: OUT/adapter is written where adapters alone are trained"},
    "--group_by_length yes": {"": "no option: records of similar length share a forward pass"},
    "--center_rows 0": {"": "no option: the mean reward of 2048 training records becomes 0"},
    "--target_kl 1": {"": "unknown option --target_kl: no option: β is fixed: --kl_coef"},
    "--top_k 5": {"predict": "greedy decoding", "": "--top_k is an option of predict.py"},
    "--quux": {"": "unknown option --quux: see --help"},
    "--seed 1 2": {"": "got '2', which belongs to no option"},
    "--seed one": {"": "argument --seed: got one, need a whole number of at least 0"},
    "--seed": {"": "argument --seed: expected one argument"},
    "--dtype fp8": {"": "argument --dtype: invalid choice: 'fp8'"},
    "--projector linear": {"": "no option: a new projector is mlp2x_gelu"},
    "--lora_alpha 32": {"predict": "of training", "": "got --lora_alpha 32.0 without --lora_rank"},
    "--eval_every 5": {"predict": "of training", "": "got --eval_every 5 without --eval_data"},
    "--resume --overwrite": {"": "got --resume and --overwrite: give one"},
}


@pytest.mark.parametrize("script", DATA)
@pytest.mark.parametrize("options", UNKNOWN)
def test_an_option_that_is_not_there_is_answered_with_ours(script, options, capsys):
    """In one line, without the usage; neither abbreviated nor misspelt is it taken for another one."""
    said = UNKNOWN[options].get(script, UNKNOWN[options][""])
    with pytest.raises(SystemExit) as end:
        tiny.arguments(script, *FILES[script].split(), *options.split())
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1, printed
    assert printed.startswith(f"{script}.py: error: ") and said in printed


@pytest.mark.parametrize("script", DATA)
def test_help_shows_each_default_once(script, capsys):
    with pytest.raises(SystemExit):
        tiny.arguments(script, "--help")
    options = re.split(r"\n  (?=--)", capsys.readouterr().out.partition("\noptions:\n")[2])
    said = {one.split()[0]: " ".join(one.split()) for one in options}
    assert "(default: 2048)" in said["--max_len"] and "(default: auto)" in said["--image_mode"]
    assert not [one for one in said.values() if one.count("(default") > 1]


@pytest.mark.parametrize("script", DATA)
def test_every_number_is_checked_where_it_is_written(script, capsys):
    """No option that takes a number takes nan, infinity or a word; one line says what it needs."""
    given = vars(tiny.arguments(script, *FILES[script].split()))
    numbers = {name for name, value in given.items() if type(value) in (int, float)}
    assert {"max_len", "seed", "micro_batch"} < numbers
    for name in numbers | given.keys() & {"projector_lr", "critic_lr"}:
        for value in ("nan", "inf", "one"):
            with pytest.raises(SystemExit):
                tiny.arguments(script, *FILES[script].split(), f"--{name}", value)
            assert f"error: argument --{name}: got {value}, need a " in capsys.readouterr().err


def test_every_option_named_for_another_is_one():
    """What the table of other projects' names leads to is an option of some script, and no script has an
    option of such a name."""
    ours = {name for script in DATA for name in vars(tiny.arguments(script, *FILES[script].split()))}
    theirs = [name for names in fsdp.ELSEWHERE.values() for name in names.split()]
    assert len(theirs) == len({*theirs}) and not ours & {*theirs}
    named = {name for text in fsdp.ELSEWHERE for name in re.findall(r"--(\w+)", text)}
    assert named <= ours, named - ours


DEFAULT_RATES = {"sft": 2e-5, "rm": 1e-5, "dpo": 5e-7, "ppo": 1e-6}


@pytest.mark.parametrize("script", DEFAULT_RATES)
def test_the_default_rates_of_adapters_are_ten_times_those_of_weights(script):
    """A projector that is trained with them keeps its own; what is given is never changed."""
    def rates(*options):
        given = vars(tiny.arguments(script, *FILES[script].split(), *map(str, options)))
        return [given.get(name) for name in ("lr", "projector_lr", "critic_lr") if name in given]
    full, ppo = DEFAULT_RATES[script], script == "ppo"
    assert rates() == [full, full if ppo else None]
    assert rates("--lora_rank", 8) == [float(f"{10 * full:.3g}"), float(f"{10 * full:.3g}") if ppo else None]
    both = "--lora_rank", 8, "--train", "projector,llm"
    if not ppo:
        assert rates(*both) == pytest.approx([10 * full, full])
    with pytest.raises(SystemExit):  # a part without a rate of its own: the user has to say which
        rates("--lora_rank", 8, "--train", "projector,llm" if ppo else "llm,vision")
    assert rates(*both, "--lr", full) == [full, full if ppo else None]
    assert rates(*both, "--lr", 10 * full) == [10 * full, 10 * full if ppo else None]
    mine = "critic_lr" if ppo else "projector_lr"
    assert rates(*(both[:2] if ppo else both), f"--{mine}", 0.5) == pytest.approx([10 * full, 0.5])


@pytest.mark.parametrize("script, name, said", [
    ("sft", "prompt", "got no answer"), ("rm", "single", "got 1 answer"), ("dpo", "single", "got 1 answer")])
def test_bad_records_are_skipped_when_asked(script, name, said, wrong, tmp_path):
    """--skip_bad_rows names each and goes on with the rest."""
    options = f"--data {{}}/{name}.json --skip_bad_rows --batch_size 4"
    done = wrong_run(script, options, wrong, tmp_path / "out")
    assert done.code == 0, done.err
    assert f"(id row 10): {said}" in done.out and "10 records, 1 steps" in done.out
    assert [line["step"] for line in tiny.log(tmp_path / "out")] == [1]


@pytest.mark.parametrize("name, said", [("short", "gave 1 scores for 2 answers, need a finite number each"),
                                        ("not_a_number", "need a finite number each: [nan")])
def test_a_reward_function_that_fails(name, said, wrong, tmp_path):
    """It is called in the first iteration; nothing is exported."""
    options = f"--critic policy --reward_model trained/rewards.py:{name}"
    done = wrong_run("ppo", options, wrong, tmp_path / "out")
    assert_said(done, said)
    assert not (tmp_path / "out" / "model.safetensors").exists()


KEPT = {
    "sft --out {}/unrelated": "unrelated, neither empty nor an earlier run: choose another",
    "sft --out {}/unrelated --overwrite": "neither empty nor an earlier run",
    "sft --out {}/unrelated --resume": "neither empty nor an earlier run",
    "sft --out {}/file": "file, which is a file, need a folder",
    "sft --out {}/earlier": "earlier, which holds a run: give --resume or --overwrite",
    "predict --out {}/file": "file, which exists: --resume continues it, --overwrite replaces it",
    "dpo --out {}/earlier --overwrite --ref_model {}/images": "no config.json",
    "ppo --out {}/earlier --overwrite --reward_model {}/foreign": "its tokenizer is not that of",
}


@pytest.mark.parametrize("command", KEPT)
def test_nothing_is_lost_by_a_command(command, wrong, tmp_path):
    """A folder with other things in it, a file, an earlier run: refused, and left as they are, also with
    --overwrite where something else is wrong."""
    def content():
        return {path: path.stat().st_mtime_ns for path in wrong.rglob("*") if path.is_file()}
    before, (script, options) = content(), command.split(maxsplit=1)
    assert_said(wrong_run(script, options, wrong, tmp_path / "out"), KEPT[command])
    assert content() == before


@pytest.mark.parametrize("argv, said", [
    ("--llm {}/llama --data rows.json", "--llm and --clip go together"),
    ("--model model", "--data is needed with --model")])
def test_a_model_has_to_be_given_in_full(argv, said, wrong, tmp_path):
    done = fork("sft", *argv.format(wrong).split(), "--out", tmp_path / "out")
    assert_said(done, said)
    assert not (tmp_path / "out").exists()


# ---- when a run ends early ----

ANSWERS = FILES["predict"] + " --micro_batch 1 --num_samples 2"
MOMENTS = {  # what is called once per step, and which call: something complete is there by then
    "sft": ("torch.optim.AdamW.step", 5), "rm": ("torch.optim.AdamW.step", 4),
    "dpo": ("torch.optim.AdamW.step", 3), "ppo": ("torch.optim.AdamW.step", 12),
    "predict": ("predict.generate", 3)}
FAILURES = {  # what happens on the last of the ranks; exit code; last line
    "kill -9": (tiny.die, -signal.SIGKILL, None),
    "an exception": (tiny.fail, 1, "ValueError: a bug"),
    "SIGTERM": (tiny.terminate, STOPPED, None),
    "SIGINT": (tiny.interrupt, 130, "ended by SIGINT"),
    "NaN": (tiny.poison, 1, "need finite numbers: the last checkpoint, of step "),
}


def started(script, ranks, out, *more, **how):
    if script == "predict":
        return fork(script, *ANSWERS.split(), "--out", out, *more, ranks=ranks, **how)
    return long_run(script, ranks, "", out, *more, **how)


def left(out):
    """What can be gone on from: the steps of checkpoints, or complete lines."""
    if out.is_dir():
        return fsdp.checkpoint_steps(out)
    return [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="session")
def all_answers(folder, tmp_path_factory):
    @functools.cache
    def run(ranks):
        out = tmp_path_factory.mktemp("answers") / "out"
        assert started("predict", ranks, out).code == 0
        return out
    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("script, failure", [
    (script, failure) for script in MOMENTS for failure in FAILURES
    if (script, failure) != ("predict", "NaN")])  # test_predict.py has it: nothing is trained
def test_a_run_that_ends_early(script, failure, ranks, uninterrupted, all_answers, tmp_path):
    """Every rank ends, soon and with the same words; what is complete stays, nothing is exported; with
    --resume it is the run that went through."""
    act, code, said = FAILURES[failure]
    name, number = MOMENTS[script]
    if failure == "NaN":
        name = "torch.nn.utils.get_total_norm"
    out = tmp_path / "out"
    prepare = functools.partial(tiny.at_call, name, number, act, ranks - 1)
    start = time.monotonic()
    done = started(script, ranks, out, prepare=prepare)
    assert time.monotonic() - start < 60
    if ranks == 2 and failure in ("kill -9", "SIGINT"):
        code, said = 1, "another rank is gone"  # the other one's
    assert done.code == code, done
    if said:
        assert said in done.err.strip().splitlines()[-1], done.err
    if failure == "SIGTERM":
        assert "stopped by SIGTERM" in done.out and done.err == "", done
    assert left(out) and not (out / "model.safetensors").exists()
    done = started(script, ranks, out, "--resume")
    assert done.code == 0, done.err
    if script == "predict":
        assert out.read_bytes() == all_answers(ranks).read_bytes()
    else:
        assert_same_run(out, uninterrupted(script, ranks))


PAUSE = in_update(5, tiny.pause)  # step 4 is saved
# ranks; signals in step 5, a second apart, and who gets them; exit code, words, last checkpoint
SIGNALS = {
    "SIGTERM to python": (1, [(signal.SIGTERM, "launcher")], STOPPED, "stopped by SIGTERM after step 5", 5),
    "SIGTERM to torchrun": (2, [(signal.SIGTERM, "launcher")], 1, "stopped by SIGTERM after step 5", 5),
    "SIGTERM to all": (2, [(signal.SIGTERM, "all")], 1, "stopped by SIGTERM after step 5", 5),
    "SIGTERM twice": (1, [(signal.SIGTERM, "launcher")] * 2, STOPPED, "ended by SIGTERM", 4),
    "SIGINT": (1, [(signal.SIGINT, "launcher")], 130, "ended by SIGINT", 4),
    "Ctrl-C under torchrun": (2, [(signal.SIGINT, "all")], 1, "", 4),
    "kill -9 of rank 1": (2, [(signal.SIGKILL, 1)], 1, "Signal 9 (SIGKILL) received by PID", 4),
    "kill -9 of torchrun": (2, [(signal.SIGKILL, "launcher")], -signal.SIGKILL, "", 4),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_signals_of_a_user(case, uninterrupted, tmp_path):
    """They reach python and torchrun as a user starts them. No process survives, also where the launcher
    alone is killed; with --resume it is the run that went through."""
    ranks, signals, code, said, last = SIGNALS[case]
    out = tmp_path / "out"
    argv = [*LONG["sft"].split(), "--out", out]
    with tiny.Job("sft", *argv, ranks=ranks, prepare=PAUSE, cwd=os.getcwd()) as job:
        job.wait(lambda: fsdp.checkpoint_steps(out)[-1:] == [4])
        for number, to in signals:
            job.signal(number, to)
            time.sleep(1 if len(signals) > 1 else 0)
        done = job.end()
    assert done.seconds < 30 and done.code == code and said in done.out + done.err, done
    assert fsdp.checkpoint_steps(out)[-1] == last and not (out / "model.safetensors").exists()
    done = long_run("sft", ranks, "", out, "--resume")
    assert done.code == 0, done.err
    assert_same_run(out, uninterrupted("sft", ranks))


EVALUATED = " --save_every 0 --eval_every 2 --micro_batch 1"  # many batches an evaluation
CUT_SHORT = {  # options; what SIGTERM comes in; the last checkpoint
    "sft": (EVALUATED + " --eval_data rows.json", ("sft.show_answers", 1), 2),
    "sft, first batch": (EVALUATED + " --eval_data rows.json", ("fsdp.Stop.asked", 3), 2),
    "rm": (EVALUATED, ("rm.evaluate", 1), 2),
    "dpo": (EVALUATED, ("dpo.evaluate", 2), 4),
    "dpo, the last": (EVALUATED, ("dpo.evaluate", 3), 5),
    "ppo": (EVALUATED + " --eval_data trained/rows.json", ("ppo.evaluate_rollouts", 1), 2),
    "ppo, scoring": (EVALUATED + " --eval_data trained/rows.json", ("ppo.logprobs_and_values", 12), 1),
    "ppo, scoring held-out answers": (EVALUATED + " --eval_data trained/rows.json",
                                      ("ppo.evaluate_rollouts", 1), 2),
    "ppo, a rollout": (EVALUATED + " --eval_data trained/rows.json", ("ppo.generate_rollouts", 2), 1),
    "ppo, part of a rollout": (EVALUATED + " --decode_batch 1 --eval_data trained/rows.json",
                               ("ppo.sample_answers", 12), 1)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CUT_SHORT)
def test_sigterm_is_heard_in_evaluations_and_rollouts(case, ranks, folder, tmp_path):
    """At the next batch. The evaluation is made up after the resume, a rollout is sampled again: log, weights
    and checkpoints are those of a run that went through."""
    script, (options, moment, last) = case.split(",")[0], CUT_SHORT[case]
    expected, out = tmp_path / "expected", tmp_path / "out"
    assert long_run(script, ranks, options, expected).code == 0
    prepare = functools.partial(tiny.at_call, *moment, tiny.terminate, ranks - 1)
    done = long_run(script, ranks, options, out, prepare=prepare)
    assert done.code == STOPPED and fsdp.checkpoint_steps(out) == [last], done
    last = tiny.log(out)[-1]
    assert ("eval_due" in last) == (
        case not in ("sft", "ppo, a rollout", "ppo, part of a rollout", "ppo, scoring"))
    assert any(name.startswith("eval_") and name != "eval_due" for name in last) == (case == "sft")
    done = long_run(script, ranks, options, out, "--resume")
    assert done.code == 0, done.err
    assert tiny.log(out) == tiny.log(expected)
    assert weights(out).keys() == weights(expected).keys()
    assert all(torch.equal(t, weights(expected)[name]) for name, t in weights(out).items())


@pytest.mark.parametrize("script, options, said", [
    ("sft", "--lr 1e30", "step 2: loss nan"), ("rm", "--lr 1e30", "step 2: loss "),
    ("dpo", "--lr 1e30 --data pairs.json", "step 2: loss "),
    ("sft", "--lr 1e39", "step 1: a weight is not finite: nothing was saved or exported"),
    ("sft", "--lr 1e30 --max_steps 1 --eval_data rows.json", "step 1: eval_loss nan")])
def test_a_run_that_diverges(script, options, said, tmp_path):
    """It ends with exit code 1 before the next step, the log has numbers only, and nothing is exported; the
    checkpoints stay."""
    start = f"{FILES[script]} --batch_size 4 --micro_batch 2 --max_steps 4 --warmup 0"
    done = fork(script, *f"{start} --save_every 1 {options}".split(), "--out", tmp_path / "out")
    assert done.code == 1 and said in done.error and len(done.err.splitlines()) == 1, done
    assert not (tmp_path / "out" / "config.json").exists()
    saved = "eval" not in options and "1e39" not in options
    assert fsdp.checkpoint_steps(tmp_path / "out") == [1] * saved
    lines = (tmp_path / "out" / "log.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    assert len(lines.splitlines()) == ("eval" not in options)


def differ_on_rank_1(how):
    """What rank 1 alone reads: another copy on another node."""
    if os.environ["RANK"] != "1":
        return
    load_records, is_file = data.load_records, os.path.isfile
    if how in ("reversed", "shorter"):
        part = slice(None, None, -1) if how == "reversed" else slice(-1)
        data.load_records = lambda path: data.Records(load_records(path).texts[part])
    if how == "image missing":
        os.path.isfile = lambda path: not str(path).endswith("p3.png") and is_file(path)
    if how == "weights cut":
        def cut(*_):
            raise SafetensorError("incomplete metadata, file not fully covered")
        fsdp.safe_open = cut
    if how == "reward function":
        def failing(record, texts):
            return record["no such field"]
        ppo.load_function = lambda name: failing


ONE_RANK = {  # what differs: script, exit code, what is said
    "reversed": ("dpo", 2, "ranked.json (records with 2 or more answers): rank "),
    "shorter": ("sft", 2, "rows.json (records with 1 or more answers): rank "),
    "image missing": ("sft", 2, "no such image: "), "weights cut": ("sft", 2, "cannot be read"),
    "reward function": ("ppo", 1, "KeyError: 'no such field'")}


@pytest.mark.parametrize("how", ONE_RANK)
def test_what_is_wrong_on_one_rank_is_said_by_all(how, tmp_path):
    """Files of which one rank has another copy, and code that fails on one rank: the same words last, once,
    and no rank waits."""
    script, code, said = ONE_RANK[how]
    options = FILES[script] + (PPO if script == "ppo" else " --max_steps 2")
    if script == "ppo":
        options += " --reward_model trained/rewards.py:red --critic policy --micro_batch 1"
    done = fork(script, *options.split(), "--out", tmp_path / "out", ranks=2,
                prepare=functools.partial(differ_on_rank_1, how))
    assert done.code == code and said in done.err.strip().splitlines()[-1], done
    assert done.err.count(said) == 1 and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_vanishes_is_named(workers, ranks, folder, tmp_path):
    """Deleted while the run goes on: one line with record and file, on every rank; the checkpoints stay."""
    shutil.copytree(folder / "images", tmp_path / "images")
    prepare = in_update(3, functools.partial(remove, tmp_path / "images"))
    more = "--images", tmp_path / "images", "--workers", workers
    done = long_run("sft", ranks, "", tmp_path / "out", *more, prepare=prepare)
    assert re.match(r"\S*rows.json: record \d \(id row \d\): cannot read .*/p\d\.png", done.error), done
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert fsdp.checkpoint_steps(tmp_path / "out")


def remove(folder, *_):
    shutil.rmtree(folder)


def forbid_forks():
    """From now on a run in which Python starts a process after the process group stands fails."""
    def hook(event, _):
        if event in ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen") and (
                dist.is_initialized()):
            raise RuntimeError(f"{event} after the process group was joined")
    sys.addaudithook(hook)


@pytest.mark.parametrize("script", DATA)
def test_nothing_forks_once_the_process_group_stands(script, tmp_path):
    """A process forked while one of gloo's threads is in Python hangs for ever. Loading by threads,
    evaluations, saving, and the export on the way."""
    options = FILES[script] + (PPO if script == "ppo" else "") + " --workers 2"
    if script != "predict":
        options += f" --eval_data {DATA[script]}.json --eval_every 1 --max_steps 2"
    done = fork(script, *options.split(), "--out", tmp_path / "out", ranks=2, prepare=forbid_forks)
    assert done.code == 0, done.err


def forks_anyway(start):
    forbid_forks()
    at_optimizer_step(1, start)


def start_a_program(*_):
    subprocess.run(["true"])


def fork_a_process(*_):
    os.fork() or os._exit(0)


@pytest.mark.parametrize("start", [start_a_program, fork_a_process])
def test_a_fork_would_be_seen(start, tmp_path):
    """The test above fails where something forks."""
    done = long_run("sft", 1, "", tmp_path / "out", prepare=functools.partial(forks_anyway, start))
    assert done.code == 1 and "after the process group was joined" in done.err


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


FULL = {  # script, what is about to be written when the disk becomes full; the last checkpoint
    "args.json": ("sft", "open", r"/args\.json", None),
    "log.jsonl": ("sft", "open", r"/log\.jsonl\.part", None),
    "the first checkpoint": ("rm", "os.mkdir", r"step_1\.part$", None),
    "a checkpoint": ("sft", "os.mkdir", r"step_3\.part$", 2),
    "a checkpoint's metadata": ("sft", "open", r"step_3\.part/\.metadata", 2),
    "weights": ("sft", "os.mkdir", r"export\.part", 9),
    "the scalar head": ("rm", "open", r"export\.part/config\.json$", 6),
    "the configuration": ("sft", "open", r"export\.part/config\.json$", 9),
    "the reference": ("dpo", "open", r"/reference\.json", None),
    "PPO's checkpoint": ("ppo", "os.mkdir", r"step_2\.part$", 1),
}


@pytest.mark.parametrize("full", FULL)
def test_a_full_disk(full, disk, uninterrupted):
    """It is said in one line; once there is room --resume makes the run that went through."""
    script, event, pattern, last = FULL[full]
    prepare = functools.partial(at_path, event, pattern, functools.partial(tiny.fill_disk, disk))
    done = long_run(script, 1, "", disk / "out", prepare=prepare)
    assert done.code == 1 and done.err.startswith("error: no space left on the disk"), done
    assert len(done.err.splitlines()) == 1
    assert (fsdp.checkpoint_steps(disk / "out") or [None])[-1] == last
    assert not (disk / "out" / "config.json").exists()
    os.remove(disk / "ballast")
    done = long_run(script, 1, "", disk / "out", "--resume")
    assert done.code == 0, done.err
    assert_same_run(disk / "out", uninterrupted(script))


def test_a_disk_that_is_full_of_answers(disk, all_answers):
    """predict.py: what is complete stays."""
    prepare = functools.partial(tiny.at_call, "predict.generate", 3, functools.partial(tiny.fill_disk, disk))
    done = started("predict", 1, disk / "out", prepare=prepare)
    assert done.code == 1 and done.error.startswith("no space left on the disk"), done
    os.remove(disk / "ballast")
    assert started("predict", 1, disk / "out", "--resume").code == 0
    assert (disk / "out").read_bytes() == all_answers(1).read_bytes()
