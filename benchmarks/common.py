"""What the benchmarks share: a model of random weights, rows for it, the two sides' turns, and the report.

Each script puts a step of this project ("ours") beside what one would use instead ("theirs"), in one process:
theirs, ours, theirs, ours, … after a warm-up. Both start from the same checkpoint and see the same pixels and
token ids; the vision tower is frozen, projector and LLaMA are trained (AdamW, fused, learning rate 1e-5,
gradients clipped to norm 1). A step returns what it computed, losses or tokens; both sides' are printed.

bf16 is on each side what one would pick there. Ours: FSDP's mixed precision, with fp32 masters of what is
trained and all else in bf16. Theirs: torch.autocast over fp32 weights where something is trained (TRL's
bf16=True is the same), dtype=bfloat16 for models that are only read. Nobody recomputes activations; that TRL
would by default is switched off, to its advantage in time.

All of it runs on the CPU, and reads memory from Linux's /proc.

Legend: B rows, A answers, T positions, S picture's side, I tokens an image, P of a prompt, n of an answer.
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
    """→ a parser of the options that every benchmark has"""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="timed steps of each side")
    add("--batch", type=int, default=4, help="rows a step")
    add("--vocab", type=int, default=32000, help="tokens of the vocabulary")
    add("--image", type=int, default=336, help="picture's side in pixels, 14 a patch: 336 makes 576 tokens")
    add("--prompt", type=int, default=48, help="tokens of a prompt, beside its picture's")
    add("--answer", type=int, default=96, help="tokens of an answer")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="of computation")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a process")
    add("--compile", action="store_true", help="our --compile (the peers stay as they are)")
    add("--tiny", action="store_true", help="sizes for a test that it runs")
    add("--profile", action="store_true", help="print where the time of our step goes, by torch.profiler")
    return parser


def parse(parser, **defaults):
    """defaults: of a script that has others"""
    parser.set_defaults(**defaults)
    if parser.parse_args().tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args()


# ---- the model and its rows ----

def make_model(folder, args):
    """A LLaVA of random weights as transformers saves it, with a tokenizer of one word a token, and a scalar
    head beside it (score.safetensors, as rm.py leaves it)."""
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
    picture = {"crop_size": {"height": args.image, "width": args.image},
               "size": {"shortest_edge": args.image}, "image_processor_type": "CLIPImageProcessor"}
    about = {"processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1,
             "vision_feature_select_strategy": "default", "image_token": "<image>"}
    for name, content in (("preprocessor", picture), ("processor", about)):
        fsdp.write_json(os.path.join(folder, f"{name}_config.json"), content)


def make_rows(folder, args, answers):
    """args.batch Examples: <s>, a picture of noise and random words, then so many answers, each with its end
    token."""
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
    """What both sides start from."""
    folder: str
    args: argparse.Namespace  # the benchmark's
    options: argparse.Namespace  # our script's
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
    """This process as a world of one, or as one of forked()'s ranks."""
    return fsdp.launch(argparse.Namespace(replicas=1, images=""))


def prepare(script, folder, args, answers=1, more=()):
    """→ Setup. script: our module, whose options (`more` of them given) are parsed as on its command line."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    argv, sys.argv = sys.argv, [
        f"{script.__name__}.py", "--model", folder, "--template", "vicuna", "--data", "rows.json",
        "--images", folder, "--dtype", args.dtype, "--max_len", "8192",
        *["--compile"] * args.compile, *more]
    options, sys.argv = script.parse_args(), argv
    checkpoint = fsdp.open_checkpoint(options, world())
    examples = make_rows(folder, args, answers)
    batch = data.collate(examples, checkpoint.processor)
    return Setup(folder, args, options, world(), checkpoint, examples, batch)


# ---- the sides ----

def build_ours(setup, trainable=TRAINED, score=False):
    """→ our model, and the function that ends a step: clip, AdamW, release the gradients, as in the
    scripts (which have no weight decay by default)."""
    model = fsdp.build(setup.checkpoint, setup.options, setup.world, trainable, score)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def update():
        fsdp.clip_gradients(parameters, setup.options.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    return model, update


def build_theirs(setup, dtype=torch.float32):
    """transformers' model with its tower frozen."""
    model = LlavaForConditionalGeneration.from_pretrained(setup.folder, dtype=dtype)
    model.model.vision_tower.requires_grad_(False)
    return model


