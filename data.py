"""Pictures, text and what joins them: scenes, a tokenizer, the prompt template and its labels.

    Scenes ──────┐
                 ├─► Sample (images, turns) ─► encode_turns ─► ids and labels ─► Collate ─► batch
    own pictures ┘                             (the template)                   (padding)

`Scenes` are drawn as they are needed, with questions whose answers are known: nothing has to be
downloaded. Your own pictures come in the second half of this file, which you may skip.

    python data.py        two turns of a sample, token by token

B texts, N images, T tokens, Q image tokens of one image.
"""
import csv
import io
import json
import math
import mmap
import os
import random
import re
import sys
import textwrap
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.utils.rnn import pad_sequence


def check(is_right, message):
    """Raise ValueError for what a user can get wrong."""
    if not is_right:
        raise ValueError(message)


# ---- Scenes: pictures whose every fact is known ----------------------------------------------
COLORS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 215),
          "yellow": (240, 205, 30), "purple": (150, 60, 180), "black": (35, 35, 35)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.30, "large": 0.46}  # radius over the side of a cell
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
CELLS = (4, 1, 3, 5, 7, 0, 2, 6, 8)  # 3 * row + column: center, sides, corners


@dataclass(frozen=True)
class Thing:
    """One shape in one cell of a 3 x 3 grid. row and column count from the top left."""
    color: str
    shape: str
    size: str
    row: int
    column: int

    @property
    def name(self):
        return f"{self.color} {self.shape}"

    @property
    def place(self):
        """(0, 2) is "top right", (0, 1) "top", (1, 1) "center"."""
        words = [ROWS[self.row], COLUMNS[self.column]]
        return " ".join(word for word in words if word != "middle") or "center"


@dataclass(frozen=True)
class SceneSpec:
    """How hard the scenes are: the first so many of `COLORS`, `SHAPES` and `CELLS` occur."""
    image_size: int = 48  # pixels, height and width
    n_colors: int = 5
    n_shapes: int = 4
    n_places: int = 5
    max_things: int = 3

    def __post_init__(self):
        most = {"n_colors": len(COLORS), "n_shapes": len(SHAPES), "n_places": len(CELLS),
                "max_things": min(self.n_places, len(self.training_pairs))}
        for name, limit in most.items():
            check(1 <= getattr(self, name) <= limit, f"scenes.{name} must be 1 to {limit}")

    @property
    def pairs(self):
        colors = list(COLORS)[:self.n_colors]
        return [(color, shape) for color in colors for shape in SHAPES[:self.n_shapes]]

    @property
    def unseen_pairs(self):
        """One pair of each shape, in no training picture or text: red circle, green square, ...
        Can the model put together what it never saw together?"""
        colors = list(COLORS)[:self.n_colors]
        return [(colors[i % len(colors)], SHAPES[i]) for i in range(self.n_shapes)]

    @property
    def training_pairs(self):
        return [pair for pair in self.pairs if pair not in self.unseen_pairs]


def describe(things):
    """All there is to say, in reading order: "At the top left is a large blue star. At ..." """
    return " ".join(f"At the {thing.place} is a {thing.size} {thing.name}." for thing in things)


def is_reserved(things):
    """Whether an arrangement is kept for tests. A hash of its description chooses one in ten."""
    return zlib.crc32(describe(things).encode()) % 10 == 0


