"""examples/shapes.py: what it draws, writes and trains, its metrics, and how it ends early."""
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from examples import shapes

SCRIPT = shapes.__file__
TINY = {"train": 8, "pairs": 4, "prompts": 4, "test": 64, "warm_steps": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    shapes.make(folder, seed=3, train=800, pairs=600, prompts=100, test=64, warm_steps=25)
    return folder


def records(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def answers(record):
    return [*np.ravel(record["conversations"][-1]["value"])]


def write(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*args):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_withheld_sets_are_in_no_training_file(folder):
    withheld = set(map(frozenset, records(folder, "world")["withheld"]))
    assert Counter(map(len, withheld)) == {1: 4, 2: 41, 3: 304, 4: 1594}  # 15 % of 24, 276, 2024 and 10626
    for record in records(folder, "sft") + records(folder, "pairs") + records(folder, "prompts"):
        named = map(shapes.mentions, answers(record))  # none in a prompt
        assert withheld.isdisjoint(map(frozenset, [record["objects"], *named]))
    shown, tests = {frozenset(each["objects"]) for each in records(folder, "sft")}, records(folder, "test")
    for record in tests:
        assert frozenset(record["objects"]) in (shown if record["seen"] else withheld)
    assert set(Counter((record["seen"], len(record["objects"])) for record in tests).values()) == {8}


def error(truth, named):
    """The one error that turns the objects `truth` into `named`; "" for none, None for several."""
    longer, shorter = sorted((named, truth), key=len, reverse=True)
    if len(longer) == len(shorter):
        changed = [(a.split(), b.split()) for a, b in zip(truth, named) if a != b]
        same = [(a[0] == b[0], a[1] == b[1]) for a, b in changed]  # colour, shape
        return {(): "", ((True, False),): "reshaped", ((False, True),): "recoloured"}.get(tuple(same))
    one_more = [name for name in longer if name in shorter] == shorter and len(longer) == len(shorter) + 1
    return ("added" if longer is named else "dropped") if one_more else None


@pytest.mark.parametrize("name, shares", [
    ("sft", {"": 0.6, "added": 0.2, "recoloured": 0.1, "reshaped": 0.1}),
    ("pairs", {"added": 0.25, "recoloured": 0.125, "reshaped": 0.125, "dropped": 0.25, "worsened": 0.25}),
    ("test_pairs", dict.fromkeys(shapes.KINDS, 0.2))])
def test_answers_have_the_error_that_their_kind_says(folder, name, shares):
    kinds = Counter()
    for record in records(folder, name):
        truth, named = record["objects"], [shapes.mentions(answer) for answer in answers(record)]
        assert all(map(shapes.well_formed, answers(record)))
        kind = record.get("kind", error(truth, named[0]))
        if kind == "worsened":
            assert {error(truth, named[0]), error(*named)} <= shapes.ERRORS.keys()
            assert len({*named[1]} - {*truth}) == 2  # the second error does not repair the first
        else:
            assert named[:-1] in ([], [truth]) and error(truth, named[-1]) == kind
        kinds[kind] += 1
    assert kinds.keys() == shares.keys()
    assert all(abs(kinds[kind] / kinds.total() - share) < 0.07 for kind, share in shares.items()), kinds


def test_images_show_the_objects_that_their_records_name(folder):
    """Blank and shuffled images do not."""
    def pixels(record, images="images"):
        return np.asarray(Image.open(folder / images / record["image"])).reshape(64 * 64, 3)
    for record in records(folder, "test") + records(folder, "pairs")[:64]:
        colours = {shapes.COLOURS[name.split()[0]] for name in record["objects"]}
        assert set(map(tuple, pixels(record).tolist())) == {shapes.BACKGROUND, *colours}
    cells = [cell for cell, *_ in shapes.place(shapes.keyed(0, "test"), shapes.OBJECTS[:16])]
    assert cells == list(range(16))  # reading order
    tests = records(folder, "test")
    true, blank, shuffled = ([pixels(record, images).tobytes() for record in tests]
                             for images in ("images", "images_blank", "images_shuffled"))
    assert len(set(blank)) == 1 and shuffled == [*true[1:], true[0]]


def test_checkpoint_loads_in_transformers(folder):
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration
    model, info = LlavaForConditionalGeneration.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(info.values()) and 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for text in [text for record in records(folder, "pairs") for text in answers(record)]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    text = tokenizer.apply_chat_template([
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": "a red star."}], tokenize=False)
    assert text == "USER: <image>\nDescribe the image. ASSISTANT: a red star.</s>"
    assert tokenizer.unk_token_id not in tokenizer.encode(text)
    scene = shapes.place(shapes.keyed(0, "test"), ["red circle", "blue star"])
    processor = CLIPImageProcessorPil.from_pretrained(folder / "model")
    expected = processor(shapes.draw(scene), return_tensors="np")["pixel_values"]
    assert np.abs(shapes.pixels_and_labels([scene])[0] - expected).max() < 1e-5


def test_a_seed_determines_the_data_and_warm_up_teaches(folder, tmp_path):
    """25 steps tell objects far better than none, which is near chance, 1 in 25."""
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shapes.make(tmp_path / name, seed=seed, **TINY)
        paths = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        files.append({path.name: path.read_bytes() for path in paths if "_" not in path.parent.name})
    assert files[0] == files[1] and files[0].keys() == files[2].keys()
    assert all(files[0][name] != files[2][name] for name in ("sft.json", "sft-00000.png", "test.json"))
    taught, untaught = records(folder, "world"), json.loads(files[0]["world.json"])
    assert taught["object_accuracy"] > 0.4 > 0.15 > untaught["object_accuracy"]


def test_nothing_is_overwritten_unasked(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    shapes.ensure(data, **TINY)
    before = (data / "sft.json").read_text()
    shapes.ensure(data, seed=1, **TINY)
    with pytest.raises(ValueError, match="--overwrite"):
        shapes.make(data, seed=1, **TINY)
    assert (data / "sft.json").read_text() == before
    shapes.make(data, seed=1, overwrite=True, **TINY)
    assert (data / "sft.json").read_text() != before
    write(other / "thesis.txt", "mine")
    with pytest.raises(ValueError, match="no shapes data set"):
        shapes.make(other, overwrite=True, **TINY)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_data_set(tmp_path, sent):
    with subprocess.Popen([sys.executable, SCRIPT, "--out", tmp_path / "data"]) as process:
        while not list(tmp_path.glob("*/new/images/sft-00100.png")):  # in the middle of drawing
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(30) != 0
    assert not (tmp_path / "data").exists() and (sent == signal.SIGKILL or not list(tmp_path.iterdir()))


def test_captions_and_metrics_by_hand(tmp_path, capsys):
    """Of single answers, and over PPO's iterations: means over all answers, not over files."""
    text, three = "a red circle, a blue square and a green star.", ["red circle", "blue square", "green star"]
    assert shapes.caption(three) == text and shapes.mentions(text) == three and shapes.well_formed(text)
    assert not any(map(shapes.well_formed, ("", "a red circle", "a red star, a blue star.", "a red star..")))
    truth = {"a": {"objects": ["red circle", "blue star"]}, "b": {"objects": ["white square"]}}
    sampled = [("a", "a red circle.", 2.0, 1.5),  # one missed
               ("a", "a red circle and a green star.", -1.0, 0.25),  # one invented, one missed
               ("b", "a white square.", 0.5, -0.5),
               ("b", "a white square a white square", 0.5, 0.75)]  # malformed, named twice
    assert shapes.measure([(truth[id]["objects"], text) for id, text, *_ in sampled]) == pytest.approx({
        "n": 4, "chair_i": 1 / 6, "chair_s": 1 / 4, "coverage": 4 / 6,  # of 6 mentions, 4 texts, 6 objects
        "exact": 1 / 4, "well_formed": 3 / 4, "words": (3 + 7 + 3 + 6) / 4})
    assert {*shapes.measure([(three, "")]).values()} == {0, 1}  # n = 1
    for file, values in (("10", sampled[:1]), ("9", sampled[1:])):
        lines = [dict(zip(("id", "answer", "score", "kl"), line)) for line in values]
        write(tmp_path / "rollouts" / f"{file}.jsonl", *lines)
    shapes.curve(tmp_path, truth)
    assert "\n| 9–10 | 0.500 | 0.500 | 0.750 | 0.250 | 0.667 | 0.250 |\n" in capsys.readouterr().out
    shapes.write_curve(tmp_path, truth, tmp_path / "truth.jsonl")  # a line per iteration, in their order
    log = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [(each["step"], each["n"], each["chair_s"]) for each in log] == [(9, 3, 1 / 3), (10, 1, 0)]


def test_answers_and_rewards_are_judged_and_summarised_over_seeds(folder, tmp_path):
    tests, runs = records(folder, "test"), []
    scored = {"0-added": (1, 0), "1-added": (0, 1), "2-added": (2, 2), "0-dropped": (5, 4), "3": (3, 1, 2)}
    rewards = write(tmp_path / "rewards.jsonl", *(
        {"id": id, "answers": [{"reward": value} for value in values]} for id, values in scored.items()))
    for seed, wrong in enumerate((0, 16, 32)):  # of 64 answers
        greedy = write(tmp_path / str(seed) / "greedy.jsonl", *(
            {"id": record["id"], "answer": None if i < wrong else text,
             "answers": [{"text": text}, {"text": "a red red."}]}
            for i, record in enumerate(tests) for text in answers(record)))
        runs.append(tmp_path / str(seed) / "metrics.json")
        run("--world", folder, "--evaluate", greedy, "--pairs", rewards, "--json", runs[-1])
    metrics = json.loads(runs[2].read_text())
    assert [(each["over"], each["sets"], each["n"], each["exact"]) for each in metrics[:6]] == [
        (over, sets, n * samples, 0.5) for over, samples in (("answer", 1), ("2 samples", 2))
        for sets, n in (("all", 64), ("seen", 32), ("unseen", 32))]
    assert [(each["pairs"], each["n"], each["accuracy"]) for each in metrics[6:]] == [
        ("added", 3, 0.5), ("dropped", 1, 1.0), ("sampled", 1, pytest.approx(2 / 3))]  # (1, 2) is wrong
    assert re.search(r"greedy \| answer .* 0.750 ± 0.250 \|", run("--summary", *runs))  # exact: 1, .75 and .5
    with pytest.raises(AssertionError, match="got id 'nobody'"):
        run("--world", folder, "--evaluate", write(tmp_path / "bad.jsonl", {"id": "nobody", "answer": "x"}))


def test_samples_are_ranked_by_the_truth(folder, tmp_path):
    prompts = {len(record["objects"]): record for record in records(folder, "prompts")}
    a, b, c = prompts[3]["objects"]
    x, y = [name for name in shapes.OBJECTS if name not in (a, b, c)][:2]
    *best_first, tie = map(shapes.caption, ([a, b, c], [b, a, c], [a, b], [a, b, x], [a, x, y], [a, b, y]))
    best_first.append(f"a {a} a {b} a {c}.")  # malformed; the tie is as good as an earlier one, which stays
    texts = [*best_first[:3:-1], *best_first[:4], tie, "", best_first[0]]
    file = write(tmp_path / "answers.jsonl", *(
        {"id": prompts[n]["id"], "answer": tie, "answers": [{"text": text} for text in samples]}
        for n, samples in ((3, texts), (1, [tie, tie]))))  # the second has no choice
    run("--rank", file, "--world", folder, "--pairs_out", tmp_path / "ranked.json", "--mix")
    ranked, synthetic = records(tmp_path, "ranked")
    assert answers(ranked) == best_first and synthetic == records(folder, "pairs")[0]


def test_the_reward_by_hand():
    record = {"objects": ["red star", "blue circle"]}
    texts = "a red star and a blue circle.", "a red star and a green star.", "a red star", "I do not know."
    assert shapes.reward(record, texts) == [1.0, 0.5 - 0.5, 0.5 - 1.0, -1.0]
