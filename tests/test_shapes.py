"""The world of examples/shapes.py: what it draws, writes and trains, how it judges, that it is made whole."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "shapes.py"
spec = importlib.util.spec_from_file_location("shapes", SCRIPT)
shapes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shapes)

SIZES = {"train": 800, "pairs": 600, "prompts": 100, "test": 64}
TINY = {"train": 8, "pairs": 4, "prompts": 4, "test": 8, "warm_steps": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "world"
    shapes.make(folder, seed=3, warm_steps=25, **SIZES)
    return folder


def rows(world, name):
    return json.loads((world / f"{name}.json").read_text())


def answers(row):
    """What the row's gpt turn holds, as a list."""
    value = row["conversations"][-1]["value"]
    return value if isinstance(value, list) else [value]


def run(*args, **kwargs):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, **kwargs)


# ---- pictures and captions ----

def test_every_object_has_its_own_look_and_stays_in_its_cell():
    looks = set()
    for name in shapes.OBJECTS:
        for x, y in ((16, 32), (20, 36)):  # the farthest that cell 9 allows
            inside = np.asarray(shapes.draw([(9, x, y, name)]))
            drawn = np.argwhere((inside != shapes.BACKGROUND).any(-1))
            assert (drawn.min(0) >= (32, 16)).all() and (drawn.max(0) <= (47, 31)).all()
            fill = inside[tuple(drawn[len(drawn) // 2])]
            assert tuple(fill) == shapes.COLOURS[name.split()[0]]
        looks.add(np.asarray(shapes.draw([(0, 2, 2, name)])).tobytes())
    assert len(looks) == 24


def test_shapes_differ_by_more_than_a_shift():
    """No shift of one shape comes near another: at least 15 of some 100 pixels differ."""
    masks = {shape: [np.asarray(shapes.draw([(0, x, y, f"red {shape}")]))[..., 0] > 100
                     for x in range(5) for y in range(5)] for shape in shapes.SHAPES}
    for a in shapes.SHAPES:
        for b in shapes.SHAPES:
            if a != b:
                assert min((masks[a][12] ^ other).sum() for other in masks[b]) >= 15, (a, b)


def test_pixels_and_labels_follow_the_picture():
    rng = shapes.keyed(0, "test")
    for _ in range(50):
        scene = shapes.place(rng, ["red circle", "blue star", "white square", "green triangle"])
        pixels, labels = shapes.pixels_and_labels([scene])
        assert [cell for cell, *_ in scene] == sorted({cell for cell, *_ in scene})
        assert sorted(labels[0])[:-4] == [0] * 12
        for cell, x, y, name in scene:
            assert labels[0, cell] == 1 + shapes.OBJECTS.index(name)
            assert cell == x // 16 + 4 * (y // 16) and 0 <= x % 16 <= 4 and 0 <= y % 16 <= 4
        background = (np.array(shapes.BACKGROUND) / 255 - shapes.MEAN) / shapes.STD
        drawn = (np.abs(pixels[0] - background[:, None, None]) > 1e-5).any(0)  # [S, S]
        patches = drawn.reshape(4, 16, 4, 16).any((1, 3)).reshape(16)
        assert (patches == (labels[0] > 0)).all()


def test_picture_files_show_their_objects(world):
    """Each named colour is among the file's pixels, no other is."""
    for row in [row for name in ("test", "sft", "pairs", "prompts") for row in rows(world, name)[:64]]:
        image = Image.open(world / "images" / row["image"])
        assert image.size == (64, 64) and image.mode == "RGB"
        seen = {tuple(colour) for colour in np.unique(np.asarray(image).reshape(-1, 3), axis=0).tolist()}
        assert seen == {shapes.BACKGROUND, *(shapes.COLOURS[name.split()[0]] for name in row["objects"])}


def test_captions():
    assert shapes.caption(["red circle"]) == "a red circle."
    assert shapes.caption(["red circle", "blue star"]) == "a red circle and a blue star."
    text = "a red circle, a blue square and a green star."
    assert shapes.caption(["red circle", "blue square", "green star"]) == text
    assert shapes.mentions(text) == ["red circle", "blue square", "green star"]
    assert shapes.well_formed(text) and shapes.well_formed("a red circle.")
    for bad in ("", "a red circle", "red circle.", "a red circle a blue star.", "a red circle, a blue star.",
                "a red circle and a blue star and a red star.", "a red circle..", "a red a circle.", "."):
        assert not shapes.well_formed(bad), bad


# ---- the files ----

def test_every_caption_parses_back(world):
    for name in ("sft", "pairs", "test", "test_pairs"):
        for row in rows(world, name):
            for text in answers(row):
                named = shapes.mentions(text)
                assert shapes.well_formed(text) and len(set(named)) == len(named)
    for row in rows(world, "test"):
        assert shapes.mentions(answers(row)[0]) == row["objects"]
    for row in rows(world, "prompts"):
        assert row["conversations"] == [{"from": "human", "value": "<image>\nDescribe the image."}]


def test_withheld_sets_are_in_no_training_file(world):
    withheld = {frozenset(objects) for objects in json.loads((world / "world.json").read_text())["withheld"]}
    sizes = [sum(len(objects) == n for objects in withheld) for n in range(1, 5)]
    assert sizes == [round(0.15 * n) for n in (24, 276, 2024, 10626)]
    shown = {frozenset(row["objects"]) for row in rows(world, "sft")}
    for name in ("sft", "pairs", "prompts"):
        for row in rows(world, name):
            assert frozenset(row["objects"]) not in withheld
            if name != "prompts":
                assert not any(frozenset(shapes.mentions(text)) in withheld for text in answers(row))
    tests = rows(world, "test")
    for row in tests:
        assert frozenset(row["objects"]) in (shown if row["seen"] else withheld)
    for seen in (True, False):  # the two halves hold the same numbers of objects
        sizes = [len(row["objects"]) for row in tests if row["seen"] is seen]
        assert [sizes.count(n) for n in range(1, 5)] == [8, 8, 8, 8]


def test_withholding_binds():
    """Without the rule, such files would show and name withheld sets: the test above can fail."""
    withheld = shapes.withheld_sets(3)
    open_rows = [r for make in (shapes.sft_rows, shapes.pair_rows) for _, r in make(3, 300, set())]
    assert any(frozenset(row["objects"]) in withheld for row in open_rows)
    assert any(frozenset(shapes.mentions(text)) in withheld and frozenset(row["objects"]) not in withheld
               for row in open_rows for text in answers(row))


def difference(truth, named):
    """How a caption differs from the truth: (objects invented, objects missed)."""
    return len(set(named) - set(truth)), len(set(truth) - set(named))


def test_sft_noise():
    noisy = [r for _, r in shapes.sft_rows(1, 4000, shapes.withheld_sets(1))]
    kinds = {"added": 0, "recoloured": 0, "reshaped": 0}
    for row in noisy:
        truth, named = row["objects"], shapes.mentions(answers(row)[0])
        if truth == named:
            continue
        if difference(truth, named) == (1, 0):
            kinds["added"] += 1
            assert [name for name in named if name in truth] == truth
        else:
            assert difference(truth, named) == (1, 1) and len(truth) == len(named)
            (was, now), = [(a.split(), b.split()) for a, b in zip(truth, named, strict=True) if a != b]
            assert (was[0] == now[0]) != (was[1] == now[1])
            kinds["reshaped" if was[0] == now[0] else "recoloured"] += 1
    errors = sum(kinds.values())
    assert abs(errors / len(noisy) - 0.4) < 0.03  # nearly four standard deviations
    assert abs(kinds["added"] / errors - 0.5) < 0.05 and abs(kinds["recoloured"] / errors - 0.25) < 0.05


@pytest.mark.parametrize("name", ["pairs", "test_pairs"])
def test_pairs_are_what_their_kind_says(world, name):
    counts = dict.fromkeys(shapes.KINDS, 0)
    for row in rows(world, name):
        truth, (better, worse) = row["objects"], map(shapes.mentions, answers(row))
        counts[row["kind"]] += 1
        if row["kind"] == "worsened":
            assert difference(truth, better) in ((1, 0), (1, 1)) and difference(truth, worse)[0] == 2
            assert difference(truth, worse)[1] >= difference(truth, better)[1]
            continue
        assert better == truth
        changed = [(a.split(), b.split()) for a, b in zip(better, worse, strict=False) if a != b]
        if row["kind"] == "added":
            assert difference(truth, worse) == (1, 0) and len(worse) == len(truth) + 1
        elif row["kind"] == "dropped":
            assert difference(truth, worse) == (0, 1) and len(worse) == len(truth) - 1 >= 1
        else:
            (was, now), = changed
            assert difference(truth, worse) == (1, 1) and len(worse) == len(truth)
            assert [a == b for a, b in zip(was, now, strict=True)] == \
                [row["kind"] == "reshaped", row["kind"] == "recoloured"]
    total = sum(counts.values())
    if name == "pairs":
        shares = {"added": 0.25, "recoloured": 0.125, "reshaped": 0.125, "dropped": 0.25, "worsened": 0.25}
        assert all(abs(counts[kind] / total - share) < 0.07 for kind, share in shares.items()), counts
    else:  # one of each kind a picture; a single object cannot be left out, some pairs have no room
        assert counts["added"] == counts["recoloured"] == 64 and counts["dropped"] == 48
        assert counts["reshaped"] >= 60 and counts["worsened"] >= 50


def test_blind_pictures(world):
    names = {row["image"] for row in rows(world, "test")}
    for folder in ("images_blank", "images_shuffled"):
        assert {path.name for path in (world / folder).iterdir()} == names
    files = {folder: {n: np.asarray(Image.open(world / folder / n)).tobytes() for n in names}
             for folder in ("images", "images_blank", "images_shuffled")}
    assert len(set(files["images_blank"].values())) == 1
    assert sorted(files["images"].values()) == sorted(files["images_shuffled"].values())
    assert all(files["images"][n] != files["images_shuffled"][n] for n in names)


# ---- the starting checkpoint ----

def test_tokenizer_round_trip(world):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    for row in rows(world, "test") + rows(world, "pairs"):
        for text in answers(row):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    whole = "USER: Describe the image. ASSISTANT: a red circle and a blue star.</s>"
    pieces = ["USER:", "Describe the image.", "ASSISTANT:", "a red circle and a blue star.", "</s>"]
    joined = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
    assert tokenizer.encode(whole) == [tokenizer.bos_token_id, *joined]
    assert tokenizer.unk_token_id not in joined and tokenizer.decode(joined) == whole
    picture = tokenizer.encode("USER: <image>\nDescribe the image. ASSISTANT:", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<image>") in picture and tokenizer.unk_token_id not in picture
    typed = tokenizer("a</s> \n</s><image>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>")} & set(typed)


def test_chat_template(world):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    parts = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False,
                                          add_generation_prompt=True)
    assert asked == "USER: <image>\nDescribe the image. ASSISTANT:"
    turns = [{"role": role, "content": content} for role, content in
             (("user", "one"), ("assistant", "two"), ("user", "three"))]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "USER: one ASSISTANT: two</s>USER: three "


def test_checkpoint_loads_in_transformers(world):
    from safetensors import safe_open
    from transformers import LlavaForConditionalGeneration
    model, info = LlavaForConditionalGeneration.from_pretrained(world / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with safe_open(world / "model" / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        q = tensors.get_tensor("language_model.model.layers.0.self_attn.q_proj.weight")
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight",
            "vision_tower.vision_model.embeddings.class_embedding"} <= names
    assert q.std().item() == pytest.approx(0.02, rel=0.05)
    assert 1.0e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert model.config.image_token_index < model.config.text_config.vocab_size


def test_the_towers_features_are_those_transformers_reads(world):
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    from model import VisionLLM
    theirs = LlavaForConditionalGeneration.from_pretrained(world / "model")
    ours = VisionLLM(theirs.config)
    ours.load_state_dict(load_file(world / "model" / "model.safetensors"))
    scene = shapes.place(shapes.keyed(0, "test"), ["red circle", "blue star"])
    pixels = torch.from_numpy(shapes.pixels_and_labels([scene])[0])
    with torch.no_grad():
        hidden = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert (ours.vision_tower(pixels) - hidden).abs().max() < 1e-5


def test_pixels_are_those_of_the_image_processor(world):
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil.from_pretrained(world / "model")
    scene = shapes.place(shapes.keyed(0, "test"), ["red circle", "blue star"])
    theirs = processor(shapes.draw(scene), return_tensors="np")["pixel_values"]
    assert np.abs(shapes.pixels_and_labels([scene])[0] - theirs).max() < 1e-5


def test_the_warm_up_teaches(world, tmp_path):
    """Twenty-five steps tell objects far better than none, which is near chance, 1 in 25."""
    shapes.make(tmp_path / "untaught", **{**TINY, "test": 64})
    taught, untaught = (json.loads((folder / "world.json").read_text())
                        for folder in (world, tmp_path / "untaught"))
    assert taught["object_accuracy"] > 0.4 and taught["patch_accuracy"] > 0.8
    assert untaught["object_accuracy"] < 0.15


# ---- made whole or not at all ----

def test_a_seed_determines_the_world(tmp_path):
    contents = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        shapes.make(tmp_path / name, seed=seed, **{**TINY, "warm_steps": 1})
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    for name in ("sft.json", "pairs.json", "test.json", "images/sft-00000.png", "model/model.safetensors"):
        assert contents[0][name] != contents[2][name], name


def test_refuses_ensures_and_overwrites(tmp_path):
    folder = tmp_path / "world"
    shapes.ensure(folder, **TINY)
    before = (folder / "sft.json").read_text()
    shapes.ensure(folder, seed=1, **TINY)
    assert (folder / "sft.json").read_text() == before
    with pytest.raises(ValueError, match="--overwrite"):
        shapes.make(folder, seed=1, **TINY)
    assert (folder / "sft.json").read_text() == before
    shapes.make(folder, seed=1, overwrite=True, **TINY)
    assert (folder / "sft.json").read_text() != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no world of shapes"):
        shapes.make(other, overwrite=True, **TINY)
    assert (other / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "world"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_world(tmp_path, sent):
    process = subprocess.Popen([sys.executable, SCRIPT, "--out", tmp_path / "world"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.time() + 60
        while not list(tmp_path.glob("*/new/images/sft-00100.png")):  # in the middle of drawing
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert not (tmp_path / "world").exists()
    if sent != signal.SIGKILL:
        assert not list(tmp_path.iterdir())


# ---- judging ----

def test_measures_on_hand_worked_answers():
    two = ["red circle", "blue star"]
    judged = [(two, "a red circle and a blue star."),                  # right
              (two, "a red circle and a green star."),                 # one invented, one missed
              (["white square"], "a white square."),                   # right
              (["white square"], "a white square a white square")]     # malformed, named twice, none invented
    found = shapes.measure(judged)
    assert found["n"] == 4
    assert found["chair_i"] == pytest.approx(1 / 7)                    # of 2 + 2 + 1 + 2 mentions
    assert found["chair_s"] == pytest.approx(1 / 4)
    assert found["coverage"] == pytest.approx(5 / 6)                   # of 2 + 2 + 1 + 1 objects
    assert found["exact"] == pytest.approx(2 / 4)
    assert found["well_formed"] == pytest.approx(3 / 4)
    assert found["words"] == pytest.approx((7 + 7 + 3 + 6) / 4)
    silent = shapes.measure([(two, "")])
    assert silent["chair_i"] == silent["chair_s"] == silent["coverage"] == silent["well_formed"] == 0


def test_evaluates_answers_and_samples(world, tmp_path):
    file, out, wrong = tmp_path / "answers.jsonl", tmp_path / "found.json", "a red red."
    lines = []
    for row in rows(world, "test"):
        right = answers(row)[0]
        lines.append({"id": row["id"], "answer": right if row["seen"] else None,
                      "answers": [{"text": right}, {"text": wrong}]})
    file.write_text("\n".join(map(json.dumps, lines)))
    done = run("--evaluate", file, "--world", world, "--json", out)
    assert done.returncode == 0, done.stderr
    found = {(r["over"], r["sets"]): (r["n"], r["exact"], r["coverage"]) for r in json.loads(out.read_text())}
    assert found == {
        ("answer", "all"): (64, 0.5, 0.5), ("answer", "seen"): (32, 1, 1), ("answer", "unseen"): (32, 0, 0),
        **{("2 samples", sets): (n, 0.5, 0.5) for sets, n in (("all", 128), ("seen", 64), ("unseen", 64))}}
    assert len(done.stdout.splitlines()) == 7 and "2 samples" in done.stdout
    file.write_text(json.dumps({"id": "nobody", "answer": wrong}))
    done = run("--evaluate", file, "--world", world)
    assert done.returncode != 0 and "nobody" in done.stderr


def test_ranks_samples_by_the_truth(world, tmp_path):
    prompts = {len(row["objects"]): row for row in rows(world, "prompts")}
    row = prompts[3]
    a, b, c = row["objects"]
    x, y, z = [name for name in shapes.OBJECTS if name not in row["objects"]][:3]
    best_first = [shapes.caption(named) for named in ([a, b, c], [b, a, c], [a, b], [a, b, x], [a, x, y])]
    best_first.append(f"a {a} a {b} a {c}.")  # all true, but malformed
    tie = shapes.caption([a, b, z])
    sampled = [best_first[i] for i in (3, 5, 0, 2, 0, 4, 1)]
    sampled.insert(2, "")  # says nothing: no row could hold it
    sampled.insert(5, tie)  # as good as an earlier one, which stays
    given = [{"id": row["id"], "answer": tie, "answers": [{"text": text} for text in sampled]},
             {"id": prompts[1]["id"], "answer": tie, "answers": [{"text": tie}, {"text": tie}]}]  # no choice
    file, out = tmp_path / "answers.jsonl", tmp_path / "ranked.json"
    file.write_text("\n".join(map(json.dumps, given)))
    done = run("--rank", file, "--world", world, "--pairs_out", out, "--mix")
    assert done.returncode == 0, done.stderr
    ranked, synthetic = json.loads(out.read_text())
    assert answers(ranked) == best_first
    assert (ranked["id"], ranked["image"], ranked["kind"]) == (row["id"], row["image"], "sampled")
    assert ranked["conversations"][0] == row["conversations"][0]
    assert synthetic == rows(world, "pairs")[0]


def test_judges_rewards_by_kind(tmp_path, capsys):
    def scored(name, *rewards):
        answers = [{"text": "a red star.", "logprob": -1.0, "reward": reward} for reward in rewards]
        return json.dumps({"id": name, "answers": answers}) + "\n"
    (tmp_path / "rewards.jsonl").write_text(
        scored("test-00000-added", 1, 0) + scored("test-00001-added", 0, 1) + scored("test-00002-added", 2, 2)
        + scored("test-00000-dropped", 0.5, 0.25)
        + scored("test-00003", 3, 1, 2))  # (3, 1) and (3, 2) right, (1, 2) wrong
    records = shapes.judge_pairs([tmp_path / "rewards.jsonl"])
    found = {r["pairs"]: (r["n"], r["accuracy"]) for r in records}
    assert found == {"added": (3, 0.5), "dropped": (1, 1.0), "sampled": (1, pytest.approx(2 / 3))}
    assert "added" in capsys.readouterr().out


def test_curve_is_of_the_answers(tmp_path, capsys):
    """Means over all answers of the files that are there, in their numbers' order; no log is read."""
    truth = {"a": {"id": "a", "objects": ["red circle", "blue star"]},
             "b": {"id": "b", "objects": ["white square"]}}
    (tmp_path / "rollouts").mkdir()

    def answered(number, *lines):
        keys = ("id", "answer", "score", "kl", "total")
        text = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
        (tmp_path / "rollouts" / f"{number}.jsonl").write_text(text)
    answered(10, ("a", "a red circle and a blue star.", 2.0, 1.5, 1.9))
    answered(9, ("a", "a red circle and a green star.", -1.0, 0.25, -1.1),
             ("b", "a white white", 0.5, -0.5, 0.6), ("b", "a white square.", 0.5, 0.75, 0.4))
    shapes.curve(tmp_path, truth)
    head, _, line = capsys.readouterr().out.strip().splitlines()
    assert head == "| iterations | KL | score | well_formed | chair_s | coverage | exact |"
    assert line == "| 9–10 | 0.500 | 0.500 | 0.750 | 0.250 | 0.667 | 0.500 |"  # of 4 answers, 6 objects
    shapes.curve(tmp_path, truth, each=1)
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    assert first == "| 9–9 | 0.167 | 0.000 | 0.667 | 0.333 | 0.500 | 0.333 |"
    assert second == "| 10–10 | 1.500 | 2.000 | 1.000 | 0.000 | 1.000 | 1.000 |"


def test_summary_is_the_mean_over_seeds(world, tmp_path):
    test = rows(world, "test")
    for seed, wrong in enumerate((0, 16, 32)):  # of 64 answers
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "greedy.jsonl").write_text("".join(
            json.dumps({"id": r["id"], "answer": "no idea" if i < wrong else answers(r)[0]}) + "\n"
            for i, r in enumerate(test)))
        (folder / "rewards.jsonl").write_text("".join(json.dumps(
            {"id": f"{r['id']}-added", "answers": [{"reward": i >= wrong}, {"reward": 0.5}]}) + "\n"
            for i, r in enumerate(test)))
        done = run("--world", world, "--evaluate", folder / "greedy.jsonl",
                   "--pairs", folder / "rewards.jsonl", "--json", folder / "figures.json")
        assert done.returncode == 0, done.stderr
    done = run("--summary", *[tmp_path / str(seed) / "figures.json" for seed in range(3)])
    assert done.returncode == 0, done.stderr
    greedy, = (line.split(" | ") for line in done.stdout.split("\n") if line.startswith("| greedy"))
    assert greedy[1] == "answer" and greedy[5] == "0.750 ± 0.250"  # exact: 1, .75, .5
    rewards, = (line.split(" | ") for line in done.stdout.split("\n") if line.startswith("| rewards | 0"))
    assert rewards[1] == "0.750 ± 0.250"
    one = run("--summary", tmp_path / "1" / "figures.json").stdout
    assert "| 0.750 |" in one and "±" not in one
