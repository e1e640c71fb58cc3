"""Everything outside the algorithms: options, process group, FSDP2 sharding, loading and export of
weights, checkpoints, collectives, the log.

One process is a world of size one: plain `python` and `torchrun --nproc_per_node=8` take the same path,
NCCL on GPUs and gloo on CPUs. All collectives are in this file, so that the scripts read as if there were
one process.

Checkpoints. --model reads LLaVA-1.5 and LLaVA-NeXT (1.6) as transformers has them (the hub's names and
those that newer versions write) and in the original layouts; --llm with --clip starts a new projector,
LLaVA-1.5's. A hub id (org/name or org/name@revision) is downloaded once per node into the hub's cache, the
same commit for every rank and again at --resume; HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold. A
setting that changes what the model computes or sees is done as its own code does it, or refused in one line
that names file, setting and value, before any weight is read:

    done, equal to transformers                       refused
    LLaMA, Mistral, Qwen2: sizes, activations,        sliding windows, other RoPE, attention dropout,
    biases, GQA, head_dim, RoPE (plain, linear,       quantisation, other model types, code of its own
    llama3), tied embeddings
    any one feature layer, class token, mlp2x_gelu    several feature layers, other projectors,
                                                      mm_use_im_start_end, resamplers
    LLaVA-NeXT: anyres with spatial_unpad and         its class token, --image_mode, other patch merging,
    image_newline, any list of grids                  anyres_max_N, ranges of grids, tiles without newline
    shorter edge to `size`, centre crop or padding,   squashing, no rescaling, other filters
    bilinear or bicubic, any mean and deviation
    .safetensors, .bin, one file or several           adapters or a projector alone, quantised weights

When a run ends early, with the exit code of a rank (torchrun's own is 1):

    bad record, file or option         one line that names it, before any training                         2
    an exception on one rank           its traceback, once; all other ranks end within seconds             1
    a rank is killed                   the others end within a minute                                      1
    SIGTERM                            finishes the step, or drops the evaluation or rollout, and saves  143
    SIGINT, or a second SIGTERM        ends at once                                                 130, 143
    a number that is not finite        ends before the optimiser's step; the last checkpoints stay         1
    the disk is full                   one line; with room, --resume gives the uninterrupted run           1

args.json records what a run depends on: options, content of the data files, samples of the checkpoint's
files, what its chat template rendered, a reward function's file. --resume refuses what has changed. A
second run on the same --out is refused. On GPUs each line of log.jsonl has rank 0's peak memory. torchrun
kills its ranks 30 s after a SIGTERM; TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives them more seconds to save (torch
2.13). A finished run has removed its checkpoints, and --resume has nothing left to do.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import glob
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zipfile

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import LlavaConfig

import data
from data import UserError
from model import (
    EXTRAS,
    LANGUAGE_MODELS,
    VOCABULARY,
    LoRA,
    VisionLLM,
    add_lora,
    check_names,
    initial_std,
    llava_config,
    our_name,
    tensor_shape,
)

ROOT = os.path.dirname(os.path.abspath(__file__))
SHAPES_DIR = os.path.join(ROOT, "runs", "shapes")  # the shapes data set, used where no --model is given
ADAM_BETAS, MAX_GRAD_NORM = (0.9, 0.95), 1.0  # LLaMA's, arXiv:2302.13971, section 2.2


# ---- options ----

# What an option takes, for argparse's type=. Its error names the option.

def bounded(text, kind, need, least=-sys.float_info.max, most=sys.float_info.max):
    """An option's text as an int or float within bounds, so neither infinite nor NaN. need: what an error
    says."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"got {text}, need {need}")
    return value


def positive_int(text):
    return bounded(text, int, "a whole number of at least 1", 1)


def non_negative_int(text):
    return bounded(text, int, "a whole number of at least 0", 0)


def positive(text):
    return bounded(text, float, "a number above 0", sys.float_info.min)


def non_negative(text):
    return bounded(text, float, "a number of at least 0", 0)


def fraction(text):
    return bounded(text, float, "a number from 0 to 1", 0, 1)


def finite(text):
    return bounded(text, float, "a finite number")


def train_parts(text, known):
    """--train: comma-joined parts of those that a script can train."""
    if not {*text.split(",")} <= {*known}:
        raise argparse.ArgumentTypeError(f"got {text}, need any of {','.join(known)}, joined by commas")
    return text


