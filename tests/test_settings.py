"""Settings of a checkpoint: each one that changes results equals transformers, or is refused by name.

Each key of transformers' configurations and image processors is in one of three lists: implemented (with
cases that must equal transformers), refused, or without effect. A key in none of them fails a test, so that
new settings in a new release of transformers are noticed.
"""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_fsdp import assert_close, batch_of, load, original, our_logits, their_logits
from tiny import HUB, named, options, write
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import data
import fsdp

# ---- configurations ----

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
IMPLEMENTED = {  # key: values other than the default, whose logits must equal those of transformers
    "text_config": {
        "hidden_size": [48], "intermediate_size": [20], "num_hidden_layers": [3], "num_attention_heads": [2],
        "num_key_value_heads": [1, None], "head_dim": [12], "hidden_act": ["gelu", "relu"],
        "vocab_size": [640], "rms_norm_eps": [0.1], "attention_bias": [True], "mlp_bias": [True],
        "tie_word_embeddings": [True],
        "rope_parameters": [LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 500.0}]},
    "vision_config": {
        "hidden_size": [32], "intermediate_size": [20], "num_hidden_layers": [3], "num_attention_heads": [3],
        "image_size": [24], "patch_size": [4], "hidden_act": ["gelu"], "layer_norm_eps": [0.1]},
    "llava": {
        "vision_feature_layer": [-1, 1, [-2]], "vision_feature_select_strategy": ["full"],
        "projector_hidden_act": ["relu"], "multimodal_projector_bias": [False],
        "tie_word_embeddings": [True]}}
REFUSED = {  # key: (value, error message)
    "text_config": {"attention_dropout": (0.1, "got attention_dropout 0.1")},
    "vision_config": {"attention_dropout": (0.1, "got attention_dropout 0.1"),
                      "num_channels": (1, "got num_channels 1")},
    "llava": {"vision_feature_layer": ([-2, -1], r"got vision_feature_layer \[-2, -1\], need one layer")}}
MORE_REFUSED = {  # keys that are in no configuration class
    "text_config": {
        "model_type": ("gemma", "got a gemma and a clip_vision_model"),
        "quantization_config": ({"quant_method": "gptq"}, "got quantization_config"),
        "rope_parameters": ({**LINEAR, "rope_type": "dynamic"}, "got rope_type 'dynamic'"),
        "partial_rotary_factor": (0.5, "got partial_rotary_factor 0.5"),
        "hidden_act": ("gelu_new", "got the activation 'gelu_new'"),
        "auto_map": ({"AutoModelForCausalLM": "modeling.X"}, "auto_map names code of its own")},
    "vision_config": {"model_type": ("siglip_vision_model", "a llama and a siglip_vision_model")},
    "llava": {
        "model_type": ("llava_next", "got --model of the kind 'llava_next'"),
        "quantization_config": ({"load_in_4bit": True}, "got quantization_config, which is not implemented"),
        "quantization": ({"bits": 4, "group_size": 64}, "got quantization, which"),
        "mm_projector_type": (  # the mark of our earlier exports
            "linear", "got mm_projector_type 'linear', which is not implemented: need 'mlp2x_gelu'"),
        "projector_hidden_act": ("linear", "got the activation 'linear'"),
        "vision_feature_layer": (7, "got vision_feature_layer 7")}}
