"""examples/evaluate.py: every metric by hand, what it refuses, and the way from POPE's file to its table."""
import json
import subprocess
import sys

import pytest
import tiny

from examples import convert, evaluate


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(file, *arguments, code=0):
    """The command in the file's folder → what it prints, and the rows that it writes with --json"""
    command = [sys.executable, evaluate.__file__, file.name, *arguments, "--json", "table"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == code, done
    return (done.stderr, None) if code else (done.stdout, json.loads((file.parent / "table").read_text()))


def test_pope_by_hand(tmp_path):
    """Three true positives, two false ones, two true negatives, a false one; three say neither yes nor no."""
    file = write(tmp_path / "a.jsonl", *(
        {"id": i, "answer": answer, "label": label, "category": "random" if i < 4 else "popular"}
        for i, (answer, label) in enumerate([
            ("Yes, there is.", "yes"), ("yes", "no"), ("No", "no"), ("It is not there. Yes.", "yes"),
            ("Nothing, no, none", "no"), ("NO", "no"), (None, "yes"), ("A dog. No cat.", "yes")])))
    _, (both, random, popular) = run(file, "--pope")
    assert [*both] == ["file", "over", "sets", "n", "accuracy", "precision", "recall", "F1", "yes", "neither"]
    assert [*both.values()] == ["a.jsonl", "answer", "all", 8, 5 / 8, 3 / 5, 3 / 4, 2 / 3, 5 / 8, 3]
    assert [*random.values()][2:5] == ["random", 4, 0.5] and popular["accuracy"] == 0.75
    assert evaluate.pope([("no", False)])["F1"] == 0


@pytest.mark.parametrize("text, named", [
    ("Two hot dogs, a Teddy Bear. Hot, dogs.", "hot dog, teddy bear, dog"),
    ("Men's knives and baby geese by the sofa", "person, knife, bird, couch"),
    ("the seat of a toilet; toilet seats", "toilet, toilet"), ("a seat on a passenger train", "chair, train"),
    ("an adult elephant and a baby animal on the train tracks", "elephant"), ("a man-made t-shirt", ""),
    ("stove top ovens, buses, wine glasses, skis", "oven, bus, wine glass, skis")])
def test_objects_that_a_text_mentions(text, named):
    assert ", ".join(evaluate.mentions(text, evaluate.phrase_table(evaluate.COCO))) == named


@pytest.fixture
def folder(tmp_path):
    """COCO's annotations of two images, and a caption of one."""
    names = [name for name in evaluate.COCO if name]
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 4, "file_name": "b.jpg"}]
    there = [(7, "person"), (7, "dog"), (7, "dog"), (7, "dining table"), (4, "toilet"), (4, "hot dog")]
    write(tmp_path / "instances", {
        "images": images, "categories": [{"id": id, "name": name} for id, name in enumerate(names)],
        "annotations": [{"image_id": image, "category_id": names.index(name)} for image, name in there]})
    write(tmp_path / "captions", {"images": images, "annotations": [
        {"image_id": 7, "caption": "A plane above elephants."}]})
    return tmp_path


def test_chair_by_hand(folder):
    """CHAIR-i is over mentions, CHAIR-s over answers, coverage over objects; captions; samples."""
    answers = [("a.jpg", "Two men with puppies at a desk. A man's chair is empty."),  # 1 of 5 mentions wrong
               ("val/b.jpg", "A toilet seat, hot dogs and a teddy bear."),  # 1 of 3
               ("a.jpg", "A passenger jet over train tracks, a baby elephant.")]  # both, but for the caption
    file = write(folder / "a.jsonl", *({"id": i, "image": image, "answer": text, "answers": [
        {"text": text}, {"text": "A hot dog."}]} for i, (image, text) in enumerate(answers)))
    _, (answer, samples) = run(file, "--chair", "instances")
    assert [*answer.values()][1:] == ["answer", "all", 3, 4 / 10, 1, 5 / 8]
    assert [*samples.values()][1:] == ["2 samples", "all", 6, 6 / 13, 5 / 6, 6 / 16]
    _, (answer, _) = run(file, "--chair", "instances", "--captions", "captions")
    assert [*answer.values()][3:] == [3, 2 / 10, 2 / 3, 7 / 12] and len(evaluate.COCO) == 80 + 1  # "": none
    write(folder / "own", {"synonyms": {"cat": ["moggy"]}, "images": {"a.jpg": [], "b.jpg": ["cat"]}})
    file = write(folder / "a.jsonl", {"id": 1, "image": "b.jpg", "answer": "moggies and a dog"})
    assert run(file, "--chair", "own")[0].split()[-6:] == ["answer", "all", "1", "0.000", "0.000", "1.000"]