def arguments(parser, training=True):
    """Adds the options that every run has, in groups."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="LLaVA: folder or hub id, HF or original layout (default: the shapes data set's)")
    add("--llm", help="LLaMA that gets a new projector (needs --clip)")
    add("--clip", help="CLIP for --llm, or in place of an original LLaVA's mm_vision_tower")
    add("--tokenizer", help="tokenizer folder, if not the checkpoint's")
    add("--template", default="auto",
        help=f"{', '.join(data.TEMPLATES)}, or a .jinja file (default: the checkpoint's own)")
    add("--image_mode", choices=["auto", "crop", "pad"], default="auto", help="how an image becomes a square "
        "(auto: as in the checkpoint; LLaVA-NeXT takes no other)")
    add("--dtype", choices=["bf16", "fp32"], default="bf16" if torch.cuda.is_available() else "fp32",
        help="of computation and export (default: bf16 on GPUs, fp32 on CPUs)")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="files of records: .json, .jsonl or .txt (head of data.py)")
    add("--images", help="folder that the image paths of all files start from (default: each file's own)")
    add("--max_len", type=positive_int, default=2048, help="longest record, in tokens; images count (of "
        "LLaVA-NeXT up to 2928 each)")
    add("--skip_bad_rows", action="store_true", help="report bad records and leave them out")
    add("--workers", type=non_negative_int, default=2, help="threads per rank to decode images (0: none)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="what is written: a folder (predict.py: a .jsonl file)")
    add("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    add("--resume", action="store_true", help="continue the run in --out where it ended, if there is one")
    add("--seed", type=non_negative_int, default=0, help="of record order, new parameters and sampling")
    add("--replicas", type=positive_int, default=1, help="copies of the sharded model (hybrid sharding)")
    if not training:
        return
    add("--save_every", type=non_negative_int, default=500, help="steps per checkpoint (0: one at the end)")
    add("--eval_data", nargs="+", help="files of held-out records")
    add("--eval_every", type=non_negative_int, default=500, help="steps per evaluation (0: one at the end)")
    add("--wandb", metavar="PROJECT", help="log to this Weights & Biases project too (pip install wandb)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=positive_int, default=128, help="records per optimizer step, over all ranks")
    add("--micro_batch", type=positive_int, default=4,
        help="records per forward pass on one rank: changes memory and speed, not results")
    add("--epochs", type=positive, default=1, help="passes over the data")
    add("--max_steps", type=non_negative_int, default=0, help="optimizer steps, in place of --epochs")
    add("--lr", type=non_negative, default=2e-5,
        help="peak learning rate (default: %(default)g; with --lora_rank ten times that, as adapters learn "
        "next to nothing at the rate of full weights)")
    add("--warmup", type=non_negative, default=0.03,
        help="linear warm-up: steps, or below 1 a share of all steps")
    add("--weight_decay", type=non_negative, default=0.0, help="AdamW's, not on norms and biases")
    add("--recompute", action="store_true", help="recompute activations in backward: less memory, more time")
    add("--offload", action="store_true", help="weights, gradients and AdamW's state in host memory, AdamW "
        "on the CPU: less GPU memory, slower steps")
    add("--lora_rank", type=non_negative_int, default=0,
        help="train LoRA adapters in place of the LLaMA, at ten times the default --lr (0: no LoRA); "
        "trained alone on a --model, they are in OUT/adapter too, as PEFT's")
    add("--lora_alpha", type=positive, default=16, help="LoRA's update is scaled by alpha / rank")


NEEDED = {  # options that do nothing without another one
    "lora_alpha": "lora_rank", "eval_every": "eval_data", "ptx_coef": "ptx_data"}

def hint(word, names):
    """What to say of an option that argparse does not know. names: the script's own options.
    option_names.json has names of transformers, TRL, PEFT, DeepSpeed and LLaVA, and earlier ones of ours."""
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    table = data.read_json(ROOT, "option_names.json")
    ours = next((ours for ours, others in table.items() if name in others.split()), f"--{name}")
    if ours.startswith("no option"):
        return ours
    option = re.match(r"-+(\w*)", ours)[1]
    if option in names:
        return f"use {ours}"
    for script in ("sft", "rm", "dpo", "ppo", "predict", "fsdp"):
        with open(os.path.join(ROOT, f"{script}.py"), encoding="utf-8") as f:
            if f'add("--{option}"' in f.read():
                return f"{ours} is an option of " + ("training" if script == "fsdp" else f"{script}.py")
    near = [other for other in names if other.startswith(name)]
    near = near or difflib.get_close_matches(name, names, 1, 0.75)
    return f"did you mean --{near[0]}?" if near else "see --help"


def parse(parser, data_file, shapes, argv=None):
    """Parses the command line. Without --model and --llm a run uses the shapes data set: its files and the
    values in `shapes` become the defaults, and it is created on first use. With --lora_rank the default --lr
    is ten times that of full training (LLaVA's ratio)."""
    parser.allow_abbrev, parser.print_usage = False, lambda file=None: None  # an error is one line
    for action in parser._actions:  # --help shows each default
        if action.default not in (None, False, argparse.SUPPRESS) and "default" not in action.help:
            action.help += " (default: %(default)s)"
    args, unknown = parser.parse_known_args(argv)
    options = [word for word in unknown if re.match("-+[A-Za-z]", word)]  # the others are their values
    if options:
        parser.error("; ".join(f"unknown option {word}: {hint(word, [*vars(args)])}" for word in options))
    if unknown:
        parser.error(f"got {unknown[0]!r}, which belongs to no option")
    lora = getattr(args, "lora_rank", 0)
    full = parser.get_default("lr")
    if not (args.model or args.llm):
        parser.set_defaults(**{"model": os.path.join(SHAPES_DIR, "model"),
                               "data": [os.path.join(SHAPES_DIR, data_file)], **shapes})
    elif lora:
        parser.set_defaults(lr=None)
    args = parser.parse_args(argv)
    if getattr(args, "train", "") is None:  # a new projector is always trained
        args.train = "llm" if lora and not args.llm else "projector,llm"
    if lora and args.lr is None:
        args.lr = round(10 * full, 12)
        in_full = {*args.train.split(",")} - {"llm"}  # parts that are no adapters
        if "projector" in in_full and hasattr(args, "projector_lr"):
            in_full.remove("projector")
            args.projector_lr = args.projector_lr or full
        if in_full:
            parser.error(f"got --train {args.train} with --lora_rank, need --lr: the default suits adapters, "
                         f"and is ten times that of {' and '.join(sorted(in_full))}")
    if getattr(args, "projector_lr", None) is not None and "projector" not in args.train.split(","):
        parser.error(f"got --projector_lr {args.projector_lr}, but --train {args.train} has no projector")
    for option, other in NEEDED.items():
        value = getattr(args, option, None)
        if value and value != parser.get_default(option) and not getattr(args, other):
            parser.error(f"got --{option} {value} without --{other}, which it is for")
    if args.resume and args.overwrite:
        parser.error("got --resume and --overwrite: give one (--resume starts afresh where nothing is left)")
    if bool(args.llm) != bool(args.clip) and not args.model:
        parser.error("--llm and --clip go together: a LLaMA and the CLIP tower for its new projector")
    if args.model and args.llm:
        parser.error("got --model and --llm: give a whole LLaVA, or a LLaMA with --clip")
    if not args.data and not getattr(args, "prompt", None):
        parser.error("--data is needed with --model: a file of records (head of data.py)")
    if args.template != "auto":
        data.template_text(args.template)  # raises where there is none
    name = os.path.splitext(os.path.basename(parser.prog))[0]
    name += "" if hasattr(args, "save_every") else ".jsonl"
    if not getattr(args, "prompt", None):  # predict.py's, which writes nothing
        args.out = args.out or os.path.join(ROOT, "runs", name)
    return args


def left_by(script, option="model"):
    """The default of an option on the shapes data set: the output folder of a script that ran without
    arguments, if there is one."""
    folder = os.path.join(ROOT, "runs", script)
    return {option: folder} if os.path.isfile(os.path.join(folder, "config.json")) else {}


# ---- launch ----

@dataclasses.dataclass
class World:
    rank: int
    size: int
    device: torch.device
    mesh: object
    commit: str = None  # of this project, if known
    inputs: dict = dataclasses.field(default_factory=dict)  # what this run depends on beyond its options
    earlier: dict = dataclasses.field(default_factory=dict)  # `inputs` of the run that --resume continues
    snapshots: dict = dataclasses.field(default_factory=dict)  # folder in the hub's cache → id, commit, files

    def sum(self, *numbers):
        """Sums each number (or scalar tensor) over ranks, in fp64. → a list"""
        total = torch.stack([torch.as_tensor(n, dtype=torch.float64).detach().cpu() for n in numbers])
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flags):
        """Whether a flag [...] is set on some rank."""
        return self.sum(flags.sum())[0] > 0

    def gather(self, item):
        """→ the items of all ranks, in their order, on every rank"""
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def on_rank0(self, function, *args):
        """Runs function on rank 0 while the others wait. → its result, on every rank"""
        result = [function(*args) if self.rank == 0 else None]
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def parallel_map(self, function, items, what):
        """→ [function(item) for item in items], computed by all ranks and their threads"""
        mine = items[self.rank::self.size]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = [pool.submit(function, item) for item in mine]
            done = [future.result() for future in data.progress(waiting, what)]
        results = [None] * len(items)
        for rank, part in enumerate(self.gather(done)):
            results[rank::self.size] = part
        return results

    def depends_on(self, what, value):
        """Records a JSON value that the run depends on. UserError if ranks differ, or if the value is not the
        one that the run which --resume continues began with."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                raise UserError(f"{what}: rank {rank} reads other content than rank {self.rank}: "
                                "need the same files on every node")
        value = json.loads(json.dumps(value))
        if self.earlier and self.earlier.get(what) != value:
            raise UserError(f"cannot resume: {what} changed since the run began: restore it, or start again "
                            "in another --out")
        self.inputs[what] = value


def launch(args):
    """Joins the process group and creates the mesh. → World"""
    # Other programs are started first: a process with gloo's threads must not be forked.
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or None
    paths = [getattr(args, "model", None), *(getattr(args, "data", None) or [])]
    if os.environ.get("RANK", "0") == "0" and any(path and folder_of(path) == SHAPES_DIR for path in paths):
        make_shapes()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and offloads(args):  # AdamW runs on the CPU, where torchrun gives each rank one thread
        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, cores // ranks))
    if kind == "cuda":
        # lengths vary from batch to batch: segments that can grow are reused where fixed ones would not fit
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # cuDNN's attention plans anew for each length, which decoding and packing change all the time, and
        # its masked backward has given NaN (torch 2.11 to 2.13)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # long, as a node may wait for another's download; the watching thread ends a wait for dead ranks
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=6), **alone)
    store = None
    if not alone:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False)
        # torchrun's store outlives its restarts of the ranks
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    watch(store)
    size = dist.get_world_size()
    if size % args.replicas:
        raise UserError(f"got --replicas {args.replicas}, need a divisor of the {size} ranks")
    shape = args.replicas, size // args.replicas
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if args.replicas > 1 else mesh["shard"]
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return World(dist.get_rank(), size, device, mesh, commit)


def folder_of(path):
    return os.path.dirname(os.path.abspath(path))


def make_shapes():
    if not os.path.isdir(SHAPES_DIR):
        script = os.path.join(ROOT, "examples", "shapes.py")
        subprocess.run([sys.executable, script, "--out", SHAPES_DIR], check=True)


# ---- the end of a run: failures, signals ----

STOPPED = 143  # exit code of a run that SIGTERM ended, as in shells: `sft.py … && rm.py …` goes no further


class Diverged(ArithmeticError):
    """A loss, gradient or score is not finite: the run ends before the optimizer's step."""


def run(main):
    """Runs a script's main and exits: with 2 after a UserError (one line on the terminal), with 1 after any
    other failure, else with main's return value. The first rank that fails prints the reason, and the others
    exit with it."""
    text, code = "", 0
    try:
        code = main() or 0
        if dist.is_initialized():  # after a failure other ranks may not join in
            dist.destroy_process_group()
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=code)
    except SystemExit as error:
        code = error.code
        if dist.is_initialized() or not isinstance(code, int | None):  # else argparse has said why
            text, code = f"{traceback.format_exc()}error: something called sys.exit({code!r})", 1
    except (UserError, Diverged) as error:
        text, code = f"error: {error}", 2 if isinstance(error, UserError) else 1
    except BaseException as error:
        text, code = traceback.format_exc(), 1
        if disk_full(error):
            why = str(error).partition("\n")[0][:200]
            text = f"error: no space left on the disk: free some, then --resume continues the run ({why})"
        elif isinstance(error, RuntimeError) and "gloo" in str(error) or isinstance(error, dist.DistError):
            text += "error: another rank is gone: was it killed, or out of memory? --resume continues the run"
    fail(text, code) if text else leave(code or 0)


