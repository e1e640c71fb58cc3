"""What goes in: rows of JSON → conversations → tokens and pixels → a Batch.

A row is {"id", "image", "conversations": [{"from": "human" | "gpt" | "system", "value"}, …]}; the last gpt turn's value may be
a list of answers, best first. It becomes an Example: a prompt and its answers, each answer seeing the prompt and itself only:

    ids       <bos> USER: <image>…<image> prompt | answer 1 … | answer 2 … | pad
    position  0 1 2 …                        P-1 | P P+1 …    | P P+1 …    |
    branch    0 0 0 …                          0 | 1 1 …      | 2 2 …      | -1

The first token of every answer is predicted by the prompt's last token, each later one by the token before it.

Legend: B rows, T columns, P prompt length, N targets, A answers, M distinct images, R image runs, I tokens an image,
S picture side. A mask says what is kept.
"""
import dataclasses
import functools
import json
import os
import re

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer

IMAGE = "<image>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---- rows ----

def load_rows(path):
    """The rows of a .json, .jsonl or .txt file (a JSON list, or one JSON object a line). ValueError names the file and line."""
    if not os.path.isfile(path):
        raise ValueError(f"got --data {path}, need a .json, .jsonl or .txt file: no such file")
    with open(path, encoding="utf-8") as f:
        text = f.read().strip()
    try:
        if text.startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}): need a list of rows, or one row a line") from error
    if not rows:
        raise ValueError(f"{path}: got no rows, need at least one")
    return rows


@dataclasses.dataclass
class Conversation:
    """A checked row. contents[i] is what roles[i] said, up to the final answer; answers: the final gpt turn's, best first."""
    id: str
    roles: list
    contents: list
    answers: list
    images: list  # paths below the picture folder


def read_row(row, images_dir, need_answer=True):
    """A row → Conversation; ValueError says what is wrong with it (the caller adds which row it is)."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise ValueError('need {"id", "image", "conversations": [{"from", "value"}, …]} with at least one turn')
    roles, contents = [], []
    for turn in row["conversations"]:
        if not isinstance(turn, dict) or "value" not in turn:
            raise ValueError(f'got the turn {str(turn)[:80]!r}, need {{"from", "value"}}')
        roles.append(turn.get("from"))
        contents.append(turn["value"])
    body = roles[1:] if roles[0] == "system" else roles
    if body != ["human", "gpt"] * (len(body) // 2) + ["human"] * (len(body) % 2) or not body:
        raise ValueError(f"got turns from {roles}, need human and gpt in turn, human first (a system turn may lead)")
    answers = []
    if roles[-1] == "gpt":
        roles, last = roles[:-1], contents.pop()
        answers = last if isinstance(last, list) else [last]
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(f"got the answer {str(last)[:80]!r}, need text that is not empty (or a list of such, best first)")
    elif need_answer:
        raise ValueError("got no answer: the last turn is human; training needs a final gpt turn")
    if not all(isinstance(c, str) for c in contents):
        raise ValueError("got a turn whose value is not text; only the last gpt turn may be a list")
    if not all(c.strip() for role, c in zip(roles, contents) if role == "gpt"):
        raise ValueError("got an empty gpt turn, need text")
    images = image_list(row.get("image"), images_dir)
    asked = sum(c.count(IMAGE) for role, c in zip(roles, contents) if role == "human")
    if asked > len(images):
        raise ValueError(f"got {asked} {IMAGE} placeholders for {len(images)} images: add images or remove placeholders")
    first = roles.index("human")
    contents[first] = f"{IMAGE}\n" * (len(images) - asked) + contents[first]
    return Conversation(str(row.get("id")), roles, [c.strip() for c in contents], [a.strip() for a in answers], images)


def image_list(value, images_dir):
    """A row's `image` (path, list, comma-joined paths, null) → paths that exist below images_dir; else ValueError."""
    names = value if isinstance(value, list) else [value] if value else []
    if isinstance(value, str) and "," in value and not os.path.isfile(os.path.join(images_dir, value)):
        names = [name.strip() for name in value.split(",")]
    paths, root = [], os.path.abspath(images_dir)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"got the image {name!r}, need a path")
        path = os.path.abspath(os.path.join(root, name))
        if os.path.commonpath([path, root]) != root:
            raise ValueError(f"got the image {name!r}, which leaves --images {images_dir}: use paths below it")
        if not os.path.isfile(path):
            raise ValueError(f"no such picture: {path} (see --images)")
        paths.append(path)
    return paths


