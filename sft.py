r"""Supervised fine-tuning of a vision-LLM, and LLaVA's pre-training of the projector (--train projector
--template plain).

    loss = − Σ log p(token | picture, row before the token) / n

summed over the supervised tokens of all rows of the step, on all ranks; n is their number. Supervised are
what the gpt turns say and the token that ends each. LLaVA-1.5, arXiv:2310.03744, section 3.4; departures: the
mean is over all tokens of the step (not a mean of micro-batch means), and step k sees the same rows on any
number of ranks.

    python sft.py                                       # on the shapes world
    torchrun --nproc_per_node=8 sft.py --model llava-hf/llava-1.5-7b-hf --data rows.json --images pictures \
        --out out

Legend: N supervised tokens.
"""
import argparse
import dataclasses
import os

import torch

import data
import fsdp
from data import UserError
from model import generate


def sft_loss(logprob, count):
    """logprob [N] of a micro-batch's targets; count: targets of the whole step on all ranks. → scalar, to be
    summed."""
    return -logprob.sum() / count


@torch.no_grad()
def evaluate(model, steps, world, args, stop):
    """Mean loss per supervised token over all held-out rows; {} where SIGTERM cuts it short."""
    total = count = 0
    for micro_batches in stop.until(data.loader(steps, 0, len(steps), args.workers), world):
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
def show_answers(model, examples, processor, world, log, max_new=64):
    """Prints greedy answers to a few held-out prompts, decoded as one batch, the same on every rank."""
    prompts = []
    for example in examples[:3]:
        images = example.images[:int((example.prompt == processor.image_token).sum())]
        prompts.append(dataclasses.replace(example, answers=[], token_masks=[], images=images))
    batch = data.collate(prompts, processor).to(world.device)
    with fsdp.unsharded(model):
        features = model.vision_tower(batch.pixels)
        answers, _ = generate(model, batch, features, max_new, processor.stop, processor.banned)
    for example, (ids,) in zip(examples, answers):
        kept = example.token_masks[0].tolist()
        given = example.answers[0][:kept.index(False) if False in kept else None]  # of the first turn
        log.say(f"    {data.shown(example.id)}: {processor.text(ids)!r}  (given: {processor.text(given)!r})")


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser)
    add = parser.add_argument_group("supervised fine-tuning").add_argument
    add("--train", help="any of projector,llm,vision (default: projector,llm; with --lora_rank llm)")
    add("--projector_lr", type=float, help="its own peak rate (default: --lr, or a tenth of LoRA's default)")
    return fsdp.parse(parser, data_file="sft.json", shapes=dict(
        eval_data=[os.path.join(fsdp.WORLD, "test.json")], batch_size=64, micro_batch=64, lr=2e-3, warmup=40,
        adam_beta2=0.98, max_steps=350))


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)
    parts = {"projector": "multi_modal_projector.", "llm": "language_model.", "vision": "vision_tower."}
    train = args.train.split(",")
    if not set(train) <= set(parts):
        raise UserError(f"got --train {args.train}, need any of projector,llm,vision, comma-joined")
    if args.projector_lr is not None and "projector" not in train:
        raise UserError(f"got --projector_lr {args.projector_lr}, but --train {args.train} has no projector")

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    examples = fsdp.read_examples(args.data, "turns", processor, args, world)
    held_out = fsdp.read_examples(args.eval_data, "turns", processor, args, world) if args.eval_data else []
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed, by_length=args.group_by_length == "yes")
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False)
    total = args.max_steps or max(1, round(args.epochs * len(steps)))

    # model and optimiser
    model = fsdp.build(checkpoint, args, world, trainable=[parts[part] for part in train])
    model.set_recompute(args.recompute)
    groups = {}  # weight decay on matrices only; the projector has its own rate
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = args.projector_lr is not None and name.startswith(parts["projector"])
            lr = args.projector_lr if own_rate else args.lr
            decay = args.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr, "peak": lr, "weight_decay": decay}
                                   for (lr, decay), params in groups.items()],
                                  betas=(0.9, args.adam_beta2), fused=True)
    parameters = [parameter for params in groups.values() for parameter in params]
    fsdp.begin_run(args, world, checkpoint)
    done = fsdp.load_checkpoint(args, world, model, optimizer)
    log, stop = fsdp.Log(args, world, total, done), fsdp.Stop()
    log.say(f"{len(examples)} rows, {total} steps, {sum(p.numel() for p in parameters):,} trained parameters")
    if held_out and log.owes_evaluation():  # of the last step done: SIGTERM cut it short
        log.add_evaluation(evaluate(model, eval_steps, world, args, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        count, columns = world.sum(sum(len(batch.target) for batch in micro_batches),
                                   sum(int((batch.branch >= 0).sum()) for batch in micro_batches))
        loss = 0.0
        for batch in micro_batches:
            batch = batch.to(world.device)
            features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
            logprob = model(batch, features)  # [N]
            micro_loss = sft_loss(logprob, count)
            micro_loss.backward()
            loss += micro_loss.detach()
        loss, = world.sum(loss)
        grad_norm = fsdp.clip_gradients(parameters, args.grad_clip)
        fsdp.check_finite(args, step, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        figures = {"loss": loss, "lr": factor * args.lr, "grad_norm": grad_norm}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            figures |= evaluate(model, eval_steps, world, args, stop) or fsdp.EVAL_DUE
            if "eval_loss" in figures:
                show_answers(model, held_out, processor, world, log)
        log.step(step, columns, seconds, **figures)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and step % args.save_every == 0:
            fsdp.save_checkpoint(args, world, step, model, optimizer)
        log.seconds()
        if stopped:
            log.say(f"stopped by SIGTERM after step {step}; --resume goes on from there")
            return fsdp.STOPPED
    fsdp.export(model, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
