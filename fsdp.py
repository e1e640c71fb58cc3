"""How it is run: options, launch, sharding, weights in and out, checkpoints, sums over ranks, the log.

One process is a world of size one: plain `python` and `torchrun --nproc_per_node=8` take the same path, NCCL on GPUs and
gloo on CPUs. Everything collective is in this file, so that the training scripts read as if there were one machine.
"""
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import data
from model import VisionLLM, is_linear

ROOT = os.path.dirname(os.path.abspath(__file__))
WORLD = os.path.join(ROOT, "runs", "shapes")  # the small world of examples/shapes.py, used where no --model is given


# ---- options ----

def arguments(parser, training=True):
    """Adds the options that every run has, in groups."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="LLaVA checkpoint: folder or hub id (HF or original layout); default: the shapes world")
    add("--llm", help="LLaMA checkpoint, to start with a fresh projector (needs --clip)")
    add("--clip", help="CLIP checkpoint for --llm, or in place of an original LLaVA's mm_vision_tower")
    add("--projector", choices=["mlp2x_gelu", "linear"], default="mlp2x_gelu", help="fresh projector of --llm")
    add("--tokenizer", help="tokenizer folder, if not the checkpoint's")
    add("--template", choices=["auto", *data.TEMPLATES], default="auto", help="auto: the checkpoint's chat template")
    add("--image_mode", choices=["auto", "crop", "pad"], default="auto", help="centre crop, or pad to a square")
    add("--dtype", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of computation and export; trained parameters are fp32 masters (default: bf16 on GPUs, fp32 on CPUs)")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="rows: .json, .jsonl or .txt (README: data format)")
    add("--images", help="folder that the rows' picture paths start from (default: the folder of --data)")
    add("--max_len", type=int, default=2048, help="tokens a row, image tokens counted; longer answers lose their tail")
    add("--skip_bad_rows", action="store_true", help="report and leave out bad rows, instead of stopping at the first")
    add("--workers", type=int, default=2, help="processes a rank that decode pictures ahead")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="what is written: a folder (predict.py: a .jsonl file)")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    add("--seed", type=int, default=0, help="of the order of rows, new parameters and sampling")
    add("--replicas", type=int, default=1, help="copies of the sharded model (hybrid sharding); divides the ranks")
    if not training:
        return
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; start afresh if there is none")
    add("--save_every", type=int, default=500, help="steps between checkpoints (0: only when stopped and at the end)")
    add("--keep", type=int, default=1, help="checkpoints kept")
    add("--eval_data", help="held-out rows")
    add("--eval_every", type=int, default=500, help="steps between evaluations (0: only at the end)")
    add("--wandb", metavar="PROJECT", help="log to this Weights & Biases project too (pip install wandb)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=128, help="rows an optimiser step, over all ranks")
    add("--micro_batch", type=int, default=4, help="rows a forward pass on one rank: memory, not mathematics")
    add("--group_by_length", choices=["yes", "no"], default="yes", help="a step's rows of similar length share a pass")
    add("--epochs", type=float, default=1, help="passes over the data")
    add("--max_steps", type=int, default=0, help="optimiser steps, in place of --epochs")
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    add("--warmup", type=float, default=0.03, help="linear warm-up: steps, or below 1 a share of all steps")
    add("--weight_decay", type=float, default=0.0, help="AdamW's, not on norms and biases")
    add("--grad_clip", type=float, default=1.0, help="largest global gradient norm (0: no clipping)")
    add("--recompute", action="store_true", help="recompute activations in backward: less memory, a third more time")


def parse(parser, data_file, shapes, argv=None):
    """Parses the command line. Without --model and --llm the shapes world is meant: its files and the sizes in `shapes`
    become the defaults, and it is made on first use."""
    args = parser.parse_args(argv)
    if not (args.model or args.llm):
        parser.set_defaults(**{"model": os.path.join(WORLD, "model"), "data": os.path.join(WORLD, data_file),
                               "images": os.path.join(WORLD, "images"), **shapes})
        args = parser.parse_args(argv)
    if bool(args.llm) != bool(args.clip) and not args.model:
        parser.error("--llm and --clip go together: a LLaMA and the CLIP tower for its fresh projector")
    if args.model and args.llm:
        parser.error("got --model and --llm: give a whole LLaVA, or a LLaMA with --clip")
    if not args.data:
        parser.error("--data is needed with --model: a file of rows (README: data format)")
    args.images = args.images or os.path.dirname(os.path.abspath(args.data))
    name = os.path.splitext(os.path.basename(parser.prog))[0]
    args.out = args.out or os.path.join(ROOT, "runs", name + ("" if hasattr(args, "resume") else ".jsonl"))
    for option in ("batch_size", "micro_batch", "keep", "replicas", "max_len"):
        if getattr(args, option, 1) < 1:
            parser.error(f"got --{option} {getattr(args, option)}, need at least 1")
    return args


# ---- launch ----

@dataclasses.dataclass
class World:
    rank: int
    size: int
    device: torch.device
    mesh: object

    def sum(self, *numbers):
        """Numbers (or scalar tensors) summed over ranks, in fp64."""
        total = torch.stack([torch.as_tensor(n, dtype=torch.float64).detach().cpu() for n in numbers])
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flags):
        """Whether any flag is set on any rank."""
        return self.sum(flags.sum())[0] > 0

    def gather(self, item):
        """Every rank's item, as a list on every rank."""
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def share(self, function, items):
        """[function(item) for item in items], the work spread over ranks and threads; with progress when it is long."""
        mine, done, start = items[self.rank::self.size], [], time.time()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for result in pool.map(function, mine):
                done.append(result)
                if self.rank == 0 and time.time() - start > 10 and len(done) % 1000 == 0:
                    rate = len(done) / (time.time() - start)
                    left = (len(mine) - len(done)) / rate
                    print(f"{function.__name__}: {len(done)}/{len(mine)}, {rate:.0f}/s, {left:.0f} s left", flush=True)
        results = [None] * len(items)
        for rank, part in enumerate(self.gather(done)):
            results[rank::self.size] = part
        return results

    def first(self, function, *args):
        """Runs function on rank 0; the others wait, and stop too if it fails."""
        error = None
        if self.rank == 0:
            try:
                function(*args)
            except Exception as raised:
                error = raised
        failed = self.gather(error is not None)[0]
        if failed:
            raise error or RuntimeError("rank 0 failed; see its message")


