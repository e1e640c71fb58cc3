"""What is the same for every script: two ranks do what one does; a run that was killed is resumed; what is
wrong is said in one line. In fp32 on the CPU, over gloo. Paths in options are below `place` (conftest.py)."""
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import assert_same_gradients, assert_same_log, assert_same_run, at_path, fork, inside

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
    # five records in steps of one per rank: three rounds, and rank 1 has none in the last
    "ppo": PPO + " --micro_batch 1 --max_new_tokens 12 --ppo_epochs 1 --save_rollouts"
           " --eval_data trained/rows.json"}
PLAIN = "--batch_size 6 --micro_batch 2"
ALL = "--batch_size 5 --micro_batch 2 --train projector,llm,vision"
LORA = "--batch_size 5 --micro_batch 2 --lora_rank 3 --lora_alpha 6"
CASES = {
    "sft": {
        "plain": PLAIN, "micro 1": "--batch_size 6 --micro_batch 1", "all": ALL,
        "recompute": f"{ALL} --recompute",
        "one record": "--batch_size 1 --micro_batch 1",  # rank 1 has none
        "all text": "--batch_size 4 --micro_batch 2 --data all_text.json",
        "projector": "--batch_size 5 --micro_batch 2 --data text.json --train projector",
        "vision": "--batch_size 5 --micro_batch 2 --train vision", "lora": f"{LORA} --train projector,llm",
        "tied": f"{PLAIN} --model tied", "tiles": f"{ALL} --model tiled",
        "replicas": f"{PLAIN} --replicas {{ranks}}",
        "evaluated": f"{PLAIN} --eval_data rows.json --eval_every 2"},
    "rm": {
        "plain": PLAIN, "micro 1": "--batch_size 6 --micro_batch 1", "lora": LORA,
        "all": f"{ALL} --recompute --center_coef 0.3 --projector_lr 1e-3",
        "evaluated": f"{PLAIN} --eval_data margins.json --eval_every 2"},
    "dpo": {
        "plain": f"{PLAIN} --data pairs.json --sft_coef 0.5", "one record": "--batch_size 1 --micro_batch 1",
        "ipo": "--data pairs.json --batch_size 5 --micro_batch 2 --loss ipo --length_norm --ref_model other",
        "lora": f"{LORA} --train llm", "image loss": f"{PLAIN} --data pairs.json --image_coef 1",
        "tiles": f"{PLAIN} --data pairs.json --image_coef 1 --model tiled",
        "evaluated": f"{PLAIN} --data pairs.json --sft_coef 0.5 --eval_data ranked.json --eval_every 2"},
    "ppo": {"gathered": "", "sharded": "--rollout sharded --normalize_scores --max_steps 2",
            "grpo": "--advantage grpo --samples_per_prompt 3",
            "tiles": "--model tiled --critic policy"},
    "predict": {
        "greedy": "", "samples": "--num_samples 3", "score": "--score --data trained/turns.json",
        "best of 3": "--num_samples 3 --reward_model trained/reward",
        "tiles": "--model tiled --num_samples 3 --reward_model trained/reward",
        "rewarded": "--score --reward_model trained/tower --data ranked.json",
        "samples, sharded": "--sharded --num_samples 3",
        "rewarded, sharded": "--sharded --score --reward_model trained/tower --data ranked.json"}}
TRAINING = [(script, case) for script in CASES if script != "predict" for case in CASES[script]]
UNREACHED = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.encoder.layers.1.")


def recorded(script, argv):
    """A run in this process, and the gradients that each optimiser's first step has. → {name: gradient}"""
    step, gradients = torch.optim.AdamW.step, {}

    def recording_step(optimizer, *args, **kwargs):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if id(p) not in gradients:
                gradients[id(p)] = p.grad.full_tensor().clone()
        return step(optimizer, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recording_step)
        models = inside(script, *argv)
    return {name if i == 0 else f"{i} {name}": gradients[id(p)] for i, model in enumerate(models)
            for name, p in model.named_parameters() if id(p) in gradients}