# ---- templates ----

# Each template is the chat_template.jinja that an export carries; text() takes a string or transformers' list of parts.
_TEXT = ("{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
         "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{%- endfor -%}{%- endif -%}{%- endmacro -%}")
TEMPLATES = {
    # LLaVA-1.5's conversation, vicuna v1
    "vicuna": _TEXT + (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}A chat between a curious human and an artificial intelligence "
        "assistant. The assistant gives helpful, detailed, and polite answers to the human's questions. {% endif %}"
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ text(m['content']) + ' ' }}"
        "{% elif m['role'] == 'user' %}{{ 'USER: ' + text(m['content']) + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + text(m['content']) + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"),
    # Meta's LLaMA-2 chat: one <bos> a turn, the system prompt inside the first
    "llama2": _TEXT + (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ bos_token + '[INST] <<SYS>>\n' + text(m['content']) + "
        "'\n<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}{% if loop.first or loop.previtem['role'] != 'system' %}"
        "{{ bos_token + '[INST] ' }}{% endif %}{{ text(m['content']) + ' [/INST]' }}"
        "{% else %}{{ ' ' + text(m['content']) + ' ' + eos_token }}{% endif %}{% endfor %}"),
    # Meta's LLaMA-3 chat: turns end with <|eot_id|>, which is not the tokenizer's eos
    "llama3": _TEXT + (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "text(m['content']) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"),
    # LLaVA's projector pre-training: pictures, caption, newline; nothing else of the human turn
    "plain": _TEXT + (
        "{{ bos_token }}{% for m in messages %}{{ text(m['content']) }}{% if m['role'] == 'assistant' %}{{ '\n' }}{% endif %}"
        "{% endfor %}"),
}


