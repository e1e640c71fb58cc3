"""data.py: golden token ids against whole-string tokenisation, pixels against transformers' processors,
batches and the order of rows against brute force from their definitions, and the words of every error.

Nothing is downloaded: two tiny tokenizers, one of LLaMA-2's kind and one of LLaMA-3's, are made here; the
real ones are used where they are present. In golden strings «…» marks what is supervised.

Legend: TOKENS an image takes, P prompt length, A answers, M distinct images, S picture side.
"""

import io
import json
import multiprocessing
import operator
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
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import data

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = SHARED / "real/tokenizers"
TOKENS, S = 4, 8  # of the processors here: pictures of 8 × 8 in patches of 4 × 4


# ---- tokenizers ----

CORPUS = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "What is it? A cat, black.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "user assistant",
    "USER: Hi there. ASSISTANT: Hello there. [INST] <<SYS>>\nBe kind.\n<</SYS>> [/INST]",
    "<image></s>",
    "Compare the two with the blue sky. Which colour is the dog?\n",
] * 3


def llama2_like():
    """SentencePiece BPE: a space in front of every text, byte fallback (newlines too), BOS in front."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        (line.replace("\n", " ") for line in CORPUS), trainers.BpeTrainer(vocab_size=180, show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            list(map(tuple, learned["merges"])),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama3_like():
    """Byte-level BPE: no space added, no BOS added, the eos is not what ends a turn; ChatML's tokens too."""
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # LLaMA-3's
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    lines = [*CORPUS, "It is kind.\n", "end.\n\n", "\n\nbe"] * 2
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_special_tokens(
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|im_start|>",
            "<|im_end|>",
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizer folders by name; the real ones where present."""
    found = {}
    for name, make in (("tiny2", llama2_like), ("tiny3", llama3_like)):
        found[name] = str(tmp_path_factory.mktemp(name))
        make().save_pretrained(found[name])
    return found | {name: str(REAL / name) for name in ("llama2", "llama3") if (REAL / name).is_dir()}


NO_REAL = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
LIKE2 = ["tiny2", pytest.param("llama2", marks=NO_REAL)]
LIKE3 = ["tiny3", pytest.param("llama3", marks=NO_REAL)]


def make_config(vocab_size=None, image_token=-1):
    """What load_processor reads and writes of a LlavaConfig."""
    return SimpleNamespace(
        image_token_index=image_token,
        image_seq_length=TOKENS,
        vision_feature_select_strategy="default",
        text_config=SimpleNamespace(vocab_size=vocab_size or 200_000),
        vision_config=SimpleNamespace(image_size=S, patch_size=4),
    )


def load(folder, template="vicuna", config=None, max_len=2048, image_mode="auto", tokenizer=None):
    args = SimpleNamespace(template=template, tokenizer=tokenizer, image_mode=image_mode, max_len=max_len)
    return data.load_processor(str(folder), config or make_config(), args)[0]


LOADED = {}  # processors by (folder, template): the real tokenizers take a second each


@pytest.fixture
def loaded(folders):
    def get(name, template):
        key = folders[name], template
        LOADED[key] = LOADED.get(key) or load(*key)
        return LOADED[key]

    return get


def whole(tokenizer, golden):
    """A golden string tokenised as one → ids, and which begin inside «…»."""
    golden = golden.replace("<s>", tokenizer.bos_token).replace("</s>", tokenizer.eos_token)
    text, inside, kept = "", False, []
    for char in golden:
        if char in "«»":
            inside = char == "«"
        else:
            text += char
            kept.append(inside)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return coded.input_ids, [kept[start] for start, _ in coded.offset_mapping]


def encode(processor, turns, system=None, all_turns=True):
    """Turns, human first, as Template.encode takes them."""
    roles, contents = (["human", "gpt"] * len(turns))[: len(turns) - 1], list(turns[:-1])
    if system:
        roles, contents = ["system", *roles], [system, *contents]
    return processor.template.encode(roles, contents, turns[-1], all_turns)


def assert_golden(processor, golden, turns, system=None):
    """Equal ids and marks; shown as tokens where they differ."""

    def show(ids, kept):
        return [
            f"«{token}»" if keep else token
            for token, keep in zip(processor.tokenizer.convert_ids_to_tokens(ids), kept)
        ]

    ids, kept = encode(processor, turns, system)
    expected = whole(processor.tokenizer, golden)
    assert show(ids, kept) == show(*expected)
    assert ids == expected[0]


# ---- 1. golden ids ----

SINGLE, TURNS = ["Hi there.", "Hello"], ["What is it?", "A cat", "Which colour?", "Black"]
FRONT, MIDDLE, END = (
    ["<image>\nWhat is it?", "A cat"],
    ["Compare <image> to the sky.", "Blue"],
    ["What is it?\n<image>", "A cat"],
)
TWO, LATER = ["<image>\n<image>\nSame?", "No"], ["<image>\nWhat is it?", "A cat", "And <image>?", "A dog"]
CHAT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. "
)
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"

GOLDEN = {  # (turns, system turn) and the string by hand
    "vicuna": [
        (SINGLE, None, f"<s>{CHAT}USER: Hi there. ASSISTANT:« Hello</s>»"),
        (
            TURNS,
            None,
            f"<s>{CHAT}USER: What is it? ASSISTANT:« A cat</s>»USER: Which colour? ASSISTANT:« Black</s>»",
        ),
        (SINGLE, "Be kind.", "<s>Be kind. USER: Hi there. ASSISTANT:« Hello</s>»"),
        (
            TURNS,
            "Be kind.",
            "<s>Be kind. USER: What is it? ASSISTANT:« A cat</s>»USER: Which colour? ASSISTANT:« Black</s>»",
        ),
        (FRONT, None, f"<s>{CHAT}USER: <image>\nWhat is it? ASSISTANT:« A cat</s>»"),
        (MIDDLE, None, f"<s>{CHAT}USER: Compare <image> to the sky. ASSISTANT:« Blue</s>»"),
        (END, None, f"<s>{CHAT}USER: What is it?\n<image> ASSISTANT:« A cat</s>»"),
        (TWO, None, f"<s>{CHAT}USER: <image>\n<image>\nSame? ASSISTANT:« No</s>»"),
        (
            LATER,
            None,
            f"<s>{CHAT}USER: <image>\nWhat is it? ASSISTANT:« A cat</s>»"
            "USER: And <image>? ASSISTANT:« A dog</s>»",
        ),
    ],
    "llama2": [
        (SINGLE, None, "<s>[INST] Hi there. [/INST]« Hello </s>»"),
        (
            TURNS,
            None,
            "<s>[INST] What is it? [/INST]« A cat </s>»<s>[INST] Which colour? [/INST]« Black </s>»",
        ),
        (SINGLE, "Be kind", "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi there. [/INST]« Hello </s>»"),
        (
            TURNS,
            "Be kind",
            "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nWhat is it? [/INST]« A cat </s>»"
            "<s>[INST] Which colour? [/INST]« Black </s>»",
        ),
        (FRONT, None, "<s>[INST] <image>\nWhat is it? [/INST]« A cat </s>»"),
        (
            FRONT,
            "Be kind",
            "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\n<image>\nWhat is it? [/INST]« A cat </s>»",
        ),
        (MIDDLE, None, "<s>[INST] Compare <image> to the sky. [/INST]« Blue </s>»"),
        (END, None, "<s>[INST] What is it?\n<image> [/INST]« A cat </s>»"),
        (TWO, None, "<s>[INST] <image>\n<image>\nSame? [/INST]« No </s>»"),
        (
            LATER,
            None,
            "<s>[INST] <image>\nWhat is it? [/INST]« A cat </s>»<s>[INST] And <image>? [/INST]« A dog </s>»",
        ),
    ],
    "llama3": [
        (SINGLE, None, f"<s>{USER}Hi there.{ASSISTANT}«Hello<|eot_id|>»"),
        (
            TURNS,
            None,
            f"<s>{USER}What is it?{ASSISTANT}«A cat<|eot_id|>»"
            f"{USER}Which colour?{ASSISTANT}«Black<|eot_id|>»",
        ),
        (
            SINGLE,
            "Be kind.",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            f"{USER}Hi there.{ASSISTANT}«Hello<|eot_id|>»",
        ),
        (FRONT, None, f"<s>{USER}<image>\nWhat is it?{ASSISTANT}«A cat<|eot_id|>»"),
        (MIDDLE, None, f"<s>{USER}Compare <image> to the sky.{ASSISTANT}«Blue<|eot_id|>»"),
        (END, None, f"<s>{USER}What is it?\n<image>{ASSISTANT}«A cat<|eot_id|>»"),
        (TWO, None, f"<s>{USER}<image>\n<image>\nSame?{ASSISTANT}«No<|eot_id|>»"),
        (
            LATER,
            None,
            f"<s>{USER}<image>\nWhat is it?{ASSISTANT}«A cat<|eot_id|>»"
            f"{USER}And <image>?{ASSISTANT}«A dog<|eot_id|>»",
        ),
    ],
    "plain": [  # the human's words are left out
        (FRONT, None, "<s><image>«A cat\n»"),
        (MIDDLE, None, "<s><image>«Blue\n»"),
        (TWO, None, "<s><image><image>«No\n»"),
    ],
}
STOP = {"vicuna": "</s>", "llama2": "</s>", "llama3": "<|eot_id|>", "plain": "\n"}
PAIRS = [
    (template, tokenizer)
    for template in GOLDEN
    for tokenizer in [*LIKE2, *LIKE3]
    if not (template == "llama3" and tokenizer in LIKE2)
]  # its turns need LLaMA-3's tokens


def pairs(pairs):
    return pytest.mark.parametrize(
        "template, name",
        [
            pytest.param(template, getattr(name, "values", [name])[0], marks=getattr(name, "marks", ()))
            for template, name in pairs
        ],
    )


@pairs(PAIRS)
def test_golden_ids(loaded, template, name):
    """Piece by piece gives the ids of the whole string; the answers and what ends them are supervised."""
    processor = loaded(name, template)
    for turns, system, golden in GOLDEN[template]:
        assert_golden(processor, golden, turns, system)


@pairs([(template, name) for template, name in PAIRS if template != "plain"])  # which drops the human's words
def test_golden_ids_of_any_words(loaded, template, name):
    """The joints hold for words that begin or end in digits, signs, other scripts; with newlines inside."""
    by_hand = {
        "vicuna": "<s>{0} USER: {1} ASSISTANT:« {2}</s>»USER: {3} ASSISTANT:« {4}</s>»",
        "llama2": "<s>[INST] <<SYS>>\n{0}\n<</SYS>>\n\n{1} [/INST]« {2} </s>»"
        "<s>[INST] {3} [/INST]« {4} </s>»",
        "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n{0}<|eot_id|>"
        f"{USER}{{1}}{ASSISTANT}«{{2}}<|eot_id|>»{USER}{{3}}{ASSISTANT}«{{4}}<|eot_id|>»",
    }
    processor, rng = loaded(name, template), random.Random(0)
    parts = [
        "cat",
        "A",
        "7",
        "2026",
        "?",
        "...",
        "(",
        "'s",
        "é",
        "猫",
        "🙂",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "_",
        "[",
        "<",
    ]
    for _ in range(60):
        words = ["".join(rng.choices(parts, k=rng.randint(1, 6))).strip() or "x" for _ in range(5)]
        if (
            template == "llama2"
        ):  # (a sign before "\n<</SYS>>" is one token with it in LLaMA-3's whole string)
            words[0] += "x"
        assert_golden(processor, by_hand[template].format(*words), words[1:], words[0])


def test_where_pieces_differ_from_the_whole_string(loaded, folders):
    """On purpose: a caption's newline stays its own token, and text behind a special token begins with ▁."""
    # plain: a byte-level BPE joins ".\n" into one token, which would hide the end of the caption
    processor = loaded("tiny3", "plain")
    ids, kept = encode(processor, ["<image>", "It is kind."])
    assert processor.tokenizer.tokenize("kind.\n")[-1] == ".Ċ"
    assert processor.tokenizer.convert_ids_to_tokens(ids)[-2:] == [".", "Ċ"] and kept[-1]
    # transformers' LlamaTokenizer(legacy=False) leaves the space out behind <s>, </s> and <image>; LLaVA was
    # trained with it
    tokenizer = loaded("tiny2", "vicuna").tokenizer
    modern = AutoTokenizer.from_pretrained(folders["tiny2"])
    modern._tokenizer.normalizer = None
    modern._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    modern.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    image = modern.convert_tokens_to_ids("<image>")
    assert modern.tokenize("<s>cat") != tokenizer.tokenize("<s>cat")
    for turns in (TURNS, FRONT, LATER):
        roles = ["human", "gpt", "human"][: len(turns) - 1]
        assert data.Template("vicuna", modern, image).encode(roles, turns[:-1], turns[-1]) == encode(
            loaded("tiny2", "vicuna"), turns
        )


@pairs(PAIRS)
def test_ends_and_beginnings(loaded, template, name):
    """One BOS (llama2: one a turn); an answer's end token comes last, is supervised, and stops sampling."""
    processor = loaded(name, template)
    tokenizer, bos = processor.tokenizer, processor.tokenizer.bos_token_id
    end = {"</s>": tokenizer.eos_token_id, "\n": processor.template.ids("\n")[-1]}.get(STOP[template])
    end = tokenizer.convert_tokens_to_ids(STOP[template]) if end is None else end
    assert processor.stop == {end, tokenizer.eos_token_id}
    turns = FRONT if template == "plain" else LATER
    ids, kept = encode(processor, turns)
    assert ids[0] == bos and ids.count(bos) == (2 if template == "llama2" else 1)
    assert ids[-1] == end and kept[-1]
    assert ids.count(processor.image_token) == "".join(turns).count("<image>")
    if template == "plain":
        assert tokenizer.eos_token_id not in ids
    # of the last turn only
    ids_again, last = encode(processor, turns, all_turns=False)
    begin = len(kept) - kept[::-1].index(False)
    assert ids_again == ids and last == [i >= begin for i in range(len(ids))]
    assert (last == kept) == (len(turns) == 2)


@pairs([(template, name) for template, name in PAIRS if name in ("tiny2", "tiny3")])
def test_a_prompt_is_what_precedes_the_answer(loaded, tmp_path, template, name):
    """Generation starts from the very ids that precede the answer in training."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    row = {
        "id": 1,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": ["A cat", "A dog", "7", "(x)"]},
        ],
    }
    processor, conversation = loaded(name, template), data.read_record(row, tmp_path)
    examples = [
        data.build_examples([(0, conversation)], processor, which)[0][0]
        for which in ("prompt", "turns", "answers")
    ]
    prompt = examples[0].prompt.tolist()
    assert [e.prompt.tolist() for e in examples] == [prompt] * 3
    assert [len(e.answers) for e in examples] == [0, 1, 4]
    for answer, ids in zip(conversation.answers, examples[2].answers):
        assert prompt + ids.tolist() == encode(processor, ["<image>\nWhat is it?", answer])[0]
        assert processor.text(ids) == answer


def test_render(loaded):
    """The prompt as text: up to where the answer begins, one <image> a picture."""
    conversation = data.Conversation("1", ["human"], ["<image>\nWhat?"], [], ["a.png"])
    assert loaded("tiny2", "vicuna").template.render(conversation) == (
        f"<s>{CHAT}USER: <image>\nWhat? ASSISTANT:"
    )
    assert loaded("tiny2", "plain").template.render(conversation) == "<s><image>"
    assert loaded("tiny2", "llama2").template.render(conversation) == "<s>[INST] <image>\nWhat? [/INST]"
    assert loaded("tiny3", "llama3").template.render(conversation) == (
        f"<|begin_of_text|>{USER}<image>\nWhat?{ASSISTANT}"
    )


# ---- 2. what people type is text ----


@pairs(PAIRS)
def test_typed_special_tokens_are_text(loaded, template, name):
    """Special tokens typed in a human, gpt or system turn never become their ids; <image> does in human turns
    only."""
    processor = loaded(name, template)
    tokenizer = processor.tokenizer
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    typed = " ".join(token for token in special if not re.match(r"<\|reserved", token) and token != "<image>")
    innocent, _ = encode(
        processor, ["<image> Hi", "Hello", "Go on", "Bye"], None if template == "plain" else "Be kind"
    )
    turns = [f"<image> {typed}", f"{typed} <image>", typed, f"<image> {typed}"]
    guilty, kept = encode(processor, turns, None if template == "plain" else f"{typed} <image>")
    assert len(special) >= 4 and len(typed) > 8

    def count(ids):
        return Counter(i for i in ids if i in special.values())

    assert count(guilty) == count(innocent)
    assert count(guilty)[processor.image_token] == 1
    said = tokenizer.decode([i for i, keep in zip(guilty, kept) if keep])
    assert said.count("<image>") == 2 and said.count(typed) == 2


def encode_by_piece(template, roles, contents, answer):
    """Template.encode from its definition, one call of the tokenizer per piece."""
    def ids(text):
        return template.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    gaps, pieces = template.gaps((*roles, "gpt")), []
    follow = template.split(gaps[0])
    for i, (role, content) in enumerate(zip((*roles, "gpt"), (*contents, answer))):
        pieces += [[piece, False] for piece in follow]
        follow = template.split(gaps[i + 1])
        if role == "gpt":
            end, follow = template.after_answer(gaps[i + 1], gaps[-1])
            pieces += [[piece, True] for piece in (content, *end)]
        elif role == "human":
            for part in re.split("(<image>)", content):
                if part == "<image>" or not template.plain:
                    pieces.append([template.image_token if part == "<image>" else part, False])
        else:
            pieces.append([content, False])
    for left, right in zip(pieces, pieces[1:]):
        if isinstance(left[0], str) and isinstance(right[0], str) and left[0].endswith(" "):
            left[0], right[0] = left[0][:-1], " " + right[0]
    coded, kept, first = [], [], True
    for piece, keep in pieces:
        if piece == "":
            continue
        if isinstance(piece, int):
            new, first = [piece], True
        else:
            if first or not template.prefixes:
                new = ids(piece)
            elif len(piece) > 1 and piece[0] == " ":
                new = ids(piece[1:])
            else:
                newline, new = ids("\n"), ids("\n" + piece)
                new = new[len(newline):] if new[:len(newline)] == newline else ids(piece)
            first = False
        coded += new
        kept += [keep] * len(new)
    return coded, kept


TRICKY = ["cat", "A", "7", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "<image>", "</s>", "<s>", "▁", "▁▁",
          "a▁b", " x", "x ", "é", "猫", "🙂", "'s", "USER:", "[INST]", "<unk>", "<|eot_id|>", "\u00a0", "."]


@pairs(PAIRS)
def test_ids_of_many_records(loaded, template, name):
    """Records tokenised together have the ids of one call of the tokenizer per piece, whatever stands at the
    joints: spaces, newlines, images, typed tokens, the tokenizer's own "▁"."""
    processor, rng = loaded(name, template), random.Random(1)
    conversations = []
    for i in range(150):
        roles = ["human", "gpt"] * rng.choice([0, 0, 1, 2]) + ["human"]
        roles = ["system", *roles] if template != "plain" and i % 3 == 0 else roles
        said = ["".join(rng.choices(TRICKY, k=rng.randint(1, 8))) for _ in [*roles, "answer"]]
        images = sum(text.count("<image>") for role, text in zip(roles, said) if role == "human")
        conversations.append((i, data.Conversation(str(i), roles, said[:-1], said[-1:], ["a"] * images)))
    examples, counts = data.build_examples(conversations, processor, "turns")
    assert len(examples) == 150 and counts == {"too_long": 0, "cut": 0}
    for example, (_, c) in zip(examples, conversations):
        ids, kept = encode_by_piece(processor.template, c.roles, c.contents, c.answers[0])
        assert [*example.prompt, *example.answers[0]] == ids, c
        assert [False] * len(example.prompt) + example.token_masks[0].tolist() == kept
    for text in ["", " ", "  ", "▁", " ▁", "x", "x ", "x  ", " x", "\n ", "a  b ▁c", *TRICKY]:
        assert processor.template.ids(text) == processor.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True), repr(text)


