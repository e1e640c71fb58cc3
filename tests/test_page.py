"""examples/page.py, run as a user runs it."""
import base64
import io
import json
import re
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "page.py"


def record(id, answer, **more):
    return {"id": id, "image": None, "prompt": "USER: What? ASSISTANT:", "answer": answer, **more}


def run(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder)


def plain(html):
    return unescape(re.sub("<[^>]*>", "", html))


def make(folder, *options, **files):
    """The page of these files of records: its HTML, the cells of its table, and its articles by id."""
    for name, records in files.items():
        lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", errors="surrogatepass")
    names = [f"{name}.jsonl" for name in files]
    done = run(folder, *names, "--images", "images", "--out", "page.html", *options)
    assert done.returncode == 0, done.stderr
    html = (folder / "page.html").read_text(encoding="utf-8")
    articles = {plain(re.search("<h2>.*</h2>", body)[0]): SimpleNamespace(
        attributes=attributes, html=body, text=plain(body), images=re.findall("<img ([^>]*)>", body),
        sections=re.findall('<section class="(.*?)">(.*?)</section>', body, re.DOTALL))
        for attributes, body in re.findall("<article (.*?)>(.*?)</article>", html, re.DOTALL)}
    return SimpleNamespace(html=html, cells=re.findall("<td>([^<]*)", html), articles=articles)


def test_files_are_joined_by_id_and_compared_with_labels(tmp_path):
    page = make(tmp_path, sft=[record("a", "a red star", label="a red star"), record("b", "two", label="one"),
                               record("c", "same")],
                dpo=[record("b", " one\n", label="one"), record(7, "late"), record("c", "same")])
    assert {id: [(kind, plain(html)) for kind, html in article.sections]
            for id, article in page.articles.items()} == {
        "a": [("right", "sft.jsonla red star ✓ right"), ("gap", "dpo.jsonlno such row here")],
        "b": [("wrong", "sft.jsonltwo ✗ wrong"), ("right", "dpo.jsonl one\n ✓ right")],
        "c": [("", "sft.jsonlsame "), ("", "dpo.jsonlsame ")],
        "7": [("gap", "sft.jsonlno such row here"), ("", "dpo.jsonllate ")]}
    for show, ids in {"all": ["a", "b", "c", "7"], "wrong": ["b"], "differ": ["b"]}.items():
        assert [id for id in page.articles if f"data-{show}" in page.articles[id].attributes] == ids
    assert page.cells[:4] == ["sft.jsonl", "3", "1 of 2 (50.0%)", "1.7"]  # (3 + 1 + 1) / 3 words
    assert page.cells[4:] == ["dpo.jsonl", "3", "1 of 1 (100.0%)", "1.0"]
    assert "content=\"default-src 'none'; img-src data:;" in page.html  # nothing is fetched


def test_everything_from_the_user_is_escaped(tmp_path):
    evil = "\"'</p></title></style><script>alert(1)</script><x-evil a=\"&lt;&amp;\">"
    (tmp_path / "images").mkdir()
    name = evil.replace("/", "") + ".png"
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    more = {"label": evil + " <w>", "prompt": "USER: " + evil, "answers": [{"text": evil}]}
    page = make(tmp_path, "--title", evil, a=[record(evil, evil, image=name, **more)])
    # title, heading, id, prompt, label, answer, sample; the name as alternative text and as caption
    assert page.html.count(escape(evil)) == 7 and page.html.count(escape(name)) == 2
    assert "x-evil" not in page.html.replace(escape(evil), "").replace(escape(name), "")
    assert page.html.count('data-missing=" &lt;w&gt;"') == 2


def test_images_are_upright_scaled_down_and_embedded_once(tmp_path):
    (tmp_path / "images").mkdir()
    small, turned, exif = Image.effect_noise((64, 64), 90), Image.new("RGB", (1200, 600), "red"), Image.Exif()
    turned.paste("lime", (0, 0, 300, 600))  # the left quarter
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: the left becomes the top
    small.save(tmp_path / "images" / "a,b.png")
    turned.save(tmp_path / "images" / "turned.jpg", exif=exif)
    Image.new("I;16", (300, 200), 0x8000).save(tmp_path / "images" / "deep.png")
    page = make(tmp_path, a=[record(i, "x", image=image) for i, image in enumerate(
        ["a,b.png", ["turned.jpg", "a,b.png"], "deep.png, turned.jpg", None])])
    shown = [page.articles[id].images for id in "0123"]
    assert [["src" in image for image in images] for images in shown] == [[1], [1, 0], [1, 0], []]
    assert 'data-same="p0"' in shown[1][1] and 'data-same="p1"' in shown[2][1]
    urls = [re.search(";base64,([^\"]*)", images[0])[1] for images in shown[:3]]
    first, second, third = (Image.open(io.BytesIO(base64.b64decode(url))) for url in urls)
    assert first.tobytes() == small.convert("RGB").tobytes() and 'width="192"' in shown[0][0]  # 3 × 64
    assert second.size == (168, 336) and [
        second.getpixel((84, y))[0] > 128 for y in (20, 300)] == [False, True]  # green above red
    assert third.size == (300, 200) and abs(third.convert("L").getpixel((9, 9)) - 128) <= 2  # of 16 bits


