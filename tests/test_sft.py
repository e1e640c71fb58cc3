"""sft.py: its loss by hand, and runs as a user starts them."""
import math
import re
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from tiny import MIXED, fork

import sft


def files(place):
    return ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images"]


def test_loss_by_hand():
    """Probabilities 1/2, 1/4 and 1/8 in unequal micro-batches of a step of four tokens."""
    token_logps = torch.tensor([0.5, 0.25, 0.125]).log()
    losses = [sft.sft_loss(part, 4).item() for part in (token_logps[:2], token_logps[2:], token_logps[:0])]
    assert losses == pytest.approx([0.75 * math.log(2), 0.75 * math.log(2), 0])


def fake_wandb():  # prints its calls
    def say(*args, **named):
        print("wandb", args, sorted(named))
    wandb = SimpleNamespace(init=lambda **named: say(named["project"], named["id"], named["resume"]) or wandb,
                            log=say, finish=say, Table=lambda columns, data: f"{columns} {data}")
    sys.modules["wandb"], wandb.__spec__ = wandb, SimpleNamespace()


def test_projector_pre_training(place, tmp_path):
    """The first loss is transformers', over the caption and its newline; the export keeps the template, and
    --wandb is started with the project, called with the metrics, and finished; a resume continues its run."""
    file, out = tiny.write_rows(tmp_path / "one.json", [MIXED[0]]), tmp_path / "out"
    argv = [*files(place), "--data", file, "--out", out, "--max_steps", 1, "--train", "projector",
            "--template", "plain", "--wandb", "mine", "--eval_data", file, "--lr", 0]
    done = fork("sft", *argv, prepare=fake_wandb)
    peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / "model").eval()
    processor = tiny.hf.AutoProcessor.from_pretrained(out)
    encoded = processor(text="<s><image>a red circle\n", images=Image.open(place / "images" / "p0.png"),
                        return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logp = peer(**encoded).logits[0, :-1].log_softmax(-1)
    token_logps = logp.gather(1, encoded.input_ids[0, 1:, None])[tiny.PATCHES:]
    assert tiny.log(out)[0]["loss"] == pytest.approx(-token_logps.mean().item(), rel=1e-5)
    plain = (tiny.ROOT / "templates" / "plain.jinja").read_text()
    assert (out / "chat_template.jinja").read_text() == plain
    start, table, step, finish = (line for line in done.out.splitlines() if line.startswith("wandb"))
    columns, shown = r"\['id', 'answer', 'label'\]", r"\[\['row 0', '.*', 'a red circle'\]\]"
    assert re.search(f"answers.*{columns} {shown}.*'step'", table)
    assert finish == "wandb () ['exit_code']" and "'loss'" in step
    assert re.fullmatch(r"wandb \('mine', '[0-9a-f]{8}', 'allow'\) \[\]", start)
    same, other = (fork("sft", *argv, how, prepare=fake_wandb).out for how in ("--resume", "--overwrite"))
    assert start in same and start not in other


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_user_fine_tunes(ranks, place, tmp_path):
    """Answers are shown, records above --max_len are counted, and the export can be trained on."""
    out, argv = tmp_path / "out", [*files(place), "--max_len", 140]
    options = ["--out", out, "--eval_data", place / "rows.json", "--eval_every", 15, "--batch_size", 9,
               "--micro_batch", 5, "--max_steps", 30, "--lr", "1e-2", "--warmup", 3, "--recompute"]
    done = tiny.command("sft", *argv, *options, ranks=ranks)
    assert done.code == 0 and "Traceback" not in done.err and "Warning" not in done.err, done.err
    lines, again = tiny.log(out), tmp_path / "again"
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert max(line["lr"] for line in lines) == pytest.approx(1e-2) == 4 * lines[0]["lr"]
    assert done.out.count("    row 0: ") == 2 and "(label 'a red circle')" in done.out
    assert f"wrote {out}" in done.out and "30/30" in done.out and "--max_len 140 leaves out" in done.out
    assert "removed its checkpoints" in done.out and not (out / "checkpoints").exists()
    done = fork("sft", *argv, *options, "--resume", ranks=ranks)
    assert done.code == 0 and "nothing is left to do" in done.out and tiny.log(out) == lines
    done = fork("sft", *argv, *options, "--resume", "--seed", 1)
    assert done.code == 2 and "--seed 0 then, 1 now" in done.error
    fork("sft", *argv, "--model", out, "--out", again, "--max_steps", 1)
    assert tiny.log(again)[0]["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-4)
