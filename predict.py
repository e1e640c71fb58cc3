r"""Answers of a vision-LLM to the rows of a data file, in their order, as JSON lines.

    python predict.py                                   # greedy, the shapes world's test set
    python predict.py --num_samples 8                   # eight samples a row
    python predict.py --score                           # log-probability of the rows' own answers
    torchrun --nproc_per_node=8 predict.py --model out --data rows.json --images pictures \
        --out answers.jsonl

Each line is {"id", "image", "prompt", "answer", "label"?}; with --num_samples K also
"answers": [{"text", "logprob"}]; with --score no answer but "answers": [{"text", "logprob", "tokens"}].
A log-probability is the sum over the answer's tokens, its end token included, in nats at temperature 1.
A row whose prompt does not fit --max_len has the answer null.

Legend: A answers of a batch.
"""
import argparse
import contextlib
import json
import os
import time

import torch

import data
import fsdp
from model import generate, keyed_uniforms


@torch.no_grad()
def score(model, batch, processor, examples):
    """Log-probability [A] and length of the rows' own answers, by teacher forcing. → answers of each
    example"""
    logprob = model(batch, model.vision_tower(batch.pixels))  # [N]
    total = logprob.new_zeros(len(batch.last)).index_add(0, batch.answer, logprob).tolist()
    tokens = torch.bincount(batch.answer, minlength=len(batch.last)).tolist()
    scored = iter(zip(total, tokens))
    return [[{"text": processor.text(answer), "logprob": logprob, "tokens": n}
             for answer, (logprob, n) in zip(example.answers, scored)] for example in examples]


def sample(model, batch, processor, examples, args, anyone):
    """--num_samples answers of each example, from one prefill; greedy at temperature 0."""
    uniforms = None
    if args.temperature > 0 and examples:
        uniforms = keyed_uniforms(args.seed, 0, [e.index for e in examples], args.num_samples, args.max_new)
    features = model.vision_tower(batch.pixels)
    answers, logprob = generate(
        model, batch, features, args.max_new, processor.stop, processor.banned, uniforms, args.num_samples,
        args.temperature, args.top_k, args.top_p, anyone)
    return [[{"text": processor.text(ids), "logprob": lp} for ids, lp in zip(*row)]
            for row in zip(answers, logprob.tolist())][:len(examples)]


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser, training=False)
    add = parser.add_argument_group("prediction").add_argument
    add("--micro_batch", type=int, default=8, help="rows a forward pass on one rank")
    add("--max_new", type=int, default=256, help="tokens an answer, at most")
    add("--num_samples", type=int, default=1, help="answers a row")
    add("--temperature", type=float, default=None, help="0: greedy (default: 0, or 1 with --num_samples)")
    add("--top_k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens up to this mass")
    add("--score", action="store_true", help="score the rows' own answers instead of generating")
    add("--sharded", action="store_true", help="keep weights sharded while decoding: less memory, slower")
    tuned = os.path.join(fsdp.ROOT, "runs", "sft")  # what `python sft.py` leaves
    tuned = {"model": tuned} if os.path.isfile(os.path.join(tuned, "config.json")) else {}
    args = fsdp.parse(parser, data_file="test.json", shapes=dict(micro_batch=64, max_new=32, **tuned))
    if args.temperature is None:
        args.temperature = 1.0 if args.num_samples > 1 else 0.0
    if args.num_samples > 1 and args.temperature == 0:
        parser.error(f"got --num_samples {args.num_samples} --temperature 0, need a temperature above 0")
    return args


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_file(args)

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    rows, conversations = fsdp.read_conversations(args.data, args, world, need_answer=args.score)
    examples, counts = data.build_examples(conversations, processor, "answers" if args.score else "prompt")
    steps = data.Steps(examples, processor, args.micro_batch * world.size, args.micro_batch, world.rank,
                       world.size, shuffle=False, by_length=False)

    # model
    model = fsdp.build(checkpoint, args, world)
    whole = contextlib.nullcontext() if args.sharded else fsdp.gathered(model)

    # loop: every rank answers its rows of a step; rank 0 keeps all of them
    found, start, shown = {}, time.time(), time.time()
    with torch.no_grad(), whole:
        for step, (batch,) in enumerate(data.loader(steps, 0, len(steps), args.workers)):
            mine = [examples[i] for i in steps.groups(step)[0]]
            batch = batch.to(world.device)
            if args.score:
                answers = score(model, batch, processor, mine)
            else:
                anyone = world.any if args.sharded else torch.any  # sharded weights: all ranks decode in step
                answers = sample(model, batch, processor, mine, args, anyone)
            for part in world.gather([(example.index, answer) for example, answer in zip(mine, answers)]):
                found.update(part)
            if world.rank == 0 and time.time() - shown > 5:
                shown, rate = time.time(), len(found) / (time.time() - start)
                left = (len(examples) - len(found)) / rate
                print(f"{len(found)}/{len(examples)} rows  {rate:.1f} rows/s  {left:.0f} s left", flush=True)

    # write
    lines, right, labelled = [], 0, 0
    for index, conversation in conversations:
        row, answers = rows[index], found.get(index)
        prompt = processor.template.render(conversation)
        line = {"id": row.get("id", index), "image": row.get("image"), "prompt": prompt}
        if not args.score:
            line["answer"] = answers[0]["text"] if answers else None
            if conversation.answers:
                line["label"] = conversation.answers[0]
                labelled, right = labelled + 1, right + (line["answer"] == line["label"])
        if args.score or args.num_samples > 1:
            line["answers"] = answers
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    world.first(fsdp.write_text, args.out, "".join(lines))
    if world.rank == 0:
        accuracy = f", exact match {right / labelled:.4f} of {labelled}" if labelled else ""
        length = f"{counts['too_long']} too long, {counts['cut']} cut"
        print(f"wrote {args.out}: {len(lines)} rows, {length}{accuracy}", flush=True)


if __name__ == "__main__":
    fsdp.run(main)
