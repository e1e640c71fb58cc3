"""fsdp.py: checkpoints in and out against transformers, two ranks against one, kill and resume, memory.

`peer` is transformers' model with the same weights. A run is sft.py's own main, in forked processes
(tiny.py). Everything is fp32 on the CPU, over gloo, unless a test says otherwise.
"""
import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny import HUB, MEMORY, MIXED, NEW, ORIGINAL, fork, named, write
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

import data
import fsdp


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a checkpoint, pictures and rows."""
    folder = tmp_path_factory.mktemp("fsdp")
    tiny.make_model(folder / "model")
    tiny.make_images(folder / "images")
    tiny.write_rows(folder / "rows.json", MIXED)
    return folder


@pytest.fixture(scope="module")
def world():
    """This process as a world of one."""
    world = fsdp.launch(options())
    yield world
    dist.destroy_process_group()


def options(**changes):
    parser = argparse.ArgumentParser()
    fsdp.arguments(parser)
    args = parser.parse_args([])
    vars(args).update({"template": "vicuna", "images": "", **changes})
    return args


def batch_of(processor, images):
    """A picture, two pictures and text alone, padded to the longest."""
    rows = [MIXED[0], MIXED[2], MIXED[1]]
    conversations = [(i, data.read_row(row, str(images))) for i, row in enumerate(rows)]
    return data.collate(data.build_examples(conversations, processor, "turns")[0], processor)


@torch.no_grad()
def our_logits(model, batch):
    everywhere = torch.arange(batch.ids.numel())
    logits = model.states(batch, model.vision_tower(batch.pixels), everywhere, F.linear)
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


def reload(folder, dtype=torch.float32):
    """transformers' model from an exported folder; nothing missing, nothing left over."""
    load = hf.LlavaForConditionalGeneration.from_pretrained
    peer, info = load(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return peer.eval()


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


def original(folder, tokenizer, kind, projector="mlp2x_gelu"):
    """An original LLaVA (config of its LLaMA with mm_*, weights in a .bin or safetensors) and its CLIP."""
    clip, llava = folder / "clip", folder / "llava"
    clip.mkdir()
    llava.mkdir()
    tiny.make_tokenizer(llava, specials=False)
    peer = tiny.make_peer(tokenizer)
    config = hf.LlamaConfig(**{**peer.config.text_config.to_dict(), "vocab_size": len(tokenizer) - 2})
    config = {**config.to_dict(), "model_type": "llava", "mm_vision_tower": str(clip), "mm_hidden_size": 24,
              "mm_projector_type": projector, "mm_vision_select_layer": -2,
              "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
    (llava / "config.json").write_text(json.dumps(config))
    write_clip(clip, peer)
    tensors = named(peer, ORIGINAL)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:len(tokenizer) - 2].clone()
    if projector == "linear":
        tensors = {name: tensor for name, tensor in tensors.items() if "mm_projector.2" not in name}
        tensors = {name.replace("mm_projector.0.", "mm_projector."): t for name, t in tensors.items()}
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


@pytest.mark.parametrize("kind", ["safetensors", ".bin", "old .bin", "two .bin"])
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


def test_a_tower_in_an_original_llava_is_the_one_used(world, tmp_path):
    """A tuned tower among an original LLaVA's weights comes before the CLIP that it was tuned from."""
    peer, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    tensors = load_file(folder / "model.safetensors")
    tower = named(peer, {"model.vision_tower.": "model.vision_tower.vision_tower.vision_model."})
    tower = {name: tensor + 1 for name, tensor in tower.items()}
    write(folder, {**tensors, **tower})
    model, _ = load(options(model=str(folder)), world)
    name = "vision_model.pre_layrnorm.weight"
    ours = dict(model.vision_tower.named_parameters())[name].full_tensor()
    assert torch.equal(ours, tower[f"model.vision_tower.vision_tower.{name}"])


def test_an_original_linear_projector_is_read(place, world, tmp_path):
    """model.mm_projector.weight alone: one layer, exported with the identity behind it."""
    peer, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), ".bin", "linear")
    model, exported, batch = round_trip(options(model=str(folder)), world, place / "images", tmp_path / "out")
    assert_close(our_logits(model, batch), their_logits(exported, batch))
    theirs = exported.model.multi_modal_projector
    assert torch.equal(theirs.linear_1.weight, peer.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(theirs.linear_2.weight, torch.eye(32))


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("whole_clip", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_and_a_clip_get_a_fresh_projector(projector, whole_clip, tied, place, world, tmp_path):
    """Every tensor of both arrives, the vocabulary grows by mean rows, the projector is keyed by the seed;
    the export loads in transformers, in our loader and in AutoProcessor."""
    llm, clip = tmp_path / "llm", tmp_path / "clip"
    tokenizer = tiny.make_tokenizer(llm, specials=False)
    text = tiny.randomise(hf.LlamaForCausalLM(tiny.llama_config(tokenizer, tie_word_embeddings=tied)))
    text.save_pretrained(llm)
    peer = tiny.make_peer(tiny.make_tokenizer(tmp_path))
    clip.mkdir()
    write_clip(clip, peer, whole_clip)
    args = options(llm=str(llm), clip=str(clip), projector=projector)
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
    other, _ = load(options(llm=str(llm), clip=str(clip), projector=projector, seed=1), world)
    assert not torch.equal(other.multi_modal_projector.linear_1.weight.full_tensor(), drawn)

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
    "extra": (lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.ones(2, 3)}),
              "not known: language_model.model.layers.7.mlp.up_proj.weight (2, 3)"),
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

