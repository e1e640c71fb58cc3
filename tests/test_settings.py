"""Settings of a checkpoint: each key of transformers' configurations and image processors is in a table, of
those that equal transformers, are refused by name, or have no effect. A key in none of them fails a test."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file
from test_fsdp import SIZES, assert_parity, make_tiled, original
from test_model import LINEAR, LLAMA3
from tiny import HUB, named, options, write

import data
import fsdp
import model

# ---- configurations ----

IMPLEMENTED = {  # key: values other than the default, whose logits must equal those of transformers
    "text_config": {
        "hidden_size": [48], "intermediate_size": [20], "num_hidden_layers": [3], "num_attention_heads": [2],
        "num_key_value_heads": [1, None], "head_dim": [12], "hidden_act": ["gelu", "relu"],
        "vocab_size": [640], "rms_norm_eps": [0.1], "attention_bias": [True], "tie_word_embeddings": [True],
        "mlp_bias": [True], "rope_parameters": [LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 9.0}]},
    "vision_config": {
        "hidden_size": [32], "intermediate_size": [20], "num_hidden_layers": [3], "num_attention_heads": [3],
        "image_size": [24], "patch_size": [4], "hidden_act": ["gelu"], "layer_norm_eps": [0.1]},
    "llava": {"vision_feature_select_strategy": ["full"], "multimodal_projector_bias": [False],
              "vision_feature_layer": [-1, 1, [-2]], "projector_hidden_act": ["relu"],
              "tie_word_embeddings": [True]}}
REFUSED = {  # of the LLaVA, a section of it, an original LLaVA or its CLIP: (changes, what the error says)
    "text_config": [
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"), ({"model_type": "gemma"}, "got a gemma and"),
        ({"hidden_size": "x"}, "config.json cannot be used: "), ({"hidden_act": "tanh"}, "activation 'tanh'"),
        ({"rope_parameters": {**LINEAR, "rope_type": "yarn"}}, "got rope_type 'yarn', need"),
        ({"partial_rotary_factor": 0.5}, "got partial_rotary_factor 0.5"),
        ({"auto_map": {"AutoModel": "m.X"}}, "code of its own"), ({"model_type": "mistral"}, "window 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
         "got sliding_window 8")],
    "vision_config": [
        ({"attention_dropout": 0.1}, "got attention_dropout"), ({"num_channels": 1}, "got num_channels 1"),
        ({"model_type": "siglip_vision_model"}, "a llama and a siglip_vision_model")],
    "llava": [
        ({"vision_feature_layer": [-2, -1]}, "got vision_feature_layer .*, need one layer"),
        ({"vision_feature_layer": 7}, "vision_feature_layer 7"), ({"model_type": "qwen2_vl"}, "'qwen2_vl'"),
        ({"vision_feature_layer": -4}, r"vision_feature_layer -4, need -3\.\.2 "),
        ({"quantization_config": {"bits": 4}}, "got quantization_config, which is not implemented")],
    "original": [
        *(({key: value}, f"got {key}") for key, value in {
            "mm_use_im_start_end": True, "mm_patch_merge_type": "unpad", "image_aspect_ratio": "anyres",
            "mm_resampler_type": "q", "mm_vision_select_feature": "cls", "mm_hidden_size": 25}.items()),
        ({"mm_projector_type": None}, "got no mm_projector_type, which means 'linear'"),
        ({"mm_vision_tower": "/x"}, "tower: got '/x'.*--clip gives"), ({"model_type": "x"}, "kind 'x'")],
    "hub next": [  # of a LLaVA-NeXT
        ({"use_image_newline_parameter": False}, "got use_image_newline_parameter False.* need True"),
        ({"vision_feature_select_strategy": "full"}, "got vision_feature_select_strategy 'full'.* 'default'"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, "config.json cannot be used: .*image_grid_pinpoints.*1x1"),
        *(({"image_grid_pinpoints": grids}, "got image_grid_pinpoints .*, need pairs of multiples of 16, the")
          for grids in ([], [[16, 32], [16, 24]], [[16] * 3], [[0, 16]], [[-16, 16]]))],
    "original next": [
        ({"image_grid_pinpoints": "(1x1),(6x6)"}, "got image_grid_pinpoints .1x1.,.6x6., need pairs of"),
        ({"image_grid_pinpoints": None}, "config.json cannot be used: 'image_grid_pinpoints'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "got image_aspect_ratio 'anyres_max_9'.*need 'anyres'"),
        ({"image_aspect_ratio": "pad"}, "got image_aspect_ratio 'pad'.*need 'anyres'"),
        ({"image_aspect_ratio": None}, "got image_aspect_ratio None.*need 'anyres'"),
        ({"mm_patch_merge_type": "spatial"}, "got mm_patch_merge_type 'spatial'"),
        ({"mm_patch_merge_type": "flat"}, "got image_aspect_ratio 'anyres'"),
        ({"mm_vision_select_feature": "cls_patch"}, "got mm_vision_select_feature 'cls_patch'")],
    "clip": [({"model_type": "x"}, "got model_type 'x', need clip"), ({"num_channels": 1}, "num_channels 1")]}
NO_EFFECT = {
    "_name_or_path", "architectures", "transformers_version", "model_type", "dtype", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "use_cache", "text_config",
    "is_encoder_decoder", "chunk_size_feed_forward", "projection_dim", "vision_config",
    "initializer_range", "initializer_factor",  # of new weights, of which a full checkpoint has none
    "bos_token_id", "eos_token_id", "pad_token_id", "image_token_index",  # the tokenizer's count
    "image_seq_length",  # computed from image_size and patch_size
    "max_position_embeddings", "pretraining_tp",  # read by transformers' LLaMA only for RoPE scaling
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}  # windows: see below
ORIGINAL = [  # changes of transformers' configuration, the same in the config.json of an original LLaVA
    ({"text_config": {"rope_parameters": LLAMA3}},
     {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 100.0}),
    ({"text_config": {"rope_parameters": LINEAR}},
     {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100.0}),
    ({"llava": {"vision_feature_select_strategy": "full"}}, {"mm_vision_select_feature": "cls_patch"}),
    ({"llava": {"vision_feature_layer": -1}}, {"mm_vision_select_layer": -1}),
    ({}, {"mm_projector_lr": 2e-5, "mm_patch_merge_type": "flat", "model_type": "llava_llama"})]


@pytest.mark.parametrize("section, kind", [
    ("text_config", hf.LlamaConfig), ("text_config", hf.MistralConfig), ("text_config", hf.Qwen2Config),
    ("vision_config", hf.CLIPVisionConfig), ("llava", hf.LlavaConfig), ("hub next", hf.LlavaNextConfig)])
def test_every_setting_of_a_configuration_is_known(section, kind):
    done = IMPLEMENTED.get(section, IMPLEMENTED["llava"])
    known = NO_EFFECT | done.keys() | {key for one, _ in REFUSED[section] for key in one}
    assert kind().to_dict().keys() | kind.__annotations__.keys() <= known


def checkpoint(folder, changes, kind):
    """Writes a LLaVA with changes {section: {key: value}} of its configuration. → transformers' model"""
    folder.mkdir()
    config = tiny.llava_config(tiny.make_tokenizer(folder)).to_dict()
    del config["text_config"]["head_dim"], config["tie_word_embeddings"]
    config["text_config"]["model_type"] = kind
    for section, changed in changes.items():
        config.get(section, config).update(changed)
    config = hf.LlavaConfig(**config)
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    peer = tiny.randomise(hf.LlavaForConditionalGeneration(config))
    peer.config.save_pretrained(folder)
    write(folder, named(peer, HUB))
    (folder / "model.safetensors.index.json").write_text("not read beside model.safetensors")
    tiny.write_processor(folder, config.vision_config.image_size)
    return peer


