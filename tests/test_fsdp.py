"""fsdp.py: checkpoints in and out against transformers, gradients, memory, resuming, the hub; fp32, gloo."""
import dataclasses
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

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from tiny import HUB, MEMORY, MIXED, NEW, ORIGINAL, named, options, reload, row, write

import data
import fsdp
import model as network


def batch_of(processor, images):
    """An image, two images and text alone, padded to the longest."""
    conversations = [(i, data.read_record(MIXED[k], str(images))) for i, k in enumerate((0, 2, 1))]
    return data.collate(data.build_examples(conversations, processor, "turns")[0], processor)


@torch.no_grad()
def our_logits(model, batch):
    positions = torch.arange(batch.ids.numel())
    logits = model.hidden(batch, model.vision_tower(batch.pixels), positions, F.linear)
    fsdp.reshard(model)
    return logits[batch.branch.flatten() >= 0].float()


@torch.no_grad()
def their_logits(peer, batch):
    logits = peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(),
                  pixel_values=tiny.shown(batch, peer.config).to(peer.dtype)).logits
    return logits[batch.branch >= 0].float()


def load(args, world, trainable=()):
    checkpoint = fsdp.open_checkpoint(args, world)
    return fsdp.build(checkpoint, args, world, trainable), checkpoint.processor


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).norm() / theirs.norm() <= tolerance


def assert_parity(args, world, images, out, peer=None, new_ids=0, **changes):
    """Our logits are those of transformers' model of our export and, but for ids that the checkpoint does not
    have, of `peer`. → our model, that of the export, a batch"""
    model, processor = load(args, world)
    args.out = str(out)
    out.mkdir()
    fsdp.export(model, processor, args, world, **changes)
    exported, batch = reload(out), batch_of(processor, images)
    ours = our_logits(model, batch)
    assert_close(ours, their_logits(exported, batch))
    if peer:
        known = peer.config.text_config.vocab_size - new_ids
        assert_close(ours[:, :known], their_logits(peer, batch)[:, :known])
    return model, exported, batch


# ---- checkpoints in and out ----

LAYOUTS = {"hub": {}, "new": {"spelling": NEW}, "memory": {"spelling": MEMORY}, "sharded": {"files": 3},
           "tied, memory": {"tie_word_embeddings": True, "spelling": MEMORY}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_llava_is_read_and_written_as_transformers_does(layout, place, world, tmp_path):
    peer = tiny.make_model(tmp_path / "model", **LAYOUTS[layout])
    args = options(model=str(tmp_path / "model"))
    _, exported, batch = assert_parity(args, world, place / "images", tmp_path / "out", peer)
    assert torch.equal(their_logits(exported, batch), their_logits(peer, batch))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == named(peer, HUB).keys()


def original(folder, kind, peer=None, **changes):
    """An original LLaVA (its LLaMA's config with mm_*, weights in .bin files or safetensors) and its CLIP.
    changes: of its config.json."""
    clip, llava = folder / "clip", folder / "llava"
    clip.mkdir()
    tokenizer = tiny.make_tokenizer(llava, specials=False)
    peer = peer or tiny.make_peer(tiny.make_tokenizer(folder))
    config = {**peer.config.text_config.to_dict(), "vocab_size": len(tokenizer), "model_type": "llava",
              "mm_vision_tower": str(clip), "mm_hidden_size": 24, "mm_projector_type": "mlp2x_gelu",
              "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad",
              **changes}
    (llava / "config.json").write_text(json.dumps(config))
    tiny.clip_config().save_pretrained(clip)
    write(clip, named(peer, {"model.vision_tower.": "vision_model."}))
    tensors = named(peer, ORIGINAL)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:len(tokenizer)].clone()
    if kind == "safetensors":
        write(llava, tensors)
    else:
        for i in range(2):
            some = {name: tensors[name] for name in [*tensors][i::2]}
            torch.save(some, llava / f"pytorch_model-0000{i + 1}-of-00002.bin")
    return peer, llava


def test_an_original_llava_in_bin_files_is_read(place, world, tmp_path):
    """A tower among its weights comes before the CLIP that it was tuned from."""
    peer, folder = original(tmp_path, ".bin")
    prefix = "model.vision_tower.vision_tower.vision_model."
    torch.save(named(peer, {"model.vision_tower.": prefix}), folder / "pytorch_model-00003-of-00003.bin")
    clip = load_file(tmp_path / "clip" / "model.safetensors")
    write(tmp_path / "clip", {name: tensor + 1 for name, tensor in clip.items()})
    assert_parity(options(model=str(folder)), world, place / "images", tmp_path / "out", peer, 2)


