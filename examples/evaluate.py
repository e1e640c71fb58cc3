#!/usr/bin/env python3
r"""Metrics of the answers that predict.py wrote: POPE, CHAIR, exact match, VQA accuracy.

    python examples/evaluate.py sft.jsonl dpo.jsonl --pope
    python examples/evaluate.py sft.jsonl dpo.jsonl --chair instances_val2014.json \
        --captions captions_val2014.json
    python examples/evaluate.py sft.jsonl dpo.jsonl --vqa v2_mscoco_val2014_annotations.json
    python examples/evaluate.py sft.jsonl dpo.jsonl --exact

Prints one table; --json FILE writes it as JSON too. Each file has a line for `answer` and, where predict.py
ran with --num_samples K, one for all K samples. All metrics are shares, from 0 to 1, of answers or mentions.
An answer of null (its prompt did not fit in --max_len) counts as an empty text.

--pope (arXiv:2305.10355) needs records with `label` yes or no: convert.py reads POPE's own files. As POPE's
    code does, the text up to the first full stop is a no if one of its words, without commas, is "No", "no"
    or "not"; anything else is a yes. `neither` counts the answers that became a yes without saying yes. With
    yes as the positive class, TP, FP, TN, FN being true and false positives and negatives:
    accuracy = (TP + TN) / n, precision = TP / (TP + FP), recall = TP / (TP + FN),
    F1 = 2 precision recall / (precision + recall), yes = (TP + FP) / n
    Where records have a `category` (random, popular, adversarial), each has its own line too.

--chair (arXiv:1809.02156) needs the objects in each image, by the image's file name:
    CHAIR-i = mentions of objects that are not in the image / mentions of objects
    CHAIR-s = answers with such a mention / answers
    coverage = objects in the images that are mentioned / objects in the images (recall; AMBER: "cover")
    OBJECTS.json is COCO's instance annotations, or {"synonyms": {object: [word, ...]}, "images": {file name:
    [object, ...]}}. Synonyms of "" name no object; without `synonyms`, COCO's 80 objects are meant. As in the
    paper's code, plurals count, the longest name at a place counts alone ("hot dog" is no dog), "baby" or
    "adult" before an animal and "passenger" before a vehicle are no person, and a toilet's seat is no chair.
    Published numbers also count as true what COCO's reference captions mention: give --captions, or CHAIR is
    higher than theirs. The synonyms are this file's own: words that mostly mean something else (batter,
    pitcher, couple) are left out, so numbers differ a little from those of the paper's list.

--vqa (arXiv:1505.00468) needs {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]}; a record's
    question_id, or else its id, says which is its question. Mean over all sets of nine of the ten humans of
    min(humans who gave this answer / 3, 1)
    On both sides case, articles and punctuation are removed and number words become digits, by the official
    rules. Apostrophes are removed too, where the official code has a table (dont = don't), and answers on
    which all ten humans agree are treated like others, which it leaves as they are. Annotations'
    `answer_type` (yes/no, number, other) each have their own line too.

--exact: share of the answers that equal `label`, space around both aside.
"""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