NO_EFFECT = {
    # names, bookkeeping, what a forward pass returns
    "_name_or_path", "architectures", "transformers_version", "model_type", "dtype", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "use_cache",
    "is_encoder_decoder", "chunk_size_feed_forward", "projection_dim",
    # initialisation of new weights, of which a full checkpoint has none
    "initializer_range", "initializer_factor",
    # ids that come from the tokenizer, the template and generation_config.json
    "bos_token_id", "eos_token_id", "pad_token_id", "image_token_index",
    "image_seq_length",  # computed from image_size and patch_size
    "max_position_embeddings", "pretraining_tp",  # read by transformers' LLaMA only for RoPE scaling
    "text_config", "vision_config",
    # windows: test_windows
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
CLASSES = {"text_config": (hf.LlamaConfig, hf.MistralConfig, hf.Qwen2Config),
           "vision_config": (hf.CLIPVisionConfig,), "llava": (hf.LlavaConfig,)}


def test_every_setting_of_a_configuration_is_known():
    for section, classes in CLASSES.items():
        known = NO_EFFECT | IMPLEMENTED[section].keys() | REFUSED[section].keys()
        for config in classes:
            assert not (config().to_dict().keys() | config.__annotations__.keys()) - known, config


def checkpoint(folder, changes=None, kind=hf.LlamaConfig):
    """Writes a LLaVA checkpoint with changes {section: {key: value}} of its configuration. → transformers'
    model with the same weights"""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, changes = tiny.make_tokenizer(folder), changes or {}
    text = {**tiny.llama_config(tokenizer).to_dict(), **changes.get("text_config", {})}
    text = {key: value for key, value in text.items() if key not in ("model_type", "head_dim")
            or key in changes.get("text_config", {})}
    llava = {key: value for key, value in tiny.llava_config(tokenizer).to_dict().items()
             if key not in ("text_config", "vision_config", "model_type", "tie_word_embeddings")}
    vision = tiny.clip_config(**changes.get("vision_config", {}))
    config = hf.LlavaConfig(text_config=kind(**text), vision_config=vision,
                            **{**llava, **changes.get("llava", {})})
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    peer = tiny.randomise(hf.LlavaForConditionalGeneration(config))
    peer.config.save_pretrained(folder)
    write(folder, named(peer, HUB))
    tiny.write_processor(folder, vision.image_size)
    return peer


def edit(path, **changes):
    """Sets keys of a JSON file; the value None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_parity(folder, peer, place, world, words=None):
    """Our logits equal those of transformers, and those of transformers on our export. words: the size of the
    vocabulary before we add tokens, which the first comparison is restricted to."""
    model, processor = load(options(model=str(folder)), world)
    batch = batch_of(processor, place / "images")
    ours = our_logits(model, batch)
    assert_close(ours[:, :words], their_logits(peer, batch)[:, :words])
    args = options(model=str(folder), out=str(folder / "out"))
    fsdp.export(model, processor, args, world)
    assert_close(ours, their_logits(tiny.reload(folder / "out"), batch))


@pytest.mark.parametrize("section, key, value", [
    (section, key, value) for section, keys in IMPLEMENTED.items() for key, values in keys.items()
    for value in values])
def test_implemented_settings_equal_transformers(section, key, value, place, world, tmp_path):
    peer = checkpoint(tmp_path / "model", {section: {key: value}})
    assert_parity(tmp_path / "model", peer, place, world)


@pytest.mark.parametrize("section, key, value, message", [
    (section, key, *case) for table in (REFUSED, MORE_REFUSED) for section, keys in table.items()
    for key, case in keys.items()])
def test_other_settings_are_refused(section, key, value, message, place, world, tmp_path):
    """By name in one line, before any weight or data is read."""
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (config if section == "llava" else config[section])[key] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(fsdp.UserError, match=message) as error:
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


WINDOWS = {  # configuration class and settings of a language model, and the error message or None
    "mistral": (hf.MistralConfig, {"sliding_window": None}, None),
    "mistral, biases of a LLaMA": (
        hf.MistralConfig, {"sliding_window": None, "attention_bias": True, "mlp_bias": True}, None),
    "mistral, window": (hf.MistralConfig, {"sliding_window": 8}, "got sliding_window 8"),
    "mistral, layer types": (hf.MistralConfig, {  # not read by this class
        "sliding_window": 8, "layer_types": ["full_attention"] * 2}, "got sliding_window 8"),
    "mistral, default": (hf.MistralConfig, {}, "got sliding_window 4096"),
    "qwen2": (hf.Qwen2Config, {}, None),
    "qwen2, unused window": (hf.Qwen2Config, {"sliding_window": 8}, None),
    "qwen2, window": (
        hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "got sliding_window 8"),
    "qwen2, no layer": (hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 8}, None)}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, place, world, tmp_path):
    """Without a sliding window Mistral and Qwen2 equal LLaMA up to biases; with one they are refused."""
    kind, changes, said = WINDOWS[case]
    peer = checkpoint(tmp_path / "model", {"text_config": changes}, kind)
    if said is None:
        return assert_parity(tmp_path / "model", peer, place, world)
    with pytest.raises(fsdp.UserError, match=said):
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)


# the config.json of an original LLaVA
ORIGINAL_IMPLEMENTED = {  # (changes of transformers' configuration, the same in this config.json)
    "rope llama3": ({"text_config": {"rope_parameters": LLAMA3}},
                    {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 100.0}),
    "rope linear": ({"text_config": {"rope_parameters": LINEAR}},
                    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0},
                     "rope_theta": 100.0}),
    "class token": ({"llava": {"vision_feature_select_strategy": "full"}},
                    {"mm_vision_select_feature": "cls_patch"}),
    "last layer": ({"llava": {"vision_feature_layer": -1}}, {"mm_vision_select_layer": -1}),
    "llava_llama": ({}, {"model_type": "llava_llama"}),
    "no effect": ({}, {"mm_use_im_patch_token": True, "mm_projector_lr": 2e-5, "mm_patch_merge_type": "flat",
                       "image_crop_resolution": 224, "tokenizer_model_max_length": 2048,
                       "sliding_window": 8}),  # not read by a LLaMA
    "biased": ({"text_config": {"attention_bias": True}}, {})}
ORIGINAL_REFUSED = {
    "mm_use_im_start_end": True, "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
    "mm_resampler_type": "perceiver", "mm_projector_type": "mlp3x_gelu", "mm_vision_select_feature": "cls",
    "mm_spatial_merge": 2, "s2": True, "quantization_config": {"bits": 4}, "attention_dropout": 0.1,
    "mm_hidden_size": 25, "model_type": "llava_mpt", "mm_vision_select_layer": [-2, -1]}


@pytest.mark.parametrize("case", ORIGINAL_IMPLEMENTED)
def test_implemented_settings_of_an_original_llava(case, place, world, tmp_path):
    changes, written = ORIGINAL_IMPLEMENTED[case]
    peer = checkpoint(tmp_path / "peer", changes)
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors", peer=peer)
    edit(folder / "config.json", **written)
    assert_parity(folder, peer, place, world, words=-2 + peer.config.text_config.vocab_size)


@pytest.mark.parametrize("kind", ["llava_mistral", "llava_qwen"])
def test_an_original_llava_on_another_language_model(kind, place, world, tmp_path):
    config = {"llava_mistral": hf.MistralConfig, "llava_qwen": hf.Qwen2Config}[kind]
    peer = checkpoint(tmp_path / "peer", {"text_config": {"sliding_window": None}}, config)
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors", peer=peer)
    edit(folder / "config.json", model_type=kind)
    if kind == "llava_mistral":
        with pytest.raises(fsdp.UserError, match="got sliding_window 4096"):  # the default of MistralConfig
            fsdp.open_checkpoint(options(model=str(folder)), world)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert_parity(folder, peer, place, world, words=-2 + peer.config.text_config.vocab_size)


@pytest.mark.parametrize("key", ORIGINAL_REFUSED)
def test_other_settings_of_an_original_llava_are_refused(key, world, tmp_path):
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    edit(folder / "config.json", **{key: ORIGINAL_REFUSED[key]})
    said = {"model_type": "kind 'llava_mpt'", "mm_vision_select_layer": "vision_feature_layer"}.get(key, key)
    with pytest.raises(fsdp.UserError, match=f"{folder}.*got .*{said}"):
        fsdp.open_checkpoint(options(model=str(folder)), world)


@pytest.mark.parametrize("value, said", [
    ("linear", "got mm_projector_type 'linear', which is not implemented: need 'mlp2x_gelu'"),
    (None, "got no mm_projector_type, which means 'linear' .the first LLaVA. and is not implemented: need")])
def test_a_linear_projector_is_refused(value, said, world, tmp_path):
    """Named, or implied as in the first LLaVA, whose config.json has no mm_projector_type."""
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    edit(folder / "config.json", mm_projector_type=value)
    (folder / "model.safetensors").write_text("not read")
    with pytest.raises(fsdp.UserError, match=f"{folder}/config.json: {said}"):
        fsdp.open_checkpoint(options(model=str(folder)), world)


def test_a_missing_tower_of_an_original_llava_names_the_setting(world, tmp_path):
    """The error names mm_vision_tower, since the user gave no such option."""
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    edit(folder / "config.json", mm_vision_tower="/gone/clip")
    with pytest.raises(fsdp.UserError, match="config.json: mm_vision_tower: got '/gone/clip'.*--clip gives"):
        fsdp.open_checkpoint(options(model=str(folder)), world)


@pytest.mark.parametrize("changes, said", [
    ({"model_type": "siglip_vision_model"}, "got model_type 'siglip_vision_model', need clip"),
    ({"num_channels": 1}, "got num_channels 1"), ({"quantization_config": {}}, "got quantization_config")])
def test_settings_of_a_tower_are_refused(changes, said, world, tmp_path):
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    edit(tmp_path / "clip" / "config.json", **changes)
    with pytest.raises(fsdp.UserError, match=f"{tmp_path}/clip/config.json: {said}"):
        fsdp.open_checkpoint(options(model=str(folder)), world)


# ---- what a folder is ----

def as_adapter(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}')


def as_projector(folder):
    edit(folder / "config.json", _name_or_path="lmsys/vicuna-7b-v1.5")
    (folder / "model.safetensors").rename(folder / "mm_projector.bin")


def as_int8(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors |= {name: tensors[name].char(), "a.absmax": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors")


FOLDERS = {
    "an adapter": (as_adapter, "holds a LoRA adapter .* of 'lmsys/vicuna-7b-v1.5', need full weights: merge"),
    "an adapter beside weights": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
    "LLaVA's LoRA": (lambda folder: (folder / "non_lora_trainables.bin").touch(), "holds a LoRA adapter"),
    "a projector": (as_projector, "projector alone .mm_projector.bin., of 'lmsys/vicuna-7b-v1.5'; need full"),
    "int8": (as_int8, "is I8, as in quantised weights"),
    "GPTQ": (lambda folder: (folder / "quantize_config.json").touch(), "its weights are quantised"),
    "GGUF": (lambda folder: (folder / "model.safetensors").rename(folder / "q4.gguf"),
             "need weights; .*q4.gguf"),
    "Meta's": (lambda folder: (folder / "config.json").rename(folder / "params.json"),
               "no config.json, need .* as transformers writes it; it holds .*params.json"),
    "no settings": (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'),
                    "got --model of the kind 'llava', need LLaVA-1.5"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be used"),
    "half a scaling": (lambda folder: edit(folder / "config.json", text_config={
        "model_type": "llama", "rope_scaling": {"type": "linear"}}), "config.json cannot be used: .*factor"),
    "no RoPE base": (lambda folder: edit(folder / "config.json", text_config={
        **json.loads((folder / "config.json").read_text())["text_config"],
        "rope_parameters": {"rope_type": "default", "rope_theta": None}}), "config.json cannot be used: "),
    "a word as a size": (lambda folder: edit(folder / "config.json", text_config={
        "model_type": "llama", "hidden_size": "x"}), "config.json cannot be used: .*hidden_size"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_a_folder_is_comes_first(case, place, world, tmp_path):
    """Not the tensors that it lacks: one line says what it is."""
    spoil, said = FOLDERS[case]
    shutil.copytree(place / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(fsdp.UserError, match=said) as error:
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_weights_are_looked_for_as_transformers_does(place, world, tmp_path):
    """model.safetensors goes before an index beside it, variants are not read."""
    peer = tiny.make_model(tmp_path / "model")
    other = tiny.make_model(tmp_path / "other", files=2, seed=1)
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, tmp_path / "model")
    save_file(named(other, HUB), tmp_path / "model" / "model.fp16.safetensors", {"format": "pt"})
    assert_parity(tmp_path / "model", peer, place, world)


# ---- tied embeddings ----

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize("case", ["equal", "another head", "head alone", "head of another size"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tied_embeddings(case, kind, place, world, tmp_path, capsys):
    """What transformers makes of the same files: the head's weights count where they differ."""
    tiny.make_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    if case == "another head":
        tensors[HEAD] = tensors[HEAD].flip(0).contiguous()
    if case == "head alone":
        del tensors[EMBEDDING]
    if case == "head of another size":
        tensors[HEAD] = tensors[HEAD][1:].clone()
    if kind == "bin":
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    else:
        write(tmp_path / "model", tensors)
    if case == "head of another size":
        with pytest.raises(fsdp.UserError, match="shape: language_model.lm_head.weight"):
            fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)
        return
    peer = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert_parity(tmp_path / "model", peer, place, world)
    assert ("their weights differ" in capsys.readouterr().out) == (case == "another head")


