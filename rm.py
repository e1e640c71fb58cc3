r"""A reward model: a vision-LLM that gives each answer a score, learned from answers ranked by people.

    loss = mean over rows of  − log P(ranking) + c · (mean score of the row)²

    P(ranking) = Π_k exp r_k / Σ_{j ≥ k} exp r_j        answers 1 … K, best first (Plackett–Luce)

which for two answers is Bradley–Terry, σ(r_1 − r_2). The score r is a scalar head on the state of the
answer's last token. InstructGPT, arXiv:2203.02155, Eq. 1; Plackett–Luce, arXiv:2305.18290, Eq. 18; a row's
margin m is taken off the better score, arXiv:2307.09288, Eq. 2; the centring penalty is after
arXiv:2312.09244, Eq. 2, which squares the sum of a pair's scores (c is four times its coefficient).
Departures: K ranked answers are one listwise term, not K(K − 1)/2 pairs; a row counts once, whatever its
number of answers; the head starts at N(0, 1/(D + 1)), arXiv:2009.01325, and its bias, which no ranking can
teach, is set at the end so that training rewards average 0.

    python rm.py                                        # on the shapes world
    torchrun --nproc_per_node=8 rm.py --model runs/sft-7b --data pairs.json --images pictures --out out

Legend: A answers of a micro-batch, B rows with answers, K most answers of a row, D width.
"""
import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F

import data
import fsdp
from data import UserError
from model import plackett_luce


def rm_loss(scores, kept, margin, center_coef):
    """Sum over rows of the loss at the head of this file, to be divided by the step's rows.

    scores [B, K] best first; kept [B, K]: which answers there are; margin [B]: 0 where a row has none."""
    best = F.pad(margin[:, None], (0, scores.shape[1] - 1))  # [B, K]: the margin, then zeros; K may be 0
    mean = (scores * kept).sum(-1) / kept.sum(-1)
    # of two answers: − log σ(r_1 − m − r_2)
    return plackett_luce(scores - best, kept).sum() + center_coef * mean.square().sum()


def pairwise(scores, kept):
    """Each row's accuracy (pairs in the right order; a tie counts half) and margin (best score less the mean
    of the others) [B]."""
    K = scores.shape[1]
    pairs = torch.ones(K, K).triu(1).to(kept) & kept[:, None, :]  # [B, better, worse]
    difference = scores[:, :, None] - scores[:, None, :]
    right = (torch.sign(difference) + 1) / 2
    best, others = scores[:, :1].sum(-1), scores[:, 1:].sum(-1) / (kept.sum(-1) - 1)
    return (right * pairs).sum((1, 2)) / pairs.sum((1, 2)), best - others


@torch.no_grad()
def score_rows(model, steps, last, world, args, stop):
    """Scores of the answers of steps 0 … last − 1, on every rank: (example, answer's length, score), an
    example's answers together, best first. [] where SIGTERM cuts it short."""
    found = []
    for step, micro_batches in enumerate(stop.until(data.loader(steps, 0, last, args.workers), world)):
        for group, batch in zip(steps.groups(step), micro_batches):
            batch = batch.to(world.device)
            scores = model.scores(batch, model.vision_tower(batch.pixels), batch.last_token).tolist()
            answers = [(i, len(answer)) for i in group for answer in steps.examples[i].answers]
            found += [(i, length, score) for (i, length), score in zip(answers, scores)]
    fsdp.reshard(model)
    if stop.asked(world):
        return []
    return [answer for part in world.gather(found) for answer in part]


