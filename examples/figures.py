"""The figures of README.md, as SVGs in examples/figures/: the same input gives the same bytes.

    python examples/figures.py runs/chain-0

answers.svg and curves.svg are drawn from a chain of examples/shapes.sh, here of seed 0 at commit bf521fe, and
packed.svg from the code that packs and masks sequences. They hold no script and no link, and follow the
reader's light or dark setting.

Legend: T positions of the packed sequence.
"""

import argparse
import re
import sys
from html import escape
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import page  # noqa: E402

COLOURS = re.findall(r"(--\w+): light-dark\((\S+), (\S+)\)", page.THEME)
LIGHT, DARK = ("; ".join(f"{name}: {pair[i]}" for name, *pair in COLOURS) for i in (0, 1))
STYLE = f":root {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}" + """
.ink, .extra { fill: var(--ink) } .extra { fill: var(--wrong); font-weight: 600; text-decoration: underline }
.missing { fill: var(--wrong); text-decoration: line-through } .right { fill: var(--right); font-weight: 600 }
.wrong { fill: var(--wrong); font-weight: 600 } .large { font-size: 15px }"""
STAGES = {"SFT": "sft-sampled.jsonl", "DPO": "dpo-sampled.jsonl", "PPO": "ppo-sampled.jsonl"}


def card(width, height, title, inside):
    """A complete SVG: its elements on a card, so that it can be read on any background."""
    rules = page.THEME.split("}", 1)[1]  # of text and lines
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}"><title>{escape(title)}</title><style>{rules}{STYLE}</style>\n'
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="var(--card)" '
            f'stroke="var(--edge)"/>\n' + "\n".join(inside) + "\n</svg>\n")


def text(x, y, content, kind="", anchor="start"):
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(str(content))}</text>'


# ---- answers.svg ----

