#!/usr/bin/env python3
"""Answers beside their images, and training curves, as one HTML page to browse, mail and keep with a run.

    python examples/page.py SFT=sft.jsonl DPO=dpo.jsonl --images DIR --logs DPO=dpo/log.jsonl --out page.html

Answers are JSON lines of predict.py: {"id", "image", "prompt", "answer", "label"?, "answers"?}. Several files
are joined by id and stand side by side; a record that one of them lacks is a gap. An answer is right if it
equals the record's label, apart from space around it; otherwise the words that the label lacks are marked,
and the label's own words are shown struck through. The table counts every record, whatever --limit shows.

Logs are JSON lines, with a "step" or one line per step: a run's log.jsonl, or any other. Each metric has a
chart, each log a line, and two logs of the same NAME share one. A line has at most 60 points, each the mean
of equally many steps.

The page works from file:// without a network, on a phone, in light and dark. It needs Pillow, nothing else.
"""

import argparse
import base64
import io
import json
import math
import os
import re
from difflib import SequenceMatcher
from html import escape
from pathlib import Path

from PIL import Image, ImageOps

SIDE = 336  # longest side of an embedded image, pixels
EXACT = 96  # images up to this side are embedded without loss and shown enlarged, pixel by pixel
POINTS = 60  # of a line in a chart
CURVES = {  # metrics in logs: the titles of their charts
    "loss": "loss", "accuracy": "reward model: pairs in the right order", "margin": "reward model: margin",
    "rewards/accuracies": "DPO: pairs in the right order", "rewards/margins": "DPO: margin of the rewards",
    "objective/scores": "score by the reward model", "objective/kl": "KL to the reference, nats per answer",
    "chair_s": "CHAIR-s: answers with a hallucination", "coverage": "coverage: objects that answers name"}
COLUMNS = {"chair_s": "CHAIR-s", "chair_i": "CHAIR-i", "coverage": "coverage", "well_formed": "well-formed"}
THEME = """
:root { color-scheme: light dark; --paper: light-dark(#f5f4f0, #13161a); --card: light-dark(#fff, #1c2025);
  --ink: light-dark(#1f2328, #e6e8ea); --dim: light-dark(#5b636e, #9ba5b0); --mark: light-dark(#fdb, #631);
  --right: light-dark(#0a6b57, #5fd0b4); --wrong: light-dark(#b31, #f97); --edge: light-dark(#ddd, #353b43);
  --c0: light-dark(#0068b5, #58aef5); --c1: light-dark(#c84e00, #f93); --c2: light-dark(#008060, #3fc79f);
  --c3: light-dark(#a8488f, #e38fce); --c4: light-dark(#8a6d00, #db4); --c5: light-dark(#5f5fc4, #a5a5ff) }
text { font: 12px system-ui, sans-serif; fill: var(--dim) } .title { font-weight: 600; fill: var(--ink) }
line { stroke: var(--edge) } polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
"""
CSS = """
* { box-sizing: border-box } body { margin: auto; max-width: 88rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
table { display: block; overflow-x: auto; border-spacing: 0; text-align: left; white-space: nowrap }
th, td { padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid var(--edge) } small { color: var(--dim) }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
svg { width: 100%; height: auto } svg, article { background: var(--card); border: 1px solid var(--edge) }
article { display: flex; flex-flow: wrap; gap: 1em; padding: 1em; margin: 1em 0 } div+div { flex: 18em }
img { display: block; width: 12rem; margin: 5px 0 } img[src*="/png"] { image-rendering: pixelated }
.right { --verdict: var(--right) } .wrong { --verdict: var(--wrong) } b { color: var(--verdict) }
section { padding: .6rem; border: 1px solid var(--edge); border-left: 4px solid var(--verdict, var(--dim)) }
mark { color: inherit; background: var(--mark) } del { color: var(--wrong) } .text { white-space: pre-wrap }
del::before { content: attr(data-missing) } /* copying gives the answer alone */
:has(#wrong:checked) > article:not([data-wrong]), :has(#differ:checked) > article:not([data-differ]),
details:not(:has(li)) { display: none }
"""


# ---- what goes in ----

def read_lines(path):
    """Yields (place for messages, object) for each line of a JSON-lines file."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # no other separator ends a line
        place = f"line {number} of {path}: got {line[:80].decode(errors='replace')}"
        try:
            if line.strip():
                yield place, {} | json.loads(line)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place} ({error}), need a JSON object, repair it") from error


def read_answers(path):
    """{id: record} in the file's order. An answer of null (its prompt was too long) becomes an empty one."""
    records = {}
    for place, record in read_lines(path):
        record |= {"answer": record["answer"] or ""} if "answer" in record else {}
        texts = record.get("prompt"), record.get("answer", "")
        if record.get("id") is None or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{place}, need {{"id", "image", "prompt", "answer"}} as predict.py writes them')
        if records.setdefault(str(record["id"]), record) is not record:
            raise ValueError(f"{place}: id {record['id']} a second time, need each id once, remove one")
    return records


