"""dpo.py: equations by hand, the reference, a shared prompt against separate sequences, runs as a user starts
them, and peak memory.

All is fp32 on the CPU unless a test says otherwise. Legend: A answers, B records, K answers per record.
"""
import functools
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from test_fsdp import peak_of
from tiny import PAIRS, RANKED, assert_same_gradients, fork, inside

import data
import dpo
import fsdp

ORACLES = Path(__file__).resolve().parents[2] / "shared/oracles.json"


def files(place, name="pairs.json"):
    return ["--model", place / "model", "--data", place / name, "--images", place / "images", "--workers", 0]


def prepared(place, world, *argv, records="ranked.json", trainable=()):
    """→ model, processor, and the examples of a data file"""
    args = tiny.arguments("dpo", *files(place, records), *argv)
    checkpoint = fsdp.open_checkpoint(args, world)
    examples = fsdp.read_examples(args.data, "ranked", checkpoint.processor, args, world)
    return fsdp.build(checkpoint, args, world, trainable), checkpoint.processor, examples


# ---- equations ----

# Three pairs, beta 0.1: h = (π_w − ref_w) − (π_l − ref_l) is 0, 10 and 20, so beta h is 0, 1 and 2
POLICY = torch.tensor([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
REFERENCE = torch.tensor([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
LENGTH = torch.tensor([[5, 7], [8, 9], [4, 6]])
S0, S1, S2 = (math.log(1 + math.exp(-x)) for x in (0, 1, 2))  # − log σ(x)
# of h a token: 0.1/8 + 9.9/9 = 1.1125 and −0.9/4 + 20.9/6 = 3.258333
EQUATIONS = {  # name in oracles.json: options, the three losses by hand
    "dpo": ({}, [S0, S1, S2]),
    "cdpo_label_smoothing_0.1": ({"label_smoothing": 0.1}, [S0, S1 + 0.1, S2 + 0.2]),  # − log σ(−x) = S + x
    "robust_0.1 (TRL formula)": ({"loss": "robust", "label_smoothing": 0.1},
                                 [S0, S1 - 0.1 / 0.8, S2 - 0.2 / 0.8]),
    "hinge": ({"loss": "hinge"}, [1, 0, 0]),
    "ipo_sum (eric-mitchell trainers.py)": ({"loss": "ipo"}, [25, 25, 225]),  # (h − 5)²
    "ipo_len_norm (TRL formula; chosen_len=[5,8,4], rejected_len=[7,9,6])": (
        {"loss": "ipo", "length_norm": True}, [25, 15.112656, 3.033403]),
    "sigmoid_norm (TRL formula; same lens)": (
        {"length_norm": True}, [S0, math.log(1 + math.exp(-0.11125)), math.log(1 + math.exp(-0.3258333))]),
}


def pair_loss(policy, reference, beta, *options, **named):
    """dpo_loss of [B, 2] log-probabilities, the chosen answer first."""
    return dpo.dpo_loss(*policy.unbind(1), *reference.unbind(1), beta, *options, **named)


def list_loss(logratio, beta, answer_mask=None):
    answer_mask = torch.ones_like(logratio, dtype=torch.bool) if answer_mask is None else answer_mask
    return dpo.listwise_dpo_loss(logratio, torch.zeros_like(logratio), answer_mask, beta)


@pytest.mark.parametrize("name", EQUATIONS)
def test_losses_by_hand(name):
    """dpo_loss on log-probabilities in nats per answer, or per token with length_norm."""
    options, expected = EQUATIONS[name]
    unit = LENGTH if "length_norm" in options else 1
    options = {key: value for key, value in options.items() if key != "length_norm"}
    losses = pair_loss(POLICY / unit, REFERENCE / unit, 0.1, **options)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.skipif(not ORACLES.is_file(), reason="no ../shared/oracles.json")
def test_the_hand_is_the_oracle():
    """The numbers above are those of other implementations."""
    oracles = json.loads(ORACLES.read_text())
    inputs = oracles["dpo_inputs"]
    for name, tensor in (("policy", POLICY), ("ref", REFERENCE)):
        stored = [inputs[f"{name}_chosen"], inputs[f"{name}_rejected"]]
        assert torch.equal(torch.tensor(stored).T, tensor)
    for name, (_, expected) in EQUATIONS.items():
        assert oracles[name] == pytest.approx(expected, abs=2e-6), name
    assert oracles["dpo_chosen_rewards"] == pytest.approx([0, 0.01, -0.09])
    assert oracles["dpo_rejected_rewards"] == pytest.approx([0, -0.99, -2.09])


def batch_of_pairs(processor, records):
    """Pairs of text with answers of LENGTH tokens; and token log-probabilities whose sums are POLICY."""
    examples = [data.Example(i, str(i), np.array([1, 9]), [np.arange(n) + 20 for n in LENGTH[i].tolist()],
                             [np.ones(n, dtype=bool) for n in LENGTH[i].tolist()], []) for i in records]
    batch, weights = data.collate(examples, processor), torch.Generator().manual_seed(0)
    parts = []
    for total, n in zip(POLICY[records].flatten(), LENGTH[records].flatten()):
        share = torch.rand(int(n), generator=weights)
        parts.append(total * share / share.sum())
    return batch, torch.cat(parts)


class Recorded:
    """In place of a model: returns recorded log-probabilities of the target tokens."""

    def __init__(self, token_logps):
        self.token_logps = token_logps

    def vision_tower(self, pixels):
        return pixels

    def __call__(self, batch, features):
        assert len(batch.target) == len(self.token_logps)
        return self.token_logps


@pytest.fixture(scope="module")
def processor(place, world):
    return fsdp.open_checkpoint(tiny.arguments("dpo", *files(place)), world).processor


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("records", [[0], [1], [2], [0, 1, 2]])
def test_a_micro_batch_by_hand(name, records, processor, place):
    """forward: the log-probability of an answer is the sum over its tokens, and --length_norm divides it by
    their number in the loss, but not in the rewards; the SFT loss is over the tokens of the chosen answers.
    The step has 2 records and 10 chosen tokens."""
    options, expected = EQUATIONS[name]
    args = tiny.arguments("dpo", *files(place), "--beta", 0.1, "--sft_coef", 0.5)
    vars(args).update(options)
    batch, token_logps = batch_of_pairs(processor, records)
    reference = [{"logps": logps} for logps in REFERENCE[records].tolist()]
    loss, metrics = dpo.micro_batch_loss(Recorded(token_logps), batch, reference, 2, 10, args)
    assert float(loss) == metrics.pop("loss")
    assert float(loss) == pytest.approx(float(metrics["loss/dpo"] + 0.5 * metrics["loss/sft"]))
    values = {
        "loss/dpo": expected, "rewards/chosen": [0, 0.01, -0.09], "rewards/rejected": [0, -0.99, -2.09],
        "rewards/accuracies": [math.nan, 1, 1], "rewards/margins": [0, 1, 2], "logps/chosen": [-0.5, -10, -1],
        "logps/rejected": [-0.1, -30, -21], "logratio/chosen": [0, 0.1 / 8, -0.9 / 4],
        "logratio/rejected": [0, -9.9 / 9, -20.9 / 6]}
    terms = {name: sum(values[name][i] for i in records) / 2 for name in values}
    if 0 in records:  # whose rewards are equal up to rounding
        metrics["rewards/accuracies"] = math.nan
    terms["loss/sft"] = -sum(values["logps/chosen"][i] for i in records) / 10
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        terms, rel=1e-5, abs=1e-5, nan_ok=True)


def test_metrics_of_more_answers_by_hand():
    """Records of two and three answers: rejected is the mean of the others, accuracy counts all pairs,
    padding of the shorter record counts for nothing."""
    logps = torch.tensor([[3.0, 1.0, 0.0], [2.0, 6.0, 4.0]])
    answer_mask = torch.tensor([[True, True, False], [True, True, True]])
    length = torch.tensor([[3, 2, 1], [1, 2, 4]])
    metrics = dpo.dpo_metrics(torch.tensor([0.5, 0.25]), 2 * logps, logps, logps / length, answer_mask)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx({
        "loss/dpo": 0.75, "rewards/chosen": 6 + 4, "rewards/rejected": 2 + 10,
        "rewards/accuracies": 1 + 1 / 3, "rewards/margins": 4 - 6, "logps/chosen": 5, "logps/rejected": 1 + 5,
        "logratio/chosen": 1 + 2, "logratio/rejected": 1 / 2 + (3 + 1) / 2})


def test_a_tie_counts_half():
    """In one pair of two answers, and in one of the three pairs of 1, 1, 0."""
    answer_mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = torch.tensor([[2.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    metrics = dpo.dpo_metrics(torch.zeros(2), rewards, rewards, rewards, answer_mask)
    assert metrics["rewards/accuracies"].item() == pytest.approx(0.5 + 2.5 / 3)


def random_logps(B, K, seed=0):
    return 5 * torch.randn(B, K, generator=torch.Generator().manual_seed(seed))


def test_policy_equals_reference():
    """Every loss at h = 0: log 2 for the sigmoid losses; 1 for hinge; (1 / (2 beta))² for IPO."""
    logps = random_logps(6, 2)
    for options, expected in ((("sigmoid",), math.log(2)), (("sigmoid", 0.2), math.log(2)),
                              (("robust", 0.2), math.log(2)), (("hinge",), 1), (("ipo",), 25)):
        assert pair_loss(logps, logps, 0.1, *options).tolist() == pytest.approx([expected] * 6)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_policy_equals_reference_for_more_answers(K):
    """All rankings are equally likely: log K!."""
    assert list_loss(torch.zeros(1, K), 0.3).item() == pytest.approx(math.log(math.factorial(K)), rel=1e-6)


def test_beta_to_zero():
    """The loss tends to log 2, whatever the log-ratios, and its gradient to ∓ beta / 2."""
    logps = random_logps(6, 2).requires_grad_()
    losses = pair_loss(logps, torch.zeros(6, 2), 1e-5)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2)] * 6, abs=1e-4)
    assert torch.allclose(logps.grad / 1e-5, torch.tensor([-0.5, 0.5]).expand(6, 2), atol=1e-4)


def test_gradient_of_a_pair():
    """− beta σ(−beta h) for the chosen answer (the equation after Eq. 7), its opposite for the rejected."""
    logps = random_logps(6, 2).requires_grad_()
    pair_loss(logps, torch.zeros(6, 2), 0.3).sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (logps[:, 0] - logps[:, 1]).detach())
    torch.testing.assert_close(logps.grad, torch.stack([expected, -expected], 1))


def test_the_listwise_loss_of_two_answers_is_the_pairs():
    """Eq. 20 with K = 2 is Eq. 7: the same losses and gradients."""
    policy, reference, gradients = random_logps(6, 2).requires_grad_(), random_logps(6, 2, seed=1), []
    pairs = pair_loss(policy, reference, 0.3)
    lists = dpo.listwise_dpo_loss(policy, reference, torch.ones(6, 2, dtype=torch.bool), 0.3)
    torch.testing.assert_close(pairs, lists)
    for losses in (pairs, lists):
        gradients += torch.autograd.grad(losses.sum(), policy)
    torch.testing.assert_close(*gradients)


def test_three_ranked_answers_by_hand():
    """Weights 3, 2, 1: P(best to worst) = 3/6 · 2/3 · 1/1 = 1/3, and of the opposite order 1/6 · 2/5 = 1/15.
    The probabilities of all six orders sum to 1."""
    weights = torch.tensor([3.0, 2.0, 1.0])
    orders = torch.stack([weights[list(order)] for order in itertools.permutations(range(3))])
    p = (-list_loss(orders.log() / 0.1, 0.1)).exp()
    assert p[0].item() == pytest.approx(1 / 3) and p[-1].item() == pytest.approx(1 / 15)
    assert len(p.unique()) == 6 and p.sum().item() == pytest.approx(1)


def test_padding_has_no_loss_and_no_gradient():
    """A record of two answers padded to five: the same loss, no gradient at the padding, no NaN."""
    logps = random_logps(1, 5).requires_grad_()
    loss = list_loss(logps, 0.3, torch.tensor([[True, True, False, False, False]]))
    torch.testing.assert_close(loss, list_loss(logps[:, :2], 0.3))
    loss.backward()
    assert logps.grad[0, :2].all() and not logps.grad[0, 2:].any()


def test_ipo_is_least_at_its_margin():
    """IPO is 0, with gradient 0, at h = 1 / (2 beta): 5 for beta 0.1."""
    logps = torch.tensor([[3.0, -2.0]], requires_grad=True)
    loss = pair_loss(logps, torch.zeros(1, 2), 0.1, "ipo")
    loss.backward()
    assert loss.item() == 0 and not logps.grad.any()


def test_robust_is_unbiased():
    """Labels flipped at the rate 0.1: the expected robust loss is the plain loss of the true labels."""
    logps, reference = random_logps(6, 2), torch.zeros(6, 2)
    true, flipped = (pair_loss(x, reference, 0.3, "robust", 0.1) for x in (logps, logps.flip(1)))
    torch.testing.assert_close(0.9 * true + 0.1 * flipped, pair_loss(logps, reference, 0.3))


# ---- one packed sequence, or one sequence per answer ----

def gathered_gradients(model):
    named = model.named_parameters()
    gradients = {name: p.grad.full_tensor().clone() for name, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def loss_of_separate_sequences(model, processor, examples, reference, beta, tokens):
    """The loss of a step with one sequence per answer, from its definition: Eq. 20 with sft_coef 0.5."""
    loss = 0.0
    for example, ref_logps in zip(examples, reference):
        logratio = []
        for k, (answer, token_mask) in enumerate(zip(example.answers, example.token_masks)):
            one = data.Example(0, "", example.prompt, [answer], [token_mask], example.images)
            batch = data.collate([one], processor)
            assert batch.causal_prefix == batch.ids.shape[1]
            logprob = model(batch, model.vision_tower(batch.pixels))
            logratio.append(beta * (logprob.sum() - ref_logps[k]))
            loss = loss - 0.5 * logprob.sum() / tokens if k == 0 else loss
        for k in range(len(logratio)):
            loss = loss - (logratio[k] - torch.stack(logratio[k:]).logsumexp(0)) / len(examples)
    return loss


@pytest.mark.parametrize("records", [[0], [2], [3], [2, 3, 0, 4, 6]], ids=str)
def test_a_shared_prompt_equals_separate_sequences(records, place, world):
    """Two, three and five answers of unequal lengths, two images, padding, activations recomputed: the loss
    and all gradients equal those of one sequence per answer. Each distinct image passes the tower once."""
    model, processor, examples = prepared(place, world, trainable=[
        "vision_tower.", "multi_modal_projector.", "language_model."])
    examples = [examples[i] for i in records]
    draw = np.random.default_rng(0)
    reference = [(-40 * draw.random(len(example.answers))).tolist() for example in examples]
    tokens = dpo.chosen_tokens(examples)
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    batch = data.collate(examples, processor)
    model.set_recompute(True)
    args = tiny.arguments("dpo", *files(place), "--beta", 0.05, "--sft_coef", 0.5)
    ref_logps = [{"logps": logps} for logps in reference]
    loss, _ = dpo.micro_batch_loss(model, batch, ref_logps, len(examples), tokens, args)
    loss.backward()
    shared = gathered_gradients(model)
    assert seen == [max(1, len({path for example in examples for path in example.images}))]

    model.set_recompute(False)
    expected = loss_of_separate_sequences(model, processor, examples, reference, 0.05, tokens)
    expected.backward()
    separate = gathered_gradients(model)
    assert len(seen) == 1 + sum(len(example.answers) for example in examples)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    unreached = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.encoder.layers.1.")
    assert shared.keys() == {name for name, _ in model.named_parameters() if not name.startswith(unreached)}
    assert_same_gradients(shared, separate)


# ---- runs ----

def test_a_user_prefers(place, tmp_path):
    """python dpo.py, with worker processes: step 1 meets the reference, log 2 and margins of 0; the margins
    grow; the export can be tuned on."""
    out = tmp_path / "out"
    done = tiny.command("dpo", *files(place)[:-2], "--out", out, "--eval_data", place / "pairs.json",
                        "--workers", 1, "--batch_size", 7, "--micro_batch", 2, "--max_steps", 10, "--lr",
                        "1e-3", "--warmup", 2, "--sft_coef", 0.5, "--recompute")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err
    first, *_, last = tiny.log(out)
    assert abs(first["loss"] - math.log(2) - 0.5 * first["loss/sft"]) < 1e-5
    assert abs(first["rewards/margins"]) < 1e-5 and abs(first["rewards/chosen"]) < 1e-5
    assert last["eval_rewards/margins"] > 0.5 and last["eval_rewards/accuracies"] > 0.5
    assert last["loss"] < first["loss"]
    assert [line["step"] for line in tiny.log(out) if "eval_loss" in line] == [10]
    assert {f"eval_{name}" for name in first if "/" in name} < last.keys()
    assert "rewards/margins" in done.out and f"wrote {out}" in done.out
    again = fork("dpo", *files(place), "--model", out, "--out", tmp_path / "again", "--max_steps", 1)
    assert again.code == 0, again.err
    one = tiny.log(tmp_path / "again")[0]
    assert one["logps/chosen"] == pytest.approx(last["eval_logps/chosen"], rel=1e-4)


def test_step_one_of_ranked_records(place, world, tmp_path):
    """Rows of two, three and five answers: the mean of log K!, no margin; to the last bit, for the
    reference's batches are those of the first epoch, in bf16 as well."""
    sizes = [len(record["conversations"][-1]["value"]) for record in RANKED]
    for dtype in ("fp32", "bf16"):
        inside("dpo", *files(place, "ranked.json"), "--out", tmp_path / dtype, "--batch_size", 3,
               "--micro_batch", 2, "--epochs", 1, "--lr", 0, "--dtype", dtype)
        lines = tiny.log(tmp_path / dtype)
        assert len(lines) == 3
        losses = sum(line["loss"] * n for line, n in zip(lines, (3, 3, 1)))
        assert losses == pytest.approx(sum(math.log(math.factorial(K)) for K in sizes), rel=1e-6)
        assert all(line[f"rewards/{name}"] == 0
                   for line in lines for name in ("chosen", "rejected", "margins"))


def test_the_sft_term_is_sfts_loss(place, world, tmp_path):
    """loss/sft of step 1 is the loss of sft.py on the best answers; with a vanishing beta the full gradient
    is, too."""
    single = [pair for pair in PAIRS if len(pair["conversations"]) == 2]  # sft.py also learns earlier turns
    tiny.write_rows(tmp_path / "pairs.json", single)
    tiny.write_rows(tmp_path / "best.json", tiny.best(single, 1))
    step = ["--batch_size", 6, "--micro_batch", 2, "--max_steps", 2, "--lr", "1e-3"]
    inside("sft", *files(place), "--data", tmp_path / "best.json", "--out", tmp_path / "sft", *step)
    inside("dpo", *files(place), "--data", tmp_path / "pairs.json", "--out", tmp_path / "dpo", *step,
           "--beta", "1e-7", "--sft_coef", 1)
    for ours, theirs in zip(tiny.log(tmp_path / "dpo"), tiny.log(tmp_path / "sft"), strict=True):
        assert ours["loss/sft"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"] + math.log(2), rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_evaluation_is_a_mean_over_records(place, world, tmp_path):
    """Seven held-out records in batches of three, the last of one record, have the metrics of one training
    step of seven: the same loss, with its SFT term."""
    step = ["--ref_model", place / "other", "--lr", 0, "--max_steps", 1, "--sft_coef", 0.5]
    for name, options in {"one": ["--batch_size", 7, "--micro_batch", 7],
                          "parts": ["--batch_size", 3, "--micro_batch", 2]}.items():
        inside("dpo", *files(place, "ranked.json"), "--out", tmp_path / name, "--eval_data",
               place / "ranked.json", *step, *options)
    one, parts = (tiny.log(tmp_path / name)[0] for name in ("one", "parts"))
    for name in ("loss", *(name for name in one if "/" in name and not name.startswith("eval_"))):
        assert parts[f"eval_{name}"] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
    assert one["rewards/margins"] != parts["rewards/margins"]


# ---- the reference ----

def stored(path):
    return json.loads(Path(path).read_text())


ONE_STEP = ["--max_steps", 1, "--batch_size", 3, "--micro_batch", 2]


def test_the_file_is_a_resident_reference(place, world, tmp_path):
    """Its values are those of a second model in memory, on the same batches; and those of
    transformers, one answer per sequence."""
    inside("dpo", *files(place, "ranked.json"), "--out", tmp_path / "out", *ONE_STEP, "--eval_data",
           place / "pairs.json")
    model, processor, examples = prepared(place, world)
    steps = data.Steps(examples, processor, 3, 2, 0, 1)
    saved = stored(tmp_path / "out" / "reference.json")
    for step in range(len(steps)):
        for indices, batch in zip(steps.groups(step), steps[step]):
            with torch.no_grad():
                resident, _ = dpo.sequence_logprobs(model, batch)
            values = [value for i in indices for value in saved["training"][i]["logps"]]
            assert values == pytest.approx(resident.tolist(), rel=1e-6)
    peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / "model").eval()
    for example, *values in zip(examples, saved["training"], saved["held_out"], strict=True):
        images = [processor.pixels(path) for path in example.images]
        images = {"pixel_values": torch.stack(images)} if images else {}
        expected = []
        for answer in example.answers:
            ids = torch.from_numpy(np.concatenate([processor.expand(example.prompt), answer])).long()
            with torch.no_grad():
                logp = peer(input_ids=ids[None], **images).logits[0].log_softmax(-1)
            expected.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(ids) - len(answer), len(ids))))
        assert values[0]["logps"] == pytest.approx(expected, rel=1e-5)
        assert values[1]["logps"] == pytest.approx(expected[:2], rel=1e-5)