ALL = {"projector": "multi_modal_projector.", "llm": "language_model.", "vision": "vision_tower."}


def gradients_of(place, world, dtype):
    """A model's gradients after two micro-batches, and its trained parameters."""
    model, processor = load(options(model=str(place / "model"), dtype=dtype), world, tuple(ALL.values())[:2])
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(processor, place / "images")
    for weight in (1, 3):
        (weight * model(batch, model.vision_tower(batch.pixels)).sum()).backward()
    return [p.grad.full_tensor().clone() for p in parameters], parameters


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_world_of_one_reduces_in_place(dtype, place, world, monkeypatch):
    """FSDP asks for memory twice a unit and gets the same; gradients are those that it makes by itself."""
    made, allocate = [], fsdp.OneBuffer.allocate

    def recorded(self, *args, **kwargs):
        made.append(allocate(self, *args, **kwargs))
        return made[-1]
    monkeypatch.setattr(fsdp.OneBuffer, "allocate", recorded)
    found, _ = gradients_of(place, world, dtype)
    assert len(made) == 2 * 2 * (2 + 1 + 1)  # micro-batches; two layers, the LLaMA's root, the projector
    assert all(a is b for a, b in zip(made[::2], made[1::2])) and len({id(a) for a in made}) == len(made) / 2
    monkeypatch.setattr(fsdp, "OneBuffer", DefaultReduceScatter)
    expected, _ = gradients_of(place, world, dtype)
    assert all(grad.any() for grad in found) and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_clip_gradients(place, world):
    """Up to the limit gradients stay as they are, to the bit; beyond it their norm becomes the limit, and NaN
    reaches all of them. Returned is the norm before."""
    whole, parameters = gradients_of(place, world, "fp32")
    norm = torch.cat([grad.flatten() for grad in whole]).norm().item()
    for limit in (0, 2 * norm):
        assert fsdp.clip_gradients(parameters, limit) == pytest.approx(norm, rel=1e-5)
        assert all(torch.equal(p.grad.full_tensor(), grad) for p, grad in zip(parameters, whole))
    assert fsdp.clip_gradients(parameters, norm / 2) == pytest.approx(norm, rel=1e-5)
    for p, grad in zip(parameters, whole):
        torch.testing.assert_close(p.grad.full_tensor(), grad / 2, rtol=1e-4, atol=0)
    parameters[0].grad.to_local()[:1] = torch.nan
    assert math.isnan(fsdp.clip_gradients(parameters, norm))
    assert all(p.grad.full_tensor().isnan().all() for p in parameters)


# ---- two ranks and one ----