def run_cases(script, ranks, folder, out):
    """All cases of a script in one process group."""
    os.chdir(folder)
    fsdp.launch(SimpleNamespace(replicas=1, images=""))
    for name, options in CASES[script].items():
        options = f"{FILES[script]}{START[script]} {options}".format(ranks=ranks).split()
        target = out / (f"{name}.jsonl" if script == "predict" else name)
        gradients = recorded(script, [*options, "--out", target])
        if dist.get_rank() == 0 and script != "predict":
            torch.save(gradients, target / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def runs(folder, tmp_path_factory):
    """(script, case, ranks) → what that run leaves"""
    @functools.cache
    def run(script, ranks):
        out = tmp_path_factory.mktemp(f"{script}-{ranks}")
        return out, tiny.spread(functools.partial(run_cases, script, ranks, folder, out), ranks)

    def get(script, case, ranks):
        out, done = run(script, ranks)
        path = out / (f"{case}.jsonl" if script == "predict" else case)
        assert path.is_file() or (path / "gradients.pt").exists(), done.err
        return path
    return get


def gradients(out):
    return torch.load(out / "gradients.pt")


def weights(out):
    """By our names: a LLaVA-NeXT's image_newline is the projector's."""
    return {network.our_name(name): rows for name, rows in load_file(out / "model.safetensors").items()}


def options_of(script, case):
    words = f"{FILES[script]}{START[script]} {CASES[script][case]}".split()
    return {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}


def base(folder, script, case):
    return weights(folder / options_of(script, case)["--model"])


@pytest.mark.parametrize("script, case", TRAINING)
def test_two_ranks_do_what_one_does(script, case, folder, runs):
    """The first step's gradients, the log, what was sampled and how far every exported weight has moved."""
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
    """Byte for byte, in the records' order, with a rank that runs out of records."""
    expected = runs("predict", case.removesuffix(", sharded"), 1).read_bytes()
    assert runs("predict", case, 2).read_bytes() == expected
    assert len(expected.splitlines()) >= 7 and len(set(expected.splitlines())) == len(expected.splitlines())


def trained_by(script, case, start):
    """The names of the exported tensors that a case's options train."""
    options, layers, names = options_of(script, case), "language_model.model.layers.", set()
    if "--lora_rank" in options:
        names = {name for name in start if name.startswith(layers) and "_proj." in name}
    train = options.get("--train", "llm" if names else "projector,llm").split(",")
    parts = {"projector": "multi_modal_projector.", "vision": "vision_tower.",
             "llm": "language_model.model." if script == "rm" else "language_model."}
    prefixes = tuple(parts[part] for part in train if not (names and part == "llm"))
    return names | {name for name in start if name.startswith(prefixes) and not name.startswith(UNREACHED)}


@pytest.mark.parametrize("script, case", TRAINING)
def test_what_is_trained_moves_and_nothing_else(script, case, folder, runs):
    """Nor what the forward pass does not reach. A step of text leaves the projector's gradient at zero."""
    start, after = base(folder, script, case), weights(runs(script, case, 2))
    moved = {name for name in start if not torch.equal(after[name], start[name])}
    expected = trained_by(script, case, start)
    assert moved == (expected if case != "all text" else {
        name for name in expected if name.startswith("language_model.")})
    if "--lora_rank" not in CASES[script][case]:
        grads = gradients(runs(script, case, 2))
        assert {name for name in grads if name in start} == expected
        if case != "one record":  # the last step's may be text alone
            assert any(grads[name].any() for name in expected if "projector" in name) == (
                case not in ("all text", "vision") and "projector" in " ".join(expected))


@pytest.mark.parametrize("script, case, same", [
    ("sft", "micro 1", "plain"), ("rm", "micro 1", "plain"), ("sft", "recompute", "all")])
def test_accumulation_and_recomputation_change_nothing(script, case, same, runs):
    """Micro-batches of one record, with few targets or many, two answers or five, are those of several."""
    case, same = runs(script, case, 1), runs(script, same, 1)
    assert_same_gradients(gradients(case), gradients(same))
    assert_same_log(tiny.log(case), tiny.log(same))


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_an_evaluation_between_steps_changes_nothing(script, runs):
    """--eval_every 2 of five steps: metrics at 2, 4 and 5; all else is bit for bit that of a run without."""
    evaluated, plain = (runs(script, case, 2) for case in ("evaluated", "plain"))
    trace, expected = tiny.log(evaluated), tiny.log(plain)
    assert [line["step"] for line in trace if len(line) > len(expected[0])] == [2, 4, 5]
    assert [{key: line[key] for key in expected[0]} for line in trace] == expected
    for file in ("gradients.pt", "model.safetensors", *(["score.safetensors"] if script == "rm" else [])):
        assert (evaluated / file).read_bytes() == (plain / file).read_bytes(), file


RATES = {"multi_modal_projector.linear_1.weight": 1e-2, "language_model.model.norm.weight": 1e-3,
         "language_model.model.layers.0.mlp.up_proj.weight": 1e-3}


@pytest.mark.parametrize("script", ["sft", "rm", "dpo"])
def test_two_learning_rates_and_decay(script, folder, tmp_path):
    """AdamW's first step is of the rate's size: --projector_lr, or --lr. Weight decay is of matrices only."""
    start, after = base(folder, script, "lora"), {}
    argv = f"{FILES[script]} --batch_size 10 --max_steps 1 --warmup 0 --lr 1e-3 --projector_lr 1e-2".split()
    for decay in (0, 0.5):
        done = fork(script, *argv, "--weight_decay", decay, "--out", tmp_path / str(decay))
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
    """The distinct images of a micro-batch, whatever the number of answers, models and passes."""
    seen, forward = [], network.CLIPVision.forward
    monkeypatch.setattr(network.CLIPVision, "forward",
                        lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    options += " --batch_size 10 --micro_batch 10 --max_steps 1 --recompute"
    inside(script, *(FILES[script] + options).split(), "--out", tmp_path / "out")
    assert seen == passes


# ---- runs that end early, and what --resume makes of them ----

SAVED = " --save_every 1 --lr 1e-2 --batch_size 4 --micro_batch 2"
LONG = {  # the last optimisation is that of the third epoch; evaluations and the fixed reference on the way
    "sft": FILES["sft"] + SAVED + " --epochs 3",  # of 10 records: 3 steps per epoch, the last of them short
    "rm": FILES["rm"] + SAVED + " --epochs 2 --eval_data pairs.json --eval_every 2",
    "dpo": FILES["dpo"] + SAVED + " --max_steps 5 --eval_data pairs.json --eval_every 2",
    "ppo": FILES["ppo"] + PPO + " --max_steps 3 --save_every 1 --max_new_tokens 10 --normalize_scores"
           " --critic_warmup 1 --ptx_data trained/turns.json --eval_data trained/rows.json --eval_every 2",
    "predict": FILES["predict"] + " --micro_batch 1 --num_samples 2"}
ADAPTERS = " --lora_rank 3 --max_steps 3"


def in_call(name, number, act=tiny.die, rank=0):
    return functools.partial(tiny.at_call, name, number, act, rank)


def in_update(number, act=tiny.die, rank=0):
    """Gradients are there, and no weight has moved."""
    return in_call("torch.optim.AdamW.step", number, act, rank)


def in_file(event, pattern, act=tiny.die):
    return functools.partial(at_path, event, pattern, act)


GONE = 1, "another rank is gone"
KILLED, TERM = (-signal.SIGKILL, ""), (fsdp.STOPPED, "stopped by SIGTERM")
ENDS = {  # (script, ranks, options, when it ends, exit code, last words, the last complete checkpoint)
    "kill before the first save": ("sft", 1, "", in_file("os.mkdir", r"step_1\.part$"), *KILLED, None),
    "kill at an epoch's end": ("sft", 1, "", in_file("os.mkdir", r"step_3\.part$"), *KILLED, 2),
    "kill in a save": ("sft", 2, "", in_file("open", r"step_5\.part/.*metadata"), *KILLED, 4),
    "kill before the rename": ("sft", 1, "", in_file("os.rename", r"step_5\.part$"), *KILLED, 4),
    "kill after it": ("sft", 1, "", in_file("os.rmdir", r"step_3$"), *KILLED, 5),
    "kill in the export": ("sft", 1, "", in_file("os.rename", r"export\.part/\w"), *KILLED, 9),
    "kill of rank 1": ("sft", 2, "", in_update(6, rank=1), *GONE, 5),
    "kill, adapters": ("sft", 2, ADAPTERS, in_update(3, rank=1), *GONE, 2),
    "kill, tiles": ("sft", 2, " --model tiled --max_steps 3", in_update(3, rank=1), *GONE, 2),
    "rm: kill": ("rm", 2, "", in_file("os.mkdir", r"step_4\.part$"), *KILLED, 3),
    "rm: kill in the export": ("rm", 1, "", in_file("os.rename", r"export\.part/\w"), *KILLED, 6),
    "dpo: kill": ("dpo", 2, "", in_update(5, rank=1), *GONE, 4),
    "dpo: kill in the reference": ("dpo", 1, "", in_file("os.rename", r"/reference\.json$"), *KILLED, None),
    "ppo: kill": ("ppo", 1, "", in_update(6), *KILLED, 1),
    "ppo: kill, two ranks": ("ppo", 2, "", in_update(16, rank=1), *GONE, 2),
    "predict: kill": ("predict", 2, "", in_call("predict.generate", 3, rank=1), *GONE, "lines"),
    "exception, two ranks": ("dpo", 2, "", in_update(3, tiny.fail, 1), 1, "ValueError: a bug", 2),
    "SIGINT": ("sft", 1, "", in_update(5, tiny.interrupt), 130, "ended by SIGINT", 4),
    "SIGINT, two ranks": ("rm", 2, "", in_update(4, tiny.interrupt, 1), *GONE, 3),
    "NaN": ("ppo", 1, "", in_call("torch.nn.utils.get_total_norm", 12, tiny.poison), 1, "need finite", 1),
    "NaN, two ranks": ("sft", 2, "", in_call("torch.nn.utils.get_total_norm", 5, tiny.poison, 1), 1,
                       "need finite numbers: the last checkpoint, of step 4", 4),
    "predict: SIGTERM": ("predict", 1, "", in_call("predict.generate", 3, tiny.terminate), *TERM, "lines"),
    "rm: SIGTERM in an evaluation": ("rm", 1, "", in_call("rm.evaluate", 1, tiny.terminate), *TERM, 2),
    "dpo: in the last one": ("dpo", 2, "", in_call("dpo.evaluate", 3, tiny.terminate, 1), *TERM, 5),
    "ppo: in an evaluation": ("ppo", 2, "", in_call("ppo.evaluate_rollouts", 1, tiny.terminate, 1), *TERM, 2),
    "ppo: in a rollout": ("ppo", 2, "", in_call("ppo.generate_rollouts", 2, tiny.terminate, 1), *TERM, 1)}


def long_run(script, ranks, options, out, *more, **how):
    return fork(script, *(LONG[script] + options).split(), "--out", out, *more, ranks=ranks, **how)


@pytest.fixture(scope="session")
def uninterrupted(folder, tmp_path_factory):
    @functools.cache
    def run(script, ranks=1, options=""):
        out = tmp_path_factory.mktemp("uninterrupted") / "out"
        done = long_run(script, ranks, options, out)
        assert done.code == 0, done.err
        return out
    return run


def assert_resumed(script, ranks, options, out, uninterrupted):
    """With --resume it is the uninterrupted run."""
    done = long_run(script, ranks, options, out, "--resume")
    assert done.code == 0, done.err
    if script == "predict":
        assert out.read_bytes() == uninterrupted(script, ranks).read_bytes()
    else:
        assert_same_run(out, uninterrupted(script, ranks, options))


@pytest.mark.parametrize("case", ENDS)
def test_a_run_that_ends_early_is_resumed(case, uninterrupted, tmp_path):
    """Every rank ends, with the same words last; what is complete stays, nothing is exported."""
    script, ranks, options, prepare, code, said, last = ENDS[case]
    out = tmp_path / "out"
    done = long_run(script, ranks, options, out, prepare=prepare)
    last_words = done.out if code == fsdp.STOPPED else [*done.err.splitlines(), ""][:-1][-1:]
    assert done.code == code and said in "".join(last_words), done
    if script == "predict":
        assert out.read_text().count("\n") > 0
    else:
        assert (fsdp.checkpoint_steps(out) or [None])[-1] == last and not (out / "config.json").exists()
    assert_resumed(script, ranks, options, out, uninterrupted)


@pytest.mark.parametrize("when", [
    in_call("fsdp.remove_checkpoints", 1), in_file("os.rmdir", r"step_8\.part$")])
def test_a_kill_while_a_finished_run_removes_its_checkpoints(when, uninterrupted, tmp_path):
    """--resume ends as the run would have; what others put there stays."""
    out, expected = tmp_path / "out", uninterrupted("sft") / "model.safetensors"
    done = long_run("sft", 1, "", out, prepare=functools.partial(tiny.remove_checkpoints, when))
    assert done.code == -signal.SIGKILL and any((out / "checkpoints").iterdir())
    (out / "checkpoints" / "mine").mkdir()
    done = long_run("sft", 1, "", out, "--resume", prepare=tiny.remove_checkpoints)
    assert done.code == 0 and (out / "model.safetensors").read_bytes() == expected.read_bytes(), done
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["mine"]


def require_offload():
    """From now on a unit that is sharded without CPUOffloadPolicy fails the run."""
    shard = fsdp.fully_shard

    def checked(unit, *, offload_policy, **how):
        assert isinstance(offload_policy, fsdp.CPUOffloadPolicy), offload_policy
        return shard(unit, offload_policy=offload_policy, **how)
    fsdp.fully_shard = checked


@pytest.mark.parametrize("script, ranks", [("sft", 2), ("ppo", 1)])
def test_offloading_changes_nothing(script, ranks, uninterrupted, tmp_path):
    """Killed, and resumed with --offload."""
    assert long_run(script, ranks, "", tmp_path / "out", prepare=in_update(6)).code != 0
    done = long_run(script, ranks, " --offload", tmp_path / "out", "--resume", prepare=require_offload)
    assert done.code == 0 and re.search(r"optimizer .* GB \(in host memory\)", done.out), done
    assert_same_run(tmp_path / "out", uninterrupted(script, ranks))


def test_one_rank_resumes_what_two_began(uninterrupted, tmp_path):
    assert long_run("sft", 2, "", tmp_path / "out", prepare=in_update(6)).code != 0
    assert long_run("sft", 1, "", tmp_path / "out", "--resume").code == 0
    assert_same_log(tiny.log(tmp_path / "out"), tiny.log(uninterrupted("sft", 2)), 1e-4)


def test_overwrite_starts_afresh_and_resume_refuses_other_options(uninterrupted, tmp_path):
    """Options that only concern memory or saving may differ. The last two checkpoints stay."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted("sft"), out)
    done = long_run("sft", 1, " --lr 2e-2 --save_every 2 --micro_batch 1", out, "--resume")
    assert done.code == 2 and "--lr 0.01 then, 0.02 now" in done.error
    assert "--save_every" not in done.error and "--micro_batch" not in done.error
    save_file({"old": torch.ones(1)}, out / "model-00001-of-00002.safetensors")
    assert long_run("sft", 1, " --save_every 2", out, "--overwrite", prepare=in_update(8)).code != 0
    assert not list(out.glob("model*")) and not (out / "config.json").exists()
    assert [line["step"] for line in tiny.log(out)] == [*range(1, 8)] and fsdp.checkpoint_steps(out) == [4, 6]


def test_what_a_run_leaves_behind(uninterrupted):
    """args.json: resolved arguments, versions, ranks; log.jsonl: unrounded metrics of every step."""
    out = uninterrupted("sft", 2)
    args = json.loads((out / "args.json").read_text())
    assert args.items() >= {"batch_size": 4, "lr": 1e-2, "ranks": 2, "seed": 0}.items()
    versions = {"torch": torch.__version__, "transformers": tiny.hf.__version__}
    assert args["versions"].items() >= versions.items()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second"} for line in lines)
    assert any(len(repr(line["loss"])) > 12 for line in lines)
    assert {path.name for path in out.iterdir()} == {
        "args.json", "log.jsonl", "checkpoints", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json",
        "processor_config.json"}
    modes = {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    os.umask(umask := os.umask(0))
    assert modes == {0o666 & ~umask}  # safetensors would make its files private


PAUSE = in_update(5, tiny.pause)  # step 4 is saved
# ranks; signals in step 5, a second apart, and who gets them; exit code, words, last checkpoint
SIGNALS = {
    "SIGTERM to python": (1, [(signal.SIGTERM, "launcher")], fsdp.STOPPED, "by SIGTERM after step 5", 5),
    "SIGTERM to all": (2, [(signal.SIGTERM, "all")], 1, "stopped by SIGTERM after step 5", 5),
    "SIGTERM twice": (1, [(signal.SIGTERM, "launcher")] * 2, fsdp.STOPPED, "ended by SIGTERM", 4),
    "Ctrl-C under torchrun": (2, [(signal.SIGINT, "all")], 1, "", 4),
    "kill -9 of rank 1": (2, [(signal.SIGKILL, 1)], 1, "Signal 9 (SIGKILL) received by PID", 4),
    "kill -9 of torchrun": (2, [(signal.SIGKILL, "launcher")], -signal.SIGKILL, "", 4),
}


@pytest.mark.parametrize("case", SIGNALS)
def test_signals_of_a_user(case, uninterrupted, tmp_path):
    """They reach python and torchrun as a user starts them. No process survives."""
    ranks, signals, code, said, last = SIGNALS[case]
    out = tmp_path / "out"
    argv = [*LONG["sft"].split(), "--out", out]
    with tiny.Job("sft", *argv, ranks=ranks, prepare=PAUSE, cwd=os.getcwd()) as job:
        job.wait(lambda: fsdp.checkpoint_steps(out)[-1:] == [4])
        for number, to in signals:
            job.signal(number, to)
            tiny.time.sleep(len(signals) - 1)
        done = job.end(30)
    assert done.code == code and said in done.out + done.err, done
    assert fsdp.checkpoint_steps(out)[-1] == last and not (out / "model.safetensors").exists()
    assert_resumed("sft", ranks, "", out, uninterrupted)


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


@pytest.mark.parametrize("script, event, pattern", [
    ("sft", "os.mkdir", r"step_3\.part$"), ("rm", "open", r"export\.part/config\.json$"),
    ("dpo", "open", r"/reference\.json"), ("predict", "predict.generate", 3)])
def test_a_full_disk_is_said_in_one_line(script, event, pattern, disk, uninterrupted):
    when, fill = in_call if script == "predict" else in_file, functools.partial(tiny.fill_disk, disk)
    done = long_run(script, 1, "", disk / "out", prepare=when(event, pattern, fill))
    assert done.code == 1 and re.fullmatch("error: no space left on the disk.*\n", done.err), done
    os.remove(disk / "ballast")
    assert_resumed(script, 1, "", disk / "out", uninterrupted)


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
    for name in ("no_tokenizer", "cut", "bad_config", "foreign", "llama"):
        tiny.shutil.copytree(folder / "model", wrong / name)
    os.remove(wrong / "no_tokenizer" / "tokenizer.json")
    os.truncate(wrong / "cut" / "model.safetensors", 100_000)
    (wrong / "bad_config" / "config.json").write_text('{"text_config": ')
    (wrong / "llama" / "config.json").write_text(json.dumps(config["text_config"]))
    tiny.swap_tokens(wrong / "foreign")
    peer = tiny.make_model(wrong / "larger")  # its tower takes larger images
    peer.config.vision_config.image_size, peer.config.image_seq_length = 24, 9
    peer.config.save_pretrained(wrong / "larger")
    tiny.write(wrong / "larger", tiny.named(tiny.hf.LlavaForConditionalGeneration(peer.config), tiny.HUB))
    tiny.write_processor(wrong / "larger", 24)
    for file, text in {"unrelated/thesis.tex": "years of work", "file": "", "earlier/args.json": '{"lr": 1}',
                       "earlier/model.safetensors": "weeks of work"}.items():
        (wrong / file).parent.mkdir(exist_ok=True)
        (wrong / file).write_text(text)
    return wrong


WRONG = {  # options that come after good ones, and what is said. {} is the folder `wrong`
    "sft": {  # and what is shared by every script; on two ranks
        "--model nobody/nothing": "got 'nobody/nothing', need a checkpoint folder or a hub id",
        "--model {}/llama": "got --model of the kind 'llama', need LLaVA-1.5 or LLaVA-NeXT as trans",
        "--model {}/bad_config": "bad_config/config.json", "--model {}/cut": "cut/model.safetensors",
        "--model {}/no_tokenizer": "no tokenizer.json or tokenizer.model: give --tokenizer",
        "--template vicunna": "got --template vicunna, need auto, vicuna, llama2, llama3, plain or a .jinja",
        "--model model --llm model": "got --model and --llm",
        "--data {}/nowhere.json": "need a .json, .jsonl or .txt file: no such file",
        "--data {}/not.json": "not.json: not JSON",
        "--data {}/cut.json --images {}/images": "(id row 10): cannot read the ",
        "--data rows.json {}/prompt.json": "prompt.json: record 10 (id row 10): got no answer",
        "--eval_data {}/prompt.json": "prompt.json: record 10 (id row 10): got no answer",
        "--max_len 20": "fits --max_len 20: raise it",
        "--train projector,llama": "argument --train: got projector,llama, need any of projector,llm,vision",
        "--train llm --projector_lr 1": "but --train llm has no projector",
        "--model tiled --image_mode pad": "got --image_mode pad, but tiled cuts images into tiles",
        "--replicas 3": "got --replicas 3, need a divisor of the ", "--wandb project": "pip install wandb",
        "--lora_rank 2 --train projector": "got --lora_rank 2 without llm in --train",
        "--out {}/unrelated --overwrite": "unrelated, neither empty nor an earlier run: choose another",
        "--out {}/file": "file, which is a file, need a folder",
        "--out {}/earlier": "earlier, which holds a run: give --resume or --overwrite",
        "--model {}/foreign --out {}/foreign --overwrite": "which is --model too: choose another"},
    "rm": {"--eval_data {}/single.json": "(id row 10): got 1 answer, need 2 or more, best first",
           "--train projector,head": "--train: got projector,head, need any of projector,llm,vision"},
    "dpo": {
        "--data {}/three.json --loss ipo": "(id row 10): got 3 answers, need two; only --loss sigmoid",
        "--label_smoothing 0.7": "got --label_smoothing 0.7 with --loss sigmoid, need less than 0.5",
        "--loss robust": "got --loss robust without --label_smoothing, need the share",
        "--ref_model {}/foreign": "foreign: its tokenizer is not that of model",
        "--ref_model {}/larger": "got --ref_model {}/larger, need the policy's image size, tiles and mode",
        "--ref_model tiled": "got --ref_model tiled, need the policy's image size, tiles and mode",
        "--out {}/earlier --overwrite --ref_model {}/images": "no config.json"},
    "ppo": {
        "--rollout_batch 7": "got --rollout_batch 7, need a multiple of --batch_size 5",
        "--advantage grpo --samples_per_prompt 1": "--samples_per_prompt 1, need at least 2 samples",
        "--advantage rloo --samples_per_prompt 2 --lam 0.9": "got --lam with --advantage rloo, which has no",
        "--reward_model=": "--reward_model is needed: what rm.py leaves, or FILE.py:F",
        "--reward_model model": "model: no score.safetensors, need a reward model: what rm.py leaves",
        "--model tiled": "reward: its images have another size or other tiles than the policy's, whose",
        "--reward_model {}/nowhere.py:f": "no such file {}/nowhere.py",
        "--reward_model trained/rewards.py:number": "no function number in trained/rewards.py",
        "--reward_model trained/rewards.py:short": "give --critic policy",
        "--train vision": "argument --train: got vision, need any of projector,llm, joined by",
        "--ptx_data {}/prompt.json": "(id row 10): got no answer"},
    "predict": {
        "--out {}/file": "file, which exists: --resume continues it, --overwrite replaces it",
        "--out {}": "which is a folder, need a .jsonl file", "--out /proc/x.jsonl": "cannot be written",
        "--num_samples 2 --temperature 0": "need a temperature above 0",
        "--data {}/prompt.json --score": "(id row 10): got no answer",
        "--top_k 5": "got --top_k or --top_p, but greedy decoding: give --temperature, or",
        "--score --num_samples 2": "got --score with options of sampling",
        "--prompt Why?": "got --data with --prompt, which prints one answer",
        "--prompt Why? --prompt <image>": "got <image> in a later --prompt, need it in the first",
        "--image images/p0.png": "got --image without --prompt, need a question about it"}}


def short_run(script, options, wrong, out, **how):
    start = FILES[script] + (PPO if script == "ppo" else " --max_steps 1" if script != "predict" else "")
    return fork(script, *start.split(), "--out", out, *options.replace("{}", str(wrong)).split(), **how)


@pytest.mark.parametrize(
    "script, options", [(script, options) for script in WRONG for options in WRONG[script]])
def test_what_is_wrong_is_said_in_one_line(script, options, wrong, tmp_path):
    """Before anything is written, or removed by --overwrite. Of an option every rank says the same."""
    def content():
        return {path: path.stat().st_mtime_ns for path in wrong.rglob("*") if path.is_file()}
    before, said = content(), WRONG[script][options].replace("{}", str(wrong))
    done = short_run(script, options, wrong, tmp_path / "out", ranks=1 + (script == "sft"))
    assert done.code == 2 and said in done.error and len({*done.err.splitlines()}) == 1, done
    assert not list(tmp_path.iterdir()) and content() == before


UNKNOWN = {  # options that are wrong for every script, and what is said of them
    "--learning-rate=1e-5": {"predict": "--lr is an option of training", "": "use --lr"},
    "--gradient_accumulation_steps 4": {"": "use --micro_batch (records per forward pass on one rank"},
    "--bf16 True --output_dir x": {"": "unknown option --output_dir: use --out"},
    "--deepspeed zero3.json": {"": "no option: FSDP2 always shards"},
    "--micro-batch 2": {"": "use --micro_batch"}, "--micro_bach 2": {"": "did you mean --micro_batch?"},
    "--micro 2": {"": "did you mean --micro_batch?"}, "--quux": {"": "unknown option --quux: see --help"},
    "--beta 1 --critic policy": {
        "dpo": "--critic: --critic is an option of ppo.py", "": "--beta: --beta is an option of dpo.py"},
    "--seed 1 2": {"": "got '2', which belongs to no option"}, "--seed": {"": "expected one argument"},
    "--dtype fp8": {"": "argument --dtype: invalid choice: 'fp8'"},
    "--batch_size 0": {"predict": "of training", "": "got 0, need a whole number of at least 1"},
    "--workers -1": {"": "argument --workers: got -1, need a whole number of at least 0"},
    "--lora_alpha 32": {"predict": "of training", "": "got --lora_alpha 32.0 without --lora_rank"},
    "--eval_every 5": {"predict": "of training", "": "got --eval_every 5 without --eval_data"},
    "--resume --overwrite": {"": "got --resume and --overwrite: give one"}}


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
    """The table of other projects' names leads to options of ours, and names none of them."""
    ours = {name for script in DATA for name in vars(tiny.arguments(script, *FILES[script].split()))}
    table = data.read_json(fsdp.ROOT, "option_names.json")
    theirs = [name for names in table.values() for name in names.split()]
    assert len(theirs) == len({*theirs}) and not ours & {*theirs}
    named = {name for text in table for name in re.findall(r"--(\w+)", text)}
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


def test_bad_records_are_skipped_when_asked(wrong, tmp_path):
    done = short_run("dpo", "--data {}/single.json --skip_bad_rows --batch_size 4", wrong, tmp_path / "out")
    assert done.code == 0, done.err
    assert "(id row 10): got 1 answer" in done.out and "10 records, 1 steps" in done.out


DIVERGES = "--batch_size 4 --max_steps 4 --warmup 0 --save_every 1 --lr 1e30"
LATE = [  # (script, options, exit code, what is said, steps in the log)
    ("sft", DIVERGES, 1, "step 2: loss nan", 1), ("rm", DIVERGES, 1, "step 2: loss ", 1),
    ("sft", f"{DIVERGES} --lr 1e39", 1, "step 1: a weight is not finite: nothing was saved or exported", 1),
    ("sft", f"{DIVERGES} --max_steps 1 --eval_data rows.json", 1, "step 1: eval_loss nan", 0),
    ("ppo", "--critic policy --reward_model trained/rewards.py:short", 2,
     "gave 1 scores for 2 answers, need a finite number each", 0),
    ("ppo", "--critic policy --reward_model trained/rewards.py:not_a_number", 2, "number each: [nan", 0)]


@pytest.mark.parametrize("script, options, code, said, steps", LATE)
def test_a_run_that_cannot_go_on_exports_nothing(script, options, code, said, steps, wrong, tmp_path):
    """It ends before the next step, and the log has finite numbers only."""
    done = short_run(script, options, wrong, tmp_path / "out")
    assert done.code == code and said in done.error and len(done.err.splitlines()) == 1, done
    assert not (tmp_path / "out" / "config.json").exists()
    text = (tmp_path / "out" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and len(text.splitlines()) == steps


def differ_on_rank_1(how):
    """What rank 1 alone reads: another copy on another node."""
    if os.environ["RANK"] != "1":
        return
    load_records, is_file = data.load_records, os.path.isfile
    if how == "reversed":
        data.load_records = lambda path: data.Records(load_records(path).texts[::-1])
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
    "image missing": ("sft", 2, "no such image: "), "weights cut": ("sft", 2, "cannot be read"),
    "reward function": ("ppo", 1, "KeyError: 'no such field'")}


@pytest.mark.parametrize("how", ONE_RANK)
def test_what_is_wrong_on_one_rank_is_said_by_all(how, tmp_path):
    """The same words last, once, and no rank waits."""
    script, code, said = ONE_RANK[how]
    options = FILES[script] + (PPO if script == "ppo" else " --max_steps 2")
    if script == "ppo":
        options += " --reward_model trained/rewards.py:red --critic policy --micro_batch 1"
    done = fork(script, *options.split(), "--out", tmp_path / "out", ranks=2,
                prepare=functools.partial(differ_on_rank_1, how))
    assert done.code == code and said in done.err.strip().splitlines()[-1], done
    assert done.err.count(said) == 1 and not (tmp_path / "out" / "config.json").exists()


def forbid_forks():
    """From now on a run in which Python starts a process after the process group stands fails."""
    def hook(event, _):
        if event in ("os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen") and (
                dist.is_initialized()):
            raise RuntimeError(f"{event} after the process group was joined")
    sys.addaudithook(hook)


@pytest.mark.parametrize("script", DATA)
def test_nothing_forks_once_the_process_group_stands(script, tmp_path):
    """A process forked while one of gloo's threads is in Python hangs for ever."""
    options = FILES[script] + (PPO if script == "ppo" else "") + " --workers 2"
    if script != "predict":
        options += f" --eval_data {DATA[script]}.json --eval_every 1 --max_steps 2"
    done = fork(script, *options.split(), "--out", tmp_path / "out", ranks=2, prepare=forbid_forks)
    assert done.code == 0, done.err
