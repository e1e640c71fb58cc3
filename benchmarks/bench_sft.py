"""A step of supervised fine-tuning against transformers, or against TRL.

Ours is sft.py's step. Theirs is LlavaForConditionalGeneration with labels and the same AdamW loop, or with
--peer trl the SFTTrainer's own train(), whose collator returns our tensors.

    python benchmarks/bench_sft.py
    python benchmarks/bench_sft.py --vocab 128256
    python benchmarks/bench_sft.py --peer trl           # pip install -r benchmarks/requirements.txt
"""
import common

import fsdp
import sft


def ours(setup):
    model, update = common.build_ours(setup)
    batch = setup.batch

    def step():
        loss = sft.sft_loss(model(batch, model.vision_tower(batch.pixels)), len(batch.target))
        loss.backward()
        update()
        return [loss.item()]
    return step


def labelled(setup):
    """Inputs of a transformers model; labels are −100 at tokens that are not targets."""
    inputs, mask = common.their_rows(setup)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}


def transformers_side(setup):
    model, inputs = common.build_theirs(setup), labelled(setup)
    update = common.their_update(model)

    def step():
        with setup.autocast():
            loss = model(**inputs).loss
        loss.backward()
        update()
        return [loss.item()]
    return step


def main():
    parser = common.options(__doc__)
    parser.add_argument("--peer", choices=["transformers", "trl"], default="transformers")
    args = common.parse(parser)
    if args.peer == "trl":
        import trl_side
        theirs = trl_side.sft(labelled)
    else:
        theirs = transformers_side
    common.compare(f"SFT against {args.peer}", args, sft, ours, theirs, common.training_flops)


if __name__ == "__main__":
    fsdp.run(main)
