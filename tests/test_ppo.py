"""ppo.py: equations by hand and in their limits, packed samples against one sequence per answer, and runs of
main in this process, in fp32 on the CPU. N tokens of all answers, V vocabulary."""
import dataclasses
import functools
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import assert_same_gradients, inside

import data
import fsdp
import model as network
import ppo


def files(trained, reward="reward"):
    return ["--model", trained / "model", "--reward_model", trained / reward, "--data", trained / "rows.json",
            "--images", trained / "images", "--workers", 0]


SMALL = ["--batch_size", 5, "--rollout_batch", 10, "--micro_batch", 5, "--samples_per_prompt", 2,
         "--max_new_tokens", 8, "--ppo_epochs", 2, "--max_steps", 1, "--lr", "1e-3"]
TWICE = ("--max_steps", 2, "--micro_batch", 3, "--max_new_tokens", 10)
ONE_STEP = [*SMALL, "--batch_size", 10, "--micro_batch", 10, "--ppo_epochs", 1]


def arguments(*argv):
    return tiny.arguments("ppo", "--model", "model", "--reward_model", "reward", "--data", "data.json", *argv)


def ragged(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def close(ours, theirs, limit=1e-6):
    torch.testing.assert_close(ours.float(), torch.as_tensor(theirs).float(), rtol=limit, atol=limit)


def noise(like, seed, scale=1.0):
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


# ---- equations ----

def test_gae_by_hand():
    """In answers of 4, 2 and 1 tokens, whose padding is not read. Of four, δ = −0.71, 0.52, −0.23, 0.9."""
    mask = ragged(4, 2, 1)
    rewards = torch.tensor([-0.01, 0.02, -0.03, 1.0]).expand(3, 4).where(mask, 50.0)
    values = torch.tensor([0.5, -0.2, 0.3, 0.1]).expand(3, 4).where(mask, -50.0)
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.95)
    close(advantages, [[0.3480625, 1.11375, 0.625, 0.9], [-0.71 + 0.95 * 0.22, 0.22, 0, 0], [-0.51, 0, 0, 0]])
    close(returns, [[0.8480625, 0.91375, 0.925, 1.0], [-0.21 + 0.95 * 0.22, 0.02, 0, 0], [-0.01, 0, 0, 0]])


def test_gae_in_its_limits():
    """λ = 1: returns are discounted sums of rewards, whatever the values; λ = 0: advantages are TD errors."""
    mask, gamma = ragged(6, 3, 1, 6), 0.7
    rewards, values = noise(mask, 0) * mask, noise(mask, 1)
    _, returns = ppo.gae(rewards, values, mask, gamma, 1.0)
    advantages, _ = ppo.gae(rewards, values, mask, gamma, 0.0)
    for a, n in enumerate((6, 3, 1, 6)):
        for t in range(n):
            close(returns[a, t], sum(gamma**k * rewards[a, t + k] for k in range(n - t)))
            next_value = values[a, t + 1] if t + 1 < n else 0.0
            close(advantages[a, t], rewards[a, t] + gamma * next_value - values[a, t])


def test_kl_reward_by_hand():
    """The score is at the last token only; where policy and reference are equal, it is the whole reward."""
    mask, score = ragged(3, 1, 2, 3), torch.tensor([5.0, 6.0, -7.0, 2.0])
    logprob = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [-2.0, -2.0, 9.0], [-1.0, -2.0, -3.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 0.0, 0.0], [-1.0, -2.2, 0.0], [-1.0, -2.0, -3.0]])
    rewards = ppo.kl_reward(logprob, reference, score, mask, 0.1)
    close(rewards, [[-0.05, 0.0, 0.1 + 5], [-0.2 + 6, 0, 0], [0.1, -0.02 - 7, 0], [0, 0, 2]])


@pytest.mark.parametrize("loss, new, old, target, total, gradient", [
    (ppo.policy_loss, np.log([1.5, 0.5, 1.5, 0.5, 1.1, 1.1]) - 1, -1, [2, 2, -2, -2, 3, 9],
     -2.4 - 1.0 + 3.0 + 1.6 - 3.3, [0, -1, 3, 0, -3.3, 0]),  # − A ρ where ρ is not clipped
    (ppo.value_loss, [1.5, 1.5, 1.1, 0.5, 1.1], 1, [2, 1, 0, 0, 9],
     (0.8**2 + 0.5**2 + 1.1**2 + 0.8**2) / 2, [0, 0.5, 1.1, 0, 0])])  # V − R