@pytest.mark.parametrize("name", ["tiny2", "tiny3"])
def test_tokenising_many_records_takes_few_calls(folders, monkeypatch, name):
    """A word is tokenised once; a tokenizer of another kind gets the texts of many records in one batch."""
    processor, batches = load(folders[name]), []
    learn = processor.template.learn
    monkeypatch.setattr(processor.template, "learn", lambda units: batches.append(units) or learn(units))
    conversations = [(i, data.Conversation(str(i), ["human"], [f"Is {i} or {i + 1} a cat?"], ["It is."], []))
                     for i in range(50)]
    data.build_examples(conversations, processor, "turns")
    units = [unit for batch in batches for unit in batch]
    assert len(units) == len(set(units)) and len(batches) <= (60 if name == "tiny2" else 5)
    assert all(" " not in unit for unit in units) == (name == "tiny2")


def test_word_by_word_only_where_it_is_the_same(folders):
    """A tokenizer of LLaMA-2's kind is asked for each word once. One whose tokens span words, with tokens
    of its own that are not special, or of another kind, gets every text in full."""
    def by_word(change=lambda spec: None, name="tiny2"):
        spec = json.loads((Path(folders[name]) / "tokenizer.json").read_text())
        change(spec)
        fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>")
        return data.words_are_apart(fast)

    def spanning(spec):
        vocab = spec["model"]["vocab"]
        vocab["▁A▁"] = len(vocab)
        spec["model"]["merges"].append(["▁A", "▁"])
    assert by_word() and not by_word(name="tiny3") and not by_word(spanning)
    assert not by_word(lambda spec: spec["added_tokens"][0].update(special=False))
    assert not by_word(lambda spec: spec["model"].update(ignore_merges=True))
    assert not by_word(lambda spec: spec.update(pre_tokenizer={"type": "WhitespaceSplit"}))
    assert not by_word(lambda spec: spec["normalizer"]["normalizers"].append({"type": "Lowercase"}))


# ---- 3. --template auto ----

LLAVA_HF = """{% for message in messages %}\
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>
' }}{% endfor %}\
{# Render all text next #}{% if message['role'] != 'assistant' %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ content['text'] + ' '}}{% endfor %}\
{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
CHATML = """{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3 = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
IM_USER, IM_ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
AUTO = [
    # no end token of its own: the tokenizer's is put behind every answer, as LLaVA was trained
    (
        LLAVA_HF,
        "tiny2",
        {"</s>"},
        [
            (FRONT, None, "<s>USER: <image>\nWhat is it? ASSISTANT:« A cat</s>»"),
            (
                TURNS,
                "Be kind.",
                "<s>Be kind. USER: What is it? ASSISTANT:« A cat</s>»USER: Which colour? "
                "ASSISTANT:« Black</s>»",
            ),
            (END, None, "<s>USER: What is it?\n<image> ASSISTANT:« A cat</s>»"),
        ],
    ),
    (LLAVA_HF, "tiny3", {"</s>"}, [(FRONT, None, "USER: <image>\nWhat is it? ASSISTANT:« A cat</s>»")]),
    # this tokenizer adds no BOS and the template has none; what follows the end token is not supervised
    (
        CHATML,
        "tiny3",
        {"<|im_end|>", "</s>"},
        [
            (MIDDLE, None, f"{IM_USER}Compare <image> to the sky.{IM_ANSWER}«Blue<|im_end|>»"),
            (
                TURNS,
                "Be kind.",
                f"<|im_start|>system\nBe kind.<|im_end|>\n{IM_USER}What is it?{IM_ANSWER}«A cat<|im_end|>»\n"
                f"{IM_USER}Which colour?{IM_ANSWER}«Black<|im_end|>»",
            ),
        ],
    ),
    (LLAMA3, "tiny3", {"<|eot_id|>", "</s>"}, GOLDEN["llama3"]),
]


def with_template(folder, out, jinja, where="chat_template.jinja"):
    """A copy of a tokenizer folder that has a chat template."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    text = json.dumps({"chat_template": jinja}) if where.endswith(".json") else jinja
    (Path(out) / where).write_text(text, encoding="utf-8")
    return str(out)


@pytest.mark.parametrize("jinja, name, stop, golden", AUTO, ids=["llava-hf", "llava-hf3", "chatml", "llama3"])
@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json"])
def test_auto(folders, tmp_path, jinja, name, stop, golden, where):
    """The checkpoint's own template, wherever it lies, gives the ids of the whole string."""
    processor = load(with_template(folders[name], tmp_path, jinja, where), "auto")
    for turns, system, text in golden:
        assert_golden(processor, text, turns, system)
    tokenizer = processor.tokenizer
    assert processor.stop == {
        tokenizer.convert_tokens_to_ids(token.replace("</s>", tokenizer.eos_token)) for token in stop
    }
    assert tokenizer.chat_template == jinja  # what an export will hold


ROLES = """{{ bos_token }}{% for m in messages %}\
{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"""  # Phi-3's and Zephyr's kind
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
OWN = {  # template: (tokenizer, its text, its tokens, how two turns read)
    "chatml": ("tiny2", "{{ bos_token }}" + CHATML, ["<|im_start|>", "<|im_end|>"],
               f"<s>{IM_USER}What is it?{IM_ANSWER}«A cat<|im_end|>»\n{IM_USER}Which colour?{IM_ANSWER}"
               "«Black<|im_end|>»"),
    "llama3": ("tiny3", NO_SYSTEM + LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               f"<s>{USER}What is it?{ASSISTANT}«A cat<|eot_id|>»{USER}Which colour?{ASSISTANT}"
               "«Black<|eot_id|>»"),
    "roles": ("tiny2", ROLES, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
              "<s><|user|>\nWhat is it?<|end|>\n<|assistant|>\n«A cat<|end|>»\n<|user|>\nWhich colour?<|end|>"
              "\n<|assistant|>\n«Black<|end|>»"),
}


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}],
                         ids=lambda flags: "-".join(flags) or "none")
@pytest.mark.parametrize("template", OWN)
def test_what_a_template_writes_is_its_own(folders, tmp_path, template, flags):
    """Added tokens that a template writes are control tokens though no flag says so: ids in its text, text in
    a user's, the end of a turn, no part of an answer. Other added tokens stay as they are."""
    name, jinja, tokens, golden = OWN[template]

    def make(special):
        folder = with_template(folders[name], tmp_path / str(special), jinja)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens([*tokens, "<b>", "\n\n"])
        tokenizer.save_pretrained(folder)
        spec = json.loads((tmp_path / str(special) / "tokenizer.json").read_text())
        for token in spec["added_tokens"]:
            if token["content"] in tokens:
                token.update({"normalized": False, **flags, "special": special})
        (tmp_path / str(special) / "tokenizer.json").write_text(json.dumps(spec))
        return load(folder, "auto")
    processor, flagged = make(False), make(True)
    ids = processor.tokenizer.convert_tokens_to_ids(tokens)
    assert_golden(processor, golden, TURNS)
    typed = ["Say <b>\n\n" + "".join(tokens) + "!", "A" + tokens[-1] + "."]
    for turns in (TURNS, typed):
        assert encode(processor, turns) == encode(flagged, turns)
    assert Counter(i for i in encode(processor, typed)[0] if i in ids) == Counter(
        i for i in encode(processor, ["a", "b"])[0] if i in ids)
    assert processor.stop == flagged.stop == {ids[-1], processor.tokenizer.eos_token_id}
    for one in (processor, flagged):
        assert one.text([*ids, *one.template.ids(typed[0]), ids[-1]]) == typed[0]
    b = processor.tokenizer.convert_tokens_to_ids("<b>")
    assert b in encode(processor, typed)[0] and b not in processor.template.special_ids.values()
    assert processor.template.by_word is False  # while such tokens are left

    data.save_processor(processor, make_config(), str(tmp_path))
    again = load(tmp_path, "auto")
    assert encode(again, typed) == encode(processor, typed) and again.stop == processor.stop
    messages = [{"role": role, "content": said} for role, said in zip(["user", "assistant"] * 2, TURNS)]
    peer = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages)["input_ids"]
    expected = encode(processor, TURNS)[0]
    assert peer[:len(expected)] == expected


