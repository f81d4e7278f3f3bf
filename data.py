"""Text, pictures and what joins them: a tokenizer, built-in scenes, a reader for your data, training targets.

    Scenes ──────┐
                 ├─► Sample (images, turns) ─► encode_turns ─► ids and labels ─► Collate ─► one batch
    Conversations┘                             (the prompt template)             (padding)

`Scenes` are small pictures drawn as they are needed, with questions whose answers are known exactly, so that
the whole model can be trained and measured with nothing downloaded. `Conversations` reads LLaVA JSON and folders
of captions.

    python data.py        draws scenes.png and prints one sample, token by token

Left out on purpose: random crops and flips (they would make "left" a lie).

B texts, N images, T tokens, Q rows for each image.
"""
import copy
import json
import math
import os
import random
import re
import textwrap
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset


# ---- Tokenizer ------------------------------------------------------------------------------------

# Special tokens come first, so their ids never depend on the corpus.
SPECIALS = ("<pad>", "<ImageHere>", "<s>", "<dec>", "###", "Human:", "Assistant:", "<Img>", "</Img>")
PAD, IMAGE, START, DECODE, END, HUMAN, ASSISTANT, IMAGE_OPEN, IMAGE_CLOSE = range(len(SPECIALS))

# A word with the space before it, one digit, punctuation, underscores, other white space: every character
# falls in exactly one piece, and no token crosses a piece.
PIECES = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\w\s]+| ?_+|\s+")


