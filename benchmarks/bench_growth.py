"""How the cost of our DPO step (with its reference pass, see bench_dpo.py) grows, and its share of the peak.

Time: 1 → 8 answers per record, 144 → 1296 image tokens, vocabulary 32k → 256k, small and large in turn, each
against the growth of the step's FLOPs (common.forward_flops, including the logits that backward computes
again); 1 → 2 ranks of one thread, each with its own --batch records, so that the FLOPs per rank stay the
same. Memory: over the number of records, at both vocabularies; the memory per additional record should depend
on neither. A record with one answer has no preference: its loss is 0, at the same cost.

    python benchmarks/bench_growth.py
    python benchmarks/bench_growth.py --profile         # with a torch.profiler table of the step
"""
import argparse
import json
import tempfile

import bench_dpo
import common
import numpy as np

import dpo
import fsdp

LARGE = {"answers": (1, 8), "image": (168, 504), "vocab": (32000, 256000)}
LARGE_TINY = {"answers": (1, 8), "image": (28, 56), "vocab": (200, 400)}


def changed(args, **changes):
    return argparse.Namespace(**{**vars(args), **changes})


def report(title, **metrics):
    print(json.dumps({"title": title, **metrics}, ensure_ascii=False), flush=True)


def share(args):
    """FLOP/s of the step as a share of those of a matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        common.make_model(folder, args)
        setup = common.prepare(dpo, folder, args, answers=2)
        step = bench_dpo.ours(setup)
        (seconds, _), = common.alternate(step, rounds=args.rounds)
        flops, peak = bench_dpo.flops(setup), common.matrix_peak(args)
        report("DPO step", seconds=common.spread(seconds), flops=flops, peak=peak,
               share=flops / np.median(seconds) / peak)
        if args.profile:
            common.print_profile(step)


def time_growth(name, args, sizes):
    """Ratio of seconds at the larger size to those at the smaller, and the ratio of FLOPs."""
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        setups = []
        for folder, size in zip((small, large), sizes):
            sized = changed(args, **{name: size})
            common.make_model(folder, sized)
            setups.append(common.prepare(dpo, folder, sized, sized.answers))
        (small, _), (large, _) = common.alternate(*map(bench_dpo.ours, setups), rounds=args.rounds)
        flops = bench_dpo.flops(setups[1], head=4) / bench_dpo.flops(setups[0], head=4)
    ratios = np.array(large) / np.array(small)
    report(f"{name} {sizes[0]} → {sizes[1]}", seconds=[float(np.median(s)) for s in (small, large)],
           ratio=common.spread(ratios), flops=flops, ratio_over_flops=float(np.median(ratios) / flops))


def step_seconds(folder, args):
    """→ the seconds of this rank's steps"""
    setup = common.prepare(dpo, folder, args, args.answers)
    (seconds, _), = common.alternate(bench_dpo.ours(setup), rounds=args.rounds)
    return seconds


def rank_growth(args):
    """Ratio of a step's seconds on two ranks to those on one."""
    with tempfile.TemporaryDirectory() as folder:
        common.forked(common.make_model, folder, args)
        one, two = (common.forked(step_seconds, folder, args, ranks=ranks) for ranks in (1, 2))
    report("ranks 1 → 2", seconds=[float(np.median(s)) for s in (one, two)],
           ratio=float(np.median(two) / np.median(one)))


def memory_growth(args, vocabularies):
    """Peak memory at one, two and three times --batch records, and the memory per additional record."""
    for vocab in vocabularies:
        peaks = []
        with tempfile.TemporaryDirectory() as folder:
            common.forked(common.make_model, folder, changed(args, vocab=vocab))
            for times in (1, 2, 3):
                sized = changed(args, vocab=vocab, batch=times * args.batch)
                peaks.append(common.forked(
                    common.memory_of, bench_dpo.ours, dpo, folder, sized, args.answers))
        a_row = [(b - a) / args.batch / 1e6 for a, b in zip(peaks, peaks[1:])]
        report(f"memory at vocabulary {vocab}", rows=[times * args.batch for times in (1, 2, 3)],
               megabytes=[round(peak / 1e6) for peak in peaks], megabytes_a_row=a_row)


def main():
    parser = common.options(__doc__)
    parser.add_argument("--answers", type=int, default=2, help="answers per record, where not varied")
    args = common.parse(parser)
    sizes = LARGE_TINY if args.tiny else LARGE
    common.forked(share, args)
    for name in sizes:
        common.forked(time_growth, name, args, sizes[name])
    rank_growth(changed(args, threads=1))
    memory_growth(args, sizes["vocab"])


if __name__ == "__main__":
    fsdp.run(main)
