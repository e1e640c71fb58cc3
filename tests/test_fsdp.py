"""fsdp.py: checkpoints in and out against transformers, gradients, memory.

`peer` is transformers' model with the same weights. Everything is fp32 on the CPU, over gloo, unless a
test says otherwise.
"""
import contextlib
import errno
import functools
import hashlib
import http.server
import json
import math
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file
from tiny import HUB, MEMORY, MIXED, NEW, ORIGINAL, named, options, reload, write

import data
import fsdp


def batch_of(processor, images):
    """A picture, two pictures and text alone, padded to the longest."""
    rows = [MIXED[0], MIXED[2], MIXED[1]]
    conversations = [(i, data.read_record(row, str(images))) for i, row in enumerate(rows)]
    return data.collate(data.build_examples(conversations, processor, "turns")[0], processor)


@torch.no_grad()
def our_logits(model, batch):
    everywhere = torch.arange(batch.ids.numel())
    logits = model.hidden(batch, model.vision_tower(batch.pixels), everywhere, F.linear)
    fsdp.reshard(model)
    return logits[batch.branch.flatten() >= 0].float()


@torch.no_grad()
def their_logits(peer, batch):
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(),
                  pixel_values=batch.pixels[batch.image].to(peer.dtype)).logits
    return logits[batch.branch >= 0].float()


def load(args, world, trainable=()):
    checkpoint = fsdp.open_checkpoint(args, world)
    return fsdp.build(checkpoint, args, world, trainable), checkpoint.processor


def round_trip(args, world, images, out, **changes):
    """Load → export → transformers. → our model, transformers', a batch"""
    model, processor = load(args, world)
    args.out = str(out)
    out.mkdir()
    fsdp.export(model, processor, args, world, **changes)
    return model, reload(out), batch_of(processor, images)


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).norm() / theirs.norm() <= tolerance


# ---- checkpoints in and out ----

LAYOUTS = {
    "hub": {}, "new": {"spelling": NEW}, "memory": {"spelling": MEMORY}, "sharded": {"files": 3},
    "tied": {"tie_word_embeddings": True}, "tied, memory": {"tie_word_embeddings": True, "spelling": MEMORY},
    "biased": {"attention_bias": True},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_llava_is_read_and_written_as_transformers_does(layout, place, world, tmp_path):
    """Every spelling and layout: our logits and those of the exported folder are the peer's."""
    peer = tiny.make_model(tmp_path / "model", **LAYOUTS[layout])
    args = options(model=str(tmp_path / "model"))
    model, exported, batch = round_trip(args, world, place / "images", tmp_path / "out")
    assert_close(our_logits(model, batch), their_logits(peer, batch))
    assert torch.equal(their_logits(exported, batch), their_logits(peer, batch))
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == named(peer, HUB).keys()


def original(folder, tokenizer, kind, peer=None):
    """An original LLaVA (config of its LLaMA with mm_*, weights in a .bin or safetensors) and its CLIP."""
    clip, llava = folder / "clip", folder / "llava"
    clip.mkdir()
    llava.mkdir()
    tiny.make_tokenizer(llava, specials=False)
    peer = peer or tiny.make_peer(tokenizer)
    config = {**peer.config.text_config.to_dict(), "vocab_size": len(tokenizer) - 2, "model_type": "llava",
              "mm_vision_tower": str(clip), "mm_hidden_size": 24, "mm_projector_type": "mlp2x_gelu",
              "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    (llava / "config.json").write_text(json.dumps(config))
    write_clip(clip, peer)
    tensors = named(peer, ORIGINAL)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:len(tokenizer) - 2].clone()
    if kind == "safetensors":
        write(llava, tensors)
    elif kind == "two .bin":
        names = list(tensors)
        for i in range(2):
            some = {name: tensors[name] for name in names[i::2]}
            torch.save(some, llava / f"pytorch_model-0000{i + 1}-of-00002.bin")
    else:
        torch.save(tensors, llava / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "old .bin")
    return peer, llava


def write_clip(folder, peer, whole=False):
    """The peer's tower as a CLIPVisionModel, or as the vision side of a whole CLIPModel."""
    if whole:
        text = hf.CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=30,
                                 num_attention_heads=2, projection_dim=20, max_position_embeddings=8)
        config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=tiny.clip_config().to_dict(),
                               projection_dim=20)
        clip = tiny.randomise(hf.CLIPModel(config), 9)
        clip.config.save_pretrained(folder)
        tensors = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
        assert any("text_model." in name for name in tensors) and "logit_scale" in tensors
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # as older files have it
    else:
        tiny.clip_config().save_pretrained(folder)
        tensors = {}
    tensors.update(named(peer, {"model.vision_tower.": "vision_model."}))
    write(folder, tensors)


@pytest.mark.parametrize("kind", ["safetensors", ".bin", "two .bin"])
def test_an_original_llava_is_read(kind, place, world, tmp_path):
    """mm_projector names, tower by mm_vision_tower, a vocabulary without <image>: the peer's logits."""
    tokenizer = tiny.make_tokenizer(tmp_path)
    peer, folder = original(tmp_path, tokenizer, kind)
    args = options(model=str(folder))
    model, exported, batch = round_trip(args, world, place / "images", tmp_path / "out")
    words = len(tokenizer) - 2
    assert_close(our_logits(model, batch)[:, :words], their_logits(peer, batch)[:, :words])
    assert_close(our_logits(model, batch), their_logits(exported, batch))
    preprocessor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert preprocessor["do_pad"]  # its image_aspect_ratio


