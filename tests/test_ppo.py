"""ppo.py: its equations by hand and in their limits, rollouts against the training forward pass and against
the softmax, packed sequences against one sequence per answer, and runs as a user starts them.

A run is ppo.py's own main, in this process or in forked ones (tiny.py), in fp32 on the CPU, over gloo. The
policy is a tiny LLaVA after a few steps of sft.py, so its answers end at unequal lengths; the reward model
has other weights behind the same vision tower.

Legend: A answers, L tokens of the longest, B prompts, K samples per prompt, V vocabulary.
"""
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import ONE_TURN, assert_same_gradients, inside, options, reload

import data
import fsdp
import model as network
import ppo

ORACLES = Path(__file__).resolve().parents[2] / "shared" / "oracles.json"
PARTS = ("multi_modal_projector.", "language_model.")  # what is trained of the policy, and of the critic
CRITIC = ("multi_modal_projector.", "language_model.model.", "score.")


@pytest.fixture(scope="session")
def place(trained):
    return trained


def files(place, reward="reward"):
    return ["--model", place / "model", "--reward_model", place / reward, "--data", place / "rows.json",
            "--images", place / "images", "--workers", 0]


SMALL = ["--batch_size", 5, "--rollout_batch", 10, "--micro_batch", 5, "--samples_per_prompt", 2,
         "--max_new_tokens", 8, "--ppo_epochs", 2, "--max_steps", 1, "--lr", "1e-3"]


def arguments(*argv):
    """Parsed options of a run that is not started."""
    return tiny.arguments("ppo", "--model", "model", "--reward_model", "reward", "--data", "data.json", *argv)


def ragged(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float(), rtol=tolerance,
                               atol=tolerance)


def noise(like, seed, scale=1.0):
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


# ---- equations ----

# by hand: δ = (−0.71, 0.52, −0.23, 0.9); A_4 = 0.9, A_3 = −0.23 + 0.95 · 0.9, A_2 = 0.52 + 0.95 A_3, …
VALUES, REWARDS = torch.tensor([[0.5, -0.2, 0.3, 0.1]]), torch.tensor([[-0.01, 0.02, -0.03, 1.0]])
ADVANTAGES, RETURNS = [[0.3480625, 1.11375, 0.625, 0.9]], [[0.8480625, 0.91375, 0.925, 1.0]]
# δ = (0, 0, 0.9, 0): A = (0.855² · 0.9, 0.855 · 0.9, 0.9, 0), of mean 0.5818556 and deviation 0.4003
LAST = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
DISCOUNTED = [0.855**2 * 0.9, 0.855 * 0.9, 0.9, 0.0]


def test_gae_by_hand():
    """Advantages and returns of four tokens; and, discounted, of a reward and a value at the last token."""
    advantages, returns = ppo.gae(REWARDS, VALUES, ragged(4), 1.0, 0.95)
    close(advantages, ADVANTAGES)
    close(returns, RETURNS)
    advantages, returns = ppo.gae(LAST, LAST, ragged(4), 0.9, 0.95)
    close(advantages, [DISCOUNTED])
    close(returns, [[*DISCOUNTED[:3], 1.0]])


def test_gae_of_ragged_answers():
    """Answers of 4, 2 and 1 tokens in one tensor do not affect each other; what comes after an answer's end
    is neither read nor written."""
    rewards, values, mask = REWARDS.repeat(3, 1), VALUES.repeat(3, 1), ragged(4, 2, 1)
    for garbage in (0.0, 50.0):
        found = ppo.gae(rewards.where(mask, garbage), values.where(mask, -garbage), mask, 0.9, 0.8)
        for a, n in enumerate((4, 2, 1)):
            single = ppo.gae(REWARDS[:, :n], VALUES[:, :n], ragged(n), 0.9, 0.8)
            for ours, theirs in zip(found, single):
                close(ours[a, :n], theirs[0])
                assert not ours[a, n:].any()
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.8)
    close(advantages[1, :2], [-0.01 - 0.9 * 0.2 - 0.5 + 0.72 * 0.22, 0.02 + 0.2])  # δ, and 0.72 of the next
    close(returns[2, 0], -0.01)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_gae_in_its_limits(gamma):
    """λ = 1: returns are the discounted sums of the rewards to come, whatever the values say (Eq. 18,
    arXiv:1506.02438); λ = 0: advantages are the TD errors (Eq. 17)."""
    mask = ragged(6, 3, 1, 6)
    rewards, values = noise(mask, 0) * mask, noise(mask, 1)
    _, returns = ppo.gae(rewards, values, mask, gamma, 1.0)
    advantages, _ = ppo.gae(rewards, values, mask, gamma, 0.0)
    for a, n in enumerate((6, 3, 1, 6)):
        for t in range(n):
            to_come = sum(gamma**k * rewards[a, t + k] for k in range(n - t))
            following = values[a, t + 1] if t + 1 < n else 0.0
            close(returns[a, t], to_come)
            close(advantages[a, t], rewards[a, t] + gamma * following - values[a, t])


def test_kl_reward_by_hand():
    """− β (log π − log π_ref) at every token, and the score at the last token only."""
    mask, logprob = ragged(3, 1, 2), torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [-2.0, -2.0, 9.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 0.0, 0.0], [-1.0, -2.2, 0.0]])
    rewards = ppo.kl_reward(logprob, reference, torch.tensor([5.0, 6.0, -7.0]), mask, 0.1)
    close(rewards, [[-0.05, 0.0, 0.1 + 5], [-0.2 + 6, 0, 0], [0.1, -0.02 - 7, 0]])


def test_kl_reward_of_identical_policies():
    """The score at the last token and nothing else; the scores themselves do not change."""
    mask, score = ragged(4, 2, 3, 1), torch.tensor([5.0, -1.0, 2.0, 0.5])
    logprob = noise(mask, 2)
    rewards = ppo.kl_reward(logprob, logprob.clone(), score, mask, 0.5)
    expected = torch.zeros(4, 4)
    for a, n in enumerate((4, 2, 3, 1)):
        expected[a, n - 1] = score[a]
    assert torch.equal(rewards, expected)
    assert score.tolist() == [5.0, -1.0, 2.0, 0.5]


def test_policy_loss_by_hand():
    """max(− A ρ, − A clip(ρ, 0.8, 1.2)): clipped, without a gradient, only where the ratio has gone beyond
    1 ± 0.2 in the direction that the advantage favours."""
    ratio, advantages = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]]), torch.tensor([[2.0, 2.0, -2.0, -2.0, 3.0]])
    old = torch.tensor([[-0.5, -1.0, -2.0, -3.0, -0.1]])
    expected = [-2.4, -1.0, 3.0, 1.6, -3.3]
    gradient = [[0.0, -1.0, 3.0, 0.0, -3.3]]  # − A ρ where it is not clipped
    logprob = (old + ratio.log()).requires_grad_()
    for t in range(5):
        one = torch.arange(5)[None] == t
        close(ppo.policy_loss(logprob, old, advantages, one, 0.2), expected[t])
    loss = ppo.policy_loss(logprob, old, advantages, ragged(5), 0.2)
    loss.backward()
    close(loss.detach(), sum(expected))
    close(logprob.grad, gradient)


def test_value_loss_by_hand():
    """½ max((V − R)², (clip(V, V_old ± 0.2) − R)²): no gradient where V has moved more than 0.2
    towards R."""
    old, values = torch.ones(1, 4), torch.tensor([[1.5, 1.5, 1.1, 0.5]], requires_grad=True)
    returns = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    loss = ppo.value_loss(values, old, returns, ragged(4), 0.2)
    close(loss.detach(), (0.8**2 + 0.5**2 + 1.1**2 + 0.8**2) / 2)
    loss.backward()
    close(values.grad, [[0.0, 0.5, 1.1, 0.0]])
    close(ppo.value_loss(values, old, returns, ragged(4) & torch.tensor([[False, True, False, False]]), 0.2),
          0.125)


