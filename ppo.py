r"""Proximal policy optimisation of a vision-LLM against a learned reward model.

Four models: the policy π and its frozen start π_ref (--model), the reward model and the critic V
(--reward_model). An iteration samples answers y to --rollout_batch prompts x and learns from them for
--ppo_epochs passes, in minibatches of --batch_size prompts (an optimiser step each), in micro-batches (a
forward pass; one Rollout each):

    reward      r_t = − β (log π(y_t) − log π_ref(y_t)) + [t is the last token] · score(x, y)
    advantage   A_t = Σ_l (γ λ)^l δ_{t+l},   δ_t = r_t + γ V_{t+1} − V_t,   return R_t = A_t + V_t
    policy      mean over tokens of max(− A_t ρ_t, − A_t clip(ρ_t, 1 ± ε)),   ρ_t = π(y_t) / π_old(y_t)
    critic      mean over tokens of ½ max((V_t − R_t)², (clip(V_t, V_old,t ± ε) − R_t)²)

PPO, arXiv:1707.06347, Eq. 7; GAE, arXiv:1506.02438, Eq. 16; on language, with the reward above,
arXiv:1909.08593, Eq. 2, and arXiv:2009.01325, whose critic too starts from the reward model. The defaults
γ = 1, λ = 0.95, ε = 0.2, β = 0.05, four epochs and Adam's ε 1e-5, advantages whitened over the iteration
(after R_t is taken) and a fixed score for answers without an end token are those of arXiv:2403.17031, which
reproduces it; its normalised scores are --normalize_scores. Clipped values are OpenAI Baselines'. --ptx_data
is after InstructGPT, arXiv:2203.02155, Eq. 2.

Departures: the critic has an optimiser of its own; a loss is a mean over all tokens of a minibatch and
whitening over those of an iteration, on all ranks; tokens are the inverse CDF of uniforms keyed by (seed,
minibatch, prompt, sample, step); the samples of a prompt share its row; a cosine over iterations, not a line,
and the policy's starts after --critic_warmup; prompts that do not fill a minibatch at an epoch's end wait for
a later one; the vision tower stays frozen; --ptx_data holds SFT rows, not pre-training text; --whiten_rewards
divides and does not centre. ρ and KL are of the whole softmax, while ids that no one may say (padding,
pictures) and what --top_k or --top_p cut are never sampled. policy/clipfrac and val/clipfrac count what lies
outside 1 ± ε and V_old ± ε, whether or not it is clipped.

    python ppo.py                                       # on the shapes world, after sft.py and rm.py
    torchrun --nproc_per_node=8 ppo.py --model runs/sft-7b --reward_model runs/rm-7b --data prompts.json \
        --images pictures --out out

Legend: B rows (prompts) of P tokens, K samples of each, T = prompt and answers, A = B · K answers, L longest
answer, N all answers' tokens.
"""
import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys

import numpy as np
import torch
from torch import nn

import data
import fsdp
from data import UserError
from model import generate, keyed_uniforms

# ---- equations: all tensors [A, L] over the answers' tokens, kept [A, L] says which there are ----


def kl_reward(logprob, ref_logprob, score, kept, beta):
    """r_t = − β (log π − log π_ref), and the score [A] at each answer's last token (Eq. 2,
    arXiv:1909.08593)."""
    last = kept & ~nn.functional.pad(kept, (0, 1))[:, 1:]
    return (-beta * (logprob - ref_logprob) + last * score[:, None]) * kept


def gae(rewards, values, kept, gamma, lam):
    """→ advantages and returns [A, L] (Eq. 16, arXiv:1506.02438); nothing follows an answer's last token."""
    values = values * kept
    advantages, following = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * kept[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def policy_loss(logprob, old_logprob, advantages, kept, clip):
    """Sum over kept tokens of max(− A ρ, − A clip(ρ, 1 ± ε)) (Eq. 7, arXiv:1707.06347)."""
    ratio = (logprob - old_logprob).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return (losses * kept).sum()


def value_loss(values, old_values, returns, kept, clip):
    """Sum over kept tokens of ½ max((V − R)², (clip(V, V_old ± ε) − R)²) (OpenAI Baselines' ppo2)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return (0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * kept).sum()


def masked_mean_std(tensors, kepts, world):
    """Mean and standard deviation (of a sample: n − 1) over the kept elements of all tensors on all ranks."""
    kept = torch.cat([t[k].double() for t, k in zip(tensors, kepts)])
    n, total, squares = world.sum(len(kept), kept.sum(), kept.square().sum())
    mean = total / n
    return mean, (max(0.0, squares - n * mean**2) / max(1, n - 1)) ** 0.5


def adapted_beta(beta, kl, target, horizon, answers):
    """β after an iteration of so many answers whose mean KL was kl (section 2.2, arXiv:1909.08593, with
    answers / horizon for its K_β, as in the code released with it)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / horizon)


