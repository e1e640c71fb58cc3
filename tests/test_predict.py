"""predict.py: answers, samples and scores against transformers."""
import functools
import json
import sys

import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from tiny import ONE_TURN, fork, inside

import predict
from model import CLIPVision

SAMPLED = "--num_samples", 3


def arguments(trained, out, *options, data="rows.json"):
    return ["--model", trained / "model", "--data", trained / data, "--images", trained / "images", "--out",
            out, "--max_new_tokens", 20, "--workers", 0, "--micro_batch", 3, *options]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Options → predict.py's lines and what it printed."""
    @functools.cache
    def started(*options, data="rows.json"):
        out = tmp_path_factory.mktemp("out") / "answers.jsonl"
        done = fork("predict", *arguments(trained, out, *options, data=data))
        assert done.code == 0, done.err
        return lines(out), done.out
    return started


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def inputs(record, processor, trained, answer=None):
    """A one-turn record, encoded by the processor of transformers."""
    paths = record.get("image") or []
    paths = paths if isinstance(paths, list) else [paths]
    asked = record["conversations"][0]["value"]
    asked = "<image>\n" * (len(paths) - asked.count("<image>")) + asked
    chat = [{"role": "user", "content": asked.strip()}]
    chat += [{"role": "assistant", "content": answer}] if answer else []
    text = processor.apply_chat_template(chat, add_generation_prompt=not answer)
    images = [Image.open(trained / "images" / path).convert("RGB") for path in paths]
    return processor(text=text, images=images or None, return_tensors="pt", add_special_tokens=False)


def test_greedy_answers_are_transformers(trained, run):
    """Without <image> and <pad>, as ours. Lines are in the file's order and hold the prompt."""
    model = hf.LlavaForConditionalGeneration.from_pretrained(trained / "model").eval()
    processor = hf.AutoProcessor.from_pretrained(trained / "model")
    banned = [processor.tokenizer.pad_token_id, processor.tokenizer.convert_tokens_to_ids("<image>")]
    results, printed = run()
    for record, line in zip(ONE_TURN, results, strict=True):
        encoded = inputs(record, processor, trained)
        with torch.no_grad():
            ids = model.generate(**encoded, max_new_tokens=20, do_sample=False, suppress_tokens=banned)
        answer = processor.tokenizer.decode(ids[0, encoded.input_ids.shape[1]:], skip_special_tokens=True)
        images = record.get("image") or []
        assert line["prompt"].count("<image>") == (len(images) if isinstance(images, list) else 1)
        assert line["prompt"].startswith("<s>A chat between") and line["prompt"].endswith("ASSISTANT:")
        assert line == {"id": record["id"], "image": record.get("image"), "prompt": line["prompt"],
                        "answer": answer.strip(), "label": record["conversations"][1]["value"].strip()}
    right = sum(line["answer"] == line["label"] for line in results)
    assert 0 < right and f"10 records, 0 too long, 0 cut, exact match {right / 10:.4f} of 10" in printed


def on_terminal():  # each piece that is written ends with a bar
    write = sys.stdout.write
    sys.stdout.isatty, sys.stdout.write = lambda: True, lambda text: write(text + "|" * (text != "\n"))


@pytest.mark.parametrize("prepare, ranks", [(None, 2), (on_terminal, 1)])
def test_questions_are_turns_of_a_conversation(prepare, ranks, trained, tmp_path):
    """Printed at once or as they grow, the answers are those to the same turns in a data file."""
    image, asked = ONE_TURN[0]["image"], ["What is <image> this?", "And now?"]
    turns, expected = [], []
    for prompt in asked:
        turns.append({"from": "human", "value": prompt})
        (trained / "turns.json").write_text(json.dumps([{"image": image, "conversations": turns}]))
        out = tmp_path / f"{len(turns)}.jsonl"
        assert fork("predict", *arguments(trained, out, data="turns.json")).code == 0
        expected.append(lines(out)[0]["answer"])
        turns.append({"from": "gpt", "value": expected[-1]})
    argv = ["--model", trained / "model", "--max_new_tokens", 20, "--image", trained / "images" / image]
    for prompt in asked:
        argv += ["--prompt", prompt]
    done = fork("predict", *argv, ranks=ranks, prepare=prepare)
    if prepare:
        assert all(line.count("|") > 2 for line in done.out.splitlines()), done.out
    assert done.code == 0 and done.out.replace("|", "") == "".join(f"{answer}\n" for answer in expected), done
    done = fork("predict", *argv, "--image", trained / "images" / "none.png")
    assert done.code == 2 and "none.png: no such file" in done.err


def test_samples_do_not_depend_on_the_batch(run):
    """Another seed draws others; one sample is the first of many; top_k 1 is greedy."""
    expected = run(*SAMPLED)[0]
    for size in (1, 10):
        for line, other in zip(expected, run(*SAMPLED, "--micro_batch", size)[0], strict=True):
            for a, b in zip(line["answers"], other["answers"], strict=True):
                assert a == {"text": b["text"], "logprob": pytest.approx(b["logprob"], rel=1e-4)}
            assert line["answer"] == line["answers"][0]["text"]
    assert run(*SAMPLED, "--seed", 1)[0] != expected
    assert [line["answer"] for line in run("--temperature", 1.0)[0]] == [line["answer"] for line in expected]
    for line, greedy in zip(run(*SAMPLED, "--top_k", 1)[0], run()[0]):
        assert {a["text"] for a in line["answers"]} == {greedy["answer"]}


