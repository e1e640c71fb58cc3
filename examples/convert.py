"""Convert other data layouts into this project's own: one JSON list of records and a folder of their images.

    python examples/convert.py SOURCE --out DIR [--split train] [--images DIR] [--drop COLUMN …] [--limit N]
    python examples/convert.py openbmb/RLHF-V-Dataset --out data/rlhfv

SOURCE is a file (a JSON list, JSON lines, or CSV or TSV with a header line, told apart by content; or
parquet, `pip install pyarrow`), a folder of parquet files, or a hub data set id (`pip install datasets`).
DIR/data.json (one record a line, image paths that start with images/) and DIR/images/ appear when all is
done.

Layouts, told apart record by record by the columns that are filled ("|": one of them, "+": together):

    conversations | messages      turns {"from", "value"} or {"role", "content"}, or their JSON text. The last
                                  gpt turn may list answers, best first: `value` or `preference_values`
    PROMPT + chosen + rejected    a preference; `rejected` may list several answers, best first. An answer is
                                  a text, a message or a list of messages
    chosen + rejected             TRL's implicit prompt: two lists of messages, equal but for the last message
    PROMPT + output_1 +           LLaVA-RLHF: `preference` is 1 or 2. A gpt turn at the end of conversations
      output_2 + preference       is replaced by the outputs, as in LLaVA-RLHF's own code
    text                          RLHF-V: {"question", "chosen", "rejected"}, or its JSON text
    PROMPT + ANSWER               a question and its answer (TRL: prompt + completion)
    PROMPT                        a prompt without an answer, for ppo.py and predict.py
    question_id + text (+ label)  LLaVA's evaluation questions and POPE: `text` asks, `label` is the answer
    image + caption | text        a caption; the human turn is "<image>" alone (for sft.py --template plain)

    PROMPT: prompt | question | query | instruction (+ input) | problem: a text, or a list of messages;
            or conversations | messages that end with a human turn
    ANSWER: answer | response | output | completion | solution, or else a `label` that is text (and stays)

`system` or `system_prompt` becomes a leading system turn. Images stand in `image`, `images`, `img`,
`image_path`, `file_name`, or in messages: bytes, {"bytes", "path"}, base64, a data URL, a PIL image, or a
path below --images. An image in a message becomes `<image>` on a line of its own. File bytes stay as they are
(a PIL image becomes a PNG), and so does a file's path, below DIR/images/. Another image of the same name gets
a suffix; bytes that come without a name (`path`, or `image_path` beside them) are named by their hash.

`id` is kept (or is the record's index in SOURCE), and so are `margin` and all other columns of JSON values.
What this layout cannot hold makes a bad record: video, audio, tools, weights, masked turns, ties, an image or
a turn in another column. --drop leaves such columns out.
"""

import argparse
import base64
import csv
import datetime
import filecmp
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

from PIL import Image, ImageOps

CHATS = ("conversations", "messages")
PROMPTS = (*CHATS, "prompt", "question", "query", "instruction", "problem")
ANSWERS = ("answer", "response", "output", "completion", "solution")
IMAGES = ("image", "images", "img")
IMAGE_PATHS = ("image_path", "image_file", "file_name")
BESIDE = ("choices", "options", "context", "passage", "hint", *"ABCDEFGH")  # what a question is asked with
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "llm": "gpt",
         "system": "system"}
LAYOUTS = ("conversations | messages, prompt | question + chosen + rejected, prompt | question + answer, "
           "image + caption, or another layout that --help lists")

FLAGS = ("loss", "weight", "train")  # of a turn or a record: false or 0 says not to learn from it
TEXTS = "(response|answer|output|completion|candidate|generation|message|text|caption|value|label)"
LOST = re.compile(  # what would be lost of a record or a turn, by names in lower case without separators
    r"(image|img|picture|photo|pic|video|audio)s?\d*(path|file|name|url|uri|link|data|bytes|base64|b64|list)*s?\d*"
    r"|pixelvalues|sys(tem)?(prompt|message|msg|instruction|text)?s?|(chosen|rejected).*|reject|winner|loser"
    rf"|((dis)?prefer(red|ences?)|accepted|winning|losing|best|worst){TEXTS}?s?|{TEXTS}(s?\d+|[ab])|rankings?"
    r"|responses|completions|candidates|prompt|conversations?|messages|input|history|tools|functions?"
    r"|(tool|function)call(s|id)?|reasoningcontent|thinking|kto(tag|label)?s?|loss(es|mask|weight)?s?|(sample|token|turn)?weights?"
    r"|train(able|ing|detail)?")