def edit(path, changes, section=None):
    """Changes a JSON file, or a section of it; None removes a key."""
    content = json.loads(path.read_text())
    content.get(section, content).update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("kind, changes, written", [
    *(("llama", {section: {key: value}}, None) for section, keys in IMPLEMENTED.items()
      for key, values in keys.items() for value in values),
    ("mistral", {"text_config": {"sliding_window": None, "mlp_bias": True}}, None),  # without windows
    ("qwen2", {"text_config": {"use_sliding_window": True, "sliding_window": 8}}, None),  # on no layer
    ("qwen2", {"text_config": {"sliding_window": 8}}, {"model_type": "llava_qwen", "sliding_window": 8}),
    *(("llama", *case) for case in ORIGINAL)])
def test_implemented_settings_equal_transformers(kind, changes, written, place, world, tmp_path):
    """As transformers writes them, or in an original LLaVA, whose vocabulary has no <pad> and no <image>."""
    peer = checkpoint(tmp_path / "model", changes, kind)
    folder, new_ids = tmp_path / "model", 0
    if written is not None:
        (_, folder), new_ids = original(tmp_path, "safetensors", peer), 2
        edit(folder / "config.json", written)
    assert_parity(options(model=str(folder)), world, place / "images", tmp_path / "out", peer, new_ids)