BAD_BIN = {  # what pytorch_model.bin is, and what is said
    "the old format": (lambda path: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False),
                       "from before PyTorch 1.6"),
    "cut short": (lambda path: os.truncate(path, 10_000), "cut short"),
    "nested": (lambda path: torch.save({"state_dict": torch.load(path)}, path), "under 'state_dict'"),
    "mixed": (lambda path: torch.save({**torch.load(path), "step": 3}, path), "a tensor under 'step'"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "need a dict of tensors")}


@pytest.mark.parametrize("bad", BAD_BIN)
def test_a_bin_file_that_cannot_be_mapped_is_refused(bad, world, tmp_path):
    """In one line that names the file. The command in it converts the old format to one that is read."""
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), ".bin")
    spoil, said = BAD_BIN[bad]
    spoil(folder / "pytorch_model.bin")
    with pytest.raises(fsdp.UserError, match=said) as error:
        load(options(model=str(folder)), world)
    assert f"{folder}/pytorch_model.bin: " in str(error.value)
    if bad == "the old format":
        command = re.search("or convert it: python (.*) \\(", str(error.value))[1]
        subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
        load(options(model=str(folder)), world)


@pytest.mark.parametrize("part, name, value", [
    ("text_config", "num_hidden_layers", 10**6), ("text_config", "num_hidden_layers", 1),
    ("text_config", "vocab_size", 10**9), ("vision_config", "num_hidden_layers", 10**6),
    ("vision_config", "image_size", 10**6)])
def test_sizes_that_the_weights_do_not_have_are_refused(part, name, value, place, world, tmp_path):
    """Before a model, a list of layers or a set of ids of that size is created."""
    tiny.shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config[part][name] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    start = time.time()
    with pytest.raises(fsdp.UserError, match="need the config.json of these weights"):
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)
    assert time.time() - start < 10


def test_a_tower_in_an_original_llava_is_the_one_used(world, tmp_path):
    """A tuned tower among an original LLaVA's weights comes before the CLIP that it was tuned from."""
    peer, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    tensors = load_file(folder / "model.safetensors")
    tower = named(peer, {"model.vision_tower.": "model.vision_tower.vision_tower.vision_model."})
    tower = {name: tensor + 1 for name, tensor in tower.items()}
    write(folder, {**tensors, **tower})
    model, _ = load(options(model=str(folder)), world)
    name = "vision_model.pre_layrnorm.weight"
    ours = fsdp.full_tensor(dict(model.vision_tower.named_parameters())[name])
    assert torch.equal(ours, tower[f"model.vision_tower.vision_tower.{name}"])


@pytest.mark.parametrize("whole_clip", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_and_a_clip_get_a_fresh_projector(whole_clip, tied, place, world, tmp_path):
    """Every tensor of both arrives, the vocabulary grows by mean rows, the projector is keyed by the seed;
    the export loads in transformers, in our loader and in AutoProcessor."""
    llm, clip = tmp_path / "llm", tmp_path / "clip"
    tokenizer = tiny.make_tokenizer(llm, specials=False)
    text = tiny.randomise(hf.LlamaForCausalLM(tiny.llama_config(tokenizer, tie_word_embeddings=tied)))
    text.save_pretrained(llm)
    peer = tiny.make_peer(tiny.make_tokenizer(tmp_path))
    clip.mkdir()
    write_clip(clip, peer, whole_clip)
    args = options(llm=str(llm), clip=str(clip))
    model, exported, batch = round_trip(args, world, place / "images", tmp_path / "out")
    assert_close(our_logits(model, batch), their_logits(exported, batch))

    state, old, new = exported.state_dict(), len(tokenizer), -(-(len(tokenizer) + 2) // 64) * 64
    for name, tensor in text.state_dict().items():
        ours = state[name.replace("model.", "model.language_model.", 1)]
        if "embed_tokens" in name or "lm_head" in name:
            assert ours.shape[0] == new > old
            assert torch.allclose(ours[old:], tensor.mean(0).expand(new - old, -1), atol=1e-6)
            ours = ours[:old]
        assert torch.equal(ours, tensor), name
    for name, tensor in named(peer, {"model.vision_tower.": "model.vision_tower."}).items():
        assert torch.equal(state[name], tensor), name
    drawn = state["model.multi_modal_projector.linear_1.weight"]
    assert 0.015 < drawn.std() < 0.025 and not state["model.multi_modal_projector.linear_1.bias"].any()
    other, _ = load(options(llm=str(llm), clip=str(clip), seed=1), world)
    assert not torch.equal(fsdp.full_tensor(other.multi_modal_projector.linear_1.weight), drawn)

    again, processor = load(options(model=str(tmp_path / "out"), template="auto"), world)
    assert torch.equal(our_logits(again, batch), our_logits(model, batch))
    assert not processor.banned.isdisjoint(range(old, new))
    theirs = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    assert theirs.tokenizer.convert_tokens_to_ids("<image>") == processor.image_token


def test_an_export_in_several_files_has_an_index(place, world, tmp_path):
    """file_bytes small: no file is larger, the index names every tensor, and both loaders follow it."""
    peer = tiny.make_model(tmp_path / "model")
    args = options(model=str(tmp_path / "model"))
    model, exported, batch = round_trip(args, world, place / "images", tmp_path / "out", file_bytes=60_000)
    assert torch.equal(their_logits(exported, batch), their_logits(peer, batch))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and not (tmp_path / "out" / "model.safetensors").exists()
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 60_000
        assert file.name.endswith(f"of-{len(files):05}.safetensors")
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file.name}
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    again, _ = load(options(model=str(tmp_path / "out")), world)
    assert torch.equal(our_logits(again, batch), our_logits(model, batch))
    args = options(model=str(tmp_path / "out"), out=str(tmp_path / "out"))
    fsdp.export(*load(args, world), args, world)  # one file takes their place
    assert torch.equal(their_logits(reload(tmp_path / "out"), batch), their_logits(peer, batch))


def test_an_export_in_bf16(place, world, tmp_path):
    """--dtype bf16 writes bf16 tensors, says so in config.json, and loads as such."""
    peer = tiny.make_model(tmp_path / "model")
    args = options(model=str(tmp_path / "model"), dtype="bf16", out=str(tmp_path))
    model, processor = load(args, world, trainable=["language_model."])
    dtypes = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {"vision_tower": torch.bfloat16, "multi_modal_projector": torch.bfloat16,
                      "language_model": torch.float32}
    args.out = str(tmp_path / "out")
    os.mkdir(args.out)
    fsdp.export(model, processor, args, world)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = named(peer, HUB)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, theirs[name].bfloat16()), name
    batch = batch_of(processor, place / "images")
    assert_close(our_logits(model, batch), their_logits(reload(args.out, torch.bfloat16), batch), 3e-2)