def test_clipped_losses_by_hand(loss, new, old, target, total, gradient):
    """No gradient where ρ or V has moved more than 0.2 in the favoured direction; the last token is masked"""
    new, target = torch.tensor(new).float()[None].requires_grad_(), torch.tensor(target)[None]
    mask = torch.arange(target.shape[1])[None] < target.shape[1] - 1
    result = loss(new, torch.full_like(target, old), target, mask, 0.2)
    close(result.detach(), total)
    close(torch.autograd.grad(result, new)[0], [gradient])


def test_rloo_and_grpo_by_hand(world):
    """Equal scores: no advantages. RLOO's totals contain the KL of the answer; padding has no advantage."""
    close(ppo.rloo(torch.tensor([[6.0, 3.0, 0.0], [2.0, 2.0, 2.0]])), [[4.5, 0, -4.5], [0, 0, 0]])
    close(ppo.grpo(torch.tensor([[6.0, 3.0, 0.0], [2.0, 2.0, 2.0]])), [[3 / 3.0001, 0, -3 / 3.0001], [0] * 3])
    assert not ppo.grpo(torch.full((1, 8), 100.1)).any()
    logprob, ref = torch.tensor([[-1.0, -2.0, -7.0]]), torch.tensor([[-1.0, -1.0, -3.0]])
    close(ppo.grpo_kl(logprob, ref, torch.tensor([[True, True, False]])), math.e - 2)
    logprob, kl = torch.tensor([[-1.0, -2.0], [-1.0, 5.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.0]])
    old = ppo.OldOutputs(ragged(2, 1), logprob, logprob - kl, None, None)
    for advantage, expected in (("rloo", 2.3), ("grpo", 0.5**0.5)):  # totals 1 − .4 and 3 − .1
        args = arguments("--advantage", advantage, "--samples_per_prompt", 2, "--kl_coef", 0.4)
        estimates, = ppo.compute_advantages([old], [torch.tensor([1.0, 3.0])], args, world)
        close(estimates.advantages, torch.tensor([[-1.0, -1.0], [1.0, 0.0]]) * expected, 1e-4)
        assert estimates.returns is None
    scores = [torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([4.0, 4.0])]
    assert ppo.frac_equal_scores(scores, 2, world) == pytest.approx(2 / 3)


def test_advantages_are_whitened_over_all_answers(world):
    """Over the tokens of all rollouts; returns are computed before. A large mean costs no precision."""
    scores, raw = [torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.0, 2.0])], []
    outputs = [ppo.OldOutputs(mask, noise(mask, 0), noise(mask, 1), noise(mask, 2), None)
               for mask in (ragged(3, 1, 5), ragged(2, 2))]
    results = ppo.compute_advantages(outputs, scores, arguments("--kl_coef", 0.5, "--lam", 0.9), world)
    for old, score, estimates in zip(outputs, scores, results):
        rewards = ppo.kl_reward(old.logprob, old.ref_logprob, score, old.token_mask, 0.5)
        advantages, returns = ppo.gae(rewards, old.values, old.token_mask, 1.0, 0.9)
        raw.append(advantages[old.token_mask])
        close(estimates.returns, returns)
        assert not estimates.advantages[~old.token_mask].any()
    mean, std = torch.cat(raw).mean(), torch.cat(raw).std()
    for old, advantages, estimates in zip(outputs, raw, results):
        close(estimates.advantages[old.token_mask], (advantages - mean) / std)
    _, std = ppo.masked_mean_std([torch.tensor([1.0, 2, 3, 6]) + 2.0**20], [ragged(4)[0]], world)
    assert std == pytest.approx((14 / 3) ** 0.5, rel=1e-6)


