"""examples/page.py, run as a user runs it; the page is read back with html.parser."""

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "examples" / "page.py"
UNCLOSED = {"meta", "input", "img", "tr", "td", "th", "li"}  # elements without an end tag in the page


class Page(HTMLParser):
    """What a reader of the page meets: articles by id, their sections and images; also all tags."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.articles, self.text, self.cells = [], [], {}, "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in UNCLOSED:
            self.open.append(tag)
        if tag == "article":
            self.article = {"attributes": attributes, "id": "", "text": "", "images": [], "sections": []}
        elif tag == "section":
            section = {"class": attributes["class"], "text": "", "answer": None, "marks": [], "missing": []}
            self.article["sections"].append(section)
        elif tag == "img":
            self.article["images"].append(attributes)
        elif tag == "del" and "section" in self.open:
            self.article["sections"][-1]["missing"].append(attributes["data-missing"])
        elif tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "article":
            self.articles[self.article["id"]] = self.article

    def handle_data(self, data):
        if "script" in self.open or "style" in self.open:
            return
        self.text += data
        if "table" in self.open and self.cells:
            self.cells[-1] += data
        if "article" in self.open:
            self.article["text"] += data
            if "h2" in self.open:
                self.article["id"] += data
        if "section" in self.open:
            section = self.article["sections"][-1]
            section["text"] += data
            if "p" in self.open and "span" in self.open:
                section["answer"] = (section["answer"] or "") + data
            if "mark" in self.open:
                section["marks"].append(data.strip())


def row(id, answer, **more):
    return {"id": id, "image": None, "prompt": "USER: What? ASSISTANT:", "answer": answer, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def make(tmp_path, *files, options=()):
    """The page of these {name: rows}, pictures in tmp_path/images."""
    paths = [write(tmp_path / name, rows) for name, rows in files]
    done = run(*paths, "--images", tmp_path / "images", "--out", tmp_path / "page.html", *options)
    assert done.returncode == 0, done.stderr
    return Page(tmp_path / "page.html")


def picture(attributes):
    head, data = attributes["src"].split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_files_are_joined_by_id_and_judged(tmp_path):
    sft = [row("a", "a red star", label="a red star"), row("b", "two", label="one"), row("c", "same")]
    dpo = [row("b", " one\n", label="one"), row(7, "late"), row("c", "same")]
    page = make(tmp_path, ("sft.jsonl", sft), ("dpo.jsonl", dpo))
    assert list(page.articles) == ["a", "b", "c", "7"]
    sections = {id: article["sections"] for id, article in page.articles.items()}
    assert ["no such row here" in each["text"] for each in sections["a"]] == [False, True]
    assert [[each["class"] for each in sections[id]] for id in "abc7"] == [
        ["right", "gap"], ["wrong", "right"], ["", ""], ["gap", ""]]
    assert [[each["answer"] for each in sections[id]] for id in "abc7"] == [
        ["a red star", None], ["two", " one\n"], ["same", "same"], [None, "late"]]
    for first, second in sections.values():
        assert "sft.jsonl" in first["text"] and "dpo.jsonl" in second["text"]
    # told by sign and word, not by colour alone
    assert "✗ wrong" in sections["b"][0]["text"] and "✓ right" in sections["b"][1]["text"]
    assert [at["value"] for _, at in page.tags if "checked" in at] == ["all"]
    choices = [at["value"] for _, at in page.tags if at.get("type") == "radio" and "disabled" not in at]
    assert choices == ["all", "wrong", "differ"]
    passed = {each: [id for id in page.articles if f"data-{each}" in page.articles[id]["attributes"]]
              for each in choices}
    assert passed == {"all": ["a", "b", "c", "7"], "wrong": ["b"], "differ": ["b"]}  # gaps do not disagree
    assert page.cells[:4] == ["sft.jsonl", "3", "1 of 2 (50.0%)", "1.7"]  # (3 + 1 + 1) / 3 words
    assert page.cells[4:] == ["dpo.jsonl", "3", "1 of 1 (100.0%)", "1.0"]


def test_one_file_without_labels(tmp_path):
    page = make(tmp_path, ("a.jsonl", [row(1, "x y"), row(2, "z")]))
    assert page.cells == ["a.jsonl", "2", "no labels", "1.5"]
    assert {at["value"] for tag, at in page.tags if "disabled" in at} == {"wrong", "differ"}
    assert "right" not in page.text and "wrong" not in page.articles["1"]["text"]


def test_equal_file_names_are_told_apart_by_folder(tmp_path):
    for folder in "uv":
        (tmp_path / folder).mkdir()
    page = make(tmp_path, ("u/a.jsonl", [row(1, "x")]), ("v/a.jsonl", [row(1, "x")]))
    assert page.cells[0::4] == [str(tmp_path / "u/a.jsonl"), str(tmp_path / "v/a.jsonl")]


def test_everything_from_the_user_is_escaped(tmp_path):
    evil = "\"'</p></title></style><script>alert(1)</script><x-evil a=\"&lt;&amp;\">"
    name = evil.replace("/", "")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / (name + ".png"))
    samples = [{"text": evil + " sampled", "logprob": -1.0}]
    rows = [row(evil, evil + " answered", label=evil + " wanted", image=name + ".png", answers=samples,
                prompt="USER: " + evil)]
    rows += [row("unjudged", evil), row("lacking", "a b c d", label="a b c d e f <g>")]
    page = make(tmp_path, (name, rows), options=["--title", evil + " title"])
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "x-evil" not in [tag for tag, _ in page.tags]
    article = page.articles[evil]
    assert article["sections"][0]["answer"] == evil + " answered"
    assert article["images"][0]["alt"] == name + ".png"
    assert article["sections"][0]["missing"] == [" wanted"] * 2  # beside the answer and beside the sample
    assert page.articles["unjudged"]["sections"][0]["answer"] == evil
    assert page.articles["lacking"]["sections"][0]["missing"] == [" e f <g>"]
    assert "del data-missing=\" e f &lt;" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in evil + " sampled", evil + " wanted", "USER: " + evil:
        assert text in article["text"]
    assert evil + " title" in page.text and name in page.text


def test_separators_and_lone_surrogates_survive(tmp_path):
    text = "one\u2028two\u0085three"
    (tmp_path / "a.jsonl").write_text(json.dumps(row(1, text), ensure_ascii=False) + "\n\n", encoding="utf-8")
    write(tmp_path / "b.jsonl", [row(1, "half \ud83d a pair")])
    done = run(tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    sections = Page(tmp_path / "page.html").articles["1"]["sections"]
    assert [each["answer"] for each in sections] == [text, "half \ufffd a pair"]


def test_pictures_are_scaled_down_turned_and_embedded_once(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    small = Image.effect_noise((64, 64), 90).convert("RGB")
    small.save(images / "small.png")
    turned = Image.new("RGB", (1200, 600), "red")
    turned.paste("lime", (0, 0, 300, 600))  # the left quarter
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees: the left becomes the top
    turned.save(images / "turned.jpg", exif=exif)
    Image.new("I;16", (300, 200), 0x8000).save(images / "deep.png")
    Image.new("RGBA", (10, 500), (0, 0, 255, 255)).save(images / "a,b.png")
    page = make(tmp_path, ("a.jsonl", [
        row(1, "x", image="small.png"), row(2, "x", image=["turned.jpg", "small.png"]),
        row(3, "x", image="deep.png, turned.jpg"),
        row(4, "x", image="a,b.png"), row(5, "x")]))
    shown = [page.articles[id]["images"] for id in "12345"]
    assert [len(each) for each in shown] == [1, 2, 2, 1, 0]

    first = picture(shown[0][0])
    assert first.size == (64, 64) and first.tobytes() == small.tobytes()  # drawn enlarged: lossless
    assert (shown[0][0]["width"], shown[0][0]["class"]) == ("192", "tiny")
    second = picture(shown[1][0])
    assert second.size == (168, 336) and "class" not in shown[1][0]
    top, bottom = second.getpixel((84, 20)), second.getpixel((84, 300))
    assert top[1] > 200 > 60 > top[0] and bottom[0] > 200 > 60 > bottom[1]  # green above red
    deep = picture(shown[2][0])
    assert deep.size == (300, 200) and abs(deep.convert("L").getpixel((9, 9)) - 128) <= 2
    assert picture(shown[3][0]).size == (7, 336)

    again = [shown[1][1], shown[2][1]]
    assert all("src" not in each for each in again)
    assert [each["data-same"] for each in again] == [shown[0][0]["id"], shown[1][0]["id"]]
    ids = [at["id"] for _, at in page.tags if "id" in at]
    assert len(ids) == len(set(ids))


def test_nothing_is_fetched(tmp_path):
    page = make(tmp_path, ("a.jsonl", [row(1, "x")]))
    assert not [at for tag, at in page.tags if tag == "link" or "src" in at]
    assert all(at.get("href", "#").startswith("#") for _, at in page.tags)
    policy = next(at["content"] for _, at in page.tags if at.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_samples_and_scores_are_listed(tmp_path):
    samples = [{"text": "one", "logprob": -0.5, "reward": 1.25}, {"text": "two", "logprob": -2, "tokens": 3},
               {"text": "", "logprob": None}]
    scored = {"id": 2, "image": None, "prompt": "USER: What?", "answers": samples[:2]}
    page = make(tmp_path, ("a.jsonl", [row(1, "two", label="one", answers=samples), scored]))
    text = page.articles["1"]["text"]
    assert "3 answers, 1 right" in text
    assert "one ✓ right logprob -0.5 · reward 1.25" in text and "two ✗ wrong logprob -2 · tokens 3" in text
    assert "(no answer) ✗ wrong" in text
    assert "2 answers" in page.articles["2"]["text"] and page.articles["2"]["sections"][0]["class"] == ""
    assert ["open" in at for tag, at in page.tags if tag == "details"] == [False, True]
    assert page.cells == ["a.jsonl", "2", "0 of 1 (0.0%)", "1.0"]  # scores alone are no answers


def test_a_row_left_unanswered_counts_as_wrong(tmp_path):
    rows = [row(1, None, label="x"), row(2, "x", label="x"), row(3, None, answers=None)]
    page = make(tmp_path, ("a.jsonl", rows))
    assert "(no answer) ✗ wrong" in page.articles["1"]["text"]
    assert [article["sections"][0]["class"] for article in page.articles.values()] == ["wrong", "right", ""]
    assert page.cells == ["a.jsonl", "3", "1 of 2 (50.0%)", "0.3"]


def test_differing_words_are_marked_and_the_text_stays_whole(tmp_path):
    label = "a red circle and a blue star."
    answers = ["a red square and a blue star.", "a red circle.", "a red circle, a tree and a blue star.",
               "No.", label]
    page = make(tmp_path, ("a.jsonl", [row(n, answer, label=label) for n, answer in enumerate(answers)]))
    sections = [page.articles[str(n)]["sections"][0] for n in range(5)]
    assert [each["answer"] for each in sections] == answers
    assert [each["marks"] for each in sections] == [["square"], [], [", a tree"], [], []]
    assert [each["missing"] for each in sections] == [[" circle"], [" and a blue star"], [], [], []]


def test_prompts_are_shown_without_the_beginning_they_share(tmp_path):
    system = "A chat between a curious user and an assistant that answers politely. USER: "
    rows = [row(1, "x", prompt=system + "What is it? ASSISTANT:"),
            row(2, "x", prompt=system + "What now? ASSISTANT:")]
    page = make(tmp_path, ("a.jsonl", rows))
    assert page.text.count(system.strip()) == 1
    assert "… What is it? ASSISTANT:" in page.articles["1"]["text"]
    same = make(tmp_path, ("a.jsonl", [rows[0], {**rows[0], "id": 2}]))
    assert all("… What is it? ASSISTANT:" in article["text"] for article in same.articles.values())
    whole = "<|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>assistant\n\n"
    ends = make(tmp_path, ("a.jsonl", [row(1, "x", prompt=whole), row(2, "x", prompt=whole)]))
    assert all(whole in article["text"] for article in ends.articles.values())  # nothing of it would be left
    other = make(tmp_path, ("a.jsonl", rows), ("b.jsonl", [row(1, "y", prompt="[INST] What is it? [/INST]")]))
    assert system in other.articles["1"]["text"]
    assert "[INST] What is it? [/INST]" in other.articles["1"]["sections"][1]["text"]
    assert "[INST]" not in other.articles["1"]["sections"][0]["text"]


def test_limit_cuts_the_rows_and_not_the_figures(tmp_path):
    rows = [row(n, "x" if n < 3 else "y", label="x", image=None if n < 2 else "gone.png") for n in range(6)]
    page = make(tmp_path, ("a.jsonl", rows), options=["--limit", 2])
    assert list(page.articles) == ["0", "1"] and "the first 2 of 6" in page.text
    assert page.cells[1:3] == ["6", "3 of 6 (50.0%)"]


def bytes_of(rows):
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


good = row("fine", "x")
BAD = {
    "twice": (bytes_of([good, row("q", "x"), row("q", "y")]), ["line 3", "id q", "second time"]),
    "missing picture": (bytes_of([good, row("q", "x", image="gone.png")]), ["id q", "gone.png", "--images"]),
    "outside": (bytes_of([row("q", "x", image="../a.jsonl")]), ["id q", "a.jsonl", "inside"]),
    "not a picture": (bytes_of([row("q", "x", image="text.png")]), ["id q", "text.png"]),
    "truncated": (bytes_of([row("q", "x", image=["whole.png", "half.png"])]), ["id q", "half.png"]),
    "not JSON": (bytes_of([good]) + b'{"id": "q",\n', ["line 2", "JSON object"]),
    "not UTF-8": (b'{"id": "\xff"}\n', ["line 1", "utf-8"]),
    "no object": (b"[1]\n", ["line 1", "[1]"]),
    "no id": (bytes_of([row(None, "x")]), ["line 1", '"id"']),
    "no prompt": (b'{"id": "q", "answer": "x"}\n', ["line 1", "'q'", '"prompt"']),
    "no answer": (b'{"id": "q", "image": null, "prompt": "x"}\n', ["line 1", "'q'", '"answer"']),
    "answer a number": (bytes_of([row("q", 3)]), ["line 1", "'q'", '"answer"']),
    "answers of text": (bytes_of([row("q", None, answers=["x"])]), ["line 1", "'q'"]),
    "image a number": (bytes_of([row("q", "x", image=3)]), ["line 1", "'q'", '"image"']),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, case):
    content, words = BAD[case]
    (tmp_path / "images").mkdir()
    Image.effect_noise((200, 200), 90).save(tmp_path / "images" / "whole.png")
    whole = (tmp_path / "images" / "whole.png").read_bytes()
    (tmp_path / "images" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "images" / "text.png").write_text("no picture")
    (tmp_path / "a.jsonl").write_bytes(content)
    out = tmp_path / "out" / "page.html"
    done = run(tmp_path / "a.jsonl", "--images", tmp_path / "images", "--out", out)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in [*words, "got", "need"]), done.stderr
    assert not out.parent.exists()


@pytest.mark.parametrize("other, word", [
    (row("q", "x", image="b.png"), "b.png"), (row("q", "x", image="a.png", label="two"), "two")])
def test_files_about_different_data_are_refused(tmp_path, other, word):
    first = write(tmp_path / "a.jsonl", [row("q", "x", image="a.png", label="one")])
    done = run(first, write(tmp_path / "b.jsonl", [other]), "--out", tmp_path / "page.html")
    assert done.returncode == 1 and "id q" in done.stderr and word in done.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("options, word", [
    (["--out", "a.jsonl"], ".html"), (["--out", "p.html", "--limit", "-1"], "--limit -1"),
    (["gone.jsonl", "--out", "p.html"], "gone.jsonl")])
def test_bad_options_leave_everything_as_it_was(tmp_path, monkeypatch, options, word):
    monkeypatch.chdir(tmp_path)
    before = write(tmp_path / "a.jsonl", [good]).read_bytes()
    done = run("a.jsonl", *options)
    assert done.returncode == 1 and word in done.stderr and "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path):
    make(tmp_path, ("a.jsonl", [row(1, "first")]))
    page = make(tmp_path, ("a.jsonl", [row(1, "second")]))
    assert page.articles["1"]["sections"][0]["answer"] == "second"
    before = (tmp_path / "page.html").read_bytes()
    write(tmp_path / "a.jsonl", [row(1, "third", image="gone.png")])
    assert run(tmp_path / "a.jsonl", "--out", tmp_path / "page.html").returncode == 1
    assert (tmp_path / "page.html").read_bytes() == before
    (tmp_path / "folder.html").mkdir()  # a name that cannot be replaced
    write(tmp_path / "a.jsonl", [row(1, "third")])
    done = run(tmp_path / "a.jsonl", "--out", tmp_path / "folder.html")
    assert done.returncode == 1 and "folder.html" in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "folder.html", "page.html"]