def join(files):
    """{id: (image, label or None, [record or {} per file])}, ordered by the first file that has the id."""
    joined = {}
    for i, records in enumerate(files):
        for key, record in records.items():
            image, label = record.get("image"), record.get("label")
            *others, columns = joined.setdefault(key, (image, label, [{} for _ in files]))
            if others != [image, label]:
                raise ValueError(f"id {key}: got {others} and {[image, label]}, need answers to equal data")
            columns[i] = record
    return joined


# ---- curves ----

def ticks(low, high):
    """Round numbers, equally spaced, from at most `low` to at least `high`."""
    least = ((high - low) or abs(high) or 1) / 4
    power = 10 ** math.floor(math.log10(least))
    space = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least)
    first = math.floor(low / space)
    return [round(i * space, 12) for i in range(first, max(math.ceil(high / space), first + 1) + 1)]


def bucket_means(points):
    """At most POINTS points, each the mean of equally many consecutive ones (the last: of the rest)."""
    size = math.ceil(len(points) / POINTS)
    return [tuple(sum(axis) / len(axis) for axis in zip(*points[i:i + size]))
            for i in range(0, len(points), size)]


def chart(title, lines, width=360, height=220, x_label="step"):
    """An SVG of {(name, colour 0 … 5): [(step, value), ...]} as lines."""
    lines = {key: bucket_means(points) for key, points in lines.items()}
    steps, values = zip(*(point for points in lines.values() for point in points))
    first, last, y_ticks = min(steps), max(steps), ticks(min(values), max(values))
    left, right, top, bottom = 50, width - 14, 56, height - 26
    svg = [f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
           f'<text class="title" x="12" y="22">{escape(title)}</text><text x="0" y="41">']
    svg += [f'<tspan dx="12" fill="var(--c{colour})">●</tspan> {escape(name)}' for name, colour in lines]
    svg += [f'</text><text x="12" y="{bottom + 18}">{x_label}</text>']

    def at(step, value):
        x = left + (right - left) * (step - first) / ((last - first) or 1)
        y = bottom - (bottom - top) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{x:.1f}", f"{y:.1f}"
    for tick in y_ticks:
        _, y = at(first, tick)
        svg += [f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>'
                f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{tick:.6g}</text>']
    svg += [f'<text x="{at(tick, 0)[0]}" y="{bottom + 18}" text-anchor="middle">{tick:.6g}</text>'
            for tick in ticks(first, last) if first <= tick <= last and tick == int(tick)]
    for (_, colour), points in lines.items():
        path, (x, y) = " ".join(",".join(at(*point)) for point in points), at(*points[-1])
        svg += [f'<polyline stroke="var(--c{colour})" points="{path}"/>'
                f'<circle fill="var(--c{colour})" cx="{x}" cy="{y}" r="3"/>']
    return "\n".join(svg) + "</svg>"


def charts_html(logs):
    """A chart per metric of CURVES in the logs, [(name, path)]. Values that are not finite are left out."""
    curves, colours = {metric: {} for metric in CURVES}, {}
    for name, path in logs:
        key = name, colours.setdefault(name, len(colours) % 6)
        for number, (_, record) in enumerate(read_lines(path), 1):
            for metric, value in record.items():
                if metric in curves and isinstance(value, int | float) and math.isfinite(value):
                    curves[metric].setdefault(key, []).append((record.get("step", number), value))
    return "\n".join(chart(CURVES[metric], lines) for metric, lines in curves.items() if lines)


# ---- answers ----

def images_html(key, names, root, embedded):
    """A record's images. `embedded` maps the path of each image on the page to the id of its element."""
    html = ""
    for name in [names] if isinstance(names, str) else names or []:
        path = Path(os.path.abspath(root / name))
        source = f'data-same="{embedded.get(path)}"'
        if path not in embedded:
            try:
                path.relative_to(os.path.abspath(root))
                image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ValueError(f"id {key}: got image {name} ({error}), need a sound one inside {root}, "
                                 "set --images to its folder") from error
            image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            kind, file = "png" if max(image.size) <= EXACT else "jpeg", io.BytesIO()
            image.save(file, kind, quality=88)
            data, embedded[path] = base64.b64encode(file.getvalue()).decode(), f"i{len(embedded)}"
            source = f'id="{embedded[path]}" src="data:image/{kind};base64,{data}"'
        html += f'<img {source} alt="{escape(name)}">'
    return html


def verdict(answer, label):
    return "" if None in (answer, label) else "right" if answer.strip() == label.strip() else "wrong"


def differences(answer, label):
    """The answer as [(text, "same")], and where most of it agrees with the label also (text, "extra") for
    what the label lacks and (text, "missing") for what the answer lacks."""
    words, wanted = (re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text) for text in (answer, label or ""))
    matcher, pieces = SequenceMatcher(None, words, wanted, autojunk=False), []
    if not label or matcher.ratio() <= 0.5:
        return [(answer, "same")]
    for kind, a, b, c, d in matcher.get_opcodes():
        pieces.append(("".join(words[a:b]), "same" if kind == "equal" else "extra"))
        pieces.append(("".join(wanted[c:d]) if kind != "equal" else "", "missing"))
    return [piece for piece in pieces if piece[0]]


