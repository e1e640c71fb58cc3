"""From data files to batches: JSON records → conversations → tokens and pixels → packed tensors.

A record is {"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}, …]}. The
value of the last gpt turn may be a list of answers, best first. A record becomes an Example: a prompt and
its answers. `image` is a path, a list of paths, comma-joined paths, or absent; paths start from their
file's own folder, or from --images. <image> may stand anywhere in a human turn; missing ones go first. A
`margin` beside `conversations` may say by how much the first of two answers is better. Other fields are
allowed, but not those that other layouts use for images, system prompts, preferences or loss masks, since
nothing would be learnt from them. Where only a prompt is needed, a gpt turn at the end is left out. What
people wrote is always text: a typed "</s>" never ends a turn. An answer beyond --max_len loses its tail; a
record whose prompt alone is longer is left out. Images are JPEG, PNG, WebP, GIF, BMP or TIFF files.

--template is `auto` (the checkpoint's own chat template), a name, or the path of a .jinja file; with a name
or a path nothing is taken from generation_config.json. Messages are tokenised one by one, so a tokenizer of
the SentencePiece kind puts a space before the text after an image. An added token that a template writes is
a control token, whether or not the tokenizer flags it: it ends answers, and is text where a user typed it.
A checkpoint that was trained with `plain` is read as `plain`. It keeps its LLaMA's own template for LLaVA's
second stage: --template runs/stage1/additional_chat_templates/original.jinja.

Prompt and answers are packed into one sequence, in which each answer attends to the prompt and to itself:

    ids       <bos> USER: <image>…<image> prompt | answer 1 … | answer 2 … | pad
    position  0 1 2 …                        P-1 | P P+1 …    | P P+1 …    |
    branch    0 0 0 …                          0 | 1 1 …      | 2 2 …      | -1

The prompt's last token predicts the first token of every answer. Each later token is predicted by the
token before it.

A model sees square tiles. LLaVA-1.5 has one per image, and I tokens. LLaVA-NeXT has a base view, the image
squeezed into a square, and a grid of tiles chosen by the image's size; how many tokens an image takes is
known from its size alone, which a file's header tells.

Legend: B sequences, T positions, P prompt length, N targets (tokens to predict), A answers, M tiles of the
distinct images, R image tokens of the batch, I features per tile, S edge of a tile in pixels.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import reprlib
import shutil
import sys
import tempfile
import threading
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEMPLATE_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


class UserError(ValueError):
    """A mistake of the user: fsdp.run prints one line instead of a traceback."""


def progress(items, what, count=None):
    """Yields the items; count: their number, if they have no length. Rank 0 prints the progress and the
    remaining time every ten seconds."""
    count = len(items) if count is None else count
    start = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        if done < count and time.time() - shown > 10 and os.environ.get("RANK", "0") == "0":
            shown = time.time()
            left = (shown - start) / done * (count - done)
            print(f"{what}: {done}/{count}, {left:.0f} s left", flush=True)


BRIEF = reprlib.Repr()  # repr of a value from a data file: cut where it is long, deep or has many digits
BRIEF.maxlist, BRIEF.maxstring = 20, 80


def shown(value, most=240):
    """A value of a data file as text for a message: shortened to `most` characters, controls escaped."""
    text = value if isinstance(value, str) else BRIEF.repr(value)
    text = f"{text[:most - 41]}…{text[-40:]}" if len(text) > most else text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ---- records ----

class Records:
    """The records of a data file, held as JSON text and decoded on access, which takes a third of the memory
    of dictionaries."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return json.loads(self.texts[index])

    def __eq__(self, others):
        return [*self] == [*others]


def load_records(path):
    """The Records of a .json, .jsonl or .txt file: a JSON list, or one JSON object per line. UserError names
    the file and where in it."""
    if not os.path.isfile(path):
        raise UserError(f"got --data {path}, need a .json, .jsonl or .txt file: no such file")
    texts, line = [], 0
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip().startswith("["):
            texts = [item.encode() for item in list_items(text)]
        else:
            for one in text.split("\n"):
                line += 1
                if one.strip():
                    json.loads(one)
                    texts.append(one.encode())
    except (ValueError, RecursionError) as error:  # of the decoder or of json
        where = f" in line {line}" if line else ""
        raise UserError(f"{path}: not JSON{where} ({error}): need a list, or one record per line") from error
    if not texts:
        raise UserError(f"{path}: got no records, need at least one")
    return Records(texts)


