r"""Direct preference optimisation (DPO): a vision-LLM learns from ranked answers without a reward model.

    loss = (mean over records of  − log σ(β h))  +  c · SFT loss  +  λ · image loss

    h = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))        y_w chosen, y_l rejected

log π(y) is the sum of log π(y_t | x, y_1 … y_{t−1}), in nats, over the answer's target tokens: its text and
its end token; with --length_norm and for simpo, divided by their number. DPO: arXiv:2305.18290, Eq. 7; for
more than two ranked answers Eq. 20. With --loss another function of h replaces − log σ(β h). The reference
π_ref is the policy before its first step, or --ref_model; --loss simpo has none.

The SFT loss is the mean of − log π(y_t) over all target tokens of the step's chosen answers, and c is
--sft_coef (after arXiv:2404.19733, Eq. 1, which takes the mean of each answer).

DPO can be solved without looking at the image. The image loss of mDPO (arXiv:2406.11839; λ is --image_coef)
prefers the chosen answer with its image to the same answer with a corrupted one, a small crop of it; its
second term keeps that answer above the reference. It is the mean over records (0 for those without an image)
of

    − log σ(β (r_w − r_c))  − log σ(β r_w)

where r_w is log π(y_w) − log π_ref(y_w) with the image, and r_c the same with the corrupted one. It has this
form with every --loss but simpo, which refuses it, having no reference.

Departures from the DPO paper:
- The reference's log-probabilities are computed once, before training, and no second model stays in memory.
- The optimiser is AdamW, with linear warm-up and a cosine schedule; the paper uses RMSprop.
- Gradients are clipped to a global norm of 1.
- The projector and the LLaMA are trained and the vision tower is frozen, unless --train says otherwise.
- The answers of a record follow their prompt in one packed sequence. Answers do not attend to one another,
  and the position ids of each continue the prompt's.

    python dpo.py                                       # on the shapes data set
    torchrun --nproc_per_node=8 dpo.py --model runs/sft-7b --data pairs.json --images images --sft_coef 1 \
        --out out

Legend: N target tokens, A answers of a micro-batch (and C more with corrupted images), L target tokens of the
longest answer, B records, K most answers per record, M images or tiles, I features of each. In a data.Batch,
answer [N] is, for each target token, the index of its answer; sequence [A + C] is, for each answer, the index
of the packed sequence that holds it (for the first A that is the index of their record); token_shape is
(A + C, L), answer_shape (B + C, K). A rank that has no records left in a step gets a micro-batch of padding,
as all ranks take part in every pass: B = K = 0 there.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import os

import torch
import torch.nn.functional as F

import data
import fsdp
from data import UserError
from model import plackett_luce, ranking_accuracy

# --train → prefix of parameter names; all other parameters are frozen
PARTS = {"projector": "multi_modal_projector.", "llm": "language_model.", "vision": "vision_tower."}


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss="sigmoid",
             label_smoothing=0.0, simpo_gamma=0.0):
    """Loss of each pair [B], from the log-probabilities [B] of its chosen and its rejected answer under the
    policy and the reference: in nats per answer, or per token with --length_norm and for SimPO."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # [B]
    if loss == "sigmoid" and not label_smoothing:
        return -F.logsigmoid(beta * h)  # DPO, Eq. 7, arXiv:2305.18290
    if loss == "simpo":  # SimPO, arXiv:2405.14734, without a reference: ref_… are 0
        return -F.logsigmoid(beta * h - simpo_gamma)
    if loss == "hinge":  # RSO's hinge-norm, arXiv:2309.06657: SLiC's (Eq. 1, arXiv:2305.10425) on log-ratios
        return torch.relu(1 - beta * h)
    if loss == "ipo":  # IPO, Eq. 17, arXiv:2310.12036
        return (h - 1 / (2 * beta)).square()
    p, correct, flipped = label_smoothing, -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    if loss == "robust":  # unbiased if labels are flipped with probability p: Eq. 12, arXiv:2403.00409
        return ((1 - p) * correct - p * flipped) / (1 - 2 * p)
    # sigmoid with label smoothing: conservative DPO, ericmitchell.ai/cdpo.pdf
    return (1 - p) * correct + p * flipped


def listwise_dpo_loss(policy_logps, ref_logps, answer_mask, beta):
    """Loss of each record's ranking [B] (Plackett-Luce, Eq. 20, arXiv:2305.18290), from log-probabilities
    [B, K], best answer first; answer_mask [B, K] is False for padding. For two answers it equals dpo_loss
    with its default loss."""
    return plackett_luce(beta * (policy_logps - ref_logps), answer_mask)