def disk_full(error):
    """Whether the error, or one in its chain of causes, means that the disk is full."""
    if error is None:
        return False
    # safetensors gives the system's text only, PyTorch's writer that it could not write all
    words = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "unexpected pos"
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or any(word in str(error) for word in words)
    return full or disk_full(error.__cause__ or error.__context__)


def fail(text, code):
    """Prints why this rank fails and tells the others. If another rank failed first, waits for the exit that
    it causes."""
    rank, store = int(os.environ.get("RANK", 0)), Watch.store
    if Watch.ending:
        time.sleep(10)  # the watching thread ends this process
    with contextlib.suppress(RuntimeError):  # the store may be gone with its rank
        if store:
            first, _ = json.loads(store.compare_set("failure", "", json.dumps([rank, code])))
            if first != rank:
                time.sleep(10)
    text = text.strip()
    if rank and not text.startswith("error"):
        text = f"rank {rank} failed:\n{text}"
    with contextlib.suppress(OSError):  # the terminal may be gone, or a full disk
        print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError, KeyError):  # torchrun ends its own report with it
        said = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as f:
            json.dump({"message": said}, f)
    with contextlib.suppress(RuntimeError):
        if store:
            store.set("failure said", "")
            others = [f"failure heard by {r}" for r in range(int(os.environ["WORLD_SIZE"])) if r != rank]
            deadline = time.monotonic() + 3
            while not store.check(others) and time.monotonic() < deadline:
                time.sleep(0.05)  # the launcher, or the end of the store, would make the others print more
    leave(code)


def leave(code):
    """Exits at once, without Python's teardown: gloo's threads outlive their group, and one that frees a
    tensor during the teardown aborts the process."""
    unlock()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Watch:
    """State that the watching thread shares with the main one."""
    store = None  # shared with the other ranks, None in a world of one
    sigterm = None  # time of the first SIGTERM
    saves = False  # whether the run saves after SIGTERM; if not, SIGTERM ends the process at once
    ending = False  # whether another rank has failed
    started = False


def watch(store):
    """Starts the thread that ends this process after another rank's failure, after the launcher's death, at
    SIGINT, and at SIGTERM if nothing can be saved or if it is the second one. It is a thread because Python's
    signal handlers do not run while the main thread is inside a collective."""
    Watch.store = store
    if Watch.started:
        return
    Watch.started, launcher = True, os.getppid()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    reader.settimeout(1)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: writer)  # keeps it open; the thread acts

    def loop():
        while True:
            numbers = b""
            with contextlib.suppress(TimeoutError):
                numbers = reader.recv(16)
            try:
                end_with_the_first()
            except RuntimeError:  # the store is gone with its process
                Watch.store = None
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
                leave(1)
            for number in numbers:
                obey(number)
    threading.Thread(target=loop, daemon=True).start()


def end_with_the_first():
    """Ends this process if another rank has failed and has printed its reason."""
    if Watch.store and Watch.store.check(["failure"]):
        rank, code = json.loads(Watch.store.get("failure"))
        if rank != int(os.environ["RANK"]):
            Watch.ending = True
            with contextlib.suppress(RuntimeError):
                Watch.store.wait(["failure said"], datetime.timedelta(seconds=5))
                Watch.store.set(f"failure heard by {os.environ['RANK']}", "")
                time.sleep(0.5)  # the store may end with this process: the other one leaves first
            leave(code)


def obey(number):
    """Acts on a signal."""
    # Schedulers signal the launcher and its ranks, and the launcher passes it on: together one SIGTERM.
    again = Watch.sigterm and time.monotonic() - Watch.sigterm > 0.5
    if number == signal.SIGINT or number == signal.SIGTERM and (again or not Watch.saves):
        with contextlib.suppress(OSError):
            print(f"ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        leave(128 + number)
    if number == signal.SIGTERM:
        Watch.sigterm = Watch.sigterm or time.monotonic()


class Stop:
    """Whether SIGTERM (a scheduler's warning) has reached any rank: the run then saves and ends. Once a Stop
    is created, SIGTERM no longer ends the process by itself."""

    def __init__(self):
        Watch.saves = True

    @property
    def heard(self):
        """Whether SIGTERM has reached this rank."""
        return Watch.sigterm is not None

    def asked(self, world):
        return world.sum(self.heard)[0] > 0

    def until(self, items, world):
        """Yields the items until a rank is asked to stop. All ranks have equally many items."""
        for item in items:
            if self.asked(world):
                return
            yield item


def check_finite(args, step, **metrics):
    """Raises Diverged if a metric is not finite. Called before the optimizer's step, and before anything of
    the step is written."""
    bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
    if bad:
        saved = checkpoint_steps(args.out)
        last = f"the last checkpoint, of step {saved[-1]}, is kept" if saved else "there is no checkpoint yet"
        raise Diverged(f"step {step}: {bad}, need finite numbers: {last}, nothing was exported; start again "
                       "with a lower learning rate, or look for odd records in the data")


# ---- reading a checkpoint ----

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?"


def fetch(name, world):
    """→ the checkpoint folder. For a hub id, org/name or org/name@revision: its snapshot in the hub's cache,
    without weights so far, of the same commit on every rank (in a resumed run: the commit that it began
    with)."""
    if os.path.isdir(name):
        return name
    if os.path.exists(name) or not re.fullmatch(HUB_ID, name):
        raise UserError(f"got {name!r}, need a checkpoint folder or a hub id; there is no such folder")
    what, (repo, _, revision) = f"the commit of {name}", name.partition("@")
    small = ["*.json", "*.jinja", "*.model"]
    revision = world.earlier.get(what) or revision or None
    commit = os.path.basename(world.on_rank0(download, repo, revision, small))
    world.depends_on(what, commit)
    folder = once_per_node(f"{name} {commit}", download, repo, commit, small)
    world.snapshots[folder] = repo, commit, world.on_rank0(list_files, repo, commit)
    return folder


def fetch_weights(folder, world):
    """Downloads the weights of a snapshot that `fetch` returned: safetensors files, or .bin files if there
    are no others."""
    if folder not in world.snapshots:
        return
    repo, commit, sizes = world.snapshots[folder]
    found = sizes or os.listdir(folder)
    names = weight_names(folder, found) + [SCORE] * (SCORE in found)

    def download_missing():
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing and sizes:
            if not int(os.environ.get("LOCAL_RANK", 0)):
                size = f"{sum(sizes.get(name) or 0 for name in missing) / 1e9:.2f} GB"
                print(f"{repo}, commit {commit}: downloading {size}, {len(missing)} files", flush=True)
            download(repo, commit, missing, show=True)
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing or not names:
            where = "the hub has" if sizes else "the hub cannot be asked (HF_HUB_OFFLINE?), and its cache has"
            lacks = ", ".join(missing) or "model*.safetensors or pytorch_model*.bin"
            raise UserError(f"{repo}, commit {commit}: need weights, but {where} no {lacks}")
    once_per_node(f"weights of {folder}", download_missing)


def list_files(repo, commit):
    """→ {name: size} of a repository's files and folders; None if the hub cannot be reached."""
    from huggingface_hub import HfApi
    try:
        return {file.path: getattr(file, "size", 0) for file in HfApi().list_repo_tree(repo, revision=commit)}
    except Exception:  # of as many kinds as there are HTTP clients
        return None


def download(repo, revision, names, show=False):
    """Downloads those of a repository's files with these names that are not in the cache. → the snapshot's
    folder"""
    from huggingface_hub import constants, errors, snapshot_download, utils
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        show = show and not int(os.environ.get("LOCAL_RANK", 0))
        (utils.enable_progress_bars if show else utils.disable_progress_bars)()
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=names, ignore_patterns="*/*")
    except Exception as error:
        if disk_full(error):
            raise
        text = " ".join(str(error).split())[:400]
        why = f"the hub says: {text}"
        if isinstance(error, errors.GatedRepoError):
            why = (f"the hub wants its licence accepted at {constants.ENDPOINT}/{repo}: do so, then set "
                   "HF_TOKEN, or run: hf auth login")
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = "the hub has none of this name, or a private one: set HF_TOKEN, or run: hf auth login"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"the hub has no revision {revision} of it"
        elif constants.HF_HUB_OFFLINE:
            why = f"HF_HUB_OFFLINE is set while {constants.HF_HUB_CACHE} lacks it, or a part of it: {text}"
        raise UserError(f"got {repo!r}, need a checkpoint folder or a hub id; there is no such folder, and "
                        f"{why}") from error


