r"""Supervised fine-tuning (SFT) of a vision-LLM, and LLaVA's pre-training of the projector (--train projector
--template plain).

    loss = − 1/n Σ log p(token | image, preceding tokens)

The sum is over the n supervised tokens of the step, in all records on all ranks: the text of the gpt turns
and the token that ends each turn. LLaVA-1.5, arXiv:2310.03744, section 3.4. Departures from the paper:
- The loss is a mean over all tokens of the step, not a mean of micro-batch means.
- Step k uses the same records on any number of ranks.

    python sft.py                                       # on the shapes data set
    torchrun --nproc_per_node=8 sft.py --model llava-hf/llava-1.5-7b-hf --data sft.json --images images \
        --out out

Legend: N target tokens of a micro-batch.
"""
import argparse
import dataclasses
import os

import torch

import data
import fsdp
from model import generate

PARTS = {"projector": "multi_modal_projector.", "llm": "language_model.", "vision": "vision_tower."}


def sft_loss(token_logps, count):
    """A micro-batch's term of the step's loss. token_logps [N]: log-probability of each target token in nats;
    count: target tokens of the step, over all micro-batches and ranks."""
    return -token_logps.sum() / count


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    fsdp.arguments(parser)
    add = parser.add_argument_group("supervised fine-tuning").add_argument
    add("--train", type=lambda text: fsdp.train_parts(text, PARTS),
        help="parts to train: any of projector,llm,vision (default: projector,llm; with "
        "--lora_rank on a --model: llm)")
    add("--projector_lr", type=fsdp.non_negative,
        help="peak rate of the projector (default: --lr; with --lora_rank and no --lr: the default --lr of "
        "full training)")
    return fsdp.parse(parser, data_file="sft.json", shapes=dict(
        eval_data=[os.path.join(fsdp.SHAPES_DIR, "test.json")], batch_size=64, micro_batch=64, lr=2e-3,
        warmup=40, max_steps=350))


@torch.no_grad()
def evaluate(model, steps, world, args, stop):
    """{"eval_loss": mean over the held-out tokens, in nats per token}; {} if SIGTERM interrupts it."""
    total = count = 0
    batches = data.progress(data.Loader(steps, 0, len(steps), args.workers), "evaluation: steps")
    for micro_batches in stop.until(batches, world):
        for batch in micro_batches:
            batch = batch.to(world.device)
            total += model(batch, model.vision_tower(batch.pixels)).sum()
            count += len(batch.target)
    fsdp.reshard(model)
    if stop.asked(world):
        return {}
    total, count = world.sum(total, count)
    return {"eval_loss": -total / count}


@torch.no_grad()
def show_answers(model, examples, processor, world, log, step, max_new_tokens=64):
    """Shows greedy answers to the first three held-out prompts. Every rank decodes the same batch."""
    prompts = []
    for example in examples[:3]:
        images = example.images[:int((example.prompt == processor.image_token).sum())]
        prompts.append(dataclasses.replace(example, answers=[], token_masks=[], images=images))
    batch = data.collate(prompts, processor).to(world.device)
    features = model.vision_tower(batch.pixels)
    answers, _ = generate(model, batch, features, max_new_tokens, processor.end_ids, processor.banned,
                          any_running=world.any, cuda_graph=False)
    fsdp.reshard(model)
    shown = []
    for example, (ids,) in zip(examples, answers):
        token_mask = example.token_masks[0].tolist()  # False from the second human turn on, if there is one
        label = example.answers[0][:token_mask.index(False) if False in token_mask else None]
        shown.append({"id": example.id, "answer": processor.text(ids), "label": processor.text(label)})
    log.show(step, shown)


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    examples = fsdp.read_examples(args.data, "turns", processor, args, world)
    held_out = fsdp.read_examples(args.eval_data, "turns", processor, args, world) if args.eval_data else []
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed)
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False)
    total = args.max_steps or max(1, round(args.epochs * len(steps)))

    # model and optimiser
    model = fsdp.build(checkpoint, args, world, trainable=[PARTS[part] for part in args.train.split(",")])
    model.set_recompute(args.recompute)
    # (learning rate, weight decay) → parameters: only matrices decay; the projector may have its own rate
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = args.projector_lr is not None and name.startswith(PARTS["projector"])
            lr = args.projector_lr if own_rate else args.lr
            decay = args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
                                   for (lr, decay), params in groups.items()],
                                  betas=fsdp.ADAM_BETAS, fused=True)
    parameters = [parameter for params in groups.values() for parameter in params]
    fsdp.begin_run(args, world, checkpoint)
    done = fsdp.load_checkpoint(args, world, model, optimizer)
    log, stop = fsdp.Log(args, world, total, done), fsdp.Stop()
    log.say(f"{len(examples)} records, {total} steps of {len(steps.groups(done))} micro-batches per rank, "
            f"{sum(p.numel() for p in parameters):,} trained parameters")
    log.say(fsdp.memory_line(args, model))
    if held_out and log.owes_evaluation():  # SIGTERM interrupted the last evaluation
        log.add_evaluation(evaluate(model, eval_steps, world, args, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.Loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        count, tokens = world.sum(sum(len(batch.target) for batch in micro_batches),
                                  sum(int((batch.branch >= 0).sum()) for batch in micro_batches))
        loss = 0.0
        for batch in log.progress(micro_batches, step, "micro-batches"):
            batch = batch.to(world.device)
            features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
            token_logps = model(batch, features)  # [N]
            micro_loss = sft_loss(token_logps, count)
            micro_loss.backward()
            loss += micro_loss.detach()
        loss, = world.sum(loss)
        grad_norm = fsdp.clip_gradients(parameters)
        fsdp.check_finite(args, step, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss, "lr": factor * args.lr, "grad_norm": grad_norm}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(model, eval_steps, world, args, stop) or fsdp.EVAL_DUE
            if "eval_loss" in metrics:
                show_answers(model, held_out, processor, world, log, step)
        log.step(step, tokens, seconds, **metrics)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and step % args.save_every == 0:
            fsdp.save_checkpoint(args, world, step, model, optimizer)
        log.seconds()
        if stopped:
            log.say(f"stopped by SIGTERM after step {step}; --resume continues from there")
            return fsdp.STOPPED
    fsdp.export(model, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