def test_losses_ignore_masked_tokens():
    """Loss and gradient do not depend on what comes after the answers' ends."""
    mask = ragged(5, 2, 3)
    for loss in (ppo.policy_loss, ppo.value_loss):
        found = []
        for garbage in (0.0, 3.0):
            new, old, target = (noise(mask, seed).where(mask, torch.tensor(seed * garbage))
                                for seed in (3, 4, 5))
            new.requires_grad_()
            value = loss(new, old, target, mask, 0.2)
            value.backward()
            found.append((value.detach(), new.grad))
        close(found[0][0], found[1][0])
        close(found[0][1], found[1][1])
        assert found[0][1][mask].any() and not found[0][1][~mask].any()


def test_moments_by_hand(world):
    """Over the unmasked elements of all tensors: (1, 2, 3, 6) has mean 3 and deviation √(14 / 3); of one
    number the deviation is 0; a large mean costs no precision."""
    tensors = [torch.tensor([[1.0, 9.0], [2.0, 3.0]]), torch.tensor([6.0])]
    masks = [torch.tensor([[True, False], [True, True]]), torch.tensor([True])]
    mean, std = ppo.masked_mean_std(tensors, masks, world)
    assert mean == pytest.approx(3) and std == pytest.approx((14 / 3) ** 0.5)
    assert ppo.masked_mean_std(tensors[1:], masks[1:], world) == (6, 0)
    _, shifted = ppo.masked_mean_std([t + 2.0**20 for t in tensors], masks, world)
    assert shifted == pytest.approx(std, rel=1e-6)


def old_outputs_for(rewards, values, token_mask):
    """OldOutputs whose KL rewards for β = 1 are these."""
    logprob = -rewards * token_mask
    return ppo.OldOutputs(token_mask, logprob, torch.zeros_like(logprob), values, None)


def advantages_of(old_outputs, args, world, beta=1.0):
    """compute_advantages where all scores are 0"""
    scores = [torch.zeros(len(old.token_mask)) for old in old_outputs]
    return ppo.compute_advantages(old_outputs, scores, with_beta(args, beta), world)


def with_beta(args, beta):
    return SimpleNamespace(**{**vars(args), "kl_coef": beta})


def test_advantages_are_whitened_over_all_answers(world, monkeypatch):
    """Mean 0 and standard deviation 1 over the tokens of all rollouts; returns come before whitening."""
    monkeypatch.setattr(ppo, "GAMMA", 0.9)
    args = arguments()
    targets, = advantages_of([old_outputs_for(LAST, LAST, ragged(4))], args, world)
    mean, std = sum(DISCOUNTED) / 4, torch.tensor(DISCOUNTED).std()
    close(targets.advantages, [[(a - mean) / std for a in DISCOUNTED]])
    close(targets.returns, [[*DISCOUNTED[:3], 1.0]])
    masks = [ragged(3, 1, 5), ragged(2, 2)]
    old_outputs = [old_outputs_for(noise(mask, i), noise(mask, i + 7), mask) for i, mask in enumerate(masks)]
    raw = [ppo.gae(-old.logprob, old.values, old.token_mask, 0.9, 0.95)[0] for old in old_outputs]
    all_raw = torch.cat([a[mask] for a, mask in zip(raw, masks)])
    for targets, a, mask in zip(advantages_of(old_outputs, args, world), raw, masks):
        close(targets.advantages, (a - all_raw.mean()) / all_raw.std() * mask, 1e-5)
        assert not targets.advantages[~mask].any()


def step_of(logprob, world):
    """The metrics of a step whose tokens have these log-probabilities now, and had 0 before."""
    mask, now = torch.ones_like(logprob).bool(), logprob.flatten().requires_grad_()  # [A, L], [N]
    zeros = torch.zeros_like(logprob)
    batch = SimpleNamespace(answer=mask.nonzero()[:, 0], logit_position=None, target=now,
                            token_shape=mask.shape)
    micro_batch = (ppo.Rollout([], batch, None, None, None), old_outputs_for(zeros, zeros, mask),
                   ppo.Targets(zeros, zeros))
    critic = SimpleNamespace(scores=lambda *_: torch.zeros(len(now), requires_grad=True))
    policy = lambda *_, entropy: (now, now)  # noqa: E731
    return ppo.minibatch_backward([micro_batch], policy, critic, arguments(), world)[0]


def test_rollout_metrics_by_hand(world):
    """Three answers in two rollouts, of 3, 1 and 2 tokens: means over answers; explained variance is over all
    six tokens."""
    logprobs = [torch.tensor([[-1.0, -2.0, -0.5], [-4.0, 0.0, 0.0]]), torch.tensor([[-0.25, -0.75]])]
    kl = [torch.tensor([[0.25, 0.5, -0.25], [-0.25, 0.0, 0.0]]), torch.tensor([[1.0, 0.25]])]
    values = [torch.tensor([[1.0, 2.0, 3.0], [0.0, 9.0, 9.0]]), torch.tensor([[1.0, 2.0]])]
    returns = [torch.tensor([[2.0, 2.0, 4.0], [-2.0, 0.0, 0.0]]), torch.tensor([[1.0, 5.0]])]
    ended = [torch.tensor([True, False]), torch.tensor([True])]
    rollouts = [ppo.Rollout([], None, None, None, e) for e in ended]
    old_outputs = [ppo.OldOutputs(mask, logprob, logprob - k, v, None)
                   for mask, logprob, k, v in zip((ragged(3, 1), ragged(2)), logprobs, kl, values)]
    scores = [torch.tensor([2.0, -1.0]), torch.tensor([5.0])]
    metrics = ppo.rollout_metrics(rollouts, scores, old_outputs, 0.1, world)
    assert metrics == pytest.approx(
        {"objective/kl": 1.5 / 3, "objective/entropy": 8.5 / 3, "objective/scores": 2.0,
         "objective/non_score_reward": -0.05, "objective/rlhf_reward": 1.95, "answer/length": 2.0,
         "answer/no_eos": 1 / 3}, rel=1e-6)
    # R = 2, 2, 4, −2, 1, 5 of variance 30 / 5; R − V = 1, 0, 1, −2, 0, 3 of 13.5 / 5
    targets = [ppo.Targets(None, r) for r in returns]
    assert ppo.explained_variance(old_outputs, targets, world) == pytest.approx(1 - 13.5 / 30, rel=1e-6)


@pytest.mark.skipif(not ORACLES.is_file(), reason="no ../shared/oracles.json")
def test_the_hand_is_the_oracle(world, monkeypatch):
    """The numbers above are those of other implementations."""
    oracles = json.loads(ORACLES.read_text())
    for name in ("gae", "gae_torchtune"):
        o = oracles[name]
        rewards, values = torch.tensor(o["rewards"]).float(), torch.tensor(o["values"]).float()
        advantages, returns = ppo.gae(rewards, values, torch.ones_like(values).bool(), o["gamma"], o["lam"])
        close(returns, o["returns"], 2e-6)
        if "adv_raw" in o:
            close(advantages, o["adv_raw"], 2e-6)
        else:  # whitened, with the mean added again
            old = old_outputs_for(rewards, values, torch.ones_like(values).bool())
            monkeypatch.setattr(ppo, "GAMMA", o["gamma"])
            targets, = advantages_of([old], arguments("--lam", o["lam"]), world)
            close(targets.advantages + advantages.mean(), o["adv_whitened_shift_mean_true"], 2e-6)
    o = oracles["ppo_policy_loss eps=.2 adv=1"]
    old = torch.tensor([o["old"]])
    for change in ("+1.0", "-1.0", "+0.1"):
        loss = ppo.policy_loss(old + float(change), old, torch.ones(1, 3), ragged(3), 0.2) / 3
        close(loss, o[f"new{change}"], 2e-6)
    o = oracles["value_clip eps=.2"]
    values, old, returns = (torch.tensor([o[name]]).float() for name in ("v", "old", "ret"))
    close(ppo.value_loss(values, old, returns, ragged(3), 0.2) / 3, o["loss"], 2e-6)
    _, o, _ = oracles["kl_k1_k2_k3 at logp-ref=0.3"]
    assert step_of(torch.full((1, 3), 0.3), world)["policy/approxkl"] == pytest.approx(o, abs=1e-6)
    o = oracles["rewards_ppo kl_coef=.5"]
    rewards = ppo.kl_reward(torch.full((3, 3), -0.1), torch.zeros(3, 3), torch.tensor(o["scores"]).float(),
                            ragged(3, 3, 3), 0.5)
    close(rewards[0], o["rewards_row0"])


