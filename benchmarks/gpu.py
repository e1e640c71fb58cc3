"""Checks and times this project on one GPU of 80 GB, with random weights: nothing is downloaded.

    python benchmarks/gpu.py --out DIR                      all stages, within --budget seconds
    python benchmarks/gpu.py --out DIR --only card,parity
    python benchmarks/gpu.py --out DIR --tiny               the same stages in small sizes, also without a GPU

    card      rates of the card; what attention costs for a new length; NaN gradients of cuDNN's attention
    parity    a small model against the CPU in fp32; decoding as a CUDA graph against eager decoding
    scripts   sft, rm, dpo, ppo and predict as a user starts them; a resume; the export in transformers
    decode    LLaVA-1.5-7B: prefill and decoding, against transformers
    sft, dpo  LoRA steps of the 7B model, against transformers with PEFT
    full      a full fine-tuning step of a LLaVA of 2.9B parameters, eager and compiled
    ppo       the phases of an iteration: a 7B policy and critic with LoRA, a 7B reward model
    profile   the kernels of a training step and of a decoding step
    ranks     two ranks on one card against one rank

DIR/gpu.json holds the findings, DIR/gpu.log what the stages print. Each stage runs in its own process, with a
time limit. Every finding is written at once, so a stage that fails or is cut keeps what it has found. Times
are medians in seconds; `memory` is the peak of allocated memory in GB; `matrix_share` is model FLOPs of the
packed batch (common.forward_flops; recomputation not counted) per second over the rate of a large matrix
product; `bandwidth_share` is the bytes that a decoding step has to read per second over the rate of a copy.

Legend: B records, A answers per record, K samples per prompt, T positions, n tokens per answer.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from traceback import extract_tb, format_exc
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # is_available() must not initialise CUDA before a fork
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
import common  # noqa: E402  (hides all GPUs, sets HF_HUB_OFFLINE)

os.environ.pop("CUDA_VISIBLE_DEVICES")
os.environ.update({} if VISIBLE is None else {"CUDA_VISIBLE_DEVICES": VISIBLE})
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import fsdp  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402

with contextlib.suppress(ImportError):
    import peft

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # as the default of --dtype
WIDTHS = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
SIZES = {  # WIDTHS of the LLaMA and of its vision tower, side of an image in pixels, vocabulary
    "7b": ((4096, 11008, 32, 32, 32), (1024, 4096, 24, 16), 336, 32064),
    "3b": ((2560, 7680, 32, 20, 20), (1024, 4096, 24, 16), 336, 32064),
    "gqa": ((512, 1408, 8, 8, 4), (256, 1024, 6, 4), 336, 32064),
    "mha": ((512, 1408, 8, 8, 8), (256, 1024, 6, 4), 336, 32064),
    "tiny": ((64, 96, 2, 4, 2), (32, 64, 3, 2), 28, 512),
    "tiny mha": ((64, 96, 2, 4, 4), (32, 64, 3, 2), 28, 512)}


# ---- findings and timing ----

class Findings:
    """What a stage finds, name → value; written to a file at every change."""

    def __init__(self, path):
        self.path, self.values = path, {}

    def add(self, name, value):
        self.values[name] = rounded(value)
        fsdp.write_json(self.path, self.values)
        print(name, self.values[name], flush=True)


def rounded(value):
    """Four significant digits for every float in it."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def clock():
    """time.perf_counter once the device is idle"""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, rounds=5, warm_up=2):
    """→ {"seconds": median of a call, "memory": peak in GB}"""
    for _ in range(warm_up):
        function()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = clock()
        function()
        seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds), "memory": torch.cuda.max_memory_allocated() / 1e9}


def card_rates(args):
    """→ FLOP/s of a large bf16 matrix product, bytes/s (read and written) of a copy"""
    common.world()  # first: it sets the allocator and the attention kernels
    side, size = (256, 2**22) if args.tiny else (8192, 2**31)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    product, copied = timed(lambda: a @ b, 10), timed(source.clone, 10)
    return 2 * side**3 / product["seconds"], 2 * size / copied["seconds"]


def relative_error(a, b):
    """‖a − b‖ / ‖b‖"""
    a, b = (t.detach().double().cpu() for t in (a, b))
    return float((a - b).norm() / b.norm())


# ---- models, batches and steps from random numbers ----

