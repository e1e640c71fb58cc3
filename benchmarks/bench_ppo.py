"""An iteration of PPO (16 prompts, 64 new tokens, one optimiser pass) against a loop of transformers models.

Ours are the functions of ppo.py in its order: rollout, scores, forward passes, advantages, gradients, clip,
step. Theirs is a plain loop with transformers: policy.generate(), then forward passes of full sequences
through reward model, policy, reference and critic, then the update, with the same equations (imported from
ppo.py). Policy and critic are trained; reference and reward model are frozen. transformers, too, computes
logits only at the answers' positions (logits_to_keep).

Both sides take the most likely token (--top_k 1, which changes nothing else), so that the answers are equal
and the results can be compared: the value loss, and −log π per token before the update. All answers count as
ended.

    python benchmarks/bench_ppo.py
"""
import common
import torch

import fsdp
import ppo


def ours(setup):
    options, world, checkpoint = setup.options, setup.world, setup.checkpoint
    policy = fsdp.build(checkpoint, options, world, common.TRAINED)
    reference = fsdp.build(checkpoint, options, world)
    judge = ppo.Judge(model=fsdp.build(checkpoint, options, world, score=True), processor=setup.processor,
                      prompts={example.index: example for example in setup.examples})
    trained = ["multi_modal_projector.", "language_model.model.", "score."]
    critic = fsdp.build(checkpoint, options, world, trained, score=True)
    reference.vision_tower = policy.vision_tower
    judge.shared = fsdp.share_tower(policy, judge.model, world) and fsdp.share_tower(policy, critic, world)
    adams = [(model, ppo.adam(model, common.LR, options)) for model in (policy, critic)]

    def step():
        with ppo.decoding(policy, options):
            rollout = ppo.generate_rollout(
                policy, setup.batch, setup.examples, setup.processor, options, world, 1)
        rollout.ended[:] = True
        rollout.score = judge.scores(rollout, setup.processor)
        ppo.postprocess_scores([rollout], torch.tensor([0.0, 1.0]), options)
        ppo.logprobs_and_values(rollout, policy, reference, critic, options)
        fsdp.reshard(policy, reference, critic, judge.model)
        ppo.compute_advantages([rollout], options.kl_coef, options, world)
        figures, _ = ppo.minibatch_gradients([rollout], policy, critic, options, world)
        for model, adam in adams:
            fsdp.clip_gradients([p for p in model.parameters() if p.requires_grad], options.grad_clip)
            adam.step()
            adam.zero_grad()
        return [figures["loss/value"], -rollout.logprob.mean().item()]
    return step


def theirs(setup):
    options, inputs, n = setup.options, common.their_rows(setup)[0], setup.options.max_new_tokens
    policy, critic = common.build_theirs(setup), common.build_theirs(setup).model
    reference, judge = (common.build_theirs(setup, fsdp.DTYPES[setup.args.dtype]) for _ in range(2))
    critic_head, judge_head = common.their_head(setup), common.their_head(setup)
    updates = [common.their_update(policy, eps=1e-5), common.their_update(critic, critic_head, eps=1e-5)]
    policy.generation_config.eos_token_id = None
    kept = torch.ones(len(setup.examples), n, dtype=torch.bool)

    def logprobs(model, rows):
        logits = model(**rows, logits_to_keep=n + 1, use_cache=False).logits[:, :-1].float()
        answers = rows["input_ids"][:, -n:, None]
        return torch.log_softmax(logits, dim=-1).gather(-1, answers).squeeze(-1)

    def heads(model, head, rows):
        with setup.autocast():
            states = model(**rows, use_cache=False).last_hidden_state
        return head(states.float()).squeeze(-1)  # [B, T]

    def step():
        with torch.no_grad(), setup.autocast():
            ids = policy.generate(**inputs, max_new_tokens=n, do_sample=True, top_k=1)
            rows = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            old, given = logprobs(policy, rows), logprobs(reference, rows)
        with torch.no_grad():
            score = heads(judge.model, judge_head, rows)[:, -1]
            old_values = heads(critic, critic_head, rows)[:, -n - 1:-1]
        rewards = ppo.kl_reward(old, given, score, kept, options.kl_coef)
        advantages, returns = ppo.gae(rewards, old_values, kept, options.gamma, options.lam)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        with setup.autocast():
            logprob = logprobs(policy, rows)
        loss = ppo.policy_loss(logprob, old, advantages, kept, options.clip_range) / kept.numel()
        loss.backward()
        values = heads(critic, critic_head, rows)[:, -n - 1:-1]
        loss = ppo.value_loss(values, old_values, returns, kept, options.value_clip) / kept.numel()
        loss.backward()
        for update in updates:
            update()
        return [loss.item(), -old.mean().item()]
    return step


def flops(setup):
    """The tower once; a prefill; n − 1 tokens an answer; four forward passes of whole rows (reward model,
    policy, reference, critic), and the policy's and the critic's training passes."""
    config, (tokens, pairs) = setup.checkpoint.config, common.visible_pairs(setup.batch)
    B, n = len(setup.examples), setup.options.max_new_tokens
    prefill = common.forward_flops(config, B, tokens, pairs, B)
    more = sum(tokens + B * t for t in range(1, n + 1))  # pairs: each new token sees what came before
    decoding = common.forward_flops(config, 0, B * (n - 1), more, B * (n - 1))
    row = common.forward_flops(config, B, tokens + B * n, pairs + more, B * n)
    passes = (4 + 3 + 3) * row["language"] + (2 + 3) * row["head"]
    return sum(prefill.values()) + sum(decoding.values()) + passes


def main():
    args = common.parse(common.options(__doc__), batch=16, answer=64)
    options = ("--reward_model", ".", "--max_new_tokens", str(args.answer), "--top_k", "1")
    common.compare("PPO against transformers", args, ppo, ours, theirs, flops, 0, options)


if __name__ == "__main__":
    fsdp.run(main)