ANSWER_NAME = re.compile("answer|response|output|completion|solution|caption|chosen|rejected|label$")
SCORE_NAME = re.compile("label|score|reward|rating|rank")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # those that the trainer opens
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
BASE64 = ("data:", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how a data URL, JPEG, PNG, GIF and WebP begin
MESSAGES_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')  # the JSON text of messages
OTHER_PLACEHOLDER = re.compile(r"<(video|audio)>|<img>[^<]+</img>|<image_?\d+>|<\|image[_\d]*\|>|<ImageHere>")
IMAGE_TEXT = re.compile(  # a data URL, base64, or the path of an image, a video or a sound
    r"data:[\w/.+-]*[;,]|(/9j/|iVBORw0K|R0lGOD|UklGR|Qk|SUkqA|TU0AK)[\w+/=\s]{60,}\Z|[^\n]{0,2000}\.(?i:jpe?g|jfif|png|"
    r"webp|gif|bmp|tiff?|heic|avif|mp4|avi|mov|mkv|webm|wav|mp3|flac)([?#]\S*)?\s*\Z")
FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
SHARD = re.compile(r"(.+)-\d+-of-\d+\.parquet")  # train-00000-of-00012.parquet, as the hub names them
REPORT_SECONDS = 10
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # the trainer opens none so large


def short(value):
    """How an error shows a value that may be megabytes long."""
    text = repr(value[:80] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def empty(value):
    """Whether a cell holds nothing: null, NaN (which pandas writes for null), an empty text or list."""
    return value in (None, "", [], {}) or isinstance(value, float) and math.isnan(value)


def first(record, *keys):
    """The first of these fields that is not null, else None."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def take(columns, names):
    """Removes that one of these columns that is filled → its name and value; ("", None) if none is."""
    filled = [name for name in names if name in columns]
    values = [columns.pop(name) for name in filled]
    if any(value != values[0] for value in values):
        names = " and ".join(filled)
        raise ValueError(f"got the columns {names}, need one of them: leave out the other one by --drop")
    return (filled[0], values[0]) if filled else ("", None)


def parse_json(text, name, need):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        got = f"{name} {short(text.strip())}, which cannot be parsed ({error})"
        raise ValueError(f"got {got}, need {need}: correct it") from None


# ---- text: every layout becomes turns [{"from", "value"}] and the images that stood in them


def message_text(content, role, images):
    """A message's content as one string; an image in it goes to `images` and leaves `<image>` behind."""
    if isinstance(content, str):
        return content
    lines = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind in ("image", "image_url") and role == "human":
            lines.append("<image>")
            image = first(part, "image", "image_url", "url", "path")
            images += [] if image is None else [image]  # none: it stands in the record's image column
        else:
            raise ValueError(f"got {short(part)} in a {role} turn, need text, or a human's image: correct it")
    return "\n".join(lines)


def check_message(message, role):
    """ValueError for what a turn holds besides its text, if it would be lost."""
    for name, value in message.items():
        if name in ("from", "role", "value", "content", "preference_values"):
            continue
        if name in FLAGS:  # only gpt turns are learnt, and all of them
            lost = role == "gpt" and value not in (None, 1)
        else:
            lost = not empty(value) and is_lost(name, value)
        if lost:
            raise ValueError(f"got a {role} turn with {name} {short(value)}, which would be lost, need none: "
                             "correct it")


def chat_turns(messages, name, images):
    """Messages in either spelling → turns; the images in them go to `images`."""
    need = 'a list of messages, {"from", "value"} or {"role", "content"}'
    need = need if name in CHATS else f"text, or {need}"
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = parse_json(messages, name, need)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"got {name} {short(messages)}, need {need}: correct it")
    turns = []
    for message in messages:
        role = ROLES.get(first(message, "from", "role"))
        if role is None:
            raise ValueError(f"got {short(message)}, need a message by one of {', '.join(ROLES)}: correct it")
        check_message(message, role)
        value = first(message, "preference_values", "value", "content")
        if not (role == "gpt" and isinstance(value, list) and all(isinstance(v, str) for v in value)):
            value = message_text(value, role, images)
        turns.append({"from": role, "value": value})
    return turns


def read_context(columns):
    """What stands before an answer → (turns, images); no turns where the record has no prompt."""
    name, prompt = take(columns, PROMPTS)
    if name == "" and "question_id" in columns:
        prompt = columns.pop("text", None)
    if not isinstance(prompt, str) or name in CHATS:
        images = []
        return [] if prompt is None else chat_turns(prompt, name, images), images
    if isinstance(columns.get("input"), str):
        prompt = f"{prompt}\n{columns.pop('input')}"
    for name in BESIDE:
        values = columns.get(name, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) and value in prompt for value in values):
            raise ValueError(f"got the column {name} ({short(values)}), which the question does not contain, "
                             f"need it there: write it into the question, or --drop {name}")
    return [{"from": "human", "value": prompt}], []