def evaluate(model, steps, world, args, log, stop):
    """Held-out accuracy and margin (a row counts once), and the scores' mean and standard deviation by length
    quartile: a score that grows with length is a reward model's commonest failure. {} where SIGTERM cuts it
    short."""
    answers = score_rows(model, steps, len(steps), world, args, stop)
    if not answers:
        return {}
    rows, lengths, scores = (np.array(column) for column in zip(*answers))
    first = np.flatnonzero(np.diff(rows, prepend=-1))
    batch_row = torch.from_numpy(np.repeat(np.arange(len(first)), np.diff(first, append=len(rows))))
    accuracy, margin = pairwise(*data.pad_by_sequence(torch.from_numpy(scores), batch_row))
    figures = {"eval_accuracy": accuracy.mean(), "eval_margin": margin.mean(), "eval_score": scores.mean()}
    edges = np.quantile(lengths, [0.25, 0.5, 0.75])
    quartile = np.searchsorted(edges, lengths)
    for q in np.unique(quartile):
        of = quartile == q
        log.say(f"    {of.sum()} answers of {lengths[of].min()} to {lengths[of].max()} tokens: "
                f"score {scores[of].mean():.3f} ± {scores[of].std():.3f}")
        figures |= {f"length/q{q + 1}_mean": scores[of].mean(), f"length/q{q + 1}_std": scores[of].std()}
    return figures


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser)
    parser.set_defaults(lr=1e-5)
    add = parser.add_argument_group("reward model").add_argument
    add("--train", help="any of projector,llm,vision (default: projector,llm; with --lora_rank llm)")
    add("--projector_lr", type=float, help="its own peak rate (default: --lr, or a tenth of LoRA's default)")
    add("--center_coef", type=float, default=0.0, help="c: weight of a row's mean score, squared")
    add("--center_rows", type=int, default=2048, help="rows (whole steps) whose mean reward becomes 0")
    return fsdp.parse(parser, data_file="pairs.json", shapes=dict(
        eval_data=[os.path.join(fsdp.WORLD, "test_pairs.json")], batch_size=64, micro_batch=64, lr=7e-4,
        warmup=60, adam_beta2=0.98, max_steps=350, **fsdp.left_by("sft")))


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)
    parts = {"projector": "multi_modal_projector.", "llm": "language_model.model.", "vision": "vision_tower."}
    train = args.train.split(",")
    if not set(train) <= set(parts):
        raise UserError(f"got --train {args.train}, need any of projector,llm,vision, comma-joined")
    if args.projector_lr is not None and "projector" not in train:
        raise UserError(f"got --projector_lr {args.projector_lr}, but --train {args.train} has no projector")

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    examples = fsdp.read_examples(args.data, "ranked", processor, args, world)
    held_out = fsdp.read_examples(args.eval_data, "ranked", processor, args, world) if args.eval_data else []
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed, by_length=args.group_by_length == "yes")
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False)
    total = args.max_steps or max(1, round(args.epochs * len(steps)))

    # model and optimiser
    trainable = [*(parts[part] for part in train), "score.weight"]
    model = fsdp.build(checkpoint, args, world, trainable, score=True)
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
    shown = ("loss", "lr", "grad_norm", "accuracy", "margin", "eval_accuracy", "eval_margin")
    log = fsdp.Log(args, world, total, done, shown)
    stop = fsdp.Stop()
    log.say(f"{len(examples)} rows, {total} steps, {sum(p.numel() for p in parameters):,} trained parameters")
    if held_out and log.owes_evaluation():  # of the last step done: SIGTERM cut it short
        log.add_evaluation(evaluate(model, eval_steps, world, args, log, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        rows_of = steps.groups(step - 1)  # of each micro-batch, as indices of examples
        count, columns = world.sum(sum(map(len, rows_of)),
                                   sum(int((batch.branch >= 0).sum()) for batch in micro_batches))
        sums = torch.zeros(4, device=world.device)
        for rows, batch in zip(rows_of, micro_batches):
            batch = batch.to(world.device)
            margin = torch.tensor([examples[i].margin for i in rows], device=world.device)  # [B]
            features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
            scores, kept = data.pad_by_sequence(model.scores(batch, features, batch.last_token), batch.sequence)  # [B, K] each
            micro_loss = rm_loss(scores, kept, margin, args.center_coef) / count
            micro_loss.backward()
            with torch.no_grad():
                accuracy, gap = pairwise(scores, kept)
                mean = (scores.sum(-1) / kept.sum(-1)).sum()
                sums += torch.stack([micro_loss * count, accuracy.sum(), gap.sum(), mean]) / count
        loss, accuracy, gap, mean = world.sum(*sums)
        grad_norm = fsdp.clip_gradients(parameters, args.grad_clip)
        fsdp.check_finite(args, step, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        figures = {"loss": loss, "lr": factor * args.lr, "grad_norm": grad_norm,
                   "accuracy": accuracy, "margin": gap, "score": mean}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            figures |= evaluate(model, eval_steps, world, args, log, stop) or fsdp.EVAL_DUE
        log.step(step, columns, seconds, **figures)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and step % args.save_every == 0:
            fsdp.save_checkpoint(args, world, step, model, optimizer)
        log.seconds()
        if stopped:
            log.say(f"stopped by SIGTERM after step {step}; --resume goes on from there")
            return fsdp.STOPPED

    # the bias: training rewards average 0
    last = min(len(steps), -(-args.center_rows // args.batch_size))
    if last:
        scores = [score for _, _, score in score_rows(model, steps, last, world, args, stop)]
        if not scores:
            return fsdp.STOPPED
        with torch.no_grad():
            model.score.bias -= sum(scores) / len(scores)
        log.say(f"training rewards averaged {sum(scores) / len(scores):.4f}; the bias brings them to 0")
    fsdp.export(model, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
