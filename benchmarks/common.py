"""Shared by the benchmarks: a model of random weights, records for it, the timing loop, and the report.

Each script times a step of this project ("ours") against the usual alternative ("theirs") in one process, in
turns (theirs, ours, theirs, ours, …) after a warm-up. Both start from the same checkpoint and see the same
pixels and token ids. The vision tower is frozen; projector and LLaMA are trained (fused AdamW, learning rate
1e-5, gradients clipped to norm 1). A step returns its losses or tokens, and those of both sides are printed.

bf16 means the usual choice of each side. Ours: FSDP's mixed precision, with fp32 masters of trained
parameters and bf16 for the rest. Theirs: torch.autocast over fp32 weights for trained models (as TRL's
bf16=True does), dtype=bfloat16 for frozen models. Neither side recomputes activations; TRL's default of doing
so is switched off, which makes TRL faster.

The benchmarks run on the CPU and read memory from Linux's /proc.

Legend: B sequences, A answers, T positions, S side of an image in pixels, I tokens per image, P tokens of a
prompt, n tokens of an answer.
"""
import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update({"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    logging,
)

import data  # noqa: E402
import fsdp  # noqa: E402

TRAINED = ("multi_modal_projector.", "language_model.")  # prefixes of our names
LR = 1e-5
WARM_UP = 2  # steps of each side


# ---- options ----

TINY = dict(batch=2, vocab=200, image=28, prompt=5, answer=6)


def options(doc):
    """→ a parser with the options that all benchmarks have"""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="timed steps per side")
    add("--batch", type=int, default=4, help="records per step")
    add("--vocab", type=int, default=32000, help="size of the vocabulary in tokens")
    add("--image", type=int, default=336, help="side of an image in pixels: 336 / 14 squared = 576 tokens")
    add("--prompt", type=int, default=48, help="tokens per prompt, without its image")
    add("--answer", type=int, default=96, help="tokens per answer")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the computation")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads per process")
    add("--tiny", action="store_true", help="tiny sizes, to test that the benchmark runs")
    add("--profile", action="store_true", help="print a torch.profiler table of our step")
    return parser


def parse(parser, **defaults):
    """→ the parsed options; `defaults` replace those of `options`."""
    parser.set_defaults(**defaults)
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args()


# ---- the model and its records ----

def make_model(folder, args):
    """Writes a LLaVA of random weights as transformers saves it, with a tokenizer of one token per word, and
    a scalar head (score.safetensors, as rm.py exports it)."""
    logging.disable_progress_bar()
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    words = {word: i for i, word in enumerate(specials + [f"w{i}" for i in range(5, args.vocab)])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"])
    tokenizer.save_pretrained(folder)
    tower = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
    llama = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                 num_key_value_heads=4)
    if args.tiny:
        tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        llama = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=args.image, patch_size=14, **tower),
        text_config=LlamaConfig(vocab_size=args.vocab, max_position_embeddings=8192, bos_token_id=1,
                                eos_token_id=2, pad_token_id=3, tie_word_embeddings=False, **llama),
        image_token_index=4, image_seq_length=(args.image // 14) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    head = torch.randn(1, llama["hidden_size"]) / llama["hidden_size"] ** 0.5
    save_file({"weight": head, "bias": torch.zeros(1)}, os.path.join(folder, fsdp.SCORE))
    shutil.copy(ROOT / "templates" / "vicuna.jinja", os.path.join(folder, "chat_template.jinja"))
    image = {"crop_size": {"height": args.image, "width": args.image},
               "size": {"shortest_edge": args.image}, "image_processor_type": "CLIPImageProcessor"}
    about = {"processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1,
             "vision_feature_select_strategy": "default", "image_token": "<image>"}
    for name, content in (("preprocessor", image), ("processor", about)):
        fsdp.write_json(os.path.join(folder, f"{name}_config.json"), content)


def make_examples(folder, args, answers):
    """→ args.batch data.Examples: <s>, an image of noise and random words, then `answers` answers, each with
    its end token"""
    draw, rows = np.random.default_rng(0), []
    for i in range(args.batch):
        path = os.path.join(folder, f"{os.getpid()}-{i}.png")  # ranks share the folder
        Image.fromarray(draw.integers(0, 256, (args.image, args.image, 3), dtype=np.uint8)).save(path)

        def words(start, n, end):
            return np.array([*start, *draw.integers(5, args.vocab, n - len(start + end)), *end], np.int32)
        prompt = words([1], args.prompt, [])
        rows.append(data.Example(
            i, str(i), np.insert(prompt, 1, 4), [words([], args.answer, [2]) for _ in range(answers)],
            [np.ones(args.answer, bool)] * answers, [path]))
    return rows


@dataclasses.dataclass
class Setup:
    """The start of both sides."""
    folder: str
    args: argparse.Namespace  # of the benchmark
    options: argparse.Namespace  # of our script
    world: fsdp.World
    checkpoint: fsdp.Checkpoint
    examples: list
    batch: data.Batch

    @property
    def processor(self):
        return self.checkpoint.processor

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.dtype == "bf16")


