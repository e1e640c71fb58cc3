r"""Answers of a vision-LLM to the rows of a data file, in their order, as JSON lines.

    python predict.py                                   # greedy, the shapes world's test set
    python predict.py --num_samples 8                   # eight samples a row
    python predict.py --num_samples 8 --reward_model runs/rm        # the best of eight
    python predict.py --score                           # log-probability of the rows' own answers
    torchrun --nproc_per_node=8 predict.py --model out --data rows.json --images pictures \
        --out answers.jsonl

Each line is {"id", "image", "prompt", "answer", "label"?} and the record's other fields (question_id,
category, …; not an own `answer`), whose `label` replaces the one from the final gpt turn; with --num_samples
K also "answers": [{"text", "logprob", "reward"?}], "answer" being the best rewarded; with --score no answer
but "answers": [{"text", "logprob", "tokens", "reward"?}]. A log-probability is the sum over the answer's
tokens, its end token included, in nats at temperature 1. A row whose prompt does not fit --max_len has the
answer null. Lines are written as they are done; --resume continues where they end, with the options and
inputs that OUT.args.json names.

Best of n: the prompt passes the policy once for its K samples, and the reward model once with all of them in
one row (README: rows). A sample that --max_new_tokens cuts is rewarded as it stands.

Legend: A answers of a batch, N their tokens.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import time

import numpy as np
import torch

import data
import fsdp
from model import generate, keyed_uniforms


def score(model, batch, features, processor, examples):
    """Log-probability and length of the rows' own answers, by teacher forcing. → answers of each example"""
    logprob = model(batch, features)  # [N]
    total = logprob.new_zeros(len(batch.last_token)).index_add(0, batch.answer, logprob).tolist()
    tokens = torch.bincount(batch.answer, minlength=len(batch.last_token)).tolist()
    scored = iter(zip(total, tokens))
    return [[{"text": processor.text(answer), "logprob": logprob, "tokens": n}
             for answer, (logprob, n) in zip(example.answers, scored)] for example in examples]


def sample(model, batch, features, processor, examples, args, anyone):
    """--num_samples answers of each example, from one prefill; greedy at temperature 0. → answers of each
    example, and their ids"""
    uniforms = None
    if args.temperature > 0 and examples:
        uniforms = keyed_uniforms(args.seed, 0, [e.index for e in examples], args.num_samples, args.max_new_tokens)
    sampled, logprob = generate(
        model, batch, features, args.max_new_tokens, processor.stop, processor.banned, uniforms, args.num_samples,
        args.temperature, args.top_k, args.top_p, anyone)
    sampled = sampled[:len(examples)]  # a batch of padding has one row, and no example
    answers = [[{"text": processor.text(ids), "logprob": lp} for ids, lp in zip(*row)]
               for row in zip(sampled, logprob.tolist())]
    return answers, sampled


def add_rewards(answers, judged, reward, processor, batch, features, same_images, shared):
    """Adds to each answer the reward model's score; judged: Examples with these answers, as the reward model
    is to read them. same_images: it reads images in the policy's size and mode; shared: with the policy's
    tower."""
    row = data.collate(judged, processor, batch.pixels.cpu() if same_images else None).to(features.device)
    if not shared:
        features = reward.vision_tower(row.pixels)
    scores = iter(reward.scores(row, features, row.last_token).tolist())
    for answer in (answer for row_answers in answers for answer in row_answers):
        answer["reward"] = next(scores)


def check_answers(examples, answers):
    """NaN is not JSON, and not an answer either."""
    for example, given in zip(examples, answers):
        for answer in given:
            for name in ("logprob", "reward"):
                if not math.isfinite(answer.get(name, 0.0)):
                    raise fsdp.Diverged(
                        f"{example.name}: got the {name} {answer[name]}, need a "
                        "finite number: weights are not finite, or --dtype overflows")


OWN = {"id", "image", "conversations", "prompt", "answer", "answers"}  # what is not copied from a record