def make_checkpoint(args, size):
    """→ fsdp.Checkpoint that fsdp.build fills with random weights. Images are noise, keyed by their paths."""
    llama, tower, side, vocab = SIZES[size if not args.tiny else "tiny mha" if size == "mha" else "tiny"]
    llama, tower = dict(zip(WIDTHS, llama)), dict(zip(WIDTHS, tower))
    image_token, patches = vocab - 64, (side // 14) ** 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=side, patch_size=14, **tower),
        text_config=LlamaConfig(vocab_size=vocab, max_position_embeddings=8192, **llama),
        image_token_index=image_token, image_seq_length=patches, tie_word_embeddings=False)
    processor = data.Processor(
        None, None, image_token, patches, side, "crop", data.CLIP_MEAN, data.CLIP_STD, side, 3, pad=0,
        stop=frozenset({2}), banned=frozenset({0, image_token}), max_len=8192)
    processor.pixels = lambda path: np.random.default_rng(int(path)).random((3, side, side), np.float32)
    fsdp.load_weights = draw_weights
    return fsdp.Checkpoint("model", config, [], {}, processor, None, ("",))


def is_norm(name):
    return "norm" in name and name.endswith("weight")


@torch.no_grad()
def draw_weights(model, _tensors, _resized_vocab, seed):
    """Stands in for fsdp.load_weights: draws on the device, the same weights for any number of ranks."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, parameter in model.named_parameters():
        full, mesh = torch.ones(parameter.shape, dtype=parameter.dtype, device=DEVICE), parameter.device_mesh
        if not is_norm(name):
            full.normal_(0, M.initial_std(name, full.shape), generator=generator)
        parameter.to_local().copy_(full.chunk(mesh.size())[mesh.get_local_rank()])


def make_batch(checkpoint, B, prompt=48, n=0, A=0, ragged=0):
    """→ B data.Examples of random tokens, and their data.Batch. A prompt has `prompt` tokens and an image,
    its A answers have n tokens each; every next prompt and answer is shorter by `ragged` tokens."""
    image_token, draw, examples = checkpoint.processor.image_token, np.random.default_rng(0), []
    for i in range(B):
        ids, *answers = (draw.integers(5, image_token, length).astype(np.int32)
                         for length in (prompt - ragged * i, *(n - ragged * a for a in range(A))))
        masks = [np.ones(len(answer), bool) for answer in answers]
        examples.append(data.Example(i, str(i), np.insert(ids, 1, image_token), answers, masks, [str(i)]))
    return examples, data.collate(examples, checkpoint.processor)


def place(batch, model):
    """The batch on a plain model's device, its pixels in the model's dtype."""
    weight = next(model.vision_tower.parameters())
    batch = batch.to(weight.device)
    batch.pixels = batch.pixels.to(weight.dtype)
    return batch


def options(script, *argv):
    """The options of a script with a command line."""
    words = [f"{script.__name__}.py", "--model", "random", "--data", "random", *map(str, argv)]
    with mock.patch.object(sys, "argv", words):
        return script.parse_args()


@torch.no_grad()
def sample(model, batch, n, stop=(), **how):
    """→ answers of at most n tokens [B, K, n]; how: of generate (greedy without uniforms)"""
    batch = place(batch, model)
    return M.generate(model, batch, model.vision_tower(batch.pixels), n, stop, **how)[0]


def sft_loss(model, batch, count):
    return sft.sft_loss(model(batch, model.vision_tower(batch.pixels)), count)


def train_step(parameters, clip, loss_function):
    """→ a function that takes an AdamW step, and the list of its losses. Call it before any forward pass."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True), []

    def step():
        loss = loss_function()
        loss.backward()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return step, losses