# ---- a bench: models, and an iteration's rollouts up to the update ----

def prepared(place, world, *argv, reward="reward"):
    """The pieces of ppo.main, up to its loop."""
    args = tiny.arguments("ppo", *files(place, reward), *SMALL, *argv)
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    reward_checkpoint = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
    prompts = ppo.read_prompts(args.data, processor, reward_checkpoint.processor, args, world)
    policy, _, scorer, critic = ppo.build_models(checkpoint, reward_checkpoint, args, world)
    return SimpleNamespace(args=args, processor=processor, scorer=scorer, policy=policy, critic=critic,
                           prompts=prompts, examples=prompts.examples, world=world)


def sample(bench, examples, number=1, **options):
    """Rollout of one micro-batch, as in the minibatch of this number."""
    args = SimpleNamespace(**{**vars(bench.args), **options})
    prompts = data.collate(examples, bench.processor)
    policy = fsdp.unsharded(bench.policy, args, bench.world)
    rollout, = ppo.sample_answers(policy, [(prompts, examples, number)], bench.processor, args, bench.world)
    return rollout


def rolled(bench, examples):
    """One micro-batch → Rollout, scores, OldOutputs"""
    b, rollout = bench, sample(bench, examples)
    return rollout, b.scorer.score(rollout, b.prompts), old_outputs_of(b, rollout)


def old_outputs_of(bench, rollout):
    """OldOutputs with the policy itself, without its adapters, as the reference."""
    old = ppo.logprobs_and_values(rollout, bench.policy, None, bench.critic, bench.args)
    fsdp.reshard(bench.policy, bench.critic, bench.scorer.model)
    return old


@pytest.fixture(scope="module")
def bench(place, world):
    return prepared(place, world, "--samples_per_prompt", 3, "--temperature", 0.8)


def disturbed(bench, scores, old):
    """As in a later epoch: old log-probabilities and values are others, some far enough to be clipped."""
    mask = old.token_mask
    old = old._replace(ref_logprob=old.logprob + noise(mask, 1, 0.3) * mask)
    targets, = ppo.compute_advantages([old], [scores], with_beta(bench.args, 0.1), bench.world)
    old = old._replace(logprob=old.logprob + noise(mask, 2, 0.3) * mask,
                       values=old.values + noise(mask, 3, 0.3) * mask)
    return old, targets


def gradients(bench, minibatch):
    """→ the gradients of policy and critic, and the metrics"""
    b = bench
    metrics, count = ppo.minibatch_backward(minibatch, b.policy, b.critic, b.args, b.world)
    assert count == sum(int(old.token_mask.sum()) for _, old, _ in minibatch)
    return taken(b), metrics


def taken(bench):
    found = {}
    for name in ("policy", "critic"):
        parameters = [*getattr(bench, name).named_parameters()]
        found |= {f"{name} {n}": p.grad.full_tensor().clone() for n, p in parameters if p.grad is not None}
        getattr(bench, name).zero_grad(set_to_none=True)
    return found


@pytest.fixture(scope="module")
def micro_batch(bench):
    """(Rollout, OldOutputs, Targets) of prompts with one image, two and none, three samples each, unequal
    lengths."""
    rollout, scores, old = rolled(bench, [bench.examples[i] for i in (0, 1, 2, 7)])
    assert len({len(ids) for e in rollout.examples for ids in e.answers}) > 2
    assert 0 < rollout.ended.sum() < len(rollout.ended)
    return rollout, *disturbed(bench, scores, old)


@pytest.fixture(scope="module")
def rollout(micro_batch):
    return micro_batch[0]


@pytest.fixture(scope="module")
def expected(bench, micro_batch):
    return gradients(bench, [micro_batch])


def with_answer(example, k):
    return dataclasses.replace(example, answers=[example.answers[k]], token_masks=[example.token_masks[k]])


def everywhere(model, batch, read):
    return model.hidden(batch, model.vision_tower(batch.pixels), torch.arange(batch.ids.numel()), read)