class Writer:
    """OUT on rank 0: lines in the order of the data, each written when all before it are. With --resume the
    lines that are there stay up to the first that is not of its record, and `done` counts them."""

    def __init__(self, args, rows, conversations, processor):
        self.args, self.rows, self.conversations, self.processor = args, rows, conversations, processor
        self.done = self.right = self.labelled = 0
        kept = 0  # bytes
        if args.resume and os.path.isfile(args.out):
            with open(args.out, "rb") as f:
                for text, conversation in zip(f, conversations):
                    try:
                        line, expected = json.loads(text), self.start_of_line(*conversation)
                        if not text.endswith(b"\n") or any(line[key] != expected[key] for key in expected):
                            break
                        self.count(line, conversation[1])
                    except (ValueError, TypeError, KeyError):  # what a crash left
                        break
                    kept += len(text)
            if kept < os.path.getsize(args.out):
                print(f"{args.out}: {self.done} complete lines stay, the rest is answered again", flush=True)
        self.file = open(args.out, "a", encoding="utf-8")  # noqa: SIM115 (open while the run lasts)
        self.file.truncate(kept)

    def start_of_line(self, index, conversation):
        text = json.dumps(self.rows[index], ensure_ascii=False).encode(errors="replace")
        row = json.loads(text, parse_constant=lambda name: None)  # NaN is not JSON
        others = {key: value for key, value in row.items()
                  if key not in OWN and (key != "label" or value is not None)}
        return {"id": row.get("id", index), "image": row.get("image"),
                "prompt": self.processor.template.render(conversation), **others}

    def count(self, line, conversation):
        self.done += 1
        if "answer" in line and conversation.answers and isinstance(line.get("label"), str):
            self.labelled, self.right = self.labelled + 1, self.right + (line["answer"] == line["label"])

    def write(self, found, end):
        """found: index of a record → its answers; end: the index of the first that is not answered yet."""
        while self.done < len(self.conversations) and self.conversations[self.done][0] < end:
            index, conversation = self.conversations[self.done]
            answers, line = found.get(index), self.start_of_line(index, conversation)
            if not self.args.score:
                best = max(answers, key=lambda answer: answer.get("reward", 0)) if answers else {"text": None}
                line["answer"] = best["text"]
                if conversation.answers:
                    line.setdefault("label", conversation.answers[0])
            if self.args.score or self.args.num_samples > 1 or self.args.reward_model:
                line["answers"] = answers
            self.file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            self.count(line, conversation)
        self.file.flush()


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser, training=False)
    add = parser.add_argument_group("prediction").add_argument
    add("--micro_batch", type=int, default=8, help="rows a forward pass on one rank")
    add("--max_new_tokens", type=int, default=256, help="tokens an answer, at most")
    add("--num_samples", type=int, default=1, help="answers a row")
    add("--temperature", type=float, help="0: greedy (default: 0, or 1 with --num_samples)")
    add("--top_k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens up to this mass")
    add("--score", action="store_true", help="score the rows' own answers instead of generating")
    add("--reward_model", help="what rm.py leaves: scores answers too, and picks the best sample")
    add("--sharded", action="store_true", help="keep weights sharded while decoding: less memory, slower")
    args = fsdp.parse(parser, data_file="test.json",
                      shapes=dict(micro_batch=64, max_new_tokens=32, **fsdp.left_by("sft")))
    if args.score and (args.num_samples > 1 or args.temperature is not None or args.top_k or args.top_p < 1):
        parser.error("got --score with options of sampling: it takes the rows' own answers")
    if args.temperature is None:
        args.temperature = 1.0 if args.num_samples > 1 else 0.0
    if args.num_samples > 1 and args.temperature == 0:
        parser.error(f"got --num_samples {args.num_samples} --temperature 0, need a temperature above 0")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        parser.error("got --top_k or --top_p, but greedy decoding: give --temperature, or --num_samples")
    return args


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_file(args, world)

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor, which = checkpoint.processor, "answers" if args.score else "prompt"
    rows, conversations = fsdp.read_conversations(args.data, args, world, data.ANSWERS_NEEDED[which])
    examples, counts = data.build_examples(conversations, processor, which)
    if args.reward_model:
        judge = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
        judged, _ = data.build_examples(conversations, judge.processor, which)
        judged = {example.index: example for example in judged}
        fits = [example for example in examples if example.index in judged]
        counts["too_long"] += len(examples) - len(fits)
        examples = fits

    # models
    model = fsdp.build(checkpoint, args, world)
    if args.reward_model:
        reward = fsdp.build(judge, args, world, score=True)
        same_images = processor.pictures == judge.processor.pictures
        shared = same_images and fsdp.share_tower(model, reward, world)
    whole = contextlib.nullcontext() if args.sharded else fsdp.unsharded(model)
    fsdp.record_templates(world, checkpoint, *([judge] if args.reward_model else []))
    writer = Writer(args, rows, conversations, processor) if world.rank == 0 else None
    world.on_rank0(fsdp.write_args, f"{args.out}.args.json", args, world)
    done, stop = world.on_rank0(lambda: writer.done), fsdp.Stop()
    left = {index for index, _ in conversations[done:]}
    examples = [example for example in examples if example.index in left]
    steps = data.Steps(examples, processor, args.micro_batch * world.size, args.micro_batch, world.rank,
                       world.size, shuffle=False, by_length=False)

    # loop: every rank answers its rows of a step; all of them are written together
    start, shown = time.time(), time.time()
    with torch.no_grad(), whole:
        for step, (batch,) in enumerate(data.loader(steps, 0, len(steps), args.workers)):
            if stop.asked(world):
                if world.rank == 0:
                    print(f"stopped by SIGTERM after {writer.done} rows; --resume goes on from there",
                          flush=True)
                return fsdp.STOPPED
            mine = [examples[i] for i in steps.groups(step)[0]]
            batch = batch.to(world.device)
            features = model.vision_tower(batch.pixels)
            if args.score:
                answers = score(model, batch, features, processor, mine)
            else:
                anyone = world.any if args.sharded else torch.any  # sharded weights: all ranks decode in step
                answers, sampled = sample(model, batch, features, processor, mine, args, anyone)
            if args.reward_model:
                given = [judged[example.index] for example in mine]
                if not args.score:  # sampled ids as they are, behind the reward model's own prompt
                    given = [dataclasses.replace(example, answers=[np.array(ids) for ids in row],
                                                 token_masks=[np.ones(len(ids), bool) for ids in row])
                             for example, row in zip(given, sampled)]
                add_rewards(answers, given, reward, judge.processor, batch, features, same_images, shared)
            check_answers(mine, answers)
            found = world.gather([(example.index, answer) for example, answer in zip(mine, answers)])
            if world.rank == 0:
                n = min((step + 1) * steps.batch_size, len(examples))  # answered
                end = examples[n].index if n < len(examples) else len(rows)
                writer.write(dict(answer for part in found for answer in part), end)
                if time.time() - shown > 5:
                    shown, rate = time.time(), n / (time.time() - start)
                    seconds = (len(examples) - n) / rate
                    print(f"{n}/{len(examples)} rows  {rate:.1f} rows/s  {seconds:.0f} s left", flush=True)
    if world.rank == 0:
        writer.write({}, len(rows))  # the rows behind the last that fits
        accuracy = ""
        if writer.labelled:
            accuracy = f", exact match {writer.right / writer.labelled:.4f} of {writer.labelled}"
        length = f"{counts['too_long']} too long, {counts['cut']} cut"
        print(f"wrote {args.out}: {writer.done} rows, {length}{accuracy}", flush=True)


if __name__ == "__main__":
    fsdp.run(main)