def test_auto_bos(folders, tmp_path):
    """A template without BOS gets one from a tokenizer that adds one; a template with one gets no second."""
    bare = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"
    assert_golden(
        load(with_template(folders["tiny2"], tmp_path / "a", bare), "auto"),
        "<s>user Hi there.</s>assistant« Hello</s>»",
        SINGLE,
    )
    assert_golden(
        load(with_template(folders["tiny2"], tmp_path / "b", "{{ bos_token }}" + bare), "auto"),
        "<s>user Hi there.</s>assistant« Hello</s>»",
        SINGLE,
    )


REFUSED = {  # case: (template, system turn, what the error says)
    "reorders": ("{% for m in messages | reverse %}{{ m['content'] }}</s>{% endfor %}", None, "it reorders"),
    "repeats": (
        "{% for m in messages %}{{ m['content'] + m['content'] }}</s>{% endfor %}",
        None,
        "it reorders, repeats",
    ),
    "drops": (
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] + m['content'] }}</s>{% endfor %}",
        "Be kind.",
        "it reorders, repeats or drops",
    ),
    "raises": (
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{{ m['content'] }}</s>{% endfor %}",
        "Be kind.",
        "no system turns",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_auto_refuses(folders, tmp_path, case):
    """A template that reorders, repeats, drops or rejects messages is an error that names --template."""
    jinja, system, words = REFUSED[case]
    folder = with_template(folders["tiny2"], tmp_path, jinja)
    with pytest.raises(
        ValueError, match=rf"chat template cannot be used.*{words}.*--template vicuna\|llama2"
    ):
        encode(load(folder, "auto"), TURNS, system)


@pytest.mark.parametrize("name, template", [("tiny2", "llama3"), ("tiny2", "auto")])
def test_an_end_that_is_no_token_is_refused(folders, tmp_path, name, template):
    """A template for another tokenizer: the text would not end an answer."""
    folder = with_template(folders[name], tmp_path, CHATML)
    with pytest.raises(data.UserError, match=r"an answer with '<\|(eot_id|im_end)\|>', which is no token"):
        load(folder, template)


@pytest.mark.parametrize("where", ["chat_template.json", "processor_config.json"])
def test_the_template_of_a_processor_comes_first(folders, tmp_path, where):
    """A LLaVA's, before its language model's."""
    own = with_template(folders["tiny3"], tmp_path, CHATML, "chat_template.json")
    for name in ("tokenizer_config.json", where):
        path = tmp_path / name
        content = json.loads(path.read_text()) if path.exists() else {}
        template = LLAVA_HF if name == where else CHATML
        path.write_text(json.dumps({**content, "chat_template": template}))
    assert load(own, "auto").tokenizer.chat_template == LLAVA_HF


def test_auto_gives_up_an_endless_template(folders, tmp_path, monkeypatch):
    """A template that does not end in seconds is an error that names it, not a run that never starts."""
    monkeypatch.setattr(data, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(N) %}{% endfor %}{% endfor %}"  # half a minute
    folder = with_template(folders["tiny2"], tmp_path, endless.replace("N", "99"))
    start = time.time()
    with pytest.raises(data.UserError, match=f"chat template of {folder} takes more than 0.2 s: give --temp"):
        load(folder, "auto")
    assert time.time() - start < 10


def test_auto_without_template(folders):
    """No chat template anywhere is an error that names --template."""
    with pytest.raises(ValueError, match="no chat template: give --template " + r"\|".join(data.TEMPLATES)):
        load(folders["tiny2"], "auto")


# ---- 4. length ----


def columns(processor, ids, kept):
    """(id, supervised) of every column, a picture taking TOKENS."""
    return [
        column
        for i, keep in zip(ids, kept)
        for column in [(i, keep)] * (TOKENS if i == processor.image_token else 1)
    ]


@pytest.mark.parametrize("turns", [FRONT, LATER, ["<image>\nHi", "Hello", "Go <image> on <image>", "Bye"]])
def test_length_turns(loaded, turns):
    """At every max_len: prompt and pictures whole or no row at all; else all supervised tokens that fit, and
    nothing behind the last of them."""
    processor = loaded("tiny2", "vicuna")
    roles, pictures = ["human", "gpt", "human"][: len(turns) - 1], "".join(turns).count("<image>")
    conversation = data.Conversation(
        "1", roles, turns[:-1], [turns[-1]], [f"{i}.png" for i in range(pictures)]
    )
    ids, kept = encode(processor, turns)
    full, P = columns(processor, ids, kept), [keep for _, keep in columns(processor, ids, kept)].index(True)
    seen = set()
    for max_len in range(1, len(full) + 3):
        short = data.dataclasses.replace(processor, max_len=max_len)
        example, cut = short.example(0, conversation, conversation.answers, all_turns=True)
        left = full[:max_len]
        while left and not left[-1][1]:
            left.pop()
        if not left:
            assert example is None and max_len <= P
            seen.add("left out")
            continue
        got = np.concatenate([example.prompt, example.answers[0]])
        mask = [False] * len(example.prompt) + example.token_masks[0].tolist()
        assert columns(processor, got, mask) == left
        assert len(short.expand(example.prompt)) == P
        assert cut == (sum(keep for _, keep in left) < sum(keep for _, keep in full))
        assert example.images == conversation.images[: (got == processor.image_token).sum()]
        seen.add(("cut" if cut else "whole", len(example.images)))
    assert seen >= {"left out", ("cut", 1), ("whole", pictures)}


def test_length_answers(loaded):
    """Each answer is cut by itself, behind the whole prompt; its end token goes first."""
    processor = loaded("tiny2", "vicuna")
    answers = ["A cat", "A cat, black, and the blue sky", "No"]
    conversation = data.Conversation("1", ["human"], ["<image>\nWhat is it?"], answers, ["a.png"])
    full = data.build_examples([(0, conversation)], processor, "answers")[0][0]
    P, lengths = len(processor.expand(full.prompt)), [len(answer) for answer in full.answers]
    assert len(set(lengths)) == 3
    for room in range(1, max(lengths) + 1):
        short = data.dataclasses.replace(processor, max_len=P + room)
        (example,), counts = data.build_examples([(0, conversation)], short, "answers")
        assert example.prompt.tolist() == full.prompt.tolist() and example.images == ["a.png"]
        for got, kept, want in zip(example.answers, example.token_masks, full.answers):
            assert got.tolist() == want[:room].tolist() and kept.all() and len(kept) == len(got)
            assert (got[-1] == processor.tokenizer.eos_token_id) == (room >= len(want))
        assert counts == {"too_long": 0, "cut": int(room < max(lengths))}


@pytest.mark.parametrize("which", ["turns", "answers", "prompt"])
def test_length_counts(loaded, which):
    """Rows whose prompt does not fit are left out and counted; none left is an error that names --max_len."""
    short = data.Conversation("1", ["human"], ["Hi"], ["Hello", "No"], [])
    picture = data.Conversation("2", ["human"], ["<image>\nHi"], ["Hello", "No"], ["a.png"])
    processor = loaded("tiny2", "llama2")
    P = len(processor.example(0, short, [])[0].prompt)
    for room in (0, 1):  # a prompt without room for any answer does not fit
        full = data.dataclasses.replace(processor, max_len=P + room)
        answers = {"turns": ["Hello"], "answers": ["Hello", "No"], "prompt": []}[which]
        assert (full.example(0, short, answers, which == "turns")[0] is not None) == (room == 1)
    processor = data.dataclasses.replace(processor, max_len=P + 3)  # <image> and "\n" are TOKENS + 2
    examples, counts = data.build_examples([(3, picture), (5, short), (8, picture)], processor, which)
    assert [(e.index, e.id) for e in examples] == [(5, "1")]
    assert counts == {"too_long": 2, "cut": int(which != "prompt")}
    with pytest.raises(
        ValueError,
        match=rf"none of 1 records fits --max_len {P + 3}: raise it \(an image takes {TOKENS} tokens",
    ):
        data.build_examples([(3, picture)], processor, which)


# ---- 5. pixels ----


def noise(width, height, seed=0):
    return Image.fromarray((np.random.RandomState(seed).rand(height, width, 3) * 255).astype(np.uint8))


def peer_pixels(picture, size, mode, resize=None, resample=data.BICUBIC):
    """What transformers makes of a picture."""
    kind = {"crop": CLIPImageProcessorPil, "pad": LlavaImageProcessorPil}[mode]
    processor = kind(
        size={"shortest_edge": resize or size},
        crop_size={"height": size, "width": size},
        resample=resample,
        do_convert_rgb=True,
        **({"do_pad": True} if mode == "pad" else {}),
    )
    return torch.as_tensor(np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]))


SIZES = [
    (40, 30),
    (30, 40),
    (33, 33),
    (1, 9),
    (9, 1),
    (1, 1),
    (3, 2),
    (57, 23),
    (23, 58),
    (224, 224),
    (301, 227),
    (640, 480),
]


@pytest.mark.parametrize("resample", data.FILTERS)
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size, resize", [(24, 24), (56, 56), (24, 39)])
def test_pixels_equal_transformers(mode, size, resize, resample):
    """Every shape of picture gives transformers' pixels."""
    for width, height in SIZES:
        picture = noise(width, height)
        ours = data.to_pixels(picture, size, mode, resize=resize, resample=resample)
        peer = peer_pixels(picture, size, mode, resize, resample)
        assert ours.dtype == torch.float32 and ours.shape == (3, size, size) and ours.is_contiguous()
        torch.testing.assert_close(
            ours, peer, rtol=0, atol=1e-6, msg=lambda m, s=(width, height): f"{s}: {m}"
        )


