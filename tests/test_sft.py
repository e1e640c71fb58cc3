"""sft.py: its loss by hand, runs as a user starts them, and what a user sees who gets something wrong."""
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import MIXED, fork

import sft


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, pictures and rows, and everything that the table of errors needs."""
    folder = tmp_path_factory.mktemp("sft")
    peer = tiny.make_model(folder / "model")
    tiny.make_images(folder / "images")
    tiny.write_rows(folder / "rows.json", MIXED)
    peer.model.language_model.config.save_pretrained(folder / "llama")
    spoil(folder)
    return folder


def files(place):
    return ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images"]


# ---- the loss ----

def test_loss_by_hand():
    """Three tokens of probability 1/2, 1/4 and 1/8 in a step of four: (1 + 2 + 3) log 2 / 4."""
    logprob = torch.tensor([0.5, 0.25, 0.125]).log()
    assert math.isclose(sft.sft_loss(logprob, 4), 6 * math.log(2) / 4, rel_tol=1e-6)


def test_loss_of_parts_is_the_loss_of_the_whole():
    """Summed over micro-batches of unequal size it is the mean over all tokens, not a mean of means."""
    logprob = -torch.arange(1.0, 8.0)
    parts = sft.sft_loss(logprob[:2], 7) + sft.sft_loss(logprob[2:], 7)
    assert math.isclose(parts, 4.0, rel_tol=1e-6)
    assert sft.sft_loss(logprob[:0], 7) == 0


def test_the_first_logged_loss_is_transformers(place, tmp_path):
    """Step 1 of a run logs the mean over the supervised tokens of the logits that transformers computes."""
    from transformers import AutoTokenizer
    row = MIXED[1]
    tiny.write_rows(tmp_path / "one.json", [row])
    done = fork("sft", *files(place), "--data", tmp_path / "one.json", "--out", tmp_path / "out",
                "--max_steps", 1, "--workers", 0)
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    chat = [{"role": "user", "content": "yes or no?"}, {"role": "assistant", "content": "no"}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False).input_ids
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / "model").eval()
    with torch.no_grad():
        logp = peer(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = -sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)
    assert math.isclose(tiny.log(tmp_path / "out")[0]["loss"], expected, rel_tol=1e-5)


# ---- as a user runs it ----

@pytest.mark.parametrize("ranks", [1, 2])
def test_a_user_fine_tunes(ranks, place, tmp_path):
    """python and torchrun, from another folder, with worker processes: the loss falls by half, the held-out
    loss is logged, answers are shown, and the export is a checkpoint that can be tuned on."""
    out = tmp_path / "out"
    done = tiny.command("sft", *files(place), "--out", out, "--eval_data", place / "rows.json",
                        "--eval_every", 15, "--batch_size", 10, "--micro_batch", 5, "--max_steps", 30, "--lr",
                        "1e-2", "--projector_lr", "1e-3", "--warmup", 3, "--recompute", ranks=ranks)
    assert done.code == 0, done.err
    lines = tiny.log(out)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [15, 30]
    assert lines[0]["lr"] == pytest.approx(1e-2 / 4)
    assert max(line["lr"] for line in lines) == pytest.approx(1e-2)
    assert done.out.count("    row 0: ") == 2 and "(given: 'a red circle')" in done.out
    assert f"wrote {out}" in done.out and "30/30" in done.out
    assert "Traceback" not in done.err and "Warning" not in done.err
    done = fork("sft", *files(place), "--model", out, "--out", tmp_path / "again", "--max_steps", 1,
                "--batch_size", 10, "--workers", 0)
    assert done.code == 0, done.err
    assert tiny.log(tmp_path / "again")[0]["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-4)


def test_the_logged_rate(place, tmp_path):
    """lr is that of --lr, whichever parts have rates of their own."""
    done = fork("sft", *files(place), "--out", tmp_path / "out", "--train", "projector,llm,vision", "--lr",
                "1e-3", "--projector_lr", "1e-2", "--max_steps", 1, "--warmup", 0, "--workers", 0)
    assert done.code == 0, done.err
    assert tiny.log(tmp_path / "out")[0]["lr"] == pytest.approx(1e-3)


def test_compile_without_a_compiler(place, tmp_path, monkeypatch):
    """Said at once, with what to do, and before anything is written."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = tiny.command("sft", *files(place), "--compile", "--out", tmp_path / "out")
    assert done.code == 2 and done.error == (
        "got --compile, need a C++ compiler: install no-such-compiler, or name another in CXX")
    assert not (tmp_path / "out").exists()