def reward_by_transformers(folder):
    """score.safetensors on the last hidden state that transformers computes → function of inputs()"""
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    head = load_file(folder / "score.safetensors")

    @torch.no_grad()
    def reward(encoded):
        hidden = model(**encoded, output_hidden_states=True).hidden_states[-1]
        return pytest.approx(float(hidden[0, -1] @ head["weight"][0] + head["bias"][0]), rel=1e-5, abs=1e-5)
    return reward


@pytest.mark.parametrize("name", ["reward", "tower", "llama2"])
def test_scores_and_rewards_are_transformers(name, trained, run):
    """Log-probability and length of each answer with its end token; rewards by an own tower and template."""
    answers = ["a red circle", "no"], ["yes"], ["a", "a blue star", "no"], ["a human, a human, a human"]
    records = [{**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": values}]}
               for record, values in zip(ONE_TURN, answers)]
    tiny.write_rows(trained / "given.json", records)
    model = hf.LlavaForConditionalGeneration.from_pretrained(trained / "model").eval()
    folders = trained / "model", trained / name
    processor, reward_processor = (hf.AutoProcessor.from_pretrained(folder) for folder in folders)
    reward = reward_by_transformers(trained / name)
    results = run("--score", "--reward_model", trained / name, data="given.json")[0]
    for record, values, line in zip(records, answers, results, strict=True):
        assert line.keys() == {"id", "image", "prompt", "answers"}
        start = inputs(record, processor, trained).input_ids.shape[1]
        for answer, scored in zip(values, line["answers"], strict=True):
            encoded = inputs(record, processor, trained, answer)
            ids = encoded.input_ids[0]
            with torch.no_grad():
                logp = model(**encoded).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[start - 1:]
            assert scored == {
                "text": answer, "logprob": pytest.approx(float(logp.sum()), rel=1e-5),
                "tokens": len(ids) - start,
                "reward": reward(inputs(record, reward_processor, trained, answer))}


@pytest.mark.parametrize("name, options, passes", [
    ("reward", [], 1), ("tower", [], 2), ("reward", ["--image_mode", "pad"], 2)])
def test_the_best_of_three(name, options, passes, trained, run, world, tmp_path, monkeypatch):
    """Answers are those drawn without a reward model, each reward that of the sampled ids by themselves. The
    distinct images of a micro-batch pass one tower if both models have the same tower and image mode."""
    images, rewarded, forward, add = [], [], CLIPVision.forward, predict.add_rewards

    def recording_add(answers, examples, *rest):
        add(answers, examples, *rest)
        rewarded.extend((example, ids, answer["reward"]) for example, record in zip(examples, answers)
                        for ids, answer in zip(example.answers, record, strict=True))
    monkeypatch.setattr(CLIPVision, "forward", lambda self, x: images.append(len(x)) or forward(self, x))
    monkeypatch.setattr(predict, "add_rewards", recording_add)
    out = tmp_path / "out.jsonl"
    inside("predict", *arguments(trained, out, *SAMPLED, *options, "--reward_model", trained / name))
    paths = [record.get("image") or [] for record in ONE_TURN]
    paths = [path if isinstance(path, list) else [path] for path in paths]
    assert images == [n for i in range(0, 10, 3) for n in [len(set(sum(paths[i:i + 3], []))) or 1] * passes]
    rewards = [[answer["reward"] for answer in line["answers"]] for line in lines(out)]
    assert sum(rewards, []) == [reward for *_, reward in rewarded] and len(rewarded) == 30
    assert len({values.index(max(values)) for values in rewards}) > 1
    for line, values, without in zip(lines(out), rewards, run(*SAMPLED, *options)[0], strict=True):
        assert line == {**without, "answer": line["answers"][values.index(max(values))]["text"], "answers": [
            {**answer, "reward": reward} for answer, reward in zip(without["answers"], values)]}
    reward = reward_by_transformers(trained / name)
    processor = hf.AutoProcessor.from_pretrained(trained / name)
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for example, sampled, value in rewarded:
        ids = [i for i in (*example.prompt, *sampled) for _ in range(tiny.PATCHES if i == token else 1)]
        pixels = [Image.open(path).convert("RGB") for path in example.images]
        pixels = processor.image_processor(pixels, return_tensors="pt").pixel_values if pixels else None
        assert value == reward({"input_ids": torch.tensor([ids]), "pixel_values": pixels})


def test_prompts_that_are_too_long_have_no_answer(run, trained):
    """In either model's template: null in its place, and counted; the other answers do not change."""
    tiny.write_rows(trained / "long.json", [*ONE_TURN, tiny.row(10, None, "What is it? " * 60, "a star")])
    tiny.shutil.copytree(trained / "reward", trained / "more words")
    jinja = trained / "more words" / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("A chat between", "A polite chat between"))
    processor = hf.AutoProcessor.from_pretrained(trained / "model")
    longest = max(inputs(record, processor, trained).input_ids.shape[1] for record in ONE_TURN)
    results, printed = run(*SAMPLED, "--max_len", longest + 1, "--reward_model", trained / "more words",
                           data="long.json")
    answered = [line["answer"] is not None for line in results]
    assert answered == [line["answers"] is not None for line in results] and 0 < sum(answered[:10]) < 10
    assert f"11 records, {11 - sum(answered)} too long" in printed and "of 11" in printed and not answered[10]
    for line, expected in zip(results, run(*SAMPLED)[0]):
        assert [a["text"] for a in line["answers"] or expected["answers"]] == [
            a["text"] for a in expected["answers"]]