class Template:
    """A chat template as the text between messages, and tokenisation piece by piece.

    A template is rendered once a sequence of roles, with a sentinel as each message, and cut at the sentinels. Its own
    special tokens become ids; what people wrote is always text, so a typed "</s>" never ends a turn.
    """

    def __init__(self, name, tokenizer, image_token):
        self.name, self.tokenizer, self.image_token = name, tokenizer, image_token
        self.jinja = tokenizer.chat_template if name == "auto" else TEMPLATES[name]
        if not self.jinja:
            raise ValueError(f"got --template auto, but {tokenizer.name_or_path} has no chat template: "
                             f"give --template {'|'.join(TEMPLATES)}")
        specials = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.special_ids = specials
        self.specials = re.compile("(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")")
        # a tokenizer of the SentencePiece kind puts a space in front of every text by itself
        self.prefixes = tokenizer.convert_ids_to_tokens(self.ids("a"))[0].startswith("▁")
        self.gaps = functools.lru_cache(maxsize=256)(self.gaps)
        self.template_ids = functools.lru_cache(maxsize=4096)(self.piece_ids)

    def gaps(self, roles):
        """roles (a tuple) → the texts before, between and after their messages [len(roles) + 1]."""
        marks = [f"SENTINEL{i}X" for i in range(len(roles))]
        names = {"human": "user", "gpt": "assistant", "system": "system"}
        for form in (lambda mark: mark, lambda mark: [{"type": "text", "text": mark}]):  # text-only and multi-modal templates
            messages = [{"role": names[role], "content": form(mark)} for role, mark in zip(roles, marks)]
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.jinja)
            except Exception as error:  # jinja raises whatever the template raises
                text, why = "", error
            else:
                why = "it reorders, repeats or drops messages"
            places = [text.find(mark) for mark in marks]
            if -1 not in places and places == sorted(places) and all(text.count(mark) == 1 for mark in marks):
                gaps = re.split("|".join(marks), text)
                bos = self.tokenizer.bos_token
                if bos and not gaps[0].startswith(bos) and self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id:
                    gaps[0] = bos + gaps[0]
                return gaps
        raise ValueError(f"the chat template cannot be used for turns {list(roles)}: {why}; give --template "
                         f"{'|'.join(TEMPLATES)}")

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def piece_ids(self, text, first):
        """Token ids of a text that starts a stretch of text (first) or goes on after another piece of it."""
        if first or not self.prefixes:
            return self.ids(text)
        if len(text) > 1 and text[0] == " ":
            return self.ids(text[1:])  # the tokenizer puts the joint's space back
        newline, whole = self.ids("\n"), self.ids("\n" + text)  # no space at the joint: keep the tokenizer from adding one
        return whole[len(newline):] if whole[:len(newline)] == newline else self.ids(text)

    def split(self, gap):
        """A template's own text → pieces: texts and the ids of its special tokens."""
        return [self.special_ids.get(piece, piece) for piece in self.specials.split(gap) if piece]

    def after_answer(self, gap):
        """The gap behind an answer → (pieces that end the answer, pieces of what follows)."""
        pieces = self.split(gap)
        if self.name == "plain":
            return pieces, []
        for i, piece in enumerate(pieces):
            if isinstance(piece, int):
                return pieces[:i + 1], pieces[i + 1:]
        return [self.tokenizer.eos_token_id], self.split(gap.lstrip())  # a template without an end token: the tokenizer's

    def stop_ids(self):
        """The last token of what ends an answer."""
        return {self.encode(["human"], ["a"], "b")[0][-1]}

    def encode(self, roles, contents, answer, all_turns=True):
        """A conversation with its final answer → ids, and which of them are supervised: the answer (all_turns: every gpt
        turn) and what ends it. One image token stands for each picture."""
        gaps = self.gaps((*roles, "gpt"))
        pieces, follow = [], self.split(gaps[0])  # [text or id, supervised, from the template]
        for i, (role, content) in enumerate(zip((*roles, "gpt"), (*contents, answer))):
            pieces += [(piece, False, True) for piece in follow]
            if role == "human":
                said = re.split(f"({IMAGE})", content)
                if self.name == "plain":
                    said = [s for s in said if s == IMAGE]
                pieces += [(self.image_token if s == IMAGE else s, False, False) for s in said if s]
                follow = self.split(gaps[i + 1])
            elif role == "gpt":
                keep = all_turns or i == len(roles)
                end, follow = self.after_answer(gaps[i + 1])
                pieces += [(content, keep, False)] + [(piece, keep, True) for piece in end]
            else:
                pieces.append((content, False, False))
                follow = self.split(gaps[i + 1])
        return self.tokenise(pieces)

    def tokenise(self, pieces):
        ids, kept, first = [], [], True
        pieces = [list(piece) for piece in pieces]
        for left, right in zip(pieces, pieces[1:]):  # the space at a joint belongs to the piece behind it
            if isinstance(left[0], str) and isinstance(right[0], str) and left[0].endswith(" "):
                left[0], right[0] = left[0][:-1], " " + right[0]
        for piece, keep, own in pieces:
            if isinstance(piece, int):
                new, first = [piece], True
            elif piece:
                new, first = (self.template_ids if own else self.piece_ids)(piece, first), False
            else:
                new = []
            ids += new
            kept += [keep] * len(new)
        return ids, kept

    def render(self, conversation):
        """The prompt as text, one <image> a picture."""
        gaps = self.gaps((*conversation.roles, "gpt"))
        return "".join(gap + content for gap, content in zip(gaps, (*conversation.contents, ""))).rstrip(" ")


