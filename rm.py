r"""Reward model (RM): a vision-LLM that scores answers, trained on answers ranked by people.

    loss = mean over records of  − log P(ranking)  +  c · (mean score of the record)²

    P(ranking) = Π_k exp r_k / Σ_{j ≥ k} exp r_j        answers 1 … K, best first (Plackett-Luce)

For two answers P is Bradley-Terry, σ(r_1 − r_2). The score r is a scalar head on the hidden state of the
answer's last token. InstructGPT, arXiv:2203.02155, Eq. 1; Plackett-Luce, arXiv:2305.18290, Eq. 18. The margin
m of a record, if it has one, is subtracted from the best answer's score, arXiv:2307.09288, Eq. 2. The second
term centres the scores, after arXiv:2312.09244, Eq. 2, which squares the sum of a pair's scores: c
(--center_coef) is four times its coefficient. Departures from the papers:
- K ranked answers are one listwise term, not K(K − 1)/2 pairs.
- Every record has the same weight, whatever its number of answers.
- The head's weights are initialised from N(0, 1/(D + 1)), as in arXiv:2009.01325. Its bias cannot be learned
  from rankings; it is set after training so that the mean training reward is 0.

    python rm.py                                        # on the shapes data set
    torchrun --nproc_per_node=8 rm.py --model runs/sft-7b --data pairs.json --images images --out out

Legend: A answers of a micro-batch, B records, K most answers per record, D width.
"""
import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F

import data
import fsdp
from model import plackett_luce, ranking_accuracy

PARTS = {"projector": "multi_modal_projector.", "llm": "language_model.model.", "vision": "vision_tower."}
CENTER_RECORDS = 2048  # whose mean reward is set to 0: its standard error is then 2 % of the deviation


def rm_loss(scores, answer_mask, margin, center_coef):
    """Sum over records of the loss at the head of this file.

    scores [B, K], best answer first; answer_mask [B, K], False for padding; margin [B], 0 if none."""
    shift = F.pad(margin[:, None], (0, scores.shape[1] - 1))  # [B, K]: margin, 0, 0, …; K may be 0
    ranking = plackett_luce(scores - shift, answer_mask)  # [B]; for two answers − log σ(r_1 − m − r_2)
    mean = (scores * answer_mask).sum(-1) / answer_mask.sum(-1)  # [B]
    return ranking.sum() + center_coef * mean.square().sum()


def ranking_metrics(scores, answer_mask):
    """Accuracy [B] and margin [B] per record; the margin is the best score minus the mean of the others."""
    best, others = scores[:, :1].sum(-1), scores[:, 1:].sum(-1) / (answer_mask.sum(-1) - 1)
    return ranking_accuracy(scores, answer_mask), best - others


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    fsdp.arguments(parser)
    parser.set_defaults(lr=1e-5)
    add = parser.add_argument_group("reward model").add_argument
    add("--train", type=lambda text: fsdp.train_parts(text, PARTS),
        help="parts to train: any of projector,llm,vision (default: projector,llm; with "
        "--lora_rank on a --model: llm)")
    add("--projector_lr", type=fsdp.non_negative,
        help="peak rate of the projector (default: --lr; with --lora_rank and no --lr: the default --lr of "
        "full training)")
    add("--center_coef", type=fsdp.non_negative, default=0.0,
        help="c: weight of the squared mean score of each record")
    return fsdp.parse(parser, data_file="pairs.json", shapes=dict(
        eval_data=[os.path.join(fsdp.SHAPES_DIR, "test_pairs.json")], batch_size=64, micro_batch=64, lr=7e-4,
        warmup=60, max_steps=350, **fsdp.left_by("sft")))


@torch.no_grad()
def score_records(model, steps, end, world, args, stop):
    """{index of a record: [score of each answer]} for steps 0 … end − 1, on every rank; {} if SIGTERM
    interrupts it."""
    results = {}
    batches = data.progress(data.Loader(steps, 0, end, args.workers), "evaluation: steps")
    for step, micro_batches in enumerate(stop.until(batches, world)):
        for indices, batch in zip(steps.groups(step), micro_batches):
            batch = batch.to(world.device)
            scores = model.scores(batch, model.vision_tower(batch.pixels), batch.last_token)  # [A]
            counts = [len(steps.examples[i].answers) for i in indices]
            results |= {i: answers.tolist() for i, answers in zip(indices, scores.split(counts))}
    fsdp.reshard(model)
    if stop.asked(world):
        return {}
    return {i: scores for results in world.gather(results) for i, scores in results.items()}