def once_per_node(key, function, *args):
    """Calls function on a node's first rank, then on its other ranks, which reuse the files. They do not wait
    in a collective, because a download may take longer than its timeout."""
    key, first = f"{key}, node {os.environ.get('GROUP_RANK', 0)}", not int(os.environ.get("LOCAL_RANK", 0))
    while not first and Watch.store and not Watch.store.check([key]):
        time.sleep(0.1)
    result = function(*args)
    if first and Watch.store:
        Watch.store.set(key, "")
    return result


def read_config(args, world):
    """--model, or --llm and --clip → LlavaConfig or LlavaNextConfig, the tokenizer's folder, the vision
    tower's folder, and the folders that hold the model's tensors; of two equal names the later folder's
    tensor counts."""
    folder = fetch(args.model or args.llm, world)
    raw = read_config_file(folder, world)
    kind = raw.get("model_type")
    if args.llm:
        if kind not in ("llama", "mistral", "qwen2"):
            raise UserError(f"{folder}: got --llm of the kind {kind!r}, need llama, mistral or qwen2")
    elif kind in ("llava", "llava_next") and "text_config" in raw:
        if args.clip:
            raise UserError(f"got --clip {args.clip}, but {folder} has a tower of its own: leave it out")
        return llava_config(folder, raw), folder, folder, [folder]
    elif "text_config" in raw or kind not in LANGUAGE_MODELS or "mm_vision_tower" not in raw:
        original = ", ".join(name for name in LANGUAGE_MODELS if name.startswith("llava"))
        raise UserError(
            f"{folder}: got --model of the kind {kind!r}, need LLaVA-1.5 or LLaVA-NeXT as transformers has "
            f"them (llava, llava_next), or an original one with mm_vision_tower ({original}); give a LLaMA "
            "as --llm, with --clip")
    try:
        clip = fetch(args.clip or raw["mm_vision_tower"], world)
    except UserError as error:
        if args.clip:
            raise
        raise UserError(f"{folder}/config.json: mm_vision_tower: {error}; --clip gives another") from error
    # an original LLaVA may hold a tower that was trained with it, but --clip replaces that
    folders = [folder, clip] if args.clip else [clip, folder]
    return llava_config(folder, raw, clip, read_config_file(clip, world)), folder, clip, folders


def read_config_file(folder, world):
    """→ a checkpoint folder's config.json. UserError if the folder, or its repository on the hub, does not
    hold full weights."""
    _, _, hub = world.snapshots.get(folder, (None, None, None))
    names = sorted(hub or os.listdir(folder))
    raw, adapter = (data.read_json(folder, name) for name in ("config.json", "adapter_config.json"))
    weights = weight_names(folder, names)
    if adapter is not None or "non_lora_trainables.bin" in names:
        base = (adapter or {}).get("base_model_name_or_path")
        raise UserError(f"{folder}: holds a LoRA adapter (adapter_config.json) of {base!r}, need full "
                        "weights: merge it (LLaVA: scripts/merge_lora_weights.py, PEFT: merge_and_unload)")
    if "mm_projector.bin" in names and not weights:
        base = (raw or {}).get("_name_or_path")
        raise UserError(f"{folder}: holds a projector alone (mm_projector.bin), of {base!r}; need full "
                        "weights, or --llm and --clip for a new projector")
    if "quantize_config.json" in names:
        raise UserError(f"{folder}: its weights are quantised (quantize_config.json), need those they were "
                        "made from")
    if raw is None:
        raise UserError(f"{folder}: no config.json, need a checkpoint folder as transformers writes it; "
                        f"it holds {data.shown(', '.join(names) or 'nothing')}")
    if not weights and (hub or folder not in world.snapshots):  # offline: fetch_weights says so
        raise UserError(f"{folder}: got none of {', '.join(WEIGHTS)}, need weights; it holds "
                        f"{data.shown(', '.join(names))}")
    return raw