def image_loss(chosen_logratio, corrupted_logratio, beta):
    """mDPO's conditional and anchor terms of each record [C] (Eq. 5, and 6 with δ = 0, arXiv:2406.11839),
    from log π − log π_ref of its chosen answer [C] with its image and with a corrupted one."""
    return (-F.logsigmoid(beta * (chosen_logratio - corrupted_logratio))
            - F.logsigmoid(beta * chosen_logratio))


@torch.no_grad()
def dpo_metrics(losses, rewards, policy_logps, logratio_per_token, answer_mask):
    """→ {name: sum over records}. losses [B]; the other arguments [B, K], best answer first.

    rewards are beta · (log π − log π_ref), per answer (SimPO: beta · log π per token); policy_logps is log π
    in nats per answer, and logratio_per_token log π − log π_ref in nats per token. `chosen` is the best
    answer, `rejected` the mean of the others; accuracies is the share of correctly ordered pairs, where a tie
    counts 1/2."""
    def chosen(values):
        return values[:, :1].sum(-1)  # [B]; a slice, as K may be 0

    def rejected(values):
        return (values * answer_mask)[:, 1:].sum(-1) / (answer_mask.sum(-1) - 1)  # [B]

    metrics = {
        "loss/dpo": losses,
        "rewards/chosen": chosen(rewards),
        "rewards/rejected": rejected(rewards),
        "rewards/accuracies": ranking_accuracy(rewards, answer_mask),
        "rewards/margins": chosen(rewards) - rejected(rewards),
        "logps/chosen": chosen(policy_logps),
        "logps/rejected": rejected(policy_logps),
        "logratio/chosen": chosen(logratio_per_token),
        "logratio/rejected": rejected(logratio_per_token),
    }
    return {name: values.sum() for name, values in metrics.items()}


def parse_args():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    fsdp.arguments(parser)
    parser.set_defaults(lr=5e-7)
    add = parser.add_argument_group("direct preference optimisation").add_argument
    add("--train", type=lambda text: fsdp.train_parts(text, PARTS),
        help="parts to train: any of projector,llm,vision (default: projector,llm; with "
        "--lora_rank on a --model: llm)")
    add("--projector_lr", type=fsdp.non_negative,
        help="peak rate of the projector (default: --lr; with --lora_rank and no --lr: the default --lr of "
        "full training)")
    add("--beta", type=fsdp.positive,
        help="β: implicit reward per nat of log-ratio to the reference, IPO's τ (default: 0.1; simpo: 2)")
    add("--loss", choices=["sigmoid", "ipo", "hinge", "robust", "simpo"], default="sigmoid",
        help="sigmoid: DPO; ipo: IPO; hinge: RSO's hinge-norm; robust: DPO for labels that may be flipped; "
        "simpo: SimPO, without a reference (see dpo_loss)")
    add("--simpo_gamma", type=fsdp.finite, default=0.5,
        help="γ of --loss simpo: margin between the rewards of the answers")
    add("--label_smoothing", type=fsdp.fraction, default=0.0,
        help="fraction of labels assumed to be flipped, for --loss sigmoid or robust")
    add("--length_norm", action="store_true",
        help="use log-ratios in nats per token in the loss, not per answer: needs a larger --beta, 5 in "
        "arXiv:2411.15124 (rewards/* stay per answer)")
    add("--sft_coef", type=fsdp.non_negative, default=0.0,
        help="weight of the SFT loss of the chosen answers")
    add("--image_coef", type=fsdp.non_negative, default=0.0,
        help="λ: weight of mDPO's image loss, which prefers the answer's image to a crop of it")
    add("--ref_model", help="checkpoint of the reference (default: the policy before its first step)")
    # without --data: the shapes data set, with these defaults and the model that sft.py left
    args = fsdp.parse(parser, data_file="pairs.json", shapes=dict(
        eval_data=[os.path.join(fsdp.SHAPES_DIR, "test_pairs.json")], batch_size=64, micro_batch=64, lr=3e-4,
        warmup=10, max_steps=80, sft_coef=1.0, **fsdp.left_by("sft")))
    smooth = args.label_smoothing
    args.beta = args.beta or (2.0 if args.loss == "simpo" else 0.1)
    if args.loss != "simpo" and args.simpo_gamma != parser.get_default("simpo_gamma"):
        parser.error(f"got --simpo_gamma {args.simpo_gamma} with --loss {args.loss}, need --loss simpo")
    if args.loss == "simpo" and (args.ref_model or args.image_coef):
        parser.error("got --ref_model or --image_coef with --loss simpo, which has no reference")
    if args.loss == "robust" and not smooth:
        parser.error("got --loss robust without --label_smoothing, need the share of labels that are flipped")
    if smooth and (args.loss not in ("sigmoid", "robust") or not 0 < smooth < 0.5):
        parser.error(f"got --label_smoothing {smooth} with --loss {args.loss}, need less than 0.5, and "
                     "--loss sigmoid or robust")
    return args


