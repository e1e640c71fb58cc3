"""dpo.py: equations by hand, the reference, a shared prompt against one sequence per answer, and runs."""
import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
import torch
from tiny import RANKED, assert_same_gradients, inside

import data
import dpo
import fsdp


def files(place, name="pairs.json"):
    return ["--model", place / "model", "--data", place / name, "--images", place / "images", "--workers", 0]


def prepared(place, world, trainable=()):
    """→ model, processor, and the examples of ranked.json"""
    args = tiny.arguments("dpo", *files(place, "ranked.json"))
    checkpoint = fsdp.open_checkpoint(args, world)
    examples = fsdp.read_examples(args.data, "ranked", checkpoint.processor, args, world)
    return fsdp.build(checkpoint, args, world, trainable), checkpoint.processor, examples


# ---- equations ----

def S(x):  # − log σ(x)
    return math.log(1 + math.exp(-x))


# Three pairs: h = (π_w − ref_w) − (π_l − ref_l) is 0 (policy = reference), 10 and 20, so 0.1 h is 0, 1 and 2
POLICY = torch.tensor([[-0.5, -0.1], [-10.0, -30.0], [-1.0, -21.0]])
REFERENCE = torch.tensor([[-0.5, -0.1], [-10.1, -20.1], [-0.1, -0.1]])
LENGTH = torch.tensor([[5, 7], [8, 9], [4, 6]])
# h per token: 0, 0.1/8 + 9.9/9 = 1.1125 and −0.9/4 + 20.9/6 = 3.258333
EQUATIONS = {  # options: the three losses by hand, which are also TRL's
    "": [S(0), S(1), S(2)],
    "--label_smoothing 0.1": [S(0), S(1) + 0.1, S(2) + 0.2],  # − log σ(−x) = S + x
    "--loss robust --label_smoothing 0.1": [S(0), S(1) - 0.1 / 0.8, S(2) - 0.2 / 0.8],
    "--loss hinge": [1, 0, 0],
    "--loss ipo": [25, 25, 225],  # (h − 5)²
    "--loss ipo --length_norm": [25, 15.112656, 3.033403],
    "--length_norm": [S(0), S(0.11125), S(0.3258333)],
    "--loss simpo --simpo_gamma 0.6": [S(-0.6), S(0.11125 - 0.6), S(0.3258333 - 0.6)]}


@pytest.mark.parametrize("options", EQUATIONS)
def test_a_micro_batch_by_hand(options, place, world):
    """One of several micro-batches of a step with 4 records and 20 chosen tokens. --length_norm divides by an
    answer's number of tokens in the loss, SimPO in the rewards too; the SFT loss is of the chosen answers."""
    def model(batch, features):  # log-probabilities of the targets, whose sums per answer are POLICY
        share = torch.rand(len(batch.target), generator=torch.Generator().manual_seed(0))
        totals = torch.zeros(6).index_add(0, batch.answer, share)
        return share * (POLICY.flatten() / totals)[batch.answer]
    model.vision_tower = lambda pixels: pixels
    args = tiny.arguments("dpo", *files(place), "--beta", 0.1, "--sft_coef", 0.5, *options.split())
    examples = [data.Example(i, "", np.array([1, 9]), [np.arange(n) + 20 for n in lengths],
                             [np.ones(n, dtype=bool) for n in lengths], [])
                for i, lengths in enumerate(LENGTH.tolist())]
    batch = data.collate(examples, fsdp.open_checkpoint(args, world).processor)
    reference = [{"logps": logps} for logps in REFERENCE.tolist()]
    loss, metrics = dpo.micro_batch_loss(model, batch, reference, 4, 20, args)
    values = {
        "loss/dpo": EQUATIONS[options], "rewards/margins": [0, 1, 2],
        "rewards/chosen": [0, 0.01, -0.09], "rewards/rejected": [0, -0.99, -2.09],
        "logps/chosen": [-0.5, -10, -1], "logps/rejected": [-0.1, -30, -21],
        "logratio/chosen": [0, 0.1 / 8, -0.9 / 4], "logratio/rejected": [0, -9.9 / 9, -20.9 / 6]}
    if "simpo" in options:
        values |= {"rewards/margins": [0, 0.11125, 0.3258333], "rewards/chosen": [0, 0.01 / 8, -0.09 / 4],
                   "rewards/rejected": [0, -0.99 / 9, -2.09 / 6]}
    expected = {name: sum(pairs) / 4 for name, pairs in values.items()} | {"loss/sft": 11.5 / 20}
    expected["loss"] = expected["loss/dpo"] + 0.5 * 11.5 / 20
    metrics = {name: float(value) for name, value in metrics.items()}
    assert metrics.pop("rewards/accuracies") in (0.5, 0.625, 0.75)  # the first pair is a tie up to rounding
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-5) and float(loss) == metrics["loss"]


