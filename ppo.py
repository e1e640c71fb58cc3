r"""Proximal policy optimisation (PPO) of a vision-LLM against a reward model or a function FILE.py:FUNCTION,
and its relatives without a critic, RLOO and GRPO (--advantage).

Four models: the policy π, the reference π_ref (the policy before training, frozen), the scorer (the reward
model, frozen, or a function) and the critic V. Policy and reference start from --model, the critic from
--reward_model, or with --critic policy from --model, where V starts at 0. Each iteration samples answers y
to --rollout_batch prompts x, then takes --ppo_epochs passes over them. A pass takes one optimiser step per
minibatch of --batch_size prompts; a minibatch is one or more micro-batches, one forward pass each.

    reward      r_t = − β (log π_old(y_t) − log π_ref(y_t)) + [t is the last token] · score(x, y)
    advantage   A_t = Σ_l (γ λ)^l δ_{t+l},   δ_t = r_t + γ V_old,t+1 − V_old,t,   return R_t = A_t + V_old,t
    policy      mean over tokens of max(− A_t ρ_t, − A_t clip(ρ_t, 1 ± ε)),   ρ_t = π(y_t) / π_old(y_t)
    critic      mean over tokens of ½ max((V_t − R_t)², (clip(V_t, V_old,t ± ε) − R_t)²)

RLOO and GRPO have no critic. All tokens of an answer have the same advantage, from the K samples of its
prompt (--samples_per_prompt); GRPO's KL is a term of each token's loss, not of the reward:

    rloo        A_i = s_i − mean of the other K − 1,   s_i = score_i − β Σ_t (log π_old(y_t) − log π_ref(y_t))
    grpo        A_i = (score_i − mean) / (std + 1e-4),   loss + β (π_ref / π − log (π_ref / π) − 1)

π_old and V_old are the policy and the critic before the iteration's first step. V_t is read at the position
that predicts token t: it is the value of the prompt and y_1 … y_{t−1}. After an answer's last token the value
is 0, even if --max_new_tokens cut the answer.

PPO: arXiv:1707.06347, Eq. 7. GAE: arXiv:1506.02438, Eq. 16. The reward: arXiv:1909.08593, Eq. 2. The critic
starts from the reward model as in arXiv:2009.01325. These defaults are those of arXiv:2403.17031: γ = 1,
λ = 0.95, clip range ε = 0.2, β = 0.05, four epochs, Adam's epsilon of 1e-5, advantages whitened after R_t is
computed, a score of −1 for answers without their end token. --normalize_scores is the score normalisation of
arXiv:1909.08593, fitted to the complete answers of iteration 1. The clipped value loss is that of ppo2 in
OpenAI Baselines. RLOO: arXiv:2402.14740. GRPO: arXiv:2402.03300, section 4.1. --ptx_data follows InstructGPT,
arXiv:2203.02155, Eq. 2.

Departures from these papers, and other choices:
- The optimiser is AdamW with betas 0.9 and 0.95, and gradients are clipped to a global norm of 1. The critic
  has its own optimiser and learning rate, and its gradients are clipped apart from the policy's.
- Both losses are means over all tokens of a minibatch on all ranks. Whitening is over all tokens of an
  iteration on all ranks. Rewards are not whitened, nor are RLOO's and GRPO's advantages. GRPO's paper takes
  the mean of each answer first, which favours long answers among the wrong ones (arXiv:2503.20783).
- RLOO takes PPO's clipped loss. With one optimiser step per iteration its gradient is REINFORCE's, summed
  over the answers and divided by the number of tokens.
- The prompts of a minibatch stay the same in all epochs of an iteration; the order of minibatches changes.
- The uniform number behind each sampled token depends only on (seed, minibatch, prompt, sample, token index),
  so up to rounding samples do not depend on the number of ranks, --micro_batch or --decode_batch.
- The samples of a prompt follow it in one packed sequence. Samples do not attend to one another, and the
  position ids of each continue the prompt's.
- The learning rates follow a cosine over iterations, not a linear decay. The policy's schedule starts after
  --critic_warmup iterations.
- Prompts that do not fill a minibatch at the end of a data epoch are left out of that epoch.
- The vision tower is frozen. --ptx_data holds SFT records, not pre-training text.
- Ratios and KL use the full softmax, but padding, image and unused ids are never sampled (except a padding id
  that is also an end token).

    python ppo.py                                       # on the shapes data set, after sft.py and rm.py
    torchrun --nproc_per_node=8 ppo.py --model runs/sft-7b --reward_model runs/rm-7b --data prompts.json \
        --images images --out out

Legend: B prompts, K samples per prompt, A = B · K answers, L tokens of the longest answer, N tokens of all
answers, T positions of a packed sequence (a prompt and its K answers), M images or tiles, I features of each,
D width of the vision tower, S edge of a tile in pixels. In a data.Batch, target [N] holds the answer
tokens, logit_position [N] the position that predicts each, answer [N] the answer that each belongs to,
last_token [A] the position of each answer's last token, where a position is an index into the flattened
[B · T]; branch [B, T] is 0 in the prompt, k in its answer k and −1 at padding; token_shape is (A, L). A rank
that has no prompts left in a step gets a micro-batch of padding, as all ranks take part in every pass.
"""
import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import data
import fsdp
from data import UserError
from model import generate, keyed_uniforms

PARTS = {"projector": "multi_modal_projector.", "llm": "language_model."}  # --train → parameter prefix
HELD_OUT = 0  # minibatch number in the sampling key of held-out prompts; training minibatches count from 1
GAMMA = 1.0  # no discount: answers end (arXiv:2403.17031)
SHOW_EVERY = 10  # iterations between printed answers; --save_rollouts writes all of them

# ---- equations: tensors [A, L], one value per answer token; token_mask [A, L] marks the real tokens ----


