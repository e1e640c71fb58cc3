"""A tiny LLaVA with random weights, images and records for it, ways to run the scripts, to end them early and
to compare results. `peer` is transformers' model with the same weights."""
import argparse
import base64
import contextlib
import dataclasses
import functools
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
       "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
os.environ.update(ENV)  # of every process that a test starts

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

PATCHES = 4  # of an image of 16 × 16 in patches of 8 × 8
GRIDS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]  # LLaVA-1.6's, for tiles of 16 × 16
CORPUS = [
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. USER: ASSISTANT: ",
    "Describe the image. What is in the picture? a red circle, a blue square and a green star. yes no"]


# ---- a checkpoint ----

def make_tokenizer(folder, specials=True):
    """LLaMA's kind; "▁" is a space, unknown letters become bytes. specials: with <pad> and <image>."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=121, show_progress=False))
    learned = json.loads(learned.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {word: i for i, word in enumerate(words)}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    more = {"pad_token": "<pad>", "additional_special_tokens": ["<image>"]} if specials else {}
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, **more)
    fast.save_pretrained(folder)
    return fast


def clip_config(**changes):
    settings = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8, "projection_dim": 20}
    return hf.CLIPVisionConfig(**{**settings, **changes})


def llama_config(tokenizer, **changes):
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
                "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    return hf.LlamaConfig(**{**settings, **changes})


def llava_config(tokenizer, tiles=False, **changes):
    """tiles: a LLaVA-NeXT"""
    text = llama_config(tokenizer, **changes)
    kind = functools.partial(hf.LlavaNextConfig, image_grid_pinpoints=GRIDS) if tiles else hf.LlavaConfig
    return kind(
        vision_config=clip_config(), text_config=text, tie_word_embeddings=text.tie_word_embeddings,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=PATCHES,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu")


@torch.no_grad()
def randomise(model, seed=0):
    """Norms near 1, biases off 0, everything else of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        scale = 0.1 if p.ndim < 2 else 0.7 if "embed" in name else p[0].numel() ** -0.5
        p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1 and name.endswith("weight")))
    return model.eval()


def make_peer(tokenizer, seed=0, **changes):
    return randomise(hf.AutoModelForImageTextToText.from_config(llava_config(tokenizer, **changes)), seed)


# what a tensor is called: transformers' name in memory → that in a file
HUB = {"model.vision_tower.": "vision_tower.vision_model.", "lm_head.": "language_model.lm_head.",
       "model.multi_modal_projector.": "multi_modal_projector.", "model.image_newline": "image_newline",
       "model.language_model.": "language_model.model."}
NEW = {**HUB, "model.vision_tower.": "vision_tower."}  # as transformers 5 saves
MEMORY = {key: key for key in HUB}
ORIGINAL = {"model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
            "model.language_model.": "model.", "lm_head.": "lm_head.",
            "model.image_newline": "model.image_newline"}


def named(model, spelling):
    """A transformers model's tensors under the names of a spelling; a tied head is left out, as files do."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in spelling if name.startswith(prefix)), None)
        if prefix and name not in tied:
            tensors[spelling[prefix] + name[len(prefix):]] = tensor.clone()
    return tensors


def write(folder, tensors, files=1):
    """Tensors as model.safetensors, or as several files with their index."""
    if files == 1:
        return save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    names, where = list(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::files]}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(names[i::files], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_processor(folder, size=16, tiles=False):
    """Image settings and chat template."""
    kind = functools.partial(hf.LlavaNextImageProcessorPil, image_grid_pinpoints=GRIDS)
    kind, crop_size = kind if tiles else CLIPImageProcessorPil, {"height": size, "width": size}
    kind(size={"shortest_edge": size}, crop_size=crop_size).save_pretrained(folder)
    shutil.copy(ROOT / "templates" / "vicuna.jinja", folder / "chat_template.jinja")


def shown(batch, config):
    """The pixels that a LLaVA-1.5 sees, as transformers takes them: one image per placeholder."""
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    tokens += config.vision_feature_select_strategy == "full"
    return batch.pixels[batch.image_feature[::tokens] // tokens]


def make_model(folder, spelling=HUB, files=1, seed=0, **changes):
    """A LLaVA checkpoint folder. → transformers' model with the same weights"""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    peer = make_peer(tokenizer, seed, **changes)
    peer.config.save_pretrained(folder)
    write(folder, named(peer, spelling), files)
    write_processor(folder, tiles=changes.get("tiles", False))
    return peer


# ---- rows ----

SIZES = [(16, 16), (40, 24), (20, 33), (64, 64), (17, 50), (31, 16)]


def make_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(SIZES):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"p{i}.png")