def test_rollout_metrics_by_hand(world):
    """Of answers of 3, 1 and 2 tokens in two rollouts: means over answers, explained variance over tokens."""
    logprobs = [torch.tensor([[-1.0, -2.0, -0.5], [-4.0, 0.0, 0.0]]), torch.tensor([[-0.25, -0.75]])]
    kl = [torch.tensor([[0.25, 0.5, -0.25], [-0.25, 0.0, 0.0]]), torch.tensor([[1.0, 0.25]])]
    values = [torch.tensor([[1.0, 2.0, 3.0], [0.0, 9.0, 9.0]]), torch.tensor([[1.0, 2.0]])]
    returns = [torch.tensor([[2.0, 2.0, 4.0], [-2.0, 0.0, 0.0]]), torch.tensor([[1.0, 5.0]])]
    rollouts = [ppo.Rollout([], None, None, None, torch.tensor(ended)) for ended in ([True, False], [True])]
    outputs = [ppo.OldOutputs(mask, logprob, logprob - k, v, None)
               for mask, logprob, k, v in zip((ragged(3, 1), ragged(2)), logprobs, kl, values)]
    scores = [torch.tensor([2.0, -1.0]), torch.tensor([5.0])]
    assert ppo.rollout_metrics(rollouts, scores, outputs, 0.1, world) == pytest.approx(
        {"objective/kl": 1.5 / 3, "objective/entropy": 8.5 / 3, "objective/scores": 2.0,
         "objective/non_score_reward": -0.05, "objective/rlhf_reward": 1.95, "answer/length": 2.0,
         "answer/no_eos": 1 / 3}, rel=1e-6)
    # R = 2, 2, 4, −2, 1, 5 of variance 30 / 5; R − V = 1, 0, 1, −2, 0, 3 of 13.5 / 5
    variance = ppo.explained_variance(outputs, [ppo.Estimates(None, r) for r in returns], world)
    assert variance == pytest.approx(1 - 13.5 / 30, rel=1e-6)


# ---- an iteration up to the update: packed samples against one sequence per answer ----

def prepared(trained, world, *argv, reward="reward"):
    """The pieces of ppo.main, up to its loop."""
    args = tiny.arguments("ppo", *files(trained, reward), *SMALL, *argv)
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    reward_checkpoint = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
    prompts = ppo.read_prompts(args.data, processor, reward_checkpoint.processor, args, world)
    policy, _, scorer, critic = ppo.build_models(checkpoint, reward_checkpoint, args, world)
    return SimpleNamespace(args=args, processor=processor, scorer=scorer, policy=policy, critic=critic,
                           prompts=prompts, world=world)


def old_outputs_of(bench, rollout):
    """OldOutputs with the policy itself, without its adapters, as the reference."""
    old = ppo.logprobs_and_values(rollout, bench.policy, None, bench.critic, bench.args)
    fsdp.reshard(bench.policy, bench.critic, bench.scorer.model)
    return old


def pop_gradients(bench):
    gradients = {f"{model} {name}": p.grad.full_tensor().clone() for model in ("policy", "critic")
                 for name, p in getattr(bench, model).named_parameters() if p.grad is not None}
    for model in (bench.policy, bench.critic):
        model.zero_grad(set_to_none=True)
    return gradients


@pytest.fixture(scope="module")
def bench(trained, world):
    return prepared(trained, world, "--samples_per_prompt", 3, "--temperature", 0.8)


@pytest.fixture(scope="module")
def micro_batches(bench):
    """(Rollout, OldOutputs, Estimates) of prompts with one image, two and none, three samples each; and of
    two more. As in a later epoch old outputs differ, some far enough to be clipped; padding is not 0."""
    results, policy = [], fsdp.unsharded(bench.policy, bench.args, bench.world)
    groups = ([bench.prompts.examples[i] for i in indices] for indices in ((0, 1, 2, 7), (3, 4)))
    group = [(data.collate(examples, bench.processor), examples, 1) for examples in groups]
    for rollout in ppo.sample_answers(policy, group, bench.processor, bench.args, bench.world):
        old = old_outputs_of(bench, rollout)
        mask = old.token_mask
        old = old._replace(logprob=old.logprob + noise(mask, 1, 0.3), values=old.values + noise(mask, 2, 0.3),
                           ref_logprob=old.ref_logprob + noise(mask, 5, 0.5))
        results.append((rollout, old, ppo.Estimates(noise(mask, 3), old.values + noise(mask, 4, 0.5))))
    rollout, old, _ = results[0]
    assert len(old.token_mask.sum(1).unique()) > 2 and 1 < rollout.ended.sum() < len(rollout.ended)
    return results


