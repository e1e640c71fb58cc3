"""A small data set with exact ground truth: every stage of the chain is measured without human or model.

An image is 64x64 pixels, a 4x4 grid of cells, with one to four distinct objects (6 colours x 4 shapes), one
a cell. Its true caption names them in reading order: "a red circle, a blue square and a green star."

    python examples/shapes.py --out DIR                     make the data set (half a minute on two cores)
    python examples/shapes.py --evaluate ANSWERS.jsonl ...  metrics of the answers that predict.py wrote
    python examples/shapes.py --rank ANSWERS.jsonl --pairs_out FILE.json
                                                            rank its sampled answers by the truth
    python examples/shapes.py --pairs SCORED.jsonl ...      accuracy of the rewards of predict.py --score
    python examples/shapes.py --summary METRICS.json ...    one table of several seeds' metrics (--json)
    python examples/shapes.py --curve DIR                   reward and truth over PPO's iterations

What making it leaves in DIR:

    model/          a starting checkpoint in the layout of llava-hf/llava-1.5-7b-hf, with tokenizer; the LLaMA
                    is random, the tower has learned to see the objects, as CLIP learned from the web
    images/         the images. images_blank/ and images_shuffled/ hold the test images' names with
                    nothing to see or another test image: what a model gets right there, it does not see
    sft.json        captions, 40 % with an error: half invent an object, half mistake a colour or a shape
    pairs.json      preferences, best answer first: 50 % truth > one error, 25 % truth > an object left out,
                    25 % one error > two
    prompts.json    questions alone
    test.json       held-out images with true captions; test_pairs.json: a preference of every kind on each
    world.json      how it was made; written last

15 % of the sets of objects are withheld: no image and no caption of the training files shows or names just
these objects. Half of the test images show withheld sets ("unseen"), half sets out of sft.json ("seen").

Legend: M images, S their side in pixels.
"""

import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from itertools import combinations
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evaluate import by_samples, chair, exact_match, print_table  # noqa: E402
from evaluate import read_answers as read_records  # noqa: E402

# torch and transformers are imported where the checkpoint is made: metrics need neither and start at once