def fake_wandb():
    """A module that prints what it is asked to do."""
    def say(*args, **named):
        print("wandb", args, sorted(named))
    wandb = SimpleNamespace(init=lambda **named: say(named["project"]) or wandb, log=say, finish=say)
    wandb.__spec__ = SimpleNamespace()
    sys.modules["wandb"] = wandb


def test_weights_and_biases(place, tmp_path):
    """--wandb: started with the project, given every step's figures, and finished."""
    done = fork("sft", *files(place), "--out", tmp_path / "out", "--max_steps", 2, "--wandb", "mine",
                "--workers", 0, prepare=fake_wandb)
    assert done.code == 0, done.err
    said = [line for line in done.out.splitlines() if line.startswith("wandb")]
    assert said[0] == "wandb ('mine',) []" and said[-1] == "wandb () ['exit_code']" and len(said) == 4
    assert "'loss'" in said[1] and said[1].endswith("['step']")


def test_projector_pre_training(place, tmp_path):
    """--train projector --template plain: the projector moves, all else is the checkpoint's bit for bit, and
    the export keeps the template."""
    tiny.write_rows(tmp_path / "captions.json", [MIXED[0], MIXED[5], MIXED[8]])
    done = fork("sft", *files(place), "--data", tmp_path / "captions.json", "--train", "projector",
                "--template", "plain", "--out", tmp_path / "out", "--batch_size", 3, "--epochs", 10,
                "--lr", "1e-2", "--workers", 0)
    assert done.code == 0, done.err
    before = load_file(place / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("multi_modal_projector.")}
    lines = tiny.log(tmp_path / "out")
    assert len(lines) == 10 and lines[-1]["loss"] < lines[0]["loss"]
    plain = (tiny.ROOT / "templates" / "plain.jinja").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == plain


def test_two_learning_rates_and_decay(place, tmp_path):
    """Of the first AdamW step, which is the rate's size: the projector moves by --projector_lr, the LLaMA by
    --lr; --weight_decay shrinks matrices only."""
    moves = {}
    for name, options in {"plain": [], "decay": ["--weight_decay", 0.5]}.items():
        done = fork("sft", *files(place), "--out", tmp_path / name, "--max_steps", 1, "--batch_size", 10,
                    "--lr", "1e-3", "--projector_lr", "1e-2", "--warmup", 0, "--workers", 0, *options)
        assert done.code == 0, done.err
        moves[name] = load_file(tmp_path / name / "model.safetensors")
    before = load_file(place / "model" / "model.safetensors")
    rates = {"multi_modal_projector.linear_1.weight": 1e-2, "language_model.model.norm.weight": 1e-3,
             "language_model.model.layers.0.mlp.up_proj.weight": 1e-3}
    for name, rate in rates.items():
        assert (moves["plain"][name] - before[name]).abs().median() == pytest.approx(rate, rel=0.02)
        decayed = moves["plain"][name] - (rate * 0.5 * before[name] if before[name].ndim > 1 else 0)
        assert torch.allclose(moves["decay"][name], decayed, atol=1e-6)


# ---- what a user sees ----