WEIGHTS = ("model.safetensors", "model.safetensors.index.json",  # as transformers looks for them, in order
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_names(folder, names):
    """→ those of a checkpoint's files (names) that hold its tensors. Without an index in the folder these are
    all numbered files."""
    for name in WEIGHTS:
        if name in names and not name.endswith(".json"):
            return [name]
        if name in names:
            return sorted({*data.read_json(folder, name)["weight_map"].values()})
    parts = [[name for name in sorted(names) if re.fullmatch(rf"{stem}-\d+-of-\d+\.{kind}", name)]
             for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin"))]
    return parts[0] or parts[1]


def open_tensors(folders):
    """→ the tensors of checkpoint folders: {our name: object that reads a slice of rows when indexed}"""
    tensors = {}
    for folder in folders:
        for file in (os.path.join(folder, name) for name in weight_names(folder, os.listdir(folder))):
            if not os.path.isfile(file):
                raise UserError(f"{file}: named by the index of {folder}, but there is no such file")
            found = open_pickled(file) if file.endswith(".bin") else slices(file)
            tensors.update({our_name(key): rows for key, rows in found.items() if not EXTRAS.search(key)})
    return tensors


def slices(file):
    """→ the tensors of a safetensors file: {name: object that reads a slice of rows when indexed}"""
    try:
        handle = safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read ({error}): fetch it again") from error
    return {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (no dict)


def open_pickled(file):
    """→ the tensors of a .bin file: {name: memory-mapped tensor}"""
    try:
        found = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        raise UserError(
            f"{file}: cannot be mapped: it is cut short, or in the format from before PyTorch 1.6. Fetch it "
            f"again, or convert it: python -c \"import torch; torch.save(torch.load('{file}', "
            f"weights_only=True), '{file}.new')\" && mv '{file}.new' '{file}' ({error})") from error
    bad = [""]
    if isinstance(found, dict):
        bad = [key for key, value in found.items() if not torch.is_tensor(value)]
    if bad:
        raise UserError(f"{file}: got something else than a tensor under {bad[0]!r}, need a dict of tensors")
    return found


def check_sizes(config, tensors, folders):
    """Compares sizes in config.json with those of the tensors, before a model of these sizes is created."""
    text, vision, tower = config.text_config, config.vision_config, "vision_tower.vision_model."
    checks = []  # name in config.json, its value, that of the weights
    for name, value, prefix in (("text_config", text.num_hidden_layers, "language_model.model.layers."),
                                ("vision_config", vision.num_hidden_layers, f"{tower}encoder.layers.")):
        numbers = [int(key[len(prefix):].split(".")[0]) for key in tensors if key.startswith(prefix)]
        checks.append((f"num_hidden_layers of the {name}", value, 1 + max(numbers, default=value - 1)))
    positions = 1 + (vision.image_size // vision.patch_size) ** 2
    table = f"{tower}embeddings.position_embedding.weight"
    for name, value, key in (("vocab_size", text.vocab_size, VOCABULARY[0]), ("positions", positions, table)):
        checks.append((name, value, tensor_shape(tensors[key])[0] if key in tensors else value))
    for name, value, found in checks:
        if value != found:
            raise UserError(f"{' + '.join(folders)}: config.json gives {value} as {name}, the weights have "
                            f"{found}: need the config.json of these weights")


def resolve_tied(config, tensors, world):
    """If embedding and head are tied, keeps one matrix, whichever exists. If both exist and differ, they are
    not tied, whatever config.json says (as in transformers). Changes config and tensors."""
    embedding, head = VOCABULARY
    if not config.tie_word_embeddings or head not in tensors:
        return
    if embedding in tensors and not world.on_rank0(equal_tensors, tensors[embedding], tensors[head]):
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        if world.rank == 0:
            print("config.json ties lm_head to the embedding, but their weights differ: they stay apart")
        return
    found = tensors.pop(head)
    tensors.setdefault(embedding, found)


def equal_tensors(a, b, rows=4096):
    """Whether two tensors, or slices of safetensors files, hold the same values."""
    n = tensor_shape(a)[0]
    return tensor_shape(a) == tensor_shape(b) and all(
        torch.equal(a[start:start + rows], b[start:start + rows]) for start in range(0, n, rows))


@torch.no_grad()
def load_weights(model, tensors, resized_vocab, seed):
    """Loads every parameter; each rank reads only its own rows. New rows of a resized vocabulary are the mean
    of the old ones. Parameters without a tensor are drawn at random, keyed by (seed, name)."""
    for name, parameter in data.progress([*model.named_parameters()], "tensors read"):
        local, n, size, mine = local_tensor(parameter), parameter.shape[0], 1, 0
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            size, mine = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)
        chunk = -(-n // size)  # FSDP2 shards rows as torch.chunk does
        start, stop = min(n, mine * chunk), min(n, (mine + 1) * chunk)
        assert len(local) == stop - start, (name, local.shape, start, stop)
        if name not in tensors:
            key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
            whole = torch.empty(parameter.shape)
            whole.normal_(0, initial_std(name, whole.shape), generator=torch.Generator().manual_seed(key))
            local.copy_(whole[start:stop])
            continue
        old = resized_vocab[0] if resized_vocab and name in VOCABULARY else n
        local[:max(0, min(stop, old) - start)] = tensors[name][start:min(stop, old)].to(local)
        if stop > max(start, old):
            steps = range(0, old, 4096)
            mean = sum(tensors[name][i:min(i + 4096, old)].double().sum(0) for i in steps) / old
            local[max(0, old - start):] = mean.to(local)


# ---- reading data ----

def images_folder(path, args):
    """→ the folder that a data file's image paths are relative to"""
    folder = folder_of(path)
    return args.images or (os.path.join(SHAPES_DIR, "images") if folder == SHAPES_DIR else folder)


def read_conversations(paths, args, world, need_answers):
    """Data files → the records of all files in their order, and the (index, Conversation) pairs of the good
    ones. Every image is decoded once, but not again when a run is resumed."""
    all_records, conversations = data.Records([]), []
    for path in paths:
        records, first, images = data.load_records(path), len(all_records), images_folder(path, args)
        read = f"{path} (records with {need_answers} or more answers)"
        what = f"which images can be read of {read}"
        good, bad, unreadable = data.check_records(
            records, images, path, need_answers, args.skip_bad_rows, world, world.earlier.get(what))
        world.depends_on(read, data.digest(good, images))
        world.depends_on(what, unreadable)
        if world.rank == 0 and bad:
            print(f"{path}: {bad} of {len(records)} records are bad and left out", flush=True)
        file = path, first
        for index, conversation in good:
            conversation.file = file
            conversations.append((first + index, conversation))
        all_records.texts += records.texts
    return all_records, conversations


def read_examples(paths, which, processor, args, world):
    """Data files → Examples (see data.build_examples). Prints how many records were left out or cut."""
    all_records, conversations = read_conversations(paths, args, world, data.ANSWERS_NEEDED[which])
    total = len(all_records)
    del all_records  # before the examples need memory
    examples, counts = data.build_examples(conversations, processor, which)
    if world.rank == 0 and any(counts.values()):
        print(f"{', '.join(paths)}: --max_len {args.max_len} leaves out {counts['too_long']} of {total} "
              f"records, whose prompt alone is longer, and cuts the answers of {counts['cut']}", flush=True)
    return examples


# ---- building and sharding ----

@dataclasses.dataclass
class Checkpoint:
    """A model of the command line, before any weight is read."""
    option: str  # the option that names it
    config: LlavaConfig  # or LlavaNextConfig
    folders: list  # the folders that hold its tensors
    tensors: dict  # our name → object that reads a slice of rows when indexed
    processor: data.Processor
    resized_vocab: tuple  # (old, new) embedding rows, or None
    newly_initialised: tuple  # substrings of parameter names that are drawn at random if there is no tensor


def open_checkpoint(args, world, option="model"):
    """--model, or --llm with --clip → Checkpoint"""
    try:
        config, folder, tower, folders = read_config(args, world)
        for source in folders:
            fetch_weights(source, world)
        tensors = open_tensors(folders)
        resolve_tied(config, tensors, world)
        check_sizes(config, tensors, folders)
    except (TypeError, ArithmeticError, AttributeError, LookupError, StrictDataclassError) as error:
        why = " ".join(str(error).split())  # values that no model has
        raise UserError(f"{args.model or args.llm}: config.json cannot be used: {why}") from error
    sources = [*folders, args.tokenizer] if args.tokenizer else folders
    world.depends_on(f"the checkpoint of --{option}", world.on_rank0(fingerprint, sources))
    rendered = world.earlier.get(f"what the chat template of --{option} renders", [])
    processor, resized_vocab = data.load_processor(folder, config, args, rendered, tower)
    grids, *sizes = processor.grids, processor.tile_tokens, processor.size
    most = max((len(data.feature_layout(grid[::-1], *sizes, grids)[0]) for grid in grids), default=0)
    if args.max_len <= most and world.rank == 0:
        print(f"{folder}: an image takes up to {most} tokens, but --max_len is {args.max_len}: records with "
              "large images are left out; give --max_len 4096", flush=True)
    newly_initialised = ("multi_modal_projector.", ".lora_") if args.llm else (".lora_",)
    try:  # before any data is read
        with torch.device("meta"):
            model = VisionLLM(config)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    check_names(model, tensors, resized_vocab, newly_initialised, folders)
    return Checkpoint(option, config, folders, tensors, processor, resized_vocab, newly_initialised)


def fingerprint(folders):
    """→ a hash of the files in checkpoint folders that define a model: of their names, sizes and 64 samples
    of 4 KB each. A copy has the same hash, other weights have another."""
    seen = hashlib.sha256()
    for folder in folders:
        for kind in ("*.safetensors", "*.bin", "*.index.json", "*config.json", "*token*", "chat_template*"):
            for path in sorted(glob.glob(os.path.join(folder, kind))):
                size = os.path.getsize(path)
                seen.update(f"{os.path.basename(path)} {size}".encode())
                with open(path, "rb") as f:
                    for sample in range(64):
                        f.seek(max(0, size - 4096) * sample // 63)
                        seen.update(f.read(4096))
    return seen.hexdigest()


def file_digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_second_model(option, processor, args, world, reward=False):
    """A second LLaVA, named by an option → Checkpoint. It must have the processor's tokenizer. reward: it
    must have a scalar head, as rm.py writes it, and keeps its own template and image settings."""
    other = argparse.Namespace(**vars(args))
    name = getattr(args, option)
    other.model, other.llm, other.clip = name, None, None
    if reward:
        other.tokenizer, other.template, other.image_mode = None, "auto", "auto"
    checkpoint = open_checkpoint(other, world, option)
    if checkpoint.processor.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise UserError(f"{name}: its tokenizer is not that of {args.model or args.llm}, need the same")
    if reward and not any(os.path.isfile(os.path.join(folder, SCORE)) for folder in checkpoint.folders):
        raise UserError(f"{name}: no {SCORE}, need a reward model: what rm.py leaves in --out")
    return checkpoint


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCORE = "score.safetensors"  # a reward model's scalar head, which transformers does not read


def build(checkpoint, args, world, trainable=(), score=False):
    """The checkpoint's model, sharded, with its weights loaded; for the parameters see build_sharded. Build
    optimisers before the first forward pass."""
    tensors, newly_initialised = dict(checkpoint.tensors), checkpoint.newly_initialised
    if score:  # the scalar head is drawn where the checkpoint has none
        newly_initialised += ("score.",)
        for file in (os.path.join(folder, SCORE) for folder in checkpoint.folders):
            if os.path.isfile(file):
                tensors.update({f"score.{key}": rows for key, rows in slices(file).items()})
    model = build_sharded(checkpoint.config, args, world, trainable, score)
    check_names(model, tensors, checkpoint.resized_vocab, newly_initialised, checkpoint.folders)
    model.to_empty(device="cpu" if offloads(args) else world.device)
    if not isinstance(model.language_model.lm_head.weight, DTensor):  # FSDP itself keeps tied weights so
        model.language_model.tie()
    load_weights(model, tensors, checkpoint.resized_vocab, args.seed)
    return model


def build_sharded(config, args, world, trainable=(), score=False):
    """A sharded model without weights, on `meta`. trainable: prefixes of the names that are trained (fp32
    masters; with --lora_rank adapters stand for the LLaMA's weights); all else is frozen, in the compute
    dtype. score: with a scalar head."""
    lora = trainable and args.lora_rank
    with torch.device("meta"):
        model = VisionLLM(config, score)
        if lora:
            add_lora(model, args.lora_rank, args.lora_alpha)
    unreached = ["vision_tower.vision_model.post_layernorm."] + [
        f"vision_tower.vision_model.encoder.layers.{i}."
        for i in range(model.vision_tower.depth, config.vision_config.num_hidden_layers)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(trainable)) and not name.startswith(tuple(unreached))
        if lora and name.startswith("language_model.") and ".lora_" not in name:
            parameter.requires_grad = False
        master = parameter.requires_grad or name.startswith("score.")
        parameter.data = parameter.data.to(torch.float32 if master else DTYPES[args.dtype])
    if lora and not any(".lora_" in name and p.requires_grad for name, p in model.named_parameters()):
        raise UserError(f"got --lora_rank {args.lora_rank} without llm in --train: adapters are the LLaMA's")
    shard(model, world, DTYPES[args.dtype], offloads(args))
    return model


def offloads(args):
    """Whether the run keeps its parameters in host memory; predict.py has no such option."""
    return getattr(args, "offload", False)


def share_tower(model, other, world):
    """Lets `other` use the vision tower of `model` if both hold the same frozen weights, so that an image
    passes one tower only. → whether they share it"""
    ours, theirs = (dict(m.vision_tower.named_parameters()) for m in (model, other))
    kinds = [(m.vision_tower.depth, m.vision_tower.drop_class) for m in (model, other)]
    equal = kinds[0] == kinds[1] and ours.keys() == theirs.keys() and all(
        not p.requires_grad and torch.equal(local_tensor(p), local_tensor(theirs[n]))
        for n, p in ours.items())
    if all(world.gather(equal)):
        other.vision_tower = model.vision_tower
    return other.vision_tower is model.vision_tower


def roots(model):
    score = [model.score] if hasattr(model, "score") else []
    return model.language_model, model.multi_modal_projector, model.vision_tower, *score


def shard(model, world, dtype, offload=False):
    """fully_shard on each root, the LLaMA's layers as units of their own; scores are computed in fp32.
    Gradients are summed over ranks, not averaged. offload: parameters, gradients and thus the optimiser's
    state are CPU tensors; FSDP copies a unit to the GPU before it is gathered.

    In a world of one, frozen weights stay plain tensors, which FSDP would copy in every pass, and layers that
    hold some are no units of their own: its hooks take longer than what they do for adapters."""
    plain = {p for p in model.parameters() if not p.requires_grad and world.size == 1 and not offload}
    layers = [layer for layer in model.language_model.model.layers if plain.isdisjoint(layer.parameters())]
    offloading = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for unit in (*layers, *roots(model)):
        unit_dtype = torch.float32 if unit is getattr(model, "score", None) else dtype
        policy = MixedPrecisionPolicy(param_dtype=unit_dtype, reduce_dtype=torch.float32)
        fully_shard(unit, mesh=world.mesh, mp_policy=policy, offload_policy=offloading, ignored_params=plain)
    for module in model.modules():
        if isinstance(module, FSDPModule) and world.size > 1:  # a world of one would copy to divide by 1
            module.set_gradient_divide_factor(1.0)  # these settings do not reach child units by themselves
            module.set_force_sum_reduction_for_comms(True)


def local_tensor(parameter):
    """What this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def full_tensor(parameter):
    """All of a parameter, on every rank: collective."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def bytes_per_rank(*models):
    """→ {"weights", "gradients", "optimizer"}: bytes of sharded models on this rank while they are trained. A
    tower that several share counts once; the optimizer's are AdamW's two moments, in the gradients' dtype."""
    shards = {id(p): p for model in models for p in model.parameters()}.values()
    trained = sum(local_tensor(p).nbytes for p in shards if p.requires_grad)
    return {"weights": sum(local_tensor(p).nbytes for p in shards), "gradients": trained,
            "optimizer": 2 * trained}


def memory_line(args, *models):
    """What a run's first lines say of bytes_per_rank, on rank 0, which has the most."""
    sizes = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in bytes_per_rank(*models).items())
    return f"memory per rank: {sizes}{' (in host memory)' if offloads(args) else ''}"


def reshard(*models):
    """Call it after every forward pass without gradients. FSDP otherwise keeps the unsharded weights, and the
    next forward pass would miss the optimizer's update."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def unsharded(model, args, world):
    """→ a plain model with the full weights on every rank's device, in --dtype, so that ranks can decode at
    their own pace and without FSDP's hooks. In a world of one, weights that are like that are not copied."""
    reshard(model)
    with torch.device("meta"):
        plain = VisionLLM(model.config)
        adapter = next((module for module in model.modules() if isinstance(module, LoRA)), None)
        if adapter:
            add_lora(plain, adapter.rank, adapter.alpha)
    for name, parameter in model.named_parameters():
        full = parameter.detach().to(world.device, DTYPES[args.dtype])
        full = local_tensor(full) if world.size == 1 else full_tensor(full)
        owner, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(owner), leaf, nn.Parameter(full, requires_grad=False))
    plain.language_model.tie()
    return plain


@torch.no_grad()
def clip_gradients(parameters, largest=MAX_GRAD_NORM):
    """Scales gradients to the given global norm, if theirs is larger. → the norm before, over all ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards, mesh = [gradient.to_local() for gradient in gradients], gradients[0].device_mesh
    squares = nn.utils.get_total_norm(shards).double().square()  # of this rank's rows
    if mesh.size(-1) > 1:  # over the ranks that share a model; with --replicas each model has the same sum
        dist.all_reduce(squares, group=mesh.get_group(mesh.ndim - 1))
    norm = math.sqrt(squares)
    if norm > largest:
        torch._foreach_mul_(shards, largest / (norm + 1e-6))
    return norm


def schedule(step, steps, warmup):
    """→ the learning rate's factor at a step (from 0): linear warm-up, then half a cosine down to 0"""
    warm = warmup if warmup >= 1 else warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# ---- what a run leaves behind ----

RUN_FILES = ("log.jsonl", "config.json", "model*.safetensors*", "score.safetensors", "adapter",
             "reference.json", "rollouts", "export.part", "checkpoints/step_*.part")
RESUME_MAY_DIFFER = {"resume", "overwrite", "out", "save_every", "eval_every", "workers", "wandb",
                     "micro_batch", "decode_batch", "replicas", "offload", "save_rollouts"}
ABOUT_RUN = ("ranks", "versions", "commit", "inputs")  # what args.json holds beyond options
LOCKS = []  # (path, the open file that holds its lock, the folders created for it)


def lock(path):
    """Locks a file, which is created if there is none, until this process ends. UserError if another process
    holds the lock or the file cannot be written."""
    folder, created = os.path.dirname(os.path.abspath(path)), []
    while not os.path.isdir(folder):
        created.append(folder)
        folder = os.path.dirname(folder)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 (held open)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(path) or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise BlockingIOError  # removed by a run that was just ending
    except BlockingIOError as error:
        raise UserError(f"got --out, but another run holds {path}: wait for it, or choose another") from error
    except OSError as error:
        raise UserError(f"got --out, but {path} cannot be written ({error.strerror}): choose "
                        "another") from error
    LOCKS.append((path, file, created))


def unlock():
    """Removes locked files that are empty, and folders that lock() created and that are empty now."""
    for path, file, folders in LOCKS:
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_size == 0:
                os.remove(path)
            for folder in folders:
                os.rmdir(folder)


def check_out_file(args, world):
    """The check of predict.py, whose --out is a file; OUT.args.json records its options and inputs."""
    def check():
        if os.path.isdir(args.out):
            raise UserError(f"got --out {args.out}, which is a folder, need a .jsonl file")
        there, about = os.path.isfile(args.out), f"{args.out}.args.json"
        if there and any(os.path.isfile(path) and os.path.samefile(args.out, path) for path in args.data):
            raise UserError(f"got --out {args.out}, which is --data too: choose another")
        if there and not (args.overwrite or args.resume):
            raise UserError(f"got --out {args.out}, which exists: --resume continues it, --overwrite "
                            "replaces it")
        if there and args.resume and os.path.getsize(args.out) and not os.path.isfile(about):
            raise UserError(f"got --resume, but {about} is gone, which says what {args.out} was made of: "
                            "--overwrite starts anew")
        lock(args.out)
        return earlier_args(about, args)["inputs"] if os.path.isfile(about) and args.resume and there else {}
    world.earlier = world.on_rank0(check)


def check_out_dir(args, world):
    """Locks --out. UserError if the folder is not empty, unless it holds a run and --resume or --overwrite is
    given. --resume of a finished run exits with 0, as a scheduler may start it again."""
    if args.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("--wandb needs Weights & Biases: pip install wandb")
    world.earlier = world.on_rank0(earlier_inputs, args)
    if world.earlier is None:
        if world.rank == 0:
            print(f"{args.out} holds the finished run: nothing is left to do (--overwrite starts it anew)")
        leave(0)


def earlier_inputs(args):
    """→ the recorded inputs of the run in --out that --resume continues; {} for a new run; None if --resume
    finds a finished one"""
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"got --out {args.out}, which is a file, need a folder")
    read = {name: getattr(args, name, None) for name in ("model", "llm", "clip", "reward_model", "ref_model")}
    for option, folder in read.items():
        if folder and os.path.isdir(folder) and os.path.realpath(folder) == os.path.realpath(args.out):
            raise UserError(f"got --out {args.out}, which is --{option} too: choose another")
    path, steps = os.path.join(args.out, "args.json"), checkpoint_steps(args.out)
    found = os.listdir(args.out) if os.path.isdir(args.out) else []
    if not (os.path.isfile(path) or steps):
        if any(name != ".lock" and not name.endswith(".part") for name in found):
            raise UserError(f"got --out {args.out}, neither empty nor an earlier run: choose another")
    elif not (args.resume or args.overwrite):
        raise UserError(f"got --out {args.out}, which holds a run: give --resume or --overwrite")
    elif args.resume and not steps and "config.json" in found and "export.part" not in found:
        earlier_args(path, args)  # UserError: this is not the run that has finished
        remove_checkpoints(args.out)  # what a kill has left of them
        return None
    lock(os.path.join(args.out, ".lock"))
    return earlier_args(path, args)["inputs"] if args.resume and steps else {}


def earlier_args(path, args):
    """→ the args.json of the run that is continued; UserError if its options are not those of `args`"""
    try:
        with open(path, encoding="utf-8") as f:
            earlier = json.load(f)
        earlier.setdefault("inputs", {})
    except FileNotFoundError:
        print(f"{path} is gone: --resume goes on with the options given now", flush=True)
        return {"inputs": {}}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or remove it, and --resume goes on with "
                        "the options given now") from error
    differ = [f"--{key} {as_given(earlier.get(key))} then, {as_given(value)} now"
              for key, value in vars(args).items()
              if key not in RESUME_MAY_DIFFER and earlier.get(key, value) != value]
    differ += [f"--{key} {as_given(value)} then, which is no option now" for key, value in earlier.items()
               if key not in vars(args) and key not in ABOUT_RUN]
    if differ:
        raise UserError(f"cannot resume {args.out}: got {'; '.join(differ)}; use the old values")
    return earlier


def as_given(value):
    """→ an option's value as written on the command line"""
    return " ".join(value) if isinstance(value, list) else value


def write_args(path, args, world):
    versions = {package.__name__: package.__version__ for package in (torch, transformers, safetensors)}
    about = dict(zip(ABOUT_RUN, (world.size, versions, world.commit, world.inputs)))
    write_json(path, {**vars(args), **about})


def record_templates(world, *checkpoints):
    """Records the text that each checkpoint's chat template rendered, which a resumed run uses again."""
    for checkpoint in checkpoints:
        rendered = [[list(roles), gaps] for roles, gaps in checkpoint.processor.template.rendered.items()]
        world.depends_on(f"what the chat template of --{checkpoint.option} renders", rendered)


def begin_run(args, world, *checkpoints):
    """Removes the run in --out that --overwrite replaces, and writes args.json. checkpoints: those whose
    processors tokenised the data."""
    record_templates(world, *checkpoints)

    def begin():
        folder = os.path.join(args.out, "checkpoints")
        old = [path for pattern in RUN_FILES for path in glob.glob(os.path.join(args.out, pattern))]
        old += [os.path.join(folder, f"step_{step}") for step in checkpoint_steps(args.out)]
        for path in old if not (args.resume and checkpoint_steps(args.out)) else []:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        write_args(os.path.join(args.out, "args.json"), args, world)
        os.makedirs(folder, exist_ok=True)
        given = {key: value for key, value in vars(args).items() if value not in (None, False)}
        print(*(f"--{key} {as_given(value)}" for key, value in given.items()))
    world.on_rank0(begin)


def write_text(path, text):
    """Writes a file completely or not at all: beside its path first, then renamed."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".part", path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


EVAL_DUE = {"eval_due": 1}  # logged if SIGTERM interrupts an evaluation; --resume then repeats it


class Log:
    """Writes log.jsonl, one object per step, and on rank 0 an aligned line at most once a second to a
    terminal, every ten steps or ten seconds to a file; always for the first and last step and for
    evaluations. After a resume log.jsonl holds every step once, and Weights & Biases continues the same run,
    in which repeated steps keep their first values."""

    def __init__(self, args, world, steps, done, shown=("loss", "lr", "grad_norm")):
        self.args, self.steps, self.first, self.start = args, steps, done, time.time()
        self.quiet, self.wandb, self.last, self.printed = world.rank != 0, None, time.time(), 0.0
        self.shown = (*shown, *(f"eval_{name}" for name in shown))
        self.path = os.path.join(args.out, "log.jsonl")
        self.last_line = world.on_rank0(self.reopen, done)
        if args.wandb and not self.quiet:
            import wandb
            path = os.path.join(args.out, "wandb_run")  # holds the id of the run
            if not (done and os.path.isfile(path)):
                write_text(path, secrets.token_hex(4))
            with open(path) as f:
                self.wandb = wandb.init(project=args.wandb, config=vars(args), id=f.read(), resume="allow",
                                        name=os.path.basename(args.out))

    def reopen(self, done):
        """Removes the lines of later steps, and lines that a crash left incomplete. → the object of step
        `done`"""
        lines, damaged = {}, 0
        if os.path.isfile(self.path):
            with open(self.path, errors="replace") as f:
                for text in f:
                    try:
                        line = json.loads(text)
                        assert isinstance(line["step"], int)
                        lines[line["step"]] = line
                    except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
                        damaged += 1
        if damaged:
            print(f"{self.path}: dropped {damaged} damaged lines", flush=True)
        lines = {step: line for step, line in sorted(lines.items()) if step <= done}
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines.values()))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 (open while the run lasts)
        return lines.get(done, {})

    def owes_evaluation(self):
        """Whether SIGTERM interrupted the evaluation of the last step."""
        return "eval_due" in self.last_line

    def add_evaluation(self, metrics):
        """Adds a repeated evaluation to the line of its step."""
        check_finite(self.args, self.first, **metrics)
        if metrics and not self.quiet:
            del self.last_line["eval_due"]
            self.last_line.update({name: float(value) for name, value in metrics.items()})
            self.file.close()
            with open(self.path) as f:
                lines = f.readlines()[:-1]
            write_text(self.path, "".join([*lines, json.dumps(self.last_line) + "\n"]))
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115
            if self.wandb:
                # a continued run drops what is logged to an earlier step; this joins the next one's
                self.wandb.log(metrics, step=self.first + 1)
        self.seconds()

    def seconds(self):
        """→ seconds since the last call. Called after each step and after what follows it, so that evaluating
        and saving do not count as a step's time."""
        elapsed, self.last = time.time() - self.last, time.time()
        return elapsed

    def step(self, step, tokens, seconds, **figures):
        """step counts from 1; tokens of the step over all ranks, and the seconds it took. Tensors and floats
        are written unrounded. On a GPU also rank 0's peak memory since the step before, an evaluation in
        between included. Diverged where a number is not finite."""
        now = time.time()
        figures = {"step": step, **{k: float(v) for k, v in figures.items()}}
        check_finite(self.args, **figures)
        if self.quiet:
            return
        figures["tokens_per_second"] = tokens / seconds
        if torch.cuda.is_available():
            figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        self.file.write(json.dumps(figures) + "\n")
        if self.wandb:
            self.wandb.log(figures, step=step)
        pause = 1 if sys.stdout.isatty() else 0 if step % 10 == 0 else 10
        ends = step in (self.first + 1, self.steps) or any(name.startswith("eval_") for name in figures)
        if now - self.printed < pause and not ends:
            return
        self.printed = now
        left = (now - self.start) / (step - self.first) * (self.steps - step)
        shown = "  ".join(f"{key} {value:<9.4g}" for key, value in figures.items() if key in self.shown)
        left = f"{int(left) // 60:>3}:{int(left) % 60:02} left"
        print(f"{step:>6}/{self.steps}  {shown}  {tokens / seconds:7.0f} tokens/s  {left}", flush=True)

    def progress(self, items, step, what):
        """The items, with their progress in the run's first step: no line says how long a step takes."""
        return data.progress(items, f"step {step}: {what}") if step == self.first + 1 else items

    def say(self, text):
        if not self.quiet:
            print(text, flush=True)

    def show(self, step, answers):
        """Prints answers, and logs them to Weights & Biases as the step's table. answers: {"id", "answer" and
        what is known of it: "label", "score", …} per answer."""
        for answer in answers:
            known = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value!r}"
                              for name, value in answer.items() if name not in ("id", "answer"))
            self.say(f"    {data.shown(answer['id'])}: {answer['answer']!r}  ({known})")
        if self.wandb:
            table = sys.modules["wandb"].Table([*answers[0]], [[*answer.values()] for answer in answers])
            self.wandb.log({"answers": table}, step=step)


