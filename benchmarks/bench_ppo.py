"""An iteration of PPO (16 prompts, 64 new tokens, one optimiser pass) against a loop of transformers models.

Our side calls ppo.py's own functions in its order. Their side is what one writes with transformers:
policy.generate(), then forward passes of full sequences through reward model, policy, reference and critic,
then the update, with the equations of ppo.py. Policy and critic are trained; reference and reward model are
frozen. transformers, too, computes logits only at the answers' positions (logits_to_keep).

Both sides decode greedily (temperature 0 in sample_answers alone), so their answers are the same and their
results can be compared: the value loss, and − log π per token before the update. Every answer counts as
ended.

    python benchmarks/bench_ppo.py
"""
import argparse

import common
import torch

import fsdp
import ppo


def ours(setup):
    args, world, checkpoint = setup.options, setup.world, setup.checkpoint
    policy = fsdp.build(checkpoint, args, world, common.TRAINED)
    reference = fsdp.build(checkpoint, args, world)
    reference.vision_tower = policy.vision_tower
    reward_model = fsdp.build(checkpoint, args, world, score=True)
    critic_parts = ["multi_modal_projector.", "language_model.model.", "score."]
    critic = fsdp.build(checkpoint, args, world, critic_parts, score=True)
    shared_tower = fsdp.share_tower(policy, reward_model, world) and fsdp.share_tower(policy, critic, world)
    scorer = ppo.RewardModel(reward_model, setup.processor, False, shared_tower)
    prompts = ppo.Prompts(setup.examples, [], {example.index: example for example in setup.examples})
    models = {"policy": policy, "critic": critic}
    optimizers = {name: ppo.adam(model, common.LR, args) for name, model in models.items()}
    greedy = argparse.Namespace(**{**vars(args), "temperature": 0.0})

    def step():
        group = [(setup.batch, setup.examples, 1)]
        full = fsdp.unsharded(policy, args, world)
        rollout, = ppo.sample_answers(full, group, setup.processor, greedy, world)
        rollout.ended[:] = True
        scores, moments = [scorer.score(rollout, prompts)], torch.tensor([0.0, 1.0])
        scores = ppo.postprocess_scores(scores, [rollout], moments, args)
        old = ppo.logprobs_and_values(rollout, policy, reference, critic, args)
        fsdp.reshard(policy, reference, critic, reward_model)
        estimates, = ppo.compute_advantages([old], scores, args, world)
        metrics, *_ = ppo.ppo_step([(rollout, old, estimates)], None, models, optimizers, 1, args, world)
        return [metrics["loss/value"], -old.logprob.mean().item()]
    return step


def theirs(setup):
    options, inputs, n = setup.options, common.their_rows(setup)[0], setup.options.max_new_tokens
    policy, critic = common.build_theirs(setup), common.build_theirs(setup).model
    reference, reward_model = (common.build_theirs(setup, fsdp.DTYPES[setup.args.dtype]) for _ in range(2))
    critic_head, reward_head = common.their_head(setup), common.their_head(setup)
    updates = [common.their_update(policy, eps=1e-5), common.their_update(critic, critic_head, eps=1e-5)]
    policy.generation_config.eos_token_id = None
    mask = torch.ones(len(setup.examples), n, dtype=torch.bool)

    def logprobs(model, full):
        logits = model(**full, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].float()
        answers = full["input_ids"][:, -n:, None]
        return torch.log_softmax(logits, dim=-1).gather(-1, answers).squeeze(-1)

    def values_of(model, head, full):
        with setup.autocast():
            hidden = model(**full, use_cache=False).last_hidden_state
        return head(hidden.float()).squeeze(-1)  # [B, T]

    def step():
        with torch.no_grad(), setup.autocast():
            ids = policy.generate(**inputs, max_new_tokens=n, do_sample=False)
            full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            old, ref = logprobs(policy, full), logprobs(reference, full)
        with torch.no_grad():
            score = values_of(reward_model.model, reward_head, full)[:, -1]
            old_values = values_of(critic, critic_head, full)[:, -n - 1:-1]
        rewards = ppo.kl_reward(old, ref, score, mask, options.kl_coef)
        advantages, returns = ppo.gae(rewards, old_values, mask, ppo.GAMMA, options.lam)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        with setup.autocast():
            logprob = logprobs(policy, full)
        loss = ppo.policy_loss(logprob, old, advantages, mask, options.clip_range) / mask.numel()
        loss.backward()
        values = values_of(critic, critic_head, full)[:, -n - 1:-1]
        loss = ppo.value_loss(values, old_values, returns, mask, options.clip_range) / mask.numel()
        loss.backward()
        for update in updates:
            update()
        return [loss.item(), -old.mean().item()]
    return step


def flops(setup):
    """The tower once; a prefill; n − 1 decoded tokens per answer; four forward passes of full sequences
    (reward model, policy, reference, critic), and the policy's and the critic's training passes."""
    config, (tokens, pairs) = setup.checkpoint.config, common.visible_pairs(setup.batch)
    B, n = len(setup.examples), setup.options.max_new_tokens
    prefill = common.forward_flops(config, B, tokens, pairs, B)
    more = sum(tokens + B * t for t in range(1, n + 1))  # pairs: each new token sees what came before
    decoding = common.forward_flops(config, 0, B * (n - 1), more, B * (n - 1))
    full = common.forward_flops(config, B, tokens + B * n, pairs + more, B * n)
    passes = (4 + 3 + 3) * full["language"] + (2 + 3) * full["head"]
    return sum(prefill.values()) + sum(decoding.values()) + passes


def main():
    args = common.parse(common.options(__doc__), batch=16, answer=64)
    options = ("--reward_model", ".", "--max_new_tokens", str(args.answer))
    common.compare("PPO against transformers", args, ppo, ours, theirs, flops, 0, options)


if __name__ == "__main__":
    fsdp.run(main)
