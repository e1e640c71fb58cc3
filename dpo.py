r"""Direct preference optimisation: a vision-LLM learns from ranked answers, without a reward model.

    loss = mean over rows of  − log σ(β h) + c · SFT      h = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)

DPO, arXiv:2305.18290, Eq. 7; more than two ranked answers: Eq. 20. SFT is − log π a token of the best answers
(--sft_coef; after arXiv:2404.19733, Eq. 1). The reference π_ref is the policy before its first step, or
--ref_model; its log-probabilities are computed in one pass before training, so no second model stays in
memory. Departures from the paper: AdamW with a cosine, not RMSprop; the SFT term's mean is over all tokens of
the step.

    python dpo.py                                       # on the shapes world
    torchrun --nproc_per_node=8 dpo.py --model runs/sft-7b --data pairs.json --images pictures --sft_coef 1 \
        --out out

Legend: N targets, A answers of a micro-batch, B rows with answers, K most answers of a row.
"""
import argparse
import hashlib
import json
import os

import torch
import torch.nn.functional as F

import data
import fsdp
from data import UserError
from model import plackett_luce


def dpo_loss(logratio, kept, beta, loss="sigmoid", label_smoothing=0.0):
    """Each row's loss [B]. logratio [B, K]: log π − log π_ref of its answers, best first, in nats an answer
    (or a token: the length-normalised losses); kept [B, K]: which answers there are."""
    if loss == "sigmoid" and not label_smoothing:
        return plackett_luce(beta * logratio, kept)  # Eq. 20, arXiv:2305.18290; for two answers Eq. 7
    h = logratio[:, :1].sum(-1) - logratio[:, 1:].sum(-1)  # of two answers; a batch of padding has K = 0
    right, wrong = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    if loss == "sigmoid":  # conservative: labels flipped with probability ε, ericmitchell.ai/cdpo.pdf
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if loss == "robust":  # the same, unbiased: Eq. 12, arXiv:2403.00409
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    if loss == "hinge":  # SLiC, Eq. 1, arXiv:2305.10425, with the margin of arXiv:2309.06657
        return torch.relu(1 - beta * h)
    return (h - 1 / (2 * beta)).square()  # IPO, Eq. 17, arXiv:2310.12036


def sequence_logprobs(model, batch, features):
    """→ log-probability of every target [N], summed over each answer [A], and the answers' lengths [A]."""
    logprob = model(batch, features)
    total = logprob.new_zeros(len(batch.last_token)).index_add(0, batch.answer, logprob)
    return logprob, total, torch.bincount(batch.answer, minlength=len(batch.last_token))


METRICS = ("loss/dpo", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
           "logps/chosen", "logps/rejected", "logratio/chosen", "logratio/rejected")


@torch.no_grad()
def dpo_metrics(loss, policy, reference, kept, length, beta):
    """The METRICS, summed over rows [9]. `chosen` is the best answer, `rejected` the mean of the others;
    rewards are β (log π − log π_ref), a tie is half an accuracy, logratio is log π − log π_ref per token on
    the given answers: not the KL of π's own samples, and negative where they lost. All [B, K] but loss
    [B]."""
    reward = beta * (policy - reference)

    def both(values):
        return values[:, :1].sum(-1), (values * kept)[:, 1:].sum(-1) / (kept.sum(-1) - 1)
    pairs = torch.ones(kept.shape[1], kept.shape[1]).triu(1).to(kept) & kept[:, None, :]  # [B, better, worse]
    right = (torch.sign(reward[:, :, None] - reward[:, None, :]) + 1) / 2
    accuracy = (right * pairs).sum((1, 2)) / pairs.sum((1, 2))
    chosen, rejected = both(reward)
    logratio = (policy - reference) / length.clamp(min=1)
    each = [loss, chosen, rejected, accuracy, chosen - rejected, *both(policy), *both(logratio)]
    return torch.stack([values.sum() for values in each])


# ---- the reference ----

@torch.no_grad()
def reference_pass(model, steps, world, args):
    """→ {example: the reference's log-probability of each of its answers}, on every rank. Batches are those
    of the first epoch, so that the policy's first step meets the same numbers."""
    found = {}
    batches = data.loader(steps, 0, len(steps), args.workers)
    for step, micro_batches in enumerate(data.progress(batches, "reference: steps")):
        for rows, batch in zip(steps.groups(step), micro_batches):
            batch = batch.to(world.device)
            _, logprob, _ = sequence_logprobs(model, batch, model.vision_tower(batch.pixels))
            counts = [len(steps.examples[i].answers) for i in rows]
            found.update(zip(rows, (part.tolist() for part in logprob.split(counts))))
    fsdp.reshard(model)
    return {i: logprob for part in world.gather(found) for i, logprob in part.items()}