def spoil(folder):
    """Files and folders that something is wrong with."""
    (folder / "not.json").write_text('[{"id": 1},')
    (folder / "empty.json").write_text("")
    tiny.write_rows(folder / "lost.json", [*MIXED, tiny.row(10, "nowhere.png", "What?", "no")])
    (folder / "images" / "torn.png").write_bytes((folder / "images" / "p3.png").read_bytes()[:900])
    tiny.write_rows(folder / "torn.json", [*MIXED, tiny.row(10, "torn.png", "What?", "no")])
    tiny.write_rows(folder / "outside.json", [tiny.row(0, "../model/config.json", "What?", "no")])
    tiny.write_rows(folder / "asked.json", [tiny.row(0, "p0.png", "<image> and <image>?", "no")])
    turned = {"id": "turned", "conversations": [{"from": "gpt", "value": "no"}]}
    tiny.write_rows(folder / "order.json", [turned])
    tiny.write_rows(folder / "silent.json", [tiny.row(0, "p0.png", "What?", " ")])
    tiny.write_rows(folder / "prompt.json", [tiny.row(0, "p0.png", "What?")])
    for name in ("bare", "mute", "torn", "broken", "other"):
        tiny.shutil.copytree(folder / "model", folder / name)
    os.remove(folder / "bare" / "tokenizer.json")
    os.remove(folder / "mute" / "chat_template.jinja")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "broken" / "config.json").write_text('{"text_config": ')
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "image_token_index": 7}))
    (folder / "unrelated").mkdir()
    (folder / "unrelated" / "thesis.tex").write_text("years of work")
    (folder / "file").write_text("")
    (folder / "earlier").mkdir()
    (folder / "earlier" / "args.json").write_text(json.dumps({"lr": 1}))