def by_definition(bench, rollout, old_outputs, targets):
    """Both losses of a step, one sequence per answer, from logits and values at all positions.
    → loss to be differentiated; log-probabilities, values and entropies of each answer"""
    args, count, loss, found = bench.args, int(old_outputs.token_mask.sum()), 0.0, []
    answers = [(e, k) for e in rollout.examples for k in range(len(e.answers))]
    for a, (example, k) in enumerate(answers):
        row = data.collate([with_answer(example, k)], bench.processor)
        assert row.causal_prefix == row.ids.shape[1]
        n, ids = len(example.answers[k]), torch.from_numpy(example.answers[k]).long()
        before = slice(row.ids.shape[1] - n - 1, -1)  # the positions that predict each token
        logp = (everywhere(bench.policy, row, F.linear)[before] / args.temperature).log_softmax(-1)
        logprob = logp.gather(1, ids[:, None])[:, 0]
        states = everywhere(bench.critic, row, lambda states, head: states)
        values = bench.critic.score(states)[before, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        found.append((logprob.detach(), values.detach(), entropy.detach()))
        A, old, V, R = (x[a, :n] for x in (targets.advantages, old_outputs.logprob, old_outputs.values,
                                           targets.returns))
        ratio = (logprob - old).exp()
        clipped = V + (values - V).clamp(-args.clip_range, args.clip_range)
        bounded = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
        loss = loss - torch.minimum(A * ratio, A * bounded).sum() / count
        loss = loss + 0.5 * torch.maximum((values - R) ** 2, (clipped - R) ** 2).sum() / count
    return loss, found


def test_packed_samples_equal_one_sequence_per_answer(bench, micro_batch, expected):
    """Three samples packed behind their prompt: log-probabilities, values and every gradient of policy and
    critic are those of one sequence per answer, from the definitions. So prompt and padding have no loss."""
    loss, found = by_definition(bench, *micro_batch)
    loss.backward()
    assert_same_gradients(expected[0], taken(bench))
    old = old_outputs_of(bench, micro_batch[0])
    for a, (logprob, values, _) in enumerate(found):
        close(old.logprob[a, :len(logprob)], logprob, 1e-5)
        close(old.values[a, :len(values)], values, 1e-5)
        assert old.token_mask[a].sum() == len(logprob) and not old.logprob[a, len(logprob):].any()


def test_micro_batches_of_one_sum_to_one_of_four(bench, micro_batch, expected):
    """Accumulated gradients and metrics are the same."""
    rollout, old, targets = micro_batch
    minibatch, K = [], bench.args.samples_per_prompt
    for i, example in enumerate(rollout.examples):
        batch = data.collate([example], bench.processor)
        longest, rows = max(map(len, example.answers)), slice(i * K, (i + 1) * K)
        features = bench.policy.vision_tower(batch.pixels)
        old_i = ppo.OldOutputs(*(x[rows, :longest] for x in old[:4]), features)
        minibatch.append((rollout._replace(examples=[example], batch=batch, features=features), old_i,
                          ppo.Targets(*(x[rows, :longest] for x in targets))))
    found = gradients(bench, minibatch)
    assert_same_gradients(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-5)


def test_the_metrics_of_an_update(bench, micro_batch, expected):
    """Means over the step's tokens, by hand from the log-probabilities and values before and after."""
    rollout, old, targets = micro_batch
    new, mask, metrics = old_outputs_of(bench, rollout), old.token_mask, expected[1]
    change, moved = (new.logprob - old.logprob)[mask], (new.values - old.values)[mask]
    assert metrics["policy/approxkl"] == pytest.approx(float(change.square().mean() / 2), rel=1e-4)
    assert metrics["policy/ratio"] == pytest.approx(float(change.exp().mean()), rel=1e-4)
    far = (change.exp() < 0.8) | (change.exp() > 1.2)
    assert metrics["policy/clipfrac"] == pytest.approx(float(far.float().mean()), abs=1e-6) and 0 < far.sum()
    assert metrics["val/clipfrac"] == pytest.approx(float((moved.abs() > 0.2).float().mean()), abs=1e-6)
    mean = ppo.policy_loss(new.logprob, old.logprob, targets.advantages, mask, 0.2) / mask.sum()
    assert metrics["loss/policy"] == pytest.approx(float(mean), rel=1e-4)
    with torch.no_grad():
        entropies = torch.cat([entropy for *_, entropy in by_definition(bench, *micro_batch)[1]])
    fsdp.reshard(bench.policy, bench.critic)
    assert len(entropies) == mask.sum() and entropies.mean() > 0.1
    assert metrics["policy/entropy"] == pytest.approx(float(entropies.mean()), rel=1e-4)


GARBAGE = {"advantages": 50.0, "returns": -50.0, "values": 30.0, "logprob": -3.0}


@pytest.mark.parametrize("name", [*GARBAGE, "ids"])
def test_masked_tokens_get_no_gradient(name, bench, micro_batch, expected):
    """Other numbers after the answers' ends, and another token in place of the padding, change no gradient
    and no metric."""
    rollout, old, targets = micro_batch
    if name == "ids":
        batch, real = rollout.batch, rollout.batch.branch >= 0
        assert not real.all()
        rollout = rollout._replace(batch=dataclasses.replace(
            batch, ids=batch.ids.where(real, 17), position=batch.position.where(real, 33)))
    elif name in targets._fields:
        changed = getattr(targets, name).where(old.token_mask, GARBAGE[name])
        targets = targets._replace(**{name: changed})
    else:
        old = old._replace(**{name: getattr(old, name).where(old.token_mask, GARBAGE[name])})
    found = gradients(bench, [(rollout, old, targets)])
    assert_same_gradients(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-5)


def test_masked_tokens_get_no_reward(bench, micro_batch):
    """Other log-probabilities and values after the answers' ends change no advantage and no return."""
    _, old, _ = micro_batch
    garbage = {"logprob": 40.0, "ref_logprob": -40.0, "values": 25.0}
    changed = old._replace(**{name: getattr(old, name).where(old.token_mask, value)
                              for name, value in garbage.items()})
    plain, found = (advantages_of([x], bench.args, bench.world, 0.1)[0] for x in (old, changed))
    for ours, theirs in zip(found, plain):
        close(ours, theirs)
        assert theirs[old.token_mask].all() and not theirs[~old.token_mask].any()


# ---- rollout ----

def test_greedy_is_predict(bench, place, tmp_path):
    """At temperature 0 sample_answers takes the tokens that predict.py answers with."""
    inside("predict", "--model", place / "model", "--data", place / "rows.json", "--images", place / "images",
           "--out", tmp_path / "answers.jsonl", "--max_new_tokens", 8, "--workers", 0, "--micro_batch", 4)
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    def texts(**options):
        rollout = sample(bench, bench.examples, **options)
        fsdp.reshard(bench.policy)
        return [[bench.processor.text(ids) for ids in e.answers] for e in rollout.examples]

    expected = [[answer] * 3 for answer in answers]
    assert texts() != expected == texts(temperature=0) and len(set(answers)) > 3


def test_samples_do_not_depend_on_the_decode_batch(bench):
    """Three micro-batches of prompts of other lengths and images, and one of padding, of two minibatches:
    together, in pairs and one by one they get the same answers, features and packed batches."""
    examples = bench.examples
    group = [(data.collate(part, bench.processor), part, number)
             for part, number in ((examples[:3], 1), (examples[3:4], 1), ([], 2), (examples[2:7], 2))]
    assert len({batch.ids.shape for batch, *_ in group}) == 4
    policy, results = fsdp.unsharded(bench.policy, bench.args, bench.world), []
    for n in (4, 2, 1):
        results.append([rollout for i in range(0, 4, n) for rollout in ppo.sample_answers(
            policy, group[i:i + n], bench.processor, bench.args, bench.world)])
    for rollouts in results[1:]:
        for rollout, expected in zip(rollouts, results[0], strict=True):
            assert [[ids.tolist() for ids in e.answers] for e in rollout.examples] == [
                [ids.tolist() for ids in e.answers] for e in expected.examples]
            assert torch.equal(rollout.batch.ids, expected.batch.ids)
            assert torch.equal(rollout.features, expected.features)
            assert torch.equal(rollout.ended, expected.ended)
    assert [len(rollout.examples) for rollout in results[0]] == [3, 1, 0, 5]


@pytest.mark.parametrize("decode_batch", [0, 2])
def test_an_evaluation_decodes_no_more_at_once_than_an_iteration(decode_batch, place, tmp_path, monkeypatch):
    """Its prompts may be many more, and their cache would not fit."""
    calls = recorded(monkeypatch, ppo, "sample_answers")
    inside("ppo", *files(place), *SMALL, "--out", tmp_path / "out", "--eval_data", place / "rows.json",
           "--rollout_batch", 5, "--micro_batch", 1, "--decode_batch", decode_batch)
    sizes = [sum(len(examples) for _, examples, _ in args[1]) for args, _ in calls]
    assert sum(sizes) == 5 + 10 and max(sizes) == (decode_batch or 5), sizes


def test_the_caches_logprobs_are_the_forward_passs(bench):
    """Token by token: what generate says of n tokens less what it says of n − 1, drawn with the same
    uniforms, is what the training forward says of token n; sample_answers' are generate's."""
    args = SimpleNamespace(**{**vars(bench.args), "temperature": 1.0})
    examples, K = bench.examples, args.samples_per_prompt
    prompts = data.collate(examples, bench.processor)
    r = sample(bench, examples, 5, temperature=1.0)
    old = ppo.logprobs_and_values(r, bench.policy, None, bench.critic, args)
    before = torch.zeros(len(examples), K)
    for n in range(1, args.max_new_tokens + 1):
        uniforms = network.keyed_uniforms(args.seed, 5, [e.index for e in examples], K, n)
        answers, total = network.generate(bench.policy, prompts, r.features, n, bench.processor.stop,
                                          bench.processor.banned, uniforms, K)
        ids = [answer for row in r.examples for answer in row.answers]
        assert [a for row in answers for a in row] == [answer[:n].tolist() for answer in ids]
        close((total - before).flatten(), old.logprob[:, n - 1], 1e-4)
        before = total
    fsdp.reshard(bench.policy, bench.critic)
    assert old.token_mask.sum(1).min() < args.max_new_tokens == old.token_mask.sum(1).max()


def chi_square(drawn, p, least=5.0):
    """Pearson's test of drawn ids against p [V]: the probability of so large a deviation. Tokens expected
    fewer than `least` times are one class."""
    seen = torch.bincount(torch.tensor(drawn), minlength=len(p)).double()
    expected = p.double() * len(drawn)
    often = expected >= least
    seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
    statistic = ((seen - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2.0), statistic / 2))