@functools.cache
def world():
    """fsdp.World of this process: world size 1, or one of the ranks of forked()."""
    return fsdp.launch(argparse.Namespace(replicas=1, images=""))


def prepare(script, folder, args, answers=1, more=()):
    """→ Setup. script: our module, whose options, with `more`, are parsed as from its command line."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    argv, sys.argv = sys.argv, [
        f"{script.__name__}.py", "--model", folder, "--template", "vicuna", "--data", "rows.json",
        "--images", folder, "--dtype", args.dtype, "--max_len", "8192",
        *more]
    options, sys.argv = script.parse_args(), argv
    checkpoint = fsdp.open_checkpoint(options, world())
    examples = make_examples(folder, args, answers)
    batch = data.collate(examples, checkpoint.processor)
    return Setup(folder, args, options, world(), checkpoint, examples, batch)


# ---- the sides ----

def build_ours(setup, trainable=TRAINED, score=False):
    """→ our model, and a function that clips, steps AdamW and frees the gradients, as the scripts do (their
    default has no weight decay)."""
    model = fsdp.build(setup.checkpoint, setup.options, setup.world, trainable, score)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def update():
        fsdp.clip_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
    return model, update


def build_theirs(setup, dtype=torch.float32):
    """transformers' model with its tower frozen."""
    model = LlavaForConditionalGeneration.from_pretrained(setup.folder, dtype=dtype)
    model.model.vision_tower.requires_grad_(False)
    return model


def their_update(*modules, eps=1e-8):
    """The same function for transformers' models."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, eps=eps, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def their_head(setup):
    """The scalar head of our checkpoint, in fp32."""
    tensors = fsdp.slices(os.path.join(setup.folder, fsdp.SCORE))
    head = torch.nn.Linear(tensors["weight"].get_shape()[1], 1)
    head.load_state_dict({name: rows[:] for name, rows in tensors.items()})
    return head


def their_rows(setup):
    """Our examples as transformers takes them, one sequence per answer: the first answers of all prompts,
    then the second answers, … (without answers: the prompts). → {input_ids, attention_mask [A, T],
    pixel_values [A, 3, S, S]}, and a mask of the answers' tokens [A, T]"""
    ids, mask = [], []
    for a in range(max(1, len(setup.examples[0].answers))):
        for example in setup.examples:
            lengths = setup.processor.lengths(example.prompt, example.images)
            prompt, answer = np.repeat(example.prompt, lengths), [*example.answers, []][a]
            ids.append([*prompt, *answer])
            mask.append([0] * len(prompt) + [1] * len(answer))
    ids, mask = torch.tensor(ids, dtype=torch.long), torch.tensor(mask)
    pixels = setup.batch.pixels.repeat(len(ids) // len(setup.examples), 1, 1, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, mask


# ---- cost ----

def visible_pairs(batch):
    """→ the tokens of a Batch, and its pairs of a query and a visible key: per sequence, with a prompt of P
    tokens and answers of n tokens, P (P + 1) / 2 + Σ (n P + n (n + 1) / 2)"""
    tokens = pairs = 0
    for branch in batch.branch:
        P, *answers = torch.bincount(branch[branch >= 0]).tolist()
        tokens += P + sum(answers)
        pairs += P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in answers)
    return tokens, pairs


def forward_flops(config, images, tokens, pairs, read):
    """Floating-point operations of a forward pass: two per multiply-add, matrix products only.

    tower      images · (2 · 3 · patch² · D I + layers used · (2 (1 + I) (4 D² + 2 D · MLP) + 4 (1 + I)² D))
    language   projector: images · I · 2 (D E + E²), and in each layer
               tokens · 2 E (2 E + 2 E_kv + 3 MLP) + 4 · pairs · E
    head       read · 2 E V

    D, E, E_kv: widths of the tower, of the LLaMA and of its keys; pairs: query and visible key; read: number
    of positions with logits. → {"tower", "language", "head": FLOPs}"""
    vision, text = config.vision_config, config.text_config
    patches, D, E = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size, text.hidden_size
    E_kv = E * text.num_key_value_heads // text.num_attention_heads
    layers = vision.num_hidden_layers + 1 + config.vision_feature_layer
    layer = 2 * (1 + patches) * (4 * D**2 + 2 * D * vision.intermediate_size) + 4 * (1 + patches) ** 2 * D
    tower = images * (2 * 3 * vision.patch_size**2 * D * patches + layers * layer)
    projector = images * config.image_seq_length * 2 * (D * E + E**2)
    linear = tokens * 2 * E * (2 * E + 2 * E_kv + 3 * text.intermediate_size)
    return {"tower": tower, "head": read * 2 * E * text.vocab_size,
            "language": projector + text.num_hidden_layers * (linear + 4 * pairs * E)}


def training_flops(setup, read=None, head=3):
    """FLOPs of a training step on the setup's batch: the frozen tower once, the rest three times (forward,
    then the gradients of inputs and of weights). TokenLogProbs computes the logits again in backward: head=3
    leaves this out, head=4 counts it. read=None: the batch's targets."""
    tokens, pairs = visible_pairs(setup.batch)
    read = len(setup.batch.target) if read is None else read
    parts = forward_flops(setup.checkpoint.config, len(setup.batch.pixels), tokens, pairs, read)
    return parts["tower"] + 3 * parts["language"] + head * parts["head"]


