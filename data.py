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
import csv
import functools
import heapq
import json
import math
import os
import random
import re
import sys
import textwrap
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    never yields a special id, so text cannot fake an image or the end of an answer. `load` also reads the tokenizers
    of published models, whose ids are their own.
    Source: arXiv 1508.07909, section 3.2, on bytes as in GPT-2.
    """

    def __init__(self, merges: list[tuple[int, int]]):
        self.merges = [tuple(pair) for pair in merges]
        self.merge = {pair: (rank, len(SPECIALS) + 256 + rank) for rank, pair in enumerate(self.merges)}
        self.bytes = [name.encode() for name in SPECIALS] + [bytes([value]) for value in range(256)]
        for left, right in self.merges:
            self.bytes.append(self.bytes[left] + self.bytes[right])
        self.published = None                                 # see `PublishedText`
        self.cache: dict[str, list[int]] = {}
        # What the prompt template and the Q-Former's losses put around the text.
        self.pad, self.image, self.summary, self.dec, self.end = PAD, IMAGE, START, DECODE, END
        self.start, self.human, self.assistant = [START], [END, HUMAN], [END, ASSISTANT]
        self.image_open, self.image_close, self.space = [IMAGE_OPEN], [IMAGE_CLOSE], " "

    @property
    def vocab_size(self) -> int:
        """How many ids there are, with those that stand for no text."""
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

    def encode(self, text: str, plain: bool = False) -> list[int]:
        """The ids of text; "" gives []. plain: special tokens of a published vocabulary that stand in the text are
        read letter by letter too."""
        words = self.published(text, plain) if self.published else PIECES.findall(text)
        ids = []
        for word in words:
            ids += [word] if isinstance(word, int) else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word not in self.cache:
            if len(self.cache) >= 100_000:
                self.cache.clear()
            ids = self._join(self.published.symbols(word) if self.published else self._bytes_to_ids(word))
            if len(word) > 64:                                # to LLaMA a whole text is one word
                return ids
            self.cache[word] = ids
        return self.cache[word]

    def _join(self, ids: list[int]) -> list[int]:
        """Merge neighbours until no merge is left: the earliest learned first, of equal ones the leftmost."""
        after = [*range(1, len(ids)), None]                   # a linked list: merging takes the right one out
        before = [None, *range(len(ids) - 1)]
        waiting = []

        def propose(left: int | None) -> None:
            if left is not None and after[left] is not None:
                pair = ids[left], ids[after[left]]
                if pair in self.merge:
                    heapq.heappush(waiting, (self.merge[pair][0], left, pair))

        for left in range(len(ids)):
            propose(left)
        while waiting:
            _, left, pair = heapq.heappop(waiting)
            right = after[left] if ids[left] is not None else None
            if right is None or (ids[left], ids[right]) != pair:
                continue                                      # one of the two has been merged meanwhile
            ids[left], ids[right], after[left] = self.merge[pair][1], None, after[right]
            if after[left] is not None:
                before[after[left]] = left
            propose(before[left])
            propose(left)
        return [token for token in ids if token is not None]

    def decode(self, ids) -> str:
        """The text of ids (ints). Special tokens read as their names, broken UTF-8 as U+FFFD, unknown ids as ""."""
        data = b"".join(self.bytes[int(token)] for token in ids if int(token) < len(self.bytes))
        data = data.removeprefix(b" ") if not self.space else data
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        content = self.published.content if self.published else {"specials": SPECIALS, "merges": self.merges}
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read what `save` wrote, or the `tokenizer.json` of a published model, whose start and end symbols
        `tokenizer_config.json` beside it names. Raises ValueError when the file is no such tokenizer."""
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if "model" in content:
                beside = path.with_name("tokenizer_config.json")
                names = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else content
                return published_tokenizer(content | {key: names.get(key) for key in ("bos_token", "eos_token")})
            if tuple(content["specials"]) != SPECIALS:
                raise ValueError(f"special tokens {content['specials']} are not {list(SPECIALS)}")
            return cls(content["merges"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, re.error) as error:
            raise ValueError(f"{path}: not a tokenizer that can be read here ({error})") from error


# ---- Tokenizers published by others: the same merges, other ways of cutting text into words -----------

@functools.cache
def unicode_class(category: str) -> str:
    """All characters of a Unicode category ("L": letters, "N": numbers), to stand in a regex's brackets."""
    inside = [unicodedata.category(chr(code)).startswith(category) for code in range(sys.maxunicode + 1)] + [False]
    edges = [code for code in range(len(inside)) if inside[code] != (code > 0 and inside[code - 1])]
    return "".join(f"\\U{start:08x}-\\U{stop - 1:08x}" for start, stop in zip(edges[::2], edges[1::2]))


# White space to Unicode. To Python's \s the separators U+001C to U+001F are white space too.
SPACE = "\\t-\\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def to_python(pattern: str) -> re.Pattern:
    """A regex as tokenizer.json has it: with \\p{L}, which Python lacks, and with Unicode's white space."""
    out, in_brackets = "", False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if re.match(r"\\[pPX]", part) and not re.fullmatch(r"\\p\{[LMNPSZC][a-z]?\}", part):
            raise ValueError(f"{part} in a pattern is not known here")
        if part.startswith("\\p") or part == r"\s":
            part = unicode_class(part[3:-1]) if part != r"\s" else SPACE
            part = part if in_brackets else f"[{part}]"
        elif part == r"\S":
            part = f"[^{SPACE}]"
        in_brackets = part == "[" or in_brackets and part != "]"
        out += part
    return re.compile(out)


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's vocabulary writes as they are
UNSEEN = [value for value in range(256) if value not in SEEN]
LETTERS = [chr(value if value in SEEN else 256 + UNSEEN.index(value)) for value in range(256)]    # byte -> character
BYTES = {letter: value for value, letter in enumerate(LETTERS)}
WORDY = r"[\w\p{M}\u200c\u200d]"                              # what makes a word, to Rust


def cut(pattern: re.Pattern, text: str) -> list[str]:
    """Text as the matches of a pattern and what lies between them."""
    edges = sorted({0, len(text), *(edge for match in pattern.finditer(text) for edge in match.span())})
    return [text[start:stop] for start, stop in zip(edges, edges[1:])]


def steps(part: dict | None) -> list[dict]:
    """A normalizer or pre-tokenizer of tokenizer.json as a list of the steps that it consists of."""
    if part is None or part["type"] != "Sequence":
        return [part] if part else []
    return [step for inner in part.get("normalizers", part.get("pretokenizers")) for step in steps(inner)]


class PublishedText:
    """How a `tokenizer.json` (the `tokenizers` library's format) takes text apart: added tokens, then normal forms,
    then words, then the symbols that merges start from.

    content: what the file holds. Read are byte-level BPE (GPT-2, SmolLM2, Qwen2, Llama 3) and SentencePiece-like BPE
    with byte fallback (LLaMA). Raises ValueError naming a step that is not known here.
    """

    KNOWN = ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "ByteLevel", "Digits", "Metaspace", "Split")

    def __init__(self, content: dict):
        self.content, model = content, content["model"]
        self.normalizers, self.pre_tokenizers = steps(content.get("normalizer")), steps(content.get("pre_tokenizer"))
        for step in self.normalizers + self.pre_tokenizers:
            if step["type"] not in self.KNOWN or step.get("invert") or step.get("behavior", "Isolated") != "Isolated":
                raise ValueError(f"the step {step} is not known here")
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model.get("type", "BPE") != "BPE" or affixes:
            raise ValueError("of models only BPE without prefixes and suffixes is known here")
        self.vocab, self.unknown = model["vocab"], model["vocab"].get(model.get("unk_token"))
        self.byte_fallback, self.fuse = model.get("byte_fallback"), model.get("fuse_unk")
        self.whole_words = model.get("ignore_merges")
        self.added = {token["content"]: token for token in content.get("added_tokens", []) if token["content"]}

    def __call__(self, text: str, plain: bool = False) -> list[int | str]:
        """Text -> the ids of added tokens and, between them, words. plain: special ones are not looked for."""
        parts = []
        for part in self.take_added(text, False, plain):
            parts += [part] if isinstance(part, int) else self.take_added(self.normalize(part), True, plain)
        words = []
        for i, part in enumerate(parts):
            words += [part] if isinstance(part, int) else self.words(part, is_first=i == 0)
        return words

    def take_added(self, text: str, normalized: bool, plain: bool) -> list[int | str]:
        """Cut text at added tokens, the leftmost and longest first; lstrip and rstrip take white space along."""
        tokens = {self.normalize(name) if normalized else name: token for name, token in self.added.items()
                  if bool(token.get("normalized")) == normalized and not (plain and token.get("special"))}
        if not tokens:
            return [text] if text else []
        parts, done = [], 0
        for match in re.finditer("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), text):
            token, (start, stop) = tokens[match[0]], match.span()
            around = text[max(0, start - 1):start] + text[stop:stop + 1]
            if token.get("single_word") and to_python(WORDY).search(around):
                continue
            if token.get("lstrip"):
                start = max(done, len(re.sub(rf"[{SPACE}]+\Z", "", text[:start])))
            if token.get("rstrip"):
                stop += re.match(f"[{SPACE}]*", text[stop:]).end()
            parts += [text[done:start], token["id"]]
            done = stop
        return [part for part in (*parts, text[done:]) if part != ""]

    def normalize(self, text: str) -> str:
        for step in self.normalizers:
            if step["type"] == "Prepend":
                text = step["prepend"] + text
            elif step["type"] == "Replace":
                text = self.pattern(step).sub(lambda _: step["content"], text)
            else:
                text = unicodedata.normalize(step["type"], text)
        return text

    @staticmethod
    def pattern(step: dict) -> re.Pattern:
        return to_python(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))

    def words(self, text: str, is_first: bool) -> list[str]:
        """Normal text -> words. is_first: no added token stands before it."""
        words = [text]
        for step in self.pre_tokenizers:
            words = [part for i, word in enumerate(words) for part in self.split(step, word, is_first and i == 0)]
        return words

    def split(self, step: dict, text: str, is_first: bool) -> list[str]:
        if step["type"] == "Split":
            return cut(self.pattern(step), text)
        if step["type"] == "Digits":
            return cut(to_python(r"\p{N}" if step["individual_digits"] else r"\p{N}+"), text)
        if step["type"] == "ByteLevel":
            text = " " + text if step["add_prefix_space"] and not text.startswith(" ") else text
            words = cut(to_python(GPT2_WORDS), text) if step.get("use_regex", True) else [text]
            return ["".join(LETTERS[byte] for byte in word.encode("utf-8", "surrogatepass")) for word in words]
        mark = step["replacement"]                            # Metaspace: a mark where a word begins
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        text = text.replace(" ", mark)
        if (scheme == "always" or scheme == "first" and is_first) and not text.startswith(mark):
            text = mark + text
        return re.findall(f"{mark}[^{mark}]*|[^{mark}]+", text) if step.get("split", True) else [text]

    def symbols(self, word: str) -> list[int]:
        """The ids that merging starts from: those of the characters, else of their bytes, else the unknown one."""
        if self.whole_words and word in self.vocab:
            return [self.vocab[word]]
        ids = []
        for character in word:
            if character in self.vocab:
                ids.append(self.vocab[character])
                continue
            fallback = [self.vocab.get(f"<0x{byte:02X}>") for byte in character.encode("utf-8", "surrogatepass")]
            if self.byte_fallback and None not in fallback:
                ids += fallback
            elif self.unknown is not None and not (self.fuse and ids[-1:] == [self.unknown]):
                ids.append(self.unknown)
        return ids