# ---- LLaVA-NeXT ----

# of images, as width and height: square, wide, tall, tiny, larger than all grids, extreme
SIZES = [(16, 16), (40, 24), (20, 33), (5, 7), (90, 80), (300, 9), (9, 300), (49, 15), (15, 47)]
TILED = [row(0, None, "yes or no?", "no"), row(1, ["0.png", "5.png"], "<image>\n<image>\nWhat?", "a star"),
         *(row(2 + i, f"{i}.png", "Describe the image.", "a red circle") for i in range(len(SIZES))),
         row(20, ["1.png", "2.png"], "<image>\nWhat?", "a star", "and <image> here?", "no")]


def make_tiled(folder, layout):
    """A checkpoint and images of SIZES. → transformers' model, the checkpoint's folder"""
    for i, size in enumerate(SIZES):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    if layout != "original":
        spelling = {"hub": HUB, "new": NEW, "memory": MEMORY}[layout]
        return tiny.make_model(folder / "model", spelling, tiles=True), folder / "model"
    peer = tiny.make_peer(tiny.make_tokenizer(folder), tiles=True)
    return original(
        folder, "safetensors", peer, mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres",
        image_grid_pinpoints=[[width, height] for height, width in tiny.GRIDS], image_crop_resolution=224)


def tiled_examples(folder, records, processor, which):
    conversations = [(i, data.read_record(record, str(folder), 0)) for i, record in enumerate(records)]
    return data.build_examples(conversations, processor, which)[0], conversations


@pytest.mark.parametrize("layout", ["hub", "new", "memory", "original"])
def test_a_llava_next_is_transformers(layout, world, tmp_path):
    """Ids, pixels, logits and all gradients, of text, of one and of two images; and after the export."""
    peer, folder = make_tiled(tmp_path, layout)
    parts = "vision_tower.", "multi_modal_projector.", "language_model."
    args = options(model=str(folder), out=str(tmp_path / "out"))
    model, processor = load(args, world, parts)
    (tmp_path / "out").mkdir()
    fsdp.export(model, processor, args, world)
    theirs = hf.AutoProcessor.from_pretrained(args.out, backend="pil")
    assert type(theirs) is hf.LlavaNextProcessor
    examples, conversations = tiled_examples(tmp_path, TILED, processor, "turns")
    batch = data.collate(examples, processor)

    shown, lengths = [], set()  # transformers' pixels of all images in the order of the sequences
    for example, (_, conversation) in zip(examples, conversations):
        shown += [Image.open(path) for path in example.images]
        if len(conversation.contents) == 1:  # a first turn
            prompt = np.repeat(example.prompt, processor.lengths(example.prompt, example.images))
            images = [Image.open(path) for path in example.images] or None
            text = processor.template.render(conversation)
            coded = theirs(text=text, images=images, add_special_tokens=False)
            assert coded["input_ids"] == [prompt.tolist()]
            lengths.add(len(prompt))
    assert len(lengths) > 6  # they depend on the images' sizes
    images = theirs.image_processor(shown, return_tensors="pt")
    for image, pixels in zip(shown, images["pixel_values"], strict=True):
        tiles = torch.from_numpy(processor.pixels(image.filename))
        assert torch.equal(tiles, pixels[:len(tiles)]) and not pixels[len(tiles):].any()

    def their_logits(peer):
        return peer(input_ids=batch.ids, attention_mask=(batch.branch >= 0).long(), **images).logits
    known, valid = peer.config.text_config.vocab_size - 2 * (layout == "original"), batch.branch >= 0
    logits, exported = their_logits(peer), their_logits(reload(tmp_path / "out"))
    ours = our_logits(model, batch)
    assert_close(ours[:, :known], logits[valid][:, :known])
    assert_close(ours, exported[valid])
    if layout != "original":  # which has fewer rows in the vocabulary
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == named(peer, HUB).keys()
        assert torch.equal(exported, logits)
        model(batch, model.vision_tower(batch.pixels)).sum().backward()
        logps = logits.flatten(0, 1)[batch.logit_position].log_softmax(-1)
        logps.gather(1, batch.target[:, None]).sum().backward()
        found, expected = (
            {network.our_name(name): fsdp.full_tensor(p.grad) for name, p in one.named_parameters()
             if p.grad is not None} for one in (model, peer))
        tiny.assert_same_gradients(found, expected, 1e-4)
        assert peer.model.image_newline.grad.norm() > 0


