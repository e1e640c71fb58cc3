"""rm.py: the loss by hand, packed sequences against one sequence per answer, what a run writes.

A run is rm.py's own main, in forked processes (tiny.py), in fp32 on the CPU, over gloo. Scores of an exported
model are compared with those that transformers' hidden states and score.safetensors give.

Legend: A answers, B records, K most answers per record, D width.
"""
import contextlib
import io
import itertools
import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import MARGINS, assert_same_gradients, fork, inside, options, reload

import data
import fsdp
import rm

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles.json"
PARTS = {"projector": "multi_modal_projector.", "llm": "language_model.model.", "vision": "vision_tower."}


def read(place, processor, records=MARGINS):
    conversations = [(i, data.read_record(one, str(place / "images"), 2)) for i, one in enumerate(records)]
    return data.build_examples(conversations, processor, "ranked")[0]


def build(folder, world, trainable=(), **changes):
    """A checkpoint folder's model with a scalar head, and its processor."""
    args = options(model=str(folder), **changes)
    checkpoint = fsdp.open_checkpoint(args, world)
    return fsdp.build(checkpoint, args, world, trainable, score=True), checkpoint.processor


def scores_of(model, batch):
    return model.scores(batch, model.vision_tower(batch.pixels), batch.last_token)


@torch.no_grad()
def record_scores(model, examples, processor):
    """Each record's scores, one forward pass per record → list of tensors."""
    results = [scores_of(model, data.collate([example], processor)) for example in examples]
    fsdp.reshard(model)
    return results


def ranked(*records):
    """Lists of scores, best first → scores [B, K], padded with 0, and the answer mask [B, K]."""
    K = max(map(len, records))
    scores = torch.tensor([[*record, *[0.0] * (K - len(record))] for record in records])
    return scores, torch.tensor([[True] * len(record) + [False] * (K - len(record)) for record in records])


def loss_of(*records, margin=None, center=0.0):
    return float(rm.rm_loss(*ranked(*records), torch.tensor(margin or [0.0] * len(records)), center))


# ---- the loss ----

def test_two_answers_are_bradley_terry():
    """−log σ(r_1 − r_2): σ(1) and σ(−0.5), as TRL and torchtune have it for these two pairs."""
    assert loss_of([1.0, 0.0]) == pytest.approx(0.313262, abs=1e-6)
    assert loss_of([0.0, 0.5]) == pytest.approx(0.974077, abs=1e-6)
    assert loss_of([1.0, 0.0], [0.0, 0.5]) / 2 == pytest.approx(0.643669, abs=1e-6)
    assert loss_of([3.0, 3.0]) == pytest.approx(math.log(2))
    for better, worse in torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).mul(4).tolist():
        assert loss_of([better, worse]) == pytest.approx(math.log1p(math.exp(worse - better)), abs=1e-6)


@pytest.mark.skipif(not ORACLES.exists(), reason="needs ../shared/oracles.json")
def test_two_answers_are_the_oracles():
    oracle = json.loads(ORACLES.read_text())["rm_pairwise"]
    pairs = [*zip(oracle["chosen"], oracle["rejected"])]
    assert loss_of(*pairs) / len(pairs) == pytest.approx(oracle["mean_loss"], abs=1e-6)


def test_three_answers_by_hand():
    """exp r = 3, 2, 1: P = 3/6 · 2/3 = 1/3 in this order, 1/6 · 2/5 = 1/15 in the other, 2/6 · 3/4 = 1/4 with
    the first two exchanged; all six orders add up to 1."""
    three, two, one = math.log(3), math.log(2), 0.0
    assert loss_of([three, two, one]) == pytest.approx(math.log(3))
    assert loss_of([one, two, three]) == pytest.approx(math.log(15))
    assert loss_of([two, three, one]) == pytest.approx(math.log(4))
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    values = torch.tensor([three, two, one])[orders]
    assert rm.plackett_luce(values, values > -1).neg().exp().sum() == pytest.approx(1)
    assert rm.plackett_luce(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)) == pytest.approx(
        math.log(24))  # equal scores: every order is as likely


