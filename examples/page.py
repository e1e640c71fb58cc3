#!/usr/bin/env python3
"""Answers beside their pictures: one self-contained HTML page to look through, to mail, to keep with a run.

    python examples/page.py sft.jsonl dpo.jsonl --images DIR --out page.html

Reads JSON lines as predict.py writes them: {"id", "image", "prompt", "answer", "label"?, "answers"?}. Several
files are joined by id and stand side by side; a row that one of them lacks is shown as a gap. Where a row has
a label, an answer is right if it equals the label (space around it aside); words it has too much are marked,
words it lacks are shown struck out. The figures at the top count every row, whatever --limit shows. Pictures
are at most 336 pixels a side, and one that several rows show is embedded once. The page works from file://
without a network, on a phone and in the dark. Needs Pillow, nothing else.
"""

import argparse
import base64
import io
import json
import os
import re
import sys
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

SIDE = 336  # longest side of an embedded picture, pixels
ENLARGED = 224  # smaller pictures are drawn enlarged by a whole factor, to this side at most

CSS = """
:root { color-scheme: light dark; --paper: #f5f4f0; --card: #fff; --ink: #1f2328; --dim: #5b636e;
  --line: #d8d6cf; --right: #0a6b57; --wrong: #b0320b; --mark: #ffdfb0; --link: #1d5fa8; }
@media (prefers-color-scheme: dark) { :root { --paper: #13161a; --card: #1c2025; --ink: #e6e8ea;
  --dim: #9ba5b0; --line: #353b43; --right: #5fd0b4; --wrong: #ff9b73; --mark: #633f10; --link: #8cbcf2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { margin: 0 0 .75rem; font-size: 1.4rem; } h2, h3 { margin: 0; font-size: .85rem; } p { margin: .5rem 0; }
p:first-child { margin-top: 0; }
a { color: var(--link); } small, summary, output, :disabled + span { color: var(--dim); font-size: .85rem; }
table { border-collapse: collapse; text-align: left; }
th, td { padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, td + td { overflow-wrap: normal; } td:first-child { min-width: 6rem; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem;
  align-items: center; padding: .6rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
input[type=search] { flex: 1 1 10rem; max-width: 24rem; padding: .35rem .6rem; font: inherit; }
article { display: grid; grid-template-columns: min(var(--pictures), 40%) minmax(0, 1fr); gap: .5rem 1.25rem;
  margin: 1rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  scroll-margin-top: 4rem; }
article[hidden] { display: none; } h2 { grid-column: 1 / -1; } figure { margin: 0 0 .6rem; }
img { display: block; max-width: 100%; height: auto; } .tiny { image-rendering: pixelated; }
.text { white-space: pre-wrap; }
.answers { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); }
section { padding: .6rem .8rem; border: 1px solid var(--line); border-left: 4px solid var(--dim); }
section.right { border-left-color: var(--right); } section.wrong { border-left-color: var(--wrong); }
section.gap { border-style: dashed; } ol { margin: .3rem 0 0; padding-left: 1.6rem; }
b { white-space: nowrap; } b.right { color: var(--right); } b.wrong { color: var(--wrong); }
mark { color: var(--ink); background: var(--mark); }
del::before { content: attr(data-missing); color: var(--wrong); }
@media (max-width: 44rem) { article { grid-template-columns: minmax(0, 1fr); } form { position: static; } }
"""

SCRIPT = """
for (const img of document.querySelectorAll("[data-same]"))
  img.src = document.getElementById(img.dataset.same).src;
const form = document.forms[0], rows = [...document.querySelectorAll("article")];
const texts = rows.map(row => row.textContent.toLowerCase());
function update() {
  const show = form.elements.show.value, words = form.elements.find.value.toLowerCase().split(" ");
  const fits = (row, i) => show in row.dataset && words.every(word => texts[i].includes(word));
  rows.forEach((row, i) => row.hidden = !fits(row, i));
  form.querySelector("output").value = `${rows.filter(fits).length} of ${rows.length} rows shown`;
}
form.addEventListener("input", update);
form.addEventListener("submit", event => event.preventDefault());
update();
"""