def separate_sequences(bench, rollout):
    """→ ids [n], log-probabilities [n, V] and values [n] of each answer, in a sequence of its own"""
    outputs = []
    for example in rollout.examples:
        for ids in example.answers:
            one = dataclasses.replace(example, answers=[ids], token_masks=[np.ones(len(ids), bool)])
            batch = data.collate([one], bench.processor)
            before = torch.arange(-len(ids) - 1, -1) + batch.ids.numel()  # the position that predicts a token
            features = bench.policy.vision_tower(batch.pixels)
            logits = bench.policy.hidden(batch, features, before, F.linear) / bench.args.temperature
            values = bench.critic.scores(batch, features, before)
            outputs.append((torch.from_numpy(ids).long(), logits.log_softmax(-1), values))
    return outputs


@pytest.mark.parametrize("advantage, single_step", [("gae", False), ("grpo", False), ("grpo", True)])
def test_packed_samples_equal_one_sequence_per_answer(advantage, single_step, bench, micro_batches):
    """Every gradient, log π, values and the metrics, means per token over unequal micro-batches. GRPO has the
    KL to the reference in its loss, and no critic; in its single step π_old is π."""
    args = SimpleNamespace(**{**vars(bench.args), "advantage": advantage, "kl_coef": 0.3})
    critic = bench.critic if advantage == "gae" else None
    batches = [(rollout, old._replace(logprob=None) if single_step else old, estimates)
               for rollout, old, estimates in micro_batches]
    metrics, count, logprobs = ppo.minibatch_backward(batches, bench.policy, critic, args, bench.world)
    gradients = pop_gradients(bench)

    ids, logps, values = map(torch.cat, zip(*(
        output for rollout, *_ in micro_batches for output in separate_sequences(bench, rollout))))
    old_logprob, ref_logprob, old_values, advantages, returns = (
        torch.cat([{**old._asdict(), **estimates._asdict()}[name][old.token_mask]
                   for _, old, estimates in micro_batches])
        for name in ("logprob", "ref_logprob", "values", "advantages", "returns"))
    logprob, tokens = logps.gather(1, ids[:, None])[:, 0], torch.ones(len(ids)).bool()  # [N]
    old_logprob = logprob.detach() if single_step else old_logprob
    policy_loss = ppo.policy_loss(logprob, old_logprob, advantages, tokens, 0.2) / len(ids)
    value_loss = ppo.value_loss(values, old_values, returns, tokens, 0.2) / len(ids)
    if not critic:
        policy_loss = policy_loss + 0.3 * ppo.grpo_kl(logprob, ref_logprob, tokens) / len(ids)
    (policy_loss + value_loss).backward()
    expected = pop_gradients(bench)
    assert_same_gradients(gradients, {n: g for n, g in expected.items() if critic or n.startswith("policy")})
    logprob, values = logprob.detach(), values.detach()
    now = [old_outputs_of(bench, rollout) for rollout, *_ in micro_batches]
    close(torch.cat([old.logprob[old.token_mask] for old in now]), logprob, 1e-5)
    close(torch.cat([old.values[old.token_mask] for old in now]), values, 1e-5)
    close(torch.cat([one[old.token_mask] for one, old in zip(logprobs, now)]), logprob, 1e-5)
    change, entropy = logprob - old_logprob, -(logps.exp() * logps).sum(-1).mean()
    outside = (change.exp() < 0.8) | (change.exp() > 1.2)
    assert count == len(ids) and outside.any() != single_step and entropy > 0.1
    of_critic = {"val/clipfrac": ((values - old_values).abs() > 0.2).float().mean(), "loss/value": value_loss}
    assert metrics == pytest.approx({name: value.item() for name, value in {
        "policy/approxkl": change.square().mean() / 2, "policy/ratio": change.exp().mean(),
        "policy/clipfrac": outside.float().mean(), "policy/entropy": entropy, "loss/policy": policy_loss,
        **(of_critic if critic else {})}.items()}, rel=1e-4)


