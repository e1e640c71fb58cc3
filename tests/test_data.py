"""data.py: token ids against those of the full string, pixels against transformers' processors, batches and
steps against brute force, and what is refused. Tokenizers are of LLaMA-2's and LLaMA-3's kind; the real ones
are used where they are present. In golden strings «…» is supervised.

Legend: P prompt length, S edge of an image in pixels."""
import dataclasses
import functools
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, TiffImagePlugin
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, LlavaNextProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import data

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENS, S = 4, 8  # of an image: 8 × 8 pixels in patches of 4 × 4


# ---- tokenizers ----

def llama3_like():
    """Byte-level BPE: no space and no BOS added; the EOS does not end a turn. With ChatML's tokens too."""
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # LLaMA-3's
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(tiny.CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    names = "begin_of_text end_of_text start_header_id end_header_id eot_id im_start im_end"
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizer folders by name; the real ones where they are present."""
    place, real = tmp_path_factory.mktemp("tokenizers"), SHARED / "real/tokenizers"
    tiny.make_tokenizer(place / "tiny2", specials=False)
    llama3_like().save_pretrained(place / "tiny3")
    config = {"model_type": "llava", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    (place / "tiny2/config.json").write_text(json.dumps(config))  # LLaVA's own: transformers cannot read it
    path = place / "tiny2/tokenizer_config.json"  # the class that most LLaMA checkpoints name
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    found = {name: place / name for name in ("tiny2", "tiny3")}
    return found | {name: real / name for name in ("llama2", "llama3") if (real / name).is_dir()}


def make_config(vocab_size=200_000, image_token=-1):
    """What load_processor reads and writes of a LlavaConfig."""
    return SimpleNamespace(
        model_type="llava", image_token_index=image_token, image_seq_length=TOKENS,
        vision_feature_select_strategy="default",
        text_config=SimpleNamespace(vocab_size=vocab_size),
        vision_config=SimpleNamespace(image_size=S, patch_size=4))


def load(folder, template="vicuna", config=None, **options):
    args = tiny.options(template=template, **options)
    return data.load_processor(str(folder), config or make_config(), args)[0]


@pytest.fixture(scope="module")
def loaded(folders):
    """Processors by tokenizer and template, loaded once."""
    @functools.cache
    def get(name, template="vicuna"):
        return load(folders[name], template) if name in folders else pytest.skip(f"no {SHARED}/real")
    return get


def roles_and_contents(turns, system=None):
    roles, contents = ["human", "gpt", "human"][:len(turns) - 1], turns[:-1]
    return (["system", *roles], [system, *contents]) if system else (roles, contents)


def encode(processor, turns, system=None, all_turns=True):
    """Turns, human first, and a system turn as Template.encode takes them."""
    return processor.template.encode(*roles_and_contents(turns, system), turns[-1], all_turns)


def assert_golden(processor, golden, turns, system=None):
    """The ids and the mask are those of the golden string, tokenised as one."""
    tokenizer = processor.tokenizer
    golden = golden.replace("<s>", tokenizer.bos_token).replace("</s>", tokenizer.eos_token)
    supervised = [i % 2 == 1 for i, part in enumerate(re.split("[«»]", golden)) for _ in part]
    coded = tokenizer(re.sub("[«»]", "", golden), add_special_tokens=False, return_offsets_mapping=True)
    mask = [supervised[start] for start, _ in coded.offset_mapping]
    assert encode(processor, turns, system) == (coded.input_ids, mask)


# ---- ids ----

TURNS = ["What is it?", "A cat", "Which colour?", "Black"]
IMAGE_FIRST, IMAGE_LAST = ["<image>\nWhat is it?", "A cat"], ["What is it?\n<image>", "A cat"]
IMAGE_LATER = ["<image>\nCompare <image> to it.", "Blue", "And <image>?", "A dog"]
CHAT = ("A chat between a curious human and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the human's questions. ")
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
GOLDEN = {  # (turns, system turn, string by hand)
    "vicuna": [
        (IMAGE_LATER, None, f"<s>{CHAT}USER: <image>\nCompare <image> to it. ASSISTANT:« Blue</s>»"
                            "USER: And <image>? ASSISTANT:« A dog</s>»")],
    "llama2": [
        (IMAGE_LATER, None, "<s>[INST] <image>\nCompare <image> to it. [/INST]« Blue </s>»"
                            "<s>[INST] And <image>? [/INST]« A dog </s>»")],
    "llama3": [
        (IMAGE_LATER, None, f"<s>{USER}<image>\nCompare <image> to it.{ASSISTANT}«Blue<|eot_id|>»"
                            f"{USER}And <image>?{ASSISTANT}«A dog<|eot_id|>»")],
    "plain": [  # only the images of the human turn are left
        (IMAGE_FIRST, None, "<s><image>«A cat\n»"),
        (["Compare <image> to <image>.", "Blue"], None, "<s><image><image>«Blue\n»")]}
ANY_WORDS = {
    "vicuna": "<s>{0} USER: {1} ASSISTANT:« {2}</s>»USER: {3} ASSISTANT:« {4}</s>»",
    "llama2": "<s>[INST] <<SYS>>\n{0}x\n<</SYS>>\n\n{1} [/INST]« {2} </s>»<s>[INST] {3} [/INST]« {4} </s>»",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n{0}<|eot_id|>"
              f"{USER}{{1}}{ASSISTANT}«{{2}}<|eot_id|>»{USER}{{3}}{ASSISTANT}«{{4}}<|eot_id|>»"}
NAMES = ["tiny2", "tiny3", "llama2", "llama3"]
PAIRS = [(template, name) for template in GOLDEN for name in NAMES
         if template != "llama3" or name.endswith("3")]  # its turns need LLaMA-3's tokens
TINY_PAIRS = [pair for pair in PAIRS if "tiny" in pair[1]]


@pytest.mark.parametrize("template, name", PAIRS)
def test_piecewise_ids_are_those_of_the_full_string(loaded, template, name):
    """So are the mask, of all answers or the last, the tokens that stop sampling and the prompt as text."""
    processor, rng = loaded(name, template), random.Random(0)
    tokenizer = processor.tokenizer
    for turns, system, golden in GOLDEN[template]:
        assert_golden(processor, golden, turns, system)
        ids, mask = encode(processor, turns, system)
        assert processor.end_ids == {ids[-1], tokenizer.eos_token_id}
        last = [i >= len(ids) - mask[::-1].index(False) for i in range(len(ids))]
        assert encode(processor, turns, system, all_turns=False) == (ids, last)
        conversation = data.Conversation("1", *roles_and_contents(turns, system), turns[-1:], [])
        prompt = golden[:golden.rindex("«")].replace("«", "").replace("»", "").rstrip(" ")
        prompt = prompt.replace("<s>", tokenizer.bos_token).replace("</s>", tokenizer.eos_token)
        assert processor.template.render(conversation) == prompt
    parts = "cat A 7 2026 ? ... ( 's é 猫 🙂 _ [ <".split() + ["\n", "\n\n", " ", "  ", "\t"]
    for _ in range(60 if template in ANY_WORDS else 0):
        said = ["".join(rng.choices(parts + ["<image>"] * (i in (1, 3)), k=rng.randint(1, 6))).strip() or "x"
                for i in range(5)]
        system = said[0] + "x" * (template == "llama2")  # a sign would form one token with the "\n" behind it
        assert_golden(processor, ANY_WORDS[template].format(*said), said[1:], system)


TRICKY = ["cat", "A", "7", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "<image>", "</s>", "<s>", "▁", "▁▁",
          "a▁b", " x", "x ", "é", "猫", "🙂", "'s", "USER:", "[INST]", "<unk>", "<|eot_id|>", "\u00a0", "."]


@pytest.mark.parametrize("name", NAMES)
def test_records_tokenised_together_have_the_ids_of_one_at_a_time(folders, loaded, monkeypatch, name):
    """And those that tokenizer.json gives the full text, typed special tokens included, in few calls."""
    one_by_one, rng = loaded(name).template, random.Random(1)
    together, batches = load(folders[name]), []
    learn, tokenizer = together.template.learn, together.tokenizer
    monkeypatch.setattr(together.template, "learn", lambda units: batches.append(units) or learn(units))
    system, answer = f"Be {tokenizer.eos_token} kind. <image>", f"<image> {tokenizer.bos_token}"

    def build(texts):
        conversations = [(i, data.Conversation(str(i), ["system", "human"], [system, text], [answer],
                                               ["a.png"] * text.count("<image>")))
                         for i, text in enumerate(texts)]
        return data.build_examples(conversations, together, "turns")[0]
    build([f"Is {i} or {i + 1} a cat?" for i in range(50)])
    units = [unit for batch in batches for unit in batch]
    assert len(units) == len(set(units)) and len(batches) <= (60 if name.endswith("2") else 5)
    texts = ["".join(rng.choices(TRICKY, k=rng.randint(1, 8))) for _ in range(150)]
    for example, text in zip(build(texts), texts):
        ids, mask = one_by_one.encode(["system", "human"], [system, text], answer)
        assert [*example.prompt, *example.answers[0]] == ids
        assert [False] * len(example.prompt) + example.token_masks[0].tolist() == mask
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, together.image_token]
        assert [ids.count(i) for i in special] == [1, 1, text.count("<image>")]  # the template's, and images
    rust = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    rust.encode_special_tokens = True  # what people write is text
    for text in ["", "x", "x  ", " ▁", "\n ", "a  b ▁c", *TRICKY, *texts, *data.VARIED]:
        assert together.template.ids(text) == rust.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("change", [
    lambda spec: (spec["model"]["vocab"].update({"▁a▁": 999}), spec["model"]["merges"].append(["▁a", "▁"])),
    lambda spec: spec["added_tokens"][0].update(special=False),
    lambda spec: spec["model"].update(ignore_merges=True),
    lambda spec: spec.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    lambda spec: spec["normalizer"]["normalizers"].append({"type": "Lowercase"})])
def test_a_tokenizer_whose_words_depend_on_each_other_gets_texts_in_full(folders, change):
    spec = json.loads((folders["tiny2"] / "tokenizer.json").read_text())
    for expected in (True, False):
        rust = Tokenizer.from_str(json.dumps(spec))
        assert data.words_are_apart(PreTrainedTokenizerFast(tokenizer_object=rust)) == expected
        change(spec)


# ---- --template auto ----

LLAVA_HF = """{% for message in messages %}\
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""  # the images' branch is left out
CHATML = """{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BARE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
ROLES = """{{ bos_token }}{% for m in messages %}\
{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"""  # Phi-3's and Zephyr's kind
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
IM_USER, IM_ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
AUTO = {  # case: (template, tokenizer, tokens that stop sampling, generation_config's, golden strings)
    # no end token of its own: the tokenizer's is put behind every answer, as LLaVA was trained
    "llava-hf": (LLAVA_HF, "tiny2", {"</s>"}, 5, [
        (IMAGE_FIRST, None, "<s>USER: <image>\nWhat is it? ASSISTANT:« A cat</s>»"),
        (TURNS, "Be kind.", "<s>Be kind. USER: What is it? ASSISTANT:« A cat</s>»USER: Which colour? "
                            "ASSISTANT:« Black</s>»")]),
    # this tokenizer adds no BOS and the template has none; what follows the end token is not supervised
    "chatml": (CHATML, "tiny3", {"<|im_end|>", "</s>"}, None, [
        (TURNS, "Be kind.", f"<|im_start|>system\nBe kind.<|im_end|>\n{IM_USER}What is it?{IM_ANSWER}«A cat"
                            f"<|im_end|>»\n{IM_USER}Which colour?{IM_ANSWER}«Black<|im_end|>»")]),
    # a tokenizer that adds a BOS gives one to a template without
    "no BOS, no system": (NO_SYSTEM + BARE, "tiny2", {"</s>"}, [5, 6], [
        (IMAGE_LAST, None, "<s>user What is it?\n<image></s>assistant« A cat</s>»")])}


def with_template(folder, out, jinja):
    """A copy of a tokenizer's folder that has a chat template."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (Path(out) / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    return str(out)


@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "processor_config.json"])
@pytest.mark.parametrize("case", AUTO)
def test_the_checkpoints_own_template_gives_the_ids_of_the_full_string(folders, tmp_path, case, where):
    """A processor's template, in a .json file, comes first. generation_config's end tokens stop sampling."""
    jinja, name, stop, eos, golden = AUTO[case]
    folder = with_template(folders[name], tmp_path, jinja)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if where.endswith(".json"):
        (tmp_path / "chat_template.jinja").write_text(ROLES)
        (tmp_path / where).write_text(json.dumps({"chat_template": jinja}))
    processor = load(folder, "auto")
    for turns, system, text in golden:
        assert_golden(processor, text, turns, system)
    tokenizer = processor.tokenizer
    stop = [token.replace("</s>", tokenizer.eos_token) for token in stop]
    eos = eos if isinstance(eos, list) else [eos]
    assert processor.end_ids == {*tokenizer.convert_tokens_to_ids(stop), *eos} - {None}
    assert load(folder, "vicuna").end_ids == {tokenizer.eos_token_id}
    assert tokenizer.chat_template == jinja  # what an export will hold


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}], ids="-".join)
def test_added_tokens_that_a_template_writes_are_control_tokens(folders, tmp_path, flags):
    """Though no flag says so: ids in its text, text in a user's. An export keeps this."""
    tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    folder = with_template(folders["tiny2"], tmp_path / "folder", ROLES)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([*tokens, "<b>", "\n\n"])
    tokenizer.save_pretrained(folder)
    spec = json.loads((tmp_path / "folder/tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        if token["content"] in tokens:
            token.update({"normalized": False, **flags, "special": False})
    (tmp_path / "folder/tokenizer.json").write_text(json.dumps(spec))
    processor = load(folder, "auto")
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    assert_golden(processor, "<s><|user|>\nWhat is it?<|end|>\n<|assistant|>\n«A cat<|end|>»\n<|user|>\n"
                             "Which colour?<|end|>\n<|assistant|>\n«Black<|end|>»", TURNS)
    typed = ["Say <b>\n\n" + "".join(tokens) + "!", "A" + tokens[-1] + "."]
    coded = encode(processor, typed)[0]
    expected = Counter(i for i in encode(processor, ["a", "b"])[0] if i in ids)
    assert Counter(i for i in coded if i in ids) == expected
    assert processor.end_ids == {ids[-1], processor.tokenizer.eos_token_id}
    assert processor.text([*ids, *processor.template.ids(typed[0]), ids[-1]]) == typed[0]
    b = processor.tokenizer.convert_tokens_to_ids("<b>")  # an added token that stays as it is
    assert b in coded and b not in processor.template.special_ids.values()
    data.save_processor(processor, make_config(), str(tmp_path))
    again = load(tmp_path, "auto")
    assert encode(again, typed) == encode(processor, typed) and again.end_ids == processor.end_ids


ANY, NO_TOKEN = r"--template vicuna\|llama2", "an answer with '<|%s|>', which is no token"
REFUSED_TEMPLATES = {  # case: (chat template, --template, system turn, what the error says)
    **{case: (jinja, "auto", None, f"cannot be used.*it reorders, repeats or drops messages.*{ANY}")
       for case, jinja in {"reorders": "{% for m in messages | reverse %}{{ m['content'] }}</s>{% endfor %}",
                           "repeats": "{% for m in messages %}{{ m['content'] * 2 }}</s>{% endfor %}",
                           "drops": "{{ messages[0]['content'] }}</s>"}.items()},
    "raises": (NO_SYSTEM + BARE, "auto", "Be kind.", f"cannot be used.*no system turn.*{ANY}"),
    "endless": ("{% for a in range(99999) %}{% for b in range(50) %}{% endfor %}{% endfor %}", "auto", None,
                f"takes more than 0.2 s: give {ANY}"),
    "of another tokenizer": (CHATML, "auto", None, re.escape(NO_TOKEN % "im_end")),
    "named, of another tokenizer": (None, "llama3", None, re.escape(NO_TOKEN % "eot_id")),
    "none": (None, "auto", None, f"has no chat template: give {ANY}"),
    "unknown": (None, "no.jinja", None, "got --template no.jinja, need auto, vicuna, llama2, llama3, plain")}


@pytest.mark.parametrize("case", REFUSED_TEMPLATES)
def test_a_template_that_cannot_be_used_is_refused(folders, tmp_path, monkeypatch, case):
    jinja, template, system, words = REFUSED_TEMPLATES[case]
    folder = with_template(folders["tiny2"], tmp_path, jinja) if jinja else folders["tiny2"]
    if case == "endless":
        monkeypatch.setattr(data, "TEMPLATE_SECONDS", 0.2)
    with pytest.raises(data.UserError, match=words):
        encode(load(folder, template), TURNS, system)


# ---- length ----

@pytest.mark.parametrize("turns, answers", [
    (IMAGE_FIRST[:1], ["A cat"]), (IMAGE_LATER[:3], ["A dog"]),
    (IMAGE_FIRST[:1], ["A cat", "A cat, black, and the blue sky", "It is a dog"])])
def test_max_len_cuts_each_answer_by_itself_and_never_an_image_or_the_prompt(loaded, turns, answers):
    """The prompt in full or no example; all supervised tokens that fit, and nothing behind the last."""
    processor, images = loaded("tiny2"), [f"{i}.png" for i in range("".join(turns).count("<image>"))]
    conversation = data.Conversation("1", *roles_and_contents([*turns, ""]), answers, images)

    def positions(ids, mask):
        return [position for i, m in zip(ids, mask)
                for position in [(i, m)] * (TOKENS if i == processor.image_token else 1)]
    full = [positions(*encode(processor, [*turns, answer])) for answer in answers]
    P = [supervised for _, supervised in full[0]].index(True)
    for max_len in range(1, max(map(len, full)) + 3):
        short = dataclasses.replace(processor, max_len=max_len)
        example, cut = short.example(0, conversation, answers, all_turns=len(answers) == 1)
        fits = [one[:max_len] for one in full]
        for one in fits:
            while one and not one[-1][1]:
                one.pop()
        if example is None:
            assert max_len <= P and not any(fits)
            continue
        for one, ids, mask in zip(fits, example.answers, example.token_masks, strict=True):
            mask = [False] * len(example.prompt) + mask.tolist()
            assert positions([*example.prompt, *ids], mask) == one and len(one) > P
        assert cut == (sum(m for one in fits for _, m in one) < sum(m for one in full for _, m in one))
        shown = [*example.prompt, *np.concatenate(example.answers)].count(processor.image_token)
        assert example.images == images[:shown]


@pytest.mark.parametrize("which", ["turns", "answers", "ranked", "prompt"])
def test_records_whose_prompt_does_not_fit_are_counted(loaded, which):
    """None left is an error that names --max_len."""
    short = data.Conversation("1", ["human"], ["Hi"], ["Hello", "No"], [])
    with_image = data.Conversation("2", ["human"], ["<image>\nHi"], ["Hello", "No"], ["a.png"])
    processor = loaded("tiny2", "llama2")
    P = len(processor.example(0, short, [])[0].prompt)
    processor = dataclasses.replace(processor, max_len=P + 3)  # <image> and "\n" take TOKENS + 2
    examples, counts = data.build_examples([(3, with_image), (5, short), (8, with_image)], processor, which)
    answers = {"turns": 1, "prompt": 0}.get(which, 2)
    assert [(e.index, e.id, len(e.answers)) for e in examples] == [(5, "1", answers)]
    assert counts == {"too_long": 2, "cut": int(which != "prompt")}
    words = rf"none of 1 records fits --max_len {P + 3}: .* takes up to {TOKENS} "
    with pytest.raises(data.UserError, match=words):
        data.build_examples([(3, with_image)], processor, which)


# ---- pixels ----

def noise(width, height, seed=0):
    return Image.fromarray((np.random.RandomState(seed).rand(height, width, 3) * 255).astype(np.uint8))


@pytest.mark.parametrize("resample", data.FILTERS)
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size, resize", [(7, 7), (24, 24), (24, 37), (56, 56)])
def test_pixels_equal_transformers(mode, size, resize, resample):
    """Odd and even, enlarged and reduced, wide and tall, with a checkpoint's own mean and deviation."""
    mean, std = ((0.5, 0.4, 0.2), (0.5, 0.1, 0.2)) if resize > size else (data.CLIP_MEAN, data.CLIP_STD)
    kind, pad = {"crop": (CLIPImageProcessorPil, {}), "pad": (LlavaImageProcessorPil, {"do_pad": True})}[mode]
    peer = kind(size={"shortest_edge": resize}, crop_size={"height": size, "width": size}, resample=resample,
                do_convert_rgb=True, image_mean=mean, image_std=std, **pad)
    for short, ratio in itertools.product((1, 2, 5, 23, 24, 57, 80), (1, 1.31, 2, 2.04, 4.01, 7.3, 33.37)):
        long = max(short, round(short * ratio))
        for edges in ((short, long), (long, short)):
            image = noise(*edges, seed=short + long)
            if short % 2:
                image = image.point(lambda value: 255 * (value > 127))  # overshoots at both ends
            pixels = data.to_pixels(image, size, mode, mean, std, resize, resample)
            assert pixels.dtype == torch.float32 and pixels.shape == (3, size, size)
            expected = peer(image, return_tensors="pt")["pixel_values"][0]
            assert (pixels - expected).abs().max() < 2e-6, edges  # levels of a byte differ by 0.007 or more


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("edges", [(1, 20000), (65535, 2)])
def test_a_narrow_image_takes_little_memory(mode, edges):
    """White is (1 - mean) / std; the background, if there is any, is the mean colour as a byte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    white = Image.new("RGB", edges, (255, 255, 255))
    pixels = data.to_pixels(white, 336, mode, (0.5, 0.4, 0.2), (0.5, 0.1, 0.2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KB
    corner = [1, 6, 4] if mode == "crop" else [(127 / 255 - 0.5) / 0.5, 0, 0]
    assert pixels[:, 0, 0].tolist() == pytest.approx(corner, abs=1e-6)
    assert (pixels[0, 168, 168] > pixels[0, 0, 0]) == (mode == "pad")


RED = Image.new("RGB", (12, 10), (255, 0, 0))
KINDS = {  # (image, format, its first pixel as RGB)
    "palette": (RED.quantize(4), "GIF", (255, 0, 0)),
    # transparency is dropped, as in LLaVA and transformers up to 4.45; 5.23 puts a white background
    "RGBA": (Image.new("RGBA", (12, 10), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
    "1 bit": (Image.new("1", (12, 10), 1), "BMP", (255, 255, 255)),
    "CMYK": (Image.new("CMYK", (12, 10), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
    "WebP": (RED, "WEBP", (255, 0, 0)), "TIFF": (RED, "TIFF", (255, 0, 0)),
    "a phone's JPEG with a second image": (RED, "MPO", (255, 0, 0))}


@pytest.mark.parametrize("name", KINDS)
def test_every_common_kind_of_image_becomes_rgb(tmp_path, name):
    """Whatever the file is called."""
    (image, kind, color), path = KINDS[name], tmp_path / "a.jpg"
    image.save(path, kind, **({"save_all": True, "append_images": [RED]} if kind == "MPO" else {}))
    result = data.read_image(path)
    assert result.mode == "RGB" and result.size == (12, 10) and data.image_error(path) is None
    assert max(abs(a - b) for a, b in zip(result.getpixel((0, 0)), color)) <= 3


def test_16_bit_grey_keeps_its_greys_and_exif_turns_an_image_upright(tmp_path):
    """257 levels become one, not 256."""
    greys = np.array([[0, 257, 1000, 128 * 257, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(greys).save(tmp_path / "grey.png")
    assert np.asarray(data.read_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 1, 3, 128, 254, 255]
    for orientation, upright in ((3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))):
        stored, exif = noise(5, 3), Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(data.read_image(tmp_path / "a.png"), upright(np.asarray(stored)))


def image_bytes(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or noise(300, 200)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content, words", [
    *((image_bytes(kind, **options), "truncated|Truncated|broken")
      for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}))),
    (b"<html>404 not found</html>", "corrupt"),
    (image_bytes("EPS"), "not one of the formats that are opened .JPEG, PNG"),  # Pillow runs a program for it
    (image_bytes("PPM"), "not one of the formats that are opened .JPEG, PNG"),
    (image_bytes("PNG", noise(65536, 1)), "got 65536 × 1 pixels, need at most"),
    (image_bytes("PNG", Image.new("1", (9500, 9500))), "got 9500 × 9500 pixels, need at most")])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_truncated_corrupt_uncommon_and_huge_images_are_refused(tmp_path, monkeypatch, content, words, share):
    """By the check before the run and by the loader."""
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "a.jpg").write_bytes(content[:int(share * len(content))])
    error = data.image_error(tmp_path / "a.jpg")
    assert re.search(rf"cannot read the image {tmp_path}/a\.jpg: .*({words})", error)
    with pytest.raises(data.UserError, match=words):
        data.read_image(tmp_path / "a.jpg")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Good and bad image files, a comma in a name, a folder below, a file outside, links."""
    folder = tmp_path_factory.mktemp("records") / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "x,y.png", "sub/c.png", "../outside.png")):
        noise(9, 7, seed=i).save(folder / name)
    (folder / "cut.jpg").write_bytes(image_bytes("JPEG")[:500])
    for name, target in (("out.png", "../outside.png"), ("outer", ".."), ("in.png", "a.png")):
        (folder / name).symlink_to(target)
    return str(folder)