# ---- the reference's log-probabilities ----

def get_reference(model, splits, world, args):
    """→ {"training": records, "held_out": records}: per record {"logps": [nats of each answer]}, and with
    --image_coef "corrupted", nats of the chosen answer with corrupted images. splits: {"training":
    data.Steps, "held_out": data.Steps}. Computed once and written to OUT/reference.json; a resumed run reads
    that."""
    if args.loss == "simpo":  # no reference
        return {split: [{"logps": [0.0] * len(example.answers)} for example in steps.examples]
                for split, steps in splits.items()}
    path = os.path.join(args.out, "reference.json")
    if world.on_rank0(os.path.isfile, path):
        return world.on_rank0(read_reference, path, splits, args.image_coef)
    reference = {split: reference_pass(model, steps, world, args) for split, steps in splits.items()}
    world.on_rank0(fsdp.write_json, path, {**reference, "sha256": sha256(reference)})
    return reference


@torch.no_grad()
def reference_pass(model, steps, world, args):
    """The reference's log-probabilities of every record, on every rank. Its batches are those of the first
    epoch, so that without --ref_model the policy's first step computes exactly the same numbers."""
    results = {}
    batches = data.Loader(steps, 0, len(steps), args.workers)
    for step, micro_batches in enumerate(data.progress(batches, "reference: steps")):
        for indices, batch in zip(steps.groups(step), micro_batches):
            logps, _ = sequence_logprobs(model, batch.to(world.device))  # [A], [A + C] with --image_coef
            logps = iter(logps.tolist())
            results |= {i: {"logps": [next(logps) for _ in steps.examples[i].answers]} for i in indices}
            # those with corrupted images follow all others (collate_with_corrupted)
            for i in (i for i in indices if args.image_coef and steps.examples[i].images):
                results[i]["corrupted"] = next(logps)
    # no backward follows, which would free the unsharded weights: the next forward pass would use them even
    # after load_checkpoint
    fsdp.reshard(model)
    all_results = {i: record for part in world.gather(results) for i, record in part.items()}
    return [all_results[i] for i in range(len(all_results))]


def sha256(reference):
    return hashlib.sha256(json.dumps(reference).encode()).hexdigest()


def read_reference(path, splits, image_coef):
    """The file that get_reference wrote. UserError if it was changed or belongs to other records."""
    try:
        reference = data.read_json(*os.path.split(path))
        unchanged = reference.pop("sha256") == sha256(reference)
        # (number of answers, whether there are corrupted images) per record
        layout = {split: [(len(record["logps"]), "corrupted" in record) for record in reference[split]]
                  for split in splits}
    except (UserError, AttributeError, KeyError, TypeError):
        unchanged = False
    if not unchanged or layout != {
            split: [(len(example.answers), bool(image_coef and example.images)) for example in steps.examples]
            for split, steps in splits.items()}:
        raise UserError(f"{path} was changed since the run began: remove it, and --resume computes it again")
    return reference


def open_ref_model(processor, args, world):
    """--ref_model, which must accept the policy's batches."""
    checkpoint = fsdp.open_second_model("ref_model", processor, args, world)
    if checkpoint.processor.pixel_settings != processor.pixel_settings:
        raise UserError(f"got --ref_model {args.ref_model}, need the policy's image size, tiles and "
                        "mode: both models use the same batches")
    return fsdp.build(checkpoint, args, world)


# ---- one micro-batch, one evaluation ----

def collate_with_corrupted(examples, processor, seed):
    """Examples → Batch. After the examples' sequences comes one more per example with images: its prompt with
    corrupted images and its chosen answer. The crop is fixed by (seed, record), as the reference's
    log-probability of that answer is computed once."""
    corrupted = []
    for example in examples:
        images = [data.Corrupted(path, seed, example.index) for path in example.images]
        if images:
            corrupted.append(dataclasses.replace(example, images=images, answers=example.answers[:1],
                                                 token_masks=example.token_masks[:1]))
    return data.collate([*examples, *corrupted], processor)


def sequence_logprobs(model, batch):
    """Log-probability of each answer in nats, and its number of target tokens: [A + C] each."""
    features = model.vision_tower(batch.pixels)  # [M, I, D of the tower]
    # log π of each target token [N], from the hidden state one token before it
    token_logps = model(batch, features)
    token_logps, token_mask = data.pad_by_sequence(token_logps, batch.answer, batch.token_shape)  # [A + C, L]
    return token_logps.sum(1), token_mask.sum(1)


