"""rm.py: the loss by hand, and a run against transformers' hidden states with score.safetensors."""
import contextlib
import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import MARGINS, inside, options

import data
import fsdp
import rm


def files(place):
    file = place / "margins.json"
    return ["--model", place / "model", "--images", place / "images", "--data", file, "--eval_data", file]


def read(place, processor):
    conversations = [(i, data.read_record(one, str(place / "images"), 2)) for i, one in enumerate(MARGINS)]
    return data.build_examples(conversations, processor, "ranked")[0]


def build(folder, world, **changes):
    args = options(model=str(folder), **changes)
    checkpoint = fsdp.open_checkpoint(args, world)
    return fsdp.build(checkpoint, args, world, score=True), checkpoint.processor


def ranked(records):
    """Lists of scores, best first → scores [B, K], padded with 77, and the answer mask [B, K]."""
    K = max(map(len, records))
    scores = torch.tensor([[*record, *[77.0] * (K - len(record))] for record in records], requires_grad=True)
    return scores, torch.tensor([[k < len(record) for k in range(K)] for record in records])


# ---- the loss ----

@pytest.mark.parametrize("records, margin, center_coef, expected", [
    ([[1.0, 0.0], [0.0, 0.5]], [0, 0], 0, 2 * 0.643669),  # − log σ(r_1 − r_2), as TRL and torchtune have it
    ([[0.0] * 4], [0], 0, math.log(24)),  # equal scores: every order is as likely
    ([[math.log(3), math.log(2), 0.0]], [0], 0, math.log(3)),  # P = 3/6 · 2/3
    ([[0.0, math.log(2), math.log(3)]], [0], 0, math.log(15)),  # P = 1/6 · 2/5
    ([[2.0, 0.5]], [1.0], 0, math.log1p(math.exp(-0.5))),  # Llama 2: − log σ(r_1 − r_2 − m)
    ([[2.0, 0.5]], [1.0], 0.1, math.log1p(math.exp(-0.5)) + 0.15625),  # the mean ignores the margin
    ([[3.0, 3.0], [0.0, math.log(2), math.log(3)]], [0, 0], 0.1,  # equal weights; no mean over padding
     math.log(2) + math.log(15) + 0.1 * (9 + (math.log(6) / 3) ** 2)),
    ([[-1e4, 1e4], [-1e4, 0.0, 1e4], [1e4, -1e4]], [0, 0, 0], 0, 5e4)])  # no overflow
def test_loss_by_hand(records, margin, center_coef, expected):
    """Sum over records; padding gets no gradient, and the gradients of a record sum to 2 c · mean."""
    scores, answer_mask = ranked(records)
    loss = rm.rm_loss(scores, answer_mask, torch.tensor(margin, dtype=torch.float32), center_coef)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert scores.grad.isfinite().all() and not scores.grad[~answer_mask].any()
    means = [2 * center_coef * sum(record) / len(record) for record in records]
    assert scores.grad.sum(1).tolist() == pytest.approx(means, abs=1e-6)


# ---- a run, and what it writes ----

@pytest.fixture(scope="module")
def run(place, world, tmp_path_factory):
    """→ its folder, trained weights and printed lines; the exported model, its processor and scores"""
    out = tmp_path_factory.mktemp("rm") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "CENTER_RECORDS", 5)
        trained, = inside("rm", *files(place), "--out", out, "--batch_size", 5, "--micro_batch", 3, "--lr",
                          "1e-2", "--max_steps", 12, "--warmup", 2, "--center_coef", 0.01)
    model, processor = build(out, world, template="auto")
    scores = record_scores(place, model, processor)
    return out, tiny.state(trained), printed.getvalue(), model, processor, scores


@torch.no_grad()
def record_scores(place, model, processor):
    """→ a tensor of scores per record"""
    batches = [data.collate([example], processor) for example in read(place, processor)]
    scores = [model.scores(batch, model.vision_tower(batch.pixels), batch.last_token) for batch in batches]
    fsdp.reshard(model)
    return scores


def records_of_step_one(place, processor):
    groups = data.Steps(read(place, processor), processor, 5, 3, 0, 1).groups(0)
    return [i for group in groups for i in group]