def test_another_reference_model(place, world, tmp_path):
    """--ref_model: the numbers are those that the other model has as its own reference."""
    inside("dpo", *files(place), "--out", tmp_path / "out", *ONE_STEP, "--ref_model", place / "other")
    inside("dpo", *files(place), "--out", tmp_path / "own", *ONE_STEP, "--model", place / "other")
    inside("dpo", *files(place), "--out", tmp_path / "self", *ONE_STEP, "--ref_model", place / "model")
    inside("dpo", *files(place), "--out", tmp_path / "plain", *ONE_STEP)
    out, own, self, plain = (stored(tmp_path / name / "reference.json")
                             for name in ("out", "own", "self", "plain"))
    assert out == own and self == plain and out != plain
    values, others = (torch.tensor([record["logps"] for record in file["training"]]) for file in (out, plain))
    assert ((values - others).abs() > 1e-2).all()
    assert abs(tiny.log(tmp_path / "out")[0]["rewards/margins"]) > 1e-2
    assert tiny.log(tmp_path / "self") == tiny.log(tmp_path / "plain")


def test_overwrite_recomputes_the_reference(place, world, tmp_path):
    """The default file belongs to the run: --overwrite with other data or another model is no stale file."""
    out = tmp_path / "out"
    inside("dpo", *files(place), "--out", out, *ONE_STEP)
    inside("dpo", *files(place, "ranked.json"), "--out", out, *ONE_STEP, "--overwrite")
    saved = stored(out / "reference.json")["training"]
    assert [len(record["logps"]) for record in saved] == [2, 3, 2, 5, 2, 2, 2]


