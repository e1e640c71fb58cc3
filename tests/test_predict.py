"""predict.py: answers, samples and scores against transformers."""
import functools
import json
import math

import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from tiny import ONE_TURN, fork


@pytest.fixture(scope="session")
def place(trained):
    return trained


@pytest.fixture(scope="module")
def predict(place, tmp_path_factory):
    """Options → predict.py's Run and the text that it wrote; every run is started once."""
    @functools.cache
    def run(*options, ranks=1, data="rows.json"):
        out = tmp_path_factory.mktemp("out") / "answers.jsonl"
        done = fork("predict", "--model", place / "model", "--data", place / data, "--images",
                    place / "images", "--out", out, "--max_new_tokens", 20, "--workers", 0, *options,
                    ranks=ranks)
        assert done.code == 0, done.err
        return done, out.read_text()
    return run


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def oracle(place):
    model = hf.LlavaForConditionalGeneration.from_pretrained(place / "model").eval()
    return model, hf.AutoProcessor.from_pretrained(place / "model")


def inputs(record, processor, place, answer=None):
    """A one-turn record, encoded by the processor of transformers."""
    paths = record.get("image") or []
    paths = paths if isinstance(paths, list) else [paths]
    asked = record["conversations"][0]["value"]
    asked = "<image>\n" * (len(paths) - asked.count("<image>")) + asked
    chat = [{"role": "user", "content": asked.strip()}]
    chat += [{"role": "assistant", "content": answer}] if answer else []
    text = processor.apply_chat_template(chat, add_generation_prompt=not answer)
    images = [Image.open(place / "images" / path).convert("RGB") for path in paths]
    return processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)


def test_greedy_answers_are_transformers(place, predict, oracle):
    """Each answer equals that of transformers.generate, which suppresses <image> and <pad> too; the lines
    are in the file's order and hold the prompt."""
    model, processor = oracle
    banned = [processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids("<image>")]
    done, text = predict("--micro_batch", 4)
    results = lines(text)
    assert [line["id"] for line in results] == [record["id"] for record in ONE_TURN]
    for record, line in zip(ONE_TURN, results):
        encoded = inputs(record, processor, place)
        with torch.no_grad():
            ids = model.generate(**encoded, max_new_tokens=20, do_sample=False, suppress_tokens=banned)
        answer = processor.tokenizer.decode(ids[0, encoded.input_ids.shape[1]:], skip_special_tokens=True)
        assert line["answer"] == answer.strip()
        assert line.keys() == {"id", "image", "prompt", "answer", "label"}
        assert line["image"] == record.get("image")
        assert line["label"] == record["conversations"][1]["value"].strip()
        images = record.get("image") or []
        assert line["prompt"].count("<image>") == (len(images) if isinstance(images, list) else 1)
        assert line["prompt"].startswith("<s>A chat between") and line["prompt"].endswith("ASSISTANT:")
    assert len({line["answer"] for line in results}) > 3  # it learned to look at what is asked
    right = sum(line["answer"] == line["label"] for line in results)
    assert 0 < right and f"10 records, 0 too long, 0 cut, exact match {right / 10:.4f} of 10" in done.out


def test_samples_do_not_depend_on_the_batch(predict):
    """Any --micro_batch draws the same answers; log-probabilities are equal to rounding. Another seed draws
    others, and the answers of a record differ."""
    expected = lines(predict("--micro_batch", 3, "--num_samples", 3)[1])
    for size in (1, 10):
        for line, other in zip(expected, lines(predict("--micro_batch", size, "--num_samples", 3)[1])):
            assert [a["text"] for a in line["answers"]] == [a["text"] for a in other["answers"]]
            for a, b in zip(line["answers"], other["answers"]):
                assert math.isclose(a["logprob"], b["logprob"], rel_tol=1e-4)
            assert line["answer"] == line["answers"][0]["text"] and len(line["answers"]) == 3
    others = lines(predict("--micro_batch", 3, "--num_samples", 3, "--seed", 1)[1])
    assert [line["answers"] for line in others] != [line["answers"] for line in expected]
    assert any(len({a["text"] for a in line["answers"]}) > 1 for line in expected)
    one = lines(predict("--micro_batch", 3, "--temperature", 1.0)[1])
    assert [line["answer"] for line in one] == [line["answer"] for line in expected]  # the first of many
    nearly = lines(predict("--micro_batch", 3, "--num_samples", 2, "--top_k", 1)[1])
    greedy = lines(predict("--micro_batch", 3)[1])
    assert all({a["text"] for a in n["answers"]} == {g["answer"]} for n, g in zip(nearly, greedy))