def row(i, image, *turns):
    """turns: human, gpt, human, gpt, …"""
    roles = ("human", "gpt") * len(turns)
    said = [{"from": role, "value": value} for role, value in zip(roles, turns)]
    return {"id": f"row {i}", **({"image": image} if image else {}), "conversations": said}


MIXED = [  # pictures, text alone, two pictures, several turns; of unequal lengths
    row(0, "p0.png", "<image>\nDescribe the image.", "a red circle"),
    row(1, None, "yes or no?", "no"),
    row(2, ["p1.png", "p2.png"], "<image>\n<image>\nWhat is it?", "a blue square and a green star."),
    row(3, "p3.png", "What is this?\n<image>", "a star", "and the other?", "a red square, a blue square."),
    row(4, None, "What is a polite answer? " * 4, "yes. " * 12),
    row(5, "p4.png", "Describe the picture.", "a green circle and a red star, a curious picture"),
    row(6, "p5.png", "What is in the image?", "no"),
    row(7, None, "no?", "yes", "yes?", "no", "and the human?", "a human gives answers."),
    row(8, "p0.png", "Describe it in detail.", "a blue circle " * 6),
    row(9, "p1.png", "a star?", "yes, a star"),
]

RANKED = [  # answers best first: two, three and five of them, of unequal lengths; a picture twice
    row(0, "p0.png", "<image>\nDescribe the image.", ["a red circle", "a blue square and a green star. yes"]),
    row(1, None, "yes or no?", ["no", "yes, yes", "a human"]),
    row(2, ["p1.png", "p2.png"], "<image>\n<image>\nWhat is it?", ["a blue square and a green star.", "no"]),
    row(3, "p3.png", "What is this?\n<image>", "a star", "and the other?",
        ["a red square", "a star, a star, a star", "no", "yes. yes", "a picture in the image"]),
    row(4, None, "What is a polite answer? " * 4, ["yes. " * 12, "no. " * 3]),
    row(5, "p4.png", "Describe the picture.", ["a green circle and a red star", "a curious picture"]),
    row(6, "p0.png", "What is in the image?", ["a red circle", "detailed, helpful and polite"]),
]

MARGINS = [*RANKED,  # and a margin, four answers, three after an earlier turn
           {**row(7, "p5.png", "What is it?", ["a green star", "a picture, a star"]), "margin": 0.75},
           row(8, "p0.png", "Describe it in detail.", ["a red circle " * 3, "no", "star", "yes, an image"]),
           row(9, None, "no?", "yes", "yes?", ["a human gives answers.", "no", "yes, yes"])]
ONE_TURN = [{**one, "conversations": one["conversations"][:2]} for one in MIXED]


def best(rows, n):
    """The same rows with the best n of their answers; one stands by itself, not in a list."""
    rows = json.loads(json.dumps(rows))
    for turn in (row["conversations"][-1] for row in rows):
        turn["value"] = turn["value"][:n] if n > 1 else turn["value"][0]
    return rows


PAIRS = best(RANKED, 2)

REWARDS = """
def red(row, texts):
    assert row["conversations"][0]["from"] == "human"
    return [text.split().count("red") for text in texts]

def nought(row, texts):
    return [0.0] * len(texts)

def short(row, texts):
    return [1.0] * (len(texts) - 1)

def not_a_number(row, texts):
    return [float("nan")] * len(texts)

number = 3
"""


def write_rows(path, rows):
    path.write_text(json.dumps(rows))
    return path


