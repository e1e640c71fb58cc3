"""A step of the reward model on pairs of answers against transformers.

Ours is rm.py's step, with both answers in one packed sequence. Theirs is transformers' LLaVA without its LM
head, and an fp32 linear layer on the hidden state of the last token; chosen and rejected answer are two
sequences. The AdamW loop is the same.

    python benchmarks/bench_rm.py
"""
import common
import torch

import data
import fsdp
import rm


def ours(setup):
    model, update = common.build_ours(
        setup, ["multi_modal_projector.", "language_model.model.", "score.weight"], score=True)
    batch, margin = setup.batch, torch.zeros(len(setup.examples))

    def step():
        features = model.vision_tower(batch.pixels)
        scores = model.scores(batch, features, batch.last_token)
        scores, answer_mask = data.pad_by_sequence(scores, batch.sequence, batch.answer_shape)
        loss = rm.rm_loss(scores, answer_mask, margin, setup.options.center_coef) / len(margin)
        loss.backward()
        update()
        return [loss.item()]
    return step


def theirs(setup):
    model, head = common.build_theirs(setup).model, common.their_head(setup)
    head.bias.requires_grad = False
    inputs, _ = common.their_rows(setup)
    update = common.their_update(model, head)

    def step():
        with setup.autocast():
            hidden = model(**inputs, use_cache=False).last_hidden_state
        chosen, rejected = head(hidden[:, -1].float()).squeeze(1).chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        update()
        return [loss.item()]
    return step


def main():
    args = common.parse(common.options(__doc__))
    common.compare("RM against transformers", args, rm, ours, theirs,
                   lambda setup: common.training_flops(setup, read=0), answers=2)


if __name__ == "__main__":
    fsdp.run(main)