def published_tokenizer(content: dict) -> Tokenizer:
    """A tokenizer from the content of tokenizer.json and tokenizer_config.json."""
    tokenizer, text = Tokenizer([]), PublishedText(content)
    tokenizer.published = text
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
    ids = text.vocab
    tokenizer.merge = {(ids[a], ids[b]): (rank, ids[a + b]) for rank, (a, b) in enumerate(pairs)}
    is_byte_level = any(step["type"] == "ByteLevel" for step in text.pre_tokenizers)
    names = text.vocab | {name: token["id"] for name, token in text.added.items()}
    if not all(type(token) is int and 0 <= token < 2**24 for token in names.values()):
        raise ValueError("an id is not a number from 0 to 2^24")
    tokenizer.bytes = [b""] * (max(names.values()) + 1)
    for name, token in names.items():
        if is_byte_level and name not in text.added and BYTES.keys() >= set(name):
            tokenizer.bytes[token] = bytes(BYTES[letter] for letter in name)
        elif text.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", name):
            tokenizer.bytes[token] = bytes([int(name[3:5], 16)])
        else:
            tokenizer.bytes[token] = name.replace("\u2581", " ").encode("utf-8", "surrogatepass")
    # The template in its own words and symbols. What is not text gets ids that no text has.
    n = len(tokenizer.bytes)
    tokenizer.bytes += [b"<pad>", b"<ImageHere>", b"<summary>", b"<dec>"]
    tokenizer.pad, tokenizer.image, tokenizer.summary, tokenizer.dec = range(n, n + 4)
    start, tokenizer.end = (names.get(name["content"] if isinstance(name, dict) else name)
                            for name in (content.get("bos_token"), content.get("eos_token")))
    tokenizer.start = [] if start is None else [start]
    tokenizer.space = "" if text.words(text.normalize("a"), True)[:1] == ["\u2581a"] else " "
    tokenizer.human, tokenizer.assistant, tokenizer.image_open, tokenizer.image_close = (
        tokenizer.encode(words, plain=True)
        for words in ("###Human:", "###Assistant:", tokenizer.space + "<Img>", "</Img>"))
    return tokenizer


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

    @functools.cached_property
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
CAPTION = ("Describe the picture in one sentence.", "What does the picture show, in short?", "Give a short caption.")


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
    images: list[Image.Image | Tensor]                        # a tensor: what a frozen ViT and Q-Former made of it
    turns: list[tuple[str, str]]
    kind: str = "answer"                                      # groups the answers in an evaluation
    name: str = "sample"                                      # for error messages
    frames: tuple[int, ...] = ()                              # none: one image each
    references: tuple[str, ...] = ()                          # all right answers, where there are several