def list_items(text):
    """Yields the text of each item of a JSON list. One at a time is decoded: all at once take three times the
    memory."""
    decoder, gap = json.JSONDecoder(), re.compile(r"\s*")
    end = gap.match(text).end()  # where the "[" is, then each comma
    while text[end:end + 1] != "]":
        start = gap.match(text, end + 1).end()
        if text[end] == "[" and text[start:start + 1] == "]":
            end = start
            break
        _, item_end = decoder.raw_decode(text, start)
        yield text[start:item_end]
        end = gap.match(text, item_end).end()
        if text[end:end + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    if text[end + 1:].strip():
        raise json.JSONDecodeError("Extra data", text, end + 1)


def read_json(folder, name, default=None):
    """The content of folder/name, or `default` if there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return default
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}): need a whole file") from error


@dataclasses.dataclass(slots=True)
class Conversation:
    """A checked record. contents[i] is the text of the turn by roles[i], without a last gpt turn, whose texts
    are the answers, best first."""
    id: str
    roles: list
    contents: list
    answers: list
    images: list  # paths below the image folder
    margin: float = 0.0  # by how much the first of two answers is better, where the record says so
    file: tuple = ("", 0)  # it comes from: path, and the index of that file's first record


CONVERT = "examples/convert.py converts other layouts"
RECORD_FIELDS, TURN_FIELDS = ("id", "image", "conversations", "margin"), ("from", "value")
FILES = "s?[0-9]*(path|file|name|url|uri|link|data|bytes|base64|b64|list|tensor|feature|embed)*s?[0-9]*"
SIDES = ("(is|ai|gpt4?|human|original)?(chosen|reject(ed)?)|(dis|non)?prefer(red|ence)?|accepted|"
         "win(ner|ning)?|los(er?|ing)|better|best|worse|worst|safer")
ANSWERS = "response|answer|output|completion|candidate|generation"
IN_IMAGE = "put image files into the record's `image`"
NO_VIDEO = "videos and sound cannot be expressed: remove it"
IN_ANSWERS = "make the last gpt value a list of answers, best first"
IN_TURNS = 'write it into the turns of "conversations", or remove it'
ELSEWHERE = {  # names of other layouts, in lower case without separators: where the content belongs
    f"(input|source|raw|pil|main|query|question)?(image|img|picture|photo|pic)({FILES}|ids?)|cocoids?|pixelvalues|"
    "jpe?g|png|webp|frames?|media|visuals?": IN_IMAGE,
    f"(video|audio|speech|sound|pointcloud)({FILES}|ids?)": NO_VIDEO,
    "sys(tem)?(prompt|message|msg|instruction|text)?s?": 'make it a first turn from "system"',
    f"({SIDES})({ANSWERS}|message|text|caption|conversation|value|label)?s?(id|idx|index)?|"
    f"({ANSWERS})(s?[0-9]+|[abwl])|y[wl]|(response|completion|candidate)s|ranking|kto(tag|label)s?|"
    "(un)?desir(able|ed)": IN_ANSWERS,
    "loss(es|mask|weight)?s?|mask(ed)?|(sample|token|turn)?weights?|train(able|ing|detail)?":
        "weights and masks cannot be expressed: remove it",
    "messages|history|tools|functions|(tool|function)calls?|thinking|reasoningcontent": IN_TURNS}
IMAGE_DATA = r"data:[\w/.+-]*[;,]|(?:/9j/|iVBORw0K|R0lGOD|UklGR|Qk|SUkqA|TU0AK)[A-Za-z0-9+/=\s]{60,}\Z"
NO_PATH = re.compile(rf"[A-Za-z]+://|{IMAGE_DATA}")
IMAGE_TEXT = re.compile(IMAGE_DATA + r"|[^\n]{0,2000}\.(?i:jpe?g|jfif|png|webp|gif|bmp|tiff?|heic|avif|mp4|"
                        r"avi|mov|mkv|webm|wav|mp3|flac)(?:[?#]\S*)?\s*\Z")
OTHER_PLACEHOLDER = re.compile(  # of Qwen-VL, Phi-3, MMMU, MiniGPT-4, DeepSeek-VL, InternVL, Gemma 3 …
    r"(?i)<(?:img>[^<\s]+</img|\|?image[-_ ]?(?:\d+|pad|placeholder|token|soft_token)\|?|\|image\||imagehere|"
    r"img_context|start_of_image)>")


@functools.lru_cache(maxsize=1024)
def elsewhere(name):
    """Where the content of a field belongs that other data formats have, or None."""
    name = re.sub("[^a-z0-9]", "", name.lower())
    return next((where for names, where in ELSEWHERE.items() if re.fullmatch(names, name)), None)


def images_and_turns(value, depth=8):
    """Yields the images (their names, their data as text, or dictionaries) and the turns in a field's
    value."""
    if isinstance(value, str) and IMAGE_TEXT.match(value):
        yield value
    elif isinstance(value, dict):
        turn = {"from", "value"} <= value.keys() or {"role", "content"} <= value.keys()
        if turn or "bytes" in value or value.keys() == {"path"}:
            yield value
            return
        value = [*value.values()]
    for item in value if isinstance(value, list) and depth else []:
        yield from images_and_turns(item, depth - 1)


def check_fields(fields, read, answers=1, image=None):
    """Refuses fields of a record or turn, other than those `read`, in which other layouts keep images, turns
    or preferences: they would be ignored in silence. answers: how many answers the record has. image: its
    `image`; other fields may repeat its paths, and may hold ids or the URL of an image."""
    own = image if isinstance(image, list) else [image, *str(image).split(",")]
    own = [f"/{name.strip()}" for name in own if isinstance(name, str)]
    own += [os.path.splitext(name)[0] for name in own]
    for name, value in fields.items():
        found = value if isinstance(value, list) else [value]
        if name in read or all(item is None or item in ("", [], {}) for item in found):
            continue
        where = elsewhere(name)
        if not where and re.search("label|score|reward|rating|rank", name.lower()) and (
                len(found) == answers > 1 or name.lower() in ("label", "labels")
                and any(isinstance(item, int if answers > 1 else bool) for item in found)):
            where = IN_ANSWERS
        elif not where:
            found = [*images_and_turns(value)]
            turn = any(isinstance(item, dict) and item.keys() & {"from", "role"} for item in found)
            where = IN_TURNS if turn else IN_IMAGE
        if image and where in (IN_IMAGE, NO_VIDEO) and re.search("(?i)ids?$", name):
            continue
        if image and where == IN_IMAGE:
            found = [item for item in found if not (isinstance(item, str) and (
                re.match(r"\w+://", item) or any(path.endswith(f"/{item.strip()}") for path in own)))]
        if found:
            raise UserError(f"got the field '{shown(name, 80)}' ({shown(value, 120)}), but only "
                            f"{', '.join(f'`{one}`' for one in read)} are read: {where}; {CONVERT}")


def read_record(record, images_dir, need_answers=1):
    """Record → Conversation. UserError says what is wrong; the caller adds which record it is."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        got = f"the fields {shown(', '.join(record))}" if isinstance(record, dict) else f"'{shown(record)}'"
        raise UserError(f'got {got}, need {{"id", "image", "conversations": [{{"from", "value"}}, …]}} with '
                        f"a turn or more; {CONVERT}")
    last = turns[-1].get("value") if isinstance(turns[-1], dict) else None
    check_fields(record, RECORD_FIELDS, len(last) if isinstance(last, list) else 1, record.get("image"))
    if type(record.get("id")) not in (str, int, type(None)):
        raise UserError(f"got the id {BRIEF.repr(record['id'])}, need a text or a whole number")
    roles, contents = [], []
    for turn in turns:
        if not isinstance(turn, dict) or "value" not in turn:
            raise UserError(f"got the turn '{shown(turn)}'" f', need {{"from", "value"}}; {CONVERT}')
        if len(turn) > 2:
            check_fields(turn, TURN_FIELDS, image=record.get("image"))
        roles.append(turn.get("from"))
        contents.append(turn["value"])
    body = roles[1:] if roles[0] == "system" else roles
    if body != ["human", "gpt"] * (len(body) // 2) + ["human"] * (len(body) % 2) or not body:
        raise UserError(f"got turns from {shown(roles)}, need human and gpt in turn, human first; "
                        "system may lead")
    answers = []
    if roles[-1] == "gpt":
        roles, last = roles[:-1], contents.pop()
        answers = last if isinstance(last, list) else [last]
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"got the answer '{shown(last)}', need text, or a list of texts, none empty"
                            + (f"; {CONVERT}" if any(isinstance(a, dict) for a in answers) else ""))
    elif need_answers:
        raise UserError("got no answer: the last turn is human; training needs a final gpt turn")
    if len(answers) < need_answers:
        raise UserError(f"got {len(answers)} answer, need {need_answers} or more, best first, as the last "
                         "gpt turn's value")
    margin = 0.0 if record.get("margin") is None else record["margin"]
    in_range = type(margin) in (int, float) and 0 <= margin <= sys.float_info.max
    if not in_range or margin and len(answers) != 2:
        raise UserError(f"got the margin {BRIEF.repr(margin)}, {len(answers)} answers; need a number from "
                        "0, and two")
    if not all(isinstance(c, str) for c in contents):
        raise UserError("got a turn whose value is not text; only the last gpt turn may be a list"
                        f"; {CONVERT}")
    if not all(c.strip() for role, c in zip(roles, contents) if role == "gpt"):
        raise UserError("got an empty gpt turn, need text")
    images = shared_list(tuple(image_list(record.get("image"), images_dir)))
    said = "\n".join(c for role, c in zip(roles, contents) if role == "human")
    if other := OTHER_PLACEHOLDER.search(said):
        raise UserError(f"got '{shown(other[0])}' in a human turn, need {IMAGE} there, and "
                        "its file in `image`")
    asked = said.count(IMAGE)
    if asked > len(images):
        raise UserError(f"got {asked} {IMAGE} placeholders for {len(images)} images: name the missing ones "
                        "in `image`, or remove placeholders that stand for none")
    first = roles.index("human")
    contents[first] = f"{IMAGE}\n" * (len(images) - asked) + contents[first]
    contents, answers = [*map(str.strip, contents)], [*map(str.strip, answers)]
    id = str(record.get("id"))
    "".join([id, *contents, *answers]).encode()  # UnicodeEncodeError for half a surrogate pair
    return Conversation(id, shared_list(tuple(roles)), contents, answers, images, float(margin))


@functools.lru_cache(maxsize=1024)
def shared_list(items):
    """The same list object for equal lists, to save memory. It must not be changed."""
    return [*items]


def image_list(value, images_dir):
    """The `image` of a record (path, list of paths, comma-joined paths or null) → paths of existing files
    below images_dir."""
    names = value if isinstance(value, list) else [value] if value else []
    joined = isinstance(value, str) and "," in value and not NO_PATH.match(value)
    if joined and not os.path.isfile(os.path.join(images_dir, value)):
        names = [name.strip() for name in value.split(",")]
    for name in names:
        if not isinstance(name, str) or not name or NO_PATH.match(name):
            raise UserError(f"got the image {BRIEF.repr(name)}, need a path of a file; {CONVERT}")
    return [find_image(name, images_dir) for name in names]


@functools.lru_cache(maxsize=2**16)  # many records may show one image
def find_image(name, images_dir):
    """The path of an image below images_dir. UserError: it does not exist, or lies outside, also through a
    symbolic link. images_dir itself may be a link."""
    root = os.path.abspath(images_dir)
    path = os.path.abspath(os.path.join(root, name))
    inside = path.startswith(os.path.join(root, ""))
    if inside and not os.path.isfile(path):
        raise UserError(f"no such image: {shown(path)} (see --images)")
    folder = os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path)
    if not inside or not real_folder(folder).startswith(real_folder(root)):
        raise UserError(f"got the image '{shown(name)}', outside --images {images_dir}: use paths below it")
    return path


@functools.lru_cache(maxsize=1024)
def real_folder(folder):
    """The real path of a folder, without symbolic links, with a slash at its end."""
    return os.path.join(os.path.realpath(folder), "")


# ---- tokenizers ----