FOLDERS = [  # what makes a folder hold no LLaVA: a file that is renamed, or added; what the error says
    ("", "adapter_config.json", "holds a LoRA adapter .* of 'vicuna', need full weights: merge it"),
    ("model.safetensors", "mm_projector.bin", "holds a projector alone .mm_projector.bin., .*; need full"),
    ("", "quantize_config.json", "its weights are quantised"),
    ("model.safetensors", "q4.gguf", "need weights; .*q4.gguf"),
    ("config.json", "params.json", "no config.json, need .* transformers writes it; it holds .*params.json")]


@pytest.mark.parametrize("section, case", [
    *((section, case) for section, cases in REFUSED.items() for case in cases),
    *(("", case) for case in FOLDERS)])
def test_what_is_not_implemented_is_refused_by_name(section, case, place, world, tmp_path):
    """In one line, before any weight or data is read."""
    if section in ("original", "clip"):
        _, folder = original(tmp_path, "safetensors")
    elif "next" in section:
        _, folder = make_tiled(tmp_path, section.removesuffix(" next"))
    else:
        folder = shutil.copytree(place / "model", tmp_path / "model")
    *change, said = case
    if section:
        edit((tmp_path / "clip" if section == "clip" else folder) / "config.json", *change, section)
    elif change[0]:
        (folder / change[0]).rename(folder / change[1])
    else:
        (folder / change[1]).write_text('{"base_model_name_or_path": "vicuna"}')
    with pytest.raises(fsdp.UserError, match=said) as error:
        fsdp.open_checkpoint(options(model=str(folder)), world)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("case", ["equal", "another head", "head alone"])
def test_tied_embeddings_are_read_as_transformers_does(case, place, world, tmp_path, capsys):
    """Where embedding and head differ, the head's weights count."""
    embedding, head = model.VOCABULARY
    tiny.make_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[head] = (tensors[embedding].flip(0) if case == "another head" else tensors[embedding]).clone()
    if case == "head alone":
        del tensors[embedding]
    write(tmp_path / "model", tensors)
    peer = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert_parity(options(model=str(tmp_path / "model")), world, place / "images", tmp_path / "out", peer)
    assert ("their weights differ" in capsys.readouterr().out) == (case == "another head")


# ---- image settings ----

S = 16  # the tower's image_size
GIVEN = {  # of a CLIP, none of them a default
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 20},
    "resample": 2, "do_center_crop": True, "crop_size": {"height": S, "width": S}, "do_rescale": True,
    "rescale_factor": 0.00392156862745098, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4], "do_convert_rgb": True}
