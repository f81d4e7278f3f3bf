"""Pictures, text and what joins them: scenes, a tokenizer, training targets, your own data.

    Scenes ──────┐
                 ├─► Sample (images, turns) ─► encode_turns ─► ids and labels ─► Collate ─► batch
    Conversations┘                             (the prompt template)             (padding)

`Scenes` are drawn as they are needed, with questions whose answers are known: nothing has to be
downloaded. `Conversations` are your own. At first reading skip the tokenizer, half of which is for
published vocabularies, and stop at the last section, which makes published weights fit our model.

    python data.py        draws scenes.png and prints two turns of a sample, token by token

B texts, N images, T tokens, Q rows for each image.
"""
import copy
import csv
import json
import math
import mmap
import random
import re
import sys
import textwrap
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset


class BadRecord(ValueError):
    """A record that cannot be trained on; the message names the file and the record."""


def check(is_right: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with this message for what a user can get wrong."""
    if not is_right:
        raise error(message)


# ---- Scenes: pictures whose every fact is known ----------------------------------------------

COLORS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 215),
          "yellow": (240, 205, 30), "purple": (150, 60, 180), "black": (35, 35, 35)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.30, "large": 0.46}  # radius over the side of a cell
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
CELLS = (4, 1, 3, 5, 7, 0, 2, 6, 8)  # 3 * row + column: center, sides, corners


@dataclass(frozen=True)
class Thing:
    """One shape in one cell of the 3 x 3 grid; row and column count from the top left."""
    color: str
    shape: str
    size: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        words = [word for word in (ROWS[self.row], COLUMNS[self.column]) if word != "middle"]
        return " ".join(words) or "center"


@dataclass(frozen=True)
class SceneSpec:
    """How hard the scenes are: how many of `COLORS`, `SHAPES` and `CELLS` occur, the first ones."""
    image_size: int = 48  # pixels, height and width
    n_colors: int = 5
    n_shapes: int = 4
    n_places: int = 5
    max_things: int = 3

    def __post_init__(self):
        most_things = min(self.n_places, (self.n_colors - 1) * self.n_shapes)  # of different pairs
        limits = {"n_colors": (2, len(COLORS)), "n_shapes": (1, len(SHAPES)),
                  "n_places": (1, len(CELLS)), "max_things": (1, most_things)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            check(least <= value <= most, f"scenes.{name} must be {least} to {most}, not {value}")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        colors = list(COLORS)[:self.n_colors]
        return [(color, shape) for color in colors for shape in SHAPES[:self.n_shapes]]

    @property
    def unseen_pairs(self) -> list[tuple[str, str]]:
        """One colour of each shape, for pairs that are in no training picture or text."""
        colors = list(COLORS)[:self.n_colors]
        return [(colors[i % len(colors)], SHAPES[i]) for i in range(self.n_shapes)]

    @property
    def training_pairs(self) -> list[tuple[str, str]]:
        return [pair for pair in self.pairs if pair not in self.unseen_pairs]


def random_things(spec: SceneSpec, rng: random.Random, unseen: bool = False) -> list[Thing]:
    """1 to max_things things in reading order, no two of one pair or in one cell. With `unseen`
    exactly one of them has an unseen pair, else none."""
    n = rng.randint(1, spec.max_things)
    pairs = rng.sample(spec.training_pairs, n)
    if unseen:
        pairs[0] = rng.choice(spec.unseen_pairs)
    things = []
    for (color, shape), cell in zip(pairs, rng.sample(CELLS[:spec.n_places], n)):
        things.append(Thing(color, shape, rng.choice(list(SIZES)), cell // 3, cell % 3))
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw(things: list[Thing], size: int, rng: random.Random) -> Image.Image:
    """An RGB picture of size x size pixels: jittered things on a shaded ground."""
    scale = 2  # drawn larger, then shrunk: smooth edges
    light, slope = rng.randint(175, 255), rng.randint(-40, 40)
    ground = np.array([light + rng.randint(-15, 15) for _ in range(3)], dtype=np.float32)
    ramp = np.linspace(-slope, slope, size, dtype=np.float32)
    ramp = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    ground = np.broadcast_to(ground + ramp, (size, size, 3)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(ground).resize((size * scale, size * scale), Image.Resampling.NEAREST)
    canvas, cell = ImageDraw.Draw(picture), size * scale / 3
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
        else:  # corners on circles, the first on top
            radii = {"triangle": [1.1] * 3, "star": [1.15, 0.5] * 5}[thing.shape]
            angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
            canvas.polygon([(x + radius * far * math.sin(angle), y - radius * far * math.cos(angle))
                            for far, angle in zip(radii, angles)], fill)
    return picture.resize((size, size), Image.Resampling.BOX)


def describe(things: list[Thing]) -> str:
    """All there is to say, in reading order: "At the top left is a large red circle. At ..." """
    return " ".join(f"At the {thing.place} is a {thing.size} {thing.name}." for thing in things)


def caption(things: list[Thing], rng: random.Random) -> str:
    """A short, noisy caption: all things, each with a size, a place or neither, in any order."""
    forms = ("a {0.name}", "a {0.size} {0.name}", "a {0.name} at the {0.place}")
    parts = [rng.choice(forms).format(thing) for thing in rng.sample(things, len(things))]
    return " and ".join(parts).capitalize() + "."


KINDS = ("color", "shape", "size", "where", "count", "exists", "relation")
CLASS = "What is in the picture?"
DESCRIBE = ("Describe the picture in detail.", "What do you see? Describe everything.",
            "Give a detailed description.")
CAPTION = ("Describe the picture in one sentence.", "What does the picture show, in short?",
           "Give a short caption.")


def ask(kind: str, things: list[Thing], about: Thing, spec: SceneSpec, rng: random.Random,
        unseen: bool = False) -> tuple[str, str] | None:
    """A question of this kind about one of the things, and its answer; None if it is ambiguous."""
    others = [thing for thing in things if thing != about]
    if kind == "color" and all(thing.shape != about.shape for thing in others):
        return f"What color is the {about.shape}?", about.color
    if kind == "shape" and all(thing.color != about.color for thing in others):
        return f"What shape is the {about.color} one?", about.shape
    if kind == "size":
        return f"How big is the {about.name}?", about.size
    if kind == "where":
        return f"Where is the {about.name}?", about.place
    if kind == "count":
        whats = ["shape", about.shape, about.color + " shape", rng.choice(spec.pairs)[1]]
        what = rng.choice(whats)
        n = sum(what in ("shape", thing.shape, thing.color + " shape") for thing in things)
        return f"How many {what}s are there?", str(n)
    if kind == "exists":
        form = rng.choice(("{1}", "{0} shape", "{0} {1}"))  # a circle, a red shape, a red circle
        if rng.random() < 0.5:
            return f"Is there a {form.format(about.color, about.shape)}?", "yes"
        # What is absent shares its color or shape with something present: half of it is not enough.
        present = [form.format(thing.color, thing.shape) for thing in things]
        pairs = spec.pairs if unseen else spec.training_pairs
        alike = [form.format(*pair) for pair in pairs if about.color in pair or about.shape in pair]
        absent = [what for what in alike if what not in present]
        return (f"Is there a {rng.choice(absent)}?", "no") if absent else None
    if kind == "relation" and others:
        other, sides = rng.choice(others), []
        if about.column != other.column:
            sides.append(("left of", about.column < other.column))
        if about.row != other.row:
            sides.append(("above", about.row < other.row))
        word, holds = rng.choice(sides)
        return f"Is the {about.name} {word} the {other.name}?", "yes" if holds else "no"
    return None


def ask_any(things: list[Thing], spec: SceneSpec, rng: random.Random, unseen: bool = False):
    """(kind, question, answer): a random kind about a random thing, or about the unseen one."""
    asked = None
    while asked is None:
        kind = rng.choice(KINDS)
        about = rng.choice([thing for thing in things if not unseen
                            or (thing.color, thing.shape) in spec.unseen_pairs])
        asked = ask(kind, things, about, spec, rng, unseen)
    return kind, *asked


@dataclass
class Sample:
    """One record of any source. turns: (question, answer); "<image>" stands for the next image."""
    images: list[Image.Image]  # in `Conversations.records` still their paths
    turns: list[tuple[str, str | None]]
    kind: str = "answer"  # groups the answers in an evaluation
    name: str = "sample"  # for error messages
    references: tuple[str, ...] = ()  # all right answers, if there are several


class Scenes(Dataset):
    """Endless scenes: number i is always the same picture and text for the same arguments.

    task: a training stage, or "question" or "describe" in an evaluation. split: "train", "test"
    (other pictures of the same pairs) or "unseen" (an unseen pair in each, and asked for).
    """

    def __init__(self, spec: SceneSpec, task: str, n: int, split: str = "train", seed: int = 0,
                 n_turns: int = 6):
        self.spec, self.task, self.n, self.split = spec, task, n, split
        self.seed, self.n_turns = seed, n_turns

    def __len__(self) -> int:
        return self.n

    def things(self, i: int) -> tuple[list[Thing], random.Random]:
        """What is in scene i, and the generator that decides how it is drawn."""
        rng = random.Random(f"{self.seed} {self.split} {i}")
        return random_things(self.spec, rng, self.split == "unseen"), rng

    def conversation(self, things: list[Thing], rng: random.Random) -> list[tuple[str, str]]:
        """Questions and answers, or else a description; for `language` with the picture in words.
        There descriptions are rare: to copy one is easy, and so many easy tokens would outweigh the
        answers, which must be looked up. Captions teach the decoder to write those of `align`."""
        lot, is_text = rng.random(), self.task == "language"
        if lot < (0.03 if is_text else 0.5):
            turns = [(rng.choice(DESCRIBE), describe(things))]
        elif is_text and lot < 0.06:
            turns = [("", caption(things, rng))]
        else:
            turns = [ask_any(things, self.spec, rng)[1:] for _ in range(self.n_turns)]
            turns = list(dict(turns).items())  # no question twice
        picture = describe(things) if is_text else "<image>"
        return [(f"{picture} {turns[0][0]}", turns[0][1]), *turns[1:]]

    def __getitem__(self, i: int) -> Sample:
        check(0 <= i < self.n, f"there is no scene {i} of {self.n}", IndexError)
        things, how = self.things(i)
        rng, kind = random.Random(f"{self.seed} {self.split} {i} text"), self.task
        if self.task in ("language", "instruct"):
            turns = self.conversation(things, rng)
        elif self.task == "question":
            kind, question, answer = ask_any(things, self.spec, rng, self.split == "unseen")
            turns = [("<image> " + question, answer)]
        elif self.task == "align":
            turns = [("<image>", caption(things, rng))]
        else:
            question = "<image> " + DESCRIBE[0] if self.task == "describe" else "<image>"
            turns = [(question, describe(things))]
        images = [] if self.task == "language" else [draw(things, self.spec.image_size, how)]
        return Sample(images, turns, kind, f"scene {i}")


# ---- Tokenizer: text as ids ------------------------------------------------------------------

# The marks of the prompt template, tokens of their own in a tokenizer that is trained here.
# <ImageHere> holds the place of an image row, <s> starts a text and sums it up for ITC and ITM,
# <dec> starts a text that the Q-Former is to generate, ### ends an answer.
SPECIALS = ["<pad>", "<ImageHere>", "<s>", "<dec>", "###", "Human:", "Assistant:"]
SPECIALS += ["<Img>", "</Img>"]

# How a text is cut into words; no token crosses a word. \p{L} are letters and \p{N} numbers, which
# Python's `re` does not know, see `compile_pattern`.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# The steps by which a tokenizer.json cuts text; "" is SentencePiece, which does not cut.
STEPS = {("ByteLevel",): GPT2, ("Digits", "ByteLevel"): SMOLLM2, ("Prepend", "Replace"): "",
         ("Metaspace",): ""}

# GPT-2's vocabularies write each byte as a character that can be printed.
LETTERS = list(map(chr, range(256)))
for i, byte in enumerate([*range(33), *range(127, 161), 173]):  # those that cannot
    LETTERS[byte] = chr(256 + i)


@cache
def compile_pattern(pattern: str) -> re.Pattern:
    """A pattern for Python's `re`: the characters behind \\p{L}, \\p{N} and \\s as ranges."""
    # White space to Unicode; Python's \s has the separators U+001C to U+001F too.
    classes = {r"\s": "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    categories = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    for letter in "LN":
        classes[rf"\p{{{letter}}}"] = "".join(f"\\U{run.start():08x}-\\U{run.end() - 1:08x}"
                                              for run in re.finditer(f"{letter}+", categories))
    pattern = pattern.replace(r"\S", r"[^\s]")
    for name, ranges in classes.items():  # first where it stands in brackets already
        pattern = re.sub(r"\[[^\]]*\]", lambda inside: inside[0].replace(name, ranges), pattern)
        pattern = pattern.replace(name, f"[{ranges}]")
    return re.compile(pattern)


def word_pattern(content: dict) -> re.Pattern | None:
    """What a word is to a tokenizer.json; None for SentencePiece. Raises ValueError for another."""
    steps, regex = [], None
    for part in (content.get("normalizer"), content.get("pre_tokenizer")):
        for step in part.get("normalizers", part.get("pretokenizers", [part])) if part else ():
            if step["type"] == "Split":  # Qwen2 and Llama 3 bring their own pattern
                regex = step["pattern"].get("Regex")
            steps.append("add_prefix_space" if step["type"] == "ByteLevel"
                         and step.get("add_prefix_space") else step["type"])
    steps = tuple(step for step in steps if step != "NFC")  # `words` knows it
    pattern = regex if steps == ("Split", "ByteLevel") else STEPS.get(steps)
    check(bool(pattern) or pattern == "" and content["model"].get("byte_fallback", False),
          f"{content['model'].get('type')} with the steps {steps} is not known, only those of "
          "GPT-2, SmolLM2, Qwen2, Llama 3 and LLaMA")
    return compile_pattern(pattern) if pattern else None


def to_letters(word: str) -> str:
    return "".join(LETTERS[byte] for byte in word.encode("utf-8", "replace"))


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Each occurrence of the pair in parts as one part, from the left."""
    merged = []
    for part in parts:
        if merged and merged[-1] == pair[0] and part == pair[1]:
            merged[-1:] = ["".join(pair), ""]  # "" keeps a part from merging twice
        else:
            merged.append(part)
    return [part for part in merged if part]


class Tokenizer:
    """Byte-pair encoding (arXiv 1508.07909, section 3.2): any text in, ids out, and back.

    content: what a `tokenizer.json` holds; bos and eos: the symbols of start and end. Two families
    are known. On bytes: those trained here, GPT-2, SmolLM2, Qwen2, Llama 3. On characters, with
    "\u2581" for a space and bytes for what is in no token: LLaMA's SentencePiece. `encode` never
    yields an added token, so text cannot fake an image or the end of an answer.
    """

    def __init__(self, content: dict, bos: str | None = None, eos: str | None = None):
        model, self.pattern = content["model"], word_pattern(content)
        self.content = content | {"bos_token": bos, "eos_token": eos}
        self.vocab, self.rank = model["vocab"], {}
        for pair in model["merges"]:
            pair = pair.split(" ") if isinstance(pair, str) else pair
            self.rank[tuple(pair)] = len(self.rank)
        self.normalizer = (content.get("normalizer") or {}).get("type")
        self.known_words: dict[str, list[int]] = {}
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        self.bytes = {token: self.bytes_of(name) for name, token in self.vocab.items()}
        self.bytes |= {token: name.encode() for name, token in added.items()}
        self.space = " " if self.pattern else ""  # SentencePiece begins each text with one itself
        n = self.vocab_size = max(self.bytes) + 1
        if set(SPECIALS) <= set(added):
            (self.pad, self.image, self.summary, self.dec, self.end, human, assistant, opening,
             closing) = (added[name] for name in SPECIALS)
            self.start, self.image_open, self.image_close = [self.summary], [opening], [closing]
            self.human, self.assistant = [self.end, human], [self.end, assistant]
        else:  # a published vocabulary writes the template in its own tokens; no text has these ids
            self.pad, self.image, self.summary, self.dec = range(n, n + 4)
            self.vocab_size, names = n + 4, self.vocab | added
            self.start, self.end = [names[bos]] if bos in names else [], names.get(eos)
            self.human, self.assistant = self.encode("###Human:"), self.encode("###Assistant:")
            self.image_open = self.encode(self.space + "<Img>")
            self.image_close = self.encode("</Img>")

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts until there are vocab_size ids or no pair occurs twice."""
        pattern = compile_pattern(GPT2)
        counts = Counter(to_letters(word) for text in texts for word in pattern.findall(text))
        words = [(list(word), count) for word, count in counts.items()]
        vocab, merges = {letter: len(SPECIALS) + i for i, letter in enumerate(LETTERS)}, []
        while len(SPECIALS) + len(vocab) < vocab_size:
            pair_counts = Counter()
            for parts, count in words:
                for pair in zip(parts, parts[1:]):
                    pair_counts[pair] += count
            best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair), default=None)
            if pair_counts[best] < 2:
                break
            merges.append(best)
            vocab.setdefault("".join(best), len(SPECIALS) + len(vocab))
            words = [(merge_pair(parts, best), count) for parts, count in words]
        added = [{"id": i, "content": name, "special": True} for i, name in enumerate(SPECIALS)]
        return cls({"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel"},
                    "model": {"type": "BPE", "vocab": vocab, "merges": merges}})

    def words(self, text: str) -> list[str]:
        """Text -> words, in the letters that the vocabulary is written in."""
        if self.pattern:
            text = unicodedata.normalize("NFC", text) if self.normalizer == "NFC" else text
            return [to_letters(word) for word in self.pattern.findall(text)]
        text = text.replace(" ", "\u2581")
        if text and (self.normalizer or text[0] != "\u2581"):  # newer files: if there is none yet
            text = "\u2581" + text
        # There a text is one word. No token has a "\u2581" behind another character, though, so
        # to cut it in front of each run of them changes nothing and is faster.
        return re.findall("\u2581*[^\u2581]+|\u2581+", text)

    def encode(self, text: str) -> list[int]:
        """The ids of text; "" gives []."""
        ids = []
        for word in self.words(text):
            if word not in self.known_words:
                self.known_words[word] = self.encode_word(word)
            ids += self.known_words[word]
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Merge neighbours until no merge is left, the earliest learned first."""
        keeps_words = self.content["model"].get("ignore_merges", False)
        parts = [word] if keeps_words and word in self.vocab else list(word)
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        ids = []
        for part in parts:
            if part in self.vocab:
                ids.append(self.vocab[part])
            else:
                ids += [self.vocab[f"<0x{byte:02X}>"] for byte in part.encode("utf-8", "replace")]
        return ids

    def bytes_of(self, name: str) -> bytes:
        """The bytes that a token of the vocabulary stands for."""
        if self.pattern and set(name) <= set(LETTERS):
            return bytes(LETTERS.index(letter) for letter in name)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode("utf-8", "replace")

    def decode(self, ids: list[int]) -> str:
        """The text of ids: added tokens as names, broken UTF-8 as U+FFFD, unknown ids as ""."""
        data = b"".join(self.bytes.get(token, b"") for token in ids)
        return (data if self.space else data.removeprefix(b" ")).decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`; `tokenizer_config.json` beside it names start and end symbols.
        Raises FileNotFoundError, or ValueError naming the file and what is not known in it."""
        content, beside = read_json(path), Path(path).with_name("tokenizer_config.json")
        names = read_json(beside) if beside.is_file() else content  # as `save` has them
        symbols = [names.get("bos_token"), names.get("eos_token")]
        symbols = [symbol["content"] if isinstance(symbol, dict) else symbol for symbol in symbols]
        try:
            return cls(content, *symbols)
        except (ValueError, KeyError, TypeError, re.error) as error:
            raise ValueError(f"{path}: not a tokenizer that is known here ({error})") from error