def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder: tokenizer.json unchanged, else tokenizer.model converted.
    AutoTokenizer is not used: it would rebuild a LlamaTokenizer with other ids for consecutive spaces."""
    def has(name):
        return os.path.isfile(os.path.join(folder, name))
    if has("tokenizer.json"):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if not has("tokenizer.model"):
        raise UserError(f"{folder}: no tokenizer.json or tokenizer.model: give --tokenizer, a folder of one")
    config = read_json(folder, "tokenizer_config.json", {})
    with tempfile.TemporaryDirectory() as converted:  # not in the folder, which other ranks read at this time
        rust, ends = convert_sentencepiece(os.path.join(folder, "tokenizer.model"),
                                           config.get("add_bos_token", True))
        rust.save(os.path.join(converted, "tokenizer.json"))
        with open(os.path.join(converted, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump({**ends, **config}, f)
        for name in filter(has, ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")):
            shutil.copy(os.path.join(folder, name), converted)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(converted)
    tokenizer.name_or_path = folder
    known = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    for token, id in (known | read_json(folder, "added_tokens.json", {})).items():
        if tokenizer.convert_tokens_to_ids(token) != id:
            raise UserError(f"{folder}: the added token {token} is {id} there, and would become "
                            f"{tokenizer.convert_tokens_to_ids(token)}: give --tokenizer, a folder with a "
                            "tokenizer.json")
    return tokenizer


VARIED = (  # texts on which a converted tokenizer has to agree, beside every piece of its vocabulary
    "", " ", "Hello, how", " a", "a ", "  a   b    c  ", "a\nb\n\n\tc\r\n", "In 2024: 3.14159, 1000000",
    "naïve cafe\u0301 ﬁ Ａ²", "Привет, мир! 日本語 العربية", "👩‍👩‍👧 \x00\u200b", "</s><unk><0x41>", "a▁b▁▁c",
    "A chat between a curious human and an artificial intelligence assistant.")


def convert_sentencepiece(path, add_bos):
    """A LLaMA's tokenizer.model (BPE of SentencePiece) → a Tokenizer with the same ids, and its special
    tokens by name. Pieces merge in the order of their scores, which transformers 5 ignores. UserError: a text
    of VARIED or a piece of the vocabulary gets other ids."""
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError(f"{path}: no tokenizer.json beside it; to have it converted: "
                        "pip install sentencepiece, then run this again") from error
    try:
        original = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a file of SentencePiece: give --tokenizer, a folder with a "
                        "tokenizer.json") from error
    size = range(original.get_piece_size())
    pieces = original.id_to_piece([*size])
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranked = sorted((-original.get_score(i), i, ids[piece[:k]], ids[piece[k:]])
                    for i, piece in enumerate(pieces) for k in range(1, len(piece))
                    if piece[:k] in ids and piece[k:] in ids)
    ends = {f"{name}_token": pieces[id] for name, id in (
        ("bos", original.bos_id()), ("eos", original.eos_id()), ("unk", original.unk_id())) if id >= 0}
    rust = Tokenizer(models.BPE(
        ids, [(pieces[left], pieces[right]) for *_, left, right in ranked], unk_token=ends["unk_token"],
        fuse_unk=True, byte_fallback=any(map(original.is_byte, size))))
    prefix = original.encode("a", out_type=str)[0].startswith("▁")
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
                                     + [decoders.Strip(" ", 1, 0)] * prefix)
    rust.add_special_tokens([pieces[i] for i in size if original.is_control(i) or original.is_unknown(i)])
    if add_bos and "bos_token" in ends:
        bos = ends["bos_token"]
        rust.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    rust.encode_special_tokens = True
    texts = [*VARIED, *pieces]
    coded = rust.encode_batch(texts, add_special_tokens=False)
    for text, expected, one in zip(texts, original.encode(texts), coded):
        if one.ids != expected:
            raise UserError(f"{path}: cannot be converted: {text!r} is {expected} there, and would become "
                            f"{one.ids}: give --tokenizer, a folder with a tokenizer.json")
    return rust, ends


# ---- templates ----

# templates/NAME.jinja, written as chat_template.jinja into an export; text() takes a string or transformers'
# parts
TEMPLATES = ("vicuna", "llama2", "llama3", "plain")


def template_text(name):
    """The text of a template: one of TEMPLATES, or a .jinja file."""
    path = os.path.join(TEMPLATE_DIR, f"{name}.jinja") if name in TEMPLATES else name
    if not path.endswith(".jinja") or not os.path.isfile(path):
        raise UserError(f"got --template {name}, need auto, {', '.join(TEMPLATES)} or a .jinja file's path")
    with open(path, encoding="utf-8") as f:
        return f.read()


TEMPLATE_SECONDS = 5  # to render a few words, which takes milliseconds


def with_time_limit(seconds, function):
    """→ function()'s result, or TimeoutError. Its thread then goes on until the process ends."""
    future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=call, daemon=True).start()
    return future.result(seconds)


# of a text behind a space: spaces and what follows them, with a single space at the very end
WORDS = re.compile(r"[ ▁]+[^ ▁]*(?:[ ▁]\Z)?")


def words_are_apart(tokenizer):
    """Whether a text's ids are those of its WORDS: a BPE like LLaMA-2's, which writes "▁" for a space and in
    front of every text, whose tokens have "▁" only at their beginning, so that none spans two words."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spaces = [{"type": "Prepend", "prepend": "▁"},
              {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    bpe = spec["model"]
    extras = "dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"
    return (bpe["type"] == "BPE" and spec["pre_tokenizer"] is None and not any(map(bpe.get, extras))
            and spec["normalizer"] == {"type": "Sequence", "normalizers": spaces}
            and all(token["special"] for token in spec["added_tokens"])
            and not any("▁" in token.lstrip("▁") for token in bpe["vocab"]))


TURN = ("human", "gpt")


def any_token(tokens):
    """A pattern of the AddedTokens, the longest first, each with the white space that it strips."""
    patterns = [r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip
                for t in sorted(tokens, key=lambda t: -len(t.content))]
    return re.compile(f"({'|'.join(patterns)})")


class Template:
    """A chat template, as the gaps of text around the messages, and tokenisation piece by piece.

    A template is rendered once per sequence of roles, with a sentinel for each message, and split at the
    sentinels. Special tokens in the gaps become ids. Messages are always text: a typed "</s>" never ends a
    turn."""

    def __init__(self, name, tokenizer, image_token, rendered=()):
        self.tokenizer, self.image_token = tokenizer, image_token
        named = tokenizer.chat_template or {}
        if isinstance(named, str):
            named = {"default": named}
        self.jinja = named.get("default") if name == "auto" else template_text(name)
        if not self.jinja:
            raise UserError(f"got --template auto, but {tokenizer.name_or_path} has no chat template: "
                             f"give --template {'|'.join(TEMPLATES)}")
        # the text is what a checkpoint records: one that was trained with `plain` is read as plain
        self.plain = self.jinja == template_text("plain")
        if self.plain and named.get("default", self.jinja) != self.jinja:  # the LLaMA's own, for stage 2
            named = {"original": named["default"], **named}
        named = {**named, "default": self.jinja}
        tokenizer.chat_template = named if len(named) > 1 else self.jinja
        self.adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        self.rendered = {tuple(roles): gaps for roles, gaps in rendered}
        self.claim_tokens()
        specials = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = {t.content: i for i, t in specials.items()}
        self.specials = any_token(specials.values())
        self.by_word, self.known, self.wanted = words_are_apart(tokenizer), {}, None
        # a tokenizer of the SentencePiece kind puts a space in front of every text by itself
        self.prefixes = tokenizer.convert_ids_to_tokens(self.ids("a"))[0].startswith("▁")
        self.frame = functools.lru_cache(maxsize=256)(self.frame)
        self.piece_ids = functools.lru_cache(maxsize=1024)(self.piece_ids)  # the template's own come again

    def claim_tokens(self):
        """Makes each added token in the template's text a special token: an id there, text in messages, and
        no part of decoded answers. Runs of spaces are not claimed: people write them too."""
        written = [*itertools.chain(self.gaps(TURN), *self.rendered.values())]
        for roles in (2 * TURN, ("system", *TURN), ("system", *2 * TURN)):
            with contextlib.suppress(UserError):  # no template has to have a system turn
                written += self.rendered.get(roles) or self.render_gaps(roles)
        added = [t for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()]
        found = {token.strip() for gap in written for token in any_token(added).findall(gap)}
        if any(t.content.strip() in found and (t.normalized or not t.special) for t in added):
            spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for token in spec["added_tokens"]:
                if token["content"].strip() in found:  # a normalised one is not found behind a word
                    token.update(special=True, normalized=False)
            self.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))

    def gaps(self, roles):
        """roles (a tuple) → the texts before, between and after their messages [len(roles) + 1]. Each is
        rendered once per run, as a template may contain today's date."""
        if roles not in self.rendered:
            self.rendered[roles] = self.render_gaps(roles)
        return self.rendered[roles]

    def render_gaps(self, roles):
        marks, why = [f"SENTINEL{i}X" for i in range(len(roles))], []
        names = {"human": "user", "gpt": "assistant", "system": "system"}
        for form in (lambda mark: mark), (lambda mark: [{"type": "text", "text": mark}]):  # they take either
            messages = [{"role": names[role], "content": form(mark)} for role, mark in zip(roles, marks)]
            try:
                text = with_time_limit(TEMPLATE_SECONDS, functools.partial(
                    self.tokenizer.apply_chat_template, messages, tokenize=False, chat_template=self.jinja))
            except TimeoutError as error:
                raise UserError(f"the chat template of {self.tokenizer.name_or_path} takes more than "
                                f"{TEMPLATE_SECONDS} s: give --template {'|'.join(TEMPLATES)}") from error
            except Exception as error:  # jinja raises whatever the template raises
                why.append(str(error))
                continue
            if re.findall(r"SENTINEL\d+X", text) == marks:
                gaps, bos = re.split(r"SENTINEL\d+X", text), self.tokenizer.bos_token
                if self.adds_bos and not gaps[0].startswith(bos):
                    gaps[0] = bos + gaps[0]
                return gaps
            why.append("it reorders, repeats or drops messages")
        raise UserError(f"the chat template cannot be used for turns {list(roles)}: {'; '.join(why)}; "
                         f"give --template {'|'.join(TEMPLATES)}")

    def ids(self, text):
        """Token ids of a text, word by word where that gives the same; a word is tokenised once."""
        units = [text]
        if self.by_word:
            units = text.split(" ")
            if "" in units or "▁" in text:  # spaces that are more than one, or at an end
                units = [unit[1:] for unit in WORDS.findall(" " + text)]
        try:
            return [*itertools.chain.from_iterable(map(self.known.__getitem__, units))]
        except KeyError:
            new = [unit for unit in dict.fromkeys(units) if unit not in self.known]
            if self.wanted is not None:
                self.wanted.update(dict.fromkeys(new))
                return []
            self.learn(new)
            return self.ids(text)

    def learn(self, units):
        """Tokenises texts in one batch, on all cores."""
        rust = self.tokenizer.backend_tokenizer
        rust.encode_special_tokens = True  # what people wrote is text
        rust.no_truncation()
        rust.no_padding()
        coded = rust.encode_batch(units, add_special_tokens=False)  # encode_batch_fast takes one core
        self.known.update(zip(units, (one.ids for one in coded)))

    def prepare(self, calls):
        """Before many calls of encode(): tokenises their texts in one batch."""
        if len(self.known) > 2**18 or not self.by_word:
            self.known = {}
        if not self.by_word:  # a first round notes which texts are asked for
            self.wanted = {}
            for call in calls:
                self.encode(*call)
            wanted, self.wanted = self.wanted, None
            self.piece_ids.cache_clear()
            self.learn([*wanted])

    def piece_ids(self, text, first):
        """Token ids of a piece of text. first: it is the first piece of a stretch of text."""
        if first or not self.prefixes:
            return self.ids(text)
        if len(text) > 1 and text[0] == " ":
            return self.ids(text[1:])  # the tokenizer puts the joint's space back
        newline, whole = self.ids("\n"), self.ids("\n" + text)  # no space here: keep it from adding one
        return whole[len(newline):] if whole[:len(newline)] == newline else self.ids(text)

    def split(self, gap):
        """A gap → pieces: texts, and the ids of special tokens."""
        return [self.special_ids.get(piece, self.special_ids.get(piece.strip(), piece))
                for piece in self.specials.split(gap) if piece]

    def after_answer(self, gap, last_gap):
        """The gap after an answer → the pieces that end the answer, and those that follow. A template without
        an end token, which last_gap (after the final answer) shows, gets the tokenizer's."""
        pieces = self.split(gap)
        if self.plain:
            return pieces, []
        special, last = ([isinstance(p, int) for p in ps] for ps in (pieces, self.split(last_gap)))
        if last_gap.strip() and not any(last):
            raise UserError(f"the template ends an answer with '{shown(last_gap.strip())}', which is no "
                            "token of the tokenizer: add it there, or give another --template")
        if not (any(special) and any(last)):
            return [self.tokenizer.eos_token_id], self.split(gap.lstrip())
        end = 1 + special.index(True)
        return pieces[:end], pieces[end:]

    def stop_ids(self):
        """The last token of what ends an answer."""
        return {self.encode(["human"], ["a"], "b")[0][-1]}

    def frame(self, roles):
        """roles (a tuple) → the pieces before each message, and those that end it where it is an answer."""
        gaps, frame = self.gaps(roles), []
        follow = self.split(gaps[0])
        for i, role in enumerate(roles):
            before, follow, end = follow, self.split(gaps[i + 1]), []
            if role == "gpt":
                end, follow = self.after_answer(gaps[i + 1], gaps[-1])
            frame.append((before, end))
        return frame

    def encode(self, roles, contents, answer, all_turns=True):
        """A conversation and its final answer → token ids with one image token per image, and the mask of
        supervised tokens. all_turns: every gpt turn is supervised, not only the answer."""
        roles, pieces = (*roles, "gpt"), []  # (text or id, whether it is supervised)
        turns = zip(roles, (*contents, answer), self.frame(roles))
        for i, (role, content, (before, end)) in enumerate(turns):
            pieces += [(piece, False) for piece in before]
            if role == "gpt":
                supervised = all_turns or i == len(roles) - 1
                pieces += [(piece, supervised) for piece in (content, *end)]
            elif role == "human":
                content = IMAGE * content.count(IMAGE) if self.plain else content
                said = re.split(f"({IMAGE})", content) if IMAGE in content else [content]
                pieces += [(self.image_token if part == IMAGE else part, False) for part in said]
            else:
                pieces.append((content, False))
        return self.tokenise(pieces)

    def tokenise(self, pieces):
        ids, mask, first, space = [], [], True, ""
        for (piece, supervised), (after, _) in zip(pieces, [*pieces[1:], (None, None)]):
            if isinstance(piece, int):
                ids.append(piece)
                mask.append(supervised)
                first = True
                continue
            piece, space = space + piece, ""
            if piece.endswith(" ") and isinstance(after, str):
                piece, space = piece[:-1], " "  # a joint's space belongs to the piece behind it
            if piece:
                new, first = self.piece_ids(piece, first), False
                ids += new
                mask += [supervised] * len(new)
        return ids, mask

    def render(self, conversation):
        """The prompt as text, with one <image> per image."""
        gaps, contents = self.gaps((*conversation.roles, "gpt")), conversation.contents
        if self.plain:
            contents = [IMAGE * content.count(IMAGE) if role == "human" else content
                        for role, content in zip(conversation.roles, contents)]
        return "".join(gap + content for gap, content in zip(gaps, (*contents, ""))).rstrip(" ")