def next_token(bench, example, begun, temperature):
    """The training forward's distribution [V] of the token after a prompt and the tokens begun, without
    those that are never sampled."""
    longer = dataclasses.replace(example, prompt=np.concatenate([example.prompt, begun]).astype(np.int32))
    row = data.collate([longer], bench.processor)
    with torch.no_grad():
        logits = everywhere(bench.policy, row, F.linear)[-1] / temperature
    logits[sorted(bench.processor.banned)] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_from_the_policy(temperature, bench):
    """Thousands of first tokens, and of second ones given the first, have the softmax's frequencies; and
    not those at another temperature."""
    example = bench.examples[2]

    def draw(samples, max_new, iteration):
        r = sample(bench, [example], iteration, samples_per_prompt=samples, max_new_tokens=max_new,
                   temperature=temperature)
        return [ids.tolist() for ids in r.examples[0].answers]

    first = [ids[0] for ids in draw(4000, 1, 1)]
    p = next_token(bench, example, [], temperature)
    assert chi_square(first, p) > 0.001
    assert chi_square(first, next_token(bench, example, [], 1.4 * temperature)) < 1e-6
    begun = max(set(first), key=first.count)
    pairs = [ids for iteration in range(2, 6) for ids in draw(500, 2, iteration)]
    assert chi_square([ids[0] for ids in pairs], p) > 0.001
    second = [ids[1] for ids in pairs if ids[0] == begun]
    assert len(second) > 300
    assert chi_square(second, next_token(bench, example, [begun], temperature)) > 0.001
    assert chi_square(second, p) < 1e-6
    fsdp.reshard(bench.policy)


def test_every_prompt_sample_and_iteration_draws_its_own(bench):
    """Answers do not depend on the batch, and change with iteration and seed."""
    def draw(examples, iteration=1, **changes):
        r = sample(bench, examples, iteration, **changes)
        return [[ids.tolist() for ids in e.answers] for e in r.examples]

    answers = draw(bench.examples)
    assert draw(bench.examples[4:7]) == answers[4:7] and draw(bench.examples[:1]) == answers[:1]
    assert draw(bench.examples, samples_per_prompt=1) == [row[:1] for row in answers]
    assert draw(bench.examples, 2) != answers != draw(bench.examples, seed=1)
    assert any(row[0] != row[1] for row in answers)
    fsdp.reshard(bench.policy)


# ---- scores ----

def test_scores_are_the_reward_models(bench, rollout):
    """Three answers packed behind one prompt, with the policy's features: the scores that the reward model
    gives to one sequence per answer."""
    answers = [with_answer(example, k) for example in rollout.examples for k in range(3)]
    assert bench.scorer.shared_tower
    scores = bench.scorer.score(rollout, bench.prompts)
    reward = bench.scorer.model
    with torch.no_grad():
        for score, example in zip(scores, answers, strict=True):
            row = data.collate([example], bench.scorer.processor)
            states = everywhere(reward, row, lambda states, head: states)
            close(score, reward.score(states[-1])[0], 1e-5)
    fsdp.reshard(reward)
    assert scores.std() > 0.01


@pytest.mark.parametrize("reward", ["llama2", "tower"])
def test_a_reward_model_reads_prompts_its_own_way(reward, bench, rollout, place, world):
    """The prompt is in the reward model's template and the images pass its own vision tower; the answers' ids
    are those that were sampled."""
    b = prepared(place, world, reward=reward)
    assert b.scorer.shared_tower == (reward == "llama2")
    read, scores = [], b.scorer.model.scores
    b.scorer.model.scores = lambda batch, *rest: read.append(batch) or scores(batch, *rest)
    found = b.scorer.score(rollout, b.prompts)
    (batch,), tokenizer = read, b.processor.tokenizer
    for i, example in enumerate(rollout.examples):
        for k, ids in enumerate(example.answers, 1):
            assert batch.ids[i][batch.branch[i] == k].tolist() == ids.tolist()
        prompt = tokenizer.decode(batch.ids[i][batch.branch[i] == 0])
        asked = ONE_TURN[example.index]["conversations"][0]["value"].split("<image>\n")[-1].strip()
        assert f"{asked} [/INST]" in prompt if reward == "llama2" else f"{asked} ASSISTANT:" in prompt
        theirs = rollout.batch.ids[i][rollout.batch.branch[i] == 0]
        assert (theirs.tolist() == batch.ids[i][batch.branch[i] == 0].tolist()) == (reward == "tower")
    with torch.no_grad():
        expected = scores(batch, b.scorer.model.vision_tower(batch.pixels), batch.last_token)
    fsdp.reshard(b.scorer.model)
    close(found, expected, 1e-5)
    assert (found - bench.scorer.score(rollout, bench.prompts)).abs().max() > 1e-3
    fsdp.reshard(bench.scorer.model)


def test_postprocess_scores_by_hand():
    """Normalised; an answer without its end token gets the fixed score, which is not."""
    rollout = ppo.Rollout([], None, None, None, torch.tensor([True, True, True, False, True]))
    raw = torch.tensor([1.0, 5.0, 9.0, 2.0, -9.0])
    for moments, argv, expected in (
            ([3.0, 4.0], ("--missing_eos_score", -9), [-0.5, 0.5, 1.5, -9.0, -3.0]),
            ([0.0, 1.0], (), [1.0, 5.0, 9.0, -1.0, -9.0])):
        moments = torch.tensor(moments, dtype=torch.float64)
        score, = ppo.postprocess_scores([raw], [rollout], moments, arguments(*argv))
        assert score.tolist() == expected


def test_normalised_scores(place, world):
    """--normalize_scores: complete answers of the first iteration get mean 0 and standard deviation 1, and a
    critic that was the reward model predicts on that scale."""
    b = prepared(place, world)
    rollout, scores, old = rolled(b, b.examples)
    raw = scores[rollout.ended]
    assert 1 < len(raw) < len(scores)
    mean, std = ppo.fit_score_scale([scores], [rollout], world)
    assert mean == pytest.approx(float(raw.mean()), rel=1e-5) and std == pytest.approx(float(raw.std()))
    moments = torch.tensor([mean, std], dtype=torch.float64)
    scores, = ppo.postprocess_scores([scores], [rollout], moments, b.args)
    close([scores[rollout.ended].mean(), scores[rollout.ended].std()], [0.0, 1.0], 1e-5)
    assert (scores[~rollout.ended] == -1).all()
    ppo.rescale_head(b.critic.score, mean, std)
    new = old_outputs_of(b, rollout)
    close(new.values[old.token_mask], (old.values[old.token_mask] - mean) / std, 1e-5)


# ---- runs ----

@pytest.fixture(scope="module")
def run(place, world, tmp_path_factory):
    """Options → the folder that a run in this process leaves, and the models that it built (policy,
    reference, reward model and critic, if they are); every run is made once."""
    @functools.cache
    def made(*argv, reward="reward"):
        out = tmp_path_factory.mktemp("run") / "out"
        models = inside("ppo", *files(place, reward), *SMALL, "--out", out, *argv)
        return out, models
    return made


TWICE = ("--max_steps", 2, "--micro_batch", 3, "--max_new_tokens", 10)


def built(place, world, folder="reward", **changes):
    """The weights of a reward model before training."""
    args = options(model=str(place / folder), **changes)
    return tiny.state(fsdp.build(fsdp.open_checkpoint(args, world), args, world, score=True))


