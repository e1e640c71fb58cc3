"""Turn other data layouts into this project's own: one JSON list of rows, and a folder of pictures beside it.

    python examples/convert.py SOURCE --out DIR [--split train] [--images DIR] [--limit N] [--skip_bad_rows]
    python examples/convert.py openbmb/RLHF-V-Dataset --out data/rlhfv

SOURCE is a .json, .jsonl or .parquet file (`pip install pyarrow`), a folder of parquet files, or a hub data
set id (`pip install datasets`). DIR/data.json (one row a line) and DIR/images/ appear when all rows are done.

Layouts, told apart row by row from the columns that are not null:
  conversations     ours and LLaVA's: [{"from": "human" | "gpt", "value": ...}], also as a JSON string. The
                    last gpt turn may list answers, best first: as `value`, or as `preference_values` (that is
                    vision-feedback-mix-binarized: id, image, image_path, and conversations as a string)
  messages          chat: [{"role", "content"}]; content is a string, or parts: text, image or image_url
  chosen, rejected  after a prompt, a string or a chat: `prompt`, `question` (RLAIF-V), `messages` or
                    `conversations`. An answer is a string, a message, or a list of one message (TRL);
                    `rejected` may also list several answers, best first
  text              RLHF-V: a JSON string (or an object) with question, chosen and rejected

Pictures stand in `image`, `images` or `image_path`, or in messages: bytes, {"bytes", "path"}, base64, a data
URL, a PIL image, or a path below --images. File bytes stay as they are (a PIL image becomes a PNG) and are
named by their hash, so a picture of many rows is stored once. A picture in a message becomes `<image>` on a
line of its own. A system turn may lead. `id` is kept, or else is the row's index in SOURCE; `label` is kept;
other columns are dropped.
"""

import argparse
import base64
import datetime
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps

LAYOUTS = "conversations, messages, prompt|question + chosen + rejected, text {question, chosen, rejected}"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
BASE64 = ("data:", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how a data URL, JPEG, PNG, GIF and WebP begin
SHARD = re.compile(r"(.+)-\d+-of-\d+\.parquet")  # train-00000-of-00012.parquet, as the hub names them
REPORT_SECONDS = 10


def short(value):
    """How an error shows a value that may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first(row, *keys):
    """The first of these fields that is not null, else None."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def parse_json(text, name):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"got {name} {short(text)}, need JSON ({error}): correct it") from None


# ---- text: every layout becomes turns [{"from", "value"}] and the pictures that stood in them


def message_text(content, role, pictures):
    """A message's content as one string; a picture in it goes to `pictures` and leaves `<image>` behind."""
    if isinstance(content, str):
        return content
    lines = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind in ("image", "image_url") and role == "human":
            lines.append("<image>")
            picture = first(part, "image", "image_url", "url", "path")
            pictures += [] if picture is None else [picture]  # none: it stands in the row's image column
        else:
            raise ValueError(f"got {short(part)} in a {role} turn, need text, or a human's image: correct it")
    return "\n".join(lines)


def chat_turns(messages):
    """Messages in either spelling → (turns, pictures)."""
    messages = parse_json(messages, "the conversation") if isinstance(messages, str) else messages
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"got the conversation {short(messages)}, need a list of messages: correct it")
    turns, pictures = [], []
    for message in messages:
        role = ROLES.get(first(message, "from", "role"))
        if role is None:
            raise ValueError(f"got {short(message)}, need a message by one of {', '.join(ROLES)}: correct it")
        value = first(message, "preference_values", "value", "content")
        if not (role == "gpt" and isinstance(value, list) and all(isinstance(v, str) for v in value)):
            value = message_text(value, role, pictures)
        turns.append({"from": role, "value": value})
    return turns, pictures