WRONG = {  # {} is the folder that all of it is in; the options come after good ones
    "part": (["--train", "projector,llama"], "got --train projector,llama, need any of projector,llm,vision"),
    "no part": (["--train", ""], "need any of projector,llm,vision"),
    "no model": (["--model", "{}/nowhere"], "need a checkpoint folder or a hub id; there is no such folder"),
    "hub id": (["--model", "nobody/nothing"], "got 'nobody/nothing', need a checkpoint folder or a hub id"),
    "llama": (["--model", "{}/llama"], "got --model of the kind 'llama', need a LLaVA; give a LLaMA as"),
    "config": (["--model", "{}/images"], "no config.json: need a checkpoint folder"),
    "broken config": (["--model", "{}/broken"], "broken/config.json"),
    "tokenizer": (["--model", "{}/bare"], "no tokenizer.json; make one: python -c"),
    "another tokenizer": (["--model", "{}/other"], "the tokenizer is of another checkpoint"),
    "template": (["--model", "{}/mute"], "has no chat template: give --template vicuna|llama2|llama3|pl"),
    "torn weights": (["--model", "{}/torn"], "torn/model.safetensors"),
    "no data": (["--data", "{}/nowhere.json"], "need a .json, .jsonl or .txt file: no such file"),
    "not json": (["--data", "{}/not.json"], "not.json: not JSON"),
    "empty": (["--data", "{}/empty.json"], "empty.json: got no rows"),
    "picture": (["--data", "{}/lost.json"], "lost.json: row 10 (id row 10): no such picture: {}/images"),
    "torn picture": (["--data", "{}/torn.json"], "(id row 10): cannot read the picture {}/images/torn.png"),
    "outside": (["--data", "{}/outside.json"], "(id row 0): got the image '../model/config.json', outside"),
    "placeholders": (["--data", "{}/asked.json"], "(id row 0): got 2 <image> placeholders for 1 images"),
    "order": (["--data", "{}/order.json"], "(id turned): got turns from ['gpt'], need human and gpt in turn"),
    "no words": (["--data", "{}/silent.json"], "(id row 0): got the answer"),
    "no answer": (["--data", "{}/prompt.json"], "(id row 0): got no answer"),
    "eval data": (["--eval_data", "{}/lost.json"], "lost.json: row 10 (id row 10): no such picture"),
    "length": (["--max_len", 20], "none of 10 rows fits --max_len 20: raise it"),
    "replicas": (["--replicas", 3], "got --replicas 3, need a divisor of the 1 ranks"),
    "batch": (["--batch_size", 0], "got --batch_size 0, need at least 1"),
    "workers": (["--workers", -1], "--workers -1"),
    "clipping": (["--grad_clip", -1], "--grad_clip -1"),
    "wandb": (["--wandb", "project"], "pip install wandb"),
    "both models": (["--llm", "{}/llama", "--clip", "{}/clip"], "got --model and --llm"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said(wrong, place, tmp_path):
    """The last line on the terminal says it, the exit code is 2, and --out is not there."""
    options, message = WRONG[wrong]
    options = [str(option).format(place) for option in options]
    done = fork("sft", *files(place), "--out", tmp_path / "out", "--workers", 0, "--max_steps", 1, *options)
    assert message.format(place) in done.error, done.err
    assert done.code == 2 and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


WRONG_OUT = {
    "unrelated": (["--out", "{}/unrelated"], "unrelated, neither empty nor an earlier run: choose another"),
    "overwritten": (["--out", "{}/unrelated", "--overwrite"], "neither empty nor an earlier run"),
    "resumed": (["--out", "{}/unrelated", "--resume"], "neither empty nor an earlier run"),
    "a file": (["--out", "{}/file"], "file, which is a file, need a folder"),
    "a run": (["--out", "{}/earlier"], "earlier, which holds a run: give --resume or --overwrite"),
}


@pytest.mark.parametrize("wrong", WRONG_OUT)
def test_nothing_is_lost_by_a_command(wrong, place):
    """A folder that something else stands in, a file, an earlier run: refused, and left as they are."""
    options, message = WRONG_OUT[wrong]
    before = sorted(path for path in place.rglob("*") if path.is_file())
    done = fork("sft", *files(place), "--workers", 0, *[option.format(place) for option in options])
    assert message in done.error and done.code == 2, done.err
    assert sorted(path for path in place.rglob("*") if path.is_file()) == before


def test_a_model_has_to_be_given_whole(place, tmp_path):
    """--llm without --clip, --model without --data."""
    done = fork("sft", "--llm", place / "llama", "--data", place / "rows.json", "--out", tmp_path / "out")
    assert done.code == 2 and "--llm and --clip go together" in done.error
    done = fork("sft", "--model", place / "model", "--out", tmp_path / "out")
    assert done.code == 2 and "--data is needed with --model" in done.error
    assert not (tmp_path / "out").exists()


def test_two_ranks_say_it_once(place, tmp_path):
    """What only rank 0 finds ends the others too, and nobody prints a traceback."""
    done = fork("sft", *files(place), "--model", "nobody/nothing", "--out", tmp_path / "out", ranks=2)
    assert done.code == 2 and "need a checkpoint folder or a hub id" in done.error
    assert "Traceback" not in done.err and done.err.count("error: ") == 1


def test_bad_rows_are_skipped_when_asked(place, tmp_path):
    """--skip_bad_rows names each and goes on with the rest."""
    done = fork("sft", *files(place), "--data", place / "torn.json", "--skip_bad_rows", "--out",
                tmp_path / "out", "--workers", 0, "--max_steps", 1, "--batch_size", 4)
    assert done.code == 0, done.err
    assert "row 10 (id row 10): cannot read the picture" in done.out and "1 of 11 rows are bad" in done.out
    assert "10 rows, 1 steps" in done.out


def test_cut_and_skipped_rows_are_counted(place, tmp_path):
    """--max_len: what is left out and what loses its tail is said."""
    done = fork("sft", *files(place), "--max_len", 140, "--out", tmp_path / "out", "--workers", 0,
                "--max_steps", 1, "--batch_size", 4)
    assert done.code == 0, done.err
    assert "--max_len 140 leaves out" in done.out