def their_update(*modules, eps=1e-8):
    """The same end of a step for transformers' models."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, eps=eps, fused=True)

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return update


def their_head(setup):
    """The scalar head that our checkpoint has, in fp32."""
    tensors = fsdp.slices(os.path.join(setup.folder, fsdp.SCORE))
    head = torch.nn.Linear(tensors["weight"].get_shape()[1], 1)
    head.load_state_dict({name: rows[:] for name, rows in tensors.items()})
    return head


def their_rows(setup):
    """Our rows as transformers takes them, an answer a row: the first answers of all prompts, then the second
    … (without answers: the prompts) → input_ids, attention_mask [A, T], pixel_values [A, 3, S, S], and
    completion_mask [A, T]: where the answer stands."""
    ids, mask = [], []
    for a in range(max(1, len(setup.examples[0].answers))):
        for example in setup.examples:
            prompt, answer = setup.processor.expand(example.prompt), [*example.answers, []][a]
            ids.append([*prompt, *answer])
            mask.append([0] * len(prompt) + [1] * len(answer))
    ids, mask = torch.tensor(ids, dtype=torch.long), torch.tensor(mask)
    pixels = setup.batch.pixels.repeat(len(ids) // len(setup.examples), 1, 1, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, mask


# ---- cost ----

def visible_pairs(batch):
    """Of a Batch: its tokens, and its pairs of a query and a key that it sees: in a row of a prompt of P and
    answers of n tokens P (P + 1) / 2 + Σ (n P + n (n + 1) / 2)."""
    tokens = pairs = 0
    for branch in batch.branch:
        P, *answers = torch.bincount(branch[branch >= 0]).tolist()
        tokens += P + sum(answers)
        pairs += P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in answers)
    return tokens, pairs


def forward_flops(config, images, tokens, pairs, read):
    """Floating-point operations of a forward pass: two a multiply-add, matrix products alone.

    tower      images · (2 · 3 · patch² · D I + layers used · (2 (1 + I) (4 D² + 2 D · MLP) + 4 (1 + I)² D))
    language   projector: images · I · 2 (D E + E²), and in each layer
               tokens · 2 E (2 E + 2 E_kv + 3 MLP) + 4 · pairs · E
    head       read · 2 E V

    D width of the tower, E of the LLaMA, E_kv of its keys; pairs: of a query and a key that it sees; read:
    positions at which the vocabulary's logits are made. → {part: FLOPs}"""
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
    """Of one training step on the setup's batch: the frozen tower once, all else three times (forward, and in
    backward the gradients of inputs and of weights). The head's logits, which TokenLogProbs makes once more
    in backward, are not counted as work: with head=4 they are. read: None for the batch's targets."""
    tokens, pairs = visible_pairs(setup.batch)
    read = len(setup.batch.target) if read is None else read
    parts = forward_flops(setup.checkpoint.config, len(setup.batch.pixels), tokens, pairs, read)
    return parts["tower"] + 3 * parts["language"] + head * parts["head"]


def matrix_peak(args):
    """FLOP/s of the machine's own matrix product: the best of several, of three sizes."""
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
    """This process's anonymous memory now, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def forked(function, *args, ranks=1):
    """function(*args) in a process of its own, or in so many ranks. This one must not have computed anything
    yet: torch's threads do not survive a fork. → what it returns (on rank 0)"""
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
    """The most anonymous memory above the level before, while function() runs; in bytes."""
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
    """Peak memory of one side alone, from nothing through two steps: weights, optimiser, activations."""
    def two_steps():
        step = side(prepare(script, folder, args, *how))
        step()
        step()
        return step
    return peak_memory(two_steps)


# ---- the comparison ----

def alternate(*steps, rounds):
    """Steps in turn, A B A B …, after a warm-up. → for each its seconds and its results, the first rounds'
    results too"""
    seconds, results = [[] for _ in steps], [[] for _ in steps]
    for round_ in range(WARM_UP + rounds):
        for step, times, values in zip(steps, seconds, results):
            start = time.perf_counter()
            values.append(step())
            if round_ >= WARM_UP:
                times.append(time.perf_counter() - start)
    return list(zip(seconds, results))


def spread(values):
    """Median, and from where to where."""
    return f"{np.median(values):.3g} ({min(values):.3g} – {max(values):.3g})"


def compare(title, args, script, ours, theirs, flops, answers=1, more=()):
    """Times a step of ours against theirs and reports. ours, theirs: Setup → step function; flops: Setup →
    those of our step; answers: of a row. → seconds of our steps and of theirs"""
    with tempfile.TemporaryDirectory() as folder:
        forked(make_model, folder, args)
        memory = [forked(memory_of, side, script, folder, args, answers, more) for side in (ours, theirs)]
        both = prepare(script, folder, args, answers, more)
        step = ours(both)
        sides = alternate(theirs(both), step, rounds=args.rounds)[::-1]
        rate, peak = flops(both) / np.median(sides[0][0]), matrix_peak(args)
    print(f"\n{title}: {args.dtype}, {args.threads} threads, {args.batch} rows, vocabulary {args.vocab}, "
          f"{args.rounds} rounds")
    for name, (seconds, results), held in zip(("ours", "theirs"), sides, memory):
        print(f"  {name:7} {spread(seconds)} s, peak memory {held / 1e6:.0f} MB, {shown(results)}")
    ratios = [b / a for a, b in zip(sides[0][0], sides[1][0])]
    print(f"  ratio   {spread(ratios)}")
    print(f"  ours    {flops(both) / 1e9:.4g} GFLOP at {rate / 1e9:.4g} GFLOP/s, {rate / peak:.1%} of "
          f"the matrix product's {peak / 1e9:.4g}")
    figures = {"title": title, "ratio": float(np.median(ratios)), "peak_share": rate / peak, "memory": memory,
               "difference": difference(*(results for _, results in sides)),
               "seconds": [seconds for seconds, _ in sides]}
    if figures["difference"] is not None:
        print(f"  results differ by at most {figures['difference']:.2g}")
    if args.profile:
        print_profile(step)
    print(json.dumps(figures), flush=True)
    return figures["seconds"]


def print_profile(step):
    with torch.profiler.profile() as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def shown(results):
    """The first few losses or tokens of the first few steps."""
    texts = [" ".join(f"{value:.6g}" for value in result[:4]) for result in results[:4]]
    return "results " + (", ".join(texts) if any(texts) else "not compared")


def difference(ours, theirs):
    """Of losses the largest relative difference, of tokens the largest share of a step's that differs; None
    where a step returns nothing."""
    ours, theirs = np.array(ours), np.array(theirs)
    if not ours.size:
        return None
    differ = (ours != theirs).mean(-1) if ours.dtype.kind == "i" else np.abs(ours - theirs) / np.abs(theirs)
    return float(differ.max())