# ---- rollout and scores ----

def test_tokens_are_drawn_by_inverse_cdf_of_the_policys_softmax(bench, micro_batches):
    """At the uniform keyed by (seed, minibatch, prompt, sample, step), without the tokens never sampled."""
    rollout, args = micro_batches[0][0], bench.args
    prompts = [example.index for example in rollout.examples]
    uniforms = network.keyed_uniforms(args.seed, 1, prompts, 3, args.max_new_tokens).flatten(0, 1)
    for (ids, logp, _), uniform in zip(separate_sequences(bench, rollout), uniforms, strict=True):
        p = logp.detach().exp().double()
        p[:, sorted(bench.processor.banned)] = 0
        upper, t = (p / p.sum(1, keepdim=True)).cumsum(1), torch.arange(len(ids))
        lower = F.pad(upper, (1, 0))
        assert (lower[t, ids] - 1e-5 <= uniform[t]).all() and (uniform[t] <= upper[t, ids] + 1e-5).all()
    fsdp.reshard(bench.policy, bench.critic)


@pytest.mark.parametrize("reward", ["reward", "llama2", "tower"])
def test_scores_are_the_reward_models(reward, bench, micro_batches, trained, world):
    """Of one sequence per answer, in its own template and with the features of its own vision tower."""
    b = bench if reward == "reward" else prepared(trained, world, reward=reward)
    scorer, rollout, expected = b.scorer, micro_batches[0][0], []
    assert scorer.shared_tower == (reward != "tower")
    scores = scorer.score(rollout, b.prompts)
    for example in rollout.examples:
        prompt = b.prompts.scorer_examples[example.index]
        assert ("[/INST]" in scorer.processor.tokenizer.decode(prompt.prompt)) == (reward == "llama2")
        for ids in example.answers:
            one = dataclasses.replace(prompt, answers=[ids], token_masks=[np.ones(len(ids), bool)])
            batch = data.collate([one], scorer.processor)
            with torch.no_grad():
                features = scorer.model.vision_tower(batch.pixels)
                expected += scorer.model.scores(batch, features, torch.tensor([batch.ids.numel() - 1]))
    fsdp.reshard(scorer.model)
    close(scores, torch.stack(expected), 1e-5)
    assert scores.std() > 0.01


def test_normalised_scores(bench, micro_batches, world):
    """Complete answers get mean 0 and deviation 1, the others a fixed score; the critic's values follow. One
    complete answer or equal scores are refused."""
    rollout = micro_batches[0][0]
    scores, old = bench.scorer.score(rollout, bench.prompts), old_outputs_of(bench, rollout)
    mean, std = ppo.fit_score_scale([scores], [rollout], world)
    normalised, = ppo.postprocess_scores([scores], [rollout], torch.tensor([mean, std]), bench.args)
    close(torch.stack(torch.std_mean(normalised[rollout.ended])), [1.0, 0.0], 1e-5)
    assert (normalised[~rollout.ended] == -1).all()
    ppo.rescale_head(bench.critic.score, mean, std)
    values = old_outputs_of(bench, rollout).values
    ppo.rescale_head(bench.critic.score, -mean / std, 1 / std)
    close(values[old.token_mask], (old.values[old.token_mask] - mean) / std, 1e-5)
    for ended, message in ((1, "but 1 of the first iteration's answers have their end token"),
                           (2, "but all complete answers of iteration 1 score 4.0: leave it out")):
        few = rollout._replace(ended=torch.arange(3) < ended)
        with pytest.raises(data.UserError, match=message):
            ppo.fit_score_scale([torch.tensor([4.0, 4.0, 5.0])], [few], world)


# ---- runs ----

@pytest.fixture(scope="module")
def run(trained, world, tmp_path_factory):
    """Options → the folder that a run leaves, and the models that it built; every run is started once."""
    @functools.cache
    def started(*argv):
        out = tmp_path_factory.mktemp("run") / "out"
        return out, inside("ppo", *files(trained), *SMALL, "--out", out, *argv)
    return started


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def weights(folder):
    return load_file(folder / "model.safetensors")