def open_ref_model(processor, args, world):
    """--ref_model, which has to read the policy's batches."""
    other = fsdp.open_second_model("ref_model", processor, args, world)
    if other.processor.pictures != processor.pictures:
        raise UserError(f"got --ref_model {args.ref_model}, which sees pictures in another size or mode "
                        "than the policy: both read the same batches")
    return fsdp.build(other, args, world)


def make_reference(model, training, held_out, args, world):
    """→ {"training", "held_out"}: the reference's log-probabilities, a list per record with one per answer. A
    run that is continued finds them in OUT/reference.json."""
    path = os.path.join(args.out, "reference.json")
    if world.on_rank0(os.path.isfile, path):
        return world.on_rank0(read_reference, path, training, held_out)
    found = [reference_pass(model, steps, world, args) for steps in (training, held_out)]
    training, held_out = ([logprobs[i] for i in range(len(logprobs))] for logprobs in found)
    made = {"training": training, "held_out": held_out, "sha256": reference_digest(training, held_out)}
    world.on_rank0(fsdp.write_json, path, made)
    return made


def reference_digest(training, held_out):
    return hashlib.sha256(json.dumps([training, held_out]).encode()).hexdigest()


def read_reference(path, training, held_out):
    """What make_reference left. UserError where it was changed, or is of other answers."""
    try:
        saved = data.read_json(*os.path.split(path))
        found = [[len(answers) for answers in saved[name]] for name in ("training", "held_out")]
        right = saved["sha256"] == reference_digest(saved["training"], saved["held_out"])
    except (UserError, KeyError, TypeError):
        right = False
    if not right or found != [[len(e.answers) for e in steps.examples] for steps in (training, held_out)]:
        raise UserError(f"{path} was changed since the run began: remove it, and --resume computes it again")
    return saved


# ---- the loop ----

def forward(model, batch, rows, reference, world, args):
    """A micro-batch's DPO losses summed over rows, its best answers' log-probability summed over their
    tokens, and its METRICS."""
    batch = batch.to(world.device)
    features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
    logprob, policy, length = sequence_logprobs(model, batch, features)  # [N], [A], [A]
    given = policy.new_tensor([value for i in rows for value in reference[i]])  # [A]
    (policy, kept), (given, _), (length, _) = (data.pad_by_sequence(v, batch.sequence) for v in (policy, given, length))
    logratio = policy - given  # [B, K]
    if args.length_norm:  # a token, not an answer: length-normalised DPO of Tülu 3, arXiv:2411.15124
        logratio = logratio / length.clamp(min=1)
    losses = dpo_loss(logratio, kept, args.beta, args.loss, args.label_smoothing)  # [B]
    best = batch.sequence.diff(prepend=batch.sequence.new_tensor([-1])) > 0  # [A]: the first answer of its row
    figures = dpo_metrics(losses, policy, given, kept, length, args.beta)
    return losses.sum(), logprob[best[batch.answer]].sum(), figures


def best_tokens(rows, examples):
    """Supervised tokens of the best answers of a micro-batch."""
    return sum(int(examples[i].token_masks[0].sum()) for i in rows)


@torch.no_grad()
def evaluate(model, steps, reference, world, args, stop):
    """The loss and the METRICS over all held-out rows, means over rows; {} where SIGTERM cuts it short."""
    sums, tokens = torch.zeros(1 + len(METRICS), device=world.device), 0
    batches = data.loader(steps, 0, len(steps), args.workers)
    for step, micro_batches in enumerate(stop.until(batches, world)):
        for rows, batch in zip(steps.groups(step), micro_batches):
            _, best, figures = forward(model, batch, rows, reference, world, args)
            sums += torch.cat([-best[None], figures])
            tokens += best_tokens(rows, steps.examples)
    fsdp.reshard(model)
    if stop.asked(world):
        return {}
    sft_loss, *sums, tokens = world.sum(*sums, tokens)
    figures = {name: value / len(steps.examples) for name, value in zip(METRICS, sums)}
    return {f"eval_{name}": value for name, value in with_loss(figures, sft_loss / tokens, args).items()}


def with_loss(figures, sft_loss, args):
    """The METRICS, and what is minimised: loss = loss/dpo + c · loss/sft."""
    return {"loss": figures["loss/dpo"] + args.sft_coef * sft_loss, "loss/sft": sft_loss, **figures}