# ---- batches ----
IMAGE_ID, PAD = 9, 0
PROCESSOR = data.Processor(  # without a tokenizer: ids 1 … 8 are words
    None, None, IMAGE_ID, TOKENS, S, "crop", data.CLIP_MEAN, data.CLIP_STD, S, data.BICUBIC, (), PAD,
    frozenset(), frozenset(), 100)


def example(index, prompt, *answers, images=()):
    """Answers as (ids, mask)."""
    ids, masks = zip(*answers) if answers else ((), ())
    prompt, *ids = [np.array(one, dtype=np.int32) for one in (prompt, *ids)]
    return data.Example(index, f"r\x1b{index}", prompt, ids, [np.array(m) == 1 for m in masks], [*images])


def assert_equal_batches(batch, other, *, but=()):
    for name in (field.name for field in dataclasses.fields(batch) if field.name not in but):
        a, b = getattr(batch, name), getattr(other, name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, name


def test_a_batch_by_hand(images, monkeypatch):
    """Two ranked answers, two turns with an image between them, and a prompt. Each image is decoded once."""
    decoded, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: decoded.append(path) or read_image(path))
    a, b = f"{images}/a.png", f"{images}/b.png"
    examples = [
        example(0, [1, IMAGE_ID, 2], ([3, 4], [1, 1]), ([5], [1]), images=[b]),
        example(1, [6], ([7, 8, IMAGE_ID, 1, 2, 3], [1, 1, 0, 0, 1, 1]), images=[a]),
        example(2, [IMAGE_ID, IMAGE_ID], images=[b, a])]
    batch = data.collate(examples, PROCESSOR)
    assert decoded == [b, a]
    assert_equal_batches(batch, data.collate(examples, PROCESSOR, torch.zeros(2, 3, S, S)), but=["pixels"])
    pixels = torch.stack([data.to_pixels(read_image(path), S) for path in (b, a)])
    assert decoded == [b, a] and torch.equal(batch.pixels, pixels)
    image = [IMAGE_ID] * TOKENS
    expected = dict(
        ids=[[1, *image, 2, 3, 4, 5, PAD], [6, 7, 8, *image, 1, 2, 3], [*image, *image, PAD, PAD]],
        position=[[0, 1, 2, 3, 4, 5, 6, 7, 6, 0], [*range(10)], [*range(8), 0, 0]],
        branch=[[0] * 6 + [1, 1, 2, -1], [0] + [1] * 9, [0] * 8 + [-1, -1]],
        image_feature=[*range(8), *range(8)], image_position=[1, 2, 3, 4, 13, 14, 15, 16, *range(20, 28)],
        target=[3, 4, 5, 7, 8, 2, 3], logit_position=[5, 6, 5, 10, 11, 17, 18],  # 3 and 5 follow the prompt
        answer=[0, 0, 1, 2, 2, 2, 2], last_token=[7, 8, 19], sequence=[0, 0, 1],
        causal_prefix=6, token_shape=(3, 4), answer_shape=(3, 2))
    for name, value in expected.items():
        found = getattr(batch, name)
        assert (found.tolist() if torch.is_tensor(found) else found) == value, name
        assert not torch.is_tensor(found) or found.dtype == torch.int64, name
    assert_equal_batches(batch, batch.to("cpu"))
    assert data.collate(examples[1:], PROCESSOR).causal_prefix == 10  # one answer each: causal throughout
    empty = data.collate([], PROCESSOR)
    assert empty.branch.tolist() == [[-1]] and empty.answer_shape == (0, 0) and not len(empty.target)
    assert empty.pixels.shape == (1, 3, S, S)  # blank: every rank runs the tower
    for paths in ([], [a, b]):
        with pytest.raises((AssertionError, ValueError)):
            data.collate([example(0, [1, IMAGE_ID, 2], images=paths)], PROCESSOR)


