"""sft.py: its loss by hand, and runs as a user starts them."""
import math
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import MIXED, fork

import sft


def files(place):
    return ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images"]


# ---- the loss ----

def test_loss_by_hand():
    """Three tokens of probability 1/2, 1/4 and 1/8 in a step of four: (1 + 2 + 3) log 2 / 4."""
    logprob = torch.tensor([0.5, 0.25, 0.125]).log()
    assert math.isclose(sft.sft_loss(logprob, 4), 6 * math.log(2) / 4, rel_tol=1e-6)


def test_loss_of_micro_batches_sums_to_the_loss_of_the_step():
    """Summed over micro-batches of unequal size it is the mean over all tokens, not a mean of means."""
    logprob = -torch.arange(1.0, 8.0)
    parts = sft.sft_loss(logprob[:2], 7) + sft.sft_loss(logprob[2:], 7)
    assert math.isclose(parts, 4.0, rel_tol=1e-6)
    assert sft.sft_loss(logprob[:0], 7) == 0


def test_the_first_logged_loss_is_transformers(place, tmp_path):
    """Step 1 of a run logs the mean over the supervised tokens of the logits that transformers computes."""
    from transformers import AutoTokenizer
    record = MIXED[1]
    tiny.write_rows(tmp_path / "one.json", [record])
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
    assert done.out.count("    row 0: ") == 2 and "(label: 'a red circle')" in done.out
    assert f"wrote {out}" in done.out and "30/30" in done.out
    assert "Traceback" not in done.err and "Warning" not in done.err
    done = fork("sft", *files(place), "--model", out, "--out", tmp_path / "again", "--max_steps", 1,
                "--batch_size", 10, "--workers", 0)
    assert done.code == 0, done.err
    assert tiny.log(tmp_path / "again")[0]["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-4)


def fake_wandb():
    """A module that prints what it is asked to do."""
    def say(*args, **named):
        print("wandb", args, sorted(named))
    wandb = SimpleNamespace(init=lambda **named: say(named["project"]) or wandb, log=say, finish=say)
    wandb.__spec__ = SimpleNamespace()
    sys.modules["wandb"] = wandb


def test_weights_and_biases(place, tmp_path):
    """--wandb: started with the project, called with the metrics of every step, and finished."""
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


def test_truncated_and_skipped_records_are_counted(place, tmp_path):
    """--max_len: the run prints how many records are left out."""
    done = fork("sft", *files(place), "--max_len", 140, "--out", tmp_path / "out", "--workers", 0,
                "--max_steps", 1, "--batch_size", 4)
    assert done.code == 0, done.err
    assert "--max_len 140 leaves out" in done.out