DAMAGE = {
    "one entry short": lambda saved: {**saved, "training": saved["training"][:-1]},
    "a number edited": lambda saved: {**saved, "held_out": [{"logps": [0.0, 0.0]}, *saved["held_out"][1:]]},
    "no digest": lambda saved: {"training": saved["training"], "held_out": saved["held_out"]},
    "of other records": lambda saved: {
        **saved, "training": saved["training"][:3],
        "sha256": dpo.sha256({"training": saved["training"][:3], "held_out": saved["held_out"]})},
    "a list": lambda saved: saved["training"]}


@pytest.mark.parametrize("damage", [*DAMAGE, "cut short"])
def test_a_changed_reference_is_refused(damage, place, world, tmp_path):
    """A resume uses the numbers that the run began with; once the file is removed, it computes them again."""
    out, argv = tmp_path / "out", [*files(place), "--eval_data", place / "pairs.json", *ONE_STEP]
    inside("dpo", *argv, "--out", out)
    path = out / "reference.json"
    text = path.read_text()
    path.write_text(text[:-50] if damage == "cut short" else json.dumps(DAMAGE[damage](json.loads(text))))
    with pytest.raises(data.UserError, match="reference.json was changed since the run began: remove it"):
        inside("dpo", *argv, "--out", out, "--resume")
    os.remove(path)
    inside("dpo", *argv, "--out", out, "--resume")
    assert path.read_text() == text