def test_gradient_by_hand():
    """A pair: ∓ σ(r_2 − r_1). Three answers: Σ over the choices of (share of what is left) − 1 for the
    chosen; each record's gradients add up to 0, without the penalty."""
    scores, answer_mask = ranked([1.0, 0.0], [math.log(3), math.log(2), 0.0])
    scores.requires_grad_()
    rm.rm_loss(scores, answer_mask, torch.zeros(2), 0.0).backward()
    pair = 1 / (1 + math.e)
    expected = [[-pair, pair, 0], [1 / 2 - 1, 1 / 3 + 2 / 3 - 1, 1 / 6 + 1 / 3]]
    assert torch.allclose(scores.grad, torch.tensor(expected), atol=1e-6)


def test_margin_by_hand():
    """Llama 2: −log σ(r_w − r_l − m), for the record that has one only: a margin raises a pair's loss."""
    assert loss_of([2.0, 0.5], margin=[1.0]) == pytest.approx(math.log1p(math.exp(-0.5)))
    assert loss_of([2.0, 0.5], margin=[1.5]) == pytest.approx(math.log(2))
    both = loss_of([2.0, 0.5], [1.0, 0.0, 2.0], margin=[1.0, 0.0])
    assert both == pytest.approx(math.log1p(math.exp(-0.5)) + loss_of([1.0, 0.0, 2.0]))
    assert loss_of([2.0, 0.5], margin=[1.0]) > loss_of([2.0, 0.5])


def test_centring_by_hand():
    """c · (mean score of the record)²: 1.25² for (2, 0.5), 0 for (1, −1), 2² for (1, 2, 3); the ranking
    term does not change, and the mean ignores the margin."""
    records = [2.0, 0.5], [1.0, -1.0], [1.0, 2.0, 3.0]
    for record, square in zip(records, (1.5625, 0.0, 4.0)):
        assert loss_of(record, center=0.1) - loss_of(record) == pytest.approx(0.1 * square, abs=1e-6)
    assert loss_of(*records, center=0.1) - loss_of(*records) == pytest.approx(0.55625, abs=1e-6)
    assert loss_of([2.0, 0.5], margin=[1.0], center=0.1) - loss_of([2.0, 0.5], margin=[1.0]) == pytest.approx(
        0.15625, abs=1e-6)
    assert loss_of([3.0, 2.0]) == pytest.approx(loss_of([103.0, 102.0]), abs=1e-5)  # a shift is free


