"""examples/page.py, run as a user runs it."""
import base64
import io
import json
import math
import re
import subprocess
import sys
from html import escape, unescape
from types import SimpleNamespace

import pytest
from PIL import Image

from examples import page as script


def record(id, answer, **more):
    return {"id": id, "image": None, "prompt": "USER: What? ASSISTANT:", "answer": answer, **more}


def run(folder, *options):
    command = [sys.executable, script.__file__, "--images", "images", "--out", "page.html", *options]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder)


def write(path, records):
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    path.write_text(lines, encoding="utf-8", errors="surrogatepass")


def plain(html):
    return unescape(re.sub("<[^>]*>", "", html).replace("&nbsp;", " ")).strip()


def make(folder, *options, **files):
    """The page of these files of records: HTML, the cells of its table, charts, articles by id."""
    for name, records in files.items():
        write(folder / f"{name}.jsonl", records)
    done = run(folder, *(f"{name}.jsonl" for name in files), *options)
    assert done.returncode == 0, done.stderr
    html = (folder / "page.html").read_text(encoding="utf-8")
    articles = {plain(re.search("<strong>.*?</strong>", body)[0]): SimpleNamespace(
        flags=flags, html=body, text=plain(body), images=re.findall("<img ([^>]*)>", body),
        sections=re.findall('<section class="(.*?)">(.*?)(?:<details>|</section>)', body, re.DOTALL))
        for flags, body in re.findall("<article(.*?)>(.*?)</article>", html, re.DOTALL)}
    return SimpleNamespace(html=html, cells=re.findall("<td>([^<]*)", html), articles=articles,
                           charts=re.findall("<svg.*?</svg>", html, re.DOTALL))


def test_files_are_joined_by_id_and_compared_with_labels(tmp_path):
    page = make(tmp_path, a=[record("a", "a red star", label="a red star"), record("b", "two", label="one"),
                             record("c", "same")],
                b=[record("b", " one\n", label="one"), record(7, "late"), record("c", "same")])
    assert {id: [(kind, plain(html)) for kind, html in article.sections]
            for id, article in page.articles.items()} == {
        "a": [("right", "aa red star ✓ right"), ("", "bno record")],
        "b": [("wrong", "atwo ✗ wrong"), ("right", "b one\n ✓ right")],
        "c": [("", "asame"), ("", "bsame")], "7": [("", "ano record"), ("", "blate")]}
    assert [each.flags for each in page.articles.values()] == ["", " data-wrong data-differ", "", ""]
    assert page.cells == ["a", "3", "1 of 2 (50.0%)", "b", "3", "1 of 1 (100.0%)"]
    assert not re.findall(r"(?:src|href)=.(?!data:)|@import|url\(|https?:", page.html)  # nothing is fetched


def test_everything_from_the_user_is_escaped(tmp_path):
    evil = "\"'</p></title></style><script>alert(1)</script><x-evil a=\"&lt;&amp;\">"
    (tmp_path / "images").mkdir()
    name = evil.replace("/", "") + ".png"
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    more = {"label": evil + " <w>", "prompt": "USER: " + evil, "answers": [{"text": evil, "reward": "<i>"}]}
    write(tmp_path / "log.jsonl", [{"step": 1, "loss": 1}])
    page = make(tmp_path, "--title", evil, "--notes", evil, "--logs", f"{evil}=log.jsonl",
                a=[record(evil, evil, image=name, **more)])
    # title, heading, note, log, id, prompt, label, answer, sample; the image's name
    assert page.html.count(escape(evil)) == 9 and page.html.count(escape(name)) == 1
    assert "x-evil" not in page.html.replace(escape(evil), "").replace(escape(name), "")
    assert page.html.count('data-missing=" &lt;w&gt;"') == 2 and "<i>" not in page.html


def test_images_are_upright_scaled_down_and_embedded_once(tmp_path):
    (tmp_path / "images").mkdir()
    small, turned, exif = Image.effect_noise((64, 64), 90), Image.new("RGB", (1200, 600), "red"), Image.Exif()
    turned.paste("lime", (0, 0, 300, 600))  # the left quarter
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: the left becomes the top
    small.save(tmp_path / "images" / "a.png")
    turned.save(tmp_path / "images" / "turned.jpg", exif=exif)
    page = make(tmp_path, a=[record(0, "x", image="a.png"), record(1, "x", image=["turned.jpg", "a.png"])])
    assert [image.split('"')[:3] for id in "01" for image in page.articles[id].images] == [
        ["id=", "i0", " src="], ["id=", "i1", " src="], ["data-same=", "i0", " alt="]]
    urls = re.findall(";base64,([^\"]*)", page.html)
    first, second = (Image.open(io.BytesIO(base64.b64decode(url))) for url in urls)
    assert first.tobytes() == small.convert("RGB").tobytes() and second.size == (168, 336)
    assert second.getpixel((84, 20))[0] < 128 < second.getpixel((84, 300))[0]  # green above red