def test_scores_are_transformers(place, predict, oracle):
    """--score: the summed log-probability of each answer, end token included, and its length in tokens."""
    model, processor = oracle
    records = [{**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": answers}]}
            for record, answers in zip(ONE_TURN, (["a red circle", "no"], "yes", ["a", "a blue star", "no"]))]
    tiny.write_rows(place / "ranked.json", records)
    for record, line in zip(records, lines(predict("--score", data="ranked.json")[1]), strict=True):
        assert "answer" not in line and "label" not in line
        answers = record["conversations"][1]["value"]
        answers = answers if isinstance(answers, list) else [answers]
        for answer, scored in zip(answers, line["answers"], strict=True):
            start = inputs(record, processor, place).input_ids.shape[1]
            encoded = inputs(record, processor, place, answer)
            ids = encoded.input_ids[0]
            with torch.no_grad():
                logp = model(**encoded).logits[0].log_softmax(-1)
            expected = logp[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum()
            assert scored["text"] == answer and scored["tokens"] == len(ids) - start
            assert int(ids[-1]) == processor.tokenizer.eos_token_id
            assert math.isclose(scored["logprob"], expected, rel_tol=1e-5)


def test_a_sampled_logprob_is_its_score(place, predict):
    """What --num_samples says of an answer, --score says of it too, where it ended by itself."""
    sampled = lines(predict("--micro_batch", 3, "--num_samples", 3)[1])
    records = [{**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": [
        a["text"] for a in line["answers"]]}]} for record, line in zip(ONE_TURN, sampled)
        if all(a["text"] for a in line["answers"])]
    tiny.write_rows(place / "sampled.json", records)
    scored = {line["id"]: line["answers"] for line in lines(predict("--score", data="sampled.json")[1])}
    equal = [math.isclose(a["logprob"], b["logprob"], rel_tol=1e-4)
             for line in sampled for a, b in zip(line["answers"], scored.get(line["id"], []))]
    assert sum(equal) > len(equal) / 2  # others were cut at --max_new_tokens, or have a spelling of their own


def test_a_record_whose_prompt_is_too_long_has_no_answer(predict, place):
    """--max_len below a record's prompt: its answer is null, in its place, and it counts as too long."""
    tiny.write_rows(place / "long.json", [ONE_TURN[1], {**ONE_TURN[3], "conversations": [
        {"from": "human", "value": "What is it? " * 60}, {"from": "gpt", "value": "a star"}]}, ONE_TURN[0]])
    done, text = predict("--max_len", 150, data="long.json")
    answers = [line["answer"] for line in lines(text)]
    assert answers[1] is None and answers[0] is not None and answers[2] is not None
    assert "3 records, 1 too long" in done.out and " of 3" in done.out
    scored = lines(predict("--max_len", 150, "--score", data="long.json")[1])
    assert [line["answers"] is None for line in scored] == [False, True, False]


def test_a_records_other_fields_come_along(predict, place, tmp_path):
    """question_id, category, …; its own label goes before the gpt turn's, and only a text can be matched.
    Each line is JSON, and --resume knows it."""
    first = lines(predict("--micro_batch", 4)[1])
    more = [{"question_id": 3, "category": ["a"], "answer": "no", "prompt": "x", "label": first[0]["answer"]},
            {"label": "never said"}, {"label": 5}, {"label": None, "score": float("nan"), "text": "\ud83d"}]
    records = [{**record, **fields} for record, fields in zip(ONE_TURN, more)]
    records[1] = {**records[1], "conversations": records[1]["conversations"][:1]}  # a prompt: not matched
    tiny.write_rows(place / "more.json", records)
    done, text = predict("--micro_batch", 4, data="more.json")
    results = lines(text)
    assert [line["answer"] for line in results] == [line["answer"] for line in first[:4]]
    assert results[0] == {**first[0], "question_id": 3, "category": ["a"], "label": first[0]["answer"]}
    assert [line["label"] for line in results] == [first[0]["answer"], "never said", 5, first[3]["label"]]
    assert results[3]["score"] is None and results[3]["text"] == "?" and "NaN" not in text
    right = (1 + (first[3]["answer"] == first[3]["label"])) / 2
    assert f"4 records, 0 too long, 0 cut, exact match {right:.4f} of 2" in done.out
    assert lines(predict("--score", data="rows.json")[1])[0].keys() == {"id", "image", "prompt", "answers"}
    argv = ["--model", place / "model", "--data", place / "more.json", "--images", place / "images", "--out",
            tmp_path / "out.jsonl", "--max_new_tokens", 20, "--micro_batch", 4]
    assert fork("predict", *argv).code == 0
    done = fork("predict", *argv, "--resume")
    assert done.code == 0 and "answered again" not in done.out
    assert (tmp_path / "out.jsonl").read_text() == text


