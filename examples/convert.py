"""Convert other data layouts into this project's own: one JSON list of records and a folder of their images.

    python examples/convert.py SOURCE --out DIR [--split train] [--images DIR] [--drop COLUMN …] [--limit N]
    python examples/convert.py openbmb/RLHF-V-Dataset --out data/rlhfv

SOURCE is a file (JSON list, JSON lines, CSV or TSV with a header line, told apart by content; or parquet,
`pip install pyarrow`), a folder of parquet files, or a hub data set id (`pip install datasets`).
DIR/data.json (one record a line, image paths start with images/) and DIR/images/ appear when all is done.

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
`image_path`, `file_name`, or in messages: bytes, {"bytes", "path"}, base64, a data URL, or a path below
--images. An image in a message becomes `<image>` on a line of its own. File bytes stay as they are, and so
does a file's path, below DIR/images/. Another image of the same name gets a suffix; bytes that come without a
name (`path`, or `image_path` beside them) are named by their hash.

`id` is kept (or is the record's index in SOURCE), and so are `margin` and all other columns of JSON values.
What the trainer refuses, because it would be lost, makes a bad record: video, audio, tools, weights, masked
turns, ties, an image or a turn in another column. --drop leaves such columns out.
"""

import argparse
import base64
import contextlib
import csv
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
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402 (what the trainer reads, and what it refuses to lose)

CHATS = ("conversations", "messages")
PROMPTS = (*CHATS, "prompt", "question", "query", "instruction", "problem")
ANSWERS = ("answer", "response", "output", "completion", "solution")
IMAGES = ("image", "images", "img")
IMAGE_PATHS = ("image_path", "image_file", "image_name", "img_path", "file_name", "filename")
BESIDE = re.compile(  # what a question is asked with
    r"(\w+_)?(choice|option)(s|_\w|_list)?|op[a-h]|context|passage|document|hint|input|[A-H]")
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "llm": "gpt",
         "system": "system"}
LAYOUTS = ("conversations | messages, prompt | question + chosen + rejected, prompt | question + answer, "
           "image + caption, or another layout that --help lists")
TURN_FIELDS = ("from", "role", "value", "content", "preference_values")
FLAGS = ("loss", "weight", "train")  # of a record or a gpt turn: learn from it; human turns are never learnt
ANSWER_NAME = re.compile("answer|response|output|completion|solution|caption|chosen|rejected|label$")
BASE64 = ("data:", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how a data URL, JPEG, PNG, GIF and WebP begin
MESSAGES_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')  # the JSON text of messages
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FILES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
SHARD = re.compile(r"(.+)-\d+-of-\d+\.parquet")  # train-00000-of-00012.parquet, as the hub names them
REPORT_SECONDS = 10


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


def chat_turns(messages, name, images):
    """Messages in either spelling → turns; the images in them go to `images`."""
    need = 'a list of messages, {"from", "value"} or {"role", "content"}'
    need = need if name in CHATS else f"text, or {need}"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"got {name} {short(messages)}, need {need}: correct it")
    turns = []
    for message in messages:
        role = ROLES.get(first(message, "from", "role"))
        if role is None:
            raise ValueError(f"got {short(message)}, need a message by one of {', '.join(ROLES)}: correct it")
        data.check_fields({name: item for name, item in message.items() if not (
            name in FLAGS and (role != "gpt" or item == 1))}, TURN_FIELDS)
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
    for name, values in columns.items():
        values = values if isinstance(values, list) else [values]
        if BESIDE.fullmatch(name) and not all(isinstance(value, str) and value in prompt for value in values):
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


def read_turns(columns, record):
    """A record's filled columns in any layout → (turns, images in them). Takes out those that it read."""
    text, asked = columns.get("text"), bool(columns.keys() & {*PROMPTS})
    if not asked and (isinstance(text, dict) or re.match(r'\s*\{\s*"', str(text))):
        del columns["text"]
        columns.update(text if isinstance(text, dict) else parse_json(text, "text", "RLHF-V's fields"))
    if columns.keys() & {"output_1", "output_2"}:
        return read_outputs(columns)
    if columns.keys() >= {"chosen", "rejected"}:
        return read_preference(columns)
    if not columns.keys() & {"chosen", "rejected"}:  # else an answer would get lost
        if asked or columns.keys() >= {"question_id", "text"}:
            return read_question(columns, record)
        if columns.keys() & {"caption", "text"} and columns.keys() & {*IMAGES, *IMAGE_PATHS}:
            name, caption = take(columns, ("caption", "text"))
            return join(([{"from": "human", "value": "<image>"}], []), split_answer(caption, name))
        if isinstance(text, str):
            raise ValueError(f"got text {short(text)} alone, need an image, whose caption it is then, or a "
                             "prompt and an answer in columns of their own: add them")
    names = ", ".join(f"{key} (empty)" if empty(value) else key for key, value in record.items())
    raise ValueError(f"got the columns {names or '(none)'}, need {LAYOUTS}: rename them")