def answer_texts(value):
    """`chosen` or `rejected` → the answers in it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and not all(isinstance(v, dict) for v in value):
        return [text for v in value for text in answer_texts(v)]
    turns, _ = chat_turns([value] if isinstance(value, dict) else value)
    if [turn["from"] for turn in turns] != ["gpt"]:
        raise ValueError(f"got the answer {short(value)}, need one message by the assistant: split it")
    return [turns[0]["value"]]


def read_turns(row):
    """A row of any known layout → (turns, pictures that stood in them); ranked answers are a list."""
    filled = {key for key, value in row.items() if value is not None}
    chat = first(row, "messages", "conversations")
    if {"chosen", "rejected"} <= filled and filled & {"prompt", "question", "messages", "conversations"}:
        prompt = first(row, "prompt", "question")
        prompt = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt
        turns, pictures = chat_turns(chat if prompt is None else prompt)
        answers = answer_texts(row["chosen"]) + answer_texts(row["rejected"])
        return [*turns, {"from": "gpt", "value": answers}], pictures
    if not any(key.startswith(("chosen", "rejected")) for key in filled):  # else answers would get lost
        if chat is not None:
            return chat_turns(chat)
        fields = parse_json(row["text"], "text") if isinstance(row.get("text"), str) else row.get("text")
        if isinstance(fields, dict) and {"question", "chosen", "rejected"} <= fields.keys():
            return read_turns({key: fields[key] for key in ("question", "chosen", "rejected")})
    keys = ", ".join(key if key in filled else f"{key} (null)" for key in row)
    raise ValueError(f"got the columns {keys or '(none)'}, need one of {LAYOUTS}: rename them")


def check_turns(turns, pictures):
    """Human and gpt alternate, no text is empty, answers differ, each placeholder has a picture."""
    body = turns[1:] if turns and turns[0]["from"] == "system" else turns
    if not body:
        raise ValueError("got a conversation without turns, need a human one at least: correct it")
    for number, turn in enumerate(body, 1):
        role, value = turn["from"], turn["value"]
        if role != ("gpt", "human")[number % 2]:
            raise ValueError(f"got a {role} turn as turn {number}, need human and gpt in turn: correct it")
        if isinstance(value, list) and number < len(body):
            raise ValueError(f"got a list of answers in turn {number}, need it in the last turn: move it")
        texts = [text.strip() for text in (value if isinstance(value, list) else [value])]
        if not texts or not all(texts):
            raise ValueError(f"got an empty text in turn {number} ({role}), need words: correct it")
        if len(set(texts)) < len(texts):
            raise ValueError(f"got equal answers {short(texts[0])}, need answers that differ: remove the row")
    holders = sum(turn["value"].count("<image>") for turn in turns if turn["from"] == "human")
    if holders > len(pictures):
        raise ValueError(f"got {holders} <image> for {len(pictures)} pictures, need one for each: correct it")


# ---- pictures: every kind of value becomes the bytes of a picture file


def text_pictures(text, root):
    """A path below `root`, a data URL, base64, or paths joined by commas → the bytes of each picture."""
    path = Path(os.path.abspath(os.path.join(root, text)))  # not resolved: links in it may lead out
    inside = path.is_relative_to(os.path.abspath(root))
    if inside and os.path.isfile(path):
        return [path.read_bytes()]
    if text.startswith(BASE64):
        return [base64.b64decode(text.rpartition(",")[2])]
    if "," in text:
        return [data for name in text.split(",") for data in text_pictures(name.strip(), root)]
    where = "is not in" if inside else "lies outside"
    raise ValueError(f"got the picture {short(text)}, which {where} {root}, need a file there: give --images")


def picture_bytes(value, root):
    """A picture value of any kind, or a list of them → the bytes of each picture."""
    if isinstance(value, list):
        return [data for v in value for data in picture_bytes(v, root)]
    if isinstance(value, dict):
        value = first(value, "bytes", "path", "url")
    if isinstance(value, str):
        return text_pictures(value, root)
    if isinstance(value, Image.Image):
        image, buffer = ImageOps.exif_transpose(value), io.BytesIO()
        image = image if image.mode in ("1", "L", "LA", "I;16", "P", "RGBA") else image.convert("RGB")
        image.save(buffer, "PNG")
        return [buffer.getvalue()]
    if isinstance(value, bytes):
        return [value]
    raise ValueError(f"got the picture {short(value)}, need bytes, base64, a path or a PIL image: correct it")


def picture_name(data, folder):
    """A picture's file name: its hash and format. One new to `folder` is decoded, to see that it is whole."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            name = f"{hashlib.sha256(data).hexdigest()[:32]}.{image.format.lower().replace('jpeg', 'jpg')}"
            if not (folder / name).exists():
                image.draft("RGB", (1, 1))  # a JPEG decodes at an eighth of its size, which is quicker
                image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"got a bad picture ({error}), need a whole one: replace it") from None
    return name


def convert_row(row, index, folder, root):
    """A row of any layout → ours; its pictures go into `folder`, none of them if it raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"got {short(row)}, need an object with named fields: correct it")
    turns, found = read_turns(row)
    column = next((row[key] for key in ("image", "images", "image_path") if row.get(key)), [])
    if found and column:
        raise ValueError("got pictures both in messages and in a column, need one of the two: drop the other")
    pictures = picture_bytes(found or column, root)
    check_turns(turns, pictures)
    names = [picture_name(data, folder) for data in pictures]
    for name, data in zip(names, pictures, strict=True):
        (folder / name).write_bytes(data)
    converted = {
        "id": row["id"] if isinstance(row.get("id"), (str, int)) else f"{index:09d}",
        "image": names[0] if len(names) == 1 else names or None,
        "conversations": turns,
        "label": row["label"] if isinstance(row.get("label"), (str, int)) else None,
    }
    return {key: value for key, value in converted.items() if value is not None}


# ---- sources: (number of rows or None, rows, folder that picture paths count from)


def json_lines(path):
    with path.open("rb") as lines:
        yield from (line for line in lines if line.strip())


def parquet_rows(files):
    """→ (number of rows, rows); a picture comes as {"bytes", "path"}."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("got parquet, need pyarrow to read it: run pip install pyarrow") from None
    total = sum(parquet.read_metadata(file).num_rows for file in files)
    batches = (batch for file in files for batch in parquet.ParquetFile(file).iter_batches(batch_size=64))
    return total, (row for batch in batches for row in batch.to_pylist())