def test_records_have_equal_weight():
    """Rows of 2, 5 and 3 answers together have the sum of their separate losses; the values at padding change
    nothing and get no gradient."""
    records = [1.0, 0.0], [0.3, -2.0, 1.0, 0.0, 4.0], [-1.0, 2.0, 0.5]
    margin = [0.5, 0.0, 0.0]
    separate = sum(loss_of(record, margin=[m], center=0.3) for record, m in zip(records, margin))
    assert loss_of(*records, margin=margin, center=0.3) == pytest.approx(separate, rel=1e-6)
    scores, answer_mask = ranked(*records)
    scores = scores.masked_fill(~answer_mask, 77.0).requires_grad_()
    loss = rm.rm_loss(scores, answer_mask, torch.tensor(margin), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(separate, rel=1e-6)
    assert not scores.grad[~answer_mask].any() and scores.grad[answer_mask].all()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_are_safe(sign):
    """Scores of ±1e4 in fp32: a finite loss that is the largest difference, and finite gradients."""
    records = [1e4 * sign, -1e4 * sign], [1e4 * sign, 0.0, -1e4 * sign], [-1e4, -1e4, -1e4], [1e4, 1e4]
    scores, answer_mask = ranked(*records)
    scores.requires_grad_()
    losses = rm.plackett_luce(scores, answer_mask)
    hard = [2e4, 3e4] if sign < 0 else [0.0, 0.0]
    assert losses.tolist() == pytest.approx([*hard, math.log(6), math.log(2)], abs=2e-3)
    rm.rm_loss(scores, answer_mask, torch.full((4,), 3.0) * (answer_mask.sum(1) == 2), 0.1).backward()
    assert scores.grad.isfinite().all() and scores.dtype == torch.float32
    assert not scores.grad[~answer_mask].any()


def test_ranking_metrics_by_hand():
    """(3, 1, 2): two of three pairs are right, margin 3 − 1.5. (1, 1): a tie is half. (0, 4): wrong, −4.
    (2, 2, 1, 0): five right and a tie of six."""
    scores = ranked([3.0, 1.0, 2.0], [1.0, 1.0], [0.0, 4.0], [2.0, 2.0, 1.0, 0.0])
    accuracy, margin = rm.ranking_metrics(*scores)
    assert accuracy.tolist() == pytest.approx([2 / 3, 1 / 2, 0, 5.5 / 6])
    assert margin.tolist() == pytest.approx([1.5, 0, -4, 1])


def test_no_records():
    """A micro-batch of padding: loss 0, still a part of the graph, and no accuracy to add."""
    scores = torch.zeros(0, requires_grad=True)
    grid, answer_mask = data.pad_by_sequence(scores, torch.zeros(0, dtype=torch.long), (0, 0))
    loss = rm.rm_loss(grid, answer_mask, torch.tensor([]), 0.5)
    loss.backward()
    assert loss == 0 and scores.grad.shape == (0,)
    assert [metric.sum() for metric in rm.ranking_metrics(grid, answer_mask)] == [0, 0]


def test_nothing_to_predict_reaches_every_parameter(place, world):
    """The same for the full model: gradients of exactly zero, which the other ranks' are added to."""
    model, processor = build(place / "model", world, ["multi_modal_projector.", "score.weight"])
    batch = data.collate([], processor)
    scores = data.pad_by_sequence(scores_of(model, batch), batch.sequence, batch.answer_shape)
    rm.rm_loss(*scores, torch.tensor([]), 0.1).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 5 and all(not p.grad.full_tensor().any() for p in trained)


# ---- packed sequences ----

EVERY = [*PARTS.values(), "score."]


def one_answer_each(examples):
    """One example per answer, each with its own copy of the prompt."""
    return [data.dataclasses.replace(example, answers=[answer], token_masks=[token_mask])
            for example in examples for answer, token_mask in zip(example.answers, example.token_masks)]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_shared_prompt_equals_separate_sequences(recompute, place, world):
    """Two, three and five answers of unequal length, two images, padding: each score and the gradient of
    every parameter are those of a sequence per answer."""
    model, processor = build(place / "model", world, EVERY)
    model.set_recompute(recompute)
    examples, results = read(place, processor)[:6], []
    for sequences in (examples, one_answer_each(examples)):
        scores = scores_of(model, data.collate(sequences, processor))
        record = torch.tensor([i for i, example in enumerate(examples) for _ in example.answers])
        rm.rm_loss(*data.pad_by_sequence(scores, record, (6, 5)), torch.zeros(6), 0.1).backward()
        results.append((scores.detach(), {name: p.grad.full_tensor().clone() for name, p in
                                        model.named_parameters() if p.requires_grad}))
        model.zero_grad()
    (scores, gradients), (expected, separate) = results
    assert len(scores) == 2 + 3 + 2 + 5 + 2 + 2 and scores.std() > 0.1
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert {name for name, gradient in separate.items() if gradient.any()} == gradients.keys()
    assert "score.bias" in gradients and any(name.startswith("vision_tower.") for name in gradients)
    assert_same_gradients(gradients, separate)


def test_a_score_is_read_at_the_last_token(place, world):
    """The head is applied to the hidden state of each answer's last token, its end token."""
    model, processor = build(place / "model", world)
    examples = read(place, processor)[:4]
    batch = data.collate(examples, processor)
    everywhere = torch.arange(batch.ids.numel())
    with torch.no_grad():
        features = model.vision_tower(batch.pixels)
        hidden = model.hidden(batch, features, everywhere, lambda hidden, head: hidden)
        weight, bias = fsdp.full_tensor(model.score.weight), fsdp.full_tensor(model.score.bias)
        scores = model.scores(batch, features, batch.last_token)
    positions = [int((batch.branch[b] == a).nonzero().max()) + b * batch.ids.shape[1]
          for b, example in enumerate(examples) for a in range(1, len(example.answers) + 1)]
    assert all(batch.ids.flatten()[t] == processor.tokenizer.eos_token_id for t in positions)
    assert torch.allclose(scores, (hidden[positions] @ weight.T + bias).squeeze(1), atol=1e-6)
    assert len(set(scores.tolist())) == 2 + 3 + 2 + 5


# ---- a run, and what it writes ----

def files(place):
    return ["--model", place / "model", "--data", place / "margins.json", "--images", place / "images",
            "--workers", 0]


@pytest.fixture(scope="module")
def run(place, world, tmp_path_factory):
    """Twelve steps of rm.py with held-out records. → its folder, the model, what was printed"""
    out = tmp_path_factory.mktemp("rm") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rm, "CENTER_RECORDS", 5)
        model, = inside("rm", *files(place), "--out", out, "--batch_size", 5, "--micro_batch", 3, "--lr",
                        "1e-2", "--max_steps", 12, "--warmup", 2, "--eval_data", place / "margins.json",
                        "--eval_every", 4, "--center_coef", 0.01)
    return out, tiny.state(model), printed.getvalue()