CASES = {  # options of a run of 5 steps; what each is there for is in the tests below
    "plain": ["--batch_size", 6, "--micro_batch", 2],
    "micro 1": ["--batch_size", 8, "--micro_batch", 1, "--group_by_length", "no"],
    "micro 8": ["--batch_size", 8, "--micro_batch", 8, "--group_by_length", "no"],
    "empty": ["--batch_size", 5, "--micro_batch", 2],
    "one row": ["--batch_size", 1, "--micro_batch", 1],
    "text": ["--batch_size", 4, "--micro_batch", 2, "--data", "text.json"],
    "all text": ["--batch_size", 4, "--micro_batch", 2, "--data", "all_text.json"],
    "projector": ["--batch_size", 4, "--micro_batch", 2, "--train", "projector", "--data", "text.json"],
    "llm": ["--batch_size", 5, "--micro_batch", 2, "--train", "llm"],
    "vision": ["--batch_size", 5, "--micro_batch", 2, "--train", "vision"],
    "all": ["--batch_size", 5, "--micro_batch", 2, "--train", "projector,llm,vision"],
    "recompute": ["--batch_size", 5, "--micro_batch", 2, "--train", "projector,llm,vision", "--recompute"],
    "tied": ["--batch_size", 6, "--micro_batch", 2, "--model", "tied"],
    "evaluated": ["--batch_size", 6, "--micro_batch", 2, "--eval_data", "rows.json", "--eval_every", 2],
    "replicas": ["--batch_size", 6, "--micro_batch", 2, "--replicas", 2],
}


def run_case(name, ranks, place):
    """sft.py's main with a case's options, which records the first step's gradients."""
    import sft
    first, clip = {}, fsdp.clip_gradients

    def recording_clip(parameters, largest):
        if not first:
            names = {id(p): name for name, p in models[-1].named_parameters()}
            first.update({names[id(p)]: p.grad.full_tensor().clone() for p in parameters})
        return clip(parameters, largest)

    models, build = [], fsdp.build

    def recording_build(*args, **kwargs):
        models.append(build(*args, **kwargs))
        return models[-1]

    fsdp.clip_gradients, fsdp.build = recording_clip, recording_build
    replicas = {"1": ["--replicas", 1]}.get(str(ranks), []) if name == "replicas" else []
    out = place / f"{name}-{ranks}"
    sys.argv = ["sft.py", "--model", "model", "--data", "rows.json", "--images", "images", "--out", str(out),
                "--max_steps", "5", "--lr", "1e-2", "--workers", "0", "--save_every", "0",
                *map(str, [*CASES[name], *replicas])]
    sft.main()
    if dist.get_rank() == 0:
        torch.save(first, out / "gradients.pt")
    fsdp.clip_gradients, fsdp.build = clip, build


def run_cases(ranks, place):
    """All cases in one process group, which starts once."""
    start = dist.init_process_group
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or start(*args, **kwargs)
    os.chdir(place)
    for name in CASES:
        run_case(name, ranks, place)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def runs(place):
    """Every case on one rank and on two. → (case, ranks) → its gradients, log and weights"""
    tiny.make_model(place / "tied", tie_word_embeddings=True)
    tiny.write_rows(place / "text.json", [MIXED[1], MIXED[7], MIXED[3], MIXED[5]])  # the short ones are text
    tiny.write_rows(place / "all_text.json", [MIXED[1], MIXED[7], MIXED[4], MIXED[1]])
    done = {ranks: tiny.spread(functools.partial(run_cases, ranks, place), ranks) for ranks in (1, 2)}

    @functools.cache
    def read(name, ranks):
        out = place / f"{name}-{ranks}"
        assert (out / "gradients.pt").exists(), done[ranks].err
        return torch.load(out / "gradients.pt"), tiny.log(out), load_file(out / "model.safetensors")
    return read


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    """Relative norms, tensor by tensor. Where a gradient is zero but for rounding (a key's bias has none),
    relative to the largest."""
    assert ours.keys() == theirs.keys() and ours
    floor = 1e-3 * max(tensor.norm() for tensor in theirs.values())
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= tolerance * max(tensor.norm(), floor), name


def assert_same_trace(ours, theirs, tolerance=1e-5):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5]
    for a, b in zip(ours, theirs):
        for key in ("loss", "grad_norm", "lr"):
            assert abs(a[key] - b[key]) <= tolerance * abs(b[key]), (key, a, b)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_does(case, runs):
    """Gradients of the first step, and losses and gradient norms of five, are equal to rounding: with unequal
    lengths, micro-batches without a picture or a row, every part frozen in turn, and two replicas."""
    (ours, trace, _), (theirs, expected, _) = runs(case, 2), runs(case, 1)
    assert_same_gradients(ours, theirs)
    assert_same_trace(trace, expected)