def split_answer(value, name):
    """An answer (a text, a message, or messages) → (turns before it, images in them, its text)."""
    if isinstance(value, str):
        return [], [], value
    messages, images, turns = [value] if isinstance(value, dict) else value, [], []
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        turns = chat_turns(messages, name, images)
    if not turns or turns[-1]["from"] != "gpt" or not isinstance(turns[-1]["value"], str):
        raise ValueError(f"got {name} {short(value)}, need a text, or messages of which the assistant's is "
                         "the last: correct it")
    return turns[:-1], images, turns[-1]["value"]


def join(context, *answers):
    """The (turns, images) of a prompt, and split answers → (turns, images). TRL repeats the prompt in each
    answer, or gives it there alone."""
    contexts = [context, *(answer[:2] for answer in answers)]
    contexts = [(turns, images) for turns, images in contexts if turns]
    if not contexts:
        raise ValueError("got answers alone, need a prompt: add one")
    if any(other != contexts[0] for other in contexts):
        raise ValueError("got answers to different contexts, need one prompt for all of them: correct it")
    texts = [text for _, _, text in answers]
    turns, images = contexts[0]
    return [*turns, {"from": "gpt", "value": texts if len(texts) > 1 else texts[0]}], images


def read_rlhf_v(columns):
    """RLHF-V's text → its fields as columns."""
    text, need = columns.pop("text"), "RLHF-V's question, chosen and rejected"
    fields = parse_json(text, "text", need) if isinstance(text, str) else text
    if not {"question", "chosen", "rejected"} <= fields.keys() or fields.keys() & columns.keys():
        raise ValueError(f"got text with the fields {', '.join(fields)}, need {need}: correct it")
    columns.update(fields)


def check_scores(columns):
    """ValueError where score_chosen is not above score_rejected (UltraFeedback), in any such spelling."""
    for name, score in columns.items():
        other = columns.get(name.replace("chosen", "rejected"))
        is_score = "chosen" in name and re.search("score|rating|reward", name)
        if is_score and {type(score), type(other)} <= {int, float} and score <= other:
            raise ValueError(f"got {name} {score}, need more than the rejected {other}: leave the record out")


def read_preference(columns):
    """PROMPT + chosen + rejected, or these two alone."""
    chosen, rejected = split_answer(columns.pop("chosen"), "chosen"), columns.pop("rejected")
    several = isinstance(rejected, list) and not all(isinstance(message, dict) for message in rejected)
    rejected = [split_answer(value, "rejected") for value in (rejected if several else [rejected])]
    check_scores(columns)
    return join(read_context(columns), chosen, *rejected)


def read_outputs(columns):
    """PROMPT + output_1 + output_2 + preference."""
    answers = [split_answer(columns.pop(name, None), name) for name in ("output_1", "output_2")]
    preference = columns.pop("preference", None)
    if isinstance(preference, bool) or preference not in (1, 2, "1", "2"):
        raise ValueError(f"got the preference {short(preference)}, need 1 or 2, no tie: leave the record out")
    turns, images = read_context(columns)
    turns = turns[:-1] if turns and turns[-1]["from"] == "gpt" else turns
    return join((turns, images), *(answers if int(preference) == 1 else answers[::-1]))


