"""What fits where: GB per GPU that each training script needs, computed on a CPU without any weights.

    python benchmarks/memory.py                      LLaVA-1.5 7B and 13B, LLaMA-3 8B and 70B with CLIP
    python benchmarks/memory.py --model FOLDER --gpus 2 4       a LLaVA's config.json, other numbers of GPUs

The models are those that the scripts build (fsdp.build_sharded, ppo.build_models), on `meta`, sharded over a
process group that communicates nothing. Weights, gradients and AdamW's moments are the bytes of rank 0's
shards (fsdp.bytes_per_rank). A GPU also holds, with --recompute, in bytes (e: bytes per number of --dtype):

    root      e · (parameters of the FSDP roots, without the LLaMA's layers): unsharded for a full pass
    layer     2 e · (parameters of a layer): the one in hand and the next
    reduction max((e + 4) · trained parameters of a layer, 4 · those of the roots): gradients, in fp32 too
              + e · trained parameters of the roots: the head's gradient waits for the embedding's
    inputs    e · B T · D per layer: saved for the backward pass
    internals e · B T · (7 D + 7 H C + 4 K C + 7 M): of one layer, computed again, and their gradients
    head      8 B T · D: hidden states where tokens are predicted
    passing   e · (2 D + 3 M) per token: of one layer in a pass without gradients

    update    gradients + root + layer + reduction + inputs + internals + head; the largest trained model
    forward   roots of all models + layer + passing · B T; PPO's log-probabilities and values
    generate  copy + (2 e · K C per layer + passing) · P T; PPO's plain model (e · parameters of the policy,
              on one GPU of those that are not in --dtype), its KV cache and the prefill; with --rollout
              sharded root + layer in place of the copy
    GPU       weights + moments + max(update, forward, generate)

With --offload weights, gradients and moments are in host memory, not on the GPU (pinned: PyTorch may round
each tensor up to a power of two). Not counted: a frozen vision tower's activations, batches, CUDA's context,
NCCL's buffers, fragmentation. A model fits if its sum is at most --gpu_gb (in 1e9 bytes); a card of "80 GB"
has 85, and what is not counted has to fit into the rest.

Legend: B --micro_batch, P --decode_batch, T --tokens (prompt, image and answers), D width, H heads, K
kv-heads, C channels per head, M width of the MLP.
"""
import argparse
import contextlib
import itertools
import json
import sys
from types import SimpleNamespace
from unittest import mock

import common
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import dpo
import fsdp
import ppo
import rm
import sft

# vocabulary (LLaMA-3: grown by <image> and <pad>), width, MLP width, layers, heads, kv-heads
SIZES = {
    "LLaVA-1.5 7B": (32064, 4096, 11008, 32, 32, 32), "LLaVA-1.5 13B": (32064, 5120, 13824, 40, 40, 40),
    "LLaMA-3 8B": (128320, 4096, 14336, 32, 32, 8), "LLaMA-3 70B": (128320, 8192, 28672, 80, 64, 8)}
SCRIPTS = {  # script → {row of the table: PPO's --rollout}
    sft: {"SFT": None}, dpo: {"DPO": None}, rm: {"RM": None},
    ppo: {"PPO": "gathered", "PPO, --rollout sharded": "sharded"}}


def llava_config(vocab, width, mlp, layers, heads, kv_heads):
    """→ the LlavaConfig of a LLaMA of these sizes behind CLIP ViT-L/14-336"""
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336,
                              num_attention_heads=16, patch_size=14, projection_dim=768)
    text = LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False)
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, image_seq_length=576,
                       vision_feature_select_strategy="default", projector_hidden_act="gelu",
                       tie_word_embeddings=False)