def test_our_export_answers_with_transformers_processor(place, world, tmp_path):
    """AutoProcessor on the exported folder makes the ids and pixels that we make."""
    args = options(model=str(place / "model"))
    _, _, batch = round_trip(args, world, place / "images", tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with tiny.Image.open(place / "images" / "p0.png") as picture:
        theirs = processor(text=text, images=picture, return_tensors="pt", add_special_tokens=False)
    length = theirs.input_ids.shape[1]
    assert torch.equal(theirs.input_ids[0], batch.ids[0, :length]) and not batch.branch[0, :length].any()
    assert torch.equal(theirs.pixel_values[0], batch.pixels[0])


SPOILED = {
    "missing": (lambda t: t.pop("multi_modal_projector.linear_1.bias"),
                "missing: multi_modal_projector.linear_1.bias (32,)"),
    "extra": (lambda t: t.update({"language_model.model.layers.1.mlp.in_proj.weight": torch.ones(2, 3)}),
              "not known: language_model.model.layers.1.mlp.in_proj.weight (2, 3)"),
    "shape": (lambda t: t.update({"language_model.model.norm.weight": torch.ones(33)}),
              "shape: language_model.model.norm.weight is (33,), need (32,)"),
    "head": (lambda t: t.pop("language_model.lm_head.weight"), "missing: language_model.lm_head.weight")}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_weights_that_do_not_fit_are_listed(spoiled, place, world, tmp_path):
    """A missing, an extra and a misshapen tensor are named; all of them at once, too."""
    tiny.make_model(tmp_path / "model")
    args = options(model=str(tmp_path / "model"))
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    spoil, message = SPOILED[spoiled]
    spoil(tensors)
    write(tmp_path / "model", tensors)
    with pytest.raises(ValueError, match="do not fit its config.json") as error:
        load(args, world)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 2
    for spoil, _ in [other for name, other in SPOILED.items() if name != spoiled]:
        spoil(tensors)
    write(tmp_path / "model", tensors)
    with pytest.raises(ValueError) as error:
        load(args, world)
    assert all(message in str(error.value) for _, message in SPOILED.values())


def test_a_shard_that_is_not_there_is_named(world, tmp_path):
    """A file of the index that is missing: the error names it."""
    tiny.make_model(tmp_path / "model", files=3)
    os.remove(tmp_path / "model" / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: named by"):
        load(options(model=str(tmp_path / "model")), world)


# ---- gradients ----


def gradients_of(place, world, dtype):
    """A model's gradients after two micro-batches, and its trained parameters."""
    model, processor = load(options(model=str(place / "model"), dtype=dtype), world,
                            ("multi_modal_projector.", "language_model."))
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(processor, place / "images")
    for weight in (1, 3):
        (weight * model(batch, model.vision_tower(batch.pixels)).sum()).backward()
    return [p.grad.full_tensor().clone() for p in parameters], parameters


def test_clip_gradients(place, world):
    """Up to the limit gradients stay as they are, to the bit; above it their norm becomes the limit. The norm
    before is returned, NaN where one is: the caller steps no further."""
    whole, parameters = gradients_of(place, world, "fp32")
    norm = torch.cat([grad.flatten() for grad in whole]).norm().item()
    assert fsdp.clip_gradients(parameters, 2 * norm) == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(p.grad.full_tensor(), grad) for p, grad in zip(parameters, whole))
    assert fsdp.clip_gradients(parameters, norm / 2) == pytest.approx(norm, rel=1e-5)
    for p, grad in zip(parameters, whole):
        torch.testing.assert_close(p.grad.full_tensor(), grad / 2, rtol=1e-4, atol=0)
    parameters[0].grad.to_local()[:1] = torch.nan
    assert math.isnan(fsdp.clip_gradients(parameters, norm))



# ---- memory ----

def anonymous():
    """This process's anonymous memory now, in bytes."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def peak_of(function):
    """The most anonymous memory above the level before, while function() runs."""
    start, seen, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    held = function()
    seen.append(anonymous())
    done.set()
    thread.join()
    return max(seen) - start, held


def measure_loading(folder, streamed):
    """Writes each rank's peak of loading: streamed by fsdp.build, or whole and then sharded."""
    args = options(model=str(folder))
    world = fsdp.launch(args)
    checkpoint = fsdp.open_checkpoint(args, world)

    def whole():
        model = fsdp.VisionLLM(checkpoint.config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        fsdp.shard(model, world, torch.float32)
        return model
    peak, _ = peak_of(functools.partial(fsdp.build, checkpoint, args, world) if streamed else whole)
    peaks = world.gather(peak)
    world.on_rank0(fsdp.write_json, str(folder / f"peaks-{streamed}.json"), peaks)
    dist.destroy_process_group()


def test_each_rank_loads_its_part_only(tmp_path):
    """150 MB on two ranks: each rank's peak is at most 0.65 of that of loading whole and then sharding."""
    tiny.make_model(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=9)
    size = os.path.getsize(tmp_path / "model.safetensors")
    assert 100e6 < size < 200e6
    peaks = {}
    for streamed in (True, False):
        done = tiny.spread(functools.partial(measure_loading, tmp_path, streamed), 2)
        assert done.code == 0, done.err
        peaks[streamed] = json.loads((tmp_path / f"peaks-{streamed}.json").read_text())
    assert min(peaks[True]) > 0.4 * size  # the measurement sees what is loaded
    assert max(peaks[True]) <= 0.65 * min(peaks[False]), (peaks, size)


def test_the_log_has_the_peak_memory_of_a_gpu(world, tmp_path, monkeypatch):
    """Per step, and on GPUs alone."""
    args = options(out=str(tmp_path))
    log, peaks = fsdp.Log(args, world, 3, 0), [7e9, 3e9, 0]
    log.step(1, 10, 1.0, loss=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.pop(0))
    for step in (2, 3):
        log.step(step, 10, 1.0, loss=1.0)
    assert [line.get("peak_memory_gb") for line in tiny.log(tmp_path)] == [None, 7, 3] and peaks == [0]


def test_schedule_by_hand():
    """Linear warm-up to the peak, half of it halfway down the cosine, nearly nothing at the last step."""
    assert [fsdp.schedule(step, 24, 4) for step in (0, 3)] == pytest.approx([1 / 5, 4 / 5])
    assert [fsdp.schedule(step, 24, 4) for step in (4, 9, 14, 19)] == pytest.approx(
        [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
    assert 0 < fsdp.schedule(23, 24, 4) < 0.01
    assert fsdp.schedule(0, 100, 0.03) == pytest.approx(1 / 4)  # below 1: a share of all steps
    assert fsdp.schedule(0, 10, 0) == 1


# ---- what a run leaves, and what a resume makes of it ----

EARLIER = ["--max_steps", 3, "--batch_size", 4, "--micro_batch", 2, "--save_every", 1, "--workers", 0]


def sft(place, out, *argv, **how):
    files = ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images"]
    return tiny.fork("sft", *files, "--out", out, *EARLIER, *argv, **how)


@pytest.fixture(scope="module")
def earlier(place, tmp_path_factory):
    """What a run of three steps leaves; tests take a copy."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    done = sft(place, out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def out(earlier, tmp_path):
    tiny.shutil.copytree(earlier, tmp_path / "out")
    return tmp_path / "out"


def test_only_steps_are_checkpoints(out, place, earlier):
    """Folders and files of other names are left alone, by a save and by a resume."""
    folder = out / "checkpoints"
    foreign = ("step_2_keep", "step_best", "best", "step_", "step_-1", "step_0001")
    for name in foreign:
        tiny.shutil.copytree(folder / "step_2", folder / name)
    (folder / "notes.txt").write_text("")
    tiny.shutil.rmtree(folder / "step_3")
    os.rename(folder / "step_2", folder / "elsewhere")
    os.rename(folder / "elsewhere", folder / "step_2")
    assert fsdp.checkpoint_steps(out) == [2]
    done = sft(place, out, "--resume")
    assert done.code == 0, done.err
    assert fsdp.checkpoint_steps(out) == [2, 3]
    assert {path.name for path in folder.iterdir()} == {*foreign, "notes.txt", "step_2", "step_3"}
    assert tiny.log(out) == tiny.log(earlier)
    for step in (2, 3):
        tiny.shutil.rmtree(folder / f"step_{step}")
    for option in ("--resume", "--overwrite"):
        os.remove(out / "config.json")
        assert sft(place, out, option).code == 0
        assert {path.name for path in folder.iterdir()} == {*foreign, "notes.txt", "step_2", "step_3"}
        for step in (2, 3):
            tiny.shutil.rmtree(folder / f"step_{step}")


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def forge(metadata, path):
    """Data that dcp.load would unpickle: it is said to be bytes, not a tensor."""
    found = pickle.loads(metadata.read_bytes())
    found.state_dict_metadata = dict.fromkeys(
        found.state_dict_metadata, torch.distributed.checkpoint.metadata.BytesStorageMetadata())
    metadata.write_bytes(pickle.dumps(found))


DAMAGE = {  # of the last checkpoint
    "data cut short": lambda folder, path: os.truncate(folder / "__0_0.distcp", 2000),
    "no data": lambda folder, path: os.remove(folder / "__0_0.distcp"),
    "data overwritten": lambda folder, path: (folder / "__0_0.distcp").write_bytes(bytes(10**6)),
    "no metadata": lambda folder, path: os.remove(folder / ".metadata"),
    "metadata cut short": lambda folder, path: os.truncate(folder / ".metadata", 100),
    "empty metadata": lambda folder, path: os.truncate(folder / ".metadata", 0),
    "code for metadata": lambda folder, path: (folder / ".metadata").write_bytes(pickle.dumps(Attack(path))),
    "bytes for tensors": lambda folder, path: forge(folder / ".metadata", path)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(damage, out, place, earlier, tmp_path):
    """With the way on: once it is removed, --resume goes on from the one before. No code in it is run."""
    last = out / "checkpoints" / "step_3"
    DAMAGE[damage](last, str(tmp_path / "attacked"))
    done = sft(place, out, "--resume")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert f"{last} is damaged" in done.error and "remove it, and --resume goes on from step 2" in done.error
    assert not (tmp_path / "attacked").exists()
    tiny.shutil.rmtree(last)
    done = sft(place, out, "--resume")
    assert done.code == 0, done.err
    tiny.assert_same_run(out, earlier)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def nudge(path):
    """One weight of a layer is another; the file's size is the same."""
    tensors = load_file(path)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] *= 1.01
    tiny.write(path.parent, tensors)


def swap(a, b):
    a.rename(a.parent / "c")
    b.rename(a)
    (a.parent / "c").rename(b)


CHANGES = {  # of what the run reads, and what is said
    "a record": (lambda folder: tiny.write_rows(folder / "rows.json", [*MIXED[1:], MIXED[0]]), "rows.json ("),
    "one word": (lambda folder: edit(folder / "rows.json", "a star", "a stars"), "rows.json ("),
    "a held-out record": (lambda folder: tiny.write_rows(folder / "pairs.json", MIXED[:3]), "pairs.json ("),
    "images": (lambda folder: swap(folder / "images" / "p0.png", folder / "images" / "p3.png"),
               "rows.json ("),
    "weights": (lambda folder: nudge(folder / "model" / "model.safetensors"), "the checkpoint of --model"),
    "tokenizer": (lambda folder: tiny.swap_tokens(folder / "model"), "the checkpoint of --model"),
    "template": (lambda folder: edit(folder / "model" / "chat_template.jinja", "USER", "User"),
                 "the checkpoint of --model"),
    "nothing": (lambda folder: os.utime(folder / "model" / "model.safetensors"), None),
    "how the data is written": (lambda folder: (folder / "rows.json").write_text(
        "\n".join(map(json.dumps, MIXED))), None),
    "other files": (lambda folder: (folder / "model" / "eval.json").write_text("{}"), None)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_notices_what_has_changed(change, place, tmp_path):
    """Data, images, weights, tokenizer and template are those that the run began with, or it ends and says
    which are not. A copy is the same, and so are records written in another way."""
    folder = tmp_path / "place"
    tiny.shutil.copytree(place, folder)
    argv = ["--eval_data", folder / "text.json", folder / "pairs.json", "--max_steps", 1]
    assert sft(folder, tmp_path / "out", *argv).code == 0
    spoil, said = CHANGES[change]
    spoil(folder)
    done = sft(folder, tmp_path / "out", *argv, "--resume")
    if said is None:
        assert done.code == 0, done.err
    else:
        assert done.code == 2 and f"{said}" in done.error, done.err
        assert "cannot resume: " in done.error and "changed since the run began" in done.error


@pytest.mark.parametrize("what, old, new", [
    ("rewards.py", "1.0 *", "2.0 *"), ("rows.json", '"gold": 1', '"gold": 2'),
    ("more.json", '"gold": 1', '"gold": 2')])
def test_a_resume_notices_what_a_reward_function_reads(what, old, new, place, tmp_path):
    """It may read any field of a record; its own code counts, too."""
    for name in ("rows", "more"):
        tiny.write_rows(tmp_path / f"{name}.json", [{**row, "gold": 1} for row in tiny.ONE_TURN])
    (tmp_path / "rewards.py").write_text(
        "def gold(record, texts):\n    return [1.0 * record['gold']] * len(texts)\n")
    argv = ["--model", place / "model", "--data", tmp_path / "rows.json", tmp_path / "more.json",
            "--images", place / "images", "--out", tmp_path / "out", "--reward_model",
            f"{tmp_path}/rewards.py:gold", *EARLIER, "--critic", "policy", "--rollout_batch", 4,
            "--max_new_tokens", 4, "--max_steps", 1]
    assert tiny.fork("ppo", *argv).code == 0
    assert tiny.fork("ppo", *argv, "--resume").code == 0
    edit(tmp_path / what, old, new)
    done = tiny.fork("ppo", *argv, "--resume")
    assert done.code == 2 and f"cannot resume: the file {tmp_path / what} changed" in done.error, done.err


def test_several_files_are_read_as_one(place, world, tmp_path, capsys):
    """Indices go on from file to file; paths of images start from their own file's folder, and bad records
    are counted, and records named, by file."""
    for name, records in {"a": [MIXED[0], {}, MIXED[1]], "b": [{}, {}, MIXED[6]]}.items():
        tiny.make_images(tmp_path / name)
        tiny.write_rows(tmp_path / name / "rows.json", records)
    paths = [str(tmp_path / name / "rows.json") for name in "ab"]
    args = options(data=paths, model=str(place / "model"), skip_bad_rows=True)
    records, conversations = fsdp.read_conversations(paths, args, world, 1)
    assert len(records) == 6 and records[5] == MIXED[6]
    assert [(index, c.images) for index, c in conversations] == [
        (0, [f"{tmp_path}/a/p0.png"]), (2, []), (5, [f"{tmp_path}/b/p5.png"])]
    examples, _ = data.build_examples(conversations, fsdp.open_checkpoint(args, world).processor, "turns")
    assert [(e.index, e.name) for e in examples] == [
        (0, f"{paths[0]}: record 0 (id row 0)"), (2, f"{paths[0]}: record 2 (id row 1)"),
        (5, f"{paths[1]}: record 2 (id row 6)")]
    said = capsys.readouterr().out
    assert f"{paths[0]}: 1 of 3 records are bad" in said and f"{paths[1]}: 2 of 3 records are bad" in said


def test_the_shapes_have_a_folder_of_their_own(monkeypatch, tmp_path):
    """A data file of the shapes data set needs no --images, nor does one that lies elsewhere; --images is for
    both. The data set is created where a run without --model reads any of it."""
    monkeypatch.setattr(fsdp, "SHAPES_DIR", str(tmp_path / "shapes"))
    monkeypatch.setattr(fsdp, "left_by", lambda *_: {})
    args = tiny.arguments("sft", "--data", tmp_path / "own" / "rows.json")
    (file,), (held_out,) = args.data, args.eval_data
    assert fsdp.images_folder(file, args) == str(tmp_path / "own")
    assert fsdp.images_folder(held_out, args) == str(tmp_path / "shapes" / "images")
    args.images = "elsewhere"
    assert {fsdp.images_folder(path, args) for path in (file, held_out)} == {"elsewhere"}
    created = []
    monkeypatch.setattr(fsdp, "make_shapes", lambda: created.append(1) or 1 / 0)
    for argv in [], ["--data", "rows.json"], ["--model", "x", "--data", tmp_path / "shapes" / "test.json"]:
        with pytest.raises(ZeroDivisionError):
            fsdp.launch(tiny.arguments("sft", *argv))
    assert len(created) == 3


def on(date, stop=False):
    """strftime_now() of chat templates gives `date`; stop: the run is killed before its last checkpoint."""
    import transformers.utils.chat_template_utils as utils
    now = SimpleNamespace(strftime=lambda form: date)
    utils.datetime = SimpleNamespace(now=lambda: now)
    if stop:
        tiny.at_path("os.mkdir", r"step_3\.part$")


def test_a_template_with_the_date_is_rendered_once(place, tmp_path):
    """A run that goes on the next day trains on the prompts that it began with."""
    folder = tmp_path / "place"
    tiny.shutil.copytree(place, folder, symlinks=True)
    template = folder / "model" / "chat_template.jinja"
    text = template.read_text()
    assert "{{- bos_token -}}" in text
    template.write_text(text.replace("{{- bos_token -}}", "{{- bos_token + strftime_now('%A') -}}"))
    logs = []
    for first, second in (("Monday", "Monday"), ("Monday", "Tuesday"), ("Tuesday", "Tuesday")):
        out = tmp_path / f"{first}-{second}"
        assert sft(folder, out, prepare=functools.partial(on, first, stop=True)).code != 0
        done = sft(folder, out, "--resume", prepare=functools.partial(on, second))
        assert done.code == 0, done.err
        logs.append(tiny.log(out))
    assert logs[0] == logs[1] != logs[2]


@pytest.mark.parametrize("text", ["", '{"lr": 2e-5, "mod', "[1, 2]", "\0\0\0"])
def test_damaged_args_are_named(text, out, place, earlier):
    """With the way on: without args.json, --resume takes the options given now."""
    (out / "args.json").write_text(text)
    done = sft(place, out, "--resume")
    assert done.code == 2 and f"{out}/args.json is damaged" in done.error and "or remove it" in done.error
    os.remove(out / "args.json")
    tiny.shutil.rmtree(out / "checkpoints" / "step_3")
    done = sft(place, out, "--resume")
    assert done.code == 0, done.err
    tiny.assert_same_run(out, earlier)


@pytest.mark.parametrize("damage", [
    lambda lines: [lines[0], '{"step": 2, "lo\n', *lines[1:]], lambda lines: [*lines, "\0" * 999],
    lambda lines: [*lines, '{"step": 4'], lambda lines: [*lines[:2], "\n", "7\n", "null\n", *lines[2:]],
    lambda lines: ['{"step": null}\n', '{"step": "3"}\n', "[" * 99999 + "\n", *lines],
    lambda lines: [*lines, lines[-1]]])
def test_damaged_lines_of_the_log_are_dropped(damage, out, place, earlier):
    """What a crash leaves of a line does not end a resume; every step is there once."""
    with open(out / "log.jsonl") as f:
        lines = f.readlines()
    (out / "log.jsonl").write_text("".join(damage(lines)))
    done = sft(place, out, "--resume")
    assert done.code == 0, done.err
    assert tiny.log(out) == tiny.log(earlier)
    repeated = damage(lines) == [*lines, lines[-1]]
    assert ("damaged lines" in done.out) != repeated


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(umask, mode, place, tmp_path):
    """Also those that safetensors writes: model, score and adapter."""
    data = ["--data", place / "pairs.json", "--lora_rank", 2]
    done = tiny.fork("rm", "--model", place / "model", "--images", place / "images", *EARLIER, *data, "--out",
                     tmp_path / "out", "--max_steps", 1, prepare=functools.partial(os.umask, umask))
    assert done.code == 0, done.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"model.safetensors", "score.safetensors", "adapter_model.safetensors"} <= {f.name for f in files}
    assert {f.name: oct(f.stat().st_mode & 0o777) for f in files} == {f.name: oct(mode) for f in files}


def test_a_second_run_on_the_same_out_is_refused(place, out, tmp_path):
    """Whatever it is told to do there; also where the first one is about to begin. Its lock ends with it."""
    for folder, argv in ((out, ["--overwrite"]), (out, ["--resume"]), (tmp_path / "new", [])):
        fsdp.lock(str(folder / ".lock"))
        done = sft(place, folder, *argv)
        assert done.code == 2 and f"another run holds {folder}/.lock" in done.error, done.err
        tiny.unwatch()
    fsdp.lock(str(tmp_path / "answers.jsonl"))
    done = tiny.fork("predict", "--model", place / "model", "--data", place / "rows.json", "--images",
                     place / "images", "--out", tmp_path / "answers.jsonl", "--overwrite")
    assert done.code == 2 and f"another run holds {tmp_path}/answers.jsonl" in done.error
    tiny.unwatch()
    assert not (tmp_path / "new").exists() and not (out / ".lock").exists()
    assert sft(place, tmp_path / "new", "--max_steps", 1).code == 0


@pytest.mark.parametrize("script, name", [("sft", "out"), ("predict", "answers.jsonl")])
def test_an_out_that_cannot_be_written_is_refused(script, name, place):
    """At once and in one line; /proc takes no files, whoever asks."""
    done = tiny.fork(script, "--model", place / "model", "--data", place / "nothing.json", "--out",
                     f"/proc/{name}")
    assert done.code == 2 and "/proc" in done.error and "cannot be written" in done.error, done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--model", "--ref_model"])
def test_out_is_not_a_model_that_is_read(option, place, tmp_path):
    """Not even with --overwrite: it would be gone."""
    tiny.shutil.copytree(place / "model", tmp_path / "model")
    argv = ["--model", place / "model", option, tmp_path / "model", "--data", place / "pairs.json"]
    done = tiny.fork("dpo", *argv, "--out", tmp_path / "model", "--overwrite")
    assert done.code == 2 and f"which is {option} too: choose another" in done.error, done.err


def test_a_full_disk_is_seen_through_other_errors():
    """By its number or its text, wherever in the chain of causes it stands."""
    full, other = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError(errno.EIO, os.strerror(errno.EIO))
    wrapped, hidden = RuntimeError("could not save"), RuntimeError("could not save")
    wrapped.__cause__, hidden.__context__ = full, RuntimeError(f"I/O error: {full.strerror} (os error 28)")
    assert all(map(fsdp.disk_full, (full, wrapped, hidden, OSError(errno.EDQUOT, "quota"))))
    assert not any(map(fsdp.disk_full, (other, RuntimeError("could not save"), KeyError("x"))))


# ---- the hub ----

@contextlib.contextmanager
def hub(folder, moves=False):
    """A server that plays the hub over the folders folder/ORG/NAME. moves: `main` is another commit at every
    request. org/gated and org/private are what they are called. → environment, requests so far"""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        commit = ""

        def log_message(self, *_):
            pass

        def answer(self, status=200, content=b"", **headers):
            self.send_response(status)
            headers = {"Content-Length": len(content), "X-Repo-Commit": self.commit, **headers}
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked = re.fullmatch("(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
            if not asked:  # the library's own affairs
                return self.answer(404)
            requests.append((self.command, path))
            repo, what, revision, file = asked.groups()
            self.commit = revision if len(revision) == 40 else f"{len(requests) if moves else 1:040x}"
            files = [path for path in (folder / repo).rglob("*") if path.is_file()]
            if "private" in repo or not files:
                return self.answer(401, X_Error_Code="RepoNotFound")
            if what == "revision":
                siblings = [{"rfilename": str(path.relative_to(folder / repo))} for path in files]
                return self.answer(content=json.dumps(
                    {"id": repo, "sha": self.commit, "siblings": siblings}).encode())
            if what == "tree":
                return self.answer(content=json.dumps([
                    {"type": "file", "path": str(path.relative_to(folder / repo)), "oid": "0" * 40,
                     "size": path.stat().st_size} for path in files]).encode())
            if "gated" in repo:
                return self.answer(403, X_Error_Code="GatedRepo")
            content = (folder / repo / file).read_bytes()
            self.answer(content=content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}, requests
    finally:
        server.shutdown()


def fetched(requests):
    """How often each file was."""
    files = [path for kind, path in requests if kind == "GET" and "/resolve/" in path]
    return Counter(path.rpartition("/")[2] for path in files)


FETCH = """
import os, sys
import fsdp
import tiny  # sets HF_HUB_OFFLINE, which has been read by now
world = fsdp.launch(tiny.options())
for name in sys.argv[1:]:
    try:
        folder = fsdp.fetch(name, world)
        fsdp.read_config_file(folder, world)
        assert not [file for file in os.listdir(folder) if file.endswith(("n.safetensors", ".bin"))]
        fsdp.fetch_weights(folder, world)
        world.earlier = {**world.inputs}  # as of a run that is resumed
        assert fsdp.fetch(name, world) == folder
        world.earlier = {}
        print(os.path.basename(folder), *sorted(os.listdir(folder)), flush=True)
    except fsdp.UserError as error:
        assert world.size == 1
        print(error, flush=True)
world.gather("done")
fsdp.leave(0)
"""


def fetch(names, home, env, nodes=(1,)):
    """FETCH in processes that share the cache home/0, home/1, … of their node. nodes: ranks of each. → what
    each rank prints"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [(node, local) for node, ranks in enumerate(nodes) for local in range(ranks)]
    processes = []
    for rank, (node, local) in enumerate(ranks):
        place = {"HF_HOME": home / str(node), "RANK": rank, "WORLD_SIZE": len(ranks), "LOCAL_RANK": local,
                 "GROUP_RANK": node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", FETCH, *names], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **env, **{name: str(value) for name, value in place.items()}}))
    said = [process.communicate(timeout=200) for process in processes]
    assert not any(process.returncode for process in processes), said
    return [out.splitlines() for out, _ in said]


NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
          "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
          "model-00002-of-00002.safetensors"}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny.make_model(folder / "org" / "tiny", files=2)
    (folder / "org" / "tiny" / "onnx").mkdir()
    for name in ("pytorch_model.bin", "tf_model.h5", "consolidated.safetensors", "model.fp16.safetensors",
                 "README.md", "onnx/model.safetensors", "onnx/config.json"):
        (folder / "org" / "tiny" / name).write_bytes(b"not needed")
    for repo, names in (
            ("old", ("config.json", "pytorch_model.bin", "optimizer.bin")), ("gated", ("config.json",)),
            ("gguf", ("config.json", "q4.gguf")), ("projector", ("config.json", "mm_projector.bin")),
            ("text", ("README.md",))):
        (folder / "org" / repo).mkdir()
        for name in names:
            (folder / "org" / repo / name).write_text(json.dumps({"file": name}))  # equal ones are one blob
    return folder


@pytest.mark.parametrize("nodes", [(2,), (1, 2)])
def test_every_rank_reads_the_same_snapshot_which_each_node_fetches_once(nodes, repositories, tmp_path):
    """Though `main` moves between requests; only what is needed, and it says how much that is. Afterwards
    the same is there offline, without a request."""
    with hub(repositories, moves=True) as (env, requests):
        said = fetch(["org/tiny"], tmp_path, env, nodes)
        assert fetched(requests) == Counter({name: len(nodes) for name in NEEDED})
        commit, *files = said[0][-1].split()
        assert all(lines[-1] == said[0][-1] for lines in said) and {*files} == NEEDED
        size = sum((repositories / "org" / "tiny" / name).stat().st_size for name in NEEDED
                   if name.endswith(".safetensors"))
        local = [local for ranks in nodes for local in range(ranks)]
        assert [lines[0] for lines, n in zip(said, local) if n == 0] == [
            f"org/tiny, commit {commit}: downloading {size / 1e9:.2f} GB, 2 files"] * len(nodes)
        assert [len(lines) for lines in said] == [1 if n else 2 for n in local]
        requests.clear()
        said = fetch(["org/tiny"], tmp_path, {**env, "HF_HUB_OFFLINE": "1"}, nodes)
        assert [lines[-1].split() for lines in said] == [[commit, *files]] * len(local) and not requests


def test_what_the_hub_cannot_give_is_said(repositories, tmp_path):
    """In one line each. What cannot be a hub id is not asked for."""
    with hub(repositories) as (env, requests):
        paths = ["./runs/sft", "/data/x", "runs", "runs/sft/", "https://hub/org/tiny"]
        paths = fetch(paths, tmp_path, env)[0]
        assert len(paths) == 5 and all("there is no such folder" in line for line in paths) and not requests
        names = ("gated", "private", "none", "gguf", "projector", "text", "old@v1", "tiny")
        gated, private, none, gguf, projector, text, downloading, old, *_ = fetch(
            [f"org/{name}" for name in names], tmp_path, env)[0]
        assert "licence accepted at http://" in gated and "/org/gated: do so, then set HF_TOKEN" in gated
        assert all("no such folder, and the hub has none of this name, or a private one: set HF_TOKEN" in line
                   for line in (private, none))
        assert "need weights; it holds config.json, q4.gguf" in gguf
        assert "holds a projector alone (mm_projector.bin)" in projector
        assert "no config.json, need " in text and "it holds README.md" in text
        assert "downloading 0.00 GB, 1 files" in downloading
        assert old.split() == [f"{1:040x}", "config.json", "pytorch_model.bin"]
        assert fetched(requests)["pytorch_model.bin"] == 1 and not fetched(requests)["optimizer.bin"]
        for name in ("pytorch_model.bin", "model-00002-of-00002.safetensors"):
            next(tmp_path.rglob(f"snapshots/*/{name}")).unlink()
        requests.clear()
        offline = {**env, "HF_HUB_OFFLINE": "1"}
        part, shard, none = fetch(["org/old@v1", "org/tiny", "org/none"], tmp_path, offline)[0]
        assert "need weights, but the hub cannot be asked (HF_HUB_OFFLINE?), and its cache has no" in part
        assert "and its cache has no model-00002-of-00002.safetensors" in shard
        assert "HF_HUB_OFFLINE is set while" in none and str(tmp_path) in none and not requests
