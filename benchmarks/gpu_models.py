"""What gpu.py measures: models and batches from random numbers, training steps on them, the same for
transformers, and how they are timed. Importing it hides all GPUs, so that nothing initialises CUDA in a
process that is to be forked; the forked one calls show_gpus().

Legend: B records, A answers per record, K samples per prompt, T positions, n tokens per answer.
"""
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # with it and no visible GPU, is_available() asks no driver
import common  # noqa: E402  (hides all GPUs, sets HF_HUB_OFFLINE)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

import data  # noqa: E402
import dpo  # noqa: E402
import fsdp  # noqa: E402
import model as M  # noqa: E402
import sft  # noqa: E402

with contextlib.suppress(ImportError):
    import peft

GPU = VISIBLE != "" and bool(shutil.which("nvidia-smi")) and not subprocess.run(
    ["nvidia-smi", "-L"], capture_output=True).returncode
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


def show_gpus():
    os.environ.pop("CUDA_VISIBLE_DEVICES")
    os.environ.update({} if VISIBLE is None else {"CUDA_VISIBLE_DEVICES": VISIBLE})


# ---- timing ----

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
        None, None, image_token, patches, side, "crop", data.CLIP_MEAN, data.CLIP_STD, side, 3, (), pad=0,
        end_ids=frozenset({2}), banned=frozenset({0, image_token}), max_len=8192)
    processor.pixels = lambda path: np.random.default_rng(int(path)).random((1, 3, side, side), np.float32)
    fsdp.load_weights = draw_weights
    return fsdp.Checkpoint("model", config, [], {}, processor, None, ("",))


def is_norm(name):
    return "norm" in name and name.endswith("weight")


@torch.no_grad()
def draw_weights(model, _tensors, _resized_vocab, seed):
    """Stands in for fsdp.load_weights: draws on the device, the same weights for any number of ranks."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, parameter in model.named_parameters():
        full = torch.ones(parameter.shape, dtype=parameter.dtype, device=DEVICE)
        if not is_norm(name):
            full.normal_(0, M.initial_std(name, full.shape), generator=generator)
        if isinstance(parameter, fsdp.DTensor):
            full = full.chunk(parameter.device_mesh.size())[parameter.device_mesh.get_local_rank()]
        fsdp.local_tensor(parameter).copy_(full)


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
    """The batch on a plain model's device."""
    return batch.to(next(model.vision_tower.parameters()).device)


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
        clip(parameters, fsdp.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return step, losses


class Training:
    """A model and records, four unless use() says otherwise, for steps of sft.py or dpo.py, with LoRA or full
    fine-tuning."""

    def __init__(self, args, script, size="7b", lora=True):
        self.A, self.n = (1, 102) if script is sft else (2, 150)
        self.n, self.lora, self.reference = 6 if args.tiny else self.n, lora, []
        self.flop_rate, _ = card_rates(args)
        self.checkpoint = make_checkpoint(args, size)
        self.settings = options(script, *["--lora_rank", 16] * lora)
        self.model = fsdp.build(self.checkpoint, self.settings, common.world(),
                                ["language_model.", *["multi_modal_projector."] * (not lora)])
        self.use(4)
        self.step, self.losses = train_step(self.model.parameters(), fsdp.clip_gradients, self.loss)
        if script is dpo:
            with torch.no_grad():
                logps, _ = dpo.sequence_logprobs(self.model, self.batch)  # [A]
            fsdp.reshard(self.model)
            self.reference = [{"logps": pair} for pair in logps.view(-1, self.A).tolist()]

    def use(self, B):
        self.examples, batch = make_batch(self.checkpoint, B, 48, self.n, self.A)
        self.batch = batch.to(DEVICE)
        flops = common.forward_flops(self.checkpoint.config, len(batch.pixels), *common.visible_pairs(batch),
                                     len(batch.target))
        # frozen weights cost forward and the gradients of inputs, trained weights their own gradients as well
        self.flops = flops["tower"] + (2 if self.lora else 3) * (flops["language"] + flops["head"])

    def loss(self):
        if not self.reference:
            return sft_loss(self.model, self.batch, len(self.batch.target))
        B = len(self.examples)
        return dpo.micro_batch_loss(self.model, self.batch, self.reference, B, B * self.n, self.settings)[0]

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
    tensors = {name: fsdp.local_tensor(parameter.detach()) for name, parameter in ours.named_parameters()}
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
    prompts = [np.repeat(e.prompt, checkpoint.processor.lengths(e.prompt, e.images)) for e in examples]
    ids = [[*prompt, *[*example.answers, []][a]]
           for a in range(A) for prompt, example in zip(prompts, examples)]
    ids = torch.tensor(ids, device=DEVICE)  # [A · B, T]
    pixels = batch.pixels.to(DEVICE, DTYPE).repeat(A, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def peer_logprobs(peer, inputs, n):
    """Log-probabilities of the last n tokens [A · B, n]."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):  # PEFT's adapters are fp32
        logits = peer(**inputs, use_cache=False, logits_to_keep=n + 1).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, -n:, None]).squeeze(-1)
