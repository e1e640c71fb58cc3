"""An iteration of GRPO (4 prompts with an image, 8 samples each, 64 new tokens, one step) against TRL.

Our side calls ppo.py's own functions in its order, from reading the images on; theirs is the GRPOTrainer's
train(). Both sample (TRL with the key-value cache of transformers), with the same β, reward function and
reference. Both then learn from the same given answers in place of the sampled ones, which are as many and as
long, so that their results can be compared: the gradient's norm and the mean entropy. Neither ever samples
an end token. Generation is also timed apart.

    python benchmarks/bench_grpo.py                     # pip install -r benchmarks/requirements.txt
"""
import dataclasses
import functools
import itertools
import time

import common
import numpy as np

import data
import fsdp
import ppo

SAMPLES = 8  # per prompt
generation_seconds = {"ours": [], "theirs": []}


def share_of_even_words(record, texts):
    """A reward function, ppo.py's signature: what fraction of an answer's words w5, w6, … are even"""
    return [np.mean([int(word[1:]) % 2 == 0 for word in text.split()]) for text in texts]


def timed(side, generate, *args):
    """generate(*args), whose seconds are noted"""
    start = time.perf_counter()
    result = generate(*args)
    generation_seconds[side].append(time.perf_counter() - start)
    return result


def ours(setup):
    args, world, processor = setup.options, setup.world, setup.processor
    policy = fsdp.build(setup.checkpoint, args, world, common.TRAINED)
    reference = fsdp.build(setup.checkpoint, args, world)
    reference.vision_tower = policy.vision_tower
    scorer = ppo.RewardFunction(share_of_even_words, processor)
    optimizers = {"policy": ppo.adam(policy, common.LR, args)}
    prompts = ppo.Prompts(setup.examples, [{}] * len(setup.examples), {})
    unanswered = [dataclasses.replace(example, answers=[], token_masks=[]) for example in setup.examples]
    endless = dataclasses.replace(processor, end_ids=frozenset(), banned=processor.banned | processor.end_ids)
    numbers = itertools.count(1)  # of minibatches

    def generate():
        group = [(data.collate(unanswered, processor), unanswered, next(numbers))]
        rollout, = ppo.sample_answers(fsdp.unsharded(policy, args, world), group, endless, args, world)
        return rollout

    def step():
        given = dataclasses.replace(setup.batch, pixels=None)
        rollout = timed("ours", generate)._replace(examples=setup.examples, batch=given)
        scores = [scorer.score(rollout, prompts)]
        with_policy = not ppo.old_logprob_from_update(args)
        old = ppo.logprobs_and_values(rollout, policy, reference, None, args, with_policy)
        fsdp.reshard(policy, reference)
        estimates, = ppo.compute_advantages([old], scores, args, world)
        metrics, _, per_step, _ = ppo.ppo_step(
            [(rollout, old, estimates)], None, {"policy": policy}, optimizers, 1, args, world)
        return [per_step["grad_norm/policy"], metrics["policy/entropy"]]
    return step


def flops(setup, prompt_copies=1, passes_of_the_tower=1):
    """The tower; a prefill; n − 1 decoded tokens per answer; the reference's forward pass and the policy's
    training pass. prompt_copies: how often a prompt with its image runs (TRL: once per sample, and each of
    the three passes encodes the images again)."""
    config, (tokens, pairs) = setup.checkpoint.config, common.visible_pairs(setup.batch)
    B, n = len(setup.examples), setup.options.max_new_tokens
    A = B * SAMPLES
    P = tokens // B - SAMPLES * n
    prefill = common.forward_flops(config, 0, prompt_copies * B * P, prompt_copies * B * P * (P + 1) // 2,
                                   prompt_copies * B)
    seen = A * sum(P + t for t in range(1, n))  # pairs: a new token and what it sees
    decoding = common.forward_flops(config, 0, A * (n - 1), seen, A * (n - 1))
    more = (prompt_copies - 1) * B
    full = common.forward_flops(config, prompt_copies * B, tokens + more * P,
                                pairs + more * P * (P + 1) // 2, A * n)
    return (sum(prefill.values()) + sum(decoding.values()) + passes_of_the_tower * full["tower"]
            + (1 + 3) * (full["language"] + full["head"]))


def main():
    args = common.parse(common.options(__doc__), answer=64)
    import trl_side
    options = ("--reward_model", f"{__file__}:share_of_even_words", "--advantage", "grpo",
               "--ppo_epochs", "1", "--samples_per_prompt", str(SAMPLES),
               "--max_new_tokens", str(args.answer),
               "--rollout_batch", str(args.batch), "--batch_size", str(args.batch))
    theirs = trl_side.grpo(functools.partial(share_of_even_words, None), SAMPLES,
                           functools.partial(timed, "theirs"))
    steps = common.compare("GRPO against TRL", args, ppo, ours, theirs, flops, SAMPLES, options,
                           lambda setup: flops(setup, SAMPLES, 3))
    for (side, generation), seconds in zip(generation_seconds.items(), steps):
        generation = np.array(generation[common.WARM_UP:])
        print(f"  {side:7} generation {np.median(generation):.3g} s, scores, reference and update "
              f"{np.median(seconds - generation):.3g} s")


if __name__ == "__main__":
    fsdp.run(main)