@torch.no_grad()
def test_tiles_in_packed_and_joined_sequences_are_those_of_separate_ones(world, tmp_path):
    """Several answers per prompt; prompts that decode together."""
    _, folder = make_tiled(tmp_path, "hub")
    model, processor = load(options(model=str(folder)), world)

    def logps(examples):
        batch = data.collate(examples, processor)
        return data.pad_by_sequence(model(batch, model.vision_tower(batch.pixels)), batch.answer,
                                    batch.token_shape)[0].sum(1)
    records = [row(i, one.get("image"), one["conversations"][0]["value"], ["a red circle", "no", "yes, yes"])
               for i, one in enumerate(TILED)]
    examples, _ = tiled_examples(tmp_path, records, processor, "answers")
    separate = [logps([dataclasses.replace(e, answers=[answer], token_masks=[mask])])
                for e in examples for answer, mask in zip(e.answers, e.token_masks)]
    torch.testing.assert_close(logps(examples), torch.cat(separate), rtol=0, atol=3e-5)

    prompts, _ = tiled_examples(tmp_path, records, processor, "prompt")
    batches = [data.collate(prompts[i:i + 3], processor) for i in range(0, len(prompts), 3)]
    joined = data.join_prompts(batches, processor.tile_tokens)
    features = [model.vision_tower(batch.pixels) for batch in batches]

    def answers(batch, features):
        return network.generate(model, batch, features, 6, processor.end_ids, processor.banned)[0]
    assert answers(joined, torch.cat(features)) == sum(map(answers, batches, features), [])


BAD_BIN = {  # what is written in place of the tensors, and what the error says
    "before PyTorch 1.6": lambda found, path: torch.save(found, path, _use_new_zipfile_serialization=0),
    "it is cut short": lambda found, path: os.truncate(path, 10_000),
    "under 'state_dict'": lambda found, path: torch.save({"state_dict": found}, path)}


@pytest.mark.parametrize("said", BAD_BIN)
def test_a_bin_file_that_cannot_be_mapped_is_refused(said, world, tmp_path):
    _, folder = original(tmp_path, ".bin")
    path = folder / "pytorch_model-00001-of-00002.bin"
    BAD_BIN[said](torch.load(path), path)
    with pytest.raises(fsdp.UserError, match=f"{path}: .*{said}"):
        load(options(model=str(folder)), world)


@pytest.mark.parametrize("full_clip, tied", [(True, True), (False, False)])
def test_a_llama_and_a_clip_get_a_new_projector(full_clip, tied, place, world, tmp_path):
    """New embeddings are the mean of the old, the projector is drawn by the seed. full_clip: with text."""
    llm, clip = tmp_path / "llm", tmp_path / "clip"
    tokenizer = tiny.make_tokenizer(llm, specials=False)
    text = tiny.randomise(hf.LlamaForCausalLM(tiny.llama_config(tokenizer, tie_word_embeddings=tied)))
    text.save_pretrained(llm)
    tower = hf.CLIPVisionModel(tiny.clip_config())
    if full_clip:
        tower = hf.CLIPModel(hf.CLIPConfig(vision_config=tiny.clip_config().to_dict(), text_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}))
    tiny.randomise(tower, 9).save_pretrained(clip)
    args = options(llm=str(llm), clip=str(clip))
    model, exported, batch = assert_parity(args, world, place / "images", tmp_path / "out")
    state, old, new = exported.state_dict(), len(tokenizer), -(-(len(tokenizer) + 2) // 64) * 64
    for name, tensor in text.state_dict().items():
        ours = state[name.replace("model.", "model.language_model.", 1)]
        if "embed_tokens" in name or "lm_head" in name:
            assert ours.shape[0] == new > old
            assert torch.allclose(ours[old:], tensor.mean(0).expand(new - old, -1), atol=1e-6)
            ours = ours[:old]
        assert torch.equal(ours, tensor), name
    ours, theirs = exported.model.vision_tower.state_dict(), tower.state_dict()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name if name in theirs else f"vision_model.{name}"]), name
    weight = state["model.multi_modal_projector.linear_1.weight"]
    assert 0.015 < weight.std() < 0.025 and not state["model.multi_modal_projector.linear_1.bias"].any()
    other, _ = load(options(llm=str(llm), clip=str(clip), seed=1), world)
    assert not torch.equal(fsdp.full_tensor(other.multi_modal_projector.linear_1.weight), weight)
    again, processor = load(options(model=str(tmp_path / "out"), template="auto"), world)
    assert torch.equal(our_logits(again, batch), our_logits(model, batch))
    assert not processor.banned.isdisjoint(range(old, new))