def kl_reward(logprob, ref_logprob, score, token_mask, beta):
    """r_t = − β (log π_old − log π_ref), plus the score [A] at each answer's last token (Eq. 2,
    arXiv:1909.08593)."""
    is_last = token_mask & ~nn.functional.pad(token_mask, (0, 1))[:, 1:]  # [A, L]: no token to its right
    return (-beta * (logprob - ref_logprob) + is_last * score[:, None]) * token_mask


def gae(rewards, values, token_mask, gamma, lam):
    """→ advantages and returns [A, L] (Eq. 16, arXiv:1506.02438). The value after the last token is 0."""
    values = values * token_mask
    advantages, next_advantage = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(next_advantage)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * token_mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def rloo(totals):
    """Each of a prompt's K totals [B, K] minus the mean of the other K − 1 (arXiv:2402.14740)."""
    K = totals.shape[1]
    return (totals - totals.mean(1, keepdim=True)) * K / (K - 1)


def grpo(scores):
    """Each prompt's K scores [B, K], shifted and scaled to mean 0, deviation 1 (section 4.1.2,
    arXiv:2402.03300)."""
    scores = scores - scores[:, :1]  # makes equal scores exactly 0
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)


def grpo_kl(logprob, ref_logprob, token_mask):
    """Sum over tokens of π_ref / π − log (π_ref / π) − 1: an estimate of KL(π, π_ref) in nats that is never
    negative (Eq. 4, arXiv:2402.03300)."""
    log_ratio = (ref_logprob - logprob) * token_mask
    return (log_ratio.exp() - log_ratio - 1).sum()


def policy_loss(logprob, old_logprob, advantages, token_mask, clip):
    """Sum over tokens of max(− A ρ, − A clip(ρ, 1 ± ε)) (Eq. 7, arXiv:1707.06347)."""
    ratio = (logprob - old_logprob).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return (losses * token_mask).sum()


def value_loss(values, old_values, returns, token_mask, clip):
    """Sum over tokens of ½ max((V − R)², (clip(V, V_old ± ε) − R)²) (ppo2 in OpenAI Baselines)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return (0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * token_mask).sum()


def masked_mean_std(tensors, masks, world):
    """Mean and sample standard deviation (n − 1) of the elements whose mask is True, over all tensors and
    ranks."""
    values = torch.cat([tensor[mask].double() for tensor, mask in zip(tensors, masks)])
    n, total, squares = world.sum(len(values), values.sum(), values.square().sum())
    mean = total / n
    return mean, (max(0.0, squares - n * mean**2) / max(1, n - 1)) ** 0.5


# ---- an iteration: rollouts → scores → log-probabilities and values → advantages → optimizer steps ----
# Each phase before the steps returns one item per micro-batch. All of them stay in device memory until the
# iteration ends, as every epoch reads them: ids, image features and [A, L] tensors. Pixels wait in host
# memory.

class Rollout(NamedTuple):
    """A micro-batch of B prompts with K sampled answers each."""
    examples: list  # B data.Examples with their sampled answers
    batch: data.Batch  # packed sequences [B, T], without pixels
    pixels: torch.Tensor  # [M, 3, S, S] on the CPU, for a scorer or critic with its own vision tower
    features: torch.Tensor  # [M, I, D] from the policy's vision tower
    ended: torch.Tensor  # [A] bool: False where --max_new_tokens cut the answer before its end token


class OldOutputs(NamedTuple):
    """What the models compute for the sampled tokens before any update of the iteration; padding is 0."""
    token_mask: torch.Tensor  # [A, L] bool
    logprob: torch.Tensor  # [A, L] log π_old; None where the update computes it (old_logprob_from_update)
    ref_logprob: torch.Tensor  # [A, L] log π_ref
    values: torch.Tensor  # [A, L] V_old; None without a critic
    critic_features: torch.Tensor  # [M, I, D] from the critic's vision tower; None without a critic

    def kl(self):
        """[A] log π_old(y) − log π_ref(y) in nats per answer: a one-sample estimate of the KL divergence."""
        return (self.logprob - self.ref_logprob).sum(1)


class Estimates(NamedTuple):
    """What the losses of an iteration's updates use; padding of the advantages is 0."""
    advantages: torch.Tensor  # [A, L]; those of GAE are whitened
    returns: torch.Tensor  # [A, L], from GAE's advantages before whitening; None without a critic


class Prompts(NamedTuple):
    """The prompts of data files, as the policy reads them and as the scorer does."""
    examples: list  # data.Examples in the policy's template
    records: list  # the JSON records by Example.index, for a reward function
    scorer_examples: dict  # Example.index → the same prompt in the reward model's template


@dataclasses.dataclass
class RewardFunction:
    """Scores answers by a user's function of (record, texts) → scores."""
    function: object
    processor: data.Processor

    def score(self, rollout, prompts):
        """→ scores [A]"""
        scores = []
        for example in rollout.examples:
            texts = [self.processor.text(ids) for ids in example.answers]
            values = list(self.function(prompts.records[example.index], texts))
            numbers = all(isinstance(v, (int, float, np.number)) and np.isfinite(v) for v in values)
            if len(values) != len(texts) or not numbers:
                raise UserError(f"{example.name}: --reward_model's function gave {len(values)} scores for "
                                f"{len(texts)} answers, need a finite number each: {values}")
            scores += values
        return torch.tensor(scores, dtype=torch.float32, device=rollout.features.device)


@dataclasses.dataclass
class RewardModel:
    """Scores answers by a model with a scalar head. It reads the prompt in its own template and the answers'
    ids as they were sampled."""
    model: nn.Module
    processor: data.Processor
    same_images: bool  # it reads images in the policy's size and mode: rollout.pixels serve
    shared_tower: bool  # its vision tower is the policy's: rollout.features serve

    @torch.no_grad()
    def score(self, rollout, prompts):
        """→ scores [A], read at each answer's last token"""
        examples = [dataclasses.replace(prompts.scorer_examples[example.index], answers=example.answers,
                                        token_masks=example.token_masks) for example in rollout.examples]
        batch = data.collate(examples, self.processor, rollout.pixels if self.same_images else None)
        batch = batch.to(rollout.features.device)
        features = rollout.features if self.shared_tower else self.model.vision_tower(batch.pixels)
        return self.model.scores(batch, features, batch.last_token)


