r"""Answers of a vision-LLM: to the records of a data file, as JSON lines in the same order, or to a question.

    python predict.py --model out --image cat.jpg --prompt "What is on the sofa?"    # prints the answer
    python predict.py                                   # greedy, test records of the shapes data set
    python predict.py --num_samples 8                   # eight samples per record
    python predict.py --num_samples 8 --reward_model runs/rm        # best of eight
    python predict.py --score                           # log-probability of the records' own answers
    torchrun --nproc_per_node=8 predict.py --model out --data test.json --images images \
        --out answers.jsonl

Each line holds {"id", "image", "prompt", "answer", "label"?} and the record's other fields, such as
question_id and category (but not a field `answer`). `label` is the record's own field of that name, or else
its last gpt turn. --num_samples K adds "answers": [{"text", "logprob", "reward"?}], and `answer` is the one
with the highest reward. --score writes no `answer` but "answers": [{"text", "logprob", "tokens", "reward"?}].
`logprob` is the sum over the answer's tokens, including the end token, in nats at temperature 1. `answer` is
null if the prompt does not fit in --max_len.

With --prompt no file is read or written. Several --prompt are the user's turns of one conversation, in which
all of --image belong to the first.

Lines are written batch by batch. --resume continues after the last complete line, and needs the options and
inputs that are recorded in OUT.args.json.

Best of n: the policy processes the prompt once for all n samples, and so does the reward model, which reads
them in one packed sequence. A sample that reaches --max_new_tokens is rewarded without an end token.

Legend: A answers of a batch, N their tokens.
"""
import argparse
import dataclasses
import json
import math
import os
import sys

import numpy as np
import torch

import data
import fsdp
from model import generate, keyed_uniforms


def score(model, batch, features, processor, examples):
    """Scores the examples' own answers. → per example a list of {"text", "logprob", "tokens"}"""
    token_logps = model(batch, features)  # [N]
    token_logps, token_mask = data.pad_by_sequence(token_logps, batch.answer, batch.token_shape)  # [A, L]
    results = zip(token_logps.sum(1).tolist(), token_mask.sum(1).tolist())
    return [[{"text": processor.text(answer), "logprob": logp, "tokens": n}
             for answer, (logp, n) in zip(example.answers, results)] for example in examples]


def sample(model, batch, features, processor, examples, args, any_rank, stream=None):
    """Generates --num_samples answers per example from one prefill; greedy at temperature 0. → per example a
    list of {"text", "logprob"}, and a list of the answers' token ids"""
    uniforms = None
    if args.temperature > 0 and examples:
        indices = [example.index for example in examples]
        uniforms = keyed_uniforms(args.seed, 0, indices, args.num_samples, args.max_new_tokens)
    ids, logps = generate(
        model, batch, features, args.max_new_tokens, processor.end_ids, processor.banned, uniforms,
        args.num_samples, args.temperature, args.top_k, args.top_p, any_rank, not args.sharded, stream)
    ids = ids[:len(examples)]  # a batch of padding has one sequence, but no example
    answers = [[{"text": processor.text(tokens), "logprob": logp} for tokens, logp in zip(*samples)]
               for samples in zip(ids, logps.tolist())]
    return answers, ids


def add_rewards(answers, examples, reward_model, processor, batch, features, same_images, same_tower):
    """Adds "reward" to each answer. examples: the reward model's prompts with these answers. same_images: the
    reward model uses the policy's image size and mode; same_tower: it shares the policy's vision tower."""
    pixels = batch.pixels.cpu() if same_images else None
    batch = data.collate(examples, processor, pixels).to(features.device)
    if not same_tower:
        features = reward_model.vision_tower(batch.pixels)
    rewards = iter(reward_model.scores(batch, features, batch.last_token).tolist())  # [A]
    for answer in (answer for record in answers for answer in record):
        answer["reward"] = next(rewards)