# ---- pictures ----

def read_picture(path):
    """A picture file as RGB, turned upright (EXIF), 16-bit grey brought to 8 bits."""
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
        return picture.convert("RGB")


def picture_error(path):
    """What is wrong with a picture file, or None. Decodes it, JPEG at an eighth of its size: enough to find a torn file."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (1, 1))
            picture.load()
    except Exception as error:  # decoders raise many kinds
        return f"cannot read the picture {path}: {error}"
    return None


def to_pixels(picture, size, mode="crop", mean=CLIP_MEAN, std=CLIP_STD):
    """RGB picture → [3, S, S] fp32, as CLIPImageProcessor does it: shorter side to S (bicubic), centre crop, normalised;
    mode `pad` first pads to a square with the mean colour, as LLaVA-1.5 does."""
    if mode == "pad":
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    short = min(picture.size)
    picture = picture.resize([int(size * edge / short) for edge in picture.size], Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    array = np.asarray(picture.crop((left, top, left + size, top + size)))
    array = (array.astype(np.float64) / 255).astype(np.float32)
    array = (array - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


# ---- examples ----

@dataclasses.dataclass
class Example:
    """A tokenised row. ids are int32 arrays with one image token a picture; answers may be none (a prompt)."""
    index: int  # of its row in the file
    id: str
    prompt: np.ndarray  # [P]
    answers: list  # of [n]
    kept: list  # of [n] bool: the answer's tokens that are predicted
    images: list  # paths


@dataclasses.dataclass
class Processor:
    """What turns rows into tensors for one checkpoint."""
    tokenizer: object
    template: Template
    image_token: int
    image_tokens: int  # I
    size: int  # S
    mode: str  # crop or pad
    mean: tuple
    std: tuple
    pad: int
    stop: frozenset  # ids that end an answer
    banned: frozenset  # ids that are never generated
    max_len: int

    def example(self, index, conversation, answers, all_turns=False):
        """A conversation with the given answers (none: a prompt) → Example cut to max_len, and whether an answer lost its
        tail. Example is None where the prompt alone does not fit. all_turns (one answer only): earlier gpt turns are
        supervised too, and what follows the first of them counts as the answer."""
        assert len(answers) == 1 or not all_turns, answers
        coded = [self.template.encode(conversation.roles, conversation.contents, answer, all_turns)
                 for answer in answers or [""]]
        P = coded[0][1].index(True)
        prompt = np.array(coded[0][0][:P], dtype=np.int32)
        room = self.max_len - self.lengths(prompt).sum()
        example, cut = Example(index, conversation.id, prompt, [], [], conversation.images), False
        if room <= 0:
            return None, False
        for ids, kept in coded[:len(answers)]:
            ids, kept = np.array(ids[P:], dtype=np.int32), np.array(kept[P:])
            fits = np.searchsorted(self.lengths(ids).cumsum(), room, side="right")
            end = 1 + np.flatnonzero(kept[:fits]).max(initial=-1)  # behind the last supervised token that fits
            if end == 0:
                return None, False
            cut |= bool(kept[end:].any())
            example.answers.append(ids[:end])
            example.kept.append(kept[:end])
        left = [prompt, *example.answers]
        example.images = conversation.images[:sum(int((ids == self.image_token).sum()) for ids in left)]
        return example, cut

    def text(self, ids):
        """Sampled or given ids as text, without what ends them."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop], skip_special_tokens=True).strip()

    def lengths(self, ids):
        """Columns that each id takes: I for a picture, else 1."""
        return np.where(ids == self.image_token, self.image_tokens, 1)

    def expand(self, ids):
        return np.repeat(ids, self.lengths(ids))