def parse_args():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    fsdp.arguments(parser)
    parser.set_defaults(lr=5e-7)
    add = parser.add_argument_group("direct preference optimisation").add_argument
    add("--train", help="any of projector,llm,vision (default: projector,llm; with --lora_rank llm)")
    add("--projector_lr", type=float, help="its own peak rate (default: --lr, or a tenth of LoRA's default)")
    add("--beta", type=float, default=0.1, help="how strongly the policy is held to the reference")
    add("--loss", choices=["sigmoid", "ipo", "hinge", "robust"], default="sigmoid",
        help="sigmoid: DPO; hinge: SLiC; robust: for labels that may be flipped (equations: dpo_loss)")
    add("--label_smoothing", type=float, default=0.0, help="share of flipped labels: sigmoid, robust")
    add("--length_norm", action="store_true", help="log-ratios a token, not an answer (not in rewards/*)")
    add("--sft_coef", type=float, default=0.0, help="weight of the best answers' own loss, as sft.py's")
    add("--ref_model", help="a reference other than the policy before its first step")
    args = fsdp.parse(parser, data_file="pairs.json", shapes=dict(
        eval_data=[os.path.join(fsdp.WORLD, "test_pairs.json")], batch_size=64, micro_batch=64, lr=3e-4,
        warmup=10, adam_beta2=0.98, max_steps=80, sft_coef=1.0, **fsdp.left_by("sft")))
    if args.beta <= 0:
        parser.error(f"got --beta {args.beta}, need more than 0")
    smooth = args.label_smoothing
    if args.loss == "robust" and not smooth:
        parser.error("got --loss robust without --label_smoothing, need the share of labels that are flipped")
    if smooth and (args.loss not in ("sigmoid", "robust") or not 0 < smooth < 0.5):
        parser.error(f"got --label_smoothing {smooth} with --loss {args.loss}, need 0 … 0.5 with sigmoid "
                     "or robust")
    return args


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
    examples = fsdp.read_examples(args.data, "ranked", processor, args, world)
    held_out = fsdp.read_examples(args.eval_data, "ranked", processor, args, world) if args.eval_data else []
    for example in examples + held_out:
        if len(example.answers) > 2 and (args.loss != "sigmoid" or args.label_smoothing):
            raise UserError(f"{example.name}: got {len(example.answers)} answers, "
                             "need two; only --loss sigmoid without --label_smoothing ranks more")
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
    ref_model = open_ref_model(processor, args, world) if args.ref_model else model  # before its first step
    fsdp.begin_run(args, world, checkpoint)
    reference = make_reference(ref_model, steps, eval_steps, args, world)
    del ref_model  # no second model stays in memory
    done = fsdp.load_checkpoint(args, world, model, optimizer)
    log = fsdp.Log(args, world, total, done, shown=("loss", "lr", "grad_norm", *METRICS[3:5], "eval_loss"))
    stop = fsdp.Stop()
    log.say(f"{len(examples)} rows, {total} steps, {sum(p.numel() for p in parameters):,} trained parameters")
    if held_out and log.owes_evaluation():  # of the last step done: SIGTERM cut it short
        log.add_evaluation(evaluate(model, eval_steps, reference["held_out"], world, args, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        rows_of = steps.groups(step - 1)  # of each micro-batch, as indices of examples
        count, tokens, columns = world.sum(
            sum(map(len, rows_of)), sum(best_tokens(rows, examples) for rows in rows_of),
            sum(int((batch.branch >= 0).sum()) for batch in micro_batches))
        sums = torch.zeros(1 + len(METRICS), device=world.device)
        for rows, batch in zip(rows_of, micro_batches):
            losses, best, figures = forward(model, batch, rows, reference["training"], world, args)
            sft_loss = -best / tokens
            (losses / count + args.sft_coef * sft_loss).backward()
            sums += torch.cat([sft_loss.detach()[None], figures / count])
        sft_loss, *figures = world.sum(*sums)
        figures = with_loss(dict(zip(METRICS, figures)), sft_loss, args)
        grad_norm = fsdp.clip_gradients(parameters, args.grad_clip)
        fsdp.check_finite(args, step, loss=figures["loss"], grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        figures |= {"lr": factor * args.lr, "grad_norm": grad_norm}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            figures |= evaluate(
                model, eval_steps, reference["held_out"], world, args, stop) or fsdp.EVAL_DUE
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