# ---- memory ----

def measure(folder):
    """Writes the peak of a forward and backward pass over 4 sequences of 200 targets."""
    args = tiny.arguments("dpo", "--model", folder, "--data", "none", "--sft_coef", 1)
    world = fsdp.launch(args)
    checkpoint = fsdp.open_checkpoint(args, world)
    model = fsdp.build(checkpoint, args, world, trainable=["multi_modal_projector.", "language_model."])
    ids = np.arange(3, 103)
    examples = [data.Example(i, "", ids[:20], [ids, ids[::-1]], [ids > 0] * 2, []) for i in range(4)]
    batch = data.collate(examples, checkpoint.processor)
    assert len(batch.target) == 800

    def step():
        loss, _ = dpo.micro_batch_loss(model, batch, [{"logps": [0.0, 0.0]}] * 4, 1, 400, args)
        loss.backward()
        return loss
    peak, loss = peak_of(step)
    assert loss.isfinite()
    fsdp.write_json(str(folder / "peak.json"), peak)
    dist.destroy_process_group()


def test_memory_grows_by_the_head_only(tmp_path):
    """Vocabularies of 32k and 128k, width 32: the peak differs by a few copies of embedding and head (weights
    unsharded, gradients, their reduction), 25 MB a copy of both, and not by 800 tokens times vocabulary: a
    single copy of those logits would be 315 MB, and a forward and backward pass over them makes several."""
    peaks = {}
    for vocab in (2**15, 2**17):
        tiny.make_model(tmp_path / str(vocab), vocab_size=vocab)
        done = tiny.spread(functools.partial(measure, tmp_path / str(vocab)), 1)
        assert done.code == 0, done.err
        peaks[vocab] = stored(tmp_path / str(vocab) / "peak.json")
    matrices, logits = 2 * (2**17 - 2**15) * 32 * 4, 800 * (2**17 - 2**15) * 4
    assert peaks[2**15] > 3 * 2 * 2**15 * 32 * 4  # the measurement sees weights and gradients
    assert peaks[2**17] - peaks[2**15] < 8 * matrices < logits, (peaks, matrices)