def test_metrics_of_more_answers_by_hand():
    """Of two and three answers: rejected is the mean of the others, accuracy counts all pairs, a tie half."""
    logps = torch.tensor([[3.0, 1.0, 0.0], [2.0, 6.0, 2.0]])
    answer_mask = torch.tensor([[True, True, False], [True, True, True]])
    length = torch.tensor([[3, 2, 1], [1, 2, 4]])
    metrics = dpo.dpo_metrics(torch.tensor([0.5, 0.25]), 2 * logps, logps, logps / length, answer_mask)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx({
        "loss/dpo": 0.75, "rewards/chosen": 6 + 4, "rewards/rejected": 2 + 8,
        "rewards/accuracies": 1 + 1.5 / 3, "rewards/margins": 4 - 4, "logps/chosen": 5,
        "logps/rejected": 1 + 4, "logratio/chosen": 1 + 2, "logratio/rejected": 1 / 2 + (3 + 0.5) / 2})


# ---- one packed sequence, or one sequence per answer ----

@pytest.mark.parametrize("records", [[0, 2, 4], [2, 3, 0, 4, 6]], ids=str)
def test_a_shared_prompt_equals_separate_sequences(records, place, world):
    """Loss and gradients of pairs alone, and with five answers. Each distinct image passes the tower once."""
    model, processor, examples = prepared(place, world, [
        "vision_tower.", "multi_modal_projector.", "language_model."])
    examples = [examples[i] for i in records]
    draw = np.random.default_rng(0)
    reference = [(-40 * draw.random(len(example.answers))).tolist() for example in examples]
    args, images = tiny.arguments("dpo", *files(place), "--beta", 0.05, "--sft_coef", 0.5), []
    tokens = sum(len(example.answers[0]) for example in examples)
    model.vision_tower.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))

    def pop_gradients():
        gradients = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()
                     if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return gradients
    model.set_recompute(True)
    batch, ref_records = data.collate(examples, processor), [{"logps": logps} for logps in reference]
    loss, _ = dpo.micro_batch_loss(model, batch, ref_records, len(examples), tokens, args)
    loss.backward()
    shared = pop_gradients()
    assert images == [len({path for example in examples for path in example.images})]

    model.set_recompute(False)
    expected = 0.0  # Eq. 20
    for example, ref_logps in zip(examples, reference):
        logps = []
        for answer, token_mask in zip(example.answers, example.token_masks):
            one = data.Example(0, "", example.prompt, [answer], [token_mask], example.images)
            batch = data.collate([one], processor)
            logps.append(model(batch, model.vision_tower(batch.pixels)).sum())
        rewards = 0.05 * (torch.stack(logps) - torch.tensor(ref_logps))
        ranking = sum(rewards[k:].logsumexp(0) - rewards[k] for k in range(len(rewards)))
        expected = expected + ranking / len(examples) - 0.5 * logps[0] / tokens
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(shared, pop_gradients())
    assert any(name.startswith("vision_tower.") for name in shared)