# COCO's 80 objects, each with other words for it. Plurals come from `plural`.
COCO_WORDS = """
person: people, human, humans, man, woman, boy, girl, child, kid, baby, toddler, infant, adult, guy, lady,
gentleman, teenager, player, rider, skier, snowboarder, skater, skateboarder, surfer, cyclist, biker, driver,
motorcyclist, passenger, pedestrian, worker, chef, baker, waiter, waitress, officer, policeman, cop, fireman,
firefighter, soldier, cowboy, businessman, fisherman, bride, groom, mother, father, mom, dad, sister, brother,
son, daughter, student, teacher, tourist, traveler, spectator, athlete, catcher, umpire, referee |
bicycle: bike, tricycle, unicycle | car: automobile, sedan, van, minivan, suv, jeep, hatchback, cab, taxi |
motorcycle: motorbike, motor bike, motor cycle, scooter, moped |
airplane: plane, aeroplane, air plane, aircraft, jet, jetliner, airliner, biplane, seaplane | bus: minibus |
train: locomotive, tram, caboose | truck: pickup, pickup truck, lorry, firetruck, fire truck, fire engine |
boat: ship, sailboat, motorboat, rowboat, speedboat, canoe, kayak, yacht, ferry, barge, dinghy, tugboat |
traffic light: traffic signal, stop light, stoplight, street light, streetlight | fire hydrant: hydrant |
stop sign: | parking meter: | bench: pew |
bird: duck, goose, swan, seagull, gull, pigeon, parrot, owl, eagle, hawk, pelican, penguin, ostrich |
cat: kitten, kitty, tabby | dog: puppy, pup, terrier, poodle, beagle, dachshund, labrador |
horse: pony, foal, colt, mare, stallion | sheep: lamb, ewe, ram, goat |
cow: cattle, calf, bull, ox, oxen, heifer, bison, buffalo | elephant: | bear: panda | zebra: | giraffe: |
backpack: knapsack, rucksack | umbrella: parasol | handbag: purse, wallet, briefcase | tie: necktie, bow tie |
suitcase: suit case, luggage | frisbee: | skis: ski | snowboard: | sports ball: ball | kite: | baseball bat: |
baseball glove: | skateboard: | surfboard: longboard | tennis racket: racket, racquet, tennis racquet |
bottle: | wine glass: wineglass, goblet | cup: mug, teacup | fork: | knife: pocketknife | spoon: | bowl: |
banana: | apple: | sandwich: burger, hamburger, cheeseburger | orange: | broccoli: | carrot: |
hot dog: hotdog | pizza: | donut: doughnut, bagel | cake: cheesecake, cupcake, shortcake, pancake |
chair: seat, stool | couch: sofa, loveseat, futon, settee | potted plant: houseplant | bed: |
dining table: table, desk, coffee table | toilet: toilet seat, urinal, commode |
tv: television, monitor, computer monitor | laptop: computer, macbook, netbook, laptop computer |
mouse: computer mouse | remote: remote control | keyboard: computer keyboard |
cell phone: cellphone, phone, mobile phone, telephone, smartphone, iphone | microwave: microwave oven |
oven: stove, stovetop, stove top oven | toaster: toaster oven | sink: | refrigerator: fridge, freezer |
book: | clock: | vase: | scissors: | teddy bear: teddybear | hair drier: hair dryer, hairdryer, hairdrier |
toothbrush:
"""
COCO = {}
for entry in " ".join(COCO_WORDS.split()).split(" | "):
    name, words = entry.split(":")
    COCO[name] = words.strip().split(", ") if words else []
for animal in ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"):
    COCO[animal] += [f"{age} {word}" for age in ("baby", "adult") for word in (animal, *COCO[animal])]
for vehicle in ("airplane", "train", "bus", "car", "boat"):
    COCO[vehicle] += [f"passenger {word}" for word in (vehicle, *COCO[vehicle])]
COCO[""] = ["baby animal", "adult animal", "train track", "home plate"]
IRREGULAR = {"man": "men", "child": "children", "knife": "knives", "mouse": "mice", "goose": "geese",
             "calf": "calves"}  # the ends of words
LONGEST = 4  # words of an object's name
WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|\S")  # a word ("t-shirt" is one), or a mark between words

ARTICLES = {"a", "an", "the"}
NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


# ---- metrics: of pairs of an answer and the truth ----

def says_no(text):
    """POPE's reading of an answer: whether it is a no. Anything else is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"}.isdisjoint(words)


def pope(pairs):
    """[(answer, whether yes is right), ...] → POPE's metrics; a ratio of nothing is 0."""
    said = [(not says_no(text), truth) for text, truth in pairs]
    tp, fp, fn = (said.count(case) for case in ((True, True), (True, False), (False, True)))
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    neither = sum(not says_no(text) and not re.search(r"\byes\b", text.lower()) for text, _ in pairs)
    return {"accuracy": (len(said) - fp - fn) / len(said), "precision": precision, "recall": recall,
            "F1": 2 * tp / max(2 * tp + fp + fn, 1), "yes": (tp + fp) / len(said), "neither": neither}


def chair(pairs):
    """[(objects that a text mentions, objects in its image), ...] → CHAIR-i, CHAIR-s, coverage. An object
    that is mentioned twice is two mentions; without any mention CHAIR-i is 0."""
    mentioned = hallucinated = texts = covered = present = 0
    for named, objects in pairs:
        wrong = sum(name not in objects for name in named)
        mentioned, hallucinated, texts = mentioned + len(named), hallucinated + wrong, texts + (wrong > 0)
        present, covered = present + len({*objects}), covered + len({*objects} & {*named})
    return {"chair_i": hallucinated / max(mentioned, 1), "chair_s": texts / len(pairs),
            "coverage": covered / max(present, 1)}