class Tokenizer:
    """Byte-level byte-pair encoding: any text in, ids out, and back without loss.

    Ids: the special tokens, then the 256 bytes, then one id for each merge in the order learned. `encode`
    never yields a special id, so text cannot fake an image or the end of an answer.
    Source: arXiv 1508.07909, section 3.2, on bytes as in GPT-2.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        self.bytes = [name.encode() for name in SPECIALS] + [bytes([value]) for value in range(256)]
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.bytes)

    @classmethod
    def train(cls, texts: list[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from texts until there are vocab_size ids or no pair occurs twice."""
        counts = Counter(piece for text in texts for piece in PIECES.findall(text))
        words = [(cls._bytes_to_ids(piece), count) for piece, count in counts.items()]
        pair_counts, pair_words = Counter(), defaultdict(set)
        for index, (ids, count) in enumerate(words):
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += count
                pair_words[pair].add(index)
        merges: list[tuple[int, int]] = []
        while len(SPECIALS) + 256 + len(merges) < vocab_size and pair_counts:
            pair = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
            if pair_counts[pair] < 2:
                break
            new_id = len(SPECIALS) + 256 + len(merges)
            merges.append(pair)
            for index in list(pair_words[pair]):              # only words that hold the pair change
                ids, count = words[index]
                for old in zip(ids, ids[1:]):
                    pair_counts[old] -= count
                ids = cls._merge(ids, pair, new_id)
                for new in zip(ids, ids[1:]):
                    pair_counts[new] += count
                    pair_words[new].add(index)
                words[index] = ids, count
            del pair_counts[pair]
        return cls(merges)

    @staticmethod
    def _bytes_to_ids(piece: str) -> list[int]:
        return [len(SPECIALS) + value for value in piece.encode("utf-8", "surrogatepass")]

    @staticmethod
    def _merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
        merged, i = [], 0
        while i < len(ids):
            if tuple(ids[i:i + 2]) == pair:
                merged.append(new_id)
                i += 2
            else:
                merged.append(ids[i])
                i += 1
        return merged

    def encode(self, text: str) -> list[int]:
        """The ids of text; "" gives []."""
        return [token for piece in PIECES.findall(text) for token in self._encode_piece(piece)]

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.cache:
            ids = self._bytes_to_ids(piece)
            while len(ids) > 1:                               # the earliest learned merge goes first
                pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, math.inf))
                if pair not in self.rank:
                    break
                ids = self._merge(ids, pair, len(SPECIALS) + 256 + self.rank[pair])
            if len(self.cache) >= 100_000:
                self.cache.clear()
            self.cache[piece] = ids
        return self.cache[piece]

    def decode(self, ids) -> str:
        """The text of ids (ints). Special tokens read as their names, broken UTF-8 as U+FFFD."""
        data = b"".join(self.bytes[int(token)] for token in ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"specials": SPECIALS, "merges": self.merges}))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what `save` wrote. Raises ValueError when the file is no such tokenizer."""
        try:
            content = json.loads(Path(path).read_text())
            if tuple(content["specials"]) != SPECIALS:
                raise ValueError(f"special tokens {content['specials']} are not {list(SPECIALS)}")
            return cls(content["merges"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not a tokenizer written by this program ({error})") from error


# ---- Scenes: pictures whose every fact is known ---------------------------------------------------

COLORS = {"red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 215), "yellow": (240, 205, 30),
          "purple": (150, 60, 180), "black": (35, 35, 35)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 0.30, "large": 0.46}                        # radius over the side of a cell
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
CELLS = (4, 1, 3, 5, 7, 0, 2, 6, 8)                           # 3 * row + column: center, sides, corners


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
        words = [ROWS[self.row]] * (self.row != 1) + [COLUMNS[self.column]] * (self.column != 1)
        return " ".join(words) or "center"


@dataclass(frozen=True)
class SceneSpec:
    """How hard the scenes are. Colours, shapes and places are the first of `COLORS`, `SHAPES`
    and `CELLS`."""
    image_size: int = 48                                      # pixels, height and width
    n_colors: int = 5
    n_shapes: int = 4
    n_places: int = 5                                         # of `CELLS`
    max_things: int = 3

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [(color, shape) for color in list(COLORS)[:self.n_colors] for shape in SHAPES[:self.n_shapes]]

    @property
    def held_out(self) -> list[tuple[str, str]]:
        """One colour of each shape: pairs that no training picture and no training text contains."""
        return [(list(COLORS)[i % self.n_colors], shape) for i, shape in enumerate(SHAPES[:self.n_shapes])]

    @property
    def seen(self) -> list[tuple[str, str]]:
        return [pair for pair in self.pairs if pair not in self.held_out]


def random_things(spec: SceneSpec, rng: random.Random, unseen: bool = False) -> list[Thing]:
    """1 to max_things things in reading order, of different colour-shape pairs, in different cells.

    unseen: exactly one of them is a held-out pair; otherwise none is.
    """
    n = rng.randint(1, spec.max_things)
    pairs = rng.sample(spec.seen, n)
    if unseen:
        pairs[0] = rng.choice(spec.held_out)
    cells = rng.sample(CELLS[:spec.n_places], n)
    things = [Thing(*pair, rng.choice(list(SIZES)), *divmod(cell, 3)) for pair, cell in zip(pairs, cells)]
    return sorted(things, key=lambda thing: (thing.row, thing.column))


def draw(things: list[Thing], size: int, rng: random.Random) -> Image.Image:
    """An RGB picture of size x size pixels: shapes, shades and places jittered, on a light, shaded ground."""
    scale = 4                                                 # drawn larger, then shrunk: smooth edges
    light, slope = rng.randint(175, 255), rng.randint(-40, 40)
    ground = np.array([light + rng.randint(-15, 15) for _ in range(3)], dtype=np.float32)
    ramp = np.linspace(-slope, slope, size, dtype=np.float32)
    ramp = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    ground = np.broadcast_to(ground + ramp, (size, size, 3)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(ground).resize((size * scale, size * scale), Image.Resampling.NEAREST)
    canvas, cell = ImageDraw.Draw(picture), size * scale / 3
    for thing in things:
        radius = SIZES[thing.size] * cell * rng.uniform(0.92, 1.08)
        x, y = (((i + 0.5) + rng.uniform(-0.06, 0.06)) * cell for i in (thing.column, thing.row))
        fill = tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLORS[thing.color])
        if thing.shape == "circle":
            canvas.circle((x, y), radius, fill)
        elif thing.shape == "square":
            side = radius * 0.88
            canvas.rectangle((x - side, y - side, x + side, y + side), fill)
        else:                                                 # corners on a circle, the first on top
            radii = {"triangle": [1.1], "star": [1.15, 0.5]}[thing.shape]
            n = {"triangle": 3, "star": 10}[thing.shape]
            angles = [2 * math.pi * i / n for i in range(n)]
            canvas.polygon([(x + radius * radii[i % len(radii)] * math.sin(angle),
                             y - radius * radii[i % len(radii)] * math.cos(angle))
                            for i, angle in enumerate(angles)], fill)
    return picture.resize((size, size), Image.Resampling.BOX)


def describe(things: list[Thing]) -> str:
    """Everything there is to say, in reading order: "At the top left is a large red circle. At ..." """
    return " ".join(f"At the {thing.place} is a {thing.size} {thing.name}." for thing in things)


def caption(things: list[Thing], rng: random.Random) -> str:
    """A short, noisy caption: all things, each with a size, a place or neither, in any order."""
    forms = ("a {0.name}", "a {0.size} {0.name}", "a {0.name} at the {0.place}")
    parts = [rng.choice(forms).format(thing) for thing in rng.sample(things, len(things))]
    return " and ".join(parts).capitalize() + "."


KINDS = ("color", "shape", "size", "where", "count", "exists", "relation")
DESCRIBE = ("Describe the picture in detail.", "What do you see? Describe everything.",
            "Give a detailed description.")


def ask(kind: str, things: list[Thing], about: Thing, spec: SceneSpec, rng: random.Random,
        unseen: bool = False) -> tuple[str, str] | None:
    """A question of this kind about one of the things and its answer; None where there is none that is
    unambiguous and interesting."""
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
        what = rng.choice(["shape", about.shape, about.color + " shape", rng.choice(spec.pairs)[1]])
        return (f"How many {what}s are there?",
                str(sum(what in ("shape", thing.shape, thing.color + " shape") for thing in things)))
    if kind == "exists":
        form = rng.choice(("{1}", "{0} shape", "{0} {1}"))    # a circle, a red shape, a red circle
        if rng.random() < 0.5:
            return f"Is there a {form.format(about.color, about.shape)}?", "yes"
        there = [form.format(thing.color, thing.shape) for thing in things]
        near = [form.format(*pair) for pair in (spec.pairs if unseen else spec.seen)
                if about.color in pair or about.shape in pair]
        if absent := [what for what in near if what not in there]:
            return f"Is there a {rng.choice(absent)}?", "no"
    if kind == "relation" and others:
        other = rng.choice(others)
        sides = [(word, mine < its) for word, mine, its in
                 (("left of", about.column, other.column), ("above", about.row, other.row)) if mine != its]
        word, holds = rng.choice(sides)
        return f"Is the {about.name} {word} the {other.name}?", "yes" if holds else "no"
    return None


def ask_any(things: list[Thing], spec: SceneSpec, rng: random.Random, unseen: bool = False):
    """(kind, question, answer): a random kind about a random thing, or about the held-out one if unseen."""
    while True:
        kind = rng.choice(KINDS)
        about = rng.choice([thing for thing in things
                            if not unseen or (thing.color, thing.shape) in spec.held_out])
        if asked := ask(kind, things, about, spec, rng, unseen):
            return kind, *asked


@dataclass
class Sample:
    """One record of any source. `turns` are (question, answer) texts; the k-th "<image>" in the questions
    stands for the next image, or for the next frames[k] images if it is a clip."""
    images: list[Image.Image]
    turns: list[tuple[str, str]]
    kind: str = "answer"                                      # groups the answers in an evaluation
    name: str = "sample"                                      # for error messages
    frames: tuple[int, ...] = ()                              # none: one image each


class Scenes(Dataset):
    """Endless scenes: number i is always the same picture and text for the same spec, split and task.

    split: "train", "test" (other pictures of the same pairs) or "unseen" (a held-out pair in each, and asked
    for). task: what the text beside the picture is, see `TASKS`.
    """

    TASKS = ("read", "see", "align", "instruct", "question", "describe")

    def __init__(self, spec: SceneSpec, task: str, length: int, split: str = "train", seed: int = 0,
                 n_turns: int = 6):
        assert task in self.TASKS and split in ("train", "test", "unseen"), (task, split)
        self.spec, self.task, self.length, self.split, self.seed = spec, task, length, split, seed
        self.n_turns = n_turns

    def __len__(self) -> int:
        return self.length

    def things(self, i: int) -> tuple[list[Thing], random.Random]:
        """What is in scene i, and the generator that decides the rest of it."""
        rng = random.Random(f"{self.seed} {self.split} {i}")
        return random_things(self.spec, rng, self.split == "unseen"), rng

    def conversation(self, things: list[Thing], rng: random.Random) -> list[tuple[str, str]]:
        """Questions and answers, or else a description; for `read` with the picture in words.

        Descriptions are rare in `read`: there they are copies, easy tokens that crowd out the answers which
        must be looked up. Captions are in it so that the decoder knows how to write what `align` asks for.
        """
        lot = rng.random()
        if lot < (0.03 if self.task == "read" else 0.5):
            turns = [(rng.choice(DESCRIBE), describe(things))]
        elif self.task == "read" and lot < 0.06:
            turns = [("", caption(things, rng))]
        else:
            turns = [ask_any(things, self.spec, rng)[1:] for _ in range(self.n_turns)]
            turns = list(dict(turns).items())                 # no question twice
        picture = describe(things) if self.task == "read" else "<image>"
        return [(f"{picture} {turns[0][0]}", turns[0][1]), *turns[1:]]

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i} of {self.length}")
        things, rng = self.things(i)
        images = [] if self.task == "read" else [draw(things, self.spec.image_size, rng)]
        kind, turns = self.task, [("<image>", describe(things))]
        if self.task == "align":
            turns = [("<image>", caption(things, rng))]
        elif self.task == "describe":
            turns = [("<image> " + DESCRIBE[0], describe(things))]
        elif self.task == "question":
            kind, question, answer = ask_any(things, self.spec, rng, self.split == "unseen")
            turns = [("<image> " + question, answer)]
        elif self.task in ("read", "instruct"):
            turns = self.conversation(things, rng)
        return Sample(images, turns, kind, f"scene {i}")


# ---- Conversations: your own data -----------------------------------------------------------------

class BadRecord(ValueError):
    """A record that cannot be trained on; the message names the file and the record."""


def existing(path: Path, name: str) -> Path:
    if not os.path.isfile(path):                              # False, too, for names no file can have
        raise BadRecord(f"{name}: no image file {path}")
    return path


def parse_record(record, folder: Path, name: str) -> tuple[list[list[Path]], list[tuple[str, str]]]:
    """One LLaVA record -> the paths of the frames of each of its images, and its turns. Raises BadRecord."""
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord(f"{name}: expected an object with a list 'conversations'")
    images = record.get("image") or []
    images = images if isinstance(images, list) else [images]
    clips = [image if isinstance(image, list) else [image] for image in images]
    if not all(clip and all(isinstance(frame, str) for frame in clip) for clip in clips):
        raise BadRecord(f"{name}: 'image' must be a file name or a list of file names, a clip a list in that list")
    messages = record["conversations"]
    for i, message in enumerate(messages):
        expected = ("human", "gpt")[i % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise BadRecord(f"{name}: message {i} must be an object with 'from' and a text 'value'")
        if message.get("from") not in ("human", "gpt"):
            raise BadRecord(f"{name}: message {i} has the unknown speaker {message.get('from')!r}; "
                            "use 'human' and 'gpt'")
        if message["from"] != expected:
            raise BadRecord(f"{name}: message {i} is from {message['from']!r}, expected {expected!r}: "
                            "speakers take turns, 'human' first")
    if not messages or len(messages) % 2:
        raise BadRecord(f"{name}: {len(messages)} messages; expected pairs of a question and an answer")
    texts = [message["value"] for message in messages]
    turns = list(zip(texts[::2], texts[1::2]))
    if not all(answer.strip() for _, answer in turns):
        raise BadRecord(f"{name}: an answer is empty, there is nothing to learn from it")
    if any("<image>" in answer for _, answer in turns):
        raise BadRecord(f"{name}: <image> may stand in a question, not in an answer")
    placeholders = sum(question.count("<image>") for question, _ in turns)
    if placeholders != len(images):
        raise BadRecord(f"{name}: {placeholders} <image> placeholders in the text, but {len(images)} images")
    return [[existing(folder / frame, name) for frame in clip] for clip in clips], turns


def parse_caption(record, folder: Path, name: str) -> tuple[list[list[Path]], list[tuple[str, str]]]:
    """One annotation of MiniGPT-4's layout -> the path of its image, and its caption as a turn. Raises BadRecord."""
    if not isinstance(record, dict) or not isinstance(record.get("image_id"), (str, int)):
        raise BadRecord(f"{name}: expected an object with 'image_id' and 'caption'")
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip() or "<image>" in caption:
        raise BadRecord(f"{name}: 'caption' must be a text that is not empty and holds no <image>")
    return [[existing(folder / f"{record['image_id']}.jpg", name)]], [("<image>", caption)]