ROOT = Path(__file__).resolve().parent.parent
GRID, CELL = 4, 16
SIZE = GRID * CELL
COLOURS = {"red": (230, 50, 50), "green": (50, 190, 70), "blue": (60, 90, 240),
           "yellow": (240, 220, 60), "purple": (160, 60, 200), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUND = (24, 26, 32)
STAR = [(5.5 + radius * np.sin(turn), 6 - radius * np.cos(turn))  # ten corners, every second one drawn in
        for turn, radius in zip(np.pi / 5 * np.arange(10), [5.7, 2.3] * 5, strict=True)]
OBJECTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
MOST = 4                       # objects in an image
WITHHELD = 0.15                # share of the sets of each size that no training file shows or names
NOISE = 0.4                    # share of the captions in sft.json that hold an error
ERRORS = {"added": 0.5, "recoloured": 0.25, "reshaped": 0.25}
KINDS = (*ERRORS, "dropped", "worsened")
QUESTION = "Describe the image."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, by channel
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{{ '<image>\\n' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ 'ASSISTANT: ' + text(message.content) + '</s>' }}
{%- else -%}{{ 'USER: ' + text(message.content) + ' ' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def keyed(seed, purpose):
    """A numpy generator for one purpose: what one part draws does not depend on how much another drew."""
    return np.random.default_rng([seed, *purpose.encode()])


# ---- images ----

def place(rng, objects):
    """Objects in random cells, shifted by up to 2 pixels -> (cell, left, top, object) in reading order."""
    cells = np.sort(rng.permutation(GRID * GRID)[:len(objects)]).tolist()
    shifts = rng.integers(0, 5, (len(objects), 2)).tolist()
    order = rng.permutation(len(objects))
    return [(cell, CELL * (cell % GRID) + dx, CELL * (cell // GRID) + dy, objects[i])
            for cell, (dx, dy), i in zip(cells, shifts, order, strict=True)]


def draw(placed):
    """Each object fills a box of 12 pixels and never leaves its cell."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for _, x, y, name in placed:
        colour, shape = name.split()
        fill = COLOURS[colour]
        if shape == "circle":
            pen.ellipse((x, y, x + 11, y + 11), fill)
        elif shape == "square":
            pen.rectangle((x + 1, y + 1, x + 10, y + 10), fill)
        elif shape == "triangle":
            pen.polygon([(x + 5.5, y), (x + 11, y + 11), (x, y + 11)], fill)
        else:
            pen.polygon([(x + dx, y + dy) for dx, dy in STAR], fill)
    return image


def pixels_and_labels(scenes):
    """-> pixels [M, 3, S, S] as CLIP's preprocessing gives; labels [M, patches]: 0 empty, else 1 + object."""
    pixels = np.stack([np.asarray(draw(placed), np.float32) for placed in scenes]) / 255
    labels = np.zeros((len(scenes), GRID * GRID), np.int64)
    for label, placed in zip(labels, scenes, strict=True):
        for cell, _, _, name in placed:
            label[cell] = 1 + OBJECTS.index(name)
    return ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2), labels


# ---- captions and their errors ----

def caption(objects):
    names = [f"a {name}" for name in objects]
    return (f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]) + "."


def mentions(text):
    """The objects that a text names, in its order, well-formed or not."""
    return re.findall(rf"\b(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b", text)


def well_formed(text):
    """Whether the whole text is a caption of this data set, true or false."""
    named = mentions(text)
    return bool(named) and caption(named) == text


def corrupt(rng, truth, named, kind):
    """Adds an error to a caption that names `named` where the image shows `truth` -> what it names then,
    None where there is no room for such an error. A new error never repairs or hides an earlier one."""
    named, still_true = list(named), [i for i, name in enumerate(named) if name in truth]
    if kind == "added":
        absent = [name for name in OBJECTS if name not in truth and name not in named]
        named.insert(rng.integers(len(named) + 1), absent[rng.integers(len(absent))])
        return named
    if not still_true or (kind == "dropped" and len(named) == 1):
        return None
    i = still_true[rng.integers(len(still_true))]
    if kind == "dropped":
        del named[i]
        return named
    colour, shape = named[i].split()
    other = [f"{c} {shape}" for c in COLOURS] if kind == "recoloured" else [f"{colour} {s}" for s in SHAPES]
    other = [name for name in other if name not in truth and name not in named]
    if not other:
        return None
    named[i] = other[rng.integers(len(other))]
    return named


def pair(rng, truth, kind):
    """-> what the better and the worse answer name; None where there is no room for this kind of pair."""
    if kind != "worsened":
        worse = corrupt(rng, truth, truth, kind)
        return worse and (list(truth), worse)
    first, second = rng.choice(list(ERRORS), 2, p=list(ERRORS.values()))
    better = corrupt(rng, truth, truth, first)
    worse = better and corrupt(rng, truth, better, second)
    return worse and (better, worse)


# ---- the files ----

def withheld_sets(seed):
    """-> the sets of objects that no training file may show or name: the same share of those of each size."""
    rng, withheld = keyed(seed, "withheld"), set()
    for size in range(1, MOST + 1):
        sets = list(combinations(OBJECTS, size))
        withheld.update(frozenset(sets[i]) for i in rng.permutation(len(sets))[:round(WITHHELD * len(sets))])
    return withheld


def training_objects(rng, withheld):
    """-> one to four objects, no withheld set. Every number is equally likely."""
    size = rng.integers(1, MOST + 1)
    while True:
        objects = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[:size]]
        if frozenset(objects) not in withheld:
            return objects


def row(name, placed, answer=None, **extra):
    """One row of a data file. `objects` is what its image shows, in reading order."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}]
    if answer is not None:
        turns.append({"from": "gpt", "value": answer})
    objects = [o for *_, o in placed]
    return {"id": name, "image": f"{name}.png", "conversations": turns, "objects": objects, **extra}


def sft_rows(seed, count, withheld):
    rng = keyed(seed, "sft")
    for i in range(count):
        placed = place(rng, training_objects(rng, withheld))
        truth = named = [o for *_, o in placed]
        wrong = rng.random() < NOISE
        while wrong and (named is None or named == truth or frozenset(named) in withheld):
            named = corrupt(rng, truth, truth, rng.choice(list(ERRORS), p=list(ERRORS.values())))
        yield placed, row(f"sft-{i:05d}", placed, caption(named))


def pair_rows(seed, count, withheld):
    rng = keyed(seed, "pairs")
    shares = [0.5 * share for share in ERRORS.values()] + [0.25, 0.25]
    for i in range(count):
        kind, answers = str(rng.choice(KINDS, p=shares)), None
        while answers is None or any(frozenset(named) in withheld for named in answers):
            placed = place(rng, training_objects(rng, withheld))
            answers = pair(rng, [o for *_, o in placed], kind)
        yield placed, row(f"pairs-{i:05d}", placed, [caption(named) for named in answers], kind=kind)


def prompt_rows(seed, count, withheld):
    rng = keyed(seed, "prompts")
    for i in range(count):
        placed = place(rng, training_objects(rng, withheld))
        yield placed, row(f"prompts-{i:05d}", placed)


def test_rows(seed, count, withheld, shown):
    """Images in turn of sets that sft.json shows and of withheld ones, with the same numbers of objects."""
    rng = keyed(seed, "test")
    pools = [sorted(map(sorted, sets)) for sets in (shown, withheld)]
    for i in range(count):
        size = 1 + i // 2 % MOST
        pool = [objects for objects in pools[i % 2] if len(objects) == size] or pools[i % 2]
        placed = place(rng, pool[rng.integers(len(pool))])
        yield placed, row(f"test-{i:05d}", placed, caption([o for *_, o in placed]), seen=i % 2 == 0)


def test_pair_rows(seed, tests):
    """A pair of every kind on each test image that has room for it."""
    rng = keyed(seed, "test pairs")
    for test in tests:
        for kind in KINDS:
            answers = pair(rng, test["objects"], kind)
            if answers:
                human = test["conversations"][0]
                turns = [human, {"from": "gpt", "value": [caption(named) for named in answers]}]
                yield {**test, "id": f"{test['id']}-{kind}", "conversations": turns, "kind": kind}


def write_rows(path, rows):
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def write_image(job):
    path, placed = job
    draw(placed).save(path, compress_level=1)


def write_images_and_rows(folder, name, rows, pool):
    """Draws each row's image, writes the rows to name.json -> the rows, what was placed for each."""
    began = time.time()
    scenes, kept = zip(*rows, strict=True)
    jobs = [(folder / "images" / r["image"], placed) for r, placed in zip(kept, scenes, strict=True)]
    for done, _ in enumerate(pool.imap(write_image, jobs), 1):
        if done % 4000 == 0:
            print(f"{name}.json: {done} images, {time.time() - began:.1f} s", flush=True)
    write_rows(folder / f"{name}.json", kept)
    print(f"{name}.json: written with {len(kept)} rows, {time.time() - began:.1f} s", flush=True)
    return kept, scenes


# ---- the starting checkpoint ----

def make_tokenizer(folder):
    """Whole words, LLaMA's way: "▁" is the space before a word, and is put before a text's first word too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<s>", "</s>", "▁", "\n", ",", ".", ":", "▁USER", "▁ASSISTANT", "Describe"]
    words += [f"▁{word}" for word in (*QUESTION[:-1].split(), "a", "and", *COLOURS, *SHAPES)]
    words += ["<pad>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Split(Regex(r"[^\w▁]"), "isolated")])  # punctuation, line ends
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"], model_max_length=256)
    fast.save_pretrained(folder)
    return fast


def make_config(tokenizer):
    """LLaVA-1.5 made small: the tower's last but one layer is read, its class token dropped."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3,
                              num_attention_heads=4, image_size=SIZE, patch_size=CELL, projection_dim=128)
    text = LlamaConfig(vocab_size=-(-len(tokenizer) // 8) * 8, hidden_size=128, intermediate_size=344,
                       num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
                       max_position_embeddings=256, rms_norm_eps=1e-5, **ids)
    return LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2,
                       vision_feature_select_strategy="default", projector_hidden_act="gelu",
                       image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                       image_seq_length=GRID * GRID,
                       architectures=["LlavaForConditionalGeneration"], dtype="float32", **ids)


def initialise(module, seed):
    """Norms start at one, biases at zero, everything else at N(0, 0.02) keyed by its name; the tower's
    positions at N(0, 0.3), so that a patch's feature tells its place (captions are in reading order)."""
    import torch
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif "norm" in name:  # CLIP spells one of its own "pre_layrnorm"
            torch.nn.init.ones_(parameter)
        else:
            std = 0.3 if "position_embedding" in name else 0.02
            drawn = keyed(seed, name).normal(0, std, tuple(parameter.shape))
            parameter.data.copy_(torch.from_numpy(drawn))


def warm_up(tower, seed, steps, scenes, held_out, batch=128, lr=2e-3):
    """Teaches the tower to tell by each patch's feature which object stands there; the probe is thrown away.
    -> accuracy on held-out images over all patches, and over those with an object."""
    import torch
    import torch.nn.functional as F
    began, rng, classes = time.time(), keyed(seed, "warm-up"), 1 + len(OBJECTS)
    probe = torch.nn.Linear(tower.vision_model.post_layernorm.weight.shape[0], classes)
    initialise(probe, seed)
    weight = torch.ones(classes)
    weight[0] = 0.1  # most cells are empty
    trained = [*tower.parameters(), *probe.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=batch)]
        pixels, labels = map(torch.from_numpy, pixels_and_labels(chosen))
        loss = F.cross_entropy(probe(tower(pixels)).flatten(0, 1), labels.flatten(), weight)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if (step + 1) % 40 == 0:
            print(f"tower: step {step + 1}/{steps}, loss {loss:.3f}, {time.time() - began:.1f} s", flush=True)
    pixels, labels = map(torch.from_numpy, pixels_and_labels(held_out))
    with torch.no_grad():
        right = probe(tower(pixels)).argmax(-1) == labels
    return right.float().mean().item(), right[labels > 0].float().mean().item()


