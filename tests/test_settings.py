"""What the settings of a checkpoint do: done, with cases that equal transformers; refused by name; or without
effect. A setting that is in none of the lists fails a test, so a new transformers shows its own.
"""
import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import data
import fsdp

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
    settings = data.picture_settings(str(folder), str(folder), S, image_mode)
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
    assert data.picture_settings(a, a, S, "auto") != data.picture_settings(b, b, S, "auto")


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
        assert data.picture_settings(tmp_path, tmp_path, S, "auto")[3] == edge


def test_an_unnamed_image_processor_is_that_of_the_model(tmp_path):
    """A LLaVA's pads, a CLIP's does not know do_pad."""
    for model_type, mode in (("llava", "pad"), ("clip", "crop")):
        folder = write_images(tmp_path, {"image_processor_type": None, "do_pad": True}, model_type=model_type)
        assert_same_pixels(folder)
        assert data.picture_settings(folder, folder, S, "auto")[0] == mode


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
    assert again.pictures == processor.pictures
    for other in ({"resize": 21}, {"resample": 3}, {"mode": ""}, {"mean": (0.4,) * 3}, {"std": (0.4,) * 3}):
        assert dataclasses.replace(again, **other).pictures != processor.pictures
    next(images()).resize((50, 30)).save(tmp_path / "a.png")
    with tiny.Image.open(tmp_path / "a.png") as image:
        expected = peer_pixels(clip if image_mode == "auto" else out, image)
        for found in (processor.pixels(tmp_path / "a.png"), peer_pixels(out, image)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_original_llava_pads_what_its_tower_wants(tmp_path):
    """image_aspect_ratio of its own config.json, all else from the folder of the tower."""
    write_images(tmp_path / "clip", {})
    own = write_images(tmp_path / "llava", {"image_mean": [0.9] * 3}, image_aspect_ratio="pad")
    expected = data.picture_settings(tmp_path, write_images(tmp_path / "wanted", PAD), S, "auto")
    assert data.picture_settings(own, tmp_path / "clip", S, "auto") == expected