def launch(args):
    """Starts the process group and makes the mesh. → World"""
    if "RANK" not in os.environ:  # plain python: a world of one
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    kind, size = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if size % args.replicas:
        raise ValueError(f"got --replicas {args.replicas} on {size} ranks, need a divisor of the number of ranks")
    mesh = init_device_mesh(kind, (args.replicas, size // args.replicas), mesh_dim_names=("replicate", "shard"))
    mesh = mesh if args.replicas > 1 else mesh["shard"]
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    world = World(dist.get_rank(), size, device, mesh)
    if args.images == os.path.join(WORLD, "images"):
        world.first(make_shapes)
    return world


def make_shapes():
    if not os.path.isdir(WORLD):
        subprocess.run([sys.executable, os.path.join(ROOT, "examples", "shapes.py"), "--out", WORLD], check=True)


def run(main):
    """Runs a script's main. What is wrong with the user's input is one line on the terminal, not a traceback."""
    try:
        main()
    except ValueError as error:
        if os.path.dirname(os.path.abspath(traceback.extract_tb(error.__traceback__)[-1].filename)) != ROOT:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---- reading a checkpoint ----

# spellings of a tensor's name → ours, which is that of llava-hf/llava-1.5-7b-hf; the first that fits is applied
SPELLINGS = [(re.compile(pattern), name) for pattern, name in [
    (r"^model\.mm_projector\.(?:0\.)?(weight|bias)$", r"multi_modal_projector.linear_1.\1"),  # original LLaVA
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.language_model\.", "language_model.model."),  # transformers' names in memory
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^model\.", "language_model.model."),  # a LLaMA
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^vision_model\.", "vision_tower.vision_model."),  # a CLIP
    (r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_tower.vision_model.\1."),
]]
EXTRAS = re.compile(r"text_model\.|logit_scale$|(visual|text)_projection\.weight$|position_ids$|inv_freq$")


def our_name(name):
    for pattern, replacement in SPELLINGS:
        if pattern.search(name):
            name = pattern.sub(replacement, name)
            break
    return re.sub(r"^vision_tower\.(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_tower.vision_model.\1.", name)


def fetch(name, world):
    """A checkpoint folder, downloaded by rank 0 where `name` is a hub id."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.jinja", "*.model", "*.safetensors"]

    def download():
        try:
            folder = snapshot_download(name, allow_patterns=patterns)
            if not glob.glob(os.path.join(folder, "*.safetensors")):
                snapshot_download(name, allow_patterns=["*.bin"])
        except Exception as error:
            raise ValueError(f"got {name!r}, need a checkpoint folder or a hub id: no such folder, and the hub says: "
                             f"{error}") from error
    world.first(download)
    return snapshot_download(name, allow_patterns=[*patterns, "*.bin"], local_files_only=True)


def read_json(folder, name, default=None):
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return default
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_config(args, world):
    """--model, or --llm and --clip → LlavaConfig, and the folders whose tensors make up the model."""
    folder = fetch(args.model or args.llm, world)
    raw = read_json(folder, "config.json")
    if raw is None:
        raise ValueError(f"{folder}: no config.json: need a checkpoint folder")
    if args.model and "text_config" in raw:
        config, folders = LlavaConfig.from_pretrained(folder), [folder]
    else:
        if args.model and "mm_vision_tower" not in raw:
            raise ValueError(f"{folder}: config.json is of a {raw.get('model_type')!r}, need a LLaVA; for a LLaMA give --llm "
                             "and --clip")
        clip = fetch(args.clip or raw["mm_vision_tower"], world)
        # an original LLaVA's config is that of its LLaMA plus mm_* keys; AutoConfig would take it for transformers' LLaVA
        text = {k: v for k, v in raw.items() if not k.startswith("mm_") and k not in ("model_type", "architectures")}
        vision = CLIPVisionConfig.from_pretrained(clip)
        linear = (raw.get("mm_projector_type", "linear") if args.model else args.projector) == "linear"
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text),
            vision_feature_layer=raw.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
            projector_hidden_act="linear" if linear else "gelu", tie_word_embeddings=raw.get("tie_word_embeddings", False))
        config.mm_projector_type = "linear" if linear else "mlp2x_gelu"
        config.image_token_index = None  # found in, or added to, the tokenizer
        folders = [folder, clip]
    kinds = config.text_config.model_type, config.vision_config.model_type
    if kinds != ("llama", "clip_vision_model") or (not args.model and raw.get("model_type") != "llama"):
        raise ValueError(f"{folder}: got a {raw.get('model_type')!r} of {kinds}, need a LLaMA and a CLIP vision tower")
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"{folder}: got vision_feature_layer {config.vision_feature_layer}, need one layer")
    config.text_config.tie_word_embeddings |= config.tie_word_embeddings
    vision = config.vision_config
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
    return config, folders


class Tensors:
    """The tensors of checkpoint folders under our names; rows are read when asked for, and no more than those."""

    def __init__(self, folders, world):
        self.open, self.where = {}, {}  # file → handle; name → (file, its name there)
        for folder in folders:
            files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
            files = [f for f in files if os.path.basename(f) not in ("score.safetensors", "adapter_model.safetensors")]
            files = files or [self.mapped(f, world) for f in sorted(glob.glob(os.path.join(folder, "pytorch_model*.bin")))]
            index = read_json(folder, "model.safetensors.index.json")
            if index:
                files = [os.path.join(folder, name) for name in sorted(set(index["weight_map"].values()))]
            if not files:
                raise ValueError(f"{folder}: no *.safetensors and no pytorch_model*.bin, need a checkpoint's weights")
            for file in files:
                if not os.path.isfile(file):
                    raise ValueError(f"{file}: named by model.safetensors.index.json, but there is no such file")
                if file.endswith(".bin"):
                    self.open[file] = torch.load(file, weights_only=True, mmap=True)
                else:
                    self.open[file] = safe_open(file, "pt")
                self.where.update({our_name(name): (file, name) for name in self.open[file].keys()
                                   if not EXTRAS.search(name) and our_name(name) not in self.where})

    @staticmethod
    def mapped(file, world):
        """A .bin that can be read row by row: itself, or for torch's old format a copy that rank 0 makes once."""
        try:
            torch.load(file, weights_only=True, mmap=True)
            return file
        except RuntimeError:
            stamp = hashlib.sha256(f"{file} {os.path.getmtime(file)}".encode()).hexdigest()[:16]
            copy = os.path.join(tempfile.gettempdir(), f"{stamp}.safetensors")

            def convert():
                if not os.path.isfile(copy):
                    tensors = torch.load(file, weights_only=True)
                    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, copy + ".part")
                    os.replace(copy + ".part", copy)
            world.first(convert)
            return copy

    def shape(self, name):
        file, key = self.where[name]
        handle = self.open[file]
        return tuple(handle[key].shape if isinstance(handle, dict) else handle.get_slice(key).get_shape())

    def rows(self, name, start, stop):
        file, key = self.where[name]
        handle = self.open[file]
        if len(self.shape(name)) == 0:
            return handle[key] if isinstance(handle, dict) else handle.get_tensor(key)
        return (handle[key] if isinstance(handle, dict) else handle.get_slice(key))[start:stop]


def check_names(model, tensors, checkpoint):
    """Every parameter found, every tensor used, every shape equal; else a ValueError that lists the difference."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ignored = {"language_model.lm_head.weight"} if model.config.text_config.tie_word_embeddings else set()
    if is_linear(model.config):
        ignored |= {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"}
    found = {name: tensors.shape(name) for name in tensors.where}
    missing = wanted.keys() - found.keys()
    if not any(name.startswith("multi_modal_projector.") for name in found):  # --llm and --clip: it is drawn afresh
        missing = {name for name in missing if not name.startswith("multi_modal_projector.")}
    grown = checkpoint.grown
    problems = [f"missing: {name} {wanted[name]}" for name in sorted(missing)]
    problems += [f"not known: {name} {found[name]}" for name in sorted(found.keys() - wanted.keys() - ignored)]
    for name in sorted(wanted.keys() & found.keys()):
        want = (grown[0], *wanted[name][1:]) if grown and name in VOCABULARY else wanted[name]
        if found[name] != want:
            problems.append(f"shape: {name} is {found[name]}, need {want}")
    if problems:
        raise ValueError(f"{' + '.join(checkpoint.folders)} does not fit its config.json:\n  " + "\n  ".join(problems))


VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


@torch.no_grad()
def fill(model, tensors, grown, seed):
    """Streams every parameter in: each rank reads its own rows only. Rows that the vocabulary has grown by are the mean of
    the old ones; parameters without a tensor are drawn, keyed by (seed, name): N(0, 0.02²), biases 0."""
    for name, parameter in model.named_parameters():
        local, mesh = parameter.to_local(), parameter.device_mesh
        n, size, mine = parameter.shape[0], mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
        chunk = -(-n // size)  # FSDP2 shards rows as torch.chunk does
        start, stop = min(n, mine * chunk), min(n, (mine + 1) * chunk)
        assert len(local) == stop - start, (name, local.shape, start, stop)
        if name not in tensors.where:
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
            whole = torch.zeros(parameter.shape)
            if parameter.ndim > 1:
                whole.normal_(0, 0.02, generator=torch.Generator().manual_seed(key))
            local.copy_(whole[start:stop])
            continue
        old = grown[0] if grown and name in VOCABULARY else n
        local[:max(0, min(stop, old) - start)] = tensors.rows(name, start, min(stop, old)).to(local)
        if stop > max(start, old):
            steps = range(0, old, 4096)
            mean = sum(tensors.rows(name, i, min(i + 4096, old)).double().sum(0) for i in steps) / old
            local[max(0, old - start):] = mean.to(local)


# ---- reading data ----

def read_conversations(path, args, world, need_answer=True):
    """A data file → its rows and the (index, Conversation) pairs of the good ones; every picture is looked at."""
    rows = data.load_rows(path)
    conversations, bad = data.check_rows(rows, args.images, path, need_answer, args.skip_bad_rows, world)
    if world.rank == 0 and bad:
        print(f"{path}: {bad} of {len(rows)} rows are bad and left out", flush=True)
    return rows, conversations


def read_examples(path, which, processor, args, world):
    """A data file → Examples (see data.build_examples), with a word on what was left out or cut."""
    rows, conversations = read_conversations(path, args, world, need_answer=which != "prompt")
    examples, counts = data.build_examples(conversations, processor, which)
    if world.rank == 0 and (counts["too_long"] or counts["cut"]):
        print(f"{path}: --max_len {args.max_len} leaves out {counts['too_long']} of {len(rows)} rows (prompt too long) and "
              f"cuts the tail of {counts['cut']}", flush=True)
    return examples


# ---- building and sharding ----

@dataclasses.dataclass
class Checkpoint:
    """What the command line's model is, before any weight is read."""
    config: LlavaConfig
    folders: list  # whose tensors make it up
    processor: data.Processor
    grown: tuple  # (old, new) embedding rows, or None


def open_checkpoint(args, world):
    config, folders = read_config(args, world)
    processor, grown = data.load_processor(folders[0], config, args)
    return Checkpoint(config, folders, processor, grown)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(checkpoint, args, world, trainable=()):
    """The checkpoint's model, sharded and filled. trainable: prefixes of the names that are trained (fp32 masters); all else
    is frozen, in the compute dtype. Build optimisers before the first forward pass."""
    config = checkpoint.config
    with torch.device("meta"):
        model = VisionLLM(config)
    unreached = ["vision_tower.vision_model.post_layernorm."] + [
        f"vision_tower.vision_model.encoder.layers.{i}."
        for i in range(model.vision_tower.depth, config.vision_config.num_hidden_layers)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(trainable)) and not name.startswith(tuple(unreached))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else DTYPES[args.dtype])
    tensors = Tensors(checkpoint.folders, world)
    check_names(model, tensors, checkpoint)
    shard(model, world, DTYPES[args.dtype])
    model.to_empty(device=world.device)
    fill(model, tensors, checkpoint.grown, args.seed)
    return model


def shard(model, world, dtype):
    """fully_shard on each root, the LLaMA's layers as units of their own. Gradients are summed over ranks, not averaged."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*model.language_model.model.layers, model.language_model, model.multi_modal_projector, model.vision_tower):
        fully_shard(unit, mesh=world.mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # these settings do not reach child units by themselves
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(*models):
    """Ends a pass without gradients: else the optimiser would step the shards, and the unsharded copies be used again."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class gathered:
    """`with gathered(model):` holds whole weights on every rank, so that ranks can decode at their own pace."""

    def __init__(self, model):
        self.model = model
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def __enter__(self):
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def __exit__(self, *_):
        for unit in self.units:
            unit.set_reshard_after_forward(True, recurse=False)
        for root in (self.model.language_model, self.model.multi_modal_projector, self.model.vision_tower):
            root.set_reshard_after_forward(False, recurse=False)  # a root's own parameters are needed first in backward
        reshard(self.model)


def clip_gradients(parameters, largest):
    """Scales gradients to the given global norm (0: as they are). → the norm before, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest or float("inf"))
    return float(norm.full_tensor())


def schedule(step, steps, warmup):
    """The learning rate's factor at a step (from 0): linear warm-up, then half a cosine down to 0."""
    warm = warmup if warmup >= 1 else warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# ---- what a run leaves behind ----

RUN_FILES = ("checkpoints", "log.jsonl", "args.json", "config.json", "model*.safetensors", "model.safetensors.index.json")
FIXED = ("model", "llm", "clip", "data", "template", "max_len", "batch_size", "group_by_length", "seed", "dtype", "train")


def check_out(args):
    """Refuses a folder that holds anything, unless --resume or --overwrite says that the run in it is meant."""
    earlier = read_json(args.out, "args.json")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f"got --out {args.out}, which is a file, need a folder")
    if earlier is None:
        if os.path.isdir(args.out) and os.listdir(args.out):
            raise ValueError(f"got --out {args.out}, which is not empty and not an earlier run: choose another folder")
    elif args.resume:
        differ = [f"--{key} {earlier.get(key)} then, {getattr(args, key)} now" for key in FIXED
                  if hasattr(args, key) and earlier.get(key) != getattr(args, key)]
        if differ and last_checkpoint(args.out):
            raise ValueError(f"cannot resume {args.out}: {'; '.join(differ)}; use the old values, or another --out")
    elif not args.overwrite:
        raise ValueError(f"got --out {args.out}, which holds a run: --resume goes on with it, --overwrite replaces it")