def load_processor(folder, config, args):
    """The Processor of a checkpoint folder, with <image> and <pad> added where its vocabulary lacks them (config then says
    so). → Processor, and None or (old, new) number of embedding rows."""
    source = args.tokenizer or folder
    if not os.path.isfile(os.path.join(source, "tokenizer.json")):
        raise ValueError(f"{source}: no tokenizer.json; make one: python -c \"from transformers import AutoTokenizer; "
                         f"AutoTokenizer.from_pretrained('{source}').save_pretrained('DIR')\" and give --tokenizer DIR")
    tokenizer = AutoTokenizer.from_pretrained(source)
    old_template = os.path.join(folder, "chat_template.json")
    if not tokenizer.chat_template and os.path.isfile(old_template):
        with open(old_template, encoding="utf-8") as f:
            tokenizer.chat_template = json.load(f)["chat_template"]
    pad = tokenizer.pad_token or "<pad>"
    new = [token for token in (IMAGE, pad) if token not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": [IMAGE]},
                                 replace_extra_special_tokens=False)
    image_token, text = tokenizer.convert_tokens_to_ids(IMAGE), config.text_config
    if config.image_token_index not in (None, image_token):
        raise ValueError(f"{source}: {IMAGE} is token {image_token}, but config.json's image_token_index is "
                         f"{config.image_token_index}: the tokenizer is of another checkpoint")
    config.image_token_index, grown = image_token, None
    if len(tokenizer) > text.vocab_size:
        if len(tokenizer) - len(new) > text.vocab_size:
            raise ValueError(f"{source}: the tokenizer has {len(tokenizer) - len(new)} tokens, the model "
                             f"{text.vocab_size}: the tokenizer is of another checkpoint")
        grown = text.vocab_size, -(-len(tokenizer) // 64) * 64
        text.vocab_size = grown[1]
    template = Template(args.template, tokenizer, image_token)
    stop = template.stop_ids() | {tokenizer.eos_token_id} | generation_stops(folder)
    banned = {image_token, tokenizer.pad_token_id, *range(len(tokenizer), text.vocab_size)} - stop
    picture = picture_settings(folder)
    mode = args.image_mode if args.image_mode != "auto" else picture["mode"]
    tokenizer.chat_template = template.jinja
    return Processor(
        tokenizer, template, image_token, config.image_seq_length, config.vision_config.image_size, mode,
        picture["mean"], picture["std"], tokenizer.pad_token_id, frozenset(stop - {None}), frozenset(banned),
        args.max_len), grown


def generation_stops(folder):
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return set()
    with open(path, encoding="utf-8") as f:
        eos = json.load(f).get("eos_token_id")
    return set(eos) if isinstance(eos, list) else {eos}


def picture_settings(folder):
    """How a checkpoint wants its pictures: preprocessor_config.json, else an original LLaVA's image_aspect_ratio."""
    settings = {}
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                found = json.load(f)
            settings.update(found.get("image_processor", found))
    pad = settings.get("do_pad") or settings.get("image_aspect_ratio") == "pad"
    return {"mode": "pad" if pad else "crop", "mean": tuple(settings.get("image_mean", CLIP_MEAN)),
            "std": tuple(settings.get("image_std", CLIP_STD))}


def save_processor(processor, config, folder):
    """Writes tokenizer, chat template, picture settings and generation configuration as transformers' LlavaProcessor and
    generate() read them."""
    processor.tokenizer.save_pretrained(folder)
    S, pad = processor.size, processor.mode == "pad"
    patch = config.vision_config.patch_size
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaImageProcessor" if pad else "CLIPImageProcessor",
            "processor_class": "LlavaProcessor", "do_resize": True, "size": {"shortest_edge": S}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": S, "width": S}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": processor.mean, "image_std": processor.std, "do_convert_rgb": True,
            **({"do_pad": True} if pad else {})},
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": patch,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": config.vision_feature_select_strategy},
        "generation_config.json": {
            "bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": sorted(processor.stop),
            "pad_token_id": processor.pad},
    }
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=2)