def test_the_first_minibatch_meets_itself(run):
    """In every iteration the first step's ratio is 1, its approximate KL and its share of clipped tokens are
    0; before the first update the KL with the reference is 0, after it not. All metrics are finite."""
    out, _ = run(*TWICE)
    lines = tiny.log(out)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["first/policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(line["first/policy/approxkl"]) < 1e-10 and line["first/policy/clipfrac"] == 0
        assert line["first/val/clipfrac"] == 0
        assert line["policy/approxkl"] > 1e-5  # later steps are not at the start any more
        assert all(np.isfinite(value) for value in line.values())
    assert abs(lines[0]["objective/kl"]) < 1e-5
    assert lines[0]["objective/rlhf_reward"] == pytest.approx(lines[0]["objective/scores"], abs=1e-6)
    assert abs(lines[1]["objective/kl"]) > 1e-4
    for line in lines:
        beta = line["objective/non_score_reward"] / (line["objective/kl"] or 1)
        assert beta == pytest.approx(-0.05 if line["objective/kl"] else 0, rel=1e-4)


def test_what_is_trained_moves_and_nothing_else(run, place, world):
    """After one iteration every tensor of the policy's projector and LLaMA, and of the critic's with its
    scalar head, has changed; vision tower, reference, reward model and critic's unused LM head have not."""
    out, (policy, reference, reward, critic) = run(*TWICE)
    base = load_file(place / "model" / "model.safetensors")
    export = load_file(out / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], export[name])}
    assert moved == {name for name in base if name.startswith(PARTS)} and base.keys() == export.keys()
    assert all(torch.equal(export[name], tensor) for name, tensor in tiny.state(policy).items())
    assert all(torch.equal(base[name], tensor) for name, tensor in tiny.state(reference).items())
    start, after, scorer = built(place, world), tiny.state(critic), tiny.state(reward)
    assert all(torch.equal(start[name], tensor) for name, tensor in scorer.items())
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved == {name for name in start if name.startswith(CRITIC)}
    assert not (out / "score.safetensors").exists()  # the export is a policy


def test_equal_towers_are_one(run, world):
    """Policy, reference, reward model and critic see with one module; one of another tower has its own."""
    _, models = run(*TWICE)
    assert len(models) == 4 and len({id(model.vision_tower) for model in models}) == 1
    _, (policy, reference, reward, critic) = run(reward="tower")
    assert reference.vision_tower is policy.vision_tower
    assert not {reward.vision_tower, critic.vision_tower} & {policy.vision_tower}


def watch(monkeypatch):
    """→ a list that gets (Rollout, OldOutputs, Targets, scores) of every micro-batch of a run"""
    seen, rollouts = [], recorded(monkeypatch, ppo, "generate_rollouts")
    compute_advantages = ppo.compute_advantages

    def watched(old_outputs, scores, *rest):
        targets = compute_advantages(old_outputs, scores, *rest)
        seen.extend(zip(rollouts[-1][1], old_outputs, targets, scores, strict=True))
        return targets
    monkeypatch.setattr(ppo, "compute_advantages", watched)
    return seen


def recorded(monkeypatch, holder, name):
    """→ a list that arguments and result of every call are put in"""
    calls, original = [], getattr(holder, name)

    def recording(*args):
        calls.append((args, original(*args)))
        return calls[-1][1]
    monkeypatch.setattr(holder, name, recording)
    return calls


def test_minibatches_in_orders_of_their_own(place, world, tmp_path, monkeypatch, capfd):
    """Ten prompts in minibatches of three, four per iteration: each is full and comes once per epoch, in an
    order keyed by (seed, iteration, epoch); metrics are means over their unequal numbers of tokens,
    grad_norm/* means over steps; the answers shown stand a third of the iteration apart."""
    seen, steps = watch(monkeypatch), recorded(monkeypatch, ppo, "minibatch_backward")
    norms = recorded(monkeypatch, fsdp, "clip_gradients")
    monkeypatch.setattr(ppo, "SHOW_EVERY", 1)
    inside("ppo", *files(place), *SMALL, "--batch_size", 3, "--rollout_batch", 12, "--ppo_epochs", 3,
           "--max_steps", 2, "--seed", 3, "--out", tmp_path / "out")
    shown = [line.split("'")[3] for line in capfd.readouterr().out.splitlines() if line.startswith("    {")]
    prompts = [[example.id for example in rollout.examples] for rollout, *_ in seen]
    assert len(prompts) == 8 and all(len(set(ids)) == 3 for ids in prompts)
    number = {id(rollout): m % 4 for m, (rollout, *_) in enumerate(seen)}
    met = [number[id(minibatch[0][0])] for (minibatch, *_), _ in steps]
    orders = [met[k:k + 4] for k in range(0, 24, 4)]
    keys = [(3, iteration, epoch) for iteration in (1, 2) for epoch in (0, 1, 2)]
    assert orders == [data.keyed_permutation(4, *key).tolist() for key in keys]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len(set(map(tuple, orders))) > 4
    for i, line in enumerate(tiny.log(tmp_path / "out")):
        taken = [(found, sum(int(old.token_mask.sum()) for _, old, _ in minibatch), count)
                 for (minibatch, *_), (found, count) in steps[12 * i:][:12]]
        tokens = [n for _, n, _ in taken]
        assert tokens == [count for *_, count in taken] and len(set(tokens)) > 2
        for name in taken[0][0]:
            mean = sum(found[name] * n for found, n, _ in taken) / sum(tokens)
            assert line[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), name
            assert line[f"first/{name}"] == taken[0][0][name]
        for k, name in enumerate(("policy", "critic")):
            mean = np.mean([norm for _, norm in norms[24 * i:][k:24:2]])
            assert line[f"grad_norm/{name}"] == pytest.approx(mean, rel=1e-9)
        ids = [name for three in prompts[4 * i:][:4] for name in three for _ in range(2)]  # two answers each
        assert shown[3 * i:][:3] == [ids[0], ids[8], ids[16]] and len({ids[0], ids[8], ids[16]}) == 3


def test_learning_rates(place, world, tmp_path, monkeypatch):
    """Linear warm-up and half a cosine over six iterations, of which the policy's begin after the two that
    train only the critic: as logged, and as every step was taken; Adam's ε is 1e-5."""
    made, rates = recorded(monkeypatch, ppo, "adam"), {"policy": [], "critic": []}
    step = torch.optim.AdamW.step

    def watched(optimizer):
        kind = "policy" if optimizer is made[0][1] else "critic"
        lr, = {group["lr"] for group in optimizer.param_groups}
        rates[kind].append(lr)
        assert all(group["eps"] == 1e-5 for group in optimizer.param_groups)
        return step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    inside("ppo", *files(place), *SMALL, "--batch_size", 10, "--max_new_tokens", 2, "--ppo_epochs", 1,
           "--max_steps", 6, "--critic_warmup", 2, "--warmup", 2, "--critic_lr", "5e-3", "--out",
           tmp_path / "out")
    lines = tiny.log(tmp_path / "out")
    policy = [1e-3 * factor for factor in (1 / 3, 1 / 3, 1 / 3, 2 / 3, 1, 1 / 2)]
    critic = [5e-3 * factor for factor in (1 / 3, 2 / 3, 1, 0.5 + 0.125**0.5, 1 / 2, 0.5 - 0.125**0.5)]
    assert [line["lr"] for line in lines] == pytest.approx(policy)
    assert [line["critic_lr"] for line in lines] == pytest.approx(critic)
    assert rates["policy"] == pytest.approx(policy[2:]) and rates["critic"] == pytest.approx(critic)