def test_an_export_in_several_files_has_an_index(place, world, tmp_path):
    """No file is larger than file_bytes, the index names every tensor, and one file may take their place."""
    args, out = options(model=str(place / "model")), tmp_path / "out"
    _, exported, batch = assert_parity(args, world, place / "images", out, file_bytes=60_000)
    files = {path.name: load_file(path) for path in sorted(out.glob("model-*.safetensors"))}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [sum(t.nbytes for t in held.values()) for held in files.values()]
    assert len(files) > 2 and max(sizes) <= 60_000 and index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    assert all(file.endswith(f"of-{len(files):05}.safetensors") for file in files)
    args = options(model=str(out), out=str(out))
    fsdp.export(*load(args, world), args, world)
    assert torch.equal(their_logits(reload(out), batch), their_logits(exported, batch))


def test_an_export_in_bf16(place, world, tmp_path):
    """Trained weights are fp32 until then; config.json says bf16."""
    out = tmp_path / "out"
    args = options(model=str(place / "model"), dtype="bf16", out=str(out))
    model, processor = load(args, world, trainable=["language_model."])
    dtypes = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {"vision_tower": torch.bfloat16, "multi_modal_projector": torch.bfloat16,
                      "language_model": torch.float32}
    out.mkdir()
    fsdp.export(model, processor, args, world)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    expected = load_file(place / "model" / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    batch = batch_of(processor, place / "images")
    assert_close(our_logits(model, batch), their_logits(reload(out, torch.bfloat16), batch), 3e-2)


def test_weights_that_do_not_fit_are_listed(world, tmp_path):
    """Missing, extra and misshapen tensors at once; an absent file, quantised weights and sizes alone."""
    tiny.make_model(tmp_path, files=2)
    os.rename(tmp_path / "model-00002-of-00002.safetensors", tmp_path / "moved")
    with pytest.raises(fsdp.UserError, match="model-00002-of-00002.safetensors: named by the index"):
        load(options(model=str(tmp_path)), world)
    tensors = load_file(tmp_path / "model-00001-of-00002.safetensors") | load_file(tmp_path / "moved")
    del tensors["multi_modal_projector.linear_1.bias"], tensors["language_model.lm_head.weight"]
    norm, extra = "language_model.model.norm.weight", "language_model.model.layers.1.mlp.in_proj.weight"
    write(tmp_path, tensors | {norm: torch.ones(33), extra: torch.ones(2, 3)})
    with pytest.raises(fsdp.UserError, match="do not fit its config.json") as error:
        load(options(model=str(tmp_path)), world)
    assert str(error.value).split("\n  ")[1:] == [
        "missing: language_model.lm_head.weight (382, 32)",
        "missing: multi_modal_projector.linear_1.bias (32,)", f"not known: {extra} (2, 3)",
        f"shape: {norm} is (33,), need (32,)"]
    write(tmp_path, tensors | {norm: torch.ones(32, dtype=torch.int8)})
    with pytest.raises(fsdp.UserError, match=f"{norm} is I8, as in quantised weights"):
        load(options(model=str(tmp_path)), world)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, name, value in (
            ("text_config", "num_hidden_layers", 10**6), ("text_config", "vocab_size", 10**9),
            ("vision_config", "num_hidden_layers", 1), ("vision_config", "image_size", 10**6)):
        text = json.dumps({**config, part: {**config[part], name: value}})
        (tmp_path / "config.json").write_text(text)  # no model of that size is created
        with pytest.raises(fsdp.UserError, match="need the config.json of these weights"):
            load(options(model=str(tmp_path)), world)


# ---- gradients, learning rate, memory ----

def test_gradients_are_clipped_to_a_norm(place, world):
    """Below it they stay as they are, to the bit. The norm before is returned, NaN where a gradient is."""
    model, processor = load(options(model=str(place / "model")), world, ("language_model.",))
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(processor, place / "images")
    model(batch, model.vision_tower(batch.pixels)).sum().backward()
    before = [p.grad.full_tensor().clone() for p in parameters]
    norm = torch.cat([grad.flatten() for grad in before]).norm().item()
    assert fsdp.clip_gradients(parameters, 2 * norm) == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(p.grad.full_tensor(), grad) for p, grad in zip(parameters, before))
    assert fsdp.clip_gradients(parameters, norm / 2) == pytest.approx(norm, rel=1e-5)
    for p, grad in zip(parameters, before):
        torch.testing.assert_close(p.grad.full_tensor(), grad / 2, rtol=1e-4, atol=0)
    parameters[0].grad.to_local()[:1] = torch.nan
    assert math.isnan(fsdp.clip_gradients(parameters, norm))