def read_question(columns, record):
    """A chat, or a prompt with an answer or without."""
    is_chat = bool(columns.keys() & {*CHATS})
    turns, images = read_context(columns)
    if is_chat and turns and turns[-1]["from"] == "gpt":
        return turns, images
    name, answer = take(columns, ANSWERS)
    if answer is None and not is_chat and isinstance(columns.get("label"), str):
        name, answer = "label", columns["label"]
    if answer is not None:
        return join((turns, images), split_answer(answer, name))
    hidden = [key for key in record if ANSWER_NAME.search(key.lower())]
    if hidden and not is_chat:
        value = short(record[hidden[0]])
        raise ValueError(f"got a prompt with {hidden[0]} {value}, need a text in `answer`: rename it, or "
                         f"keep the prompt alone by --drop {hidden[0]}")
    if turns and turns[-1]["from"] == "gpt":
        raise ValueError("got a prompt that ends with a gpt turn, need an answer, or `messages`: rename it")
    return turns, images


def read_caption(columns):
    """image + caption | text."""
    name, caption = take(columns, ("caption", "text"))
    if not isinstance(caption, str):
        raise ValueError(f"got {name} {short(caption)}, need one text: choose one")
    return [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}], []


def read_turns(columns, record):
    """A record's filled columns in any layout → (turns, images in them). Takes out those that it read."""
    text, asked = columns.get("text"), bool(columns.keys() & {*PROMPTS})
    if not asked and (isinstance(text, dict) or re.match(r'\s*\{\s*"', str(text))):
        read_rlhf_v(columns)
    if columns.keys() & {"output_1", "output_2"}:
        return read_outputs(columns)
    if columns.keys() >= {"chosen", "rejected"}:
        return read_preference(columns)
    if not columns.keys() & {"chosen", "rejected"}:  # else an answer would get lost
        if asked or columns.keys() >= {"question_id", "text"}:
            return read_question(columns, record)
        if columns.keys() & {"caption", "text"} and columns.keys() & {*IMAGES, *IMAGE_PATHS}:
            return read_caption(columns)
        if isinstance(text, str):
            raise ValueError(f"got text {short(text)} alone, need an image, whose caption it is then, or a "
                             "prompt and an answer in columns of their own: add them")
    names = ", ".join(f"{key} (empty)" if empty(value) else key for key, value in record.items())
    raise ValueError(f"got the columns {names or '(none)'}, need {LAYOUTS}: rename them")


def add_system(turns, system):
    """A system column becomes the leading turn; where there is one, it must be the same."""
    leads = bool(turns) and turns[0]["from"] == "system"
    if system is None or leads and turns[0]["value"] == system:
        return turns
    if leads or not isinstance(system, str):
        raise ValueError(f"got the system prompt {short(system)}, need one text, and no other as the first "
                         "turn: correct it")
    return [{"from": "system", "value": system}, *turns]


def check_turns(turns, images):
    """Human and gpt alternate, no text is empty, answers differ, each placeholder has an image."""
    body = turns[1:] if turns and turns[0]["from"] == "system" else turns
    if not body:
        raise ValueError("got a conversation without turns, need a human one at least: correct it")
    for number, turn in enumerate(body, 1):
        role, value = turn["from"], turn["value"]
        if role != ("gpt", "human")[number % 2]:
            raise ValueError(f"got a {role} turn as turn {number}, need human and gpt in turn: correct it")
        if isinstance(value, list) and number < len(body):
            raise ValueError(f"got a list of answers in turn {number}, need it in the last turn: move it")
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"got {short(value)} in turn {number} ({role}), need words: correct it")
        if len({text.strip() for text in texts}) < len(texts):
            raise ValueError(f"got equal answers {short(texts[0])}, need answers that differ: leave it out")
    other = [match for turn in body[::2] for match in OTHER_PLACEHOLDER.finditer(turn["value"])]
    if other:
        raise ValueError(f"got {short(other[0][0])} in a human turn, need <image>, and its image: correct it")
    placeholders = sum(turn["value"].count("<image>") for turn in turns if turn["from"] == "human")
    if placeholders > len(images):
        raise ValueError(f"got {placeholders} <image> for {len(images)} images, need one each: correct it")


# ---- images: every kind of value becomes the bytes of an image file, and its name where it has one