def read_answers(path):
    """{id: row} of one JSON-lines file, in the file's order; ValueError names the line or the id."""
    if not path.is_file():
        raise ValueError(f"got {path}, which is no file, need JSON lines, write them with predict.py --out")
    rows = {}
    with path.open("rb") as lines:  # bytes: a line ends at \n alone, whatever separators stand in the text
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number} of {path}: got"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} {error}, need a JSON object, repair it") from error
            if not is_complete(row):
                raise ValueError(f'{where} {str(row)[:80]}, need {{"id", "image", "prompt", "answer"}} as '
                                 "predict.py writes them, repair or remove the line")
            key = str(row["id"])
            if key in rows:
                raise ValueError(f"{where} id {key} a second time, need each id once, rename or remove one")
            if "answer" in row:  # null (a prompt too long): no words, and wrong where there is a label
                row["answer"] = row["answer"] or ""
            rows[key] = row
    return rows


def is_complete(row):
    """Whether a row can be shown: it has an id, a prompt, an answer or several, and says which pictures."""
    samples = isinstance(row, dict) and row.get("answers") or []
    return (isinstance(row, dict) and row.get("id") is not None and isinstance(row.get("prompt"), str)
            and isinstance(row.get("image"), str | list | None) and isinstance(samples, list)
            and all(isinstance(sample, dict) and "text" in sample for sample in samples)
            and isinstance(row.get("answer"), str | None) and ("answer" in row or "answers" in row))


def join(files):
    """[(id, label or None, [row or None per file])], ordered by the first file that has the id."""
    joined = []
    for key in dict.fromkeys(key for rows in files for key in rows):
        rows = [rows.get(key) for rows in files]
        images = [row.get("image") for row in rows if row]
        labels = [str(row["label"]) for row in rows if row and row.get("label") is not None]
        for values in images, labels:
            if any(value != values[0] for value in values):
                raise ValueError(f"id {key}: got {values}, need the same picture and label in every file, "
                                 "compare answers to the same data")
        joined.append((key, labels[0] if labels else None, rows))
    return joined


def picture_files(key, row, root):
    """[(name, path)] of a row's pictures: one, a list, or comma-joined if no file has the whole name."""
    names = row.get("image") or []
    if isinstance(names, str):
        names = [names] if os.path.isfile(root / names) else [name.strip() for name in names.split(",")]
    paths = [Path(os.path.abspath(root / name)) for name in names]
    for path in paths:
        if not path.is_relative_to(os.path.abspath(root)) or not os.path.isfile(path):
            raise ValueError(f"id {key}: got picture {path}, need a file inside {root}, set --images "
                             "to the folder of the pictures")
    return list(zip(names, paths, strict=True))