class Scenes(Dataset):
    """Endless scenes: number i is always the same picture and text for the same spec, split and task.

    split: "train", "test" (other pictures of the same pairs) or "unseen" (a held-out pair in each, and asked
    for). task: what the text beside the picture is, see `TASKS`.
    """

    TASKS = ("read", "see", "align", "instruct", "question", "describe")

    def __init__(self, spec: SceneSpec, task: str, n: int, split: str = "train", seed: int = 0,
                 n_turns: int = 6):
        assert task in self.TASKS and split in ("train", "test", "unseen"), (task, split)
        self.spec, self.task, self.n, self.split, self.seed = spec, task, n, split, seed
        self.n_turns = n_turns

    def __len__(self) -> int:
        return self.n

    def things(self, i: int) -> tuple[list[Thing], random.Random]:
        """What is in scene i, and the generator that decides how it is drawn."""
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

    def said(self, i: int, things: list[Thing]) -> tuple[str, list[tuple[str, str]]]:
        """The kind of text that scene i comes with, and its turns."""
        rng = random.Random(f"{self.seed} {self.split} {i} text")
        if self.task == "question":
            kind, question, answer = ask_any(things, self.spec, rng, self.split == "unseen")
            return kind, [("<image> " + question, answer)]
        if self.task in ("read", "instruct"):
            return self.task, self.conversation(things, rng)
        question = "<image> " + DESCRIBE[0] if self.task == "describe" else "<image>"
        return self.task, [(question, caption(things, rng) if self.task == "align" else describe(things))]

    def length(self, i: int) -> int:
        """How long the text of scene i is, in characters."""
        return sum(len(text) for turn in self.said(i, self.things(i)[0])[1] for text in turn)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < self.n:
            raise IndexError(f"scene {i} of {self.n}")
        things, rng = self.things(i)
        kind, turns = self.said(i, things)
        images = [] if self.task == "read" else [draw(things, self.spec.image_size, rng)]
        return Sample(images, turns, kind, f"scene {i}")