def text_images(text, root):
    """A path below `root`, a data URL, base64, or paths joined by commas → [(bytes, name or None)]."""
    for name in (text, text.replace("\\", "/")):
        path = Path(os.path.abspath(os.path.join(root, name)))  # not resolved: links in it may lead out
        inside = path.is_relative_to(os.path.abspath(root))
        if inside and os.path.isfile(path):
            return [(path.read_bytes(), os.path.relpath(path, root))]
    if text.startswith(BASE64):
        try:
            return [(base64.b64decode(text.rpartition(",")[2]), None)]
        except ValueError as error:
            raise ValueError(f"got the base64 {short(text)}, need all of it ({error}): correct it") from None
    if "," in text:
        return [image for name in text.split(",") for image in text_images(name.strip(), root)]
    where = "is not in" if inside else "lies outside"
    if "://" in text:
        raise ValueError(f"got the image {short(text)}, need a file: download it")
    raise ValueError(f"got the image {short(text)}, which {where} {root}, need a file there: give --images")


def image_files(value, root):
    """An image value of any kind, or a list of them → [(bytes, name or None)]."""
    if isinstance(value, list):
        return [image for v in value for image in image_files(v, root)]
    if isinstance(value, dict) and not empty(value.get("bytes")):
        return [(data, value.get("path") or name) for data, name in image_files(value["bytes"], root)]
    if isinstance(value, dict):
        value = first(value, "path", "url")
    if isinstance(value, str):
        return text_images(value, root)
    if isinstance(value, Image.Image):
        image, buffer = ImageOps.exif_transpose(value), io.BytesIO()
        image = image if image.mode in ("1", "L", "LA", "I;16", "P", "RGBA") else image.convert("RGB")
        image.save(buffer, "PNG")
        value = buffer.getvalue()
    if isinstance(value, bytes):
        return [(value, None)]
    raise ValueError(f"got the image {short(value)}, need bytes, base64, a path or a PIL image: correct it")


def read_images(columns, in_turns, root):
    """The images of a record → [(bytes, name or None)]. Takes their columns out."""
    (_, image), (_, path) = take(columns, IMAGES), take(columns, IMAGE_PATHS)
    if in_turns and (image or path):
        raise ValueError("got images both in messages and in a column, need one of them: --drop the column")
    files = image_files(in_turns or image or path or [], root)
    if image and path and files:  # it names the bytes, or says the same
        if isinstance(image, str) and files[0][1] and image != path:
            raise ValueError(f"got the images {short(image)} and {short(path)}, need one: --drop a column")
        files = [(data, name or path) for data, name in files] if len(files) == 1 else files
    return files