PAD = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
SQUARE = {"height": 20, "width": 20}
IMAGE_DONE = {  # setting → values, or changes to GIVEN, with which pixels equal transformers'; ... is absent
    "size": [24, S, {"size": {"shortest_edge": S}}, ..., {**PAD, "size": SQUARE}, {**PAD, "size": [20, 20]}],
    "default_to_square": [None, {**PAD, "size": 20, "default_to_square": True}], "crop_size": [S, [S, S]],
    "resample": [3, ...], "image_mean": [..., [0, 0.5, 1], {**PAD, "image_mean": [0, 0.5, 1]}],
    "image_std": [..., [1, 2, 0.001]], "do_center_crop": [..., {**PAD, "size": S, "do_center_crop": False}],
    "do_pad": [True, PAD, {**PAD, "size": S}, *({**PAD, "do_pad": value} for value in (False, None, ...))],
    "image_processor_type": [
        None, ..., *({**PAD, "image_processor_type": f"{kind}ImageProcessor{end}"}
                     for kind in ("CLIP", "Bit", "Llava") for end in ("", "Fast", "Pil"))],
    "feature_extractor_type": [
        {"image_processor_type": ..., "feature_extractor_type": "CLIPFeatureExtractor", "size": 24}],
    "do_convert_rgb": [False], "data_format": ["channels_last"], "input_data_format": ["channels_last"],
    "device": ["cpu"], "disable_grouping": [True], "return_tensors": ["pt"], "image_seq_length": [7],
    "patch_size": [14], "processor_class": ["Llava"], "use_fast": [True], "do_split_image": [False]}
SIZE, THREE = f'{{"shortest_edge": N}} with N of at least {S}', "three numbers"
IMAGE_REFUSED = {  # setting → values, or changes to GIVEN, and what the error says is needed
    **{name: ([None, 1, {**PAD, name: False}], "true")
       for name in ("do_resize", "do_rescale", "do_normalize", "do_center_crop")},
    "do_pad": ([{**PAD, "do_pad": 1}], "true or false"), "pad_size": ([20], "null"),
    "size": ([None, [20, 20], 15, -20, 20.0, True, 10**400, {"size": SQUARE}, {"size": {"longest_edge": 40}},
              {"size": 20, "default_to_square": True}, {**PAD, "size": {"height": 20, "width": 24}}], SIZE),
    "crop_size": ([..., None, [S, 18], {"crop_size": {"shortest_edge": S}}], f"{S}, the tower's image_size"),
    "resample": ([None, 1, "bicubic", True, 2.0], "2 (bilinear) or 3 (bicubic)"),
    "rescale_factor": ([None, 1, 0.0039], "1/255"), "default_to_square": (["no"], "true or false"),
    "image_mean": ([None, [0.5] * 2, [0.5, 0.5, "0.5"], [0.5, 0.5, 128], [0.5, 0, float("nan")]], THREE),
    "image_std": ([[0.5] * 4, [0.5, 0.5, 0], ["A" * 10**5, 1, 1]], THREE),
    "image_processor_type": (["ChineseCLIPImageProcessor", "My"], "one of CLIPImageProcessor, Bit"),
    "feature_extractor_type": ([{"image_processor_type": None, "feature_extractor_type": "V"}], "one of "),
    **{name: ([0.9], "none: it belongs to another pipeline")
       for name in ("crop_pct", "do_flip_channel_order", "image_grid_pinpoints", "auto_map")}}


TILES = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "size": {"shortest_edge": S},
         "image_grid_pinpoints": tiny.GRIDS}