# ---- Conversations: your own data -----------------------------------------------------------------

class BadRecord(ValueError):
    """A record that cannot be trained on; the message names the file and the record."""


def existing(folder: Path, file: str, name: str) -> Path:
    """The path of a file that lies in a folder, also after links are followed. Raises BadRecord."""
    path = folder / file
    if not os.path.isfile(path):                              # False, too, for names no file can have
        raise BadRecord(f"{name}: no image file {path}")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise BadRecord(f"{name}: {file!r} leaves the folder {folder}")
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
    return [[existing(folder, frame, name) for frame in clip] for clip in clips], turns


def parse_caption(record, folder: Path, name: str) -> tuple[list[list[Path]], list[tuple[str, str]]]:
    """An image and its captions -> the path of the image, and each caption as a turn. Raises BadRecord."""
    if not isinstance(record, dict) or not isinstance(record.get("image_id"), (str, int)):
        raise BadRecord(f"{name}: expected an object with 'image_id' and 'caption'")
    captions = record.get("captions", [record.get("caption")])
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip() or "<image>" in caption:
            raise BadRecord(f"{name}: 'caption' must be a text that is not empty and holds no <image>")
    file = record["image_id"] if "captions" in record else f"{record['image_id']}.jpg"
    return [[existing(folder, file, name)]], [("<image>", caption) for caption in captions]