def chosen_tokens(examples):
    """Number of target tokens in the chosen answers."""
    return sum(int(example.token_masks[0].sum()) for example in examples)


def image_terms(chosen_logratio, chosen_length, corrupted_logps, reference, args):
    """→ the image loss of each record that has an image [C], and its reward margin β (r_w − r_c), per answer
    even with --length_norm.

    chosen_logratio, chosen_length [B]: of the chosen answers with their images, in nats and in tokens;
    corrupted_logps [C]: log π of those with corrupted images."""
    device = corrupted_logps.device
    with_image = [i for i, record in enumerate(reference) if "corrupted" in record]
    ref_logps = [reference[i]["corrupted"] for i in with_image]
    ref_logps = torch.tensor(ref_logps, dtype=torch.float32, device=device)
    index = torch.tensor(with_image, dtype=torch.long, device=device)
    chosen_logratio = chosen_logratio.index_select(0, index)  # [C], like all below
    corrupted_logratio = corrupted_logps - ref_logps
    unit = chosen_length.index_select(0, index) if args.length_norm else 1
    terms = image_loss(chosen_logratio / unit, corrupted_logratio / unit, args.beta)
    return terms, args.beta * (chosen_logratio - corrupted_logratio).detach()


def micro_batch_loss(model, batch, reference, record_count, chosen_token_count, args):
    """→ a micro-batch's term of the step's loss (a scalar), and its terms of the metrics {name: scalar}.

    reference: that of get_reference, for the micro-batch's records. Both counts are of what the loss is the
    mean of, over all ranks: the step, or the held-out set."""
    all_logps, all_lengths = sequence_logprobs(model, batch)  # [A + C] each
    all_ref_logps = [logp for record in reference for logp in record["logps"]]  # A
    A, shape = len(all_ref_logps), (len(reference), batch.answer_shape[1])

    def per_record(values):  # [A] → [B, K] and its mask
        return data.pad_by_sequence(values, batch.sequence[:A], shape)
    policy_logps, answer_mask = per_record(all_logps[:A])
    ref_logps, _ = per_record(torch.tensor(all_ref_logps, dtype=torch.float32, device=batch.ids.device))
    length, _ = per_record(all_lengths[:A])
    length = length.clamp(min=1)  # padding has length 0
    sft_loss = -policy_logps[:, :1].sum() / chosen_token_count  # a slice, as K may be 0

    # per token: length-normalised DPO of Tülu 3, arXiv:2411.15124
    unit = length if args.length_norm or args.loss == "simpo" else 1
    policy, ref = policy_logps / unit, ref_logps / unit
    if policy.shape[1] == 2:
        losses = dpo_loss(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], args.beta, args.loss,
                          args.label_smoothing, args.simpo_gamma)  # [B]
    else:  # some record has more than two answers; or K = 0
        losses = listwise_dpo_loss(policy, ref, answer_mask, args.beta)  # [B]
    loss = losses.sum() / record_count + args.sft_coef * sft_loss

    logratio = policy_logps - ref_logps  # [B, K], nats per answer
    rewards = args.beta * (policy - ref if args.loss == "simpo" else logratio).detach()
    metrics = dpo_metrics(losses, rewards, policy_logps, logratio.detach() / length, answer_mask)
    if args.image_coef:
        chosen = (logratio[:, :1].sum(1), length[:, :1].sum(1))  # [B] each
        terms, margins = image_terms(*chosen, all_logps[A:], reference, args)  # [C] each
        loss = loss + args.image_coef * terms.sum() / record_count
        # divided by record_count below, as the others are: a record without an image counts 0
        metrics |= {"loss/image": terms.detach().sum(), "rewards/image_margins": margins.sum()}
    return loss, {"loss": loss.detach(), "loss/sft": sft_loss.detach(),
                  **{name: total / record_count for name, total in metrics.items()}}


def sum_metrics(micro_batches, world):
    """A list of {name: scalar} → {name: sum over the list and over ranks}."""
    totals = {name: sum(metrics[name] for metrics in micro_batches) for name in micro_batches[0]}
    return dict(zip(totals, world.sum(*totals.values())))