MARKUP = re.compile(r"</?\w+[^<>]*>")
SIGNS = set(".,;:!?'\"()%$€&/+°-–—‘’“”…。！？，、")                # that mean something beside letters and digits
SENTENCE = re.compile(r".+?(?:[.!?][\"')’”]*(?=\s|$)|[。！？]|$)", re.DOTALL)
FINISHED = re.compile(r"[.!?。！？][\"')’”]*$")
WORD = re.compile(r"[㐀-鿿]|[^\W㐀-鿿]+")                        # a Chinese character is a word


def clean_caption(caption: str, min_words: int) -> str:
    """A caption fit to be imitated, or "" where it cannot be mended: without meaningless signs, sentences said before
    and a last sentence that does not end; "" if fewer than min_words words are left.

    "A dog runs. ### A dog runs. It is brown!!! The gras" becomes "A dog runs. It is brown!".
    Source: arXiv 2304.10592, section 3.2. Differs: rules alone, nothing is asked of ChatGPT.
    """
    text = "".join(sign for sign in MARKUP.sub(" ", caption)
                   if sign.isspace() or sign in SIGNS or unicodedata.category(sign)[0] in "LMN")
    text = re.sub(r"([^\w\s])\1+", r"\1", re.sub(r"\.{2,}", "…", text))          # "!!!" says no more than "!"
    kept, said = [], set()
    for sentence in SENTENCE.findall(text):
        words = tuple(WORD.findall(sentence.lower()))
        if words and (words not in said or len(words) == 1):  # "Mr." and the like may come again
            kept.append(" ".join(sentence.split()))
        said.add(words)
    if kept and not FINISHED.search(kept[-1]):
        kept.pop()
    text = " ".join(kept)
    return text if len(WORD.findall(text)) >= min_words else ""


