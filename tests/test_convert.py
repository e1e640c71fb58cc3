"""examples/convert.py: every layout and kind of picture value in, one layout out; bad rows are named."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "convert.py"
spec = importlib.util.spec_from_file_location("convert", SCRIPT)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def picture(color, kind="PNG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


RED, BLUE, JPEG = picture("red"), picture("blue"), picture("green", "JPEG")
PAIR = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": ["good", "bad"]}]


def write_json(folder, rows, name="rows.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def read(out):
    return json.loads((Path(out) / "data.json").read_text(encoding="utf-8"))


def run(*arguments):
    """The script, run as a user runs it, from another folder."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(sys.executable))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(words):
    return {"type": "text", "text": words}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


@pytest.mark.parametrize(
    "row, turns",
    [
        # ours: supervised, ranked, prompt only, several turns
        ({"conversations": [human("Hi"), gpt("Yo")]}, [human("Hi"), gpt("Yo")]),
        ({"conversations": [human("Hi"), gpt(["a", "b", "c"])]}, [human("Hi"), gpt(["a", "b", "c"])]),
        ({"conversations": [human("Hi")]}, [human("Hi")]),
        (
            {"conversations": [human("1"), gpt("2"), human("3"), gpt(["4", "5"])]},
            [human("1"), gpt("2"), human("3"), gpt(["4", "5"])],
        ),
        # vision-feedback-mix-binarized: a JSON string, ranked answers under a key of their own
        (
            {
                "origin_pre_dataset": "x",
                "image_path": None,
                "conversations": '[{"from": "human", "value": "What is it?"},'
                ' {"from": "gpt", "preference_values": ["good", "bad"]}]',
            },
            PAIR,
        ),
        # the same after Arrow has given every turn every key
        (
            {
                "conversations": [
                    {"from": "human", "value": "What is it?", "preference_values": None},
                    {"from": "gpt", "value": None, "preference_values": ["good", "bad"]},
                ]
            },
            PAIR,
        ),
        # chosen and rejected: strings, one or several
        ({"prompt": "What is it?", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"question": "What is it?", "chosen": "good", "rejected": "bad", "messages": None}, PAIR),
        (
            {"question": "Q", "chosen": "best", "rejected": ["mid", "worst"]},
            [human("Q"), gpt(["best", "mid", "worst"])],
        ),
        # chosen and rejected: chats
        (
            {
                "prompt": [user([{"type": "image", "text": None}, text("What is it?")])],
                "chosen": [assistant([text("good")])],
                "rejected": [assistant([text("bad")])],
                "images": ["red.png"],
            },
            [human("<image>\nWhat is it?"), gpt(["good", "bad"])],
        ),
        (
            {
                "prompt": [user("1"), assistant("2"), user("3")],
                "chosen": [assistant("good")],
                "rejected": [[assistant("mid")], [assistant("bad")]],
            },
            [human("1"), gpt("2"), human("3"), gpt(["good", "mid", "bad"])],
        ),
        (
            {"conversations": [human("What is it?")], "chosen": gpt("good"), "rejected": gpt("bad")},
            PAIR,
        ),
        # RLHF-V
        ({"text": '{"question": "What is it?", "chosen": "good", "rejected": "bad"}', "idx": 3}, PAIR),
        ({"text": {"rejected": "bad", "chosen": "good", "question": "What is it?"}}, PAIR),
        # chat
        (
            {"messages": [user("1"), assistant("2"), user("3"), assistant("4")]},
            [human("1"), gpt("2"), human("3"), gpt("4")],
        ),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, user([text("Hi")]), assistant("Yo")]},
            [{"from": "system", "value": "Be brief."}, human("Hi"), gpt("Yo")],
        ),
    ],
)
def test_every_layout_becomes_ours(tmp_path, row, turns):
    (tmp_path / "red.png").write_bytes(RED)
    source = write_json(tmp_path, [row])
    assert convert.convert(source, tmp_path / "out") == (1, 0)
    (converted,) = read(tmp_path / "out")
    image = converted.pop("image", None)
    assert converted == {"id": "000000000", "conversations": turns}
    assert (image is not None) == ("images" in row)
    assert image is None or (tmp_path / "out" / "images" / image).read_bytes() == RED


