"""What a run does with its data file before the first step: reading, checking and tokenising, in wall-clock
and CPU seconds.

Writes LLaVA-like records of five turns with varied text (spans of Python's own documentation) and few
distinct images in a temporary folder; the measurement runs in a new process, whose peak memory is printed.

    python benchmarks/bench_start.py --records 200000 --tokenizer FOLDER_OF_A_LLAMA_TOKENIZER
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def write_records(folder, n, turns=5):
    """records.json and eight images; a question has 4 to 12 words, an answer 5 to 35."""
    words, rng = " ".join(topics.values()).split(), random.Random(0)

    def span(shortest, longest):
        start = rng.randrange(len(words) - longest)
        return " ".join(words[start:start + rng.randint(shortest, longest)])
    for i in range(8):
        Image.new("RGB", (64, 48), (30 * i, 0, 0)).save(os.path.join(folder, f"{i}.png"))
    with open(os.path.join(folder, "records.json"), "w", encoding="utf-8") as f:
        for i in range(n):
            said = [("human", span(4, 12)) if t % 2 == 0 else ("gpt", span(5, 35)) for t in range(2 * turns)]
            said[0] = "human", f"<image>\n{said[0][1]}"
            record = {"id": f"{i:09}", "image": f"{i % 8}.png",
                      "conversations": [{"from": role, "value": text} for role, text in said]}
            f.write(("[" if i == 0 else ",\n") + json.dumps(record))
        f.write("]")


def measure(folder, tokenizer):
    """Times each call of fsdp.read_examples, in a process of its own."""
    import data
    config = SimpleNamespace(
        model_type="llava", image_token_index=-1, image_seq_length=576,
        text_config=SimpleNamespace(vocab_size=200_000),
        vision_config=SimpleNamespace(image_size=336, patch_size=14))
    options = SimpleNamespace(template="vicuna", tokenizer=tokenizer, image_mode="crop", max_len=4096)
    processor, _ = data.load_processor(tokenizer, config, options)
    seconds, path = {}, os.path.join(folder, "records.json")

    def timed(name, function, *args):
        start = np.array([time.perf_counter(), time.process_time()])
        result = function(*args)
        seconds[name] = np.array([time.perf_counter(), time.process_time()]) - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        wall, cpu = seconds[name]
        print(f"{name:<12} {wall:7.1f} s   CPU {cpu:7.1f} s   peak so far {peak:.2f} GB", flush=True)
        return result
    rows = timed("reading", data.load_records, path)
    conversations = timed("checking", data.check_records, rows, folder, path)[0]
    del rows
    examples, _ = timed("tokenising", data.build_examples, conversations, processor, "turns")
    steps = timed("steps", data.Steps, examples, processor, 128, 4, 0, 1)
    tokens = sum(int(example.prompt.size) + sum(map(len, example.answers)) for example in examples)
    (wall, cpu), n = sum(seconds.values()), len(examples)
    print(f"{'in all':<12} {wall:7.1f} s   CPU {cpu:7.1f} s   {n} records, {tokens / n:.0f} "
          f"tokens per record, {len(steps)} steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # with the records: runs the measurement
    args = parser.parse_args()
    if args.folder:
        return measure(args.folder, args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        write_records(folder, args.records)
        again = [sys.executable, __file__, "--folder", folder, "--tokenizer", args.tokenizer]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()