def recorded(monkeypatch, owner, name):
    """→ a list of (arguments, result) of every call"""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append((args, original(*args))) or calls[-1][1])
    return calls


ADAPTERS = "--lora_rank", 4, "--max_steps", 2, "--lr", "1e-2", "--train"
RUNS = {"all": TWICE, "adapters": (*ADAPTERS, "llm"), "both": (*ADAPTERS, "projector,llm")}


@pytest.mark.parametrize("name", RUNS)
def test_first_minibatch_has_ratio_1_and_kl_0(name, run):
    """The ratio in every iteration, the KL to the reference before the first update."""
    lines = tiny.log(run(*RUNS[name])[0])
    for line in lines:
        assert line["first/policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(line["first/policy/approxkl"]) < 1e-10 and line["first/policy/clipfrac"] == 0
        assert line["first/val/clipfrac"] == 0 and line["policy/approxkl"] > 1e-5
        assert all(np.isfinite(value) for value in line.values())
    assert abs(lines[0]["objective/kl"]) < 1e-5 and abs(lines[1]["objective/kl"]) > 1e-4


def adapted(model):
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, network.LoRA)}


PROJECTOR = "multi_modal_projector."


@pytest.mark.parametrize("name, of_policy, of_critic", [
    ("all", (PROJECTOR, "language_model."), (PROJECTOR, "language_model.model.", "score.")),
    ("adapters", (), ("score.",)), ("both", (PROJECTOR,), (PROJECTOR, "score."))])
def test_what_is_trained_moves_and_nothing_else(name, of_policy, of_critic, run, trained, world):
    """Vision tower, reference, reward model, the critic's unused LM head and what has adapters stay bit for
    bit. Where adapters alone are trained the policy without them is the reference. One tower serves all."""
    out, models = run(*RUNS[name])
    policy, *reference, reward, critic = models
    args = tiny.options(model=str(trained / "reward"))
    start = tiny.state(fsdp.build(fsdp.open_checkpoint(args, world), args, world, score=True))
    base, lora = weights(trained / "model"), adapted(policy)
    for before, model, moved in ((base, policy, of_policy), *((base, model, ()) for model in reference),
                                 (start, reward, ()), (start, critic, of_critic)):
        assert changed(before, tiny.state(model)) == {name for name in before if name.startswith(moved)}
    moved = {name for name in base if name.startswith(of_policy)}
    assert changed(base, weights(out)) == lora.keys() | moved and not (out / "score.safetensors").exists()
    assert len(reference) == bool(moved) and len({id(model.vision_tower) for model in models}) == 1
    assert adapted(critic).keys() == lora.keys() and not adapted(reward)
    assert all(adapter.on for adapter in lora.values())
    assert all(adapter.lora_B.weight.full_tensor().any() for adapter in adapted(critic).values())