# ---- checkpoints ----

def checkpoint_steps(out):
    """→ the steps of the complete checkpoints in out/checkpoints, in ascending order. Other names are
    ignored."""
    folder = os.path.join(out, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_(0|[1-9]\d*)", name)
                  and os.path.isdir(os.path.join(folder, name)))


def checkpoint_state(model, optimizers):
    """→ {stable name: trained parameter, buffer or AdamW state}. Before the first step AdamW's state is
    created, so that a checkpoint can be loaded into it."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers()}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if not optimizer.state[p]:
                moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            for key, value in optimizer.state[p].items():
                tensors[f"optimizer.{names[p]}.{key}"] = value
    return tensors


def save_checkpoint(args, world, step, model, *optimizers):
    """Writes checkpoints/step_N under another name and renames it when it is complete. Keeps the last two."""
    folder = os.path.join(args.out, "checkpoints", f"step_{step}")
    world.on_rank0(shutil.rmtree, folder + ".part", True)
    finite = all(local_tensor(p).isfinite().all() for p in model.parameters() if p.requires_grad)
    if world.sum(not finite)[0]:
        raise Diverged(f"step {step}: a weight is not finite: nothing was saved or exported; start again "
                       "with a lower learning rate")
    dcp.save(checkpoint_state(model, optimizers), checkpoint_id=folder + ".part")

    def rename():
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(folder + ".part", folder)
        for old in checkpoint_steps(args.out)[:-2]:
            shutil.rmtree(os.path.join(args.out, "checkpoints", f"step_{old}"))
    world.on_rank0(rename)


def remove_checkpoints(out):
    """Frees the space of a finished run's checkpoints, of which AdamW's state is the largest part, and of
    those that a kill left incomplete. Each is renamed first: no incomplete one ever has a full one's name."""
    folder, size = os.path.join(out, "checkpoints"), 0
    for step in checkpoint_steps(out):
        path = os.path.join(folder, f"step_{step}")
        os.rename(path, path + ".part")
    for path in glob.glob(os.path.join(folder, "step_*.part")):
        size += sum(os.path.getsize(file) for file in glob.glob(os.path.join(path, "*")))
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # it may hold what others put there, or a file that is still open
        os.rmdir(folder)
    if size:
        print(f"the run is finished: removed its checkpoints ({size / 1e9:.3g} GB)", flush=True)