def test_other_fields_of_a_record_are_copied(run, trained):
    """Its own label goes before the gpt turn's, and only a text can be matched. Each line is JSON."""
    first = run()[0]
    more = [{"question_id": 3, "category": ["a"], "answer": "no", "prompt": "x", "label": first[0]["answer"]},
            {}, {"label": 5}, {"label": None, "score": float("nan"), "text": "\ud83d"}]
    records = [{**record, **fields} for record, fields in zip(ONE_TURN, more)]
    records[1] = {**records[1], "conversations": records[1]["conversations"][:1]}
    tiny.write_rows(trained / "more.json", records)
    results, printed = run(data="more.json")
    assert [line["answer"] for line in results] == [line["answer"] for line in first[:4]]
    assert results[0] == {**first[0], "question_id": 3, "category": ["a"], "label": first[0]["answer"]}
    assert [line.get("label") for line in results] == [first[0]["answer"], None, 5, first[3]["label"]]
    assert results[3]["score"] is None and results[3]["text"] == "?"
    right = (1 + (first[3]["answer"] == first[3]["label"])) / 2
    assert f"4 records, 0 too long, 0 cut, exact match {right:.4f} of 2" in printed


# ---- the output file ----

def test_overwrite(trained, run, tmp_path):
    """python, into a new folder, and again. --out is no data file."""
    out, rows = tmp_path / "new" / "answers.jsonl", tmp_path / "rows.jsonl"
    done = tiny.command("predict", *arguments(trained, out, *SAMPLED))
    assert done.code == 0 and "wrote" in done.out and "Traceback" not in done.err, done.err
    assert lines(out) == run(*SAMPLED)[0]
    assert fork("predict", *arguments(trained, out, "--overwrite")).code == 0 and lines(out) == run()[0]
    rows.write_bytes((trained / "rows.json").read_bytes())
    done = fork("predict", *arguments(trained, rows, "--data", rows, "--overwrite"))
    assert done.code == 2 and f"got --out {rows}, which is --data too" in done.error


def test_resume_keeps_complete_lines(trained, run, tmp_path):
    """Up to the first that is damaged or not its record's. Other or unknown options are refused."""
    out = tmp_path / "answers.jsonl"
    fork("predict", *arguments(trained, out), prepare=functools.partial(tiny.at_call, "predict.generate", 3))
    six = out.read_bytes().splitlines(keepends=True)  # killed before its third batch: every line is on disk
    removed, edited = [six[0], *six[2:]], [line.replace(b"USER", b"User") for line in six]
    for damaged, n in ([*six[:5], six[5][:-30]], 5), ([*six[:3], b"\0" * 999], 3), (removed, 1), (edited, 0):
        out.write_bytes(b"".join(damaged))
        done = fork("predict", *arguments(trained, out, "--resume"))
        assert f"{out}: {n} complete lines stay, the rest is answered again" in done.out and len(six) == 6
        assert lines(out) == run()[0] and done.out.split(".jsonl: ")[-1] == run()[1].split(".jsonl: ")[-1]
    done = fork("predict", *arguments(trained, out, "--resume"))
    assert done.code == 0 and "stay" not in done.out and lines(out) == run()[0]
    done = fork("predict", *arguments(trained, out, "--resume", "--seed", 1))
    assert done.code == 2 and "--seed 0 then, 1 now" in done.error
    tiny.os.remove(f"{out}.args.json")
    assert "answers.jsonl.args.json is gone" in fork("predict", *arguments(trained, out, "--resume")).error


def test_numbers_that_are_not_finite_are_refused(trained, tmp_path):
    """The record is named, and no NaN is written."""
    tiny.shutil.copytree(trained / "model", tmp_path / "model")
    tensors = load_file(trained / "model" / "model.safetensors")
    tensors["language_model.model.norm.weight"][3] = torch.nan
    tiny.write(tmp_path / "model", tensors)
    out = tmp_path / "out.jsonl"
    done = fork("predict", *arguments(trained, out, "--model", tmp_path / "model"))
    assert done.code == 1 and not out.exists(), done.err
    assert "record 0 (id row 0): got the logprob nan, need a finite number" in done.error