def test_a_reward_model_comes_back(place, run, world):
    """The exported folder, loaded with score=True, is the model that was trained, bit for bit."""
    out, trained, _ = run
    loaded = tiny.state(build(out, world, template="auto")[0])
    assert loaded.keys() == trained.keys() and "score.bias" in loaded
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    head = load_file(out / "score.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 32), "bias": (1,)}


def test_transformers_gives_the_same_scores(place, run, world):
    """Its LLaVA loads the folder with nothing missing or left over; its last hidden state of prompt and
    answer, with score.safetensors, gives our scores."""
    out, _, _ = run
    model, processor = build(out, world, template="auto")
    peer, head = reload(out), load_file(out / "score.safetensors")
    for example in read(place, processor):
        ours = record_scores(model, [example], processor)[0]
        for score, single in zip(ours, one_answer_each([example]), strict=True):
            batch = data.collate([single], processor)
            with torch.no_grad():
                pixels = batch.pixels[batch.image] if len(batch.image) else None
                results = peer(input_ids=batch.ids, pixel_values=pixels, output_hidden_states=True)
            expected = results.hidden_states[-1][0, -1] @ head["weight"][0] + head["bias"][0]
            assert math.isclose(score, expected, rel_tol=1e-4, abs_tol=1e-5)


def test_training_rewards_average_0(place, run, world):
    """Over CENTER_RECORDS, here 5: the records of the first step, with the saved bias, not all records."""
    out, trained, printed = run
    model, processor = build(out, world, template="auto")
    examples = read(place, processor)
    first = data.Steps(examples, processor, 5, 3, 0, 1).groups(0)
    scores = torch.cat(record_scores(model, [examples[i] for group in first for i in group], processor))
    assert abs(scores.mean()) <= 1e-5 < 0.1 < scores.std()
    assert abs(torch.cat(record_scores(model, examples, processor)).mean()) > 1e-3
    bias = float(trained["score.bias"])
    assert bias != 0 and f"the mean training reward was {-bias:.4f}; the new bias makes it 0" in printed


def test_held_out_metrics(place, run, world):
    """Accuracy and margin are means over records, not over pairs; scores per quartile of answer length; by
    hand from the exported model."""
    out, trained, printed = run
    lines = tiny.log(out)
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [4, 8, 12]
    model, processor = build(out, world, template="auto")
    examples = read(place, processor)
    records = record_scores(model, examples, processor)
    right = [[float(a > b) for i, a in enumerate(record) for b in record[i + 1:]] for record in records]
    by_records = sum(sum(pairs) / len(pairs) for pairs in right) / len(records)
    by_pairs = sum(map(sum, right)) / sum(map(len, right))
    assert abs(by_records - by_pairs) > 1e-3
    assert lines[-1]["eval_accuracy"] == pytest.approx(by_records, abs=1e-6)
    margins = [float(record[0] - record[1:].mean()) for record in records]
    assert lines[-1]["eval_margin"] == pytest.approx(sum(margins) / len(records), rel=1e-4)
    scores = torch.cat(records) - trained["score.bias"]  # as they were before the bias was set
    assert lines[-1]["eval_score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    lengths = torch.tensor([float(len(answer)) for example in examples for answer in example.answers])
    edges = torch.quantile(lengths, torch.tensor([0.25, 0.5, 0.75]))
    quartile = (lengths[:, None] > edges).sum(1)
    assert len(quartile.unique()) == 4
    for q in range(4):
        selected = scores[quartile == q]
        assert lines[-1][f"length/q{q + 1}_mean"] == pytest.approx(float(selected.mean()), abs=1e-5)
        assert lines[-1][f"length/q{q + 1}_std"] == pytest.approx(float(selected.std(correction=0)), abs=1e-5)
        assert f"    {len(selected)} answers of {int(lengths[quartile == q].min())} to " in printed


def test_the_first_logged_metrics(place, run, world):
    """Step 1: the mean loss over its records with margin and penalty, accuracy, margin and mean score, of the
    model as built; the loss falls."""
    out, _, _ = run
    lines = tiny.log(out)
    model, processor = build(place / "model", world)
    examples = read(place, processor)
    records = [i for group in data.Steps(examples, processor, 5, 3, 0, 1).groups(0) for i in group]
    scores, grid = record_scores(model, [examples[i] for i in records], processor), []
    for i, record in zip(records, scores):
        r = record - torch.tensor([examples[i].margin] + [0.0] * (len(record) - 1))
        ranking = sum(float(r[k:].logsumexp(0) - r[k]) for k in range(len(r)))
        grid.append(ranking + 0.01 * float(record.mean()) ** 2)
    assert lines[0]["loss"] == pytest.approx(sum(grid) / 5, rel=1e-5)
    right = [sum(float(a > b) + float(a == b) / 2 for a, b in itertools.combinations(record.tolist(), 2))
             / math.comb(len(record), 2) for record in scores]
    assert lines[0]["accuracy"] == pytest.approx(sum(right) / 5)
    margins = [float(record[0] - record[1:].mean()) for record in scores]
    assert lines[0]["margin"] == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert lines[0]["score"] == pytest.approx(sum(float(record.mean()) for record in scores) / 5, rel=1e-4)
    assert lines[0]["lr"] == pytest.approx(1e-2 / 3)
    assert sum(line["loss"] for line in lines[-2:]) < sum(line["loss"] for line in lines[:2])


def test_a_new_head(place, world):
    """Drawn from N(0, 1/(D + 1)), keyed by the seed, bias 0."""
    heads = []
    for seed in range(10):
        model, _ = build(place / "model", world, seed=seed)
        heads.append(fsdp.full_tensor(model.score.weight).clone())
        assert not fsdp.full_tensor(model.score.bias).any()
    weights = torch.stack(heads)
    assert float(weights.square().mean()) == pytest.approx(1 / 33, rel=0.2)
    assert abs(weights.mean()) < 0.04 and len({float(head[0, 0]) for head in heads}) == 10


def test_a_user_trains_a_reward_model(place, tmp_path):
    """python, from another folder, with worker processes and recomputation: the ranking is learned and said,
    and the reward model can be trained on, from the head that it has."""
    out = tmp_path / "out"
    argv = ["--model", place / "model", "--data", place / "margins.json", "--images", place / "images",
            "--batch_size", 10, "--micro_batch", 5, "--warmup", 3, "--lr", "3e-3", "--recompute"]
    done = tiny.command("rm", *argv, "--out", out, "--max_steps", 20, "--eval_data", place / "margins.json")
    assert done.code == 0, done.err
    lines = tiny.log(out)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"] and lines[-1]["eval_accuracy"] > 0.95
    assert "20/20" in done.out and f"wrote {out}" in done.out and "the new bias makes it 0" in done.out
    assert "Traceback" not in done.err and "Warning" not in done.err
    done = fork("rm", *argv, "--model", out, "--out", tmp_path / "again", "--max_steps", 1, "--lr", 0,
                "--workers", 0)
    assert done.code == 0, done.err
    again = tiny.log(tmp_path / "again")[0]
    assert again["margin"] == pytest.approx(lines[-1]["eval_margin"], rel=1e-4)
    old, new = (load_file(folder / "score.safetensors") for folder in (out, tmp_path / "again"))
    assert torch.equal(old["weight"], new["weight"])
    assert torch.allclose(old["bias"], new["bias"], atol=1e-5)  # rewards averaged 0 already