@torch.no_grad()
def evaluate(model, steps, reference, world, args, stop):
    """→ {"eval_" + name: the metric over all held-out records, as in training}; {} if SIGTERM interrupts
    it."""
    counts = len(steps.examples), chosen_tokens(steps.examples)
    micro_metrics = []
    batches = data.progress(data.Loader(steps, 0, len(steps), args.workers), "evaluation: steps")
    for step, micro_batches in enumerate(stop.until(batches, world)):
        for indices, batch in zip(steps.groups(step), micro_batches):
            ref_records = [reference[i] for i in indices]
            _, metrics = micro_batch_loss(model, batch.to(world.device), ref_records, *counts, args)
            micro_metrics.append(metrics)
    fsdp.reshard(model)
    if stop.asked(world):
        return {}
    return {f"eval_{name}": value for name, value in sum_metrics(micro_metrics, world).items()}


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
    for example in examples + held_out:
        if len(example.answers) > 2 and (args.loss != "sigmoid" or args.label_smoothing):
            raise UserError(f"{example.name}: got {len(example.answers)} answers, "
                             "need two; only --loss sigmoid without --label_smoothing accepts more")
    collate = data.collate
    if args.image_coef:
        collate = functools.partial(collate_with_corrupted, seed=args.seed)
        if not any(example.images for example in examples):
            raise UserError(f"got --image_coef {args.image_coef}, but no record of --data has an image")
    # steps[k]: this rank's micro-batches of step k; steps.groups(k): the indices of their records
    steps = data.Steps(examples, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                       args.seed, collate=collate)
    eval_steps = data.Steps(held_out, processor, args.batch_size, args.micro_batch, world.rank, world.size,
                            shuffle=False, collate=collate)
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
    ref_model = open_ref_model(processor, args, world) if args.ref_model else model
    fsdp.begin_run(args, world, checkpoint)
    # before load_checkpoint: π_ref has the initial weights, also in a resumed run
    reference = get_reference(ref_model, {"training": steps, "held_out": eval_steps}, world, args)
    del ref_model  # no second model stays in memory
    done = fsdp.load_checkpoint(args, world, model, optimizer)
    log = fsdp.Log(args, world, total, done, shown=(
        "loss", "lr", "grad_norm", "rewards/accuracies", "rewards/margins"))
    stop = fsdp.Stop()
    log.say(f"{len(examples)} records, {total} steps of {len(steps.groups(done))} micro-batches per rank, "
            f"{sum(p.numel() for p in parameters):,} trained parameters")
    log.say(fsdp.memory_line(args, model))
    if held_out and log.owes_evaluation():  # SIGTERM interrupted the last evaluation
        log.add_evaluation(evaluate(model, eval_steps, reference["held_out"], world, args, stop))
        if stop.asked(world):
            return fsdp.STOPPED

    # loop
    for step, micro_batches in enumerate(data.Loader(steps, done, total, args.workers), done + 1):
        factor = fsdp.schedule(step - 1, total, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        micro_indices = steps.groups(step - 1)
        records = [examples[i] for indices in micro_indices for i in indices]
        record_count, chosen_token_count, tokens = world.sum(
            len(records), chosen_tokens(records),
            sum(int((batch.branch >= 0).sum()) for batch in micro_batches))  # all but padding, for tokens/s
        micro_metrics = []
        micro_batches = log.progress(micro_batches, step, "micro-batches")
        for indices, batch in zip(micro_indices, micro_batches):
            ref_records = [reference["training"][i] for i in indices]
            loss, metrics = micro_batch_loss(model, batch.to(world.device), ref_records, record_count,
                                             chosen_token_count, args)
            loss.backward()  # FSDP sums gradients over ranks: this is the micro-batch's share of the mean
            micro_metrics.append(metrics)
        metrics = sum_metrics(micro_metrics, world)
        grad_norm = fsdp.clip_gradients(parameters)
        fsdp.check_finite(args, step, loss=metrics["loss"], grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": factor * args.lr, "grad_norm": grad_norm}
        seconds = log.seconds()

        ended = step == total
        if held_out and (ended or args.eval_every and step % args.eval_every == 0):
            evaluation = evaluate(model, eval_steps, reference["held_out"], world, args, stop)
            metrics |= evaluation or fsdp.EVAL_DUE  # a resumed run evaluates first
        log.step(step, tokens, seconds, **metrics)
        stopped = stop.asked(world)
        if stopped or ended or args.save_every and step % args.save_every == 0:
            fsdp.save_checkpoint(args, world, step, model, optimizer)
        log.seconds()  # what evaluating and saving took is not part of the next step
        if stopped:
            log.say(f"stopped by SIGTERM after step {step}; --resume continues from there")
            return fsdp.STOPPED
    fsdp.export(model, processor, args, world)
    log.say(f"wrote {args.out}")


if __name__ == "__main__":
    fsdp.run(main)