def make_model(folder, seed, steps, scenes, held_out):
    """Writes the starting checkpoint -> the tower's accuracies."""
    from safetensors.torch import save_file
    sys.path.insert(0, str(ROOT))
    from model import VisionLLM
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    config = make_config(tokenizer)
    config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": SIZE}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": MEAN, "image_std": STD},
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": CELL,
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "generation_config.json": {
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    model = VisionLLM(config)
    initialise(model, seed)
    patches, objects = warm_up(model.vision_tower, seed, steps, scenes, held_out)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(p.numel() for p in model.parameters())
    print(f"model/: {size:,} parameters; the tower is right on {patches:.4f} of the held-out patches, "
          f"{objects:.4f} of those with an object", flush=True)
    return patches, objects


# ---- the data set ----

def make(folder, seed=0, train=12000, pairs=6000, prompts=4000, test=384, warm_steps=100, overwrite=False):
    """Builds the data set beside `folder`, then renames it: an interrupted run leaves no part of it.
    Raises ValueError where the folder holds something else, or a data set and not `overwrite`."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / "world.json").exists():
            raise ValueError(f"{folder} exists and is no shapes data set; name a new folder with --out")
        if not overwrite:
            raise ValueError(f"{folder} already holds a shapes data set; give --overwrite to make it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.half-", dir=folder.parent))
    try:
        (beside / "new").mkdir()
        build(beside / "new", seed, train, pairs, prompts, test, warm_steps)
        if folder.exists():
            folder.rename(beside / "old")
        (beside / "new").rename(folder)
    finally:
        shutil.rmtree(beside)


def build(folder, seed, train, pairs, prompts, test, warm_steps):
    (folder / "images").mkdir()
    withheld = withheld_sets(seed)
    pool = ThreadPool()  # compressing an image leaves Python's lock to the others
    try:
        rows, scenes = write_images_and_rows(folder, "sft", sft_rows(seed, train, withheld), pool)
        shown = {frozenset(r["objects"]) for r in rows}
        write_images_and_rows(folder, "pairs", pair_rows(seed, pairs, withheld), pool)
        write_images_and_rows(folder, "prompts", prompt_rows(seed, prompts, withheld), pool)
        tests = test_rows(seed, test, withheld, shown)
        tests, held_out = write_images_and_rows(folder, "test", tests, pool)
    finally:  # an interrupted run removes the folder: nothing may still be written into it
        pool.terminate()
        pool.join()
    write_rows(folder / "test_pairs.json", list(test_pair_rows(seed, tests)))
    for name in ("blank", "shuffled"):
        (folder / f"images_{name}").mkdir()
        for i, r in enumerate(tests):
            image = draw([] if name == "blank" else held_out[(i + 1) % len(tests)])
            image.save(folder / f"images_{name}" / r["image"], compress_level=1)
    patches, objects = make_model(folder / "model", seed, warm_steps, scenes, held_out)
    (folder / "world.json").write_text(json.dumps({
        "seed": seed, "train": train, "pairs": pairs, "prompts": prompts, "test": test, "warm_up": warm_steps,
        "patch_accuracy": patches, "object_accuracy": objects,
        "withheld": sorted(sorted(objects) for objects in withheld)}) + "\n")


def ensure(folder, **sizes):
    """Makes the data set where it is absent; leaves one that is there alone."""
    if not (Path(folder) / "world.json").exists():
        make(folder, **sizes)


# ---- metrics ----

def read_answers(path, truth):
    """-> what predict.py wrote, or ppo.py's rollouts; an answer of null counts as an empty one."""
    records = read_records(path, unique=False)
    for record in records:
        if record["id"] not in truth:
            raise ValueError(f"{path}: got id {record['id']!r}, need one of this data set: set --world")
    return records


def measure(captions):
    """[(objects in the image, text), ...] -> the metrics, means over mentions, objects or texts.

    chair_i, chair_s, coverage, exact: as evaluate.py has them, of the mentions of this data set's objects.
    well_formed: share of the texts that are a caption, true or false. words: length of a text.
    """
    n = len(captions)
    return {
        "n": n, **chair([(mentions(text), objects) for objects, text in captions]),
        **exact_match([(text, caption(objects)) for objects, text in captions]),
        "well_formed": sum(well_formed(text) for _, text in captions) / n,
        "words": sum(len(text.split()) for _, text in captions) / n}


def evaluate(paths, truth):
    """-> metrics per file, kind of sets and what is measured: the rows' `answer`, and all their `answers`
    where they have several."""
    rows = []
    for path in paths:
        for over, answered in by_samples(read_answers(path, truth)).items():
            texts = [(truth[record["id"]], text) for record, text in answered]
            for sets, wanted in (("all", (True, False, None)), ("seen", (True,)), ("unseen", (False,))):
                chosen = [(r["objects"], text) for r, text in texts if r.get("seen") in wanted]
                if chosen:
                    rows.append({"file": str(path), "over": over, "sets": sets, **measure(chosen)})
    return rows


def pair_accuracy(paths):
    """Rewards of ranked answers -> for each file and kind of pair the share of pairs in the right order; a
    tie counts half, a row once."""
    records = []
    for path in paths:
        right = {}
        for line in Path(path).read_text().strip().split("\n"):
            scored = json.loads(line)
            if scored["answers"] is None:  # too long for --max_len
                continue
            rewards = [answer["reward"] for answer in scored["answers"]]
            pairs = [(better > worse) + (better == worse) / 2 for better, worse in combinations(rewards, 2)]
            kind = scored["id"].rsplit("-", 1)[-1]
            right.setdefault(kind if kind in KINDS else "sampled", []).append(sum(pairs) / len(pairs))
        for kind, shares in right.items():
            mean = sum(shares) / len(shares)
            records.append({"file": str(path), "pairs": kind, "n": len(shares), "accuracy": mean})
    for r in records:
        print(f"{r['file']}  {r['pairs']:10}  {r['n']:6d} rows, {r['accuracy']:.3f} in the right order")
    return records


def curve(run, truth, each=5):
    """Prints PPO's way by the answers that it sampled: their KL and score (normalised, with a penalty for
    answers without end), and what is true of them."""
    files = sorted((run / "rollouts").glob("*.jsonl"), key=lambda path: int(path.stem))
    names = ("well_formed", "chair_s", "coverage", "exact")
    print(f"\n| iterations | KL | score | {' | '.join(names)} |\n|" + "---|" * (3 + len(names)))
    for i in range(0, len(files), each):
        some = files[i:i + each]
        lines = [line for path in some for line in read_answers(path, truth)]
        true = measure([(truth[line["id"]]["objects"], line["answer"]) for line in lines])
        means = [np.mean([line[name] for line in lines]) for name in ("kl", "score")]
        cells = [f"{value:.3f}" for value in (*means, *(true[name] for name in names))]
        print(f"| {some[0].stem}–{some[-1].stem} | {' | '.join(cells)} |")


def write_curve(run, truth, out):
    """Writes what is true of the answers of each of PPO's iterations as a log, which page.py draws."""
    with out.open("w") as log:
        for path in sorted((run / "rollouts").glob("*.jsonl"), key=lambda file: int(file.stem)):
            lines = read_answers(path, truth)
            metrics = measure([(truth[line["id"]]["objects"], line["answer"]) for line in lines])
            log.write(json.dumps({"step": int(path.stem), **metrics}) + "\n")


def summarise(paths):
    """Prints the metrics of several seeds, as --json leaves them, as mean ± standard deviation."""
    found = {}
    for path in paths:
        for r in json.loads(Path(path).read_text()):
            kind = r["pairs"] if "pairs" in r else (r["over"], r["sets"])
            found.setdefault((Path(r["file"]).stem, kind), []).append(r)

    def cell(records, name):
        values = [r[name] for r in records]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"
    names = ("chair_i", "chair_s", "coverage", "exact", "well_formed", "words")
    print("| answers | over | " + " | ".join(names) + " |\n|" + "---|" * (2 + len(names)))
    for (file, kind), records in found.items():
        if isinstance(kind, tuple) and kind[1] == "all":
            print(f"| {file} | {kind[0]} | " + " | ".join(cell(records, name) for name in names) + " |")
    kinds = [*KINDS, "sampled"]
    print("\n| rewards | " + " | ".join(kinds) + " |\n|" + "---|" * (1 + len(kinds)))
    for file in dict.fromkeys(file for file, kind in found if not isinstance(kind, tuple)):
        cells = [cell(found[file, kind], "accuracy") if (file, kind) in found else "" for kind in kinds]
        print(f"| {file} | " + " | ".join(cells) + " |")


def badness(objects, text):
    """What ranks a text, best lowest: malformed; count of objects invented, missed, repeated; misordered."""
    named = mentions(text)
    errors = len(set(named) ^ set(objects)) + len(named) - len(set(named))
    return not well_formed(text), errors, text != caption(objects)


def reward(record, texts):
    """A reward function of ppo.py (--reward_model examples/shapes.py:reward). For each text: the share of the
    image's objects that it names, minus the share of what it names that is not there, minus 1 if the text is
    no caption."""
    scores = []
    for text in texts:
        metrics = measure([(record["objects"], text)])
        scores.append(metrics["coverage"] - metrics["chair_i"] - (not well_formed(text)))
    return scores


def rank(paths, truth):
    """Sampled answers -> preference rows. Of texts that are equally good the first stays; a row needs two."""
    rows = []
    for path in paths:
        for record in read_answers(path, truth):
            best, r = {}, truth[record["id"]]
            for text in filter(str.strip, record["answers"]):  # an answer without a word is no row's
                best.setdefault(badness(r["objects"], text), text)
            if len(best) > 1:
                turns = [r["conversations"][0], {"from": "gpt", "value": [best[key] for key in sorted(best)]}]
                rows.append({**r, "conversations": turns, "kind": "sampled"})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", "--world", dest="world", type=Path, default=ROOT / "runs" / "shapes", metavar="DIR",
        help="the data set's folder, to make or to measure by (default: runs/shapes)")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--train", type=int, default=12000, help="images in sft.json")
    add("--synthetic", type=int, default=6000, help="images in pairs.json")
    add("--prompts", type=int, default=4000, help="images in prompts.json")
    add("--test", type=int, default=384, help="images in test.json")
    add("--warm_up", type=int, default=100, help="steps of the tower's training, 128 images each")
    add("--overwrite", action="store_true", help="replace the data set that the folder holds")
    add("--if_missing", action="store_true", help="leave a data set that the folder holds as it is")
    add("--evaluate", nargs="+", metavar="JSONL", help="print metrics of these answers of predict.py")
    add("--pairs", nargs="+", default=[], metavar="JSONL", help="print the accuracy of these rewards")
    add("--json", type=Path, metavar="FILE", help="write the metrics here, --curve's as a line per iteration")
    add("--curve", type=Path, metavar="DIR", help="score and truth over a run of ppo.py --save_rollouts")
    add("--summary", nargs="+", metavar="JSON", help="one table of what --json left, a file a seed")
    add("--rank", nargs="+", metavar="JSONL", help="make preferences of the samples in these answers")
    add("--pairs_out", type=Path, metavar="FILE", help="where --rank writes them")
    add("--mix", action="store_true", help="and as many rows of pairs.json with them")
    args = parser.parse_args()
    if args.rank and not args.pairs_out:
        parser.error("--rank needs --pairs_out FILE")
    if args.evaluate or args.rank or args.curve:
        truth = {r["id"]: r for name in ("sft", "prompts", "test")
                 for r in json.loads((args.world / f"{name}.json").read_text())}
    if args.summary:
        summarise(args.summary)
    elif args.curve:
        curve(args.curve, truth)
        if args.json:
            write_curve(args.curve, truth, args.json)
    elif args.evaluate or args.pairs:
        records = evaluate(args.evaluate, truth) if args.evaluate else []
        if records:
            print_table(records)
        records += pair_accuracy(args.pairs)
        if args.json:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
    elif args.rank:
        rows = rank(args.rank, truth)
        mixed = json.loads((args.world / "pairs.json").read_text())[:len(rows)] if args.mix else []
        write_rows(args.pairs_out, rows + mixed)
        print(f"{args.pairs_out}: {len(rows)} ranked rows of samples, {len(mixed)} synthetic ones")
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part of a data set is removed
        sizes = {"seed": args.seed, "train": args.train, "pairs": args.synthetic, "prompts": args.prompts,
                 "test": args.test, "warm_steps": args.warm_up}
        if args.if_missing:
            ensure(args.world, **sizes)
        else:
            make(args.world, overwrite=args.overwrite, **sizes)
        print(f"{args.world}: the data set is there")


if __name__ == "__main__":
    main()