# ---- rewards ----

@dataclasses.dataclass
class Judge:
    """What scores whole answers: a reward model, or a function of (row, texts) → scores."""
    function: object = None
    rows: list = None  # of the data files, for the function
    model: object = None
    processor: object = None  # the reward model's own, with its template
    prompts: dict = None  # index of a row → its prompt as the reward model reads it
    same_images: bool = False  # whether it reads images in the policy's size and mode
    shared: bool = False  # whether it sees with the policy's tower

    @torch.no_grad()
    def scores(self, rollout, processor):
        """→ scores [A] of a Rollout's answers, as they were sampled"""
        if self.function:
            texts = [[processor.text(ids) for ids in example.answers] for example in rollout.examples]
            found = [list(self.function(self.rows[e.index], t)) for e, t in zip(rollout.examples, texts)]
            for example, said, scores in zip(rollout.examples, texts, found):
                numbers = all(isinstance(s, (int, float, np.number)) and np.isfinite(s) for s in scores)
                if len(scores) != len(said) or not numbers:
                    raise UserError(f"{example.name}: --reward_model's function gave "
                                     f"{len(scores)} scores for {len(said)} answers, need a finite number "
                                     f"each: {scores}")
            return torch.tensor(sum(found, []), dtype=torch.float32, device=rollout.features.device)
        read = [dataclasses.replace(self.prompts[example.index], answers=example.answers, token_masks=example.token_masks)
                for example in rollout.examples]
        batch = data.collate(read, self.processor, rollout.batch.pixels.cpu() if self.same_images else None)
        batch = batch.to(rollout.features.device)
        features = rollout.features if self.shared else self.model.vision_tower(batch.pixels)
        return self.model.scores(batch, features, batch.last_token)