def test_critic_from_the_policy(place, world, tmp_path, monkeypatch):
    """--critic policy: V = 0 at first, so the first loss is half the mean of the squared returns."""
    seen = watch(monkeypatch)
    *_, critic = inside("ppo", *files(place, "rewards.py:red"), *SMALL, "--critic", "policy", "--batch_size",
                        10, "--out", tmp_path / "out")
    assert not any(old.values.any() for _, old, *_ in seen)
    squares = sum(float(targets.returns.square().sum()) for _, _, targets, _ in seen)
    squares /= sum(int(old.token_mask.sum()) for _, old, *_ in seen)
    assert squares > 0
    assert tiny.log(tmp_path / "out")[0]["first/loss/value"] == pytest.approx(squares / 2, rel=1e-5)
    assert critic.score.weight.full_tensor().any()


def test_a_function_scores_the_texts(place, world, tmp_path, monkeypatch):
    """FILE.py:FUNCTION gets a record and its answers' texts; the score is logged as it is."""
    seen = watch(monkeypatch)
    inside("ppo", *files(place, "rewards.py:red"), *SMALL, "--critic", "policy", "--missing_eos_score", -3,
           "--samples_per_prompt", 8, "--seed", 2, "--out", tmp_path / "out")
    args = tiny.arguments("ppo", *files(place), *SMALL)
    processor = fsdp.open_checkpoint(args, world).processor
    ids = [answer for rollout, *_ in seen for example in rollout.examples for answer in example.answers]
    scores = [processor.text(answer).split().count("red") if int(answer[-1]) in processor.stop else -3.0
              for answer in ids]
    assert torch.cat([score for *_, score in seen]).tolist() == scores and max(scores) > 0 > min(scores)
    line = tiny.log(tmp_path / "out")[0]
    assert line["objective/scores"] == pytest.approx(np.mean(scores), rel=1e-6)
    assert line["answer/no_eos"] == scores.count(-3.0) / len(scores)
    assert line["answer/length"] == pytest.approx(np.mean([len(answer) for answer in ids]))


BANDIT = ["--batch_size", 10, "--rollout_batch", 10, "--micro_batch", 10, "--samples_per_prompt", 6,
          "--max_new_tokens", 8, "--ppo_epochs", 3, "--lr", "4e-3", "--critic_lr", "4e-3",
          "--missing_eos_score", 0, "--critic", "policy", "--max_steps", 10]


def test_a_user_drives_a_word_up(place, world, tmp_path):
    """python ppo.py with a function that counts one word: its count rises, from hardly ever to every other
    answer, and with it the KL; a hundred times the --kl_coef keeps the KL lower."""
    out = tmp_path / "out"
    done = tiny.command("ppo", *files(place, "rewards.py:red")[:-2], *BANDIT, "--kl_coef", 0.02, "--out",
                        out, "--eval_data", place / "rows.json", "--save_rollouts")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err
    lines = tiny.log(out)
    assert lines[0]["objective/scores"] < 0.1 and lines[0]["objective/kl"] == 0
    assert np.mean([line["objective/scores"] for line in lines[-3:]]) > 0.4
    assert lines[-1]["objective/kl"] > 1 and lines[-1]["eval_objective/scores"] > 0.3
    assert done.out.count("'score': ") == 3 and f"wrote {out}" in done.out and "10/10" in done.out
    assert (out / "model.safetensors").exists()
    total = lines[-1]["objective/scores"] - 0.02 * lines[-1]["objective/kl"]
    assert lines[-1]["objective/rlhf_reward"] == pytest.approx(total, rel=1e-5)
    for line in lines:  # what was sampled is what was logged
        records = (out / "rollouts" / f"{line['step']}.jsonl").read_text().splitlines()
        records = [json.loads(record) for record in records]
        ids = sorted(record["id"] for record in ONE_TURN for _ in range(6))
        assert sorted(answer["id"] for answer in records) == ids
        assert all(answer["score"] in (0, answer["answer"].split().count("red")) for answer in records)
        for name, key in (("kl", "kl"), ("scores", "score"), ("rlhf_reward", "total")):
            mean = np.mean([answer[key] for answer in records])
            assert mean == pytest.approx(line[f"objective/{name}"], rel=1e-4, abs=1e-5)
    inside("ppo", *files(place, "rewards.py:red"), *BANDIT, "--kl_coef", 2, "--out", tmp_path / "held")
    held = tiny.log(tmp_path / "held")
    assert max(line["objective/kl"] for line in held[-3:]) < 0.5 * lines[-1]["objective/kl"]


def test_an_evaluation_changes_nothing(run, place):
    """--eval_data between iterations: log and weights are bit for bit those without; its scores are those of
    keyed samples, the same every time while the policy stays."""
    expected, _ = run(*TWICE)
    out, _ = run(*TWICE, "--eval_data", place / "rows.json", "--eval_every", 1)
    lines = [{k: v for k, v in line.items() if not k.startswith("eval_")} for line in tiny.log(out)]
    assert lines == tiny.log(expected)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert len({line["eval_objective/scores"] for line in tiny.log(out)}) == 2
    still, _ = run(*still_run(place))
    first, second = ({k: v for k, v in line.items() if k.startswith("eval_")} for line in tiny.log(still))
    assert first == second and abs(first["eval_objective/kl"]) < 1e-5
    assert {name.removeprefix("eval_") for name in first} < tiny.log(still)[0].keys()


def still_run(place):
    """Options of two iterations that change nothing, evaluated, with SFT records."""
    return ("--lr", 0, "--max_steps", 2, "--eval_data", place / "rows.json", "--eval_every", 1, "--ptx_data",
            place / "turns.json")


def test_critic_warmup(place, world, tmp_path, monkeypatch):
    """--critic_warmup: in these iterations the policy is not run for a loss and stays bit for bit, and the
    critic moves; then both. Records of --ptx_data are read from the first on."""
    seen, look = [], ppo.logprobs_and_values

    def watched(rollout, policy, reference, critic, args):
        seen.append((tiny.state(policy), tiny.state(critic)))
        return look(rollout, policy, reference, critic, args)
    asked, loader = [], data.Loader

    def recorded(steps, first, last, workers):
        asked.append(first)
        return loader(steps, first, last, workers)
    monkeypatch.setattr(ppo, "logprobs_and_values", watched)
    monkeypatch.setattr(data, "Loader", recorded)
    inside("ppo", *files(place), *SMALL, "--batch_size", 10, "--micro_batch", 10, "--critic_warmup", 1,
           "--max_steps", 2, "--out", tmp_path / "out", "--ptx_data", place / "turns.json")
    (policy, critic), (policy_then, critic_then) = seen
    assert all(torch.equal(policy[name], tensor) for name, tensor in policy_then.items())
    moved = {name for name in critic if not torch.equal(critic[name], critic_then[name])}
    assert moved == {name for name in critic if name.startswith(CRITIC)}
    first, second = tiny.log(tmp_path / "out")
    assert "grad_norm/policy" not in first and first["grad_norm/critic"] > 0 < second["grad_norm/policy"]
    assert not any(name.startswith(("policy/", "loss/policy", "loss/ptx")) for name in first)
    assert 1e-10 < second["policy/approxkl"]
    assert asked == [0, 0] and "loss/ptx" in second  # of prompts, and of --ptx_data in the second iteration
    export = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in export if not torch.equal(export[name], policy[name])} == {
        name for name in export if name.startswith(PARTS)}


def adapted(model):
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, network.LoRA)}