def random_things(spec, rng, split):
    """1 to max_things things in reading order, of different pairs and in different cells.
    "train": no reserved arrangement. "test" and "unseen": only reserved ones.
    "unseen": exactly one thing has an unseen pair. In the other splits none has."""
    for _ in range(10_000):
        n = rng.randint(1, spec.max_things)
        pairs = rng.sample(spec.training_pairs, n)
        if split == "unseen":
            pairs[0] = rng.choice(spec.unseen_pairs)
        cells = rng.sample(CELLS[:spec.n_places], n)
        things = []
        for (color, shape), cell in zip(pairs, cells):
            things.append(Thing(color, shape, rng.choice(list(SIZES)), cell // 3, cell % 3))
        things.sort(key=lambda thing: (thing.row, thing.column))
        if is_reserved(things) == (split != "train"):
            return things
    raise ValueError(f"no arrangement is left for {split!r}: raise one of the scenes settings")


def caption(things, rng):
    """A short, noisy caption in any order: "A red star at the top and a small blue circle." """
    forms = ("a {0.name}", "a {0.size} {0.name}", "a {0.name} at the {0.place}")
    parts = [rng.choice(forms).format(thing) for thing in rng.sample(things, len(things))]
    return " and ".join(parts).capitalize() + "."


QUESTION_TYPES = ("color", "shape", "size", "where", "count", "exists", "relation")
DESCRIBE = ("Describe the picture in detail.", "What do you see? Describe everything.",
            "Give a detailed description.")


def ask(question_type, things, about, spec, rng):
    """A question about one of the things, and its answer. None if it would be ambiguous."""
    others = [thing for thing in things if thing != about]
    if question_type == "color" and all(thing.shape != about.shape for thing in others):
        return f"What color is the {about.shape}?", about.color
    if question_type == "shape" and all(thing.color != about.color for thing in others):
        return f"What shape is the {about.color} one?", about.shape
    if question_type == "size":
        return f"How big is the {about.name}?", about.size
    if question_type == "where":
        return f"Where is the {about.name}?", about.place
    if question_type == "count":
        # "shape" counts all, "red shape" the red ones, "circle" the circles.
        any_shape = rng.choice(spec.pairs)[1]
        what = rng.choice(["shape", about.shape, about.color + " shape", any_shape])
        n = sum(what in ("shape", thing.shape, thing.color + " shape") for thing in things)
        return f"How many {what}s are there?", str(n)
    if question_type == "exists":
        form = rng.choice(("{0.shape}", "{0.color} shape", "{0.name}"))
        if rng.random() < 0.5:
            return f"Is there a {form.format(about)}?", "yes"
        # What is absent has the color or the shape of something present: to see one is not enough.
        # A training text must not name an unseen pair, not even to say no.
        pairs = spec.training_pairs
        if (about.color, about.shape) in spec.unseen_pairs:
            pairs = spec.pairs
        alike = [replace(about, color=color, shape=shape) for color, shape in pairs
                 if color == about.color or shape == about.shape]
        present = [form.format(thing) for thing in things]
        absent = [form.format(thing) for thing in alike if form.format(thing) not in present]
        return (f"Is there a {rng.choice(absent)}?", "no") if absent else None
    if question_type == "relation" and others:
        other = rng.choice(others)
        relations = []
        if about.column != other.column:
            relations.append(("left of", about.column < other.column))
        if about.row != other.row:
            relations.append(("above", about.row < other.row))
        relation, holds = rng.choice(relations)
        return f"Is the {about.name} {relation} the {other.name}?", "yes" if holds else "no"
    return None


def ask_any(things, spec, rng):
    """(question type, question, answer), about an unseen pair if there is one."""
    unseen = [thing for thing in things if (thing.color, thing.shape) in spec.unseen_pairs]
    asked = None
    while asked is None:
        question_type = rng.choice(QUESTION_TYPES)
        asked = ask(question_type, things, rng.choice(unseen or things), spec, rng)
    return question_type, *asked


@dataclass
class Sample:
    """One record of any source."""
    images: list[Image.Image | Path]  # own pictures stay paths until a batch needs them
    turns: list[tuple[str, str | None]]  # (question, answer); "<image>" stands for the next image
    question_type: str = "answer"  # groups the answers in an evaluation
    references: tuple[str, ...] = ()  # all right answers to the last question, in an evaluation


@dataclass
class Scenes:
    """Scenes: number i is always the same picture and text for the same settings."""
    spec: SceneSpec
    task: str  # a stage of train.py, or "question" or "describe" in an evaluation
    n: int  # how many of them
    split: str = "train"  # or "test", other arrangements; "unseen", with an unseen pair, too
    seed: int = 0
    n_turns: int = 6  # questions about each scene

    def __len__(self):
        return self.n

    def things(self, i):
        """(what is in scene i, the generator that decides how it is drawn)."""
        rng = random.Random(f"{self.seed} {self.split} {i}")
        return random_things(self.spec, rng, self.split), rng

    def conversation(self, things, rng):
        """Questions and answers, or else a description. In `language` words replace the picture."""
        is_text = self.task == "language"
        choice = rng.random()
        # `instruct`: half descriptions. `language`: 3 %, since the question holds the description:
        # to repeat it is easy and would dominate the loss. And 3 % captions, as in `align`.
        if choice < (0.03 if is_text else 0.5):
            turns = [(rng.choice(DESCRIBE), describe(things))]
        elif is_text and choice < 0.06:
            turns = [("", caption(things, rng))]
        else:
            turns = [ask_any(things, self.spec, rng)[1:] for _ in range(self.n_turns)]
            turns = list(dict(turns).items())  # no question twice
        shown = describe(things) if is_text else "<image>"
        question, answer = turns[0]
        return [(f"{shown} {question}", answer), *turns[1:]]

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)  # ends a loop over all
        things, drawing_rng = self.things(i)
        # A generator of its own, so that the picture does not depend on what is asked.
        rng = random.Random(f"{self.seed} {self.split} {i} text")
        question_type = self.task
        if self.task in ("language", "instruct"):
            turns = self.conversation(things, rng)
        elif self.task == "question":
            question_type, question, answer = ask_any(things, self.spec, rng)
            turns = [("<image> " + question, answer)]
        elif self.task == "align":
            turns = [("<image>", caption(things, rng))]
        elif self.task == "describe":
            turns = [("<image> " + DESCRIBE[0], describe(things))]
        else:  # vision
            turns = [("<image>", describe(things))]
        if self.task == "language":
            return Sample([], turns, question_type)
        return Sample([draw(things, self.spec.image_size, drawing_rng)], turns, question_type)


# ---- Tokenizer: text as ids ------------------------------------------------------------------
# Tokens that stand for no text. The first five:
# <pad>        fills up short texts
# <ImageHere>  keeps the place of an image token
# <s>          starts a text; what the Q-Former puts out there sums the text up
# <dec>        starts a text that the Q-Former is to write
# ###          ends an answer
MARKS = ("<pad>", "<ImageHere>", "<s>", "<dec>", "###", "Human:", "Assistant:", "<Img>", "</Img>")

# A text is cut into words first, and no token crosses a word: letters, digits or other signs, with
# the space before them, or white space. "At 10, ok" -> "At", " 10", ",", " ok".
WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def merge_pair(ids, pair, merged):
    """merge_pair([1, 2, 3, 1, 2], (1, 2), merged=9) -> [9, 3, 9]."""
    result = []
    i = 0
    while i < len(ids):
        if tuple(ids[i:i + 2]) == pair:
            result.append(merged)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


class Tokenizer:
    """Byte-pair encoding (arXiv 1508.07909, section 3.2): any text in, ids out, and back.
    `encode` never yields a mark, so a text cannot fake an image or the end of an answer."""
    space = " "  # what `encode_part` puts first; a published vocabulary may do that itself

    def __init__(self, merges=()):
        # Ids 0 to 8 are `MARKS`, the next 256 are bytes, the rest are pairs that were merged.
        self.bytes = {i: mark.encode() for i, mark in enumerate(MARKS)}  # id -> what it stands for
        for byte in range(256):
            self.bytes[len(self.bytes)] = bytes([byte])
        self.merges = {}  # (left id, right id) -> (rank, merged id); rank 0 was learned first
        for rank, (left, right) in enumerate(merges):
            merged = len(self.bytes)
            self.bytes[merged] = self.bytes[left] + self.bytes[right]
            self.merges[left, right] = (rank, merged)
        self.vocab_size = len(self.bytes)
        self.state = {"merges": [list(pair) for pair in self.merges]}  # what a checkpoint stores
        self.known_words = {}  # word -> ids, so that each word is encoded once
        self.pad_id, self.image_id, self.cls_id, self.dec_id, self.end_id = range(5)
        # What the template is written in: <s>, ###Human:, ###Assistant:, <Img> and </Img>.
        self.start, self.human, self.assistant = [self.cls_id], [self.end_id, 5], [self.end_id, 6]
        self.image_open, self.image_close = [7], [8]

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent pair of neighbors, until there are vocab_size ids."""
        tokenizer = cls()
        counts = Counter()
        for text in texts:
            counts.update(tokenizer.split(text))
        words = {word: tokenizer.smallest_parts(word) for word in counts}
        pair_counts = Counter()
        words_with = defaultdict(set)  # pair -> words that have it, or had it

        def count(word, sign):
            for pair in zip(words[word], words[word][1:]):
                pair_counts[pair] += sign * counts[word]
                words_with[pair].add(word)

        for word in words:
            count(word, 1)
        merges = []
        for new_id in range(tokenizer.vocab_size, vocab_size):
            best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair), default=None)
            # A pair that occurs once is not worth an id. (No pair at all: None.)
            if pair_counts[best] < 2:
                break
            merges.append(best)
            # Only the words that have this pair change, and only their pairs are counted again.
            for word in words_with.pop(best):
                count(word, -1)
                words[word] = merge_pair(words[word], best, new_id)
                count(word, 1)
        return cls(merges)

    def split(self, text):
        return WORD.findall(text)

    def smallest_parts(self, word):
        return [len(MARKS) + byte for byte in word.encode("utf-8", "replace")]

    def encode(self, text):
        """The ids of text. "" gives []."""
        text_ids = []
        for word in self.split(text):
            if word not in self.known_words:
                ids = self.smallest_parts(word)
                while True:
                    known = [pair for pair in zip(ids, ids[1:]) if pair in self.merges]
                    if not known:
                        break
                    first = min(known, key=self.merges.get)  # the one that was learned first
                    ids = merge_pair(ids, first, self.merges[first][1])
                self.known_words[word] = ids
            text_ids += self.known_words[word]
        return text_ids

    def encode_part(self, text):
        """The ids of a question or an answer, which begins with a space: " red" is one token."""
        text = text.strip()
        return self.encode(self.space + text) if text else []

    def decode(self, ids):
        """The text of ids. Marks show by name, broken UTF-8 as U+FFFD, unknown ids not at all."""
        text = b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text if self.space else text.removeprefix(" ")


def texts_of(samples, at_most=5000):
    """Questions and answers of samples, drawn from all of them, to train a tokenizer on."""
    n = len(samples)
    for i in random.Random(0).sample(range(n), min(n, at_most)):
        text = " ".join(text for turn in samples[i].turns for text in turn)
        yield " " + " ".join(text.replace("<image>", " ").split())


# ---- From samples to a batch -----------------------------------------------------------------
IGNORED = -100  # the label that cross-entropy skips


def encode_turns(tokenizer, turns, n_image_tokens):
    """A conversation as (ids, labels), in MiniGPT-4's template (arXiv 2304.10592, section 3.2):

        <s>###Human: <Img>(placeholders)</Img> What color is the star?###Assistant: red###

    Labels are the ids of each answer and of the ### that ends it, and -100 everywhere else. If the
    last answer is None, the ids end with "Assistant:", ready to generate.
    """
    ids, labels = [], []

    def add(tokens, is_trained=False):
        ids.extend(tokens)
        labels.extend(tokens if is_trained else [IGNORED] * len(tokens))

    add(tokenizer.start)
    for question, answer in turns:
        # The ### that ends an answer also begins the next turn: it is not added twice. (A published
        # vocabulary ends an answer with a symbol of its own.)
        is_shared = ids[-1:] == tokenizer.human[:1]
        add(tokenizer.human[1:] if is_shared else tokenizer.human)
        before, *after_images = question.split("<image>")
        add(tokenizer.encode_part(before))
        for text in after_images:
            placeholders = [tokenizer.image_id] * n_image_tokens
            add(tokenizer.image_open + placeholders + tokenizer.image_close)
            add(tokenizer.encode_part(text))
        add(tokenizer.assistant)
        if answer is not None:
            add(tokenizer.encode_part(answer) + [tokenizer.end_id], is_trained=True)
    return ids, labels


def to_pixels(image, size):
    """An RGB picture or its path, squashed to size (height, width) -> (3, height, width) uint8."""
    height, width = size
    image = read_image(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pad(sequences, value):
    """Lists of ids as one tensor (B, T), filled up on the right."""
    return pad_sequence([torch.tensor(ids) for ids in sequences], True, value)


@dataclass(frozen=True)
class Collate:
    """Samples -> one batch of tensors, padded on the right."""
    tokenizer: Tokenizer
    n_image_tokens: int
    image_size: tuple[int, int]  # height, width

    def images(self, samples):
        """All images of all samples, in order: (N, 3, height, width) uint8."""
        images = [image for sample in samples for image in sample.images]
        if not images:
            return torch.zeros(0, 3, *self.image_size, dtype=torch.uint8)
        return torch.stack([to_pixels(image, self.image_size) for image in images])

    def conversations(self, samples):
        """{"input_ids" (B, T), "images" (N, 3, height, width), "labels" (B, T)}, for an `MLLM`."""
        encoded = [encode_turns(self.tokenizer, sample.turns, self.n_image_tokens)
                   for sample in samples]
        return {"input_ids": pad([ids for ids, _ in encoded], self.tokenizer.pad_id),
                "labels": pad([labels for _, labels in encoded], IGNORED),
                "images": self.images(samples)}

    def pairs(self, samples):
        """{"images" (B, 3, height, width), "text", "to_generate" and "labels" (B, T)}: a batch for
        `vision_loss` in train.py. Each sample gives its first image."""
        tokenizer = self.tokenizer
        texts, labels = [], []
        for sample in samples:
            # All that is said about the image, without the template. ITG is trained on the answers
            # and the end.
            text = [tokenizer.cls_id]
            label = [IGNORED]
            for question, answer in sample.turns:
                words = " ".join(question.replace("<image>", " ").split())
                question_ids = tokenizer.encode_part(words)
                answer_ids = tokenizer.encode_part(answer)
                text += question_ids + answer_ids
                label += [IGNORED] * len(question_ids) + answer_ids
            texts.append(text + [tokenizer.end_id])
            labels.append(label + [tokenizer.end_id])
        # ITC and ITM read the text, which begins with <s>. ITG writes it, beginning with <dec>.
        text = pad(texts, tokenizer.pad_id)
        to_generate = text.clone()
        to_generate[:, 0] = tokenizer.dec_id
        first_images = [replace(sample, images=sample.images[:1]) for sample in samples]
        return {"images": self.images(first_images), "text": text, "to_generate": to_generate,
                "labels": pad(labels, IGNORED)}


# You have read how scenes become batches. What follows is for your own pictures, for drawing, and
# for published vocabularies and weights.

# ---- Your own pictures -----------------------------------------------------------------------
CLASS = "What is in the picture?"
CAPTION = ("Describe the picture in one sentence.", "What does the picture show, in short?",
           "Give a short caption.")


def read_image(path):
    """The picture as RGB, turned as its EXIF data say. Shades of more than 8 bits are scaled, what
    is transparent is laid on white. (A picture, no path: itself.) Raises ValueError naming it."""
    if isinstance(path, Image.Image):
        return path
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # "I;16": 0 to 65535; "F": of any range
                shades = np.asarray(image, dtype=np.float32)
                white = 65535 if image.mode[0] == "I" else max(1, shades.max())
                image = Image.fromarray((shades * (255 / white)).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"cannot read the picture {path} ({error})") from error


def keep_usable(items, use, source, what="record"):
    """use(item) for each item. Where it raises, the item is left out, which is printed.
    Raises ValueError when none is left."""
    kept, problems = [], []
    for i, item in enumerate(items):
        try:
            kept.append(use(item))
        except Exception as error:  # whatever is wrong with it
            problems.append(f"{what} {i}: {type(error).__name__}: {error}")
    if problems:
        print(f"{source}: {len(problems)} of {len(items)} {what}s are left out, the first ones:")
        print(*problems[:5], sep="\n")
    check(len(kept) > 0, f"{source}: there is no usable {what} in it")
    return kept


ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def parse_record(record, folder):
    """A record as a sample with the paths of its pictures as `images`. Raises ValueError.

    {"image": FILE or a list of them or none, "conversations": [{"from": "human" or "gpt", "value":
    TEXT}, ...]} is LLaVA's, with "<image>" in the questions once for each picture. There may be a
    "system" text first. {"image": FILE, "caption": TEXT} is a line of a table, {"image_id": NAME,
    "caption": TEXT} is an annotation of cc_sbu_align, {"image": FILE, "class": TEXT} is ours.
    """
    if isinstance(record, str):  # a line of JSONL
        record = json.loads(record)
    files, question_type = record.get("image"), "answer"
    if "conversations" in record:
        messages = record["conversations"]
        texts = [message["value"].strip() for message in messages]
        speakers = [ROLES.get(message["from"], message["from"]) for message in messages]
        if speakers[:1] == ["system"]:  # goes before the first question
            texts = [" ".join(texts[:2]), *texts[2:]]
            speakers = speakers[1:]
        check(len(speakers) > 0 and speakers == ["human", "gpt"] * (len(texts) // 2),
              f"expected pairs from 'human' and 'gpt', got {speakers}")
    elif "class" in record:
        question_type, texts = "class", [f"<image> {CLASS}", record["class"].strip()]
        check(bool(texts[1]), f"{files} is in no class folder")
    else:
        check("caption" in record, "there are no 'conversations' in it")
        text, requests = record["caption"].strip(), CAPTION
        if "image_id" in record:
            files = f"image/{record['image_id']}.jpg"
            text, requests = clean_caption(text), DESCRIBE
        # A picture is always asked about in the same words.
        texts = [f"<image> {random.Random(files).choice(requests)}", text]
    questions, answers = texts[::2], texts[1::2]
    check(all(answers) and "<image>" not in " ".join(answers),
          f"an answer about {files} is empty or has <image>")
    if not isinstance(files, list):
        files = [] if files in (None, "") else [files]
    n = " ".join(questions).count("<image>")
    check(n == len(files), f"{n} <image> in the questions, but {len(files)} images")
    # A file may be written in two ways, "a.png" and "./a.png". Resolved, both are the same.
    paths = [(folder / str(file)).resolve() for file in files]
    for path in paths:
        Image.open(path).close()  # better an error now than after hours
    return Sample(paths, list(zip(questions, answers)), question_type)


def clean_caption(text):
    """A caption fit to be imitated, or "" if fewer than five words are left.
    "A dog runs. ### A dog runs. It is brown!!! The gras" becomes "A dog runs. It is brown!".
    Source: arXiv 2304.10592, section 3.2. Differs: rules alone, nothing is asked of ChatGPT."""
    text = re.sub(r"</?[A-Za-z]\w*(\s[^<>]*=[^<>]*)?\s*/?>", " ", text)  # <unk>, <a href="x">
    # Of Unicode's categories L are letters, M their accents, N numbers, P punctuation, Sc signs of
    # money, Sm those like "×". The two joiners belong to words of Persian and Hindi.
    kinds = ("L", "M", "N", "P", "Sc", "Sm")
    text = "".join(sign for sign in text if sign not in "#*_~|\\" and (
        sign.isspace() or sign in "°\u200c\u200d" or unicodedata.category(sign).startswith(kinds)))
    text = re.sub(r"\.{2,}", "…", text)
    text = re.sub(r"([^\w\s])\1+", r"\1", text)  # "!!!" says no more than "!"
    kept, known = [], set()
    # A sentence ends in a sign. What comes after the last one is unfinished. In Chinese and
    # Japanese no space follows.
    end = r"[.!?؟।۔][\"')’”]*(?=\s|$)|[。！？][”’」』]*"
    # Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces between words, so each letter
    # counts as one. Thai has no sign at the end of a sentence either.
    unspaced = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    sentences = re.findall(rf"\S.*?(?:{end})", text, re.DOTALL)
    if not sentences and re.search(unspaced, text):
        sentences = [text]
    for sentence in sentences:
        words = tuple(re.findall(r"\w+", sentence.lower()))
        # "Mr." and the like may come again.
        if words and (words not in known or len("".join(words)) < 5):
            kept.append(" ".join(sentence.split()))
        known.add(words)
    text = re.sub("([。！？][”’」』]*) ", r"\1", " ".join(kept))
    return text if len(re.findall(rf"{unspaced}|\w+", text)) >= 5 else ""


def read_records(path):
    """The records of a file or folder, not yet looked into. Raises ValueError."""
    if path.is_dir():
        beside = " or ".join(str(file) for file in path.glob("[!.]*.json*"))
        check(not beside, f"{path} has a JSON beside its folders: give --data {beside}")
        for folder, subfolders, files in os.walk(path, followlinks=True):
            subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
            place = Path(folder).relative_to(path)
            for name in sorted(files):
                if name[0] != ".":
                    yield {"image": str(place / name), "class": "".join(place.parts[:1])}
        return
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save it in that encoding") from error
    if path.name == "filter_cap.json":
        yield from json.loads(text)["annotations"]
    elif path.suffix not in (".json", ".jsonl"):
        table = csv.DictReader(io.StringIO(text))
        header = table.fieldnames or []
        check({"image", "caption"} <= {*header},
              f"{path}: the first line of a table must be image,caption, not {header}")
        for row in table:  # other columns mean nothing here
            yield {"image": row["image"], "caption": row["caption"]}
    elif text.lstrip().startswith("["):
        yield from json.loads(text)
    else:  # a record a line, whatever the file is called
        yield from filter(str.strip, text.split("\n"))


def read_own_data(path, images=""):
    """Samples from one of four layouts, with the paths of their pictures as `images`.

    A folder with a folder of pictures for each class: torchvision's ImageFolder.
    A folder like MiniGPT-4's `cc_sbu_align`: filter_cap.json, {"annotations": [{"image_id",
    "caption"}]}, and image/<image_id>.jpg. Its captions are cleaned.
    A table of captions with the header image,caption: Flickr8k's captions.txt on Kaggle.
    A file of LLaVA records, JSON or JSONL: see `parse_record`.

    images: the folder of the pictures, by default images/ beside the file, or where the file is.
    Raises FileNotFoundError, ValueError.
    """
    path = Path(path)
    if (path / "filter_cap.json").is_file():
        path = path / "filter_cap.json"
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and (folder / "images").is_dir():
        folder = folder / "images"
    folder = Path(images or folder)
    try:
        records = list(read_records(path))
    except (KeyError, TypeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: none of the layouts that are known here ({error!r})") from error
    samples = keep_usable(records, lambda record: parse_record(record, folder), path)
    if path.is_dir():
        classes = {sample.turns[0][1] for sample in samples}
        check(len(classes) > 1, f"{path}: all pictures are of one class, {classes}; give a folder "
              "with a folder for each class, or a JSON or a table of captions")
        print(f"{path}: {len(classes)} classes, {', '.join(sorted(classes)[:10])}")
        for subfolder in path.glob("[!.]*/"):
            if subfolder.name.strip() not in classes:
                print(f"{path}: the class {subfolder.name!r} has no picture")
    return samples


def hold_out(samples):
    """Split off a twentieth of all pictures, with all that is asked about them.
    They are drawn by a hash of their names, so that the draw stays nearly the same when pictures
    come or go. Returns (samples to train on, samples to measure on)."""
    def order(picture):
        name = "/".join(Path(str(picture)).parts[-2:])  # folder and file: data may be moved
        return zlib.crc32(name.encode("utf-8", "replace")), str(picture)

    pictures = [sample.images or [str(sample.turns)] for sample in samples]
    different = {picture for each in pictures for picture in each}
    chosen = set(sorted(different, key=order)[:math.ceil(len(different) / 20)])
    n_chosen = 0
    while len(chosen) > n_chosen:  # a sample with several pictures takes its other ones along
        n_chosen = len(chosen)
        for each in pictures:
            if not chosen.isdisjoint(each):
                chosen.update(each)
    train, held_out = [], []
    for sample, each in zip(samples, pictures):
        side = train if chosen.isdisjoint(each) else held_out
        side.append(sample)
    check(len(train) > 0, "there are too few pictures to hold some out: give --val")
    return train, held_out


def questions_of(samples):
    """One sample for each question, with the true turns before it.
    Where several samples answer the same question about the same picture, each answer is right."""
    questions = {}
    for sample in samples:
        for n_turns in range(1, len(sample.turns) + 1):
            *earlier, (question, answer) = sample.turns[:n_turns]
            n_images = sum(text.count("<image>") for text, _ in sample.turns[:n_turns])
            key = str((sample.images, earlier, question))
            first = questions.setdefault(key, replace(
                sample, turns=sample.turns[:n_turns], images=sample.images[:n_images]))
            first.references += (answer,)
    return list(questions.values())


def for_stage(samples, stage):
    """Own samples as a stage takes them: `language` without pictures, `vision` those with one.
    Raises ValueError when none is left."""
    chosen = []
    for sample in samples:
        if stage == "language":
            turns = [(text.replace("<image>", " "), answer) for text, answer in sample.turns]
            sample = replace(sample, images=[], turns=turns)
        if sample.images or stage != "vision":
            chosen.append(sample)
    check(len(chosen) > 0, f"there is no record with a picture, which {stage!r} needs")
    if len(chosen) < len(samples):
        print(f"{stage}: {len(samples) - len(chosen)} samples without a picture are left out")
    return chosen


# ---- Drawing ---------------------------------------------------------------------------------
def draw(things, size, rng):
    """An RGB picture of size x size pixels: things, a little off their places, on a ground."""
    # The ground is nearly gray and gets lighter or darker to one side.
    light = rng.randint(175, 255)
    slope = rng.randint(-40, 40)
    color = np.array([light + rng.randint(-15, 15) for _ in range(3)], dtype=np.float32)
    ramp = np.linspace(-slope, slope, size, dtype=np.float32)
    ramp = ramp[:, None] if rng.random() < 0.5 else ramp[None, :]
    pixels = np.broadcast_to(color + ramp[..., None], (size, size, 3))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    # Things are drawn larger, then shrunk: smooth edges.
    picture = picture.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture)
    cell = 2 * size / 3
    for thing in things:
        radius = SIZES[thing.size] * cell * rng.uniform(0.92, 1.08)
        x = (thing.column + 0.5 + rng.uniform(-0.06, 0.06)) * cell
        y = (thing.row + 0.5 + rng.uniform(-0.06, 0.06)) * cell
        shade = np.add(COLORS[thing.color], [rng.randint(-18, 18) for _ in range(3)])
        fill = tuple(shade.clip(0, 255).tolist())
        if thing.shape == "circle":
            canvas.circle((x, y), radius, fill)
        elif thing.shape == "square":
            side = radius * 0.88
            canvas.rectangle((x - side, y - side, x + side, y + side), fill)
        else:
            # A triangle has three corners on a circle; a star ten, on an outer and an inner one.
            radii = [1.1] * 3 if thing.shape == "triangle" else [1.15, 0.5] * 5
            corners = []
            for i, far in enumerate(radii):
                angle = 2 * math.pi * i / len(radii)  # the first is on top
                corners.append((x + radius * far * math.sin(angle),
                                y - radius * far * math.cos(angle)))
            canvas.polygon(corners, fill)
    return picture.resize((size, size), Image.Resampling.BOX)


def contact_sheet(pictures, texts, columns=4, side=256):
    """Pictures (or paths) in a grid, each `side` pixels wide or high, with its text under it."""
    texts = ["\n".join(textwrap.fill(line, side // 7) for line in text.split("\n"))
             for text in texts]
    height = side + 12 + 19 * max(text.count("\n") + 1 for text in texts)
    size = (columns * (side + 16), math.ceil(len(pictures) / columns) * height)
    sheet = Image.new("RGB", size, "white")
    for i, (picture, text) in enumerate(zip(map(read_image, pictures), texts)):
        x, y = i % columns * (side + 16) + 8, i // columns * height + 6
        # A very wide picture is still a pixel high.
        size = [max(1, round(side * length / max(picture.size))) for length in picture.size]
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 3), text, "black", ImageFont.load_default(13))
    return sheet


def draw_curves(losses, path):
    """One panel for each stage: the loss in nats, smoothed, on a logarithmic axis, by steps."""
    sheet, font = Image.new("RGB", (360 * len(losses), 240), "white"), ImageFont.load_default(13)
    canvas = ImageDraw.Draw(sheet)
    for panel, (stage, values) in enumerate(losses.items()):
        left, right, top, bottom = panel * 360 + 60, panel * 360 + 340, 30, 212
        # Means of 4 or more: by default ITC and ITM add to each fourth loss.
        n = 4 * max(1, len(values) // 200)
        means = [np.mean(values[i:i + n]) for i in range(0, len(values), n)]
        low, high = max(min(means), 1e-9), max(means)
        ys = np.interp(np.log(np.maximum(means, low)), np.log((low, high)), (bottom, top))
        canvas.line(list(zip(np.linspace(left, right, len(ys)), ys)), (45, 85, 215), 2)
        canvas.text((left - 6, bottom), f"{low:.2g}", "black", font, "rm")
        canvas.text((left - 6, top), f"{high:.2g}", "black", font, "rm")
        canvas.rectangle((left, top, right, bottom), outline="gray")
        title = f"{stage}: loss in nats, log scale, {len(values)} steps"
        canvas.text((left, 8), title, "black", font)
    sheet.save(path)


# ---- Published vocabularies ------------------------------------------------------------------
# How they cut text into words. \p{L} are letters and \p{N} numbers, which Python's `re` does not
# know: see `compile_pattern`.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# Their files write each byte as a character that can be printed: "A" as "A", a space as "Ġ".
UNPRINTABLE = (*range(33), *range(127, 161), 173)
PRINTED = {byte: chr(byte) for byte in range(256)}
PRINTED |= {byte: chr(256 + i) for i, byte in enumerate(UNPRINTABLE)}
BYTES = {letter: byte for byte, letter in PRINTED.items()}


DOWNLOAD = "it is a pointer of git-LFS or not whole; download it again"


@cache
def compile_pattern(pattern):
    """A pattern for Python's `re`: the characters behind \\p{L}, \\p{N} and \\s as ranges."""
    # White space to Unicode; Python's \s has the separators U+001C to U+001F, too.
    classes = {r"\s": "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    for letter in "LN":
        ranges = [f"\\U{run.start():08x}-\\U{run.end() - 1:08x}"
                  for run in re.finditer(f"{letter}+", categories)]
        classes[rf"\p{{{letter}}}"] = "".join(ranges)
    pattern = pattern.replace(r"\S", r"[^\s]")
    for name, ranges in classes.items():
        # [^\\s\\p{L}] takes the bare ranges, a \\p{L} outside of brackets gets brackets.
        pattern = re.sub(r"\[[^\]]*\]", lambda inside: inside[0].replace(name, ranges), pattern)
        pattern = pattern.replace(name, f"[{ranges}]")
    return re.compile(pattern)


def read_json(path):
    """What a JSON file of a published folder holds. Raises FileNotFoundError, ValueError."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {DOWNLOAD}") from error


class PublishedTokenizer(Tokenizer):
    """The vocabulary of a tokenizer.json in the tables of `Tokenizer`.
    Two families are known. On bytes: GPT-2, SmolLM2, Qwen2, Llama 3. On characters: LLaMA's
    SentencePiece, with "\u2581" for a space, and bytes for characters that it lacks.
    content: what the file holds. bos, eos: the symbols that start and end a text."""

    def __init__(self, content, bos=None, eos=None):
        self.state = {"content": content, "bos": bos, "eos": eos}
        self.content = content
        self.normalizer = (content.get("normalizer") or {}).get("type")
        self.vocab = content["model"]["vocab"]  # name -> id
        self.is_sentencepiece = content["model"].get("byte_fallback", False)
        cutter = content.get("pre_tokenizer") or {}
        self.steps = {step["type"]: step for step in cutter.get("pretokenizers", [cutter]) if step}
        known = ("Sequence", None) if self.is_sentencepiece else ("NFC", None)
        check(self.normalizer in known, f"normalizer {self.normalizer}")
        check(self.is_sentencepiece or "ByteLevel" in self.steps, f"steps {[*self.steps]}")
        self.space = "" if self.is_sentencepiece else " "  # SentencePiece puts it there itself
        self.known_words = {}
        self.bytes = {token: self.bytes_of(name) for name, token in self.vocab.items()}
        self.merges = {}
        for rank, pair in enumerate(content["model"]["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merged = self.vocab[left + right]
            self.merges[self.vocab[left], self.vocab[right]] = (rank, merged)
        symbols = dict(self.vocab)
        for token in content.get("added_tokens", []):
            symbols[token["content"]] = token["id"]
            self.bytes[token["id"]] = token["content"].encode()
        check(eos in symbols, f"the vocabulary lacks the eos_token {eos!r}")
        self.end_id = symbols[eos]
        # The other marks get ids beyond the end of the vocabulary. The template is written in
        # ordinary tokens; <Img> comes after a space, </Img> does not.
        n = max(self.bytes) + 1
        self.pad_id, self.image_id, self.cls_id, self.dec_id = range(n, n + 4)
        self.vocab_size = n + 4
        self.start = [symbols[bos]] if bos in symbols else []
        self.human = self.encode("###Human:")
        self.assistant = self.encode("###Assistant:")
        self.image_open = self.encode_part("<Img>")
        self.image_close = self.encode("</Img>")

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json. tokenizer_config.json beside it names start and end symbols.
        Raises FileNotFoundError, ValueError."""
        path = Path(path)
        check(path.exists(), f"{path} is missing: download it, or let transformers write it, "
              "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        content = read_json(path)
        names = read_json(path.with_name("tokenizer_config.json"))
        symbols = [names.get(name) for name in ("bos_token", "eos_token")]
        symbols = [symbol["content"] if isinstance(symbol, dict) else symbol for symbol in symbols]
        try:
            return cls(content, *symbols)
        except Exception as error:
            raise ValueError(f"{path}: not a tokenizer that is known here ({error!r})") from error

    def bytes_of(self, name):
        """What a token stands for: b" the" for "Ġthe" and "\u2581the", b"\n" for "<0x0A>"."""
        if not self.is_sentencepiece and set(name) <= BYTES.keys():
            return bytes(BYTES[letter] for letter in name)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode("utf-8", "replace")

    def split(self, text):
        if self.is_sentencepiece:
            text = text.replace(" ", "\u2581")
            # SentencePiece puts a space before a text; newer versions only if there is none yet.
            if text and (self.normalizer or text[0] != "\u2581"):
                text = "\u2581" + text
            # Its tokens have spaces in front only. To cut in front of them changes no id.
            return re.findall("\u2581*[^\u2581]+|\u2581+", text)
        if self.normalizer == "NFC":
            text = unicodedata.normalize("NFC", text)
        pattern = SMOLLM2 if "Digits" in self.steps else GPT2
        if "Split" in self.steps:  # Qwen2 and Llama 3 bring their own pattern
            pattern = self.steps["Split"]["pattern"]["Regex"]
        return compile_pattern(pattern).findall(text)

    def smallest_parts(self, word):
        names = []
        if self.is_sentencepiece:
            for character in word:
                if character in self.vocab:
                    names.append(character)
                else:
                    names += [f"<0x{byte:02X}>" for byte in character.encode("utf-8", "replace")]
        else:
            names = [PRINTED[byte] for byte in word.encode("utf-8", "replace")]
            whole = "".join(names)
            # Llama 3 does not take a word apart that is a token.
            if self.content["model"].get("ignore_merges") and whole in self.vocab:
                names = [whole]
        # Bytes that it lacks are dropped, as its own library does.
        return [self.vocab[name] for name in names if name in self.vocab]


def tokenizer_from(state):
    """The tokenizer whose `state` this is."""
    return PublishedTokenizer(**state) if "content" in state else Tokenizer(**state)


# ---- Published weights -----------------------------------------------------------------------
# What a config.json calls our arguments.
COMMON = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
          "intermediate_size": "ffn_dim", "layer_norm_eps": "norm_eps"}
VIT_SIZES = COMMON | {"image_size": "image_size", "patch_size": "patch_size",
                      "hidden_act": "activation"}
QFORMER_SIZES = COMMON | {"encoder_hidden_size": "encoder_width", "num_query_tokens": "n_queries",
                          "cross_attention_frequency": "cross_attention_every"}
GPT_SIZES = COMMON | {"vocab_size": "vocab_size", "num_key_value_heads": "n_kv_heads",
                      "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
                      "tie_word_embeddings": "tied"}
# The config.json of BLIP-2 leaves out what is as in its library.
EVA_DEFAULTS = {"image_size": 224, "patch_size": 14, "dim": 1408, "n_layers": 39, "n_heads": 16,
                "ffn_dim": 6144, "norm_eps": 1e-6, "activation": "gelu"}
QFORMER_DEFAULTS = {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 3072, "norm_eps": 1e-12,
                    "encoder_width": 1408, "cross_attention_every": 2}
CLIP_PIXELS = {"pixel_mean": (0.48145466, 0.4578275, 0.40821073),
               "pixel_std": (0.26862954, 0.26130258, 0.27577711)}  # BLIP-2's, too
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path):
    """Eight bytes hold the length of a header in JSON, which says where each tensor's bytes are."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read where it is used
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        offset = start + entry["data_offsets"][0]
        flat = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]],
                                count=math.prod(entry["shape"]), offset=offset)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def read_folder(folder, families, names, blip2_defaults, *sections):
    """(config.json, the sizes in it under our names, the tensors under theirs).
    families: the model_types that fit. names: see above. sections: parts of config.json to look in.
    Raises FileNotFoundError, or ValueError for another architecture."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    check(model_type in families, f"{folder}: model_type {model_type!r} is not one of {families}")
    for section in sections:  # what it holds is then found at the top
        config |= config.get(section) or {}
    # What our models know.
    is_gpt = model_type in ("llama", "qwen2")
    known = {"hidden_act": ("silu",) if is_gpt else ("gelu", "quick_gelu"),
             "attention_bias": (False,), "use_sliding_window": (False,), "rope_type": ("default",),
             "type": ("default",), "quantization_config": (None,)}
    for name, values in known.items():
        value = config.get(name, values[0])
        check(value in values, f"{folder}: {name} {value!r} is not known here, only {values}: take "
              "another version of this model, or another model")
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    check(len(paths) > 0, f"{folder}: no weights, model*.safetensors or pytorch_model*.bin")
    n_files = re.search(r"-of-(\d+)", paths[0].name)  # model-00001-of-00002.safetensors
    check(not n_files or int(n_files[1]) == len(paths),
          f"{folder} has {len(paths)} of the files {paths[0].name} and on: download the others")
    weights = {}
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                weights |= read_safetensors(path)
            else:
                weights |= torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {DOWNLOAD}") from error
    sizes = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    if model_type.startswith("blip"):
        sizes = blip2_defaults | sizes
    missing = set(names.values()) - {"n_kv_heads", "rope_theta", "tied"} - sizes.keys()
    check(not missing, f"{folder}: config.json does not say {sorted(missing)}")
    return config, sizes, weights