def check_rows(rows, images_dir, source, need_answer=True, skip_bad_rows=False, world=None):
    """Rows → (index, Conversation) of the good ones, and how many were bad. A bad row is a ValueError that names it, or is
    reported and skipped. world.share(function, items) spreads the look at every picture over threads and ranks."""
    good, errors = [], {}
    for index, row in enumerate(rows):
        try:
            good.append((index, read_row(row, images_dir, need_answer)))
        except ValueError as error:
            errors[index] = str(error)
            if not skip_bad_rows:
                break
    paths = sorted({path for _, conversation in good for path in conversation.images})
    torn = {path: error for path, error in zip(paths, (world.share if world else map)(picture_error, paths)) if error}
    for index, conversation in good:
        found = [torn[path] for path in conversation.images if path in torn]
        errors.update({index: found[0]} if found else {})
    for index in sorted(errors):
        name = rows[index].get("id") if isinstance(rows[index], dict) else None
        message = f"{source}: row {index} (id {name}): {errors[index]}"
        if not skip_bad_rows:
            raise ValueError(message + "; --skip_bad_rows leaves such rows out")
        print(f"skipped {message}", flush=True)
    good = [(index, conversation) for index, conversation in good if index not in errors]
    if not good:
        raise ValueError(f"{source}: all {len(rows)} rows are bad, need at least one good row")
    return good, len(errors)


def build_examples(conversations, processor, which):
    """(index, Conversation) pairs → Examples, and counts of rows too long and of answers cut. which: `turns` (the best
    answer and every earlier gpt turn supervised), `answers` (all answers of the last turn), `prompt`."""
    examples, counts = [], {"too_long": 0, "cut": 0}
    for index, conversation in conversations:
        answers = {"turns": conversation.answers[:1], "answers": conversation.answers, "prompt": []}[which]
        example, cut = processor.example(index, conversation, answers, all_turns=which == "turns")
        counts["cut"] += cut
        if example is None:
            counts["too_long"] += 1
        else:
            examples.append(example)
    if not examples:
        raise ValueError(f"none of {len(conversations)} rows fits --max_len {processor.max_len}: raise it "
                         f"(a picture takes {processor.image_tokens} tokens)")
    return examples, counts


# ---- batches ----

@dataclasses.dataclass
class Batch:
    """Rows of a prompt and its answers, as tensors (see the head of this file)."""
    ids: torch.Tensor  # [B, T]
    position: torch.Tensor  # [B, T]
    branch: torch.Tensor  # [B, T]
    pixels: torch.Tensor  # [M, 3, S, S]; one blank picture where there is none, so that every rank runs the tower
    image: torch.Tensor  # [R] which of the M each run of image tokens shows, in row order
    target: torch.Tensor  # [N] ids to predict
    source: torch.Tensor  # [N] flat position (row · T + column) whose state predicts it
    answer: torch.Tensor  # [N] which of the A answers it belongs to
    last: torch.Tensor  # [A] flat position of each answer's last kept token
    row: torch.Tensor  # [A] the row it stands in
    causal: bool  # no row has two answers: plain causal attention will do

    def to(self, device):
        return Batch(*(value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                       for value in (getattr(self, field.name) for field in dataclasses.fields(self))))