def read_captions(text: str) -> list[dict]:
    """Lines `file<TAB>caption`, or `file,caption` under a headline, several for an image -> one record an image.
    An end like "#3" of the file's name, the number of the caption, is dropped."""
    lines = [line for line in text.split("\n") if line.strip()]
    rows = (line.split("\t", 1) for line in lines)
    if "\t" not in "".join(lines[:1]):
        rows = csv.reader(lines["".join(lines[:1]).strip() == "image,caption":], strict=True)
    captions = defaultdict(list)
    for file, *caption in rows:
        captions[re.sub(r"#\d+$", "", file.strip())].append(",".join(caption).strip())
    return [{"image_id": file, "captions": texts} for file, texts in captions.items()]


def read_records(path: Path) -> tuple[list, str]:
    """The records of a file of one's own, not yet looked into, and its layout: "conversations", "annotations" or
    "captions". Raises ValueError naming the file, and the line if it has one record a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".txt", ".tsv"):
            return read_captions(text), "captions"
        if path.suffix == ".jsonl":
            content = []
            for number, line in enumerate(text.split("\n"), 1):
                content += [json.loads(line)] if line.strip() else []
        else:
            content = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        where = f" line {number}" if path.suffix == ".jsonl" and isinstance(error, json.JSONDecodeError) else ""
        kind = "text" if path.suffix in (".txt", ".tsv") else "JSON"
        raise ValueError(f"{path}{where}: not {kind} ({error})") from error
    if isinstance(content, dict) and "annotations" in content:
        return content["annotations"], "annotations"
    return content, "conversations"


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB, 8 bits a channel: more bits scaled down, what is transparent shown on white."""
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        highest = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
        highest = 1 if image.mode == "F" and values.max() <= 1 else highest
        image = Image.fromarray((values.clip(0, highest) * (255 / highest)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


Image.init()
FORMATS = [name for name in Image.OPEN if name != "EPS"]      # a program, which Pillow would have Ghostscript run


def read_image(path: str | Path, name: str = "") -> Image.Image:
    """The picture as RGB, turned as its EXIF data say. Raises BadRecord when it is missing, broken or larger than
    Pillow's limit for what is no attack (89 million pixels)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:                                # Pillow's readers raise many kinds
        raise BadRecord(f"{name + ': ' if name else ''}cannot read image {path} ({error})") from error


class Conversations(Dataset):
    """Pictures and text of your own, in one of three layouts.

    LLaVA JSON: [{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}], or JSONL, a record a
    line. "image" is a file name, a list of them, or absent; a list in that list holds the frames of a clip. "<image>"
    stands anywhere in the questions, once for each image or clip. Pictures are read when they are needed, from
    `folder`, by default images/ beside the file or else its own folder.

    MiniGPT-4's `cc_sbu_align`, a folder: filter_cap.json, {"annotations": [{"image_id", "caption"}]}, and
    image/<image_id>.jpg. For "instruct" its captions are cleaned, see `clean_caption`, and answer an instruction
    drawn at random; `cleaned` counts those "kept" as they were, "mended" and "dropped".

    Captions, a folder as of Flickr8k: captions.txt or captions.tsv, see `read_captions`, and the pictures in
    Images/, images/ or image/ or beside it. Each caption is a sample, but all of a picture are on one side of `split`,
    and for "test" they are the right answers (`references`) to one question.

    task "read" leaves the pictures out; "see" keeps only records with one.
    skip_bad: leave records out that cannot be used, listing why in `skipped`, instead of raising BadRecord.
    Raises FileNotFoundError, or ValueError naming the file, and the record where there is one.
    """

    def __init__(self, path: str | Path, folder: str | Path | None = None, skip_bad: bool = False,
                 min_words: int = 5):
        path = Path(path)
        if path.is_dir():
            files = [path / name for name in ("filter_cap.json", "captions.txt", "captions.tsv")]
            path = next((file for file in files if file.is_file()), path)
        if not path.is_file():
            raise FileNotFoundError(f"no data file {path}" if not path.is_dir() else
                                    f"{path}: a folder needs filter_cap.json, captions.txt or captions.tsv")
        records, self.layout = read_records(path)
        parse = parse_record if self.layout == "conversations" else parse_caption
        if not isinstance(records, list) or not records:
            raise ValueError(f"{path}: expected a list of at least one record")
        beside = [path.parent / name for name in ("images", "image", "Images") if (path.parent / name).is_dir()]
        folder = Path(folder or (beside[0] if beside else path.parent))
        self.task, self.min_words, self.cleaned = "", min_words, Counter()
        self.seen: dict[Path, Tensor] = {}                    # stand for the pictures of these files
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
        if self.layout == "annotations" and task in ("instruct", "test"):
            other.clean()
        if self.layout == "captions" and task != "test":      # each caption is a sample
            other.records = [(images, [turn], name) for images, turns, name in self.records for turn in turns]
        if self.layout != "conversations" and task in ("instruct", "test"):
            instructions = DESCRIBE if self.layout == "annotations" else CAPTION
            other.records = [(images, [(f"<image> {random.Random(name).choice(instructions)}", text)
                                       for _, text in turns], name) for images, turns, name in other.records]
        return other

    def clean(self) -> None:
        """Mend or drop captions that are not fit to be imitated, and count them."""
        records, self.records, self.cleaned = self.records, [], Counter(kept=0, mended=0, dropped=0)
        for images, [(_, caption)], name in records:
            clean = clean_caption(caption, self.min_words)
            self.cleaned["dropped" if not clean else "kept" if clean == caption else "mended"] += 1
            if clean:
                self.records.append((images, [("<image>", clean)], name))
        if not self.records:
            raise ValueError(f"none of {len(records)} captions, the first of them {records[0][2]}, is left "
                             f"after cleaning: they need at least {self.min_words} words in whole sentences")

    def __len__(self) -> int:
        return len(self.records)

    def length(self, i: int) -> int:
        """How long the text of record i is, in characters."""
        return sum(len(text) for turn in self.records[i][1] for text in turn)

    def __getitem__(self, i: int) -> Sample:
        images, turns, name = self.records[i]
        if self.task == "read":
            return Sample([], [(question.replace("<image>", " "), answer) for question, answer in turns], name=name)
        pictures, references = [self.seen[frame] if frame in self.seen else read_image(frame, name)
                                for clip in images for frame in clip], ()
        if self.layout == "captions" and self.task == "test":
            turns, references = turns[:1], tuple(answer for _, answer in turns)
        return Sample(pictures, turns, name=name, frames=tuple(map(len, images)), references=references)


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
    ends the ids where the model is to go on. Published vocabularies write the marks in their own words, and end an
    answer with their own end symbol. What is longer than max_len is cut at the end. The k-th "<image>"
    gets n_rows placeholders, a clip of frames[k] frames so many times n_rows.
    Raises ValueError when the cut would take image rows or leave nothing to learn.
    """
    ids, labels = [], []
    lengths = iter(frames or [1] * sum(question.count("<image>") for question, _ in turns))

    def add(tokens: list[int], learned: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learned else [NOT_LEARNED] * len(tokens))

    def add_text(text: str, end: list[int] = [], learned: bool = False) -> None:
        add(tokenizer.encode(tokenizer.space + text.strip(), plain=True) + end, learned)

    add(tokenizer.start)
    for question, answer in turns:
        ended = ids[-1:] == tokenizer.human[:1]               # ### ends an answer and begins the next turn in one
        add(tokenizer.human[ended:])
        for i, text in enumerate(question.split("<image>")):
            if i:
                add(tokenizer.image_open + [tokenizer.image] * (n_rows * next(lengths)) + tokenizer.image_close)
            if text.strip():
                add_text(text)
        add(tokenizer.assistant)
        if answer is not None:
            add_text(answer, [tokenizer.end], learned=True)
    if tokenizer.image in ids[max_len:]:
        raise ValueError(f"{name}: {len(ids)} tokens are cut at max_len {max_len} in front of an image; "
                         "raise max_len or shorten the text")
    if turns[-1][1] is not None and all(label == NOT_LEARNED for label in labels[:max_len]):
        raise ValueError(f"{name}: no answer is left to learn within max_len {max_len} of {len(ids)} tokens")
    return ids[:max_len], labels[:max_len]


HALF = (0.5, 0.5, 0.5)


def to_pixels(image: Image.Image, size: tuple[int, int], fit: str = "squash", mean: tuple[float, ...] = HALF,
              std: tuple[float, ...] = HALF) -> Tensor:
    """A picture -> (3, height, width) float32, (value - mean) / std of values in [0, 1]; by default in [-1, 1].

    fit: "squash" changes the picture's shape to that of size; "pad" keeps it, between bars of the mean colour.
    """
    height, width = size
    image = image.convert("RGB")
    if fit == "pad":
        bars = tuple(round(255 * value) for value in mean)
        image = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, bars)
    elif image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255                            # (height, width, 3)
    pixels = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class Collate:
    """Samples -> one batch of tensors, padded on the right."""
    tokenizer: Tokenizer
    n_rows: int
    image_size: tuple[int, int]                               # height, width
    max_len: int
    fit: str = "squash"                                       # this and the next two: see `to_pixels`
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def images(self, samples: list[Sample]) -> Tensor:
        """All images of all samples, in order: (N, 3, height, width), or (N, Q, Dq) where they have been seen."""
        pixels = [image if isinstance(image, Tensor) else
                  to_pixels(image, self.image_size, self.fit, self.mean, self.std)
                  for sample in samples for image in sample.images]
        return torch.stack(pixels) if pixels else torch.zeros(0, 3, *self.image_size)

    def conversations(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"input_ids" (B, T), "images" (N, 3, height, width), "labels" (B, T)} for `MLLM.forward`."""
        encoded = [encode_turns(self.tokenizer, sample.turns, self.n_rows, self.max_len, sample.name,
                                sample.frames) for sample in samples]
        ids, labels = ([torch.tensor(row) for row in rows] for rows in zip(*encoded))
        return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad),
                "images": self.images(samples),
                "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNED)}

    def pairs(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"images" (B, 3, height, width), "text" (B, T), "to_generate" (B, T)}: each first image and what is said
        about it, for the Q-Former's losses. Text begins with <s>, the token that sums it up, or with <dec>, the sign
        that it is to be generated, and ends with ###."""
        mark, texts = self.tokenizer, []
        for sample in samples:
            text = " ".join(f"{question.replace('<image>', ' ').strip()} {answer}".strip()
                            for question, answer in sample.turns)
            ids = mark.encode(mark.space + text, plain=True)[:self.max_len - 2]
            texts.append(torch.tensor([mark.summary] + ids + [mark.end]))
        text = pad_sequence(texts, batch_first=True, padding_value=mark.pad)
        return {"images": self.images([replace(sample, images=sample.images[:1]) for sample in samples]), "text": text,
                "to_generate": torch.cat([torch.full_like(text[:, :1], mark.dec), text[:, 1:]], dim=1)}


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