def read_image(path: str | Path, name: str = "") -> Image.Image:
    """The picture as RGB. Raises BadRecord when it is missing or broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRecord(f"{name + ': ' if name else ''}cannot read image {path} ({error})") from error


class Conversations(Dataset):
    """Pictures and text of your own, in one of two layouts.

    LLaVA JSON: [{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}]. "image" is a file
    name, a list of them, or absent; a list in that list holds the frames of a clip. "<image>" stands anywhere in
    the questions, once for each image or clip. Pictures are read when they are needed, from `folder`, by default
    images/ beside the JSON or else its own folder.

    MiniGPT-4's `cc_sbu_align`, a folder: filter_cap.json, {"annotations": [{"image_id", "caption"}]}, and
    image/<image_id>.jpg. For "instruct" its captions are cleaned, see `clean_caption`, and answer an instruction
    drawn at random; `cleaned` counts those "kept" as they were, "mended" and "dropped".

    task "read" leaves the pictures out; "see" keeps only records with one.
    skip_bad: leave records out that cannot be used, listing why in `skipped`, instead of raising BadRecord.
    Raises FileNotFoundError, or ValueError naming the file, and the record where there is one.
    """

    def __init__(self, path: str | Path, folder: str | Path | None = None, skip_bad: bool = False,
                 min_words: int = 5):
        path = Path(path)
        path = path / "filter_cap.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no data file {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        self.captions = isinstance(content, dict) and "annotations" in content
        records, parse = (content["annotations"], parse_caption) if self.captions else (content, parse_record)
        if not isinstance(records, list) or not records:
            raise ValueError(f"{path}: expected a list of at least one record")
        beside = path.parent / ("image" if self.captions else "images")
        folder = Path(folder or (beside if beside.is_dir() else path.parent))
        self.task, self.min_words, self.cleaned = "", min_words, Counter()
        self.records, self.skipped = [], []
        for i, record in enumerate(records):
            ids = [record[key] for key in ("id", "image_id") if key in record] if isinstance(record, dict) else []
            name = f"{path} record {i}" + (f" (id {ids[0]})" if ids else "")
            try:
                images, turns = parse(record, folder, name)
                for frame in sum(images, []) if skip_bad else []:
                    read_image(frame, name)                   # broken ones must be known before training
                self.records.append((images, turns, name))
            except BadRecord as error:
                if not skip_bad:
                    raise
                self.skipped.append(str(error))
        if not self.records:
            raise ValueError(f"{path}: all {len(records)} records were skipped, the first: {self.skipped[0]}")

    def split(self, every: int) -> "Conversations":
        """Take each every-th record out of this one and return them (at least one, never all)."""
        held_out = copy.copy(self)
        held_out.records = self.records[::every]
        self.records = [record for i, record in enumerate(self.records) if i % every]
        if not self.records:
            raise ValueError("one record is too little to train on and to measure: give a second file")
        return held_out

    def for_task(self, task: str) -> "Conversations":
        """The same records as another task wants them; nothing is read again."""
        other = copy.copy(self)
        other.task = task
        if task == "see":
            other.records = [record for record in self.records if record[0]]
        if task == "instruct" and self.captions:
            other.records, other.cleaned = [], Counter(kept=0, mended=0, dropped=0)
            for images, [(_, caption)], name in self.records:
                clean = clean_caption(caption, self.min_words)
                other.cleaned["dropped" if not clean else "kept" if clean == caption else "mended"] += 1
                if clean:
                    instruction = random.Random(name).choice(DESCRIBE)
                    other.records.append((images, [(f"<image> {instruction}", clean)], name))
            if not other.records:
                raise ValueError(f"none of {len(self.records)} captions, the first of them {self.records[0][2]}, is left "
                                 f"after cleaning: they need at least {self.min_words} words in whole sentences")
        return other

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Sample:
        images, turns, name = self.records[i]
        if self.task == "read":
            return Sample([], [(question.replace("<image>", " "), answer) for question, answer in turns], name=name)
        return Sample([read_image(frame, name) for clip in images for frame in clip], turns, name=name,
                      frames=tuple(map(len, images)))


# ---- From a sample to ids and labels --------------------------------------------------------------

NOT_LEARNED = -100                                            # the label that cross-entropy skips


def corpus(samples: Dataset, at_most: int = 5000) -> list[str]:
    """The words of the first samples, to train a tokenizer on."""
    return [" ".join(f" {question.replace('<image>', ' ')} {answer}" for question, answer in samples[i].turns)
            for i in range(min(len(samples), at_most))]


def encode_turns(tokenizer: Tokenizer, turns: list[tuple[str, str | None]], n_rows: int, max_len: int,
                 name: str = "sample", frames: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
    """A conversation as (ids, labels), in MiniGPT-4's template (arXiv 2304.10592, section 3.2):

        <s>###Human: <Img>(n_rows placeholders)</Img> What color is the circle?###Assistant: red###

    Labels are the ids on each answer and the ### that ends it, and -100 everywhere else. An answer of None
    ends the ids where the model is to go on. What is longer than max_len is cut at the end. The k-th "<image>"
    gets n_rows placeholders, a clip of frames[k] frames so many times n_rows.
    Raises ValueError when the cut would take image rows or leave nothing to learn.
    """
    ids, labels = [START], [NOT_LEARNED]
    lengths = iter(frames or [1] * sum(question.count("<image>") for question, _ in turns))

    def add(tokens: list[int], learned: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learned else [NOT_LEARNED] * len(tokens))

    for turn, (question, answer) in enumerate(turns):
        add([END, HUMAN] if turn == 0 else [HUMAN])
        for i, text in enumerate(question.split("<image>")):
            if i:
                add([IMAGE_OPEN] + [IMAGE] * (n_rows * next(lengths)) + [IMAGE_CLOSE])
            if text.strip():
                add(tokenizer.encode(" " + text.strip()))
        add([END, ASSISTANT])
        if answer is not None:
            add(tokenizer.encode(" " + answer.strip()) + [END], learned=True)
    if IMAGE in ids[max_len:]:
        raise ValueError(f"{name}: {len(ids)} tokens are cut at max_len {max_len} in front of an image; "
                         "raise max_len or shorten the text")
    if turns[-1][1] is not None and all(label == NOT_LEARNED for label in labels[:max_len]):
        raise ValueError(f"{name}: no answer is left to learn within max_len {max_len} of {len(ids)} tokens")
    return ids[:max_len], labels[:max_len]


def to_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture of any size and mode -> (3, height, width) float32 in [-1, 1], squashed to size."""
    height, width = size
    image = image.convert("RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@dataclass(frozen=True)
class Collate:
    """Samples -> one batch of tensors, padded on the right."""
    tokenizer: Tokenizer
    n_rows: int
    image_size: tuple[int, int]                               # height, width
    max_len: int

    def images(self, samples: list[Sample]) -> Tensor:
        """All images of all samples, in order: (N, 3, height, width)."""
        pixels = [to_pixels(image, self.image_size) for sample in samples for image in sample.images]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, *self.image_size)

    def conversations(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"input_ids" (B, T), "images" (N, 3, height, width), "labels" (B, T)} for `MLLM.forward`."""
        encoded = [encode_turns(self.tokenizer, sample.turns, self.n_rows, self.max_len, sample.name,
                                sample.frames) for sample in samples]
        ids, labels = ([torch.tensor(row) for row in rows] for rows in zip(*encoded))
        return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
                "images": self.images(samples),
                "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNED)}

    def pairs(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"images" (B, 3, height, width), "text" (B, T)}: each first image and what is said about it, for the
        Q-Former's losses. Text is <s>, the words, ###."""
        texts = [" ".join(f"{question.replace('<image>', ' ').strip()} {answer}".strip()
                          for question, answer in sample.turns) for sample in samples]
        ids = [torch.tensor([START] + self.tokenizer.encode(" " + text)[:self.max_len - 2] + [END])
               for text in texts]
        images = [to_pixels(sample.images[0], self.image_size) for sample in samples]
        return {"images": torch.stack(images), "text": pad_sequence(ids, batch_first=True, padding_value=PAD)}