def check_answers(examples, answers):
    for example, record in zip(examples, answers):
        for answer in record:
            for name in ("logprob", "reward"):
                if not math.isfinite(answer.get(name, 0.0)):
                    raise fsdp.Diverged(
                        f"{example.name}: got the {name} {answer[name]}, need a finite number: "
                        "weights are not finite, or --dtype overflows")


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    fsdp.arguments(parser, training=False)
    add = parser.add_argument_group("prediction").add_argument
    add("--prompt", action="append", help="question to answer, in place of --data; again: the next turn")
    add("--image", nargs="+", default=[], help="image files that the first --prompt is about")
    add("--micro_batch", type=fsdp.positive_int, default=8, help="records per forward pass on one rank")
    add("--max_new_tokens", type=fsdp.positive_int, default=256, help="maximum length of an answer in tokens")
    add("--num_samples", type=fsdp.positive_int, default=1, help="answers per record")
    add("--temperature", type=fsdp.non_negative,
        help="sampling temperature (default: 0, greedy; 1 with --num_samples)")
    add("--top_k", type=fsdp.non_negative_int, default=0,
        help="sample from the k most likely tokens (0: all)")
    add("--top_p", type=fsdp.positive, default=1.0,
        help="sample from the likeliest tokens of this total probability")
    add("--score", action="store_true", help="score the records' own answers; generate nothing")
    add("--reward_model", help="folder written by rm.py: adds rewards, and selects the best sample")
    add("--sharded", action="store_true", help="keep weights sharded during decoding: less memory, slower")
    args = fsdp.parse(parser, data_file="test.json",
                      shapes=dict(micro_batch=64, max_new_tokens=32, **fsdp.left_by("sft")))
    if any(data.IMAGE in prompt for prompt in (args.prompt or [])[1:]):
        parser.error(f"got {data.IMAGE} in a later --prompt, need it in the first, to which --image belongs")
    ignored = [name for name in ("data", "images", "skip_bad_rows", "out", "overwrite", "resume", "score",
                                 "num_samples", "reward_model")
               if args.prompt and getattr(args, name) != parser.get_default(name)]
    if ignored:
        parser.error(f"got --{ignored[0]} with --prompt, which prints one answer to one conversation")
    if args.image and not args.prompt:
        parser.error("got --image without --prompt, need a question about it")
    if args.score and (args.num_samples > 1 or args.temperature is not None or args.top_k or args.top_p < 1):
        parser.error("got --score with options of sampling, need none: it scores the records' own answers")
    if args.temperature is None:
        args.temperature = 1.0 if args.num_samples > 1 else 0.0
    if args.num_samples > 1 and args.temperature == 0:
        parser.error(f"got --num_samples {args.num_samples} --temperature 0, need a temperature above 0")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        parser.error("got --top_k or --top_p, but greedy decoding: give --temperature, or --num_samples")
    return args


