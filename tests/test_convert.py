"""examples/convert.py: every layout and kind of image in, ours out; what would be lost is a bad record."""
import base64
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "convert.py"
sys.path.insert(0, str(SCRIPT.parent))
convert = importlib.import_module("convert")


def image_bytes(color, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, kind)
    return buffer.getvalue()


RED, BLUE, JPEG = image_bytes("red"), image_bytes("blue"), image_bytes("green", "JPEG")
RED64 = base64.b64encode(RED).decode()


def write(folder, records=(), name="records.json"):
    """A folder of images and a file of records → the file's path."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for image, content in (("red.png", RED), ("sub/blue.png", BLUE), ("cut.png", RED[:-30])):
        (folder / image).write_bytes(content)
    (folder / name).write_text(json.dumps(records))
    return str(folder / name)


def read(out):
    return json.loads((Path(out) / "data.json").read_text(encoding="utf-8"))


def user(*content, role="user"):
    """A message of one text, or of parts, in which a text is a part too."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": role, "content": content[0] if len(content) == 1 else parts}


def assistant(*content):
    return user(*content, role="assistant")


def turns(*values):
    """The human's and the assistant's, in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


SYSTEM = {"from": "system", "value": "S"}
PAIR, ANSWERED = turns("Q", ["good", "bad"]), turns("Q", "A")
OUTPUTS = {"conversations": turns("Q", "old"), "output_1": {"from": "llm", "value": "bad"},
           "output_2": {"from": "llm", "value": "good"}, "preference": 2}
QUESTION, CHAT = {"question": "Q", "chosen": "good", "rejected": "bad"}, {"conversations": ANSWERED}
IMAGE, RED_PATH = {"type": "image", "text": None}, {"image": "images/red.png"}
LAYOUTS = [  # (record, its turns, the other fields that stay)
    # conversations, also as JSON text; vision-feedback-mix-binarized, of which every turn has every key
    ({"conversations": json.dumps(PAIR), "margin": 0.5, "image_path": None}, PAIR, {"margin": 0.5}),
    ({"conversations": turns("Q", "A", "R", ["a", "b"])}, turns("Q", "A", "R", ["a", "b"]), {}),
    ({"conversations": [{**turns("Q")[0], "preference_values": None},
                        {"from": "gpt", "value": None, "preference_values": ["good", "bad"]}]}, PAIR, {}),
    ({"messages": [{**user("Q"), "loss": False}, {**assistant("A"), "loss": True, "tool_calls": []}],
      "system": "S"}, [SYSTEM, *ANSWERED], {}),
    ({"conversations": [SYSTEM, *ANSWERED], "system_prompt": "S", "tools": ""}, [SYSTEM, *ANSWERED], {}),
    ({**QUESTION, "messages": None, "score_chosen": 8}, PAIR, {"score_chosen": 8}),
    ({"instruction": "Q", "input": "more", "chosen": "good", "rejected": ["mid", "bad"]},
     turns("Q\nmore", ["good", "mid", "bad"]), {}),
    ({"prompt": [user(IMAGE, "Q")], "chosen": [assistant("good")], "images": ["red.png"],
      "rejected": [assistant("bad")]}, turns("<image>\nQ", ["good", "bad"]), RED_PATH),
    ({"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}, PAIR, {}),
    ({**OUTPUTS, "flip": False}, PAIR, {"flip": False}),
    ({**OUTPUTS, "preference": 1, "conversations": turns("Q")}, turns("Q", ["bad", "good"]), {}),
    ({"text": json.dumps(QUESTION), "idx": 3}, PAIR, {"idx": 3}), ({"text": QUESTION}, PAIR, {}),
    ({"problem": "x or y?", "options": ["x"], "solution": "y"}, turns("x or y?", "y"), {"options": ["x"]}),
    ({"question_id": 1, "image": "red.png", "text": "Q", "label": "yes"}, turns("Q", "yes"),
     {**RED_PATH, "question_id": 1, "label": "yes"}),
    ({"messages": [user("Compare", {"type": "image", "image": {"bytes": RED64, "path": "red.png"}}, "with",
                        {"type": "image_url", "image_url": {"url": "sub/blue.png"}})]},
     turns("Compare\n<image>\nwith\n<image>"), {"image": ["images/red.png", "images/sub/blue.png"]}),
    ({"prompt": "Q", "image": float("nan"), "scores": [float("nan")]}, turns("Q"), {"scores": [None]}),
    ({"file_name": "red.png", "text": "Red."}, turns("<image>", "Red."), RED_PATH)]


@pytest.mark.parametrize("record, expected, others", LAYOUTS)
def test_every_layout_becomes_ours(tmp_path, record, expected, others):
    assert convert.convert(write(tmp_path, [record]), tmp_path / "out") == (1, 0)
    (converted,) = read(tmp_path / "out")
    assert converted == {"id": "000000000", "conversations": expected, **others}
    conversation = data.read_record(converted, str(tmp_path / "out"), need_answers=0)  # as a trainer does
    assert all(Path(path).read_bytes() == (BLUE if "blue" in path else RED) for path in conversation.images)


@pytest.mark.parametrize("value, expected", [
    (RED, [(RED, None)]), (RED64, [(RED, None)]), (f"data:;base64,{RED64}", [(RED, None)]),
    (base64.b64encode(JPEG).decode(), [(JPEG, None)]),  # begins with "/9j/", which could be a path
    ({"bytes": RED64, "path": "else/where.png"}, [(RED, "else/where.png")]),
    ("sub/../sub\\blue.png", [(BLUE, "sub/blue.png")]),
    ("red.png, sub/blue.png", [(RED, "red.png"), (BLUE, "sub/blue.png")]),
    (["red.png", {"bytes": JPEG}], [(RED, "red.png"), (JPEG, None)])])
def test_every_kind_of_image_keeps_its_bytes_and_name(tmp_path, value, expected):
    write(tmp_path)
    assert convert.image_files(value, tmp_path) == convert.image_files(value, f"{tmp_path}/") == expected


@pytest.mark.parametrize("name, expected", [
    ("images/a/1.jpg", "a/1.jpg"), ("/root/cache/1.jpg", "1.jpg"), ("C:\\Users\\me\\1.jpg", "1.jpg"),
    ("../../etc/./1.jpg", "etc/1.jpg"), ("a\\..\\1.jpg", "a/1.jpg"), ("what?\0.jpg", "what__.jpg"),
    ("x.png/y.png", "x.png_/y.png"), ("v1.5", "v1.5.png"), ("..", None), ("x" * 300 + ".png", None)])
def test_a_name_is_kept_but_leads_nowhere_else(name, expected):
    named = convert.image_name(RED, name)
    assert named == expected if expected else len(named) == 36 and named.endswith(".png")


def test_images_of_one_name_stay_apart_and_equal_ones_are_stored_once(tmp_path):
    write(tmp_path / "in")
    values = ["red.png", {"bytes": RED, "path": "/data/red.png"}, {"bytes": BLUE, "path": "/data/red.png"},
              [{"bytes": BLUE, "path": "red.png"}, RED], RED, {"bytes": JPEG, "path": "deep/er.jpg"}]
    records = [{"image": value, "caption": "a"} for value in values]
    found = [json.loads(convert.convert_record(record, 0, tmp_path, tmp_path / "in"))["image"]
             for record in records]
    assert found[:2] == ["images/red.png"] * 2 and found[2].startswith("images/red-")
    assert found[3] == [found[2], found[4]] and found[5] == "images/deep/er.jpg"
    files = {file.relative_to(tmp_path).as_posix(): file.read_bytes()
             for file in (tmp_path / "images").rglob("*.*")}
    assert files == {found[0]: RED, found[2]: BLUE, found[4]: RED, found[5]: JPEG}


BAD = [  # (record, what the error says)
    ({"prompt": "Q", "chosen": "good"}, "got the columns id, prompt, chosen, need conversations | messages"),
    ({"question": "Q", "answer": None}, "got a prompt with answer None, need a text in `answer`"),
    ({"question": "Q", "option_a": "x", "answer": "A"}, "got the column option_a (['x']), which the"),
    ({"conversations": "[laughs] Hi"}, "got conversations '[laughs] Hi', which cannot be parsed"),
    ({"messages": [user("Q"), {**assistant("A"), "weight": 0}]}, "got the field 'weight' (0), but only"),
    ({**QUESTION, "rejected": " good\n"}, "got equal answers 'good', need answers that differ"),
    ({**QUESTION, "score_chosen": 7, "score_rejected": 7.0}, "got score_chosen 7, need more than the"),
    ({**OUTPUTS, "preference": 0}, "got the preference 0, need 1 or 2, no tie"),
    ({"question": "Q", "query": "Other", "answer": "A"}, "got the columns question and query, need one"),
    ({"conversations": PAIR, "scores": [1, 2]}, "got the field 'scores' ([1, 2]), but only `id`, `image`"),
    ({**CHAT, "videos": ["x"]}, "remove it; --drop leaves columns out"),
    ({**CHAT, "image": "red.png", "image_path": "sub/blue.png"}, "got the images 'red.png' and 'sub/bl"),
    ({**CHAT, "image": "none.png"}, "got the image 'none.png', which is not in "),
    ({**CHAT, "image": "../red.png"}, "got the image '../red.png', which lies outside "),
    ({**CHAT, "image": "cut.png"}, "got a bad image (cannot read the image images/cut.png: "),
    ({**CHAT, "image": RED64[:-2]}, "got the base64 'iVBORw0KGgo"),
    ({**CHAT, "image": ["red.png", 3]}, "got the image 3, need bytes, base64 or a path"),
    ({"messages": [user("Q", {"type": "image", "image": "red.png"})], "image": "red.png"}, "got images both"),
    ({**CHAT, "image": "sub/blue.png", "note": "\ud800"}, "got text that is not UTF-8")]


@pytest.mark.parametrize("record, message", BAD)
def test_a_bad_record_is_named_and_nothing_of_it_is_written(tmp_path, capsys, record, message):
    good = {"id": "good", "image": "red.png", **CHAT}
    source = write(tmp_path / "in", [good, {"id": "bad one", **record}])
    (tmp_path / "red.png").write_bytes(RED)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out")
    error = str(caught.value)
    assert error.startswith(f"{source}: record 1 (id 'bad one'): got ") and message in error
    assert sorted(tmp_path.rglob("*")) == before
    assert convert.convert(source, tmp_path / "out", skip_bad_rows=True) == (1, 1)
    assert message in capsys.readouterr().err
    assert [one["id"] for one in read(tmp_path / "out")] == ["good"]
    assert [file.name for file in (tmp_path / "out/images").iterdir()] == ["red.png"]


@pytest.mark.parametrize("name, content", [
    ("lines.json", '{"question": "Qé", "answer": "A"}\r\n\r\n' * 2),
    ("table.csv", "question,answer,\r\nQé,A,1\r\n\"Qé\",\"A\",2\r\n"),
    ("table.tsv", "question\tanswer\nQé\tA\n\nQé\tA\n"), ("table.txt", "answer;question\nA;Qé\nA;Qé\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_read_by_its_content(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert convert.convert(str(tmp_path / name), tmp_path / "out") == (2, 0)
    assert [one["conversations"] for one in read(tmp_path / "out")] == [turns("Qé", "A")] * 2


def test_a_table_keeps_its_columns_and_names_its_bad_lines(tmp_path):
    write(tmp_path)
    (tmp_path / "t.csv").write_text("\n".join([
        "id,image,caption,score,margin", 'a,red.png,"red, and\nmore",3,', "b,red.png,red, and more,3,",
        f"c,{'A' * 200_000},red,3,", "d,,red,,"]))
    with pytest.raises(ValueError, match="record 1: got 6 cells, need 5 as in the header: put quotes"):
        convert.convert(str(tmp_path / "t.csv"), tmp_path / "out")
    assert convert.convert(str(tmp_path / "t.csv"), tmp_path / "out", skip_bad_rows=True) == (1, 3)
    assert read(tmp_path / "out") == [{"id": "a", **RED_PATH, "score": "3",
                                       "conversations": turns("<image>", "red, and\nmore")}]


@pytest.mark.parametrize("name, content, message", [
    ("none.json", None, "need a file (.json, .jsonl, .csv, .tsv, .txt, .parquet, …), folder or hub id"),
    ("empty.json", b"", "got no records, need at least one"), ("bad.json", b"[1]", "got no good record from"),
    ("story.txt", b"Once", "which begins with 'Once', need a JSON list, one JSON object a line, or CSV with"),
    ("utf16.csv", "a,b\nQ,A\n".encode("utf-16"), "or CSV with a header line, all of it UTF-8: convert it"),
    ("open.csv", b'prompt,x\n"open,1\n', "which cannot be parsed (unexpected end of data), need CSV"),
    ("twice.csv", b"a,a\n1,2\n", "with the header ['a', 'a'], need other names"),
    (".", None, "with no parquet")])
def test_a_bad_source_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        convert.convert(str(tmp_path / name), tmp_path / "out", skip_bad_rows=True)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_parquet_and_hub_data_sets(tmp_path, monkeypatch):
    """Stand-ins for pyarrow and datasets: shards of a split in order; a limit streams. Missing packages and
    splits are named."""
    def batches(*questions):
        return [SimpleNamespace(to_pylist=lambda q=q: [{"question": q, "answer": "A"}]) for q in questions]

    def load_dataset(name, split, streaming):
        table = SimpleNamespace(iter=lambda batch_size: batches(name, split, str(streaming)))
        return SimpleNamespace(with_format=lambda form: table)
    parquet = SimpleNamespace(ParquetFile=lambda file: SimpleNamespace(
        iter_batches=lambda batch_size: batches(f"{file.parent.name}/{file.name}")))
    for name in ("b/train-0-of-2.parquet", "a/train-1-of-2.parquet", "a/test-0-of-1.parquet"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    folder, hub = str(tmp_path / "set"), "who/what"
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=load_dataset, config=SimpleNamespace(HF_CACHE_HOME=tmp_path)))
    for source, options, expected in (
            (folder, {}, ["a/train-1-of-2.parquet", "b/train-0-of-2.parquet"]),
            (folder, {"split": "test"}, ["a/test-0-of-1.parquet"]), (hub, {}, [hub, "train", "False"]),
            (hub, {"split": "test", "limit": 3}, [hub, "test", "True"])):
        convert.convert(source, tmp_path / "out", overwrite=True, **options)
        assert [one["conversations"][0]["value"] for one in read(tmp_path / "out")] == expected
    for module, source, split, message in (
            ("x", folder, "none", "with splits test, train, need parquet of split 'none'"),
            ("pyarrow.parquet", folder, "train", "run pip install pyarrow"),
            ("datasets", hub, "train", "run pip install datasets")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=message):
            convert.convert(source, tmp_path / "none", split=split)


def test_the_command(tmp_path, monkeypatch, capsys):
    """A bad record stops it and leaves an earlier result; an image in the folder is not replaced."""
    def run(*arguments):
        code, reason = 0, ""
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        try:
            convert.main()
        except SystemExit as error:  # Python exits with 1 and prints it
            code, reason = 1, f"{error}\n"
        said = capsys.readouterr()
        return code, said.out, said.err + reason
    records = [{**QUESTION, "id": "r", "image": "red.png"}, {**QUESTION, "chosen": "bad"}]
    source, out = write(tmp_path / "in", records), tmp_path / "deep/out"
    error = f"{source}: record 1: got equal answers 'bad', need answers that differ: leave it out"
    command = [sys.executable, SCRIPT, source, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(sys.executable))
    told = f"error: {error}; --skip_bad_rows leaves such records out\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told) == run(source, "--out", out)
    assert [*(tmp_path / "deep").iterdir()] == []
    assert run(source, "--out", out, "--skip_bad_rows") == (
        0, f"wrote 1 records to {out}/data.json, skipped 1 bad records\n", f"skipped {error}\n")
    assert read(out) == [{"id": "r", **RED_PATH, "conversations": PAIR}]
    assert "holds a data.json, need a new one: name it, or --over" in run(source, "--out", out)[2]
    assert run(source, "--out", out, "--overwrite")[0] == 1 and len(read(out)) == 1
    source = write(tmp_path / "new", [{**QUESTION, "id": "new", "tools": "x", "image": "sub/blue.png"}])
    options = "--overwrite", "--drop", "tools", "--images", tmp_path / "in"
    assert run(source, "--out", out, *options)[0] == 0 and read(out)[0]["id"] == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    (out / "images/red.png").write_bytes(BLUE)
    os.remove(out / "data.json")
    source = write(tmp_path / "in", [{**QUESTION, "image": "red.png"}])
    assert "which holds another images/red.png, need a new folder" in run(source, "--out", out)[2]
    assert (out / "images/red.png").read_bytes() == BLUE and not (out / "data.json").exists()