# ---- Pictures for people --------------------------------------------------------------------------

def contact_sheet(pictures: list[Image.Image], texts: list[str], columns: int = 4,
                  side: int = 256) -> Image.Image:
    """Pictures in rows, each as wide as `side` pixels with its text wrapped under it."""
    font = ImageFont.load_default(13)
    texts = ["\n".join(textwrap.fill(line, side // 7) for line in text.split("\n")) for text in texts]
    pictures = [picture.resize((side, round(side * picture.height / picture.width)),
                               Image.Resampling.NEAREST) for picture in pictures]
    tallest = max(picture.height for picture in pictures)
    box_width = side + 16
    box_height = tallest + 12 + 19 * max(text.count("\n") + 1 for text in texts)
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * box_width, rows * box_height), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts)):
        x, y = i % columns * box_width + 8, i // columns * box_height + 6
        sheet.paste(picture, (x, y))
        canvas.multiline_text((x, y + tallest + 3), text, "black", font, spacing=4)
    return sheet


def main() -> None:
    spec = SceneSpec()
    scenes = Scenes(spec, "instruct", 12)
    samples = [scenes[i] for i in range(len(scenes))]
    contact_sheet([sample.images[0] for sample in samples],
                  [describe(scenes.things(i)[0]) for i in range(len(scenes))]).save("scenes.png")
    tokenizer = Tokenizer.train(corpus(Scenes(spec, "read", 500)), 1024)
    ids, labels = encode_turns(tokenizer, samples[0].turns, n_rows=4, max_len=512)
    print("scenes.png written. The first picture as a training sample (4 image rows; position, token, use):")
    for position, (token, label) in enumerate(zip(ids, labels)):
        use = "image" if token == IMAGE else "context" if label == NOT_LEARNED else "trained"
        print(f"{position:4d}  {tokenizer.decode([token])!r:16} {use}")


if __name__ == "__main__":
    main()