def data_url(key, path):
    """(data URL, width, height) of a picture as the model gets it, upright and RGB, scaled down to SIDE."""
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: convert("RGB") alone would clip them to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"id {key}: got picture {path} ({error}), need a sound one, replace it") from error
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kind = "png" if 2 * max(image.size) <= ENLARGED else "jpeg"  # what is drawn enlarged is kept exactly
    file = io.BytesIO()
    image.save(file, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", *image.size


def figures(key, row, root, embedded):
    """A row's pictures as HTML. `embedded` maps path → (id of its first element, drawn size, class)."""
    html = []
    for name, path in picture_files(key, row, root):
        if path in embedded:
            source = f'data-same="{embedded[path][0]}"'
        else:
            url, width, height = data_url(key, path)
            times = max(1, ENLARGED // max(width, height))
            tiny = ' class="tiny"' if times > 1 else ""
            embedded[path] = f"p{len(embedded)}", width * times, height * times, tiny
            source = f'id="{embedded[path][0]}" src="{url}"'
        _, width, height, tiny = embedded[path]
        html.append(f'<figure><img {source} width="{width}" height="{height}" alt="{escape(name)}"{tiny}>'
                    f"<figcaption><small>{escape(name)}</small></figcaption></figure>")
    return "".join(html) or "<small>no picture</small>"


def shared_beginning(prompts):
    """What all prompts start with, such as a system prompt, up to a colon or a line's end."""
    start = os.path.commonprefix(prompts).split("<image>")[0]
    start = start[: max(start.rfind(": ") + 2, start.rfind("\n") + 1)]
    return start if len(start) > 40 and start not in prompts else ""  # no prompt is left empty


def verdict(answer, label):
    return "" if None in (answer, label) else "right" if answer.strip() == label.strip() else "wrong"


def answer_html(answer, label):
    """The answer and its verdict; where most of it agrees with the label, words that differ are marked."""
    words, wanted = (re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text) for text in (answer, label or ""))
    matcher = SequenceMatcher(None, words, wanted, autojunk=False)
    html = []
    for kind, a, b, c, d in matcher.get_opcodes() if label and matcher.ratio() > 0.5 else []:
        text, missing = escape("".join(words[a:b])), escape("".join(wanted[c:d]))
        html.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
        if kind in ("insert", "replace"):  # drawn by CSS: copying and searching see the answer alone
            html.append(f'<del data-missing="{missing}"></del>')
    text = "".join(html) or (escape(answer) if answer.strip() else "<small>(no answer)</small>")
    kind = verdict(answer, label)
    sign = {"right": "✓ right", "wrong": "✗ wrong", "": ""}[kind]
    return f'<span class="text" dir="auto">{text}</span> <b class="{kind}">{sign}</b>'


def cell(name, row, label, prompt):
    """One file's answer to one row, and its samples."""
    if row is None:
        return f'<section class="gap"><h3>{escape(name)}</h3><small>no such row here</small></section>'
    answer, samples = row.get("answer"), row.get("answers") or []
    html = [f'<section class="{verdict(answer, label)}"><h3>{escape(name)}</h3>']
    if row["prompt"] != prompt:
        html.append('<details><summary>its own prompt</summary>'
                    f'<p class="text">{escape(row["prompt"])}</p></details>')
    if answer is not None:
        html.append(f"<p>{answer_html(answer, label)}</p>")
    if samples:
        right = sum(verdict(sample["text"], label) == "right" for sample in samples)
        count = f"{len(samples)} answers" + (f", {right} right" if label else "")
        html.append(f"<details{'' if answer else ' open'}><summary>{count}</summary><ol>")
        for sample in samples:
            numbers = [f"{what} {sample[what]:.5g}" for what in ("logprob", "reward", "tokens")
                       if isinstance(sample.get(what), int | float)]
            html.append(f"<li>{answer_html(sample['text'], label)} <small>{' · '.join(numbers)}</small>")
        html.append("</ol></details>")
    return "".join(html) + "</section>"


def article(number, key, label, rows, names, pictures, shared):
    """One row as HTML, with the filters it passes as data-all, data-wrong and data-differ."""
    prompt = next(row["prompt"] for row in rows if row)
    answers = [row["answer"].strip() for row in rows if row and row.get("answer") is not None]
    wrong = " data-wrong" if "wrong" in [verdict(answer, label) for answer in answers] else ""
    differ = " data-differ" if len(set(answers)) > 1 else ""
    cells = "".join(cell(name, row, label, prompt) for name, row in zip(names, rows, strict=True))
    return (f'<article id="r{number}" data-all{wrong}{differ}><h2><a href="#r{number}">{escape(key)}</a></h2>'
            f'<div>{pictures}</div><div><p class="text" dir="auto">{"… " if shared else ""}'
            f"{escape(prompt.removeprefix(shared))}</p>"
            + (f'<p class="text" dir="auto"><small>label</small> {escape(label)}</p>' if label else "")
            + f'<div class="answers">{cells}</div></div></article>\n')


def summary(names, joined):
    """Table of the files over all their rows: number, exact match where there are labels, mean length."""
    html = ["<table><tr><th>file<th>rows<th>exact match<th>mean words"]
    for column, name in enumerate(names):
        rows = [(row.get("answer"), label) for _, label, columns in joined if (row := columns[column])]
        judged = [verdict(*row) == "right" for row in rows if verdict(*row)]
        lengths = [len(answer.split()) for answer, _ in rows if answer is not None]
        exact = f"{sum(judged)} of {len(judged)} ({sum(judged) / len(judged):.1%})" if judged else "no labels"
        mean = f"{sum(lengths) / len(lengths):.1f}" if lengths else "no answers"
        html.append(f"<tr><td>{escape(name)}<td>{len(rows)}<td>{exact}<td>{mean}")
    return "".join(html) + "</table>"


def page(title, names, files, root, limit):
    """The whole page as text, with its first `limit` rows (0: all)."""
    joined, embedded = join(files), {}
    shown = joined[: limit or None]
    shared = shared_beginning([row["prompt"] for _, _, rows in shown for row in rows if row])
    articles = []
    for number, (key, label, rows) in enumerate(shown):
        pictures = figures(key, next(row for row in rows if row), root, embedded)
        articles.append(article(number, key, label, rows, names, pictures, shared))
    filters = ""
    for value, words in ("all", "all"), ("wrong", "wrong"), ("differ", "files disagree"):
        count = sum(f" data-{value}" in html[: html.index(">")] for html in articles)
        state = "checked" if value == "all" else "" if count else "disabled"
        filters += (f'<label><input type="radio" name="show" value="{value}" {state}> '
                    f"<span>{words} ({count})</span></label>")
    notes = f"<p>Rows: the first {len(shown)} of {len(joined)}.</p>" if len(shown) < len(joined) else ""
    if any("<mark>" in html or "<del " in html for html in articles):
        notes += ("<p><small>In answers: <mark>words the label lacks</mark> "
                  '<del data-missing="words it has in their place"></del></small></p>')
    if shared:
        notes += ("<details><summary>All prompts begin alike</summary>"
                  f'<p class="text">{escape(shared)}…</p></details>')
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    widest = max([96, *(width for _, width, *_ in embedded.values())])
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>{CSS}:root {{ --pictures: {widest}px; }}</style></head>
<body><h1>{escape(title)}</h1>{summary(names, joined)}{notes}
<form>{filters}<input type="search" name="find" aria-label="find words" placeholder="find words">
<output></output></form>
{"".join(articles)}<script>{SCRIPT}</script></body></html>
"""


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("answers", nargs="+", type=Path, help="files by predict.py; several are compared")
    parser.add_argument("--images", type=Path, default=Path("."), help="folder that picture paths start from")
    parser.add_argument("--out", type=Path, required=True, help="the page to write, NAME.html")
    parser.add_argument("--limit", type=int, default=500, help="rows to show, the first ones; 0 for all")
    parser.add_argument("--title", help="heading (default: the files' names)")
    args = parser.parse_args()
    if args.limit < 0:
        raise ValueError(f"got --limit {args.limit}, need rows to show, or 0 for all, set --limit")
    if args.out.suffix not in (".html", ".htm"):  # a slip here must not replace a file of answers
        raise ValueError(f"got --out {args.out}, need a name that ends in .html, set --out")
    files = [read_answers(path) for path in args.answers]
    names = [path.name for path in args.answers]
    if len(set(names)) < len(names):
        names = [str(path) for path in args.answers]
    text = page(args.title or " · ".join(names), names, files, args.images, args.limit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    try:  # written beside and renamed: nobody reads half a page
        part.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")  # JSON can hold lone surrogates
        os.replace(part, args.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"{args.out}: {text.count('<article id=')} rows, {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"page.py: {error}")
