"""examples/figures.py: the committed figures, and what is drawn from a chain."""
import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from examples import figures

FOLDER = figures.ROOT / "examples" / "figures"


def test_the_packed_figure_is_what_the_code_packs_and_masks():
    assert figures.packed() == (FOLDER / "packed.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["answers", "packed", "curves"])
def test_figures_are_small_and_self_contained(name):
    svg = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert not tags & {"script", "image", "a", "use", "foreignObject", "link"}
    assert svg.count("://") == 1 and "url(" not in svg and "@import" not in svg  # the one names SVG itself
    assert len(svg.encode()) < 30_000 and "prefers-color-scheme: dark" in svg
    assert f"](examples/figures/{name}.svg)" in (figures.ROOT / "README.md").read_text(encoding="utf-8")


def test_answers_and_curves_are_drawn_from_a_chain(tmp_path):
    """The example is the first that SFT alone answers wrongly, among those of four objects."""
    def write(name, records):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in records))
    for stage, wrong in {"sft": (0, 1, 2, 3), "dpo": (0, 2), "ppo": (1,)}.items():
        write(f"{stage}-sampled.jsonl", [
            {"id": str(i), "image": "a.png", "prompt": "?", "objects": [0] * (4 if i > 1 else 3),
             "label": f"{i} & a red star", "answer": f"{i} & a {'blue' if i in wrong else 'red'} star"}
            for i in range(5)])
    (tmp_path / "world" / "images").mkdir(parents=True)
    image = Image.new("RGB", (64, 64))
    image.paste("white", (2, 3, 5, 4))
    image.save(tmp_path / "world" / "images" / "a.png")
    svg = figures.answers(tmp_path)
    content = "".join(ElementTree.fromstring(svg).itertext())
    assert "Held-out image 3," in content and re.findall(r"(\d+) % right", content) == ["20", "60", "80"]
    assert 'class="extra">blue<' in svg and 'class="missing">red<' in svg and content.count("✗ wrong") == 1
    assert 'fill="rgb(255,255,255)" d="M2 3h3v1h-3z"' in svg
    write("ppo/log.jsonl", [{"step": i, "objective/scores": i, "objective/kl": 0.5} for i in (1, 2)])
    write("ppo-truth.jsonl", [{"step": i, "chair_s": 0.5, "coverage": 1, "exact": 0} for i in (1, 2)])
    svg = figures.curves(tmp_path)
    assert svg.count("<polyline") == 5 and ElementTree.fromstring(svg)