@pytest.mark.parametrize("per_token", [False, True])
def test_image_loss_equals_separate_sequences(per_token, place, world):
    """Of prompts with corrupted images. Records without an image have no term."""
    model, processor, examples = prepared(place, world)
    args = tiny.arguments("dpo", *files(place), "--image_coef", 2.0, "--beta", 0.3,
                          *["--length_norm"] * per_token)
    examples = [example for example in examples if len(example.answers) == 2][:4]
    assert {bool(example.images) for example in examples} == {True, False}
    with torch.no_grad():
        logps, _ = dpo.sequence_logprobs(model, data.collate(examples, processor))
        separate = [dataclasses.replace(
            e, answers=e.answers[:1], token_masks=e.token_masks[:1],
            images=[data.Corrupted(path, 5, e.index) for path in e.images]) for e in examples if e.images]
        corrupted, _ = dpo.sequence_logprobs(model, data.collate(separate, processor))
        shift, values = iter(corrupted.tolist()), logps.view(-1, 2).tolist()
        reference = [{"logps": [chosen - 1, rejected], **({"corrupted": next(shift) + 2} if e.images else {})}
                     for e, (chosen, rejected) in zip(examples, values)]
        batch = dpo.collate_with_corrupted(examples, processor, 5)
        loss, metrics = dpo.micro_batch_loss(model, batch, reference, len(examples), 50, args)
    fsdp.reshard(model)
    # log-ratios of 1, of rejected answers 0, of corrupted images −2
    lengths = [float(e.token_masks[0].sum()) if per_token else 1.0 for e in examples]
    terms = [S(0.3 * 3 / n) + S(0.3 / n) for e, n in zip(examples, lengths) if e.images]
    image, share = sum(terms) / len(examples), len(separate) / len(examples)
    pairs = sum(S(0.3 / n) for n in lengths) / len(examples)
    assert float(loss) == pytest.approx(pairs + 2 * image, rel=1e-5)
    assert float(metrics["loss/image"]) == pytest.approx(image, rel=1e-5)
    assert float(metrics["rewards/image_margins"]) == pytest.approx(0.9 * share, rel=1e-4)


# ---- runs ----

def test_a_user_prefers(place, tmp_path):
    """python dpo.py: step 1 equals the reference, log 2 and margins of 0; the margins grow."""
    out = tmp_path / "out"
    done = tiny.command("dpo", *files(place)[:-2], "--out", out, "--eval_data", place / "pairs.json",
                        "--workers", 1, "--batch_size", 7, "--micro_batch", 2, "--max_steps", 10, "--lr",
                        "1e-3", "--warmup", 2, "--sft_coef", 0.5, "--recompute")
    assert done.code == 0 and "Traceback" not in done.err and "Warning" not in done.err, done.err
    first, *_, last = tiny.log(out)
    assert abs(first["loss"] - math.log(2) - 0.5 * first["loss/sft"]) < 1e-5
    assert abs(first["rewards/margins"]) < 1e-5 and abs(first["rewards/chosen"]) < 1e-5
    assert last["eval_rewards/margins"] > 0.5 and last["eval_rewards/accuracies"] > 0.5
    assert last["loss"] < first["loss"] and {f"eval_{name}" for name in first if "/" in name} < last.keys()
    assert f"wrote {out}" in done.out


@pytest.mark.parametrize("options", ["--image_coef 1", "--loss simpo"])
def test_relatives_learn(options, place, tmp_path):
    """At first policy and reference agree with a corrupted image, too. SimPO has no reference; its β is 2."""
    inside("dpo", *files(place), "--out", tmp_path, "--batch_size", 7, "--micro_batch", 2, "--max_steps", 10,
           "--lr", "1e-3", "--eval_data", place / "pairs.json", *options.split())
    first, *_, last = tiny.log(tmp_path)
    if options == "--loss simpo":
        assert first["rewards/chosen"] == pytest.approx(2 * first["logratio/chosen"])
        assert last["eval_loss/dpo"] < first["loss/dpo"] and not (tmp_path / "reference.json").exists()
    else:
        assert abs(first["rewards/image_margins"]) < 1e-5 and last["eval_loss/image"] < first["loss/image"]