# ---- image settings ----

S = 16  # the tower's image_size
GIVEN = {  # of a CLIP, none of them a default
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 20},
    "resample": 2, "do_center_crop": True, "crop_size": {"height": S, "width": S}, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4], "do_convert_rgb": True}
LLAVA = {"image_processor_type": "LlavaImageProcessor"}
PAD = {**LLAVA, "do_pad": True}
SQUARE = {"height": 20, "width": 20}
IMAGE_DONE = {  # setting → changes to GIVEN (...: absent) with which pixels equal transformers'
    "size": [{"size": 24}, {"size": S}, {"size": {"shortest_edge": S}}, {"size": ...}, {"size": 200},
             {**PAD, "size": {"height": 24, "width": 24}}, {**PAD, "size": [20, 20]}],
    "default_to_square": [{**PAD, "size": 20, "default_to_square": True},
                          {"size": 20, "default_to_square": None}],
    "crop_size": [{"size": 20, "crop_size": S, "resample": 3}, {"crop_size": [S, S]}],
    "resample": [{"resample": 3}, {"resample": ...}],
    "image_mean": [{"image_mean": ...}, {"image_mean": [0, 0.5, 1]}, {**PAD, "image_mean": [0, 0.5, 1]}],
    "image_std": [{"image_std": ...}, {"image_std": [1, 2, 0.001]}],
    "do_pad": [PAD, {**PAD, "size": S}, *({**PAD, "do_pad": value} for value in (False, None, ...)),
               {"do_pad": True}],
    "do_center_crop": [{**PAD, "size": S, "do_center_crop": False}, {"do_center_crop": ...}],
    "image_processor_type": [
        PAD, *({**PAD, "image_processor_type": f"{kind}ImageProcessor{end}"}
               for kind in ("CLIP", "Bit", "Llava") for end in ("", "Fast", "Pil")),
        {"image_processor_type": None}, {"image_processor_type": ...}],
    "feature_extractor_type": [
        {"image_processor_type": ..., "feature_extractor_type": "CLIPFeatureExtractor", "size": 24}]}