def pixels_by_pillow(image, size, mode, resize, resample):
    """to_pixels from its definition, whatever memory that takes."""
    if mode == "pad":
        square = Image.new("RGB", (max(image.size),) * 2, (122, 116, 104))
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        image = square
    edges = [int(resize * edge / min(image.size)) for edge in image.size]
    image = image.resize(edges, resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    array = np.asarray(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(np.stack([data.levels(data.CLIP_MEAN, data.CLIP_STD)[c][array[..., c]]
                                      for c in range(3)]))


@pytest.mark.parametrize("resample", data.FILTERS)
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size, resize", [(7, 7), (24, 24), (24, 37), (56, 56)])
def test_pixels_of_narrow_images(mode, size, resize, resample):
    """Every bit is Pillow's for every aspect ratio, odd and even, enlarged and reduced, wide and tall; and
    transformers' pixels."""
    for short in (1, 2, 3, 5, 23, 24, 25, 57, 80):
        for ratio in (1, 3.99, 4, 4.01, 5, 7.3, 16, 33.37):
            long = max(short, round(short * ratio))
            for edges in ((short, long), (long, short)):
                image = noise(*edges, seed=short + long)
                if short % 2:
                    image = image.point(lambda value: 255 * (value > 127))  # overshoots at both ends
                ours = data.to_pixels(image, size, mode, resize=resize, resample=resample)
                expected = pixels_by_pillow(image, size, mode, resize, resample)
                assert torch.equal(ours, expected), (edges, size)
                if size == 24 and short < 24:
                    peer = peer_pixels(image, size, mode, resize, resample)
                    torch.testing.assert_close(ours, peer, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("edges", [(1, 20000), (20000, 1), (65535, 2)])
def test_a_narrow_image_costs_little_memory(tmp_path, mode, edges):
    """A file of a hundred bytes does not take gigabytes; its pixels stay finite and show the image."""
    Image.new("RGB", edges, (255, 255, 255)).save(tmp_path / "a.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = data.to_pixels(data.read_image(tmp_path / "a.png"), 336, mode)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KB
    white = data.levels(data.CLIP_MEAN, data.CLIP_STD)[0, 255].item()
    assert pixels.shape == (3, 336, 336) and (pixels[0] == white).all() == (mode == "crop")
    if mode == "pad":
        assert pixels[0, 0, 0] == pixels[0, -1, -1] < pixels[0, 167:169, 167:169].max()


def test_pixels_by_numbers():
    """CLIP ViT-L/14-336's numbers for a known picture (transformers 4.45.2 and 5.23.0 agree on them)."""
    pixels = data.to_pixels(noise(640, 480), 336)
    facts = {"mean": 0.181178, "std": 0.622891, "pixel[0,:,0,0]": [0.3537, 0.1239, 0.5248]}
    if (SHARED / "oracles.json").is_file():
        oracle = json.loads((SHARED / "oracles.json").read_text())
        assert {key: oracle["clip_pixels"][key] for key in facts} == facts
        assert oracle["clip_pad_background"] == [122, 116, 104]
    assert pixels.mean().item() == pytest.approx(facts["mean"], abs=1e-6)
    assert pixels.numpy().std() == pytest.approx(facts["std"], abs=1e-6)
    assert pixels[:, 0, 0].tolist() == pytest.approx(facts["pixel[0,:,0,0]"], abs=5e-5)
    corner = data.to_pixels(Image.new("RGB", (40, 20)), 40, "pad")[:, 0, 0]
    expected = (np.array([122, 116, 104]) / 255 - data.CLIP_MEAN) / data.CLIP_STD
    assert corner.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_pixels_of_another_normalisation():
    """A checkpoint's own mean and deviation are used, for the background too."""
    pixels = data.to_pixels(
        Image.new("RGB", (4, 2), (255, 0, 51)), 4, "pad", (0.5, 0.4, 0.2), (0.5, 0.1, 0.2)
    )
    assert pixels[:, 0, 0].tolist() == pytest.approx([(127 / 255 - 0.5) / 0.5, 0, 0], abs=1e-6)
    assert pixels[:, 2, 2].tolist() == pytest.approx([1, -4, 0], abs=1e-6)


# what a viewer does to the stored picture to show it
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, orientation):
    """A picture taken with the camera turned is read upright."""
    stored, exif = noise(5, 3), Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    upright = data.read_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](np.asarray(stored)))


def kinds_of_pictures():
    """name → (picture, file kind, the RGB that its first pixel is read as)."""
    red = Image.new("RGB", (12, 10), (255, 0, 0))
    palette = red.quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = clear.getpixel((0, 0))
    return {
        "palette": (palette, "PNG", (255, 0, 0)),
        # transparency is dropped, as LLaVA and transformers up to 4.45 do; 5.23 lays the picture on white
        "palette with transparency": (clear, "PNG", (255, 0, 0)),
        "gif": (palette, "GIF", (255, 0, 0)),
        "RGBA": (Image.new("RGBA", (12, 10), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        "LA": (Image.new("LA", (12, 10), (77, 5)), "PNG", (77, 77, 77)),
        "L": (Image.new("L", (12, 10), 77), "PNG", (77, 77, 77)),
        "1 bit": (Image.new("1", (12, 10), 1), "PNG", (255, 255, 255)),
        "CMYK": (Image.new("CMYK", (12, 10), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        "webp": (red, "WEBP", None),
        "bmp": (red, "BMP", (255, 0, 0)),
    }


@pytest.mark.parametrize("name", kinds_of_pictures())
def test_kinds_of_pictures(tmp_path, name):
    """Every mode becomes RGB, as transformers does it, and passes as a good picture."""
    picture, kind, colour = kinds_of_pictures()[name]
    picture.save(tmp_path / "a", kind)
    read = data.read_image(tmp_path / "a")
    assert read.mode == "RGB" and read.size == (12, 10) and data.image_error(tmp_path / "a") is None
    if colour:
        assert max(abs(a - b) for a, b in zip(read.getpixel((0, 0)), colour)) <= 2
    with Image.open(tmp_path / "a") as opened:
        peer = peer_pixels(Image.fromarray(np.asarray(opened.convert("RGB"))), S, "crop")
        torch.testing.assert_close(data.to_pixels(read, S), peer, rtol=0, atol=1e-6)
        if "transparency" not in opened.info and not opened.mode.endswith("A"):
            assert torch.equal(peer, peer_pixels(opened, S, "crop"))


def test_16_bit_grey(tmp_path):
    """A 16-bit grey PNG keeps its greys: 257 levels become one, not 256."""
    values = np.array([[0, 257, 1000, 128 * 257, 65280, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode.startswith("I")
    read = np.asarray(data.read_image(tmp_path / "a.png"))
    assert read.shape == (1, 6, 3) and np.abs(read[0] - values[0, :, None] / 257).max() < 1
    assert read[0, [0, 1, 3, 4, 5], 0].tolist() == [0, 1, 128, 254, 255]


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_torn_pictures(tmp_path, kind, options, share):
    """A truncated picture is found, wherever it was torn, and named."""
    buffer = io.BytesIO()
    noise(300, 200).save(buffer, kind, **options)
    (tmp_path / "a.img").write_bytes(buffer.getvalue())
    assert data.image_error(tmp_path / "a.img") is None
    (tmp_path / "a.img").write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    assert re.search(
        r"cannot read the image .*a\.img: .*(truncated|broken)",
        data.image_error(tmp_path / "a.img"),
        re.I,
    )


def test_only_common_formats_are_opened(tmp_path, monkeypatch):
    """JPEG, PNG, WebP, GIF, BMP and TIFF by content, whatever the name; nothing else reaches Pillow's other
    decoders, of which that for EPS runs a program. A phone's JPEG with a second image (MPO) opens."""
    image = noise(12, 10)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        image.save(tmp_path / "a.jpg", kind)
        assert data.image_error(str(tmp_path / "a.jpg")) is None
    image.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[noise(12, 10, seed=1)])
    with Image.open(tmp_path / "phone.jpg") as opened:
        assert opened.format == "MPO"
    assert data.image_error(str(tmp_path / "phone.jpg")) is None
    assert data.read_image(str(tmp_path / "phone.jpg")).size == (12, 10)
    monkeypatch.setattr(subprocess, "Popen", None)
    for kind in ("EPS", "PPM", "ICO", "TGA", "PCX"):
        image.save(tmp_path / "photo.jpg", kind)
        with pytest.raises(data.UserError, match="not one of the formats that are opened .JPEG, PNG, WEBP"):
            data.read_image(str(tmp_path / "photo.jpg"))
        assert "photo.jpg: corrupt, or not one of the" in data.image_error(str(tmp_path / "photo.jpg"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit, value, edges", [("Image.MAX_IMAGE_PIXELS", 99, (10, 10)),
                                                 ("LONGEST_EDGE", 19, (20, 2))])
def test_too_many_pixels(tmp_path, monkeypatch, limit, value, edges):
    """Above Pillow's limit, of which Pillow itself only warns up to twice as many, an image is bad."""
    noise(*edges).save(tmp_path / "a.png")
    path, holder = str(tmp_path / "a.png"), data.Image if "." in limit else data
    assert data.image_error(path) is None
    monkeypatch.setattr(holder, limit.split(".")[-1], value)
    assert re.search(r"a\.png: got \d+ × \d+ pixels, need at most", data.image_error(path))
    with pytest.raises(data.UserError, match="need at most"):
        data.read_image(path)


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_not_a_picture(tmp_path, content):
    """Something else under a picture's name is found and named."""
    (tmp_path / "a.jpg").write_bytes(content)
    assert re.search(r"cannot read the image .*a\.jpg: ", data.image_error(tmp_path / "a.jpg"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_exif(tmp_path, kind):
    """What image_error passes, read_image can read: also with EXIF data that is none."""
    noise(9, 7).save(tmp_path / "a", kind, exif=b"Exif\0\0garbage-garbage")
    if data.image_error(tmp_path / "a") is None:
        assert data.read_image(tmp_path / "a").size == (9, 7)


# ---- 6. batches ----

IMAGE_ID, PAD = 9, 0


def picture_processor(max_len=100):
    """A Processor without a tokenizer: ids 1 … 8 are words."""
    return data.Processor(
        None,
        None,
        IMAGE_ID,
        TOKENS,
        S,
        "crop",
        data.CLIP_MEAN,
        data.CLIP_STD,
        S,
        data.BICUBIC,
        PAD,
        frozenset(),
        frozenset(),
        max_len,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five small picture files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        noise(10 + i, 12 - i, seed=i).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(5)]


def random_example(rng, index, pictures, answers):
    """An example with pictures in its prompt and, if it is of several turns, in what counts as the answer."""

    def words(n, images=0):
        ids = [rng.randint(1, 8) for _ in range(n)]
        for _ in range(images):
            ids.insert(rng.randint(0, len(ids)), IMAGE_ID)
        return ids

    prompt, parts, kept = words(rng.randint(1, 6), rng.randint(0, 2)), [], []
    for _ in range(answers):
        ids, keep = words(rng.randint(1, 4)), None
        keep = [True] * len(ids)
        if answers == 1 and rng.random() < 0.5:  # a second turn
            turn, answer = words(rng.randint(1, 3), rng.randint(0, 2)), words(rng.randint(1, 3))
            ids, keep = ids + turn + answer, keep + [False] * len(turn) + [True] * len(answer)
        parts.append(np.array(ids, dtype=np.int32))
        kept.append(np.array(keep))
    n = sum(ids.count(IMAGE_ID) for ids in [prompt, *map(np.ndarray.tolist, parts)])
    return data.Example(
        index, str(index), np.array(prompt, dtype=np.int32), parts, kept, rng.choices(pictures, k=n)
    )


def collate_by_hand(examples):
    """The row layout from its definition, column by column."""
    rows, target, source, answer, last, owner, paths = [], [], [], [], [], [], []
    for b, example in enumerate(examples):
        row = []  # of (id, position, branch)
        for token in example.prompt.tolist():
            row += [(token, None, 0)] * (TOKENS if token == IMAGE_ID else 1)
        row = [(token, i, 0) for i, (token, _, _) in enumerate(row)]
        P = len(row)
        for a, (ids, kept) in enumerate(zip(example.answers, example.token_masks)):
            position, before = P, P - 1  # before: the column that predicts the next token
            for token, keep in zip(ids.tolist(), kept.tolist()):
                for _ in range(TOKENS if token == IMAGE_ID else 1):
                    if keep:
                        target.append(token)
                        source.append((b, before))
                        answer.append(len(owner))
                        end = len(row)
                    before = len(row)
                    row.append((token, position, a + 1))
                    position += 1
            last.append((b, end))
            owner.append(b)
        rows.append(row)
        paths += example.images
    rows = rows or [[(PAD, 0, -1)]]
    T = max(map(len, rows))
    rows = [row + [(PAD, 0, -1)] * (T - len(row)) for row in rows]
    ids, position, branch = (torch.tensor([[column[i] for column in row] for row in rows]) for i in range(3))
    distinct = sorted(set(paths), key=paths.index)
    return dict(
        ids=ids,
        position=position,
        branch=branch,
        target=target,
        logit_position=[b * T + t for b, t in source],
        answer=answer,
        last_token=[b * T + t for b, t in last],
        sequence=owner,
        image=[distinct.index(p) for p in paths],
        causal_prefix=min([
            T, *(branch[b].tolist().count(0) for b, e in enumerate(examples) if len(e.answers) > 1)]),
    ), distinct


@pytest.mark.parametrize("answers", [[0], [1], [2], [5], [0, 1, 2, 5], [1, 1, 1], [0, 0], []])
def test_collate_by_definition(pictures, answers):
    """Every field of a Batch equals brute force, for any mix of answers, pictures and turns."""
    for seed in range(25):
        rng = random.Random(seed)
        examples = [random_example(rng, i, pictures[:3], n) for i, n in enumerate(answers)]
        batch, (expected, distinct) = data.collate(examples, picture_processor()), collate_by_hand(examples)
        for name, want in expected.items():
            got = getattr(batch, name)
            if name == "causal_prefix":
                assert got == want
                continue
            assert got.dtype == torch.int64, name
            assert got.tolist() == (want.tolist() if torch.is_tensor(want) else want), name
        wanted = [data.to_pixels(data.read_image(path), S) for path in distinct] or [torch.zeros(3, S, S)]
        assert batch.pixels.dtype == torch.float32
        assert torch.equal(batch.pixels, torch.stack(wanted))


def test_collate_shares_pictures(pictures, monkeypatch):
    """A picture that several rows and several places show is decoded and held once."""
    read = []
    monkeypatch.setattr(data, "read_image", lambda path, f=data.read_image: read.append(path) or f(path))
    prompt = np.array([1, IMAGE_ID, IMAGE_ID, 2], dtype=np.int32)
    examples = [data.Example(i, "", prompt, [], [], [pictures[i], pictures[1]]) for i in range(2)]
    batch = data.collate(examples, picture_processor())
    assert (
        read == pictures[:2] and batch.image.tolist() == [0, 1, 1, 1] and batch.pixels.shape == (2, 3, S, S)
    )


def test_an_image_that_is_lost_during_the_run(tmp_path, pictures):
    """Deleted or truncated after the check: the loader raises one line that names record and file."""
    lost = [str(tmp_path / "lost.png"), str(tmp_path / "cut.png")]
    Path(lost[1]).write_bytes(Path(pictures[0]).read_bytes()[:60])
    prompt = np.array([1, IMAGE_ID], dtype=np.int32)
    for path in lost:
        examples = [data.Example(i, f"record\x1b{i}", prompt, [], [], [image])
                    for i, image in enumerate([pictures[0], path])]
        words = rf"record 1 \(id record\\x1b1\): cannot read the image {path}: .*readable when the run"
        for workers in (0, 1):
            with pytest.raises(data.UserError, match=words):
                list(data.Loader(make_steps(examples), 0, 1, workers))


def test_collate_counts_pictures(pictures):
    """An example with more or fewer pictures than image tokens is a bug that is caught."""
    prompt = np.array([1, IMAGE_ID, 2], dtype=np.int32)
    for paths in ([], pictures[:2]):
        with pytest.raises(AssertionError):
            data.collate([data.Example(0, "", prompt, [], [], paths)], picture_processor())


def test_batch_to(pictures):
    """to() keeps every field and its order."""
    batch = data.collate([random_example(random.Random(1), 0, pictures, 2)], picture_processor())
    moved = batch.to("cpu")
    for field in data.dataclasses.fields(batch):
        a, b = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, field.name


# ---- 7. steps ----


def make_examples(n, pictures=None, seed=0):
    rng = random.Random(seed)
    return [
        random_example(rng, i, pictures, rng.choice([1, 2]))
        if pictures
        else data.Example(i, str(i), np.full(rng.randint(1, 30), 1, dtype=np.int32), [], [], [])
        for i in range(n)
    ]


def make_steps(examples, batch_size=8, micro_batch=2, rank=0, world=1, **options):
    return data.Steps(examples, picture_processor(), batch_size, micro_batch, rank, world, **options)


def rows_of(examples, step, world, micro_batch, **options):
    """The micro-batches of all ranks, in the order they would stand in on one."""
    ranks = [
        make_steps(examples, 8, micro_batch, rank, world, **options).groups(step) for rank in range(world)
    ]
    assert len({len(groups) for groups in ranks}) == 1  # every rank has as many
    return [group for groups in zip(*ranks) for group in groups]


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_steps_do_not_depend_on_ranks(shuffle, by_length):
    """Step k takes the same rows in the same order on 1, 2 or 4 ranks, whatever the micro-batch."""
    examples = make_examples(29)
    for step in range(8):
        options = dict(shuffle=shuffle, by_length=by_length, seed=3)
        expected = sum(rows_of(examples, step, 1, 1, **options), [])
        assert len(expected) == (8 if (step + 1) % 4 else 5)
        for world in (1, 2, 4):
            for micro_batch in (1, 2, 3, 8, 50):
                groups = rows_of(examples, step, world, micro_batch, **options)
                assert sum(groups, []) == expected
                assert all(len(group) <= micro_batch for group in groups)
                assert len(groups) == world * -(-len(expected) // (world * micro_batch))


def test_steps_epochs():
    """Every row once an epoch; the order is a function of (seed, epoch) and differs between them."""
    examples = make_examples(29)

    def epoch(seed, e, fresh=True):
        steps = make_steps(examples, seed=seed, by_length=False)
        assert len(steps) == 4
        visits = range(e * 4, e * 4 + 4) if fresh else reversed(range(e * 4 + 4))
        groups = {step: sum(steps.groups(step), []) for step in visits}
        return sum((groups[step] for step in range(e * 4, e * 4 + 4)), [])

    orders = {(seed, e): epoch(seed, e) for seed in (0, 1) for e in (0, 1, 2)}
    assert all(sorted(order) == list(range(29)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == 6
    assert all(
        epoch(*key, fresh=False) == order for key, order in orders.items()
    )  # whatever was asked before
    assert epoch(0, 0) != list(range(29))


def test_steps_that_are_whole():
    """drop_last: no short step, no row twice an epoch, and over epochs every row; fewer rows than a step
    takes are one short step. Orders are their keys' alone: of any length, and not model.keyed_uniforms'."""
    steps = make_steps(make_examples(29), seed=3, drop_last=True)
    assert len(steps) == 3
    epochs = [[sum(steps.groups(3 * e + k), []) for k in range(3)] for e in range(6)]
    for epoch in epochs:
        assert all(len(rows) == 8 for rows in epoch) and len(set(sum(epoch, []))) == 24
    assert set(sum(sum(epochs, []), [])) == set(range(29))
    assert len(make_steps(make_examples(24), drop_last=True)) == 3
    few = make_steps(make_examples(5), drop_last=True)
    assert len(few) == 1 and sorted(sum(few.groups(4), [])) == [0, 1, 2, 3, 4]
    keys = [(7,), (7, 0), (7, 0, 0), (7, 1), (7, 1, 0), (7, 0, 1), (8, 0)]
    orders = [data.keyed_permutation(50, *key).tolist() for key in keys]
    assert len(set(map(tuple, orders))) == len(keys) and all(sorted(o) == list(range(50)) for o in orders)
    assert orders == [data.keyed_permutation(50, *key).tolist() for key in keys]
    drawn = [[7, iteration, prompt, k] for iteration in (0, 1) for prompt in range(4) for k in range(4)]
    assert not any(np.random.default_rng(key).permutation(50).tolist() in orders for key in drawn)


def test_steps_without_shuffle():
    """Evaluation and prediction go through the file in its order."""
    steps = make_steps(make_examples(21), shuffle=False, by_length=False)
    assert [sum(steps.groups(step), []) for step in range(3)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 21)),
    ]
    ranks = [make_steps(make_examples(5), 4, 2, rank, 2, shuffle=False, by_length=False) for rank in range(2)]
    assert [[steps.groups(step) for step in range(2)] for steps in ranks] == [
        [[[0, 1]], [[4]]],
        [[[2, 3]], [[]]],
    ]


def test_steps_by_length(pictures):
    """Within a step rows of similar length share a micro-batch; the step's rows stay the same."""
    examples = make_examples(32, pictures)
    length = [int((data.collate([example], picture_processor()).branch >= 0).sum()) for example in examples]
    grouped, plain = make_steps(examples), make_steps(examples, by_length=False)
    for step in range(4):
        rows = sum(grouped.groups(step), [])
        assert sorted(rows) == sorted(sum(plain.groups(step), []))
        assert [length[i] for i in rows] == sorted(length[i] for i in rows)
    assert any(grouped.groups(step) != plain.groups(step) for step in range(4))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_loader(pictures, workers):
    """The batches of the steps asked for, in order, in every pass; without records, padding only."""
    steps = make_steps(make_examples(11, pictures), 4, 1, rank=1, world=2)
    loader = data.Loader(steps, 1, 4, workers)  # the last is of the second epoch
    assert len(loader) == 3
    for _ in range(2):
        got = list(loader)
        assert [len(micro_batches) for micro_batches in got] == [2, 2, 2]
        for step, micro_batches in enumerate(got, 1):
            for batch, group in zip(micro_batches, steps.groups(step)):
                want = data.collate([steps.examples[i] for i in group], steps.processor)
                for field in data.dataclasses.fields(want):
                    a, b = getattr(batch, field.name), getattr(want, field.name)
                    assert torch.equal(a, b) if torch.is_tensor(b) else a == b
    empty = got[1][1]  # three records are left for two ranks with two micro-batches of one each
    assert empty.branch.tolist() == [[-1]] and empty.pixels.shape == (1, 3, S, S) and not len(empty.target)


class RecordedSteps:
    """Stands for data.Steps: item k is k, after a while. Keeps which steps were begun, and by which
    threads."""

    def __init__(self, seconds=lambda step: 0.0, broken=()):
        self.seconds, self.broken, self.begun, self.threads = seconds, broken, [], set()

    def __getitem__(self, step):
        self.begun.append(step)
        self.threads.add(threading.current_thread())
        time.sleep(self.seconds(step))
        if step in self.broken:
            raise RuntimeError(f"step {step} is broken")
        return step


def test_loader_keeps_the_order_and_a_bound(monkeypatch):
    """Steps that take unequally long come in order; at most two per worker and the one due are begun before
    they are asked for; threads decode, and no process is forked."""
    monkeypatch.setattr(os, "fork", None)
    steps = RecordedSteps(lambda step: 0.02 * (step % 3))
    for step, got in enumerate(data.Loader(steps, 0, 20, 2)):
        assert got == step
        time.sleep(0.03)
        assert max(steps.begun) <= step + 4
    assert sorted(steps.begun) == list(range(20))
    assert len(steps.threads) == 2 and threading.main_thread() not in steps.threads
    assert not multiprocessing.active_children()
    steps = RecordedSteps()
    assert list(data.Loader(steps, 3, 6, 0)) == [3, 4, 5] and steps.threads == {threading.main_thread()}


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_raises_where_the_step_is_due(workers):
    """A step's exception comes after the steps before it, although it was decoded ahead of them."""
    loader, got = data.Loader(RecordedSteps(lambda step: 0.1 * (step == 1), broken=[2]), 0, 9, workers), []
    with pytest.raises(RuntimeError, match="step 2 is broken"):
        got.extend(loader)  # extend keeps what came before an exception
    assert got == [0, 1]


def test_loader_stops_early():
    """A consumer that leaves is not kept waiting by a step that hangs; what is queued is not begun, and no
    thread stays."""
    release = threading.Event()
    steps = RecordedSteps(lambda step: release.wait(20) * 0.0 if step else 0.0)
    passing = iter(data.Loader(steps, 0, 100, 2))
    assert next(passing) == 0
    start = time.time()
    del passing
    assert time.time() - start < 5
    release.set()
    for thread in steps.threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in steps.threads)
    assert set(steps.begun) <= {0, 1, 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_over_a_loader(monkeypatch, capsys, workers):
    """A pass that takes over ten seconds says how far it is, with a loader as with a list."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(data.time, "time", lambda: next(clock))
    assert list(data.progress(data.Loader(RecordedSteps(), 2, 8, workers), "steps")) == list(range(2, 8))
    assert capsys.readouterr().out.splitlines()[0] == "steps: 3/6, 16 s left"


# ---- 8. rows ----


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A picture folder: good and bad files, one with a comma in its name, one in a subfolder, one outside."""
    folder = tmp_path_factory.mktemp("rows") / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "x,y.png", "sub/c.png", "../outside.png"):
        noise(9, 7).save(folder / name)
    buffer = io.BytesIO()
    noise(90, 70).save(buffer, "JPEG")
    (folder / "torn.jpg").write_bytes(buffer.getvalue()[:500])
    (folder / "page.png").write_text("<html>")
    return str(folder)


def make_row(*turns, image=None, id=7, **more):
    """Turns (role, value)."""
    return {
        "id": id,
        "conversations": [{"from": role, "value": value} for role, value in turns],
        "image": image,
        **more,
    }


GOOD = make_row(("human", "Hi"), ("gpt", "Hello"), id="good")


def test_read_row(images):
    """Roles and contents up to the final answer, stripped; the answers best first; the picture in front."""
    row = make_row(
        ("system", " Be kind. "),
        ("human", "  Hi\n"),
        ("gpt", " Hello "),
        ("human", "Go"),
        ("gpt", [" best ", "worst"]),
        image="a.png",
        id=12,
    )
    got = data.read_record(row, images)
    assert got == data.Conversation(
        "12",
        ["system", "human", "gpt", "human"],
        ["Be kind.", "<image>\n  Hi", "Hello", "Go"],
        ["best", "worst"],
        [f"{images}/a.png"],
    )
    assert data.read_record(make_row(("human", "Hi"), ("gpt", "Yo")), images).answers == ["Yo"]
    prompt = data.read_record(make_row(("human", "Hi")), images, need_answers=0)
    assert (prompt.roles, prompt.contents, prompt.answers) == (["human"], ["Hi"], [])


def test_symbolic_links(images, tmp_path):
    """A link that leads out of --images is refused, of a file or of a folder; one that stays inside is not,
    and --images itself may be a link."""
    outside = Path(images).parent / "outside.png"
    for name, target in (("out.png", outside), ("outer", outside.parent), ("in.png", f"{images}/a.png")):
        if not os.path.lexists(f"{images}/{name}"):
            os.symlink(target, f"{images}/{name}")
    for name in ("out.png", "outer/outside.png", "sub/../out.png"):
        with pytest.raises(data.UserError, match=f"got the image '{name}', outside --images"):
            data.image_list(name, images)
    os.symlink(images, tmp_path / "link")
    for folder in (images, str(tmp_path / "link")):
        assert data.image_list("in.png", folder) == [f"{folder}/in.png"]


@pytest.mark.parametrize(
    "value, names",
    [
        ("a.png", ["a.png"]),
        ("sub/c.png", ["sub/c.png"]),
        ("./sub/../a.png", ["a.png"]),
        (["a.png", "b.png"], ["a.png", "b.png"]),
        (["b.png"], ["b.png"]),
        ("a.png,b.png", ["a.png", "b.png"]),
        ("b.png, sub/c.png", ["b.png", "sub/c.png"]),
        ("x,y.png", ["x,y.png"]),
        (["x,y.png", "a.png"], ["x,y.png", "a.png"]),
        (["a.png", "a.png"], ["a.png", "a.png"]),
        (None, []),
        ([], []),
        ("", []),
    ],
)
def test_image_list(images, value, names):
    """Path, list, comma-joined paths (unless a file of the whole name exists), null: the paths in order."""
    assert data.image_list(value, images) == [f"{images}/{name}" for name in names]


def test_absent_image(images):
    """A row without the key has no picture."""
    row = make_row(("human", "Hi"), ("gpt", "Hello"))
    del row["image"]
    assert data.read_record(row, images).images == []


@pytest.mark.parametrize(
    "image, human, content",
    [
        ("a.png", "What?", "<image>\nWhat?"),
        ("a.png", "What?\n<image>", "What?\n<image>"),
        ("a.png,b.png", "<image> and?", "<image>\n<image> and?"),
        ("a.png,b.png,a.png", "What?", "<image>\n" * 3 + "What?"),
        ("a.png,b.png", "Is <image> as <image>?", "Is <image> as <image>?"),
        (None, "What?", "What?"),
    ],
)
def test_placeholders(images, image, human, content):
    """Placeholders stay where they are; the missing ones go first."""
    assert data.read_record(make_row(("human", human), ("gpt", "Yes"), image=image), images).contents == [
        content
    ]


def test_placeholders_of_turns(images):
    """Missing placeholders go to the first human turn, behind a system turn; only human turns have any."""
    row = make_row(
        ("system", "See <image>"),
        ("human", "One"),
        ("gpt", "An <image>"),
        ("human", "<image> two"),
        ("gpt", "Yes"),
        image=["a.png", "b.png"],
    )
    expected = ["See <image>", "<image>\nOne", "An <image>", "<image> two"]
    assert data.read_record(row, images).contents == expected


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.json", json.dumps([GOOD, GOOD])),
        ("rows.json", "\n " + json.dumps([GOOD, GOOD], indent=1) + "\n"),
        ("rows.jsonl", json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n"),
        ("rows.txt", json.dumps([GOOD, GOOD])),
        ("rows.json", "\ufeff" + json.dumps([GOOD, GOOD])),
        ("rows.jsonl", "\ufeff" + json.dumps(GOOD) + "\r\n" + json.dumps(GOOD)),
        ("rows.txt", json.dumps(GOOD) + "\n" + json.dumps(GOOD)),
    ],
)
def test_load_rows(tmp_path, name, text):
    """A JSON list or one object a line, by content and not by name."""
    (tmp_path / name).write_text(text)
    assert data.load_records(str(tmp_path / name)) == [GOOD, GOOD]


def test_a_list_is_read_item_by_item():
    """The items of a JSON list, however it is spaced; a list that is not one is an error."""
    items = [{"a": "[,]\\"}, [], {}, "x, ]", 12, None, {"b": [{"c": "é🙂"}]}]
    for indent in (None, 2):
        text = " " + json.dumps(items, indent=indent, ensure_ascii=False) + "\n"
        assert [json.loads(item) for item in data.list_items(text)] == items
    assert list(data.list_items("[ ]")) == []
    for bad in ("[", "[1", "[1,", "[1 2]", "[,1]", "[1,,2]", "[1,]", "[1]]", "[1] 2", '[{"a": 1]', "[1 [2]]"):
        with pytest.raises(ValueError):
            list(data.list_items(bad))


def test_load_rows_keeps_line_separators(tmp_path):
    """U+2028 and U+0085 inside a string do not end a line of JSON."""
    row = make_row(("human", "a\u2028b\u0085c"), ("gpt", "é"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.load_records(str(tmp_path / "rows.jsonl")) == [row]


BAD_FILES = {
    "no such file": (None, "no such file"),
    "empty": (b"", "got no records"),
    "empty list": (b"[]", "got no records"),
    "not JSON": (b"id,image\n1,a.png\n", "not JSON"),
    "torn list": (b'[{"id": 1},', "not JSON"),
    "torn line": (b'{"id": 1}\n{"id": 2}\n{"id": \n', "not JSON.*line 3"),
    "too deep": (b"[" * 200_000, "not JSON.*recursion"),
    "too deep in a line": (b'{"id": 1}\n' + b'{"a":' * 200_000, "not JSON in line 2.*recursion"),
    "a number of 5,000 digits": (b"[" + b"9" * 5000 + b"]", "not JSON.*digits"),
    "not text": (b"\xff\xfe\x00\x01", "UTF-8|utf-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    """A file that holds no rows is an error that names it, and the line."""
    content, words = BAD_FILES[case]
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*(?:{words})"):
        data.load_records(str(path))


DEEP = json.loads("[" * 900 + "]" * 900)
CONVERTS = "examples/convert.py converts other layouts"
HUMAN, GPT, NEED = ("human", "Hi"), ("gpt", "Hello"), r'need \{"id", "image", "conversations"'
BAD_ROWS = {  # case: (row, essential words of the error)
    "not an object": ([1, 2], NEED),
    "no conversations": ({"id": 7, "image": "a.png"}, NEED),
    "conversations empty": (make_row(), NEED),
    "conversations a string": ({"id": 7, "conversations": "Hi"}, NEED),
    "turn without value": (
        {"id": 7, "conversations": [{"from": "human"}]},
        r"got the turn .*'human'.*need .*\"value\"",
    ),
    "turn not an object": ({"id": 7, "conversations": ["Hi", "Hello"]}, "got the turn 'Hi'"),
    "turn without from": ({"id": 7, "conversations": [{"value": "Hi"}]}, r"got turns from \[None\]"),
    "unknown role": (
        make_row(("user", "Hi"), ("assistant", "Hello")),
        "got turns from .*user.*human and gpt in turn",
    ),
    "two humans in a row": (make_row(HUMAN, HUMAN, GPT), "got turns from .*human and gpt in turn"),
    "gpt first": (make_row(GPT, HUMAN, GPT), "got turns from .*human first"),
    "system only": (make_row(("system", "Be kind")), "got turns from"),
    "system in the middle": (
        make_row(HUMAN, GPT, ("system", "x"), HUMAN, GPT),
        "got turns from .*system may lead",
    ),
    "empty answer": (make_row(HUMAN, ("gpt", "")), "got the answer '', need text"),
    "blank answer": (make_row(HUMAN, ("gpt", " \n")), "got the answer .*, need text"),
    "one empty of several": (make_row(HUMAN, ("gpt", ["Hello", ""])), r"got the answer .*\['Hello', ''\]"),
    "empty list of answers": (make_row(HUMAN, ("gpt", [])), r"got the answer '\[\]'"),
    "answer a number": (make_row(HUMAN, ("gpt", 3)), "got the answer '3', need text"),
    "answer null": (make_row(HUMAN, ("gpt", None)), "got the answer 'None', need text"),
    "list not in the last turn": (
        make_row(HUMAN, ("gpt", ["a", "b"]), HUMAN, GPT),
        "only the last gpt turn may be a list",
    ),
    "human turn not text": (make_row(("human", 3), GPT), "whose value is not text"),
    "empty turn before": (make_row(HUMAN, ("gpt", ""), HUMAN, GPT), "got an empty gpt turn"),
    "half an emoji": (make_row(("human", "Hi \ud83d"), GPT), "surrogate"),
    "half an emoji in an answer": (make_row(HUMAN, ("gpt", ["Hi", "\ud83d"])), "surrogate"),
    "no answer": (make_row(HUMAN), "got no answer: the last turn is human"),
    "id a list": (make_row(HUMAN, GPT, id=[7]), r"got the id \[7\], need a text or a whole number"),
    "half an emoji as an id": (make_row(HUMAN, GPT, id="7\ud83d"), "surrogate"),
    "deep": (make_row(HUMAN, ("gpt", DEEP)), r"got the answer '\[+\.\.\.\]+'"),
    "deep turn": ({"id": 7, "conversations": [DEEP]}, r"got the turn '\[+\.\.\.\]+'"),
    "terminal escapes": (make_row(HUMAN, GPT, image="\x1b[2J\x07.png"), r"/\\x1b\[2J\\x07\.png "),
    "another layout": ({"id": 7, "prompt": "Hi", "chosen": "a", "rejected": "b"},
                       f"the fields id, prompt, chosen, rejected, {NEED}.*{CONVERTS}"),
    "content parts": (make_row(("human", [{"type": "image"}, {"type": "text", "text": "?"}]), GPT), CONVERTS),
    "content parts as an answer": (make_row(HUMAN, ("gpt", [{"type": "text", "text": "Hi"}])), CONVERTS),
    "a placeholder for the images of another layout": (
        make_row(("human", "<image>\nHi"), GPT, images=["a.png"]), "got the field 'images'"),
    "output_1 in place of an answer": (make_row(HUMAN, output_1="a"), "got the field 'output_1'"),
    "a JPEG in base64": (make_row(HUMAN, GPT, image="/9j/" + "Q" * 9999),
                         f"'/9j/.{{,99}}, need a path.*{CONVERTS}"),
    "a data URL": (make_row(HUMAN, GPT, image=["data:image/png;base64,iVBO"]), "'data:.*, need a path"),
    "a URL": (make_row(HUMAN, GPT, image="https://x.org/a.png"), "'https:.*, need a path"),
    "an image as bytes": (make_row(HUMAN, GPT, image={"bytes": "Q" * 9999}), "{'bytes': .{,99}, need a path"),
    "base64 as an image": (make_row(HUMAN, GPT, image="QUJD" * 9999), "such image: .{,240} .see"),
    "too many placeholders": (
        make_row(("human", "<image> <image>"), GPT, image="a.png"),
        "got 2 <image> .* for 1 images",
    ),
    "placeholder without picture": (
        make_row(("human", "<image>\nHi"), GPT), "got 1 <image> .* for 0 images: name the missing ones in"),
    **{f"placeholder {text}": (make_row(("human", f"{text} Hi"), GPT, image="a.png"),
                               "got '<.*need <image> there, and its file in `image`")
       for text in ("<img>a.png</img>", "<|image_1|>", "<image 1>", "<image_00>", "<|image|>", "<ImageHere>",
                    "<|image_pad|>", "<image_placeholder>", "<start_of_image>")},
    "missing picture": (
        make_row(HUMAN, GPT, image="none.png"),
        r"no such image: .*none\.png \(see --images\)",
    ),
    "one of two missing": (make_row(HUMAN, GPT, image="a.png,none.png"), r"no such image: .*/none\.png"),
    "picture a folder": (make_row(HUMAN, GPT, image="sub"), "no such image"),
    "picture a number": (make_row(HUMAN, GPT, image=3), "got the image 3, need a path"),
    "picture null in a list": (
        make_row(HUMAN, GPT, image=["a.png", None]),
        "got the image None, need a path",
    ),
    "picture outside": (
        make_row(HUMAN, GPT, image="../outside.png"),
        r"got the image '\.\./outside\.png', outside --images",
    ),
    "absolute path": (
        make_row(HUMAN, GPT, image="/etc/hostname"),
        "got the image '/etc/hostname', outside --images",
    ),
    "torn picture": (make_row(HUMAN, GPT, image="torn.jpg"), r"cannot read the image .*torn\.jpg: "),
    "not a picture": (
        make_row(HUMAN, GPT, image=["a.png", "page.png"]),
        r"cannot read the image .*page\.png: ",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(images, capsys, case):
    """A bad row is an error naming file, row, id and fault; --skip_bad_rows skips, counts and reports it."""
    row, words = BAD_ROWS[case]
    rows = [GOOD, row, GOOD, row]
    name = r"rows\.json: record 1 \(id %s\): " % (None if isinstance(row, list) else r"\[?7.{,6}")
    with pytest.raises(ValueError, match=f"(?s){name}.*{words}.*; --skip_bad_rows leaves such records out"):
        data.check_records(rows, images, "rows.json")
    good, bad, _ = data.check_records(rows, images, "rows.json", skip_bad_rows=True)
    assert [(index, c.id) for index, c in good] == [(0, "good"), (2, "good")] and bad == 2
    said = capsys.readouterr().out.splitlines()
    assert all(map(str.isprintable, said)) and max(map(len, said)) < 600
    assert len(said) == 2 and all(re.search(f"skipped .*{words}", line) for line in said)
    assert "row 1 " in said[0] and "row 3 " in said[1]
    with pytest.raises(ValueError, match=r"rows\.json: all 1 records are bad, need at least one good one"):
        data.check_records([row], images, "rows.json", skip_bad_rows=True)


IMAGES, SYSTEM, RANKING = "record's `image`", 'a first turn from "system"', "a list of answers, best first"
TURN, JPEG = {"from": "gpt", "value": "Yo"}, "/9j/" + "Q" * 200
ELSEWHERE = [  # fields of other layouts, and where the message says that their content belongs
    *[({name: "x"}, IMAGES) for name in (
        "images", "img", "image_path", "imagePaths", "image_file", "image_url", "image_1", "photo", "Image",
        "input_image", "jpg", "frames", "media")],
    *[({"a": value}, IMAGES) for value in (
        "b.png", "x/B.JPG", ["a.png", "b.webp"], {"b": ["c.jpeg"]}, JPEG, [JPEG],
        "data:image/png;base64,iVBO", {"bytes": "iVBO", "path": None}, [{"path": "a"}])],
    ({"pixel_values": [[0.5]]}, IMAGES), ({"images": [None, "b.png"]}, IMAGES),
    *[({name: ["x"]}, "videos and sound") for name in (
        "video", "videos", "video_path", "audio", "point_cloud")],
    *[({name: "Be kind."}, SYSTEM) for name in ("system", "system_prompt", "System Message")],
    *[({name: "x"}, RANKING) for name in (
        "chosen", "rejected", "rejected_response", "reject_answer", "output_1", "response_0", "answer_b",
        "preference", "preference_values", "ranking", "kto_tag", "winner", "candidates", "chosen_idx", "lose",
        "better_response_id", "AI_rejected", "y_w", "response_l", "desirable",
        "is_chosen", "non_preferred_output")],
    ({"output_2": TURN}, RANKING), ({"label": False}, RANKING), ({"labels": [True, False]}, RANKING),
    *[({name: value}, "weights and masks") for name in ("loss", "weight", "train", "loss_mask")
      for value in (False, 0, 1.5)],
    ({"messages": [{"role": "user", "content": "Hi"}]}, "turns of"), ({"a": [TURN]}, "turns of"),
    ({"history": [["Hi", "Yo"]]}, "turns of"), ({"tools": "[]"}, "turns of"), ({"thinking": "x"}, "turns of")]


@pytest.mark.parametrize("fields, where", ELSEWHERE, ids=lambda value: str(value)[:40])
def test_fields_of_other_layouts_are_refused(images, fields, where):
    """In a record and in a turn: nothing of them would be learnt. The message says where the content
    belongs."""
    (name, _), = fields.items()
    turns = [{"from": "human", "value": "Hi", **fields}, TURN]
    for place, row in {"image": make_row(HUMAN, GPT, image="sub/c.png", **fields),
                       "value": {"conversations": turns}}.items():
        with pytest.raises(data.UserError) as error:
            data.read_record(row, images)
        assert f"got the field '{name}'" in str(error.value) and f"`{place}`" in str(error.value)
        assert where in str(error.value) and CONVERTS in str(error.value) and len(str(error.value)) < 400


def test_a_list_beside_as_many_answers_is_their_ranking(images):
    """Scores in another order than best first would be ignored."""
    with pytest.raises(data.UserError, match=RANKING):
        data.read_record(make_row(HUMAN, ("gpt", ["a", "b"]), gpt4_scores=[1, 2]), images)
    with pytest.raises(data.UserError, match=RANKING):  # the index of the better one
        data.read_record(make_row(HUMAN, ("gpt", ["a", "b"]), label=1), images)
    for scores, answers in ([1, 2], ["a", "b", "c"]), ([1], "a"):
        data.read_record(make_row(HUMAN, ("gpt", answers), gpt4_scores=scores), images)


COLUMNS = {
    "question_id": 3, "source": "coco/train2017", "category": "conv", "label": "B", "labels": [17, 18],
    "idx": 0, "model": "gpt-4", "dataset": "llava.v1", "origin": "a/b.json", "split": "train", "score": 0.3,
    "image_id": 42, "image_size": [640, 480], "video_id": "v1", "bbox": [[1, 2, 3, 4]], "tags": ["a", "b"],
    "meta": {"a": {"b": 1}}, "question": "What?", "answer": "no", "answers": ["no", "no"],
    "url": "https://x.org/page", "sample_id": "ocr/1.png", "imageId": "n1", "chosen_score": 3,
    "score_chosen": 3, "caption": "A cat.", "deep": DEEP, "nan": float("nan"),
    "images": [], "system": "", "video": None, "chosen": [None], "preference": {}}


@pytest.mark.parametrize("name", COLUMNS)
def test_other_columns_are_allowed(images, name):
    """Of records and of turns."""
    row = make_row(HUMAN, GPT, image="sub/c.png", **{name: COLUMNS[name]})
    row["conversations"][0][name] = COLUMNS[name]
    assert data.read_record(row, images) == data.read_record(make_row(HUMAN, GPT, image="sub/c.png"), images)


@pytest.mark.parametrize("name", ["image_path", "images", "column"])
def test_the_same_image_once_more_is_allowed(images, name):
    """Nothing is lost then; another image is an error."""
    for value in ("sub/c.png", ["sub/c.png"], "c"):
        data.read_record(make_row(HUMAN, GPT, image="sub/c.png", **{name: value}), images)
    data.read_record(make_row(HUMAN, GPT, image="a.png,b.png", **{name: ["a.png", "b.png"]}), images)
    for source in (("url", "https://x.org/b.jpg?w=9"), ("image_url", ["https://x.org/b"]),
                   ("image_id", 42), ("video_id", "v1")):
        # where the image is from, but not in its place
        data.read_record(make_row(HUMAN, GPT, image="sub/c.png", **dict([source])), images)
        with pytest.raises(data.UserError, match=f"got the field '{source[0]}'"):
            data.read_record(make_row(HUMAN, GPT, **dict([source])), images)
    for value in ("b.png", "masks/sub/c.png", ["sub/c.png", "b.png"], "c.jpg"):
        with pytest.raises(data.UserError, match=f"got the field '{name}'"):
            data.read_record(make_row(HUMAN, GPT, image="sub/c.png", **{name: value}), images)


def test_rows_without_answer(images):
    """Prediction takes rows without an answer, and keeps the answers of those that have one."""
    good, bad, _ = data.check_records([make_row(HUMAN), GOOD], images, "rows.json", need_answers=0)
    assert [c.answers for _, c in good] == [[], ["Hello"]] and bad == 0


def test_the_first_bad_row_is_named(images):
    """A torn picture in an earlier row goes before a malformed later row."""
    torn = make_row(HUMAN, GPT, image="torn.jpg", id="torn")
    with pytest.raises(ValueError, match=r"record 1 \(id torn\).*cannot read"):
        data.check_records([GOOD, torn, make_row(GPT)], images, "rows.json")


def test_pictures_are_looked_at_once(images):
    """Each distinct picture is checked once, through the world where there is one."""
    looked = []

    def parallel_map(function, items, what):
        looked.extend(items)
        return [function(item) for item in items]
    world = SimpleNamespace(parallel_map=parallel_map, gather=lambda item: [item])

    rows = [
        make_row(HUMAN, GPT, image=image, id=image) for image in ("a.png", "b.png,a.png", "torn.jpg", "a.png")
    ]
    good, bad, _ = data.check_records(
        rows, images, "rows.json", skip_bad_rows=True, world=world
    )
    assert sorted(looked) == [f"{images}/{name}" for name in ("a.png", "b.png", "torn.jpg")]
    assert [index for index, _ in good] == [0, 1, 3] and bad == 1


def test_known_unreadable_images_are_not_decoded_again(images, monkeypatch):
    """What a first check returns makes a second one skip the same records without a look at any image."""
    rows = [make_row(HUMAN, GPT, image=image, id=image) for image in ("a.png", "torn.jpg", "b.png")]
    good, bad, unreadable = data.check_records(rows, images, "rows.json", skip_bad_rows=True)
    assert list(unreadable) == [f"{images}/torn.jpg"] and bad == 1
    monkeypatch.setattr(data, "image_error", None)
    assert data.check_records(rows, images, "rows.json", skip_bad_rows=True, unreadable=unreadable) == (
        good, bad, unreadable)
    with pytest.raises(ValueError, match=r"record 1 \(id torn.jpg\): cannot read the image"):
        data.check_records(rows, images, "rows.json", unreadable=unreadable)


class ThreadRank:
    """A rank of fsdp.World whose ranks are threads."""

    def __init__(self, rank, size, items, barrier):
        self.rank, self.size, self.items, self.barrier = rank, size, items, barrier

    def gather(self, item):
        self.items[self.rank] = item
        self.barrier.wait(20)
        items = list(self.items)
        self.barrier.wait(20)
        return items

    def parallel_map(self, function, items, what):
        results = [None] * len(items)
        for rank, part in enumerate(self.gather([function(item) for item in items[self.rank::self.size]])):
            results[rank::self.size] = part
        return results


def on_ranks(function, *per_rank):
    """function(world, what the rank is given) on a thread per rank → what each returned or raised."""
    size = len(per_rank)
    items, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank):
        try:
            results[rank] = function(ThreadRank(rank, size, items, barrier), per_rank[rank])
        except Exception as error:
            results[rank] = error
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_an_image_missing_on_one_rank(images, tmp_path):
    """Every rank raises the same error, of the file that one rank lacks, or skips the same records; an
    earlier unreadable image is named first."""
    shutil.copytree(images, tmp_path / "copy", symlinks=True)
    os.remove(tmp_path / "copy/b.png")
    rows = [make_row(HUMAN, GPT, image=image, id=image)
            for image in ("a.png", "x,y.png", "b.png", "sub/c.png", "a.png")]

    def check(rows, **options):
        return on_ranks(
            lambda world, folder: data.check_records(rows, folder, "rows.json", world=world, **options),
            images, str(tmp_path / "copy"))
    words = f"rows.json: record 2 (id b.png): no such image: {tmp_path}/copy/b.png (see --images); --skip"
    assert [str(error)[:len(words)] for error in check(rows)] == [words] * 2
    both = check(rows, skip_bad_rows=True)
    assert [([index for index, _ in good], bad) for good, bad, _ in both] == [([0, 1, 3, 4], 1)] * 2
    rows[1]["image"] = "torn.jpg"
    assert all("record 1 (id x,y.png): cannot read the image" in str(error) for error in check(rows))


def test_other_records_on_another_rank(images):
    """A rank with fewer records or others does not break the check of the images; the digests differ."""
    rows = [make_row(HUMAN, GPT, image=image) for image in ("a.png", "b.png", "x,y.png", None)]
    for other in (rows[:1], rows[3:], rows[:2] + rows[3:]):
        results = on_ranks(lambda world, rows: data.check_records(rows, images, "rows.json", world=world),
                           rows, other)
        assert [len(good) for good, _, _ in results] == [4, len(other)]
        assert len({data.digest(good, images) for good, _, _ in results}) == 2


def test_digest(images, tmp_path):
    """Of all that is read of a record and its place; not of where the image folder lies."""
    shutil.copytree(images, tmp_path / "copy", symlinks=True)
    row = make_row(HUMAN, GPT, ("human", "Go"), ("gpt", ["a", "b"]), image="a.png", margin=1)

    def digest(*rows, folder=images):
        return data.digest(data.check_records(rows, folder, "rows.json")[0], folder)
    last = row["conversations"][:-1]
    others = [{**row, "id": 8}, {**row, "image": "b.png"}, {**row, "margin": 2},
              {**row, "conversations": [*last, {"from": "gpt", "value": ["b", "a"]}]},
              {**row, "conversations": [*last, {"from": "gpt", "value": ["a", "b "]}]},
              {**row, "conversations": [{"from": "system", "value": "Hi"}, *row["conversations"]]}]
    assert digest(row) == digest(row, folder=str(tmp_path / "copy")) == digest(others[4])
    assert len({digest(other) for other in [row, *others]}) == len(others)
    assert digest(row, others[0]) != digest(others[0], row)


# ---- 9. processors ----


def test_tokens_are_added(folders):
    """<image> and <pad> are added, rows grow to a multiple of 64, and new ids are never sampled."""
    size = len(AutoTokenizer.from_pretrained(folders["tiny2"]))
    config, args = (
        make_config(size),
        SimpleNamespace(template="vicuna", tokenizer=None, image_mode="auto", max_len=9),
    )
    processor, grown = data.load_processor(folders["tiny2"], config, args)
    rows = -(-(size + 2) // 64) * 64
    assert grown == (size, rows) and config.text_config.vocab_size == rows and rows % 64 == 0
    assert config.image_token_index == processor.image_token
    assert {processor.image_token, processor.pad} == {size, size + 1}
    assert processor.banned == set(range(size, rows))
    assert (processor.image_tokens, processor.size, processor.max_len) == (TOKENS, S, 9)


@pytest.mark.parametrize("spare", [2, 10])
def test_tokens_fit(folders, spare):
    """A model with rows to spare is not grown; ids beyond the tokenizer's are never sampled."""
    size = len(AutoTokenizer.from_pretrained(folders["tiny2"]))
    config, args = (
        make_config(size + spare),
        SimpleNamespace(template="vicuna", tokenizer=None, image_mode="auto", max_len=9),
    )
    processor, grown = data.load_processor(folders["tiny2"], config, args)
    assert grown is None and config.text_config.vocab_size == size + spare
    assert processor.banned == set(range(size, size + spare))


def test_tokens_present(folders, tmp_path):
    """A tokenizer with <image> and a pad token keeps them; a pad token that ends answers may be sampled."""
    tokenizer = AutoTokenizer.from_pretrained(folders["tiny2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<other>"], "pad_token": "</s>"})
    tokenizer.save_pretrained(tmp_path)
    config, args = (
        make_config(len(tokenizer)),
        SimpleNamespace(template="vicuna", tokenizer=None, image_mode="auto", max_len=9),
    )
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    processor, grown = data.load_processor(str(tmp_path), config, args)
    assert grown is None and processor.pad == 2 and processor.banned == {config.image_token_index}
    assert len(processor.tokenizer) == len(tokenizer)
    assert "<other>" in processor.template.special_ids


# a config.json of LLaVA's own code
ORIGINAL = {"model_type": "llava", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", [*LIKE2, *LIKE3])
def test_tokenizer_json_is_read_as_it_stands(folders, tmp_path, name, kind):
    """Whatever class its configuration names, and beside a config.json that transformers cannot read."""
    shutil.copytree(folders[name], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": kind}))
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    tokenizer = data.load_tokenizer(str(tmp_path))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.backend_tokenizer.to_str() == expected.to_str()
    assert [tokenizer.bos_token, tokenizer.eos_token] == [config["bos_token"], config["eos_token"]]
    for text in data.VARIED:
        assert tokenizer(text).input_ids == expected.encode(text).ids


def train_sentencepiece(folder, **options):
    """A tokenizer.model of LLaMA's kind alone in a folder: runs of spaces have the lowest scores."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file, lines = io.BytesIO(), [line.replace("\n", " ").replace(",", ",   ") for line in CORPUS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, minloglevel=2, **{
            "model_type": "bpe", "vocab_size": 400, "byte_fallback": True,
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True, **options})
    run = "▁▁".encode()  # a piece is a string, and its score as a float
    model, found = re.subn(b"\n" + bytes([len(run)]) + run + b"\x15....",
                           lambda m: m[0][:-4] + struct.pack("<f", -1e9), file.getvalue(), flags=re.DOTALL)
    assert found or options
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_is_converted(tmp_path, prefix):
    """tokenizer.model alone: SentencePiece's own ids for any text, the added tokens' ids, the golden ids of a
    template, nothing written beside it, and an export that transformers reads with the same ids."""
    folder, out = tmp_path / "llava", tmp_path / "out"
    original = train_sentencepiece(folder, add_dummy_prefix=prefix)
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 401, "<pad>": 400}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    files, config = sorted(folder.iterdir()), make_config()
    processor = load(folder, config=config)
    assert sorted(folder.iterdir()) == files
    tokenizer, rng = processor.tokenizer, random.Random(0)
    tokens = ["<s>", "</s>", "<pad>", "<extra>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == [1, 2, 400, 401, 402]
    assert processor.pad == 400 and processor.stop == {2}
    assert tokenizer("a").input_ids == [1, *original.encode("a")]
    data.save_processor(processor, config, str(out))
    peer = AutoTokenizer.from_pretrained(out)
    words = [" ", "  ", "   ", "\n", "▁", "</s>", "e\u0301", "ﬁ", "日", "👩‍👩‍👧", "7"]
    words += " ".join(CORPUS).split()
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randrange(9)))
        expected = original.encode(text)
        assert processor.template.ids(text) == expected
        assert peer(text, add_special_tokens=False, split_special_tokens=True).input_ids == expected
        assert tokenizer.decode(expected) == original.decode(expected)
    turns, _, golden = GOLDEN["vicuna"][0]
    assert_golden(processor, golden, turns)


NOT_CONVERTED = {  # case: (what the model is trained with, added tokens, what the error says)
    "normalised": ({"normalization_rule_name": "nmt_nfkc"}, {}, "cannot be converted: "),
    "spaces": ({"remove_extra_whitespaces": True}, {}, "cannot be converted: ' ' is "),
    "unigram": ({"model_type": "unigram", "vocab_size": 330}, {}, "cannot be converted: "),
    "symbols": ({"user_defined_symbols": ["<|im_start|>"]}, {}, "cannot be converted: "),
    "added": ({}, {"<extra>": 405}, "the added token <extra> is 405 there, and would become 400"),
}


@pytest.mark.parametrize("case", NOT_CONVERTED)
def test_sentencepiece_that_cannot_be_converted(tmp_path, case):
    """Other ids than SentencePiece's are an error, never used."""
    options, added, words = NOT_CONVERTED[case]
    train_sentencepiece(tmp_path, **options)
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(data.UserError, match=f"{words}.*: give --tokenizer, a folder with a tokenizer.json"):
        load(tmp_path)


def test_sentencepiece_is_missing(tmp_path, monkeypatch):
    """The error has the command that helps. A tokenizer.model of another kind is named."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # LLaMA-3's is of another kind
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        with pytest.raises(data.UserError, match="converted: pip install sentencepiece, then run this again"):
            load(tmp_path)
    pytest.importorskip("sentencepiece")
    with pytest.raises(data.UserError, match="not a file of SentencePiece: give --tokenizer, a folder with"):
        load(tmp_path)


@pytest.mark.parametrize("eos, stop", [(5, {2, 5}), ([5, 6], {2, 5, 6}), (None, {2})])
def test_stop_of_generation_config(folders, tmp_path, eos, stop):
    """With the checkpoint's own template generation_config's end tokens stop sampling too, beside the
    template's and the tokenizer's; a template that is named brings its own."""
    with_template(folders["tiny2"], tmp_path, LLAVA_HF)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert load(tmp_path, "auto").stop == stop and load(tmp_path, "vicuna").stop == {2}


def test_processor_errors(folders, tmp_path):
    """A tokenizer that is missing, of another checkpoint or too big is an error that says so."""
    with pytest.raises(data.UserError, match=r"no tokenizer\.json or tokenizer\.model: give --tokenizer, a "):
        load(tmp_path)
    with pytest.raises(
        ValueError, match="image_token_index is 32000: the tokenizer is of another checkpoint"
    ):
        load(folders["tiny2"], config=make_config(image_token=32000))
    size = len(AutoTokenizer.from_pretrained(folders["tiny2"]))
    with pytest.raises(
        ValueError, match=f"the tokenizer has {size} tokens, the model {size - 1}: .*another checkpoint"
    ):
        load(folders["tiny2"], config=make_config(size - 1))
    assert (
        len(load(tmp_path, tokenizer=folders["tiny2"]).tokenizer) == size + 2
    )  # --tokenizer overrides the folder


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "version https://git-lfs.github.com/spec/v1"])
def test_a_tokenizer_that_cannot_be_read(folders, tmp_path, file, content):
    """Files that are cut short or were never fetched: one line that names the folder."""
    shutil.copytree(folders["tiny2"], tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(data.UserError, match=f"{tmp_path}: its tokenizer cannot be read .*: fetch the files"):
        load(tmp_path)


def pad_settings(**changes):
    return {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "image_mean": [0.5] * 3,
            "crop_size": S, **changes}


@pytest.mark.parametrize(
    "files, mode, mean",
    [
        ({}, "crop", data.CLIP_MEAN),
        ({"config.json": {"image_aspect_ratio": "pad"}}, "pad", data.CLIP_MEAN),  # original LLaVA
        ({"config.json": {"image_aspect_ratio": "square"}}, "crop", data.CLIP_MEAN),
        ({"config.json": {"image_aspect_ratio": "pad", "text_config": {}}}, "crop", data.CLIP_MEAN),
        ({"preprocessor_config.json": pad_settings()}, "pad", (0.5,) * 3),
        ({"preprocessor_config.json": pad_settings(do_pad=False)}, "crop", (0.5,) * 3),
        ({"processor_config.json": {"image_processor": pad_settings()}}, "pad", (0.5,) * 3),
        ({"processor_config.json": {"image_processor": pad_settings()},
          "preprocessor_config.json": pad_settings(do_pad=False)}, "pad", (0.5,) * 3),
    ],
)
def test_image_settings(folders, tmp_path, capsys, files, mode, mean):
    """--image_mode auto and the normalisation come from the checkpoint; crop and pad overrule it."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    processor = load(tmp_path, tokenizer=folders["tiny2"])
    assert (processor.mode, processor.mean) == (mode, mean)
    assert ("no preprocessor_config.json" in capsys.readouterr().out) == (set(files) <= {"config.json"})
    for mode in ("crop", "pad"):
        assert load(tmp_path, tokenizer=folders["tiny2"], image_mode=mode).mode == mode


def export(folders, tmp_path, template="vicuna", name="tiny2", image_mode="auto"):
    size = len(AutoTokenizer.from_pretrained(folders[name]))
    config = make_config(size)
    processor = load(folders[name], template, config, image_mode=image_mode)
    data.save_processor(processor, config, str(tmp_path))
    return processor, config


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pairs([(template, name) for template, name in PAIRS if name in ("tiny2", "tiny3")])
def test_round_trip(folders, tmp_path, template, name, mode):
    """What is saved loads again as it was, with --template auto and --image_mode auto."""
    processor, config = export(folders, tmp_path, template, name, mode)
    config = make_config(config.text_config.vocab_size, config.image_token_index)
    again, grown = data.load_processor(
        str(tmp_path),
        config,
        SimpleNamespace(template="auto", tokenizer=None, image_mode="auto", max_len=2048),
    )
    assert grown is None
    for field in data.dataclasses.fields(processor):
        if field.name not in ("tokenizer", "template"):
            assert getattr(again, field.name) == getattr(processor, field.name), field.name
    for turns, system, _ in GOLDEN[template]:
        assert encode(again, turns, system) == encode(processor, turns, system)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pairs(
    [("vicuna", "tiny2"), ("vicuna", "tiny3"), ("llama2", "tiny2"), ("llama3", "tiny3"), ("plain", "tiny2")]
)
def test_transformers_reads_the_export(folders, tmp_path, template, name, mode):
    """transformers' processor gives our ids and pixels for a chat with a picture."""
    processor, _ = export(folders, tmp_path / "out", template, name, mode)
    picture = noise(23, 11)
    picture.save(tmp_path / "a.png")
    words = "" if template == "plain" else "What is it?"
    conversation = data.read_record(make_row(("human", words), image="a.png"), tmp_path, need_answers=0)
    batch = data.collate(data.build_examples([(0, conversation)], processor, "prompt")[0], processor)
    peer = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(peer, LlavaProcessor)
    content = [{"type": "image", "image": picture}, *([{"type": "text", "text": words}] if words else [])]
    coded = peer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert coded["input_ids"].tolist() == batch.ids.tolist()
    torch.testing.assert_close(torch.as_tensor(coded["pixel_values"]), batch.pixels, rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"<image>\n{words}".strip()}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == processor.template.render(conversation)
    assert tokenizer.pad_token_id == processor.pad
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert saved == {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [2] if template == "plain" else sorted(processor.stop),
        "pad_token_id": processor.pad,
    }


CAPTION = ["<image>\nDescribe it.", "A red square\nA blue circle"]


@pytest.mark.parametrize("second", ["vicuna", "own"])
def test_two_stages(folders, tmp_path, capsys, second):
    """LLaVA's recipe: the projector with `plain`, then another. The first stage's checkpoint is known as
    plain's and keeps its LLaMA's own template; nothing of plain is left in the second."""
    stage1, stage2, config = tmp_path / "1", tmp_path / "2", make_config()
    plain = load(with_template(folders["tiny3"], tmp_path / "llama", CHATML), "plain", config)
    data.save_processor(plain, config, str(stage1))
    auto, original = load(stage1, "auto"), stage1 / "additional_chat_templates/original.jinja"
    said = f"{stage1} was trained with --template plain: using that; its LLaMA's own: --template {original}\n"
    assert said in capsys.readouterr().out
    assert auto.stop == plain.stop and encode(auto, CAPTION) == encode(plain, CAPTION)
    newline = plain.template.ids("\n")[0]
    assert newline in auto.stop and auto.text(encode(auto, CAPTION)[0][2:]) == CAPTION[1]
    eos = json.loads((stage1 / "generation_config.json").read_text())["eos_token_id"]
    assert eos == [plain.tokenizer.eos_token_id]
    peer = AutoProcessor.from_pretrained(stage1)  # of transformers
    message = [{"role": "user", "content": [{"type": "image"}]}]
    assert peer.apply_chat_template(message) == "<|begin_of_text|><image>"
    assert peer.tokenizer.get_chat_template("original") == CHATML

    template = "vicuna" if second == "vicuna" else str(original)
    processor = load(stage1, template, config)
    golden = load(folders["tiny3"], "vicuna") if second == "vicuna" else load(tmp_path / "llama", "auto")
    data.save_processor(processor, config, str(stage2))
    for again in (processor, load(stage2, "auto")):
        ids, kept = encode(again, CAPTION)
        assert (ids, kept) == encode(golden, CAPTION) and again.stop == golden.stop
        answer = [i for i, keep in zip(ids, kept) if keep]
        assert newline in answer and newline not in again.stop and again.text(answer) == CAPTION[1]
    load(stage2, "plain")  # the LLaMA's template is still there for yet another run
    assert (stage2 / "additional_chat_templates/original.jinja").read_text() == CHATML


@pytest.mark.parametrize("name", ["vicunna", "no.jinja", "."])
def test_an_unknown_template(folders, name):
    """The error lists what there is."""
    with pytest.raises(data.UserError, match=re.escape(
            f"got --template {name}, need auto, vicuna, llama2, llama3, plain or a .jinja file's path")):
        load(folders["tiny2"], name)


# ---- 10. ranked answers ----

MARGINS = [(None, 0.0), (0, 0.0), (2, 2.0), (0.25, 0.25), (1, 1.0)]


@pytest.mark.parametrize("margin, want", MARGINS)
def test_a_margin_is_read(loaded, images, margin, want):
    """A row's margin reaches its Conversation and its Example as a float; absent, null or 0 is none."""
    rows = [make_row(HUMAN, ("gpt", ["Yo", "Hello"]), margin=margin), make_row(HUMAN, ("gpt", ["Yo", "Ho"]))]
    good, bad, _ = data.check_records(rows, images, "rows.json", data.ANSWERS_NEEDED["ranked"])
    assert [type(c.margin) for _, c in good] == [float, float] and bad == 0
    assert [c.margin for _, c in good] == [want, 0.0]
    examples, _ = data.build_examples(good, loaded("tiny2", "vicuna"), "ranked")
    assert [e.margin for e in examples] == [want, 0.0]
    data.read_record(make_row(HUMAN, ("gpt", ["a", "b", "c"]), margin=0), images)  # 0 is none: any answers


BAD_RANKED = {  # case: (row, essential words of the error), where two answers are needed
    "one answer": (make_row(HUMAN, GPT), "got 1 answer, need 2 or more, best first"),
    "a list of one": (make_row(HUMAN, ("gpt", ["Hello"])), "got 1 answer, need 2 or more"),
    "no answer": (make_row(HUMAN), "got no answer"),
    "margin, three answers": (
        make_row(HUMAN, ("gpt", ["a", "b", "c"]), margin=1.0),
        "got the margin 1.0, 3 answers; need a number from 0, and two",
    ),
    "margin a string": (make_row(HUMAN, ("gpt", ["a", "b"]), margin="1"), "got the margin '1', 2 answers"),
    "margin a list": (make_row(HUMAN, ("gpt", ["a", "b"]), margin=[1]), r"got the margin \[1\], 2 answers"),
}


@pytest.mark.parametrize("case", BAD_RANKED)
def test_bad_ranked_rows(images, case):
    """Rows that cannot be ranked are errors naming file, row, id and fault; skipped when asked."""
    row, words = BAD_RANKED[case]
    good = make_row(HUMAN, ("gpt", ["Hello", "Yo"]), id="good")
    with pytest.raises(ValueError, match=rf"rows\.json: record 1 \(id 7\): {words}"):
        data.check_records([good, row], images, "rows.json", data.ANSWERS_NEEDED["ranked"])
    left, bad, _ = data.check_records([good, row], images, "rows.json", 2, skip_bad_rows=True)
    assert [c.id for _, c in left] == ["good"] and bad == 1


@pytest.mark.parametrize("margin", [float("nan"), float("inf"), -0.5, True, "", 10**400, -(10**400), DEEP])
def test_a_margin_that_is_no_number(images, margin):
    """JSON as Python reads it knows NaN and Infinity: as a margin they would make every weight NaN."""
    row = json.loads(json.dumps(make_row(HUMAN, ("gpt", ["a", "b"]), margin=margin)))
    with pytest.raises(ValueError, match="got the margin"):
        data.read_record(row, images, 2)


def test_ranked_examples_hold_every_answer(loaded, images):
    """`ranked` is `answers`: all of them, best first, only the last turn supervised."""
    row = make_row(HUMAN, GPT, ("human", "Go"), ("gpt", ["best", "middle one", "worst"]))
    good = [(0, data.read_record(row, images, 2))]
    processor = loaded("tiny2", "vicuna")
    (ranked,), _ = data.build_examples(good, processor, "ranked")
    (same,), _ = data.build_examples(good, processor, "answers")
    assert [a.tolist() for a in ranked.answers] == [a.tolist() for a in same.answers]
    assert ranked.prompt.tolist() == same.prompt.tolist() and all(kept.all() for kept in ranked.token_masks)
    assert [processor.text(a.tolist()) for a in ranked.answers] == ["best", "middle one", "worst"]


def test_by_row_by_hand():
    """Three rows of 3, 1 and 2 answers: each in its place, zeros where there is none, gradients through;
    no answers, no rows."""
    values = torch.arange(1.0, 7.0, requires_grad=True)
    grid, kept = data.pad_by_sequence(values, torch.tensor([0, 0, 0, 1, 2, 2]), (3, 3))
    assert grid.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert kept.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    (grid * torch.tensor([[1.0, 2, 3], [4, 99, 99], [5, 6, 99]])).sum().backward()
    assert values.grad.tolist() == [1, 2, 3, 4, 5, 6]
    none = torch.zeros(0, requires_grad=True)
    grid, kept = data.pad_by_sequence(none, torch.zeros(0, dtype=torch.long), (0, 0))
    assert grid.shape == kept.shape == (0, 0)
    grid.sum().backward()  # still a part of the graph
    assert none.grad.shape == (0,)


def test_by_row_of_a_batch(pictures):
    """With a batch's own rows it is each example's answers."""
    rng = random.Random(5)
    batch = data.collate([random_example(rng, i, pictures, n) for i, n in enumerate([2, 5, 3])],
                         picture_processor())
    grid, kept = data.pad_by_sequence(torch.arange(1, 11), batch.sequence, batch.answer_shape)
    assert kept.sum(1).tolist() == [2, 5, 3]
    assert [row[keep].tolist() for row, keep in zip(grid, kept)] == [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]


def test_collate_takes_pixels_at_hand(pictures, monkeypatch):
    """pixels= of the same examples' pictures: the same batch, and no file is opened."""
    rng = random.Random(2)
    examples = [random_example(rng, i, pictures[:3], 2) for i in range(4)]
    batch = data.collate(examples, picture_processor())
    assert len(batch.pixels) > 1
    monkeypatch.setattr(data, "read_image", None)
    marked = torch.randn(batch.pixels.shape)
    again = data.collate(examples, picture_processor(), marked)
    assert again.pixels is marked
    for field in data.dataclasses.fields(batch):
        if field.name != "pixels":
            found, expected = getattr(again, field.name), getattr(batch, field.name)
            equal = torch.equal if torch.is_tensor(found) else operator.eq
            assert equal(found, expected), field.name
    blank = data.collate([], picture_processor(), marked[:1])
    assert blank.pixels.shape[0] == 1 and len(blank.image) == 0 and len(blank.last_token) == 0