# ---- images: every kind of value becomes the bytes of an image file, and its name where it has one


def text_images(text, root):
    """A path below `root`, a data URL, base64, or paths joined by commas → [(bytes, name or None)]."""
    for name in (text, text.removeprefix("file://").replace("\\", "/")):
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
    where = "is a URL, not in" if "://" in text else "is not in" if inside else "lies outside"
    raise ValueError(f"got the image {short(text)}, which {where} {root}, need a file there: download it, or "
                     "give --images")


def image_files(value, root):
    """An image value of any kind, or a list of them → [(bytes, name or None)]."""
    if isinstance(value, list):
        return [image for v in value for image in image_files(v, root)]
    if isinstance(value, dict) and not empty(value.get("bytes")):
        return [(data, value.get("path") or name) for data, name in image_files(value["bytes"], root)]
    if isinstance(value, dict):
        value = first(value, "path", "url") or value
    if isinstance(value, str):
        return text_images(value, root)
    if isinstance(value, bytes):
        return [(value, None)]
    raise ValueError(f"got the image {short(value)}, need bytes, base64 or a path: correct it")


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


def image_name(content, name):
    """The name below images/ for an image file: its own without what would leave that folder, or its hash."""
    parts = re.split(r"[/\\]", name if isinstance(name, str) else "")
    if parts[0] == "" or re.match(r"[A-Za-z]:", parts[0]):  # an absolute path: that of another machine, maybe
        parts = [re.sub("^[A-Za-z]:", "", parts[-1])]
    parts = [re.sub(r'[\x00-\x1f<>:"|?*]', "_", part) for part in parts if part not in ("", ".", "..")]
    parts = parts[1:] if parts[0:1] == ["images"] else parts  # what this program wrote keeps its names
    parts[:-1] = [f"{part}_" if part.lower().endswith(SUFFIXES) else part for part in parts[:-1]]
    if not parts or max(len(part.encode()) for part in parts) > 200 or len(parts) > 8:
        parts = [hashlib.sha256(content).hexdigest()[:32]]
    if not parts[-1].lower().endswith(SUFFIXES):
        with contextlib.suppress(Exception):  # whatever a decoder raises: write_image says what is wrong
            with Image.open(io.BytesIO(content), formats=data.FORMATS) as image:
                parts[-1] += f".{image.format.lower()}".replace("jpeg", "jpg")
    return "/".join(parts)