def answer_html(answer, label):
    forms = {"same": "{}", "extra": "<mark>{}</mark>", "missing": '<del data-missing="{}"></del>'}
    text = "".join(forms[kind].format(escape(piece)) for piece, kind in differences(answer, label))
    kind = verdict(answer, label)
    sign = {"right": "✓&nbsp;right", "wrong": "✗&nbsp;wrong", "": ""}[kind]
    return f'<span class="text {kind}" dir="auto">{text or "(no answer)"} <b>{sign}</b></span>'


def section(name, record, label):
    """One file's answer to one record, and its samples."""
    answer = answer_html(record["answer"], label) if "answer" in record else "" if record else "no record"
    samples = "".join(f"<li>{answer_html(it.get('text', ''), label)} {escape(str(it.get('reward', ''))[:6])}"
                      for it in record.get("answers") or [])
    return (f'<section class="{verdict(record.get("answer"), label)}"><strong>{escape(name)}</strong><br>'
            f"{answer}<details><summary><small>samples</small></summary><ol>{samples}</ol></details></section>")


def article(key, label, records, names, images):
    """One record, with data-wrong and data-differ for the filters that it passes."""
    prompt = next(record["prompt"] for record in records if record)
    answers = [record["answer"].strip() for record in records if "answer" in record]
    wrong, differ = "wrong" in [verdict(answer, label) for answer in answers], len(set(answers)) > 1
    sections = "".join(section(name, record, label) for name, record in zip(names, records))
    return (f'<article{" data-wrong" * wrong}{" data-differ" * differ}><div><strong>{escape(key)}</strong>'
            f'{images}</div><div><p class="text"><small>{escape(prompt)}</small> {escape(label or "")}</p>'
            f'<div class="grid">{sections}</div></div></article>')


def table(answers, joined, metrics):
    """The answers, [(name, path)], over all their records; metrics: {path: {metric: number}}."""
    columns = [each for each in COLUMNS if any(each in numbers for numbers in metrics.values())]
    html = "".join(f"<th>{COLUMNS.get(key, key)}" for key in ("answers", "records", "exact match", *columns))
    for i, (name, path) in enumerate(answers):
        verdicts = [verdict(each[i].get("answer"), label) for _, label, each in joined.values() if each[i]]
        right, labelled = verdicts.count("right"), len(verdicts) - verdicts.count("")
        exact = f"{right} of {labelled} ({right / labelled:.1%})" if labelled else "no labels"
        numbers = (f"{metrics.get(str(path), {}).get(each, math.nan):.3f}" for each in columns)
        html += "<tr>" + "".join(f"<td>{cell}" for cell in (escape(name), len(verdicts), exact, *numbers))
    return f"<table>{html}</table>"


# ---- the page ----

def page(args):
    joined, embedded = join([read_answers(path) for _, path in args.answers]), {}
    metrics = json.loads(args.metrics.read_text()) if args.metrics else []
    metrics = {str(Path(each["file"])): each for each in metrics  # those of the answers shown, for all images
               if each.get("over") == "answer" and each["sets"] == "all"}
    names, shown = [name for name, _ in args.answers], list(joined.items())[:args.limit or None]
    articles = "\n".join(article(key, label, records, names, images_html(key, image, args.images, embedded))
                         for key, (image, label, records) in shown)
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{escape(args.title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{THEME}{CSS}</style>
<h1>{escape(args.title)}</h1><ul>{"".join(f"<li>{escape(note)}" for note in args.notes)}</ul>
{table(args.answers, joined, metrics)}<p class="grid">{charts_html(args.logs)}</p>
<label><input type="radio" name="show" checked> {len(shown)} of {len(joined)} records</label>
<label><input type="radio" name="show" id="wrong"> those with a wrong answer</label>
<label><input type="radio" name="show" id="differ"> those whose answers differ</label>
{articles}
<script>for (const img of document.querySelectorAll("[data-same]"))
  img.src = document.getElementById(img.dataset.same).src</script>
"""


def named(text):
    """NAME=FILE, or a file alone → (name, path)"""
    name, _, path = text.rpartition("=") if not os.path.exists(text) else ("", "", text)
    return name or path.removesuffix(".jsonl").removesuffix("/log"), Path(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("answers", nargs="*", type=named, metavar="[NAME=]JSONL", help="answers by predict.py, side by side")
    add("--logs", nargs="+", default=[], type=named, metavar="[NAME=]JSONL", help="logs of runs")
    add("--metrics", type=Path, help="more columns: --json of evaluate.py, or of shapes.py --evaluate")
    add("--notes", nargs="+", default=[], metavar="SENTENCE", help="what to say above the table")
    add("--images", type=Path, default=Path("."), help="folder that image paths start from")
    add("--limit", type=int, default=500, help="records to show, the first ones; 0 for all")
    add("--title", default="Answers", help="heading")
    add("--out", type=Path, required=True, help="the page to write; its name ends in .html")
    args = parser.parse_args()
    out = args.out.with_suffix(".html")  # a slip must not replace a file of answers
    try:
        text = page(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    out.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")  # JSON can hold lone surrogates
    print(f"{out}: {text.count('<article')} records, {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