def test_records_without_an_answer_have_no_label(predict, place):
    """Prompts without an answer are answered; there is then no label and no exact match."""
    prompts = [{**record, "conversations": record["conversations"][:1]} for record in ONE_TURN]
    tiny.write_rows(place / "prompts.json", prompts)
    done, text = predict("--micro_batch", 4, data="prompts.json")
    assert all("label" not in line for line in lines(text)) and "exact match" not in done.out
    labelled = lines(predict("--micro_batch", 4)[1])
    assert [line["answer"] for line in lines(text)] == [line["answer"] for line in labelled]


def test_a_user_predicts_on_two_ranks(place, predict, tmp_path):
    """torchrun, into a folder that is not there yet; then --overwrite's rule."""
    argv = ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images",
            "--out", tmp_path / "new" / "answers.jsonl", "--max_new_tokens", 20, "--micro_batch", 3]
    done = tiny.command("predict", *argv, ranks=2)
    assert done.code == 0, done.err
    assert "wrote" in done.out and "Traceback" not in done.err
    text = (tmp_path / "new" / "answers.jsonl").read_text()
    assert text == predict("--micro_batch", 3)[1]
    done = fork("predict", *argv)
    assert done.code == 2 and "which exists: --resume continues it, --overwrite replaces it" in done.error
    assert (tmp_path / "new" / "answers.jsonl").read_text() == text
    assert fork("predict", *argv, "--max_new_tokens", 1, "--overwrite").code == 0
    assert (tmp_path / "new" / "answers.jsonl").read_text() != text
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"answers.jsonl", "answers.jsonl.args.json"}


def test_answers_are_written_as_they_are_done(place, predict, tmp_path):
    """Every batch's lines are on disk before the next is decoded. --resume drops an incomplete line and goes
    on; with other options it is refused; of what is complete it changes nothing."""
    out = tmp_path / "answers.jsonl"
    argv = ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images",
            "--out", out, "--max_new_tokens", 20]
    hook = functools.partial(tiny.at_call, "predict.generate", 3, tiny.die)
    assert fork("predict", *argv, "--micro_batch", 3, prepare=hook).code != 0
    lines = out.read_bytes().splitlines(keepends=True)
    text = predict("--micro_batch", 3)[1].encode()
    assert len(lines) == 6 and text.startswith(b"".join(lines))
    out.write_bytes(b"".join(lines)[:-30])
    done = fork("predict", *argv, "--micro_batch", 3, "--resume", "--seed", 1)
    assert done.code == 2 and "--seed 0 then, 1 now" in done.error
    for _ in range(2):
        done = fork("predict", *argv, "--micro_batch", 3, "--resume")
        assert done.code == 0 and out.read_bytes() == text
        labelled = [json.loads(line) for line in text.splitlines()]
        right = sum(line["answer"] == line["label"] for line in labelled) / len(labelled)
        assert f"10 records, 0 too long, 0 cut, exact match {right:.4f} of 10" in done.out