# ---- images ----

FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"  # Pillow knows more: for EPS it runs Ghostscript
PASSING = errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE
LONGEST_EDGE = 65535  # JPEG's own limit; memory grows with the longer edge of a narrow image
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # an error: see open_image


@contextlib.contextmanager
def open_image(path):
    """An image file, open for decoding. UserError: it cannot be decoded, its format is not one of FORMATS, or
    it has more pixels than Pillow's limit."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > LONGEST_EDGE:
                raise UserError(f"got {image.width} × {image.height} pixels, need at most {LONGEST_EDGE} on "
                                f"an edge and {Image.MAX_IMAGE_PIXELS} in all: shrink it")
            yield image
    except Exception as error:  # decoders raise many kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING:
            raise  # not the file's fault
        if isinstance(error, UnidentifiedImageError):
            error = f"corrupt, or not one of the formats that are opened ({', '.join(FORMATS)})"
        raise UserError(f"cannot read the image {shown(str(path))}: {error}") from None


def read_image(path):
    """An image file as RGB, rotated as EXIF says, 16-bit grey scaled to 8 bits. Transparency is dropped, as
    in LLaVA; transformers 5 puts a white background instead."""
    with open_image(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            grey = np.asarray(image).clip(0, 65535) // 257  # 65535 / 255
            image = Image.fromarray(grey.astype(np.uint8))
        return image.convert("RGB")


class Corrupted(NamedTuple):
    """Stands for an image of which a random crop is left."""
    path: str
    seed: int
    index: int  # of the record


def corrupt(image):
    """A Corrupted → its crop, as mDPO makes its rejected images (arXiv:2406.11839)."""
    full = read_image(image.path)
    return full.crop(crop_box(image, full.size))


def crop_box(image, size):
    """The edges (left, top, right, bottom) of a Corrupted's crop in the image of this size: keyed by (seed,
    record), at most a fifth of the image's area at its aspect ratio."""
    draw = np.random.default_rng([image.seed, image.index, 1])
    share, left, top = draw.uniform(0.0, 0.2), *draw.random(2)
    width, height = (max(1, round(edge * share**0.5)) for edge in size)
    left, top = int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1))
    return left, top, left + width, top + height


@functools.cache  # what a run has counted on does not change with the file: see Processor.pixels
def image_size(image):
    """Width and height that a path or a Corrupted will have once it is decoded, from the file's header."""
    if isinstance(image, Corrupted):
        left, top, right, bottom = crop_box(image, image_size(image.path))
        return right - left, bottom - top
    with open_image(image) as file:
        late = rb"eXIf|Raw profile type|tiff:Orientation"  # may stand behind the pixels
        if file.format in ("PNG", "TIFF") and re.search(late, pathlib.Path(image).read_bytes()):
            return read_image(image).size
        rotated = Image.Image.getexif(file).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return file.size[::-1] if rotated and file.format != "TIFF" else file.size  # TIFF: Pillow has done it


def image_error(path):
    """What is wrong with an image file, or None. JPEG is decoded at an eighth of its size, which is enough to
    detect a truncated file."""
    try:
        with open_image(path) as image:
            image.draft("RGB", (1, 1))
            ImageOps.exif_transpose(image, in_place=True)
            image.load()
    except UserError as error:
        return str(error)
    return None


# Pillow's number of a filter → how many pixels it reaches, and the weight of a pixel at distance x below that
FILTERS = {
    2: (1, lambda x: 1 - x),  # bilinear
    3: (2, lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5))}
BICUBIC = 3