# ---- From a sample to ids and labels ---------------------------------------------------------

IGNORED = -100  # the label that cross-entropy skips


def corpus(samples: Dataset, at_most: int = 5000) -> list[str]:
    """Questions and answers of the first samples, to train a tokenizer on."""
    texts = []
    for i in range(min(len(samples), at_most)):
        text = " ".join(text for turn in samples[i].turns for text in turn)
        texts.append(" " + " ".join(text.replace("<image>", " ").split()))
    return texts


def encode_turns(tokenizer: Tokenizer, turns: list[tuple[str, str | None]], n_rows: int,
                 max_len: int = 10**9, name: str = "sample") -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels), in MiniGPT-4's template (arXiv 2304.10592, section 3.2):

        <s>###Human: <Img>(n_rows placeholders)</Img> What color is the circle?###Assistant: red###

    Labels are the ids on each answer and the ### (in published vocabularies: their end symbol)
    that ends it, and -100 everywhere else. An answer of None ends the ids where the model is to go
    on. What is longer than max_len is cut at the end. Raises ValueError when the cut would take
    image rows or leave nothing to train on.
    """
    ids, labels = list(tokenizer.start), [IGNORED] * len(tokenizer.start)

    def add(tokens: list[int], is_trained: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if is_trained else [IGNORED] * len(tokens))

    for question, answer in turns:
        # The ### that ends an answer also begins the next turn.
        is_shared = ids[-1:] == tokenizer.human[:1]
        add(tokenizer.human[1:] if is_shared else tokenizer.human)
        for i, text in enumerate(question.split("<image>")):
            if i:
                add(tokenizer.image_open + [tokenizer.image] * n_rows + tokenizer.image_close)
            if text.strip():
                add(tokenizer.encode(tokenizer.space + text.strip()))
        add(tokenizer.assistant)
        if answer is not None:
            text = tokenizer.encode(tokenizer.space + answer.strip())
            add(text + [tokenizer.end], is_trained=True)
    check(tokenizer.image not in ids[max_len:],
          f"{name}: {len(ids)} tokens are cut at max_len {max_len} in front of an image")
    check(turns[-1][1] is None or set(labels[:max_len]) != {IGNORED},
          f"{name}: no answer is left within max_len {max_len} of {len(ids)} tokens")
    return ids[:max_len], labels[:max_len]


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB picture, squashed to size (height, width) -> (3, height, width) uint8."""
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Collate:
    """Samples -> one batch of tensors, padded on the right. n_rows: placeholders for an image."""
    tokenizer: Tokenizer
    n_rows: int
    image_size: tuple[int, int]
    max_len: int

    def images(self, samples: list[Sample]) -> Tensor:
        """All images of all samples, in order: (N, 3, height, width) uint8, a quarter of the bytes
        that they have once the model has normalised them."""
        pixels = [to_pixels(image, self.image_size) for sample in samples
                  for image in sample.images]
        empty = torch.zeros(0, 3, *self.image_size, dtype=torch.uint8)
        return torch.stack(pixels) if pixels else empty

    def conversations(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"input_ids" (B, T), "images" (N, 3, height, width), "labels" (B, T)}, for an `MLLM`."""
        rows = [encode_turns(self.tokenizer, sample.turns, self.n_rows, self.max_len, sample.name)
                for sample in samples]
        ids, labels = ([torch.tensor(row) for row in side] for side in zip(*rows))
        return {"input_ids": pad_sequence(ids, True, self.tokenizer.pad),
                "labels": pad_sequence(labels, True, IGNORED), "images": self.images(samples)}

    def pairs(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"images" (B, 3, height, width), "text", "to_generate" and "labels" (B, T)}: each first
        image and its text, for the Q-Former's losses. Text begins with <s>, whose row sums it up,
        or <dec>, the sign to generate it, and ends with ###. labels: what is to be generated,
        answers alone; elsewhere -100."""
        mark, rows = self.tokenizer, []
        for sample in samples:
            ids, labels = [mark.summary], [IGNORED]
            for question, answer in sample.turns:
                words = question.replace("<image>", " ").split()
                asked = mark.encode(mark.space + " ".join(words)) if words else []
                told = mark.encode(mark.space + answer.strip())
                ids += asked + told
                labels += [IGNORED] * len(asked) + told
            rows.append([(*row[:self.max_len - 1], mark.end) for row in (ids, labels)])
        ids, labels = ([torch.tensor(row) for row in side] for side in zip(*rows))
        text = pad_sequence(ids, True, mark.pad)
        to_generate = text.clone()
        to_generate[:, 0] = mark.dec
        firsts = [replace(sample, images=sample.images[:1]) for sample in samples]
        return {"images": self.images(firsts), "text": text, "to_generate": to_generate,
                "labels": pad_sequence(labels, True, IGNORED)}


