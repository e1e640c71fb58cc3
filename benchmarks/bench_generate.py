"""Decoding against transformers: greedy answers to 8 prompts, and 8 samples of one.

Ours is predict.py's `sample` with unsharded weights, theirs is generate(), both in --dtype and without stop
ids. The prefill is a run of one new token; decoding is the time of a full run minus the median prefill. For
the 8 samples, ours encodes image and prompt once and generate(num_return_sequences=8) eight times; each side
draws its own random numbers, so the samples are not compared.

    python benchmarks/bench_generate.py
"""
import argparse
import dataclasses

import common
import numpy as np
import torch

import fsdp
import predict


def ours(setup):
    model = fsdp.unsharded(fsdp.build(setup.checkpoint, setup.options, setup.world),
                           setup.options, setup.world)
    processor = dataclasses.replace(setup.processor, end_ids=frozenset(), banned=frozenset())

    @torch.no_grad()
    def step():
        features = model.vision_tower(setup.batch.pixels)
        _, ids = predict.sample(model, setup.batch, features, processor, setup.examples, setup.options,
                                torch.any)
        return np.ravel(ids).tolist() if setup.options.num_samples == 1 else []
    return step


def theirs(setup):
    model = common.build_theirs(setup, fsdp.DTYPES[setup.args.dtype])
    model.generation_config.eos_token_id = None
    inputs, _ = common.their_rows(setup)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    samples, max_new = setup.options.num_samples, setup.options.max_new_tokens
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": samples} if samples > 1 else {}

    def step():
        ids = model.generate(**inputs, max_new_tokens=max_new, **how)
        return ids[:, -max_new:].flatten().tolist() if samples == 1 else []
    return step


def flops(setup):
    """A forward pass over the prompts, then one for each new token except the last, over all tokens before
    it."""
    config, (tokens, pairs) = setup.checkpoint.config, common.visible_pairs(setup.batch)
    B, K, n = len(setup.examples), setup.options.num_samples, setup.options.max_new_tokens
    prefill = common.forward_flops(config, B, tokens, pairs, B)
    pairs = K * sum(tokens + B * t for t in range(1, n))
    decoding = common.forward_flops(config, 0, B * K * (n - 1), pairs, B * K * (n - 1))
    return sum(prefill.values()) + sum(decoding.values())


def main():
    args = common.parse(common.options(__doc__), batch=8, answer=64)
    one = argparse.Namespace(**{**vars(args), "batch": 1})

    def run(title, args, *options):
        return common.forked(common.compare, title, args, predict, ours, theirs, flops, 0, options)
    prefill = run("prefill", args, "--max_new_tokens", "1")
    full = run("prefill and greedy decoding", args, "--max_new_tokens", str(args.answer))
    a, b = (np.array(side) - np.median(first) for side, first in zip(full, prefill))
    print(f"greedy decoding alone: ours {common.spread(a)} s, theirs {common.spread(b)} s, "
          f"ratio {common.spread(b / a)}")
    run("8 samples of a picture", one, "--max_new_tokens", str(args.answer), "--num_samples", "8")


if __name__ == "__main__":
    fsdp.run(main)