def image_name(data, name):
    """The name below images/ for an image file: its own without what would leave that folder, or its hash."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            suffix = f".{image.format.lower()}".replace("jpeg", "jpg")
    except Exception as error:  # decoders raise many kinds
        raise ValueError(f"got a bad image ({error}), need one of {', '.join(FORMATS)}: replace it") from None
    parts = re.split(r"[/\\]", name if isinstance(name, str) else "")
    if parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]):  # an absolute path: that of another machine, maybe
        parts = [re.sub("^[A-Za-z]:", "", parts[-1])]
    parts = [re.sub(r'[\x00-\x1f<>:"|?*]', "_", part) for part in parts if part not in ("", ".", "..")]
    parts = parts[1:] if parts[0:1] == ["images"] else parts  # what this program wrote keeps its names
    parts[:-1] = [f"{part}_" if part.lower().endswith(SUFFIXES) else part for part in parts[:-1]]
    if not parts or max(len(part.encode()) for part in parts) > 200 or len(parts) > 8:
        parts = [hashlib.sha256(data).hexdigest()[:32]]
    return "/".join(parts) + ("" if parts[-1].lower().endswith(SUFFIXES) else suffix)


def write_images(files, folder, taken):
    """Image files → their paths in data.json. taken: hash by name of all that are in `folder`. Each one is
    decoded before it is written; none is written if one is bad."""
    names, new = [], {}
    for data, name in files:
        name, digest = image_name(data, name), hashlib.sha256(data).hexdigest()
        if new.get(name.lower(), taken.get(name.lower(), digest)) != digest:  # another image of this name
            name = f"-{digest[:12]}".join(os.path.splitext(name))
        names.append(name)
        if name.lower() not in taken:
            try:
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    image.draft("RGB", (1, 1))  # a JPEG decodes at an eighth of its size, which is quicker
                    image.load()
            except Exception as error:
                raise ValueError(f"got a bad image ({error}), need a complete one: replace it") from None
            new[name.lower()] = digest
    for name, (data, _) in zip(names, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower() in new:
            (folder / name).write_bytes(data)
    taken.update(new)
    return [f"images/{name}" for name in names]


# ---- records


def holds_lost(value):
    """Whether a value is or holds an image or a turn."""
    if isinstance(value, dict):
        turn = value.keys() >= {"from", "value"} or value.keys() >= {"role", "content"}
        return turn or "bytes" in value or value.keys() == {"path"} or holds_lost([*value.values()])
    if isinstance(value, list):
        return any(map(holds_lost, value))
    return isinstance(value, (bytes, Image.Image)) or isinstance(value, str) and bool(IMAGE_TEXT.match(value))


def stem(path):
    """photo for dir/photo.jpg"""
    return os.path.splitext(re.split(r"[/\\]", path)[-1])[0]


def is_lost(name, value, num_answers=1):
    """Whether what no layout has read of a record or of a turn says something that would be lost."""
    name = re.sub("[^a-z0-9]", "", name.lower())
    if name.startswith(("chosen", "rejected")) and type(value) in (int, float):
        return False  # a score of the answer
    if isinstance(value, list) and len(value) == num_answers > 1 and SCORE_NAME.search(name):
        return True  # they may be ties, or in another order
    unpaired = name == "label" and isinstance(value, bool)  # TRL's: whether the answer is a good one
    return unpaired or bool(LOST.fullmatch(name)) or holds_lost(value)


def other_columns(columns, num_answers, image_names):
    """The columns that no layout has read, as JSON values. ValueError for one whose meaning would be lost."""
    others, own = {}, {stem(name) for name in image_names if isinstance(name, str)}
    for name, value in columns.items():
        if name == "" or name in FLAGS and value == 1:
            continue  # an index that pandas wrote; what holds for every record
        if is_lost(name, value, num_answers):
            if isinstance(value, str) and stem(value) in own:
                continue  # the image's own name
            raise ValueError(f"got the column {name} ({short(value)}), which would be lost, need it in the "
                             f"image or the turns: move it there, or leave it out by --drop {name}")
        text = json.dumps(value, default=str)  # a date of parquet becomes text
        others[name] = json.loads(text, parse_constant=lambda _: None)  # NaN becomes null
    return others


def read_margin(columns, num_answers):
    """By how much the better of two answers is better; a number from 0, or None."""
    margin = columns.pop("margin", None)
    try:
        margin = float(margin) if isinstance(margin, str) else margin  # of CSV
    except ValueError:
        pass
    in_range = type(margin) in (int, float) and 0 <= margin <= sys.float_info.max
    if margin is None or margin == 0 or in_range and num_answers == 2:
        return margin
    raise ValueError(f"got the margin {short(margin)} and {num_answers} answers, need a number from 0, and "
                     "two: correct it, or --drop margin")


def convert_record(record, index, folder, root, taken, drop=()):
    """A record of any layout → ours; its images go into `folder`, none of them if it raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"got {short(record)}, need an object with named fields: correct it")
    record = {name: value for name, value in record.items() if name not in drop}
    columns = {name: value for name, value in record.items() if not empty(value)}
    for name in columns.keys() & {*PROMPTS, *ANSWERS, "chosen", "rejected"}:
        if isinstance(columns[name], str) and MESSAGES_TEXT.match(columns[name]):
            columns[name] = parse_json(columns[name], name, "a list of messages")
    id = columns.pop("id", f"{index:09d}")
    if type(id) not in (str, int):
        raise ValueError(f"got the id {short(id)}, need a text or a whole number: correct it")
    turns, in_turns = read_turns(columns, record)
    turns = add_system(turns, take(columns, ("system", "system_prompt"))[1])
    files = read_images(columns, in_turns, root)
    check_turns(turns, files)
    num_answers = len(turns[-1]["value"]) if isinstance(turns[-1]["value"], list) else 1
    margin = read_margin(columns, num_answers)
    others = other_columns(columns, num_answers, [name for _, name in files])
    json.dumps([id, turns, others], ensure_ascii=False).encode()  # UnicodeEncodeError before it writes images
    names = write_images(files, folder, taken)
    image = names[0] if len(names) == 1 else names
    ours = {"id": id, "image": image or None, "conversations": turns, "margin": margin}
    return {name: value for name, value in ours.items() if value is not None} | others