def test_transformers_gives_the_same_scores(place, run):
    """From its last hidden state of prompt and answer. The export is the trained model, bit for bit."""
    out, trained, _, model, processor, records = run
    loaded, peer, head = tiny.state(model), tiny.reload(out), load_file(out / "score.safetensors")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    for example, scores in zip(read(place, processor), records, strict=True):
        for answer, token_mask, score in zip(example.answers, example.token_masks, scores, strict=True):
            single = dataclasses.replace(example, answers=[answer], token_masks=[token_mask])
            batch = data.collate([single], processor)
            pixels = tiny.shown(batch, peer.config) if len(batch.image_feature) else None
            with torch.no_grad():
                results = peer(input_ids=batch.ids, pixel_values=pixels, output_hidden_states=True)
            expected = results.hidden_states[-1][0, -1] @ head["weight"][0] + head["bias"][0]
            assert score.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


def test_training_rewards_average_0(place, run):
    """Over CENTER_RECORDS, here 5: the records of the first step, with the saved bias, not all records."""
    _, trained, printed, _, processor, records = run
    scores = torch.cat([records[i] for i in records_of_step_one(place, processor)])
    assert abs(scores.mean()) <= 1e-5 < 0.1 < scores.std() and abs(torch.cat(records).mean()) > 1e-3
    assert f"the mean training reward was {-float(trained['score.bias']):.4f}; the new bias makes" in printed


def accuracy_and_margin(records):
    """Means over records, not over pairs."""
    accuracy = [np.mean([bool(a > b) for a, b in itertools.combinations(scores, 2)]) for scores in records]
    margin = [float(scores[0] - scores[1:].mean()) for scores in records]
    return pytest.approx([np.mean(accuracy), np.mean(margin)], rel=1e-4)


def test_held_out_metrics(place, run):
    """By hand from the exported model: of all records, and scores per quartile of answer length."""
    out, trained, printed, _, processor, records = run
    line = tiny.log(out)[-1]
    assert [line["eval_accuracy"], line["eval_margin"]] == accuracy_and_margin(records)
    scores = torch.cat(records) - trained["score.bias"]  # as they were before the bias was set
    assert line["eval_score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    lengths = torch.tensor([float(len(answer)) for e in read(place, processor) for answer in e.answers])
    quartile = (lengths[:, None] > torch.quantile(lengths, torch.tensor([0.25, 0.5, 0.75]))).sum(1)
    for q in range(4):
        selected = scores[quartile == q]
        assert line[f"length/q{q + 1}_mean"] == pytest.approx(selected.mean().item(), abs=1e-5)
        assert line[f"length/q{q + 1}_std"] == pytest.approx(selected.std(correction=0).item(), abs=1e-5)
        assert f"    {len(selected)} answers of {int(lengths[quartile == q].min())} to " in printed


def test_the_first_logged_metrics(place, run, world):
    """Of the model as built, by hand: means over the records of step 1, with margin and penalty."""
    first = tiny.log(run[0])[0]
    model, processor = build(place / "model", world)
    indices, scores = records_of_step_one(place, processor), record_scores(place, model, processor)
    records = [scores[i] for i in indices]
    padded, answer_mask = ranked([record.tolist() for record in records])
    margin = torch.tensor([float(MARGINS[i].get("margin", 0)) for i in indices])
    assert first["loss"] == pytest.approx(rm.rm_loss(padded, answer_mask, margin, 0.01).item() / 5, rel=1e-5)
    assert [first["accuracy"], first["margin"]] == accuracy_and_margin(records)
    assert first["score"] == pytest.approx(np.mean([float(r.mean()) for r in records]), rel=1e-4)


def test_a_new_head(place, world):
    """Drawn from N(0, 1/(D + 1)), keyed by the seed, bias 0."""
    states = [tiny.state(build(place / "model", world, seed=seed)[0]) for seed in range(10)]
    weights = torch.stack([state["score.weight"] for state in states])
    assert not any(state["score.bias"] for state in states)
    assert weights.square().mean().item() == pytest.approx(1 / 33, rel=0.2)
    assert abs(weights.mean()) < 0.04 and len(weights[:, 0, 0].unique()) == 10


def test_a_user_trains_a_reward_model(place, tmp_path):
    out = tmp_path / "out"
    done = tiny.command("rm", *files(place), "--batch_size", 10, "--micro_batch", 5, "--warmup", 3, "--lr",
                        "3e-3", "--recompute", "--out", out, "--max_steps", 20)
    assert done.code == 0 and "Traceback" not in done.err and "Warning" not in done.err, done.err
    first, *_, last = tiny.log(out)
    assert last["loss"] < 0.3 * first["loss"] and last["eval_accuracy"] > 0.95 and f"wrote {out}" in done.out