def ask(checkpoint, args, world):
    """Prints an answer to each --prompt, as it grows if the output is a terminal."""
    processor, turns, printed = checkpoint.processor, [], ""
    images = [os.path.abspath(path) for path in args.image]
    for path in args.image:
        if not os.path.isfile(path):
            raise data.UserError(f"got --image {path}: no such file")
        if error := data.image_error(path):
            raise data.UserError(error)

    def stream(ids):
        nonlocal printed
        text = processor.text(ids).rstrip("\ufffd")  # the end of a character may be a token of its own
        if world.rank == 0 and text.startswith(printed):
            print(text[len(printed):], end="", flush=True)
            printed = text

    def example_of(turns):
        conversation = data.read_record({"image": images, "conversations": turns}, os.sep, need_answers=0)
        example, _ = processor.example(len(turns) // 2, conversation, [])
        if example is None:
            lengths = processor.image_lengths(images)
            raise data.UserError(f"the conversation, with images of {lengths} tokens, is longer than "
                                 f"--max_len {args.max_len}: raise it")
        return example
    example_of([{"from": "human", "value": args.prompt[0]}])  # its errors, before the weights are read
    model = fsdp.build(checkpoint, args, world)
    model = model if args.sharded else fsdp.unsharded(model, args, world)
    for prompt in args.prompt:
        turns.append({"from": "human", "value": prompt})
        example, printed = example_of(turns), ""
        batch = data.collate([example], processor).to(world.device)
        (answer,), _ = sample(model, batch, model.vision_tower(batch.pixels), processor, [example], args,
                              world.any if args.sharded else torch.any,
                              stream if sys.stdout.isatty() else None)
        check_answers([example], [answer])
        if not answer[0]["text"]:
            raise data.UserError(f"the model answered nothing to --prompt {prompt!r}")
        turns.append({"from": "gpt", "value": answer[0]["text"]})
        if world.rank == 0:
            print(answer[0]["text"].removeprefix(printed), flush=True)


NOT_COPIED = {"id", "image", "conversations", "prompt", "answer", "answers"}  # fields of a record


class Writer:
    """Writes OUT on rank 0, in the order of the data. With --resume the existing lines stay, up to the first
    that does not match its record. `done` counts the lines in the file."""

    def __init__(self, args, records, conversations, processor):
        self.args, self.records, self.conversations, self.processor = args, records, conversations, processor
        self.done = self.correct = self.labelled = 0
        size = 0  # bytes of the lines that are kept
        if args.resume and os.path.isfile(args.out):
            with open(args.out, "rb") as f:
                for text, conversation in zip(f, conversations):
                    try:
                        line, expected = json.loads(text), self.start_of_line(*conversation)
                        if not text.endswith(b"\n") or any(line[key] != expected[key] for key in expected):
                            break
                        self.count(line, conversation[1])
                    except (ValueError, TypeError, KeyError):  # a crash damaged the line
                        break
                    size += len(text)
            if size < os.path.getsize(args.out):
                print(f"{args.out}: {self.done} complete lines stay, the rest is answered again", flush=True)
        self.file = open(args.out, "a", encoding="utf-8")  # noqa: SIM115 (open while the run lasts)
        self.file.truncate(size)

    def start_of_line(self, index, conversation):
        text = json.dumps(self.records[index], ensure_ascii=False).encode(errors="replace")
        record = json.loads(text, parse_constant=lambda name: None)  # NaN is not JSON
        others = {key: value for key, value in record.items()
                  if key not in NOT_COPIED and (key != "label" or value is not None)}
        return {"id": record.get("id", index), "image": record.get("image"),
                "prompt": self.processor.template.render(conversation), **others}

    def count(self, line, conversation):
        self.done += 1
        if "answer" in line and conversation.answers and isinstance(line.get("label"), str):
            self.labelled, self.correct = self.labelled + 1, self.correct + (line["answer"] == line["label"])

    def write(self, results, end):
        """Writes the lines of all records before index `end`. results: index of a record → its answers."""
        while self.done < len(self.conversations) and self.conversations[self.done][0] < end:
            index, conversation = self.conversations[self.done]
            answers, line = results.get(index), self.start_of_line(index, conversation)
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


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    if args.prompt:
        return ask(fsdp.open_checkpoint(args, world), args, world)
    fsdp.check_out_file(args, world)

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor, which = checkpoint.processor, "answers" if args.score else "prompt"
    records, conversations = fsdp.read_conversations(args.data, args, world, data.ANSWERS_NEEDED[which])
    examples, counts = data.build_examples(conversations, processor, which)
    if args.reward_model:  # it has its own template: its prompts must fit in --max_len too
        scorer = fsdp.open_second_model("reward_model", processor, args, world, reward=True)
        scorer_examples, _ = data.build_examples(conversations, scorer.processor, which)
        scorer_examples = {example.index: example for example in scorer_examples}
        counts["too_long"] += sum(example.index not in scorer_examples for example in examples)
        examples = [example for example in examples if example.index in scorer_examples]

    # models
    model = fsdp.build(checkpoint, args, world)
    if args.reward_model:
        reward_model = fsdp.build(scorer, args, world, score=True)
        same_images = processor.pixel_settings == scorer.processor.pixel_settings
        same_tower = same_images and fsdp.share_tower(model, reward_model, world)
    model = model if args.sharded else fsdp.unsharded(model, args, world)
    fsdp.record_templates(world, checkpoint, *([scorer] if args.reward_model else []))
    writer = Writer(args, records, conversations, processor) if world.rank == 0 else None
    world.on_rank0(fsdp.write_args, f"{args.out}.args.json", args, world)
    done, stop = world.on_rank0(lambda: writer.done), fsdp.Stop()
    remaining = {index for index, _ in conversations[done:]}
    examples = [example for example in examples if example.index in remaining]
    steps = data.Steps(examples, processor, args.micro_batch * world.size, args.micro_batch, world.rank,
                       world.size, shuffle=False, by_length=False)
    any_rank = world.any if args.sharded else torch.any  # with sharded weights all ranks decode in step

    # loop: each rank answers its records of the step, rank 0 writes those of all ranks
    batches = data.Loader(steps, 0, len(steps), args.workers)
    with torch.no_grad():
        for step, (batch,) in enumerate(data.progress(batches, "answers: steps")):
            if stop.asked(world):
                if world.rank == 0:
                    print(f"stopped by SIGTERM after {writer.done} records; --resume continues from there",
                          flush=True)
                return fsdp.STOPPED
            indices = steps.groups(step)[0]
            asked = [examples[i] for i in indices]
            batch = batch.to(world.device)
            features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
            if args.score:
                answers = score(model, batch, features, processor, asked)
            else:
                answers, ids = sample(model, batch, features, processor, asked, args, any_rank)
            if args.reward_model:
                scored = [scorer_examples[example.index] for example in asked]
                if not args.score:  # the sampled ids, without decoding and encoding them again
                    scored = [dataclasses.replace(
                        example, answers=[np.array(tokens) for tokens in samples],
                        token_masks=[np.ones(len(tokens), bool) for tokens in samples])
                        for example, samples in zip(scored, ids)]
                add_rewards(answers, scored, reward_model, scorer.processor, batch, features, same_images,
                            same_tower)
            check_answers(asked, answers)
            gathered = world.gather([(example.index, record) for example, record in zip(asked, answers)])
            if world.rank == 0:
                n = (step + 1) * steps.batch_size  # examples answered so far
                end = examples[n].index if n < len(examples) else len(records)
                writer.write(dict(record for part in gathered for record in part), end)
    if world.rank == 0:
        writer.write({}, len(records))  # the records at the end whose prompts are too long
        accuracy = ""
        if writer.labelled:
            accuracy = f", exact match {writer.correct / writer.labelled:.4f} of {writer.labelled}"
        print(f"wrote {args.out}: {writer.done} records, {counts['too_long']} too long, {counts['cut']} cut"
              f"{accuracy}", flush=True)


if __name__ == "__main__":
    fsdp.run(main)