def sync_files(folder):
    """Waits until all files in a folder are on the disk: a full one is noticed here at the latest."""
    for path in filter(os.path.isfile, glob.glob(os.path.join(folder, "**"), recursive=True)):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load_checkpoint(args, world, model, *optimizers):
    """With --resume, loads the last checkpoint if there is one. → the number of completed steps"""
    steps = world.on_rank0(checkpoint_steps, args.out) if args.resume else []
    if not steps:
        return 0
    folder = os.path.join(args.out, "checkpoints", f"step_{steps[-1]}")
    try:
        world.on_rank0(check_metadata, folder)
        dcp.load(checkpoint_state(model, optimizers), checkpoint_id=folder)
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        damage = error  # of the metadata
    except dcp.CheckpointException as error:  # of the data, unless it is about something else
        damage, _ = next(iter(error.failures.values()))
        if not isinstance(damage, EOFError | pickle.UnpicklingError | ValueError | zipfile.BadZipFile) and (
                "PytorchStreamReader" not in str(damage)):
            raise
    else:
        return steps[-1]
    why = f"{type(damage).__name__}: {str(damage).partition(chr(10))[0][:200]}"
    before = f"goes on from step {steps[-2]}" if steps[1:] else "starts afresh"
    raise UserError(f"{folder} is damaged ({why}): remove it, and --resume {before}") from damage


