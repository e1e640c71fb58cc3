"""Settings of a checkpoint: each that changes results is done as transformers does it, or refused by name.

Each key of transformers' configurations stands in one of three lists; one that is in none fails a test, so
that a new release of transformers shows what is new.
"""
import json
import shutil

import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_fsdp import assert_close, batch_of, load, original, our_logits, their_logits
from tiny import HUB, named, options, write

import fsdp

# ---- configurations ----

LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
DONE = {  # key: values that are not the default; logits are those of transformers
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
REFUSED = {  # key: (value, what is said)
    "text_config": {"attention_dropout": (0.1, "got attention_dropout 0.1")},
    "vision_config": {"attention_dropout": (0.1, "got attention_dropout 0.1"),
                      "num_channels": (1, "got num_channels 1")},
    "llava": {"vision_feature_layer": ([-2, -1], r"got vision_feature_layer \[-2, -1\], need one layer")}}
MORE_REFUSED = {  # keys that no configuration class names
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
        "vision_feature_layer": (7, "got vision_feature_layer 7")}}
NO_EFFECT = {
    # names, bookkeeping, what a forward pass returns
    "_name_or_path", "architectures", "transformers_version", "model_type", "dtype", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "use_cache",
    "is_encoder_decoder", "chunk_size_feed_forward", "projection_dim",
    # how new weights are drawn; parts of checkpoints that hold all weights
    "initializer_range", "initializer_factor",
    # ids that the tokenizer, the template and generation_config.json say
    "bos_token_id", "eos_token_id", "pad_token_id", "image_token_index",
    "image_seq_length",  # computed from image_size and patch_size
    "max_position_embeddings", "pretraining_tp",  # transformers' LLaMA reads neither, but for RoPE's scaling
    "text_config", "vision_config",
    # windows: test_windows
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
CLASSES = {"text_config": (hf.LlamaConfig, hf.MistralConfig, hf.Qwen2Config),
           "vision_config": (hf.CLIPVisionConfig,), "llava": (hf.LlavaConfig,)}


def test_every_setting_of_a_configuration_is_known():
    for part, classes in CLASSES.items():
        known = NO_EFFECT | DONE[part].keys() | REFUSED[part].keys()
        for one in classes:
            assert not (one().to_dict().keys() | one.__annotations__.keys()) - known, one


def checkpoint(folder, changes=None, kind=hf.LlamaConfig):
    """A LLaVA checkpoint folder with changes {part: {key: value}} of its configuration. → transformers'
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
    tiny.write_processor(folder)
    edit(folder / "preprocessor_config.json", size={"shortest_edge": vision.image_size},
         crop_size={"height": vision.image_size, "width": vision.image_size})
    return peer


def edit(path, **changes):
    """Sets keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_parity(folder, peer, place, world, words=None):
    """Our logits are those of transformers (the first `words` of a vocabulary that we grow); so are those of
    our export."""
    model, processor = load(options(model=str(folder)), world)
    batch = batch_of(processor, place / "images")
    ours = our_logits(model, batch)
    assert_close(ours[:, :words], their_logits(peer, batch)[:, :words])
    args = options(model=str(folder), out=str(folder / "out"))
    fsdp.export(model, processor, args, world)
    assert_close(ours, their_logits(tiny.reload(folder / "out"), batch))


@pytest.mark.parametrize("part, key, value", [
    (part, key, value) for part, keys in DONE.items() for key, values in keys.items() for value in values])
def test_settings_that_are_done(part, key, value, place, world, tmp_path):
    peer = checkpoint(tmp_path / "model", {part: {key: value}})
    assert_parity(tmp_path / "model", peer, place, world)


@pytest.mark.parametrize("part, key, value, said", [
    (part, key, *case) for table in (REFUSED, MORE_REFUSED) for part, keys in table.items()
    for key, case in keys.items()])
def test_settings_that_are_refused(part, key, value, said, place, world, tmp_path):
    """By name, before any data is read."""
    shutil.copytree(place / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (config if part == "llava" else config[part])[key] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(fsdp.UserError, match=said) as error:
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


WINDOWS = {  # a language model's kind and settings, and what is said, or None
    "mistral": (hf.MistralConfig, {"sliding_window": None}, None),
    "mistral, window": (hf.MistralConfig, {"sliding_window": 8}, "got sliding_window 8"),
    "mistral, default": (hf.MistralConfig, {}, "got sliding_window 4096"),
    "qwen2": (hf.Qwen2Config, {}, None),
    "qwen2, unused window": (hf.Qwen2Config, {"sliding_window": 8}, None),
    "qwen2, window": (
        hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "got sliding_window 8"),
    "qwen2, no layer": (hf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 8}, None)}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, place, world, tmp_path):
    """Mistral and Qwen2 are LLaMA with other biases, where no layer has a sliding window."""
    kind, changes, said = WINDOWS[case]
    peer = checkpoint(tmp_path / "model", {"text_config": changes}, kind)
    if said is None:
        return assert_parity(tmp_path / "model", peer, place, world)
    with pytest.raises(fsdp.UserError, match=said):
        fsdp.open_checkpoint(options(model=str(tmp_path / "model")), world)


# of an original LLaVA's config.json
ORIGINAL_DONE = {  # (the same in transformers' configuration, what is written)
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
                       "sliding_window": 8}),  # no LLaMA reads it
    "biased": ({"text_config": {"attention_bias": True}}, {})}
ORIGINAL_REFUSED = {
    "mm_use_im_start_end": True, "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
    "mm_resampler_type": "perceiver", "mm_projector_type": "mlp3x_gelu", "mm_vision_select_feature": "cls",
    "mm_spatial_merge": 2, "s2": True, "quantization_config": {"bits": 4}, "attention_dropout": 0.1,
    "mm_hidden_size": 25, "model_type": "llava_mpt", "mm_vision_select_layer": [-2, -1]}


@pytest.mark.parametrize("case", ORIGINAL_DONE)
def test_settings_of_an_original_llava_that_are_done(case, place, world, tmp_path):
    changes, written = ORIGINAL_DONE[case]
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
        with pytest.raises(fsdp.UserError, match="got sliding_window 4096"):  # as its class has it by default
            fsdp.open_checkpoint(options(model=str(folder)), world)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert_parity(folder, peer, place, world, words=-2 + peer.config.text_config.vocab_size)


@pytest.mark.parametrize("key", ORIGINAL_REFUSED)
def test_settings_of_an_original_llava_that_are_refused(key, world, tmp_path):
    _, folder = original(tmp_path, tiny.make_tokenizer(tmp_path), "safetensors")
    edit(folder / "config.json", **{key: ORIGINAL_REFUSED[key]})
    said = {"model_type": "kind 'llava_mpt'", "mm_vision_select_layer": "vision_feature_layer"}.get(key, key)
    with pytest.raises(fsdp.UserError, match=f"{folder}.*got .*{said}"):
        fsdp.open_checkpoint(options(model=str(folder)), world)


@pytest.mark.parametrize("changes, said", [
    ({"model_type": "siglip_vision_model"}, "got model_type 'siglip_vision_model', need clip"),
    ({"num_channels": 1}, "got num_channels 1"), ({"quantization_config": {}}, "got quantization_config")])
def test_settings_of_a_tower_that_are_refused(changes, said, world, tmp_path):
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