def exact_match(pairs):
    """[(answer, label), ...] → share of equal ones, space around both aside."""
    return {"exact": sum(text.strip() == label.strip() for text, label in pairs) / len(pairs)}


def normalise(answer):
    """An answer as the VQA evaluation compares it. A mark becomes a space, but vanishes if it stands beside
    a space anywhere in the answer, or if the answer has a number like 1,000."""
    text = marked = " ".join(answer.split())
    thousands = re.search(r"\d,\d", marked)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if beside_space or thousands else " ")
    text = re.sub(r"\.(?!\d)|'", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(word for word in words if word not in ARTICLES)


def vqa(pairs):
    """[(answer, the humans' answers), ...] → VQA accuracy."""
    scores = []
    for text, humans in pairs:
        same = [normalise(human) == normalise(text) for human in humans]
        scores.append(sum(min((sum(same) - left_out) / 3, 1) for left_out in same) / len(same))
    return {"vqa_accuracy": sum(scores) / len(scores)}


# ---- the objects that a text mentions ----

def plural(phrase):
    for ending, other in IRREGULAR.items():
        if phrase.endswith(ending):
            return phrase.removesuffix(ending) + other
    if re.search("[^aeiou]y$", phrase):
        return f"{phrase[:-1]}ies"
    return phrase + ("es" if re.search("(s|x|z|ch|sh)$", phrase) else "s")


def phrase_table(synonyms):
    """{object: [word, ...]} → {phrase, singular or plural: object}"""
    table = {}
    for name, words in synonyms.items():
        for word in filter(None, (name, *words)):
            tokens = WORD.findall(word.lower())
            for phrase in (" ".join(tokens), plural(" ".join(tokens))):
                if len(tokens) > LONGEST or table.setdefault(phrase, name) != name:
                    raise ValueError(f"{word!r} of {name!r} has over {LONGEST} words or is of two objects")
    return table


def mentions(text, table):
    """The objects that a text mentions, in its order; the longest phrase at each place counts."""
    words, phrases, i = WORD.findall(text.lower()), [], 0
    while i < len(words):
        for length in range(LONGEST, 0, -1):
            phrase = " ".join(words[i:i + length])
            if phrase in table:
                phrases.append((phrase, table[phrase]))
                break
        i += length
    if any(phrase in ("toilet", "toilets") for phrase, _ in phrases):  # "the seat of the toilet" is no chair
        phrases = [(phrase, name) for phrase, name in phrases if phrase not in ("seat", "seats")]
    return [name for _, name in phrases if name]


# ---- files ----

@contextlib.contextmanager
def reading(path, need):
    """Any error while a file is read names the file and what it should be."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        error = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"got {path} ({error}), need {need}: check the file") from None


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_objects(path, captions=()):
    """→ {image file: set of the objects in it}, and the phrase table of these objects"""
    with reading(path, 'COCO\'s instance annotations, or {"images": {file name: [object, ...]}}'):
        content = read_json(path)
        if isinstance(content["images"], list):
            names = {one["id"]: one["name"] for one in content["categories"]}
            synonyms = {name: COCO.get(name, []) for name in (*names.values(), "")}
            files = {one["id"]: one["file_name"] for one in content["images"]}
            images = {file: set() for file in files.values()}
            for one in content["annotations"]:
                images[files[one["image_id"]]].add(names[one["category_id"]])
        else:
            synonyms = content.get("synonyms", COCO)
            images = {file: set(objects) for file, objects in content["images"].items()}
            if unknown := set().union(*images.values()) - synonyms.keys():
                raise ValueError(f"the object {sorted(unknown)[0]!r} is not in its synonyms")
        table = phrase_table(synonyms)
    for path in captions:
        with reading(path, "COCO's caption annotations"):
            content = read_json(path)
            files = {one["id"]: one["file_name"] for one in content["images"]}
            for one in content["annotations"]:
                if files[one["image_id"]] in images:
                    images[files[one["image_id"]]].update(mentions(one["caption"], table))
    return images, table


def read_answers(path, unique=True):
    """The records that predict.py wrote, one per line; `answer` and `answers` become a text and texts.
    unique: an id may stand there only once."""
    records, ids = [], set()
    with reading(path, "answers that predict.py wrote"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        if not any(map(str.strip, lines)):
            raise ValueError("no record")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with reading(f"{path}, line {number}", "a complete record, once, of predict.py without --score"):
                record = json.loads(line)
                id, record["answer"] = record["id"], record["answer"] or ""
                record["answers"] = [sample["text"] for sample in record.get("answers") or []]
                if not all(isinstance(text, str) for text in (record["answer"], *record["answers"])):
                    raise TypeError("an answer that is no text")
                if unique and id in ids:
                    raise ValueError(f"id {id!r} again")
                ids.add(id)
                records.append(record)
    return records


def by_samples(records):
    """→ {"answer": [(record, text), ...]}, and the same for "K samples" where records have several"""
    texts = {"answer": [(record, record["answer"]) for record in records]}
    most = max(len(record["answers"]) for record in records)
    if most > 1:
        texts[f"{most} samples"] = [(record, text) for record in records for text in record["answers"]]
    return texts


# ---- the command: of each metric, a function from a record to (truth, group), and one of pairs ----

def pope_metric():
    def truth(record):
        label = str(record.get("label")).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"got the label {record.get('label')!r}, need yes or no: convert POPE's files")
        return label == "yes", record.get("category")
    return truth, pope


def chair_metric(path, captions):
    images, table = read_objects(path, captions)

    def truth(record):
        name = str(record.get("image"))
        name = name if name in images else name.rpartition("/")[2]
        if name not in images:
            raise ValueError(f"got the image {record.get('image')!r}, need one of {path}: check the file")
        return images[name], None
    return truth, lambda pairs: chair([(mentions(text, table), objects) for text, objects in pairs])


def vqa_metric(path):
    with reading(path, "VQA's annotations"):
        humans = {str(one["question_id"]): ([answer["answer"] for answer in one["answers"]],
                                            one.get("answer_type")) for one in read_json(path)["annotations"]}
        if not all(answers for answers, _ in humans.values()):
            raise ValueError("a question without answers")

    def truth(record):
        question = str(record.get("question_id", record["id"]))
        if question not in humans:
            raise ValueError(f"got the question {question!r}, need one of {path}: check the file")
        return humans[question]
    return truth, vqa


def exact_metric():
    def truth(record):
        if not isinstance(record.get("label"), str):
            raise ValueError(f"got the label {record.get('label')!r}, need a text: add it to the data file")
        return record["label"], None
    return truth, exact_match


def measure(path, truth, metrics):
    """Lines of the table for one file: over `answer` and over all samples, for all records and per group."""
    rows, truths = [], {}
    records = read_answers(path)
    for record in records:
        try:
            truths[record["id"]] = truth(record)
        except ValueError as error:
            raise ValueError(f"{path}: record {record['id']!r}: {error}") from None
    for over, answered in by_samples(records).items():
        groups = {"all": []}
        for record, text in answered:
            true, group = truths[record["id"]]
            for name in ("all", group) if group else ("all",):
                groups.setdefault(name, []).append((text, true))
        for name, pairs in groups.items():
            rows.append({"file": str(path), "over": over, "sets": name, "n": len(pairs), **metrics(pairs)})
    return rows


def print_table(rows):
    """One line per row; the first three columns are text."""
    headings = {"chair_i": "CHAIR-i", "chair_s": "CHAIR-s"}
    lines = [[headings.get(name, name) for name in rows[0]]]
    for row in rows:
        lines.append([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(line)))


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("answers", nargs="+", help="files that predict.py --out wrote")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--pope", action="store_true", help="accuracy, precision, recall, F1, share of yes")
    add("--chair", metavar="OBJECTS.json", help="hallucinated objects, by the objects in each image")
    add("--vqa", metavar="ANNOTATIONS.json", help="VQA accuracy, by the humans' answers")
    add("--exact", action="store_true", help="share of the answers that equal `label`")
    parser.add_argument("--captions", nargs="+", default=(), metavar="FILE",
                        help="with --chair: COCO's caption annotations; what they mention is true as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here as well")
    args = parser.parse_args()
    if args.captions and not args.chair:
        parser.error("got --captions without --chair, need both")
    try:
        metric = (pope_metric() if args.pope else chair_metric(args.chair, args.captions) if args.chair else
                  vqa_metric(args.vqa) if args.vqa else exact_metric())
        rows = [row for path in args.answers for row in measure(path, *metric)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