# ---- sources: (number of records or None, records, folder that image paths count from)


def lines_of(path):
    """A text file's lines that are not blank; where bytes are not UTF-8, the record's conversion fails."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            if "\0" in line:
                raise ValueError(f"got {path}, which holds null bytes, need UTF-8 or parquet: convert it")
            if line.strip():
                yield line


def table_records(path):
    """The records of a CSV or TSV file, whose first line names the columns."""
    header_line = next(lines_of(path))
    separator = max("\t,;", key=header_line.count)
    if separator not in header_line and path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"got {path}, which begins with {short(header_line.strip())}, need a JSON list, one "
                         "JSON object a line, or CSV with a header line: convert it")
    csv.field_size_limit(2**31 - 1)  # a cell may hold an image
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = filter(None, csv.reader(file, delimiter=separator, strict=True))
        try:
            header = [name.strip() for name in next(rows)]
            if len({*header}) < len(header):
                raise ValueError(f"got {path} with the header {short(header)}, need other names: rename some")
            for cells in rows:
                yield dict(zip(header, cells)) if len(cells) == len(header) else ValueError(
                    f"got {len(cells)} cells, need {len(header)} as in the header: put quotes around text "
                    f"that holds {separator!r}")
        except csv.Error as error:
            raise ValueError(f"got {path}, which cannot be parsed ({error}), need CSV: correct it") from None


def text_records(path):
    """A file of JSON or of a table, whatever it is called → (number of records or None, records)."""
    start = next(lines_of(path), "[]").strip()
    if start.startswith("{") and start.rstrip(",").endswith("}"):
        return sum(1 for _ in lines_of(path)), (line.rstrip(", \n") for line in lines_of(path))
    if not start.startswith(("[", "{")):
        return None, table_records(path)
    need = "a JSON list, or one JSON object a line"
    records = parse_json(path.read_text("utf-8-sig", errors="surrogateescape") or "[]", str(path), need)
    if not isinstance(records, list):
        raise ValueError(f"got {path} with {short(records)}, need {need}: put the records into a list")
    return len(records), records


def parquet_records(files):
    """→ (number of records, records); an image comes as {"bytes", "path"}."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("got parquet, need pyarrow to read it: run pip install pyarrow") from None
    total = sum(parquet.read_metadata(file).num_rows for file in files)
    batches = (batch for file in files for batch in parquet.ParquetFile(file).iter_batches(batch_size=64))
    return total, (record for batch in batches for record in batch.to_pylist())


def hub_records(name, split, limit):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"got {name!r}, need datasets for it: run pip install datasets") from None
    streaming = limit is not None  # a few records do not need the full download
    try:
        data = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"got {name!r}, split {split!r}, need a hub data set ({error}): check") from None
    tables = data.with_format("arrow").iter(batch_size=64)  # in Arrow, images are not decoded
    records = (record for table in tables for record in table.to_pylist())
    return None if streaming else len(data), records, datasets.config.HF_CACHE_HOME


def shards(folder, split):
    """The parquet files of a folder; those of one split where the files are named by split."""
    files = {file: SHARD.fullmatch(file.name) for file in sorted(folder.rglob("*.parquet"))}
    splits = sorted({match[1] for match in files.values() if match})
    wanted = [file for file, match in files.items() if not splits or match and match[1] == split]
    if not wanted:
        held = f"splits {', '.join(splits)}" if splits else "no parquet file"
        raise ValueError(f"got {folder} with {held}, need parquet of split {split!r}: check --split")
    return wanted


def source_records(source, split, limit):
    path = Path(source)
    if path.is_dir():
        return *parquet_records(shards(path, split)), path
    if path.is_file():
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1" or path.suffix == ".parquet"
        return *(parquet_records([path]) if parquet else text_records(path)), path.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in FILES:
        return hub_records(source, split, limit)
    raise ValueError(f"got {source!r}, need a file ({', '.join(FILES)}, …), folder or hub id: check it")