@pytest.mark.parametrize(
    "value, expected",
    [
        (RED, [RED]),
        ({"bytes": JPEG, "path": None}, [JPEG]),
        ({"bytes": RED, "path": "somewhere/else.png"}, [RED]),
        ({"bytes": None, "path": "sub/blue.png"}, [BLUE]),
        ("sub/blue.png", [BLUE]),
        (base64.b64encode(RED).decode(), [RED]),
        (base64.b64encode(JPEG).decode(), [JPEG]),  # begins with "/9j/", which could be a path
        ("data:image/png;base64," + base64.b64encode(BLUE).decode(), [BLUE]),
        ({"url": "data:image/png;base64," + base64.b64encode(BLUE).decode()}, [BLUE]),
        ("red.png, sub/blue.png", [RED, BLUE]),
        ("a,b.png", [JPEG]),  # a name with a comma in it, as the file is there
        (["red.png", {"bytes": JPEG}], [RED, JPEG]),
    ],
)
def test_every_kind_of_picture_keeps_its_bytes(tmp_path, value, expected):
    (tmp_path / "sub").mkdir()
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "a,b.png").write_bytes(JPEG)
    (tmp_path / "sub" / "blue.png").write_bytes(BLUE)
    assert convert.picture_bytes(value, tmp_path) == expected
    assert convert.picture_bytes(value, str(tmp_path) + "/") == expected


def test_a_pil_image_is_stored_upright_and_lossless(tmp_path):
    image = Image.new("RGB", (3, 2), "red")
    image.putpixel((0, 0), (1, 2, 3))
    image.getexif()[0x0112] = 6  # shown after a quarter turn clockwise
    (data,) = convert.picture_bytes(image, tmp_path)
    stored = Image.open(io.BytesIO(data))
    assert (stored.format, stored.size, stored.getpixel((1, 0))) == ("PNG", (2, 3), (1, 2, 3))
    (data,) = convert.picture_bytes(Image.new("CMYK", (2, 2)), tmp_path)
    assert Image.open(io.BytesIO(data)).mode == "RGB"


def test_pictures_in_messages_leave_placeholders_in_their_places(tmp_path):
    content = [
        text("Compare"),
        {"type": "image", "image": RED},
        text("with"),
        {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(JPEG).decode()}},
    ]
    row = {"messages": [user(content), assistant("They differ.")]}
    converted = convert.convert_row(row, 7, tmp_path, tmp_path)
    assert converted["conversations"][0]["value"] == "Compare\n<image>\nwith\n<image>"
    assert [(tmp_path / name).read_bytes() for name in converted["image"]] == [RED, JPEG]
    assert converted["id"] == "000000007"


def test_names_are_stable_shared_and_keep_the_format(tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "copy of red.png").write_bytes(RED)
    (tmp_path / "wrong.png").write_bytes(JPEG)  # what is in the file counts, not what it is called
    rows = [
        {"id": 5, "image": "red.png", "conversations": [human("a"), gpt("b")], "label": "b", "other": 1},
        {"id": "x", "image": ["copy of red.png", "wrong.png"], "conversations": [human("<image>a")]},
        {"image": "", "conversations": [human("a"), gpt("b")]},
        {"id": "last", "image_path": "red.png", "conversations": [human("a"), gpt("b")]},
    ]
    source = write_json(tmp_path, rows)
    convert.convert(source, tmp_path / "one")
    convert.convert(source, tmp_path / "two")
    converted = read(tmp_path / "one")
    assert [row["id"] for row in converted] == [5, "x", "000000002", "last"]
    assert converted[0].keys() == {"id", "image", "conversations", "label"} and converted[0]["label"] == "b"
    red, jpeg = converted[1]["image"]
    assert converted[0]["image"] == converted[3]["image"] == red and red.endswith(".png")
    assert jpeg.endswith(".jpg") and "image" not in converted[2]
    assert {p.name: p.read_bytes() for p in (tmp_path / "one" / "images").iterdir()} == {red: RED, jpeg: JPEG}
    assert (tmp_path / "one" / "data.json").read_bytes() == (tmp_path / "two" / "data.json").read_bytes()