def test_minibatches_are_shuffled_per_epoch(trained, world, tmp_path, monkeypatch):
    """Ten prompts in minibatches of three: each is full and used once per epoch, in an order keyed by (seed,
    iteration, epoch); a prompt that comes twice gets other samples. Metrics are means over tokens."""
    rollouts, steps = (recorded(monkeypatch, ppo, name) for name in ("sample_answers", "minibatch_backward"))
    inside("ppo", *files(trained), *SMALL, "--batch_size", 3, "--rollout_batch", 12, "--ppo_epochs", 3,
           "--max_steps", 2, "--seed", 3, "--out", tmp_path / "out")
    rollouts = [rollout for _, result in rollouts for rollout in result]
    answers = [{example.id: [ids.tolist() for ids in example.answers] for example in rollout.examples}
               for rollout in rollouts]
    assert len(answers) == 8 and all(len(minibatch) == 3 for minibatch in answers)
    twice = [(a[name], b[name]) for a, b in zip(answers, answers[3:]) for name in a.keys() & b.keys()]
    assert twice and any(a != b for a, b in twice)
    number = {id(rollout): m % 4 for m, rollout in enumerate(rollouts)}
    order = [number[id(minibatch[0][0])] for (minibatch, *_), _ in steps]
    assert order == [m for iteration in (1, 2) for epoch in (0, 1, 2)
                     for m in data.keyed_permutation(4, 3, iteration, epoch)]
    for i, line in enumerate(tiny.log(tmp_path / "out")):
        metrics, tokens, _ = zip(*(result for _, result in steps[12 * i:][:12]))
        assert len(set(tokens)) > 2
        for name in metrics[0]:
            mean = sum(step[name] * n for step, n in zip(metrics, tokens)) / sum(tokens)
            assert line[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), name
            assert line[f"first/{name}"] == metrics[0][name]


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_a_run_without_a_critic(advantage, trained, tmp_path, monkeypatch):
    """The first ratio is 1. A resumed run is the same, and so is GRPO with a forward pass of its own."""
    argv = [*files(trained), *ONE_STEP, "--advantage", advantage, "--out"]

    def run(name, *options):
        inside("ppo", *argv, tmp_path / name, "--max_steps", 2, *options)
        return [{key: value for key, value in line.items() if "second" not in key}
                for line in tiny.log(tmp_path / name)]
    lines = run("whole", "--save_every", 1)
    for line in lines:
        assert line["first/policy/ratio"] == 1 and line["first/policy/approxkl"] == 0
        assert 0 <= line["frac_reward_zero_std"] <= 1 and not any("val" in name for name in line)
    assert lines[0]["objective/kl"] == 0 != lines[1]["objective/kl"]
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_2")
    assert run("whole", "--save_every", 1, "--resume") == lines
    monkeypatch.setattr(ppo, "old_logprob_from_update", lambda args: False)
    assert run("separate") == lines


def test_learning_rates_and_critic_warmup(trained, world, tmp_path, monkeypatch):
    """Linear warm-up and half a cosine; the policy's rates and --ptx_data begin after two iterations."""
    optimizers, loaders = recorded(monkeypatch, ppo, "adam"), recorded(monkeypatch, data, "Loader")
    inside("ppo", *files(trained), *ONE_STEP, "--max_new_tokens", 2, "--max_steps", 6, "--critic_warmup", 2,
           "--warmup", 2, "--critic_lr", "5e-3", "--ptx_data", trained / "turns.json", "--out", tmp_path)
    lines = tiny.log(tmp_path)
    policy = [1e-3 * factor for factor in (0, 0, 1 / 3, 2 / 3, 1, 1 / 2)]
    critic = [5e-3 * factor for factor in (1 / 3, 2 / 3, 1, 0.5 + 0.125**0.5, 1 / 2, 0.5 - 0.125**0.5)]
    assert [line["lr"] for line in lines] == pytest.approx(policy)
    assert [line["critic_lr"] for line in lines] == pytest.approx(critic)
    for (_, optimizer), rate, steps in zip(optimizers, (policy[-1], critic[-1]), (4, 6), strict=True):
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate) and group["eps"] == 1e-5
    assert arguments("--lr", 2).critic_lr == 2 and arguments("--critic_lr", 0).critic_lr == 0
    for line in lines:
        for name in ("policy/ratio", "loss/policy", "grad_norm/policy", "loss/ptx"):
            assert (name in line) == (line["step"] > 2)
    assert [start for (_, start, *_), _ in loaders] == [0, 0, 1, 2, 3]  # of prompts, and of --ptx_data