@contextlib.contextmanager
def fake_world(rank, size):
    """fsdp.World of one of `size` ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
        yield fsdp.World(rank, size, torch.device("cpu"), mesh)
    finally:
        dist.destroy_process_group()


def script_args(script, *more):
    """What a script makes of its command line."""
    rewards = ["--reward_model", "rm"] if script is ppo else []
    argv = [f"{script.__name__}.py", "--model", "sft", "--data", "records.json", *rewards, *map(str, more)]
    with mock.patch.object(sys, "argv", argv):
        return script.parse_args()


def models_of(script, config, args, world):
    """The models that a script trains or holds while it trains, without weights. PPO's frozen towers are
    taken to be equal, and so are shared."""
    if script is not ppo:
        parts = dict(zip(("projector", "llm"), common.TRAINED))
        parts["llm"] += "model." if script is rm else ""
        trainable = [parts[part] for part in args.train.split(",")] + ["score.weight"] * (script is rm)
        return [fsdp.build_sharded(config, args, world, trainable, score=script is rm)]

    def build(checkpoint, *build_args, **more):
        return fsdp.build_sharded(checkpoint.config, *build_args, **more)

    def share_tower(model, other, world):
        other.vision_tower = model.vision_tower
        return True
    checkpoint = SimpleNamespace(config=config, processor=SimpleNamespace(pixel_settings=None))
    with mock.patch.multiple(fsdp, build=build, share_tower=share_tower):
        policy, reference, scorer, critic = ppo.build_models(checkpoint, checkpoint, args, world)
    return [model for model in (policy, reference, scorer.model, critic) if model]


def numel(parameters, trained=False):
    """Numbers in full parameters, those that several models share once; trained: of trained ones alone."""
    return sum(p.numel() for p in {id(p): p for p in parameters}.values() if p.requires_grad or not trained)


def bytes_of(models, config, options, offload=False, rollout=None):
    """→ {part: bytes} on rank 0, the sums "GPU" and "host" among them. models: those of models_of; rollout:
    PPO's --rollout."""
    text, dtype = config.text_config, fsdp.DTYPES[options.dtype]
    D, L, M, e = text.hidden_size, text.num_hidden_layers, text.intermediate_size, dtype.itemsize
    C = getattr(text, "head_dim", None) or D // text.num_attention_heads
    HC, KC = text.num_attention_heads * C, text.num_key_value_heads * C
    BT, PT = options.micro_batch * options.tokens, options.decode_batch * options.tokens
    passing, cache = e * (2 * D + 3 * M), 2 * e * KC * L  # per token

    def layers(model):  # those that FSDP gathers, or on one GPU copies
        return [p for layer in model.language_model.model.layers for p in layer.parameters()
                if isinstance(p, DTensor)]

    def root(*models):
        in_layers = {id(p) for model in models for p in layers(model)}
        return [p for model in models for p in model.parameters()
                if id(p) not in in_layers and isinstance(p, DTensor)]

    def training(model):  # the transient part
        trained, trained_root = numel(layers(model), True) // L, numel(root(model), True)
        reduction = max((e + 4) * trained, 4 * trained_root) + e * trained_root
        unsharded = e * (numel(root(model)) + 2 * numel(layers(model)) // L)
        internals = e * (7 * D + 7 * HC + 4 * KC + 7 * M)  # per token
        return unsharded + reduction + BT * (D * (e * L + 8) + internals)

    sizes = fsdp.bytes_per_rank(*models)
    weights, gradients, moments = (0, 0, 0) if offload else sizes.values()
    phases = {"update": gradients + max(training(m) for m in models if numel(m.parameters(), True))}
    if rollout:
        policy, layer = models[0], 2 * e * numel(layers(models[0])) // L
        copied = [p for p in (*layers(policy), *root(policy))
                  if offload or p.device_mesh.size() > 1 or p.dtype != dtype]
        full = e * numel(copied) if rollout == "gathered" else e * numel(root(policy)) + layer
        phases["forward"] = e * numel(root(*models)) + layer + BT * passing
        phases["generate"] = full + PT * (cache + passing)
    return {**sizes, **phases, "GPU": weights + moments + max(phases.values()),
            "host": sum(sizes.values()) if offload else 0}


def cell(sizes, gpu_gb):
    """bytes_of → 12 characters of the table"""
    gpu, host = sizes["GPU"] / 1e9, sizes["host"] / 1e9
    return f"{gpu:>7.0f}" + f"{'*' if gpu <= gpu_gb else ' '}{f'+{host:.0f}' if host else '':4}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder with a LLaVA's config.json, in place of the four models")
    add("--gpus", type=int, nargs="+", default=[1, 8, 16], help="numbers of GPUs")
    add("--gpu_gb", type=float, default=80, help="memory per GPU in GB")
    add("--micro_batch", type=int, default=4, help="records per forward pass on a GPU")
    add("--tokens", type=int, default=2048, help="tokens per record")
    add("--decode_batch", type=int, default=16, help="prompts that a GPU decodes at once (ppo.py's default: "
        "all of an iteration)")
    add("--lora_rank", type=int, default=16, help="of the LoRA columns")
    add("--dtype", choices=[*fsdp.DTYPES], default="bf16", help="of the computation")
    add("--json", action="store_true", help="print the bytes of every part as JSON lines, too")
    options = parser.parse_args()
    configs = {name: llava_config(*sizes) for name, sizes in SIZES.items()}
    if options.model:
        configs = {options.model: LlavaConfig.from_pretrained(options.model)}
    ways = {"full": (0, False), f"LoRA {options.lora_rank}": (options.lora_rank, False),
            "full, --offload": (0, True)}  # LoRA rank, offload
    print(f"GB per GPU, + GB of host memory per GPU; * fits into {options.gpu_gb:g} GB. {options.dtype}, "
          f"--recompute, --micro_batch {options.micro_batch}, --decode_batch {options.decode_batch}, "
          f"{options.tokens} tokens per record")
    for model, config in configs.items():
        print("\n" + (f"{model:24}" + "".join(f"{way:^{12 * len(options.gpus)}}" for way in ways)).rstrip())
        print((f"{'GPUs':24}" + "".join(f"{n:>7}     " for n in options.gpus) * len(ways)).rstrip())
        for script, rollouts in SCRIPTS.items():
            built = {}
            for rank, n in itertools.product((0, options.lora_rank), options.gpus):
                args = script_args(script, "--dtype", options.dtype, "--lora_rank", rank)
                with fake_world(0, n) as world:
                    built[rank, n] = models_of(script, config, args, world)
            for label, rollout in rollouts.items():
                sizes = {(way, n): bytes_of(built[rank, n], config, options, offload, rollout)
                         for way, (rank, offload) in ways.items() for n in options.gpus}
                cells = "".join(cell(parts, options.gpu_gb) for parts in sizes.values())
                print(f"{label:24}{cells.rstrip()}", flush=True)
                for (way, n), parts in sizes.items() if options.json else ():
                    print(json.dumps({"title": f"{model}: {label}, {way}, {n} GPUs", **parts}))


if __name__ == "__main__":
    main()