def load_function(name):
    """FILE.py:FUNCTION → the function"""
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):
        raise UserError(f"got --reward_model {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location("reward_function", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # as an import would leave it
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise UserError(f"got --reward_model {name}: no function {function} in {path}")
    return getattr(module, function)


# ---- one micro-batch's way through an iteration ----

@dataclasses.dataclass
class Rollout:
    """A micro-batch of prompts with their sampled answers, and what is computed of them."""
    examples: list  # B of them, each with its K answers
    batch: data.Batch
    features: torch.Tensor  # the policy's tower
    critic_features: torch.Tensor = None
    kept: torch.Tensor = None  # [A, L] like all that follows
    logprob: torch.Tensor = None
    ref_logprob: torch.Tensor = None
    values: torch.Tensor = None
    kl: torch.Tensor = None  # [A] log π − log π_ref of whole answers
    score: torch.Tensor = None  # [A]
    ended: torch.Tensor = None  # [A] whether the answer has its end token
    rewards: torch.Tensor = None
    advantages: torch.Tensor = None
    returns: torch.Tensor = None


def decoding(policy, args):
    """Around a rollout: whole weights on every rank, which then decodes at its own pace, or sharded ones."""
    return fsdp.unsharded(policy) if args.rollout == "gathered" else contextlib.nullcontext()


def interrupted(stop, world, args):
    """Whether SIGTERM ends a rollout before its next batch. Ranks that decode at their own pace need not
    agree: what is sampled is dropped on all of them."""
    return stop.asked(world) if args.rollout == "sharded" else stop.heard


@torch.no_grad()
def generate_rollout(policy, batch, examples, processor, args, world, minibatch_number):
    """Samples --samples_per_prompt answers of each prompt → Rollout with rows of prompt and answers. The
    draws are keyed by the minibatch's number."""
    batch, K = batch.to(world.device), args.samples_per_prompt
    features = policy.vision_tower(batch.pixels)
    uniforms = None
    if examples:
        uniforms = keyed_uniforms(args.seed, minibatch_number, [e.index for e in examples], K, args.max_new_tokens)
    anyone = world.any if args.rollout == "sharded" else torch.any  # sharded weights: ranks decode in step
    answers, _ = generate(policy, batch, features, args.max_new_tokens, processor.stop, processor.banned, uniforms,
                          K, args.temperature, args.top_k, args.top_p, anyone)
    rows = [dataclasses.replace(example, answers=[np.array(ids, dtype=np.int32) for ids in row],
                                token_masks=[np.ones(len(ids), dtype=bool) for ids in row])
            for example, row in zip(examples, answers)]
    whole = data.collate(rows, processor, batch.pixels.cpu()).to(world.device)
    ended = [int(ids[-1]) in processor.stop for row in rows for ids in row.answers]
    return Rollout(rows, whole, features, ended=torch.tensor(ended, dtype=torch.bool, device=world.device))


@torch.no_grad()
def logprobs_and_values(rollout, policy, reference, critic, args):
    """The sampled tokens' log-probabilities under policy and reference, and their values, by the very forward
    passes that the update will take. reference None: the policy without its adapters."""
    batch, features = rollout.batch, rollout.features
    rollout.logprob, rollout.token_mask = data.pad_by_sequence(policy(batch, features, args.temperature), batch.answer)
    policy.set_adapters(False)
    ref_logprob = (reference or policy)(batch, features, args.temperature)
    policy.set_adapters(True)
    rollout.ref_logprob, _ = data.pad_by_sequence(ref_logprob, batch.answer)
    rollout.kl = (rollout.logprob - rollout.ref_logprob).sum(1)
    shared = critic.vision_tower is policy.vision_tower
    rollout.critic_features = features if shared else critic.vision_tower(batch.pixels)
    rollout.values, _ = data.pad_by_sequence(critic.scores(batch, rollout.critic_features, batch.logit_position), batch.answer)


@torch.no_grad()
def fit_score_scale(training, rollouts, args, world):
    """Fixes the scale of all scores by those of whole answers before training, and brings a critic that was
    the reward model to it."""
    ended, = world.sum(sum(int(r.ended.sum()) for r in rollouts))
    if ended < 2:
        raise UserError(f"got --normalize_scores, but {ended:.0f} of the first iteration's answers have "
                         "their end token: raise --max_new_tokens")
    mean, std = masked_mean_std([r.score for r in rollouts], [r.ended for r in rollouts], world)
    if std < 1e-6:
        raise UserError(f"got --normalize_scores, but whole answers of iteration 1 all score {mean}: "
                         "leave it out")
    training.score_moments.copy_(torch.tensor([mean, std], dtype=torch.float64))
    if args.critic == "reward":
        head = training["critic"].score
        head.weight /= std
        head.bias.copy_((head.bias - mean) / std)


def postprocess_scores(rollouts, score_moments, args):
    """What the judge said, in place: brought to the scale of the first iteration's (--normalize_scores),
    clipped, and a fixed score for an answer without its end token."""
    mean, std = score_moments.tolist()
    for rollout in rollouts:
        score = (rollout.score - mean) / std
        if args.score_clip:
            score = score.clamp(-args.score_clip, args.score_clip)
        rollout.score = torch.where(rollout.ended, score, args.missing_eos_score)


def compute_advantages(rollouts, beta, args, world):
    """KL rewards, GAE and whitened advantages of all of an iteration's rollouts, in place."""
    for r in rollouts:
        r.rewards = kl_reward(r.logprob, r.ref_logprob, r.score, r.token_mask, beta)
    if args.whiten_rewards:
        _, std = masked_mean_std([r.rewards for r in rollouts], [r.token_mask for r in rollouts], world)
        for r in rollouts:
            r.rewards = r.rewards / (std + 1e-8)
    for r in rollouts:
        r.advantages, r.returns = gae(r.rewards, r.values, r.token_mask, args.gamma, args.lam)
    mean, std = masked_mean_std([r.advantages for r in rollouts], [r.token_mask for r in rollouts], world)
    for r in rollouts:
        r.advantages = (r.advantages - mean) / (std + 1e-8) * r.token_mask


def minibatch_gradients(rollouts, policy, critic, args, world):
    """Backward passes of one optimiser step's rollouts. policy None: while the critic learns alone. → its
    figures, means over its tokens, and their number"""
    count, = world.sum(sum(int(r.token_mask.sum()) for r in rollouts))
    sums = {}
    for r in rollouts:
        parts = {}
        if policy:
            logprob, entropy = policy(r.batch, r.features, args.temperature, entropy=True)  # [N] each
            logprob, _ = data.pad_by_sequence(logprob, r.batch.answer)  # [A, L]
            loss = policy_loss(logprob, r.logprob, r.advantages, r.token_mask, args.clip_range)
            ((loss - args.entropy_coef * entropy.sum()) / count).backward()
            change = (logprob.detach() - r.logprob)[r.token_mask]
            ratio = change.exp()
            parts |= {"loss/policy": loss, "policy/approxkl": 0.5 * change.square(),
                      "policy/clipfrac": (ratio - 1).abs() > args.clip_range, "policy/ratio": ratio,
                      "policy/entropy": entropy}
        values = critic.scores(r.batch, r.critic_features, r.batch.logit_position)  # [N]
        values, _ = data.pad_by_sequence(values, r.batch.answer)
        error = value_loss(values, r.values, r.returns, r.token_mask, args.value_clip)
        (error / count).backward()
        moved = (values.detach() - r.values)[r.token_mask].abs()
        parts |= {"loss/value": error, "val/clipfrac": moved > args.value_clip}
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.detach().sum() / count
    return dict(zip(sums, world.sum(*sums.values()))), count


def ptx_gradients(micro_batches, policy, args, world):
    """Backward passes of sft.py's loss on a step's rows of --ptx_data (Eq. 2, arXiv:2203.02155) → the
    loss"""
    count, = world.sum(sum(len(batch.target) for batch in micro_batches))
    total = 0.0
    for batch in micro_batches:
        batch = batch.to(world.device)
        loss = -policy(batch, policy.vision_tower(batch.pixels)).sum() / count
        (args.ptx_coef * loss).backward()
        total += loss.detach()
    return world.sum(total)[0]


@torch.no_grad()
def rollout_metrics(rollouts, beta, world):
    """What the iteration's answers are worth, means over answers, and how much of the returns' variance the
    critic explains."""
    names = ("kl", "entropy", "scores", "non_score_reward", "length", "no_eos")
    sums = torch.zeros(len(names), device=world.device)
    for r in rollouts:
        sums += torch.stack([value.sum() for value in (
            r.kl, -r.logprob, r.score, -beta * r.kl, r.token_mask, ~r.ended)])
    *sums, count = world.sum(*sums, sum(len(r.score) for r in rollouts))
    kl, entropy, scores, non_score, length, no_eos = (value / count for value in sums)
    figures = {"objective/kl": kl, "objective/entropy": entropy, "objective/scores": scores,
               "objective/non_score_reward": non_score, "objective/rlhf_reward": scores + non_score,
               "answer/length": length, "answer/no_eos": no_eos}
    if rollouts[0].returns is not None:
        kepts = [r.token_mask for r in rollouts]
        _, left = masked_mean_std([r.returns - r.values for r in rollouts], kepts, world)
        _, whole = masked_mean_std([r.returns for r in rollouts], kepts, world)
        figures["val/explained_variance"] = 1 - left**2 / max(whole**2, 1e-12)
    return figures


def rollout_records(rollouts, processor, beta):
    """What was sampled, an answer a line: {"id", "answer", "score", "kl", "total"}"""
    lines = []
    for r in rollouts:
        said = [(example.id, processor.text(ids)) for example in r.examples for ids in example.answers]
        for (id_, text), score, kl in zip(said, r.score.tolist(), r.kl.tolist()):
            lines.append({"id": id_, "answer": text, "score": score, "kl": kl, "total": score - beta * kl})
    return lines


def evaluate_rollouts(steps, models, judge, processor, score_moments, beta, args, world, stop):
    """Answers sampled to each held-out prompt, scored: the objectives, as eval_…; {} where SIGTERM cuts it
    short."""
    policy, reference, critic = models
    rollouts = []
    with decoding(policy, args):
        for step, micro_batches in enumerate(data.loader(steps, 0, len(steps), args.workers)):
            for rows, batch in zip(steps.groups(step), micro_batches):
                if interrupted(stop, world, args):
                    continue
                prompts = [steps.examples[i] for i in rows]
                rollouts.append(generate_rollout(policy, batch, prompts, processor, args, world, 0))
    rollouts = [] if stop.asked(world) else rollouts  # a rank that heard of it has fewer
    for rollout in stop.until(rollouts, world):
        rollout.score = judge.scores(rollout, processor)
        logprobs_and_values(rollout, policy, reference, critic, args)
    fsdp.reshard(*[model for model in (*models, judge.model) if model])
    if stop.asked(world):
        return {}
    postprocess_scores(rollouts, score_moments, args)
    figures = rollout_metrics(rollouts, beta, world)
    return {f"eval_{name}": value for name, value in figures.items()}


# ---- the script ----

def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser)
    parser.set_defaults(lr=1e-6, save_every=10, eval_every=10)
    add = parser.add_argument_group("PPO (steps of the options above are iterations)").add_argument
    add("--train", help="projector, llm or both (default: projector,llm; with --lora_rank llm)")
    add("--reward_model", help="what rm.py leaves, or FILE.py:FUNCTION of (row, texts) → scores")
    add("--critic", choices=["reward", "policy"], default="reward", help="what the "
        "critic starts from (policy: with V = 0)")
    add("--rollout_batch", type=int, default=512, help="prompts an iteration, over all ranks")
    add("--samples_per_prompt", type=int, default=1, help="answers sampled of each")
    add("--max_new_tokens", type=int, default=256, help="tokens an answer, at most; not part of --max_len")
    add("--temperature", type=float, default=1.0, help="of sampling, and of all log-probabilities")
    add("--top_k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens up to this mass")
    add("--rollout", choices=["gathered", "sharded"], default="gathered", help="weights while "
        "decoding (sharded: less memory, slower)")
    add("--missing_eos_score", type=float, default=-1.0, help="score of an answer without its end "
        "token, on the scale that --normalize_scores and --score_clip leave")
    add("--normalize_scores", action="store_true", help="scores to mean 0 and deviation 1, as "
        "measured in the first iteration")
    add("--score_clip", type=float, default=0.0, help="largest absolute score (0: no clipping)")
    add("--whiten_rewards", action="store_true", help="divide rewards by their deviation")
    add("--kl_coef", type=float, default=0.05, help="β: reward lost per nat of KL")
    add("--target_kl", type=float, default=0.0, help="KL an answer that β is adapted to (0: β is fixed)")
    add("--kl_horizon", type=float, default=10000, help="answers over which β is adapted")
    add("--gamma", type=float, default=1.0, help="discount")
    add("--lam", type=float, default=0.95, help="GAE's λ")
    add("--ppo_epochs", type=int, default=4, help="passes over an iteration's answers")
    add("--clip_range", type=float, default=0.2, help="ε of the policy's ratio")
    add("--value_clip", type=float, default=0.2, help="ε of the critic's values")
    add("--entropy_coef", type=float, default=0.0, help="weight of an entropy bonus")
    add("--ptx_data", nargs="+", help="files of SFT records, mixed into the policy's loss")
    add("--ptx_coef", type=float, default=1.0, help="weight of their loss a token")
    add("--kl_stop", type=float, default=0.0, help="end an iteration's updates at this approxkl (0: never)")
    add("--critic_lr", type=float, help="the critic's peak rate (default: --lr)")
    add("--critic_warmup", type=int, default=0, help="first iterations that train the critic alone")
    add("--save_rollouts", action="store_true", help="keep all sampled answers, OUT/rollouts/ITERATION.jsonl")
    add("--show_every", type=int, default=10, help="iterations between shown answers (0: never)")
    args = fsdp.parse(parser, data_file="prompts.json", shapes=dict(
        eval_data=[os.path.join(fsdp.WORLD, "test.json")], batch_size=128, micro_batch=128, rollout_batch=128,
        max_steps=40, max_new_tokens=28, lr=2e-4, critic_lr=3e-4, ppo_epochs=2, critic_warmup=2,
        missing_eos_score=-3.0, normalize_scores=True, **fsdp.left_by("sft"),
        **fsdp.left_by("rm", "reward_model")))
    if not args.reward_model:
        parser.error("--reward_model is needed: what rm.py leaves, or FILE.py:FUNCTION")
    if args.rollout_batch % args.batch_size:
        parser.error(f"got --rollout_batch {args.rollout_batch}, need a multiple of --batch_size "
                     f"{args.batch_size}")
    if args.target_kl and args.kl_horizon < args.rollout_batch * args.samples_per_prompt:
        parser.error(f"got --kl_horizon {args.kl_horizon}, need at least an iteration's answers")
    if args.reward_model.endswith(".py"):
        parser.error(f"got --reward_model {args.reward_model}, need FILE.py:FUNCTION")
    args.critic_lr = args.lr if args.critic_lr is None else args.critic_lr
    if args.temperature <= 0:
        parser.error(f"got --temperature {args.temperature}, need more than 0: PPO learns from samples")
    return args