def evaluate(model, steps, world, args, log, stop):
    """Held-out accuracy, margin and score, and the mean and standard deviation of the scores per quartile of
    answer length, because many reward models prefer long answers. {} if SIGTERM interrupts it."""
    results = score_records(model, steps, len(steps), world, args, stop)
    if not results:
        return {}
    scores = np.array([score for answers in results.values() for score in answers])  # [A]
    lengths = np.array([len(answer) for i in results for answer in steps.examples[i].answers])  # [A]
    record = torch.tensor([n for n, answers in enumerate(results.values()) for _ in answers])  # [A]
    shape = len(results), max(map(len, results.values()))
    accuracy, margin = ranking_metrics(*data.pad_by_sequence(torch.from_numpy(scores), record, shape))
    metrics = {"eval_accuracy": accuracy.mean(), "eval_margin": margin.mean(), "eval_score": scores.mean()}
    quartile = np.searchsorted(np.quantile(lengths, [0.25, 0.5, 0.75]), lengths)
    for q in np.unique(quartile):
        in_quartile = quartile == q
        mean, std = scores[in_quartile].mean(), scores[in_quartile].std()
        log.say(f"    {in_quartile.sum()} answers of {lengths[in_quartile].min()} to "
                f"{lengths[in_quartile].max()} tokens: score {mean:.3f} ± {std:.3f}")
        metrics |= {f"length/q{q + 1}_mean": mean, f"length/q{q + 1}_std": std}
    return metrics


def main():
    # check
    args = parse_args()
    world = fsdp.launch(args)
    fsdp.check_out_dir(args, world)

    # data
    checkpoint = fsdp.open_checkpoint(args, world)
    processor = checkpoint.processor
    examples = fsdp.read_examples(args.data, "ranked", processor, args, world)
    held_out = fsdp.read_examples(args.eval_data, "ranked", processor, args, world) if args.eval_data else []
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed)
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False)
    total = args.max_steps or max(1, round(args.epochs * len(steps)))

    # model and optimiser
    trainable = [*(PARTS[part] for part in args.train.split(",")), "score.weight"]
    model = fsdp.build(checkpoint, args, world, trainable, score=True)
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
    shown = ("loss", "lr", "grad_norm", "accuracy", "margin")
    log = fsdp.Log(args, world, total, done, shown)
    stop = fsdp.Stop()
    log.say(f"{len(examples)} records, {total} steps of {len(steps.groups(done))} micro-batches per rank, "
            f"{sum(p.numel() for p in parameters):,} trained parameters")
    log.say(fsdp.memory_line(args, model))
    if held_out and log.owes_evaluation():  # SIGTERM interrupted the last evaluation
        log.add_evaluation(evaluate(model, eval_steps, world, args, log, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.Loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        micro_indices = steps.groups(step - 1)  # indices of the records, per micro-batch
        count, tokens = world.sum(sum(map(len, micro_indices)),
                                  sum(int((batch.branch >= 0).sum()) for batch in micro_batches))
        totals = torch.zeros(4, device=world.device)
        micro_batches = log.progress(micro_batches, step, "micro-batches")
        for indices, batch in zip(micro_indices, micro_batches):
            batch = batch.to(world.device)
            margin = torch.tensor([examples[i].margin for i in indices], device=world.device)  # [B]
            features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
            scores = model.scores(batch, features, batch.last_token)  # [A]
            scores, answer_mask = data.pad_by_sequence(scores, batch.sequence, batch.answer_shape)  # [B, K]
            loss = rm_loss(scores, answer_mask, margin, args.center_coef) / count
            loss.backward()
            with torch.no_grad():
                accuracy, gap = ranking_metrics(scores, answer_mask)
                mean = scores.sum(-1) / answer_mask.sum(-1)
                totals += torch.stack([loss, accuracy.sum() / count, gap.sum() / count, mean.sum() / count])
        loss, accuracy, gap, mean = world.sum(*totals)
        grad_norm = fsdp.clip_gradients(parameters)
        fsdp.check_finite(args, step, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss, "lr": factor * args.lr, "grad_norm": grad_norm,
                   "accuracy": accuracy, "margin": gap, "score": mean}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(model, eval_steps, world, args, log, stop) or fsdp.EVAL_DUE
        log.step(step, tokens, seconds, **metrics)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and step % args.save_every == 0:
            fsdp.save_checkpoint(args, world, step, model, optimizer)
        log.seconds()
        if stopped:
            log.say(f"stopped by SIGTERM after step {step}; --resume continues from there")
            return fsdp.STOPPED

    # the head's bias: the mean training reward becomes 0
    end = min(len(steps), -(-CENTER_RECORDS // args.batch_size))
    results = score_records(model, steps, end, world, args, stop)
    scores = [score for answers in results.values() for score in answers]
    if not scores:
        return fsdp.STOPPED
    with torch.no_grad():
        model.score.bias -= sum(scores) / len(scores)
    log.say(f"the mean training reward was {sum(scores) / len(scores):.4f}; the new bias makes it 0")
    fsdp.export(model, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