def test_vqa_accuracy_and_exact_match_by_hand(tmp_path):
    texts = "The two Dogs.", "1,000!", "blue/green", "yes, sir", "3.5", "Don't\n"
    assert [*map(evaluate.normalise, texts)] == ["2 dogs", "1000", "blue green", "yes sir", "3.5", "dont"]
    scores = [evaluate.vqa([("Two", ["2."] * same + ["3"] * (10 - same))]) for same in (0, 1, 2, 3, 4, 10)]
    assert [score["vqa_accuracy"] for score in scores] == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])
    write(tmp_path / "humans", {"annotations": [
        {"question_id": id, "answer_type": kind, "answers": [{"answer": answer}] * 10}
        for id, kind, answer in ((70, "number", "2"), (71, "other", "dog"))]})
    file = write(tmp_path / "a.jsonl", {"id": "x", "question_id": 70, "answer": " two", "label": "two\n"},
                 {"id": 71, "answer": "cat", "label": "dog"})
    accuracies = {each["sets"]: each["vqa_accuracy"] for each in run(file, "--vqa", "humans")[1]}
    assert accuracies == {"all": 0.5, "number": 1, "other": 0}
    assert run(file, "--exact")[1][0]["exact"] == 0.5


X = {"id": 4, "answer": "x"}


@pytest.mark.parametrize("lines, metric, message", [
    ([], "--pope", "a.jsonl (no record), need answers"), ([X, X], "--pope", "line 2 (id 4 again), need a"),
    ([{"answer": "yes"}], "--pope", "a.jsonl, line 1 (no 'id'), need a complete record"),
    ([{"id": 4, "answers": []}], "--exact", "line 1 (no 'answer'), need"),
    ([{**X, "label": "maybe"}], "--pope", "a.jsonl: record 4: got the label 'maybe', need yes or no"),
    ([X], "--exact", "a.jsonl: record 4: got the label None, need a text"),
    ([{**X, "image": "c.jpg"}], "--chair instances", "record 4: got the image 'c.jpg', need one of inst"),
    ([X], "--vqa instances", "got instances (no 'question_id'), need VQA's annotations"),
    ([X], "--chair a.jsonl", "got a.jsonl (no 'images'), need COCO's instance annotations, or {")])
def test_bad_input_is_one_line(folder, lines, metric, message):
    error, _ = run(write(folder / "a.jsonl", *lines), *metric.split(), code=1)
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_from_popes_file_to_its_table(tmp_path):
    """POPE's own layout through convert.py and predict.py: its labels, one line per question."""
    tiny.make_model(tmp_path / "model")
    tiny.make_images(tmp_path / "val2014")
    labels = ["yes", "no", "no", "no"]
    source = write(tmp_path / "pope.json", *(
        {"question_id": i, "image": f"p{i // 2}.png", "text": "Is there a dog in the image?", "label": label}
        for i, label in enumerate(labels)))
    convert.convert(str(source), tmp_path / "pope", images=str(tmp_path / "val2014"))
    file = tmp_path / "a.jsonl"
    done = tiny.fork("predict", "--model", tmp_path / "model", "--data", tmp_path / "pope" / "data.json",
                     "--out", file, "--max_new_tokens", 4, "--workers", 0)
    assert done.code == 0, done.err
    records = [json.loads(line) for line in file.read_text().splitlines()]
    right = [evaluate.says_no(record["answer"]) == (record["label"] == "no") for record in records]
    _, (row,) = run(file, "--pope")
    assert [record["label"] for record in records] == labels and row["accuracy"] == sum(right) / 4