def test_lora(run, place, world):
    """--lora_rank: no second model is built as the reference; the KL starts at 0; the base stays bit for
    bit; the export has the adapters merged, and transformers reads it."""
    out, (policy, reward, critic) = run("--lora_rank", 4, "--max_steps", 2, "--lr", "1e-2")
    first, second = tiny.log(out)
    assert abs(first["objective/kl"]) < 1e-5 < abs(second["objective/kl"])
    base, weights = load_file(place / "model" / "model.safetensors"), tiny.state(policy)
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.items())
    export, lora = load_file(out / "model.safetensors"), adapted(policy)
    assert {name for name in base if not torch.equal(base[name], export[name])} == lora.keys()
    for name, module in lora.items():
        A, B = (adapter.weight.detach().full_tensor() for adapter in (module.lora_A, module.lora_B))
        close(export[name], base[name] + 16 / 4 * B @ A)
        assert B.any() and module.on
    critic_lora = adapted(critic)
    assert critic_lora.keys() == lora.keys() and not adapted(reward)
    start, after = built(place, world), tiny.state(critic)
    same = {name for name in start if torch.equal(start[name], after[name])}
    assert same == start.keys() - {"score.weight", "score.bias"}
    assert all(module.lora_B.weight.full_tensor().any() for module in critic_lora.values())
    reload(out)


def test_the_reference_under_lora_is_the_base(place, world):
    """Adapters that have moved change the policy's log-probabilities, not the reference's, and are on again
    afterwards."""
    b = prepared(place, world, "--lora_rank", 4)
    rollout, _, start = rolled(b, b.examples[:4])
    with torch.no_grad():
        for i, module in enumerate(adapted(b.policy).values()):
            module.lora_B.weight.copy_(module.lora_B.weight + 0.2 * (-1) ** i)
    moved = old_outputs_of(b, rollout)
    close(start.logprob, start.ref_logprob, 1e-5)
    close(moved.ref_logprob, start.ref_logprob, 1e-5)
    difference = moved.logprob - moved.ref_logprob
    close(moved.kl(), [row[mask].sum() for row, mask in zip(difference, moved.token_mask)], 1e-5)
    assert (moved.logprob - start.logprob).abs().max() > 0.05
    assert all(module.on for module in adapted(b.policy).values())


def test_ptx_gradients_are_sfts(bench, place, world):
    """--ptx_coef times the gradient of sft.py's loss is added to what is there already; the loss is sft.py's,
    over all micro-batches."""
    examples = fsdp.read_examples([str(place / "turns.json")], "turns", bench.processor, bench.args, world)
    batch = data.collate(examples[:5], bench.processor)
    loss = -bench.policy(batch, bench.policy.vision_tower(batch.pixels)).mean()
    (2.5 * loss).backward()
    expected = taken(bench)
    parts = [data.collate(examples[:2], bench.processor), data.collate(examples[2:5], bench.processor)]
    for coefficient in (1, 1.5):
        args = arguments("--ptx_data", "turns.json", "--ptx_coef", coefficient)
        found = ppo.ptx_backward(parts, bench.policy, args, world)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(taken(bench), expected)


def test_ptx_is_mixed_in(run, place, world, tmp_path):
    """loss/ptx is the mean of sft.py's losses on the same records. Where rewards, KL and values are 0, the
    policy moves by these records only; without them it stays."""
    out, _ = run(*still_run(place))
    inside("sft", *files(place)[:2], "--data", place / "turns.json", *files(place)[6:], "--out",
           tmp_path / "sft", "--batch_size", 5, "--micro_batch", 5, "--max_steps", 8, "--lr", 0)
    losses = np.reshape([line["loss"] for line in tiny.log(tmp_path / "sft")], (2, 4))
    assert [line["loss/ptx"] for line in tiny.log(out)] == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    nothing = ("--critic", "policy", "--kl_coef", 0, "--missing_eos_score", 0, "--batch_size", 10)
    base = load_file(place / "model" / "model.safetensors")
    for mixed in ((), ("--ptx_data", place / "turns.json")):
        out, _ = run(*nothing, *mixed, reward="rewards.py:nought")
        export, (line,) = load_file(out / "model.safetensors"), tiny.log(out)
        moved = {name for name in base if not torch.equal(base[name], export[name])}
        assert moved == ({name for name in base if name.startswith(PARTS)} if mixed else set())
        assert line["loss/policy"] == 0 and ("loss/ptx" in line) == bool(mixed)


@pytest.mark.parametrize("ended, scores, message", [
    (0, [1.0, 2.0, 3.0], "but 0 of the first iteration's answers have their end token: raise --max_new"),
    (1, [1.0, 2.0, 3.0], "but 1 of the first iteration's answers have their end token: raise --max_new"),
    (2, [4.0, 4.0, 5.0], "but all complete answers of iteration 1 score 4.0: leave it out")])
def test_scores_that_have_no_scale(ended, scores, message, world):
    """--normalize_scores where no answer of the first iteration ends, or one, or all score the same."""
    rollout = ppo.Rollout([], None, None, None, torch.arange(3) < ended)
    with pytest.raises(ValueError, match=message):
        ppo.fit_score_scale([torch.tensor(scores)], [rollout], world)


def test_a_reward_function_with_a_dataclass(tmp_path):
    """dataclasses looks annotations that are strings up in the module, by its name: it has to be known."""
    (tmp_path / "typed.py").write_text("""from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Rule:
    word: str

def count(row, texts):
    return [text.count(Rule("red").word) for text in texts]
""")
    assert ppo.load_function(f"{tmp_path}/typed.py:count")({}, ["red, red", "no"]) == [2, 0]


def test_a_prompt_that_comes_twice_is_answered_anew(place, world, tmp_path, monkeypatch):
    """A rollout batch that is larger than the data has prompts twice; their answers are other samples."""
    seen = watch(monkeypatch)
    inside("ppo", *files(place), *SMALL, "--batch_size", 10, "--rollout_batch", 20, "--ppo_epochs", 1,
           "--out", tmp_path / "out")
    found = {}
    for example in (example for rollout, *_ in seen for example in rollout.examples):
        found.setdefault(example.index, []).append([ids.tolist() for ids in example.answers])
    assert all(len(twice) == 2 for twice in found.values()) and len(found) == 10
    assert any(first != second for first, second in found.values())


def test_a_reward_function_gets_its_record_of_any_file(place, world, monkeypatch):
    """Of several files: the record of the prompt's index."""
    args = tiny.arguments("ppo", *files(place), "--data", place / "rows.json", place / "turns.json")
    processor = fsdp.open_checkpoint(args, world).processor
    prompts = ppo.read_prompts(args.data, processor, None, args, world)
    assert [prompts.records[e.index] for e in prompts.examples] == tiny.ONE_TURN + tiny.MIXED


def test_the_reference_keeps_its_projector_under_lora(place, world, tmp_path, monkeypatch):
    """--lora_rank --train projector,llm: the reference of the second iteration is that of the first."""
    seen, look = [], ppo.logprobs_and_values

    def watched(rollout, policy, reference, critic, args):
        seen.append(tiny.state(reference or policy)["multi_modal_projector.linear_1.weight"])
        return look(rollout, policy, reference, critic, args)
    monkeypatch.setattr(ppo, "logprobs_and_values", watched)
    inside("ppo", *files(place), *SMALL, "--batch_size", 10, "--micro_batch", 10, "--ppo_epochs", 1,
           "--max_steps", 2, "--lora_rank", 4, "--train", "projector,llm", "--out", tmp_path / "out")
    assert torch.equal(seen[0], seen[1])


def test_a_critic_rate_of_zero(place, world, tmp_path):
    """--critic_lr 0: the critic stays the reward model."""
    *_, critic = inside("ppo", *files(place), *SMALL, "--batch_size", 10, "--ppo_epochs", 1, "--critic_lr", 0,
                        "--out", tmp_path / "out")
    start = built(place, world)
    assert all(torch.equal(start[name], tensor) for name, tensor in tiny.state(critic).items())