def collate(examples, processor):
    """Examples → Batch, padded on the right to the longest. No examples: one row of padding with nothing to predict."""
    rows, paths, targets, last, owner = [], [], [], [], []
    for b, example in enumerate(examples):
        prompt = processor.expand(example.prompt)
        P = len(prompt)
        ids, position, branch = [prompt], [np.arange(P)], [np.zeros(P)]
        start = P
        for a, (answer, kept) in enumerate(zip(example.answers, example.kept), 1):
            kept = np.repeat(kept, processor.lengths(answer))
            answer = processor.expand(answer)
            n = len(answer)
            ids.append(answer)
            position.append(np.arange(P, P + n))
            branch.append(np.full(n, a))
            before = np.concatenate([[P - 1], np.arange(start, start + n - 1)])  # the column that predicts each token
            targets.append((answer[kept], b, before[kept], len(owner)))
            last.append((b, start + np.flatnonzero(kept)[-1]))
            owner.append(b)
            start += n
        rows.append([np.concatenate(part) for part in (ids, position, branch)])
        paths += example.images
    rows = rows or [[np.array([processor.pad]), np.zeros(1), np.full(1, -1)]]
    T = max(len(row[0]) for row in rows)
    ids, position, branch = (
        torch.from_numpy(np.stack([np.pad(row[i], (0, T - len(row[i])), constant_values=fill) for row in rows]).astype(np.int64))
        for i, fill in enumerate((processor.pad, 0, -1)))
    distinct = {path: m for m, path in enumerate(dict.fromkeys(paths))}
    assert (ids == processor.image_token).sum() == processor.image_tokens * len(paths), (len(paths), examples)
    pixels = [to_pixels(read_picture(path), processor.size, processor.mode, processor.mean, processor.std)
              for path in distinct] or [torch.zeros(3, processor.size, processor.size)]

    def flat(parts):
        return torch.from_numpy(np.concatenate([np.zeros(0), *parts]).astype(np.int64))
    return Batch(
        ids, position, branch, torch.stack(pixels), torch.tensor([distinct[path] for path in paths], dtype=torch.long),
        target=flat(t for t, *_ in targets), source=flat(b * T + before for _, b, before, _ in targets),
        answer=flat(np.full(len(t), a) for t, _, _, a in targets), last=flat([b * T + column] for b, column in last),
        row=torch.tensor(owner, dtype=torch.long), causal=all(len(example.answers) < 2 for example in examples))


class Steps(torch.utils.data.Dataset):
    """Item k: the micro-batches of optimiser step k for this rank, every rank as many (short ones hold padding only).

    Step k takes the same rows whatever the number of ranks; within it, rows of similar length share a micro-batch
    (by_length). shuffle: every epoch in an order keyed by (seed, epoch); else in file order.
    """

    def __init__(self, examples, processor, batch_size, micro_batch, rank, world, seed=0, shuffle=True, by_length=True):
        self.examples, self.processor, self.batch_size, self.micro_batch = examples, processor, batch_size, micro_batch
        self.rank, self.world, self.seed, self.shuffle, self.by_length = rank, world, seed, shuffle, by_length
        self.per_epoch = -(-len(examples) // batch_size)
        self.columns = np.array([sum(processor.lengths(ids).sum() for ids in (example.prompt, *example.answers))
                                 for example in examples])
        self.order = functools.lru_cache(maxsize=1)(self.order)

    def __len__(self):
        return self.per_epoch

    def order(self, epoch):
        if not self.shuffle:
            return np.arange(len(self.examples))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))

    def groups(self, step):
        """The micro-batches of this rank as lists of example indices."""
        epoch, k = divmod(step, self.per_epoch)
        rows = self.order(epoch)[k * self.batch_size:(k + 1) * self.batch_size]
        if self.by_length:
            rows = rows[np.argsort(self.columns[rows], kind="stable")]
        rounds = -(-len(rows) // (self.micro_batch * self.world))
        starts = [(i * self.world + self.rank) * self.micro_batch for i in range(rounds)]
        return [rows[start:start + self.micro_batch].tolist() for start in starts]

    def __getitem__(self, step):
        return [collate([self.examples[i] for i in group], self.processor) for group in self.groups(step)]


def loader(steps, first, last, workers):
    """A DataLoader over steps first … last − 1, decoded ahead by worker processes."""
    return torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(first, last), num_workers=workers,
                                       prefetch_factor=2 if workers else None)