def hub_rows(name, split, limit):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"got {name!r}, need datasets for it: run pip install datasets") from None
    streaming = limit is not None  # a few rows do not need the whole download
    try:
        data = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"got {name!r}, split {split!r}, need a hub data set ({error}): check") from None
    tables = data.with_format("arrow").iter(batch_size=64)  # in Arrow, pictures are not decoded
    rows = (row for table in tables for row in table.to_pylist())
    return None if streaming else len(data), rows, datasets.config.HF_CACHE_HOME


def shards(folder, split):
    """The parquet files of a folder; those of one split where the files are named by split."""
    files = {file: SHARD.fullmatch(file.name) for file in sorted(folder.rglob("*.parquet"))}
    splits = sorted({match[1] for match in files.values() if match})
    wanted = [file for file, match in files.items() if not splits or match and match[1] == split]
    if not wanted:
        held = f"splits {', '.join(splits)}" if splits else "no parquet file"
        raise ValueError(f"got {folder} with {held}, need parquet of split {split!r}: check --split")
    return wanted


def source_rows(source, split, limit):
    path = Path(source)
    if path.is_dir():
        return *parquet_rows(shards(path, split)), path
    known = path.suffix in (".json", ".jsonl", ".parquet")
    if not known and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return hub_rows(source, split, limit)
    if not known or not path.is_file():
        raise ValueError(f"got {source!r}, need a .json, .jsonl, .parquet, folder or hub id: check it")
    if path.suffix == ".parquet":
        return *parquet_rows([path]), path.parent
    if path.suffix == ".jsonl":
        return sum(1 for _ in json_lines(path)), json_lines(path), path.parent
    rows = parse_json(path.read_bytes(), source)
    if not isinstance(rows, list):
        raise ValueError(f"got {source} with {short(rows)}, need a JSON list of rows: put them into a list")
    return len(rows), rows, path.parent


# ---- the command


def progress(done, total, seconds):
    """"1,200 of 4,800 rows, 300 rows/s, 0:00:12 left"; no time left where the total is unknown."""
    rate = done / seconds
    if total is None:
        return f"{done:,} rows, {rate:,.0f} rows/s"
    left = datetime.timedelta(seconds=round((total - done) / rate))
    return f"{done:,} of {total:,} rows, {rate:,.0f} rows/s, {left} left"


def convert_rows(source, rows, total, staging, root, skip_bad_rows):
    """Rows → staging/data.json and staging/images; returns the numbers of rows written and skipped."""
    written, skipped = 0, 0
    start = reported = time.monotonic()
    (staging / "images").mkdir()
    with (staging / "data.json").open("wb") as file:
        for index, row in enumerate(rows):
            try:
                row = parse_json(row, "the line") if isinstance(row, bytes) else row
                line = json.dumps(convert_row(row, index, staging / "images", root), ensure_ascii=False)
                file.write((b",\n" if written else b"[\n") + line.encode())
                written += 1
            except ValueError as error:
                own_id = f" (id {row['id']!r})" if isinstance(row, dict) and "id" in row else ""
                message = f"{source}: row {index}{own_id}: {error}"
                if not skip_bad_rows:
                    raise ValueError(f"{message}, or leave such rows out by --skip_bad_rows") from None
                skipped += 1
                print(f"skipped {message}", file=sys.stderr)
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                print(progress(index + 1, total, reported - start), file=sys.stderr, flush=True)
        file.write(b"\n]\n")
    return written, skipped


def convert(source, out, split="train", images=None, limit=None, skip_bad_rows=False, overwrite=False):
    """SOURCE → OUT/data.json and OUT/images; returns the numbers of rows written and skipped.

    All is made beside OUT and moved there at the end, data.json last: an error leaves OUT as it was.
    """
    out = Path(out).absolute()
    if (out / "data.json").exists() and not overwrite:
        raise ValueError(f"got --out {out}, which holds a data.json, need a new one: name it, or --overwrite")
    total, rows, root = source_rows(source, split, limit)
    total = total if None in (total, limit) else min(total, limit)
    rows = itertools.islice(rows, limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        staging = Path(name)
        written, skipped = convert_rows(source, rows, total, staging, images or root, skip_bad_rows)
        if not written:
            raise ValueError(f"got no row from {source}, {skipped} bad ones, need one at least: correct them")
        (out / "images").mkdir(parents=True, exist_ok=True)
        for picture in (staging / "images").iterdir():
            os.replace(picture, out / "images" / picture.name)
        os.replace(staging / "data.json", out / "data.json")
    return written, skipped


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", help="file, folder of parquet files, or hub data set id")
    parser.add_argument("--out", required=True, help="folder to write data.json and images/ into")
    parser.add_argument("--split", default="train", help="split of a hub data set, or of a folder of shards")
    parser.add_argument("--images", help="folder that picture paths count from (default: SOURCE's own)")
    parser.add_argument("--limit", type=int, help="read this many rows at most")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave bad rows out and count them")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR/data.json; old pictures stay")
    args = parser.parse_args()
    try:
        written, skipped = convert(**vars(args))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {written:,} rows to {Path(args.out, 'data.json')}, skipped {skipped:,} bad rows")


if __name__ == "__main__":
    main()