def test_accumulation_is_the_larger_batch(runs):
    """Eight micro-batches of one row are one of eight, on one rank and on two."""
    gradients, trace, _ = runs("micro 8", 1)
    for ranks in (1, 2):
        assert_same_gradients(runs("micro 1", ranks)[0], gradients)
        assert_same_trace(runs("micro 1", ranks)[1], trace)


def test_recomputed_activations_change_nothing(runs):
    """--recompute: the same gradients and losses."""
    assert_same_gradients(runs("recompute", 1)[0], runs("all", 1)[0], 1e-6)
    assert_same_trace(runs("recompute", 1)[1], runs("all", 1)[1], 1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_between_steps_changes_nothing(ranks, runs):
    """With no-grad passes between steps, losses, gradients and weights are bit for bit those without."""
    gradients, trace, weights = runs("evaluated", ranks)
    expected = runs("plain", ranks)
    assert all(torch.equal(gradients[name], tensor) for name, tensor in expected[0].items())
    assert [line["step"] for line in trace if "eval_loss" in line] == [2, 4, 5]
    assert [{k: v for k, v in line.items() if k != "eval_loss"} for line in trace] == expected[1]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected[2].items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "case", ["plain", "projector", "llm", "vision", "all", "evaluated", "tied", "replicas"])
def test_what_is_trained_moves_and_nothing_else(case, ranks, place, runs):
    """After five steps every trained tensor is another, every frozen one the checkpoint's. Frozen too: what
    the forward pass never reaches (the tower's layers above the one read)."""
    gradients, _, weights = runs(case, ranks)
    before = load_file(place / ("tied" if case == "tied" else "model") / "model.safetensors")
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    train = {"plain": "projector,llm", "evaluated": "projector,llm", "tied": "projector,llm",
             "replicas": "projector,llm", "all": "projector,llm,vision"}.get(case, case)
    unreached = ("vision_tower.vision_model.post_layernorm", "vision_tower.vision_model.encoder.layers.1.")
    expected = {name for name in before if name.startswith(tuple(ALL[part] for part in train.split(",")))
                and not name.startswith(unreached)}
    assert moved == expected == gradients.keys()


def test_an_all_text_step_leaves_the_projector_alone(runs):
    """Zero-weighted pictures keep the ranks in step, and give the projector a gradient of exactly zero."""
    for ranks in (1, 2):
        gradients, _, _ = runs("all text", ranks)
        assert not any(t.any() for name, t in gradients.items() if name.startswith("multi_modal_projector"))
        assert any(t.any() for name, t in gradients.items() if name.startswith("language_model"))


def test_one_ranks_evaluation_is_two_ranks(runs):
    """Mean loss of the held-out rows, whatever the number of ranks."""
    for one, two in zip(runs("evaluated", 1)[1], runs("evaluated", 2)[1]):
        if "eval_loss" in one:
            assert abs(one["eval_loss"] - two["eval_loss"]) <= 1e-5 * one["eval_loss"]


# ---- killed and resumed ----

# 10 rows in steps of 4: an epoch is 3 steps, the last of them short; 3 epochs
EPOCHS = ["--batch_size", 4, "--micro_batch", 2, "--epochs", 3, "--lr", "1e-2", "--save_every", 1]


def sft_run(place, out, *argv, ranks=1, prepare=None, workers=0):
    files = ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images"]
    argv = [*files, "--out", out, "--workers", workers, *EPOCHS, *argv]
    return fork("sft", *argv, ranks=ranks, prepare=prepare)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(number, act):
    """Calls act() once a step's line is logged, before its checkpoint is saved."""
    log_step = fsdp.Log.step

    def step(self, step, *args, **figures):
        log_step(self, step, *args, **figures)
        if step == number:
            act()
    fsdp.Log.step = step