def test_critic_from_the_policy_and_scores_from_a_function(bench, trained, world, tmp_path, monkeypatch):
    """V = 0 at first, so the first loss is half the mean of the squared returns. The function, imported as a
    module, gets a prompt's record, of several data files, and its answers' texts."""
    advantages = recorded(monkeypatch, ppo, "compute_advantages")
    metrics = recorded(monkeypatch, ppo, "rollout_metrics")
    (tmp_path / "f.py").write_text("records = []\ndef red(record, texts):\n    records.append(record)\n"
                                   "    return [text.split().count('red') for text in texts]")
    *_, critic = inside(
        "ppo", *files(trained, f"{tmp_path}/f.py:red"), *ONE_STEP, "--critic", "policy", "--seed", 2,
        "--missing_eos_score", -3, "--samples_per_prompt", 8, "--out", tmp_path / "out", "--data",
        trained / "rows.json", trained / "turns.json")
    (((old,), *_), (estimates,)), line = advantages[0], tiny.log(tmp_path / "out")[0]
    mean_square = float(estimates.returns[old.token_mask].square().mean())
    assert not old.values.any() and critic.score.weight.full_tensor().any()
    assert line["first/loss/value"] == pytest.approx(mean_square / 2, rel=1e-5)
    ((rollout,), (logged,), *_), _ = metrics[0]
    asked = [(tiny.ONE_TURN + tiny.MIXED)[example.index] for example in rollout.examples]
    assert sys.modules["reward_function"].records == asked
    ids = [answer for example in rollout.examples for answer in example.answers]
    texts, stop = map(bench.processor.text, ids), bench.processor.end_ids
    scores = [text.split().count("red") if int(i[-1]) in stop else -3.0 for i, text in zip(ids, texts)]
    assert logged.tolist() == scores and max(scores) > 0 > min(scores)


def test_a_word_is_learned(trained, tmp_path):
    """python ppo.py: the word that a function counts comes hardly ever, then in every other answer."""
    out = tmp_path / "out"
    done = tiny.command(
        "ppo", *files(trained, "rewards.py:red"), *ONE_STEP, "--samples_per_prompt", 6, "--ppo_epochs", 3,
        "--lr", "4e-3", "--critic", "policy", "--missing_eos_score", 0, "--max_steps", 10, "--kl_coef", 0.02,
        "--out", out)
    assert done.code == 0 and "Traceback" not in done.err and "Warning" not in done.err, done.err
    lines = tiny.log(out)
    assert lines[0]["objective/scores"] < 0.1 and lines[0]["objective/kl"] == 0
    assert np.mean([line["objective/scores"] for line in lines[-3:]]) > 0.4 and lines[-1]["objective/kl"] > 1
    assert done.out.count("  (score ") == 3 and f"wrote {out}" in done.out


def test_evaluations_change_nothing_and_ptx_is_sft(run, trained, world, tmp_path, monkeypatch):
    """Log and weights are bit for bit those without. At --lr 0 two evaluations are equal; without rewards and
    KL the loss is --ptx_coef times sft.py's, in its order. No more prompts are decoded at once than asked."""
    def most_prompts():  # that were decoded at once
        return max(sum(len(examples) for _, examples, _ in group) for (_, group, *_), _ in calls)
    (expected, _), calls = run(*TWICE), recorded(monkeypatch, ppo, "sample_answers")
    out, _ = run(*TWICE, "--eval_data", trained / "rows.json", "--eval_every", 1, "--decode_batch", 3)
    assert most_prompts() == 3
    lines = [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in tiny.log(out)]
    assert lines == tiny.log(expected) and not changed(weights(out), weights(expected))
    assert len({line["eval_objective/scores"] for line in tiny.log(out)}) == 2
    calls.clear()
    out, _ = run("--lr", 0, "--max_steps", 2, "--eval_data", trained / "rows.json", "--eval_every", 1,
                 "--rollout_batch", 5, "--micro_batch", 1, "--ptx_data", trained / "turns.json", "--ptx_coef",
                 2.5, "--reward_model", trained / "rewards.py:nought", "--critic", "policy", "--kl_coef", 0,
                 "--missing_eos_score", 0)
    lines = tiny.log(out)
    first, second = ({k: v for k, v in line.items() if k.startswith("eval_")} for line in lines)
    assert first == second and abs(first["eval_objective/kl"]) < 1e-5 and most_prompts() == 5
    assert {name.removeprefix("eval_") for name in first} < lines[0].keys()
    inside("sft", *files(trained)[:2], "--data", trained / "turns.json", *files(trained)[6:], "--out",
           tmp_path / "sft", "--batch_size", 5, "--micro_batch", 5, "--max_steps", 4, "--lr", 0)
    for name, theirs, factor in ("loss/ptx", "loss", 1), ("grad_norm/policy", "grad_norm", 2.5):
        expected = factor * np.reshape([line[theirs] for line in tiny.log(tmp_path / "sft")], (2, 2)).mean(1)
        assert [line[name] for line in lines] == pytest.approx(expected.tolist(), rel=1e-5)