DAMAGE = {  # of the lines that are there: how many of them stay
    "half a line in the middle": (lambda lines: [*lines[:2], lines[2][:20] + b"\n", *lines[3:]], 2),
    "NULs": (lambda lines: [*lines[:3], b"\0" * 999], 3),
    "a line removed": (lambda lines: [*lines[:1], *lines[2:]], 1),
    "a line twice": (lambda lines: [*lines[:2], *lines[1:]], 2),
    "other records": (lambda lines: [b'{"id": "row 0"}\n', *lines[1:]], 0),
    "another prompt": (lambda lines: [line.replace(b"USER", b"User") for line in lines], 0)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_lines_that_are_not_of_their_records_are_answered_again(damage, place, predict, tmp_path):
    """From the first of them on, and it is said."""
    out, (damaged, n) = tmp_path / "answers.jsonl", DAMAGE[damage]
    argv = ["--model", place / "model", "--data", place / "rows.json", "--images", place / "images",
            "--out", out, "--max_new_tokens", 20, "--micro_batch", 1]
    assert fork("predict", *argv).code == 0
    text = out.read_bytes()
    out.write_bytes(b"".join(damaged(text.splitlines(keepends=True))))
    done = fork("predict", *argv, "--resume")
    assert done.code == 0 and out.read_bytes() == text, done.err
    assert f"{out}: {n} complete lines stay, the rest is answered again" in done.out


def test_answers_are_not_mixed_up(place, tmp_path):
    """--out is no data file; answers whose options are not known are not continued."""
    data = tmp_path / "rows.jsonl"
    data.write_bytes((place / "rows.json").read_bytes())
    argv = ["--model", place / "model", "--data", data, "--images", place / "images", "--max_new_tokens", 1]
    for option in ("--resume", "--overwrite"):
        done = fork("predict", *argv, "--out", data, option)
        assert done.code == 2 and f"got --out {data}, which is --data too" in done.error
    assert data.read_bytes() == (place / "rows.json").read_bytes()
    assert fork("predict", *argv, "--out", tmp_path / "a.jsonl").code == 0
    (tmp_path / "a.jsonl.args.json").unlink()
    done = fork("predict", *argv, "--out", tmp_path / "a.jsonl", "--resume")
    assert done.code == 2 and "a.jsonl.args.json is gone" in done.error


@pytest.mark.parametrize("options", [[], ["--num_samples", 2], ["--score"]])
def test_numbers_that_are_not_finite_are_no_answer(options, place, tmp_path):
    """Of weights that hold NaN: the record is named, with exit code 1, and no NaN is written."""
    tiny.shutil.copytree(place / "model", tmp_path / "model")
    tensors = load_file(place / "model" / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] = torch.nan
    tiny.write(tmp_path / "model", tensors)
    done = fork("predict", "--model", tmp_path / "model", "--data", place / "rows.json", "--images",
                place / "images", "--out", tmp_path / "answers.jsonl", "--max_new_tokens", 4, *options)
    assert done.code == 1, done.err
    assert "record 0 (id row 0): got the logprob nan, need a finite number" in done.error
    assert not (tmp_path / "answers.jsonl").exists()


# ---- rewards ----


def reward_by_transformers(folder):
    """A reward model as transformers reads it: score.safetensors on the last state. → function of inputs()"""
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    head = load_file(folder / "score.safetensors")

    @torch.no_grad()
    def reward(encoded):
        hidden = model(**encoded, output_hidden_states=True).hidden_states[-1]
        return float(hidden[0, -1] @ head["weight"][0] + head["bias"][0])
    return reward


@pytest.mark.parametrize("name", ["reward", "tower", "llama2"])
def test_rewards_are_transformers(name, place, predict):
    """--score --reward_model: every answer's reward by the reward model's own tower and template; text,
    log-probability and number of tokens as without."""
    tiny.write_rows(place / "given.json", ANSWERED)
    reward, processor = reward_by_transformers(place / name), hf.AutoProcessor.from_pretrained(place / name)
    results = lines(predict("--score", "--reward_model", place / name, data="given.json")[1])
    plain, rewards = lines(predict("--score", data="given.json")[1]), []
    for record, line, without in zip(ANSWERED, results, plain, strict=True):
        answers = record["conversations"][1]["value"]
        for answer, scored in zip(answers if isinstance(answers, list) else [answers], line["answers"],
                                  strict=True):
            encoded = inputs(record, processor, place, answer)
            assert scored["text"] == answer and encoded.input_ids[0, -1] == processor.tokenizer.eos_token_id
            rewards.append(scored.pop("reward"))
            assert math.isclose(rewards[-1], reward(encoded), rel_tol=1e-5, abs_tol=1e-5)
        assert line == without
    assert len(set(rewards)) == len(rewards) == 14


ANSWERED = [{**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": answers}]}
         for record, answers in zip(ONE_TURN, (["a red circle", "no"], "yes", ["a", "a blue star", "no"],
                                        ["yes", "no", "a star", "a picture", "a human, a human, a human"],
                                        ["polite", "no"], "a picture"))]


BEST = "--micro_batch", 3, "--num_samples", 3


def test_the_best_of_three(place, predict):
    """Answers and log-probabilities are those drawn without a reward model; the answer is the best rewarded,
    which is not always the first."""
    results = lines(predict(*BEST, "--reward_model", place / "reward")[1])
    places = []
    for line, without in zip(results, lines(predict(*BEST)[1]), strict=True):
        rewards = [answer.pop("reward") for answer in line["answers"]]
        places.append(rewards.index(max(rewards)))
        assert line["answer"] == line["answers"][places[-1]]["text"] and len(rewards) == 3
        assert line["answers"] == without["answers"]
        assert {**line, "answer": 0} == {**without, "answer": 0}
    assert len(set(places)) > 1
    (one,) = lines(predict("--micro_batch", 3, "--reward_model", place / "reward")[1])[0]["answers"]
    assert one.keys() == {"text", "logprob", "reward"}  # greedy, and rewarded too


def watched(file):
    """Writes down what passes a vision tower, and which sampled ids are rewarded."""
    import predict
    from model import CLIPVision
    forward, add, seen = CLIPVision.forward, predict.add_rewards, {"towers": [], "rewards": []}

    def watched_forward(self, pixels):
        seen["towers"].append(len(pixels))
        return forward(self, pixels)

    def watched_add(answers, examples, *rest):
        add(answers, examples, *rest)
        for example, record in zip(examples, answers):
            item = {"prompt": example.prompt.tolist(), "images": example.images}
            seen["rewards"] += [{**item, "ids": ids.tolist(), "reward": answer["reward"]}
                                for ids, answer in zip(example.answers, record, strict=True)]
        file.write_text(json.dumps(seen))
    CLIPVision.forward, predict.add_rewards = watched_forward, watched_add


@pytest.mark.parametrize("name, options, passes", [
    ("reward", [], 1), ("tower", [], 2), ("reward", ["--image_mode", "pad"], 2)])
def test_an_equal_tower_is_run_once(name, options, passes, place, tmp_path):
    """The distinct images of a micro-batch pass one tower if both models have the same one and the same image
    mode, else both towers. Each reward equals that of the sampled ids in a sequence of their own, with the
    images as the reward model sees them."""
    done = fork("predict", "--model", place / "model", "--data", place / "rows.json", "--images",
                place / "images", "--out", tmp_path / "out.jsonl", "--max_new_tokens", 12, "--workers", 0,
                *BEST, "--reward_model", place / name, *options,
                prepare=functools.partial(watched, tmp_path / "seen.json"))
    assert done.code == 0, done.err
    seen = json.loads((tmp_path / "seen.json").read_text())
    groups, expected = [ONE_TURN[i:i + 3] for i in range(0, len(ONE_TURN), 3)], []
    for group in groups:
        paths = [record.get("image") or [] for record in group]
        distinct = {path for p in paths for path in (p if isinstance(p, list) else [p])}
        expected += [len(distinct) or 1] * passes
    assert seen["towers"] == expected

    reward, processor = reward_by_transformers(place / name), hf.AutoProcessor.from_pretrained(place / name)
    written = [a["reward"] for line in lines((tmp_path / "out.jsonl").read_text()) for a in line["answers"]]
    assert written == [item["reward"] for item in seen["rewards"]] and len(written) == 3 * len(ONE_TURN)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for item in seen["rewards"]:
        ids = [i for i in (*item["prompt"], *item["ids"]) for _ in range(tiny.PATCHES if i == token else 1)]
        images = [Image.open(path).convert("RGB") for path in item["images"]]
        pixels = processor.image_processor(images, return_tensors="pt").pixel_values if images else None
        expected = reward({"input_ids": torch.tensor([ids]), "pixel_values": pixels})
        assert math.isclose(item["reward"], expected, rel_tol=1e-5, abs_tol=1e-5)


def test_records_that_do_not_fit_the_reward_model(place, predict):
    """A record that is too long in the reward model's template has no answer, like one that is
    too long for the policy; the answers of the others do not change."""
    tiny.shutil.copytree(place / "reward", place / "more words")
    jinja = place / "more words" / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("A chat between", "A polite chat between"))
    processor = hf.AutoProcessor.from_pretrained(place / "model")
    longest = max(inputs(record, processor, place).input_ids.shape[1] for record in ONE_TURN)
    results = {name: predict(*BEST, "--max_len", longest + 1, "--reward_model", place / name)
             for name in ("reward", "more words")}
    all_, some = (lines(results[name][1]) for name in ("reward", "more words"))
    assert "10 records, 0 too long" in results["reward"][0].out and all(line["answers"] for line in all_)
    left = [line["answers"] is not None for line in some]
    assert 0 < sum(left) < 10 and f"10 records, {10 - sum(left)} too long" in results["more words"][0].out
    for line, full in zip(some, all_, strict=True):
        if line["answers"]:
            assert [a["text"] for a in line["answers"]] == [a["text"] for a in full["answers"]]
        else:
            assert line["answer"] is None and line["id"] == full["id"]