def in_save(number, where):
    """Dies in a step's save: before a byte is written, with the data written but not what completes them,
    with all written but not renamed, or renamed but the older checkpoint not removed."""
    module, name = {"before": (fsdp.dcp, "save"), "half": (fsdp.dcp.FileSystemWriter, "finish"),
                    "written": (os, "rename"), "renamed": (fsdp.shutil, "rmtree")}[where]
    original, save = getattr(module, name), fsdp.save_checkpoint

    def dying(*args, **kwargs):
        # the checkpoint's own rename and the removal of the older one, not dcp's and not the .part's
        mine = {"written": lambda: str(args[0]).endswith(f"step_{number}.part"),
                "renamed": lambda: str(args[0]).endswith(f"step_{number - 1}")}.get(where, lambda: True)()
        if mine:
            die()
        return original(*args, **kwargs)

    def save_checkpoint(args, world, step, *rest):
        if step == number:
            setattr(module, name, dying)
        save(args, world, step, *rest)
    fsdp.save_checkpoint = save_checkpoint


@pytest.fixture(scope="session")
def uninterrupted(place):
    @functools.cache
    def run(ranks):
        out = place / f"uninterrupted-{ranks}"
        done = sft_run(place, out, ranks=ranks)
        assert done.code == 0, done.err
        assert [line["step"] for line in tiny.log(out)] == list(range(1, 10))
        return out
    return run


def assert_same_run(out, expected):
    """Log and weights, bit for bit."""
    assert tiny.log(out) == tiny.log(expected)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert not list(out.glob("**/*.part"))


KILLS = {  # how the run dies; the step whose checkpoint is the last whole one
    "mid-epoch": (functools.partial(after_step, 3, die), 2),
    "at an epoch's end": (functools.partial(after_step, 4, die), 3),
    "in the second epoch": (functools.partial(after_step, 6, die), 5),
    "before the first save": (functools.partial(after_step, 1, die), None),
    "before a byte is saved": (functools.partial(in_save, 5, "before"), 4),
    "in the middle of a save": (functools.partial(in_save, 5, "half"), 4),
    "before the rename": (functools.partial(in_save, 5, "written"), 4),
    "after the rename": (functools.partial(in_save, 5, "renamed"), 5)}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_is_uninterrupted(kill, place, uninterrupted, tmp_path):
    """kill -9, then --resume: the loss trace and the weights are those of a run that went through."""
    prepare, last = KILLS[kill]
    out = tmp_path / "out"
    assert sft_run(place, out, prepare=prepare).code == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    assert (fsdp.checkpoint_steps(out) or [None])[-1] == last
    assert sft_run(place, out, "--resume").code == 0
    assert_same_run(out, uninterrupted(1))


@pytest.mark.parametrize("kill", ["in the second epoch", "in the middle of a save"])
def test_two_ranks_killed_and_resumed(kill, place, uninterrupted, tmp_path):
    """The same on two ranks; and one rank goes on from their checkpoint, equal to rounding."""
    prepare, last = KILLS[kill]
    out = tmp_path / "out"
    assert sft_run(place, out, prepare=prepare, ranks=2).code != 0
    assert fsdp.checkpoint_steps(out)[-1] == last
    tiny.shutil.copytree(out, tmp_path / "one")
    assert sft_run(place, out, "--resume", ranks=2).code == 0
    assert_same_run(out, uninterrupted(2))
    assert sft_run(place, tmp_path / "one", "--resume").code == 0
    for ours, theirs in zip(tiny.log(tmp_path / "one"), tiny.log(out), strict=True):
        for key, value in theirs.items():
            assert abs(ours[key] - value) <= 1e-4 * abs(value), (ours, theirs)


def send_term():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "ranks, term, workers", [(1, send_term, 0), (2, send_term, 0), (1, send_term, 2)])
def test_sigterm_saves_first(ranks, term, workers, place, uninterrupted, tmp_path):
    """SIGTERM: the step in hand is finished and saved, the run ends well, and --resume goes on from it."""
    out = tmp_path / "out"
    done = sft_run(place, out, "--save_every", 0, ranks=ranks, workers=workers,
                   prepare=functools.partial(before_step, 4, term))
    assert done.code == 0, done.err
    assert "stopped by SIGTERM after step 4" in done.out and fsdp.checkpoint_steps(out) == [4]
    assert not (out / "model.safetensors").exists()
    assert sft_run(place, out, "--resume", "--save_every", 0, ranks=ranks).code == 0
    assert_same_run(out, uninterrupted(ranks))