def generate_rollouts(policy, steps, first, count, batches, processor, args, world, stop, held_out=False):
    """Samples answers to the prompts of minibatches first … first + count − 1 of `steps` → Rollouts, one per
    micro-batch; [] once SIGTERM stops it on any rank. batches: an iterator, whose next item is the list of
    the next minibatch's micro-batches. With --rollout gathered each rank holds the full weights and decodes
    at its own pace, so it must not wait for other ranks: stop.heard is SIGTERM on this rank, stop.asked on
    any."""
    sharded = args.rollout == "sharded"
    model = policy if sharded else fsdp.unsharded(policy, args, world)

    def any_running(running):  # whether to decode another token
        if sharded:  # all ranks take the same steps
            return not stop.asked(world) and world.any(running)
        return not stop.heard and running.any()
    prompt_batches = ((batch, [steps.examples[i] for i in indices], HELD_OUT if held_out else step + 1)
                      for step in range(first, first + count)
                      for batch, indices in zip(next(batches), steps.groups(step)))
    # Decoding reads all weights once per token, for however many prompts: micro-batches are decoded together.
    prompts_at_once = args.decode_batch or -(-args.rollout_batch // world.size)
    rollouts, batches_at_once = [], max(1, prompts_at_once // args.micro_batch)
    groups = iter(lambda: [*itertools.islice(prompt_batches, batches_at_once)], [])
    batch_count = sum(len(steps.groups(step)) for step in range(first, first + count))
    for group in data.progress(groups, "groups of prompts answered", -(-batch_count // batches_at_once)):
        rollouts += sample_answers(model, group, processor, args, world, any_running)
        if (stop.asked(world) if sharded else stop.heard):
            break
    return [] if stop.asked(world) else rollouts


@torch.no_grad()
def sample_answers(model, group, processor, args, world, any_running=torch.any):
    """Samples K answers per prompt. group: per micro-batch its Batch of prompts, their examples and its
    minibatch's number → Rollouts, one per micro-batch. The draws do not depend on the grouping."""
    K, max_new_tokens = args.samples_per_prompt, args.max_new_tokens
    batches = [batch.to(world.device) for batch, *_ in group]
    features = [model.vision_tower(batch.pixels) for batch in batches]
    # [prompts, K, max_new_tokens]. A micro-batch of padding has one sequence; its samples are dropped below.
    uniforms = torch.cat([
        keyed_uniforms(args.seed, number, [example.index for example in examples] or [0], K, max_new_tokens)
        for _, examples, number in group])
    # K lists of ids per prompt, end token included. generate's log-probabilities are dropped:
    # logprobs_and_values computes log π_old by the update's own forward pass, so that the first ratio is 1.
    all_answers, _ = generate(
        model, data.join_prompts(batches, processor.tile_tokens), torch.cat(features), max_new_tokens,
        processor.end_ids, processor.banned, uniforms, K, args.temperature, any_running=any_running,
        cuda_graph=args.rollout == "gathered")
    rollouts, answers = [], iter(all_answers)
    for (batch, examples, _), image_features in zip(group, features):
        samples = [[np.array(ids, dtype=np.int32) for ids in next(answers)] for _ in batch.ids]
        examples = [
            dataclasses.replace(example, answers=own, token_masks=[np.ones(len(ids), bool) for ids in own])
            for example, own in zip(examples, samples)]
        # batch.pixels spares collate reading the images again. pixels=None: the features are computed already
        packed = dataclasses.replace(data.collate(examples, processor, batch.pixels), pixels=None)
        ended = [int(ids[-1]) in processor.end_ids for example in examples for ids in example.answers]
        ended = torch.tensor(ended, dtype=torch.bool, device=world.device)
        rollouts.append(Rollout(examples, packed.to(world.device), batch.pixels, image_features, ended))
    return rollouts


def fit_score_scale(scores, rollouts, world):
    """→ mean and standard deviation of the scores of all answers that have their end token."""
    ended, = world.sum(sum(int(rollout.ended.sum()) for rollout in rollouts))
    if ended < 2:
        raise UserError(f"got --normalize_scores, but {ended:.0f} of the first iteration's answers have "
                        "their end token: raise --max_new_tokens")
    mean, std = masked_mean_std(scores, [rollout.ended for rollout in rollouts], world)
    if std < 1e-6:
        raise UserError(f"got --normalize_scores, but all complete answers of iteration 1 score {mean}: "
                        "leave it out")
    return mean, std


@torch.no_grad()
def rescale_head(head, mean, std):
    """Makes a scalar head predict (score − μ) / σ: w / σ and (b − μ) / σ. A critic that starts from the
    reward model predicts raw scores, but the returns contain normalised ones."""
    head.weight /= std
    head.bias.copy_((head.bias - mean) / std)


def postprocess_scores(scores, rollouts, score_mean_std, args):
    """→ scores [A] per rollout: (score − mean) / std, with mean 0 and std 1 unless --normalize_scores; an
    answer without its end token gets --missing_eos_score instead."""
    mean, std = score_mean_std.tolist()
    return [torch.where(rollout.ended, (score - mean) / std, args.missing_eos_score)
            for rollout, score in zip(rollouts, scores)]


def old_logprob_from_update(args):
    """Whether log π_old is left to the update: in GRPO with one optimiser step per iteration, where π is
    still π_old. (PPO's rewards and RLOO's advantages contain log π_old.)"""
    return args.advantage == "grpo" and args.ppo_epochs == 1 and args.rollout_batch == args.batch_size


@torch.no_grad()
def logprobs_and_values(rollout, policy, reference, critic, args, with_policy=True):
    """→ OldOutputs of the sampled tokens. The forward passes are those of the update, with the same padding,
    so that the first ratio is 1. reference None: the policy without its adapters. critic None: no values.
    with_policy False: no log π_old."""
    batch, features, logprob = rollout.batch, rollout.features, None
    if with_policy:
        logprob = policy(batch, features, args.temperature)  # log π of each answer token [N]
        logprob, _ = data.pad_by_sequence(logprob, batch.answer, batch.token_shape)  # [A, L]
    policy.set_adapters(False)  # if reference is None, π_ref is the policy without its adapters
    ref_logprob = (reference or policy)(batch, features, args.temperature)
    ref_logprob, token_mask = data.pad_by_sequence(ref_logprob, batch.answer, batch.token_shape)
    policy.set_adapters(True)
    if critic is None:
        return OldOutputs(token_mask, logprob, ref_logprob, None, None)
    if critic.vision_tower is not policy.vision_tower:
        features = critic.vision_tower(rollout.pixels.to(features.device))
    values = critic.scores(batch, features, batch.logit_position)  # [N]
    values, _ = data.pad_by_sequence(values, batch.answer, batch.token_shape)
    return OldOutputs(token_mask, logprob, ref_logprob, values, features)


def group_advantages(old_outputs, scores, args):
    """RLOO's or GRPO's advantages → Estimates per rollout."""
    K, estimates = args.samples_per_prompt, []
    for old, score in zip(old_outputs, scores):  # score [A]: the K samples of a prompt are neighbours
        if args.advantage == "rloo":
            advantages = rloo((score - args.kl_coef * old.kl()).view(-1, K))  # [B, K]
        else:
            advantages = grpo(score.view(-1, K))
        estimates.append(Estimates(advantages.view(-1, 1) * old.token_mask, None))
    return estimates


def compute_advantages(old_outputs, scores, args, world):
    """KL rewards, GAE, and whitening over all tokens of the iteration → Estimates per rollout. (RLOO and
    GRPO: group_advantages.)"""
    if args.advantage != "gae":
        return group_advantages(old_outputs, scores, args)
    masks = [old.token_mask for old in old_outputs]
    rewards = [kl_reward(old.logprob, old.ref_logprob, score, old.token_mask, args.kl_coef)
               for old, score in zip(old_outputs, scores)]
    raw = [gae(reward, old.values, old.token_mask, GAMMA, args.lam)
           for reward, old in zip(rewards, old_outputs)]
    mean, std = masked_mean_std([advantages for advantages, _ in raw], masks, world)
    return [Estimates((advantages - mean) / (std + 1e-8) * mask, returns)
            for (advantages, returns), mask in zip(raw, masks)]


def policy_backward(rollout, old, estimates, policy, count, args):
    """Backward pass of a micro-batch's policy loss / count; count: the minibatch's tokens on all ranks.
    → log π [A, L], and metrics: tensors whose sums, divided by count, are means per token.

    policy/entropy is exact (nats, full softmax). policy/approxkl is ½ (log ρ)² at the sampled token, an
    estimate in nats of KL(π_old, π). policy/clipfrac is the share of ratios outside 1 ± ε, even where the
    loss takes the other term."""
    batch = rollout.batch
    logprob, entropy = policy(batch, rollout.features, args.temperature, entropy=True)  # [N] each
    logprob, mask = data.pad_by_sequence(logprob, batch.answer, batch.token_shape)  # [A, L]
    old_logprob = logprob.detach() if old.logprob is None else old.logprob
    loss = policy_loss(logprob, old_logprob, estimates.advantages, mask, args.clip_range)
    if args.advantage == "grpo":
        loss = loss + args.kl_coef * grpo_kl(logprob, old.ref_logprob, mask)
    (loss / count).backward()
    log_ratio = (logprob.detach() - old_logprob) * mask  # [A, L]
    ratio = log_ratio.exp()
    return logprob.detach(), {
        "loss/policy": loss, "policy/approxkl": 0.5 * log_ratio.square(), "policy/ratio": ratio * mask,
        "policy/clipfrac": (ratio - 1).abs() > args.clip_range, "policy/entropy": entropy}


def critic_backward(rollout, old, estimates, critic, count, args):
    """Backward pass of a micro-batch's value loss / count → metrics, as in policy_backward. val/clipfrac is
    the share of values outside V_old ± ε, even where the loss takes the other term."""
    values = critic.scores(rollout.batch, old.critic_features, rollout.batch.logit_position)  # [N]
    values, mask = data.pad_by_sequence(values, rollout.batch.answer, rollout.batch.token_shape)  # [A, L]
    loss = value_loss(values, old.values, estimates.returns, mask, args.clip_range)
    (loss / count).backward()
    change = (values.detach() - old.values).abs() * mask  # [A, L]
    return {"loss/value": loss, "val/clipfrac": change > args.clip_range}


def minibatch_backward(minibatch, policy, critic, args, world):
    """Backward passes of a minibatch: a list of (Rollout, OldOutputs, Estimates). A model that is None is not
    trained. → metrics, means over the minibatch's tokens on all ranks, the number of these tokens, and log π
    [A, L] per micro-batch. FSDP sums gradients over ranks."""
    count, = world.sum(sum(len(rollout.batch.target) for rollout, *_ in minibatch))
    sums, logprobs = {}, []
    for micro_batch in minibatch:
        logprob, metrics = policy_backward(*micro_batch, policy, count, args) if policy else (None, {})
        metrics |= critic_backward(*micro_batch, critic, count, args) if critic else {}
        logprobs.append(logprob)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.detach().sum() / count
    return dict(zip(sums, world.sum(*sums.values()))), count, logprobs


def ptx_backward(micro_batches, policy, args, world):
    """Backward passes of sft.py's loss on one step's records of --ptx_data, times --ptx_coef (Eq. 2,
    arXiv:2203.02155) → the loss, nats per token"""
    count, = world.sum(sum(len(batch.target) for batch in micro_batches))
    total = 0.0
    for batch in micro_batches:
        batch = batch.to(world.device)
        loss = -policy(batch, policy.vision_tower(batch.pixels)).sum() / count
        (args.ptx_coef * loss).backward()
        total += loss.detach()
    return world.sum(total)[0]


def ppo_step(minibatch, ptx_micro_batches, models, optimizers, iteration, args, world):
    """One step of each optimiser → {name: mean over tokens}, the number of tokens, {name: number} per step
    (gradient norms, loss/ptx), and log π before the step."""
    policy, critic = (models[name] if name in optimizers else None for name in ("policy", "critic"))
    metrics, count, logprobs = minibatch_backward(minibatch, policy, critic, args, world)
    per_step = {}
    if ptx_micro_batches:
        per_step["loss/ptx"] = ptx_backward(ptx_micro_batches, policy, args, world)
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        per_step[f"grad_norm/{name}"] = fsdp.clip_gradients(parameters)
    fsdp.check_finite(args, iteration, **metrics, **per_step)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return metrics, count, per_step, logprobs


# ---- what is logged ----

def update_metrics(results):
    """Results of ppo_step → means over the iteration's steps, and first/* of its first step alone. In the
    first step π is still π_old: a ratio other than 1 or an approxkl other than 0 reveals a bug
    (with old_logprob_from_update they are 1 and 0 by construction)."""
    metrics, tokens, per_step, _ = zip(*results)
    means = {name: np.average([step[name] for step in metrics], weights=tokens) for name in metrics[0]}
    means |= {f"first/{name}": value for name, value in metrics[0].items()}
    return means | {name: np.mean([step[name] for step in per_step]) for name in per_step[0]}


def rollout_metrics(rollouts, scores, old_outputs, beta, world):
    """→ means per answer. objective/kl, of KL(π_old, π_ref), and objective/entropy are one-sample estimates
    in nats per answer; scores are those of postprocess_scores; non_score_reward is − β kl. answer/length is
    in tokens; answer/no_eos is the share of answers that --max_new_tokens cut."""
    sums = torch.zeros(6, device=world.device)
    for rollout, score, old in zip(rollouts, scores, old_outputs):
        sums += torch.stack([values.sum() for values in (
            old.kl(), -old.logprob, score, -beta * old.kl(), old.token_mask, ~rollout.ended)])
    *sums, count = world.sum(*sums, sum(map(len, scores)))
    kl, entropy, score, non_score_reward, length, no_eos = (total / count for total in sums)
    return {"objective/kl": kl, "objective/entropy": entropy, "objective/scores": score,
            "objective/non_score_reward": non_score_reward, "objective/rlhf_reward": score + non_score_reward,
            "answer/length": length, "answer/no_eos": no_eos}


def explained_variance(old_outputs, estimates, world):
    """1 − Var(R − V_old) / Var(R) over all tokens: 1 is a perfect critic, 0 one that is no better than a
    constant."""
    masks = [old.token_mask for old in old_outputs]
    errors = [estimate.returns - old.values for estimate, old in zip(estimates, old_outputs)]
    _, error_std = masked_mean_std(errors, masks, world)
    _, return_std = masked_mean_std([estimate.returns for estimate in estimates], masks, world)
    return 1 - error_std**2 / max(return_std**2, 1e-12)


def frac_equal_scores(scores, K, world):
    """Share of prompts whose K samples all have the same score: GRPO's advantages are 0 there."""
    groups = torch.cat(scores).view(-1, K)
    equal, count = world.sum((groups.amax(1) == groups.amin(1)).sum(), len(groups))
    return equal / count


def rollout_records(rollouts, scores, old_outputs, processor, beta):
    """One record per answer: {"id", "answer", "score", "kl", "total"}, where total is score − β kl."""
    records = []
    for rollout, score, old in zip(rollouts, scores, old_outputs):
        answers = [(e.id, processor.text(ids)) for e in rollout.examples for ids in e.answers]
        records += [{"id": id_, "answer": text, "score": s, "kl": kl, "total": s - beta * kl}
                    for (id_, text), s, kl in zip(answers, score.tolist(), old.kl().tolist())]
    return records


def save_rollouts(records, iteration, args, world):
    """Writes the records of all ranks to OUT/rollouts/ITERATION.jsonl."""
    records = sorted(sum(world.gather(records), []), key=lambda record: record["id"])
    text = "".join(json.dumps(record) + "\n" for record in records)
    world.on_rank0(fsdp.write_text, os.path.join(args.out, "rollouts", f"{iteration}.jsonl"), text)


def evaluate_rollouts(policy, reference, scorer, prompts, steps, processor, score_mean_std, args, world,
                      stop):
    """Samples and scores answers to the held-out prompts → rollout_metrics as eval_…; {} once SIGTERM stops
    it."""
    batches = iter(data.Loader(steps, 0, len(steps), args.workers))
    rollouts = generate_rollouts(policy, steps, 0, len(steps), batches, processor, args, world, stop,
                                 held_out=True)
    scores, old_outputs = [], []
    for rollout in stop.until(rollouts, world):
        scores.append(scorer.score(rollout, prompts))
        old_outputs.append(logprobs_and_values(rollout, policy, reference, None, args))
    fsdp.reshard(*[model for model in (policy, reference, getattr(scorer, "model", None)) if model])
    if stop.asked(world):
        return {}
    scores = postprocess_scores(scores, rollouts, score_mean_std, args)
    metrics = rollout_metrics(rollouts, scores, old_outputs, args.kl_coef, world)
    return {f"eval_{name}": value for name, value in metrics.items()}


# ---- the script ----

def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    fsdp.arguments(parser)
    parser.set_defaults(lr=1e-6, save_every=10, eval_every=10)
    add = parser.add_argument_group("PPO (--max_steps, --warmup, --save_every and --eval_every count "
                                    "iterations; --batch_size: prompts per minibatch)").add_argument
    add("--train", type=lambda text: fsdp.train_parts(text, PARTS),
        help="projector, llm or both (default: projector,llm; with --lora_rank on a --model: llm)")
    add("--reward_model", help="output folder of rm.py, or FILE.py:FUNCTION of (record, texts) → scores")
    add("--advantage", choices=["gae", "rloo", "grpo"], default="gae",
        help="gae: PPO, with a critic; rloo, grpo: from the samples of a prompt, without a critic")
    add("--critic", choices=["reward", "policy"], default="reward",
        help="weights that the critic starts from (policy: with a scalar head of zeros, so V = 0)")
    add("--rollout_batch", type=fsdp.positive_int, default=512, help="prompts per iteration, over all ranks")
    add("--samples_per_prompt", type=fsdp.positive_int, default=1, help="answers sampled per prompt")
    add("--max_new_tokens", type=fsdp.positive_int, default=256,
        help="most tokens per answer; --max_len limits the prompt alone")
    add("--temperature", type=fsdp.positive, default=1.0,
        help="of sampling and of all log-probabilities but those of --ptx_data")
    add("--decode_batch", type=fsdp.non_negative_int, default=0,
        help="prompts that a rank decodes together, in full micro-batches (0: all of an iteration); more is "
        "faster and takes more memory: a 7B's cache has 0.5 MB per token")
    add("--rollout", choices=["gathered", "sharded"], default="gathered",
        help="full weights on every rank while decoding, or sharded ones: less memory, slower")
    add("--missing_eos_score", type=fsdp.finite, default=-1.0,
        help="score of an answer without its end token, in place of the scorer's; never normalised")
    add("--normalize_scores", action="store_true",
        help="shift and scale scores so that iteration 1's complete answers have mean 0, deviation 1")
    add("--kl_coef", type=fsdp.non_negative, default=0.05,
        help="β: reward lost per nat of KL (grpo: weight of the KL term)")
    add("--lam", type=fsdp.fraction, default=0.95, help="λ of GAE")
    add("--ppo_epochs", type=fsdp.positive_int, default=4, help="passes over an iteration's answers")
    add("--clip_range", type=fsdp.positive, default=0.2, help="ε of ratios and values")
    add("--ptx_data", nargs="+", help="files of SFT records, whose loss is added to the policy's")
    add("--ptx_coef", type=fsdp.non_negative, default=1.0, help="weight of the SFT loss per token")
    add("--critic_lr", type=fsdp.non_negative,
        help="the critic's peak rate, often 5 to 10 times --lr (default: --lr)")
    add("--critic_warmup", type=fsdp.non_negative_int, default=0,
        help="number of first iterations that train the critic alone")
    add("--save_rollouts", action="store_true", help="write sampled answers to OUT/rollouts/ITERATION.jsonl")
    # without --data: the shapes data set, with these defaults and the models that sft.py and rm.py left
    args = fsdp.parse(parser, data_file="prompts.json", shapes=dict(
        eval_data=[os.path.join(fsdp.SHAPES_DIR, "test.json")], batch_size=128, micro_batch=128,
        rollout_batch=128, max_steps=40, max_new_tokens=28, lr=2e-4, critic_lr=3e-4, ppo_epochs=2,
        critic_warmup=2, missing_eos_score=-3.0, normalize_scores=True, **fsdp.left_by("sft"),
        **fsdp.left_by("rm", "reward_model")))
    if not args.reward_model:
        parser.error("--reward_model is needed: what rm.py leaves, or FILE.py:FUNCTION")
    if args.rollout_batch % args.batch_size:
        parser.error(f"got --rollout_batch {args.rollout_batch}, need a multiple of --batch_size "
                     f"{args.batch_size}")
    if args.reward_model.endswith(".py"):
        parser.error(f"got --reward_model {args.reward_model}, need FILE.py:FUNCTION")
    if args.advantage != "gae":
        if args.samples_per_prompt < 2:
            parser.error(f"got --advantage {args.advantage} with --samples_per_prompt "
                         f"{args.samples_per_prompt}, need at least 2 samples to compare")
        for option in ("critic", "critic_lr", "critic_warmup", "lam"):
            if getattr(args, option) != parser.get_default(option):
                parser.error(f"got --{option} with --advantage {args.advantage}, which has no critic")
        args.critic_warmup = 0  # on the shapes data set the default is 2
    args.critic_lr = args.lr if args.critic_lr is None else args.critic_lr
    return args


def load_function(name):
    """FILE.py:FUNCTION → the function"""
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"got --reward_model {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location("reward_function", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # as an import does
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"got --reward_model {name}: no function {function} in {path}")
    return getattr(module, function)


def read_prompts(paths, processor, scorer_processor, args, world):
    """Data files → Prompts. scorer_processor None: a reward function scores, which reads the records."""
    if not paths:
        return Prompts([], [], {})
    records, conversations = fsdp.read_conversations(paths, args, world, need_answers=0)
    examples, _ = data.build_examples(conversations, processor, "prompt")
    scorer_examples = {}
    if scorer_processor:
        built, _ = data.build_examples(conversations, scorer_processor, "prompt")
        scorer_examples = {example.index: example for example in built}
        examples = [example for example in examples if example.index in scorer_examples]
    if world.rank == 0 and len(examples) < len(conversations):
        skipped = len(conversations) - len(examples)
        print(f"{', '.join(paths)}: --max_len {args.max_len} leaves out {skipped} prompts", flush=True)
    return Prompts(examples, records, scorer_examples)


def build_models(checkpoint, reward_checkpoint, args, world):
    """→ policy, reference, scorer, critic. reference is None if adapters alone are trained: π_ref is then
    the policy without them. scorer is a RewardModel, or None if a function scores. critic is None for RLOO
    and GRPO. Models with equal frozen vision towers share one."""
    train = args.train.split(",")
    trainable = [PARTS[part] for part in train]
    policy = fsdp.build(checkpoint, args, world, trainable)
    policy.set_recompute(args.recompute)
    reference = scorer = None
    if not args.lora_rank or "projector" in train:
        reference = fsdp.build(checkpoint, args, world)
        reference.vision_tower = policy.vision_tower
    if reward_checkpoint:
        reward_model = fsdp.build(reward_checkpoint, args, world, score=True)
        same_images = checkpoint.processor.pixel_settings == reward_checkpoint.processor.pixel_settings
        shared_tower = same_images and fsdp.share_tower(policy, reward_model, world)
        scorer = RewardModel(reward_model, reward_checkpoint.processor, same_images, shared_tower)
    if args.advantage != "gae":
        return policy, reference, scorer, None
    # The critic reads the policy's sequences and images. Its LM head is not used, so it is not trained.
    trainable = [name.replace("language_model.", "language_model.model.") for name in trainable]
    start = checkpoint if args.critic == "policy" else reward_checkpoint
    critic = fsdp.build(start, args, world, [*trainable, "score."], score=True)
    shared = fsdp.share_tower(policy, critic, world)  # False if the towers differ
    if not shared and scorer:
        fsdp.share_tower(scorer.model, critic, world)
    if args.critic == "policy":
        for parameter in critic.score.parameters():
            nn.init.zeros_(parameter)
    critic.set_recompute(args.recompute)
    return policy, reference, scorer, critic


def adam(model, lr, args):
    """AdamW on a model's trained parameters, with weight decay on matrices only; ε 1e-5
    (arXiv:2403.17031)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix], "weight_decay": decay}
              for matrix, decay in ((True, args.weight_decay), (False, 0.0))]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, eps=1e-5,
                             betas=fsdp.ADAM_BETAS, fused=True)


def learning_rates(iteration, total, args):
    """→ {"policy": rate, "critic": rate}. iteration counts from 1. The policy's schedule starts after
    --critic_warmup iterations."""
    critic_only = args.critic_warmup  # iterations
    policy = fsdp.schedule(max(0, iteration - 1 - critic_only), max(1, total - critic_only), args.warmup)
    return {"policy": args.lr * policy,
            "critic": args.critic_lr * fsdp.schedule(iteration - 1, total, args.warmup)}


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)
    function = load_function(args.reward_model) if ".py:" in args.reward_model else None
    if function and args.advantage == "gae" and args.critic == "reward":
        raise UserError("got a function as --reward_model and --critic reward: give --critic policy")

    # data
    checkpoint, reward_checkpoint = fsdp.open_checkpoint(args, world), None
    processor, scorer_processor = checkpoint.processor, None
    if not function:
        reward_checkpoint = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
        scorer_processor = reward_checkpoint.processor
        sizes = [(p.size, p.tile_tokens, p.grids) for p in (processor, scorer_processor)]
        if args.advantage == "gae" and args.critic == "reward" and sizes[0] != sizes[1]:
            raise UserError(f"{args.reward_model}: its images have another size or other tiles than the "
                            "policy's, whose sequences the critic reads: give --critic policy")
    prompts = read_prompts(args.data, processor, scorer_processor, args, world)
    eval_prompts = read_prompts(args.eval_data, processor, scorer_processor, args, world)
    ptx_examples = fsdp.read_examples(args.ptx_data, "turns", processor, args, world) if args.ptx_data else []
    batching = (processor, args.batch_size, args.micro_batch, world.rank, world.size, args.seed)
    # steps[k]: this rank's micro-batches of minibatch k; steps.groups(k): the indices of their prompts
    steps = data.Steps(prompts.examples, *batching, drop_last=True)
    ptx_steps = data.Steps(ptx_examples, *batching)
    eval_steps = data.Steps(eval_prompts.examples, *batching, shuffle=False)
    minibatch_count = args.rollout_batch // args.batch_size  # optimizer steps per PPO epoch
    total = args.max_steps or max(1, round(args.epochs * len(steps) / minibatch_count))

    # models and optimizers
    policy, reference, scorer, critic = build_models(checkpoint, reward_checkpoint, args, world)
    scorer = scorer or RewardFunction(function, processor)
    models = [model for model in (policy, reference, critic, getattr(scorer, "model", None)) if model]
    # One optimiser each: the value loss has another scale and usually takes a higher rate.
    optimizers = {"policy": adam(policy, args.lr, args)}
    if critic:
        optimizers["critic"] = adam(critic, args.critic_lr, args)
    # What a checkpoint holds. The scores' mean and standard deviation (--normalize_scores) are those of
    # iteration 1, so they are a buffer, which a resumed run loads.
    trained_models = nn.ModuleDict({"policy": policy, **({"critic": critic} if critic else {})})
    trained_models.register_buffer("score_mean_std", torch.tensor([0.0, 1.0], dtype=torch.float64))
    if function:  # it may read any field of a record: a resumed run must find the same files
        for path in (args.reward_model.rpartition(":")[0], *args.data, *(args.eval_data or [])):
            world.depends_on(f"the file {path}", world.on_rank0(fsdp.file_digest, path))
    fsdp.begin_run(args, world, checkpoint, *([reward_checkpoint] if reward_checkpoint else []))
    done = fsdp.load_checkpoint(args, world, trained_models, *optimizers.values())
    log = fsdp.Log(args, world, total, done, shown=("objective/scores", "objective/kl", "policy/clipfrac",
                                                    "val/explained_variance", "answer/length"))
    stop = fsdp.Stop()
    log.say(f"{len(prompts.examples)} prompts, {total} iterations of {minibatch_count} minibatches of "
            f"{len(steps.groups(0))} micro-batches per rank")
    log.say(fsdp.memory_line(args, *models))

    def save(iteration):
        fsdp.save_checkpoint(args, world, iteration, trained_models, *optimizers.values())

    def evaluate():
        return evaluate_rollouts(policy, reference, scorer, eval_prompts, eval_steps, processor,
                                 trained_models.score_mean_std, args, world, stop)

    def abandon(iteration):  # no update of this iteration was made: the weights are those of the last one
        fsdp.reshard(*models)
        if iteration > 1 and iteration - 1 not in world.on_rank0(fsdp.checkpoint_steps, args.out):
            save(iteration - 1)
        log.say(f"stopped by SIGTERM in iteration {iteration}; --resume starts it again")
        return fsdp.STOPPED

    if eval_prompts.examples and log.owes_evaluation():  # SIGTERM interrupted that of the last iteration
        log.add_evaluation(evaluate())
        if stop.asked(world):
            return fsdp.STOPPED

    # loop. A step of data.Steps is a minibatch of prompts here; each gets --ppo_epochs optimiser steps.
    # SIGTERM during sampling, scoring or the forward passes abandons the iteration, and --resume repeats it;
    # later, its updates are finished and it is saved.
    batches = iter(data.Loader(steps, done * minibatch_count, total * minibatch_count, args.workers))
    for iteration in range(done + 1, total + 1):
        rates, seconds = learning_rates(iteration, total, args), {}
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]

        # prompts [B, prompt length] → packed prompts and answers [B, T], per micro-batch
        first = (iteration - 1) * minibatch_count
        rollouts = generate_rollouts(policy, steps, first, minibatch_count, batches, processor, args, world,
                                     stop)
        if stop.asked(world):
            return abandon(iteration)
        seconds["generate"] = log.seconds()

        # answers → one score each [A]
        to_score = log.progress(rollouts, iteration, "micro-batches scored")
        scores = [scorer.score(rollout, prompts) for rollout in stop.until(to_score, world)]
        if stop.asked(world):
            return abandon(iteration)
        if args.normalize_scores and iteration == 1:
            mean, std = fit_score_scale(scores, rollouts, world)
            trained_models.score_mean_std.copy_(torch.tensor([mean, std], dtype=torch.float64))
            if critic and args.critic == "reward":
                rescale_head(critic.score, mean, std)
        scores = postprocess_scores(scores, rollouts, trained_models.score_mean_std, args)
        fsdp.check_finite(args, iteration, scores=world.sum(sum(score.sum() for score in scores))[0])
        seconds["score"] = log.seconds()

        # sequences → log π_old, log π_ref, V_old [A, L]
        old_outputs = [
            logprobs_and_values(rollout, policy, reference, critic, args, not old_logprob_from_update(args))
            for rollout in stop.until(log.progress(rollouts, iteration, "forward passes"), world)]
        fsdp.reshard(*models)  # frees unsharded weights: no backward follows, which would
        if stop.asked(world):
            return abandon(iteration)
        seconds["forward"] = log.seconds()

        # rewards and values [A, L] → advantages and returns [A, L]
        estimates = compute_advantages(old_outputs, scores, args, world)

        # epochs over fixed minibatches, each epoch in its own order
        train_policy = iteration > args.critic_warmup
        order = [m for epoch in range(args.ppo_epochs)
                 for m in data.keyed_permutation(minibatch_count, args.seed, iteration, epoch)]
        ptx_batches = [None] * len(order)
        if ptx_examples and train_policy:
            start = (iteration - 1 - args.critic_warmup) * len(order)
            ptx_batches = data.Loader(ptx_steps, start, start + len(order), args.workers)
        active = optimizers if train_policy else {"critic": optimizers["critic"]}
        micro_batches = list(zip(rollouts, old_outputs, estimates))
        n = len(micro_batches) // minibatch_count  # micro-batches per minibatch, the same on every rank
        results = []
        for m, ptx_micro_batches in zip(log.progress(order, iteration, "minibatches"), ptx_batches):
            minibatch = micro_batches[m * n:(m + 1) * n]
            results.append(ppo_step(minibatch, ptx_micro_batches, trained_models, active, iteration, args,
                                    world))
        if old_logprob_from_update(args):
            logprobs = results[0][-1]  # log π before the only step is log π_old
            old_outputs = [old._replace(logprob=logprob) for old, logprob in zip(old_outputs, logprobs)]
        seconds["update"] = log.seconds()

        # log, evaluate, save
        line = rollout_metrics(rollouts, scores, old_outputs, args.kl_coef, world) | update_metrics(results)
        line |= {f"seconds/{name}": value for name, value in seconds.items()}
        line["lr"] = rates["policy"] if train_policy else 0.0
        if critic:
            line["critic_lr"] = rates["critic"]
            line["val/explained_variance"] = explained_variance(old_outputs, estimates, world)
        else:
            line["frac_reward_zero_std"] = frac_equal_scores(scores, args.samples_per_prompt, world)
        tokens, = world.sum(sum(int((rollout.batch.branch >= 0).sum()) for rollout in rollouts))
        records = rollout_records(rollouts, scores, old_outputs, processor, args.kl_coef)
        if iteration % SHOW_EVERY == 0:
            log.show(iteration, records[::max(1, len(records) // 3)][:3])
        if args.save_rollouts:
            save_rollouts(records, iteration, args, world)
        ended = iteration == total
        if eval_prompts.examples and (ended or args.eval_every and iteration % args.eval_every == 0):
            line |= evaluate() or fsdp.EVAL_DUE  # a resumed run evaluates first
        log.step(iteration, tokens, sum(seconds.values()), **line)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and iteration % args.save_every == 0:
            save(iteration)
        log.seconds()  # what evaluating and saving took is not part of the next iteration
        if stopped:
            log.say(f"stopped by SIGTERM after iteration {iteration}; --resume goes on from there")
            return fsdp.STOPPED
    fsdp.export(policy, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