def test_schedule_by_hand():
    """Linear warm-up to the peak, half of it halfway down the cosine, nearly nothing at the last step."""
    assert [fsdp.schedule(step, 24, 4) for step in (0, 3)] == pytest.approx([1 / 5, 4 / 5])
    assert [fsdp.schedule(step, 24, 4) for step in (4, 9, 14, 19)] == pytest.approx(
        [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
    assert 0 < fsdp.schedule(23, 24, 4) < 0.01
    assert fsdp.schedule(0, 100, 0.03) == pytest.approx(1 / 4)  # below 1: a share of all steps
    assert fsdp.schedule(0, 10, 0) == 1


def measure_loading(folder):
    """Writes by how many bytes of anonymous memory each rank grows, at most, while it loads."""
    world, args, seen, loaded = fsdp.launch(options()), options(model=str(folder)), [], threading.Event()

    def watch():
        while not loaded.wait(0.001):
            with open("/proc/self/status") as f:
                seen.append(next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon")))
    thread = threading.Thread(target=watch)
    thread.start()
    while not seen:
        time.sleep(0.001)
    _ = fsdp.build(fsdp.open_checkpoint(args, world), args, world)
    loaded.set()
    thread.join()
    world.on_rank0(fsdp.write_json, str(folder / "peaks.json"), world.gather(max(seen) - seen[0]))
    dist.destroy_process_group()


def test_a_rank_loads_its_own_shards_only(tmp_path):
    """Of 150 MB on two ranks each has half; loading all of it on a rank takes at least its size."""
    tiny.make_model(tmp_path, hidden_size=512, intermediate_size=2048, num_hidden_layers=9)
    size = os.path.getsize(tmp_path / "model.safetensors")
    assert tiny.spread(functools.partial(measure_loading, tmp_path), 2).code == 0
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    assert all(0.4 * size < peak < 0.75 * size for peak in peaks), (peaks, size)


# ---- resuming ----

def on(date):
    """strftime_now() of chat templates gives `date` from now on."""
    import transformers.utils.chat_template_utils as utils
    utils.datetime = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda form: date))


def sft(folder, out, *argv, date="Monday"):
    """Three steps, whose prompts contain the date."""
    files = ["--data", folder / "rows.json", "--eval_data", folder / "text.json", folder / "pairs.json"]
    return tiny.fork("sft", "--model", folder / "model", *files, "--images", folder / "images", "--out", out,
                     *"--max_steps 3 --batch_size 4 --micro_batch 2 --save_every 1".split(), *argv,
                     prepare=functools.partial(on, date))


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A copy of `place` with a run in out/."""
    folder = tmp_path_factory.mktemp("finished") / "place"
    tiny.shutil.copytree(place, folder, ignore=tiny.shutil.ignore_patterns("trained"))
    template = folder / "model" / "chat_template.jinja"
    edit(template, "{{- bos_token -}}", "{{- bos_token + strftime_now('%A') -}}")
    done = sft(folder, folder / "out")
    assert done.code == 0, done.err
    return folder


class Attack:
    def __reduce__(self):
        return open, ("attacked", "w")


def forge(path):
    """Data that dcp.load would unpickle: it is said to be bytes, not a tensor."""
    found = pickle.loads(path.read_bytes())
    bytes_ = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    found.state_dict_metadata = dict.fromkeys(found.state_dict_metadata, bytes_)
    path.write_bytes(pickle.dumps(found))


def nudge(path):
    """One weight of a layer is another; the file's size is the same."""
    tensors = load_file(path)
    tensors["language_model.model.layers.0.mlp.up_proj.weight"] *= 1.01
    tiny.write(path.parent, tensors)


STEP, METADATA = "out/checkpoints/step_3/__0_0.distcp", "out/checkpoints/step_3/.metadata"
DAMAGED = "step_3 is damaged .*: remove it, and --resume goes on from step 2"
CHANGES = {  # a file that a resume reads, how it changes, what the error says
    "order": ("rows.json", lambda path: tiny.write_rows(path, [*MIXED[1:], MIXED[0]]), "rows.json .*changed"),
    "word": ("rows.json", lambda path: edit(path, "a star", "a stars"), "rows.json .* changed since the run"),
    "held out": ("pairs.json", lambda path: tiny.write_rows(path, MIXED[:3]), "pairs.json .* changed since"),
    "image": ("images/p0.png", lambda path: path.write_bytes(path.with_name("p3.png").read_bytes()), "rows"),
    "weights": ("model/model.safetensors", nudge, "the checkpoint of --model changed since the run began"),
    "tokenizer": ("model/tokenizer.json", lambda path: tiny.swap_tokens(path.parent), "--model changed"),
    "template": ("model/chat_template.jinja", lambda path: edit(path, "USER", "U"), "--model changed since"),
    "time": ("model/model.safetensors", os.utime, ""),
    "format": ("rows.json", lambda path: path.write_text("\n".join(map(json.dumps, MIXED))), ""),
    "options": ("out/args.json", lambda path: os.truncate(path, 90), "args.json is damaged .*or remove it"),
    "option that is gone": ("out/args.json", lambda path: edit(path, '"lr":', '"adam_beta2": 0.98, "lr":'),
                            "--adam_beta2 0.98 then, which is no option now"),
    "data truncated": (STEP, lambda path: os.truncate(path, 2000), DAMAGED),
    "data overwritten": (STEP, lambda path: path.write_bytes(bytes(10**6)), DAMAGED),
    "no metadata": (METADATA, os.remove, DAMAGED),
    "metadata truncated": (METADATA, lambda path: os.truncate(path, 100), DAMAGED),
    "code for metadata": (METADATA, lambda path: path.write_bytes(pickle.dumps(Attack())), DAMAGED),
    "bytes for tensors": (METADATA, forge, DAMAGED)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_notices_what_has_changed(change, finished, tmp_path, monkeypatch):
    """But not how records are written, or what day it is. No code in a checkpoint is run."""
    monkeypatch.chdir(tmp_path)
    name, spoil, said = CHANGES[change]
    content = (finished / name).read_bytes()
    spoil(finished / name)
    done = sft(finished, finished / "out", "--resume", date="Tuesday")
    (finished / name).write_bytes(content)
    assert done.code == (2 if said else 0) and re.search(said, done.error) and "Trace" not in done.err, done
    assert not any(tmp_path.iterdir())


def test_a_resume_goes_on_from_what_is_complete(finished, tmp_path):
    """The last folder named as a step, complete lines of the log; other names stay, as with --overwrite."""
    out, foreign = tmp_path / "out", ("step_2_keep", "step_", "step_-1", "step_0001")
    tiny.shutil.copytree(finished / "out", out)
    first, *others = (out / "log.jsonl").read_text().splitlines(keepends=True)
    damaged = ['{"step": 2, "lo\n', "7\n", '{"step": "3"}\n', "[" * 99999 + "\n"]
    (out / "log.jsonl").write_text("".join([first, *damaged, *others, others[-1], "\0" * 999, '{"step": 4']))
    for name in foreign:
        os.rename(out / "checkpoints" / "step_3", out / "checkpoints" / name)
        tiny.shutil.copytree(out / "checkpoints" / "step_2", out / "checkpoints" / "step_3")
    tiny.shutil.rmtree(out / "checkpoints" / "step_3")
    os.remove(out / "args.json")
    for option in "--resume", "--overwrite":
        done = sft(finished, out, option)
        assert done.code == 0 and ("dropped 5 damaged lines" in done.out) == (option == "--resume"), done
        assert {path.name for path in (out / "checkpoints").iterdir()} == {*foreign, "step_2", "step_3"}
        assert tiny.log(out) == tiny.log(finished / "out")


def test_a_resume_notices_what_a_reward_function_reads(place, tmp_path):
    """It may read any field of a record; its own code counts, too."""
    tiny.write_rows(tmp_path / "rows.json", [{**record, "gold": 1} for record in tiny.ONE_TURN])
    (tmp_path / "rewards.py").write_text(
        "def gold(record, texts):\n    return [1.0 * record['gold']] * len(texts)\n")
    argv = ["--model", place / "model", "--data", tmp_path / "rows.json", "--images", place / "images",
            "--out", tmp_path / "out", "--reward_model", f"{tmp_path}/rewards.py:gold", "--critic",
            "policy", *"--batch_size 4 --rollout_batch 4 --max_new_tokens 4 --max_steps 1".split()]
    assert tiny.fork("ppo", *argv).code == tiny.fork("ppo", *argv, "--resume").code == 0
    for name, old, new in ("rewards.py", "1.0 *", "2.0 *"), ("rows.json", '"gold": 1', '"gold": 2'):
        edit(tmp_path / name, old, new)
        done = tiny.fork("ppo", *argv, "--resume")
        assert done.code == 2 and f"cannot resume: the file {tmp_path / name} changed" in done.error, done.err
        edit(tmp_path / name, new, old)


def test_a_second_run_on_the_same_out_is_refused(place, tmp_path):
    """The first one has a lock, which ends with it."""
    for script, lock in ("sft", tmp_path / "out" / ".lock"), ("predict", tmp_path / "answers.jsonl"):
        fsdp.lock(str(lock))
        done = tiny.fork(script, "--model", place / "model", "--data", place / "rows.json", "--images",
                         place / "images", "--overwrite", "--out",
                         lock if script == "predict" else lock.parent)
        assert done.code == 2 and f"another run holds {lock}" in done.error, done.err
        tiny.unwatch()
    assert not [*tmp_path.iterdir()]


# ---- the hub ----

@pytest.fixture
def hub(tmp_path):
    """A server that plays the hub over tmp_path/hub. `main` is another commit at every request; org/gated and
    org/private are what they are called. → environment, requests so far"""
    folder, requests = tmp_path / "hub", []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            path = self.path.partition("?")[0]
            asked = re.fullmatch("(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
            status, content, headers = 404, b"", {}  # the library's own affairs
            if asked:
                requests.append((self.command, path))
                status, content, headers = self.answer(*asked.groups())
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def answer(self, repo, what, revision, name):
            headers = {"X-Repo-Commit": revision if len(revision) == 40 else f"{len(requests):040x}"}
            files = {str(path.relative_to(folder / repo)): path.read_bytes()
                     for path in (folder / repo).rglob("*") if path.is_file()}
            if "private" in repo or not files:
                return 401, b"", {"X-Error-Code": "RepoNotFound"}
            if "gated" in repo and what == "resolve":
                return 403, b"", {"X-Error-Code": "GatedRepo", **headers}
            if what == "resolve":
                headers["ETag"] = f'"{hashlib.sha256(files[name]).hexdigest()}"'
                return 200, files[name], headers
            about = {"sha": headers["X-Repo-Commit"], "siblings": [{"rfilename": name} for name in files]}
            tree = [{"type": "file", "path": name, "oid": "0" * 40, "size": len(content)}
                    for name, content in files.items()]
            return 200, json.dumps(tree if what == "tree" else {"id": repo, **about}).encode(), headers

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}, requests
    server.shutdown()


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
    """FETCH in processes that share the cache of their node. nodes: ranks of each. → what each rank prints"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, processes = [(node, local) for node, n in enumerate(nodes) for local in range(n)], []
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


def test_a_node_fetches_one_snapshot_once(tmp_path, hub):
    """Only what is needed, of one commit though `main` moves. Afterwards it is there offline."""
    nodes, folder, (env, requests) = (1, 2), tmp_path / "hub" / "org" / "tiny", hub
    tiny.make_model(folder, files=2)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "README.md"):
        (folder / name).write_bytes(b"not needed")
    said = fetch(["org/tiny"], tmp_path, env, nodes)
    files = [path.rpartition("/")[2] for kind, path in requests if kind == "GET" and "/resolve/" in path]
    assert Counter(files) == Counter({name: len(nodes) for name in NEEDED})
    commit, *files = said[0][-1].split()
    assert all(lines[-1] == said[0][-1] for lines in said) and {*files} == NEEDED
    assert [len(lines) for lines in said] == [2, 2, 1]  # a node's first rank says what it downloads
    assert re.fullmatch(f"org/tiny, commit {commit}: downloading 0.00 GB, 2 files", said[0][0])
    requests.clear()
    said = fetch(["org/tiny"], tmp_path, {**env, "HF_HUB_OFFLINE": "1"}, nodes)
    assert [lines[-1].split() for lines in said] == [[commit, *files]] * 3 and not requests


def test_what_the_hub_cannot_give_is_said(tmp_path, hub):
    """In one line each. What cannot be a hub id is not asked for."""
    env, requests = hub
    for repo, names in (("old", ("config.json", "pytorch_model.bin", "optimizer.bin")),
                        ("gated", ("config.json",)), ("gguf", ("config.json", "q4.gguf"))):
        (tmp_path / "hub" / "org" / repo).mkdir(parents=True)
        for name in names:
            (tmp_path / "hub" / "org" / repo / name).write_text(json.dumps({"file": name}))
    names = "nothing", "./x/y", "org/gated", "org/private", "org/gguf", "org/old@v1"
    *no_ids, gated, private, gguf, downloading, old = fetch(names, tmp_path, env)[0]
    assert len(no_ids) == 2 and all("there is no such folder" in line for line in no_ids)
    assert not [path for _, path in requests if "/org/" not in path]
    assert "licence accepted at http://" in gated and "/org/gated: do so, then set HF_TOKEN" in gated
    assert "no such folder, and the hub has none of this name, or a private one: set HF_TOKEN" in private
    assert "need weights; it holds config.json, q4.gguf" in gguf and "downloading" in downloading
    assert old.split()[1:] == ["config.json", "pytorch_model.bin"]
    next(tmp_path.rglob("snapshots/*/pytorch_model.bin")).unlink()
    part, none = fetch(["org/old@v1", "org/none"], tmp_path, {**env, "HF_HUB_OFFLINE": "1"})[0]
    assert "need weights, but the hub cannot be asked (HF_HUB_OFFLINE?), and its cache has no" in part
    assert "HF_HUB_OFFLINE is set while" in none


def test_progress_is_printed_every_ten_seconds(monkeypatch, capsys):
    """Items of 4 s; an iterator's number is given."""
    clock = [0.0]
    monkeypatch.setattr(fsdp.data.time, "time", lambda: clock[0])
    for items, count in ([*range(8)], None), (iter(range(8)), 8):
        for _ in fsdp.data.progress(items, "items", count):
            clock[0] += 4
        assert capsys.readouterr().out == "items: 3/8, 20 s left\nitems: 6/8, 8 s left\n"
    log, items = SimpleNamespace(first=4), [1, 2]  # a run that goes on after step 4
    assert fsdp.Log.progress(log, items, 6, "items") is items
    assert fsdp.Log.progress(log, items, 5, "items") is not items


@pytest.mark.parametrize("terminal, shown", [
    (True, [1, 3, 4, 6, 8, 10, 12, 14, 16, 17, 19, 21, 23, 24]), (False, [1, 4, 10, 17, 20, 24])])
def test_terminal_lines_come_at_a_pace(terminal, shown, world, monkeypatch, capsys, tmp_path):
    """Steps of 0.6 s, step 17 of 11 s, step 4 with an evaluation. log.jsonl has all."""
    clock = [0.0]
    monkeypatch.setattr(fsdp.time, "time", lambda: clock[0])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    log = fsdp.Log(SimpleNamespace(out=str(tmp_path), wandb=None), world, 24, 0)
    for step in range(1, 25):
        clock[0] += 11 if step == 17 else 0.6
        log.step(step, 9, 0.6, loss=1.0, **({"eval_loss": 2.0} if step == 4 else {}))
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0]) for line in printed] == shown and "eval_loss 2" in printed[shown.index(4)]
    assert [line["step"] for line in tiny.log(tmp_path)] == [*range(1, 25)]