# ---- the command


def progress(done, total, seconds):
    """"1,200 of 4,800 records, 300 records/s, 0:00:12 left"; no time left where the total is unknown."""
    rate = done / seconds
    if total is None:
        return f"{done:,} records, {rate:,.0f} records/s"
    left = datetime.timedelta(seconds=round((total - done) / rate))
    return f"{done:,} of {total:,} records, {rate:,.0f} records/s, {left} left"


def convert_records(source, records, total, staging, root, skip_bad_rows, drop):
    """Records → staging/data.json and staging/images; returns how many were written and skipped."""
    written, skipped, taken = 0, 0, {}
    start = reported = time.monotonic()
    (staging / "images").mkdir()
    with (staging / "data.json").open("wb") as file:
        for index, record in enumerate(records):
            try:
                if isinstance(record, ValueError):  # of a table
                    raise record
                if isinstance(record, str):
                    record = parse_json(record, "the line", "one JSON object")
                converted = convert_record(record, index, staging / "images", root, taken, drop)
                line = json.dumps(converted, ensure_ascii=False).encode()
                file.write((b",\n" if written else b"[\n") + line)
                written += 1
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeError):
                    error = "got text that is not UTF-8, need UTF-8: save it in that encoding"
                if isinstance(error, RecursionError):
                    error = "got lists in lists without end, need a record: correct it"
                own_id = f" (id {short(record['id'])})" if isinstance(record, dict) and "id" in record else ""
                message = f"{source}: record {index}{own_id}: {error}"
                if not skip_bad_rows:
                    raise ValueError(f"{message}; --skip_bad_rows leaves such records out") from None
                skipped += 1
                print(f"skipped {message}", file=sys.stderr)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                print(progress(index + 1, total, reported - start), file=sys.stderr, flush=True)
        file.write(b"\n]\n")
    return written, skipped


def convert(source, out, split="train", images=None, drop=(), limit=None, skip_bad_rows=False,
            overwrite=False):
    """SOURCE → OUT/data.json and OUT/images; returns the numbers of records written and skipped.

    All is created beside OUT and moved there at the end, data.json last: an error leaves OUT as it was.
    """
    out = Path(out).absolute()
    if (out / "data.json").exists() and not overwrite:
        raise ValueError(f"got --out {out}, which holds a data.json, need a new one: name it, or --overwrite")
    total, records, root = source_records(source, split, limit)
    total = total if None in (total, limit) else min(total, limit)
    records = itertools.islice(records, limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        staging = Path(name)
        root = images or root
        written, skipped = convert_records(source, records, total, staging, root, skip_bad_rows, drop)
        if not written:
            raise ValueError(f"got no good record from {source}, {skipped} bad ones, need one: correct them")
        files = [file for file in (staging / "images").rglob("*") if file.is_file()]
        files = {file: out / file.relative_to(staging) for file in files}
        for file, target in files.items():
            if target.exists() and not overwrite and not filecmp.cmp(file, target, shallow=False):
                raise ValueError(f"got --out {out}, which holds another {target.relative_to(out)}, need a "
                                 "new folder: name it, or --overwrite")
        (out / "images").mkdir(parents=True, exist_ok=True)
        for file, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        os.replace(staging / "data.json", out / "data.json")
    return written, skipped


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", help="file, folder of parquet files, or hub data set id")
    parser.add_argument("--out", required=True, help="folder to write data.json and images/ into")
    parser.add_argument("--split", default="train", help="split of a hub data set, or of a folder of shards")
    parser.add_argument("--images", help="folder that image paths count from (default: SOURCE's own)")
    parser.add_argument("--drop", nargs="+", default=(), metavar="COLUMN", help="leave these columns out")
    parser.add_argument("--limit", type=int, help="read this many records at most")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad records out and count them")
    parser.add_argument("--overwrite", action="store_true", help="replace data.json, and images of one name")
    args = parser.parse_args()
    try:
        written, skipped = convert(**vars(args))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {written:,} records to {Path(args.out, 'data.json')}, skipped {skipped:,} bad records")


if __name__ == "__main__":
    main()