TILES_REFUSED = {  # setting of a LLaVA-NeXT → values, and what the error says is needed
    "size": ([20, 15], SIZE), "crop_size": ([...], f"{S}, the tower's image_size"),
    "image_grid_pinpoints": ([None, tiny.GRIDS[::-1], tiny.GRIDS[:4]], f"{tiny.GRIDS}, as in config.json"),
    "image_processor_type": (["CLIPImageProcessor", "LlavaImageProcessor"], "one of LlavaNextImageProcessor"),
    "do_center_crop": ([False], "true"), "do_resize": ([False], "true"), "resample": ([1], "2 (bilinear)")}


def write_images(folder, name, case, **config):
    """A folder with image settings, one or several (a dict) of them changed, and a config.json."""
    changes = case if isinstance(case, dict) else {name: case}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    settings = {name: value for name, value in {**GIVEN, **changes}.items() if value is not ...}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def assert_same_pixels(folder, wanted=None, image_mode="auto"):
    """Ours by the settings of `folder`, transformers' by those of `wanted`, of all shapes of images."""
    processor = hf.AutoImageProcessor.from_pretrained(wanted or folder, backend="pil")
    settings = data.image_settings(str(folder), str(folder), S, image_mode)
    for seed, size in enumerate([*tiny.SIZES, (90, 9), (5, 70)]):
        noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = tiny.Image.fromarray(noise)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(data.to_pixels(image, S, *settings), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [
    hf.CLIPImageProcessorPil, hf.LlavaImageProcessorPil, hf.BitImageProcessorPil])
def test_every_image_setting_is_known_and_its_default_is_transformers(kind):
    known = {*IMAGE_DONE, *IMAGE_REFUSED}
    assert kind().to_dict().keys() | kind.valid_kwargs.__annotations__.keys() <= known
    for name, value in data.DEFAULTS.items():
        expected = getattr(kind(), name, None)
        size = isinstance(value, dict) or name == "crop_size"
        assert (dict(expected) in (value, {"height": value, "width": value}) if size
                else (expected or False) == (value or False)), name


@pytest.mark.parametrize("name", IMAGE_DONE)
def test_pixels_equal_those_of_transformers_processor(tmp_path, name):
    for case in IMAGE_DONE[name]:
        assert_same_pixels(write_images(tmp_path, name, case))


@pytest.mark.parametrize("name", IMAGE_REFUSED)
def test_other_image_settings_are_refused_by_name(tmp_path, name):
    """The error names file, setting, value and need in one short line."""
    cases, needed = IMAGE_REFUSED[name]
    for case in cases:
        folder = write_images(tmp_path, name, case)
        with pytest.raises(data.UserError) as error:
            data.image_settings(folder, folder, S, "auto")
        value = case[name] if isinstance(case, dict) and name in case else case
        said = "224 (the default)" if value is ... else data.shown(json.dumps(value))
        assert f"{tmp_path}/preprocessor_config.json: got {name} {said}, need {needed}" in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("change", [
    {}, {"size": {"height": S, "width": S}}, {"size": S}, {"do_pad": False}, {"image_processor_type": None},
    {"image_mean": [0, 0.5, 1], "image_std": [1, 2, 3]}, {"resample": 3}])
def test_tiles_equal_those_of_transformers_processor(tmp_path, change):
    """By each setting that is implemented."""
    grids = tuple(map(tuple, tiny.GRIDS))
    folder = write_images(tmp_path, "", {**TILES, **change}, model_type="llava_next", text_config={})
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    mode, mean, std, resize, resample = data.image_settings(str(folder), str(folder), S, "auto", grids)
    assert (mode, resize) == ("tiles", S)
    for seed, size in enumerate(SIZES):
        noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = tiny.Image.fromarray(noise)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(data.tile_pixels(image, S, mean, std, resample, grids), expected)