def image_svg(path, x, y, scale):
    """An image's pixels, a rectangle per run of equal ones in a line."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    svg = [f'<g transform="translate({x} {y}) scale({scale})" shape-rendering="crispEdges">']
    for colour in sorted({colour for _, colour in image.getcolors(image.width * image.height)}):
        runs = ""
        for line in range(image.height):
            start = 0
            for equal, run in groupby(image.getpixel((i, line)) == colour for i in range(image.width)):
                length = len(list(run))
                runs += f"M{start} {line}h{length}v1h-{length}z" if equal else ""
                start += length
        svg.append(f'<path fill="rgb{colour}" d="{runs}"/>'.replace(", ", ","))
    return "".join(svg) + "</g>"


def choose(files):
    """The first record of four objects that is answered wrongly after SFT, and rightly after DPO and PPO."""
    for key, (_, label, records) in page.join(files).items():
        verdicts = [page.verdict(record.get("answer"), label) for record in records]
        if verdicts == ["wrong", "right", "right"] and len(records[0]["objects"]) == 4:
            return key
    raise ValueError("got no record that SFT answers wrongly, DPO and PPO rightly, need one, train longer")


def answer_lines(pieces, width=70):
    """[(text, kind)] of page.differences → lines of at most `width` characters, the insides of <text>s."""
    lines, used = [""], 0
    for piece, kind in pieces:
        for word in re.findall(r"\s*\S+", piece):
            if used + len(word) > width:
                lines, used, word = [*lines, ""], 0, word.strip()
            used += len(word)
            space = " " * word.startswith(" ")  # outside, so that it is neither underlined nor struck through
            lines[-1] += f'{space}<tspan class="{kind}">{escape(word.strip())}</tspan>'
    return lines


def answers(run):
    """The same held-out image with an answer after each stage."""
    files = [page.read_answers(run / file) for file in STAGES.values()]
    key = choose(files)
    record, y = files[0][key], 36
    svg = [image_svg(run / "world" / "images" / record["image"], 20, 20, 3),
           text(232, y, "truth"), text(310, y, record["label"], "ink large")]
    for stage, records in zip(STAGES, files):
        y += 32
        right = sum(page.verdict(each["answer"], each["label"]) == "right" for each in records.values())
        svg += [text(232, y, stage, "title large"),
                text(232, y + 17, f"{100 * right / len(records):.0f} % right")]
        for line in answer_lines(page.differences(records[key]["answer"], record["label"])):
            svg.append(f'<text x="310" y="{y}" class="ink large">{line}</text>')
            y += 20
        kind = page.verdict(records[key]["answer"], record["label"])
        svg.append(text(310, y - 1, {"right": "✓ right", "wrong": "✗ wrong"}[kind], kind))
    svg += [text(20, 246, f"Held-out image {key}, sampled at temperature 1. Underlined: not in the truth; "
                 "struck through: not in the answer."),
            text(20, 264, f"The first of {len(records)} images that has four objects and that SFT gets "
                 "wrong, DPO and PPO right. The shares are of all images.")]
    return card(830, 280, f"Answers to {key} after SFT, DPO and PPO", svg)


# ---- packed.svg ----

def packed():
    """A prompt and two answers as data.py packs them, and the sequence's mask as model.py computes it."""
    import numpy as np
    import torch

    import data
    from model import attention_mask
    parts = ["<s> USER: <image> <image> <image> <image> Which shape?", "a star </s>", "a red star </s>"]
    P, *lengths = (len(part.split()) for part in parts)
    tokens = [*" ".join(parts).split(), "<pad>"]
    example = data.Example(0, "", np.arange(P), [np.arange(n) for n in lengths],
                           [np.ones(n, bool) for n in lengths], [])
    as_is = SimpleNamespace(image_token=-1, lengths=lambda ids, images: np.ones(len(ids), int))
    sequence = np.hstack([data.pack(example, as_is), [[0], [0], [-1], [0], [0]]])  # the last is padding
    _, position, branch, predicted_from, target = sequence  # [T] each
    index, branches = torch.arange(len(tokens)), torch.from_numpy(branch)[None]
    mask = attention_mask(branches, branches, index, index)[0, 0]  # [T, T]

    left, wide, high, top, T = 104, 44, 17, 146, len(tokens)
    lines = {"position": position, "branch": branch, "predicted by": [
        tokens[i] if is_target else "" for i, is_target in zip(predicted_from, target)]}
    svg = [text(left - 10, 88 + 20 * i, name, "", "end") for i, name in enumerate(lines)]
    cells = {}  # of the grid, by colour
    for i, token in enumerate(tokens):
        x, y = left + wide * i, top + high * i
        style = f'style="fill: var(--c{branch[i]})"' if branch[i] >= 0 else ""
        svg += [f'<text transform="translate({x + 18} 70) rotate(-45)" {style}>{escape(token)}</text>',
                f'<text x="{left - 10}" y="{y + 12}" text-anchor="end" {style}>{escape(token)}</text>']
        svg += [text(x + wide / 2, 88 + 20 * line, values[i], "ink", "middle")
                for line, values in enumerate(lines.values())]
        for j in range(T):  # does position i see j?
            cell = f"M{left + wide * j + 1} {y + 1}h{wide - 2}v{high - 2}h{2 - wide}z"
            cells.setdefault(f"var(--c{branch[j]})" if mask[i, j] else "none", []).append(cell)
    for fill, paths in cells.items():
        svg.append(f'<path fill="{fill}" stroke="var(--edge)" d="{"".join(paths)}"/>')
    svg.append(text(left, top + high * T + 22, "Each line of the grid is a token; its filled cells are the "
                    "tokens that it sees: the prompt and its own answer."))
    return card(left + wide * T + 22, top + high * T + 38, "A packed sequence and its attention mask", svg)


# ---- curves.svg ----

def curves(run):
    """What PPO optimises, and what is true of the answers that it samples, over the iterations."""
    log = [record for _, record in page.read_lines(run / "ppo" / "log.jsonl")]
    truth = [record for _, record in page.read_lines(run / "ppo-truth.jsonl")]
    plots = {"PPO: score by the reward model, and KL": (log, {
                 "score": "objective/scores", "KL, nats per answer": "objective/kl"}),
             "The same answers compared with the truth": (truth, {
                 "coverage": "coverage", "exact match": "exact", "CHAIR-s": "chair_s"})}
    svg = []
    for i, (title, (records, metrics)) in enumerate(plots.items()):
        lines = {(name, colour + 2 * i): [(record["step"], record[metric]) for record in records]
                 for colour, (name, metric) in enumerate(metrics.items())}
        chart = page.chart(title, lines, 400, 260, "iteration")
        svg.append(f'<g transform="translate({8 + 406 * i} 8)">{chart}</g>')
    return card(830, 276, "PPO over its iterations: score and KL, CHAIR-s and coverage", svg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished chain, runs/chain-0")
    run, out = parser.parse_args().run, ROOT / "examples" / "figures"
    for name, svg in {"answers": answers(run), "packed": packed(), "curves": curves(run)}.items():
        (out / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(f"examples/figures/{name}.svg: {len(svg.encode()) / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