def test_samples_unanswered_records_metrics_and_the_limit(tmp_path):
    numbers = {"file": "./a.jsonl", "over": "answer", **dict.fromkeys(script.COLUMNS, 0.25)}
    write(tmp_path / "metrics.json", [[
        numbers | {"sets": "all"}, numbers | {"sets": "seen", "chair_s": 1},
        {"file": "other/a.jsonl", "over": "answer", "sets": "all", "accuracy": 1}]])
    page = make(tmp_path, "--limit", "2", "--metrics", "metrics.json", a=[
        record(1, "two", label="one", answers=[{"text": "one", "reward": 1.25}, {"text": ""}]),
        record("half \ud83d", "x\u2028y"), record(3, None, label="x"), record(5, "x", label="x")])
    assert re.search("one ✓ right 1.25.*no answer. ✗ wrong", page.articles["1"].text)
    assert list(page.articles) == ["1", "half \ufffd"] and "2 of 4 records" in page.html
    assert "x\u2028y" in page.html  # it ends no line
    assert page.cells == ["a", "4", "1 of 3 (33.3%)", *["0.250"] * 4]  # unanswered: wrong


def test_differing_words_are_marked(tmp_path):
    expected = {"a red square and a star.": ([" square"], [" circle"]), "No.": ([], []),
                "a red circle, a box and a star.": ([", a box"], []), "a red circle.": ([], [" and a star"])}
    page = make(tmp_path, a=[record(each, each, label="a red circle and a star.") for each in expected])
    assert {id: (re.findall("<mark>(.*?)<", each.html), re.findall('missing="(.*?)"', each.html))
            for id, each in page.articles.items()} == expected


def test_curves_have_a_chart_per_metric_and_a_line_per_name(tmp_path):
    write(tmp_path / "log.jsonl", [{"step": i, "loss": 4 - i, "margin": math.nan} for i in (1, 2, 3)])
    write(tmp_path / "b.jsonl", [{"unlisted": 1}] * 4 + [{"loss": 2}])
    write(tmp_path / "more.jsonl", [{"step": i, "coverage": 0.5, "note": "x"} for i in range(1, 601)])
    loss, coverage = make(tmp_path, "--logs", "DPO=log.jsonl", "b.jsonl", "DPO=more.jsonl").charts
    assert re.findall(r"--(c.*)\).>●</tspan> (.*)", loss) == [("c0", "DPO"), ("c1", "b")]
    assert re.findall('--(c.*)." points="(.*?)"', loss) == [
        ("c0", "50.0,56.0 124.0,125.0 198.0,194.0"), ("c1", "346.0,125.0")]
    assert len(re.search('--c0." points="(.*?)"', coverage)[1].split()) == script.POINTS
    assert script.bucket_means([(i, 2 * i) for i in range(61)])[-2:] == [(58.5, 117), (60, 120)]
    assert script.ticks(0.31, 0.72) == [0.2, 0.4, 0.6, 0.8] and script.ticks(-9, 35) == [-20, 0, 20, 40]
    assert script.ticks(0, 0) == [0, 0.25] and script.ticks(7, 7) == [6, 8]  # constant metrics


BAD = {
    "id twice": ([record("q", "x")] * 2, "line 2 .*id q a second time"), "no object": ([1], "line 1 .* 1 "),
    "no id": ([record(None, "x")], 'line 1 .*"id"'), "no text": ([record("q", 3)], 'line 1 .*"q"'),
    "missing": ([record("q", "x", image="gone.png")], "id q.*gone.png.*--images"),
    "outside": ([record("q", "x", image="../a.png")], "id q.*a.png.*inside"),
    "truncated": ([record("q", "x", image="b.png")], "id q.*b.png"),
    "other label": ([record("a", "x", label="two")], "id a.*'two'")}


@pytest.mark.parametrize("records, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_and_the_page_stays(tmp_path, records, message):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    make(tmp_path, a=[record("a", "x", label="one")])
    before = [(tmp_path / name).read_bytes() for name in ("page.html", "a.jsonl")]
    write(tmp_path / "b.jsonl", records)
    done = run(tmp_path, "a.jsonl", "b.jsonl")
    assert done.returncode == 2 and re.search(f"page.py: error: .*{message}", done.stderr), done.stderr
    assert run(tmp_path, "a.jsonl", "--out", "a.jsonl").returncode == 0  # it writes a.html
    assert [(tmp_path / name).read_bytes() for name in ("page.html", "a.jsonl")] == before