def log(out):
    """log.jsonl's objects, without what the clock says."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "seconds/")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def swap_tokens(folder, a="<0x00>", b="<0x01>"):
    """Exchanges the ids of two tokens of the tokenizer in a folder: it is another one then."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def make_reward_model(folder, policy, seed=1, tower=True):
    """Another LLaVA with a scalar head. tower: behind the policy's vision tower."""
    make_model(folder, seed=seed)
    shutil.copy(policy / "processor_config.json", folder)
    tensors = load_file(folder / "model.safetensors")
    if tower:
        policy = load_file(policy / "model.safetensors")
        tensors |= {name: tensor for name, tensor in policy.items() if name.startswith("vision_tower.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) / 5
    save_file({"weight": weight, "bias": torch.tensor([0.3])}, folder / "score.safetensors")


# ---- comparing ----

def options(**changes):
    """What a script makes of a command line with nothing on it, and changes."""
    parser = argparse.ArgumentParser()
    importlib.import_module("fsdp").arguments(parser)
    args = parser.parse_args([])
    vars(args).update({"template": "vicuna", "images": "", **changes})
    return args


def command_line(script, argv):
    return mock.patch.object(sys, "argv", [f"{script}.py", *map(str, argv)])


def arguments(script, *argv):
    """What a script makes of a command line."""
    with command_line(script, argv):
        return importlib.import_module(script).parse_args()


def state(model):
    """A model's full parameters now."""
    importlib.import_module("fsdp").reshard(model)
    full = importlib.import_module("fsdp").full_tensor
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def reload(folder, dtype=torch.float32):
    """transformers' model from an exported folder; nothing missing, nothing left over."""
    load = hf.AutoModelForImageTextToText.from_pretrained
    peer, info = load(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return peer.eval()


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    """Relative norms, per tensor; relative to the largest where a gradient is rounding alone (key biases)."""
    assert ours.keys() == theirs.keys() and ours
    floor = 1e-3 * max(tensor.norm() for tensor in theirs.values())
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= tolerance * max(tensor.norm(), floor), name


def assert_same_log(ours, theirs, tolerance=1e-5):
    """Losses, gradient norms and rates to `tolerance`; other metrics may be small differences: to 1e-4."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key, value in b.items():
            exact = key in ("loss", "grad_norm", "lr", "step")
            limit = tolerance * abs(value) if exact else 1e-4 * max(1, abs(value))
            assert abs(a[key] - value) <= limit, (key, a, b)


def assert_same_run(out, expected):
    """The log, every exported file and the last checkpoints' tensors are the same, bit for bit."""
    def content(folder):
        files = [path for path in folder.rglob("*") if path.is_file()
                 and path.name not in ("args.json", "log.jsonl", ".metadata", ".lock")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert log(out) == log(expected)
    ours, theirs = content(out), content(expected)
    assert ours.keys() == theirs.keys() and any(name.endswith(".safetensors") for name in theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []


# ---- running a script ----

@dataclasses.dataclass
class Run:
    code: int
    out: str
    err: str

    @property
    def error(self):
        """The message that the user is left with."""
        _, *errors = re.split(r"^(?:\w+\.py: )?error: ", self.err.strip(), flags=re.MULTILINE)
        return errors[-1] if errors else ""


def command(script, *argv, ranks=1):
    """A script as a user runs it, from another folder: `python script.py argv…`, or torchrun."""
    with Job(script, *argv, ranks=ranks) as job:
        return job.end(240)


def fork(script, *argv, ranks=1, prepare=None):
    """The same, forked from a process that has imported everything: two seconds, not ten. prepare() is called
    in every rank first. → rank 0's Run"""
    return spread(functools.partial(main, script, argv, prepare), ranks)


def main(script, argv, prepare=None):
    """What `python script.py argv…` does, in this process. A finished run keeps its checkpoints, which tests
    compare."""
    sys.argv, fsdp = [f"{script}.py", *map(str, argv)], importlib.import_module("fsdp")
    fsdp.remove_checkpoints = mock.Mock(original=fsdp.remove_checkpoints, return_value=None)
    if prepare:
        prepare()
    fsdp.run(importlib.import_module(script).main)


def inside(script, *argv):
    """A script's main in this process and its process group, if it has one; checkpoints are kept. → the
    models that it built"""
    fsdp, models = importlib.import_module("fsdp"), []
    build, dist = fsdp.build, torch.distributed

    def recording_build(*args, **kwargs):
        models.append(build(*args, **kwargs))
        return models[-1]
    start = mock.Mock() if dist.is_initialized() else dist.init_process_group
    with (mock.patch.object(fsdp, "build", recording_build), command_line(script, argv),
          mock.patch.object(fsdp, "remove_checkpoints", lambda out: None),
          mock.patch.object(dist, "init_process_group", start), contextlib.ExitStack() as stack):
        stack.callback(unwatch)
        importlib.import_module(script).main()
    return models


def unwatch():
    """Gives signals and locks back that a run in this process took."""
    fsdp = importlib.import_module("fsdp")
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fsdp.unlock()
    for _, file, _ in fsdp.LOCKS:
        file.close()
    fsdp.LOCKS.clear()


def spread(function, ranks, timeout=200):
    """function() in `ranks` processes, as under torchrun. → rank 0's Run, with a failed rank's exit code"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft", "predict", "tiny"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as logs:
        processes = [context.Process(target=rank_main, args=(function, rank, ranks, port, logs))
                     for rank in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.time() + timeout
        while alive := [process for process in processes if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)
            if time.time() > deadline or any(process.exitcode for process in processes):
                for process in processes:
                    process.join(5 if time.time() < deadline else 0)
                    process.kill()
        text = {name: (Path(logs) / name).read_text() for name in os.listdir(logs)}
    assert time.time() < deadline, f"still running after {timeout} s\n{text}"
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return Run(code, text["out0"], "".join(text[f"err{rank}"] for rank in reversed(range(ranks))))


def rank_main(function, rank, ranks, port, logs):
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{logs}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    function()


# ---- how a run ends early: for the argument `prepare` of fork() and Job ----

def remove_checkpoints(then=None):
    """A finished run removes its checkpoints after all, as a user's does."""
    fsdp = importlib.import_module("fsdp")
    fsdp.remove_checkpoints = fsdp.remove_checkpoints.original
    if then:
        then()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(*_):
    """As a scheduler does. The signal is heard by a thread: a moment for it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def pause(*_):
    time.sleep(1.5)


def fail(*_):
    raise ValueError("a bug")


def poison(gradients, *_):
    """One number of a gradient, on this rank alone, becomes NaN."""
    gradients[0].view(-1)[:1] = torch.nan


def fill_disk(folder, *_):
    """Leaves no room on a file system, until the file `ballast` is removed."""
    with contextlib.suppress(OSError), open(Path(folder) / "ballast", "wb", buffering=0) as f:
        while f.write(bytes(4096)):
            pass


def at_path(event, pattern, act=die):
    """Calls act() before the first audit event (open, os.rename, os.mkdir, …) with a path that matches."""
    waiting = True

    def hook(name, arguments):
        nonlocal waiting
        if waiting and name == event and any(
                isinstance(a, str | os.PathLike) and re.search(pattern, os.fspath(a)) for a in arguments):
            waiting = False
            act()
    sys.addaudithook(hook)


def at_call(name, number, act=die, rank=0):
    """Calls act(*arguments) on one rank before the number-th call of "module.function"."""
    owner, name = pkgutil.resolve_name(name.rpartition(".")[0]), name.rpartition(".")[2]
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(number)
        if len(calls) == number and os.environ.get("RANK", "0") == str(rank):
            act(*args)
        return function(*args, **kwargs)
    setattr(owner, name, counted)


class Job:
    """A script as a user starts it, `python` or torchrun, that signals reach while it runs. prepare: as of
    fork(), from a module of tests/. The end of the block asserts that no process is left."""

    def __init__(self, script, *argv, ranks=1, prepare=None, cwd=None):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        file = [ROOT / "tests" / "tiny.py", script] if prepare else [ROOT / f"{script}.py"]
        self.ranks, self.marker = ranks, f"{os.getpid()}-{time.monotonic_ns()}"
        env = {"TINY_JOB": self.marker, "TINY_PREPARE": base64.b64encode(pickle.dumps(prepare)).decode()}
        self.folder = tempfile.TemporaryDirectory()
        streams = {name: open(Path(self.folder.name) / name, "w") for name in ("stdout", "stderr")}
        command = [sys.executable, *(torchrun if ranks > 1 else []), *file, *map(str, argv)]
        self.launcher = subprocess.Popen(command, env=os.environ | env, cwd=cwd or self.folder.name,
                                         start_new_session=True, **streams)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        self.folder.cleanup()
        assert not left, f"still there: {left}"

    def out(self, stream="stdout"):
        return (Path(self.folder.name) / stream).read_text()

    def processes(self):
        """The job's processes that still run → {pid: its rank, None for torchrun's own and for helpers}."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                environment = dict(item.partition("=")[::2]
                                   for item in (folder / "environ").read_text(errors="replace").split("\0"))
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if environment.get("TINY_JOB") == self.marker and state not in "ZX":
                    own = int(folder.name) == self.launcher.pid if self.ranks == 1 else (
                        int(parent) == self.launcher.pid and "RANK" in environment)
                    found[int(folder.name)] = int(environment.get("RANK", 0)) if own else None
        return found

    def wait(self, condition, timeout=120):
        """Until condition(); fails if the job ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.launcher.poll() is None, (self.launcher.poll(), self.out(), self.out("stderr"))
            assert time.monotonic() < deadline, (timeout, self.out(), self.out("stderr"))
            time.sleep(0.02)

    def signal(self, number, to="launcher"):
        """to: "launcher", "all" (every process, as a scheduler does), or a rank."""
        pids = [self.launcher.pid] if to == "launcher" else [
            pid for pid, rank in self.processes().items() if to in ("all", rank)]
        for pid in pids:
            os.kill(pid, number)

    def end(self, timeout):
        """Waits for the end, at most `timeout` seconds."""
        code, ended = self.launcher.wait(timeout), time.monotonic()
        while self.processes() and time.monotonic() < ended + 2:
            time.sleep(0.05)  # torchrun's children may outlive it by a moment
        return Run(code, self.out(), self.out("stderr"))


if __name__ == "__main__":  # a Job with `prepare`
    main(sys.argv[1], sys.argv[2:], pickle.loads(base64.b64decode(os.environ["TINY_PREPARE"])))