def test_an_image_lost_during_the_run_is_named(tmp_path, images):
    """With its file and record, whether it was deleted or truncated."""
    good, cut = f"{images}/a.png", tmp_path / "cut.png"
    cut.write_bytes(Path(good).read_bytes()[:60])
    for path in (str(cut), str(tmp_path / "lost.png")):
        examples = [example(i, [1, IMAGE_ID], images=[image]) for i, image in ((3, good), (4, path))]
        examples[1].file = "b.json", 3
        words = rf"^b.json: record 1 \(id r\\x1b4\): cannot read the image {path}: .*readable when the run"
        for workers in (0, 1):
            with pytest.raises(data.UserError, match=words):
                list(data.Loader(make_steps(examples), 0, 1, workers))


# ---- LLaVA-NeXT's tiles ----

GRIDS = tuple((height * S, width * S) for height, width in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
TILED = dataclasses.replace(PROCESSOR, grids=GRIDS, mode="tiles")


def oriented(kind, orientation, late=False):
    """An image of 30 × 20 pixels with an EXIF orientation. late: behind the pixels, as some programs do."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_bytes(kind, noise(30, 20), exif=exif)
    if late:
        start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
        content = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    return content


def test_the_header_tells_of_xmp(tmp_path):
    """An orientation behind the pixels of a PNG, and one that a TIFF has in XMP alone."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + xmp
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png, tags = image_bytes("PNG", noise(30, 20)), TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = xmp
    for name, content in (("png", png[:-12] + chunk + png[-12:]),
                          ("tiff", image_bytes("TIFF", noise(30, 20), tiffinfo=tags))):
        path = tmp_path / name
        path.write_bytes(content)
        assert data.image_size(str(path)) == data.read_image(str(path)).size == (20, 30), name


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "WEBP", "TIFF"])
def test_the_header_tells_the_size_of_the_decoded_image(tmp_path, kind, orientation):
    """And that of its corrupted crop."""
    path = str(tmp_path / "a")
    Path(path).write_bytes(oriented(kind.removeprefix("late "), orientation, kind == "late PNG"))
    assert data.image_size(path) == data.read_image(path).size == ((30, 20) if orientation < 5 else (20, 30))
    for index in range(5):
        crop = data.Corrupted(path, 0, index)
        assert data.image_size(crop) == data.corrupt(crop).size