class Training:
    """A model and four records, for steps of sft.py or dpo.py, with LoRA or full fine-tuning."""

    def __init__(self, args, script, size="7b", lora=True):
        A, self.n = (1, 102) if script is sft else (2, 150)
        self.n = 6 if args.tiny else self.n
        self.flop_rate, _ = card_rates(args)
        self.checkpoint = make_checkpoint(args, size)
        self.settings = options(script, *["--lora_rank", 16] * lora)
        self.model = fsdp.build(self.checkpoint, self.settings, common.world(),
                                ["language_model.", *["multi_modal_projector."] * (not lora)])
        self.examples, batch = make_batch(self.checkpoint, 4, 48, self.n, A)
        self.batch, self.reference = batch.to(DEVICE), []
        flops = common.forward_flops(self.checkpoint.config, len(batch.pixels), *common.visible_pairs(batch),
                                     len(batch.target))
        # frozen weights cost forward and the gradients of inputs, trained weights their own gradients as well
        self.flops = flops["tower"] + (2 if lora else 3) * (flops["language"] + flops["head"])
        self.step, self.losses = train_step(self.model.parameters(), fsdp.clip_gradients, self.loss)
        if script is dpo:
            with torch.no_grad():
                logps, _ = dpo.sequence_logprobs(self.model, self.batch)  # [A]
            fsdp.reshard(self.model)
            self.reference = [{"logps": pair} for pair in logps.view(-1, A).tolist()]

    def loss(self):
        if not self.reference:
            return sft_loss(self.model, self.batch, len(self.batch.target))
        B = len(self.examples)
        return dpo.forward(self.model, self.batch, self.reference, B, B * self.n, self.settings)[0]

    def measure(self, step, losses, rounds=5):
        """→ what a step costs, and its first losses"""
        result, first = timed(step, rounds), len(losses) - rounds - 2
        share = self.flops / result["seconds"] / self.flop_rate
        return {**result, "matrix_share": share, "loss": losses[first:first + 4]}


# ---- the peer: transformers ----

def make_peer(config, ours):
    """transformers' model with our tensors, not copies of them."""
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        peer = LlavaForConditionalGeneration(config)  # the weights drawn here are freed below
    torch.set_default_dtype(torch.float32)
    fsdp.reshard(ours)  # after backward roots stay unsharded
    tensors = {name: parameter.to_local() for name, parameter in ours.named_parameters()}
    tensors = {name: tensors[M.our_name(name)] for name, _ in peer.named_parameters()}
    peer.load_state_dict(tensors, assign=True)
    peer.generation_config.eos_token_id = None
    return peer.requires_grad_(False).eval()


@torch.no_grad()
def add_peer_lora(peer, adapters):
    """→ the peer under PEFT, with the adapters {our name: tensor}"""
    target = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    peer = peft.get_peft_model(peer, peft.LoraConfig(r=16, lora_alpha=16, target_modules=target))
    for name, parameter in peer.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "")
            parameter.copy_(adapters[M.our_name(name)])
    return peer


def peer_inputs(checkpoint, examples, batch):
    """One sequence per answer: the first answers of all records, then the second. No answers: prompts."""
    A = max(1, len(examples[0].answers))
    ids = [[*checkpoint.processor.expand(example.prompt), *[*example.answers, []][a]]
           for a in range(A) for example in examples]
    ids = torch.tensor(ids, device=DEVICE)  # [A · B, T]
    pixels = batch.pixels.to(DEVICE, DTYPE).repeat(A, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def peer_logprobs(peer, inputs, n):
    """Log-probabilities of the last n tokens [A · B, n]."""
    logits = peer(**inputs, use_cache=False, logits_to_keep=n + 1).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -n:, None]).squeeze(-1)


# ---- stages ----

def card(found, args):
    flop_rate, byte_rate = card_rates(args)
    found.add("matrix_tflops", flop_rate / 1e12)
    found.add("copy_tb_per_s", byte_rate / 1e12)
    found.add("cudnn_attention_after_launch", torch.backends.cuda.cudnn_sdp_enabled())
    if GPU:
        found.add("multiprocessors", torch.cuda.get_device_properties(0).multi_processor_count)
        found.add("expandable_segments", all(s["is_expandable"] for s in torch.cuda.memory_snapshot()))

    def attention(T, q_scale=1.0, mean_score=0.0):
        """→ a function: forward and backward of masked attention → gradient of the queries"""
        q, k, v = torch.randn(3, 4, 8, T, 64, device=DEVICE, dtype=torch.bfloat16) * q_scale
        q[..., 0], k[..., 0] = 1.0, mean_score * 8
        mask = torch.ones(4, 1, T, T, dtype=torch.bool, device=DEVICE).tril()
        q.requires_grad_()

        def run():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return torch.autograd.grad(out.sum(), q)[0]
        return run
    for name, cudnn in (("cudnn", True), ("no_cudnn", False)):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for T in (200, 201):  # 200 loads the kernels
            run = attention(T)
            first, following = timed(run, 1, 0)["seconds"], timed(run, 5, 0)["seconds"]
        # pytorch issue 196678: scores far below 0, and a length of 64 more than a multiple of 128
        nan = int((~attention(704, 0.1, -120.0)().isfinite()).sum())
        found.add(f"attention/{name}", {"new_length": first, "same_length": following, "nan_gradients": nan})