def test_samples_unanswered_records_and_the_limit(tmp_path):
    samples = [{"text": "one", "logprob": -0.5, "reward": 1.25}, {"text": "", "tokens": 3}]
    page = make(tmp_path, "--limit", 2, a=[
        record(1, "two", label="one", answers=samples), record("half \ud83d", "one\u2028two"),
        record(3, None, label="x"), record(5, "x", label="x")])
    assert "2 answers, 1 right" in page.html and "the first 2 of 4" in page.html
    assert re.search("one ✓ right logprob -0.5 · reward 1.25.*no answer. ✗ wrong", page.articles["1"].text)
    assert list(page.articles) == ["1", "half \ufffd"] and "one\u2028two" in page.articles["half \ufffd"].text
    assert page.cells == ["a.jsonl", "4", "1 of 3 (33.3%)", "1.0"]  # unanswered: wrong, of no words


def test_differing_words_are_marked(tmp_path):
    label = "a red circle and a blue star."
    expected = {"a red square and a blue star.": ([" square"], [" circle"]), "No.": ([], []),
                "a red circle, a tree and a blue star.": ([", a tree"], []), label: ([], []),
                "a red circle.": ([], [" and a blue star"])}
    page = make(tmp_path, a=[record(answer, answer, label=label) for answer in expected])
    assert {id: (re.findall("<mark>(.*?)</mark>", article.html), re.findall('missing="(.*?)"', article.html))
            for id, article in page.articles.items()} == expected


def test_prompts_are_shown_without_the_beginning_they_share(tmp_path):
    system = "A chat between a curious user and an assistant that answers politely. USER: "
    records = [record(i, "x", prompt=f"{system}What is {i}? ASSISTANT:") for i in range(2)]
    page = make(tmp_path, a=records)
    assert page.html.count(system) == 1 and "… What is 1?" in page.articles["1"].text
    page = make(tmp_path, a=records, b=[record(1, "y", prompt="[INST] What? [/INST]")])
    assert system in page.articles["1"].text and "[INST]" in page.articles["1"].sections[1][1]


BAD = {
    "id twice": ([record("q", "x")] * 2, "line 2 .*id q a second time"), "no object": ([1], "line 1 .* 1,"),
    "no id": ([record(None, "x")], 'line 1 .*"id"'), "no text": ([record("q", 3)], "line 1 .*'q'"),
    "missing": ([record("q", "x", image="gone.png")], "id q.*gone.png.*--images"),
    "outside": ([record("q", "x", image="../page.html")], "id q.*page.html.*inside"),
    "truncated": ([record("q", "x", image="half.png")], "id q.*half.png"), "not JSON": ([], "line 1 .*JSON"),
    "other label": ([record("a", "x", label="two")], "id a.*'two'")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_the_page_stays(tmp_path, case):
    records, message = BAD[case]
    (tmp_path / "images").mkdir()
    Image.effect_noise((200, 200), 90).save(tmp_path / "images" / "half.png")
    (tmp_path / "images" / "half.png").open("r+b").truncate(2000)
    make(tmp_path, a=[record("a", "x", label="one")])
    page = (tmp_path / "page.html").read_bytes()
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)) if records else "{")
    done = run(tmp_path, "a.jsonl", "b.jsonl", "--images", "images", "--out", "page.html")
    assert done.returncode == 1 and re.match(f"page.py: .*{message}", done.stderr), done.stderr
    done = run(tmp_path, "a.jsonl", "--out", "a.jsonl")
    assert done.returncode == 1 and ".html" in done.stderr and (tmp_path / "page.html").read_bytes() == page
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "images", "page.html"}