def test_step_one_of_ranked_records(place, world, tmp_path):
    """The mean of log K!, no margin; to the last bit, as the reference's batches are the first epoch's."""
    sizes = [len(record["conversations"][-1]["value"]) for record in RANKED]
    for dtype in ("fp32", "bf16"):
        inside("dpo", *files(place, "ranked.json"), "--out", tmp_path / dtype, "--batch_size", 3,
               "--micro_batch", 2, "--epochs", 1, "--lr", 0, "--dtype", dtype)
        lines = tiny.log(tmp_path / dtype)
        losses = sum(line["loss"] * n for line, n in zip(lines, (3, 3, 1), strict=True))
        assert losses == pytest.approx(sum(math.log(math.factorial(K)) for K in sizes), rel=1e-6)
        names = [f"rewards/{name}" for name in ("chosen", "rejected", "margins")]
        assert not any(line[name] for line in lines for name in names)


def test_evaluation_is_a_mean_over_records(place, world, tmp_path):
    """Seven held-out records in batches of 3, 3 and 1 have the metrics of a training step of seven; the SFT
    loss is a mean over its chosen answers' tokens."""
    for size in (7, 3):
        inside("dpo", *files(place, "ranked.json"), "--out", tmp_path / str(size), "--eval_data",
               place / "ranked.json", "--ref_model", place / "other", "--lr", 0, "--max_steps", 1,
               "--sft_coef", 0.5, "--batch_size", size, "--micro_batch", (size + 1) // 2)
    full, parts = (tiny.log(tmp_path / size)[0] for size in ("7", "3"))
    chosen_tokens = sum(len(example.answers[0]) for example in prepared(place, world)[2])
    assert full["loss/sft"] == pytest.approx(-7 * full["logps/chosen"] / chosen_tokens, rel=1e-5)
    for name in ("loss", *(name for name in full if "/" in name and not name.startswith("eval_"))):
        assert parts[f"eval_{name}"] == pytest.approx(full[name], rel=1e-5, abs=1e-6), name


# ---- the reference ----

ONE_STEP = ["--max_steps", 1, "--batch_size", 3, "--micro_batch", 2]


def test_the_reference_is_transformers(place, world, tmp_path):
    """The stored log-probabilities, of --model or --ref_model; --overwrite computes them again."""
    _, processor, examples = prepared(place, world)
    for folder, options in ("model", []), ("other", ["--ref_model", place / "other", "--overwrite"]):
        inside("dpo", *files(place, "ranked.json"), "--eval_data", place / "pairs.json", *ONE_STEP, "--out",
               tmp_path, *options)
        assert (abs(tiny.log(tmp_path)[0]["rewards/margins"]) > 1e-2) == (folder == "other")
        saved = json.loads((tmp_path / "reference.json").read_text())
        peer = tiny.hf.LlavaForConditionalGeneration.from_pretrained(place / folder).eval()
        for example, ranked, pair in zip(examples, saved["training"], saved["held_out"], strict=True):
            pixels, expected = [processor.pixels(path) for path in example.images], []
            pixels = {"pixel_values": torch.cat(pixels)} if pixels else {}
            for answer in example.answers:
                prompt = np.repeat(example.prompt, processor.lengths(example.prompt, example.images))
                ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
                with torch.no_grad():
                    logp = peer(ids[None], **pixels).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
                expected.append(float(logp[-len(answer):].sum()))
            assert ranked["logps"] == pytest.approx(expected, rel=1e-5)
            assert pair["logps"] == pytest.approx(expected[:2], rel=1e-5)


def test_a_changed_reference_is_refused(place, world, tmp_path):
    """Truncated, with another number or of other records. Once the file is removed it is computed again."""
    argv = [*files(place), "--eval_data", place / "pairs.json", *ONE_STEP, "--out", tmp_path]
    inside("dpo", *argv)
    path = tmp_path / "reference.json"
    text = path.read_text()
    saved = json.loads(text)
    edited = {**saved, "held_out": [{"logps": [0.0, 0.0]}, *saved["held_out"][1:]]}
    fewer = {"training": saved["training"][:3], "held_out": saved["held_out"]}
    for damaged in text[:-50], json.dumps(edited), json.dumps({**fewer, "sha256": dpo.sha256(fewer)}):
        path.write_text(damaged)
        with pytest.raises(data.UserError, match="reference.json was changed since the run began: remove it"):
            inside("dpo", *argv, "--resume")
    path.unlink()
    inside("dpo", *argv, "--resume")
    assert path.read_text() == text