def test_an_image_has_as_many_tokens_as_in_transformers():
    """In LLaVA-1.6's grids, in two orders, of extreme and random shapes: all lines of a grid may be padding;
    352 / 748 of 672 is a whole number of patches, but not in floating point."""
    rng, counts, wide = random.Random(0), set(), [[336 * y // S, 336 * x // S] for y, x in GRIDS]
    sizes = [(1, 1), (336, 336), (672, 672), (1, 5000), (9000, 3), (65535, 7), (1009, 336), (352, 748)]
    sizes += [(rng.randint(1, edge), rng.randint(1, edge)) for edge in (50, 700, 5000) for _ in range(300)]
    for (width, height), grids in itertools.product(sizes, (wide, wide[::-1])):
        fields = SimpleNamespace(image_processor=SimpleNamespace(image_grid_pinpoints=grids), patch_size=14,
                                 num_additional_image_tokens=1)
        fields._get_unpadded_features = functools.partial(LlavaNextProcessor._get_unpadded_features, fields)
        layout, tiles = data.feature_layout((width, height), 576, 336, tuple(map(tuple, grids)))
        expected = LlavaNextProcessor._get_number_of_features(fields, height, width, 336, 336)
        assert len(layout) == expected - 1, (width, height)  # the class token is none
        assert layout.max() < 576 * tiles and {*layout[layout >= 0]} >= {*range(576)}
        counts.add(len(layout))
    assert min(counts) == 576 and max(counts) == 576 * 5 + 48


def test_tiles_are_counted_in_lengths_and_cut_to_max_len(loaded, tmp_path):
    """In the prompt and in later turns, whose images count as the answer's."""
    for name, size in (("a", (30, 20)), ("b", (9, 80))):
        noise(*size).save(tmp_path / f"{name}.png")
    loaded = dataclasses.replace(loaded("tiny2"), grids=GRIDS, mode="tiles", max_len=10**4)
    turns = [("human", "<image>\nA?"), ("gpt", "yes"), ("human", "<image> B?"), ("gpt", "no")]
    conversation = data.read_record(make_record(*turns, image=["a.png", "b.png"]), tmp_path)

    def packed(max_len):
        processor = dataclasses.replace(loaded, max_len=max_len)
        example, cut = processor.example(0, conversation, ["no, no"], True)
        if example is None:
            return [], cut
        sequence = data.pack(example, processor)
        steps = data.Steps([example], processor, 1, 1, 0, 1)
        assert steps.lengths == [sequence.shape[1]] and data.collate([example], processor).ids.numel()
        return sequence[0].tolist(), cut
    full, cut = packed(10**4)
    tokens = sum(loaded.image_lengths(conversation.images))
    # base views; two lines of four and their newlines; six lines of which only the newline is no padding
    assert full.count(loaded.image_token) == tokens == 4 + 2 * 5 + 4 + 6 and not cut
    lengths = [len(ids) for ids, cut in map(packed, range(1, len(full) + 1)) if ids]
    for max_len in range(1, len(full)):
        ids, cut = packed(max_len)
        assert ids == full[:len(ids)] and len(ids) <= max_len and (cut or not ids)
    assert len({*lengths}) > 4 and lengths[-1] == len(full)


def test_an_image_that_changes_its_size_during_the_run_is_named(tmp_path):
    path = str(tmp_path / "a.png")
    noise(30, 20).save(path)
    examples = [example(3, [1, IMAGE_ID], images=[path])]
    data.collate(examples, TILED)
    noise(20, 30).save(path)
    words = rf"record 3 .*: cannot use the image {path}: its size is \(20, 30\), but was \(30, 20\) when"
    with pytest.raises(data.UserError, match=words):
        data.collate(examples, TILED)


# ---- steps ----

def make_examples(n, *paths):
    """Of random lengths, each with one of the images."""
    rng = random.Random(0)
    return [example(i, [1] * rng.randint(1, 30) + [IMAGE_ID] * len(paths[:1]),
                    *[([2] * n, [1] * n) for n in (rng.randint(1, 9), 3)],
                    images=rng.choices(paths, k=1) if paths else []) for i in range(n)]


def make_steps(examples, batch_size=8, micro_batch=2, rank=0, world_size=1, **options):
    return data.Steps(examples, PROCESSOR, batch_size, micro_batch, rank, world_size, **options)


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_do_not_depend_on_ranks_or_micro_batches(shuffle, by_length):
    """In the order of lengths or of the file. Every rank has equally many micro-batches."""
    examples, options = make_examples(29), dict(shuffle=shuffle, by_length=by_length, seed=3)
    for step in range(8):
        expected = sum(make_steps(examples, **options).groups(step), [])
        in_order = make_steps(examples, **{**options, "by_length": False}).groups(step)
        lengths = [sum(map(len, (examples[i].prompt, *examples[i].answers))) for i in expected]
        assert len(expected) == (8 if (step + 1) % 4 else 5) and sorted(expected) == sorted(sum(in_order, []))
        assert not by_length or lengths == sorted(lengths)
        assert shuffle or sum(in_order, []) == list(range(29))[step % 4 * 8:][:8]
        for world_size, micro_batch in itertools.product((1, 2, 4), (1, 2, 3, 8, 50)):
            ranks = [make_steps(examples, 8, micro_batch, rank, world_size, **options).groups(step)
                     for rank in range(world_size)]
            groups = [group for groups in zip(*ranks, strict=True) for group in groups]
            assert sum(groups, []) == expected and all(len(group) <= micro_batch for group in groups)
            assert len(groups) == world_size * -(-len(expected) // (world_size * micro_batch))


def test_every_example_comes_once_per_epoch_in_an_order_of_seed_and_epoch():
    """drop_last: full steps only; over epochs every example still comes; too few are one short step."""
    def epochs(n=29, which=(0, 1, 2), **options):
        steps = make_steps(make_examples(n), by_length=False, **options)
        return [[sum(steps.groups(epoch * len(steps) + k), []) for k in range(len(steps))] for epoch in which]
    orders = [tuple(sum(epoch, [])) for seed in (0, 1) for epoch in epochs(seed=seed)]
    assert {tuple(sorted(order)) for order in orders} == {(*range(29),)}
    assert len({*orders, (*range(29),)}) == 7 and epochs(which=(2, 1, 0)) == epochs()[::-1]
    full = epochs(which=range(6), drop_last=True)
    assert {len(step) for epoch in full for step in epoch} == {8} and {len(epoch) for epoch in full} == {3}
    assert all(len(set(sum(epoch, []))) == 24 for epoch in full)
    assert set(sum(sum(full, []), [])) == set(range(29))
    assert [len(epoch) for epoch in epochs(24, drop_last=True)] == [3] * 3
    assert [sorted(sum(epoch, [])) for epoch in epochs(5, drop_last=True)] == [[0, 1, 2, 3, 4]] * 3
    keys = [(7,), (7, 0), (7, 0, 0), (7, 1), (7, 1, 0), (7, 0, 1), (8, 0)]  # also of different lengths
    assert len({tuple(data.keyed_permutation(50, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_yields_the_steps_batches_in_every_pass(images, workers):
    """Into the next epoch."""
    examples = make_examples(11, f"{images}/a.png", f"{images}/b.png")
    steps = make_steps(examples, 4, 1, rank=1, world_size=2)
    loader = data.Loader(steps, 1, 4, workers)
    assert len(loader) == 3
    for _ in range(2):
        for step, micro_batches in enumerate(loader, 1):
            assert len(micro_batches) == 2  # of step 2 three examples are left: one rank has padding
            for batch, group in zip(micro_batches, steps.groups(step), strict=True):
                assert_equal_batches(batch, data.collate([steps.examples[i] for i in group], PROCESSOR))


class RecordedSteps:
    """Stands for data.Steps: item k is k. Notes which steps were begun, and by which threads."""

    def __init__(self, wait):
        self.wait, self.begun, self.threads = wait, [], set()

    def __getitem__(self, step):
        self.begun.append(step)
        self.threads.add(threading.current_thread())
        self.wait(step)
        return step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_keeps_the_order_and_a_bound(monkeypatch, workers):
    """At most two steps per worker and the one due are begun; an error comes where it is due."""
    def wait(step):
        time.sleep(0.02 * (step % 3))
        if step == 12:
            raise RuntimeError("step 12 is broken")
    monkeypatch.setattr(os, "fork", None)
    steps, found = RecordedSteps(wait), []
    with pytest.raises(RuntimeError, match="step 12 is broken"):
        for step in data.Loader(steps, 0, 20, workers):
            found.append(step)
            time.sleep(0.03)
            assert max(steps.begun) <= step + 2 * workers
    assert found == list(range(12)) and len(steps.threads) == max(workers, 1)
    assert (threading.main_thread() in steps.threads) == (workers == 0)


def test_a_loader_that_is_left_early_waits_for_nothing():
    """What is queued is not begun, and no thread stays."""
    release = threading.Event()
    steps = RecordedSteps(lambda step: step and release.wait(20))
    passing, start = iter(data.Loader(steps, 0, 100, 2)), time.time()
    assert next(passing) == 0
    del passing
    assert time.time() - start < 5
    release.set()
    for thread in steps.threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in steps.threads) and set(steps.begun) <= {0, 1, 2}


# ---- records ----

def make_record(*turns, image=None, id=7, **more):
    """Turns (role, value)."""
    turns = [{"from": role, "value": value} for role, value in turns]
    return {"id": id, "conversations": turns, "image": image, **more}


HUMAN, GPT, PAIR = ("human", "Hi"), ("gpt", "Hello"), ("gpt", ["a", "b"])
GOOD = make_record(HUMAN, GPT, id="good")


def test_a_record_becomes_a_conversation(images):
    """Texts are stripped. Missing placeholders go to the first human turn; only a human turn has any."""
    record = make_record(
        ("system", " See <image> "), ("human", "  Hi\n"), ("gpt", " An <image> "), ("human", "<image> two"),
        ("gpt", [" best ", "worst"]), image=["a.png", "b.png"], id=12)
    assert data.read_record(record, images) == data.Conversation(
        "12", ["system", "human", "gpt", "human"],
        ["See <image>", "<image>\n  Hi", "An <image>", "<image> two"], ["best", "worst"],
        [f"{images}/a.png", f"{images}/b.png"])
    prompt = {"id": 7, "conversations": make_record(HUMAN)["conversations"]}
    assert data.read_record(prompt, images, 0) == data.Conversation("7", ["human"], ["Hi"], [], [])
    for image, said, content in (
            ("a.png,b.png", "<image> and?", "<image>\n<image> and?"), ("a.png", "Hi\n<image>", "Hi\n<image>"),
            ("a.png,b.png,a.png", "Hi", "<image>\n" * 3 + "Hi"), ("a.png", "<image>?", "<image>?")):
        assert data.read_record(make_record(("human", said), GPT, image=image), images).contents == [content]


@pytest.mark.parametrize("value, names", [
    ("./sub/../a.png", ["a.png"]), (["b.png", "a.png", "b.png"], ["b.png", "a.png", "b.png"]),
    ("b.png, sub/c.png", ["b.png", "sub/c.png"]), ("x,y.png", ["x,y.png"]), ("in.png", ["in.png"]), ("", [])])
def test_paths_of_images(images, tmp_path, value, names):
    """A path, a list, paths joined by commas unless a file has the full name. The folder may be a link."""
    (tmp_path / "link").symlink_to(images)
    for folder in (images, str(tmp_path / "link")):
        assert data.image_list(value, folder) == [f"{folder}/{name}" for name in names]


def test_a_file_of_records_is_read_by_its_content(tmp_path):
    """A JSON list or one object per line, whatever it is called; U+2028 in a text does not end a line."""
    record = {**make_record(("human", "a\u2028b\u0085c"), GPT), "x": [{"a": "[,]\\"}, [], {}, "]", "é🙂"]}
    line, path = json.dumps(record, ensure_ascii=False), tmp_path / "records.txt"
    for text in (f"\n [{line} , {line}]\n", json.dumps([record, record], indent=1),
                 f"\ufeff[{line},{line}]", f"{line}\n\n{line}\n", f"\ufeff{line}\r\n{line}"):
        path.write_text(text, encoding="utf-8")
        assert data.load_records(str(path)) == [record, record]


@pytest.mark.parametrize("content, words", [
    (None, "no such file"), (b"", "got no records"), (b"[ ]", "got no records"), (b"\xff\xfe\x00", "utf-8"),
    (b"id,image\n", "not JSON"), (b'{"id": 1}\n{"id": 2}\n{"id": \n', "not JSON in line 3"),
    (b"[" * 200_000, "not JSON.*recursion"), (b"[" + b"9" * 5000 + b"]", "not JSON.*digits"),
    *((text, "not JSON") for text in (b"[1", b"[1,", b"[1 2]", b"[,1]", b"[1,]", b"[1]]", b"[1] 2"))])
def test_a_file_that_holds_no_records_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "records.jsonl").write_bytes(content)
    with pytest.raises(data.UserError, match=f"(?s){tmp_path}/records.jsonl.*{words}"):
        data.load_records(str(tmp_path / "records.jsonl"))


DEEP, CONVERT = json.loads("[" * 900 + "]" * 900), "examples/convert.py converts other layouts"
NEED = r'need \{"id", "image", "conversations"'
BAD_RECORDS = [  # (record, what the error says)
    ([1, 2], NEED), ({"id": 7, "conversations": "Hi"}, NEED), (make_record(), NEED),
    ({"id": 7, "prompt": "Hi", "chosen": "a"}, f"the fields id, prompt, chosen, {NEED}.*{CONVERT}"),
    ({"id": 7, "conversations": [{"from": "human"}]}, r"got the turn .*'human'.*need .*\"value\""),
    (make_record(("user", "Hi"), ("assistant", "Hello")), "got turns from .*user.*human and gpt in turn"),
    (make_record(HUMAN, GPT, ("system", "x"), HUMAN, GPT), "got turns from .*system may lead"),
    *((make_record(HUMAN, ("gpt", value)), "got the answer '.*, need text")
      for value in (" \n", ["Hello", ""], [], 3, None, DEEP)),
    (make_record(HUMAN, ("gpt", [{"type": "text", "text": "Hi"}])), CONVERT),
    (make_record(("human", [{"type": "image"}]), GPT), f"whose value is not text.*{CONVERT}"),
    (make_record(HUMAN, PAIR, HUMAN, GPT), "only the last gpt turn may be a list"),
    (make_record(HUMAN, ("gpt", ""), HUMAN, GPT), "got an empty gpt turn"),
    (make_record(("human", "Hi \ud83d"), GPT), "surrogate"),
    (make_record(HUMAN), "got no answer: the last turn is human"),
    (make_record(HUMAN, GPT, id=[7]), r"got the id \[7\], need a text or a whole number"),
    (make_record(("human", "<image> <image>"), GPT, image="a.png"), "got 2 <image> .* for 1 images"),
    *((make_record(("human", f"{text} Hi"), GPT, image="a.png"), "got '<.*need <image> there, and its file")
      for text in ("<img>a.png</img>", "<|image_1|>", "<start_of_image>")),
    (make_record(HUMAN, GPT, image="a.png,\x1b.png"), r"no such image: .*/\\x1b\.png \(see --images\)"),
    (make_record(HUMAN, GPT, image="sub"), "no such image"),
    *((make_record(HUMAN, GPT, image=name), f"got the image '{name}', outside --images")
      for name in ("../outside.png", "/etc/hostname", "out.png", "outer/outside.png")),
    *((make_record(HUMAN, GPT, image=value), f"got the image .{{,99}}, need a path.*{CONVERT}")
      for value in (3, ["a.png", None], "/9j/" + "Q" * 9999, "https://x.org/a.png", {"bytes": "Q" * 9999})),
    (make_record(HUMAN, GPT, image=["a.png", "cut.jpg"]), r"cannot read the image .*cut\.jpg: "),
    *((make_record(HUMAN, PAIR, margin=margin), "got the margin .*, 2 answers; need a number from 0, and two")
      for margin in (float("nan"), float("inf"), -0.5, True, "1", 10**400)),
    (make_record(HUMAN, ("gpt", ["a", "b", "c"]), margin=1.0), "got the margin 1.0, 3 answers"),
    (make_record(HUMAN, PAIR, gpt4_scores=[1, 2]), "got the field 'gpt4_scores'.*best first"),
    (make_record(HUMAN, PAIR, label=1), "got the field 'label'.*best first"),
    (make_record(HUMAN, GPT, image_id=42), "got the field 'image_id'")]  # but not beside an image


@pytest.mark.parametrize("record, words", BAD_RECORDS)
def test_a_bad_record_is_named_or_skipped(images, capsys, record, words):
    """By file, index, id and fault; --skip_bad_rows counts and reports it."""
    name = r"r\.json: record 1 \(id \[?(7|None)\]?\): "
    with pytest.raises(data.UserError, match=f"(?s){name}.*{words}.*; --skip_bad_rows leaves such records"):
        data.check_records([GOOD, record, GOOD], images, "r.json")
    good, bad, _ = data.check_records([GOOD, record, GOOD, record], images, "r.json", skip_bad_rows=True)
    assert [(index, c.id) for index, c in good] == [(0, "good"), (2, "good")] and bad == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and re.search(f"skipped {name}.*{words}", lines[0]) and "record 3 " in lines[1]
    assert all(line.isprintable() and len(line) < 600 for line in lines)
    with pytest.raises(data.UserError, match=r"r\.json: all 1 records are bad, need at least one good"):
        data.check_records([record], images, "r.json", skip_bad_rows=True)


def test_ranked_records_need_two_answers_and_pass_their_margin_on(loaded, images):
    """Prediction needs no answer. Absent, null or 0 is no margin."""
    records = [make_record(HUMAN, PAIR, margin=margin) for margin in (None, 0, 2, 0.25)]
    records.append(make_record(HUMAN, PAIR, gpt4_scores=[1, 2, 3]))
    good, _, _ = data.check_records(records, images, "x", data.ANSWERS_NEEDED["ranked"])
    examples, _ = data.build_examples(good, loaded("tiny2"), "ranked")
    assert [(type(e.margin), e.margin) for e in examples] == [(float, m) for m in (0, 0, 2, 0.25, 0)]
    with pytest.raises(data.UserError, match="got 1 answer, need 2 or more, best first"):
        data.read_record(GOOD, images, data.ANSWERS_NEEDED["ranked"])
    good, _, _ = data.check_records([make_record(HUMAN), GOOD], images, "x", data.ANSWERS_NEEDED["prompt"])
    assert [c.answers for _, c in good] == [[], ["Hello"]]


IMAGES, SYSTEM, RANKING = "record's `image`", 'a first turn from "system"', "a list of answers, best first"
TURN = {"from": "gpt", "value": "Yo"}
OTHER_FIELDS = [  # fields of other layouts, and where the message says that their content belongs
    *(({name: "x"}, IMAGES) for name in ("images", "image_path", "image_url", "photo", "input_image")),
    *(({"a": value}, IMAGES) for value in (
        "x/B.JPG", ["a.png", "b.webp"], {"b": ["c.jpeg"]}, "/9j/" + "Q" * 200, "data:image/png;base64,iVBO",
        {"bytes": "iVBO", "path": None}, [{"path": "a"}])),
    ({"pixel_values": [[0.5]]}, IMAGES), ({"video": ["x"]}, "videos and sound"),
    ({"audio_path": "x"}, "videos and sound"),
    *(({name: "Be kind."}, SYSTEM) for name in ("system", "System Message")),
    *(({name: "x"}, RANKING) for name in (
        "chosen", "rejected_response", "output_1", "answer_b", "preference_values", "kto_tag", "winner",
        "better_response_id", "y_w", "is_chosen", "non_preferred_output")),
    ({"output_2": TURN}, RANKING), ({"label": False}, RANKING),
    ({"loss": False}, "weights and masks"), ({"weight": 1.5}, "weights and masks"),
    ({"history": [["Hi", "Yo"]]}, "turns of"), ({"a": [TURN]}, "turns of")]


@pytest.mark.parametrize("fields, where", OTHER_FIELDS, ids=lambda value: str(value)[:40])
def test_fields_of_other_layouts_are_refused(images, fields, where):
    """In a record and in a turn. The message says where the content belongs."""
    (name, _), = fields.items()
    for record in (make_record(HUMAN, GPT, image="sub/c.png", **fields),
                   {"conversations": [{"from": "human", "value": "Hi", **fields}, TURN]}):
        with pytest.raises(data.UserError, match=f"got the field '{name}'.*{where}.*{CONVERT}") as error:
            data.read_record(record, images)
        assert len(str(error.value)) < 400


def test_other_fields_are_allowed(images):
    """In records and turns; a field that repeats the record's image too."""
    plain = data.read_record(make_record(HUMAN, GPT, image="sub/c.png"), images)
    for name, value in {
            "question_id": 3, "source": "coco/train2017", "label": "B", "labels": [17], "origin": "a/b.json",
            "score": 0.3, "image_size": [640, 480], "meta": {"a": {"b": 1}}, "answer": "no", "deep": DEEP,
            "url": "https://x.org/b.png", "image_id": 42, "score_chosen": 3, "images": []}.items():
        record = make_record(HUMAN, GPT, image="sub/c.png", **{name: value})
        record["conversations"][0][name] = value
        assert data.read_record(record, images) == plain, name
    for name, same, other in (
            ("image_path", "c", "b.png"), ("images", ["sub/c.png"], ["sub/c.png", "b.png"]),
            ("column", "sub/c.png", "masks/sub/c.png")):
        assert data.read_record(make_record(HUMAN, GPT, image="sub/c.png", **{name: same}), images) == plain
        with pytest.raises(data.UserError, match=f"got the field '{name}'"):
            data.read_record(make_record(HUMAN, GPT, image="sub/c.png", **{name: other}), images)


def test_images_are_decoded_once_and_the_first_bad_record_is_named(images, monkeypatch):
    """A second check that is told of the unreadable images decodes none."""
    decoded, image_error, names = [], data.image_error, ("a.png", "b.png,a.png", "cut.jpg", "a.png")
    monkeypatch.setattr(data, "image_error", lambda path: decoded.append(path) or image_error(path))
    records = [make_record(HUMAN, GPT, image=image, id=image) for image in names]
    result = data.check_records(records, images, "x", skip_bad_rows=True)
    assert [index for index, _ in result[0]] == [0, 1, 3] and list(result[2]) == [f"{images}/cut.jpg"]
    assert data.check_records(records, images, "x", skip_bad_rows=True, unreadable=result[2]) == result
    assert decoded == [f"{images}/{name}" for name in ("a.png", "b.png", "cut.jpg")]
    with pytest.raises(data.UserError, match=r"record 2 \(id cut.jpg\): cannot read"):
        data.check_records([*records, make_record(GPT)], images, "x")


def test_ranks_agree_although_one_lacks_an_image_or_has_other_records(images, tmp_path):
    """Every rank raises the same error or skips the same records. Digests differ where the records do."""

    def check(*per_rank, **options):  # per_rank: (records, folder)
        items, barrier = [None, None], threading.Barrier(2, timeout=20)

        def run(rank):
            def gather(item):
                items[rank] = item
                barrier.wait()
                found = [*items]
                barrier.wait()
                return found
            def parallel_map(function, items, what):
                assert len({*gather(len(items))}) == 1
                return [*map(function, items)]
            world = SimpleNamespace(gather=gather, parallel_map=parallel_map)
            try:
                return data.check_records(*per_rank[rank], "x", world=world, **options)
            except data.UserError as error:
                return str(error)
        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(run, range(2))]
    copy = shutil.copytree(images, tmp_path / "copy", symlinks=True)
    os.remove(copy / "b.png")
    paths = ("a.png", "x,y.png", "b.png", "sub/c.png")
    records = [make_record(HUMAN, GPT, image=path, id=path) for path in paths]
    (first, _, _), (second, _, _) = check((records[:2], images), (records[:2], str(copy)))
    assert data.digest(first, images) == data.digest(second, str(copy))
    (first, _, _), (second, _, _) = check((records, images), (records[:1], images))
    assert [len(first), len(second)] == [4, 1] and data.digest(first) != data.digest(second)
    found = check((records, images), (records, str(copy)))
    words = f"x: record 2 (id b.png): no such image: {copy}/b.png (see --images); --skip_bad_rows"
    assert found[0] == found[1] and found[0].startswith(words)
    found = check((records, images), (records, str(copy)), skip_bad_rows=True)
    assert [([index for index, _ in good], bad) for good, bad, _ in found] == [([0, 1, 3], 1)] * 2
    records[1]["image"] = "cut.jpg"  # an earlier unreadable image is named first
    found = check((records, images), (records, str(copy)))
    assert all("record 1 (id x,y.png): cannot read the image" in error for error in found)


def test_the_digest_is_of_all_that_is_read(images):
    turns = [HUMAN, GPT, ("human", "Go")]
    records = [make_record(*turns, PAIR), *(make_record(*turns, PAIR, **more) for more in (
        {"image": "a.png"}, {"id": 8}, {"margin": 1})), make_record(*turns, ("gpt", ["b", "a"])),
        make_record(("system", "Hi"), *turns, PAIR)]
    conversations = [(i, data.read_record(record, images)) for i, record in enumerate(records)]
    assert len({data.digest([one]) for one in conversations}) == len(records)
    assert data.digest(conversations[:2]) != data.digest(conversations[1::-1])


# ---- processors ----

@pytest.mark.parametrize("spare", [0, 2, 10])
def test_missing_tokens_are_added_and_never_sampled(folders, spare):
    """Nor are ids beyond the tokenizer's. The vocabulary grows to a multiple of 64 where there is no room."""
    size = Tokenizer.from_file(f"{folders['tiny2']}/tokenizer.json").get_vocab_size()
    config, args = make_config(size + spare), tiny.options(max_len=9)
    processor, resized = data.load_processor(str(folders["tiny2"]), config, args)
    new = size + spare if spare else -(-(size + 2) // 64) * 64
    assert resized == (None if spare else (size, new)) and config.text_config.vocab_size == new
    assert {processor.image_token, processor.pad} == {size, size + 1}
    assert config.image_token_index == processor.image_token and processor.banned == set(range(size, new))
    assert (processor.tile_tokens, processor.size, processor.max_len) == (TOKENS, S, 9)


def test_tokens_that_are_there_are_used(folders, tmp_path):
    """A pad token that ends answers may be sampled."""
    tokenizer, special = AutoTokenizer.from_pretrained(folders["tiny3"]), ["<image>", "<other>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "pad_token": tokenizer.eos_token})
    tokenizer.save_pretrained(tmp_path)
    processor = load(tmp_path, config=make_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")))
    assert processor.pad in processor.end_ids and processor.banned == {processor.image_token}
    assert len(processor.tokenizer) == len(tokenizer) and "<other>" in processor.template.special_ids


def train_sentencepiece(folder, **options):
    """A folder with only a tokenizer.model of LLaMA's kind: runs of spaces have the lowest scores."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file, lines = io.BytesIO(), [line.replace(",", ",   ") for line in tiny.CORPUS * 6]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **{
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity",
        "minloglevel": 2, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, **options})
    run = "▁▁".encode()  # a piece is a string, and its score as a float
    model, found = re.subn(b"\n" + bytes([len(run)]) + run + b"\x15....",
                           lambda m: m[0][:-4] + struct.pack("<f", -1e9), file.getvalue(), flags=re.DOTALL)
    assert found or options
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_converted(tmp_path, prefix):
    """SentencePiece's own ids for any text, also in an export; nothing is written beside the model."""
    folder, config = tmp_path / "llava", make_config()
    original = train_sentencepiece(folder, add_dummy_prefix=prefix)
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 401, "<pad>": 400}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    before = sorted(folder.iterdir())
    processor, rng = load(folder, config=config), random.Random(0)
    tokens = ["<s>", "</s>", "<pad>", "<extra>", "<image>"]
    assert processor.tokenizer.convert_tokens_to_ids(tokens) == [1, 2, 400, 401, 402]
    assert sorted(folder.iterdir()) == before and processor.pad == 400 and processor.end_ids == {2}
    assert processor.tokenizer("a").input_ids == [1, *original.encode("a")]
    data.save_processor(processor, config, str(tmp_path / "out"))
    peer = AutoTokenizer.from_pretrained(tmp_path / "out")
    words = [" ", "  ", "   ", "\n", "▁", "</s>", "e\u0301", "ﬁ", "日", "👩‍👩‍👧", "7"]
    words += tiny.CORPUS[0].split()
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randrange(9)))
        expected = original.encode(text)
        assert processor.template.ids(text) == expected
        assert peer(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected
        assert processor.tokenizer.decode(expected) == original.decode(expected)


@pytest.mark.parametrize("options, added, words", [
    ({"normalization_rule_name": "nmt_nfkc"}, {}, "cannot be converted: "),
    ({"remove_extra_whitespaces": True}, {}, "cannot be converted: ' ' is "),
    ({"model_type": "unigram", "vocab_size": 330}, {}, "cannot be converted: "),
    ({}, {"<extra>": 405}, "the added token <extra> is 405 there, and would become 400")])
def test_sentencepiece_that_would_get_other_ids_is_refused(tmp_path, options, added, words):
    train_sentencepiece(tmp_path, **options)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(data.UserError, match=f"{words}.*: give --tokenizer, a folder with a tokenizer.json"):
        load(tmp_path)


def test_a_tokenizer_that_is_missing_foreign_or_corrupt_is_refused(folders, tmp_path, monkeypatch):
    def refused(words, folder=tmp_path, **options):
        with pytest.raises(data.UserError, match=words):
            load(folder, **options)
    refused(r"no tokenizer\.json or tokenizer\.model: give --tokenizer, a ")
    size = len(load(tmp_path, tokenizer=folders["tiny2"]).tokenizer) - 2  # --tokenizer comes first
    refused("image_token_index is 32000: the tokenizer is of another checkpoint", folders["tiny2"],
            config=make_config(image_token=32000))
    refused(f"the tokenizer has {size} tokens, the model {size - 1}: .*another checkpoint", folders["tiny2"],
            config=make_config(size - 1))
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # LLaMA-3's, of another kind
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        refused("to have it converted: pip install sentencepiece, then run this again")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copytree(folders["tiny2"], tmp_path, dirs_exist_ok=True)
        for content in ("", "[]", "version https://git-lfs.github.com/spec/v1"):
            (tmp_path / file).write_text(content)
            refused(f"{tmp_path}: its tokenizer cannot be read .*: fetch the files")


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("template, name", TINY_PAIRS)
def test_an_export_loads_again_as_it_was_and_transformers_reads_it(folders, tmp_path, template, name, mode):
    """With --template auto and --image_mode auto; transformers' processor gives our ids, text and pixels."""
    config = make_config()
    processor = load(folders[name], template, config, image_mode=mode)
    data.save_processor(processor, config, str(tmp_path))
    (tmp_path / "config.json").write_text('{"image_aspect_ratio": "pad", "text_config": {}}')  # says nothing
    again = load(tmp_path, "auto", make_config(config.text_config.vocab_size, config.image_token_index))
    (tmp_path / "config.json").unlink()
    for field in dataclasses.fields(processor):
        if field.name not in ("tokenizer", "template"):
            assert getattr(again, field.name) == getattr(processor, field.name), field.name
    for turns, system, _ in GOLDEN[template]:
        assert encode(again, turns, system) == encode(processor, turns, system)

    image, words = noise(23, 11), "" if template == "plain" else "What is it?"
    image.save(tmp_path / "a.png")
    conversation = data.read_record(make_record(("human", words), image="a.png"), tmp_path, need_answers=0)
    batch = data.collate(data.build_examples([(0, conversation)], processor, "prompt")[0], processor)
    peer = AutoProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [
        {"type": "image", "image": image}, *([{"type": "text", "text": words}] if words else [])]}]
    coded = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                     return_tensors="pt")
    assert coded["input_ids"].tolist() == batch.ids.tolist()
    torch.testing.assert_close(torch.as_tensor(coded["pixel_values"]), batch.pixels, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": peer.tokenizer.bos_token_id, "pad_token_id": peer.tokenizer.pad_token_id,
        "eos_token_id": [peer.tokenizer.eos_token_id] if template == "plain" else sorted(processor.end_ids)}


@pytest.mark.parametrize("second", ["vicuna", "the LLaMA's own"])
def test_nothing_of_plain_is_left_in_the_second_stage(folders, tmp_path, capsys, second):
    """LLaVA's recipe: first `plain`, whose checkpoint keeps its LLaMA's own template; then another one."""
    stage1, stage2, config = tmp_path / "1", tmp_path / "2", make_config()
    turns = ["<image>\nDescribe it.", "A red square\nA blue circle"]
    plain = load(with_template(folders["tiny3"], tmp_path / "llama", CHATML), "plain", config)
    data.save_processor(plain, config, str(stage1))
    auto, original = load(stage1, "auto"), stage1 / "additional_chat_templates/original.jinja"
    said = f"{stage1} was trained with --template plain: using that; its LLaMA's own: --template {original}\n"
    assert said in capsys.readouterr().out and encode(auto, turns) == encode(plain, turns)
    assert auto.end_ids == plain.end_ids and auto.text(encode(auto, turns)[0][2:]) == turns[1]

    own = load(tmp_path / "llama", "vicuna" if second == "vicuna" else "auto")
    processor = load(stage1, "vicuna" if second == "vicuna" else str(original), config)
    data.save_processor(processor, config, str(stage2))
    for again in (processor, load(stage2, "auto")):
        assert encode(again, turns) == encode(own, turns) and again.end_ids == own.end_ids
        assert again.text([i for i, supervised in zip(*encode(again, turns)) if supervised]) == turns[1]
    assert (stage2 / "additional_chat_templates/original.jinja").read_text() == CHATML  # for yet another run


def test_a_corrupted_image_is_a_crop_of_at_most_a_fifth(tmp_path):
    """Keyed by seed and record; cut out of the image, at every place."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def crop(seed, index):
        return np.asarray(data.corrupt(data.Corrupted(str(tmp_path / "a.png"), seed, index)))
    places = []
    for index in range(40):
        part = crop(1, index)
        height, width, _ = part.shape
        assert height * width <= 0.21 * pixels[..., 0].size and (crop(1, index) == part).all()
        places += [(y, x) for y in range(51 - height) for x in range(41 - width)
                   if (pixels[y:y + height, x:x + width] == part).all()]
    assert len({*places}) > 20 and max(y for y, _ in places) > 25 and max(x for _, x in places) > 20
    assert len({crop(seed, 3).tobytes() for seed in range(5)}) == 5
