"""Loading on two ranks: fsdp.build, which reads only the rank's shard, against loading all, then sharding.

Each run is in new processes, two ranks of one thread each; all parameters are fp32. Reported per rank: the
peak of anonymous memory above the level before loading, the seconds, and, to compare the results, the sum of
the absolute values of all parameters.

    python benchmarks/bench_load.py
"""
import json
import tempfile
import time

import common
import numpy as np
import torch
from safetensors.torch import load_file

import fsdp
import sft
from model import VisionLLM, our_name


def ours(setup):
    return fsdp.build(setup.checkpoint, setup.options, setup.world)


def theirs(setup):
    model = VisionLLM(setup.checkpoint.config)
    tensors = load_file(f"{setup.folder}/model.safetensors")
    model.load_state_dict({our_name(name): tensor for name, tensor in tensors.items()})
    fsdp.shard(model, setup.world, torch.float32)
    return model


def measure(load, folder, args):
    """Runs on each rank. → the largest peak memory and seconds of a rank, and the result"""
    setup, models, start = common.prepare(sft, folder, args), [], time.perf_counter()
    peak = common.peak_memory(lambda: models.append(load(setup)))
    peaks, seconds = zip(*setup.world.gather((peak, time.perf_counter() - start)))
    magnitude = sum(fsdp.local_tensor(p).abs().sum().double() for p in models[0].parameters())
    return max(peaks), max(seconds), setup.world.sum(magnitude)[0]


def main():
    args = common.parse(common.options(__doc__), dtype="fp32", threads=1)
    runs = {ours: [], theirs: []}
    with tempfile.TemporaryDirectory() as folder:
        common.forked(common.make_model, folder, args)
        for _ in range(args.rounds):
            for load in (theirs, ours):
                runs[load].append(common.forked(measure, load, folder, args, ranks=2))
    memory, seconds, result = ((np.array(a), np.array(b)) for a, b in zip(*(zip(*runs[s]) for s in runs)))
    for what, (a, b), unit in (("peak memory in MB", memory, 1e6), ("seconds", seconds, 1)):
        print(f"load on 2 ranks, {what} a rank: ours {common.spread(a / unit)}, theirs "
              f"{common.spread(b / unit)}, ours / theirs {common.spread(a / b)}")
    a, b = memory
    print(json.dumps({"title": "load", "memory": float(np.median(a / b)),
                      "difference": common.difference(*result)}))


if __name__ == "__main__":
    fsdp.run(main)