SIZE, THREE = f'{{"shortest_edge": N}} with N of at least {S}', "three numbers"
IMAGE_REFUSED = {  # setting → (changes to GIVEN, what the error says is needed)
    **{name: [({**pad, name: value}, "true") for value in (False, None, 1, "true") for pad in ({}, PAD)]
       for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop")},
    "do_pad": [({**PAD, "do_pad": 1}, "true or false")],
    "pad_size": [({"do_pad": True, "pad_size": SQUARE}, "null")],
    "default_to_square": [({"default_to_square": "no"}, "true or false")],
    "size": [
        *(({"size": size}, SIZE) for size in (
            None, SQUARE, [20, 20], 15, -20, 0, 20.0, True, "20", 10**400, [], {}, {"longest_edge": 40},
            {"shortest_edge": 20, "longest_edge": 40}, {"shortest_edge": None}, {"shortest_edge": [20, 20]})),
        ({"size": 20, "default_to_square": True}, SIZE), ({**PAD, "size": 15}, SIZE),
        ({**PAD, "size": {"height": 20, "width": 24}}, SIZE), ({**PAD, "size": [20, 20, 20]}, SIZE)],
    "crop_size": [({"crop_size": crop}, f"{S}, the tower's image_size") for crop in (
        ..., None, 18, 14, [S, 18], {"shortest_edge": S}, {"height": S}, "16")],
    "resample": [({"resample": value}, "2 (bilinear) or 3 (bicubic)")
                 for value in (None, 0, 1, 4, 5, 7, "bicubic", True, 2.0)],
    "rescale_factor": [({"rescale_factor": value}, "1/255")
                       for value in (None, 1, 1 / 127.5, 0.0039, "1/255", True)],
    "image_mean": [({"image_mean": value}, THREE) for value in (
        None, 0.5, [0.5] * 2, [0.5, 0.5, "0.5"], [0.5, 0.5, 128], [0.5, 0, float("nan")], [0.5, 0.5, True])],
    "image_std": [({"image_std": value}, THREE) for value in (
        None, 0.5, [0.5] * 4, [0.5, 0.5, 0], [0.5, 0.5, -1], [0.5, 0.5, float("inf")], ["A" * 10**5, 1, 1])],
    "image_processor_type": [
        ({"image_processor_type": f"{kind}ImageProcessor{end}"}, "one of CLIPImageProcessor, ")
        for kind in ("Siglip", "LlavaNext", "LlavaOnevision", "ViT", "ConvNext", "ChineseCLIP", "My")
        for end in ("", "Fast")],
    "feature_extractor_type": [
        ({"image_processor_type": None, "feature_extractor_type": "ViTFeatureExtractor"}, "one of CLIP")],
    **{name: [({name: value}, "none: it belongs to another pipeline")] for name, value in {
        "crop_pct": 0.9, "do_flip_channel_order": True, "do_image_splitting": True, "use_square_size": True,
        "image_grid_pinpoints": [[336, 672]], "auto_map": {"AutoImageProcessor": "mine.Processor"}}.items()}}
IMAGE_NO_EFFECT = {  # setting → a value, which changes no pixel of transformers' either, and why
    "do_convert_rgb": (False, "images are RGB when they come here; without it transformers takes RGB alone"),
    "data_format": ("channels_last", "the order of axes that is returned; the tower has its own"),
    "input_data_format": ("channels_last", "of arrays, not of image files"),
    "device": ("cpu", "where it is computed"), "disable_grouping": (True, "how images are batched"),
    "return_tensors": ("pt", "the kind of array that is returned"),
    "image_seq_length": (7, "counts tokens, which config.json says"),
    "patch_size": (14, "read by other processors"), "processor_class": ("LlavaProcessor", "a name"),
    "use_fast": (True, "which backend"), "do_split_image": (False, "another pipeline's step, not asked for")}


def write_images(folder, changes, **config):
    """A folder with image settings, and a config.json of a model_type."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    settings = {name: value for name, value in {**GIVEN, **changes}.items() if value is not ...}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def our_pixels(folder, image, image_mode="auto"):
    settings = data.image_settings(str(folder), str(folder), S, image_mode)
    return data.to_pixels(image, S, *settings)


def peer_pixels(folder, image):
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(image, return_tensors="pt")["pixel_values"][0]


def images():
    """Small, large, wide, tall and narrow."""
    for seed, size in enumerate([*tiny.SIZES, (90, 9), (5, 70)]):
        noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        yield tiny.Image.fromarray(noise)


def assert_same_pixels(folder):
    for image in images():
        torch.testing.assert_close(our_pixels(folder, image), peer_pixels(folder, image), rtol=0, atol=1e-6)


def cases(table):
    """(setting, case) of all."""
    return [pytest.param(name, case, id=f"{name} {i}") for name, of_one in table.items()
            for i, case in enumerate(of_one)]


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil, BitImageProcessorPil])
def test_every_image_setting_is_in_a_list(kind):
    known = {*IMAGE_DONE, *IMAGE_REFUSED, *IMAGE_NO_EFFECT}
    assert kind().to_dict().keys() | kind.valid_kwargs.__annotations__.keys() <= known


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, LlavaImageProcessorPil, BitImageProcessorPil])
def test_absent_image_settings_are_transformers_defaults(kind):
    for name, value in data.DEFAULTS.items():
        expected = getattr(kind(), name, None)
        size = isinstance(value, dict) or name == "crop_size"
        assert (dict(expected) in (value, {"height": value, "width": value}) if size
                else (expected or False) == (value or False)), name


@pytest.mark.parametrize("name, changes", cases(IMAGE_DONE))
def test_an_image_setting_that_is_done(tmp_path, name, changes):
    """Pixels equal those of transformers' processor of the same folder."""
    assert_same_pixels(write_images(tmp_path, changes))


@pytest.mark.parametrize(
    "name", ["size", "resample", "image_mean", "image_std", "do_pad", "image_processor_type"])
def test_an_image_setting_that_is_done_matters(tmp_path, name):
    """Without it, the first case of IMAGE_DONE has other pixels, and counts as other images."""
    changes, image = IMAGE_DONE[name][0], [*images()][1]
    a = write_images(tmp_path / "a", changes)
    b = write_images(tmp_path / "b", {**changes, name: GIVEN.get(name)})
    for pixels in (our_pixels, peer_pixels):
        assert (pixels(a, image) - pixels(b, image)).abs().max() > 0.01
    assert data.image_settings(a, a, S, "auto") != data.image_settings(b, b, S, "auto")


@pytest.mark.parametrize("name", IMAGE_NO_EFFECT)
def test_an_image_setting_without_effect(tmp_path, name):
    """Transformers' pixels with it are ours without it."""
    write_images(tmp_path / "without", {})
    assert_same_pixels(write_images(tmp_path / "with", {name: IMAGE_NO_EFFECT[name][0]}))
    for image in images():
        assert torch.equal(our_pixels(tmp_path / "with", image), our_pixels(tmp_path / "without", image))


@pytest.mark.parametrize("name, case", cases(IMAGE_REFUSED))
def test_an_image_setting_that_is_refused(tmp_path, name, case):
    """The error names file, setting, value and need in one line of a bearable length."""
    changes, needed = case
    write_images(tmp_path, changes)
    with pytest.raises(data.UserError) as error:
        our_pixels(tmp_path, next(images()))
    value, file = {**GIVEN, **changes}[name], f"{tmp_path}/preprocessor_config.json"
    said = "224 (the default)" if value is ... else data.shown(json.dumps(value))
    assert str(error.value).startswith(f"{file}: got {name} {said}, need {needed}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("content", ["[]", "7", '"A"', "{", '{"size": 20'])
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_image_settings_that_are_none(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(data.UserError, match=rf"{file}: (got .*, need a dictionary|not JSON)"):
        our_pixels(tmp_path, None)


def test_processor_config_comes_first(tmp_path):
    """As transformers 5 writes it, image settings in it; preprocessor_config.json where it has none."""
    write_images(tmp_path, {"size": 30})
    for content, edge in (({}, 30), ({"image_processor": None}, 30), ({"image_processor": GIVEN}, 20)):
        (tmp_path / "processor_config.json").write_text(json.dumps({"crop_size": 7, **content}))
        assert_same_pixels(tmp_path)
        assert data.image_settings(tmp_path, tmp_path, S, "auto")[3] == edge


def test_an_unnamed_image_processor_is_that_of_the_model(tmp_path):
    """A LLaVA's pads, a CLIP's does not know do_pad."""
    for model_type, mode in (("llava", "pad"), ("clip", "crop")):
        folder = write_images(tmp_path, {"image_processor_type": None, "do_pad": True}, model_type=model_type)
        assert_same_pixels(folder)
        assert data.image_settings(folder, folder, S, "auto")[0] == mode


@pytest.mark.parametrize("image_mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [20, {"height": 20, "width": 20}])
def test_image_mode_overrules_the_mode_alone(tmp_path, image_mode, size):
    """Squares are what padding gives, and are refused where images are cropped."""
    write_images(tmp_path / "file", {**PAD, "do_pad": image_mode == "crop", "size": size})
    write_images(tmp_path / "wanted", {**PAD, "do_pad": image_mode == "pad"})
    if isinstance(size, dict) and image_mode == "crop":
        with pytest.raises(data.UserError, match="got size"):
            our_pixels(tmp_path / "file", None, image_mode)
        return
    for image in images():
        found = our_pixels(tmp_path / "file", image, image_mode)
        expected = peer_pixels(tmp_path / "wanted", image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def llama_and_clip(folder):
    """A LLaMA without and a CLIP with image settings."""
    tokenizer = tiny.make_tokenizer(folder / "llm", specials=False)
    tiny.randomise(hf.LlamaForCausalLM(tiny.llama_config(tokenizer))).save_pretrained(folder / "llm")
    tiny.randomise(hf.CLIPVisionModel(tiny.clip_config())).save_pretrained(folder / "clip")
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps({**GIVEN, **half}))
    return folder / "llm", folder / "clip"


@pytest.mark.parametrize("image_mode", ["auto", "pad"])
def test_image_settings_of_the_clip_folder_are_used_and_exported(tmp_path, world, image_mode):
    """--llm and --clip: those of --clip, also where the LLaMA's folder has others."""
    llm, clip = llama_and_clip(tmp_path)
    (llm / "preprocessor_config.json").write_text(json.dumps({**GIVEN, "do_rescale": False}))
    args = tiny.options(llm=str(llm), clip=str(clip), image_mode=image_mode)
    checkpoint = fsdp.open_checkpoint(args, world)
    processor, out = checkpoint.processor, tmp_path / "out"
    assert processor.mean == processor.std == (0.5,) * 3 and (processor.resize, processor.resample) == (20, 2)
    checkpoint.config.save_pretrained(out)
    data.save_processor(processor, checkpoint.config, out)
    again, _ = data.load_processor(out, checkpoint.config, tiny.options(template="auto"))
    assert again.pixel_settings == processor.pixel_settings
    for other in ({"resize": 21}, {"resample": 3}, {"mode": ""}, {"mean": (0.4,) * 3}, {"std": (0.4,) * 3}):
        assert dataclasses.replace(again, **other).pixel_settings != processor.pixel_settings
    next(images()).resize((50, 30)).save(tmp_path / "a.png")
    with tiny.Image.open(tmp_path / "a.png") as image:
        expected = peer_pixels(clip if image_mode == "auto" else out, image)
        for found in (processor.pixels(tmp_path / "a.png"), peer_pixels(out, image)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_original_llava_pads_what_its_tower_wants(tmp_path):
    """image_aspect_ratio of its own config.json, all else from the folder of the tower."""
    write_images(tmp_path / "clip", {})
    own = write_images(tmp_path / "llava", {"image_mean": [0.9] * 3}, image_aspect_ratio="pad")
    expected = data.image_settings(tmp_path, write_images(tmp_path / "wanted", PAD), S, "auto")
    assert data.image_settings(own, tmp_path / "clip", S, "auto") == expected
