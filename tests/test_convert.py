"""examples/convert.py: every layout and kind of image value in, one layout out that data.py reads; what would
be lost is a bad record, named."""

import base64
import datetime
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import data

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "convert.py"
spec = importlib.util.spec_from_file_location("convert", SCRIPT)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def image_bytes(color, kind="PNG", size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


RED, BLUE, JPEG = image_bytes("red"), image_bytes("blue"), image_bytes("green", "JPEG")
CUT = image_bytes("red", size=(400, 300))[:-200]
RED64 = base64.b64encode(RED).decode()


def write_json(folder, records, name="records.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(records))
    return str(folder / name)


def write_images(folder):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name, content in (("red.png", RED), ("a,b.png", JPEG), ("sub/blue.png", BLUE), ("cut.png", CUT),
                          ("x.ppm", image_bytes("red", "PPM"))):
        (folder / name).write_bytes(content)


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


def system(value):
    return {"from": "system", "value": value}


PAIR = [human("Q"), gpt(["good", "bad"])]
ANSWERED = [human("Q"), gpt("A")]
OUTPUTS = {"conversations": [human("Q"), gpt("old")], "output_1": {"from": "llm", "value": "bad"},
           "output_2": {"from": "llm", "value": "good"}, "preference": 2}
QUESTION = {"question": "Q", "chosen": "good", "rejected": "bad"}
IMAGE_PART = {"type": "image", "text": None}
RED_PATH = {"image": "images/red.png"}


@pytest.mark.parametrize("record, turns, others", [
    # conversations: supervised, ranked, prompt only, several turns, as JSON text
    ({"conversations": ANSWERED}, ANSWERED, {}),
    ({"conversations": [human("Q"), gpt(["a", "b", "c"])]}, [human("Q"), gpt(["a", "b", "c"])], {}),
    ({"conversations": [human("Q")]}, [human("Q")], {}),
    ({"conversations": [*ANSWERED, human("R"), gpt(["a", "b"])]}, [*ANSWERED, human("R"), gpt(["a", "b"])],
     {}),
    ({"conversations": json.dumps(ANSWERED)}, ANSWERED, {}),
    ({"conversations": PAIR, "margin": 0.5}, PAIR, {"margin": 0.5}),
    # vision-feedback-mix-binarized, as JSON text and after Arrow has given every turn every key
    ({"conversations": json.dumps([human("Q"), {"from": "gpt", "preference_values": ["good", "bad"]}]),
      "origin_pre_dataset": "x", "image_path": None}, PAIR, {"origin_pre_dataset": "x"}),
    ({"conversations": [{**human("Q"), "preference_values": None},
                        {**gpt(None), "preference_values": ["good", "bad"]}]}, PAIR, {}),
    # messages
    ({"messages": [user("Q"), assistant("A")]}, ANSWERED, {}),
    ({"messages": [{"role": "system", "content": "S"}, user([text("Q")]), assistant("A")]},
     [system("S"), *ANSWERED], {}),
    ({"messages": [user("Q")], "answer": "A"}, ANSWERED, {}),
    ({"messages": [{**user("Q"), "loss": False}, {**assistant("A"), "loss": True, "tool_calls": []}]},
     ANSWERED, {}),
    # a system column
    ({"conversations": ANSWERED, "system": "S"}, [system("S"), *ANSWERED], {}),
    ({"conversations": [system("S"), *ANSWERED], "system_prompt": "S", "tools": "", "videos": []},
     [system("S"), *ANSWERED], {}),
    ({**QUESTION, "system": "S"}, [system("S"), *PAIR], {}),
    # chosen and rejected: texts, messages, TRL's lists of messages with and without a prompt
    ({"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 2}, PAIR, {"margin": 2}),
    ({**QUESTION, "messages": None, "score_chosen": 8.0, "score_rejected": 7, "chosen_rank": 1}, PAIR,
     {"score_chosen": 8.0, "score_rejected": 7, "chosen_rank": 1}),
    ({"instruction": "Q", "input": "more", "chosen": "good", "rejected": "bad"},
     [human("Q\nmore"), gpt(["good", "bad"])], {}),
    ({**QUESTION, "rejected": ["mid", "bad"]}, [human("Q"), gpt(["good", "mid", "bad"])], {}),
    ({"conversations": [human("Q")], "chosen": gpt("good"), "rejected": gpt("bad")}, PAIR, {}),
    ({"prompt": [user([IMAGE_PART, text("Q")])], "chosen": [assistant([text("good")])],
      "rejected": [assistant([text("bad")])], "images": ["red.png"]},
     [human("<image>\nQ"), gpt(["good", "bad"])], RED_PATH),
    ({"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}, PAIR, {}),
    ({"chosen": [user([IMAGE_PART, text("Q")]), assistant("good")],
      "rejected": [user([IMAGE_PART, text("Q")]), assistant("bad")], "images": ["red.png"]},
     [human("<image>\nQ"), gpt(["good", "bad"])], RED_PATH),
    ({"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
     PAIR, {}),
    # LLaVA-RLHF: what the outputs stand for is replaced, or was not there
    ({**OUTPUTS, "flip": False, "hallucination": True}, PAIR, {"flip": False, "hallucination": True}),
    ({**OUTPUTS, "preference": 1}, [human("Q"), gpt(["bad", "good"])], {}),
    ({**OUTPUTS, "conversations": [human("Q")], "output_1": "bad", "output_2": "good"}, PAIR, {}),
    ({"prompt": "Q", **{name: json.dumps([assistant(name)]) for name in ("chosen", "rejected")}},
     [human("Q"), gpt(["chosen", "rejected"])], {}),
    # RLHF-V
    ({"text": json.dumps(QUESTION), "idx": 3}, PAIR, {"idx": 3}),
    ({"text": QUESTION}, PAIR, {}),
    # a question and its answer
    ({"question": "Q", "answer": "A", "question_id": 7, "category": ["x"]}, ANSWERED,
     {"question_id": 7, "category": ["x"]}),
    ({"query": "Q", "response": '[{"x": 1}]', "margin": 0}, [human("Q"), gpt('[{"x": 1}]')], {"margin": 0}),
    ({"problem": "Q", "solution": "A"}, ANSWERED, {}),
    ({"instruction": "Q", "input": "", "output": "A"}, ANSWERED, {}),
    ({"prompt": "Q", "completion": "A"}, ANSWERED, {}),
    ({"prompt": [user([IMAGE_PART, text("Q")])], "completion": [assistant("A")], "images": ["red.png"]},
     [human("<image>\nQ"), gpt("A")], RED_PATH),
    ({"question": "x or y?", "options": ["x", "y"], "answer": "y"}, [human("x or y?"), gpt("y")],
     {"options": ["x", "y"]}),
    # POPE, LLaVA's evaluation questions, prompts
    ({"question_id": 1, "image": "red.png", "text": "Is it red?", "label": "yes"},
     [human("Is it red?"), gpt("yes")], {**RED_PATH, "question_id": 1, "label": "yes"}),
    ({"question_id": 1, "image": "red.png", "text": "Q", "category": "conv"}, [human("Q")],
     {**RED_PATH, "question_id": 1, "category": "conv"}),
    ({"prompt": "Q", "image": "red.png", "source": {"set": "x"}}, [human("Q")],
     {**RED_PATH, "source": {"set": "x"}}),
    ({"prompt": [user("Q")], "image": float("nan"), "scores": [float("nan")]}, [human("Q")],
     {"scores": [None]}),
    # captions
    ({"image": "red.png", "caption": "A red field."}, [human("<image>"), gpt("A red field.")], RED_PATH),
    ({"image": "red.png", "caption": "A red field.", "file": "red.png", "coco_id": "red"},  # its own name
     [human("<image>"), gpt("A red field.")], {**RED_PATH, "file": "red.png", "coco_id": "red"}),
    ({"file_name": "red.png", "text": "A red field."}, [human("<image>"), gpt("A red field.")], RED_PATH),
])
def test_every_layout_becomes_ours(tmp_path, record, turns, others):
    write_images(tmp_path)
    source = write_json(tmp_path, [record])
    assert convert.convert(source, tmp_path / "out") == (1, 0)
    (converted,) = read(tmp_path / "out")
    assert converted == {"id": "000000000", "conversations": turns, **others}
    assert not others.get("image") or (tmp_path / "out" / others["image"]).read_bytes() == RED
    data.read_record(converted, str(tmp_path / "out"), need_answers=0)  # as the trainer reads it


def test_the_trainer_reads_every_record_and_finds_its_image(tmp_path):
    write_images(tmp_path)
    records = [
        {"id": "own", "image": "sub/blue.png", "conversations": ANSWERED, "label": "A", "question_id": 3},
        {**OUTPUTS, "image": "red.png", "flip": False},
        {**QUESTION, "images": [{"bytes": RED64, "path": "other/red.png"}], "system": "S", "chosen_score": 1},
        {"question_id": 1, "image": "red.png", "text": "Is it red?", "label": "yes"},
        {"image": "C:\\photos\\x.png", "caption": "A field."},
        {"messages": [user([{"type": "image", "image": "sub\\blue.png"}, text("Q")]), assistant("A")]},
        {"prompt": "Q", "completion": "A"}]
    records[4]["image"] = {"bytes": RED64, "path": records[4]["image"]}
    out = tmp_path / "out"
    assert convert.convert(write_json(tmp_path, records), out) == (len(records), 0)
    loaded = data.load_records(str(out / "data.json"))
    conversations, bad, _ = data.check_records(loaded, images_dir=str(out), source="data.json")
    assert [bad, len(conversations)] == [0, len(records)]
    names = ["sub/blue.png", "red.png", "other/red.png", "red.png", "x.png", "sub/blue.png"]
    assert [c.images for _, c in conversations] == [[f"{out}/images/{name}"] for name in names] + [[]]


@pytest.mark.parametrize("value, expected", [
    (RED, [(RED, None)]),
    ({"bytes": JPEG, "path": None}, [(JPEG, None)]),
    ({"bytes": RED, "path": "somewhere/else.png"}, [(RED, "somewhere/else.png")]),
    ({"bytes": RED64, "path": "x.png"}, [(RED, "x.png")]),
    ({"bytes": None, "path": "sub/blue.png"}, [(BLUE, "sub/blue.png")]),
    ("sub/../sub/blue.png", [(BLUE, "sub/blue.png")]),
    ("sub\\blue.png", [(BLUE, "sub/blue.png")]),
    (RED64, [(RED, None)]),
    (base64.b64encode(JPEG).decode(), [(JPEG, None)]),  # begins with "/9j/", which could be a path
    ("data:image/png;base64," + RED64, [(RED, None)]),
    ({"url": "data:image/png;base64," + RED64}, [(RED, None)]),
    ("red.png, sub/blue.png", [(RED, "red.png"), (BLUE, "sub/blue.png")]),
    ("a,b.png", [(JPEG, "a,b.png")]),  # a name with a comma in it, as the file is there
    (["red.png", {"bytes": JPEG}], [(RED, "red.png"), (JPEG, None)]),
])
def test_every_kind_of_image_keeps_its_bytes_and_name(tmp_path, value, expected):
    write_images(tmp_path)
    assert convert.image_files(value, tmp_path) == expected
    assert convert.image_files(value, str(tmp_path) + "/") == expected


def test_images_in_messages_leave_placeholders_in_their_places(tmp_path):
    content = [
        text("Compare"), {"type": "image", "image": RED}, text("with"),
        {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(JPEG).decode()}}]
    record = {"messages": [user(content), assistant("They differ.")]}
    converted = json.loads(convert.convert_record(record, 7, tmp_path, tmp_path))
    assert converted["conversations"][0]["value"] == "Compare\n<image>\nwith\n<image>"
    assert [(tmp_path / name).read_bytes() for name in converted["image"]] == [RED, JPEG]
    assert converted["id"] == "000000007"


@pytest.mark.parametrize("name, expected", [
    ("train2017/1.jpg", "train2017/1.jpg"),
    ("images/a/1.jpg", "a/1.jpg"),
    ("/root/cache/1.jpg", "1.jpg"),
    ("C:\\Users\\me\\1.jpg", "1.jpg"),
    ("../../etc/./1.jpg", "etc/1.jpg"),
    ("a\\..\\1.jpg", "a/1.jpg"),
    ("what?\0.jpg", "what__.jpg"),
    ("x.png/y.png", "x.png_/y.png"),  # x.png may be a file
    ("10071", "10071.png"),
    ("v1.5", "v1.5.png"),
    ("wrong.jpg", "wrong.jpg"),  # bytes and names stay, whatever the format
    ("..", None), ("", None), (None, None), ("x" * 300 + ".png", None)])
def test_a_name_is_kept_but_leads_nowhere_else(name, expected):
    named = convert.image_name(RED, name)
    assert named == expected if expected else len(named) == 36 and named.endswith(".png")


def test_images_of_one_name_stay_apart_and_equal_ones_are_stored_once(tmp_path):
    write_images(tmp_path)
    records = [
        {"id": 5, "image": "red.png", "caption": "a"},
        {"id": "again", "image": {"bytes": RED, "path": "/data/red.png"}, "caption": "b"},
        {"id": "other", "image": {"bytes": BLUE, "path": "/data/red.png"}, "caption": "c"},
        {"id": "both", "image": [{"bytes": BLUE, "path": "red.png"}, RED], "caption": "d"},
        {"id": "beside", "image": JPEG, "image_path": "deep/er.jpg", "caption": "e"},
        {"id": "hash", "image": RED, "caption": "f"}]
    found = [json.loads(convert.convert_record(record, 0, tmp_path, tmp_path)) for record in records]
    names = [record["image"] for record in found]
    assert names[:2] == ["images/red.png"] * 2 and names[4] == "images/deep/er.jpg"
    assert names[2].startswith("images/red-") and names[3] == [names[2], names[5]]
    assert [record["id"] for record in found] == [5, "again", "other", "both", "beside", "hash"]
    files = {f"images/{file.relative_to(tmp_path / 'images')}": file.read_bytes()
             for file in (tmp_path / "images").rglob("*") if file.is_file()}
    assert files == {names[0]: RED, names[2]: BLUE, names[4]: JPEG, names[5]: RED}


GOOD = {"id": "good", "image": "red.png", "conversations": ANSWERED}
CHAT = {"conversations": ANSWERED}


@pytest.mark.parametrize("record, message", [
    # no layout, or half of one
    ({"prompt": "Q", "chosen": None}, "got a prompt with chosen None, need a text in `answer`"),
    ({"prompt": "Q", "chosen": "good"}, "got the columns id, prompt, chosen, need conversations | messages"),
    ({"chosen": "good", "rejected": "bad"}, "got answers alone, need a prompt"),
    ({"x": 1}, "got the columns id, x, need conversations | messages"),
    ({"question": "Q", "answer": None}, "got a prompt with answer None, need a text in `answer`"),
    ({"question": "Q", "answer": 2}, "got answer 2, need a text, or messages"),
    ({"question": "Q", "answer": ["a", "b"]}, "got answer ['a', 'b'], need a text, or messages"),
    ({"question": "Q", "answers": ["a", "b"]}, "got a prompt with answers ['a', 'b'], need a text in"),
    ({"question": "Q", "label": 1}, "got a prompt with label 1, need a text in `answer`"),
    ({"question": "Q", "query": "Other", "answer": "A"}, "got the columns question and query, need one"),
    ({"question": "Q", "solution": "long", "answer": "A"}, "got the columns answer and solution, need one"),
    ({"question": "Q", "choices": ["x"], "answer": "A"}, "got the column choices (['x']), which the"),
    ({"question": "Q", "A": "x", "answer": "A"}, "got the column A (['x']), which the question"),
    ({"question": "Q", "option_a": "x", "answer": "A"}, "got the column option_a (['x']), which the"),
    ({"instruction": "Q", "input": ["x"], "output": "A"}, "got the column input (['x']), which the question"),
    ({"image": "red.png", "caption": ["a", "b"]}, "got caption ['a', 'b'], need a text, or messages"),
    # text that is no JSON
    ({"text": "Once upon a time"}, "got text 'Once upon a time' alone, need an image"),
    ({"text": '{"question": "Q"}'}, """got text '{"question": "Q"}' alone, need an image, whose caption"""),
    ({"conversations": "Once upon a time"}, "got conversations 'Once upon a time', which cannot be"),
    ({"conversations": "[laughs] Hi"}, "got conversations '[laughs] Hi', which cannot be parsed"),
    ({"conversations": ["Hi"]}, "got conversations ['Hi'], need a list of messages"),
    # turns
    ({"conversations": []}, "got the columns id, conversations (empty), need"),
    ({"conversations": [gpt("A")]}, "got turns from ['gpt'], need human and gpt in turn"),
    ({"conversations": [human("a"), human("b")]}, "got turns from ['human', 'human'], need"),
    ({"messages": [{"role": "system", "content": "S"}]}, "got turns from ['system'], need human"),
    ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "got turns from ['human', 'system'], "),
    ({"conversations": [{"from": "function_call", "value": "f()"}]}, "need a message by one of human, user"),
    ({"conversations": [human("a"), gpt(["b", "c"]), human("d")]}, "got a turn whose value is not text;"),
    ({"conversations": [human("a"), gpt([])]}, "got the answer '[]', need text"),
    ({"conversations": [human(None)]}, "got None in a human turn, need text"),
    ({"messages": [user([{"type": "video"}])]}, "got {'type': 'video'} in a human turn, need text"),
    ({"messages": [user("a"), assistant([{"type": "image"}])]}, "got {'type': 'image'} in a gpt turn"),
    ({"conversations": ANSWERED, "system": ["S"]}, "got a turn whose value is not text"),
    ({"conversations": [system("S"), *ANSWERED], "system": "T"}, "got turns from ['system', 'system', "),
    # preferences
    ({**QUESTION, "rejected": " good\n"}, "got equal answers 'good', need answers that differ"),
    ({**QUESTION, "chosen": " "}, "got the answer '[' ', 'bad']', need text"),
    ({**QUESTION, "rejected": ["b", ""]}, "got the answer '['good', 'b', '']', need text"),
    ({**QUESTION, "chosen": [user("Other"), assistant("good")]}, "got answers to different contexts"),
    ({"chosen": [user("Q"), assistant("a")], "rejected": [user("R"), assistant("b")]}, "different contexts"),
    ({**QUESTION, "chosen": [assistant("a"), user("b")]}, "got chosen [{'role': 'assistant'"),
    ({**QUESTION, "score_chosen": 7, "score_rejected": 7.0}, "got score_chosen 7, need more than the"),
    ({**OUTPUTS, "preference": 0}, "got the preference 0, need 1 or 2, no tie"),
    ({**OUTPUTS, "preference": None}, "got the preference None, need 1 or 2"),
    ({**OUTPUTS, "output_2": None}, "got output_2 None, need a text, or messages"),
    ({**CHAT, "margin": 1}, "got the margin 1, 1 answers; need a number from 0, and two"),
    ({**QUESTION, "margin": -1}, "got the margin -1, 2 answers"),
    ({**QUESTION, "margin": 10 ** 400}, "got the margin 1000"),
    ({**QUESTION, "margin": math.inf}, "got the margin inf"),
    # what would be lost: more in test_data.py
    ({**OUTPUTS, "output_3": "c"}, "got the field 'output_3' (c), but only"),
    ({**CHAT, "videos": ["x"]}, "remove it; --drop leaves columns out"),
    ({**CHAT, "image": "red.png", "mask": "red_mask.png"}, "got the field 'mask' (red_mask.png), but"),
    ({**CHAT, "rejected_conversations": [human("Q")]}, "got the field 'rejected_conversations' ([{"),
    ({**CHAT, "notes": [user("x")]}, "got the field 'notes' ([{"),
    ({**CHAT, "extra": {"bytes": "x"}}, "got the field 'extra' ({'bytes': 'x'}), "),
    ({"question": "Q", "answer": "A", "image_id": 7}, "got the field 'image_id' (7), but only"),
    ({"question": "Q", "win": "a", "lose": "b"}, "got the field 'win' (a), but only"),
    ({"prompt": "Q", "completion": "A", "label": False}, "got the field 'label' (False), but only"),
    ({"conversations": PAIR, "scores": [1, 2]}, "got the field 'scores' ([1, 2]), but only"),
    ({"conversations": [human("Q"), {**gpt("A"), "loss": False}]}, "got the field 'loss' (False), but only"),
    ({"messages": [user("Q"), {**assistant("A"), "weight": 0}]}, "got the field 'weight' (0), but only"),
    ({"messages": [{**user("Q"), "images": ["red.png"]}]}, "got the field 'images' (['red.png']), but only"),
    ({"prompt": "<img>x.png</img> Q"}, "got '<img>x.png</img>' in a human turn, need <image>"),
    ({**CHAT, "image": "red.png", "images": ["sub/blue.png"]}, "got the columns image and images, need one"),
    ({**CHAT, "image": "red.png", "image_path": "sub/blue.png"}, "got the images 'red.png' and 'sub/bl"),
    # images
    ({"question": "<image> or <image>?", "image": "red.png"}, "got 2 <image> placeholders for 1 images"),
    ({**CHAT, "image": "none.png"}, "got the image 'none.png', which is not in "),
    ({**CHAT, "image": "a\0.png"}, "got the image 'a\\x00.png', which is not in "),
    ({**CHAT, "image": "../red.png"}, "got the image '../red.png', which lies outside "),
    ({**CHAT, "image": "/etc/passwd"}, "got the image '/etc/passwd', which lies outside "),
    ({**CHAT, "image": "http://x/y.png"}, "got the image 'http://x/y.png', which is a URL, not in"),
    ({**CHAT, "image": "records.json"}, "got a bad image (cannot read the image "),
    ({**CHAT, "image": "cut.png"}, "image images/cut.png: image file is truncated"),
    ({**CHAT, "image": RED64[:-2]}, "got the base64 'iVBORw0KGgo"),
    ({**CHAT, "image": 3}, "got the image 3, need bytes, base64 or a path"),
    ({**CHAT, "image": ["red.png", None]}, "got the image None, need bytes"),
    ({"messages": [user([{"type": "image", "image": "red.png"}])], "image": "red.png"},
     "got images both in messages and in a column"),
    ({**CHAT, "image": "x.ppm"}, "x.ppm: corrupt, or not one of the formats that are opened"),
    ({**CHAT, "image": "sub/blue.png", "note": "\ud800"}, "got text that is not UTF-8"),
    ({"prompt": 5}, "got prompt 5, need text, or a list of messages"),
])
def test_a_bad_record_is_named_and_nothing_of_it_is_written(tmp_path, capsys, record, message):
    write_images(tmp_path / "in")
    (tmp_path / "red.png").write_bytes(RED)
    source = write_json(tmp_path / "in", [GOOD, {"id": "bad one", **record}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        convert.convert(source, tmp_path / "out")
    assert message in str(caught.value) and len(str(caught.value)) < 1000
    assert str(caught.value).startswith(f"{source}: record 1 (id 'bad one'): got ")
    assert sorted(tmp_path.rglob("*")) == before
    assert convert.convert(source, tmp_path / "out", skip_bad_rows=True) == (1, 1)
    assert message in capsys.readouterr().err
    assert [record["id"] for record in read(tmp_path / "out")] == ["good"]
    assert [file.name for file in (tmp_path / "out" / "images").iterdir()] == ["red.png"]


def test_a_date_becomes_text_and_bytes_are_not_kept():
    day = datetime.date(2024, 1, 2)
    assert convert.as_json("x", [day, {"x": [1, None, math.nan]}]) == ["2024-01-02", {"x": [1, None, None]}]
    with pytest.raises(ValueError, match="got b'x' in the column code, need images in `image`"):
        convert.as_json("code", [b"x"])


def test_a_column_is_left_out_only_when_asked(tmp_path):
    source = write_json(tmp_path, [{**QUESTION, "tools": "x", "label": True}])
    assert convert.convert(source, tmp_path / "out", drop=["tools", "label"]) == (1, 0)
    assert read(tmp_path / "out") == [{"id": "000000000", "conversations": PAIR}]


LINES = json.dumps({"question": "Qé", "answer": "A"}, ensure_ascii=False)
FIRST = {"id": "000000000", "conversations": [human("Qé"), gpt("A")]}


@pytest.mark.parametrize("name, content", [
    ("lines.json", LINES + "\r\n\r\n" + LINES + "\r\n"),
    ("lines.data", LINES + "\n" + LINES),
    ("list.jsonl", f"[{LINES},\n{LINES}]"),
    ("list.txt", f"\n [\n{LINES},\n{LINES}]\n"),
    ("table.csv", "question,answer,\r\nQé,A,1\r\n\"Qé\",\"A\",2\r\n"),
    ("table.tsv", "question\tanswer\nQé\tA\n\nQé\tA\n"),
    ("table.txt", "answer;question\nA;Qé\nA;Qé\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_read_by_its_content(tmp_path, name, content, encoding):
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert convert.convert(str(tmp_path / name), tmp_path / "out") == (2, 0)
    assert read(tmp_path / "out") == [FIRST, {**FIRST, "id": "000000001"}]


def test_a_table_keeps_its_columns_and_names_its_bad_lines(tmp_path):
    write_images(tmp_path)
    lines = ["id,image,caption,score,margin", 'a,red.png,"red, and\nmore",3,', "b,red.png,red, and more,3,",
             f"c,{'A' * 200_000},red,3,", "d,,red,,"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="record 1: got 6 cells, need 5 as in the header: put quotes"):
        convert.convert(str(tmp_path / "t.csv"), tmp_path / "out")
    assert convert.convert(str(tmp_path / "t.csv"), tmp_path / "out", skip_bad_rows=True) == (1, 3)
    assert read(tmp_path / "out") == [{"id": "a", "image": "images/red.png", "score": "3",
                                       "conversations": [human("<image>"), gpt("red, and\nmore")]}]


@pytest.mark.parametrize("source, message", [
    ("missing.json", "missing.json', need a file (.json, .jsonl, .csv, .tsv, .txt, .parquet, …), folder or"),
    ("object.json", "not JSON in line 1 ("),
    ("lines.jsonl", "lines.jsonl: not JSON in line 3 ("),
    ("broken.json", "broken.json: not JSON ("),
    ("latin.jsonl", "latin.jsonl: not JSON ('utf-8' codec"),
    ("empty.json", "got no records, need at least one"),
    ("nothing.json", "got no records, need at least one"),
    ("bad.json", "got no good record from"),
    ("story.txt", "which begins with 'Once upon a time.', need a JSON list, one JSON object a line, or CSV"),
    ("utf16.csv", "or CSV with a header line, all of it UTF-8: convert it"),
    ("open.csv", "which cannot be parsed (unexpected end of data), need CSV"),
    ("twice.csv", "with the header ['a', 'a'], need other names"),
    (".", "with no parquet file"),
])
def test_a_bad_source_is_named(tmp_path, source, message):
    for name, content in {"object.json": '{"records":\n[]}', "broken.json": '[{"id": 1}', "empty.json": "[]",
                          "bad.json": "[1]", "lines.jsonl": '{"id": 1}\n\n{"id": 2',
                          "nothing.json": "", "story.txt": "Once upon a time.",
                          "open.csv": 'prompt,x\n"open,1\n', "twice.csv": "a,a\n1,2\n"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}')
    (tmp_path / "utf16.csv").write_text("prompt,answer\nQ,A\n", encoding="utf-16")
    with pytest.raises(ValueError) as caught:
        convert.convert(str(tmp_path / source), tmp_path / "out", skip_bad_rows=True)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def write_parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def test_parquet_as_hub_data_sets_store_it(tmp_path):
    mix = [{"id": 17, "origin_pre_dataset": "RLHF-V", "image": {"bytes": JPEG, "path": "x.jpg"},
            "image_path": "x.jpg",
            "conversations": json.dumps([human("Q"), {"from": "gpt", "preference_values": ["good", "bad"]}])}]
    trl = [
        {"prompt": [user([IMAGE_PART, text("What?")])], "chosen": [assistant([text("good")])],
         "rejected": [assistant([text("bad")])], "images": [{"bytes": RED, "path": None}]},
        {"prompt": [user([text("And?")])], "chosen": [assistant([text("yes")])],
         "rejected": [assistant([text("no")])], "images": []}]
    write_parquet(tmp_path / "mix", mix)  # known by its content
    write_parquet(tmp_path / "trl.parquet", trl)
    assert convert.convert(str(tmp_path / "mix"), tmp_path / "out") == (1, 0)
    assert read(tmp_path / "out") == [
        {"id": 17, "image": "images/x.jpg", "conversations": PAIR, "origin_pre_dataset": "RLHF-V"}]
    assert (tmp_path / "out" / "images" / "x.jpg").read_bytes() == JPEG
    assert convert.convert(str(tmp_path / "trl.parquet"), tmp_path / "trl") == (2, 0)
    first, second = read(tmp_path / "trl")
    assert first["conversations"] == [human("<image>\nWhat?"), gpt(["good", "bad"])]
    assert (tmp_path / "trl" / first["image"]).read_bytes() == RED
    assert second == {"id": "000000001", "conversations": [human("And?"), gpt(["yes", "no"])]}


def test_a_folder_of_parquet_keeps_splits_apart_and_files_in_order(tmp_path):
    def records(*questions):
        return [{**QUESTION, "question": question} for question in questions]

    write_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", records("c"))
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", records("a", "b"))
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", records("t"))
    write_parquet(tmp_path / "plain" / "001.parquet", records("y"))
    write_parquet(tmp_path / "plain" / "000.parquet", records("x"))

    def questions(source, **options):
        convert.convert(str(tmp_path / source), tmp_path / "out", overwrite=True, **options)
        return [record["conversations"][0]["value"] for record in read(tmp_path / "out")]

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


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "records.parquet").touch()
    with pytest.raises(ValueError, match="got 'who/what', need datasets for it: run pip install datasets"):
        convert.convert("who/what", tmp_path / "out")
    with pytest.raises(ValueError, match="got parquet, need pyarrow to read it: run pip install pyarrow"):
        convert.convert(str(tmp_path / "records.parquet"), tmp_path / "out")


def test_a_hub_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in QUESTION} | {"image": datasets.Image()}
    records = [{**QUESTION, "question": q, "image": {"bytes": JPEG, "path": f"{q}.jpg"}} for q in "abc"]
    import pyarrow
    table = pyarrow.Table.from_pylist(records, schema=datasets.Features(features).arrow_schema)
    held = datasets.Dataset(table, fingerprint="x")
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
        assert [record["conversations"][0]["value"] for record in converted] == list(questions)
        assert [record["image"] for record in converted] == [f"images/{q}.jpg" for q in questions]
        assert (tmp_path / out / converted[0]["image"]).read_bytes() == JPEG
    with pytest.raises(ValueError, match="got 'who/what', split 'none', need a hub data set .Unknown split."):
        convert.convert("who/what", tmp_path / "out", split="none")


def test_the_command(tmp_path):
    write_images(tmp_path / "files")
    records = [{**QUESTION, "id": "r", "image": "red.png"}, {**QUESTION, "chosen": "bad"}]
    source = write_json(tmp_path / "records", records)
    out = tmp_path / "deep" / "out"
    command = (source, "--out", out, "--images", tmp_path / "files")

    done = run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {source}: record 1: got equal answers 'bad', need answers that differ: leave it out; "
        "--skip_bad_rows leaves such records out\n")
    assert list((tmp_path / "deep").iterdir()) == []

    done = run(*command, "--skip_bad_rows")
    assert done.returncode == 0 and done.stderr.startswith(f"skipped {source}: record 1: got equal answers")
    assert done.stdout == f"wrote 1 records to {out}/data.json, skipped 1 bad records\n"
    assert read(out) == [{"id": "r", "image": "images/red.png", "conversations": PAIR}]
    assert (out / "images" / "red.png").read_bytes() == RED

    before = (out / "data.json").read_bytes()
    done = run(*command, "--limit", 1)
    assert done.returncode == 1 and "holds a data.json, need a new one: name it, or --over" in done.stderr
    assert run(*command, "--overwrite").returncode == 1  # the bad record stops it, the earlier file stays
    assert (out / "data.json").read_bytes() == before
    done = run(out / "data.json", "--out", tmp_path / "again")  # what it wrote is read as it is
    assert (done.returncode, read(tmp_path / "again")) == (0, read(out))
    write_json(tmp_path / "records", [{**QUESTION, "id": "new", "tools": "x"}])
    assert run(*command, "--overwrite", "--drop", "tools").returncode == 0
    assert [record["id"] for record in read(out)] == ["new"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_image_that_lies_in_the_folder_is_not_replaced(tmp_path):
    write_images(tmp_path)
    source = write_json(tmp_path, [GOOD])
    own = tmp_path / "out" / "images" / "red.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(BLUE)
    with pytest.raises(ValueError, match="which holds another images/red.png, need a new folder"):
        convert.convert(source, tmp_path / "out")
    assert own.read_bytes() == BLUE and not (tmp_path / "out" / "data.json").exists()
    own.write_bytes(RED)
    assert convert.convert(source, tmp_path / "out") == (1, 0)


def test_progress(tmp_path, monkeypatch, capsys):
    source = write_json(tmp_path, [CHAT, CHAT, CHAT])
    convert.convert(source, tmp_path / "quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(convert, "REPORT_SECONDS", -1)
    convert.convert(source, tmp_path / "slow", limit=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" records,")[0] for line in lines] == ["1", "2"]