def check_out_file(args):
    if os.path.isdir(args.out):
        raise ValueError(f"got --out {args.out}, which is a folder, need a .jsonl file")
    if os.path.exists(args.out) and not args.overwrite:
        raise ValueError(f"got --out {args.out}, which exists: --overwrite replaces it")


def begin_run(args, world):
    """Makes --out, clears an earlier run that is to be replaced, and writes args.json."""
    def begin():
        if not args.resume:
            for pattern in RUN_FILES:
                for path in glob.glob(os.path.join(args.out, pattern)):
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        os.makedirs(os.path.join(args.out, "checkpoints"), exist_ok=True)
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
        resolved = {**vars(args), "ranks": world.size, "versions": versions, "commit": git.stdout.strip() or None}
        write_json(os.path.join(args.out, "args.json"), resolved)
        print(" ".join(f"--{key} {value}" for key, value in vars(args).items() if value not in (None, False)), flush=True)
    world.first(begin)


def write_text(path, text):
    """Written beside and renamed: whole, or not there."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


class Log:
    """log.jsonl: one object a step, and on rank 0 one aligned line on the terminal. After a resume every step stands once."""

    def __init__(self, args, world, steps, done):
        self.quiet, self.steps, self.first, self.start = world.rank != 0, steps, done, time.time()
        self.wandb, self.last = None, time.time()
        if self.quiet:
            return
        path = os.path.join(args.out, "log.jsonl")
        kept = []
        if os.path.isfile(path):
            with open(path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= done]
        write_text(path, "".join(kept))
        self.file = open(path, "a", buffering=1)
        if args.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("--wandb needs Weights & Biases: pip install wandb") from error
            self.wandb = wandb.init(project=args.wandb, config=vars(args), name=os.path.basename(args.out))

    def step(self, step, tokens=0, **figures):
        """step counts from 1; tokens: those of the step over all ranks. Tensors and floats are written unrounded."""
        now, elapsed = time.time(), time.time() - self.last
        self.last = now
        if self.quiet:
            return
        figures = {"step": step, **{k: float(v) for k, v in figures.items()}}
        if tokens:
            figures["tokens_per_second"] = tokens / elapsed
        self.file.write(json.dumps(figures) + "\n")
        if self.wandb:
            self.wandb.log(figures, step=step)
        left = (now - self.start) / (step - self.first) * (self.steps - step)
        shown = "  ".join(f"{k} {v:<9.4g}" for k, v in figures.items() if k not in ("step", "tokens_per_second"))
        rate = f"  {tokens / elapsed:7.0f} tokens/s" if tokens else ""
        print(f"{step:>6}/{self.steps}  {shown}{rate}  {int(left) // 60:>3}:{int(left) % 60:02} left", flush=True)

    def say(self, text):
        if not self.quiet:
            print(text, flush=True)


# ---- checkpoints ----

class Stop:
    """Whether SIGTERM (a scheduler's warning) has reached any rank; the step in hand is finished and saved first."""

    def __init__(self):
        self.caught = False
        signal.signal(signal.SIGTERM, self.catch)

    def catch(self, *_):
        self.caught = True

    def asked(self, world):
        return world.sum(self.caught)[0] > 0


def last_checkpoint(out):
    """The newest whole checkpoint below out/checkpoints, or None."""
    found = [(int(m[1]), m[0]) for m in (re.fullmatch(r"step_(\d+)", name) for name in os.listdir(
        os.path.join(out, "checkpoints")))if m] if os.path.isdir(os.path.join(out, "checkpoints")) else []
    return os.path.join(out, "checkpoints", max(found)[1]) if found else None


def state(model, optimizers):
    """The trained parameters and AdamW's state under stable names; made, where no step was taken yet, to be loaded into."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p not in optimizer.state or not optimizer.state[p]:
                optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            tensors.update({f"optimizer.{names[p]}.{key}": value for key, value in optimizer.state[p].items()})
    return tensors


def save_checkpoint(args, world, step, model, *optimizers):
    """Writes checkpoints/step_N beside the others and renames it when it is whole; keeps the last --keep."""
    folder = os.path.join(args.out, "checkpoints", f"step_{step}")
    world.first(shutil.rmtree, folder + ".part", True)
    dcp.save(state(model, optimizers), checkpoint_id=folder + ".part")

    def finish_save():
        if os.path.isdir(folder):
            shutil.rmtree(folder)
        os.rename(folder + ".part", folder)
        steps = sorted(int(name[5:]) for name in os.listdir(os.path.dirname(folder)) if re.fullmatch(r"step_\d+", name))
        for old in steps[:-args.keep]:
            shutil.rmtree(os.path.join(os.path.dirname(folder), f"step_{old}"))
    world.first(finish_save)


def load_checkpoint(args, model, *optimizers):
    """Loads the last checkpoint, if --resume asks for it and there is one. → the number of steps done"""
    folder = last_checkpoint(args.out) if args.resume else None
    if folder is None:
        return 0
    dcp.load(state(model, optimizers), checkpoint_id=folder)
    return int(folder.rsplit("_", 1)[1])


def export(model, processor, args, world, shard_bytes=5 * 10**9):
    """Writes --out as a Hugging Face LLaVA checkpoint: gathered tensor by tensor, in files of at most shard_bytes, moved in
    place when all are whole."""
    dtype = DTYPES[args.dtype]
    part = os.path.join(args.out, "export.part")
    world.first(shutil.rmtree, part, True)
    world.first(os.makedirs, part)
    files, held, size = [], {}, 0

    def flush():
        name = f"{len(files) + 1}.safetensors"
        safetensors.torch.save_file(held, os.path.join(part, name), metadata={"format": "pt"})
        files.append((name, {key: t.numel() * t.element_size() for key, t in held.items()}))
        held.clear()
    for name, parameter in model.named_parameters():
        whole = parameter.detach().full_tensor().to(dtype).cpu()  # collective: every rank takes part
        if world.rank == 0:
            bytes_ = whole.numel() * whole.element_size()
            if held and size + bytes_ > shard_bytes:
                flush()
                size = 0
            held[name], size = whole.contiguous(), size + bytes_
            if is_linear(model.config) and name == "multi_modal_projector.linear_1.weight":
                D = len(whole)
                held["multi_modal_projector.linear_2.weight"] = torch.eye(D, dtype=dtype)
                if model.config.multimodal_projector_bias:
                    held["multi_modal_projector.linear_2.bias"] = torch.zeros(D, dtype=dtype)

    def place():
        flush()
        data.save_processor(processor, model.config, part)
        model.config.architectures = ["LlavaForConditionalGeneration"]
        model.config.dtype = dtype
        model.config.save_pretrained(part)
        for path in glob.glob(os.path.join(args.out, "model*.safetensors*")):
            os.remove(path)
        index = {"metadata": {"total_size": sum(sum(sizes.values()) for _, sizes in files)}, "weight_map": {}}
        for i, (name, sizes) in enumerate(files, 1):
            final = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
            os.replace(os.path.join(part, name), os.path.join(args.out, final))
            index["weight_map"].update(dict.fromkeys(sizes, final))
        if len(files) > 1:
            write_json(os.path.join(args.out, "model.safetensors.index.json"), index)
        for name in os.listdir(part):
            os.replace(os.path.join(part, name), os.path.join(args.out, name))
        os.rmdir(part)
    world.first(place)