def to_pixels(image, size, mode="crop", mean=CLIP_MEAN, std=CLIP_STD, resize=None, resample=BICUBIC):
    """RGB image → [3, S, S] fp32, as CLIPImageProcessor computes it: shorter edge resized to `resize` pixels
    (None: S), centre crop of S, normalised. Mode `pad`, as LLaVA-1.5: first padded to a square with the mean
    colour. resample: Pillow's number of the filter, one of FILTERS."""
    background, resize = tuple(int(255 * m) for m in mean), resize or size
    short, long = sorted(image.size)
    if long > 2 * short and (mode == "pad" or short < resize):
        array = strip_pixels(image, size, resize, resample, background if mode == "pad" else None)
    else:
        if mode == "pad":
            square = Image.new("RGB", (long, long), background)
            square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
            image, short = square, long
        image = image.resize([int(resize * edge / short) for edge in image.size], resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        array = np.asarray(image.crop((left, top, left + size, top + size)))  # [S, S, 3] bytes
    return normalised(array, mean, std)


def normalised(image, mean, std):
    """An RGB image, or its bytes [S, S, 3] → [3, S, S] fp32"""
    array = np.asarray(image)
    return torch.from_numpy(np.stack([values[array[..., c]] for c, values in enumerate(levels(mean, std))]))


def strip_pixels(image, size, resize, resample, background):
    """A long narrow image as to_pixels crops it, or with a background pads it, as bytes [S, S, 3]:
    the enlarged image and the padded square, of which little is seen, are not computed."""
    short, long = sorted(image.size)
    edges, starts = image.size, (0, 0)
    if background is None:  # the middle, with more around it than the filter reaches
        starts = [max(0, (edge - short) // 2 - 8) for edge in edges]
        image = image.crop((*starts, *(min(edge, start + short + 16) for edge, start in zip(edges, starts))))
    array = np.asarray(image).swapaxes(0, 1)
    for edge, start in zip(edges, starts):  # the horizontal axis first: Pillow rounds to bytes in between
        total, resized = edge, int(resize * edge / short)
        if background is not None:
            start, total, resized = (long - edge) // 2, long, resize
        array = resample_axis(array, start, total, resized, size, resample, background or 0).swapaxes(0, 1)
    return array.swapaxes(0, 1)


def resample_axis(pixels, start, total, resized, count, resample, background):
    """Pillow's resize of an axis from `total` pixels to `resized`, bit for bit (its Resample.c), but of the
    middle `count` outputs only: [n, L, 3] → [count, L, 3] bytes. The n pixels lie at `start` of the axis;
    around them is the background."""
    scale, outputs = total / resized, np.empty((count, *pixels.shape[1:]), dtype=np.uint8)
    stretch, (reach, weight_at) = max(scale, 1), FILTERS[resample]
    for output in range(count):
        center = ((resized - count) // 2 + output + 0.5) * scale
        low, high = int(center - reach * stretch + 0.5), int(center + reach * stretch + 0.5)
        positions = np.arange(max(0, low), min(total, high))
        x = abs(positions - center + 0.5) * (1 / stretch)
        weight = np.where(x < reach, weight_at(x), 0)
        weight /= weight.cumsum()[-1]
        weight = np.trunc(weight * 2**22 + np.copysign(0.5, weight))  # Pillow computes in fixed point
        inside = (positions >= start) & (positions < start + len(pixels))
        fixed = weight[~inside].sum() * np.asarray(background) + 2**21
        if inside.any():
            fixed = fixed + np.tensordot(weight[inside], pixels[positions[inside] - start].astype(float), 1)
        outputs[output] = np.floor(fixed / 2**22).clip(0, 255)
    return outputs


@functools.cache
def levels(mean, std):
    """The normalised value of each byte in each channel [3, 256] (fp32), rounded as in CLIPImageProcessor."""
    scaled = (np.arange(256) / 255).astype(np.float32)
    return (scaled - np.float32(mean)[:, None]) / np.float32(std)[:, None]


# LLaVA-NeXT's tiles: those of LLaVA-1.5-HD (arXiv:2310.03744), with the details of LLaVA-1.6's code. A grid
# is a pair (height, width) in pixels, multiples of S.

def best_grid(width, height, grids):
    """The grid that shows most of an image's pixels, and of equal ones the one with least padding; the first
    of several."""
    def pixels_and_padding(grid):
        scale = min(grid[1] / width, grid[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - grid[0] * grid[1]
    return max(grids, key=pixels_and_padding)


def tile_pixels(image, size, mean, std, resample, grids):
    """RGB image → its views [tiles, 3, S, S] fp32: the base view, then the grid's tiles, line by line. The
    image fills the grid at its aspect ratio, in the middle of black padding."""
    height, width = best_grid(*image.size, grids)
    scale = min(width / image.width, height / image.height)
    resized = [min(math.ceil(edge * scale), most) for edge, most in zip(image.size, (width, height))]
    padded = Image.new("RGB", (width, height))
    padded.paste(image.resize(resized, resample), ((width - resized[0]) // 2, (height - resized[1]) // 2))
    tiles = [padded.crop((left, top, left + size, top + size))
             for top in range(0, height, size) for left in range(0, width, size)]
    return np.stack([normalised(view, mean, std) for view in (image.resize((size, size), resample), *tiles)])


@functools.lru_cache(maxsize=1024)
def feature_layout(image_size, tile_tokens, size, grids):
    """→ the feature that each token of an image shows, and the image's number of tiles. Features are numbered
    from the image's first tile on; −1 is LLaVA-NeXT's image_newline.

    Without grids (LLaVA-1.5) there is one tile. Else the base view's features come first, then the grid's,
    line by line across its tiles, without lines or columns that show padding only."""
    if not grids:
        return np.arange(tile_tokens), 1
    rows, columns = (edge // size for edge in best_grid(*image_size, grids))
    side = math.isqrt(tile_tokens)
    grid = tile_tokens + np.arange(rows * columns * tile_tokens).reshape(rows, columns, side, side)
    grid = grid.swapaxes(1, 2).reshape(rows * side, columns * side)  # features as they lie in the image
    (width, height), (lines, length) = image_size, grid.shape
    scale = min(lines / height, length / width)
    top, left = ((padded - int(round(edge * scale, 7))) // 2  # lines and columns of padding
                 for padded, edge in ((lines, height), (length, width)))
    grid = np.pad(grid[top:lines - top, left:length - left], [(0, 0), (0, 1)], constant_values=-1)
    return np.concatenate([np.arange(tile_tokens), grid.flatten()]), 1 + rows * columns


# ---- examples ----

@dataclasses.dataclass(slots=True)
class Example:
    """A tokenised record. Ids are int32 arrays with one image token per image. Without answers it is a
    prompt."""
    index: int  # of its record in the files that an option names, one behind another
    id: str
    prompt: np.ndarray  # [P]
    answers: list  # of [n]
    token_masks: list  # of [n] bool: the answer's tokens that are predicted
    images: list  # paths
    margin: float = 0.0
    file: tuple = ("", 0)  # as a Conversation's

    @property
    def name(self):
        """Data file, record and id, for messages."""
        path, first = self.file
        return f"{path}{': ' if path else ''}record {self.index - first} (id {shown(self.id)})"


@dataclasses.dataclass
class Processor:
    """Tokenizer, template and image settings of one checkpoint: turns records into tensors."""
    tokenizer: object
    template: Template
    image_token: int
    tile_tokens: int  # I
    size: int  # S
    mode: str  # crop or pad; tiles: LLaVA-NeXT
    mean: tuple
    std: tuple
    resize: int  # the shorter edge before S is cropped
    resample: int  # Pillow's filter
    grids: tuple  # LLaVA-NeXT's, (height, width) in pixels; else none
    pad: int
    end_ids: frozenset  # ids that end an answer
    banned: frozenset  # ids that are never generated
    max_len: int

    def example(self, index, conversation, answers, all_turns=False):
        """A conversation and some answers (none: a prompt) → Example cut to max_len, and whether an answer
        was cut. Example is None if the prompt leaves no room. all_turns (for one answer): earlier gpt turns
        are supervised too; all that follows the first of them counts as the answer."""
        assert len(answers) == 1 or not all_turns, answers
        coded = [self.template.encode(conversation.roles, conversation.contents, answer, all_turns)
                 for answer in answers or [""]]
        P = coded[0][1].index(True)
        prompt, cut = coded[0][0][:P], False
        example = Example(index, conversation.id, np.array(prompt, dtype=np.int32), [], [],
                          conversation.images, conversation.margin, conversation.file)
        images, shown = conversation.images, prompt.count(self.image_token)
        ends = [self.lengths(np.array(ids), images).cumsum() for ids, _ in coded]  # positions up to each id
        if ends[0][P - 1] >= self.max_len:
            return None, False
        for (ids, mask), reached in zip(coded[:len(answers)], ends):
            ids, mask = ids[P:], mask[P:]
            end = int(np.searchsorted(reached, self.max_len, side="right")) - P
            while end and not mask[end - 1]:  # the last supervised token that fits
                end -= 1
            cut |= any(mask[end:])
            example.answers.append(np.array(ids[:end], dtype=np.int32))
            example.token_masks.append(np.array(mask[:end], dtype=bool))
            shown += ids[:end].count(self.image_token)
        if shown < len(images):
            example.images = images[:shown]
        return example, cut

    @property
    def pixel_settings(self):
        """The image settings: processors with equal settings compute equal pixels and layouts."""
        return (self.tile_tokens, self.size, self.mode, self.mean, self.std, self.resize, self.resample,
                self.grids)

    def text(self, ids):
        """The ids of an answer as text, without the token that ends it."""
        end = len(ids) - (len(ids) > 0 and int(ids[-1]) in self.end_ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()

    def pixels(self, image):
        """A path or a Corrupted → pixels [tiles, 3, S, S]"""
        decoded = corrupt(image) if isinstance(image, Corrupted) else read_image(image)
        if not self.grids:
            return to_pixels(decoded, *self.pixel_settings[1:-1])[None]
        if decoded.size != image_size(image):
            raise UserError(f"cannot use the image {shown(str(image))}: its size is {decoded.size}, but was "
                            f"{image_size(image)} when its tokens were counted")
        return tile_pixels(decoded, self.size, self.mean, self.std, self.resample, self.grids)

    def layout(self, image):
        """→ feature_layout of a path or a Corrupted"""
        size = image_size(image) if self.grids else None
        return feature_layout(size, self.tile_tokens, self.size, self.grids)

    def image_lengths(self, images):
        """Number of tokens of each image."""
        return [len(self.layout(image)[0]) for image in images]

    def lengths(self, ids, images):
        """Number of positions per id: for an image token those of its image, else 1."""
        lengths = np.ones(len(ids), dtype=np.int64)
        lengths[ids == self.image_token] = self.image_lengths(images)
        return lengths


def load_processor(folder, config, args, rendered=(), tower=None):
    """The Processor of a checkpoint folder, and None or the (old, new) vocabulary size.

    Adds <image> and <pad> if the vocabulary lacks them, and updates config. rendered: (roles, gaps) that the
    chat template rendered at the start of a resumed run. tower: the folder of the vision tower, if
    another."""
    source = args.tokenizer or folder
    try:
        tokenizer = load_tokenizer(source)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UserError(f"{source}: its tokenizer cannot be read ({shown(str(error))}): fetch the files of "
                        "tokenizer*, special_tokens_map.json and added_tokens.json again") from error
    for name in ("chat_template.json", "processor_config.json"):  # transformers' processors read them first
        found = read_json(source, name)
        if isinstance(found, dict) and found.get("chat_template"):
            tokenizer.chat_template = found["chat_template"]
    if tokenizer.eos_token is None:
        raise UserError(f"{source}: tokenizer_config.json names no eos_token, need one: write it there")
    pad = tokenizer.pad_token or "<pad>"
    new = [token for token in (IMAGE, pad) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": [IMAGE]},
                                 replace_extra_special_tokens=False)
    image_token, text = tokenizer.convert_tokens_to_ids(IMAGE), config.text_config
    if config.image_token_index not in (-1, image_token):
        raise UserError(f"{source}: {IMAGE} is token {image_token}, but config.json's image_token_index is "
                         f"{config.image_token_index}: the tokenizer is of another checkpoint")
    config.image_token_index, resized_vocab = image_token, None
    if len(tokenizer) > text.vocab_size:
        if len(tokenizer) - len(new) > text.vocab_size:
            raise UserError(f"{source}: the tokenizer has {len(tokenizer) - len(new)} tokens, the model "
                             f"{text.vocab_size}: the tokenizer is of another checkpoint")
        resized_vocab = text.vocab_size, -(-len(tokenizer) // 64) * 64
        text.vocab_size = resized_vocab[1]
    template = Template(args.template, tokenizer, image_token, rendered)
    stop = template.stop_ids() | {tokenizer.eos_token_id}
    if args.template == "auto":
        eos = read_json(folder, "generation_config.json", {}).get("eos_token_id")
        stop |= set(eos if isinstance(eos, list) else [eos])
        if template.plain and os.environ.get("RANK", "0") == "0":
            own = os.path.join(source, "additional_chat_templates", "original.jinja")
            own = f"; its LLaMA's own: --template {own}" if os.path.isfile(own) else ""
            print(f"{source} was trained with --template plain: using that{own}", flush=True)
    banned = {image_token, tokenizer.pad_token_id, *range(len(tokenizer), text.vocab_size)} - stop
    size = config.vision_config.image_size
    grids = tuple(map(tuple, config.image_grid_pinpoints)) if config.model_type == "llava_next" else ()
    pixel_settings = image_settings(folder, tower or folder, size, args.image_mode, grids)
    return Processor(
        tokenizer, template, image_token, config.image_seq_length, size, *pixel_settings, grids,
        tokenizer.pad_token_id, frozenset(stop - {None}), frozenset(banned), args.max_len), resized_vocab


# transformers' image processors that take the same steps with the same defaults
PIPELINES = "CLIPImageProcessor", "BitImageProcessor", "LlavaImageProcessor"
TILES = "LlavaNextImageProcessor"
DEFAULTS = {
    "do_resize": True, "size": {"shortest_edge": 224}, "default_to_square": False, "resample": BICUBIC,
    "do_center_crop": True, "crop_size": 224, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_pad": False, "pad_size": None,
    "image_grid_pinpoints": None, "do_convert_rgb": True}  # the last: images are RGB in any case
FOREIGN = re.compile(r"do_\w+|auto_map|crop_pct|crop_to_patches|keep_aspect_ratio|"
                     r"rescale_offset|size_divisor|use_square_size")  # of other pipelines


def image_settings(folder, tower, size, image_mode, grids=()):
    """The image settings of a checkpoint → mode, mean, std, pixels of the shorter edge before the crop, and
    Pillow's filter. grids: those of a LLaVA-NeXT's config.json.

    They are those that transformers' AutoImageProcessor reads in the tower's folder. An original LLaVA's
    config.json may ask for padding; --image_mode overrides both. UserError: a setting that to_pixels or
    tile_pixels cannot do."""
    path, found = image_processor_file(tower)
    if found is None:
        found = {"size": size, "crop_size": size}
        if os.environ.get("RANK", "0") == "0":
            print(f"{tower}: no preprocessor_config.json: images are resized and cropped to the image_size, "
                  f"{size}, and normalised with CLIP's mean and standard deviation", flush=True)
    own, tower_config = (read_json(place, "config.json", {}) for place in (folder, tower))
    settings = DEFAULTS | found  # null is no absence: transformers' processors keep it
    kind = "image_processor_type"
    if settings.get(kind) is None and settings.get("feature_extractor_type"):
        kind = "feature_extractor_type"
    of_model = {"llava": "LlavaImageProcessor", "llava_next": TILES}
    name = settings.get(kind) or of_model.get(tower_config.get("model_type"), "CLIPImageProcessor")
    name = re.sub("(Fast|Pil)$", "", str(name).replace("FeatureExtractor", "ImageProcessor"))
    pads = settings["do_pad"] is True and name == "LlavaImageProcessor"  # CLIP's evens out a batch
    pads |= "text_config" not in own and own.get("image_aspect_ratio") == "pad"
    if grids and image_mode != "auto":
        raise UserError(f"got --image_mode {image_mode}, but {folder} cuts images into tiles: leave it out")
    mode = "tiles" if grids else image_mode if image_mode != "auto" else "pad" if pads else "crop"
    tiles = grids and "text_config" in own  # the original layout has its CLIP's settings
    pipelines, in_config = ((TILES,), [*map(list, grids)]) if tiles else (PIPELINES, [])
    foreign = [name for name, value in found.items()
               if value and name not in DEFAULTS and FOREIGN.fullmatch(name)]
    needs = [(kind, name in pipelines, f"one of {', '.join(pipelines)}"),
             *((setting, False, "none: it belongs to another pipeline") for setting in foreign),
             ("image_grid_pinpoints", (settings["image_grid_pinpoints"] or []) == in_config,
              f"{in_config}, as in config.json" if tiles else "none: it belongs to another pipeline"),
             *image_needs(settings, size, mode)]
    for setting, done, needed in needs:
        if not done:
            default = "" if setting in found else " (the default)"
            raise UserError(f"{path}: got {setting} {shown(json.dumps(settings[setting]))}{default}, "
                            f"need {needed}")
    resize, _ = edge_length(settings["size"])
    return mode, tuple(settings["image_mean"]), tuple(settings["image_std"]), resize, settings["resample"]


def image_needs(settings, size, mode):
    """→ (name of a setting, whether its value is supported, what it needs) per setting."""
    pad, tiles = mode == "pad", mode == "tiles"
    resize, squashes = edge_length(settings["size"], settings["default_to_square"])
    crop = edge_length(settings["crop_size"], True)
    uncropped = settings["do_center_crop"] is False and pad and resize == size  # a square of the right size
    factor, resample = settings["rescale_factor"], settings["resample"]
    return [
        *((name, settings[name] is True, "true") for name in ("do_resize", "do_rescale", "do_normalize")),
        *((name, settings[name] is None or isinstance(settings[name], bool), "true or false")
          for name in ("do_pad", "default_to_square")),
        ("size", resize and (resize == size if tiles else resize >= size and (pad or not squashes)),
         f'{{"shortest_edge": N}} with N of at least {size}, the tower\'s image_size (for tiles: just that)'),
        ("do_center_crop", settings["do_center_crop"] is True or uncropped, "true"),
        ("crop_size", uncropped or crop == (size, True), f"{size}, the tower's image_size"),
        ("pad_size", settings["pad_size"] is None, "null"),
        ("resample", type(resample) is int and resample in FILTERS, "2 (bilinear) or 3 (bicubic)"),
        ("rescale_factor", isinstance(factor, float) and abs(255 * factor - 1) < 1e-9, f"1/255 ({1 / 255})"),
        ("image_mean", are_three(settings["image_mean"], 0, 1), "three numbers from 0 to 1"),
        ("image_std", are_three(settings["image_std"], 1e-6, 1e6), "three numbers above 0")]


def image_processor_file(folder):
    """→ the file from which transformers reads a folder's image settings, and the settings; None if there are
    none."""
    name, found = "processor_config.json", read_json(folder, "processor_config.json", {})
    if isinstance(found, dict):
        found = found.get("image_processor")
    if found is None:
        name, found = "preprocessor_config.json", read_json(folder, "preprocessor_config.json")
    path = os.path.join(folder, name)
    if not isinstance(found, dict | None):
        raise UserError(f"{path}: got {shown(found)}, need a dictionary of image settings")
    return path, found


def edge_length(value, square=False):
    """A size as transformers writes it → pixels of an edge (None: invalid, or unequal edges), and whether
    both edges are set to it, which distorts an image; else only the shorter edge. square: a number means
    both."""
    edges = [value]
    if isinstance(value, dict):
        square = value.keys() != {"shortest_edge"}
        edges = list(value.values()) if value.keys() in ({"shortest_edge"}, {"height", "width"}) else [None]
    elif isinstance(value, list) and len(value) == 2:
        edges, square = value, True
    good = all(type(edge) is int and 0 < edge <= LONGEST_EDGE and edge == edges[0] for edge in edges)
    return edges[0] if good else None, square


def are_three(values, low, high):
    """Whether a setting is three numbers from low to high."""
    return isinstance(values, list | tuple) and len(values) == 3 and all(
        type(value) in (int, float) and low <= value <= high for value in values)


def save_processor(processor, config, folder):
    """Writes tokenizer, chat template, image settings and generation config for transformers' LlavaProcessor
    or LlavaNextProcessor and generate()."""
    processor.tokenizer.save_pretrained(folder)
    S, kinds = processor.size, {"crop": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "tiles": TILES}
    processor_class = "LlavaNextProcessor" if processor.grids else "LlavaProcessor"
    preprocessor = {
        "image_processor_type": kinds[processor.mode], "processor_class": processor_class,
        "do_convert_rgb": True, **({} if processor.mode == "crop" else {"do_pad": True}),
        **({"image_grid_pinpoints": processor.grids} if processor.grids else {}),
        "do_resize": True, "size": {"shortest_edge": processor.resize}, "resample": processor.resample,
        "do_center_crop": True, "crop_size": {"height": S, "width": S},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": processor.mean, "image_std": processor.std}
    both = {
        "processor_class": processor_class, "image_token": IMAGE,
        "patch_size": config.vision_config.patch_size, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy}
    # plain's newline ends a caption, and no other answer
    eos = processor.end_ids - processor.template.stop_ids() if processor.template.plain else processor.end_ids
    generation = {
        "bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": sorted(eos),
        "pad_token_id": processor.pad}
    for name, content in (("preprocessor", preprocessor), ("processor", both), ("generation", generation)):
        with open(os.path.join(folder, f"{name}_config.json"), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)


def check_records(records, images_dir, source, need_answers=1, skip_bad_rows=False, world=None,
                  unreadable=None):
    """Records → [(index, Conversation)] of the valid ones, the number of bad ones, and {path: error} of the
    images that cannot be decoded. That result can be passed to another call, which then decodes no image.

    A bad record raises a UserError that names it, or is reported and skipped. All ranks get the same result,
    even if only one of them lacks a file."""
    good, errors = {}, {}

    def note(index, error):
        id = records[index].get("id") if isinstance(records[index], dict) else None
        errors[index] = f"{source}: record {index} (id {shown(id)}): {shown(str(error), 2000)}"
    for index, record in enumerate(progress(records, f"{source}: records checked")):
        try:
            good[index] = read_record(record, images_dir, need_answers)
        except (UserError, UnicodeError) as error:
            note(index, error)
            if not skip_bad_rows:
                break
    for found in reversed(world.gather(errors) if world else []):
        errors.update(found)  # the lowest rank's words last: every rank says the same
    if not skip_bad_rows:  # an unreadable image before the first of them may still be named
        good = {index: c for index, c in good.items() if index < min(errors, default=len(records))}
    good = {index: c for index, c in good.items() if index not in errors}
    paths = sorted({path for conversation in good.values() for path in conversation.images})
    if unreadable is None:
        unreadable = decode_images(paths, images_dir, source, world)
    for index, conversation in good.items():
        for path in conversation.images:
            if path in unreadable:
                note(index, unreadable[path])
    for index in sorted(errors):
        if not skip_bad_rows:
            raise UserError(errors[index] + "; --skip_bad_rows leaves such records out")
        if os.environ.get("RANK", "0") == "0":
            print(f"skipped {errors[index]}", flush=True)
    good = [(index, conversation) for index, conversation in good.items() if index not in errors]
    if not good:
        raise UserError(f"{source}: all {len(records)} records are bad, need at least one good one")
    return good, len(errors), unreadable


def decode_images(paths, images_dir, source, world):
    """Image files → {path: error} of those that cannot be decoded. The world spreads the work over threads
    and ranks. If ranks have different paths, nothing is decoded; the caller will notice the difference."""
    if not world:
        errors = map(image_error, paths)
    else:
        root = os.path.abspath(images_dir)
        names = repr([path.removeprefix(root) for path in paths])
        if len(set(world.gather(hashlib.sha256(names.encode()).digest()))) > 1:
            return {}
        errors = world.parallel_map(image_error, paths, f"{source}: images decoded")
    return {path: error for path, error in zip(paths, errors) if error}


def digest(conversations, images_dir=""):
    """[(index, Conversation)] → a hash of their content and of the images' sizes. It is equal on ranks that
    have the same data, wherever images_dir is."""
    root, seen = os.path.join(os.path.abspath(images_dir), ""), hashlib.sha256()
    size = functools.cache(os.path.getsize)
    for _, c in conversations:
        images = [(path.removeprefix(root), size(path)) for path in c.images]
        seen.update(json.dumps([c.id, c.roles, c.contents, c.answers, images, c.margin]).encode())
    return seen.hexdigest()


ANSWERS_NEEDED = {"prompt": 0, "turns": 1, "answers": 1, "ranked": 2}  # of a record, by the kind of example


def build_examples(conversations, processor, which):
    """[(index, Conversation)] → Examples, and the numbers of records that are too long and of records with an
    answer that was cut. which: `turns` (the best answer; every gpt turn is supervised), `answers` (all
    answers of the last turn), `ranked` (the same, of records with at least two) or `prompt`."""
    examples, counts = [], {"too_long": 0, "cut": 0}
    most, all_turns = {"turns": 1, "prompt": 0}.get(which), which == "turns"
    for done, (index, conversation) in enumerate(progress(conversations, "records tokenised")):
        if done % 2000 == 0:
            processor.template.prepare([
                (c.roles, c.contents, answer)
                for _, c in conversations[done:done + 2000] for answer in c.answers[:most] or [""]])
        example, cut = processor.example(index, conversation, conversation.answers[:most], all_turns)
        counts["cut"] += cut
        if example is None:
            counts["too_long"] += 1
        else:
            examples.append(example)
    if not examples:
        images = {path for _, conversation in conversations for path in conversation.images}
        most = max(processor.image_lengths(images), default=processor.tile_tokens)
        raise UserError(f"none of {len(conversations)} records fits --max_len {processor.max_len}: raise it "
                         f"(an image takes up to {most} tokens)")
    return examples, counts


# ---- batches ----

@dataclasses.dataclass
class Batch:
    """Packed sequences as tensors (see the head of this file). A flat position is sequence · T + position."""
    ids: torch.Tensor  # [B, T]
    position: torch.Tensor  # [B, T]
    branch: torch.Tensor  # [B, T]
    pixels: torch.Tensor  # [M, 3, S, S]; one blank tile if there is none, since every rank runs the tower
    image_feature: torch.Tensor  # [R] which of the M · I features an image token shows; −1: image_newline
    image_position: torch.Tensor  # [R] flat positions of the image tokens
    target: torch.Tensor  # [N] ids to predict
    logit_position: torch.Tensor  # [N] flat position whose hidden state predicts it
    answer: torch.Tensor  # [N] which of the A answers it belongs to
    last_token: torch.Tensor  # [A] flat position of each answer's last target
    sequence: torch.Tensor  # [A] the sequence it stands in
    causal_prefix: int  # leading positions with causal attention: T, or the shortest prompt that branches
    token_shape: tuple  # (A, targets of the longest answer)
    answer_shape: tuple  # (B, answers of the sequence with most), or (0, 0) if there is no answer

    def to(self, device):
        return Batch(*(value.to(device) if torch.is_tensor(value) else value
                       for value in (getattr(self, field.name) for field in dataclasses.fields(self))))


def pad_by_sequence(values, owner, shape):
    """Values [N] and the sequence (or answer) that each belongs to [N], in ascending order → (padded with 0,
    mask), both of the given shape [owners, values of the longest]. The shape is not read from the tensors: a
    GPU would be waited for."""
    index = torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)
    mask = torch.zeros(shape, dtype=torch.bool, device=owner.device)
    mask = mask.index_put((owner, index), torch.ones_like(owner, dtype=torch.bool))
    return values.new_zeros(shape).index_put((owner, index), values), mask


def pack(example, processor):
    """Example → one sequence [5, T]: ids, position, branch, the position that predicts each token, and the
    mask of targets."""
    n_images = int((example.prompt == processor.image_token).sum())  # those of later turns follow
    prompt = np.repeat(example.prompt, processor.lengths(example.prompt, example.images[:n_images]))
    P = start = len(prompt)
    parts = [np.stack([prompt, np.arange(P), *np.zeros((3, P))])]
    for a, (answer, token_mask) in enumerate(zip(example.answers, example.token_masks), 1):
        lengths = processor.lengths(answer, example.images[n_images:])
        answer, token_mask = np.repeat(answer, lengths), np.repeat(token_mask, lengths)
        n = len(answer)
        predicted_from = np.arange(start, start + n) - 1
        predicted_from[0] = P - 1  # an answer's first token is predicted by the prompt's last
        parts.append(np.stack([answer, np.arange(P, P + n), np.full(n, a), predicted_from, token_mask]))
        start += n
    return np.concatenate(parts, axis=1).astype(np.int64)


def collate(examples, processor, pixels=None):
    """Examples → Batch, padded on the right to the longest sequence. Without examples: one sequence of
    padding without targets. pixels: those of the examples' images, if already computed.

    It uses numpy because it runs in the loader's threads, where torch would start a thread pool in each."""
    padding = np.array([[processor.pad], [0], [-1], [0], [0]])
    packed = [pack(example, processor) for example in examples] or [padding]
    T = max(sequence.shape[1] for sequence in packed)
    packed = [np.concatenate([sequence, padding.repeat(T - sequence.shape[1], axis=1)], axis=1)
              for sequence in packed]
    ids, position, branch, predicted_from, token_mask = np.stack(packed, axis=1)  # [B, T] each
    targets = np.flatnonzero(token_mask)  # [N] flat positions
    sequence = targets // T  # [N]
    answers = np.array([len(example.answers) for example in examples] or [0])  # [B]
    answer = (answers.cumsum() - answers)[sequence] + branch.flatten()[targets] - 1  # [N]
    last_token = np.zeros(answers.sum(), dtype=np.int64)
    last_token[answer] = targets  # positions rise, so an answer's last one stays

    paths = [path for example in examples for path in example.images]
    features, tiles = {}, 0  # of each distinct image; number of tiles so far
    for path in dict.fromkeys(paths):
        layout, count = processor.layout(path)
        features[path] = np.where(layout < 0, -1, layout + tiles * processor.tile_tokens)
        tiles += count
    image_feature = np.concatenate([np.zeros(0, dtype=np.int64), *(features[path] for path in paths)])
    assert (ids == processor.image_token).sum() == len(image_feature), (ids, paths)

    def read(path):
        try:
            return processor.pixels(path)
        except UserError as error:
            example = next(example for example in examples if path in example.images)
            raise UserError(f"{example.name}: {error}; it was readable when "
                            "the run started") from error
    if pixels is None:
        blank = np.zeros((1, 3, processor.size, processor.size), dtype=np.float32)
        pixels = torch.from_numpy(np.concatenate([read(path) for path in features] or [blank]))
    assert len(pixels) == max(1, tiles), (pixels.shape, tiles)
    branching = (branch[answers > 1] == 0).sum(1).tolist()
    longest = int(np.bincount(answer).max(initial=0))
    fields = {"ids": ids, "position": position, "branch": branch, "image_feature": image_feature,
              "image_position": np.flatnonzero(ids == processor.image_token),
              "target": ids.flatten()[targets],
              "logit_position": sequence * T + predicted_from.flatten()[targets], "answer": answer,
              "last_token": last_token,
              "sequence": np.arange(len(answers)).repeat(answers)}
    return Batch(pixels=pixels, causal_prefix=min([T, *branching]), token_shape=(len(last_token), longest),
                 answer_shape=(len(answers), int(answers.max())) if answers.any() else (0, 0),
                 **{name: torch.from_numpy(values) for name, values in fields.items()})


def join_prompts(batches, tile_tokens):
    """Batches of prompts without answers → one Batch of all their sequences, padded to the longest, without
    pixels. Its features are numbered in the order of the batches."""
    T, joined, features, sequences = max(batch.ids.shape[1] for batch in batches), [], 0, 0
    for batch in batches:
        B, own = batch.ids.shape
        padded = [torch.nn.functional.pad(getattr(batch, name), (0, T - own), value=value)
                  for name, value in (("ids", 0), ("position", 0), ("branch", -1))]
        sequence, index = batch.image_position // own, batch.image_position % own
        image_feature = torch.where(batch.image_feature < 0, -1, batch.image_feature + features)
        joined.append((*padded, image_feature, (sequences + sequence) * T + index))
        features, sequences = features + len(batch.pixels) * tile_tokens, sequences + B
    ids, position, branch, image_feature, image_position = (torch.cat(parts) for parts in zip(*joined))
    return dataclasses.replace(batches[0], ids=ids, position=position, branch=branch, pixels=None,
                               image_feature=image_feature, image_position=image_position, causal_prefix=T)


def keyed_permutation(n, *key):
    """A permutation of 0 … n − 1 that depends on the key only. numpy reads a missing number of a seed as 0;
    the fifth number keeps keys of different lengths apart, and apart from the four of
    model.keyed_uniforms."""
    return np.random.default_rng([*key, *[0] * (4 - len(key)), len(key)]).permutation(n)


class Steps:
    """steps[k]: this rank's micro-batches of optimizer step k. All ranks have equally many; missing examples
    are padding.

    Step k takes the same examples for any number of ranks. Within a step, examples of similar length share a
    micro-batch (by_length). shuffle: the order of an epoch is keyed by (seed, epoch); else it is that of the
    file. drop_last: an epoch has full steps only; its last examples are left out. collate: makes a Batch of
    examples."""

    def __init__(self, examples, processor, batch_size, micro_batch, rank, world_size, seed=0, shuffle=True,
                 by_length=True, drop_last=False, collate=collate):
        self.examples, self.processor = examples, processor
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.world_size, self.collate = rank, world_size, collate
        self.seed, self.shuffle, self.by_length, self.drop_last = seed, shuffle, by_length, drop_last
        self.lengths = np.array([processor.lengths(np.concatenate([e.prompt, *e.answers]), e.images).sum()
                                 for e in examples])

    def __len__(self):
        """Steps per epoch."""
        whole, rest = divmod(len(self.examples), self.batch_size)
        return whole if whole and self.drop_last else whole + (rest > 0)

    def order(self, epoch):
        if not self.shuffle:
            return np.arange(len(self.examples))
        return keyed_permutation(len(self.examples), self.seed, epoch)

    def groups(self, step):
        """This rank's micro-batches as lists of indices of examples."""
        epoch, k = divmod(step, len(self))
        indices = self.order(epoch)[k * self.batch_size:(k + 1) * self.batch_size]
        if self.by_length:
            indices = indices[np.argsort(self.lengths[indices], kind="stable")]
        rounds = -(-len(indices) // (self.micro_batch * self.world_size))
        starts = [(i * self.world_size + self.rank) * self.micro_batch for i in range(rounds)]
        return [indices[start:start + self.micro_batch].tolist() for start in starts]

    def __getitem__(self, step):
        return [self.collate([self.examples[i] for i in group], self.processor)
                for group in self.groups(step)]


@dataclasses.dataclass
class Loader:
    """Iterates over steps first … last − 1, as often as asked. Threads prepare about two steps per worker
    ahead; with 0 workers the caller's thread does. An error of a step is raised when that step is due."""
    steps: Steps
    first: int
    last: int
    workers: int

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        order = range(self.first, self.last)
        if not self.workers:
            yield from map(self.steps.__getitem__, order)
            return
        pool = concurrent.futures.ThreadPoolExecutor(self.workers, "loader")
        ahead = collections.deque()
        try:
            for step in order:
                ahead.append(pool.submit(self.steps.__getitem__, step))
                if len(ahead) > 2 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where the consumer stops early: a step being decoded is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
