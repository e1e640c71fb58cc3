"""A step of direct preference optimisation on pairs against TRL.

Ours is dpo.py's step plus the reference's forward pass over the batch, without gradients. (This pass runs the
current policy, for its cost only; the loss uses the log-probabilities of the policy before its first step.)
Theirs is the DPOTrainer's own train() with the reference model that it loads itself; its collator returns our
tensors.

    python benchmarks/bench_dpo.py                      # pip install -r benchmarks/requirements.txt
    python benchmarks/bench_dpo.py --separate --image 630   # 2,025 image tokens, once or twice per pair
"""
import dataclasses

import common
import torch

import data
import dpo
import fsdp


def ours(setup):
    model, update = common.build_ours(setup)
    batch, count, reference = setup.batch, len(setup.examples), []
    tokens = dpo.chosen_tokens(setup.examples)

    def step():
        with torch.no_grad():
            logps, _ = dpo.sequence_logprobs(model, batch)
        fsdp.reshard(model)
        if not reference:
            reference.extend({"logps": record} for record in logps.view(count, -1).tolist())
        loss, _ = dpo.micro_batch_loss(model, batch, reference, count, tokens, setup.options)
        loss.backward()
        update()
        return [loss.item()]
    return step


def separate(setup):
    """Our step with one sequence per answer."""
    examples = [dataclasses.replace(example, answers=[answer], token_masks=[mask])
                for example in setup.examples for answer, mask in zip(example.answers, example.token_masks)]
    batch = dataclasses.replace(data.collate(examples, setup.processor), sequence=setup.batch.sequence,
                                answer_shape=setup.batch.answer_shape)  # which answers are a pair
    return ours(dataclasses.replace(setup, batch=batch))


def flops(setup, head=3):
    """A training step and a forward pass (head: as in common.training_flops)."""
    tokens, pairs = common.visible_pairs(setup.batch)
    reference = common.forward_flops(setup.checkpoint.config, len(setup.batch.pixels), tokens, pairs,
                                     len(setup.batch.target))
    return common.training_flops(setup, head=head) + sum(reference.values())


def masked(setup):
    """Inputs of the DPOTrainer: the sequences of the chosen answers, then those of the rejected answers."""
    inputs, mask = common.their_rows(setup)
    return {**inputs, "completion_mask": mask}


def main():
    parser = common.options(__doc__)
    parser.add_argument("--separate", action="store_true", help="against our step with a sequence per answer")
    args = common.parse(parser)
    if args.separate:
        common.compare("DPO, packed against separate sequences", args, dpo, ours, separate, flops, answers=2)
        return
    import trl_side  # not at the top: bench_growth.py does without TRL
    common.compare("DPO against TRL", args, dpo, ours, trl_side.dpo(masked), flops, answers=2)


if __name__ == "__main__":
    fsdp.run(main)