def read_prompts(paths, judge, processor, args, world):
    """Data files → their prompts as Examples, and the Judge that knows their rows."""
    if not paths:
        return [], judge
    rows, conversations = fsdp.read_conversations(paths, args, world, 0)
    examples, _ = data.build_examples(conversations, processor, "prompt")
    prompts = {}
    if judge.processor:
        prompts, _ = data.build_examples(conversations, judge.processor, "prompt")
        prompts = {example.index: example for example in prompts}
        examples = [example for example in examples if example.index in prompts]
    if world.rank == 0 and len(examples) < len(conversations):
        left_out = len(conversations) - len(examples)
        print(f"{', '.join(paths)}: --max_len {args.max_len} leaves out {left_out} prompts", flush=True)
    return examples, dataclasses.replace(judge, rows=rows, prompts=prompts)


def adam(model, lr, args):
    """AdamW on a model's trained parameters, weight decay on matrices only; ε 1e-5 (arXiv:2403.17031)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix], "weight_decay": decay}
              for matrix, decay in ((True, args.weight_decay), (False, 0.0))]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, eps=1e-5,
                             betas=(0.9, args.adam_beta2), fused=True)


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)
    train = args.train.split(",")
    parts = {"projector": "multi_modal_projector.", "llm": "language_model."}
    if not set(train) <= set(parts):
        raise UserError(f"got --train {args.train}, need projector, llm or both, comma-joined")
    by_rule = ".py:" in args.reward_model
    judge = Judge(function=load_function(args.reward_model)) if by_rule else Judge()
    if by_rule and args.critic == "reward":
        raise UserError("got a function as --reward_model, from which no critic can start: give --critic "
                         "policy")

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    if not by_rule:
        reward_checkpoint = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
        judge.processor = reward_checkpoint.processor
        sizes = [(p.size, p.image_tokens) for p in (processor, judge.processor)]
        if args.critic == "reward" and sizes[0] != sizes[1]:
            raise UserError(f"{args.reward_model}: sees pictures of another size than the policy, "
                             "whose rows the critic reads: give --critic policy")
    examples, judge = read_prompts(args.data, judge, processor, args, world)
    held_out, eval_judge = read_prompts(args.eval_data, judge, processor, args, world)
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed, by_length=args.group_by_length == "yes", drop_last=True)
    ptx = fsdp.read_examples(args.ptx_data, "turns", processor, args, world) if args.ptx_data else []
    ptx_steps = data.Steps(ptx, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                           args.seed, by_length=args.group_by_length == "yes")
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False)
    minibatches = args.rollout_batch // args.batch_size  # optimiser steps a pass over an iteration's answers
    total = args.max_steps or max(1, round(args.epochs * len(steps) / minibatches))

    # models and optimisers
    trainable = [parts[part] for part in train]
    policy = fsdp.build(checkpoint, args, world, trainable)
    reference = None  # with LoRA alone the reference is the policy without its adapters
    if not args.lora_rank or "projector" in train:
        reference = fsdp.build(checkpoint, args, world)
        reference.vision_tower = policy.vision_tower
    if not by_rule:
        judge.model = eval_judge.model = fsdp.build(reward_checkpoint, args, world, score=True)
        judge.same_images = eval_judge.same_images = processor.pictures == judge.processor.pictures
        judge.shared = eval_judge.shared = (judge.same_images
                                            and fsdp.share_tower(policy, judge.model, world))
    trainable = [name.replace("language_model.", "language_model.model.") for name in trainable]  # no head
    start = checkpoint if args.critic == "policy" else reward_checkpoint
    critic = fsdp.build(start, args, world, [*trainable, "score."], score=True)  # reads the policy's rows
    if not fsdp.share_tower(policy, critic, world) and judge.model:
        fsdp.share_tower(judge.model, critic, world)
    if args.critic == "policy":
        for parameter in critic.score.parameters():
            nn.init.zeros_(parameter)
    for model in (policy, critic):
        model.set_recompute(args.recompute)
    policy_adam, critic_adam = adam(policy, args.lr, args), adam(critic, args.critic_lr, args)
    training = nn.ModuleDict({"policy": policy, "critic": critic})  # what a checkpoint holds
    training.register_buffer("beta", torch.tensor(args.kl_coef, dtype=torch.float64))
    training.register_buffer("score_moments", torch.tensor([0.0, 1.0], dtype=torch.float64))
    models = [model for model in (policy, reference, critic, judge.model) if model]
    if by_rule:  # it may read any field of a record
        for path in (args.reward_model.rpartition(":")[0], *args.data, *(args.eval_data or [])):
            world.depends_on(f"the file {path}", world.on_rank0(fsdp.file_digest, path))
    fsdp.begin_run(args, world, checkpoint, *([] if by_rule else [reward_checkpoint]))
    done = fsdp.load_checkpoint(args, world, training, policy_adam, critic_adam)
    log = fsdp.Log(args, world, total, done, shown=("objective/scores", "objective/kl", "policy/clipfrac",
                                                    "val/explained_variance", "answer/length"))
    stop = fsdp.Stop()
    log.say(f"{len(examples)} prompts, {total} iterations")

    def evaluate():
        return evaluate_rollouts(eval_steps, (policy, reference, critic), eval_judge, processor,
                                training.score_moments, float(training.beta), args, world, stop)

    def abandon(iteration):  # its weights are still those that the last one left
        fsdp.reshard(*models)
        if iteration > 1 and iteration - 1 not in world.on_rank0(fsdp.checkpoint_steps, args.out):
            fsdp.save_checkpoint(args, world, iteration - 1, training, policy_adam, critic_adam)
        log.say(f"stopped by SIGTERM in iteration {iteration}; --resume starts it again")
        return fsdp.STOPPED

    if held_out and log.owes_evaluation():  # of the last iteration done: SIGTERM cut it short
        log.add_evaluation(evaluate())
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    batches = iter(data.loader(steps, done * minibatches, total * minibatches, args.workers))
    for iteration in range(done + 1, total + 1):
        alone = args.critic_warmup  # iterations
        lr = args.lr * fsdp.schedule(max(0, iteration - 1 - alone), max(1, total - alone), args.warmup)
        critic_lr = args.critic_lr * fsdp.schedule(iteration - 1, total, args.warmup)
        for optimizer, rate in ((policy_adam, lr), (critic_adam, critic_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate
        first, seconds = (iteration - 1) * minibatches, {}

        # generate: prompts [B, P] → rows of prompt and answers [B, T]
        with decoding(policy, args):
            rollouts = []  # of each minibatch, of each of its micro-batches
            for m in range(minibatches):
                rollouts.append([])
                for batch, rows in zip(next(batches), steps.groups(first + m)):
                    if interrupted(stop, world, args):
                        continue
                    prompts = [examples[i] for i in rows]
                    rollouts[m].append(
                        generate_rollout(policy, batch, prompts, processor, args, world, first + m + 1))
        if stop.asked(world):
            return abandon(iteration)
        every = [rollout for minibatch in rollouts for rollout in minibatch]
        seconds["generate"] = log.seconds()

        # score: answers, as they were sampled → one number each [A]
        for rollout in stop.until(every, world):
            rollout.score = judge.scores(rollout, processor)
        if stop.asked(world):
            return abandon(iteration)
        if args.normalize_scores and iteration == 1:
            fit_score_scale(training, every, args, world)
        postprocess_scores(every, training.score_moments, args)
        fsdp.check_finite(args, iteration, scores=world.sum(sum(r.score.sum() for r in every))[0])
        seconds["score"] = log.seconds()

        # log-probabilities under policy and reference, values: rows → [A, L] each
        for rollout in stop.until(every, world):
            logprobs_and_values(rollout, policy, reference, critic, args)
        fsdp.reshard(*models)
        if stop.asked(world):
            return abandon(iteration)
        seconds["forward"] = log.seconds()

        # KL reward, GAE, whitening: [A, L] → advantages and returns [A, L]
        beta = float(training.beta)
        compute_advantages(every, beta, args, world)

        # minibatch epochs: the same row groups every time, in an order of their own
        train_policy, figures, tokens, norms, ptx_losses = iteration > args.critic_warmup, [], [], {}, []
        order = [m for epoch in range(args.ppo_epochs)
                 for m in data.keyed_permutation(minibatches, args.seed, iteration, epoch)]
        start = (iteration - 1 - args.critic_warmup) * len(order)
        ptx_batches = [None] * len(order)
        if ptx and train_policy:
            ptx_batches = data.loader(ptx_steps, start, start + len(order), args.workers)
        optimizers = {"policy": policy_adam} if train_policy else {}
        optimizers["critic"] = critic_adam
        for m, ptx_batch in zip(order, ptx_batches):
            found, count = minibatch_gradients(
                rollouts[m], policy if train_policy else None, critic, args, world)
            figures.append(found)
            tokens.append(count)
            too_far = args.kl_stop and train_policy and found["policy/approxkl"] > args.kl_stop
            if ptx_batch and not too_far:
                ptx_losses.append(ptx_gradients(ptx_batch, policy, args, world))
            for name, optimizer in optimizers.items() if not too_far else ():
                trained = [p for group in optimizer.param_groups for p in group["params"]]
                norms.setdefault(name, []).append(fsdp.clip_gradients(trained, args.grad_clip))
            fsdp.check_finite(args, iteration, **found,
                              **{f"grad_norm/{name}": norm[-1] for name, norm in norms.items()})
            for optimizer in optimizers.values():
                if not too_far:
                    optimizer.step()
                optimizer.zero_grad()
            if too_far:
                break
        seconds["update"] = log.seconds()

        # log, evaluate, save
        line = rollout_metrics(every, beta, world)
        line |= {name: np.average([step[name] for step in figures], weights=tokens) for name in figures[0]}
        line |= {f"first/{name}": value for name, value in figures[0].items()}
        line |= {f"seconds/{name}": value for name, value in seconds.items()}
        line |= {"loss/ptx": np.mean(ptx_losses)} if ptx_losses else {}
        line |= {f"grad_norm/{name}": np.mean(norm) for name, norm in norms.items()}
        line |= {"beta": beta, "lr": lr, "critic_lr": critic_lr}
        n, columns = world.sum(sum(len(r.score) for r in every),
                               sum(int((r.batch.branch >= 0).sum()) for r in every))
        if args.target_kl and train_policy:
            training.beta.fill_(adapted_beta(beta, line["objective/kl"], args.target_kl, args.kl_horizon, n))
        if args.show_every and iteration % args.show_every == 0:
            answers = rollout_records(every, processor, beta)
            log.say("\n".join(f"    {answer}" for answer in answers[::max(1, len(answers) // 3)][:3]))
        if args.save_rollouts:
            answers = sum(world.gather(rollout_records(every, processor, beta)), [])
            answers.sort(key=lambda answer: answer["id"])
            text = "".join(json.dumps(answer) + "\n" for answer in answers)
            world.on_rank0(fsdp.write_text, os.path.join(args.out, "rollouts", f"{iteration}.jsonl"), text)
        ended = iteration == total
        if held_out and (ended or args.eval_every and iteration % args.eval_every == 0):
            line |= evaluate() or fsdp.EVAL_DUE
        log.step(iteration, columns, sum(seconds.values()), **line)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and iteration % args.save_every == 0:
            fsdp.save_checkpoint(args, world, iteration, training, policy_adam, critic_adam)
        log.seconds()
        if stopped:
            log.say(f"stopped by SIGTERM after iteration {iteration}; --resume goes on from there")
            return fsdp.STOPPED
    fsdp.export(policy, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
