"""A step of direct preference optimisation on pairs against TRL.

Ours is dpo.py's step plus the reference's forward pass over the batch, without gradients. (This pass runs the
current policy, for its cost only; the loss uses the log-probabilities of the policy before its first step.)
Theirs is the DPOTrainer's own train() with the reference model that it loads itself; its collator returns our
tensors.

    python benchmarks/bench_dpo.py                      # pip install -r benchmarks/requirements.txt
"""
import common
import torch

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
    args = common.parse(common.options(__doc__))
    import trl_side  # not at the top: bench_growth.py does without TRL
    common.compare("DPO against TRL", args, dpo, ours, trl_side.dpo(masked), flops, answers=2)


if __name__ == "__main__":
    fsdp.run(main)