GOOD = {"id": "good", "conversations": [human("Hi"), gpt("Yo")]}
QUESTION = {"question": "Q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Q", "chosen": None}, "got the columns id, prompt, chosen (null), need one of"),
        ({"conversations": [human("Q"), gpt("a")], "rejected_conversations": []}, "got the columns id, "),
        ({"chosen": "a", "rejected": "b"}, "got the columns id, chosen, rejected, need one of"),
        ({"text": "Once upon a time"}, "got text 'Once upon a time', need JSON"),
        ({"text": '{"question": "Q"}'}, "got the columns id, text, need one of"),
        ({"conversations": "[{'from': 'human'}]"}, "got the conversation \"[{'from': 'human'}]\", need JSON"),
        ({"conversations": ["Hi"]}, "got the conversation ['Hi'], need a list of messages"),
        ({"conversations": []}, "got a conversation without turns"),
        ({"conversations": [gpt("Yo")]}, "got a gpt turn as turn 1, need human and gpt in turn"),
        ({"conversations": [human("a"), human("b")]}, "got a human turn as turn 2"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "got a conversation without turns"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "got a system turn as turn 2"),
        ({"conversations": [{"from": "bard", "value": "Yo"}]}, "need a message by one of human, user"),
        ({"conversations": [human("a"), gpt(["b", "c"]), human("d")]}, "got a list of answers in turn 2"),
        ({"conversations": [human("a"), gpt([])]}, "got an empty text in turn 2 (gpt)"),
        ({"conversations": [human(None)]}, "got None in a human turn, need text"),
        ({"messages": [user([{"type": "video"}])]}, "got {'type': 'video'} in a human turn, need text"),
        ({"messages": [user("a"), assistant([{"type": "image"}])]}, "got {'type': 'image'} in a gpt turn"),
        ({**QUESTION, "rejected": " a\n"}, "got equal answers 'a', need answers that differ"),
        ({**QUESTION, "chosen": " "}, "got an empty text in turn 2 (gpt)"),
        ({**QUESTION, "rejected": ["b", ""]}, "got an empty text in turn 2 (gpt)"),
        ({**QUESTION, "chosen": [user("Q"), assistant("a")]}, "need one message by the assistant"),
        ({**QUESTION, "question": "<image> or <image>?", "image": "red.png"}, "got 2 <image> for 1 pictures"),
        ({**QUESTION, "image": "none.png"}, "got the picture 'none.png', which is not in "),
        ({**QUESTION, "image": "../red.png"}, "got the picture '../red.png', which lies outside "),
        ({**QUESTION, "image": "/etc/passwd"}, "got the picture '/etc/passwd', which lies outside "),
        ({**QUESTION, "image": "rows.json"}, "got a bad picture (cannot identify image"),
        ({**QUESTION, "image": "cut.jpg"}, "got a bad picture (image file is truncated"),
        ({**QUESTION, "image": "cut.png"}, "got a bad picture ("),
        ({**QUESTION, "image": 3}, "got the picture 3, need bytes, base64, a path"),
        ({**QUESTION, "image": ["red.png", None]}, "got the picture None, need bytes"),
        (
            {"messages": [user([{"type": "image", "image": "red.png"}])], "image": "red.png"},
            "got pictures both in messages and in a column",
        ),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, capsys, row, message):
    noise = Image.effect_noise((64, 64), 90)
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        name = "cut.jpg" if kind == "JPEG" else "cut.png"
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "in" / "red.png").write_bytes(RED)
    (tmp_path / "red.png").write_bytes(RED)
    source = write_json(tmp_path / "in", [{**GOOD, "image": "red.png"}, {"id": "bad one", **row}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{source}: row 1 (id 'bad one'): got ")
    assert sorted(tmp_path.rglob("*")) == before
    assert convert.convert(source, tmp_path / "out", skip_bad_rows=True) == (1, 1)
    assert message in capsys.readouterr().err
    assert [row["id"] for row in read(tmp_path / "out")] == ["good"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1  # nothing of the bad row


def test_lines_of_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '{"question": "Qé", "chosen": "a", "rejected": "b"}\r\n'
    path.write_bytes(good.encode("utf-8-sig") + b'\n{"id": 1, \n[1]\n')
    with pytest.raises(ValueError, match="row 1: got the line .*, need JSON"):
        convert.convert(str(path), tmp_path / "out")
    assert convert.convert(str(path), tmp_path / "out", skip_bad_rows=True) == (1, 2)
    assert read(tmp_path / "out")[0]["conversations"] == [human("Qé"), gpt(["a", "b"])]
    assert "Qé" in (tmp_path / "out" / "data.json").read_text(encoding="utf-8")


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_parquet_as_hub_data_sets_store_it(tmp_path):
    mix = [
        {
            "id": 17,
            "origin_pre_dataset": "RLHF-V",
            "image": {"bytes": JPEG, "path": "x.jpg"},
            "image_path": "x.jpg",
            "conversations": json.dumps([human("Q"), {"from": "gpt", "preference_values": ["good", "bad"]}]),
        }
    ]
    trl = [
        {
            "prompt": [user([{"type": "image", "text": None}, text("What?")])],
            "chosen": [assistant([text("good")])],
            "rejected": [assistant([text("bad")])],
            "images": [{"bytes": RED, "path": None}],
        },
        {
            "prompt": [user([text("And?")])],
            "chosen": [assistant([text("yes")])],
            "rejected": [assistant([text("no")])],
            "images": [],
        },
    ]
    write_parquet(tmp_path / "mix.parquet", mix)
    write_parquet(tmp_path / "trl.parquet", trl)
    done = run(tmp_path / "mix.parquet", "--out", tmp_path / "mix")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote 1 rows to {tmp_path}/mix/data.json, skipped 0 bad rows\n"
    (row,) = read(tmp_path / "mix")
    assert (row["id"], row["conversations"]) == (17, [human("Q"), gpt(["good", "bad"])])
    assert (tmp_path / "mix" / "images" / row["image"]).read_bytes() == JPEG
    assert convert.convert(str(tmp_path / "trl.parquet"), tmp_path / "trl") == (2, 0)
    first, second = read(tmp_path / "trl")
    assert first["conversations"] == [human("<image>\nWhat?"), gpt(["good", "bad"])]
    assert (tmp_path / "trl" / "images" / first["image"]).read_bytes() == RED
    assert second == {"id": "000000001", "conversations": [human("And?"), gpt(["yes", "no"])]}


def test_a_folder_of_parquet_keeps_splits_apart_and_files_in_order(tmp_path):
    def rows(*questions):
        return [{**QUESTION, "question": question} for question in questions]

    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", rows("c"))
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", rows("a", "b"))
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", rows("t"))
    write_parquet(tmp_path / "plain" / "001.parquet", rows("y"))
    write_parquet(tmp_path / "plain" / "000.parquet", rows("x"))

    def questions(source, **options):
        convert.convert(str(tmp_path / source), tmp_path / "out", overwrite=True, **options)
        return [row["conversations"][0]["value"] for row in read(tmp_path / "out")]

    assert questions("set") == ["a", "b", "c"]
    assert questions("set", split="test") == ["t"]
    assert questions("set", limit=2) == ["a", "b"]
    assert questions("plain") == ["x", "y"]
    with pytest.raises(ValueError, match="with splits test, train, need parquet of split 'validation'"):
        questions("set", split="validation")


def test_shards_without_pyarrow(tmp_path):
    for name in ("b/train-0-of-1.parquet", "a/train-0-of-1.parquet", "a/test-0-of-1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = convert.shards(tmp_path, "train")
    assert [file.parent.name for file in found] == ["a", "b"]
    assert {file.name for file in found} == {"train-0-of-1.parquet"}
    with pytest.raises(ValueError, match="with no parquet file, need parquet of split 'train'"):
        convert.shards(tmp_path / "b" / "none", "train")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").touch()
    with pytest.raises(ValueError, match="got 'who/what', need datasets for it: run pip install datasets"):
        convert.convert("who/what", tmp_path / "out")
    with pytest.raises(ValueError, match="got parquet, need pyarrow to read it: run pip install pyarrow"):
        convert.convert(str(tmp_path / "rows.parquet"), tmp_path / "out")


def test_a_hub_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in QUESTION} | {"image": datasets.Image()}
    rows = [{**QUESTION, "question": q, "image": {"bytes": JPEG, "path": "x.jpg"}} for q in "abc"]
    held = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        if split == "none":
            raise ValueError("Unknown split")
        return held.to_iterable_dataset() if streaming else held

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert convert.convert("who/what", tmp_path / "all") == (3, 0)
    assert convert.convert("who/what", tmp_path / "two", split="test", limit=2) == (2, 0)
    assert calls == [("who/what", "train", False), ("who/what", "test", True)]
    for out, questions in (("all", "abc"), ("two", "ab")):
        converted = read(tmp_path / out)
        assert [row["conversations"][0]["value"] for row in converted] == list(questions)
        assert (tmp_path / out / "images" / converted[0]["image"]).read_bytes() == JPEG
    with pytest.raises(ValueError, match="got 'who/what', split 'none', need a hub data set .Unknown split."):
        convert.convert("who/what", tmp_path / "out", split="none")


@pytest.mark.parametrize(
    "source, message",
    [
        ("missing.json", "missing.json', need a .json, .jsonl, .parquet, folder or hub id"),
        ("rows.csv", "rows.csv', need a .json, .jsonl, .parquet, folder or hub id"),
        ("object.json", "need a JSON list of rows"),
        ("broken.json", "need JSON"),
        ("empty.json", "got no row from"),
        (".", "with no parquet file"),
    ],
)
def test_a_bad_source_is_named(tmp_path, source, message):
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "object.json").write_text('{"rows": []}')
    (tmp_path / "broken.json").write_text('[{"id": 1}')
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError) as caught:
        convert.convert(str(tmp_path / source), tmp_path / "out")
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    rows = [{**QUESTION, "id": "r", "image": "red.png"}, {**QUESTION, "chosen": "b"}]
    source = write_json(tmp_path / "rows", rows)
    command = (source, "--out", tmp_path / "deep" / "out", "--images", tmp_path / "pictures")

    done = run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {source}: row 1: got equal answers 'b', need answers that differ: remove the row, "
        "or leave such rows out by --skip_bad_rows\n"
    )
    assert list((tmp_path / "deep").iterdir()) == []

    done = run(*command, "--skip_bad_rows")
    assert done.returncode == 0 and done.stderr.startswith(f"skipped {source}: row 1: got equal answers")
    assert done.stdout == f"wrote 1 rows to {tmp_path}/deep/out/data.json, skipped 1 bad rows\n"
    (row,) = read(tmp_path / "deep" / "out")
    assert row == {"id": "r", "image": row["image"], "conversations": [human("Q"), gpt(["a", "b"])]}
    assert (tmp_path / "deep" / "out" / "images" / row["image"]).read_bytes() == RED

    before = (tmp_path / "deep" / "out" / "data.json").read_bytes()
    done = run(*command, "--limit", 1)
    assert done.returncode == 1 and "holds a data.json, need a new one: name it, or --over" in done.stderr
    assert run(*command, "--overwrite").returncode == 1  # stopped by the bad row, the earlier file must stay
    assert (tmp_path / "deep" / "out" / "data.json").read_bytes() == before
    (tmp_path / "rows" / "rows.json").write_text(json.dumps([{**QUESTION, "id": "new"}]))
    assert run(*command, "--overwrite").returncode == 0
    assert [row["id"] for row in read(tmp_path / "deep" / "out")] == ["new"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_progress(tmp_path, monkeypatch, capsys):
    assert convert.progress(1200, 4800, 4.0) == "1,200 of 4,800 rows, 300 rows/s, 0:00:12 left"
    assert convert.progress(1200, None, 4.0) == "1,200 rows, 300 rows/s"
    source = write_json(tmp_path, [GOOD, GOOD, GOOD])
    convert.convert(source, tmp_path / "quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(convert, "REPORT_SECONDS", -1)
    convert.convert(source, tmp_path / "slow", limit=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" rows,")[0] for line in lines] == ["1 of 2", "2 of 2"]