def matrix_peak(args):
    """FLOP/s of the fastest of several matrix products of three sizes on this machine."""
    best = 0.0
    for n in (64, 128, 256) if args.tiny else (512, 1024, 2048):
        a, b = (torch.randn(n, n).to(fsdp.DTYPES[args.dtype]) for _ in range(2))
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


# ---- memory ----

def anonymous():
    """Anonymous memory of this process in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def forked(function, *args, ranks=1):
    """Runs function(*args) in a new process, or in `ranks` of them. → its result (on rank 0). This process
    must not have computed anything yet, because torch's threads do not survive a fork."""
    context, pipes = multiprocessing.get_context("fork"), []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def run(rank, sender):
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sender.send(function(*args))
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=run, args=(rank, sender)).start()
        sender.close()
        pipes.append(receiver)
    return [receiver.recv() for receiver in pipes][0]  # EOFError: a process has failed, and said why


def peak_memory(function):
    """→ the peak of anonymous memory while function() runs, above the level before it, in bytes"""
    start, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        held = function()
    finally:
        done.set()
        thread.join()
    del held
    return max(seen) - start


def memory_of(side, script, folder, args, *how):
    """→ peak memory of one side, from before loading through two steps: weights, optimiser, activations"""
    def two_steps():
        step = side(prepare(script, folder, args, *how))
        step()
        step()
        return step
    return peak_memory(two_steps)


# ---- the comparison ----

def alternate(*steps, rounds):
    """Runs the steps in turn, A B A B …, after a warm-up. → for each step its seconds, and its results
    including those of the warm-up"""
    seconds, results = [[] for _ in steps], [[] for _ in steps]
    for round_ in range(WARM_UP + rounds):
        for step, times, values in zip(steps, seconds, results):
            start = time.perf_counter()
            values.append(step())
            if round_ >= WARM_UP:
                times.append(time.perf_counter() - start)
    return list(zip(seconds, results))


def spread(values):
    """Median (minimum – maximum)."""
    return f"{np.median(values):.3g} ({min(values):.3g} – {max(values):.3g})"


def compare(title, args, script, ours, theirs, flops, answers=1, more=(), their_flops=None):
    """Times a step of ours against theirs and prints the report. ours, theirs: Setup → step function; flops,
    their_flops: Setup → FLOPs of a step; answers: answers per record. → seconds of our steps and of theirs"""
    with tempfile.TemporaryDirectory() as folder:
        forked(make_model, folder, args)
        memory = [forked(memory_of, side, script, folder, args, answers, more) for side in (ours, theirs)]
        both = prepare(script, folder, args, answers, more)
        step = ours(both)
        sides = alternate(theirs(both), step, rounds=args.rounds)[::-1]
        rate, peak = flops(both) / np.median(sides[0][0]), matrix_peak(args)
    print(f"\n{title}: {args.dtype}, {args.threads} threads, {args.batch} records, vocabulary {args.vocab}, "
          f"{args.rounds} rounds")
    for name, (seconds, results), held in zip(("ours", "theirs"), sides, memory):
        print(f"  {name:7} {spread(seconds)} s, peak memory {held / 1e6:.0f} MB, {shown(results)}")
    ratios = [b / a for a, b in zip(sides[0][0], sides[1][0])]
    print(f"  ratio   {spread(ratios)}")
    print(f"  ours    {flops(both) / 1e9:.4g} GFLOP at {rate / 1e9:.4g} GFLOP/s, {rate / peak:.1%} of "
          f"the matrix product's {peak / 1e9:.4g}")
    if their_flops:
        work = their_flops(both)
        print(f"  theirs  {work / 1e9:.4g} GFLOP, {work / flops(both):.3g} times ours")
    metrics = {"title": title, "ratio": float(np.median(ratios)), "peak_share": rate / peak, "memory": memory,
               "difference": difference(*(results for _, results in sides)),
               "seconds": [seconds for seconds, _ in sides]}
    if metrics["difference"] is not None:
        print(f"  results differ by at most {metrics['difference']:.2g}")
    if args.profile:
        print_profile(step)
    print(json.dumps(metrics), flush=True)
    return metrics["seconds"]


def print_profile(step):
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def shown(results):
    """The first few losses or tokens of the first few steps."""
    texts = [" ".join(f"{value:.6g}" for value in result[:4]) for result in results[:4]]
    return "results " + (", ".join(texts) if any(texts) else "not compared")


def difference(ours, theirs):
    """→ the largest relative difference of losses, or the largest share of differing tokens in a step; None
    if steps return nothing"""
    ours, theirs = np.array(ours), np.array(theirs)
    if not ours.size:
        return None
    differ = (ours != theirs).mean(-1) if ours.dtype.kind == "i" else np.abs(ours - theirs) / np.abs(theirs)
    return float(differ.max())