def rename(weights, ignored, rules):
    """The tensors under our names. Each rule is a pattern and its replacement.
    What begins with `ignored` is left out."""
    # What fits no rule keeps its name: `load_state_dict` will report it.
    state = {}
    for name, tensor in weights.items():
        if re.match(ignored, name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    # CLIP and LLaMA have three matrices where ours is one.
    for name in list(state):
        parts = [name, name.replace("<q>", "<k>"), name.replace("<q>", "<v>")]
        if "<q>" in name and set(parts) <= set(state):
            state[name.replace("<q>", "")] = torch.cat([state.pop(part) for part in parts])
    return state


VIT_RULES = [
    (r"^vision_model\.", ""), (r"^embeddings\.", ""), (r"^class_embedding", "class_token"),
    (r"^position_embedding\.weight", "position_embedding"), (r"^pre_layrnorm", "pre_norm"),
    (r"^post_layernorm", "post_norm"), (r"^encoder\.layers", "blocks"), (r"\.layer_norm", ".norm"),
    (r"self_attn\.([qkv])_proj", r"qkv<\1>"), (r"self_attn\.qkv", "qkv"),
    (r"self_attn\.(out_proj|projection)", "out_proj"), (r"fc1", "0"), (r"fc2", "2")]
QFORMER_RULES = [
    (r"^qformer\.layernorm", "embedding_norm"), (r"^qformer\.encoder\.layer", "blocks"),
    (r"\.attention\.(?=attention|output)", ".self_attention."),
    (r"crossattention", "cross_attention"), (r"attention\.attention\.(.)\w+", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.out_proj"),
    (r"attention\.output\.LayerNorm", "attention_norm"), (r"output_query\.dense", "query_ffn.2"),
    (r"intermediate_query\.dense", "query_ffn.0"), (r"output_query\.LayerNorm", "query_ffn_norm")]
GPT_RULES = [
    (r"^model\.", ""), (r"^embed_tokens", "token_embedding"), (r"^layers", "blocks"),
    (r"input_layernorm", "attention_norm"), (r"post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkv])_proj", r"attention.wqkv<\1>"), (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "w1"), (r"mlp\.down_proj", "w2"), (r"mlp\.up_proj", "w3")]


def published_vit(folder, drop_last=0):
    """The arguments of a `ViT` and its weights.
    CLIP's (`openai/clip-vit-large-patch14`), or BLIP-2's, which is EVA-CLIP's ViT-g/14
    (`Salesforce/blip2-opt-2.7b`). drop_last: how many of the last blocks to leave out; LLaVA leaves
    one of CLIP's out. Raises FileNotFoundError, ValueError."""
    families = ("clip", "clip_vision_model", "blip-2", "blip_2_vision_model")
    config, sizes, weights = read_folder(folder, families, VIT_SIZES, EVA_DEFAULTS, "vision_config")
    is_clip = "clip" in config["model_type"]  # otherwise BLIP-2
    depth = sizes["n_layers"]
    check(0 <= drop_last < depth, f"drop_last {drop_last} must leave one of {depth} blocks")
    sizes |= {"image_size": (sizes["image_size"], sizes["image_size"]),
              "n_layers": depth - drop_last, "pre_norm": is_clip, "post_norm": not is_clip,
              "mlp_ratio": sizes.pop("ffn_dim") / sizes["dim"]}
    ignored = r".*position_ids|text_|visual_projection|logit_scale|qformer\.|query_tokens|language_"
    for i in range(depth - drop_last, depth):
        ignored += rf"|.*encoder\.layers\.{i}\."
    if is_clip:  # its last norm is for the class token alone
        ignored += "|.*post_layernorm"
    state = rename(weights, ignored, VIT_RULES)
    for name in ("class_token", "position_embedding"):
        if name in state:
            state[name] = state[name].reshape(1, -1, sizes["dim"])
    return sizes, state


def published_qformer(folder):
    """The arguments of BLIP-2's `QFormer` without text half, and its weights.
    Raises FileNotFoundError, ValueError."""
    _, sizes, weights = read_folder(folder, ("blip-2",), QFORMER_SIZES, QFORMER_DEFAULTS,
                                    "qformer_config")
    return sizes, rename(weights, r"vision_model|language_|qformer\.embeddings", QFORMER_RULES)


def published_gpt(folder):
    """The arguments of a `GPT` and its weights, without adapters.
    Of the LLaMA family (SmolLM2, TinyLlama, Vicuna) or Qwen2. Raises FileNotFoundError, ValueError.
    """
    config, sizes, weights = read_folder(folder, ("llama", "qwen2"), GPT_SIZES, {}, "rope_scaling",
                                         "rope_parameters")
    ignored = r".*rotary_emb"
    if sizes.get("tied"):
        ignored += "|lm_head"
    state = rename(weights, ignored, GPT_RULES)
    if sizes.get("tied"):
        state["lm_head.weight"] = state["token_embedding.weight"]
    # Older files lack these.
    sizes = {"n_kv_heads": None, "rope_theta": 10_000.0, "tied": False} | sizes
    return sizes | {"qkv_bias": config["model_type"] == "qwen2"}, state


def main():
    spec = SceneSpec()
    tokenizer = Tokenizer.train(texts_of(Scenes(spec, "language", 500)), 1024)
    sample = Scenes(spec, "instruct", 2)[1]
    ids, labels = encode_turns(tokenizer, sample.turns[:2], n_image_tokens=4)
    print("Two turns about a scene, with 4 tokens for its picture:")
    for position, (token, label) in enumerate(zip(ids, labels)):
        use = "context" if label == IGNORED else "trained"
        if token == tokenizer.image_id:
            use = "image"
        print(f"{position:4d}  {tokenizer.decode([token])!r:16} {use}")


if __name__ == "__main__":
    main()