METADATA_CLASSES = {  # all that DCP's metadata, a pickle, needs for tensors
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(dtype)[6:] for dtype in vars(torch).values() if isinstance(dtype, torch.dtype))},
    "pathlib": {"PosixPath"}, "pathlib._local": {"PosixPath"}}


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint has")
        return super().find_class(module, name)


def check_metadata(folder):
    """Raises if unpickling a checkpoint's metadata would run code, or if a file is shorter than the metadata
    says. dcp.load itself unpickles anything."""
    with open(os.path.join(folder, ".metadata"), "rb") as f:
        metadata = MetadataUnpickler(f).load()
    for info in metadata.storage_data.values():
        file = os.path.join(folder, info.relative_path)
        if os.path.dirname(file) != folder or os.path.getsize(file) < info.offset + info.length:
            raise ValueError(f"{file} is cut short")


def export(model, processor, args, world, file_bytes=5 * 10**9):
    """Writes --out as a Hugging Face checkpoint: tensors are gathered one by one, adapters merged, and
    files of at most file_bytes moved to their place when all are complete. Then it removes the run's
    checkpoints."""
    reshard(model)
    dtype, config = DTYPES[args.dtype], model.config
    part = os.path.join(args.out, "export.part")
    world.on_rank0(shutil.rmtree, part, True)
    world.on_rank0(os.makedirs, part)
    adapted = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoRA)}
    parameters = [(name, parameter) for name, parameter in model.named_parameters()
                  if ".lora_" not in name and not name.startswith("score.")]
    files, size = [[]], 0  # which tensors go into which file
    for name, parameter in parameters:
        bytes_ = parameter.numel() * dtype.itemsize
        if files[-1] and size + bytes_ > file_bytes:
            files.append([])
            size = 0
        files[-1].append((name, parameter))
        size += bytes_
    total = sum(parameter.numel() for _, parameter in parameters) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, group in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        held = {}
        for name, parameter in data.progress(group, f"{file}: tensors written"):
            whole = full_tensor(parameter.detach())  # collective: every rank takes part
            if name in adapted:
                lora = adapted[name]
                A, B = (full_tensor(adapter.weight.detach()) for adapter in (lora.lora_A, lora.lora_B))
                whole = whole.float() + lora.alpha / lora.rank * B @ A
            if world.rank == 0:
                name = name.replace("multi_modal_projector.image_newline", "image_newline")  # the hub's
                held[name] = whole.to(dtype).cpu().contiguous()
                if not held[name].isfinite().all():
                    raise Diverged(f"{name} is not finite: nothing was exported")
        index["weight_map"].update(dict.fromkeys(held, file))
        world.on_rank0(save_tensors, held, os.path.join(part, file))
    if hasattr(model, "score"):
        head = {name: full_tensor(p.detach()).cpu() for name, p in model.score.named_parameters()}
        world.on_rank0(save_tensors, head, os.path.join(part, SCORE))
    if adapted and args.model and not any(parameter.requires_grad for _, parameter in parameters):
        save_adapter(model, args, world, os.path.join(part, "adapter"))  # with --model it is the export

    def place():
        data.save_processor(processor, config, part)
        kind = "LlavaNext" if config.model_type == "llava_next" else "Llava"
        config.architectures, config.dtype = [f"{kind}ForConditionalGeneration"], dtype
        config.save_pretrained(part)
        if len(files) > 1:
            write_json(os.path.join(part, "model.safetensors.index.json"), index)
        sync_files(part)
        for folder in ("adapter", "additional_chat_templates"):
            shutil.rmtree(os.path.join(args.out, folder), ignore_errors=True)
        for path in glob.glob(os.path.join(args.out, "model*.safetensors*")):
            os.remove(path)
        for name in os.listdir(part):
            os.replace(os.path.join(part, name), os.path.join(args.out, name))
        os.rmdir(part)
    world.on_rank0(place)
    world.on_rank0(remove_checkpoints, args.out)


def save_tensors(tensors, path):
    """Writes a safetensors file with the umask's mode (safetensors would make it private)."""
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    os.chmod(path, os.stat(os.path.dirname(path)).st_mode & 0o666)


def save_adapter(model, args, world, folder):
    """Writes the adapters as peft.PeftModel.from_pretrained reads them on top of transformers' LLaVA."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            name = name.replace("language_model.model.", "base_model.model.model.language_model.", 1)
            tensors[name] = full_tensor(parameter.detach()).cpu()
    base, _, revision = (args.model, "", "") if os.path.isdir(args.model) else args.model.partition("@")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
             "base_model_name_or_path": base, "revision": revision or None, "r": args.lora_rank,
             "lora_alpha": args.lora_alpha,
             "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"}

    def write():
        write_json(os.path.join(folder, "adapter_config.json"), about)
        save_tensors(tensors, os.path.join(folder, "adapter_model.safetensors"))
    world.on_rank0(write)