def model_outputs(model, batch):
    """→ log-probabilities, entropies, the gradient of their weighted sum, scores at the last tokens"""
    model.zero_grad()
    batch = place(batch, model)
    features = model.vision_tower(batch.pixels)
    logprob, entropy = model(batch, features, entropy=True)
    (logprob.sum() + 0.1 * entropy.sum()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    scores = model.scores(batch, features.detach(), batch.last_token)
    return {"logprob": logprob, "entropy": entropy, "gradient": gradient, "scores": scores}


def equal_share(answers, others):
    """Share of equal tokens; where one answer is longer, its tokens differ."""
    pairs = [pair for a, b in zip(sum(answers, []), sum(others, [])) for pair in itertools.zip_longest(a, b)]
    return sum(a == b for a, b in pairs) / len(pairs)


def parity(found, args):
    """Modules without FSDP. Those on the CPU in fp32 are the reference."""
    common.world()
    found.add("allow_tf32", torch.backends.cuda.matmul.allow_tf32)
    torch.manual_seed(0)
    for size in ("gqa", "mha"):
        checkpoint, n = make_checkpoint(args, size), 24
        reference = M.VisionLLM(checkpoint.config, score=True)
        for name, p in reference.named_parameters():
            nn.init.normal_(p, float(is_norm(name)), 0.05)
        models = {name: copy.deepcopy(reference).to(DEVICE, dtype) for name, dtype in fsdp.DTYPES.items()}
        for A in (1, 3):
            _, batch = make_batch(checkpoint, 3, 24, n, A, ragged=3)
            expected = model_outputs(reference, batch)
            for name, model in models.items():
                outputs = model_outputs(model, batch)
                found.add(f"{size}/{A} answers/{name}",
                          {what: relative_error(outputs[what], expected[what]) for what in expected})
        _, batch = make_batch(checkpoint, 4, 24, ragged=5)
        stop, draws = range(0, 32000, 64), M.keyed_uniforms(0, 1, range(4), 3, n)
        for kind, how in (("greedy", {}), ("sampled", {"uniforms": draws, "num_samples": 3}),
                          ("top_p", {"uniforms": draws, "num_samples": 3, "top_p": 0.9})):
            expected = sample(reference, batch, n, stop, **how)
            for name, model in models.items():
                graph, eager = (sample(model, batch, n, stop, cuda_graph=on, **how) for on in (True, False))
                found.add(f"{size}/{kind}/{name}", {
                    "equal_to_cpu": equal_share(graph, expected), "graph_is_eager": graph == eager})
    layer, x = M.LoRA(nn.Linear(512, 384), 16, 16), torch.randn(8, 512)
    nn.init.normal_(layer.lora_B.weight, 0, 0.05)
    results = []
    for lora in (copy.deepcopy(layer).to(DEVICE), layer):
        y = lora(x.to(lora.weight.device))
        gradients = torch.autograd.grad(y.square().sum(), (lora.lora_A.weight, lora.lora_B.weight))
        results.append(torch.cat([t.flatten() for t in (y, *gradients)]))
    found.add("lora/fp32", relative_error(*results))


def run_script(folder, label, script, *argv):
    """`python SCRIPT argv…`; --out is named by the label's part before a blank. → label, result"""
    start, out = time.perf_counter(), folder / label.split()[0]
    done = subprocess.run([sys.executable, ROOT / script, "--out", out, *map(str, argv)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    result, log = {"exit": done.returncode, "seconds": time.perf_counter() - start}, out / "log.jsonl"
    print(f"---- {label}\n{done.stdout[-4000:]}", flush=True)
    if log.is_file():
        result["loss"] = [json.loads(line).get("loss") for line in log.read_text().splitlines()]
    return label, result if done.returncode == 0 else {**result, "output": done.stdout[-500:]}


def scripts(found, args):
    folder = Path(tempfile.mkdtemp())
    shapes, base, rm, full_size = folder / "shapes", folder / "base", folder / "rm", not args.tiny

    def run(*commands):  # at the same time
        with ThreadPoolExecutor() as pool:
            for label, result in pool.map(lambda command: run_script(folder, *command), commands):
                found.add(label, result)
    run(("shapes", "examples/shapes.py", "--train", 96, "--synthetic", 96, "--prompts", 96, "--test", 16,
         "--warm_up", 10))
    train = "--images", shapes / "images", "--max_steps", 4, "--batch_size", 16, "--micro_batch", 8
    first = ("sft.py", *train, "--model", shapes / "model", "--data", shapes / "sft.json", "--eval_data",
             shapes / "test.json", "--save_every", 2)
    run(("sft", *first))
    shutil.copytree(folder / "sft", base)  # what the others read while sft is resumed
    shutil.rmtree(folder / "sft" / "checkpoints" / "step_4")
    pairs = ("dpo.py", *train, "--model", base, "--data", shapes / "pairs.json")
    run(("sft resumed", *first, "--resume"), ("dpo", *pairs), *[("rm", "rm.py", *pairs[1:])] * full_size)
    losses = found.values["sft"]["loss"], found.values["sft resumed"]["loss"]
    found.add("resume_difference", max(abs(a - b) for a, b in zip(*losses, strict=True)))
    if full_size:
        predict = ("predict.py", "--images", shapes / "images", "--model", base, "--max_new_tokens", 12,
                   "--data", shapes / "test.json")
        run(("ppo", "ppo.py", *train, "--model", base, "--max_new_tokens", 12, "--reward_model", rm,
             "--data", shapes / "prompts.json", "--rollout_batch", 32),
            ("greedy.jsonl", *predict), ("best.jsonl", *predict, "--num_samples", 4, "--reward_model", rm),
            ("dpo_lora", *pairs, "--lora_rank", 8), ("sft_offload", *first, "--offload"))
    found.add("export_error", export_error(folder / "dpo", shapes))
    shutil.rmtree(folder)


@torch.no_grad()
def export_error(folder, shapes):
    """Relative error of the log-probabilities that transformers computes with an exported checkpoint."""
    settings = options(sft, "--model", folder, "--data", shapes / "test.json", "--images", shapes / "images")
    checkpoint = fsdp.open_checkpoint(settings, common.world())
    model = fsdp.build(checkpoint, settings, common.world())
    examples = fsdp.read_examples(settings.data, "turns", checkpoint.processor, settings, common.world())
    batch = data.collate(examples[:8], checkpoint.processor).to(DEVICE)
    ours = model(batch, model.vision_tower(batch.pixels))
    peer = LlavaForConditionalGeneration.from_pretrained(folder, dtype=DTYPE).to(DEVICE)
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(),
                  pixel_values=batch.pixels.to(DTYPE)).logits.float().flatten(0, 1)[batch.logit_position]
    return relative_error(logits.log_softmax(-1).gather(-1, batch.target[:, None]).squeeze(-1), ours)


def decode(found, args):
    n, many = (8, 4) if args.tiny else (64, 64)
    checkpoint, (_, byte_rate) = make_checkpoint(args, "7b"), card_rates(args)
    text, tokens = checkpoint.config.text_config, {}
    settings = options(sft)
    model = fsdp.build(checkpoint, settings, common.world())
    weights = sum(p.numel() for p in model.language_model.parameters()) - text.vocab_size * text.hidden_size
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # numbers per position

    def measure(name, B, decoder, K=1):
        """decoder(examples, batch, n) → tokens. A graph's cost is in both times of the difference."""
        examples, batch = make_batch(checkpoint, B)
        batch = batch.to(DEVICE)
        decoder(examples, batch, n // 8)

        def run(length):
            tokens[name] = decoder(examples, batch, length)
        prefill, short, result = (timed(functools.partial(run, length), 1, 0) for length in (1, n // 8, n))
        token = (result["seconds"] - short["seconds"]) / (n - n // 8)
        read = DTYPE.itemsize * (weights + B * cache * (batch.ids.shape[1] + K * n // 2))
        found.add(name, {**result, "prefill": prefill["seconds"], "token": token,
                         "tokens_per_s": B * K / token, "bandwidth_share": read / token / byte_rate})
        gc.collect()
        torch.cuda.empty_cache()
    plain, draws = fsdp.unsharded(model, settings, common.world()), M.keyed_uniforms(0, 1, range(8), 8, n)
    measure("ours/8", 8, lambda examples, batch, n: sample(plain, batch, n))
    measure("ours/8/eager", 8, lambda examples, batch, n: sample(plain, batch, n, cuda_graph=False))
    measure(f"ours/{many}", many, lambda examples, batch, n: sample(plain, batch, n))
    measure("ours/8 prompts, 8 samples", 8, K=8, decoder=lambda examples, batch, n: sample(
        plain, batch, n, uniforms=draws[:, :, :n], num_samples=8))
    peer = make_peer(checkpoint.config, model)

    def generate(examples, batch, n, **how):
        inputs = peer_inputs(checkpoint, examples, batch)
        ids = peer.generate(**inputs, max_new_tokens=n, do_sample=False, **how)
        return [[sequence] for sequence in ids[:, -n:].tolist()]
    for B in (8, many):
        measure(f"transformers/{B}", B, generate)
        found.add(f"equal_tokens/{B}", equal_share(tokens[f"ours/{B}"], tokens[f"transformers/{B}"]))
    if GPU:  # it compiles, for longer than the limit perhaps
        measure("transformers/8/static", 8, functools.partial(generate, cache_implementation="static"))


def lora_step(found, args, script):
    run = Training(args, script)
    found.add("positions", run.batch.ids.shape[1])
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    adapters = {name: p.detach().to_local().clone() for name, p in trained}
    found.add("ours", run.measure(run.step, run.losses))
    run.model.set_recompute(True)
    found.add("ours/recompute", run.measure(run.step, run.losses, 3))
    if "peft" not in sys.modules:
        found.add("transformers", "not run: peft is not installed")
        return
    peer = add_peer_lora(make_peer(run.checkpoint.config, run.model), adapters)
    inputs, n = peer_inputs(run.checkpoint, run.examples, run.batch), run.n
    run.model = run.step = None

    def loss():
        if script is sft:
            return -peer_logprobs(peer, inputs, n).mean()
        with torch.no_grad(), peer.disable_adapter():
            ref = peer_logprobs(peer, inputs, n).sum(1)
        chosen, rejected = (peer_logprobs(peer, inputs, n).sum(1) - ref).chunk(2)
        return -F.logsigmoid(run.settings.beta * (chosen - rejected)).mean()
    found.add("transformers", run.measure(*train_step(peer.parameters(), nn.utils.clip_grad_norm_, loss)))


def full(found, args):
    run = Training(args, sft, "3b", lora=False)
    found.add("positions", run.batch.ids.shape[1])
    found.add("parameters", sum(p.numel() for p in run.model.parameters() if p.requires_grad))
    found.add("eager", run.measure(run.step, run.losses))
    if GPU:
        run.model.compile_layers()
        found.add("first compiled step", timed(run.step, 1, 0)["seconds"])
        found.add("compiled", run.measure(run.step, run.losses))


def ppo_iteration(found, args):
    """The phases of ppo.main, twice; the second iteration is timed."""
    B, micro_batch, n = (4, 2, 6) if args.tiny else (16, 4, 128)
    settings = options(ppo, "--reward_model", "random", "--lora_rank", 16, "--max_new_tokens", n,
                       "--rollout_batch", B, "--batch_size", B, "--micro_batch", micro_batch)
    checkpoint, world, stop = make_checkpoint(args, "7b"), common.world(), fsdp.Stop()
    processor, (examples, _) = checkpoint.processor, make_batch(checkpoint, B)
    policy, reference, scorer, critic = ppo.build_models(checkpoint, checkpoint, settings, world)
    models = {"policy": policy, "critic": critic}
    optimizers = {name: ppo.adam(model, settings.lr, settings) for name, model in models.items()}
    found.add("memory/models", torch.cuda.memory_allocated() / 1e9)
    prompts = ppo.Prompts(examples, [], {example.index: example for example in examples})
    steps = data.Steps(examples, processor, B, micro_batch, 0, 1, drop_last=True)
    batches, moments = iter(data.loader(steps, 0, 2, 0)), torch.tensor([0.0, 1.0])
    for iteration in (1, 2):
        times = [clock()]
        rollouts = ppo.generate_rollouts(policy, steps, iteration - 1, 1, batches, processor, settings, world,
                                         stop)
        times.append(clock())
        scores = [scorer.score(rollout, prompts) for rollout in rollouts]
        scores = ppo.postprocess_scores(scores, rollouts, moments, settings)
        times.append(clock())
        old_outputs = [ppo.logprobs_and_values(rollout, policy, reference, critic, settings)
                       for rollout in rollouts]
        fsdp.reshard(policy, critic, scorer.model)
        times.append(clock())
        targets = ppo.compute_advantages(old_outputs, scores, settings.kl_coef, settings, world)
        minibatch = list(zip(rollouts, old_outputs, targets))
        results = [ppo.ppo_step(minibatch, None, models, optimizers, iteration, settings, world)
                   for _ in range(settings.ppo_epochs)]
        times.append(clock())
    phases = ("generate", "score", "forward", "update")
    seconds = dict(zip(phases, (end - start for start, end in itertools.pairwise(times))))
    found.add("phases", {**seconds, "generate_share": seconds["generate"] / sum(seconds.values())})
    found.add("memory", torch.cuda.max_memory_allocated() / 1e9)
    found.add("metrics", {name: float(value) for name, value in ppo.update_metrics(results).items()})


def kernels(function):
    """→ {kernel: (milliseconds, calls)} of a second call; without a GPU, of operators"""
    function()
    clock()
    activity = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
        clock()
    events, key = profiler.key_averages(), "self_device_time_total" if GPU else "self_cpu_time_total"
    print(events.table(sort_by=key, row_limit=30), flush=True)
    kind = torch.autograd.DeviceType.CUDA if GPU else torch.autograd.DeviceType.CPU
    return {e.key: (getattr(e, key) / 1e3, e.count) for e in events if e.device_type == kind}


def profile(found, args):
    run = Training(args, sft)

    def add(name, table):
        top = sorted(table.items(), key=lambda item: -item[1][0])[:12]
        ms, calls = (sum(values) for values in zip(*table.values()))
        found.add(name, {"kernels": calls, "ms": ms, "top": [
            (key.removeprefix("void ").replace("at::native::", "")[:64], *values) for key, values in top]})
    add("sft_step", kernels(run.step))
    _, batch = make_batch(run.checkpoint, 8)
    plain = fsdp.unsharded(run.model, run.settings, common.world())
    plain.set_adapters(False)
    few, more = (kernels(lambda n=n: sample(plain, batch, n, cuda_graph=False)) for n in (1, 9))
    add("decode_step", {key: [(a - b) / 8 for a, b in zip(more[key], few.get(key, (0, 0)))] for key in more})


def rank_steps(ranks, folder, args):
    """Two SFT steps in fp32 as one of `ranks` ranks on one device. → losses, gradients; or an error's text"""
    try:
        rank, os.environ["LOCAL_RANK"] = int(os.environ.get("RANK", 0)), "0"
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{ranks}", rank=rank, world_size=ranks,
            timeout=datetime.timedelta(seconds=20))
        mesh = init_device_mesh(DEVICE.type, (ranks,), mesh_dim_names=("shard",))
        world = fsdp.World(rank, ranks, DEVICE, mesh)
        checkpoint = make_checkpoint(args, "gqa")
        model = fsdp.build(checkpoint, options(sft, "--dtype", "fp32"), world, ["language_model."])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        examples, _ = make_batch(checkpoint, 4, 24, 24, 1, ragged=3)
        batch = data.collate(examples[rank::ranks], checkpoint.processor).to(DEVICE)
        count, losses, gradients = world.sum(len(batch.target))[0], [], []
        for _ in range(2):
            loss = sft_loss(model, batch, count)
            loss.backward()
            losses += world.sum(loss.detach())
            gradients += [p.grad.full_tensor().flatten().cpu() for p in model.parameters() if p.requires_grad]
            optimizer.step()
            optimizer.zero_grad()
        return losses, torch.cat(gradients).numpy()
    except Exception:
        return format_exc()[-600:]


def ranks(found, args):
    with tempfile.TemporaryDirectory() as folder:
        one, two = (common.forked(rank_steps, n, folder, args, ranks=n) for n in (1, 2))
    if isinstance(one, str) or isinstance(two, str):
        found.add("not supported", {"one": one, "two": two} if isinstance(one, str) else two)
        return
    (losses, gradient), (losses2, gradient2) = one, two
    found.add("loss", losses)
    found.add("loss_error", relative_error(torch.tensor(losses2), torch.tensor(losses)))
    found.add("gradient_error", relative_error(torch.from_numpy(gradient2), torch.from_numpy(gradient)))


STAGES = {  # name → function, limit in seconds
    "card": (card, 40), "parity": (parity, 60), "scripts": (scripts, 110), "decode": (decode, 80),
    "sft": (functools.partial(lora_step, script=sft), 60),
    "dpo": (functools.partial(lora_step, script=dpo), 60),
    "full": (full, 60), "ppo": (ppo_iteration, 60), "profile": (profile, 40), "ranks": (ranks, 60)}


# ---- the parent: imports once, never initialises CUDA, and forks a process per stage ----

def run_here(name, function, args):
    """Runs a stage and ends this process."""
    found = Findings(os.path.join(args.out, f"{name}.part.json"))
    try:
        function(found, args)
    except Exception as error:
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in extract_tb(error.__traceback__)[-4:])
        found.add("error", f"{type(error).__name__}: {str(error)[:500]} ({where})")
        raise
    sys.stdout.flush()
    os._exit(0)  # no teardown


def run_child(name, function, args, forked):
    """The stage's process: the head of a process group, its output in gpu.log."""
    os.setsid()
    log = os.open(os.path.join(args.out, "gpu.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"======== {name}", flush=True)
    if forked:
        run_here(name, function, args)
    sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:], "--stage", name]).returncode)


def fork(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def run_stage(name, function, args, limit, forked=True):
    """→ {"end": "done" or what happened, "seconds", its findings, and "error" if it raised one}"""
    start, process = time.perf_counter(), fork(run_child, name, function, args, forked)
    process.join(limit)
    end = {0: "done", 1: "failed", None: f"cut after {limit:.0f} s"}.get(
        process.exitcode, f"ended with {process.exitcode}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what it has started
    found = data.read_json(args.out, f"{name}.part.json", {})
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(args.out, f"{name}.part.json"))
    return {"end": end, "seconds": rounded(time.perf_counter() - start), **found}


def header():
    """What runs: card, versions, commit, command."""
    def output(*command):
        found = shutil.which(command[0])
        return found and subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    card = output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {"card": card, "cpus": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version() if GPU else None,
            "transformers": transformers.__version__, "command": " ".join(sys.argv),
            "commit": os.environ.get("GIT_COMMIT") or output("git", "-C", str(ROOT), "rev-parse", "HEAD")}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of gpu.json and gpu.log")
    add("--budget", type=float, default=480, help="seconds for all stages")
    add("--only", default=",".join(STAGES), help="stages, comma-joined")
    add("--tiny", action="store_true", help="small sizes, to test that the stages run")
    add("--stage", help=argparse.SUPPRESS)  # the stage that this process is to run
    args = parser.parse_args()
    if not set(args.only.split(",")) <= set(STAGES):
        parser.error(f"got --only {args.only}, need any of {','.join(STAGES)}")
    if not GPU and not args.tiny:
        parser.error("got no GPU (torch.cuda.is_available() is False), need one; --tiny runs without")
    if args.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts
        torch.set_num_threads(1)
    if args.stage:
        run_here(args.stage, STAGES[args.stage][0], args)
    os.makedirs(args.out, exist_ok=True)
    start, results = time.perf_counter(), header()
    # whether a forked process can initialise CUDA; if not, each stage starts Python anew
    probe = fork(torch.cuda.init if GPU else int)
    probe.join()
    results["forked"] = probe.exitcode == 0
    print(json.dumps(results), flush=True)
    for name in args.only.split(","):
        function, limit = STAGES[name]
        left = args.budget - (time.perf_counter() - start)
        results[name] = {"end": f"skipped, {left:.0f} s were left"}
        if left > 10:
            limit = min(left, 3 * limit if args.tiny else limit)
            results[name] = run_stage(name, function, args, limit, results["forked"])
        fsdp.write_json(os.path.join(args.out, "gpu.json"), results)
        print(json.dumps({"stage": name, **results[name]}, separators=(",", ":")), flush=True)


if __name__ == "__main__":
    main()