@pytest.mark.parametrize("name", TILES_REFUSED)
def test_other_settings_of_tiles_are_refused_by_name(tmp_path, name):
    cases, needed = TILES_REFUSED[name]
    for case in cases:
        folder = write_images(tmp_path, "", {**TILES, name: case}, text_config={})
        with pytest.raises(data.UserError) as error:
            data.image_settings(folder, folder, S, "auto", tuple(map(tuple, tiny.GRIDS)))
        assert f"json: got {name} " in str(error.value) and f"need {needed}" in str(error.value)
    for image_mode in "crop", "pad":
        with pytest.raises(data.UserError, match=f"got --image_mode {image_mode}, but .* tiles: leave"):
            data.image_settings(folder, folder, S, image_mode, tuple(map(tuple, tiny.GRIDS)))


def test_where_image_settings_are_read(tmp_path):
    """processor_config.json comes first; an unnamed processor is the model's: a LLaVA's pads."""
    write_images(tmp_path, "size", 30)
    for content, edge in ({}, 30), ({"image_processor": None}, 30), ({"image_processor": GIVEN}, 20):
        (tmp_path / "processor_config.json").write_text(json.dumps({"crop_size": 7, **content}))
        assert_same_pixels(tmp_path)
        assert data.image_settings(tmp_path, tmp_path, S, "auto")[3] == edge
    for kind, mode in ("llava", "pad"), ("clip", "crop"):
        write_images(tmp_path / kind, "", {**PAD, "image_processor_type": None}, model_type=kind)
        assert_same_pixels(tmp_path / kind)
        assert data.image_settings(tmp_path / kind, tmp_path / kind, S, "auto")[0] == mode
    own = write_images(tmp_path / "own", "image_mean", [0.9] * 3, image_aspect_ratio="pad")
    assert data.image_settings(own, tmp_path / "clip", S, "auto")[:2] == ("pad", (0.5, 0.4, 0.3))
    for content in "7", '{"size": 20':
        (tmp_path / "processor_config.json").write_text(content)
        with pytest.raises(data.UserError, match="processor_config.json: (got .*need a dict|not JSON)"):
            data.image_settings(tmp_path, tmp_path, S, "auto")


def test_image_mode_overrules_the_mode_alone(tmp_path):
    """Squares are what padding gives, and are refused where images are cropped."""
    for image_mode, size in ("crop", 20), ("pad", 20), ("pad", SQUARE):
        file = write_images(tmp_path / "file", "", {**PAD, "do_pad": image_mode == "crop", "size": size})
        wanted = write_images(tmp_path / "wanted", "", {**PAD, "do_pad": image_mode == "pad"})
        assert_same_pixels(file, wanted, image_mode)
    with pytest.raises(data.UserError, match="got size"):
        data.image_settings(file, file, S, "crop")


@pytest.mark.parametrize("image_mode", ["auto", "pad"])
def test_image_settings_of_the_clip_folder_are_used_and_exported(tmp_path, world, image_mode):
    """Also where the folder of --llm has others."""
    llm, clip = tmp_path / "llm", tmp_path / "clip"
    tokenizer = tiny.make_tokenizer(llm, specials=False)
    tiny.randomise(hf.LlamaForCausalLM(tiny.llama_config(tokenizer))).save_pretrained(llm)
    tiny.randomise(hf.CLIPVisionModel(tiny.clip_config())).save_pretrained(clip)
    for folder, changes in (clip, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}), (llm, {"do_resize": 0}):
        (folder / "preprocessor_config.json").write_text(json.dumps(GIVEN | changes))
    checkpoint = fsdp.open_checkpoint(options(llm=str(llm), clip=str(clip), image_mode=image_mode), world)
    processor, out = checkpoint.processor, tmp_path / "out"
    checkpoint.config.save_pretrained(out)
    data.save_processor(processor, checkpoint.config, out)
    for other in ({"resize": 21}, {"resample": 3}, {"mode": ""}, {"mean": (0.4,) * 3}, {"std": (0.4,) * 3},
                  {"grids": ((16, 32),)}):
        assert dataclasses.replace(processor, **other).pixel_settings != processor.pixel_settings
    assert_same_pixels(out)
    assert_same_pixels(clip, clip if image_mode == "auto" else out, image_mode)