# ---- Conversations: your own data ------------------------------------------------------------

PICTURES = (".jpg", ".jpeg", ".png")


def read_json(path: str | Path, text: str = ""):
    """The content of a file, or of a text in it. Raises FileNotFoundError, ValueError."""
    try:
        return json.loads(text or Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def read_image(path: str | Path, name: str = "picture") -> Image.Image:
    """The picture as RGB, turned as its EXIF data say. Raises BadRecord if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRecord(f"{name}: cannot read image {path} ({error})") from error


def parse_record(record, folder: Path, name: str) -> Sample:
    """A LLaVA record as a sample with the paths of its pictures as `images`. Raises BadRecord.

    {"image": FILE or a list of them or none, "conversations": [{"from": "human" or "gpt", "value":
    TEXT}, ...]}, with "<image>" in the questions once for each picture.
    """
    def must(is_right: bool, message: str) -> None:
        check(is_right, f"{name}: {message}", BadRecord)

    try:
        name += f" (id {record['id']})" if "id" in record else ""
        speakers = [message["from"] for message in record["conversations"]]
        texts = [message["value"].strip() for message in record["conversations"]]
        files = record.get("image") or []
    except (TypeError, KeyError, AttributeError) as error:
        raise BadRecord(f"{name}: not in LLaVA's form ({error!r})") from error
    must(len(texts) > 0 and speakers == ["human", "gpt"] * (len(texts) // 2),
         f"expected pairs from 'human' and 'gpt', got {speakers}")
    for text in texts[1::2]:
        must(text != "" and "<image>" not in text, f"{text!r} cannot be an answer")
    files = files if isinstance(files, list) else [files]
    n = sum(text.count("<image>") for text in texts)
    must(n == len(files), f"{n} <image> placeholders in the text, but {len(files)} images")
    paths = tuple(folder / str(file) for file in files)
    for path in paths:
        must(path.is_file(), f"no image file {path}")
    return Sample(paths, list(zip(texts[::2], texts[1::2])), name=name)


def as_record(file: str, question: str, answer: str) -> dict:
    """One question about one picture in LLaVA's form."""
    return {"id": file, "image": file, "conversations": [
        {"from": "human", "value": f"<image> {question}"}, {"from": "gpt", "value": answer}]}


def clean_caption(text: str) -> str:
    """A caption fit to be imitated: without markup, meaningless signs, repeated sentences and an
    unfinished last one; "" if fewer than five words are left.

    "A dog runs. ### A dog runs. It is brown!!! The gras" becomes "A dog runs. It is brown!".
    Source: arXiv 2304.10592, section 3.2. Differs: rules alone, nothing is asked of ChatGPT.
    """
    text = re.sub(r"</?\w+[^<>]*>", " ", text)
    text = "".join(sign for sign in text if sign in ".,;:!?'\"()%$€&/+°–—‘’“”…-" or sign.isspace()
                   or unicodedata.category(sign)[0] in "LMN")  # letters, their accents, numbers
    text = re.sub(r"\.{2,}", "…", text)
    text = re.sub(r"([^\w\s])\1+", r"\1", text)  # "!!!" says no more than "!"
    kept, known = [], set()
    for sentence in re.findall(r"\S.*?[.!?][\"')’”]*(?=\s|$)", text, re.DOTALL):
        words = tuple(re.findall(r"\w+", sentence.lower()))
        if words and (words not in known or len(words) == 1):  # "Mr." and the like may come again
            kept.append(" ".join(sentence.split()))
        known.add(words)
    text = " ".join(kept)
    return text if len(re.findall(r"\w+", text)) >= 5 else ""


def read_captions(path: Path) -> list[dict]:
    """The records of cc_sbu_align's filter_cap.json, captions cleaned, or of a text with a caption
    a line. A picture always gets the same instruction."""
    records = []
    if path.suffix == ".json":
        content = read_json(path)
        check("annotations" in content, f"{path}: expected 'annotations', a list of records")
        for record in content["annotations"]:
            file, text = f"{record.get('image_id')}.jpg", record.get("caption") or ""
            text = clean_caption(text)
            if text:
                records.append(as_record(file, random.Random(file).choice(DESCRIBE), text))
        print(f"{path}: {len(records)} captions are left after cleaning")
        return records
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for line in filter(str.strip, lines):
        # "7.jpg<TAB>A dog." or "7.jpg,A dog.", "7.jpg#0" for the first of many
        file, *text = line.split("\t", 1) if "\t" in line else next(csv.reader([line]))
        file = re.sub(r"#\d+$", "", file.strip())
        if file != "image":  # the headline is "image,caption"
            question = random.Random(file).choice(CAPTION)
            records.append(as_record(file, question, ",".join(text)))
    return records


def read_records(path: Path) -> list:
    """The records of a file or folder in LLaVA's form, not yet looked into. Raises ValueError
    naming the file, and the line of JSONL."""
    if path.is_dir():
        files = [file for file in sorted(path.glob("*/*")) if file.suffix.lower() in PICTURES]
        return [as_record(f"{file.parent.name}/{file.name}", CLASS, file.parent.name)
                for file in files]
    if path.name == "filter_cap.json" or path.suffix == ".txt":
        return read_captions(path)
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
        return [read_json(f"{path} line {i}", line) for i, line in lines if line.strip()]
    records = read_json(path)
    check(isinstance(records, list), f"{path}: expected a list of records")
    return records


class Conversations(Dataset):
    """Pictures and text of your own, in one of four layouts.

    A folder with a folder of pictures for each class: torchvision's ImageFolder.
    A file of LLaVA records, JSON or JSONL, see `parse_record`.
    A folder like Flickr8k's: captions.txt.
    A folder like MiniGPT-4's `cc_sbu_align`: filter_cap.json, {"annotations": [{"image_id",
    "caption"}]}, and image/<image_id>.jpg.

    folder: of the pictures, by default images/, image/ or Images/ beside the file, or where it is.
    skip_bad: leave out records that cannot be used. Raises FileNotFoundError, or ValueError naming
    the file, and the record where there is one.
    """

    def __init__(self, path: str | Path, folder: str = "", skip_bad: bool = False):
        path, self.records = Path(path), []
        files = [path / name for name in ("filter_cap.json", "captions.txt")]
        path = next((file for file in files if file.is_file()), path)
        beside = [path.parent / name for name in ("images", "image", "Images")]
        nearest = next((one for one in beside if one.is_dir()), path.parent)
        folder = Path(folder or (path if path.is_dir() else nearest))
        for i, record in enumerate(read_records(path)):
            try:
                parsed = parse_record(record, folder, f"{path} record {i}")
                for file in parsed.images if skip_bad else ():  # now, or it is too late to skip
                    read_image(file, parsed.name)
                self.records.append(parsed)
            except BadRecord as error:
                if not skip_bad:
                    raise
                print(f"skipped {error}")
        check(len(self.records) > 0, f"{path}: there is no usable record in it")

    def split(self, every: int) -> "Conversations":
        """Move the records of every n-th picture into a new dataset and return that."""
        pictures = list(dict.fromkeys(record.images or record.name for record in self.records))
        chosen, held_out = set(pictures[::every]), copy.copy(self)
        held_out.records, rest = [], []
        for record in self.records:
            is_chosen = (record.images or record.name) in chosen
            (held_out.records if is_chosen else rest).append(record)
        self.records = rest
        check(len(rest) > 0, "one picture is too little to train on and to measure on")
        return held_out

    def for_task(self, task: str) -> "Conversations":
        """The same records as another task wants them; for "test" all answers to one question about
        one picture are right (`references`)."""
        other, questions = copy.copy(self), {}
        if task == "vision":
            other.records = [record for record in self.records if record.images]
        elif task == "language":
            other.records = []
            for record in self.records:
                turns = [(text.replace("<image>", " "), answer) for text, answer in record.turns]
                other.records.append(replace(record, images=(), turns=turns))
        elif task == "test":
            for record in self.records:
                is_single = len(record.turns) == 1
                about = (record.images, record.turns[0][0]) if is_single else id(record)
                first = questions.setdefault(about, replace(record))
                if is_single:
                    first.references += (record.turns[0][1],)
            other.records = list(questions.values())
        check(len(other.records) > 0,
              f"{self.records[0].name} and all after it: nothing to use for {task!r}")
        return other

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Sample:
        record = self.records[i]
        return replace(record, images=[read_image(path, record.name) for path in record.images])


# ---- Pictures for people ---------------------------------------------------------------------

def contact_sheet(pictures: list[Image.Image], texts: list[str], columns: int = 4,
                  side: int = 256) -> Image.Image:
    """Pictures in rows, each `side` pixels wide, with its text wrapped under it."""
    font, wrapped = ImageFont.load_default(13), []
    for text in texts:
        wrapped.append("\n".join(textwrap.fill(line, side // 7) for line in text.split("\n")))
    tops = [round(side * picture.height / picture.width) for picture in pictures]
    height = max(tops) + 12 + 19 * max(text.count("\n") + 1 for text in wrapped)
    size = columns * (side + 16), math.ceil(len(pictures) / columns) * height
    sheet = Image.new("RGB", size, "white")
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side + 16) + 8, i // columns * height + 6
        sheet.paste(picture.resize((side, tops[i]), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, y + max(tops) + 3), wrapped[i], "black", font, spacing=4)
    return sheet


def draw_curves(losses: dict[str, list[float]], path: Path) -> None:
    """One panel per stage: loss in nats (logarithmic) against steps, smoothed."""
    font, sheet = ImageFont.load_default(13), Image.new("RGB", (360 * len(losses), 240), "white")
    canvas, top, bottom = ImageDraw.Draw(sheet), 30, 212
    for panel, (stage, values) in enumerate(losses.items()):
        steps, left, right = len(values), panel * 360 + 60, panel * 360 + 340
        values = [value for value in values if math.isfinite(value)] or [1.0]
        # A multiple of four, since ITC and ITM add to the loss of each fourth step.
        n, window = len(values), min(len(values), 4 * max(1, len(values) // 200))
        values = np.array(values[:n // window * window]).reshape(-1, window).mean(axis=1)
        values = values.clip(1.1e-6, 400)
        ticks = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)]
        low = max(tick for tick in ticks if tick < values.min())
        high = min(tick for tick in ticks if tick > values.max())

        def height(value):
            return bottom - (bottom - top) * np.log(value / low) / np.log(high / low)

        for tick in (tick for tick in ticks if low <= tick <= high):
            canvas.line((left, height(tick), right, height(tick)), "lightgray")
            canvas.text((left - 6, height(tick)), f"{tick:g}", "black", font, "rm")
        for share in (0.0, 0.5, 1.0):
            x = left + share * (right - left)
            canvas.text((x, bottom + 6), f"{round(share * steps)}", "black", font, "mt")
        canvas.rectangle((left, top, right, bottom), outline="gray")
        xs = np.linspace(left, right, len(values))
        canvas.line(list(zip(xs, height(values))), (45, 85, 215), 2)
        canvas.text((left, 8), f"{stage}: loss in nats, by step", "black", font)
    sheet.save(path)


# ---- Published weights: not needed to understand the model -----------------------------------

# The sizes in a config.json of each family, with those that it may leave out.
CLIP = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12,
        "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5}
EVA = {"image_size": 224, "patch_size": 14, "hidden_size": 1408, "num_hidden_layers": 39,
       "num_attention_heads": 16, "intermediate_size": 6144, "hidden_act": "gelu",
       "layer_norm_eps": 1e-6}
BLIP2 = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "layer_norm_eps": 1e-12, "encoder_hidden_size": 1408,
         "cross_attention_frequency": 2, "num_query_tokens": 32}
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": None, "intermediate_size": 11008,
         "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
QWEN = LLAMA | {"vocab_size": 151936, "intermediate_size": 22016}
# Our names of these sizes, where they differ; and all values of other settings that fit our model.
OURS = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_dim",
        "hidden_act": "activation", "layer_norm_eps": "norm_eps", "rms_norm_eps": "norm_eps",
        "encoder_hidden_size": "encoder_width", "tie_word_embeddings": "tied",
        "cross_attention_frequency": "cross_attention_every", "num_query_tokens": "n_queries"}
KNOWN = {"hidden_act": ("gelu", "quick_gelu", "silu"), "qkv_bias": (True,),
         "attention_bias": (False,), "use_sliding_window": (False,), "rope_type": ("default",),
         "type": ("default",)}


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Eight bytes hold the length of a header in JSON, which says where each tensor's bytes are."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # read where it is used
    start, tensors = 8 + int.from_bytes(data[:8], "little"), {}
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(data, dtype=torch.uint8)[start + first:start + last]
        if (start + first) % 8:  # torch wants numbers aligned to their size
            flat = flat.clone()
        tensors[name] = flat.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_folder(folder: str | Path, families: dict[str, dict],
                *sections: str) -> tuple[str, dict, dict[str, Tensor]]:
    """A model's type, its sizes under our names, and its tensors under theirs.

    families: the sizes by model_type; sections: parts of config.json that hold some of them.
    Raises FileNotFoundError, or ValueError for a damaged file or something that is not known here.
    """
    folder, weights = Path(folder), {}
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    check(kind in families, f"{folder}: model_type {kind!r} is not known here, only {[*families]}")
    config = families[kind] | config
    for section in sections:
        config |= config.get(section) or {}
    for name, known in KNOWN.items():
        value = config.get(name, known[0])
        check(value in known, f"{folder}: {name} {value!r} is not known here, only {known}")
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    check(len(files) > 0, f"{folder}: no weights, model*.safetensors or pytorch_model*.bin",
          FileNotFoundError)
    for path in files:
        try:
            weights |= (read_safetensors(path) if path.suffix == ".safetensors" else
                        torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            raise ValueError(f"{path}: damaged, or no weights ({str(error)[:200]})") from error
    return kind, {OURS.get(name, name): config[name] for name in families[kind]}, weights


def rename(weights: dict[str, Tensor], ignored: str, rules: list[tuple]) -> dict[str, Tensor]:
    """The tensors under our names: each rule (pattern, replacement) in turn; then "<q>", "<k>" and
    "<v>" are stacked. What begins with `ignored` is left out. What fits no rule keeps its name:
    `load_state_dict` will report it."""
    state = {}
    for name, tensor in weights.items():
        if not re.match(ignored, name):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            state[name] = tensor
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


def published_vit(folder: str | Path, drop_last: int = 0) -> tuple[dict, dict[str, Tensor]]:
    """The arguments of a `ViT` and its weights: CLIP's (`openai/clip-vit-large-patch14`) or
    BLIP-2's, which is EVA-CLIP's ViT-g/14 (`Salesforce/blip2-opt-2.7b`). drop_last: how many of
    the last blocks to leave out, one of CLIP's in LLaVA. Raises FileNotFoundError, ValueError."""
    kind, sizes, weights = read_folder(
        folder, {"clip": CLIP, "clip_vision_model": CLIP, "blip-2": EVA,
                 "blip_2_vision_model": EVA}, "vision_config")
    is_clip, depth, side = "clip" in kind, sizes["n_layers"], sizes["image_size"]
    check(0 <= drop_last < depth, f"drop_last {drop_last} must leave one of {depth} blocks")
    sizes |= {"image_size": (side, side), "n_layers": depth - drop_last, "pre_norm": is_clip,
              "post_norm": not is_clip, "mlp_ratio": sizes.pop("ffn_dim") / sizes["dim"]}
    ignored = r".*position_ids|text_|visual_projection|logit_scale|qformer\.|query_tokens|language_"
    ignored += "".join(rf"|.*encoder\.layers\.{i}\." for i in range(depth - drop_last, depth))
    if is_clip:  # its last norm is the class token's alone
        ignored += "|.*post_layernorm"
    state = rename(weights, ignored, VIT_RULES)
    for name in {"class_token", "position_embedding"} & set(state):
        state[name] = state[name].reshape(1, -1, sizes["dim"])
    return sizes, state


def published_pixels(folder: str | Path) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of the pixels that a published ViT was trained with; by default CLIP's."""
    path = Path(folder) / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    mean, std = content.get("image_mean"), content.get("image_std")
    return {"pixel_mean": tuple(mean or (0.48145466, 0.4578275, 0.40821073)),
            "pixel_std": tuple(std or (0.26862954, 0.26130258, 0.27577711))}


def published_qformer(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The arguments of a `QFormer` without text half and its weights, BLIP-2's
    (`Salesforce/blip2-opt-2.7b`). Raises FileNotFoundError, ValueError."""
    _, sizes, weights = read_folder(folder, {"blip-2": BLIP2}, "qformer_config")
    return sizes, rename(weights, r"vision_model|language_|qformer\.embeddings", QFORMER_RULES)


def published_gpt(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The arguments of a `GPT` and its weights, without adapters: of the LLaMA family (SmolLM2,
    TinyLlama, Vicuna) or Qwen2. Raises FileNotFoundError, ValueError."""
    kind, sizes, weights = read_folder(folder, {"llama": LLAMA, "qwen2": QWEN}, "rope_scaling",
                                       "rope_parameters")
    tied = sizes["tied"]
    state = rename(weights, r".*rotary_emb" + (r"|lm_head" if tied else ""), GPT_RULES)
    if tied and "token_embedding.weight" in state:
        state["lm_head.weight"] = state["token_embedding.weight"]
    return sizes | {"qkv_bias": kind == "qwen2"}, state


def main() -> None:
    spec = SceneSpec()
    scenes = Scenes(spec, "instruct", 12)
    pictures = [sample.images[0] for sample in scenes]
    texts = [describe(scenes.things(i)[0]) for i in range(12)]
    contact_sheet(pictures, texts).save("scenes.png")
    tokenizer = Tokenizer.train(corpus(Scenes(spec, "language", 500)), 1024)
    sample = next(sample for sample in scenes if len(sample.turns) > 1)
    ids, labels = encode_turns(tokenizer, sample.turns[:2], n_rows=4, max_len=512)
    print(f"scenes.png written. Two turns about {sample.name}, with 4 rows for its picture:")
    for position, (token, label) in enumerate(zip(ids, labels)):
        use = "context" if label == IGNORED else "trained"
        use = "image" if token == tokenizer.image else use
        print(f"{position:4d}  {tokenizer.decode([token])!r:16} {use}")


if __name__ == "__main__":
    main()