def write_image(content, name, folder, written):
    """An image file → its path below `folder`; a file that is new there is decoded and noted in `written`."""
    path = folder / "images" / image_name(content, name)
    if path.exists() and path.read_bytes() != content:  # another image of this name
        path = path.with_stem(f"{path.stem}-{hashlib.sha256(content).hexdigest()[:12]}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append(path)
        path.write_bytes(content)
        if error := data.image_error(str(path)):
            error = error.replace(f"{folder}/", "")
            raise ValueError(f"got a bad image ({error}), need a complete one: replace it")
    return path.relative_to(folder).as_posix()


# ---- records


def as_json(name, value):
    """A column's value as JSON: a date becomes text, NaN null."""
    def as_text(item):
        if isinstance(item, bytes):
            raise ValueError(f"got {short(item)} in the column {name}, need images in `image`: --drop {name}")
        return str(item)
    return json.loads(json.dumps(value, default=as_text), parse_constant=lambda _: None)


def convert_record(record, index, folder, root, drop=()):
    """A record of any layout → ours as JSON; its images go into folder/images. Nothing of it stays there
    where ValueError says what is wrong, or what the trainer would not read."""
    if not isinstance(record, dict):
        raise ValueError(f"got {short(record)}, need an object with named fields: correct it")
    record = {name: value for name, value in record.items() if name not in drop}
    columns = {name: value for name, value in record.items() if not empty(value)}
    for name in columns.keys() & {*PROMPTS, *ANSWERS, "chosen", "rejected"}:
        if isinstance(columns[name], str) and (name in CHATS or MESSAGES_TEXT.match(columns[name])):
            columns[name] = parse_json(columns[name], name, "a list of messages")
    id = columns.pop("id", f"{index:09d}")
    turns, in_turns = read_turns(columns, record)
    _, system = take(columns, ("system", "system_prompt"))
    system = [] if system is None else [{"from": "system", "value": system}]
    turns = turns if turns[:1] == system else [*system, *turns]
    texts = turns[-1]["value"]
    if isinstance(texts, list) and len({text.strip() for text in texts}) < len(texts):
        raise ValueError(f"got equal answers {short(texts[0])}, need answers that differ: leave it out")
    if isinstance(columns.get("margin"), str):  # of CSV
        with contextlib.suppress(ValueError):
            columns["margin"] = float(columns["margin"])
    files, written = read_images(columns, in_turns, root), []
    others = {name: value if name == "margin" else as_json(name, value) for name, value in columns.items()
              if name and not (name in FLAGS and value == 1)}  # "": an index that pandas wrote
    try:
        names = [write_image(*file, folder, written) for file in files]
        image = {} if not names else {"image": names[0] if len(names) == 1 else names}
        ours = {"id": id, **image, "conversations": turns, **others}
        data.read_record(ours, str(folder), need_answers=0)
        return json.dumps(ours, ensure_ascii=False).encode()  # UnicodeEncodeError too
    except ValueError:
        for path in written:
            path.unlink()
        raise


# ---- sources: records, and the folder that image paths count from


def text_records(path):
    """The records of a file of JSON, or of CSV or TSV with a header line, whatever it is called."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = next(filter(str.strip, file), "[").strip()
    if start.startswith(("[", "{")):
        return data.load_records(str(path))
    separator = max("\t,;", key=start.count)
    if "\0" in start or separator not in start and path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"got {path}, which begins with {short(start)}, need a JSON list, one JSON object a "
                         "line, or CSV with a header line, all of it UTF-8: convert it")
    return table_records(path, separator)


def table_records(path, separator):
    """The records of a table; a ValueError in place of one that is bad."""
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


def parquet_records(files):
    """The records of parquet files; an image comes as {"bytes", "path"}."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("got parquet, need pyarrow to read it: run pip install pyarrow") from None
    batches = (batch for file in files for batch in parquet.ParquetFile(file).iter_batches(batch_size=64))
    return (record for batch in batches for record in batch.to_pylist())


def hub_records(name, split, limit):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"got {name!r}, need datasets for it: run pip install datasets") from None
    try:  # a few records do not need the full download
        loaded = datasets.load_dataset(name, split=split, streaming=limit is not None)
    except (OSError, ValueError) as error:
        raise ValueError(f"got {name!r}, split {split!r}, need a hub data set ({error}): check") from None
    tables = loaded.with_format("arrow").iter(batch_size=64)  # in Arrow, images are not decoded
    return (record for table in tables for record in table.to_pylist()), datasets.config.HF_CACHE_HOME


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
        return parquet_records(shards(path, split)), path
    if path.is_file():
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1" or path.suffix == ".parquet"
        return parquet_records([path]) if parquet else text_records(path), path.parent
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in FILES:
        return hub_records(source, split, limit)
    raise ValueError(f"got {source!r}, need a file ({', '.join(FILES)}, …), folder or hub id: check it")


# ---- the command


def convert_records(source, records, staging, root, skip_bad_rows, drop):
    """Records → staging/data.json and staging/images; returns how many were written and skipped."""
    written = skipped = 0
    start = reported = time.monotonic()
    with (staging / "data.json").open("wb") as file:
        for index, record in enumerate(records):
            try:
                if isinstance(record, ValueError):  # of a table
                    raise record
                line = convert_record(record, index, staging, root, drop)
                file.write((b",\n" if written else b"[\n") + line)
                written += 1
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeError):
                    error = "got text that is not UTF-8, need UTF-8: save it in that encoding"
                own_id = f" (id {short(record['id'])})" if isinstance(record, dict) and "id" in record else ""
                message = f"{source}: record {index}{own_id}: {error}"
                message = message.replace(data.CONVERT, "--drop leaves columns out")
                if not skip_bad_rows:
                    raise ValueError(f"{message}; --skip_bad_rows leaves such records out") from None
                skipped += 1
                print(f"skipped {message}", file=sys.stderr)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                rate = (index + 1) / (reported - start)
                print(f"{index + 1:,} records, {rate:,.0f} records/s", file=sys.stderr, flush=True)
        file.write(b"\n]\n")
    return written, skipped


def convert(source, out, split="train", images=None, drop=(), limit=None, skip_bad_rows=False,
            overwrite=False):
    """SOURCE → OUT/data.json and OUT/images; returns the numbers of records written and skipped. All is
    created beside OUT and moved there at the end, data.json last: an error leaves OUT as it was."""
    out = Path(out).absolute()
    if (out / "data.json").exists() and not overwrite:
        raise ValueError(f"got --out {out}, which holds a data.json, need a new one: name it, or --overwrite")
    records, root = source_records(source, split, limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        staging = Path(name)
        written, skipped = convert_records(
            source, itertools.islice(records, limit), staging, images or root, skip_bad_rows, drop)
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