def before_step(number, act):
    """Calls act() in the middle of a step, on rank 0 alone."""
    clip, steps = fsdp.clip_gradients, []

    def clip_gradients(*args):
        steps.append(1)
        if len(steps) == number and dist.get_rank() == 0:
            act()
        return clip(*args)
    fsdp.clip_gradients = clip_gradients


def test_keep_and_save_every(place, tmp_path):
    """--save_every 2 --keep 3: of steps 2, 4, 6, 8 and the last, 9, three are kept."""
    assert sft_run(place, tmp_path / "out", "--save_every", 2, "--keep", 3).code == 0
    assert fsdp.checkpoint_steps(tmp_path / "out") == [6, 8, 9]


def test_a_finished_run_resumes_to_itself(place, uninterrupted, tmp_path):
    """--resume of what is done writes the same export again and not a step more."""
    tiny.shutil.copytree(uninterrupted(1), tmp_path / "out")
    os.remove(tmp_path / "out" / "model.safetensors")
    assert sft_run(place, tmp_path / "out", "--resume").code == 0
    assert_same_run(tmp_path / "out", uninterrupted(1))


def test_resume_with_other_options_is_refused(place, uninterrupted, tmp_path):
    """What would make it another run is named; what only concerns memory or saving may differ."""
    tiny.shutil.copytree(uninterrupted(1), tmp_path / "out")
    done = sft_run(place, tmp_path / "out", "--resume", "--lr", "2e-2", "--keep", 2, "--micro_batch", 1)
    assert done.code == 2 and "--lr 0.01 then, 0.02 now" in done.error
    assert "--keep" not in done.error and "--micro_batch" not in done.error
    assert tiny.log(tmp_path / "out") == tiny.log(uninterrupted(1))


def test_overwrite_starts_afresh(place, uninterrupted, tmp_path):
    """--overwrite leaves nothing of the earlier run: no checkpoint, log line or weights file."""
    out = tmp_path / "out"
    tiny.shutil.copytree(uninterrupted(1), out)
    save_file({"old": torch.ones(1)}, out / "model-00001-of-00002.safetensors")
    assert sft_run(place, out, "--overwrite", prepare=functools.partial(after_step, 2, die)).code != 0
    assert not list(out.glob("model*")) and not (out / "config.json").exists()
    assert [line["step"] for line in tiny.log(out)] == [1, 2] and fsdp.checkpoint_steps(out) == [1]


def test_what_a_run_leaves_behind(place, uninterrupted):
    """args.json: resolved arguments, versions, ranks; log.jsonl: unrounded figures of every step; nothing
    half-written."""
    args = json.loads((uninterrupted(2) / "args.json").read_text())
    assert args["batch_size"] == 4 and args["lr"] == 1e-2 and args["ranks"] == 2 and args["seed"] == 0
    assert args["versions"].items() >= {"torch": torch.__version__, "transformers": hf.__version__}.items()
    lines = [json.loads(line) for line in (uninterrupted(2) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second"}
    assert any(len(repr(line["loss"])) > 12 for line in lines)
    names = {path.name for path in uninterrupted(2).iterdir()}
    assert names == {"args.json", "log.jsonl", "checkpoints", "config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json", "preprocessor_config.json", "processor_config.json"}


def start_afresh():
    multiprocessing.set_start_method("forkserver", force=True)


def test_worker_processes_where_python_does_not_fork(place, uninterrupted, tmp_path):
    """macOS and Python 3.14 start new processes afresh by default: the loader's workers work there too."""
    done = sft_run(place, tmp_path / "out", prepare=start_afresh, workers=1)
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "out", uninterrupted(1))


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
    world.first(fsdp.write_json, str(folder / f"peaks-{streamed}.json"), peaks)
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


def test_schedule_by_hand():
    """Linear warm-up to the peak, half of it halfway down the cosine, nearly nothing at the last step."""
    assert [fsdp.schedule(step, 24, 4) for step in (0, 3)] == pytest.approx([1 / 5, 4 / 5])
    assert [fsdp.schedule(step, 24, 4) for step in (4, 9, 14, 19)] == pytest.approx(
        [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5])
    assert 0 < fsdp.schedule(23, 24, 4) < 0.01
    assert fsdp.schedule(0, 100, 0.03) == pytest.approx(1 / 4)  # below 1: a share of all steps
    assert fsdp.schedule(0, 10, 0) == 1
